"""The smallest scenario that still shows the same violation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from msgspec.structs import replace

from ...messages.sampling import SamplingParams
from .scenario import Client, Scenario

MAX_RUNS = 600

_QUIET: tuple[tuple[str, object], ...] = (
    ("encodes", False),
    ("checks_each_message", False),
    ("duplicate_rate", 0.0),
    ("topology", "one"),
    ("link_ns", 0),
    ("hop_ns", 0),
    ("notice_ns", 0),
    ("load_ns", 0),
    ("step_token_ns", 0),
    ("step_ns", 0),
)
_PLAIN_ENGINE: tuple[tuple[str, object], ...] = (
    ("pipeline_depth", 1),
    ("enable_prefix_caching", False),
    ("long_prefill_threshold", 0),
    ("max_num_queued_requests", 4096),
    ("max_num_queued_tokens", 8_000_000),
    ("priority_aging_ns", 0),
    ("max_num_batched_tokens", 200),
)
_PLAIN_CLIENT: tuple[tuple[str, object], ...] = (
    ("cancel_after_ns", -1),
    ("cancel_after_tokens", -1),
    ("read_every_ns", 0),
    ("timeout_ns", 0),
    ("priority", 0),
    ("cache_salt", ""),
    ("is_poison", False),
    ("is_poison_in_company", False),
    ("follows", -1),
    ("at_ns", 0),
)
_PLAIN_PARAMS: tuple[tuple[str, object], ...] = (
    ("n", 1),
    ("stop", ()),
    ("stop_token_ids", ()),
    ("prompt_logprobs", None),
    ("min_tokens", 0),
    ("ignore_eos", True),
    ("include_stop_str_in_output", False),
    ("skip_special_tokens", True),
    ("seed", 0),
    ("max_tokens", 1),
    ("max_tokens", 2),
    ("max_tokens", 4),
)


def shrink(scenario: Scenario, fails: Callable[[Scenario], bool], max_runs: int = MAX_RUNS) -> Scenario:
    """Take away clients and faults, then complications, as long as it still fails.

    Args:
        scenario: fails.
        fails: runs a scenario and tells whether the same violation shows.
        max_runs: most calls of `fails`.

    Source: delta debugging (Zeller and Hildebrandt 2002), with single steps instead of complements at the end.
    """
    num_runs = 0
    while True:
        for candidate in _smaller(scenario):
            if num_runs >= max_runs:
                return scenario
            num_runs += 1
            if fails(candidate):
                scenario = candidate
                break
        else:
            return scenario


def _smaller(scenario: Scenario) -> Iterator[Scenario]:
    """Scenarios with a little less, those that take away most first."""
    for clients in _without(scenario.clients):
        yield replace(scenario, clients=clients)
    for faults in _without(scenario.faults):
        yield replace(scenario, faults=faults)
    for name, value in _QUIET:
        if getattr(scenario, name) != value:
            yield replace(scenario, **{name: value})
    for name, value in _PLAIN_ENGINE:
        if getattr(scenario.scheduler, name) != value:
            yield replace(scenario, scheduler=replace(scenario.scheduler, **{name: value}))
    for index, client in enumerate(scenario.clients):
        for smaller in _smaller_client(client):
            yield replace(scenario, clients=(*scenario.clients[:index], smaller, *scenario.clients[index + 1 :]))
    for index, fault in enumerate(scenario.faults):
        if fault.at_ns > 1:
            earlier = replace(fault, at_ns=fault.at_ns // 2)
            yield replace(scenario, faults=(*scenario.faults[:index], earlier, *scenario.faults[index + 1 :]))


def _smaller_client(client: Client) -> Iterator[Client]:
    for name, value in _PLAIN_CLIENT:
        if getattr(client, name) != value:
            yield replace(client, **{name: value})
    for name, value in _PLAIN_PARAMS:
        before = getattr(client.params, name)
        if before != value and not (name == "max_tokens" and before is not None and before <= value):
            yield replace(client, params=replace(client.params, **{name: value}))
    length = len(client.prompt)
    for keep in dict.fromkeys((1, length // 2, length - 1)):
        if 0 < keep < length:
            yield replace(client, prompt=client.prompt[:keep])
    if client.at_ns > 1:
        yield replace(client, at_ns=client.at_ns // 2)


def _without(items: tuple[object, ...]) -> Iterator[tuple[object, ...]]:
    """The items without halves, quarters ... single ones of them."""
    size = len(items)
    while size >= 1:
        for begin in range(0, len(items), size):
            yield items[:begin] + items[begin + size :]
        size //= 2


def describe_scenario(scenario: Scenario) -> list[str]:
    """A scenario in words, leaving out what is as always."""
    plain = Scenario(seed=scenario.seed, scheduler=scenario.scheduler)
    lines = ["engine: " + _fields(scenario.scheduler, (("max_executor_losses", 2), *_PLAIN_ENGINE[2:6]))]
    lines[0] += ", " + _fields(
        scenario, tuple((name, getattr(plain, name)) for name in ("duplicate_rate", "encodes", "checks_each_message"))
    )
    for index, client in enumerate(scenario.clients):
        plain_client = list(_PLAIN_CLIENT[:-1])
        if not client.read_every_ns:
            plain_client.append(("read_buffer", client.read_buffer))
        lines.append(f"client {index}: " + _fields(client, plain_client))
    lines += [f"fault: {_fields(fault, (('duration_ns', 0),))}" for fault in scenario.faults]
    return lines


def _fields(struct: object, plain: Sequence[tuple[str, object]]) -> str:
    hidden = dict(plain)
    words = []
    for name in struct.__struct_fields__:  # type: ignore[attr-defined]  # a msgspec struct
        value = getattr(struct, name)
        if name in {"scheduler", "clients", "faults"} or (name in hidden and hidden[name] == value):
            continue
        if isinstance(value, SamplingParams):
            params = {key: getattr(value, key) for key, _ in _PLAIN_PARAMS}
            words += [f"{key}={params[key]!r}" for key, default in _PLAIN_PARAMS[:-3] if params[key] != default]
            words.append(f"max_tokens={value.max_tokens!r}")
        else:
            words.append(f"{name}={value!r}")
    return ", ".join(words)
