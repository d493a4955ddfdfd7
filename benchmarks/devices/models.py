"""The modules and their loss. torch only, so that the plain loop loads nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kitestring.apps.recommender import movielens
from kitestring.tasks.adapters import low_rank
from kitestring.tasks.llama import Llama, LlamaConfig


class Frozen(nn.BatchNorm2d):
    """Its statistics and its scale stay as they are."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.requires_grad_(False).eval()
        nn.init.uniform_(self.running_mean, -0.1, 0.1)
        nn.init.uniform_(self.running_var, 0.8, 1.2)

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


class Residual(nn.Module):
    """Two convolutions beside the input; He et al. 2016, arXiv 1512.03385, section 3.3."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = Frozen(out), Frozen(out)
        self.beside: nn.Module = nn.Identity()
        if stride > 1:
            self.beside = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), Frozen(out))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.beside(x))


class ResNet8(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), Frozen(16), nn.ReLU())
        self.blocks = nn.Sequential(Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2))
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.stem(x)).mean((2, 3)))


def _llama() -> nn.Module:
    return Llama(LlamaConfig(2048, 256, 768, 4, 8, 4, 64, 32))


MAKE: dict[str, Callable[[], nn.Module]] = {
    "cnn": ResNet8, "recommender": movielens._small, "llama": _llama,
}  # fmt: skip


def make(model: str, train: str = "all") -> nn.Module:
    """The same weights each time; what is not trained needs no gradient."""
    torch.manual_seed(0)
    found = MAKE[model]()
    if train == "adapters":
        return low_rank(found, 8, ("*.q_proj", "*.v_proj"))
    if train == "last":
        assert isinstance(found, Llama)
        assert found.lm_head is not None
        found.requires_grad_(False)
        found.lm_head.requires_grad_(True)
    return found


def loss(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, -2), y.flatten())
