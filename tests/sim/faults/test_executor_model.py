from __future__ import annotations

from array import array

import pytest

from octavo.messages.ids import BlockId, Epoch, RequestId, StepId
from octavo.messages.request import SubmitRequest
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep, StartRequest
from octavo.sim.faults.executor_model import ExecutorModel, PoisonError
from octavo.sim.faults.oracle import Oracle
from octavo.sim.faults.violation import Violation

PROMPT = array("i", [3, 1, 2]).tobytes()


def make(*, is_poison: bool = False, salt: str = "") -> tuple[ExecutorModel, Oracle]:
    submit = SubmitRequest(RequestId(0), PROMPT, SamplingParams(max_tokens=5, seed=1), cache_salt=salt)
    oracle = Oracle(submit, 20, 8, is_poison=is_poison)
    model = ExecutorModel(
        Epoch(0),
        {RequestId(0): oracle, RequestId(1): Oracle(submit, 20, 8)},
        num_blocks=8,
        block_size=2,
        max_num_seqs=2,
        max_num_batched_tokens=8,
        max_sequence_len=20,
    )
    return model, oracle


def step(number: int, *, tokens: int, start: tuple[int, ...] = (), blocks: tuple[int, ...] = ()) -> ExecuteStep:
    request_id = RequestId(0)
    starts = tuple(StartRequest(RequestId(i), PROMPT, 3, 0, SamplingParams()) for i in start)
    append = ((request_id, tuple(map(BlockId, blocks))),) if blocks else ()
    return ExecuteStep(
        Epoch(0), StepId(number), (request_id,), (tokens,), starts, ((),) * len(starts), append_blocks=append
    )


def test_rows_sample_the_oracles_tokens() -> None:
    model, oracle = make()
    results = [
        model.execute(step(0, tokens=3, start=(0,), blocks=(5, 2))),
        model.execute(step(1, tokens=1)),
        model.execute(step(2, tokens=1, blocks=(0,))),
    ]
    assert [result.token_ids[0] for result in results] == oracle.outputs()[:3]


def test_a_block_that_another_row_overwrote_is_found() -> None:
    model, _ = make()
    model.execute(step(0, tokens=3, start=(0,), blocks=(5, 2)))
    other = ExecuteStep(
        Epoch(0),
        StepId(1),
        (RequestId(1),),
        (1,),
        (StartRequest(RequestId(1), PROMPT, 3, 0, SamplingParams()),),
        ((),),
        append_blocks=((RequestId(1), (BlockId(2),)),),
    )
    model.execute(other)
    with pytest.raises(Violation, match="another history"):
        model.execute(step(2, tokens=1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (step(0, tokens=3, start=(0,), blocks=(1,)), "no block to write to"),
        (step(0, tokens=3, start=(0,), blocks=(1, 2, 3)), "not as long as its tokens need"),
        (step(0, tokens=4, start=(0,), blocks=(1, 2)), "tokens that nobody knows"),
        (step(0, tokens=3), "no running request"),
    ],
)
def test_a_step_that_cannot_be_is_found(wrong: ExecuteStep, message: str) -> None:
    model, _ = make()
    if not wrong.start:
        with pytest.raises(Violation, match=message):
            model.execute(wrong)
        return
    with pytest.raises(Violation, match=message):
        model.execute(wrong)


def test_a_poison_kills_before_anything_is_said() -> None:
    model, _ = make(is_poison=True)
    with pytest.raises(PoisonError):
        model.execute(step(0, tokens=3, start=(0,), blocks=(5, 2)))


def test_the_salt_is_part_of_the_history() -> None:
    assert make()[1].histories[0] != make(salt="a")[1].histories[0]
