"""Between the processes of one engine: what was loaded, who is where, how the engine does."""

from __future__ import annotations

from .base import Message
from .ids import Epoch, RequestId
from .samples import SampleFamily


class ExecutorLoaded(Message, frozen=True):
    """Executor -> edge 0: what it has loaded, before it is ready.

    Attributes:
        child, incarnation: which executor process.
        vocab_size, max_model_len, num_blocks, kv_cache_bytes, dtype, load_seconds: of the model and the KV cache.
        is_deterministic: a row's logits are the same bits alone and in any batch.
    """

    child: str
    incarnation: int
    vocab_size: int
    max_model_len: int
    num_blocks: int
    kv_cache_bytes: int
    dtype: str
    load_seconds: float
    is_deterministic: bool = False


class LoadFailed(Message, frozen=True):
    """Executor -> edge 0: it cannot load what it was told to; its process ends.

    Attributes:
        code, error: of the public error.
    """

    child: str
    incarnation: int
    code: str
    error: str


class SetUpEngine(Message, frozen=True):
    """Edge 0 -> engine: what to schedule, known once the executor has loaded.

    Attributes:
        setup: an `EngineSetup`, msgpack.
    """

    setup: bytes


class PeerStarted(Message, frozen=True):
    """Edge 0 -> engine or executor: a peer's new incarnation listens.

    To other edges it tells of a new edge 0: another of them has taken the dead one's place, until all streams are over.

    Attributes:
        name, incarnation: of the peer.
        endpoint: where; empty: on this host, where its name and incarnation say.
        server_key: its CURVE public key.
    """

    name: str
    incarnation: int
    endpoint: str = ""
    server_key: str = ""


class PeerLeft(Message, frozen=True):
    """Edge 0 -> engine: a peer is gone; what it waited for is to be cancelled."""

    name: str
    incarnation: int


class RememberQuarantined(Message, frozen=True):
    """Edge -> engine: an engine before it, or beside it, found that the executor dies of requests like this one.

    Attributes:
        digest: of what the executor computes from.
        until_ns: how long such a request is refused, on the clock that the processes of a host share.
    """

    digest: bytes
    until_ns: int


class EngineStuck(Message, frozen=True):
    """Other edge -> edge 0: this incarnation of an engine takes no more messages; only a new one can help.

    Said again with every beat until there is a new one.
    """

    name: str
    incarnation: int


class EngineFailed(Message, frozen=True):
    """Engine -> edge, its last word: scheduler or KV allocator raised at a message about requests of the edge's.

    Attributes:
        incarnation: of the engine.
        request_id: at which; -1 if the message was about several, and nothing tells which of them it was.
        why: type and text of the exception.
        suspects: the edge's requests among those several.
    """

    incarnation: int
    request_id: RequestId
    why: str
    suspects: tuple[RequestId, ...] = ()


class EdgeShed(Message, frozen=True):
    """Engine -> edge: it took no more of what it was told, so the rest of that is void, and so is all it had asked for.

    Until its `ShedHeard` it hears of no step and no end, and nothing that it says about requests counts.

    Attributes:
        incarnation: of the engine.
        number: of the time that this happened.
    """

    incarnation: int
    number: int


class ShedHeard(Message, frozen=True):
    """Edge -> engine: what comes behind this is all that it waits for, each request with the tokens that reached it.

    Attributes:
        number: of the `EdgeShed` that it answers.
    """

    number: int


class EngineReport(Message, frozen=True):
    """Engine -> edges, a few times a second: the accounts of scheduler and KV allocator.

    Attributes:
        step_age_ns: since the last step ended, or work came.
        num_edges_shed: times that an edge took no more of what it was told.
        messages_dropped: `(reason, number)` of those that the engine's port threw away.
        num_accepted: it is `num_completed`, `num_failed`, `num_cancelled`, `num_running` and `num_waiting` together.
        Others: as in `SchedulerStats` and `AllocatorStats`; totals are of this incarnation.
    """

    incarnation: int
    num_running: int
    num_waiting: int
    num_held_blocks: int
    num_blocks: int
    num_preemptions: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    prompt_tokens: int
    generation_tokens: int
    num_steps: int
    num_steps_in_flight: int
    num_dropped_messages: int
    num_executor_losses: int
    num_requeued: int = 0
    num_quarantined: int = 0
    step_age_ns: int = 0
    num_numerics_losses: int = 0
    step_sizes: tuple[int, ...] = ()
    step_tokens: int = 0
    num_edges_shed: int = 0
    messages_dropped: tuple[tuple[str, int], ...] = ()
    num_completed: int = 0
    num_accepted: int = 0
    num_failed: int = 0
    num_cancelled: int = 0


class EdgeAccount(Message, frozen=True):
    """Other edge -> edge 0, once a second and before it asks: what it counts itself.

    Attributes:
        name, incarnation: of the edge.
        num_live: sequences that its clients wait for.
        families: of its metrics.
    """

    name: str
    incarnation: int
    num_live: int
    families: tuple[SampleFamily, ...]


class AccountAsked(Message, frozen=True):
    """Other edge -> edge 0: somebody asks for the metrics of all edges.

    Attributes:
        number: of the question, to be told with the answer.
    """

    number: int


class AccountTold(Message, frozen=True):
    """Edge 0 -> other edge, to `AccountAsked`.

    Attributes:
        number: of the question.
        metrics: Prometheus' text.
        num_live: sequences that clients of all edges wait for.
    """

    number: int
    metrics: bytes
    num_live: int


class EngineUp(Message, frozen=True):
    """Edge 0 -> other edges: this incarnation of an engine takes requests; what the one before had is lost.

    Attributes:
        name, incarnation: of the engine.
        epoch: that it began with.
    """

    name: str
    incarnation: int
    epoch: Epoch


class EdgeStatus(Message, frozen=True):
    """Edge 0 -> other edges: what the supervisor knows.

    Attributes:
        why_not_ready: empty if a request sent now would be served.
        restarts: `(kind, number)` of each kind of child.
        engines_down: which are being replaced, or wait for an executor.
        engines_gone: which will not be replaced.
    """

    why_not_ready: str
    restarts: tuple[tuple[str, int], ...] = ()
    engines_down: tuple[str, ...] = ()
    engines_gone: tuple[str, ...] = ()
