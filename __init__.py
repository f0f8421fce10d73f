"""Octavo: an LLM inference engine built as a small company of actors.

The public face is lazy: nothing here may execute a relative import (pytest imports this file under another name).
"""

import os as _os
import sys as _sys
from typing import TYPE_CHECKING, Any

# With the repository's root on sys.path, other packages that probe for a top-level `kernels` would import ours.
_here = _os.path.dirname(_os.path.abspath(__file__))
_sys.path[:] = [p for p in _sys.path if _os.path.abspath(p or ".") != _here]

# A step shares its work among threads some dozens of times. GNU OpenMP has the one that is done first spin for
# milliseconds, which keeps the other from running where a core is shared: measured, a step of 5 ms then took 320. So
# it spins for some 20 microseconds and sleeps. GNU OpenMP reads this once, when torch is imported.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & _os.environ.keys():
    _os.environ["GOMP_SPINCOUNT"] = "1000"

__version__ = "0.1.0"

_LAZY = {
    "Engine": ".gateway.engine",
    "LLM": ".gateway.llm",
    "RequestOutput": ".gateway.outputs",
    "CompletionOutput": ".gateway.outputs",
    "EngineConfig": ".gateway.config",
    "SamplingParams": ".messages.sampling",
    "OctavoError": ".messages.errors",
}

__all__ = ["LLM", "CompletionOutput", "Engine", "EngineConfig", "OctavoError", "RequestOutput", "SamplingParams"]

if TYPE_CHECKING:
    from .gateway.config import EngineConfig as EngineConfig
    from .gateway.outputs import CompletionOutput as CompletionOutput
    from .gateway.engine import Engine as Engine
    from .gateway.outputs import RequestOutput as RequestOutput
    from .gateway.llm import LLM as LLM
    from .messages.errors import OctavoError as OctavoError
    from .messages.sampling import SamplingParams as SamplingParams


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
