from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.actors.runtime import nursery_frames as module
from octavo.actors.runtime.nursery_frames import (
    FrameReader,
    FrameTooLongError,
    Prepared,
    Reaped,
    Report,
    SpawnRefused,
    decode_report,
    to_frame,
)

numbers = st.integers(-(2**31), 2**31)
reports = st.one_of(
    st.builds(Reaped, numbers, numbers),
    st.builds(Prepared, numbers),
    st.builds(SpawnRefused, numbers, st.text()),
)


@given(st.lists(reports), st.integers(1, 40))
def test_frames_survive_being_cut_anywhere(sent: list[Report], size: int) -> None:
    stream = b"".join(map(to_frame, sent))
    reader = FrameReader()
    received = []
    for begin in range(0, len(stream), size):
        received += [decode_report(body) for body in reader.feed(stream[begin : begin + size])]
    assert received == sent


def test_a_frame_that_is_too_long_is_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = to_frame(SpawnRefused(1, "x" * 100))
    monkeypatch.setattr(module, "MAX_FRAME_BYTES", 50)
    with pytest.raises(FrameTooLongError, match="SpawnRefused has"):
        to_frame(SpawnRefused(1, "x" * 100))
    with pytest.raises(FrameTooLongError, match="at most 50"):
        FrameReader().feed(frame)
