"""From a checkpoint's folder, or a GGUF file, to a model: which implementation serves it, in which dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from ..kernels import cpu_build
from .decoder import Decoder
from .deterministic import costs_nothing, make_deterministic
from .errors import ModelNotFoundError, QuantizedModelError, UnsupportedModelError
from .gemma import GemmaForCausalLM
from .gguf.config import read_config
from .gguf.reader import GGUFFile, is_gguf
from .gpt_oss import GptOssForCausalLM
from .interface import CausalLM
from .layers import cpu_multiplies_in
from .llama import LlamaForCausalLM
from .parallel import ParallelGroup
from .plain_config import PlainConfig, read_plain_config
from .quantization.reader import Quantization
from .quantization.scheme import Scheme, read_scheme
from .random_weights import RandomWeights
from .weights import checkpoint_dtype, weight_files

ModelImpl = Literal["auto", "native", "transformers"]
LoadFormat = Literal["auto", "dummy"]
WeightsAre = Scheme | RandomWeights | Literal["int8", "int4"] | None
"""How the weights are quantised or are to be, or that there are none to be read; None for floating ones."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_LARGER_THAN_CACHES = 64 * 1024**2


# model_type -> the architecture that a native class serves, and the class.
NATIVE: dict[str, tuple[str, type[Decoder]]] = {
    "llama": ("LlamaForCausalLM", LlamaForCausalLM),
    "mistral": ("MistralForCausalLM", LlamaForCausalLM),
    "mixtral": ("MixtralForCausalLM", LlamaForCausalLM),
    "qwen2": ("Qwen2ForCausalLM", LlamaForCausalLM),
    "qwen3": ("Qwen3ForCausalLM", LlamaForCausalLM),
    "qwen3_moe": ("Qwen3MoeForCausalLM", LlamaForCausalLM),
    "smollm3": ("SmolLM3ForCausalLM", LlamaForCausalLM),
    "gemma2": ("Gemma2ForCausalLM", GemmaForCausalLM),
    "gemma3_text": ("Gemma3ForCausalLM", GemmaForCausalLM),
    "gpt_oss": ("GptOssForCausalLM", GptOssForCausalLM),
}


def load_config(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The `transformers` configuration in a folder.

    Raises:
        ModelNotFoundError: no folder, or no config.json in it.
        UnsupportedModelError: `transformers` does not know the type, or refuses the values.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelNotFoundError(f"there is no folder {folder}")
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"{folder} has no config.json: is it a checkpoint in the Hugging Face layout?")
    # Not at the top: a second that a native model with a plain configuration does not need.
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001,RUF100 - each configuration class raises what it likes on bad values
        reason = str(error).strip() or type(error).__name__
        advice = ""
        if "trust_remote_code" in reason:
            reason = f"{folder / 'config.json'} names a model type that comes with its own code"
            advice = ". Read that code, and start with --trust-remote-code if you trust it"
        raise UnsupportedModelError(f"cannot use the configuration in {folder}: {reason}{advice}") from error


def resolve_dtype(dtype: str, config: Any, folder: Path, device: torch.device, *, native: bool) -> torch.dtype:
    """The dtype to compute in; `auto` takes the checkpoint's, or float32 where a CPU is slower in that.

    Half as many bytes are a gain where the weights come from memory. Where they fit the caches, float32 is quicker:
    without bfloat16 instructions (AVX2, one thread, our own bfloat16 linear takes 1.2 to 1.6 of float32's time a decode
    step at a width of 256, 0.6 to 0.85 at Qwen3-0.6B's widths; `python -m octavo.kernels.bench_cpu`), and with them
    (AVX-512, `leaf-4m`, 1.1 to 1.25; `octavo bench offline --dtype bfloat16`).
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UnsupportedModelError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    stored = getattr(config, "dtype", None)
    if isinstance(stored, str):
        stored = DTYPES.get(stored)
    if stored is None:
        stored = checkpoint_dtype(folder)
    if stored not in DTYPES.values():  # float64, float8
        stored = torch.float32
    if device.type != "cpu":
        return stored
    if native and sum(path.stat().st_size for path in weight_files(folder)) < _LARGER_THAN_CACHES:
        return torch.float32
    has_own_linear = stored is torch.bfloat16 and native and cpu_build.library() is not None
    return stored if has_own_linear or cpu_multiplies_in(stored) else torch.float32


def check_supported(config: Any, path: str | Path) -> None:
    """Refuse what neither implementation can serve.

    Raises:
        UnsupportedModelError: the model is an encoder, or encoder and decoder.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{path} is an encoder-decoder ({config.model_type}); only decoders that continue a text are supported"
        )


def weight_quantization(
    config: Any, path: Path, quantization: Quantization, *, native: bool
) -> Scheme | Literal["int8", "int4"] | None:
    """How the weights are quantised or are to be; None for floating ones.

    Raises:
        QuantizedModelError: by a method that is not read, or the model is not served natively.
        UnsupportedModelError: `int8` or `int4` was asked for where it cannot be had.
    """
    stated, method = getattr(config, "quantization_config", None), _stated_method(config)
    if stated and not native:
        raise QuantizedModelError(
            f"the weights of {path} are quantised ({method}), which is supported only by native implementations "
            f"({_native_names()}). Take the checkpoint in float32, bfloat16 or float16"
        )
    if quantization == "auto":
        return None if is_gguf(path) else read_scheme(path)
    asked = f"--quantization {quantization}"
    if stated:
        raise UnsupportedModelError(f"{asked}: weights of {path} are quantised ({method}) already; leave it at auto")
    if is_gguf(path):
        raise UnsupportedModelError(f"{asked}: {path} is a GGUF file, whose weights stay as they are; leave it at auto")
    if not native:
        raise UnsupportedModelError(
            f"{asked}: {path} is served through transformers, and only native implementations quantise "
            f"({_native_names()}). Leave --quantization at auto"
        )
    return quantization


def _stated_method(config: Any) -> Any:
    """How a configuration says that the weights are quantised; None where it does not."""
    stated = getattr(config, "quantization_config", None)
    method = stated.get("quant_method") if isinstance(stated, dict) else getattr(stated, "quant_method", None)
    return getattr(method, "value", method)


def dummy_dtype(dtype: str, config: Any, device: torch.device) -> torch.dtype:
    """The dtype of random weights; `auto` takes the configuration's, bfloat16 without one, float32 on a slow CPU."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UnsupportedModelError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    stated = getattr(config, "dtype", None)
    if isinstance(stated, str):
        stated = DTYPES.get(stated)
    found = stated if isinstance(stated, torch.dtype) and stated in DTYPES.values() else torch.bfloat16
    return found if device.type != "cpu" or cpu_multiplies_in(found) else torch.float32


def _random_weights(config: Any, folder: Path, quantization: Quantization, *, native: bool) -> RandomWeights:
    """Asks for random weights where they can be had; of a checkpoint's own quantisations MXFP4 and fp8 are kept to.

    Raises:
        UnsupportedModelError: they cannot.
    """
    why_not = _why_none_random(folder, native=native)
    if why_not:
        raise UnsupportedModelError(f"--load-format dummy: {why_not}")
    if quantization != "auto":
        return RandomWeights(quantized_to=quantization)
    scheme = _stated_fp8(config, folder)
    if scheme is not None:
        return RandomWeights(quantized_to="fp8", by_block=scheme.group_size > 0, static_inputs=scheme.static_inputs)
    is_mxfp4 = config.model_type == "gpt_oss" and _stated_method(config) == "mxfp4"
    return RandomWeights(quantized_to="mxfp4" if is_mxfp4 else None)


def _stated_fp8(config: Any, folder: Path) -> Scheme | None:
    """The scheme of a checkpoint in fp8; None for others, and for those that cannot be read."""
    if _stated_method(config) not in ("fp8", "compressed-tensors"):
        return None
    try:
        scheme = read_scheme(folder)
    except QuantizedModelError:
        return None
    return scheme if scheme is not None and scheme.method == "fp8" else None


def _why_none_random(folder: Path, *, native: bool) -> str:
    if is_gguf(folder):
        return f"{folder} is a GGUF file; give a folder with a config.json"
    return "" if native else f"{folder} has no native implementation; native are {_native_names()}"


def why_no_random_weights(path: str | Path, *, model_impl: ModelImpl = "auto", trust_remote_code: bool = False) -> str:
    """Why a model cannot be had with random weights; empty if, as far as its configuration says, it can.

    Raises:
        ModelLoadError: there is no such model at all.
    """
    folder = Path(path)
    if is_gguf(folder):
        return _why_none_random(folder, native=True)
    config = _configuration(folder, model_impl, trust_remote_code=trust_remote_code)
    native = model_impl != "transformers" and native_class(config) is not None
    return _why_none_random(folder, native=native)


def _native_names() -> str:
    return ", ".join(architecture for architecture, _ in NATIVE.values())


def native_class(config: Any) -> type[Decoder] | None:
    """The native implementation of a configuration's family, None where there is none."""
    architecture, implementation = NATIVE.get(config.model_type, (None, None))
    named = getattr(config, "architectures", None)
    return implementation if not named or architecture in named else None


def load_model(
    path: str | Path,
    *,
    dtype: str = "auto",
    model_impl: ModelImpl = "auto",
    trust_remote_code: bool = False,
    device: str = "cpu",
    max_model_len: int | None = None,
    quantization: Quantization = "auto",
    deterministic: bool | None = None,
    group: ParallelGroup | None = None,
    load_format: LoadFormat = "auto",
) -> CausalLM:
    """Load a checkpoint, natively where its family is and through `transformers` otherwise.

    Args:
        path: a folder or a GGUF file; `checkpoint.resolve_checkpoint` turns a hub name into one.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        model_impl: `auto` falls back to `transformers` for an option that the native class lacks; `native` does not.
        trust_remote_code: allow a model type that brings its own code.
        device: where the weights go.
        max_model_len: longest context that will be served; None takes the checkpoint's.
        quantization: `int8` or `int4` quantises floating weights at load; `auto` takes them as they are stored.
        deterministic: a row's logits are the same bits alone and in any batch; native implementations only. None:
            where that costs nothing.
        group: the ranks that serve the model together, each its part; None: this process alone.
        load_format: `dummy` makes random weights on the device, from config.json alone, and quantises them where that
            was asked for; native implementations only.

    Raises:
        ModelLoadError: with a message that says what is missing.
    """
    folder, target = Path(path), torch.device(device)
    config = _configuration(folder, model_impl, trust_remote_code=trust_remote_code)
    check_supported(config, folder)
    must_be_native = is_gguf(folder) or model_impl == "native"
    is_parallel = group is not None and group.world_size > 1
    implementation = None if model_impl == "transformers" else native_class(config)
    weights_are: WeightsAre
    if load_format == "dummy":
        weights_are = _random_weights(config, folder, quantization, native=implementation is not None)
    else:
        weights_are = weight_quantization(config, folder, quantization, native=implementation is not None)
    if implementation is None:
        _check_needs_no_native(
            config, folder, must_be_native=must_be_native, deterministic=deterministic, is_parallel=is_parallel
        )
    else:
        model = _load_native(
            *(implementation, folder, config),
            dtype=dtype,
            device=target,
            max_model_len=max_model_len,
            weights_are=weights_are,
            deterministic=deterministic,
            group=group,
            may_fall_back=not (must_be_native or deterministic or is_parallel) and weights_are is None,
        )
        if model is not None:
            return model
    if isinstance(config, PlainConfig):
        config = load_config(folder, trust_remote_code=trust_remote_code)
    # Not at the top: a native model needs neither the module nor `transformers`.
    from .transformers_backend import load_transformers_model

    return load_transformers_model(
        str(folder),
        config,
        dtype=resolve_dtype(dtype, config, folder, target, native=False),
        trust_remote_code=trust_remote_code,
        device=target,
        max_model_len=max_model_len,
    )


def _load_native(
    implementation: type[Decoder],
    folder: Path,
    config: Any,
    *,
    dtype: str,
    device: torch.device,
    max_model_len: int | None,
    weights_are: WeightsAre,
    deterministic: bool | None,
    group: ParallelGroup | None,
    may_fall_back: bool,
) -> CausalLM | None:
    """A model of a native class; None where that lacks something that `transformers` may have, if it `may_fall_back`.

    Raises:
        ModelLoadError: also where it lacks something and may not.
    """
    try:
        model = implementation(
            *(folder, config),
            dtype=(
                dummy_dtype(dtype, config, device)
                if isinstance(weights_are, RandomWeights)
                else resolve_dtype(dtype, config, folder, device, native=True)
            ),
            device=device,
            max_model_len=max_model_len,
            quantization=weights_are,
            group=group,
        )
    except UnsupportedModelError as error:
        if may_fall_back:
            return None
        raise UnsupportedModelError(f"{folder} cannot be served natively: {error}") from error
    if deterministic or (deterministic is None and costs_nothing(model)):
        return make_deterministic(model)
    model.pack()
    return model


def _configuration(folder: Path, model_impl: ModelImpl, *, trust_remote_code: bool) -> Any:
    """A checkpoint's configuration, read without `transformers` where a native model may do without."""
    if is_gguf(folder):
        if model_impl == "transformers":
            raise UnsupportedModelError(f"{folder} is a GGUF file, served natively: leave --model-impl at auto")
        with GGUFFile(folder) as file:
            return read_config(file)
    plain = None if model_impl == "transformers" else read_plain_config(folder)
    return load_config(folder, trust_remote_code=trust_remote_code) if plain is None else plain


def _check_needs_no_native(
    config: Any, folder: Path, *, must_be_native: bool, deterministic: bool | None, is_parallel: bool
) -> None:
    """Refuse what was asked for and cannot be had of a model that is served through `transformers`."""
    if deterministic:
        raise UnsupportedModelError(
            f"--deterministic: {folder} is served through transformers, where a token's last bits change with the rest "
            f"of the batch; native are {_native_names()}. Leave --deterministic out"
        )
    if must_be_native:
        named = ", ".join(getattr(config, "architectures", None) or [config.model_type])
        raise UnsupportedModelError(
            f"{folder} is {named}, which has no native implementation; native are "
            f"{_native_names()}. Leave --model-impl at auto"
        )
    if is_parallel:
        raise UnsupportedModelError(
            f"tensor_parallel_size and pipeline_parallel_size: {folder} is served through transformers, in one process "
            f"only; native are {_native_names()}. Leave both at 1"
        )
