"""Octavo beside itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from c_library import HAS_C
from engines import save_servable

from octavo.actors.executor.cpu_topology import read_cpus
from octavo.gateway.bench_peers import same_cores
from octavo.gateway.config import make_config
from octavo.gateway.peers.adapter import LoadOptions
from octavo.gateway.peers.process import PeerProcess


@pytest.fixture
def processes() -> Iterator[list[PeerProcess]]:
    started: list[PeerProcess] = []
    yield started
    for process in started:
        process.close()


@pytest.mark.skipif(
    not HAS_C or not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="threads cannot be bound here",
)
def test_an_engine_is_bound_to_the_cores_that_another_one_has_while_it_is_stopped(
    tmp_path: Path, processes: list[PeerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # no claims of others, nor any that others would see
    save_servable("llama", tmp_path / "model")
    cores = same_cores(read_cpus(os.sched_getaffinity(0)), 2)
    given = {"model": str(tmp_path / "model"), "dtype": "float32", "num_blocks": 64, "block_size": 4}
    fields = {**given, "cpu_affinity": cores}
    make_config(fields)
    options = LoadOptions(folder="", dtype="auto", num_threads=2, engine_fields=fields)
    for name, says in (("octavo-not-deterministic", "no"), ("octavo-deterministic", "yes")):
        processes.append(PeerProcess(name, timeout_s=120, num_threads=2))
        facts = processes[-1].load(options)["facts"]
        processes[-1].pause()
        assert facts["threads_bound_to"] == cores and facts["deterministic"] == says
