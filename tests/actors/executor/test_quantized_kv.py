"""Steps over a KV cache in another dtype than the model's: which tokens come out, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from c_library import HAS_C, needs_c
from tiny_models import greedy_reference, random_token_ids, reference_logits, save_tiny_model

from octavo.actors.executor.config import ExecutorConfig, KVCacheDtype
from octavo.actors.executor.device import Device
from octavo.actors.executor.runner import StepRunner
from octavo.actors.kv_allocator.sizing import kv_row_bytes
from octavo.kernels import paged_attention, rotary
from octavo.kernels.kv_quantization import row_width
from octavo.messages.ids import BlockId, Epoch, RequestId, StepId
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep, StartRequest
from octavo.models.interface import KVCacheSpec

BLOCK_SIZE = 4
PROMPT = random_token_ids(21, seed=4)
NUM_NEW = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
# The smallest lead of a greedy token over the next in these models, in logits; a quantised cache moves them by less.
WIDE_MARGIN = 0.07
QUANTIZED: tuple[KVCacheDtype, ...] = ("int8", "fp8")


class Sequencer:
    """Requests on a runner, stepped by hand; block tables are this class's to give out."""

    def __init__(self, runner: StepRunner) -> None:
        self.runner = runner
        self._next_block = 1
        self._next_step = 0
        self.blocks: dict[int, list[BlockId]] = {}
        self.computed: dict[int, int] = {}

    def take_blocks(self, count: int) -> list[BlockId]:
        self._next_block += count
        return [BlockId(block) for block in range(self._next_block - count, self._next_block)]

    def start(self, name: int, tokens: Sequence[int], *, reuse: Sequence[BlockId] = ()) -> StartRequest:
        """A request whose first blocks are another's, all but its newest token's worth of them computed."""
        needed = -(-(len(tokens) + NUM_NEW) // BLOCK_SIZE)
        self.blocks[name] = [*reuse, *self.take_blocks(needed - len(reuse))]
        self.computed[name] = len(reuse) * BLOCK_SIZE
        packed = torch.tensor(list(tokens), dtype=torch.int32).numpy().tobytes()
        return StartRequest(RequestId(name), packed, len(tokens), self.computed[name], GREEDY)

    def step(
        self, num_tokens: dict[int, int], starts: Sequence[StartRequest] = (), drop: Sequence[int] = ()
    ) -> dict[int, int]:
        """Compute so many tokens of each request; returns the tokens sampled."""
        self._next_step += 1
        done = self.runner.execute(
            ExecuteStep(
                Epoch(0),
                StepId(self._next_step),
                tuple(RequestId(name) for name in num_tokens),
                tuple(num_tokens.values()),
                start=tuple(starts),
                block_tables=tuple(tuple(self.blocks[start.request_id]) for start in starts),
                drop=tuple(RequestId(name) for name in drop),
            )
        )
        return dict(zip(done.request_ids, done.token_ids, strict=True))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("quantized_kv")
    return folder, save_tiny_model("qwen3", folder, seed=1, initializer_range=0.05)


def device_on(folder: Path, **fields: Any) -> Device:
    return Device(
        ExecutorConfig(
            model_path=str(folder),
            **{"dtype": "float32", "block_size": BLOCK_SIZE, "num_blocks": 64, "max_model_len": 64, **fields},
        )
    )


def sequencer_on(folder: Path, **fields: Any) -> Sequencer:
    device = device_on(folder, **fields)
    return Sequencer(StepRunner(device, max_num_seqs=4, pipeline_depth=2, block_size=BLOCK_SIZE))


def generate(sequencer: Sequencer, name: int, tokens: Sequence[int], count: int, **options: Any) -> list[int]:
    """Greedy tokens of one request alone, its prompt in two chunks."""
    start = sequencer.start(name, tokens, **options)
    rest = len(tokens) - sequencer.computed[name]
    sampled = sequencer.step({name: rest - 1}, [start]) if rest > 1 else {}
    assert not sampled
    found = [sequencer.step({name: 1}, [] if rest > 1 else [start])[name]]
    found.extend(sequencer.step({name: 1})[name] for _ in range(count - 1))
    return found


@pytest.fixture(scope="module")
def expected(checkpoint: tuple[Path, Any]) -> list[int]:
    """The model's own greedy tokens, each of which leads by a wide margin."""
    tokens = greedy_reference(checkpoint[1], PROMPT, NUM_NEW)
    logits = reference_logits(checkpoint[1], [*PROMPT, *tokens])[len(PROMPT) - 1 : -1]
    best = logits.topk(2, dim=-1).values
    assert (best[:, 0] - best[:, 1]).min() > WIDE_MARGIN
    return tokens


@pytest.fixture(params=["c", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "torch":
        monkeypatch.setattr(paged_attention, "_kernels", lambda: None)
        monkeypatch.setattr(rotary, "_kernels", lambda: None)
    elif not HAS_C:
        pytest.skip("no C compiler: the torch path is all there is")
    yield request.param


@pytest.mark.parametrize("dtype", [*QUANTIZED, "bfloat16", "float32"])
@pytest.mark.parametrize("model_impl", ["native", "transformers"])
def test_tokens_are_those_of_the_whole_model(
    dtype: KVCacheDtype, model_impl: str, checkpoint: tuple[Path, Any], expected: list[int], kernels: str
) -> None:
    sequencer = sequencer_on(checkpoint[0], kv_cache_dtype=dtype, model_impl=model_impl)
    assert generate(sequencer, 0, PROMPT, NUM_NEW) == expected


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_a_prefix_that_another_request_wrote_is_read_as_if_it_were_ones_own(
    dtype: KVCacheDtype, checkpoint: tuple[Path, Any], expected: list[int]
) -> None:
    sequencer = sequencer_on(checkpoint[0], kv_cache_dtype=dtype)
    assert generate(sequencer, 0, PROMPT, 2) == expected[:2]
    shared = sequencer.blocks[0][: len(PROMPT) // BLOCK_SIZE]
    assert generate(sequencer, 1, PROMPT, NUM_NEW, reuse=shared) == expected


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_request_that_was_preempted_goes_on_as_it_was(
    dtype: KVCacheDtype, deterministic: bool, checkpoint: tuple[Path, Any], expected: list[int]
) -> None:
    if deterministic and not HAS_C:
        pytest.skip("deterministic arithmetic needs the C kernels")
    sequencer = sequencer_on(checkpoint[0], kv_cache_dtype=dtype, deterministic=deterministic)
    begun = generate(sequencer, 0, PROMPT, 5)
    assert begun == expected[:5]
    sequencer.step({}, drop=[0])
    # Beside another request, in blocks that hold what others left there, all tokens so far in one chunk.
    tokens = [*PROMPT, *begun]
    again, other = sequencer.start(2, tokens), sequencer.start(3, PROMPT[:9])
    sampled = sequencer.step({2: len(tokens), 3: 9}, [again, other])
    found = [sampled[2]]
    while len(begun) + len(found) < NUM_NEW:
        found.append(sequencer.step({2: 1, 3: 1})[2])
    assert begun + found == expected


@needs_c
@pytest.mark.parametrize("dtype", QUANTIZED)
def test_deterministic_logits_over_codes_are_the_same_bits_in_any_chunks_and_company(
    dtype: KVCacheDtype, checkpoint: tuple[Path, Any]
) -> None:
    sequencer = sequencer_on(checkpoint[0], kv_cache_dtype=dtype, deterministic=True)
    device = sequencer.runner.device
    seen: list[torch.Tensor] = []
    forward = device.forward
    device.forward = lambda arrays: seen.append(forward(arrays)) or seen[-1]  # type: ignore[assignment,func-returns-value]
    sequencer.step({0: len(PROMPT)}, [sequencer.start(0, PROMPT)])
    whole = seen[-1][-1]
    sequencer.step({1: 13, 2: 7}, [sequencer.start(1, PROMPT), sequencer.start(2, PROMPT[5:12])])
    sequencer.step({2: 1, 1: len(PROMPT) - 13})
    assert torch.equal(seen[-1][-1], whole)


@pytest.mark.parametrize(("dtype", "item"), [("int8", 1), ("fp8", 1), ("bfloat16", 2), ("auto", 4)])
def test_the_cache_takes_what_its_dtype_takes(dtype: KVCacheDtype, item: int, checkpoint: tuple[Path, Any]) -> None:
    device = device_on(checkpoint[0], kv_cache_dtype=dtype, num_blocks=None, kv_cache_memory_bytes=100_000)
    specs = device.model.kv_cache_specs
    scale = 4 if dtype in QUANTIZED else 0
    bytes_per_block = BLOCK_SIZE * sum(2 * spec.num_kv_heads * (spec.k_head_dim * item + scale) for spec in specs)
    assert device.plan.bytes_per_block == bytes_per_block
    assert device.plan.num_blocks == min(100_000 // bytes_per_block, 256 * 64 // BLOCK_SIZE)
    assert sum(cache.k.nbytes + cache.v.nbytes for cache in device._kv_caches) == device.kv_cache_bytes


@pytest.mark.parametrize(
    ("dtype", "name", "bits"),
    [(torch.int8, "int8", 8), (torch.float8_e4m3fn, "fp8", 8), (torch.bfloat16, "bfloat16", 16)],
)
def test_the_planner_counts_the_bytes_that_the_executor_takes(dtype: torch.dtype, name: str, bits: int) -> None:
    assert kv_row_bytes(128, name, bits) == row_width(128, dtype) * dtype.itemsize
    spec = KVCacheSpec(8, 128, 96)
    assert spec.bytes_per_token(dtype) == 8 * (kv_row_bytes(128, name, bits) + kv_row_bytes(96, name, bits))
