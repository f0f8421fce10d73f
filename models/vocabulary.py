"""Both ends of a model: tokens to vectors and vectors to logits, a part of the vocabulary on each rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..kernels.embedding import embed
from ..kernels.quantized_weight import LinearWeight
from .layers import Linear
from .parallel import ParallelGroup
from .weights import WeightReader

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Vocabulary:
    """Token embedding and output projection, each `[vocab_size, hidden_size]`; one tensor where they are tied.

    As `transformers` has it: a checkpoint that promises tied weights but brings two different ones keeps both. The
    first stage of a pipeline has the embedding, the last the projection, and members of a stage equal parts of the
    rows, but for the last member, which has what is left.
    """

    def __init__(
        self, reader: WeightReader, vocab_size: int, hidden_size: int, *, tied: bool, group: ParallelGroup
    ) -> None:
        self._group = group
        self._dtype = reader.dtype
        self._vocab_size = vocab_size
        self._width = -(-vocab_size // group.tp_size)
        self._first = group.tp_rank * self._width
        rows = slice(self._first, min(self._first + self._width, vocab_size))
        shape = (vocab_size, hidden_size)
        embedding_name = _HEAD if tied and _EMBEDDING not in reader and _HEAD in reader else _EMBEDDING
        has_no_head = tied and (_HEAD not in reader or embedding_name == _HEAD)
        self.embedding: torch.Tensor | None = None
        self.head: LinearWeight | None = None
        if group.is_first_stage or has_no_head:
            self.embedding = reader.take_embedding(embedding_name, *shape, rows=rows)
        if group.is_last_stage and has_no_head:
            assert self.embedding is not None
            self.head = reader.tied_head(self.embedding, rows)
        elif group.is_last_stage:
            head = reader.take_linear(_HEAD, *shape, rows=rows, is_compared=tied)
            if tied:
                reader.settle()  # they are compared
            if (
                tied
                and self.embedding is not None
                and isinstance(head, torch.Tensor)
                and head.dtype is self.embedding.dtype
                and torch.equal(head, self.embedding)
            ):
                head = reader.tied_head(self.embedding, rows)
            self.head = head
        if not group.is_first_stage:
            self.embedding = None
        reader.leave(_EMBEDDING, _HEAD)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`[num_tokens]` ids to `[num_tokens, hidden_size]`, on the first stage."""
        assert self.embedding is not None, "the first stage has the embedding"
        if input_ids.is_cuda:  # one launch, which gives zeros for other members' tokens
            x = embed(input_ids - self._first if self._group.tp_size > 1 else input_ids, self.embedding).to(self._dtype)
            return self._group.all_reduce(x) if self._group.tp_size > 1 else x
        if self._group.tp_size == 1:
            return F.embedding(input_ids, self.embedding).to(self._dtype)
        local = input_ids - self._first
        is_elsewhere = (local < 0) | (local >= self.embedding.shape[0])
        x = F.embedding(local.masked_fill_(is_elsewhere, 0), self.embedding).to(self._dtype)
        return self._group.all_reduce(x.masked_fill_(is_elsewhere.unsqueeze(-1), 0.0))

    def logits(self, hidden: torch.Tensor, linear: Linear) -> torch.Tensor:
        """`[n, hidden_size]` to float32 logits `[n, vocab_size]`, on the last stage; all of them for each member."""
        assert self.head is not None, "the last stage has the output projection"
        logits = linear(hidden, self.head, None)
        if self._group.tp_size > 1:
            logits = F.pad(logits, (0, self._width - logits.shape[1]))  # members send equally much
            logits = self._group.all_gather_columns(logits)[:, : self._vocab_size]
        return logits.float().contiguous()  # float32 without its padding is a view of what was gathered
