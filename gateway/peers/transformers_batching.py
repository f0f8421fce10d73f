"""`transformers` with its own continuous batching over a paged cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from .adapter import LoadOptions, Request, missing_modules, module, versions_of
from .transformers_generate import load_transformers

_PAGE = 64
_POLL_S = 1.0


class TransformersBatching:
    """One manager for all runs, since a start costs a cache and a thread."""

    def __init__(self) -> None:
        self._manager: Any = None

    def is_available(self, options: LoadOptions) -> str:
        return missing_modules("torch", "transformers")

    def versions(self) -> dict[str, str]:
        return versions_of("transformers", "torch")

    def load(self, options: LoadOptions) -> dict[str, Any]:
        transformers = module("transformers")
        utils = module("transformers.generation.configuration_utils")
        model = load_transformers(options, attn_implementation="sdpa")
        # Prompts are random, so nothing is shared. -1 is no token's id: there is no other way to say "no end token".
        # Its default of the 50 likeliest would sort the whole vocabulary, which nobody else is asked for.
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0} if options.temperature else {}
        generation = transformers.GenerationConfig(**{"do_sample": False, **sampling}, eos_token_id=-1, pad_token_id=0)
        pages = -(-options.max_total_tokens // _PAGE) + options.max_num_seqs + 1
        fields = {field.name for field in dataclasses.fields(utils.ContinuousBatchingConfig)}
        batching = utils.ContinuousBatchingConfig(
            **{"page_size" if "page_size" in fields else "block_size": _PAGE},  # as 5.17 still called it
            num_blocks=pages,
            max_batch_tokens=max(8192 if options.device == "cuda" else 2048, options.max_num_seqs),
            allow_block_sharing=False,
            use_cuda_graph=options.device == "cuda",
        )
        self._manager = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching
        )
        self._manager.start()
        return {"attention": str(model.config._attn_implementation)}

    def run(self, requests: Sequence[Request]) -> list[list[int]]:
        manager = self._manager
        ids = [manager.add_request(request.token_ids, max_new_tokens=request.num_output_tokens) for request in requests]
        outputs: dict[str, list[int]] = {}
        while len(outputs) < len(ids):
            result = manager.get_result(timeout=_POLL_S)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("the batching thread ended")
            elif result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                outputs[result.request_id] = list(result.generated_tokens)
        return [outputs[request_id] for request_id in ids]
