"""Our paged attention as an attention implementation of `transformers`.

`transformers` lets each attention module call a function that is registered by name. Ours finds, on the calling module,
the `AttentionPlan` of its model, so that two models in one process share nothing but the function's name.

A plan is made once, at load, by one small recorded pass: which calls there are, in which order, with which shapes and
which mask. A forward pass then repeats exactly these calls, and the n-th call uses the n-th entry of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from ..kernels.attention_batch import AttentionBatch
from ..kernels.attention_kind import AttentionKind
from ..kernels.paged_attention import paged_attention, write_kv
from .interface import KVCache, KVCacheSpec

PAGED = "octavo_paged"  # without a mask function: transformers then builds no mask at all
RECORDING = "octavo_recording"  # with one, so that the recorded pass sees each layer's mask

_PLAN_ATTRIBUTE = "octavo_attention_plan"


class UnsupportedAttentionError(Exception):
    """This model's attention is more than causal, optionally windowed, softmax attention over K and V."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of the attention function within a forward pass.

    Attributes:
        cache_index: which of the model's KV caches it reads.
        writes: whether it writes its K and V there (not where a layer reuses those of an earlier one).
        sliding_window: tokens that a query sees, itself included; 0 sees all.
    """

    cache_index: int
    writes: bool
    sliding_window: int


@dataclass(slots=True)
class _Step:
    """What the calls of one forward pass need, and how many of them have been made."""

    batch: AttentionBatch
    kv_caches: list[KVCache]
    num_calls: int = 0


class AttentionPlan:
    """Every attention call of one model's forward pass; owned by that model."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []
        self.specs: list[KVCacheSpec] = []
        self._recorder: _Recorder | None = None
        self._step: _Step | None = None

    def attach(self, decoder: nn.Module) -> None:
        """Make this plan the one that the attention modules of `decoder` find."""
        for module in decoder.modules():
            object.__setattr__(module, _PLAN_ATTRIBUTE, self)

    @contextmanager
    def recording(self, max_position: int) -> Iterator[None]:
        """Within it, forward passes record their calls instead of computing attention.

        Raises:
            UnsupportedAttentionError: (from the pass) the model asks for what `paged_attention` cannot do.
        """
        self._recorder = _Recorder(max_position)
        token = _RECORDER.set(self._recorder)
        try:
            yield
            self.calls, self.specs = self._recorder.calls, self._recorder.specs
        finally:
            _RECORDER.reset(token)
            self._recorder = None

    @contextmanager
    def stepping(self, batch: AttentionBatch, kv_caches: list[KVCache]) -> Iterator[None]:
        """Within it, one forward pass reads and writes `kv_caches`."""
        step = self._step = _Step(batch, kv_caches)
        try:
            yield
            assert step.num_calls == len(self.calls), "the model left out attention calls that it made when recorded"
        finally:
            self._step = None

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,  # [1, num_heads, num_tokens, k_head_dim]
        key: torch.Tensor,  # [1, num_kv_heads, num_tokens, k_head_dim]
        value: torch.Tensor,  # [1, num_kv_heads, num_tokens, v_head_dim]
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """`[1, num_tokens, num_heads, v_head_dim]`, as transformers expects it."""
        if self._recorder is not None:
            return self._recorder.record(module, query, key, value, attention_mask)
        step = self._step
        assert step is not None, "attention was called outside of a step"
        call = self.calls[step.num_calls]
        step.num_calls += 1
        cache = step.kv_caches[call.cache_index]
        if call.writes:
            write_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), cache.k, cache.v, step.batch.slot_mapping)
        out = paged_attention(
            query[0].transpose(0, 1).contiguous(),
            cache.k,
            cache.v,
            step.batch,
            AttentionKind(
                scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
                sliding_window=call.sliding_window,
                softcap=softcap or 0.0,
                sinks=sinks,
            ),
        )
        return out.to(value.dtype).unsqueeze(0)


class _Recorder:
    """Notes the calls of one pass. Keeps the tensors it saw alive, so that equal addresses mean the same tensor."""

    def __init__(self, max_position: int) -> None:
        self.calls: list[AttentionCall] = []
        self.specs: list[KVCacheSpec] = []
        self._max_position = max_position
        self._seen: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        # A model may make masks that no layer uses, so one that we cannot do is an error only where it is used.
        self._windows: list[tuple[torch.Tensor, int | UnsupportedAttentionError]] = []

    def note_mask(self, mask: torch.Tensor, mask_function: Callable[..., torch.Tensor]) -> None:
        window: int | UnsupportedAttentionError
        try:
            window = sliding_window_of(mask_function, self._max_position, mask.device)
        except UnsupportedAttentionError as error:
            window = error
        self._windows.append((mask, window))

    def record(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        if query.shape[0] != 1 or key.shape[2] != query.shape[2] or num_heads % num_kv_heads:
            raise UnsupportedAttentionError(f"attention over other tokens than its own: {query.shape=} {key.shape=}")
        window = self._window_of(module, attention_mask)
        cache_index = self._shared_cache(key, value)
        writes = cache_index is None
        if cache_index is None:
            cache_index = len(self.specs)
            self.specs.append(KVCacheSpec(num_kv_heads, key.shape[-1], value.shape[-1]))
            self._seen.append((key, value, cache_index))
        self.calls.append(AttentionCall(cache_index, writes, window))
        return value.new_zeros(1, query.shape[2], num_heads, value.shape[-1])

    def _window_of(self, module: nn.Module, attention_mask: torch.Tensor | None) -> int:
        if attention_mask is None:
            if getattr(module, "is_causal", True) is not True:
                raise UnsupportedAttentionError("attention that is not causal")
            return 0
        for mask, window in self._windows:
            if _same_memory(mask, attention_mask):  # or a slice of all of it
                if isinstance(window, UnsupportedAttentionError):
                    raise window
                return window
        raise UnsupportedAttentionError("a mask that depends on more than positions")

    def _shared_cache(self, key: torch.Tensor, value: torch.Tensor) -> int | None:
        for seen_key, seen_value, cache_index in self._seen:
            if _same_memory(seen_key, key) and _same_memory(seen_value, value):
                return cache_index
        return None


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def sliding_window_of(
    mask_function: Callable[..., torch.Tensor], max_position: int, device: torch.device | None = None
) -> int:
    """The sliding window that a mask function of transformers means; 0 when it is plainly causal.

    Looked at in a few positions up to `max_position`, because chunked and windowed masks are alike near the start.

    Raises:
        UnsupportedAttentionError: it is neither.
    """
    zero = torch.zeros((), dtype=torch.long, device=device)
    keys = torch.arange(max_position, device=device)
    samples = sorted({0, 1, 2, max_position // 3, max_position // 2, max_position - 2, max_position - 1} - {-1})
    window = max_position
    for position in reversed(samples):
        if position >= max_position:
            continue
        allowed = mask_function(zero, zero, torch.tensor(position, device=device), keys).expand(max_position)
        count = int(allowed.sum())
        if position == max_position - 1:
            window = count
        expected = (keys <= position) & (keys > position - window)
        if count == 0 or not torch.equal(allowed, expected):
            raise UnsupportedAttentionError("a mask that is neither causal nor a sliding window")
    return window if window < max_position else 0


_RECORDER: ContextVar[_Recorder | None] = ContextVar("octavo_attention_recorder", default=None)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_kwargs: object,  # dropout, sliding_window (the mask says it) and what else a model passes along
) -> tuple[torch.Tensor, None]:
    plan: AttentionPlan = getattr(module, _PLAN_ATTRIBUTE)
    if position_bias is not None:
        raise UnsupportedAttentionError("a learned position bias")
    out = plan.attend(module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, sinks=s_aux)
    return out, None


def _recording_mask(*args: object, **kwargs: object) -> torch.Tensor | None:
    recorder = _RECORDER.get()
    assert recorder is not None, "the recording implementation is for the recorded pass only"
    kwargs["allow_is_causal_skip"] = False
    mask: torch.Tensor | None = eager_mask(*args, **kwargs)
    mask_function = kwargs.get("mask_function")
    if mask is not None and callable(mask_function):
        recorder.note_mask(mask, mask_function)
    return mask


# The names are process-wide in transformers; the functions hold no state.
AttentionInterface.register(PAGED, _attention)
AttentionInterface.register(RECORDING, _attention)
AttentionMaskInterface.register(RECORDING, _recording_mask)
