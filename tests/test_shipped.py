"""Every model that ships, in every way to compute, is what one device after the other gives.

On rows that are made up: what the models are does not depend on the data. Float error as in
test_compiled.py, after a few steps of descent with momentum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kitestring.apps.assistant import shakespeare
from kitestring.apps.recommender import movielens
from kitestring.core import Recipe, Rows, Tree
from kitestring.devices.fit.compute import TorchCompute
from kitestring.tasks import digits, qmnist
from kitestring.tasks.metrics import accuracy
from kitestring.tasks.programs import programs
from kitestring.tasks.sources import users_from_dict
from kitestring.tasks.task import Task
from modules import keys

N = np.array([6, 3])
IMAGES = {"digits": (digits, 16), "qmnist": (qmnist, 28)}
TEXTS = {
    "movielens": (movielens, movielens.ITEMS + 1, movielens.LENGTH),
    "shakespeare": (shakespeare, shakespeare.IDS, shakespeare.LENGTH),
}


def columns(name: str) -> dict[str, Any]:
    """Of two devices."""
    dice = np.random.default_rng(0)
    if name in IMAGES:
        side = IMAGES[name][1]
        x = dice.integers(0, 256, (2, 6, 1, side, side)).astype(np.uint8)
        return {"x": x, "y": dice.integers(0, 10, (2, 6))}
    _, ids, length = TEXTS[name]
    y = dice.integers(0, ids, (2, 6, length))
    y[:, :, :5] = -1  # not asked
    return {"x": dice.integers(0, ids, (2, 6, length)), "y": y}


def made(name: str) -> Any:
    module: Any = (IMAGES.get(name) or TEXTS[name])[0]
    given = columns(name)
    nobody = users_from_dict({f"{i}": (given["x"][0], given["y"][0]) for i in range(4)})
    own = {"server": module._server} if hasattr(module, "_server") else {}
    asks: Any = {} if name in IMAGES else {"asks": "last"}
    task = Task(name, nobody, module._small, module._large, accuracy, **own, **asks)
    torch.manual_seed(0)
    return programs(task, 0, given["x"][0, :2])


def near(a: Any, b: Any) -> bool:
    return np.allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max(initial=0) + 1e-6)


@pytest.mark.parametrize("how", ["compiled", "auto", pytest.param("vmap", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_models_that_ship(name: str, how: Any) -> None:
    every = made(name)
    plain, other = TorchCompute(every, "sequential"), TorchCompute(every, how)
    rows = {k: Rows(v, N) for k, v in columns(name).items()}
    x, recipe = {"x": rows["x"]}, Recipe(0.02, 1, 4, momentum=0.9)

    def start(program: str) -> Tree:
        return Tree({k: np.stack([a, a]) for k, a in plain.initial(program).items()})

    h = plain.predict("front", start("front"), x)["h"]
    teacher = plain.predict("large", start("large"), x)["out"]
    given = {
        "small": rows, "large": rows, "joint": rows,
        "small.distill": {**rows, "teacher": teacher},
        "server.distill": {"h": h, "y": rows["y"], "teacher": teacher},
    }  # fmt: skip
    for program, its in given.items():
        found, wanted = (
            c.fit(program, start(program), its, recipe, key=keys(2)) for c in (other, plain)
        )
        for k, a in wanted.parameters.items():
            moved = a - start(program)[k]
            got = np.asarray(found.parameters[k]) - start(program)[k]
            assert np.allclose(got, moved, rtol=0, atol=2e-3 * np.abs(moved).max() + 1e-6), k
        assert near(found.loss, wanted.loss), program
        if how == "compiled":
            assert other.explain(program).startswith("compiled"), other.explain(program)
    for program in ("small.answer", "large.answer"):
        said, meant = (c.predict(program, start(program), x) for c in (other, plain))
        mask = rows["x"].mask()
        assert all(near(said[k].values[mask], meant[k].values[mask]) for k in meant), program
