from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from octavo.models.errors import UnsupportedModelError
from octavo.models.rotary import rotary_table

CPU = torch.device("cpu")
_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}

# rope_parameters, max_position_embeddings, positions served
SCALINGS: dict[str, tuple[dict[str, Any], int, int]] = {
    "default": ({"rope_type": "default", "rope_theta": 500.0}, 64, 64),
    "linear": ({"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}, 64, 64),
    "dynamic, within the length of pre-training": (_DYNAMIC, 64, 48),
    "dynamic, past it": (_DYNAMIC, 64, 100),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 10000.0,
        },
        256,
        256,
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0},
        128,
        128,
    ),
    "longrope, short": (_LONG, 128, 32),
    "longrope, long": (_LONG, 128, 33),
    "longrope, factor given": ({**_LONG, "factor": 3.0, "attention_factor": 1.25}, 128, 128),
}


def their_angles(config: Any, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(num_positions)[None])
    return cos[0], sin[0]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_angles_are_bit_for_bit_those_of_transformers_at_the_served_length(scaling: str) -> None:
    parameters, max_position, served = SCALINGS[scaling]
    config = tiny_config("llama", rope_parameters=dict(parameters), max_position_embeddings=max_position)
    cos, sin = rotary_table(config, 16, served, device=CPU).chunk(2, dim=-1)
    their_cos, their_sin = their_angles(config, served)
    # Theirs repeat the angles for the second half of the head.
    assert torch.equal(torch.cat((cos, cos), dim=-1), their_cos)
    assert torch.equal(torch.cat((sin, sin), dim=-1), their_sin)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "spiral", "rope_theta": 1e4}, "rope_type 'spiral' is not supported; supported are default"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
        ({"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}, "mrope_section"),
    ],
)
def test_unknown_scalings_are_refused_by_name(parameters: dict[str, Any], message: str) -> None:
    config = tiny_config("llama")
    config.rope_parameters = parameters
    with pytest.raises(UnsupportedModelError, match=message):
        rotary_table(config, 16, 32, device=CPU)
