"""A router and the experts that it sends tokens to, in place of one gated MLP.

Sources: Fedus et al. 2021 (Switch Transformer), Jiang et al. 2024 (Mixtral of Experts), Yang et al. 2025 (Qwen3),
OpenAI 2025 (gpt-oss), and the implementations in `transformers`, to which the tokens are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..kernels import mixture as kernels
from ..kernels.expert_codes import coded
from ..kernels.expert_stack import AnyExpertStack, CodedExpertStack, ExpertStack, is_fusable
from ..kernels.gated_activation import GatedActivation
from ..kernels.quantized_weight import LinearWeight
from .errors import UnsupportedModelError
from .layers import Linear, linear_for
from .mlp import Expert, GatedMLP
from .parallel import ParallelGroup
from .sharding import share_evenly, share_roughly
from .weights import ALL, WeightReader

# Names of the gates' and other inputs' projection together, and of the output's, where all experts share one tensor.
STACKED_NAMES = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class MixtureSettings:
    """What tells mixtures apart.

    Attributes:
        block: the mixture's name in the checkpoint, below the layer's.
        names: of an expert's projections, as `mlp.DENSE_NAMES`; or `STACKED_NAMES`, where experts have biases too.
        num_experts, num_chosen: how many there are, and how many a token goes to.
        inner: features within an expert.
        normalizes: the chosen experts' weights are made to add up to one.
        rounds: those weights are rounded to the model's dtype.
        layers: whether a layer has a mixture in place of one gated MLP.
        router: its name below the mixture's.
        router_bias: it adds one.
        of_chosen: weights are the softmax over the chosen experts, not parts of that over all.
    """

    block: str
    names: tuple[str, ...]
    num_experts: int
    num_chosen: int
    inner: int
    normalizes: bool
    rounds: bool
    layers: tuple[bool, ...]
    router: str = "gate"
    router_bias: bool = False
    of_chosen: bool = False


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
        s = settings
        self._settings, self._group, self._dtype = s, group, reader.dtype
        self.linear = linear_for(reader.dtype, reader.device)
        # Never quantised: it is small, and a wrong choice of expert is the dearest of errors.
        router = f"{prefix}.{s.block}.{s.router}"
        self._router = reader.take(f"{router}.weight", s.num_experts, hidden)
        self._router_bias = reader.take(f"{router}.bias", s.num_experts) if s.router_bias else None
        self.batch_invariant = False
        self._stack: AnyExpertStack | None = None
        self.experts: dict[int, Expert] = {}
        given = (reader, f"{prefix}.{s.block}.experts", hidden, s, act, group)
        if s.names == STACKED_NAMES:
            self._stack = read_coded_experts(*given)
            if self._stack is None:
                self.experts = read_stacked_experts(*given)
        else:
            self.experts = read_experts(*given)

    def stack_experts(self) -> None:
        """Compute by products over all experts at once, as a GPU does, which must not wait for the router's choice.

        Call it when the experts' contents are there. Quantised ones stay codes, in the layout of those products; only
        what cannot lie so (see `coded`) becomes floating numbers: they are right, and take 16 or 32 bits each.

        Raises:
            UnsupportedModelError: the experts are activated in a way that cannot be fused.
        """
        if self._stack is not None:  # they were read as codes
            return
        experts = list(self.experts.values())
        act = experts[0].act
        if not is_fusable(act):
            raise UnsupportedModelError("this activation is not supported in a mixture of experts on a GPU")
        b13 = [expert.gate_up_bias for expert in experts if expert.gate_up_bias is not None]
        b2 = [expert.down_bias for expert in experts if expert.down_bias is not None]
        biases = (torch.stack(b13) if b13 else None, torch.stack(b2) if b2 else None)
        first = next(iter(self.experts))
        of_w13, of_w2 = [expert.gate_up for expert in experts], [expert.down for expert in experts]
        coded_w13 = coded(of_w13)
        coded_w2 = None if coded_w13 is None else coded(of_w2)
        if coded_w13 is not None and coded_w2 is not None:
            self._stack = CodedExpertStack(coded_w13, coded_w2, *biases, first, act)
            self.experts.clear()  # the memory that each had is given back
            return
        w13, w2 = _stacked(of_w13, self._dtype), _stacked(of_w2, self._dtype)
        self._stack = ExpertStack(w13, w2, *biases, first, act)
        for index, expert in enumerate(experts):  # likewise
            expert.gate_up, expert.down = w13[index], w2[index]

    def use(self, linear: Linear, acts: Mapping[GatedActivation, GatedActivation]) -> None:
        """See `Expert.use`."""
        self.linear = linear
        for expert in self.experts.values():
            expert.use(linear, acts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, hidden_size]` to the same."""
        s = self._settings
        logits = self.linear(x, self._router, self._router_bias)
        weights, chosen = kernels.route(logits, s.num_chosen, of_chosen=s.of_chosen, normalizes=s.normalizes)
        if s.rounds:
            weights = weights.to(x.dtype)
        if self._stack is not None:
            said = kernels.mixture(x, weights, chosen, self._stack, batch_invariant=self.batch_invariant)
            return self._group.all_reduce(said)
        return self._group.all_reduce(self._one_by_one(x, weights, chosen))

    def _one_by_one(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """This rank's part, expert by expert: on a CPU, where the choice is at hand."""
        s = self._settings
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
        return out


def stack_on_device(blocks: Sequence[Expert | MixtureOfExperts], device: torch.device) -> None:
    """`stack_experts` of every mixture among a model's feed-forward blocks that has been read, on anything but a CPU.

    One layer after the other: what it takes for a moment is one layer's experts.
    """
    if device.type != "cpu":
        for block in blocks:
            if isinstance(block, MixtureOfExperts):
                block.stack_experts()


def read_experts(  # noqa: PLR0917 - as `MixtureOfExperts`
    reader: WeightReader,
    prefix: str,
    hidden: int,
    settings: MixtureSettings,
    act: GatedActivation,
    group: ParallelGroup,
) -> dict[int, Expert]:
    """A rank's experts by number, of a checkpoint that has tensors for each."""
    s, by_expert = settings, group.expert_parallel
    experts: dict[int, Expert] = {
        index: GatedMLP(reader, f"{prefix}.{index}", hidden, s.inner, act, group, names=s.names, is_whole=by_expert)
        for index in held_experts(s, group)
    }
    reader.leave(*(f"{prefix}.{index}." for index in range(s.num_experts) if index not in experts))
    return experts


def read_stacked_experts(  # noqa: PLR0917 - as `MixtureOfExperts`
    reader: WeightReader,
    prefix: str,
    hidden: int,
    settings: MixtureSettings,
    act: GatedActivation,
    group: ParallelGroup,
) -> dict[int, Expert]:
    """As `read_experts`, of a checkpoint in which all experts share a tensor: GPT-OSS's.

    There gate and up take turns, and matrices are transposed: `[num_experts, hidden, 2 * inner]` and
    `[num_experts, inner, hidden]`.
    """
    s = settings
    gate_up, down = (f"{prefix}.{name}" for name in s.names)
    part = ALL if group.expert_parallel else share_evenly(group, s.inner)
    linear = linear_for(reader.dtype, reader.device)
    gate_up_bias = reader.take(f"{gate_up}_bias", s.num_experts, 2 * s.inner)
    down_bias = reader.take(f"{down}_bias", s.num_experts, hidden)
    adds_bias = group.expert_parallel or group.tp_rank == 0  # of the sum, it is part once

    def expert(index: int) -> Expert:
        bias = torch.cat((gate_up_bias[index, 0::2][part], gate_up_bias[index, 1::2][part]))
        return Expert(
            reader.take_expert(gate_up, (s.num_experts, hidden, 2 * s.inner), index, takes_turns=True, rows=part),
            bias,
            reader.take_expert(down, (s.num_experts, s.inner, hidden), index, columns=part),
            down_bias[index] if adds_bias else None,
            act,
            linear,
        )

    return {index: expert(index) for index in held_experts(s, group)}


def read_coded_experts(  # noqa: PLR0917 - as `MixtureOfExperts`
    reader: WeightReader,
    prefix: str,
    hidden: int,
    settings: MixtureSettings,
    act: GatedActivation,
    group: ParallelGroup,
) -> CodedExpertStack | None:
    """As `read_stacked_experts`, the codes that the checkpoint holds; None where the reader does not keep them so."""
    s, held = settings, held_experts(settings, group)
    gate_up, down = (f"{prefix}.{name}" for name in s.names)
    part = ALL if group.expert_parallel else share_evenly(group, s.inner)
    w13 = reader.take_expert_codes(gate_up, (s.num_experts, hidden, 2 * s.inner), held, takes_turns=True, rows=part)
    w2 = None if w13 is None else reader.take_expert_codes(down, (s.num_experts, s.inner, hidden), held, columns=part)
    if w13 is None or w2 is None:
        return None
    b13 = reader.take(f"{gate_up}_bias", s.num_experts, 2 * s.inner)[held.start : held.stop]
    b2 = reader.take(f"{down}_bias", s.num_experts, hidden)[held.start : held.stop]
    b13 = torch.cat((b13[:, 0::2][:, part], b13[:, 1::2][:, part]), dim=1)
    adds_bias = group.expert_parallel or group.tp_rank == 0  # of the sum, it is part once
    return CodedExpertStack(w13, w2, b13, b2.contiguous() if adds_bias else None, held.start, act)


def held_experts(settings: MixtureSettings, group: ParallelGroup) -> range:
    """The experts that a rank has, of each all or a part."""
    if group.expert_parallel:
        return share_roughly(group.tp_rank, group.tp_size, settings.num_experts)
    return range(settings.num_experts)


def _stacked(weights: Sequence[LinearWeight], dtype: torch.dtype) -> torch.Tensor:
    return torch.stack([_widened(weight, dtype) for weight in weights])


def _widened(weight: LinearWeight, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that a weight stands for, rounded to `dtype` once."""
    if isinstance(weight, tuple):
        return torch.cat([_widened(part, dtype) for part in weight])
    return (weight if isinstance(weight, torch.Tensor) else weight.dequantize()).to(dtype)
