"""Public errors: what went wrong, what is possible, what to change. Only the gateway knows HTTP."""

from __future__ import annotations


class OctavoError(Exception):
    """Base of all errors that a caller may act on."""

    code = "octavo_error"


class InvalidRequestError(OctavoError, ValueError):
    """A parameter is malformed, out of range, or contradicts another."""

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class InvalidConfigError(OctavoError):
    """A field of the configuration is unknown, malformed or out of range."""

    code = "invalid_config"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        self.field = field
        super().__init__(message)


class InvalidTraceError(OctavoError):
    """A recorded trace cannot be read: which file and line, what is wrong there, what to do."""

    code = "invalid_trace"

    def __init__(self, message: str, *, file: str = "", line: int = 0, advice: str = "") -> None:
        self.file = file  # empty only while another process's error is put together again from its message
        self.line = line  # from 1; 0: the file as a whole
        where = f"{file}:{line}: " if line else f"{file}: " if file else ""
        super().__init__(f"{where}{message}{'. ' + advice if advice else ''}")


class InvalidJournalError(OctavoError):
    """A journal cannot be read: where it was damaged, or why it is none."""

    code = "invalid_journal"


class InvalidWorkloadError(OctavoError):
    """A workload's description or a transform of it is malformed or impossible."""

    code = "invalid_workload"


class ContextLengthExceededError(InvalidRequestError):
    """Prompt (and output asked for) do not fit the model's context or the KV cache."""

    code = "context_length_exceeded"

    @classmethod
    def of_prompt(cls, num_tokens: int | str, max_model_len: int) -> ContextLengthExceededError:
        """The prompt alone leaves no room for a token."""
        return cls(
            f"This model's maximum context length is {max_model_len} tokens, and the prompt has {num_tokens}: shorten "
            f"it to at most {max_model_len - 1} tokens, so that at least one can be produced",
            param="prompt",
        )


class QueueFullError(OctavoError):
    """Too many requests wait already; try again later."""

    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class EngineClosedError(OctavoError):
    """The engine is draining or closed."""

    code = "engine_closed"


class RequestFailedError(OctavoError):
    """The engine could not finish this request; others are not affected."""

    code = "request_failed"


class UnsupportedModelError(OctavoError):
    """The checkpoint cannot be served; the message names what is missing."""

    code = "unsupported_model"


class ModelNotFoundError(OctavoError):
    """No model at this path or hub name."""

    code = "model_not_found"


class KVCacheTooSmallError(OctavoError):
    """The asked-for context does not fit the KV cache."""

    code = "kv_cache_too_small"

    def __init__(self, *, max_model_len: int, num_blocks: int, block_size: int, bytes_per_block: int = 0) -> None:
        self.max_model_len_possible = num_blocks * block_size
        advice = "give the KV cache more memory (--kv-cache-memory-bytes, --gpu-memory-utilization)"
        if bytes_per_block:
            num_needed = -(-max_model_len // block_size)
            advice += (
                f": {num_needed} blocks take {num_needed * bytes_per_block} bytes, one takes {bytes_per_block} bytes"
            )
        if self.max_model_len_possible >= 2:  # a prompt and an output token
            advice = f"lower --max-model-len to {self.max_model_len_possible}, or {advice}"
        super().__init__(f"max_model_len={max_model_len} does not fit {num_blocks} KV blocks of {block_size}: {advice}")


class RequestQuarantinedError(OctavoError):
    """The executor dies of this request, each time: it is ended, and refused for a while when it comes again."""

    code = "request_quarantined"


class OutOfMemoryError(OctavoError):
    """The device has no memory to compute this request, even alone."""

    code = "engine_oom"


class ModelNumericsError(RequestFailedError):
    """The model computed logits for this request that are no numbers (NaN or infinity); others are not affected."""

    code = "model_numerics"


class ExecutorLostError(OctavoError):
    """The executor died and could not be restarted."""

    code = "executor_lost"
