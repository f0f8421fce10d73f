from __future__ import annotations

from pathlib import Path

from octavo.gateway.processes.checkpoint_digest import SAMPLE_BYTES, checkpoint_digest


def save(folder: Path, config: bytes = b"{}", weights: bytes = bytes(4 * SAMPLE_BYTES)) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_copies_are_the_same_wherever_they_are_and_whatever_lies_beside_them(tmp_path: Path) -> None:
    one, other = save(tmp_path / "one"), save(tmp_path / "other")
    (other / "README.md").write_text("notes")
    assert checkpoint_digest(one) == checkpoint_digest(other)


def test_another_configuration_or_other_weights_tell(tmp_path: Path) -> None:
    weights = bytearray(4 * SAMPLE_BYTES)
    weights[-1] = 1
    digests = {
        checkpoint_digest(save(tmp_path / "a")),
        checkpoint_digest(save(tmp_path / "b", config=b'{"n": 1}')),
        checkpoint_digest(save(tmp_path / "c", weights=bytes(weights))),
        checkpoint_digest(save(tmp_path / "d", weights=bytes(5 * SAMPLE_BYTES))),
        checkpoint_digest(save(tmp_path / "e", weights=b"")),
    }
    assert len(digests) == 5


def test_a_single_file_is_a_checkpoint_too(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"a" * 100)
    (tmp_path / "b.gguf").write_bytes(b"b" * 100)
    assert checkpoint_digest(tmp_path / "a.gguf") != checkpoint_digest(tmp_path / "b.gguf")
