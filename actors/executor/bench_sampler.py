"""How long sampling takes: `python -m octavo.actors.executor.bench_sampler`.

Prints the median time of a step for several kinds of rows, beside plain torch on the same logits: `argmax`,
`softmax` + `multinomial`, and for filtered rows a full sort, softmax, cumulative sum and `multinomial`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from ...messages.ids import RequestId
from ...messages.sampling import SamplingParams
from .sampler import Sampler

_SHAPES = ["1x151936", "32x151936", "256x4096"]
_KINDS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0.0, seed=0),
    "temperature 0.8": SamplingParams(temperature=0.8, seed=0),
    "min-p 0.05": SamplingParams(min_p=0.05, seed=0),
    "top-p 0.95": SamplingParams(top_p=0.95, seed=0),
    "top-k 50, top-p 0.95": SamplingParams(top_k=50, top_p=0.95, seed=0),
    "all penalties, temperature": SamplingParams(
        repetition_penalty=1.1, frequency_penalty=0.1, presence_penalty=0.1, seed=0
    ),
    "greedy, 5 logprobs": SamplingParams(temperature=0.0, logprobs=5, seed=0),
}


def _sorted_multinomial(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Filter the textbook way."""
    values, ids = logits.sort(dim=-1, descending=True)
    if top_k:
        values[:, top_k:] = float("-inf")
    probs = torch.softmax(values, dim=-1)
    probs[(probs.cumsum(dim=-1) - probs) >= top_p] = 0.0
    return ids.gather(1, torch.multinomial(probs, 1))


def _plain_torch(kind: str, logits: torch.Tensor) -> object:
    if kind.startswith("greedy"):
        return logits.argmax(dim=-1)
    if kind.startswith("top-"):
        return _sorted_multinomial(logits, 50 if kind.startswith("top-k") else 0, 0.95)
    return torch.multinomial(torch.softmax(logits / 0.8, dim=-1), 1)


def _median_ms(step: Callable[[], object], repeats: int) -> float:
    step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m octavo.actors.executor.bench_sampler", description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=_SHAPES, metavar="ROWSxVOCABULARY", help=" ".join(_SHAPES))
    shapes = [tuple(map(int, shape.split("x"))) for shape in parser.parse_args().shapes]
    print(f"{torch.get_num_threads()} threads; ms a step")
    print(f"{'rows x vocabulary':>18}  {'kind':28}{'octavo':>9}{'torch':>9}")
    generator = torch.Generator().manual_seed(0)
    for num_rows, vocab_size in shapes:
        logits = torch.randn(num_rows, vocab_size, generator=generator) * 3
        for kind, params in _KINDS.items():
            sampler = Sampler(vocab_size)
            request_ids = [RequestId(row) for row in range(num_rows)]
            for request_id in request_ids:
                sampler.add(request_id, params, [1, 2, 3], 3, (0,))
            repeats = max(5, min(50, 20_000_000 // logits.numel()))
            ours = _median_ms(lambda s=sampler, r=request_ids, x=logits: s.sample(x, r), repeats)  # type: ignore[misc]
            theirs = _median_ms(lambda k=kind, x=logits: _plain_torch(k, x), 5)  # type: ignore[misc]
            print(f"{num_rows:>7} x {vocab_size:>8}  {kind:28}{ours:9.2f}{theirs:9.2f}")


if __name__ == "__main__":
    main()
