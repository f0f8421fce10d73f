"""From logits to tokens: masks, penalties, filters, the draw, and log-probabilities.

Every function works on each row by itself: a row's result has the same bits alone, in any batch, at any place in it.
So only operations are used whose rounding does not depend on where an element lies: exactly rounded elementwise ones,
softmax along the row (one vector routine per row), float64 cumulative sums (sequential), sums over fixed chunks,
comparisons. `torch.exp` or a whole-row `sum` would not do.

A token is drawn by inverting the cumulative distribution *in token-id order* at one uniform number. One draw per row
makes a large vocabulary cheap, and a rounding error in the logits moves each boundary by about its own size, so it
changes the token only if the draw falls that close to a boundary. Walking the tokens by probability instead would
swap places of near ties, and change the token with the probability of the swapped ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import cpu_build
from .cpu_build import CODE, POINTER, SIZE

GREEDY_EPS = 1e-5
"""A temperature below this means greedy."""

NO_TOKEN = -1
"""Stands for the token of a row from which none can be chosen."""

_CHUNK = 64  # tokens per chunk of two-level searches; 64 measured best of 16 to 256 at V = 4096 and 151936
_ELEMENTS_PER_BLOCK = 1 << 19  # rows are worked through in blocks of about 2 MB of float32, so that they stay in cache
_PROB_UNITS = 2.0**50  # probabilities as integers, whose sums are exact

MAX_NARROW_TOP_K = 64
"""Up to this k, top-k picks its tokens out and works on them alone."""


def row_blocks(num_rows: int, vocab_size: int) -> list[slice]:
    """Cut rows into blocks that fit a cache."""
    size = max(1, _ELEMENTS_PER_BLOCK // max(1, vocab_size))
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


# --- processors: in place on `[N, V]` float32 -------------------------------------------------------------------------


def keep_allowed(logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
    """Exclude all but the given tokens from every row that `rows` names.

    Args:
        logits: `[N, V]`, changed in place.
        rows, token_ids: `[M]` int64, pairs (row, allowed token).
    """
    kept = logits[rows, token_ids]
    logits.index_fill_(0, rows, float("-inf"))
    logits[rows, token_ids] = kept


def exclude(logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
    """Exclude the tokens of the pairs `(rows[i], token_ids[i])`."""
    logits[rows, token_ids] = float("-inf")


def add_bias(logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, bias: torch.Tensor) -> None:
    """Add `bias[i]` to the logit at `(rows[i], token_ids[i])`; each pair occurs once."""
    logits[rows, token_ids] += bias


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> None:
    """Make tokens of prompt and output less likely, whatever the sign of their logit.

    Args:
        logits: `[N, V]`, changed in place.
        seen: `[N, V]` bool, tokens in prompt or output.
        penalty: `[N, 1]` > 0; positive logits are divided by it, negative ones multiplied.

    Source: Keskar et al. 2019 (CTRL), section 4.1, with the sign rule that every engine since uses.
    """
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    torch.where(seen, penalized, logits, out=logits)


def penalize_counts(
    logits: torch.Tensor, counts: torch.Tensor, frequency: torch.Tensor, presence: torch.Tensor
) -> None:
    """Subtract `frequency` for each occurrence in the output, and `presence` once.

    Args:
        logits: `[N, V]`, changed in place.
        counts: `[N, V]` float32, whole numbers.
        frequency, presence: `[N, 1]`.

    Source: OpenAI API reference, "Frequency and presence penalties".
    """
    # Two operations each: a fused multiply-subtract rounds differently in a vector's tail.
    logits -= frequency * counts
    logits -= presence * (counts > 0)


# --- choosing ---------------------------------------------------------------------------------------------------------


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """Choose the largest logit of each row, the lowest token id among equals.

    Args:
        logits: `[N, V]` float32; excluded tokens are -inf.

    Returns:
        `[N]` int64; `NO_TOKEN` where the largest is not finite (nothing left, or NaN or +inf among the logits).
    """
    num_rows, vocab_size = logits.shape
    kernels = _kernels() if logits.device.type == "cpu" and logits.dtype is torch.float32 else None
    if kernels is not None and logits.stride(1) == 1:  # in place of a dozen calls of torch, which a small model feels
        out = torch.empty(num_rows, dtype=torch.int64)
        threads = torch.get_num_threads()
        kernels.octavo_greedy(logits.data_ptr(), logits.stride(0), num_rows, vocab_size, out.data_ptr(), threads)
        return out
    num_chunks = vocab_size // _CHUNK
    if num_chunks < 2:
        values, token_ids = logits.max(dim=-1)
    else:
        # `amax` runs at memory speed where `argmax` does not, so the first largest chunk is found, then looked into.
        head = logits[:, : num_chunks * _CHUNK].view(num_rows, num_chunks, _CHUNK)
        chunk = head.amax(dim=-1).argmax(dim=-1)
        rows = torch.arange(num_rows, device=logits.device)
        values, offset = head[rows, chunk].max(dim=-1)
        token_ids = chunk * _CHUNK + offset
        if num_chunks * _CHUNK < vocab_size:
            tail_values, tail = logits[:, num_chunks * _CHUNK :].max(dim=-1)
            better = (tail_values > values) | tail_values.isnan()
            token_ids = torch.where(better, tail + num_chunks * _CHUNK, token_ids)
            values = torch.where(better, tail_values, values)
    return torch.where(values.isfinite(), token_ids, NO_TOKEN)


def invert_cdf(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Find the token at which the cumulative weight in column order passes `uniforms` times the total.

    Two levels: the sums of chunks of 64 columns first, then inside one chunk; so all but a 64th of the columns are
    summed at memory speed. A column of weight zero is never chosen.

    Args:
        probs: `[N, W]` float32 or float64, >= 0, not necessarily summing to 1.
        uniforms: `[N]` float64 in [0, 1).

    Returns:
        `[N]` int64; `NO_TOKEN` where the total is zero or not a number.
    """
    num_rows, width = probs.shape
    num_chunks = width // _CHUNK
    rest = width - num_chunks * _CHUNK
    if rest or not num_chunks:
        probs = torch.nn.functional.pad(probs, (0, _CHUNK - rest))
        num_chunks += 1
    chunks = probs.view(num_rows, num_chunks, _CHUNK)
    cdf = chunks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total = cdf[:, -1:]
    target = uniforms.unsqueeze(1) * total  # < total: its largest rounding is the number below
    chunk = torch.searchsorted(cdf, target, right=True).clamp_(max=num_chunks - 1)
    before = torch.where(chunk > 0, cdf.gather(1, (chunk - 1).clamp_(min=0)), 0.0)
    # How far into the chunk, as a fraction: the chunk's own sum may be rounded otherwise than the outer one.
    fraction = ((target - before) / (cdf.gather(1, chunk) - before)).clamp_(0.0, 1.0 - 2.0**-53)
    rows = torch.arange(num_rows, device=probs.device)
    inner = chunks[rows, chunk.squeeze(1)].cumsum(dim=-1, dtype=torch.float64)
    offset = torch.searchsorted(inner, fraction * inner[:, -1:], right=True).clamp_(max=_CHUNK - 1)
    return torch.where((total > 0) & total.isfinite(), chunk * _CHUNK + offset, NO_TOKEN).squeeze(1)


def sample(logits: torch.Tensor, temperature: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw a token of each row from the softmax at a temperature.

    Args:
        logits: `[N, V]` float32.
        temperature: `[N]` float32, > 0.
        uniforms: `[N]` float64 in [0, 1).

    Returns:
        `[N]` int64; `NO_TOKEN` where nothing is left, or a logit is NaN or +inf.
    """
    parts = [
        invert_cdf(torch.softmax(logits[block] / temperature[block].unsqueeze(1), dim=-1), uniforms[block])
        for block in row_blocks(*logits.shape)
    ]
    return torch.cat(parts)


def ordered_bits(values: torch.Tensor) -> torch.Tensor:
    """Map float32 without NaN to int32 of the same order."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: makes -0.0 equal to 0.0
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


def order_keys(values: torch.Tensor) -> torch.Tensor:
    """Give each element of a row a distinct int64 that orders it by (larger value, lower column).

    Args:
        values: `[N, W]` float32 without NaN, `W` < 2**31.

    Returns:
        `[N, W]` int64; `column_of` recovers the column.
    """
    columns = torch.arange(values.shape[-1], device=values.device)
    return (ordered_bits(values).to(torch.int64) << 32) | (0x7FFFFFFF - columns)


def column_of(keys: torch.Tensor) -> torch.Tensor:
    """Recover the columns from `order_keys`."""
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF)


def top_columns(values: torch.Tensor, k: int) -> torch.Tensor:
    """Find the k largest elements of each row, in order; the lower column goes first among equals.

    Args:
        values: `[N, W]` float32 without NaN.
        k: in [1, W].

    Returns:
        `[N, k]` int64 columns.
    """
    num_rows, width = values.shape
    if 4 * k >= width:
        return column_of(order_keys(values).sort(dim=-1, descending=True).values[:, :k])
    num_chunks = width // _CHUNK
    if k * _CHUNK * 2 > width:
        return column_of(order_keys(values).topk(k, dim=-1, sorted=True).values)
    # The k largest lie in the k chunks with the largest maxima: an element outside has k larger maxima above it.
    # Chunks are contiguous, so equal maxima are ordered by column, as the elements are. Then only those are searched,
    # and what is left behind the last whole chunk.
    head = values[:, : num_chunks * _CHUNK].view(num_rows, num_chunks, _CHUNK)
    chunks = column_of(order_keys(head.amax(dim=-1)).topk(k, dim=-1, sorted=False).values).sort(dim=-1).values
    columns = (chunks.unsqueeze(-1) * _CHUNK + torch.arange(_CHUNK, device=values.device)).flatten(1)
    if num_chunks * _CHUNK < width:
        tail = torch.arange(num_chunks * _CHUNK, width, device=values.device)
        columns = torch.cat((columns, tail.expand(num_rows, -1)), dim=-1)
    # Columns ascend along each row, so ties keep their order under the new numbering.
    best = column_of(order_keys(values.gather(1, columns)).topk(k, dim=-1, sorted=True).values)
    return columns.gather(1, best)


def keep_heaviest(keys: torch.Tensor, weights: torch.Tensor, enough: torch.Tensor) -> torch.Tensor:
    """Mark the largest elements of each row, as few as together weigh `enough`.

    A radix select: histograms of the weights over the leading bits of the keys, then the next ones, find the last key
    that is needed, without a sort. Sums of integers do not depend on their order, so this holds on every device.

    Args:
        keys: `[N, W]` int32.
        weights: `[N, W]` int64 >= 0, equal where keys are equal; a row sums to less than 2**63.
        enough: `[N]` int64, >= 1.

    Returns:
        `[N, W]` bool. Of equal keys the lower columns are kept. All are kept if they weigh less than `enough`.
    """
    num_rows = keys.shape[0]
    missing = enough.unsqueeze(1)
    last = torch.zeros_like(missing)
    inside = weights  # those with the leading bits of the last key
    for shift, bits in ((21, 11), (10, 11), (0, 10)) if keys.shape[1] > 32768 else ((24, 8), (16, 8), (8, 8), (0, 8)):
        digits = (keys >> shift) & ((1 << bits) - 1)
        if shift + bits == 32:
            digits ^= 1 << (bits - 1)  # the sign bit, so that negative keys come first
        digits = digits.to(torch.int64)
        histogram = torch.zeros((num_rows, 1 << bits), dtype=torch.int64, device=keys.device)
        histogram.scatter_add_(1, digits, inside)
        above = histogram.flip(1).cumsum(dim=1).flip(1) - histogram
        digit = (above >= missing).sum(dim=1, keepdim=True)  # the lowest whose larger ones do not suffice
        missing = missing - above.gather(1, digit)
        last = (last << bits) | digit
        if shift:
            inside = torch.where(digits == digit, inside, 0)
    last = (last - (1 << 31)).to(torch.int32)
    equal = keys == last
    weight = weights.masked_fill(~equal, 0).amax(dim=1, keepdim=True).clamp_(min=1)
    num_equal = (missing + weight - 1) // weight
    return (keys > last) | (equal & (equal.cumsum(dim=1) <= num_equal))


class Filters(NamedTuple):
    """Temperature and filters of N rows, applied in this order: temperature, min-p, top-k, top-p on what is left.

    Attributes:
        temperature: `[N]` float32, > 0.
        top_k: `[N]` int64; <= 0 or >= V: off. Exactly k are kept, the lower token id first among equals.
        top_p: `[N]` float64 in (0, 1]; the smallest set whose probability, among what the others keep, reaches it.
        log_min_p: `[N]` float64, logarithm of min-p; drops tokens less likely than min-p times the likeliest.
            -inf: off.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    log_min_p: torch.Tensor

    def of_rows(self, rows: slice) -> Filters:
        return Filters(*(values[rows] for values in self))


def _draw_narrow(logits: torch.Tensor, filters: Filters, uniforms: torch.Tensor) -> torch.Tensor:
    """See `sample_filtered`; every `filters.top_k` is in [1, MAX_NARROW_TOP_K]."""
    temperature, top_k, top_p, log_min_p = filters
    width = min(
        MAX_NARROW_TOP_K, logits.shape[1]
    )  # the same for every k, so that a row's sums round alike in any batch
    scaled = logits / temperature.unsqueeze(1)
    good = scaled.amax(dim=-1).isfinite()
    token_ids = top_columns(scaled, width)
    values = scaled.gather(1, token_ids)
    # All three filters keep the leading tokens in order, so together they keep what the strictest keeps.
    kept = torch.arange(width, device=logits.device) < top_k.unsqueeze(1)
    kept &= values >= _min_logit(values[:, :1], log_min_p)
    probs = torch.softmax(values.masked_fill(~kept, float("-inf")), dim=-1, dtype=torch.float64)
    # A token is kept while those before it have not reached top_p; the one that reaches it is kept.
    kept &= ((probs.cumsum(dim=-1) - probs) < top_p.unsqueeze(1)) | (top_p >= 1.0).unsqueeze(1)
    token_ids, order = token_ids.sort(dim=-1)
    column = invert_cdf(torch.where(kept, probs, 0.0).gather(1, order), uniforms)
    token = token_ids.gather(1, column.clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(good & (column >= 0), token, NO_TOKEN)


def _draw_wide(logits: torch.Tensor, filters: Filters, uniforms: torch.Tensor) -> torch.Tensor:
    """See `sample_filtered`; nothing is known of the filters."""
    temperature, top_k, top_p, log_min_p = filters
    vocab_size = logits.shape[1]
    scaled = logits / temperature.unsqueeze(1)
    # Whole rows of NaN come out of a softmax with a NaN or +inf in it, and of no other step.
    scaled.masked_fill_(scaled < _min_logit(scaled.amax(dim=-1, keepdim=True), log_min_p), float("-inf"))
    # Each filter goes over the rows that ask for it: a filter wide open might drop a tail of rounding errors.
    rows = ((top_k > 0) & (top_k < vocab_size)).nonzero().squeeze(1)
    if len(rows):
        part = scaled[rows]
        kept = keep_heaviest(ordered_bits(part), torch.ones_like(part, dtype=torch.int64), top_k[rows])
        scaled[rows] = part.masked_fill_(~kept, float("-inf"))
    probs = torch.softmax(scaled, dim=-1)
    rows = (top_p < 1.0).nonzero().squeeze(1)
    if len(rows):
        part = probs[rows].nan_to_num_(nan=0.0)
        weights = (part.to(torch.float64) * _PROB_UNITS).to(torch.int64)
        # The product is less than 2**53, so `ceil` is exact: kept while those before have not reached top_p.
        enough = (weights.sum(dim=-1) * top_p[rows]).ceil().to(torch.int64).clamp_(min=1)
        kept = keep_heaviest(ordered_bits(part), weights, enough)
        probs[rows] = torch.where(kept, probs[rows], 0.0)
    return invert_cdf(probs, uniforms)


def _min_logit(largest: torch.Tensor, log_min_p: torch.Tensor) -> torch.Tensor:
    """The smallest logit that min-p keeps: `p >= min_p * p_max`, as `logit >= logit_max + log(min_p)`.

    An addition rounds alike in every batch, where an exponential might not.
    """
    return (largest.to(torch.float64) + log_min_p.unsqueeze(1)).to(torch.float32)


def sample_filtered(logits: torch.Tensor, filters: Filters, uniforms: torch.Tensor, *, narrow: bool) -> torch.Tensor:
    """Draw a token of each row after temperature and filters.

    Args:
        logits: `[N, V]` float32.
        filters: of the N rows.
        uniforms: `[N]` float64 in [0, 1).
        narrow: every `top_k` is in [1, MAX_NARROW_TOP_K], and only so many tokens are looked at. It must follow from
            the row alone, as the two ways round differently.

    Returns:
        `[N]` int64; `NO_TOKEN` where nothing is left, or a logit is NaN or +inf.
    """
    draw = _draw_narrow if narrow else _draw_wide
    parts = [draw(logits[block], filters.of_rows(block), uniforms[block]) for block in row_blocks(*logits.shape)]
    return torch.cat(parts)


# --- log-probabilities ------------------------------------------------------------------------------------------------


def logprobs_of(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Report how likely given tokens are, and which are likeliest.

    Args:
        logits: `[N, V]` float32, before any processing.
        token_ids: `[N]` int64.
        num_top: how many of the likeliest, in [0, V].

    Returns:
        Logprobs of the tokens `[N]` float32; their ranks `[N]` int64 (1 + number of larger logits); the likeliest
        tokens `[N, num_top]` int64, by (-logprob, id); their logprobs `[N, num_top]` float32.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    column = token_ids.unsqueeze(1)
    ranks = (logits > logits.gather(1, column)).sum(dim=-1) + 1
    if num_top:
        top_ids = top_columns(logprobs, num_top)
    else:
        top_ids = torch.empty((len(logits), 0), dtype=torch.int64, device=logits.device)
    return logprobs.gather(1, column).squeeze(1), ranks, top_ids, logprobs.gather(1, top_ids)


_kernels = cpu_build.declared(octavo_greedy=(None, POINTER, SIZE, SIZE, SIZE, POINTER, CODE))
