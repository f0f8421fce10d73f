"""Logits from hidden states by a model's own code, whatever it does to them.

Logit scales, soft caps, biases and norms between decoder and head differ from model to model. Rather than repeat each,
the model's own `forward` runs with a decoder that hands back the hidden states it is given.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class _Given:
    """A decoder's output of hidden states and nothing else; every other field is None."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, item: int | slice) -> object:
        return (self.last_hidden_state,)[item]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _GivenDecoder(nn.Module):
    """Stands in the decoder's place. Settings that a `forward` may look up on it are the decoder's own."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.__dict__["_decoder"] = decoder  # not as a submodule

    def forward(self, *args: object, inputs_embeds: torch.Tensor, **kwargs: object) -> _Given:
        return _Given(inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_decoder"], name)


def head_of(model: nn.Module, decoder: nn.Module) -> nn.Module:
    """`model` with `decoder` replaced, sharing all weights with it; `model` itself is left as it is.

    Call it as `head(inputs_embeds=hidden)` with `[1, n, hidden_size]`; `.logits` are `[1, n, vocab_size]`.
    """
    name = next(name for name, module in model.named_modules() if module is decoder)
    return _with_replaced(model, name.split("."), _GivenDecoder(decoder))


def _with_replaced(module: nn.Module, path: list[str], replacement: nn.Module) -> nn.Module:
    clone = copy.copy(module)
    name, *rest = path
    child = module._modules[name]
    assert child is not None
    # copy.copy shares the dictionary of submodules with the original: give the clone its own.
    clone.__dict__["_modules"] = {
        **module._modules,
        name: _with_replaced(child, rest, replacement) if rest else replacement,
    }
    return clone
