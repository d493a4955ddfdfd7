"""What `fit` refuses where torch is: as `devices.recipes` says it, of a program."""

from __future__ import annotations

from collections.abc import Mapping

from kitestring.core import Recipe, Rows, Tree
from kitestring.devices import recipes
from kitestring.devices.fit.programs import Program
from kitestring.errors import TaskError


def check(
    program: Program,
    weights: Tree,
    rows: Mapping[str, Rows],
    recipe: Recipe,
    centre: Tree | None,
    linear: Tree | None,
) -> None:
    """Once for a fit, at its edge; what computes it may rely on it."""
    if program.loss is None:
        raise TaskError(f"program {program.name!r} has no loss to train with")
    program.check(weights)
    recipes.check(program.name, program.chosen(("",)), weights, rows, recipe, centre, linear)
