"""The example of docs/compress.md, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from kitestring.compress.quantise.layers import StaticConv2d, StaticLinear

PAGE = Path(__file__).parents[1] / "docs" / "compress.md"


def test_the_example_gives_a_smaller_quantised_model_and_leaves_the_large_one_alone() -> None:
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert found is not None
    names: dict[str, Any] = {}
    exec(compile(found[1], str(PAGE), "exec"), names)
    small, large = names["small"], names["large"]
    kinds = [type(layer) for layer in small if list(layer.buffers())]
    assert kinds == [StaticConv2d, StaticConv2d, StaticLinear]
    assert [layer.out_channels for layer in large if hasattr(layer, "out_channels")] == [32, 64]
    assert repr(small[0]).startswith("StaticConv2d(1, 8,")
    assert repr(small[3]).startswith("StaticConv2d(8, 16,")
    assert small(torch.rand(3, 1, 16, 16)).shape == (3, 10)
