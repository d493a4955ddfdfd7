"""Low-rank adapters against the layers that they stand beside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kitestring.errors import TaskError
from kitestring.tasks.adapters import LowRank, low_rank, merged
from kitestring.tasks.layers import Transformer
from told import told


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 5, bias=False)))


def stirred(module: nn.Module) -> nn.Module:
    """As if it had been trained."""
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p += torch.randn_like(p)
    return module


def test_at_first_an_adapted_module_is_its_base() -> None:
    """B is zero: equal to the bit, since x + 0 is x."""
    x = torch.randn(4, 6)
    assert torch.equal(low_rank(base(), 2)(x), base()(x))


def test_only_adapters_are_trained_and_the_base_keeps_its_names() -> None:
    module = low_rank(base(), 2)
    trained = {k for k, p in module.named_parameters() if p.requires_grad}
    assert trained == {"0.down", "0.up", "2.0.down", "2.0.up"}
    found = module.load_state_dict(base().state_dict(), strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) == trained
    # 2 (6 + 8) + 2 (8 + 5) numbers.
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == 54


def test_the_equation_of_the_paper() -> None:
    """h = W x + b + (alpha / r) B A x, section 4.1, for one layer and alpha = 6, r = 2."""
    layer = nn.Linear(6, 8)
    module = stirred(low_rank(layer, 2, alpha=6))
    assert isinstance(module, LowRank)
    x = torch.randn(6)
    wanted = layer.weight @ x + layer.bias + 3 * (module.up @ (module.down @ x))
    assert torch.allclose(module(x), wanted, atol=1e-6)


def test_merged_is_adapted() -> None:
    """The same function, sums in another order; and the base's own names and kinds."""
    module = stirred(low_rank(base(), 3))
    x = torch.randn(4, 6)
    whole = merged(module)
    assert torch.allclose(whole(x), module(x), atol=1e-5)
    assert not torch.allclose(whole(x), base()(x), atol=1e-2)
    assert whole.state_dict().keys() == base().state_dict().keys()
    assert not any(isinstance(m, LowRank) for m in whole.modules())
    one = stirred(low_rank(nn.Linear(6, 8), 2))
    assert torch.allclose(merged(one)(x), one(x), atol=1e-5)


def test_neither_touches_what_it_is_given() -> None:
    module = base()
    adapted = low_rank(module, 2)
    before = {k: v.clone() for k, v in adapted.state_dict().items()}
    merged(stirred(low_rank(module, 2)))
    merged(adapted)
    assert all(p.requires_grad for p in module.parameters())
    assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())
    assert isinstance(module[0], nn.Linear)  # type: ignore[index]


def test_targets_are_patterns_of_names() -> None:
    module = low_rank(Transformer(7, 5, 8, 2, 2), 2, targets=("*.qkv", "blocks.1.out"))
    adapted = [name for name, m in module.named_modules() if isinstance(m, LowRank)]
    assert adapted == ["blocks.0.qkv", "blocks.1.qkv", "blocks.1.out"]


def test_layers_whose_weights_are_read_past_them_are_left_alone() -> None:
    """torch's attention takes out_proj.weight itself: an adapter in its place would do nothing."""
    whole = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    module = low_rank(whole, 2)
    assert [n for n, m in module.named_modules() if isinstance(m, LowRank)] == ["0"]
    with told(TaskError, "no linear layer matches '*'", mend="none"):
        low_rank(whole[1], 2)


@pytest.mark.parametrize("rank", [0, -1])
def test_ranks_that_make_no_sense(rank: int) -> None:
    with told(TaskError, f"rank is {rank}"):
        low_rank(base(), rank)


def test_a_target_that_names_nothing() -> None:
    with told(TaskError, "'head'", mend="0, 2.0"):
        low_rank(base(), 2, targets=("head",))


class Masked(nn.Linear):
    """Computes in its own way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * (self.weight > 0), self.bias)


def test_layers_that_compute_in_their_own_way_are_left_alone() -> None:
    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda layer, given, out: out * 2)
    module = nn.Sequential(Masked(6, 8), hooked, nn.Linear(8, 3))
    adapted, x = low_rank(module, 2), torch.randn(4, 6)
    assert torch.equal(adapted(x), module(x))
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == {"2.down", "2.up"}
    with told(TaskError, "no linear layer matches '0'", mend="Layers that can be adapted: 2"):
        low_rank(module, 2, ["0"])


def test_a_layer_in_two_places_has_one_adapter() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    adapted = stirred(low_rank(nn.Sequential(layer, nn.ReLU(), layer), 2))
    assert adapted[0] is adapted[2]  # type: ignore[index]
    whole, x = merged(adapted), torch.randn(4, 6)
    assert not any(isinstance(m, LowRank) for m in whole.modules())
    assert torch.allclose(whole(x), adapted(x), atol=1e-5)
