"""Every command that README.md and BENCHMARKS.md print is one that the command line understands, flags and all."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from octavo.gateway.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "BENCHMARKS.md")
STANDS_FOR = {"...": "MODEL", "N": "2", "N*K": "4", "N*R": "4", "WHOM": "executor"}
"""What a document leaves open, where the command line asks for something of a kind."""


def commands_of(text: str) -> list[str]:
    """Those printed after a prompt, over several lines or not, and those in the middle of a sentence."""
    prompted = [
        command.replace("\\\n", " ")
        for command in re.findall(r"^\$ (?:\.venv/bin/)?(octavo (?:.*\\\n)*.*)$", text, re.M)
    ]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    spans = [" ".join(span.split()) for span in re.findall(r"`(octavo\s[^`]+)`", prose)]
    return prompted + spans


def arguments_of(command: str) -> list[str]:
    """Without comments, and without what is the shell's: where the output goes, and what runs beside it."""
    words = shlex.split(command, comments=True)[1:]
    end = next((index for index, word in enumerate(words) if word in {">", "&"}), len(words))
    return [STANDS_FOR.get(word, word) for word in words[:end]]


CASES = [
    pytest.param(command, id=f"{name}: {command}")
    for name in DOCUMENTS
    for command in dict.fromkeys(commands_of((ROOT / name).read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("command", CASES)
def test_a_command_that_is_printed_is_understood(command: str) -> None:
    try:
        build_parser().parse_args(arguments_of(command))
    except SystemExit as end:
        assert not end.code, command


def test_commands_are_found_wherever_they_stand() -> None:
    text = "Say `octavo\ndoctor`:\n```\n"
    text += "$ .venv/bin/octavo sim run --trace a \\\n    --replicas 2 > out   # two\n$ ls\n```\n"
    assert [arguments_of(command) for command in commands_of(text)] == [
        ["sim", "run", "--trace", "a", "--replicas", "2"],
        ["doctor"],
    ]


def test_a_flag_that_there_is_not_is_not_understood() -> None:
    with pytest.raises(SystemExit) as end:
        build_parser().parse_args(arguments_of("octavo doctor --of-what 3"))
    assert end.value.code
