"""Any decoder of `transformers`, with our paged KV cache: for architectures that have no file of their own here.

Two ways, tried in this order at load and checked there against the model's own eager attention:

1. *paged attention*: the model calls attention through transformers' attention interface, and ours takes its place. The
   step's ragged batch goes through the model in one pass of `[1, num_tokens]`.
2. *paged cache*: the model computes attention itself, over K and V that its cache gathers from our blocks. Each prefill
   chunk goes through in a pass of its own. Decodes go in one, padded on the left; or, where a model counts positions
   from the length of its cache, those with contexts of the same length together.

A model for which neither gives the hidden states that it computes by itself is refused, at load.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import transformers
from torch import nn

from ..kernels.attention_batch import AttentionBatch
from .errors import ModelLoadError, UnsupportedModelError, WeightsError
from .interface import CausalLM, KVCache, KVCacheSpec
from .transformers_attention import PAGED, RECORDING, AttentionPlan, UnsupportedAttentionError
from .transformers_cache import ShapeRecorder, paged_cache, row_groups
from .transformers_check import check_tokens, largest_error, own_hidden
from .transformers_head import head_of
from .transformers_rope import settle_rope
from .transformers_support import refuse_recurrent, refuse_unsafe_weights, refuse_unsupported_config

# They know distances alone (attention with linear biases), so padding on the left changes nothing.
_RELATIVE_POSITIONS = ("bloom", "mpt")


class TransformersCausalLM:
    """A decoder of transformers behind `CausalLM`; see the module's docstring for the two ways of attention.

    Attributes:
        attention: which of the two ways this model goes.
        fits_graphs: its steps can be captured as CUDA graphs; the modules of transformers may look at numbers.
    """

    fits_graphs = False

    def __init__(
        self,
        decoder: nn.Module,
        head: nn.Module,
        *,
        vocab_size: int,
        max_position: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_cache_specs: tuple[KVCacheSpec, ...],
        plan: AttentionPlan | None,
        pad_contexts: bool,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_position = max_position
        self.dtype = dtype
        self.device = device
        self.kv_cache_specs = kv_cache_specs
        self.attention: Literal["paged attention", "paged cache"] = "paged cache" if plan is None else "paged attention"
        self._decoder = decoder
        self._head = head
        self._plan = plan
        self._pad_contexts = pad_contexts
        self._takes_positions = takes_positions(decoder)

    @torch.no_grad()
    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, kv_caches: list[KVCache]
    ) -> torch.Tensor:
        """See `CausalLM.forward`."""
        if self._plan is not None:
            with self._plan.stepping(batch, kv_caches):
                return self._run(input_ids[None], positions[None])[0]
        parts = []
        for group in row_groups(batch, pad_contexts=self._pad_contexts):
            hidden = self._run(
                input_ids[group.tokens].view(group.num_rows, group.num_new),
                positions[group.tokens].view(group.num_rows, group.num_new),
                attention_mask=group.mask,
                past_key_values=paged_cache(kv_caches, group),
                use_cache=True,
            )
            parts.append(hidden.flatten(0, 1))
        return torch.cat(parts)

    @torch.no_grad()
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `CausalLM.compute_logits`."""
        return _logits(self._head, hidden)

    def _run(self, input_ids: torch.Tensor, positions: torch.Tensor, **kwargs: object) -> torch.Tensor:
        if self._takes_positions:
            kwargs["position_ids"] = positions
        kwargs.setdefault("use_cache", False)
        hidden: torch.Tensor = self._decoder(input_ids=input_ids, **kwargs)[0]
        return hidden


def takes_positions(decoder: nn.Module) -> bool:
    return "position_ids" in inspect.signature(decoder.forward).parameters


def _logits(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = head(inputs_embeds=hidden[None], use_cache=False).logits
    return logits[0].float()


def load_transformers_model(
    path: str,
    config: Any,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
    device: torch.device,
    max_model_len: int | None = None,
) -> CausalLM:
    """Load a checkpoint in the Hugging Face layout and find out how to page its KV.

    Args:
        path: folder with config and safetensors.
        config: `transformers.PretrainedConfig` of the checkpoint.
        dtype: of weights, activations and KV.
        trust_remote_code: run code that the checkpoint brings.
        device: where to put the weights.
        max_model_len: longest context that will be asked for; only for checkpoints with two sets of rotary
            frequencies (longrope). None, or within the first set's length, uses the short one, which is exact there;
            more uses the long one at every length, so that a token's KV never depends on what came after it.

    Raises:
        ModelLoadError: the checkpoint cannot be served; the message names what is missing.
    """
    refuse_unsupported_config(config, trust_remote_code=trust_remote_code)
    refuse_unsafe_weights(path)
    with _quiet():
        model = _load(path, config, dtype=dtype, trust_remote_code=trust_remote_code).to(device)
    refuse_recurrent(type(model), model.config)
    return page_model(model, dtype=dtype, device=device, max_model_len=max_model_len)


@torch.no_grad()
def page_model(
    model: Any, *, dtype: torch.dtype, device: torch.device, max_model_len: int | None = None
) -> TransformersCausalLM:
    """Give a loaded `ForCausalLM` of transformers the paged cache, by the first way that passes the check.

    Raises:
        ModelLoadError: none does.
    """
    model.eval().requires_grad_(False)
    decoder = _decoder_of(model)
    max_position = settle_rope(model.config, decoder, max_model_len)
    head = head_of(model, decoder)
    with _quiet():
        model.set_attn_implementation("eager")
        expected = own_hidden(decoder, device)
        vocab_size = _logits(head, expected[0][:1]).shape[-1]
        counts_positions = _counts_positions(model, decoder)
        reasons = []
        for prepare, pad_contexts in ((_paged_attention, False), (_paged_cache, True), (_paged_cache, False)):
            if counts_positions and (prepare is _paged_attention or pad_contexts):
                reasons.append("it counts positions from the length of its cache")
                continue
            try:
                specs, plan = prepare(model, decoder, device, max_position)
                paged = TransformersCausalLM(
                    decoder,
                    head,
                    vocab_size=vocab_size,
                    max_position=max_position,
                    dtype=dtype,
                    device=device,
                    kv_cache_specs=specs,
                    plan=plan,
                    pad_contexts=pad_contexts,
                )
                error = largest_error(paged, expected)
            except UnsupportedAttentionError as unsupported:
                reasons.append(str(unsupported))
                continue
            except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as failure:
                # Whatever a model that nobody here has seen does with a cache or an attention function unlike its own.
                reasons.append(f"{type(failure).__name__}: {failure}")
                continue
            if error <= (1e-2 if dtype == torch.float32 else 0.1):
                return paged
            reasons.append(f"its hidden states differ from the model's own by {error:.2g}")
    raise UnsupportedModelError(
        f"'{model.config.model_type}' cannot be served with a paged KV cache. With paged attention: {reasons[0]}. "
        f"With a paged cache under its own attention: {reasons[-1]}."
    )


def _decoder_of(model: Any) -> nn.Module:
    """The part of `model` between token ids and the head."""
    decoder = model.get_decoder()
    if isinstance(decoder, nn.Module) and decoder is not model:
        return decoder
    # Some classes name another prefix than the attribute they have (Llama 4's text model).
    parts: list[nn.Module] = [child for child in model.children() if isinstance(child, transformers.PreTrainedModel)]
    if len(parts) != 1:
        raise UnsupportedModelError(
            f"'{model.config.model_type}' has no decoder apart from its head: its parts are not known"
        )
    return parts[0]


def _counts_positions(model: Any, decoder: nn.Module) -> bool:
    """Whether the model takes positions from the length of its cache instead of those it is given.

    Llama 4 scales queries so, by an amount that shows only in contexts far longer than the check's: hence told from
    the source.
    """
    if not takes_positions(decoder):
        return model.config.model_type not in _RELATIVE_POSITIONS
    attention_classes = {type(module) for module in decoder.modules() if "Attention" in type(module).__name__}
    return any("get_seq_length" in inspect.getsource(attention_class) for attention_class in attention_classes)


def _paged_attention(
    model: Any, decoder: nn.Module, device: torch.device, max_position: int
) -> tuple[tuple[KVCacheSpec, ...], AttentionPlan | None]:
    """Record the model's attention calls, and put ours in their place."""
    if not model._can_set_attn_implementation() or not takes_positions(decoder):
        raise UnsupportedAttentionError("it does not use the attention interface of transformers")
    plan = AttentionPlan()
    plan.attach(decoder)
    model.set_attn_implementation(RECORDING)
    input_ids, positions = check_tokens(device)
    with plan.recording(max_position):
        decoder(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
    if not plan.calls:
        raise UnsupportedAttentionError("no layer uses the attention interface of transformers")
    model.set_attn_implementation(PAGED)
    return tuple(plan.specs), plan


def _paged_cache(
    model: Any, decoder: nn.Module, device: torch.device, max_position: int
) -> tuple[tuple[KVCacheSpec, ...], AttentionPlan | None]:
    """Find out what the model puts into its cache, and go back to its own attention."""
    model.set_attn_implementation("eager")
    recorder = ShapeRecorder()
    input_ids, _ = check_tokens(device)
    decoder(input_ids=input_ids[None], past_key_values=recorder, use_cache=True)
    if recorder.specs is None:
        raise UnsupportedAttentionError("it does not put K and V of every layer into its cache")
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    return recorder.specs, None


def _load(path: str, config: Any, *, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    except (OSError, ImportError, KeyError, ValueError, RuntimeError) as error:
        raise ModelLoadError(f"transformers cannot load {path}: {error}") from error
    missing = tuple(sorted(info["missing_keys"]))
    mismatched = tuple(sorted(str(key[0]) for key in info["mismatched_keys"]))
    for what, keys in (("missing", missing), ("of another shape than config.json says", mismatched)):
        if keys:
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            verb = "is" if len(keys) == 1 else "are"
            raise WeightsError(
                f"the weights in {path} do not fit its config.json: {shown} {verb} {what}. "
                "Fetch the checkpoint again, or check that config.json belongs to it",
                missing=missing,
                mismatched=mismatched,
            )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars, advice and warnings away from our users while it loads a model."""
    logging = transformers.utils.logging
    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()
