"""A step on the device: its packed words in, the model, the sampled tokens to where the next step finds them."""

from __future__ import annotations

import torch

from ....kernels import device_sampling, logit_processing
from ....kernels.attention_batch import AttentionBatch
from ....kernels.step_inputs import append_tokens, apply_diff, gather_step
from ....kernels.step_layout import RowInputs, StepLayout, TokenInputs
from ..device import Device
from .mixed_sizes import MixedSize
from .packed_step import PackedStep

PACKED_WORDS = 1 << 16
"""Words of a packed step that have a fixed place; what more a step brings (long prompts) takes a detour."""


class ForwardPass:
    """The tensors of the standing batch and of one step, and what is done with them; for the stream's `submit`.

    Nothing here waits for the device, and nothing depends on what it computed: a graph can hold `decode` and `mixed`.

    Args:
        device: model and KV cache.
        layout: of steps and rows.
        num_state_rows: requests that can stand at once.
        max_rows: most rows that attention is launched for at once, padding included; None: those of the layout.
        most_padded_tokens: of any size that `mixed` is called with.
    """

    def __init__(
        self,
        device: Device,
        layout: StepLayout,
        num_state_rows: int,
        *,
        max_rows: int | None = None,
        most_padded_tokens: int = 0,
    ) -> None:
        self._device, self._model, self._layout = device, device.model, layout
        self._max_rows = max_rows or layout.max_rows
        where = device.model.device
        self._where = where
        self._state = torch.zeros((num_state_rows, layout.row_words), dtype=torch.int32, device=where)
        self._packed = torch.zeros(layout.diff + PACKED_WORDS, dtype=torch.int32, device=where)
        self._rows = RowInputs.empty(layout, where)
        # Of steps that graphs compute, which remember the addresses.
        self._tokens = TokenInputs.empty(max(layout.section, most_padded_tokens), where)
        self._sampled = torch.zeros(layout.section, dtype=torch.int64, device=where)
        self._counts = logit_processing.count_buffer(layout, device.model.vocab_size, where)
        self._hidden: torch.Tensor | None = None  # what such a step sampled from, [layout.section, hidden_size]

    def load(self, words: torch.Tensor, step: PackedStep, *, has_size: bool) -> None:
        """Bring a step's words to the device, and apply its diff unless that is still to come.

        Args:
            words: int32, pinned, not to be written before this is done.
            has_size: `decode` or `mixed` comes next, which apply what lies in its fixed place.
        """
        packed, layout = self._packed, self._layout
        if step.num_words <= len(packed):
            packed[: step.num_words].copy_(words[: step.num_words], non_blocking=True)
            if step.num_pieces and not has_size:
                apply_diff(self._state, packed, layout)
            return
        detour = words[: step.num_words].to(self._where, non_blocking=True, copy=True)
        packed[: layout.diff].copy_(detour[: layout.diff])
        packed[layout.num_pieces].zero_()  # there are none in their place
        apply_diff(self._state, detour, layout)

    def decode(self, num_rows: int) -> None:
        """One token for each of `num_rows` rows, padding included, from what was loaded to what is sampled."""
        tokens, layout = self._tokens.first(num_rows), self._layout
        apply_diff(self._state, self._packed, layout)
        gather_step(self._state, self._packed, self._rows, tokens, num_rows, 1, layout)
        hidden = self._forward(
            tokens,
            self._batch(
                tokens,
                num_rows=num_rows,
                max_query_len=1,
                max_context_len=layout.max_model_len,
                num_decodes=num_rows,
            ),
        )
        self._sample_from(hidden)

    def mixed(self, size: MixedSize) -> None:
        """Decodes and chunks, padding included, from what was loaded to what is sampled."""
        tokens, layout = self._tokens.first(size.num_tokens), self._layout
        apply_diff(self._state, self._packed, layout)
        gather_step(self._state, self._packed, self._rows, tokens, size.num_rows, max(1, size.num_chunk_tokens), layout)
        batch = self._batch(
            tokens,
            num_rows=size.num_rows,
            max_query_len=size.num_chunk_tokens,
            max_context_len=layout.max_model_len,
            num_decodes=size.num_decodes,
        )
        hidden = self._forward(tokens, batch)
        first = layout.sample_tokens
        self._sample_from(hidden.index_select(0, self._packed[first : first + size.num_rows]))

    def _sample_from(self, hidden: torch.Tensor) -> None:
        """Keep these hidden states, one of each sample, and choose the tokens."""
        if self._hidden is None:
            self._hidden = hidden.new_zeros((self._layout.section, hidden.shape[1]))
        self._hidden[: len(hidden)].copy_(hidden)
        self.sample(self._model.compute_logits(hidden))

    def logits_again(self, num_samples: int) -> torch.Tensor:
        """Of the last `decode` or `mixed`, once more: a graph keeps its hidden states, not its logits."""
        assert self._hidden is not None, "decode() or mixed() comes first"
        return self._model.compute_logits(self._hidden[:num_samples])

    def compute(self, step: PackedStep) -> torch.Tensor:
        """Hidden states `[num_tokens, hidden_size]` of any step that was loaded."""
        tokens = TokenInputs.empty(step.num_tokens, self._where)
        gather_step(self._state, self._packed, self._rows, tokens, step.num_rows, step.max_query_len, self._layout)
        batch = self._batch(
            tokens,
            num_rows=step.num_rows,
            max_query_len=step.max_query_len,
            max_context_len=step.max_context_len,
            num_decodes=step.num_decodes,
        )
        return self._forward(tokens, batch)

    def sampling_logits(self, step: PackedStep, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits `[num_samples, vocab_size]` from the hidden states of `compute`."""
        if len(step.sampled) != step.num_tokens:
            first = self._layout.sample_tokens
            hidden = hidden.index_select(0, self._packed[first : first + len(step.sampled)])
        return self._model.compute_logits(hidden)

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose a token from each row of `logits`, the step's samples in order, and append it; `[n]` int64.

        The logits are edited in place.
        """
        self.edit(logits)
        count, rows = len(logits), self._rows
        sampled = self._sampled[:count]
        device_sampling.sample_on_device(
            logits,
            rows.temperature[:count],
            rows.top_k[:count],
            rows.top_p[:count],
            rows.min_p[:count],
            rows.seeds[:count],
            rows.draw_positions[:count],
            out=sampled,
        )
        append_tokens(self._state, self._packed, sampled, self._layout)
        return sampled

    def edit(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply to `logits`, in place, what the requests of the step's samples ask for (`logit_edits`)."""
        logit_processing.process_logits(logits, self._state, self._packed, self._counts, self._layout)
        return logits

    def sampled(self, count: int) -> torch.Tensor:
        """The first tokens of the last step, `[count]` int64."""
        return self._sampled[:count]

    def append(self, token_ids: torch.Tensor) -> None:
        """Append tokens that were chosen elsewhere, one for each of the step's samples."""
        append_tokens(self._state, self._packed, token_ids.to(self._where), self._layout)

    def with_logprobs(self, sampled: torch.Tensor, logits: torch.Tensor, num_top: int) -> torch.Tensor:
        """Tokens and log-probabilities as int64 words, to come back in one copy; see `sampling_plan.read_tokens`."""
        chosen, ranks, top_ids, top_logprobs = device_sampling.logprobs_on_device(logits, sampled.clamp(min=0), num_top)
        return torch.cat(
            (
                sampled,
                chosen.view(torch.int32).to(torch.int64),
                ranks.to(torch.int64),
                top_ids.reshape(-1).to(torch.int64),
                top_logprobs.reshape(-1).view(torch.int32).to(torch.int64),
            )
        )

    def _batch(
        self, tokens: TokenInputs, *, num_rows: int, max_query_len: int, max_context_len: int, num_decodes: int
    ) -> AttentionBatch:
        packed, layout = self._packed, self._layout
        return AttentionBatch(
            query_start=packed[layout.query_start : layout.query_start + num_rows + 1],
            context_lens=packed[layout.context_lens : layout.context_lens + num_rows],
            block_tables=self._rows.block_tables[:num_rows],
            slot_mapping=tokens.slot_mapping,
            block_size=layout.block_size,
            max_query_len=max_query_len,
            max_context_len=max_context_len,
            num_decodes=num_decodes,
            max_rows=self._max_rows,
        )

    def _forward(self, tokens: TokenInputs, batch: AttentionBatch) -> torch.Tensor:
        return self._model.forward(tokens.input_ids, tokens.positions, batch, self._device.kv_caches)
