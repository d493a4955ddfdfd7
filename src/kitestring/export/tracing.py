"""From a function of tensors to one graph of operations for any number of rows.

The function is traced with two different numbers of rows. Wherever the two graphs differ, in a
size, a bound or a factor, what stands there is a multiple of the rows (and something beside, which
a third trace has to confirm). Then one row and many are computed by the function and by the graph:
a branch on how many there are would give other numbers.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kitestring.compress.quantise.ops import ROUNDING
from kitestring.export.decompositions import table
from kitestring.export.sizes import Shape, Size, through

_ROWS = ((5, 7, 17), (11, 13, 3))
"""Two numbers of rows, and one that confirms what they say. The second three are for where a size
of the module happens to be one of the first."""
MANY = 33
"""Rows that are computed beside one row, to find what depends on how many there are."""
_CLOSE = 1e-3  # of the largest number of an output
_STEPS = 2e-2  # the same where numbers are rounded to 8 bits: they may be taken to the next step
_TRIES = 2  # an unlucky draw lies at the edge of a function that is not smooth
DRAWS = "bernoulli"
UNTRACEABLE = (
    RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError, NotImplementedError,
    AttributeError,
)  # fmt: skip


class Uneven(Exception):
    """Other numbers of rows are computed in another way."""


@dataclass(frozen=True)
class Output:
    """Of an operation. `strides`: how it lay in memory when it was traced; None where that is no
    multiple of the rows."""

    shape: Shape
    dtype: torch.dtype
    strides: Shape | None


@dataclass(frozen=True)
class Call:
    """One operation; arguments are numbers, `Size`s, `Ref`s, and lists of them."""

    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outs: tuple[Output, ...]

    @property
    def out(self) -> Output:
        return self.outs[0]


@dataclass(frozen=True)
class Ref:
    """The result of call number `at`, and which of its outputs."""

    at: int
    which: int = 0


@dataclass(frozen=True)
class Traced:
    """`calls` by number: placeholders "input:<i>" first, then what an output needs, and all that is
    drawn. `constants` are tensors by their number."""

    calls: Mapping[int, Call]
    constants: Mapping[int, Tensor]
    outputs: tuple[Ref, ...]


def trace(f: Callable[..., list[Tensor]], inputs: Callable[[int], Sequence[Tensor]]) -> Traced:
    """`inputs(rows)` makes examples. Raises `Uneven`, or what torch raises where `f` cannot be
    traced (`UNTRACEABLE`)."""
    problem = Uneven("nothing was tried")
    for at, (*rows, more) in enumerate(_ROWS):
        first, second = (_graph(f, inputs(n)) for n in rows)
        try:
            found, beside = _aligned(first, second, (rows[0], rows[1]))
            if beside or at:
                _hold_all(found, _graph(f, inputs(more)), more)
            return found
        except Uneven as reason:
            problem = reason if not at else problem
    raise problem


def confirm(
    found: Traced, f: Callable[..., list[Tensor]], inputs: Callable[[int], Sequence[Tensor]]
) -> None:
    """Raises `Uneven` where one row, or many, are computed in another way than those that were
    traced. Numbers are held against each other, not operations: torch itself computes one row by
    other operations where that is the same."""
    for rows in (1, MANY):
        if all(_differs(found, f, inputs, rows, seed) for seed in range(_TRIES)):
            how_many = "1 row is" if rows == 1 else f"{rows} rows are"
            raise Uneven(f"{how_many} computed in another way than a few")


def _differs(
    found: Traced, f: Callable[..., list[Tensor]], inputs: Callable[[int], Sequence[Tensor]],
    rows: int, seed: int,
) -> bool:  # fmt: skip
    with plainly():
        try:
            dice = torch.Generator().manual_seed(seed)
            given = [_some(x, dice) for x in inputs(rows)]
            with _Drawn():
                wanted = f(*(x.clone() for x in given))
        except UNTRACEABLE:
            if rows == 1:
                return False  # torch itself gives nothing to differ from
            raise
        try:
            with _Drawn():
                made = _computed(found, given, rows)
        except UNTRACEABLE:
            return True
    largest = max((_largest(x) for x in wanted), default=0.0)
    share = _STEPS if any(call.name in ROUNDING for call in found.calls.values()) else _CLOSE
    return not all(_close(*pair, largest, share) for pair in zip(made, wanted, strict=True))


class _Drawn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws the same numbers each time; torch's own order follows how tensors lie in memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dice = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.rstrip("_") != DRAWS:
            return func(*args, **(kwargs or {}))
        x, *p = args
        chance = p[0] if p else 0.5 if name.endswith("_") else x
        kept = (torch.rand(x.shape, generator=self.dice) < chance).to(x.dtype)
        return x.copy_(kept) if name.endswith("_") else kept


def _some(x: Tensor, dice: torch.Generator) -> Tensor:
    """Other numbers than 0, since 0 hides factors; near those that there are, if there are any."""
    if not x.is_floating_point():
        return x.clone()
    drawn = torch.rand(x.shape, generator=dice).to(x.dtype)
    return x.detach() + (drawn - 0.5) * 0.1 if x.any() else drawn


def _largest(x: Tensor) -> float:
    """Of the finite ones."""
    sizes = x.detach().double().abs().nan_to_num(0, 0)
    return float(sizes.max()) if x.numel() else 0.0


def _close(made: Tensor, wanted: Tensor, largest: float, share: float) -> bool:
    """Up to axes of 1, and up to what rounding makes of slopes that cancel out."""
    if made.numel() != wanted.numel():
        return False
    a, b = (x.detach().reshape(-1).double() for x in (made, wanted))
    within = share * max(_largest(wanted), 0.01 * largest)
    return torch.allclose(a, b, rtol=0, atol=within, equal_nan=True)


def _computed(found: Traced, given: Sequence[Tensor], rows: int) -> list[Tensor]:
    """The outputs with `rows` rows, operation by operation."""
    known: dict[int, Any] = dict(found.constants)
    last = {ref.at: at for at, c in found.calls.items() for ref in refs([c.args, c.kwargs])}
    kept = {ref.at for ref in found.outputs}

    def value(argument: Any) -> Any:
        if isinstance(argument, Ref):
            made = known[argument.at]
            return made if isinstance(made, Tensor) else made[argument.which]
        if isinstance(argument, Size):
            return argument.of(rows)
        if isinstance(argument, Mapping):
            return {k: value(v) for k, v in argument.items()}
        if isinstance(argument, list | tuple):
            return type(argument)(value(v) for v in argument)
        return argument

    for at, call in found.calls.items():
        if call.name.startswith("input:"):
            known[at] = given[int(call.name.removeprefix("input:"))]
            continue
        known[at] = call.target(*value(call.args), **value(call.kwargs))
        for ref in refs([call.args, call.kwargs]):
            if last[ref.at] == at and ref.at not in kept:
                known.pop(ref.at, None)
    return [value(ref) for ref in found.outputs]


def _hold_all(found: Traced, third: GraphModule, rows: int) -> None:
    """By a third trace: the same operations, of sizes that follow from the rows."""
    nodes = list(third.graph.nodes)
    for at, call in found.calls.items():
        node = nodes[at] if at < len(nodes) else None
        given = node is not None and node.op == "placeholder"
        if node is None or (not given and _name(node) != call.name):
            raise Uneven("other numbers of rows are computed by other operations")
        _hold(call.args, () if given else node.args, call.name, rows)
        for out, wanted in zip(call.outs, _outputs(node), strict=True):
            _hold(out.shape, tuple(wanted.shape), call.name, rows)


def _hold(expected: Any, seen: Any, name: str, rows: int) -> None:
    if isinstance(expected, Size):
        if expected.of(rows) != seen:
            raise Uneven(f"{name} depends on the number of rows in another way than by multiples")
    elif isinstance(expected, list | tuple) and isinstance(seen, list | tuple):
        for a, b in zip(expected, seen, strict=True):
            _hold(a, b, name, rows)


@contextmanager
def plainly() -> Iterator[None]:
    """Without fused kernels that have no counterpart elsewhere."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False), _Known():
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fast)


class _Known(TorchFunctionMode):
    """Classes that are counted need not be looked for in the data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {**dict(zip(("tensor", "num_classes"), args, strict=False)), **(kwargs or {})}
        if func is one_hot and given.get("num_classes", -1) > 0:
            ids = given["tensor"].unsqueeze(-1)
            return (ids == torch.arange(given["num_classes"])).to(torch.int64)
        return func(*args, **(kwargs or {}))


def _graph(f: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> GraphModule:
    # Shapes are noted by one fake mode, where make_fx would make one for each operation.
    context = TracingContext(FakeTensorMode(allow_fallback_kernels=True))
    with plainly(), tracing(context):
        traced = make_fx(f, decomposition_table=dict(table()))(*inputs)
        if not all([_out_of_place(node) for node in traced.graph.nodes]):
            traced = make_fx(functionalize(traced), decomposition_table=dict(table()))(*inputs)
    return traced


def _out_of_place(node: Node) -> bool:
    """Where nothing else looks at what is overwritten, an operation in place is the same one out of
    place, and its result stands for what was there. False: not so here."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return True
    old, name = node.args[0] if node.args else None, _name(node)
    plain = getattr(torch.ops.aten, name.removesuffix("_"), None)
    overload = {"bernoulli_.float": "p"}.get(f"{name}.{target._overloadname}", target._overloadname)
    found = getattr(plain, overload, None)
    whole = isinstance(old, Node) and old.op == "call_function" and not _looks(old)
    if not name.endswith("_") or found is None or not isinstance(old, Node) or not whole:
        return False
    if any(_looks(user) and user != node and user.users for user in old.users):
        return False
    node.target = found
    if name == "bernoulli_" and len(node.args) == 1:
        node.args = (old, 0.5)  # what torch leaves out
    old.replace_all_uses_with(node, delete_user_cb=lambda user: user > node)
    return True


def _looks(node: Node) -> bool:
    """Whether its result is memory of its argument."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return any(r.alias_info is not None for r in target._schema.returns)


def _aligned(first: GraphModule, second: GraphModule, rows: tuple[int, int]) -> tuple[Traced, bool]:
    """And whether there is something beside a multiple of the rows."""
    pairs = list(zip(first.graph.nodes, second.graph.nodes, strict=False))
    order = [{node: at for at, node in enumerate(g.graph.nodes)} for g in (first, second)]
    if len(order[0]) != len(order[1]):
        raise Uneven("other numbers of rows are computed by other operations")
    align = _Align(rows, (order[0], order[1]))
    calls: dict[int, Call] = {}
    constants: dict[int, Tensor] = {}
    outputs: tuple[Ref, ...] = ()
    live = _live(first)
    for at, (a, b) in enumerate(pairs):
        if a.op != b.op or (a.op == "call_function" and a.target != b.target):
            raise Uneven(f"other numbers of rows are computed by {_name(a)} and {_name(b)}")
        if a not in live:
            continue
        if a.op == "output":
            outputs = tuple(align.value(a.args[0], b.args[0]))
        elif a.op == "get_attr":
            constants[at] = _constant((first, second), (a, b))
        elif a.op == "call_function" and a.target is operator.getitem:
            align.items[a] = Ref(order[0][a.args[0]], int(a.args[1]))
        else:
            calls[at] = Call(
                f"input:{at}" if a.op == "placeholder" else _name(a),
                a.target,
                () if a.op == "placeholder" else align.value(a.args, b.args),
                align.value(a.kwargs, b.kwargs),
                align.outputs(a, b),
            )
    return Traced(calls, constants, outputs), align.beside


def _live(traced: GraphModule) -> set[Node]:
    """What an output needs, all inputs, and all that is drawn: others come after it."""
    nodes = traced.graph.nodes
    todo = [n for n in nodes if n.op in ("placeholder", "output") or _name(n) == DRAWS]
    live = set[Node]()
    while todo:
        node = todo.pop()
        if node not in live:
            live.add(node)
            todo += node.all_input_nodes
    return live


class _Align:
    """Makes one of what stands in two graphs at the same place."""

    def __init__(
        self, rows: tuple[int, int], order: tuple[dict[Node, int], dict[Node, int]]
    ) -> None:
        self.rows, self.order = rows, order
        self.items: dict[Node, Ref] = {}
        self.beside = False

    def value(self, a: Any, b: Any) -> Any:
        if isinstance(a, Node) and isinstance(b, Node):
            if self.order[0][a] != self.order[1][b]:
                raise Uneven("other numbers of rows are computed in another order")
            return self.items.get(a, Ref(self.order[0][a]))
        if type(a) is not type(b):
            raise Uneven("other numbers of rows are computed in another way")
        if isinstance(a, list | tuple):
            if len(a) != len(b):
                raise Uneven("other numbers of rows are computed of other parts")
            found = [self.value(x, y) for x, y in zip(a, b, strict=True)]
            return tuple(found) if isinstance(a, tuple) else found
        if isinstance(a, dict):
            return {k: self.value(a[k], b.get(k)) for k in a}
        if isinstance(a, int | float) and not isinstance(a, bool):
            return a if a == b or a != a else self.size(a, b)
        if a != b:
            raise Uneven(f"{a} with {self.rows[0]} rows is {b} with {self.rows[1]}")
        return a

    def size(self, a: float, b: float) -> Size:
        found = through(a, b, self.rows)
        if found is None:
            numbers = f"{a:g} with {self.rows[0]} rows and {b:g} with {self.rows[1]}"
            raise Uneven(f"a number is {numbers}, which is no multiple of the rows")
        self.beside |= bool(found.more)
        return found

    def outputs(self, a: Node, b: Node) -> tuple[Output, ...]:
        return tuple(
            Output(self.value(tuple(x.shape), tuple(y.shape)), x.dtype, self.strides(x, y))
            for x, y in zip(_outputs(a), _outputs(b), strict=True)
        )

    def strides(self, x: Any, y: Any) -> Shape | None:
        pairs = list(zip(x.stride(), y.stride(), strict=True))
        found = [s if s == t else through(s, t, self.rows) for s, t in pairs]
        return None if None in found else tuple(s for s in found if s is not None)


def _outputs(node: Node) -> list[Any]:
    if node.op in ("get_attr", "output") or node.target is operator.getitem:
        return []
    val = node.meta.get("val")
    return [v for v in (val if isinstance(val, list | tuple) else [val]) if v is not None]


def _constant(modules: tuple[GraphModule, GraphModule], nodes: tuple[Node, Node]) -> Tensor:
    a, b = (getattr(m, str(n.target)) for m, n in zip(modules, nodes, strict=True))
    if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b):
        raise Uneven("a constant of the module depends on the number of rows")
    return a.detach()  # type: ignore[no-any-return]


def _name(node: Node) -> str:
    """As in "add", "prims.var"."""
    parts = str(node.target).split(".")
    return parts[1] if parts[0] == "aten" else ".".join(parts[:2])


def refs(argument: Any) -> list[Ref]:
    """All that arguments refer to."""
    if isinstance(argument, Ref):
        return [argument]
    if isinstance(argument, Mapping):
        argument = list(argument.values())
    if isinstance(argument, list | tuple):
        return [ref for part in argument for ref in refs(part)]
    return []
