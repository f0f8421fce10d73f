"""Who hears what: the graph of actors as data, the same for every runtime."""

from __future__ import annotations

from typing import Literal

from ...messages.base import Message
from ...messages.kv import BlocksFreed, MatchPrefix, PrefixMatched, ReleaseMatch, ResetBlocks, ResetPrefixCache
from ...messages.request import (
    CancelRequest,
    PromptReady,
    RequestEnded,
    StepTexts,
    StopMatched,
    SubmitPrompt,
    SubmitRequest,
    TextDelta,
)
from ...messages.step import ExecuteStep, PlanStep, StepExecuted
from ...messages.system import Drain, ExecutorFailed, ExecutorLost, ExecutorReady, StartExecutor

Address = Literal["frontend", "tokenizer", "scheduler", "kv_allocator", "executor", "detokenizer", "supervisor"]

Routes = dict[tuple[Address, type[Message]], tuple[Address, ...]]

ROUTES: Routes = {
    ("frontend", SubmitPrompt): ("tokenizer",),
    # By way of the tokenizer, so that a cancel cannot overtake the request that it cancels.
    ("frontend", CancelRequest): ("tokenizer",),
    ("frontend", Drain): ("scheduler",),
    ("frontend", ResetPrefixCache): ("kv_allocator",),
    ("tokenizer", PromptReady): ("detokenizer",),
    ("tokenizer", SubmitRequest): ("scheduler",),
    ("tokenizer", RequestEnded): ("detokenizer",),
    ("tokenizer", CancelRequest): ("scheduler",),
    ("scheduler", MatchPrefix): ("kv_allocator",),
    ("scheduler", ReleaseMatch): ("kv_allocator",),
    ("scheduler", ResetBlocks): ("kv_allocator",),
    ("scheduler", PlanStep): ("kv_allocator",),
    ("scheduler", StepExecuted): ("detokenizer",),
    ("scheduler", RequestEnded): ("detokenizer",),
    ("scheduler", ExecutorFailed): ("supervisor",),
    ("kv_allocator", PrefixMatched): ("scheduler",),
    ("kv_allocator", BlocksFreed): ("scheduler",),
    ("kv_allocator", ExecuteStep): ("executor",),
    # To the scheduler alone, which passes on what it accepts: what the edge knows is at all times a prefix of what the
    # scheduler knows, so the results of an executor that is lost half-way are neither repeated nor missed.
    ("executor", StepExecuted): ("scheduler",),
    ("executor", ExecutorReady): ("supervisor",),
    ("executor", ExecutorFailed): ("supervisor",),
    ("supervisor", ExecutorLost): ("scheduler",),
    ("supervisor", StartExecutor): ("executor",),
    ("detokenizer", PromptReady): ("frontend",),
    ("detokenizer", TextDelta): ("frontend",),
    ("detokenizer", StepTexts): ("frontend",),
    ("detokenizer", StopMatched): ("scheduler",),
    ("detokenizer", CancelRequest): ("scheduler",),
}
