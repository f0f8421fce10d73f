"""`octavo bench offline --peers`: the same requests through this engine and through others, in turn, on one machine.

Each engine lives in a process group of its own, which is stopped while another one is measured; a crash or a hang costs
its own column only. In every round every engine gets the very same fresh prompts (random token ids, greedy, end token
ignored), and engines take turns in going first. The machine's own ceilings are measured in the same run.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from ..actors.executor.cpu_topology import Cpu, read_cpus
from ..actors.runtime.logs import configure_logs
from ..messages.errors import InvalidConfigError, OctavoError
from .ceilings import Ceilings, ModelTraffic, measure_ceilings, model_traffic
from .config import make_config
from .flags import engine_fields
from .host import usable_cores
from .latency import write_json
from .peers.adapter import LoadOptions, Request
from .peers.catalog import OURS, PEERS
from .peers.process import PeerFailedError, PeerProcess

MIXED_REQUESTS = 32
MIXED_INPUT = (32, 512)
MIXED_OUTPUT = (16, 256)
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bits of a weight in the layers and in the head, with its share of a scale: what `--quantization` makes at load.
_QUANTIZED_BITS = {"int8": (8.25, 8.25), "int4": (4.5, 8.25)}


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that arrive all at once.

    Attributes:
        kind: what is counted. `decode`: output tokens after each request's first, over the time of the whole less the
            time of the prompts alone (a second run, one output token each). `prefill`: prompt tokens over the time to
            one output token. `mixed`: output tokens over the time of the whole.
        lengths: `(prompt, output)` tokens of each request.
    """

    name: str
    kind: str
    lengths: tuple[tuple[int, int], ...]

    @property
    def longest(self) -> int:
        return max(prompt + output for prompt, output in self.lengths)

    @property
    def total_tokens(self) -> int:
        return sum(prompt + output for prompt, output in self.lengths)


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One engine on one workload.

    Attributes:
        tokens_per_s: median of the rounds.
        low, high: of the rounds.
        ratio: ours over theirs, medians of the same rounds; None for ours and for a failure.
        foreign_cores: processors that others kept busy, median of the rounds.
        same_tokens: share of output tokens that are ours, counted up to each request's first difference.
    """

    engine: str
    workload: str
    tokens_per_s: float
    low: float
    high: float
    ratio: float | None
    rounds: list[float]
    foreign_cores: float
    cpu_s: float
    same_tokens: float | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was found out."""

    model: str
    dtype: str
    num_threads: int
    repeats: int
    workloads: list[Workload]
    cells: list[Cell]
    versions: dict[str, dict[str, str]]
    facts: dict[str, dict[str, Any]]
    left_out: dict[str, str]
    ceilings: Ceilings
    ceiling_tokens_per_s: dict[str, float]


class _Round(msgspec.Struct):
    index: int
    rate: float
    foreign_cores: float
    cpu_s: float
    outputs: list[list[int]]


class NothingToCompareError(OctavoError):
    """Our own engine did not start, or no workload fits the model."""

    code = "nothing_to_compare"


def make_workloads(arguments: argparse.Namespace) -> list[Workload]:
    """The workloads that the flags ask for; the mixed one has the same lengths for the same seed."""
    shape = (arguments.input_len, arguments.output_len)
    workloads = [
        Workload(name=f"decode {count}", kind="decode", lengths=(shape,) * count) for count in arguments.concurrency
    ]
    workloads += [
        Workload(name=f"prefill {length}", kind="prefill", lengths=((length, 1),)) for length in arguments.prefill_len
    ]
    if arguments.mixed:
        chance = random.Random(arguments.workload_seed)  # noqa: S311  # a workload, not a secret
        lengths = tuple((chance.randint(*MIXED_INPUT), chance.randint(*MIXED_OUTPUT)) for _ in range(MIXED_REQUESTS))
        workloads.append(Workload(name=f"mixed {MIXED_REQUESTS}", kind="mixed", lengths=lengths))
    return workloads


def bench_peers(arguments: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON."""
    configure_logs("human")
    fields = engine_fields(arguments)
    make_config(fields)  # refuses what is wrong before anything is started
    num_threads = arguments.num_threads or usable_cores()
    workloads = make_workloads(arguments)
    if any(workload.kind == "decode" and workload.lengths[0][1] < 2 for workload in workloads):
        raise InvalidConfigError("decoding is timed after the first token: --output-len 2 or more", field="output_len")
    fields["max_num_seqs"] = max(fields["max_num_seqs"], *(len(workload.lengths) for workload in workloads))
    if fields["cpu_affinity"] == "auto":
        num_ranks = fields["tensor_parallel_size"] * fields["pipeline_parallel_size"] * fields["data_parallel_size"]
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        fields["cpu_affinity"] = same_cores(read_cpus(allowed), num_threads * num_ranks)
    bench = _Bench(arguments, fields, num_threads, workloads)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a limit on the whole ends it as Ctrl-C does
    try:
        report = bench.run()
    finally:
        bench.close()
        signal.signal(signal.SIGTERM, before)
    print_report(report, Console())
    write_json(report, arguments.json)
    return 0


def same_cores(available: Sequence[Cpu], num_threads: int) -> str:
    """The cores that each of our own engines is bound to, for `cpu_affinity`.

    They take turns: with `auto` the first would have them all, and the next one run unbound and be compared with it.
    One thread is bound by neither, and with fewer processors than threads none is.
    """
    if num_threads == 1 or num_threads > len(available):
        return "off"
    ordered = sorted(available, key=lambda cpu: (cpu.node, cpu.core, cpu.cpu))
    first_of = {cpu.core: cpu for cpu in reversed(ordered)}
    firsts = [cpu for cpu in ordered if first_of[cpu.core] is cpu]
    others = [cpu for cpu in ordered if first_of[cpu.core] is not cpu]  # hyperthreads, where there is nothing else
    return ",".join(str(cpu.cpu) for cpu in [*firsts, *others][:num_threads])


class _Bench:
    """The processes, and what they have answered so far."""

    def __init__(
        self, arguments: argparse.Namespace, fields: dict[str, Any], num_threads: int, workloads: list[Workload]
    ) -> None:
        self._arguments = arguments
        self._fields = fields
        self._num_threads = num_threads
        self._workloads = workloads
        self._engines: dict[str, PeerProcess] = {}
        self._rounds: dict[tuple[str, str], list[_Round]] = {}
        self._versions: dict[str, dict[str, str]] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._left_out: dict[str, str] = {}
        self._num_lost: dict[str, int] = {}

    def run(self) -> Report:
        arguments = self._arguments
        chance = random.Random(arguments.workload_seed)  # noqa: S311  # a workload, not a secret
        names = [name for name in dict.fromkeys(arguments.peers or PEERS) if name != OURS]  # which always runs
        options = LoadOptions(
            folder="",
            dtype="auto",
            num_threads=self._num_threads,
            max_num_seqs=max(len(workload.lengths) for workload in self._workloads),
            gguf=arguments.peer_gguf or "",
            openvino=arguments.peer_openvino or "",
            engine_fields=self._fields,
        )
        with tqdm(total=len(names) + 1, desc="loading", unit="engine") as bar:
            if not self._start(OURS, options):
                raise NothingToCompareError(self._left_out[OURS])
            bar.update(1)
            facts = self._facts[OURS]
            self._drop_long_workloads(facts["max_model_len"])
            options = replace(
                options,
                folder=facts["folder"],
                dtype=facts["dtype"],
                max_model_len=max(workload.longest for workload in self._workloads),
                max_total_tokens=max(workload.total_tokens for workload in self._workloads),
            )
            for name in names:
                self._start(name, options)
                bar.update(1)
        ceilings = measure_ceilings(self._num_threads)
        self._warm_up(chance, facts["vocab_size"])
        self._all_rounds(chance, facts["vocab_size"])
        for name, count in self._num_lost.items():
            self._left_out.setdefault(name, f"{count} rounds of decoding, in which the prompts alone took longer")
        traffic = model_traffic(
            Path(facts["folder"]),
            itemsize=_ITEMSIZE[facts["dtype"]],
            kv_bytes_per_token=facts["kv_bytes_per_token"],
        )
        quantized_bits = _QUANTIZED_BITS.get(self._fields["quantization"])
        if traffic is not None and quantized_bits is not None:
            traffic = traffic.quantized(*quantized_bits, itemsize=_ITEMSIZE[facts["dtype"]])
        return Report(
            model=facts["folder"],
            dtype=facts["dtype"],
            num_threads=self._num_threads,
            repeats=arguments.repeats,
            workloads=self._workloads,
            cells=self._cells(),
            versions=self._versions,
            facts=self._facts,
            left_out=self._left_out,
            ceilings=ceilings,
            ceiling_tokens_per_s=ceiling_rates(self._workloads, ceilings, traffic),
        )

    def close(self) -> None:
        for process in self._engines.values():
            process.close()
        self._engines.clear()

    def _start(self, name: str, options: LoadOptions) -> bool:
        """Start an engine and load its model; a peer that cannot is left out, and the reason kept."""
        python = dict(self._arguments.peer_python).get(name)
        timeout_s = self._arguments.peer_timeout
        try:
            process = PeerProcess(name, timeout_s=timeout_s, python=python, num_threads=self._num_threads)
        except PeerFailedError as error:
            self._left_out[name] = str(error)
            return False
        self._engines[name] = process
        try:
            why_not = process.probe(options)
            if why_not:
                raise PeerFailedError(why_not)
            loaded = process.load(options)
        except PeerFailedError as error:
            self._fail(name, str(error))
            return False
        self._versions[name], self._facts[name] = loaded["versions"], {**loaded["facts"], "load_s": loaded["load_s"]}
        process.pause()
        return True

    def _fail(self, name: str, why: str) -> None:
        self._left_out[name] = why
        self._engines.pop(name).close()

    def _drop_long_workloads(self, max_model_len: int) -> None:
        """Leave out what the model's context does not hold."""
        kept = []
        for workload in self._workloads:
            if workload.longest <= max_model_len:
                kept.append(workload)
            else:
                self._left_out[workload.name] = f"needs {workload.longest} tokens of context, there are {max_model_len}"
        if not kept:
            raise NothingToCompareError(
                f"no workload fits a context of {max_model_len} tokens: lower --input-len, --output-len, --prefill-len"
            )
        self._workloads = kept

    def _warm_up(self, chance: random.Random, vocab_size: int) -> None:
        """What each engine does for the first time is not timed: compiling, choosing kernels, touching its cache."""
        for workload in self._workloads:
            short = tuple((prompt, min(output, 4)) for prompt, output in workload.lengths)
            requests = _requests(chance, vocab_size, short)
            for name in list(self._engines):
                self._measure(name, requests)

    def _all_rounds(self, chance: random.Random, vocab_size: int) -> None:
        """Measure until the end, or until the user has had enough: what was measured before is reported."""
        steps = self._arguments.repeats * len(self._workloads)
        with tqdm(total=steps * len(self._engines), desc="runs", unit="run") as bar:
            try:
                for index in range(steps):
                    if not self._engines:  # all have failed
                        break
                    workload = self._workloads[index % len(self._workloads)]
                    self._one_round(workload, chance, vocab_size, index // len(self._workloads), bar)
            except KeyboardInterrupt:
                self._left_out["the rest"] = f"interrupted after {bar.n} of {bar.total} runs"

    def _one_round(
        self, workload: Workload, chance: random.Random, vocab_size: int, round_index: int, bar: Any
    ) -> None:
        requests = _requests(chance, vocab_size, workload.lengths)
        # Other prompts than above, or an engine that keeps KV would not compute them again.
        first_only = [(prompt, 1) for prompt, _ in workload.lengths]
        prompts_alone = _requests(chance, vocab_size, first_only) if workload.kind == "decode" else []
        names = list(self._engines)
        turn = round_index % len(names)
        for name in names[turn:] + names[:turn]:
            prefill_s = 0.0
            if prompts_alone:
                alone = self._measure(name, prompts_alone)
                if alone is None:
                    continue
                prefill_s = alone.elapsed_s
            timed = self._measure(name, requests)
            bar.update(1)
            if timed is None:
                continue
            rate = rate_of(workload, timed.elapsed_s, prefill_s)
            if math.isnan(rate):  # so disturbed that the prompts alone took longer than the whole
                self._num_lost[name] = self._num_lost.get(name, 0) + 1
                continue
            self._rounds.setdefault((name, workload.name), []).append(
                _Round(round_index, rate, timed.foreign_cores, timed.cpu_s, timed.outputs)
            )

    def _measure(self, name: str, requests: Sequence[Request]) -> Any:
        """One timed run with every other engine stopped; None if the engine failed, which ends it."""
        process = self._engines.get(name)
        if process is None:
            return None
        process.resume()
        try:
            timed = process.run(requests)
        except PeerFailedError as error:
            self._fail(name, str(error))
            return None
        process.pause()
        return timed

    def _cells(self) -> list[Cell]:
        cells = []
        for (name, workload), rounds in self._rounds.items():
            ours = {one.index: one for one in self._rounds.get((OURS, workload), [])}
            rates = [one.rate for one in rounds]
            both = [(ours[one.index], one) for one in rounds if one.index in ours]
            is_peer = name != OURS and bool(both)
            cells.append(
                Cell(
                    engine=name,
                    workload=workload,
                    tokens_per_s=statistics.median(rates),
                    low=min(rates),
                    high=max(rates),
                    ratio=statistics.median(a.rate for a, _ in both) / statistics.median(b.rate for _, b in both)
                    if is_peer
                    else None,
                    rounds=rates,
                    foreign_cores=statistics.median(one.foreign_cores for one in rounds),
                    cpu_s=statistics.median(one.cpu_s for one in rounds),
                    same_tokens=statistics.mean(agreement(a.outputs, b.outputs) for a, b in both) if is_peer else None,
                )
            )
        return cells


def rate_of(workload: Workload, elapsed_s: float, prefill_s: float) -> float:
    """Tokens a second as the workload counts them; NaN where no time is left for decoding."""
    match workload.kind:
        case "decode":
            num_tokens = sum(output - 1 for _, output in workload.lengths)
            return num_tokens / (elapsed_s - prefill_s) if elapsed_s > prefill_s else math.nan
        case "prefill":
            return sum(prompt for prompt, _ in workload.lengths) / elapsed_s
        case _:
            return sum(output for _, output in workload.lengths) / elapsed_s


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of tokens before each request's first difference."""
    same = total = 0
    for a, b in zip(ours, theirs, strict=True):
        total += len(a)
        for x, y in zip(a, b, strict=True):
            if x != y:
                break
            same += 1
    return same / total


def ceiling_rates(workloads: Sequence[Workload], ceilings: Ceilings, traffic: ModelTraffic | None) -> dict[str, float]:
    """What the machine allows on each workload that is bound by one thing; the mixed one is not."""
    if traffic is None:
        return {}
    rates = {}
    for workload in workloads:
        if workload.kind == "decode":
            prompt, output = workload.lengths[0]
            rates[workload.name] = traffic.decode_ceiling(ceilings, len(workload.lengths), prompt + output / 2)
        elif workload.kind == "prefill":
            rates[workload.name] = traffic.prefill_ceiling(ceilings)
    return rates


def print_report(report: Report, console: Console) -> None:
    """A table for a person: a section for each workload, a row for each engine."""
    cells = {(cell.workload, cell.engine): cell for cell in report.cells}
    table = Table("workload", "engine", title_justify="left")
    for heading in ("tok/s", "from", "to", "ratio", "same"):
        table.add_column(heading, justify="right")
    table.title = (
        f"octavo bench offline --peers: {Path(report.model).name}, {report.dtype}, {report.num_threads} threads, "
        f"medians of {report.repeats} rounds"
    )
    for workload in report.workloads:
        label = workload.name
        for engine in report.versions:
            cell = cells.get((workload.name, engine))
            figures = ("failed", "", "", "", "") if cell is None else _figures(cell)
            table.add_row(label, engine, *figures)
            label = ""
        ceiling, ours = report.ceiling_tokens_per_s.get(workload.name), cells.get((workload.name, OURS))
        if ceiling is not None:
            share = f"{ours.tokens_per_s / ceiling:.2f}x" if ours else ""
            table.add_row("", "(ceiling)", _figure(ceiling), "", "", share, "")
        table.add_section()
    console.print(table)
    console.print("ratio: ours over theirs, or over the ceiling; same: share of their tokens that are ours")
    limits = report.ceilings
    console.print(
        f"ceilings: {limits.read_gb_per_s:.1f} GB/s read ({limits.read_one_stream_gb_per_s:.1f} in one stream), "
        f"{limits.f32_tflop_per_s:.3f} TFLOP/s float32, {limits.bf16_tflop_per_s:.3f} TFLOP/s bfloat16 by torch.mm"
    )
    if foreign := [cell.foreign_cores for cell in report.cells]:
        console.print(f"cores that others kept busy: median {statistics.median(foreign):.2f}, most {max(foreign):.2f}")
    for engine, versions in report.versions.items():
        facts = {key: value for key, value in report.facts[engine].items() if key in _SHOWN_FACTS}
        words = [*(f"{name} {version}" for name, version in versions.items()), *map(str, facts.values())]
        console.print(f"{engine}: {', '.join(words) or 'version unknown'}", markup=False)
    for name, why in report.left_out.items():
        console.print(f"left out: {name}: {why}", markup=False)


_SHOWN_FACTS = ("attention", "file", "model", "threads_bound_to")


def _figures(cell: Cell) -> tuple[str, str, str, str, str]:
    return (
        *(_figure(cell.tokens_per_s), _figure(cell.low), _figure(cell.high)),
        "" if cell.ratio is None else f"{cell.ratio:.2f}x",
        "" if cell.same_tokens is None else f"{cell.same_tokens:.0%}",
    )


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _requests(chance: random.Random, vocab_size: int, lengths: Sequence[tuple[int, int]]) -> list[Request]:
    low = min(vocab_size // 2, 200)  # above the special tokens, which lie at the beginning in most models
    return [Request([chance.randrange(low, vocab_size) for _ in range(prompt)], output) for prompt, output in lengths]
