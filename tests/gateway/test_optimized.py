"""SEC-05: what guards against a checkpoint's own code is no assertion, which `python -O` leaves out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from engines import save_servable

ASK = """
import asyncio, sys
from octavo import Engine
from octavo.messages.sampling import SamplingParams

if __debug__:
    raise SystemExit("this is to run without assertions")

async def main():
    async with Engine(sys.argv[1], dtype="float32", num_blocks=64, block_size=4, max_model_len=64) as engine:
        output = await engine.generate([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
        print(len(output.outputs[0].token_ids))

if __name__ == "__main__":
    asyncio.run(main())
"""


def ask(model: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    script = model.parent / "ask.py"
    script.write_text(ASK)
    command = [sys.executable, *flags, str(script), str(model)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)  # ours


def test_sec_05_without_assertions_no_code_of_a_checkpoint_runs_and_a_request_is_answered(tmp_path: Path) -> None:
    plain, with_code, canary = tmp_path / "plain", tmp_path / "with-code", tmp_path / "canary"
    for folder in (plain, with_code):
        folder.mkdir()
        save_servable("llama", folder)
    config = json.loads((with_code / "config.json").read_text())
    code = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForCausalLM": "evil.EvilModel",
        "AutoTokenizer": ["evil.E", None],
    }
    (with_code / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": code}))
    (with_code / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    answered = ask(plain, "-O")
    assert answered.stdout.strip() == "4", answered.stderr[-2000:]
    refused = ask(with_code, "-O")
    assert refused.returncode != 0
    assert "evil" in refused.stderr or "trust_remote_code" in refused.stderr
    assert not canary.exists()
