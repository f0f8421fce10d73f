"""Compiles a model's Triton kernels on all cores while its weights are loaded, so that warm-up finds them compiled.

One launch compiles one kernel, and waits for it: some dozens of them, one after the other, would be most of a first
start. Which ones there will be is found out by a process of its own, which warms the model up on a GPU that computes
nothing (`fake_cuda`), and compiles what was asked for in as many processes as there are cores. What comes of it is what
lies in Triton's cache on disk when warm-up launches the very same kernels; one that is not there is compiled then, so
nothing rests on this but time. A start that finds everything compiled by an earlier one leaves all of it out.

Of several ranks each does so for its own part of the model. Those of a host share its cores, and the cache: what one of
them is compiling, or a replica of the engine, no other one does (`kernels.gpu.compile_locks`).

That process is `compile_program`: a `Question` in JSON goes in, an `Answer` comes out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import structlog
import torch

from ....models import registry
from ....models.errors import ModelLoadError
from ..config import ExecutorConfig
from .fake_cuda import GpuFacts

log = structlog.get_logger("octavo.executor")

_PATIENCE_S = 60.0
"""How long warm-up waits for what is still being compiled; one after the other it would not take much longer."""

_THEN = "kernels are compiled as they are launched"

_PROGRAM = (sys.executable, "-m", "octavo.actors.executor.gpu.compile_program")


class Question(msgspec.Struct, frozen=True):
    """What to compile for, in how many processes, and for whom: nothing of it outlives the process that asks."""

    config: ExecutorConfig
    facts: GpuFacts
    num_processes: int
    parent_pid: int
    rank: int = 0


class Answer(msgspec.Struct, frozen=True):
    """What was compiled.

    Attributes:
        num_variants: of kernels, that warm-up will launch.
        num_compiled: of those, how many were not in Triton's cache yet.
        find_s, compile_s: seconds of finding them, and of compiling them.
        num_launchers: of all variants, how many have the C function in Triton's cache that launches them.
        left_out: why nothing was compiled; empty if something was.
        failures: what the compiler said of variants that do not compile, some of it.
    """

    num_variants: int
    num_compiled: int
    find_s: float
    compile_s: float
    num_launchers: int = 0
    left_out: str = ""
    failures: tuple[str, ...] = ()


class CompileAhead:
    """The compilation that runs while a model is loaded: `begin`, then `finish` before warm-up and `note` after it."""

    def __init__(self, process: subprocess.Popen[bytes] | None, mark: Path) -> None:
        self._process, self._mark = process, mark

    @classmethod
    def begin(cls, config: ExecutorConfig, facts: GpuFacts, *, rank: int = 0, num_sharing: int = 1) -> CompileAhead:
        """Begin, unless all has been compiled by an earlier start, or it cannot be found out what will be launched.

        Args:
            rank: of those that serve the model.
            num_sharing: processes on this host that begin this at the same time.
        """
        # What tells starts apart, and not what they launch.
        config = msgspec.structs.replace(config, init_method="", gpu=None, replica=0, num_replicas=1)
        mark = _mark(config, facts, rank)
        if mark.exists():
            return cls(None, mark)
        try:
            why_not = registry.why_no_random_weights(
                config.model_path, model_impl=config.model_impl, trust_remote_code=config.trust_remote_code
            )
        except ModelLoadError:
            return cls(None, mark)  # which loading will raise as well
        if why_not:
            log.info("executor.compile_ahead", left_out=why_not, then=_THEN)
            return cls(None, mark)
        num_processes = max(1, len(os.sched_getaffinity(0)) // num_sharing - 1)  # one core loads weights
        question = msgspec.json.encode(Question(config, facts, num_processes, os.getpid(), rank))
        try:
            process = subprocess.Popen(  # noqa: S603 - ours
                _PROGRAM,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # with the processes that it has begun it can be ended as one
            )
            assert process.stdin is not None
            process.stdin.write(question)
            process.stdin.close()
            process.stdin = None  # or `communicate` would close it again
        except OSError as error:
            log.warning("executor.compile_ahead", error=str(error))
            return cls(None, mark)
        return cls(process, mark)

    def finish(self) -> Answer | None:
        """Wait until all is compiled, within reason; what was, or None if nothing had to be or it did not work out."""
        process, self._process = self._process, None
        if process is None:
            return None
        try:
            said, errors = process.communicate(timeout=_PATIENCE_S)
            answer = msgspec.json.decode(said, type=Answer)
        except (subprocess.TimeoutExpired, msgspec.DecodeError) as error:
            _end(process)
            why = errors.decode(errors="replace")[-2000:] if isinstance(error, msgspec.DecodeError) else str(error)
            log.warning("executor.compile_ahead", error=why, then=_THEN)
            return None
        if answer.left_out:
            log.info("executor.compile_ahead", left_out=answer.left_out, then=_THEN)
        else:
            log.info(
                "executor.compile_ahead",
                **{
                    name: value
                    for name, value in msgspec.structs.asdict(answer).items()
                    if name not in {"left_out", "failures"} or value
                },
            )
        return answer

    def cancel(self) -> None:
        """Leave it, unless it is finished: nothing will be warmed up."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def note(self) -> None:
        """Remember that a start like this one finds its kernels compiled."""
        with contextlib.suppress(OSError):  # a cache that cannot be written to was of no use either
            self._mark.parent.mkdir(parents=True, exist_ok=True)
            self._mark.touch()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill it and all that it has begun."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _mark(config: ExecutorConfig, facts: GpuFacts, rank: int) -> Path:
    """An empty file in Triton's cache: all that this rank launches on such a GPU has been compiled."""
    import triton

    from ....kernels import gpu

    digest = hashlib.blake2b(digest_size=16)
    digest.update(msgspec.json.encode((config, dataclasses.replace(facts, free_bytes=0), rank)))
    digest.update(f"{triton.__version__} {torch.__version__}".encode())
    here = Path(config.model_path) / "config.json"
    for path in (here, *sorted(Path(gpu.__file__).parent.glob("*.py"))):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return Path(triton.knobs.cache.dir) / f"octavo-{digest.hexdigest()}"
