"""What a traced operation is called, and what follows from that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

# Of tensors, these give what follows from shape and type alone.
_SIZES = {"size", "dim", "ndimension", "numel", "sym_size", "sym_numel", "len"}
_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda"}
# These move nothing: a cut behind one of them is the cut before it.
_FREE = {
    "getitem", "reshape", "view", "view_as", "permute", "transpose", "t", "unsqueeze", "squeeze",
    "flatten", "unflatten", "unbind", "split", "split_with_sizes", "chunk", "contiguous", "expand",
    "expand_as", "slice", "select", "narrow", "movedim", "swapaxes", "detach", "alias",
    "_unsafe_view",
}  # fmt: skip


def called(node: fx.Node) -> str:
    """The operation's name, whichever way it was traced: "reshape", "add"."""
    if node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        name = schema.name if schema else getattr(node.target, "__name__", str(node.target))
        return str(name).rpartition("::")[2]
    return str(node.target)


def free(node: fx.Node) -> bool:
    """A view, or as good as one."""
    return node.op in ("call_function", "call_method") and called(node) in _FREE


def of_shape(node: fx.Node) -> bool:
    """It asks a tensor for no more than its shape or type."""
    name = called(node)
    return name in _SIZES or (name == "getattr" and node.args[1] in _ATTRIBUTES)


def leaves(found: Any) -> Iterator[Any]:
    """What a value is made of, if it is a list or a tuple."""
    if isinstance(found, list | tuple):
        for part in found:
            yield from leaves(part)
    else:
        yield found
