"""SEC-01: pickles that write a file when they are loaded, sent to everything that reads what another process wrote."""

from __future__ import annotations

import base64
import io
import os
import pickle
from pathlib import Path

import msgspec
import pytest

from octavo.actors.runtime import envelope
from octavo.actors.runtime.nursery_frames import FrameReader, decode_report, decode_request
from octavo.actors.runtime.schema import all_messages
from octavo.actors.runtime.wire import Decoder, MalformedMessageError
from octavo.gateway.api.stream_journal import FILE_NAME, StreamJournal
from octavo.messages.errors import InvalidJournalError
from octavo.sim.journal.reader import JournalReader


class Bomb:
    """Once it is loaded, a file is there."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self._canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def bombs(canary: Path) -> list[bytes]:
    """In every protocol, and as texts that some readers decode first."""
    pickled = [pickle.dumps(Bomb(canary), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    as_list = pickle.dumps([Bomb(canary)] * 3)
    return [*pickled, as_list, base64.b64encode(pickled[-1]), b"\x80\x05" + pickled[0]]


def test_the_bombs_go_off_where_pickles_are_loaded(canary: Path) -> None:
    pickle.load(io.BytesIO(bombs(canary)[0]))
    assert canary.exists()


def test_sec_01_a_pickle_on_a_port_is_counted_as_malformed_and_never_loaded(canary: Path) -> None:
    decoder = Decoder(all_messages())
    for bomb in bombs(canary):
        for frame in (bomb, envelope.seal(envelope.DATA, 1, 1, bomb)):
            try:
                envelope.unseal(frame)
            except envelope.NotAnEnvelopeError:
                assert frame is bomb
                continue
            with pytest.raises(MalformedMessageError):
                decoder.decode(memoryview(frame)[envelope.HEAD_BYTES :])
        # And within a message that has room for bytes.
        with pytest.raises(MalformedMessageError):
            decoder.decode(msgspec.msgpack.encode(bomb))
    assert not canary.exists()


def test_sec_01_a_pickle_on_the_nursery_s_pipe_is_refused_and_never_loaded(canary: Path) -> None:
    for bomb in bombs(canary):
        reader = FrameReader()
        (body,) = reader.feed(len(bomb).to_bytes(4, "big") + bomb)
        for decode in (decode_request, decode_report):
            with pytest.raises(msgspec.DecodeError):
                decode(body)
    assert not canary.exists()


def test_sec_01_a_pickle_in_a_file_that_is_read_back_is_refused_and_never_loaded(canary: Path, tmp_path: Path) -> None:
    for number, bomb in enumerate(bombs(canary)):
        folder = tmp_path / f"streams {number}"
        journal = StreamJournal(folder)
        journal.close()
        with (folder / FILE_NAME).open("ab") as file:
            file.write(bomb)
        assert StreamJournal.unfinished(folder) == []
        recorded = tmp_path / f"{number}.journal"
        recorded.write_bytes(bomb)
        with pytest.raises(InvalidJournalError):
            JournalReader(recorded)
    assert not canary.exists()
