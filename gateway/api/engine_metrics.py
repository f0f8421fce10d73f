"""The engine's own account as Prometheus metrics, read at every scrape. Labels come from closed sets only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ...actors.runtime.port_record import NOT_DROPS
from ...actors.scheduler.step_sizes import BOUNDS
from .engine_protocol import EngineLike

if TYPE_CHECKING:
    from ..stats import EngineStats
    from .connections import ConnectionTable
    from .sse import StreamPump

GAUGES_OF_AN_EDGE: Final = frozenset({"octavo:open_streams", "octavo:open_connections"})
"""Those that each edge has its own of; the others are the service's, whichever edge is asked."""
LABELS: Final = ("model_name", "engine")
RESTARTING_ACTORS: Final = ("executor", "engine", "edge", "tokenizer", "detokenizer", "scheduler", "kv_allocator")
"""Values of the label `actor`; whatever else an engine may name counts as `other`."""
DROP_REASONS: Final = (
    *("late", "malformed", "multipart", "version", "refused_hello", "stale_incarnation", "repeated", "gap", "foreign"),
    *("overrun", "full", "denied_key", "handshake_failed"),
)
"""Values of the label `reason`: those counters of a `Port` that count messages thrown away, and `late` for what cores
drop; whatever else an engine may name counts as `other`."""


class EngineCollector(Collector):
    """Gauges and totals that the engine counts itself, read when they are asked for."""

    def __init__(
        self,
        engine: EngineLike,
        labels: Sequence[str],
        pump: StreamPump,
        connections: ConnectionTable,
        read_num_refused: Callable[[], Mapping[str, int]],
    ) -> None:
        self._engine = engine
        self._labels = labels
        self._pump = pump
        self._connections = connections
        self._read_num_refused = read_num_refused

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        return self.collect_from(self._engine.stats())

    def collect_from(self, stats: EngineStats) -> Iterator[Metric]:
        """The same of another account."""
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Sequences that wait, by what they wait for.",
            labels=(*LABELS, "reason"),
        )
        waiting.add_metric((*self._labels, "capacity"), stats.num_waiting)
        yield waiting
        for name, text, value in self._gauges(stats):
            gauge = GaugeMetricFamily(name, text, labels=LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, text, value in self._counters(stats):
            counter = CounterMetricFamily(name, text, labels=LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        for name, text, label, counts in self._labelled_counters(stats):
            family = CounterMetricFamily(name, text, labels=(*LABELS, label))
            for kind, count in counts.items():
                family.add_metric((*self._labels, kind), count)
            yield family
        yield self._cache_config()
        yield self._step_sizes(stats)

    def _cache_config(self) -> GaugeMetricFamily:
        config = self._engine.config
        told = {
            "block_size": config.block_size,
            "cache_dtype": config.kv_cache_dtype,
            "enable_prefix_caching": config.enable_prefix_caching,
            "gpu_memory_utilization": config.memory_utilization,
            "kv_cache_memory_bytes": config.kv_cache_memory_bytes,
            "num_gpu_blocks": self._engine.num_blocks,
            "num_gpu_blocks_override": config.num_blocks,
        }
        info = GaugeMetricFamily("vllm:cache_config_info", "The KV cache's configuration.", labels=(*LABELS, *told))
        info.add_metric((*self._labels, *map(str, told.values())), 1)
        return info

    def _step_sizes(self, stats: EngineStats) -> HistogramMetricFamily:
        counts = itertools.accumulate(stats.step_sizes or [0] * (len(BOUNDS) + 1))
        bounds = (*(f"{bound}.0" for bound in BOUNDS), "+Inf")
        family = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens computed by a step.", labels=LABELS)
        family.add_metric(self._labels, list(zip(bounds, counts, strict=True)), stats.step_tokens)
        return family

    def _gauges(self, stats: EngineStats) -> Sequence[tuple[str, str, float]]:
        queries, hits = stats.prefix_cache_queries, stats.prefix_cache_hits
        hit_rate = hits / queries if queries else 0
        return (
            ("vllm:num_requests_running", "Sequences in the running batch.", stats.num_running),
            ("vllm:num_requests_waiting", "Sequences that wait to be scheduled.", stats.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", stats.kv_cache_usage),
            ("vllm:gpu_cache_usage_perc", "Older name of vllm:kv_cache_usage_perc.", stats.kv_cache_usage),
            ("vllm:prefix_cache_hit_rate", "Share of queried tokens found in the cache.", hit_rate),
            ("vllm:engine_healthy", "1 if a request sent now would be answered.", int(self._engine.is_ready)),
            ("octavo:engine_ready", "1 if a request sent now would be answered.", int(self._engine.is_ready)),
            ("octavo:open_streams", "Responses that are being streamed.", self._pump.num_open),
            ("octavo:open_connections", "Connections that are open.", self._connections.num_open),
        )

    def _counters(self, stats: EngineStats) -> Sequence[tuple[str, str, float]]:
        queries, hits = stats.prefix_cache_queries, stats.prefix_cache_hits
        return (
            ("vllm:num_preemptions", "Preemptions.", stats.num_preemptions),
            ("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", queries),
            ("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", hits),
            ("vllm:gpu_prefix_cache_queries", "Older name of vllm:prefix_cache_queries.", queries),
            ("vllm:gpu_prefix_cache_hits", "Older name of vllm:prefix_cache_hits.", hits),
            ("vllm:prompt_tokens", "Prompt tokens, computed or cached.", stats.prompt_tokens + hits),
            ("vllm:prompt_tokens_cached", "Prompt tokens found in the prefix cache.", hits),
            ("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens),
            ("octavo:steps", "Steps executed.", stats.num_steps),
            (
                "octavo:late_compilations",
                "Kernels compiled and graphs captured once executors were ready: each kept every stream waiting.",
                stats.num_late_compilations,
            ),
            (
                "octavo:requests_requeued",
                "Sequences put back because their executor or engine was lost.",
                stats.num_requeued,
            ),
            (
                "octavo:requests_quarantined",
                "Requests refused or ended because they had killed executors.",
                stats.num_quarantined,
            ),
            (
                "octavo:numerics_losses",
                "Executors given up because no row of a step came to numbers.",
                stats.num_numerics_losses,
            ),
            (
                "octavo:edges_shed",
                "Times that a gateway process did not take what an engine told it, and had to ask anew.",
                stats.num_edges_shed,
            ),
            ("octavo:streams_failed", "Streams whose tokens could not be made into text.", stats.num_failed_streams),
            ("octavo:streams_shed", "Streams cut because their client did not read.", self._pump.num_shed),
        )

    def _labelled_counters(self, stats: EngineStats) -> Sequence[tuple[str, str, str, Mapping[str, int]]]:
        restarts = {"executor": 0, "engine": 0, **_known(stats.actor_restarts, RESTARTING_ACTORS)}
        refused = {str(bound): count for bound, count in self._connections.num_refused.items()}
        dropped = {reason: count for reason, count in stats.messages_dropped.items() if reason not in NOT_DROPS}
        return (
            (
                "vllm:prompt_tokens_by_source",
                "Prompt tokens by where their KV came from.",
                "source",
                {"local_compute": stats.prompt_tokens, "local_cache_hit": stats.prefix_cache_hits},
            ),
            (
                "octavo:connections_refused",
                "Connections refused because all clients, or one of them, had too many.",
                "bound",
                refused,
            ),
            ("octavo:actor_restarts", "Times an actor was started anew.", "actor", restarts),
            (
                "octavo:engine_requests",
                "Sequences that engines accepted, and what became of them; the others run or wait. One that was lost "
                "with its engine is accepted again by the next.",
                "event",
                {
                    "accepted": stats.num_accepted,
                    "finished": stats.num_completed,
                    "failed": stats.num_failed,
                    "cancelled": stats.num_cancelled,
                    "lost": stats.num_lost,
                },
            ),
            (
                "octavo:messages_dropped",
                "Messages that were dropped.",
                "reason",
                _known({"late": stats.num_dropped_messages, **dropped}, DROP_REASONS),
            ),
            (
                "octavo:requests_shed",
                "Requests refused before their body was read: too many requests or bytes, too long a wait, no memory.",
                "bound",
                self._read_num_refused(),
            ),
        )


class ReadCounter(Collector):
    """A total that somebody else counts, read when it is asked for."""

    def __init__(self, name: str, text: str, labels: Sequence[str], read: Callable[[], int]) -> None:
        self._name = name
        self._text = text
        self._labels = labels
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=LABELS)
        family.add_metric(self._labels, self._read())
        yield family


def _known(counts: Mapping[str, int], kinds: Sequence[str]) -> dict[str, int]:
    """The same counts, those of kinds that nobody foresaw together as `other`: labels come from closed sets."""
    known: dict[str, int] = {}
    for kind, count in counts.items():
        label = kind if kind in kinds else "other"
        known[label] = known.get(label, 0) + count
    return known
