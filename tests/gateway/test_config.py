"""What a configuration is held to before anything is loaded."""

from __future__ import annotations

import math
from typing import Any

import pytest

from octavo import Engine
from octavo.gateway.config import EngineConfig, make_config
from octavo.messages.errors import InvalidConfigError

WRONG: list[tuple[str, Any]] = [
    ("block_size", 0),
    ("block_size", 300),
    ("max_num_seqs", 0),
    ("max_num_batched_tokens", -1),
    ("max_model_len", 1),
    ("num_blocks", 0),
    ("kv_cache_memory_bytes", -5),
    ("memory_utilization", 0.0),
    ("memory_utilization", 1.5),
    ("memory_utilization", math.nan),
    ("max_num_queued_requests", 0),
    ("max_num_queued_tokens", 0),
    ("pipeline_depth", 0),
    ("num_threads", 0),
    ("max_logprobs", -2),
    ("priority_aging_s", -1.0),
    ("priority_aging_s", math.inf),
    ("long_prefill_token_threshold", -1),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_number_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    for make in (make_config, lambda fields: EngineConfig(**fields), lambda fields: Engine(**fields)):
        with pytest.raises(InvalidConfigError, match=field) as caught:
            make({field: value})
        assert (caught.value.field, caught.value.code) == (field, "invalid_config")


@pytest.mark.parametrize(("field", "value"), [("dtype", "int3"), ("max_num_seqs", "many"), ("model", 3)])
def test_a_value_of_a_wrong_type_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidConfigError, match=field) as caught:
        make_config({field: value})
    assert caught.value.field == field


def test_an_unknown_field_names_the_nearest() -> None:
    with pytest.raises(InvalidConfigError, match="'max_num_seq': did you mean max_num_seqs"):
        make_config({"max_num_seq": 3})
    with pytest.raises(InvalidConfigError, match="there are: model, tokenizer"):
        make_config({"zzz": 3})


def test_the_bounds_themselves_are_taken() -> None:
    config = make_config({"block_size": 256, "max_num_seqs": 1, "memory_utilization": 1.0, "max_model_len": 2})
    assert (config.block_size, config.max_num_seqs) == (256, 1)
    assert make_config({}) == EngineConfig()
