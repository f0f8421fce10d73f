"""OpenVINO GenAI's continuous batching."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .adapter import LoadOptions, Request, missing_modules, module, versions_of

_PRECISION = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class OpenVINOBatching:
    """Reads an OpenVINO IR (`optimum-cli export openvino`), or a GGUF if it is given that alone."""

    def __init__(self) -> None:
        self._pipeline: Any = None

    def is_available(self, options: LoadOptions) -> str:
        missing = missing_modules("openvino", "openvino_genai", "numpy")
        if missing:
            return f"{missing}; pip install openvino-genai"
        if options.openvino:
            has_model = (Path(options.openvino) / "openvino_model.xml").is_file()
            return "" if has_model else f"{options.openvino} has no openvino_model.xml"
        if options.gguf:
            return "" if Path(options.gguf).is_file() else f"there is no file {options.gguf}"
        return "it reads no safetensors: export the model and name the folder with --peer-openvino, or give --peer-gguf"

    def versions(self) -> dict[str, str]:
        return versions_of("openvino-genai", "openvino")

    def load(self, options: LoadOptions) -> dict[str, Any]:
        genai = module("openvino_genai")
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs = options.max_num_seqs
        scheduler.max_num_batched_tokens = 2048
        scheduler.enable_prefix_caching = False
        scheduler.dynamic_split_fuse = True
        scheduler.cache_size = max(1, -(-options.max_total_tokens * _MOST_KV_BYTES_PER_TOKEN // 2**30))
        path = options.openvino or options.gguf
        self._pipeline = genai.ContinuousBatchingPipeline(
            path,
            scheduler,
            "CPU",
            {"INFERENCE_NUM_THREADS": options.num_threads, "INFERENCE_PRECISION_HINT": _PRECISION[options.dtype]},
        )
        return {"model": Path(path).name}

    def run(self, requests: Sequence[Request]) -> list[list[int]]:
        genai, openvino, numpy = module("openvino_genai"), module("openvino"), module("numpy")
        inputs, configs = [], []
        for request in requests:
            inputs.append(openvino.Tensor(numpy.array([request.token_ids], dtype=numpy.int64)))
            config = genai.GenerationConfig()
            config.max_new_tokens = request.num_output_tokens
            config.ignore_eos = True
            config.do_sample = False
            configs.append(config)
        results = self._pipeline.generate(inputs, configs)
        return [list(result.m_generation_ids[0]) for result in results]


_MOST_KV_BYTES_PER_TOKEN = 2**17
"""What a token is taken to need when the cache is sized, in GiB as OpenVINO wants it: 128 KiB."""
