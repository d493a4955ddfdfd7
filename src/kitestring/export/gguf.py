"""A Llama-like language model as a GGUF file, for llama.cpp and what is built on it.

The module has the settings and the parameter names of `tasks/llama.py`, which are Hugging Face's.
There dimension i of a head is rotated with i + half, in GGUF's "llama" with its neighbour: rows of
q and k are put in that order. Held against torch in llama.cpp itself, on drawn tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kitestring.core import Array
from kitestring.errors import ExportError, SettingError
from kitestring.export.checked import (
    TOLERANCE,
    Case,
    Died,
    Export,
    Input,
    apart,
    held,
    need,
    unproven,
)

if TYPE_CHECKING:
    from torch import nn

# Of the largest logit. f32 differs by the order of sums. f16 rounds weights, and activations before
# products, by up to 2^-11; q8_0 both by up to 1/254 of a block's largest value, eight times that.
# How that adds up depends on the model, so both leave room of a factor of some twenty: a wrong
# layout is found before, in f32.
TOLERANCES = {"f32": TOLERANCE, "f16": 1e-2, "q8_0": 1e-1}
SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "head_dim", "rms_norm_eps", "rope_theta",
)  # fmt: skip
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
_BLOCK = 32  # of q8_0
_UNKNOWN = "<unk>"
_LENGTHS = (1, 7, 128)
_ROWS = 2
Vocabulary = Sequence[str | None]


def to_gguf(
    module: nn.Module, path: Path, kind: str = "f32", vocabulary: Vocabulary | None = None
) -> Export:
    """Write a `Llama` and its weights to `path`; matrices as `kind`: f32, f16 or q8_0.

    `vocabulary`: the text of each token, and None for the one that stands for anything else; text
    is cut into the longest that fit. Without it the file has no tokeniser: the app maps text to
    token numbers.

    Raises `ExportError` in one line for another kind of model, and for an export that disagrees
    with torch; `SettingError` where it cannot be checked or written."""
    need(("gguf", "llama_cpp"), "GGUF", "'kitestring[gguf]'")
    if kind not in TOLERANCES:
        raise SettingError(f"no type {kind!r}", mend=f"Known: {', '.join(TOLERANCES)}")
    from importlib.metadata import version

    from kitestring.export import forward

    where = str(path)
    settings = _settings(module, where)
    weights = _weights(module, settings, where)
    words = settings["vocab_size"]
    if vocabulary is not None:
        _fits(vocabulary, words, where)
    inputs = (Input("tokens", (settings["max_position_embeddings"],), "int64", words),)
    cases = _drawn(words, settings["max_position_embeddings"])
    wanted = forward.answers(module, cases, where)
    runtime = f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})"
    checks, notes = [], []
    with unproven(path) as part:
        # A wrong layout could hide in the rounding, so the file is proved in float32 first.
        for each in dict.fromkeys(("f32", kind)):
            wider = _write(part, settings, weights, each, vocabulary)
            found = _found(part, cases, where)
            check = held(cases, wanted, found, path, f"{runtime}, {each}", TOLERANCES[each])
            checks.append(check)
        notes.append(_agreement(wanted, found))
        if wider:
            notes.append(f"{wider} matrices are f16: their rows are no multiple of {_BLOCK}")
        if vocabulary is not None:
            _check_text(part, vocabulary, where)
            notes.append("its tokeniser gives back drawn text")
    return Export(path, tuple(checks), inputs, tuple(cases), tuple(wanted), tuple(notes))


def _settings(module: nn.Module, where: str) -> dict[str, Any]:
    config = getattr(module, "config", None)
    missing = [name for name in SETTINGS if getattr(config, name, None) is None]
    if missing:
        raise ExportError(
            f"not a Llama-like language model: {type(module).__name__} has no config.{missing[0]}",
            where,
            "GGUF is for those of kitestring.tasks.llama; its checkpoint(folder) loads a Hugging "
            "Face Llama. Export others to onnx or executorch",
        )
    return {name: getattr(config, name) for name in SETTINGS}


def _weights(module: nn.Module, settings: Mapping[str, Any], where: str) -> dict[str, Array]:
    """By GGUF's names, in GGUF's order of rows."""
    heads = {"self_attn.q_proj": settings["num_attention_heads"],
             "self_attn.k_proj": settings["num_key_value_heads"]}  # fmt: skip
    found: dict[str, Array] = {}
    for name, tensor in module.state_dict().items():
        array = tensor.float().numpy()
        inner = name.removeprefix("model.layers.").removesuffix(".weight")
        place, _, part = inner.partition(".")
        if name in WHOLE:
            found[WHOLE[name]] = array
        elif part in LAYER and name == f"model.layers.{place}.{part}.weight":
            array = _neighbours(array, heads[part]) if part in heads else array
            found[f"blk.{place}.{LAYER[part]}.weight"] = array
        else:
            what = f"GGUF's llama has no counterpart of the parameter {name}"
            raise ExportError(what, where, "Export it to onnx or executorch")
    layers = range(settings["num_hidden_layers"])
    needed = {f"blk.{i}.{part}.weight" for i in layers for part in LAYER.values()}
    lacking = (needed | set(list(WHOLE.values())[:2])) - found.keys()
    if lacking:
        what = f"the model lacks what GGUF's llama calls {sorted(lacking)[0]}"
        raise ExportError(what, where, "Export it to onnx or executorch")
    return found


def _neighbours(weight: Array, heads: int) -> Array:
    """Rows [heads, 2, half] in the order [heads, half, 2]."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _write(
    path: Path, settings: Mapping[str, Any], weights: Mapping[str, Array], kind: str,
    vocabulary: Vocabulary | None,
) -> int:  # fmt: skip
    """Returns how many matrices could not be of that type, and are f16."""
    import gguf

    types = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16,
             "q8_0": gguf.GGMLQuantizationType.Q8_0}  # fmt: skip
    files = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
             "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(files[kind])
    writer.add_vocab_size(settings["vocab_size"])
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_key_length(settings["head_dim"])
    writer.add_value_length(settings["head_dim"])
    writer.add_rope_dimension_count(settings["head_dim"])
    writer.add_rope_freq_base(settings["rope_theta"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    _tokeniser(writer, vocabulary)
    wider = 0
    for name, array in weights.items():
        asked = kind if array.ndim > 1 else "f32"
        if asked == "q8_0" and array.shape[-1] % _BLOCK:
            asked, wider = "f16", wider + 1
        kept = gguf.quantize(array, types[asked])
        writer.add_tensor(name, kept, raw_dtype=types[asked])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wider


def _tokeniser(writer: Any, vocabulary: Vocabulary | None) -> None:
    """GGUF's "rwkv" is the one that takes any list of texts, the longest first, and names no token
    an end of the text by its number."""
    import gguf

    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    kinds = gguf.TokenType
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([_escaped(t) for t in vocabulary])
    writer.add_token_types([kinds.UNKNOWN if t is None else kinds.NORMAL for t in vocabulary])
    writer.add_unk_token_id(list(vocabulary).index(None))


def _escaped(text: str | None) -> str:
    return _UNKNOWN if text is None else text.replace("\\", "\\\\")


def _fits(vocabulary: Vocabulary, words: int, where: str) -> None:
    texts = [text for text in vocabulary if text is not None]
    wrong = (
        f"has {len(vocabulary)} entries, and the model {words} tokens" if len(vocabulary) != words
        else f"has {words - len(texts)} nulls" if len(texts) != words - 1
        else "has an empty text" if "" in texts
        else f"has {_UNKNOWN!r}, which is what null is called" if _UNKNOWN in texts
        else "has a text twice" if len(set(texts)) != len(texts)
        else ""
    )  # fmt: skip
    if wrong:
        mend = "Give one text for each token, and null for the one that stands for anything else"
        raise SettingError(f"the vocabulary {wrong}", where, mend)


def _drawn(words: int, context: int) -> list[dict[str, Array]]:
    rng = np.random.default_rng(0)
    lengths = sorted({min(length, context) for length in _LENGTHS})
    return [{"tokens": rng.integers(0, words, (_ROWS, length))} for length in lengths]


def _found(path: Path, cases: Sequence[Case], where: str) -> list[list[Array]]:
    try:
        return apart(__name__, path, "", cases)
    except Died as died:
        mend = "Check the model's settings, and that llama-cpp-python is whole"
        raise ExportError(f"llama.cpp cannot run the export: {died}", where, mend) from None


def _agreement(wanted: Sequence[Case], found: Sequence[Sequence[Array]]) -> str:
    pairs = zip(wanted, found, strict=True)
    same = np.concatenate([(w["out"].argmax(-1) == f[0].argmax(-1)).ravel() for w, f in pairs])
    return f"the most likely token is torch's at {same.sum()} of {same.size} golden positions"


def _check_text(path: Path, vocabulary: Vocabulary, where: str) -> None:
    """llama.cpp cuts drawn text as it should, text from outside the vocabulary too, and gives it
    back."""
    rng = np.random.default_rng(0)
    texts = [text for text in vocabulary if text is not None]
    drawn = "".join(rng.choice(np.array(texts, object), 64)).encode()
    strange = drawn + b"\xf0\x9f\xaa\x81" + drawn
    cases = [{"text": np.frombuffer(text, np.uint8)} for text in (drawn, strange)]
    ids, back = zip(*_found(path, cases, where), strict=True)
    wanted = [_cut(text, vocabulary) for text in (drawn, strange)]
    unknown = list(vocabulary).index(None)
    kept = "".join(vocabulary[i] or "" for i in wanted[0]).encode()
    if [list(i) for i in ids] != wanted or (unknown not in wanted[0] and bytes(back[0]) != kept):
        mend = "Leave the vocabulary out, and let the app map text to token numbers"
        raise ExportError("llama.cpp cuts text otherwise than the vocabulary says", where, mend)


def _cut(text: bytes, vocabulary: Vocabulary) -> list[int]:
    """The longest token that fits, again and again; a byte that begins none is the unknown one."""
    ids = {t.encode(): i for i, t in enumerate(vocabulary) if t is not None}
    longest, unknown = max(map(len, ids)), list(vocabulary).index(None)
    found, at = [], 0
    while at < len(text):
        sizes = range(min(longest, len(text) - at), 0, -1)
        size = next((n for n in sizes if text[at : at + n] in ids), 0)
        found.append(ids[text[at : at + size]] if size else unknown)
        at += size or 1
    return found


def run(path: str, how: str, cases: Sequence[Case]) -> list[list[Array]]:
    """In the process of `apart`: logits [n, T, words] of tokens [n, T], or the tokens of a text and
    the text that they give back."""
    import llama_cpp

    longest = max([c["tokens"].shape[1] for c in cases if "tokens" in c], default=1)
    # Keys and values in float32; an app may keep them in f16, llama.cpp's default.
    model = llama_cpp.Llama(
        path, n_ctx=longest, n_batch=longest, n_ubatch=longest, logits_all=True, n_gpu_layers=0,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False,
    )  # fmt: skip
    found: list[list[Array]] = []
    for case in cases:
        if "text" in case:
            ids = model.tokenize(case["text"].tobytes(), add_bos=False, special=False)
            back = np.frombuffer(model.detokenize(ids), np.uint8)
            found.append([np.array(ids, np.int64), back])
            continue
        rows = []
        for tokens in case["tokens"]:
            model.reset()
            model.eval(tokens.tolist())
            rows.append(np.array(model.scores[: len(tokens)], np.float32))
        found.append([np.stack(rows)])
    return found
