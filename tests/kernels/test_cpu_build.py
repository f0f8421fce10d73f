from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path

import pytest

from octavo.kernels import cpu_build

needs_c = pytest.mark.skipif(cpu_build.library() is None, reason="no C compiler")


@needs_c
def test_a_library_is_built_once_into_a_directory_of_the_user_alone(tmp_path: Path) -> None:
    directory = tmp_path / "cache" / "octavo"
    library = cpu_build.build(directory, os.environ)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in directory.iterdir()} == {library.name, "build.lock"}  # nothing half-built is left
    assert ctypes.CDLL(str(library)).octavo_paged_attention
    built_at = library.stat().st_mtime_ns
    assert cpu_build.build(directory, os.environ) == library
    assert library.stat().st_mtime_ns == built_at


@needs_c
def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(cpu_build.BuildError, match="chmod 700"):
        cpu_build.build(directory, os.environ)


def test_without_a_compiler_one_log_line_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    environ = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    with caplog.at_level(logging.INFO):
        assert cpu_build.load(environ) is None
    assert len(caplog.records) == 1
    assert "install gcc or clang" in caplog.text


def test_a_compiler_that_fails_leaves_torch_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho broken compiler >&2; exit 1\n')
    compiler.chmod(0o700)
    with caplog.at_level(logging.WARNING):
        assert cpu_build.load({"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}) is None
    assert "broken compiler" in caplog.text


def test_it_can_be_switched_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert cpu_build.load({"OCTAVO_CPU_KERNELS": "0", "XDG_CACHE_HOME": str(tmp_path)}) is None
    assert "OCTAVO_CPU_KERNELS=0" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_relative_cache_home_is_ignored_as_its_specification_says() -> None:
    assert cpu_build.cache_dir({"XDG_CACHE_HOME": "somewhere"}) == Path.home() / ".cache" / "octavo"
    assert cpu_build.cache_dir({"XDG_CACHE_HOME": "/var/cache/me"}) == Path("/var/cache/me/octavo")
