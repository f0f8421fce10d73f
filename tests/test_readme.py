"""README's examples, run as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_engine import FakeEngine

from octavo.gateway.api.server import create_app
from octavo.gateway.api.settings import ServerSettings
from octavo.models.registry import NATIVE

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", README, re.DOTALL))


@pytest.mark.parametrize("name", ["engine", "llm"])
def test_an_example_of_the_readme_runs_as_printed(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXAMPLES[name]], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) >= 2
    if name == "llm":
        assert lines[0].startswith("'The file is' -> ")


FAMILIES = {
    "Llama 1 to 3.x": "llama",
    "Mistral": "mistral",
    "Mixtral": "mixtral",
    "Qwen2 and 2.5": "qwen2",
    "Qwen3": "qwen3",
    "Qwen3-MoE": "qwen3_moe",
    "SmolLM3": "smollm3",
    "Gemma 2": "gemma2",
    "Gemma 3 (text)": "gemma3_text",
    "GPT-OSS": "gpt_oss",
}


def test_the_families_that_the_readme_calls_native_are_those_of_the_registry() -> None:
    (named,) = re.findall(r"\*\*Natively\*\*, in readable torch: ([^*]*?)\.\n- ", README)
    assert sorted(FAMILIES[name] for name in re.split(r",\s+", named)) == sorted(NATIVE)


def test_no_family_is_both_native_and_served_through_transformers() -> None:
    (named,) = re.findall(r"\*\*Any other decoder[^:]*: ([^:]*?) and many more\.", README)
    assert not set(re.split(r",\s+", named)) & set(FAMILIES)


def test_the_routes_that_the_readme_names_are_those_that_are_served() -> None:
    (paragraph,) = re.findall(r"## The server\n\n(.*?) It listens", README, re.DOTALL)
    named = set(re.findall(r"`(/[^`]+)`", paragraph))
    routes = {resource.canonical for resource in create_app(FakeEngine(), ServerSettings()).router.resources()}
    assert named == {route for route in routes if route != "/" and "{" not in route}
