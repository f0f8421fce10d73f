"""The gated feed-forward part of a layer, and the mixture of several, each of which sees some of the tokens.

Sources: Shazeer 2020 (GLU variants), Fedus et al. 2021 (Switch Transformer), Jiang et al. 2024 (Mixtral of Experts),
Yang et al. 2025 (Qwen3), and the implementations in `transformers`, to which the tokens are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .layers import GatedActivation, Linear, linear_for
from .parallel import ParallelGroup
from .sharding import share_evenly, share_roughly
from .weights import ALL, WeightReader

# Names of the gate's, the other input's and the output's projection.
DENSE_NAMES = ("gate_proj", "up_proj", "down_proj")


class GatedMLP:
    """`down(act(gate(x)) * up(x))`; ranks divide the inner features.

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
        names: tuple[str, str, str] = DENSE_NAMES,
        with_bias: bool = False,
        is_whole: bool = False,
    ) -> None:
        gate, up, down = (f"{prefix}.{name}" for name in names)
        part = ALL if is_whole else share_evenly(group, inner)
        self.act = act
        self.linear = linear_for(reader.dtype, reader.device)
        self._group = group
        self.gate_up = reader.take_fused_linear(
            (f"{gate}.weight", f"{up}.weight"), ((inner, hidden),) * 2, rows=(part, part)
        )
        self.gate_up_bias = (
            reader.take_fused((f"{gate}.bias", f"{up}.bias"), ((inner,),) * 2, rows=(part, part)) if with_bias else None
        )
        self.down = reader.take_linear(f"{down}.weight", hidden, inner, columns=part)
        down_bias = reader.take(f"{down}.bias", hidden) if with_bias else None
        self.down_bias = down_bias if group.tp_rank == 0 else None  # of the sum, it is part once

    def use(self, linear: Linear, acts: Mapping[GatedActivation, GatedActivation]) -> None:
        """Compute by another `linear`, and by what `acts` has in place of an activation."""
        self.linear, self.act = linear, acts.get(self.act, self.act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, hidden_size]` to the same."""
        return self._group.all_reduce(self.partial(x))

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sum that `forward` is."""
        inner = self.act(self.linear(x, self.gate_up, self.gate_up_bias))
        return self.linear(inner, self.down, self.down_bias)


@dataclass(frozen=True, slots=True)
class MixtureSettings:
    """What tells mixtures apart.

    Attributes:
        block: the mixture's name in the checkpoint, below the layer's.
        names: of an expert's projections, as `DENSE_NAMES`.
        num_experts, num_chosen: how many there are, and how many a token goes to.
        inner: features within an expert.
        normalizes: the chosen experts' weights are made to add up to one.
        rounds: those weights are rounded to the model's dtype.
        layers: whether a layer has a mixture in place of one gated MLP.
    """

    block: str
    names: tuple[str, str, str]
    num_experts: int
    num_chosen: int
    inner: int
    normalizes: bool
    rounds: bool
    layers: tuple[bool, ...]


class MixtureOfExperts:
    """A router that sends each token to a few of many gated MLPs and adds up what they say.

    Ranks divide each expert's inner features, or with expert parallel the experts. All have the same tokens and the
    same router, so either way each adds its part and one sum ends the layer.
    """

    def __init__(  # noqa: PLR0917 - reader, name, sizes: as everything that is read from a checkpoint
        self,
        reader: WeightReader,
        prefix: str,
        hidden: int,
        settings: MixtureSettings,
        act: GatedActivation,
        group: ParallelGroup,
    ) -> None:
        s, by_expert = settings, group.expert_parallel
        self._settings, self._group = s, group
        self.linear = linear_for(reader.dtype, reader.device)
        # Never quantised: it is small, and a wrong choice of expert is the dearest of errors.
        self._router = reader.take(f"{prefix}.{s.block}.gate.weight", s.num_experts, hidden)
        mine = share_roughly(group.tp_rank, group.tp_size, s.num_experts) if by_expert else range(s.num_experts)
        experts = f"{prefix}.{s.block}.experts."
        self.experts = {
            index: GatedMLP(reader, f"{experts}{index}", hidden, s.inner, act, group, names=s.names, is_whole=by_expert)
            for index in mine
        }
        reader.leave(*(f"{experts}{index}." for index in range(s.num_experts) if index not in self.experts))

    def use(self, linear: Linear, acts: Mapping[GatedActivation, GatedActivation]) -> None:
        """See `GatedMLP.use`."""
        self.linear = linear
        for expert in self.experts.values():
            expert.use(linear, acts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, hidden_size]` to the same."""
        s = self._settings
        probabilities = torch.softmax(self.linear(x, self._router, None).float(), dim=-1)
        weights, chosen = probabilities.topk(s.num_chosen, dim=-1)  # [num_tokens, num_chosen]
        if s.normalizes:
            weights /= weights.sum(dim=-1, keepdim=True)
        if s.rounds:
            weights = weights.to(x.dtype)
        # Sorted by expert, and within one by token: an expert's tokens lie behind each other.
        order = chosen.flatten().argsort(stable=True)
        tokens, weights = order // s.num_chosen, weights.flatten()[order].unsqueeze(-1)
        counts = chosen.flatten().bincount(minlength=s.num_experts).tolist()
        out = torch.zeros_like(x)
        end = 0
        for index, count in enumerate(counts):
            begin, end = end, end + count
            if count and index in self.experts:
                rows = tokens[begin:end]
                said = self.experts[index].partial(x.index_select(0, rows))
                out.index_add_(0, rows, (said * weights[begin:end]).to(x.dtype))
        return self._group.all_reduce(out)
