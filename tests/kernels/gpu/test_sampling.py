"""The sampler's kernels against their meaning: any mix of filters, ties, infinities, windows that miss.

Chunks, windows and samples are made small here, so that small rows meet what large ones do; one test has them as large
as they are.
"""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from octavo.kernels import device_sampling, philox
from octavo.kernels.gpu import philox as gpu_philox
from octavo.kernels.gpu import sampling as gpu
from octavo.kernels.gpu import sampling_choose, sampling_stats

INT64 = torch.iinfo(torch.int64)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_stats, "CHUNK_SIZE", 512)
    monkeypatch.setattr(gpu, "CAPACITY", 128)
    monkeypatch.setattr(gpu, "SAMPLE_SIZE", 128)


class Rows:
    """Rows to sample from, each with its own parameters."""

    def __init__(self, logits: torch.Tensor, **params: list[float]) -> None:
        self.logits = logits
        num_rows = len(logits)

        def column(name: str, default: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(params.get(name, [default] * num_rows), dtype=dtype)

        self.temperature = column("temperature", 1.0, torch.float32)
        self.top_k = column("top_k", 0, torch.int32)
        self.top_p = column("top_p", 1.0, torch.float32)
        self.min_p = column("min_p", 0.0, torch.float32)
        generator = torch.Generator().manual_seed(5)
        self.seeds = torch.randint(INT64.min, INT64.max, (num_rows,), generator=generator)
        self.positions = torch.randint(0, 2**40, (num_rows,), generator=generator)

    def of(self, rows: slice) -> tuple[torch.Tensor, ...]:
        values = (self.logits, self.temperature, self.top_k, self.top_p, self.min_p, self.seeds, self.positions)
        return tuple(x[rows] for x in values)

    def ours(self, rows: slice = slice(None), *, filtered: bool = True) -> list[int]:
        return gpu.sample_on_device(*self.of(rows), filtered=filtered).tolist()

    def meant(self) -> list[int]:
        return device_sampling.sample_on_device_ref(*self.of(slice(None))).tolist()


def randn(num_rows: int, vocab_size: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


@triton.jit
def _uniform_kernel(seeds_ptr, positions_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    bits = gpu_philox.uniform_bits(tl.load(seeds_ptr + index), tl.load(positions_ptr + index))
    tl.store(out_ptr + index, bits.to(tl.int64))


@triton.jit
def _philox_kernel(counter_ptr, key_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    words = gpu_philox.philox4x32(
        *(tl.load(counter_ptr + index), tl.load(counter_ptr + SIZE + index)),
        *(tl.load(counter_ptr + 2 * SIZE + index), tl.load(counter_ptr + 3 * SIZE + index)),
        *(tl.load(key_ptr + index), tl.load(key_ptr + SIZE + index)),
    )
    for word in tl.static_range(4):
        tl.store(out_ptr + word * SIZE + index, words[word])


@triton.jit
def _fraction_kernel(bits_ptr, totals_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    bits = tl.load(bits_ptr + index).to(tl.uint64)
    tl.store(out_ptr + index, gpu_philox.fraction_of(bits, tl.load(totals_ptr + index)))


def test_philox_has_the_published_words() -> None:
    # Known answers of Random123 1.14 (kat_vectors, philox4x32 10).
    full = 0xFFFFFFFF
    counter = [[0, full, 0x243F6A88], [0, full, 0x85A308D3], [0, full, 0x13198A2E], [0, full, 0x03707344]]
    key = [[0, full, 0xA4093822], [0, full, 0x299F31D0]]
    pad = [0]  # a power of two of columns
    words = torch.zeros(4, 4, dtype=torch.uint32)
    _philox_kernel[(1,)](
        torch.tensor([line + pad for line in counter], dtype=torch.int64).to(torch.uint32),
        torch.tensor([line + pad for line in key], dtype=torch.int64).to(torch.uint32),
        words,
        SIZE=4,
    )
    assert words.to(torch.int64)[:, :3].T.tolist() == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]


def test_uniforms_have_the_bits_of_the_torch_version() -> None:
    generator = torch.Generator().manual_seed(1)
    seeds = torch.randint(INT64.min, INT64.max, (256,), generator=generator)
    positions = torch.randint(0, 2**62, (256,), generator=generator)
    seeds[:4] = torch.tensor([0, -1, INT64.min, INT64.max])
    positions[:4] = torch.tensor([0, 2**32 - 1, 2**32, INT64.max])
    bits = torch.zeros(256, dtype=torch.int64)
    _uniform_kernel[(1,)](seeds, positions, bits, SIZE=256)
    assert torch.equal(bits.double() * 2.0**-53, philox.uniform(seeds, positions))


def test_a_fraction_of_a_total_is_exact() -> None:
    bits = [0, 1, 2**53 - 1, 2**52, 2**52 - 1, 123456789012345, 2**53 - 1, 77]
    totals = [2**62, 2**62 + 1, 2**63 - 1, 7, 1, 987654321098765432, 1, 0]
    out = torch.zeros(8, dtype=torch.int64)
    _fraction_kernel[(1,)](torch.tensor(bits), torch.tensor(totals), out, SIZE=8)
    assert out.tolist() == [b * t >> 53 for b, t in zip(bits, totals, strict=True)]


@pytest.mark.parametrize(("vocab_size", "filtered"), [(1, False), (63, True), (1000, False)])
def test_greedy_and_plain_rows(vocab_size: int, filtered: bool) -> None:
    logits = randn(6, vocab_size, 2)
    logits[2] = (logits[2] / 3).round()  # ties
    logits[3, : vocab_size // 2] = -math.inf
    rows = Rows(logits, temperature=[0.0, 1.0, 9e-6, 0.6, 1.7, 0.01])
    assert rows.ours(filtered=filtered) == rows.meant()


def test_any_mix_of_filters_in_one_launch() -> None:
    num_rows = 16
    generator = torch.Generator().manual_seed(3)
    temperature = (torch.rand(num_rows, generator=generator) + 0.3).tolist()
    temperature[4] = 0.0
    rows = Rows(
        randn(num_rows, 1100, 4),
        temperature=temperature,
        top_k=[0, 1, 5, 64, 5, 0, 0, 50, 0, 100, 0, 0, 3, 2000, 20, 0],
        top_p=[0.9, 1.0, 0.7, 0.95, 0.5, 1e-6, 0.99, 1.0, 1.0, 1.0, 0.5, 0.8, 1e-9, 0.6, 0.999, 0.3],
        min_p=[0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.01, 0.0, 0.05, 0.0, 0.0, 0.2, 0.0, 0.0, 0.0, 1.0],
    )
    together = rows.ours()
    assert together == rows.meant()
    # Bitwise what it is in a batch: a token is an integer of integers.
    assert rows.ours(slice(6, 8)) == together[6:8]


def test_ties_are_kept_from_the_lowest_id() -> None:
    logits = torch.zeros(7, 700)
    logits[1, 300:] = 1.0
    logits[2, ::2] = -0.0
    logits[3, ::100] = 5.0
    logits[4] = randn(1, 700, 6)[0].round()
    logits[5] = logits[4]
    logits[6] = -math.inf
    logits[6, 650:654] = 1.0
    rows = Rows(
        logits,
        top_k=[10, 0, 33, 3, 200, 0, 0],
        top_p=[1.0, 0.5, 1.0, 0.9, 1.0, 0.6, 0.5],
        min_p=[0.0, 0.0, 0.0, 0.0, 0.0, 1e-6, 0.0],
    )
    tokens = rows.ours()
    assert tokens == rows.meant()
    assert tokens[0] < 10
    assert tokens[2] < 33
    assert tokens[3] in {0, 100, 200}
    assert tokens[6] in {650, 651}


def test_rows_with_nothing_to_choose_from_have_no_token() -> None:
    logits = randn(8, 600, 7)
    logits[0, 3] = math.nan
    logits[1, 599] = math.nan
    logits[2, 100] = math.inf
    logits[3] = -math.inf
    logits[4, 0] = math.nan
    logits[5] = -math.inf
    logits[6, 5:] = -math.inf
    rows = Rows(
        logits,
        temperature=[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0],
        top_k=[5, 0, 0, 3, 0, 0, 300, 0],
        top_p=[1.0, 0.5, 1.0, 0.5, 1.0, 1.0, 0.9, 1.0],
    )
    tokens = rows.ours()
    assert tokens[:6] == [-1] * 6
    assert tokens == rows.meant()


def test_all_weight_on_one_token() -> None:
    logits = torch.full((4, 900), -200.0)
    logits[:, 555] = 300.0
    rows = Rows(logits, top_k=[0, 0, 7, 0], top_p=[1.0, 0.999, 0.5, 1.0], min_p=[0.0, 0.0, 0.0, 0.5])
    assert rows.ours() == [555] * 4


def test_a_window_that_misses_or_overflows_is_made_up_for_by_bisection(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = randn(3, 1100, 8, scale=0.5)  # flat: a top-p of 0.9 keeps hundreds
    rows = Rows(logits, top_k=[400, 300, 0], top_p=[1.0, 0.7, 0.9], min_p=[0.0, 0.0, 0.3])
    monkeypatch.setattr(gpu, "CAPACITY", 32)
    assert rows.ours() == rows.meant()


@pytest.mark.parametrize("low_is_wrong", [False, True])
def test_a_window_on_the_wrong_side_is_noticed(low_is_wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(randn(2, 1100, 9, scale=1.0), top_p=[0.5, 0.6])

    class WrongBracket:
        def __getitem__(self, _grid: object) -> object:
            def launch(*args: torch.Tensor, **_constexprs: object) -> None:
                window = args[8]
                assert window.shape == (2, 3)
                window[:, 0], window[:, 1] = (2.9, 3.0) if low_is_wrong else (-1.0, -0.9)
                window[:, 2] = -math.inf

            return launch

    monkeypatch.setattr(gpu, "bracket_kernel", WrongBracket())
    assert rows.ours() == rows.meant()


def test_a_window_of_a_large_vocabulary_holds_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # as large as they are
    assert (sampling_stats.CHUNK_SIZE, gpu.CAPACITY, gpu.SAMPLE_SIZE) == (2048, 8192, 8192)
    rows = Rows(randn(3, 30_001, 10, scale=1.0), top_p=[0.9, 0.95, 1.0], top_k=[0, 0, 50], min_p=[0.0, 0.02, 0.0])
    monkeypatch.setattr(sampling_choose, "search_row", None)  # any call of it would fail
    assert rows.ours() == rows.meant()


def test_draws_follow_the_distribution_that_the_filters_leave() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.5, -3.0]]).expand(12, -1).contiguous()
    rows = Rows(logits, top_k=[4] * 12, top_p=[0.9] * 12)
    tokens = rows.ours()
    assert tokens == rows.meant()
    assert set(tokens) == {0, 1, 4}


def test_it_writes_where_it_is_told_and_nothing_for_no_rows() -> None:
    rows = Rows(randn(2, 50, 11))
    out = torch.full((2,), -7)
    assert gpu.sample_on_device(*rows.of(slice(None)), out=out, filtered=False) is out
    assert out.tolist() == rows.meant()
    assert gpu.sample_on_device(*rows.of(slice(0, 0))).tolist() == []


@pytest.mark.parametrize(
    "logits", [torch.zeros(2, 4, dtype=torch.float16), torch.zeros(4, 2).T, torch.zeros(4), torch.zeros(1, 1 << 19)]
)
def test_logits_that_cannot_be_read_are_refused(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"float32|vocabulary"):
        gpu.check_logits(logits)


def test_on_a_cpu_the_meaning_answers() -> None:
    rows = Rows(
        randn(5, 300, 12), top_k=[0, 5, 0, 100, 0], top_p=[1.0, 0.9, 0.8, 0.9, 1.0], temperature=[1, 1, 1, 1, 0]
    )
    out = torch.zeros(5, dtype=torch.int64)
    assert device_sampling.sample_on_device(*rows.of(slice(None)), out=out) is out
    assert out.tolist() == rows.ours()
