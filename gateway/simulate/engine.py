"""The replica of a simulation: its flags, one value each or lists to sweep over."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ...messages.errors import InvalidConfigError
from ..flag_parser import Parser
from ..flag_values import number, positive

if TYPE_CHECKING:
    from ...sim.deployment import Deployment
    from ...sim.plan.candidate import Sweep

_Value = TypeVar("_Value")

ROUTING_POLICIES = ("round_robin", "least_loaded", "prefix_aware")
DEFAULT_GPU, DEFAULT_MODEL = "H100", "Llama-3.1-8B"


def routing(text: str) -> str:
    """A routing policy's name; `-` and `_` alike."""
    name = text.replace("-", "_")
    if name not in ROUTING_POLICIES:
        raise argparse.ArgumentTypeError(f"{text!r} is no routing policy: there are {', '.join(ROUTING_POLICIES)}")
    return name


def memory_share(text: str) -> float:
    """More than 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share: more than 0, at most 1")
    return value


def price(text: str) -> tuple[str, float]:
    """`H100=2.5`: dollars an hour of one GPU."""
    name, equals, amount = text.partition("=")
    try:
        value = float(amount)
    except ValueError:
        value = math.nan
    if not (name and equals and 0 <= value < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is not a price such as H100=2.5, in dollars an hour")
    return name, value


def _listed(read: Callable[[str], _Value]) -> Callable[[str], tuple[_Value, ...]]:
    def read_list(text: str) -> tuple[_Value, ...]:
        return tuple(read(part.strip()) for part in text.split(","))

    return read_list


def add_replica_flags(parser: Parser, *, is_sweep: bool) -> None:
    """Flags of a replica; with `is_sweep` those that may vary take lists."""
    _add_hardware_flags(_Group(parser, "replica", is_sweep))
    _add_scheduling_flags(_Group(parser, "memory and scheduling, as of octavo serve", is_sweep))
    _add_cluster_flags(_Group(parser, "cluster", is_sweep))


class _Group:
    """Flags under one heading.

    Attributes:
        add: a flag that is the same for all candidates of a sweep.
    """

    def __init__(self, parser: Parser, title: str, is_sweep: bool) -> None:
        group = parser.add_argument_group(title)
        self.add = group.add_argument
        self._is_sweep = is_sweep

    def vary(self, *names: str, dest: str, read: Callable[[str], object], default: object, text: str) -> None:
        """A flag that takes one value, or in a sweep a list to choose from."""
        text += ", a list to choose from" if self._is_sweep else ""
        self.add(
            *names,
            dest=dest,
            type=_listed(read) if self._is_sweep else read,
            default=(default,) if self._is_sweep else default,
            help=text if default is None else f"{text} (default: {default})",
            metavar="A,B,..." if self._is_sweep else "X",
        )


def _add_hardware_flags(group: _Group) -> None:
    group.vary("--gpu", dest="gpu", read=str, default=DEFAULT_GPU, text="GPU by name")
    group.add(
        "--model",
        default=DEFAULT_MODEL,
        help="known name, config.json, or folder with one (of weights nothing is read)",
    )
    group.vary("--tensor-parallel-size", "--tp", dest="tp", read=positive, default=1, text="GPUs of a replica")
    group.add("--dtype", default="auto", help="of weights: auto, bfloat16, fp8, ...")
    group.add("--kv-cache-dtype", default="auto", help="of the KV cache; auto: as octavo serve chooses it")
    group.add(
        "--profile",
        default="",
        metavar="PATH",
        help="fitted profile or folder of measured tables; without: closed form",
    )
    group.add(
        "--price",
        action="append",
        type=price,
        default=[],
        metavar="GPU=DOLLARS",
        help="of one GPU an hour, instead of the table's; may be repeated",
    )


def _add_scheduling_flags(group: _Group) -> None:
    group.add("--max-model-len", type=number, help="longest prompt plus output")
    group.vary("--max-num-seqs", dest="max_num_seqs", read=positive, default=256, text="requests in one step")
    group.vary(
        "--max-num-batched-tokens",
        dest="max_num_batched_tokens",
        read=positive,
        default=2048,
        text="tokens in one step",
    )
    group.vary("--block-size", dest="block_size", read=positive, default=16, text="tokens in a KV block")
    group.vary(
        "--num-gpu-blocks-override",
        "--num-blocks",
        dest="num_blocks",
        read=positive,
        default=None,
        text="exact number of KV blocks; default: what the memory holds",
    )
    group.vary(
        "--gpu-memory-utilization",
        "--memory-utilization",
        dest="memory_utilization",
        read=memory_share,
        default=0.9,
        text="part of the memory that the engine takes",
    )
    group.add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reuse KV of equal prefixes",
    )
    group.add("--max-num-queued-reqs", dest="max_num_queued_requests", type=positive, default=4096)
    group.add("--max-num-queued-tokens", type=positive, default=8_000_000)
    group.add(
        "--long-prefill-token-threshold",
        dest="long_prefill_threshold",
        type=number,
        default=0,
        help="most tokens of one prompt in a step; 0: no limit but the step's",
    )


def _add_cluster_flags(group: _Group) -> None:
    group.vary(
        "--routing",
        dest="routing",
        read=routing,
        default="least_loaded",
        text="router's policy: " + ", ".join(ROUTING_POLICIES),
    )
    group.add(
        "--ingress-ms", type=float, default=0.0, help="from a request's arrival to the scheduler (HTTP, tokenizer)"
    )
    group.add("--egress-ms", type=float, default=0.0, help="from a step's end to the client")


def base_deployment(arguments: argparse.Namespace) -> Deployment:
    """What is not swept.

    Raises:
        ModelNotFoundError, UnsupportedModelError: see `find_model`.
    """
    from ...sim.config import MAX_TRANSIT_NS
    from ...sim.deployment import Deployment
    from ...sim.step_time.known_models import find_model

    for name in ("ingress_ms", "egress_ms"):
        if not 0 <= getattr(arguments, name) <= MAX_TRANSIT_NS / 1e6:
            raise InvalidConfigError(
                f"{name} is {getattr(arguments, name)}, but must be from 0 to {MAX_TRANSIT_NS // 10**6}", field=name
            )
    return Deployment(
        model=find_model(arguments.model),
        dtype=arguments.dtype,
        kv_dtype=None if arguments.kv_cache_dtype == "auto" else arguments.kv_cache_dtype,
        max_model_len=arguments.max_model_len,
        max_num_queued_requests=arguments.max_num_queued_requests,
        max_num_queued_tokens=arguments.max_num_queued_tokens,
        long_prefill_threshold=arguments.long_prefill_threshold,
        profile=arguments.profile,
    )


def sweep_of(arguments: argparse.Namespace) -> Sweep:
    """Lists to try; one value each for a parser made without `is_sweep`.

    Raises:
        InvalidConfigError: an unknown GPU, or too many combinations.
    """
    from ...sim.plan.candidate import Sweep
    from ...sim.step_time.gpus import find_gpu

    def values(name: str) -> tuple[object, ...]:
        value = getattr(arguments, name)
        return value if isinstance(value, tuple) else (value,)

    fields = {
        "tensor_parallel_size": values("tp"),
        **{
            name: values(name)
            for name in (
                "max_num_batched_tokens",
                "max_num_seqs",
                "block_size",
                "memory_utilization",
                "num_blocks",
                "routing",
            )
        },
        "gpu": tuple(find_gpu(str(name)).name for name in values("gpu")),
        "enable_prefix_caching": (arguments.enable_prefix_caching,),
    }
    return Sweep(**fields)


def prices_of(arguments: argparse.Namespace) -> dict[str, float]:
    """Dollars an hour by the GPU's full name."""
    from ...sim.step_time.gpus import find_gpu

    return {find_gpu(name).name: value for name, value in arguments.price}
