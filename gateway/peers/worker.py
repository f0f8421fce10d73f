"""The process that holds one engine: reads commands as JSON lines, answers each with one line.

Runs as a module of octavo for engines of this environment, and as a plain file under another interpreter, in which
octavo is not installed: then only the standard library and the peer are needed.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(name: str, answers: TextIO) -> None:
    """Serve the engine called `name` until standard input ends."""
    die_with_parent()
    catalog = importlib.import_module(".catalog", __package__)
    adapter = importlib.import_module(".adapter", __package__)
    peer = None
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        try:
            if peer is None:
                peer = catalog.make_peer(name)
            answer = _answer(adapter, peer, command)
        except Exception as error:  # noqa: BLE001,RUF100 - whatever a peer raises is a result, and its own to word
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(adapter: Any, peer: Any, command: dict[str, Any]) -> dict[str, Any]:
    match command["do"]:
        case "probe":
            return {"why_not": peer.is_available(adapter.LoadOptions(**command["options"]))}
        case "load":
            started = time.perf_counter()
            facts = peer.load(adapter.LoadOptions(**command["options"]))
            return {"facts": facts, "versions": peer.versions(), "load_s": time.perf_counter() - started}
        case "run":
            requests = [adapter.Request(ids, count) for ids, count in command["requests"]]
            gc.collect()  # not while it is timed
            started = time.perf_counter()
            outputs = peer.run(requests)
            elapsed_s = time.perf_counter() - started
            adapter.check_outputs(requests, outputs)
            return {"elapsed_s": elapsed_s, "outputs": [[int(token) for token in output] for output in outputs]}
        case other:
            raise ValueError(f"no command {other!r}")


def die_with_parent() -> None:
    """Ask Linux to end this process when the benchmark dies; a stopped process would not notice by itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def take_standard_output() -> TextIO:
    """The pipe to the benchmark; what the engine prints goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def become_package() -> str:
    """Make the folder of this file importable as a package of a name that nothing else has."""
    folder, name = Path(__file__).resolve().parent, "_octavo_peers"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    return name


if __name__ == "__main__":
    if not __package__:
        __package__ = become_package()  # noqa: A001,RUF100 - relative imports start from it
    main(sys.argv[1], take_standard_output())
