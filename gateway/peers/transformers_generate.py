"""`transformers` with `generate`: one prompt after the other, or all of them as one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .adapter import LoadOptions, Request, missing_modules, module, versions_of


class TransformersGenerate:
    """Args:
    batch_size: prompts in one call of `generate`; None takes all at once.
    """

    def __init__(self, batch_size: int | None = None) -> None:
        self._batch_size = batch_size
        self._model: Any = None

    def is_available(self, options: LoadOptions) -> str:
        return missing_modules("torch", "transformers")

    def versions(self) -> dict[str, str]:
        return versions_of("transformers", "torch")

    def load(self, options: LoadOptions) -> dict[str, Any]:
        self._model = load_transformers(options)
        return {"attention": str(self._model.config._attn_implementation)}

    def run(self, requests: Sequence[Request]) -> list[list[int]]:
        size = self._batch_size or len(requests)
        outputs: list[list[int]] = []
        for start in range(0, len(requests), size):
            outputs += self._generate(requests[start : start + size])
        return outputs

    def _generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """A batch runs on until its longest output; what a shorter one got beyond its own is thrown away."""
        torch = module("torch")
        width = max(len(request.token_ids) for request in requests)
        num_new = max(request.num_output_tokens for request in requests)
        ids = torch.zeros((len(requests), width), dtype=torch.int64, device=self._model.device)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            # On the left, so that each row's next token comes behind its last one.
            ids[row, width - len(request.token_ids) :] = torch.tensor(request.token_ids)
            mask[row, width - len(request.token_ids) :] = 1
        with torch.inference_mode():
            output = self._model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=num_new, pad_token_id=0
            )
        rows: list[list[int]] = output[:, width:].tolist()
        return [row[: request.num_output_tokens] for row, request in zip(rows, requests, strict=True)]


def load_transformers(options: LoadOptions, **more: Any) -> Any:
    """The checkpoint as a `transformers` model that never stops at an end token."""
    torch, transformers = module("torch"), module("transformers")
    torch.set_num_threads(options.num_threads)
    dtype = getattr(torch, options.dtype)
    if options.load_format == "dummy":
        config = transformers.AutoConfig.from_pretrained(options.folder, local_files_only=True)
        with torch.device(options.device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **more).eval()
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            options.folder, dtype=dtype, local_files_only=True, **more
        )
        model = model.to(options.device).eval()
    # `generate` takes what it is not told from here, sampling and end tokens among it.
    model.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model
