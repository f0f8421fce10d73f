"""nano-vllm, with the settings of its own benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .adapter import LoadOptions, Request, missing_modules, module, versions_of

_LEAST_TEMPERATURE = 1e-5  # it knows no greedy sampling
_DEVIATION = 0.02


class NanoVLLM:
    """`nanovllm.LLM` on token ids; one GPU."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._temperature = _LEAST_TEMPERATURE

    def is_available(self, options: LoadOptions) -> str:
        if options.device != "cuda":
            return "needs a GPU"
        return missing_modules("nanovllm", "torch", "flash_attn")

    def versions(self) -> dict[str, str]:
        return versions_of("nano-vllm", "flash-attn", "torch", "transformers")

    def load(self, options: LoadOptions) -> dict[str, Any]:
        if options.load_format == "dummy":
            module("nanovllm.engine.model_runner").load_model = _random_weights
        self._llm = module("nanovllm").LLM(
            options.folder,
            enforce_eager=False,
            max_model_len=options.max_model_len,
            max_num_seqs=max(options.max_num_seqs, 512),
        )
        self._temperature = max(options.temperature, _LEAST_TEMPERATURE)
        return {}

    def run(self, requests: Sequence[Request]) -> list[list[int]]:
        params = module("nanovllm").SamplingParams
        results = self._llm.generate(
            [request.token_ids for request in requests],
            [
                params(temperature=self._temperature, ignore_eos=True, max_tokens=request.num_output_tokens)
                for request in requests
            ],
            use_tqdm=False,
        )
        return [list(result["token_ids"]) for result in results]


def _random_weights(model: Any, path: str) -> None:
    """In place of its reading of safetensors: what was allocated may hold anything, infinities among it."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, _DEVIATION)
        else:
            parameter.data.fill_(1.0)
