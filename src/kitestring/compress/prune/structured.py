"""Structured pruning: a smaller dense model without some channels, neurons and heads of attention.

Which of them can only go together is found in a run of the model, as in Fang, Ma, Song, Mi, Wang,
"DepGraph: Towards Any Structural Pruning", 2023, arXiv 2301.12900, section 3.2, but of single
positions along axes and not of layers; for transformers it is what Ma, Fang, Wang, "LLM-Pruner: On
the Structural Pruning of Large Language Models", 2023, arXiv 2305.11627, section 3.1, couple.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from kitestring.compress.matrices import copied
from kitestring.compress.prune.coupled.atoms import Ids
from kitestring.compress.prune.coupled.cut import cut, right
from kitestring.compress.prune.coupled.groups import Group as Group
from kitestring.compress.prune.coupled.groups import groups_of, layer_of
from kitestring.compress.prune.coupled.scores import Loss, by_magnitude, by_taylor
from kitestring.compress.prune.coupled.shapes import reshape as reshape
from kitestring.compress.prune.coupled.shapes import shape_of as shape_of
from kitestring.compress.prune.coupled.trace import Trace, trace
from kitestring.errors import SettingError, TaskError, unknown

What: TypeAlias = Literal["channels", "heads", "queries", "neurons", "width"]
WHAT: tuple[What, ...] = get_args(What)
USUAL: tuple[What, ...] = ("channels", "heads", "neurons")
Keep: TypeAlias = float | Mapping[str, float | int]


def slim(
    model: nn.Module,
    example: Any,
    keep: Keep = 0.5,
    *,
    scores: Mapping[str, Tensor] | None = None,
    round_to: int = 1,
    skip: Sequence[str] = (),
    what: Sequence[What] = USUAL,
) -> nn.Module:
    """A smaller copy of `model`, in evaluation: the same classes with fewer channels, neurons and
    heads. It computes what `model` does where nothing that was removed is summed into anything,
    unless a group went through a norm over it (`Group.exact`): that sees less. What the model takes
    and gives is as wide as before.

    `example` is an input of the model, several in a tuple. `keep`: the share of each group that
    stays, in 0..1, or by the names of `groups` shares (floats) and counts (whole numbers); other
    groups then stay whole. At least one of each stays. Those of the highest of `scores` do: by
    group's name [size], L2 norms of weights if None. Counts are the nearest multiples of `round_to`
    there are, but for heads. Groups of layers that match a pattern of `skip` ("layers.0.*") stay
    whole, as do those that are not of a kind in `what`: "queries", in place of "heads", are heads
    of queries alone, as many of each that share keys and values.

    Groups that cannot be followed through the model's code stay whole too. Raises `TaskError` where
    that leaves nothing, or a group that `keep` names, and `SettingError` for what makes no sense.
    """
    _sensible(keep, round_to, what)
    original = copied(model)
    _known(original, skip)
    if not isinstance(keep, Mapping) and keep == 1:
        return original
    found = trace(original, example, "queries" in what)
    every = groups_of(found)
    chosen = _chosen(every, keep, skip, what)
    ranks = by_magnitude(original, found, chosen) if scores is None else scores
    gone = {}
    for group in chosen:
        share = keep[group.name] if isinstance(keep, Mapping) else keep
        gone[group.name] = _least(group, _count(group, share, round_to), ranks)
    gone = {name: ids for name, ids in gone.items() if len(ids)}
    fine = _cuttable(original, example, found, every, gone)
    if isinstance(keep, Mapping) and (odd := gone.keys() - fine.keys()):
        said = "the model's code relies on its size"
        raise TaskError(said, f"group {min(odd)!r}", "Leave it out of keep")
    if gone and not fine:
        said = f"none of its groups can be cut, {min(gone)!r} for one: its code relies on sizes"
        raise TaskError(said, type(model).__name__, "Take sizes from x.shape in forward")
    return cut(original, found, every, fine)


def groups(model: nn.Module, example: Any, what: Sequence[What] = USUAL) -> tuple[Group, ...]:
    """What `slim` can make smaller, in the order of the run. Each was cut to half to be sure."""
    _sensible(1.0, 1, what)
    original = copied(model)
    found = trace(original, example, "queries" in what)
    every = groups_of(found)
    ranks = by_magnitude(original, found, every)
    gone = {g.name: _least(g, g.size // 2, ranks) for g in every if g.kind in _kinds(what)}
    fine = _cuttable(original, example, found, every, gone)
    return tuple(group for group in every if group.name in fine)


def magnitude(model: nn.Module, example: Any, what: Sequence[What] = USUAL) -> dict[str, Tensor]:
    """Scores for `slim`, [size] by group's name: the L2 norms of weights that go together."""
    _sensible(1.0, 1, what)
    original = copied(model)
    found = trace(original, example, "queries" in what)
    return by_magnitude(original, found, groups_of(found))


def taylor(
    model: nn.Module,
    example: Any,
    batches: Iterable[Any],
    loss: Loss,
    what: Sequence[What] = USUAL,
) -> dict[str, Tensor]:
    """Scores for `slim`, [size] by group's name: the mean over batches of how much the loss changes
    to first order when what a part adds to later layers becomes zero. `loss(model, batch)` gives a
    single number, in evaluation. Raises `TaskError` for another, and without batches."""
    _sensible(1.0, 1, what)
    original = copied(model)
    found = trace(original, example, "queries" in what)
    return by_taylor(original, found, groups_of(found), batches, loss)


def _chosen(
    every: Sequence[Group], keep: Keep, skip: Sequence[str], what: Sequence[What]
) -> list[Group]:
    kinds = _kinds(what)
    names = [group.name for group in every]
    if isinstance(keep, Mapping):
        if odd := next((name for name in keep if name not in names), None):
            raise unknown("group", odd, names)
        for g in every:
            if g.name in keep and g.kind not in kinds:
                mend = f"Add {g.kind!r} to what"
                raise SettingError(f"is of kind {g.kind!r}", f"group {g.name!r}", mend)
    chosen = [
        g for g in every
        if (g.name in keep if isinstance(keep, Mapping) else g.kind in kinds)
        and not any(fnmatchcase(layer, pattern) for layer in g.layers for pattern in skip)
    ]  # fmt: skip
    if not chosen and not isinstance(keep, Mapping):
        others = sorted({g.kind for g in every} - kinds)
        mend = f"It has {', '.join(others)}: add them to what" if others else "Use a wider model"
        raise TaskError(f"there are no {', '.join(what)} to remove", "the model", mend)
    return chosen


def _kinds(what: Sequence[What]) -> set[str]:
    return {"heads" if kind == "queries" else kind for kind in what}


def _count(group: Group, keep: float | int, round_to: int) -> int:
    """How many stay."""
    if isinstance(keep, int):
        if not 1 <= keep <= group.size:
            mend = f"Give 1 to {group.size}, or a share like 0.5"
            raise SettingError(f"keep is {keep}", f"group {group.name!r}", mend)
        return keep
    step = 1 if group.kind == "heads" else round_to
    count = int(keep * group.size / step + 0.5) * step
    return min(group.size, max(step, count))


def _least(group: Group, count: int, scores: Mapping[str, Tensor]) -> Ids:
    """The atoms of the lowest scores but `count`; of equal ones the last."""
    if group.name not in scores:
        raise SettingError("has no scores", f"group {group.name!r}", "Score every group to be cut")
    each = scores[group.name].detach().double().cpu()
    if each.shape != (group.size,) or not bool(each.isfinite().all()):
        what = f"its scores are {list(each.shape)}, or not finite"
        raise SettingError(what, f"group {group.name!r}", f"Give {group.size} finite numbers")
    order = group.atoms[torch.argsort(-each, stable=True).numpy()]
    stay = {*order[:count].tolist()}
    for along in group.along:
        if not stay & {*along.tolist()}:
            stay.add(next(a for a in order.tolist() if a in along))
    return np.array([a for a in order.tolist() if a not in stay], np.int64)


def _cuttable(
    model: nn.Module, example: Any, found: Trace, every: Sequence[Group], gone: Mapping[str, Ids]
) -> dict[str, Ids]:
    """Those that the smaller model is right without: all, or one after the other."""
    if not gone or right(model, example, found, every, gone):
        return dict(gone)
    fine: dict[str, Ids] = {}
    for name, ids in gone.items():
        if right(model, example, found, every, {**fine, name: ids}):
            fine[name] = ids
    return fine


def _sensible(keep: Keep, round_to: int, what: Sequence[What]) -> None:
    for name, value in keep.items() if isinstance(keep, Mapping) else [("", keep)]:
        where = f"slim, group {name!r}" if name else "slim"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SettingError(f"keep is {value!r}", where, "Give a share like 0.5")
        if not (name and isinstance(value, int)) and not 0 < value <= 1:
            raise SettingError(f"keep is {value}", where, "Give a share above 0, at most 1")
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise SettingError(f"round_to is {round_to!r}", "slim", "Give a whole number from 1")
    for kind in [what] if isinstance(what, str) else what:
        if kind not in WHAT:
            raise unknown("kind", str(kind), WHAT)
    if isinstance(what, str) or not what:
        raise SettingError(f"what is {what!r}", "slim", f"Give some of {', '.join(WHAT)}")


def _known(model: nn.Module, skip: Sequence[str]) -> None:
    names = [name for name, _ in model.named_modules()]
    names += [layer_of(name) for name, _ in model.named_parameters()]
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise unknown("layer to skip", pattern, names)
