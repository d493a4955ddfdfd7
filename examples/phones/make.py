"""Graphs to try on a phone or in a browser, with what they must give: `python make.py FOLDER`.

For each model: `NAME.predict.onnx`, `NAME.step.onnx` (one minibatch step of training), the weights
that both take as inputs before and after some steps as `NAME.before.safetensors` and
`NAME.after.safetensors`, and in `cases.json` drawn inputs and what ONNX Runtime gives here.
"""

from __future__ import annotations

import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from kitestring import dice
from kitestring.core import Recipe, Rows
from kitestring.devices.fit.programs import Program
from kitestring.devices.runtime.graph import Graph
from kitestring.export.graphs import predict_graph, step_graph
from kitestring.tasks import digits
from kitestring.tasks.layers import Transformer
from kitestring.tasks.llama import Llama, LlamaConfig
from kitestring.tasks.programs import cross_entropy

STEPS, ROWS, CLASSES, WORDS = 20, 8, 10, 40
Arrays = dict[str, Any]


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(6, 12, batch_first=True), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


class Column(nn.Module):
    """A module of the column x."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"out": self.inner(batch["x"])}


def loss(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return cross_entropy(outputs["out"], batch["y"])


LLAMA = LlamaConfig(
    WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=16, head_dim=8,
)  # fmt: skip
IMAGE, TEXT = ((1, 16, 16), "uint8", 256, ()), ((12,), "int64", WORDS, (12,))
# A model, one row of x (shape, type, range) and the truths' shape beside the rows, and a recipe.
MODELS: dict[str, tuple[Any, Any, Recipe]] = {
    "mlp": (digits._small, IMAGE, Recipe(0.1, momentum=0.9)),
    "cnn": (digits._large, IMAGE, Recipe(0.002, optimiser="adam")),
    "lstm": (Lstm, ((5, 6), "float32", None, ()), Recipe(0.1, clip=1.0)),
    "transformer": (
        lambda: Transformer(WORDS, 12, 16, 2, 1, dropout=0.1), TEXT, Recipe(0.1, decay=0.01),
    ),
    "llama": (lambda: Llama(LLAMA), TEXT, Recipe(0.002, optimiser="adam")),
}  # fmt: skip


def drawn(rng: np.random.Generator, form: Any, rows: int) -> Arrays:
    shape, dtype, high, truths = form
    size = (rows, *shape)
    x = rng.normal(size=size) if high is None else rng.integers(0, high, size)
    top = WORDS if truths else CLASSES
    return {"x": x.astype(dtype), "y": rng.integers(0, top, (rows, *truths))}


def made(name: str, folder: Path) -> dict[str, Any]:
    factory, form, recipe = MODELS[name]
    torch.manual_seed(0)
    program = Program(name, Column(factory()), loss)
    rng = np.random.default_rng(0)
    first = drawn(rng, form, 2)
    columns = {k: Rows(a[None], np.array([2])) for k, a in first.items()}
    predict = predict_graph(program, {"x": columns["x"]})
    step = step_graph(program, columns, recipe)
    weights = {f"w:{k}": np.ascontiguousarray(a) for k, a in program.initial().items()}
    for graph, kind in ((predict, "predict"), (step, "step")):
        (folder / f"{name}.{kind}.onnx").write_bytes(graph.model)
    save_file(weights, folder / f"{name}.before.safetensors")
    asked = drawn(rng, form, 5)["x"]
    outputs = run(predict, {**taken(predict, weights), "x:x": asked})
    training, after = trained(step, weights, recipe, form, rng)
    save_file(after, folder / f"{name}.after.safetensors")
    return {
        "model": name,
        "predict": {"inputs": {"x:x": listed(asked)}, "outputs": each(outputs)},
        "step": training,
    }


def trained(
    step: Graph, weights: Arrays, recipe: Recipe, form: Any, rng: np.random.Generator
) -> tuple[dict[str, Any], Arrays]:
    """The same rows in each step, its other inputs and its loss; the weights after the last."""
    about = step.about
    assert about.form is not None
    held = taken(step, weights)
    for prefix in about.form.memory:
        held |= {
            f"memory:{prefix}{k}": np.zeros(about.weights[k].shape, np.float32)
            for k in about.form.trained
        }
    key, losses, inputs = dice.keys(0, np.zeros(1, np.int64), 0, "fit"), [], []
    columns = {f"x:{k}": a for k, a in drawn(rng, form, ROWS).items()}
    for number in range(STEPS):
        given: Arrays = {}
        for name in about.form.scalars:
            value = number + 1 if name == "step" else getattr(recipe, name)
            given[name] = np.array(value, np.int64 if name == "step" else np.float32)
        for place, draw in enumerate(about.draws):  # dropout: ones with a chance, else zeros
            shape = draw.of(ROWS)
            numbers = dice.uniform(dice.drawn(key, number, place), int(np.prod(shape)))
            given[f"draw:{place}"] = (numbers[0] < draw.chance).astype(np.float32).reshape(shape)
        out = run(step, {**held, **columns, **given})
        losses.append(float(out.pop("loss")))
        held |= {k.removeprefix("next:"): a for k, a in out.items()}
        inputs.append(each(given))
    return {"rows": each(columns), "each": inputs, "losses": losses}, taken(step, held)


def taken(graph: Graph, weights: Arrays) -> Arrays:
    """The weights that the graph reads."""
    names = {i.name for i in session(graph).get_inputs()}
    return {k: a for k, a in weights.items() if k in names and k.startswith("w:")}


@cache
def session(graph: Graph) -> Any:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before it is imported
    import onnxruntime

    return onnxruntime.InferenceSession(graph.model, providers=["CPUExecutionProvider"])


def run(graph: Graph, given: Arrays) -> Arrays:
    there = session(graph)
    names = [o.name for o in there.get_outputs()]
    asked = {i.name: given[i.name] for i in there.get_inputs()}
    return dict(zip(names, there.run(names, asked), strict=True))


def listed(a: Any) -> dict[str, Any]:
    return {"dtype": str(a.dtype), "shape": list(a.shape), "values": a.ravel().tolist()}


def each(arrays: Arrays) -> dict[str, Any]:
    return {k: listed(np.asarray(a)) for k, a in arrays.items()}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for name in MODELS:
        cases.append(made(name, folder))
        losses = cases[-1]["step"]["losses"]
        print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {STEPS} steps")
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    print(f"{folder / 'cases.json'}: what each of them must give")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out"))
