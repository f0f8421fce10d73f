"""The gated feed-forward part of a layer. Source: Shazeer 2020 (GLU variants)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..kernels.decoder_stack import StackProduct
from ..kernels.gated_activation import GatedActivation
from ..kernels.quantized_weight import LinearWeight
from .layers import Linear, linear_for
from .parallel import ParallelGroup
from .sharding import share_evenly
from .weights import ALL, WeightReader

# Names of the gate's, the other input's and the output's projection.
DENSE_NAMES = ("gate_proj", "up_proj", "down_proj")


class Expert:
    """`down(act(gate(x)) * up(x))`, or a rank's part of that sum, of matrices that have been read.

    Args:
        gate_up, gate_up_bias: the gate's matrix and the other's, behind each other; None for no bias.
        down, down_bias: the output's.
    """

    def __init__(  # noqa: PLR0917 - two matrices, each with its bias, and what is done with them
        self,
        gate_up: LinearWeight,
        gate_up_bias: torch.Tensor | None,
        down: LinearWeight,
        down_bias: torch.Tensor | None,
        act: GatedActivation,
        linear: Linear,
    ) -> None:
        self.gate_up, self.gate_up_bias = gate_up, gate_up_bias
        self.down, self.down_bias = down, down_bias
        self.act, self.linear = act, linear

    def use(self, linear: Linear, acts: Mapping[GatedActivation, GatedActivation]) -> None:
        """Compute by another `linear`, and by what `acts` has in place of an activation."""
        self.linear, self.act = linear, acts.get(self.act, self.act)

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, hidden_size]` to this rank's part of the same."""
        inner = self.act(self.linear(x, self.gate_up, self.gate_up_bias))
        return self.linear(inner, self.down, self.down_bias)


class GatedMLP(Expert):
    """The feed-forward part of a layer; ranks divide the inner features.

    Args:
        names: as `DENSE_NAMES`.
        with_bias: each projection adds one.
        is_whole: this rank has all of it, and nothing is to be summed.
    """

    def __init__(  # noqa: PLR0917 - reader, name, sizes: as everything that is read from a checkpoint
        self,
        reader: WeightReader,
        prefix: str,
        hidden: int,
        inner: int,
        act: GatedActivation,
        group: ParallelGroup,
        *,
        names: tuple[str, ...] = DENSE_NAMES,
        with_bias: bool = False,
        is_whole: bool = False,
    ) -> None:
        gate, up, down = (f"{prefix}.{name}" for name in names)
        part = ALL if is_whole else share_evenly(group, inner)
        self._group = group
        gate_up = reader.take_fused_linear(
            (f"{gate}.weight", f"{up}.weight"), ((inner, hidden),) * 2, rows=(part, part)
        )
        gate_up_bias = (
            reader.take_fused((f"{gate}.bias", f"{up}.bias"), ((inner,),) * 2, rows=(part, part)) if with_bias else None
        )
        down_matrix = reader.take_linear(f"{down}.weight", hidden, inner, columns=part)
        down_bias = reader.take(f"{down}.bias", hidden) if with_bias else None
        down_bias = down_bias if group.tp_rank == 0 else None  # of the sum, it is part once
        linear = linear_for(reader.dtype, reader.device)
        super().__init__(gate_up, gate_up_bias, down_matrix, down_bias, act, linear)

    def for_stack(self) -> dict[str, Any]:
        """What a `StackLayer` has to know of it, by its names."""
        return {
            "gate_up": StackProduct(self.gate_up, self.gate_up_bias),
            "down": StackProduct(self.down, self.down_bias),
            "activation": self.act,
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, hidden_size]` to the same."""
        return self._group.all_reduce(self.partial(x))
