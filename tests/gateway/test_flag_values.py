from __future__ import annotations

import argparse

import pytest

from octavo.gateway.flag_values import number, origin, secret


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096),
        ("8k", 8000),
        ("8K", 8192),
        ("8KiB", 8192),
        ("1.5k", 1500),
        ("2m", 2_000_000),
        ("2G", 2 * 2**30),
        ("2GB", 2 * 2**30),
        ("1gib", 2**30),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_numbers_may_have_a_suffix(text: str, value: int) -> None:
    assert number(text) == value


@pytest.mark.parametrize("text", ["https://chat.example", "http://localhost:3000", "http://[::1]:8000", "*", "app://x"])
def test_an_origin_is_what_browsers_send(text: str) -> None:
    assert origin(text) == text
    assert origin(text.upper()) == text


@pytest.mark.parametrize("text", ["chat.example", "https://chat.example/", "https://a@b", "", "https://", "null"])
def test_what_no_browser_sends_is_no_origin(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not an origin") as refused:
        origin(text)
    assert "http://localhost:3000" in str(refused.value)


def test_a_key_is_not_repeated_where_it_is_refused() -> None:
    assert secret("sk-1_2") == "sk-1_2"
    for text in ("my key", "schlüssel"):
        with pytest.raises(argparse.ArgumentTypeError) as refused:
            secret(text)
        assert text not in str(refused.value)
