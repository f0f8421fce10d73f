"""Stop strings in a stream of text: what may be sent, what must wait, and where the answer ends."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence


class StopStrings:
    """An automaton that finds any of several strings, whatever pieces the text comes in.

    The match that ends first wins, and of those that end together the longest: so the result does not depend on how the
    text was split into tokens. The state after a text is its longest suffix that a stop string begins with, which is
    exactly the text that must wait. Each character is looked at once; runs that cannot begin a stop string are skipped
    by a regular expression. Immutable: streams with the same stop strings share one.

    Source: Aho and Corasick 1975, "Efficient string matching".
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Build the automaton, in time linear in the strings.

        Raises:
            ValueError: no strings, or an empty one.
        """
        if not strings or not all(strings):
            raise ValueError(f"stop strings must not be empty, got {strings!r}")
        self.next: list[dict[str, int]] = [{}]
        self.depth: list[int] = [0]
        self._match: list[str] = [""]  # the longest stop string that ends in this state
        for string in strings:
            self._insert(string)
        self._fail = self._link()
        firsts = "".join(re.escape(char) for char in self.next[0])
        self.search = re.compile(f"[{firsts}]").search

    def _insert(self, string: str) -> None:
        state = 0
        for char in string:
            following = self.next[state].get(char)
            if following is None:
                following = len(self.next)
                self.next[state][char] = following
                self.next.append({})
                self.depth.append(self.depth[state] + 1)
                self._match.append("")
            state = following
        self._match[state] = string

    def _link(self) -> list[int]:
        """For each state the state of its longest proper suffix, breadth first."""
        fail = [0] * len(self.next)
        queue = deque(self.next[0].values())
        while queue:
            state = queue.popleft()
            for char, following in self.next[state].items():
                suffix = fail[state]
                while suffix and char not in self.next[suffix]:
                    suffix = fail[suffix]
                fail[following] = self.next[suffix].get(char, 0)
                self._match[following] = self._match[following] or self._match[fail[following]]
                queue.append(following)
        return fail

    def scan(self, state: int, text: str, may_match: bool) -> tuple[int, str, int]:
        """Go on from `state` (0 at the beginning) over `text`.

        Args:
            state: what an earlier call returned.
            text: the next piece.
            may_match: False passes over complete stop strings, as `min_tokens` demands.

        Returns:
            `(state, string, end)`: the stop string found, or "", and the index in `text` behind its last character.
        """
        tables, fail, match = self.next, self._fail, self._match
        i, length = 0, len(text)
        while i < length:
            if not state:
                candidate = self.search(text, i)
                if candidate is None:
                    break
                i = candidate.start()
            char = text[i]
            while state and char not in tables[state]:
                state = fail[state]
            state = tables[state].get(char, 0)
            i += 1
            if match[state]:
                if may_match:
                    return state, match[state], i
                while state and not tables[state]:  # nothing goes on from here: the text need not wait for it
                    state = fail[state]
        return state, "", length


class StopStream:
    """One stream's place in the automaton, and the text that waits."""

    __slots__ = ("_include", "_state", "held", "matched", "strings")

    def __init__(self, strings: StopStrings, include_stop_str: bool) -> None:
        """Args:
        strings: what to look for.
        include_stop_str: the stop string belongs to the text; then nothing ever waits.
        """
        self.strings = strings
        self._include = include_stop_str
        self._state = 0
        self.held = ""
        self.matched = ""

    def feed(self, text: str, may_match: bool) -> str:
        """The text that may be sent now that `text` came; `matched` tells whether it is the last."""
        if not self._state and self.strings.search(text) is None:
            return text
        self._state, self.matched, end = self.strings.scan(self._state, text, may_match)
        if self._include:
            return text[:end]
        whole = self.held + text
        if self.matched:
            cut = len(self.held) + end - len(self.matched)
            self.held = ""
            return whole[:cut]
        cut = len(whole) - self.strings.depth[self._state]
        self.held = whole[cut:]
        return whole[:cut]

    @property
    def is_waiting(self) -> bool:
        """Whether the text so far ends with what a stop string begins with."""
        return self._state != 0

    def flush(self) -> str:
        """The text that waited, now that no more comes."""
        held, self.held = self.held, ""
        return held
