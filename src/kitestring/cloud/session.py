"""What the cloud half of a collaboration is handed, and nothing else: `core.Cloud`.

In the cloud weights have no device axis: one model, whoever's rows. Ragged rows of several
devices go in as they came and are computed side by side, as if they were one device's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kitestring import dice
from kitestring.core import Array, Fit, Recipe, Rows, Tree


def _one(tree: Tree) -> Tree:
    return Tree({k: np.asarray(a)[None] for k, a in tree.items()})


def _flat(rows: Mapping[str, Rows]) -> dict[str, Rows]:
    """Side by side, as one device's; columns of the same rows may be padded to different widths."""
    count = np.array([int(next(iter(rows.values())).n.sum())])
    return {k: Rows(r.values[r.mask()][None], count) for k, r in rows.items()}


class CloudSession:
    """`compute` has the primitives, `table` a tree per device, `pool` the cloud's own rows."""

    def __init__(
        self,
        compute: Any,
        fleet: int,
        seed: int,
        pool: Mapping[str, Rows] | None,
        table: Any,
        pretrained: Callable[[str], Tree],
    ) -> None:
        self.fleet, self.data, self.table, self.pretrained = fleet, pool, table, pretrained
        self.serial = 0
        self.flops = 0.0
        self._compute, self._seed = compute, seed

    def sample(self, k: int | None) -> Array:
        """k device ids without repetition, sorted; all of them for None. O(k) in the population."""
        if k is None or k >= self.fleet:
            return np.arange(self.fleet)
        generator = np.random.default_rng([self._seed, self.serial])
        return np.sort(generator.choice(self.fleet, k, replace=False, shuffle=False))

    def uniform(self, tag: str, n: int) -> Array:
        """[n] numbers in [0, 1), keyed by seed, exchange and tag."""
        key = dice.keys(self._seed, np.array([dice.CLOUD]), self.serial, tag)
        return dice.uniform(key, n)[0]

    def _spend(self, program: str, rows: Mapping[str, Rows], passes: float) -> None:
        n = int(np.sum(next(iter(rows.values())).n))
        self.flops += n * passes * self._compute.flops(program, rows)

    def initial(self, program: str) -> Tree:
        return self._compute.initial(program)  # type: ignore[no-any-return]

    def predict(self, program: str, weights: Tree, inputs: Mapping[str, Rows]) -> Tree:
        """Outputs as `Rows` of the same devices."""
        self._spend(program, inputs, 1)
        return self._compute.predict(program, _one(weights), inputs)  # type: ignore[no-any-return]

    def fit(
        self,
        program: str,
        weights: Tree,
        rows: Mapping[str, Rows],
        recipe: Recipe,
        *,
        centre: Tree | None = None,
        linear: Tree | None = None,
        tag: str = "fit",
    ) -> Fit:
        self._spend(program, rows, 3 * recipe.epochs)
        key = dice.keys(self._seed, np.array([dice.CLOUD]), self.serial, tag)
        found = self._compute.fit(
            program,
            _one(weights),
            rows if all(len(r.n) == 1 for r in rows.values()) else _flat(rows),
            recipe,
            centre=None if centre is None else _one(centre),
            linear=None if linear is None else _one(linear),
            key=key,
        )
        done = Tree({k: a[0] for k, a in found.parameters.items()})
        return Fit(done, found.loss[0], found.steps[0])

    def backward(
        self,
        program: str,
        weights: Tree,
        rows: Mapping[str, Rows],
        *,
        cotangent: Mapping[str, Rows] | None = None,
        row_weights: Array | None = None,
    ) -> tuple[Array, Tree, Tree]:
        """The loss and the weights' gradients summed over all rows; d columns as those devices'
        rows."""
        self._spend(program, rows, 3)
        first = next(iter(rows.values()))
        real = first.mask()
        weight = np.ones(real.shape, np.float32) if row_weights is None else row_weights
        loss, d_weights, d_columns = self._compute.backward(
            program,
            _one(weights),
            _flat(rows),
            cotangent=None if cotangent is None else _flat(cotangent),
            row_weights=weight[real][None],
        )
        back = Tree()
        for name, flat in d_columns.items():
            values = np.zeros((*real.shape, *flat.values.shape[2:]), flat.values.dtype)
            values[real] = flat.values[0]
            back[name] = Rows(values, first.n)
        return loss[0], Tree({k: g[0] for k, g in d_weights.items()}), back
