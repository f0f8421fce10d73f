"""From what a user calls a model to a local folder or GGUF file: these themselves, a shipped model, or the hub's."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ModelLoadError, ModelNotFoundError, WeightsError
from .gguf.reader import SUFFIX, is_gguf

SHIPPED = Path(__file__).parent / "shipped"
DEFAULT_MODEL = "leaf-4m"

_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
_WEIGHTS = "*.safetensors"
# Second copies of the same weights, in layouts of their authors' own.
_DUPLICATES = ("consolidated*", "original/*", "*/*.safetensors")


def resolve_checkpoint(
    model: str | Path | None,
    *,
    revision: str | None = None,
    offline: bool = False,
    weights: bool = True,
    trust_remote_code: bool = False,
) -> Path:
    """The folder that holds a checkpoint, downloaded first if need be; or a GGUF file.

    A file or folder that exists is taken as it is and the hub is not contacted. A folder that holds one GGUF file in
    place of weights or tokenizer in the Hugging Face layout stands for that file. Downloads go through
    `huggingface_hub`: its cache, its environment variables (`HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`) and its progress
    bars.

    Args:
        model: a folder, a GGUF file, the name of a shipped model, or a hub name `owner/name`; None is the shipped
            default.
        revision: branch, tag or commit on the hub.
        offline: take what the hub's cache holds and never contact the hub.
        weights: whether the weights are wanted, or only configuration and tokenizer.
        trust_remote_code: fetch the repository's Python files too.

    Raises:
        ModelNotFoundError: nothing by that name, or the hub cannot be reached; the message says what to do.
        WeightsError: a repository without safetensors.
        ModelLoadError: `revision` was given for a folder.
    """
    is_default = model is None
    model = DEFAULT_MODEL if model is None else model
    folder = Path(model).expanduser()
    if is_default:  # whatever of that name may lie in the current directory
        folder = SHIPPED / DEFAULT_MODEL
    elif not folder.is_dir() and str(model) in shipped_models():
        folder = SHIPPED / str(model)
    if folder.is_dir():
        if revision is not None:
            raise ModelLoadError(
                f"revision={revision!r} is of a hub repository, but {folder} is a folder: leave it out"
            )
        return (_gguf_in(folder, weights=weights) or folder).resolve()
    if is_gguf(folder):
        if revision is not None:
            raise ModelLoadError(f"revision={revision!r} is of a hub repository, but {folder} is a file: leave it out")
        return folder.resolve()
    if folder.is_file():
        raise ModelNotFoundError(
            f"{folder} is a file; give a .gguf file or the folder of a checkpoint in the Hugging Face layout"
        )
    name = str(model)
    if name == DEFAULT_MODEL:
        raise ModelNotFoundError(f"the shipped model is not in {SHIPPED}: install octavo again, or name another model")
    if name.lower().endswith(SUFFIX):
        raise ModelNotFoundError(f"there is no file {folder}")
    if isinstance(model, Path) or name.startswith(("/", ".", "~")) or name.count("/") > 1 or os.sep * 2 in name:
        raise ModelNotFoundError(f"there is no folder {folder}")
    path = _download(name, revision=revision, offline=offline, weights=weights, trust_remote_code=trust_remote_code)
    if weights and not any(path.glob(_WEIGHTS)):
        raise WeightsError(
            f"the hub repository {name} has no safetensors weights. Pickle files (.bin, .pt) can run any code when "
            "read and are never loaded; a GGUF file is read once you have downloaded it: give its path. "
            "Or look for another revision or repository of this model"
        )
    return path


def _gguf_in(folder: Path, *, weights: bool) -> Path | None:
    """The GGUF file that a folder stands for."""
    if any(folder.glob(_WEIGHTS)) or (not weights and (folder / "tokenizer.json").is_file()):
        return None
    files = sorted(path for path in folder.iterdir() if is_gguf(path))
    if len(files) > 1:
        shown = ", ".join(path.name for path in files[:8])
        raise ModelLoadError(f"{folder} has {len(files)} GGUF files: give one by its path, of {shown}")
    return files[0] if files else None


def shipped_models() -> tuple[str, ...]:
    """Names of the models that came with the package."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob("*/config.json")))


def _download(name: str, *, revision: str | None, offline: bool, weights: bool, trust_remote_code: bool) -> Path:
    # Not at the top: half a second that a folder does not need.
    from huggingface_hub import constants, errors, snapshot_download

    offline = offline or bool(constants.HF_HUB_OFFLINE)
    at = f"{name}, revision {revision}" if revision else name
    patterns = [*_SMALL_FILES, *([_WEIGHTS] if weights else []), *(["*.py"] if trust_remote_code else [])]
    try:
        path = snapshot_download(
            name,
            revision=revision,
            local_files_only=offline,
            allow_patterns=patterns,
            ignore_patterns=list(_DUPLICATES),
        )
    except errors.HFValidationError as error:
        raise ModelNotFoundError(f"{name!r} is neither a folder nor a hub name like owner/name: {error}") from error
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{at} is gated: accept its terms on its hub page, then set HF_TOKEN to a token that may read it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        known = f"a folder, a shipped model ({', '.join(shipped_models())})"
        raise ModelNotFoundError(
            f"there is no model {name}: neither {known} nor a hub repository. Check the spelling; "
            "for a private repository set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"the hub repository {name} has no revision {revision!r}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if offline:
            reason = "the hub is switched off (--offline or HF_HUB_OFFLINE) and its cache does not hold the model"
        else:
            reason = "the hub cannot be reached and its cache does not hold the model"
        raise ModelNotFoundError(
            f"cannot get {at}: {reason}. Download it where there is a network, or give a folder"
        ) from error
    except Exception as error:  # whatever the hub's client and its transport raise
        raise ModelNotFoundError(f"cannot download {at}: {error}") from error
    return Path(path)
