"""The counter-based generator against its published answers."""

import pytest
import torch
from scipy import stats

from octavo.kernels import philox

# Random123, file kat_vectors, philox4x32 with 10 rounds: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_a_known_counter_and_key_give_the_published_words(counter: str, key: str, expected: str) -> None:
    got = philox.philox4x32(torch.tensor(words(counter)).unsqueeze(1), torch.tensor(words(key)).unsqueeze(1))
    assert got.squeeze(1).tolist() == words(expected)


def test_a_column_does_not_depend_on_its_neighbours() -> None:
    counters = torch.tensor([words(counter) for counter, _, _ in KNOWN_ANSWERS] * 50).T
    keys = torch.tensor([words(key) for _, key, _ in KNOWN_ANSWERS] * 50).T
    expected = [words(answer) for _, _, answer in KNOWN_ANSWERS] * 50
    assert philox.philox4x32(counters, keys).T.tolist() == expected


def test_uniform_is_the_first_53_bits_of_the_answer() -> None:
    first, second = 0x6627E8D5, 0xE169C58D
    drawn = philox.uniform(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert drawn.item() == ((first << 21) | (second >> 11)) / 2**53


def test_uniform_distinguishes_every_bit_of_seed_and_position() -> None:
    one = torch.ones(64, dtype=torch.int64)
    bits = one << torch.arange(64)
    assert len(set(philox.uniform(bits, torch.zeros_like(one)).tolist())) == 64
    assert len(set(philox.uniform(torch.zeros_like(one)[:63], bits[:63]).tolist())) == 63


@pytest.mark.parametrize("along", ["seeds", "positions"])
def test_uniform_is_uniform_along_seeds_and_along_positions(along: str) -> None:
    varying, fixed = torch.arange(100_000), torch.full((100_000,), 7)
    drawn = philox.uniform(varying, fixed) if along == "seeds" else philox.uniform(fixed, varying)
    assert drawn.min() >= 0.0 and drawn.max() < 1.0
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 0.01
    neighbours = stats.pearsonr(drawn[:-1].numpy(), drawn[1:].numpy())
    assert neighbours.pvalue > 0.01
