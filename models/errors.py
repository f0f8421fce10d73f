"""Why a model could not be loaded. Plain `ValueError`s: the gateway turns them into what its callers see."""

from __future__ import annotations


class ModelLoadError(ValueError):
    """A model cannot be served; the message says what was asked, what is missing and what to change."""

    code = "model_load_failed"


class ModelNotFoundError(ModelLoadError):
    """There is no such folder, or no such repository on the hub, or the hub cannot be reached."""

    code = "model_not_found"


class UnsupportedModelError(ModelLoadError):
    """The checkpoint asks for something that the chosen implementation does not have."""

    code = "unsupported_model"


class QuantizedModelError(UnsupportedModelError):
    """The checkpoint's weights are quantised: by a method that is not read, or no native implementation serves them."""

    code = "quantization_not_supported"


class WeightsError(ModelLoadError):
    """The files of the checkpoint do not hold the tensors that its configuration promises.

    Attributes:
        missing, unexpected, mismatched: names of tensors; empty where the files themselves are the problem.
    """

    code = "weights_not_usable"

    def __init__(
        self,
        message: str,
        *,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        mismatched: tuple[str, ...] = (),
    ) -> None:
        self.missing = missing
        self.unexpected = unexpected
        self.mismatched = mismatched
        super().__init__(message)
