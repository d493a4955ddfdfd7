"""The Llama-like language model: its parts by hand, and the whole against Hugging Face's."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kitestring.errors import TaskError
from kitestring.tasks.llama import (
    Attention,
    Llama,
    LlamaConfig,
    RMSNorm,
    _rotated,
    checkpoint,
    config_of,
    fill,
)

ROOT = Path(__file__).parents[1]
CONFIG = LlamaConfig(
    vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, head_dim=4,
)  # fmt: skip
FILE = {**vars(CONFIG), "model_type": "llama", "hidden_act": "silu"}


def model(config: LlamaConfig = CONFIG, scale: float = 0.3) -> Llama:
    torch.manual_seed(0)
    made = Llama(config)
    for p in made.parameters():
        nn.init.normal_(p, std=scale)
    return made.eval()


def test_rms_norm_by_hand() -> None:
    """The mean square of 3 and 4 is 12.5."""
    norm = RMSNorm(2, 0.0)
    norm.weight.data = torch.tensor([1.0, 10.0])
    found = norm(torch.tensor([3.0, 4.0])).tolist()
    assert found == pytest.approx([3 / math.sqrt(12.5), 40 / math.sqrt(12.5)])


def test_rotation_by_hand_and_by_distance_alone() -> None:
    """At position 1 the pair (1, 0) of the first frequency, 1, turns by one radian; the product of
    two turned vectors depends on how far apart they are (Su et al., equation 16)."""
    stack = model().model
    cos, sin = stack.cos, stack.sin
    turned = _rotated(torch.eye(4)[:1].expand(2, 4), cos[:2], sin[:2])
    assert turned[0].tolist() == [1, 0, 0, 0]
    assert turned[1].tolist() == pytest.approx([math.cos(1), 0, math.sin(1), 0])
    torch.manual_seed(0)
    q, k = torch.randn(1, 4), torch.randn(1, 4)

    def product(i: int, j: int) -> float:
        return float((_rotated(q, cos[i], sin[i]) * _rotated(k, cos[j], sin[j])).sum())

    assert product(3, 1) == pytest.approx(product(12, 10), abs=1e-5)
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-2)


def test_later_tokens_change_nothing_before_them() -> None:
    made, tokens = model(), torch.arange(10)[None] % 20
    other = tokens.clone()
    other[0, 6:] += 3
    with torch.no_grad():
        one, two = made(tokens), made(other)
    assert torch.equal(one[:, :6], two[:, :6])
    assert not torch.allclose(one[:, 6:], two[:, 6:], atol=1e-3)


def test_shared_keys_and_values_are_those_of_each_head() -> None:
    """Heads 0, 1 share one of keys and values, heads 2, 3 the other: exactly a model whose heads
    have them each for themselves, twice the same."""
    shared = Attention(CONFIG)
    each = Attention(replace(CONFIG, num_key_value_heads=4))
    each.q_proj, each.o_proj = shared.q_proj, shared.o_proj
    for mine, theirs in ((each.k_proj, shared.k_proj), (each.v_proj, shared.v_proj)):
        twice = theirs.weight.reshape(2, 1, 4, 16).expand(2, 2, 4, 16).reshape(16, 16)
        mine.weight = nn.Parameter(twice.clone())
    stack, x = model().model, torch.randn(3, 7, 16)
    args = (stack.cos[:7], stack.sin[:7], torch.ones(7, 7).triu(1) * -1e9)
    with torch.no_grad():
        assert torch.allclose(shared(x, *args), each(x, *args), atol=1e-6)


def save(made: Llama, folder: Path, **changes: Any) -> None:
    from safetensors.torch import save_file

    config = {**vars(made.config), "model_type": "llama", "hidden_act": "silu", **changes}
    (folder / "config.json").write_text(json.dumps(config))
    weights = list(made.state_dict().items())
    # As large checkpoints are: in more files than one, in bfloat16.
    for i, part in enumerate((weights[:4], weights[4:])):
        save_file({k: v.bfloat16() for k, v in part}, folder / f"model-{i}.safetensors")


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_loads(tied: bool, tmp_path: Path) -> None:
    made = model(replace(CONFIG, tie_word_embeddings=tied))
    save(made, tmp_path)
    loaded = checkpoint(tmp_path)
    assert loaded.config == made.config
    for name, found in loaded.state_dict().items():
        assert found.dtype == torch.float32
        assert torch.equal(found, made.state_dict()[name].bfloat16().float())


@pytest.mark.slow
def test_it_is_hugging_face_s_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their random weights and their file, our model: equal but for the order of sums. Their
    library comes from the registry: nothing else needs it."""
    there = tmp_path / "library"
    pip = (sys.executable, "-m", "pip", "install", "-qq", "--no-compile", "--target", str(there))
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "transformers"], check=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(there)])  # what is installed comes first
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = importlib.import_module("transformers")
    for tied in (False, True):
        torch.manual_seed(0)
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **{**vars(CONFIG), "rope_theta": 5e4, "tie_word_embeddings": tied},
                initializer_range=0.3,
            )
        ).eval()
        theirs.save_pretrained(tmp_path / str(tied))
        ours = checkpoint(tmp_path / str(tied)).eval()
        assert ours.config.rope_theta == 5e4
        tokens = torch.randint(0, 20, (3, 25))
        with torch.no_grad():
            wanted, found = theirs(tokens).logits, ours(tokens)
        assert (wanted - found).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"scaled \(llama3\)"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"scaled \(yarn\)"),
        ({"num_key_value_heads": 3}, "4 heads do not share 3"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"hidden_size": "16", "head_dim": None}, "hidden_size is '16'.*a whole number"),
        ({"num_hidden_layers": 2.0}, r"num_hidden_layers is 2\.0.*a whole number"),
        ({"vocab_size": True}, "vocab_size is True.*a whole number"),
        ({"vocab_size": None}, "no vocab_size in it"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'.*a number"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps is inf"),
        ({"rope_theta": [1]}, r"rope_theta is \[1\]"),
        ({"rope_parameters": {"rope_theta": "1"}}, "rope_theta is '1'"),
        ({"rope_scaling": "linear"}, "rotation is 'linear'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'.*true or false"),
    ],
)
def test_what_is_another_model_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskError, match=f"config.json: .*{said}"):
        config_of({**FILE, **changes}, "config.json")


def test_older_files_say_less() -> None:
    short = {k: v for k, v in FILE.items() if k not in ("head_dim", "num_key_value_heads")}
    found = config_of(short, "config.json")
    assert (found.head_dim, found.num_key_value_heads) == (4, 4)
    with pytest.raises(TaskError, match="no hidden_size in it"):
        config_of({k: v for k, v in FILE.items() if k != "hidden_size"}, "config.json")


def test_a_folder_that_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"config\.json: cannot be read"):
        checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(FILE))
    with pytest.raises(TaskError, match=r"no \*\.safetensors there"):
        checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(TaskError, match=r"model\.safetensors: cannot be read"):
        checkpoint(tmp_path)


def test_one_name_of_shared_memory_is_enough() -> None:
    """And only of all of it: a view of a part is no other name for the whole."""
    tied = nn.ModuleDict({"a": nn.Linear(3, 2, False), "b": nn.Linear(3, 2, False)})
    tied["b"].weight = nn.Parameter(tied["a"].weight.data)
    fill(tied, {"b.weight": torch.arange(6.0).reshape(2, 3)}, "w")
    assert tied["a"].weight.tolist() == tied["b"].weight.tolist() == [[0, 1, 2], [3, 4, 5]]
    tied["b"].weight = nn.Parameter(tied["a"].weight.data[:1])
    with pytest.raises(TaskError, match=r"lacks a\.weight"):
        fill(tied, {"b.weight": torch.zeros(1, 3)}, "w")


def test_weights_that_do_not_fit_are_named() -> None:
    made = model()
    weights = dict(made.state_dict())
    with pytest.raises(TaskError, match=r"lacks lm_head\.weight"):
        fill(made, {k: v for k, v in weights.items() if k != "lm_head.weight"}, "w")
    with pytest.raises(TaskError, match=r"has, unlike the model, odd\.weight"):
        fill(made, weights | {"odd.weight": torch.zeros(1)}, "w")
    with pytest.raises(TaskError, match=r"model\.norm\.weight is \[3\], of the model \[16\]"):
        fill(made, weights | {"model.norm.weight": torch.zeros(3)}, "w")
