"""A Llama-like language model: tokens -> RMSNorm, rotary grouped-query attention, SwiGLU.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", arXiv 2302.13971, section
2.2; rotary positions: Su et al., "RoFormer", arXiv 2104.09864, section 3.2.2; several query heads
for one head of keys and values: Ainslie et al., "GQA", arXiv 2305.13245, section 2.2.

Settings and parameters have the names of Hugging Face's `LlamaForCausalLM`, so its checkpoints
load; as there, dimension i of a head is rotated with i + half. Imports torch, so factories import
this when called.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kitestring.errors import TaskError


@dataclass(frozen=True)
class LlamaConfig:
    """The settings of config.json that this model has. All sizes are counts."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            _fine(field.name, getattr(self, field.name), str(field.type))
        if self.num_attention_heads % self.num_key_value_heads:
            raise TaskError(
                f"{self.num_attention_heads} heads do not share {self.num_key_value_heads} heads "
                "of keys and values evenly",
                "Llama",
                "Make num_attention_heads a multiple of num_key_value_heads",
            )
        if self.head_dim % 2:
            raise TaskError(f"head_dim {self.head_dim} is odd", "Llama", "Rotation needs pairs")


def _fine(name: str, value: Any, kind: str = "int") -> None:
    """Raises TaskError for what is no bool, count or positive number, as `kind` wants it."""
    kinds = {"bool": bool, "int": int, "float": int | float}
    if not isinstance(value, kinds[kind]) or isinstance(value, bool) != (kind == "bool"):
        wanted = {"bool": "true or false", "int": "a whole number", "float": "a number"}[kind]
        raise TaskError(f"{name} is {value!r}", "Llama", f"Give {wanted}")
    if kind != "bool" and not 0 < value < math.inf:
        raise TaskError(f"{name} is {value}", "Llama", "Give more than 0")


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.shared = config.num_attention_heads, config.num_key_value_heads
        self.width = config.head_dim
        whole, kept = self.heads * self.width, self.shared * self.width
        self.q_proj = nn.Linear(config.hidden_size, whole, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kept, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kept, bias=False)
        self.o_proj = nn.Linear(whole, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor) -> Tensor:
        """`hidden` [T, T] is added to the attention scores: 0, or far below."""
        n, length, _ = x.shape
        q, k, v = (
            part.reshape(n, length, -1, self.width).transpose(1, 2)
            for part in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        k, v = self._of_each(k), self._of_each(v)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.width) + hidden
        mixed = (scores.softmax(-1) @ v).transpose(1, 2)
        return cast(Tensor, self.o_proj(mixed.reshape(n, length, self.heads * self.width)))

    def _of_each(self, x: Tensor) -> Tensor:
        """Shared heads [n, shared, T, width], once for each query head that shares them."""
        n, shared, length, width = x.shape
        each = self.heads // shared
        return x[:, :, None].expand(n, shared, each, length, width).reshape(n, -1, length, width)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., T, width]; cos and sin [T, width / 2]."""
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202, equation 6), SiLU written out: it trains where
    graphs of training steps have no operator for its gradient."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, wide, bias=False)
        self.up_proj = nn.Linear(width, wide, bias=False)
        self.down_proj = nn.Linear(wide, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return cast(Tensor, self.down_proj(gate * gate.sigmoid() * self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, hidden)
        return x + cast(Tensor, self.mlp(self.post_attention_layernorm(x)))


class Stack(nn.Module):
    """Token ids [n, T] -> [n, T, hidden_size]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        places = torch.arange(config.max_position_embeddings, dtype=torch.float32)
        powers = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        angles = places[:, None] / config.rope_theta ** powers[None]
        # Not in the state dict: a checkpoint has no such parameters.
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        later = torch.ones(length, length, device=x.device).triu(1) * -1e9
        h = self.embed_tokens(x)
        cos, sin = cast(Tensor, self.cos)[:length], cast(Tensor, self.sin)[:length]
        for layer in self.layers:
            h = layer(h, cos, sin, later)
        return cast(Tensor, self.norm(h))


class Llama(nn.Module):
    """Token ids [n, T] -> logits [n, T, vocab_size] of the next token; T may be at most
    max_position_embeddings."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Stack(config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.model(x)
        if self.lm_head is None:
            return functional.linear(h, self.model.embed_tokens.weight)
        return cast(Tensor, self.lm_head(h))


def checkpoint(folder: str | Path) -> Llama:
    """The model in a folder of Hugging Face's form: config.json and *.safetensors, float32.

    Raises TaskError in one line for what this model does not have (scaled rotation, biases,
    another activation, sliding windows) and for parameters that are missing or left over."""
    folder = Path(folder)
    model = Llama(config_of(_settings(folder / "config.json"), str(folder)))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise TaskError("no *.safetensors there", str(folder), "Save the model with safetensors")
    found: dict[str, Tensor] = {}
    for file in files:
        found |= _read(file)
    if model.lm_head is None:
        found.pop("lm_head.weight", None)  # the embedding once more
    fill(model, found, str(folder))
    return model


def load(module: nn.Module, file: Path) -> None:
    """Load all of a module's parameters from a .safetensors file. Raises TaskError in one line."""
    fill(module, _read(file), str(file))


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as problem:
        said = f"cannot be read: {str(problem).splitlines()[0]}"
        raise TaskError(said, str(file), "Write it with safetensors") from None


def fill(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Load all of a module's parameters by name; TaskError names the first that do not fit.

    Of parameters that are the same memory, one name is enough: files are written so."""
    wanted = module.state_dict()
    same = {_memory(wanted[name]): t for name, t in weights.items() if name in wanted}
    shared = {name: same[_memory(t)] for name, t in wanted.items() if _memory(t) in same}
    weights = {**shared, **weights}
    for names, what in ((wanted.keys() - weights.keys(), "lacks"),
                        (weights.keys() - wanted.keys(), "has, unlike the model,")):  # fmt: skip
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise TaskError(f"{what} {some}", where, "Give weights of this very model")
    for name, tensor in wanted.items():
        if tensor.shape != weights[name].shape:
            what = f"{name} is {list(weights[name].shape)}, of the model {list(tensor.shape)}"
            raise TaskError(what, where, "Give weights of this very model")
    module.load_state_dict({k: v.to(wanted[k].dtype) for k, v in weights.items()})


def _memory(t: Tensor) -> Hashable:
    """Equal for tensors that are the same numbers at the same place."""
    return t.device, t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride()


def _settings(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise TaskError(
            f"cannot be read: {problem}", str(file), "Name a checkpoint's folder"
        ) from None
    if not isinstance(found, dict):
        raise TaskError("is no JSON object", str(file), "Name a checkpoint's folder")
    return found


def config_of(found: Mapping[str, Any], where: str) -> LlamaConfig:
    """The settings of a config.json; refuses what would change the model and is not here."""
    scaled = found.get("rope_parameters") or found.get("rope_scaling") or {}
    if not isinstance(scaled, dict):
        raise TaskError(f"rotation is {scaled!r}", where, "Only plain rotation is supported")
    plain = {"model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False,),
             "mlp_bias": (False,), "sliding_window": (None,)}  # fmt: skip
    for name, fine in plain.items():
        if found.get(name, fine[0]) not in fine:
            raise TaskError(f"{name} is {found[name]!r}", where, f"Only {fine[0]!r} is supported")
    kind = scaled.get("rope_type", scaled.get("type", "default"))
    if kind != "default":
        raise TaskError(f"rotation is scaled ({kind})", where, "Only plain rotation is supported")
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "max_position_embeddings")  # fmt: skip
    missing = [name for name in needed if found.get(name) is None]
    if missing:
        raise TaskError(f"no {', '.join(missing)} in it", where, "Give a Llama's config.json")
    sizes = {f.name: found[f.name] for f in fields(LlamaConfig) if found.get(f.name) is not None}
    if scaled.get("rope_theta") is not None:
        sizes["rope_theta"] = scaled["rope_theta"]
    heads, width = found["num_attention_heads"], found["hidden_size"]
    try:
        for name in ("num_attention_heads", "hidden_size"):
            _fine(name, found[name])
        return LlamaConfig(**{"num_key_value_heads": heads, "head_dim": width // heads, **sizes})
    except TaskError as problem:
        raise TaskError(problem.what, where, problem.mend) from None
