"""Where a model is; importable without torch."""

from __future__ import annotations

from pathlib import Path

from ...messages.errors import ModelNotFoundError, UnsupportedModelError
from ...models import errors as model_errors
from ...models.checkpoint import DEFAULT_MODEL, SHIPPED, resolve_checkpoint
from ...models.shapes import PRESETS, write_config_folder


def locate_model(
    model: str | None,
    *,
    revision: str | None = None,
    offline: bool = False,
    weights: bool = True,
    trust_remote_code: bool = False,
) -> tuple[Path, str]:
    """Folder (or GGUF file) and name of a model: a folder, a file, a hub name, or None for the one that is shipped.

    Raises:
        ModelNotFoundError: no such folder or hub name, or the hub cannot be reached.
        UnsupportedModelError: what was found cannot be loaded.
    """
    try:
        folder = resolve_checkpoint(
            model, revision=revision, offline=offline, weights=weights, trust_remote_code=trust_remote_code
        )
    except model_errors.ModelNotFoundError as error:
        raise ModelNotFoundError(str(error)) from error
    except model_errors.ModelLoadError as error:
        raise UnsupportedModelError(str(error)) from error
    if folder.is_file():  # of a GGUF file the name says what it is
        return folder, folder.stem
    return folder, folder.name if model is None or Path(model).is_dir() else model


def random_model_shapes() -> tuple[str, ...]:
    """Names of the models whose shape `write_random_model` knows."""
    return tuple(PRESETS)


def write_random_model(like: str, out: Path, dtype: str = "bfloat16") -> None:
    """Write what an engine needs to serve random weights in a known model's shape: a configuration and a tokenizer.

    Args:
        like: one of `random_model_shapes`.
    """
    write_config_folder(like, out, tokenizer=SHIPPED / DEFAULT_MODEL, dtype=dtype)
