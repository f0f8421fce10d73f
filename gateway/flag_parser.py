"""The parser of every `octavo` command: its slips, its defaults, its dashes."""

from __future__ import annotations

import argparse
import difflib
import sys
from typing import Any, NoReturn


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells defaults, where there is something to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default or action.default == 0 else action.help


class Parser(argparse.ArgumentParser):
    """A parser that takes `-` and `_` alike and names the nearest flag for one it does not know."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args([_with_dashes(word) for word in words], namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            chosen = getattr(parsed, "parser", self)
            chosen.error(chosen.explain_unknown(unknown))
        return parsed

    def explain_unknown(self, unknown: list[str]) -> str:
        """One line on arguments that nothing takes, with the nearest flags."""
        parts = []
        for word in unknown:
            if not word.startswith("-"):
                parts.append(f"unexpected argument {word!r}")
                continue
            flag = word.split("=")[0]
            # Without the dashes, which all have in common.
            known = {option.lstrip("-"): option for option in self._option_string_actions}
            near = difflib.get_close_matches(flag.lstrip("-"), known, n=1, cutoff=0.5)
            parts.append(f"unknown flag {flag}" + (f" (did you mean {known[near[0]]}?)" if near else ""))
        return "; ".join(parts)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n{self.prog} --help lists what there is\n")


def _with_dashes(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value
