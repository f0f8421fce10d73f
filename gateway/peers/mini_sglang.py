"""mini-sglang, offline, with the settings of its own benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .adapter import LoadOptions, Request, missing_modules, module, versions_of

_MAX_EXTEND_TOKENS = 16384
_PAGE = 256


class MiniSGLang:
    """`minisgl.llm.LLM` on token ids; one GPU."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._temperature = 0.0

    def is_available(self, options: LoadOptions) -> str:
        if options.device != "cuda":
            return "needs a GPU"
        return missing_modules("minisgl", "torch")

    def versions(self) -> dict[str, str]:
        return versions_of("minisgl", "sgl-kernel", "flashinfer-python", "torch")

    def load(self, options: LoadOptions) -> dict[str, Any]:
        torch, base = module("torch"), module("minisgl.llm").LLM

        def keep_every_token(llm: Any, reply: Sequence[Any]) -> None:
            # Its own leaves a request's last token out of the result.
            for message in reply:
                llm.status_map[message.uid].output_ids.append(message.next_token)

        every_token = type("EveryToken", (base,), {"offline_send_result": keep_every_token})
        more: dict[str, Any] = {"use_dummy_weight": True} if options.load_format == "dummy" else {}
        if missing_modules("sgl_kernel"):  # which its choice for Hopper needs
            more["attention_backend"] = "fi"
        self._llm = every_token(
            options.folder,
            dtype=getattr(torch, options.dtype),
            max_seq_len_override=options.max_model_len,
            max_extend_tokens=_MAX_EXTEND_TOKENS,
            cuda_graph_max_bs=options.max_num_seqs,
            page_size=_PAGE,
            **more,
        )
        self._temperature = options.temperature
        return {"max_extend_tokens": _MAX_EXTEND_TOKENS, "attention": more.get("attention_backend", "auto")}

    def run(self, requests: Sequence[Request]) -> list[list[int]]:
        params = module("minisgl.core").SamplingParams
        results = self._llm.generate(
            [request.token_ids for request in requests],
            [
                params(temperature=self._temperature, ignore_eos=True, max_tokens=request.num_output_tokens)
                for request in requests
            ],
        )
        return [list(result["token_ids"]) for result in results]
