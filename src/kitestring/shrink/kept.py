"""A finished search as JSON: seconds, bytes, scores by user."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kitestring import __version__
from kitestring.comparison.compare import write_whole
from kitestring.measure.bench import machine
from kitestring.shrink import show
from kitestring.shrink.package import Packed
from kitestring.shrink.personal import Gained, Missing
from kitestring.shrink.results import Entry, Found, Scores, quality
from kitestring.shrink.study import FRONT


def write(
    found: Found, done: Packed | None, gained: Gained | Missing | None, folder: Path, command: str
) -> None:
    """`front.json`; where it is, the search is finished."""
    whole = plain(found, done, gained, command)
    write_whole(folder / FRONT, json.dumps(whole, indent=1) + "\n")


def plain(
    found: Found, done: Packed | None, gained: Gained | Missing | None, command: str
) -> dict[str, Any]:
    choice = found.choice
    return {
        "kitestring": __version__,
        "command": command,
        "machine": machine(),
        "task": found.task,
        "metric": found.metric.name,
        "higher_is_better": found.metric.higher_is_better,
        "budget": {x.what: x.most for x in found.budget.each},
        "device": asdict(found.scale.device),
        "times_here": found.scale.times,
        "seeds": found.seeds,
        "users": list(found.users),
        "rows": {split: list(rows) for split, rows in found.rows.items()},
        "front": [e.name for e in found.front],
        "choice": choice.name if choice else None,
        "nearest": found.nearest.name,
        "says": [show.headline(found), *show.reasons(found)],
        "candidates": {e.name: _entry(found, e) for e in found.entries.values()},
        "remeasured": None if done is None else _remeasured(found, done),
        "personal": None if gained is None else _personal(found, gained),
        "seconds": found.seconds,
    }


def _entry(found: Found, entry: Entry) -> dict[str, Any]:
    if entry.taken is None:
        return {"title": entry.title, "why_not": entry.why}
    said = {
        "title": entry.title,
        "scaled": asdict(found.figures(entry)),
        "here": asdict(entry.taken),
    }
    if entry.why:
        said["why_not"] = entry.why
    for split, by_metric in (("validation", entry.scores), ("test", entry.test)):
        if by_metric:
            said[split] = _judged(found, by_metric)
    return said


def _judged(found: Found, by_metric: Mapping[str, Scores]) -> dict[str, Any]:
    own = quality(by_metric[found.metric.name], found.metric)
    return {**_finite(asdict(own)), "scores": _scores(by_metric)}


def _scores(by_metric: Mapping[str, Scores]) -> Any:
    """By metric, seed and user."""
    return {name: [_known(seed) for seed in scores] for name, scores in by_metric.items()}


def _known(scores: Sequence[float]) -> list[float | None]:
    """Null where JSON has no number: undefined, or endless."""
    return [x if math.isfinite(x) else None for x in scores]


def _remeasured(found: Found, done: Packed) -> dict[str, Any]:
    return {
        "file": done.path.name,
        "package_bytes": done.size,
        "here": asdict(done.taken),
        "scaled": asdict(found.scale(done.taken)),
        "validation": _known(done.scores),
    }


def _personal(found: Found, gained: Gained | Missing) -> dict[str, Any]:
    if isinstance(gained, Missing):
        return {"how": gained.how, "why_not": gained.why}
    c = show.gain(found, gained)
    change = {"mean": c.mean, "error": c.error, "worse": c.worse, "better": c.better}
    tried = [{"lr": lr, "mean": score} for lr, score in gained.tried.items()]
    return {
        "how": gained.how,
        "file": gained.path.name,
        "package_bytes": gained.size,
        "parameters": gained.parameters,
        "lr": gained.lr,
        "validation": {
            "users": gained.tried_on,
            **_finite({"before": gained.untrained}),
            "tried": [_finite(t) for t in tried],
        },
        "before": _judged(found, gained.before),
        "after": _judged(found, gained.after),
        "change": {**_finite(change), "quarters": list(c.quarters)},
        "kept": gained.kept,
    }


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    bad = [k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
    return {**values, **dict.fromkeys(bad)}
