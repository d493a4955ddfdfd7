"""What collaborations share of training: the settings of `fit`, the loss by which devices choose,
and single optimiser steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kitestring.core import Array, Devices, Recipe, Rows, Tree

_BETAS, _EPS = (0.9, 0.999), 1e-8


def recipe(settings: Any) -> Recipe:
    """How a collaboration trains, by its own settings."""
    plain = Recipe(settings.lr, settings.epochs, settings.batch, settings.optimiser)
    return replace(plain, shuffle=getattr(settings, "shuffle", True))


def mean_loss(weights: Tree, rows: Mapping[str, Rows], devices: Devices) -> Array:
    """[D] of the small model; 0 where there is no row."""
    each = devices.predict("small.loss", weights, rows)["loss"]
    return np.where(each.mask(), each.values, 0).sum(1) / np.maximum(1, each.n)


def moments(weights: Tree, optimiser: str) -> Tree:
    """What the optimiser remembers before its first step: nothing, or Adam's two moments."""
    if optimiser == "sgd":
        return Tree()
    zero = Tree({name: np.zeros_like(a) for name, a in weights.items()})
    return Tree({**zero.inside("first."), **zero.inside("second.")})


def step(
    weights: Tree, slope: Tree, memory: Tree, count: Array, *, lr: float, optimiser: str
) -> tuple[Tree, Tree]:
    """New weights and memory after step number `count` (from 1; a number, or [D]).

    Weights without a slope stay. Adam is Kingma & Ba 2015, algorithm 1."""
    moving = Tree({name: weights[name] for name in slope})
    if optimiser == "sgd":
        return Tree({**weights, **(moving - slope * np.float32(lr))}), memory
    first = Tree({name: memory[f"first.{name}"] for name in slope})
    second = Tree({name: memory[f"second.{name}"] for name in slope})
    first = first * _BETAS[0] + slope * (1 - _BETAS[0])
    second = second * _BETAS[1] + slope * slope * (1 - _BETAS[1])
    grown = first * (1 / (1 - _BETAS[0] ** count))
    spread = second * (1 / (1 - _BETAS[1] ** count))
    move = Tree({name: lr * a / (np.sqrt(spread[name]) + _EPS) for name, a in grown.items()})
    kept = Tree({**memory, **first.inside("first."), **second.inside("second.")})
    return Tree({**weights, **(moving - move)}), kept
