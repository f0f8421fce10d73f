"""What a checkpoint recommends for sampling (generation_config.json): defaults of requests that name nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from ..messages.errors import InvalidConfigError, InvalidRequestError
from ..messages.sampling import SamplingParams
from .params import validate_params

log = structlog.get_logger("octavo")

FILE_NAME: Final = "generation_config.json"
_ANY_VOCAB_SIZE: Final = 2**31 - 1


class GenerationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Sampling parameters as `transformers` names them; None where nothing is said.

    Raises:
        InvalidConfigError: a value is out of its range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.said().items():
            ours = _OUR_NAMES.get(name, name)
            try:
                validate_params(SamplingParams(**{ours: value}), vocab_size=_ANY_VOCAB_SIZE, max_logprobs=0)
            except InvalidRequestError as error:
                raise InvalidConfigError(str(error).replace(ours, name, 1), field=name) from None

    def said(self) -> dict[str, Any]:
        """Fields that hold a value, by name."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}


_OUR_NAMES: Final = {"max_new_tokens": "max_tokens"}


class RequestDefaults(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a request is given that names no parameters.

    Attributes:
        params: with `max_tokens` None for as many as the context has room for.
        max_tokens_limit: no answer over HTTP is longer, whatever it asked for; None for no such bound.
        source: where the values come from; empty if nothing but octavo's own defaults is in force.
        told: those values, by the names of `SamplingParams`.
        ignored: what was found in the checkpoint's file and not taken, and why.
    """

    params: SamplingParams = SamplingParams(max_tokens=None)
    max_tokens_limit: int | None = None
    source: str = ""
    told: dict[str, Any] = {}
    ignored: tuple[str, ...] = ()

    def for_programs(self) -> SamplingParams:
        """The same for callers of `LLM` and `Engine`, whose answers have 16 tokens where nobody says otherwise."""
        if self.params.max_tokens is None:
            return msgspec.structs.replace(self.params, max_tokens=SamplingParams().max_tokens)
        return self.params


def named_generation_config(source: str) -> GenerationConfig | None:
    """What the file holds that `--generation-config` names; None for `auto` and `vllm`, which name none.

    Args:
        source: `auto`, `vllm`, or the path of a file or of the folder that it is in.

    Raises:
        InvalidConfigError: there is no such file, or a value in it cannot be used.
    """
    if source in ("auto", "vllm"):
        return None
    path = named_file(source)
    try:
        found, ignored = read_generation_config(path)
    except (OSError, ValueError) as error:
        raise InvalidConfigError(
            f"generation_config {source}: {error}. Give a {FILE_NAME} or the folder it is in, or auto, or vllm",
            field="generation_config",
        ) from None
    if ignored:
        raise InvalidConfigError(f"generation_config {source}: {'; '.join(ignored)}", field="generation_config")
    return found


def named_file(source: str) -> Path:
    """The file that the path of a file or of its folder stands for."""
    path = Path(source).expanduser()
    return path / FILE_NAME if path.is_dir() else path


def read_generation_config(path: Path) -> tuple[GenerationConfig, tuple[str, ...]]:
    """What a file says of sampling, and what of it cannot be used and why. Other fields are not looked at.

    Raises:
        OSError, ValueError: it cannot be read, or is no JSON object.
    """
    try:
        stated = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    except ValueError as error:  # also of msgspec
        raise ValueError(f"{path.name} is not a JSON object: {error}") from None
    taken: dict[str, Any] = {}
    ignored: list[str] = []
    for name in GenerationConfig.__struct_fields__:
        value = stated.get(name)
        if value is None:
            continue
        try:
            taken.update(msgspec.convert({name: value}, GenerationConfig).said())
        except msgspec.ValidationError as error:
            ignored.append(f"{name}: {str(error).partition(' - at ')[0]}".replace(" | null", ""))
        except InvalidConfigError as error:
            ignored.append(str(error))
    return GenerationConfig(**taken), tuple(ignored)


def request_defaults(
    source: str, named: GenerationConfig | None, override: GenerationConfig, folder: Path
) -> RequestDefaults:
    """Put together what requests are given that say nothing themselves.

    A checkpoint's `max_new_tokens` is a default; one that whoever runs the server gave is a bound, as in vLLM.

    Args:
        source, named: as for `named_generation_config` and as it said.
        override: wins over both.
        folder: of the checkpoint, for `auto`; a GGUF file says nothing.
    """
    found = GenerationConfig()
    ignored: tuple[str, ...] = ()
    where = "" if source == "vllm" else source
    if named is not None:
        found = named
    elif source == "auto":
        where = FILE_NAME
        path = folder / FILE_NAME
        if path.is_file():
            try:
                found, ignored = read_generation_config(path)
            except (OSError, ValueError) as error:
                ignored = (str(error),)
    overridden = override.said()
    told = {_OUR_NAMES.get(name, name): value for name, value in {**found.said(), **overridden}.items()}
    sources = [where] if found.said() else []
    if overridden:
        sources.append("--override-generation-config")
    max_tokens = told.get("max_tokens")
    is_bound = max_tokens is not None and ("max_new_tokens" in overridden or named is not None)
    params = SamplingParams(**{"max_tokens": None, **told, "clip_max_tokens": max_tokens is not None})
    return RequestDefaults(
        params=params,
        max_tokens_limit=max_tokens if is_bound else None,
        source=", ".join(sources),
        told=told,
        ignored=ignored,
    )


def say_request_defaults(defaults: RequestDefaults) -> None:
    """Log in one line what requests are given that say nothing themselves, and in another what was not taken."""
    if defaults.told:
        log.info("request.defaults", source=defaults.source, **defaults.told)
    if defaults.ignored:
        log.warning("generation_config.ignored", why="; ".join(defaults.ignored))
