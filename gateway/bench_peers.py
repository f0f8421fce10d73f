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
from tqdm import tqdm

from ..actors.executor.cpu_topology import Cpu, read_cpus
from ..actors.runtime.logs import configure_logs
from ..messages.errors import InvalidConfigError, OctavoError
from .ceilings import measure_ceilings, model_traffic
from .config import make_config
from .flags import engine_fields
from .host import usable_cores
from .latency import write_json
from .peers.adapter import LoadOptions, Request
from .peers.catalog import OURS, PEERS
from .peers.process import PeerFailedError, PeerProcess
from .peers.report import Cell, Report, ceiling_rates, print_report
from .peers.workload import Workload, agreement, make_workloads, rate_of

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bits of a weight in the layers and in the head, with its share of a scale: what `--quantization` makes at load.
_QUANTIZED_BITS = {"int8": (8.25, 8.25), "int4": (4.5, 8.25)}


class _Round(msgspec.Struct):
    index: int
    rate: float
    foreign_cores: float
    cpu_s: float
    outputs: list[list[int]]


class NothingToCompareError(OctavoError):
    """Our own engine did not start, or no workload fits the model."""

    code = "nothing_to_compare"


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


def _requests(chance: random.Random, vocab_size: int, lengths: Sequence[tuple[int, int]]) -> list[Request]:
    low = min(vocab_size // 2, 200)  # above the special tokens, which lie at the beginning in most models
    return [Request([chance.randrange(low, vocab_size) for _ in range(prompt)], output) for prompt, output in lengths]
