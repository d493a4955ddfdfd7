"""A language model read token by token: keys and values of earlier positions are kept.

Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762, section 3.2.3: a position sees
earlier ones alone, so what attention keeps of them does not change when a token is added.

A model is known as a Llama by the names of its submodules (`model.layers.0.self_attn.q_proj`), and
believed to be one only after a row read in two parts has given the logits of the whole model. Any
other is computed as a whole for each token.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kitestring.errors import SettingError

_STACK = ("embed_tokens", "layers", "norm", "cos", "sin")
_LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp", "input_layernorm", "post_attention_layernorm")  # fmt: skip


class Reader:
    """The rows `ids` [n, P] before a model of next tokens, to be lengthened by up to `length`.

    Each `next()` is the logits [n, V] of the token after the last; `add` appends one token to each
    row, and `take` goes on with some of the rows. With `context` the model never sees more than
    that many tokens; a Llama's own limit is known. The model should be in eval mode."""

    def __init__(
        self, model: nn.Module, ids: Tensor, length: int, context: int | None = None
    ) -> None:
        if ids.dim() != 2 or ids.shape[1] < 1:
            what = f"prompts are {list(ids.shape)}"
            raise SettingError(what, "sampling", "Give ids [n, P], P > 0")
        if context is not None and context < 1:
            raise SettingError(f"context is {context}", "sampling", "Give a whole number from 1")
        self.model, self.ids = model, ids
        self._seen = 0
        self._cache = _llama(model, ids, length, context)
        if context is None and self._cache is not None:
            context = self._cache.longest
        self._context = context

    @torch.no_grad()
    def next(self) -> Tensor:
        whole = self.ids.shape[1]
        if self._cache is not None and (self._context is None or whole <= self._context):
            logits = self._cache.read(self.ids[:, self._seen :])
            self._seen = whole
            return logits
        seen = self.ids if self._context is None else self.ids[:, -self._context :]
        return cast(Tensor, self.model(seen))[:, -1]

    def add(self, tokens: Tensor) -> None:
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)

    def take(self, rows: Tensor) -> None:
        self.ids = self.ids[rows]
        if self._cache is not None:
            self._cache.take(rows)


class _Cache:
    """Keys and values [n, heads, room, width] of what the layers of a Llama have read."""

    def __init__(self, model: Any, room: int) -> None:
        self.model, self.room, self.at = model, room, 0
        self.longest = len(model.model.cos)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def read(self, ids: Tensor) -> Tensor:
        """Tokens [n, t] that follow what was read -> logits [n, V] after the last of them."""
        stack, until = self.model.model, self.at + ids.shape[1]
        cos, sin = stack.cos[self.at : until], stack.sin[self.at : until]
        h = stack.embed_tokens(ids)
        for i, layer in enumerate(stack.layers):
            h = h + self._attend(i, layer.self_attn, layer.input_layernorm(h), cos, sin)
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        self.at = until
        h = stack.norm(h[:, -1])
        head = getattr(self.model, "lm_head", None)
        logits = functional.linear(h, stack.embed_tokens.weight) if head is None else head(h)
        return cast(Tensor, logits)

    def take(self, rows: Tensor) -> None:
        self.kept = [(keys[rows], values[rows]) for keys, values in self.kept]

    def _attend(self, i: int, layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n, length, _ = x.shape
        width, until = 2 * cos.shape[-1], self.at + length
        q, k, v = (
            part.reshape(n, length, -1, width).transpose(1, 2)
            for part in (layer.q_proj(x), layer.k_proj(x), layer.v_proj(x))
        )
        if i == len(self.kept):
            self.kept.append((k.new_empty(n, k.shape[1], self.room, width),
                              v.new_empty(n, v.shape[1], self.room, width)))  # fmt: skip
        keys, values = self.kept[i]
        keys[:, :, self.at : until] = _rotated(k, cos, sin)
        values[:, :, self.at : until] = v
        heads, shared = q.shape[1], k.shape[1]
        # The query heads that share keys stand in one: [n, shared, heads / shared * t, width].
        q = _rotated(q, cos, sin).reshape(n, shared, -1, width)
        scores = q @ keys[:, :, :until].transpose(-1, -2) / math.sqrt(width)
        if length > 1:
            later = torch.ones(length, until, device=x.device).triu(self.at + 1) * -1e9
            scores = scores + later.repeat(heads // shared, 1)
        mixed = (scores.softmax(-1) @ values[:, :, :until]).reshape(n, heads, length, width)
        return cast(Tensor, layer.o_proj(mixed.transpose(1, 2).reshape(n, length, -1)))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


@torch.no_grad()
def _llama(model: nn.Module, ids: Tensor, length: int, context: int | None) -> _Cache | None:
    """An empty cache, if `model` computes what the cache would."""
    stack: Any = getattr(model, "model", None)
    if not all(hasattr(stack, name) for name in _STACK):
        return None
    if not all(_has(layer, name) for layer in stack.layers for name in _LAYER):
        return None
    longest = len(stack.cos) if context is None else min(context, len(stack.cos))
    room = min(ids.shape[1] + length, longest)
    times = math.ceil(room / ids.shape[1])
    probe = ids[:1].repeat(1, times)[:, :room]
    tried = _Cache(model, room)
    try:
        if room > 1:
            tried.read(probe[:, :-1])
        found = tried.read(probe[:, -1:])
    except Exception:  # sizes or parts that do not fit: it is none
        return None
    if not torch.allclose(found, model(probe)[:, -1], rtol=1e-3, atol=1e-4):
        return None
    return _Cache(model, room)


def _has(layer: Any, dotted: str) -> bool:
    for name in dotted.split("."):
        if not hasattr(layer, name):
            return False
        layer = getattr(layer, name)
    return True
