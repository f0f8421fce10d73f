"""Prometheus metrics under vLLM's names, so that its dashboards fit. Labels come from closed sets only."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    Summary,
    generate_latest,
)
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ...messages.errors import ModelNumericsError
from ...messages.request import FinishReason, RequestEnded
from ...messages.samples import SampleFamily
from ...messages.sampling import SamplingParams
from .choice import Choice
from .engine_metrics import LABELS, EngineCollector, ReadCounter
from .engine_protocol import EngineLike
from .service_account import OF_PROCESSES, Collected, families_of, labelled, summed

if TYPE_CHECKING:
    from ..stats import EngineStats
    from .connections import ConnectionTable
    from .sse import StreamPump

TTFT_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_BUCKETS: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY_BUCKETS: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0),
    *(30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
REFUSAL_BUCKETS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
METHODS: Final = frozenset({"GET", "HEAD", "POST", "OPTIONS"})
ERROR_CODES: Final = frozenset(
    {
        *("invalid_request", "context_length_exceeded", "queue_full", "engine_closed", "executor_lost"),
        *("request_failed", "request_quarantined", "engine_oom", "model_numerics"),
    }
)
MAX_PLAUSIBLE_S: Final = 7 * 86400.0


class _Registry(CollectorRegistry):
    """Leaves out `..._created`, the times at which series began: vLLM has none, and the switch of the library is for
    the whole process, whose other metrics are not ours."""

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class TokenHistogram(Collector):
    """A histogram that may be told of every token: a fifth of the library's cost for each observation."""

    def __init__(self, names: Sequence[tuple[str, str]], buckets: Sequence[float], labels: Sequence[str]) -> None:
        self._names = names
        self._buckets = tuple(buckets)
        self._labels = labels
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0
        # Streams that go in step observe the same value one after another: its bucket is looked for once.
        self._last_value = 0.0
        self._last_index = bisect_left(self._buckets, 0.0)

    def observe(self, value: float) -> None:
        if value != self._last_value:
            self._last_index = bisect_left(self._buckets, value)
            self._last_value = value
        self._counts[self._last_index] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        cumulative: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip((*map(str, self._buckets), "+Inf"), self._counts, strict=True):
            total += count
            cumulative.append((bound, total))
        for name, text in self._names:
            family = HistogramMetricFamily(name, text, labels=LABELS)
            family.add_metric(self._labels, cumulative, self._sum)
            yield family


class GatewayMetrics:
    """What the gateway counts; one of these for each server, with its own registry.

    Args:
        engine: asked for its own totals at every scrape.
        model_name: value of the label of that name.
        pump: asked for its open and shed streams.
        connections: asked for those that are open and were refused.
        read_num_refused: asked for requests refused because of too much work, by bound.
    """

    def __init__(
        self,
        engine: EngineLike,
        model_name: str,
        pump: StreamPump,
        connections: ConnectionTable,
        read_num_refused: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self.registry = _Registry(auto_describe=False)
        self._labels = (model_name, "0")
        self._engine = EngineCollector(engine, self._labels, pump, connections, read_num_refused)
        itl = TokenHistogram(
            (
                ("vllm:inter_token_latency_seconds", "Time between two tokens of a sequence."),
                ("vllm:time_per_output_token_seconds", "Older name of vllm:inter_token_latency_seconds."),
            ),
            ITL_BUCKETS,
            self._labels,
        )
        self.registry.register(itl)
        self.token_gap = itl.observe
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS)
        self.first_token = self._ttft.observe
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to end.", LATENCY_BUCKETS)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Arrival to first step.", LATENCY_BUCKETS)
        self._inference = self._histogram("vllm:request_inference_time_seconds", "First step to end.", LATENCY_BUCKETS)
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds", "First step to first token.", LATENCY_BUCKETS
        )
        self._decode = self._histogram("vllm:request_decode_time_seconds", "First token to end.", LATENCY_BUCKETS)
        self._tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per token after the first.", ITL_BUCKETS
        )
        tokens = token_buckets(engine.max_model_len)
        self._prompt_tokens = self._histogram("vllm:request_prompt_tokens", "Tokens of the prompt.", tokens)
        self._generation_tokens = self._histogram("vllm:request_generation_tokens", "Tokens of the answer.", tokens)
        self._longest = self._histogram(
            "vllm:request_max_num_generation_tokens", "Tokens of the longest answer to a request.", tokens
        )
        self._computed = self._histogram(
            "vllm:request_prefill_kv_computed_tokens", "Tokens of the prompt that were not in the prefix cache.", tokens
        )
        self._max_tokens = self._histogram("vllm:request_params_max_tokens", "max_tokens asked for.", tokens)
        self._n = self._histogram("vllm:request_params_n", "n asked for.", (1, 2, 5, 10, 20))
        self._preemptions = self._histogram(
            "vllm:request_num_preemptions", "Preemptions of a sequence.", (1, 2, 3, 4, 5, 10, 20)
        )
        self._count_ends()
        self._count_http()

    def _count_ends(self) -> None:
        success = Counter(
            "vllm:request_success", "Sequences that ended.", (*LABELS, "finished_reason"), registry=self.registry
        )
        reasons: tuple[FinishReason, ...] = ("stop", "length", "abort", "error", "refused")
        self._success = {reason: success.labels(*self._labels, reason) for reason in reasons}
        corrupted = Counter(
            "vllm:corrupted_requests", "Requests for which the model computed NaN.", LABELS, registry=self.registry
        )
        self._corrupted = corrupted.labels(*self._labels)
        self._failed = Counter(
            "octavo:requests_failed",
            "Requests refused or failed, by error code.",
            (*LABELS, "code"),
            registry=self.registry,
        )

    def _count_http(self) -> None:
        self._http = Counter("http_requests", "HTTP requests.", ("handler", "method", "status"), registry=self.registry)
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "Time to the end of the response.",
            ("handler", "method"),
            registry=self.registry,
        )

        self._request_size = Summary(
            "http_request_size_bytes", "Content-Length of requests.", ("handler",), registry=self.registry
        )
        self._response_size = Summary(
            "http_response_size_bytes", "Content-Length of responses.", ("handler",), registry=self.registry
        )
        self._http_series: dict[tuple[str, str, int], tuple[Counter, Histogram, Summary, Summary]] = {}
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._refusals = self._histogram(
            "octavo:refusal_seconds",
            "Arrival of a request's bytes at the socket to its refusal for lack of room.",
            REFUSAL_BUCKETS,
        )

    def tell(self, name: str, text: str, read: Callable[[], int]) -> None:
        """Tell a total that somebody else counts."""
        self.registry.register(ReadCounter(name, text, self._labels, read))

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(Collected(self._collect()))

    def render_sum(self, edge: str, others: Iterable[SampleFamily]) -> bytes:
        """The same for all edges together: this one, which has that number, and what is known of the others."""
        return generate_latest(Collected(summed(labelled(self._collect(), edge, OF_PROCESSES), others)))

    def render_alone(self, edge: str) -> bytes:
        """What one edge of several knows without the others."""
        return generate_latest(Collected(labelled(self._collect(), edge)))

    def own_families(self, edge: str, own_stats: EngineStats) -> tuple[SampleFamily, ...]:
        """What is counted in this process alone; `own_stats` has nothing that engines told."""
        metrics = itertools.chain(self._engine.collect_from(own_stats), self.registry.collect())
        return families_of(labelled(metrics, edge, OF_PROCESSES))

    def _collect(self) -> Iterator[Metric]:
        yield from self._engine.collect()
        yield from self.registry.collect()

    def submitted(self, params: SamplingParams) -> None:
        """A request was admitted."""
        self._n.observe(params.n)
        if params.max_tokens is not None:
            self._max_tokens.observe(params.max_tokens)

    def sequence_ended(
        self, choice: Choice, reason: FinishReason, ended: RequestEnded | None, *, arrival_ns: int, now_ns: int
    ) -> None:
        """A sequence had its one end.

        Args:
            ended: the engine's account of it, if there is one.
            arrival_ns: of its request, monotonic.
        """
        self._success[reason].inc()
        self._e2e.observe((now_ns - arrival_ns) * 1e-9)
        self._prompt_tokens.observe(len(choice.prompt.token_ids))
        self._generation_tokens.observe(choice.num_tokens)
        if choice.num_tokens > 1 and choice.first_token_ns:
            self._tpot.observe((choice.last_token_ns - choice.first_token_ns) * 1e-9 / (choice.num_tokens - 1))
        if choice.first_token_ns:
            self._decode.observe((now_ns - choice.first_token_ns) * 1e-9)
        if not choice.prompt.num_unfinished:
            self._longest.observe(choice.prompt.num_longest)
        if ended is None:
            return
        self._computed.observe(len(choice.prompt.token_ids) - ended.num_cached_tokens)
        self._preemptions.observe(ended.num_preemptions)
        scheduled_ns = ended.first_scheduled_ns
        # A simulated engine's clock is not ours; times across the two would be nonsense.
        if not 0 <= (scheduled_ns - arrival_ns) * 1e-9 < MAX_PLAUSIBLE_S:
            return
        self._queue.observe((scheduled_ns - arrival_ns) * 1e-9)
        self._inference.observe((now_ns - scheduled_ns) * 1e-9)
        if choice.first_token_ns:
            self._prefill.observe(max(choice.first_token_ns - scheduled_ns, 0) * 1e-9)

    def request_failed(self, ended: RequestEnded) -> None:
        """A request was refused or failed after it was submitted."""
        code = ended.error_code if ended.error_code in ERROR_CODES else "request_failed"
        self._failed.labels(*self._labels, code).inc()
        if code == ModelNumericsError.code:
            self._corrupted.inc()
        self._success["refused" if ended.reason == "refused" else "error"].inc()

    def refused(self, seconds: float) -> None:
        """A request was refused for lack of room, so long after it had come."""
        self._refusals.observe(seconds)

    def http_ended(
        self, handler: str, method: str, status: int, seconds: float, *, num_asked: int = 0, num_answered: int = 0
    ) -> None:
        """A response is over.

        Args:
            handler: a route's path or `other`.
            num_asked, num_answered: bytes that request and response announced; 0 where they come in chunks.
        """
        method = method if method in METHODS else "other"
        series = self._http_series.get((handler, method, status))
        if series is None:  # as many as there are series, whose labels are of closed sets
            series = self._http_series[handler, method, status] = (
                self._http.labels(handler, method, str(status)),
                self._http_seconds.labels(handler, method),
                self._request_size.labels(handler),
                self._response_size.labels(handler),
            )
        num, durations, request_sizes, response_sizes = series
        num.inc()
        durations.observe(seconds)
        request_sizes.observe(num_asked)
        response_sizes.observe(num_answered)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, LABELS, buckets=buckets, registry=self.registry).labels(*self._labels)


def token_buckets(max_model_len: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 ... up to the longest sequence."""
    buckets = []
    power = 1
    while power <= max_model_len:
        buckets += [digit * power for digit in (1, 2, 5) if digit * power <= max_model_len]
        power *= 10
    return tuple(buckets or [1])
