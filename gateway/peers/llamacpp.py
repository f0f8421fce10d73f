"""llama.cpp through `llama-cpp-python`: all requests as sequences of one context, as its own batched bench does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .adapter import LoadOptions, Request, missing_modules, module, versions_of

_BATCH = 2048  # tokens in one call of llama_decode
_MICRO_BATCH = 512  # of them in one graph, llama.cpp's own default


class LlamaCpp:
    """The low-level binding: the high-level class serves one sequence at a time."""

    def __init__(self) -> None:
        self._context: Any = None
        self._batch: Any = None
        self._num_vocabulary = 0

    def is_available(self, options: LoadOptions) -> str:
        missing = missing_modules("llama_cpp", "numpy")
        if missing:
            return f"{missing}; pip install llama-cpp-python builds it"
        if not options.gguf:
            return "it reads GGUF alone: convert the model, and name the file with --peer-gguf"
        return "" if Path(options.gguf).is_file() else f"there is no file {options.gguf}"

    def versions(self) -> dict[str, str]:
        return versions_of("llama_cpp_python")

    def load(self, options: LoadOptions) -> dict[str, Any]:
        lib = module("llama_cpp")
        lib.llama_backend_init()
        model_params = lib.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model = lib.llama_model_load_from_file(options.gguf.encode(), model_params)
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {options.gguf}")
        params = lib.llama_context_default_params()
        params.n_ctx = options.max_total_tokens
        params.n_batch, params.n_ubatch = _BATCH, _MICRO_BATCH
        params.n_seq_max = options.max_num_seqs
        params.n_threads = params.n_threads_batch = options.num_threads
        params.kv_unified = True  # sequences share n_ctx as they need it
        params.offload_kqv = False
        self._context = lib.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp refuses the context: does max_total_tokens fit the memory?")
        self._batch = lib.llama_batch_init(_BATCH, 0, 1)
        self._num_vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        return {"file": Path(options.gguf).name}

    def run(self, requests: Sequence[Request]) -> list[list[int]]:
        lib = module("llama_cpp")
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
        outputs: list[list[int]] = [[] for _ in requests]
        prompts = [
            (row, position, token, position == len(request.token_ids) - 1)
            for row, request in enumerate(requests)
            for position, token in enumerate(request.token_ids)
        ]
        for start in range(0, len(prompts), _BATCH):
            self._decode(prompts[start : start + _BATCH], outputs)
        while rows := [
            (row, len(request.token_ids) + len(outputs[row]) - 1, outputs[row][-1], True)
            for row, request in enumerate(requests)
            if len(outputs[row]) < request.num_output_tokens
        ]:
            self._decode(rows, outputs)
        return outputs

    def _decode(self, tokens: list[tuple[int, int, int, bool]], outputs: list[list[int]]) -> None:
        """Compute `(row, position, token, samples)` and append the greedy token of each that samples."""
        lib, numpy = module("llama_cpp"), module("numpy")
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, (row, position, token, samples) in enumerate(tokens):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, samples
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row
        status = lib.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode says {status}")
        for index, (row, _, _, samples) in enumerate(tokens):
            if samples:
                logits = lib.llama_get_logits_ith(self._context, index)
                outputs[row].append(int(numpy.ctypeslib.as_array(logits, (self._num_vocabulary,)).argmax()))
