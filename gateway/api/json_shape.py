"""What a JSON document is made of, told before anything is built of it: how much, and whether a name comes twice."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from .http_errors import ApiError, bad_request

MAX_CONTAINERS: Final = 32_768
"""Lists and objects in a body. A million empty ones fit in 4 MB and took the decoder 0.5 s, most of it for Python's
collector; so many take it 3 ms (`octavo.gateway.bench_json`)."""

MAX_STRINGS: Final = 131_072
"""Names and texts in a body; decoding so many takes 2 ms, as names of one object 15 ms."""

_FEW_BYTES: Final = 2 * MAX_CONTAINERS
_TOP_LEVEL: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NAME_BEFORE_VALUE: Final = re.compile(
    rb'[ \t\r\n]*([{,])[ \t\r\n]*("(?:[^"\\]|\\.)*")[ \t\r\n]*:[ \t\r\n]*', re.DOTALL
)


def refuse_too_much(body: bytes) -> None:
    """Refuse a body of more lists, objects and strings than any request needs. It need not be JSON.

    Raises:
        ApiError: 400.
    """
    if len(body) < _FEW_BYTES:
        return
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS or body.count(b'"') > 2 * MAX_STRINGS:
        structure = _unescaped(body)
        num_strings = structure.count(b'"') // 2
        if num_strings > MAX_STRINGS:
            raise bad_request(f"the body holds {num_strings} names and texts: at most {MAX_STRINGS} are read")
        structure = _without_strings(structure)
        num_containers = structure.count(b"[") + structure.count(b"{")
        if num_containers > MAX_CONTAINERS:
            raise bad_request(f"the body holds {num_containers} lists and objects: at most {MAX_CONTAINERS} are read")


def members(body: bytes) -> dict[str, tuple[int, int]]:
    """Where in a JSON object each field's value stands; no object in it, at any depth, names a field twice.

    Which of two values is meant is anybody's guess, and proxies may guess otherwise.

    Raises:
        ApiError: 400, a name is repeated; `param` is the field that it is in.
        msgspec.DecodeError: it is no JSON object.
        RecursionError: it is nested too deeply.
    """
    spans = _top_level(body)
    for name, (start, end) in spans.items():
        if body[start : start + 1] in (b"{", b"[") and body.find(b"{", start, end) >= 0:
            _refuse_repeated_within(body[start:end], name)
    return spans


def _top_level(body: bytes) -> dict[str, tuple[int, int]]:
    """The decoder keeps one value for each name; if these, in order, with their names between, make up the whole body,
    then none was repeated."""
    spans: dict[str, tuple[int, int]] = {}
    position = 0
    for name, value in _TOP_LEVEL.decode(body).items():
        found = _NAME_BEFORE_VALUE.match(body, position)
        raw = bytes(value)
        if found is None or not body.startswith(raw, found.end()) or _decode_name(found.group(2)) != name:
            raise _repeated()
        position = found.end() + len(raw)
        spans[name] = (found.end(), position)
    if body[position:].strip(b" \t\r\n") not in (b"}", b"{}"):
        raise _repeated()
    return spans


def _decode_name(name: bytes) -> str:
    return name[1:-1].decode() if b"\\" not in name else msgspec.json.decode(name, type=str)


def _repeated() -> ApiError:
    return bad_request("the body names a field twice", code="invalid_json")


def _refuse_repeated_within(raw: bytes, name: str) -> None:
    """Outside of strings each name of an object has a colon behind it, and nothing else has: so there are as many as
    names, unless one was lost."""
    name = name[:100]
    try:
        num_names = _num_names(msgspec.json.decode(raw))
    except msgspec.ValidationError as error:  # of a number beyond all numbers
        raise bad_request(f"{name}: {str(error).partition(' - at `')[0]}", name) from None
    if raw.count(b":") != num_names and _without_strings(_unescaped(raw)).count(b":") != num_names:
        raise bad_request(f"an object in {name} names a field twice", name, "invalid_json")


def _num_names(document: Any) -> int:
    num_names = 0
    left = [document]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            num_names += len(value)
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
    return num_names


def _unescaped(document: bytes) -> bytes:
    """The document without those characters of strings that might be taken for a string's end."""
    return document.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in document else document


def _without_strings(unescaped: bytes) -> bytes:
    return b"".join(unescaped.split(b'"')[::2])
