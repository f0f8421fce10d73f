"""The planted bugs: each a line of production code that somebody, somewhere, has got wrong.

References such as F-27 and I10 are of the list of faults and invariants for an actor graph; `engine#number` is an
issue of that engine.
"""

from __future__ import annotations

from .allocator_mutants import ALLOCATOR_MUTANTS
from .mutation import Mutant
from .runtime_mutants import RUNTIME_MUTANTS
from .scheduler_mutants import SCHEDULER_MUTANTS

MUTANTS: tuple[Mutant, ...] = (*SCHEDULER_MUTANTS, *ALLOCATOR_MUTANTS, *RUNTIME_MUTANTS)
