"""Command-line flags of the engine, under the names vLLM's users know."""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import re
import sys
from fractions import Fraction
from typing import Any, NoReturn

from ..messages.errors import InvalidConfigError
from .accelerator import resolve_device
from .performance_mode import fill_in

_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([kKmMgG]?)([iI]?)[bB]?$")
_FACTOR = {"": 0, "k": 1, "m": 2, "g": 3}


def number(text: str) -> int:
    """`8192`, `8k` (8000) or `8K` (8192), as vLLM reads them; also m/M and g/G."""
    match = _SIZE.match(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 4096, 8k or 2G")
    value, unit, binary = match.groups()
    base = 1024 if unit.isupper() or binary else 1000
    exact = Fraction(value) * base ** _FACTOR[unit.lower()]
    if exact.denominator != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(exact)


def positive(text: str) -> int:
    """A `number` of at least 1."""
    value = number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is too small: at least 1")
    return value


def port(text: str) -> int:
    """A TCP port; 0 takes a free one."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 0 to 65535")
    return int(text)


def rate(text: str) -> float:
    """A positive number a second, or `inf`."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate: a number above 0, or inf")
    return value


def seconds(text: str) -> float:
    """A finite number of seconds from 0 up."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 up")
    return value


def network(text: str) -> str:
    """An IP address or a network such as 10.0.0.0/8."""
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address or a network such as 10.0.0.0/8") from None


def host_name(text: str) -> str:
    """A name for the `Host` header, without a port; `*` stands for any."""
    if not text or any(character in "/:[]@ " for character in text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a host name: give it without scheme and port")
    return text.lower()


def named_path(text: str) -> tuple[str, str]:
    """`NAME=PATH`."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells defaults, where there is something to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default or action.default == 0 else action.help


class Parser(argparse.ArgumentParser):
    """A parser that takes `-` and `_` alike and names the nearest flag for one it does not know."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args([_with_dashes(word) for word in words], namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            chosen = getattr(parsed, "parser", self)
            chosen.error(chosen.explain_unknown(unknown))
        return parsed

    def has_flag(self, flag: str) -> bool:
        """Whether it takes `--flag`."""
        return flag in self._option_string_actions

    def explain_unknown(self, unknown: list[str]) -> str:
        """One line on arguments that nothing takes, with the nearest flags."""
        parts = []
        for word in unknown:
            if not word.startswith("-"):
                parts.append(f"unexpected argument {word!r}")
                continue
            flag = word.split("=")[0]
            near = difflib.get_close_matches(flag, list(self._option_string_actions), n=1, cutoff=0.5)
            parts.append(f"unknown flag {flag}" + (f" (did you mean {near[0]}?)" if near else ""))
        return "; ".join(parts)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n{self.prog} --help lists what there is\n")


def _with_dashes(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that become an `EngineConfig`; their defaults are the struct's."""
    _add_model_flags(parser)
    _add_device_flags(parser)
    _add_memory_flags(parser)
    _add_scheduling_flags(parser)
    _add_process_flags(parser)


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "model",
        nargs="?",
        default=None,
        help="folder, GGUF file or hub name; without one, the model shipped with octavo",
    )
    group.add_argument("--tokenizer", help="folder or hub name, if not the model's own")
    group.add_argument("--revision", help="hub revision of config, tokenizer and weights alike")
    group.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of weights and KV"
    )
    group.add_argument(
        "--model-impl", default="auto", choices=["auto", "native", "transformers"], help="which implementation"
    )
    group.add_argument(
        "--quantization",
        default="auto",
        choices=["auto", "int8", "int4"],
        help="quantise floating weights at load (the output projection to int8); auto: as the checkpoint has them",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="a request's logits are the same bits alone and in any batch (what that costs here is measured by "
        "octavo bench offline --peers octavo-deterministic)",
    )
    group.add_argument(
        "--load-format",
        default="auto",
        choices=["auto", "dummy"],
        help="dummy: random weights, made on the device; the folder needs a config.json and a tokenizer, no weights",
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run code that the checkpoint brings")
    group.add_argument("--offline", action="store_true", help="never contact the hub (HF_HUB_OFFLINE works too)")
    group.add_argument("--chat-template", help="jinja file or text, if not the tokenizer's own")


def _add_device_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU where torch can use one"
    )
    group.add_argument(
        "--performance-mode",
        default="balanced",
        choices=["throughput", "balanced", "interactivity"],
        help="decides --max-num-seqs, --max-num-batched-tokens, --pipeline-depth, --gpu-memory-utilization and "
        "--cuda-graph-sizes where they are not given, for the device; what they are is said at start",
    )
    group.add_argument(
        "--cuda-graph-sizes",
        nargs="*",
        metavar="ROWS",
        type=positive,
        help="rows of decode steps that a GPU replays from a captured graph; with nothing behind it: no graphs. "
        "Default: the mode's",
    )


def _add_memory_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--max-model-len", type=number, help="longest prompt plus output; default: what model and memory allow"
    )
    group.add_argument(
        "--kv-cache-dtype",
        default="auto",
        choices=["auto", "bfloat16", "float16", "float32", "int8", "fp8"],
        help="of keys and values; int8 and fp8 (e4m3) have a scale for each token and head",
    )
    group.add_argument("--block-size", type=number, default=16, help="tokens in a KV block, 1 to 256")
    group.add_argument(
        "--kv-cache-memory-bytes", type=number, help="size of the KV cache (2G, 512M); default: measured"
    )
    group.add_argument(
        "--gpu-memory-utilization",
        "--memory-utilization",
        dest="memory_utilization",
        type=float,
        help="when the KV cache is measured: on a CPU its share of free memory, on a GPU the share of all memory for "
        "everything. Default: the mode's (0.5; 0.9 on a GPU)",
    )
    group.add_argument("--num-gpu-blocks-override", dest="num_blocks", type=number, help="exact number of KV blocks")
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reuse KV of equal prefixes",
    )


def _add_scheduling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scheduling")
    group.add_argument("--max-num-seqs", type=number, help="requests in one step; default: the mode's (256)")
    group.add_argument(
        "--max-num-batched-tokens", type=number, help="tokens in one step; default: the mode's (2048; 8192 on a GPU)"
    )
    group.add_argument(
        "--max-num-queued-reqs", dest="max_num_queued_requests", type=number, default=4096, help="then 429"
    )
    group.add_argument(
        "--max-num-queued-tokens", type=number, default=8_000_000, help="prompt tokens waiting; then 429"
    )
    group.add_argument(
        "--priority-aging",
        dest="priority_aging_s",
        metavar="SECONDS",
        type=seconds,
        default=10.0,
        help="waiting this long is worth one level of priority; 0: priorities alone decide",
    )
    group.add_argument(
        "--pipeline-depth",
        type=number,
        help="steps in flight; 1: each waits for the one before. Default: the mode's (2)",
    )
    group.add_argument("--seed", type=int, default=0, help="of requests that bring none")
    group.add_argument("--num-threads", type=number, help="torch's threads on the CPU")
    group.add_argument("--max-logprobs", type=int, default=20, help="most alternatives a request may ask for")
    group.add_argument(
        "--journal",
        metavar="DIR",
        help="record every scheduling decision, for `octavo sim replay` (prompts are hashed), and, of `octavo serve`, "
        "the requests that are open: after a crash, clients get the rest of their streams with Last-Event-ID",
    )
    group.add_argument("--journal-prompts", action="store_true", help="record token ids in the journal, not hashes")


def _add_process_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("processes")
    group.add_argument(
        "--in-process",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="engine and executor inside this process; otherwise each is a process of its own, which is replaced when "
        "it dies while every stream goes on. Default: processes for `octavo serve`, in process for other commands",
    )
    group.add_argument(
        "--tensor-parallel-size", "-tp", type=positive, default=1, help="executors that share each layer"
    )
    group.add_argument(
        "--pipeline-parallel-size", "-pp", type=positive, default=1, help="stages of executors that share the layers"
    )
    group.add_argument("--data-parallel-size", "-dp", type=positive, default=1, help="replicas of the model")
    group.add_argument(
        "--enable-expert-parallel",
        action="store_true",
        help="of a mixture of experts, those who share a layer hold whole experts",
    )
    group.add_argument(
        "--routing",
        default="prefix_aware",
        choices=["round_robin", "least_loaded", "prefix_aware"],
        help="how a request's replica is chosen",
    )
    group.add_argument(
        "--max-restarts",
        type=number,
        help="of an executor within a minute; default: enough to find a request that kills it",
    )
    group.add_argument(
        "--cpu-affinity",
        default="auto",
        metavar="CORES",
        help="cores that computing threads are bound to, such as 0-3,8; auto: one each unless that would do harm; off",
    )


ENGINE_FIELDS = (
    "model",
    "tokenizer",
    "revision",
    "dtype",
    "model_impl",
    "quantization",
    "deterministic",
    "trust_remote_code",
    "offline",
    "chat_template",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "kv_cache_memory_bytes",
    "memory_utilization",
    "num_blocks",
    "enable_prefix_caching",
    "max_num_queued_requests",
    "max_num_queued_tokens",
    "priority_aging_s",
    "pipeline_depth",
    "seed",
    "num_threads",
    "max_logprobs",
    "journal",
    "journal_prompts",
    "kv_cache_dtype",
    "in_process",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "enable_expert_parallel",
    "routing",
    "max_restarts",
    "cpu_affinity",
    "device",
    "performance_mode",
    "cuda_graph_sizes",
    "load_format",
)


FIELDS_WITHOUT_ENGINE_FLAG = {"served_model_names": "--served-model-name, of `octavo serve` alone"}
"""Fields of `EngineConfig` that `add_engine_flags` leaves out, and why."""


def engine_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of `EngineConfig` from parsed flags."""
    fields = {name: getattr(arguments, name) for name in ENGINE_FIELDS}
    if fields["in_process"] is None:  # several executors are several processes
        sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
        fields["in_process"] = all(fields[size] == 1 for size in sizes)
    if fields["cuda_graph_sizes"] is not None:
        fields["cuda_graph_sizes"] = tuple(fields["cuda_graph_sizes"])
    return fill_in(fields, resolve_device(fields["device"]))


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `octavo serve` alone; `server_fields` reads most of them."""
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for every interface")
    group.add_argument("--port", type=port, default=8000, help="port to listen on; 0: any free one")
    group.add_argument(
        "--gateways", type=positive, default=1, metavar="N", help="processes that serve HTTP, on the same port"
    )
    group.add_argument("--served-model-name", nargs="+", default=[], help="names that clients may use")
    group.add_argument("--api-key", action="append", default=[], help="key that clients must send; may be repeated")
    group.add_argument("--allowed-origins", nargs="+", default=[], help="origins of web pages that may call the server")
    group.add_argument(
        "--allowed-hosts",
        nargs="+",
        metavar="NAME",
        type=host_name,
        default=[],
        help="names by which clients may call the server, beside localhost and any address; * for any name. Without "
        "this flag: localhost alone if it listens on a loopback address without --api-key, otherwise any name",
    )
    group.add_argument(
        "--max-connections", type=number, default=16384, help="open at a time, then 503; 0: no bound but the system's"
    )
    group.add_argument(
        "--max-connections-per-client",
        type=number,
        default=4096,
        help="open at a time from one address (IPv6: one /64 network), then 429; 0: no bound",
    )
    group.add_argument(
        "--trusted-proxies",
        nargs="+",
        metavar="ADDRESS",
        type=network,
        default=[],
        help="addresses or networks of proxies, to which the bound for one client does not apply",
    )
    group.add_argument(
        "--shutdown-timeout",
        "--drain-timeout",
        type=seconds,
        default=30.0,
        help="seconds that SIGTERM waits for open answers",
    )
    group.add_argument(
        "--max-queue-wait",
        metavar="SECONDS",
        type=seconds,
        default=5.0,
        help="while those who wait would take longer, by the speed of late, more are refused with 429; 0: no bound",
    )
    group.add_argument(
        "--enable-fault-injection",
        action="store_true",
        help="let clients make actors fail (POST /debug/crash), for `octavo chaos`; never on a public address",
    )


def add_nodes_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `octavo serve` that become a `NodesConfig`."""
    group = parser.add_argument_group("other hosts")
    group.add_argument(
        "--listen",
        metavar="tcp://HOST:PORT",
        help="where `octavo node --join` of other hosts finds this one; 0.0.0.0 for every interface",
    )
    group.add_argument(
        "--nodes", type=positive, metavar="N", help="with --listen: nodes to wait for before loading; default: 1"
    )
    group.add_argument("--keys", metavar="FILE", help="this host's CURVE keys, made by `octavo keys FILE`")
    group.add_argument("--allow-list", metavar="FILE", help="public keys of nodes that may join, one a line")
    group.add_argument(
        "--plain-loopback", action="store_true", help="let --listen on a loopback address do without keys"
    )
    group.add_argument(
        "--local-executors",
        type=number,
        metavar="N",
        help="executors that run on this host, the others on nodes; default: an even share, rounded down",
    )
    group.add_argument(
        "--node-timeout", type=seconds, default=600.0, metavar="SECONDS", help="that executors may wait for a node"
    )


def nodes_fields(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Fields of `NodesConfig` from parsed flags; None without `--listen`."""
    if arguments.listen is None:
        for flag in ("nodes", "keys", "allow_list", "plain_loopback", "local_executors"):
            if getattr(arguments, flag):
                raise InvalidConfigError(
                    f"--{flag.replace('_', '-')} is about nodes, which join at an address: --listen tcp://HOST:PORT",
                    field=flag,
                )
        return None
    return {
        "listen": arguments.listen,
        "num_nodes": arguments.nodes or 1,
        "keys": arguments.keys or "",
        "allow_list": arguments.allow_list or "",
        "plain_loopback": arguments.plain_loopback,
        "local_executors": arguments.local_executors,
        "timeout_s": arguments.node_timeout,
    }


def server_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of `ServerSettings` from parsed flags."""
    return {
        "api_keys": tuple(arguments.api_key),
        "allowed_origins": tuple(arguments.allowed_origins),
        "allowed_hosts": tuple(arguments.allowed_hosts),
        "max_connections": arguments.max_connections,
        "max_connections_per_client": arguments.max_connections_per_client,
        "trusted_proxies": tuple(arguments.trusted_proxies),
        "shutdown_timeout_s": arguments.shutdown_timeout,
        "max_queue_wait_s": arguments.max_queue_wait,
        "enable_fault_injection": arguments.enable_fault_injection,
        "stream_journal": arguments.journal or "",
    }
