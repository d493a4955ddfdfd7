"""The workloads' modules and losses. torch only."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(561, 64), nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class CNN(nn.Module):
    """Two convolutions, each halved by pooling, and two layers: 28 x 28 pixels to 62 characters."""

    def __init__(self, first: int, second: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, first, 5, padding=2)
        self.conv2 = nn.Conv2d(first, second, 5, padding=2)
        self.fc1, self.fc2 = nn.Linear(49 * second, hidden), nn.Linear(hidden, 62)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class LSTM(nn.Module):
    """Which character comes after these 80?"""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, 8)
        self.lstm = nn.LSTM(8, 256, 2, batch_first=True)
        self.head = nn.Linear(256, 80)

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.lstm(self.embedding(x))
        return self.head(found[:, -1])


class Block(nn.Module):
    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        self.register_buffer("later", later, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fed(self.attended(x))

    def attended(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind()
        score = q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5
        score = score.masked_fill(self.later, float("-inf"))
        return x + self.out((score.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))

    def fed(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Transformer(nn.Module):
    """Which character comes after these 80?"""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, width)
        self.position = nn.Parameter(0.02 * torch.randn(80, width))
        self.block1, self.block2 = Block(width, 4, 80), Block(width, 4, 80)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 80)

    def forward(self, x: Tensor) -> Tensor:
        found = self.block2(self.block1(self.embedding(x) + self.position))
        return self.head(self.norm(found[:, -1]))


class Recommender(nn.Module):
    """Will this device's user like the item? One embedding of the user, one for each item."""

    def __init__(self) -> None:
        super().__init__()
        self.item, self.user = nn.Embedding(3000, 32), nn.Parameter(0.1 * torch.randn(32))
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 32), nn.Linear(32, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        item = self.item(x)
        both = torch.cat([item, self.user.expand_as(item)], -1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(both))))).squeeze(-1)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "W1a": lambda: nn.Linear(60, 10),
    "W1": MLP,
    "W4": Recommender,
    "W2s": lambda: CNN(16, 32, 128),
    "W2": lambda: CNN(32, 64, 2048),
    "W3": LSTM,
    "W3t": Transformer,
}


def make(name: str) -> nn.Module:
    """A workload's module, with the same initial weights each time."""
    torch.manual_seed(0)
    return MODULES[name]()


@cache
def resident(name: str) -> nn.Module:
    """The one module of a process that trains device after device with it."""
    return make(name)


def loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return F.binary_cross_entropy_with_logits if name == "W4" else F.cross_entropy
