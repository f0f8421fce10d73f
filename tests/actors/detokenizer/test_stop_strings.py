import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.actors.detokenizer.stop_strings import StopStream, StopStrings

few_letters = st.text(alphabet="abé🎉", max_size=40)
stop_lists = st.lists(st.text(alphabet="abé🎉", min_size=1, max_size=5), min_size=1, max_size=5)


def split(text: str, cuts: list[int]) -> list[str]:
    """`text` in pieces, empty ones among them."""
    points = sorted(min(cut, len(text)) for cut in cuts)
    return [text[a:b] for a, b in zip([0, *points], [*points, len(text)], strict=True)]


def first_match(text: str, stops: list[str]) -> tuple[int, int] | None:
    """By definition: of all occurrences the one that ends first, of those the one that begins first."""
    found = [(i + len(s), i) for s in stops for i in range(len(text)) if text.startswith(s, i)]
    return min(found, default=None)


@given(few_letters, stop_lists, st.lists(st.integers(0, 40)), st.booleans())
def test_any_split_of_a_text_is_cut_at_the_match_that_ends_first(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    stream, sent, matched = StopStream(StopStrings(stops), include), "", ""
    for piece in split(text, cuts):
        sent += stream.feed(piece, may_match=True)
        if matched := stream.matched:
            break
        waiting = max(
            (
                n
                for n in range(len(sent + stream.held) + 1)
                for s in stops
                if n < len(s) and (sent + stream.held).endswith(s[:n])
            ),
            default=0,
        )
        assert include or len(stream.held) == waiting
    match = first_match(text, stops)
    if match is None:
        assert not matched
        assert sent + stream.flush() == text
    else:
        end, start = match
        assert matched == text[start:end]
        assert sent == text[: end if include else start]
        assert stream.flush() == ""


@given(few_letters, few_letters, stop_lists)
def test_a_match_that_ends_before_it_may_is_passed_over(before: str, after: str, stops: list[str]) -> None:
    stream = StopStream(StopStrings(stops), include_stop_str=False)
    sent = stream.feed(before, may_match=False)
    assert not stream.matched
    sent += stream.feed(after, may_match=True)
    text = before + after
    found = [
        (i + len(s), i) for s in stops for i in range(len(text)) if text.startswith(s, i) and i + len(s) > len(before)
    ]
    if not found:
        assert sent + stream.flush() == text
    else:
        end, start = min(found)
        assert stream.matched == text[start:end]
        assert sent == text[:start]


def test_a_stop_string_that_may_not_match_yet_holds_nothing_back_unless_it_begins_another() -> None:
    stream = StopStream(StopStrings(["ab", "bcd"]), include_stop_str=False)
    assert stream.feed("xab", may_match=False) == "xa", "b may begin bcd"
    assert stream.feed("cd", may_match=False) == "bcd"
    assert not stream.is_waiting
    assert stream.feed("ab", may_match=True) == ""
    assert stream.matched == "ab"


@pytest.mark.parametrize("stops", [[], [""], ["a", ""]])
def test_empty_stop_strings_are_refused(stops: list[str]) -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        StopStrings(stops)


def test_stop_strings_that_share_long_prefixes_look_at_each_character_a_bounded_number_of_times() -> None:
    class Counting(dict[str, int]):
        looked = 0

        def get(self, key: str, default: int = 0) -> int:  # type: ignore[override]
            Counting.looked += 1
            return super().get(key, default)

    strings = StopStrings(["a" * 50 + chr(ord("b") + i) for i in range(16)])
    strings.next = [Counting(table) for table in strings.next]
    text = "a" * 20_000
    assert strings.scan(0, text, True)[1] == ""
    assert Counting.looked <= 2 * len(text)


@pytest.mark.parametrize("stop", ["]", "^a", "-", "a-z", "\\", "\\d", "[[", "&&", "||", "~~", "--", "\n", ".*", "\x00"])
def test_a_stop_string_is_text_and_no_pattern(stop: str) -> None:
    stream = StopStream(StopStrings([stop, "]^-\\"]), include_stop_str=False)
    assert stream.feed(f"0b y{stop} after", may_match=True) == "0b y"
    assert stream.matched == stop
