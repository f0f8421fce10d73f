"""Values of command-line flags: what a word must look like, and what it stands for."""

from __future__ import annotations

import argparse
import ipaddress
import json
import re
from fractions import Fraction
from typing import Any

_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([kKmMgG]?)([iI]?)[bB]?$")
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#@\s]+")
_FACTOR = {"": 0, "k": 1, "m": 2, "g": 3}


def number(text: str) -> int:
    """`8192`, `8k` (8000) or `8K` (8192), as vLLM reads them; also m/M and g/G."""
    match = _SIZE.match(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 4096, 8k or 2G")
    value, unit, binary = match.groups()
    base = 1024 if unit.isupper() or binary else 1000
    exact = Fraction(value) * base ** _FACTOR[unit.lower()]
    if exact.denominator != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(exact)


def positive(text: str) -> int:
    """A `number` of at least 1."""
    value = number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is too small: at least 1")
    return value


def json_object(text: str) -> dict[str, Any]:
    """A JSON object, of whatever its fields are."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object such as {{"temperature": 0.6}}')
    return value


def port(text: str) -> int:
    """A TCP port; 0 takes a free one."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 0 to 65535")
    return int(text)


def rate(text: str) -> float:
    """A positive number a second, or `inf`."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate: a number above 0, or inf")
    return value


def seconds(text: str) -> float:
    """A finite number of seconds from 0 up."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 up")
    return value


def network(text: str) -> str:
    """An IP address or a network such as 10.0.0.0/8."""
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address or a network such as 10.0.0.0/8") from None


def host_name(text: str) -> str:
    """A name for the `Host` header, without a port; `*` stands for any."""
    if not text or any(character in "/:[]@ " for character in text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a host name: give it without scheme and port")
    return text.lower()


def origin(text: str) -> str:
    """An origin of web pages as browsers send it, such as https://chat.example; `*` stands for any."""
    if text == "*" or _ORIGIN.fullmatch(text):
        return text.lower()
    raise argparse.ArgumentTypeError(
        f"{text!r} is not an origin: give scheme, host and, unless it is the scheme's own, port, as in "
        "http://localhost:3000; * for any"
    )


def secret(text: str) -> str:
    """A key as clients send it in a header: printable ASCII without spaces, and not nothing."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty, and would let everybody in: was a variable not set?")
    if not re.fullmatch(r"[!-~]+", text):
        raise argparse.ArgumentTypeError("a key is printable ASCII without spaces")  # it is not printed: it is a secret
    return text


def named_path(text: str) -> tuple[str, str]:
    """`NAME=PATH`."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path
