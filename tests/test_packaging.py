"""What `pip install` would put into site-packages, and traps of a package whose root is the repository's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("actors", "messages", "kernels", "models", "gateway", "sim")


def test_the_list_of_packages_is_the_folders_that_hold_code() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = ["octavo"] + [
        ".".join(["octavo", *path.parent.relative_to(ROOT).parts])
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    ]
    assert sorted(listed) == sorted(found)


def test_the_root_holds_no_other_module() -> None:
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["__init__.py", "__main__.py"]


def test_probing_for_a_kernels_package_in_the_root_imports_nothing_heavy() -> None:
    code = "import kernels, models, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_the_public_face_is_lazy() -> None:
    code = (
        "import octavo, sys; octavo.SamplingParams; assert 'torch' not in sys.modules and 'aiohttp' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=True, timeout=60)


def test_help_imports_neither_torch_nor_aiohttp() -> None:
    code = (
        "import sys\nfrom octavo.gateway.cli import build_parser\n"
        "build_parser().format_help()\n"
        "assert not {'torch', 'transformers', 'aiohttp', 'rich'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=True, timeout=60)


def test_what_torch_is_installed_with_pins_nothing_that_its_builds_pin_themselves() -> None:
    lines = (ROOT / ".ci/constraints.txt").read_text().splitlines()
    assert [line.partition("==")[0] for line in lines if not line.startswith("#")] == ["torch"]


@pytest.mark.parametrize("needs", ["filelock", 'triton==3.7.1; platform_system == "Linux"'])
def test_make_pins_triton_only_where_torch_brings_none(needs: str, tmp_path: Path) -> None:
    found = re.search(r"BRINGS_TRITON := \$\(BIN\)/python -c \\\n *'(.*)'\n", (ROOT / "Makefile").read_text())
    assert found is not None
    (tmp_path / "torch-2.13.0.dist-info").mkdir()
    (tmp_path / "torch-2.13.0.dist-info" / "METADATA").write_text(f"Name: torch\nRequires-Dist: {needs}\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", found.group(1)], env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (int("triton" not in needs), b"")
