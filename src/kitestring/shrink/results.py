"""What a search found: each candidate with what it takes and how well it answers whom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kitestring.report.summary import p10, worst10
from kitestring.shrink.budget import Budget, Figures, front, nearest
from kitestring.shrink.candidates import LARGE, Candidate
from kitestring.shrink.taking import Scale, Taken
from kitestring.tasks.task import Metric

Scores = Sequence[Sequence[float]]
"""Of each seed, each user; NaN where the metric is undefined for the user."""
NEAR = 0.01
"""As good as the best, without a budget: a point of a share, or a hundredth of another metric."""


@dataclass(frozen=True)
class Quality:
    """Over users, means over the seeds. `spread`: standard deviation of the mean over seeds."""

    mean: float
    p10: float
    worst10: float
    spread: float | None


@dataclass(frozen=True)
class Change:
    """What became of users from one model to another, each user's scores averaged over the seeds.

    `each`: by user, positive where it is better now, NaN where a score is undefined. A user is
    worse or better off where that is more than one row's worth of their score; of a metric that is
    no share, where it is anything at all. `quarters`: the mean of `each` over quarters of the
    users, from those that both models together serve worst to those they serve best."""

    each: Sequence[float]
    mean: float
    error: float
    worse: float
    better: float
    quarters: Sequence[float]


@dataclass(frozen=True)
class Entry:
    """A candidate. `why` says why it could not be made; `taken` is None where not even untrained.
    Without `scores` it was left out. `size`: bytes of its file once it is trained."""

    candidate: Candidate
    taken: Taken | None = None
    why: str = ""
    size: int | None = None
    scores: Mapping[str, Scores] = field(default_factory=dict)  # by metric, validation rows
    test: Mapping[str, Scores] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.candidate.slug

    @property
    def title(self) -> str:
        return self.candidate.title


@dataclass(frozen=True)
class Found:
    """`entries` by name. `rows`: how many each user is judged by, of validation and of test."""

    task: str
    about: str
    metric: Metric
    budget: Budget
    scale: Scale
    entries: Mapping[str, Entry]
    users: Sequence[str]
    rows: Mapping[str, Sequence[int]]
    seeds: int
    others: Sequence[str] = ()
    notes: Sequence[str] = ()
    seconds: float | None = None  # None: of a search that went on

    @property
    def judged(self) -> list[Entry]:
        return [e for e in self.entries.values() if e.scores]

    def figures(self, entry: Entry) -> Figures:
        """Of a candidate that could be made."""
        return figures(entry, self.scale)

    def good(self, entry: Entry) -> float:
        """Its mean quality on validation rows, higher is better; below all where it has none."""
        mean = quality(entry.scores[self.metric.name], self.metric).mean
        return -math.inf if math.isnan(mean) else mean if self.metric.higher_is_better else -mean

    @property
    def front(self) -> list[Entry]:
        """Nothing else is at least as good, as small and as fast, and better in one; by size.

        Times are compared in two digits: what differs by less is noise."""
        judged = sorted(self.judged, key=lambda e: self.figures(e).size)
        points = [(-self.good(e), f.size, _two(f.p50)) for e in judged for f in [self.figures(e)]]
        return [judged[i] for i in front(points)]

    @property
    def choice(self) -> Entry | None:
        """With a budget the best that meets it, of equals the smallest. Without one the smallest
        of those that are nearly as good as the best."""
        fit = [e for e in self.judged if self.budget.meets(self.figures(e))]
        if not fit:
            return None
        best = max(map(self.good, fit))
        room = 0.0
        if not self.budget.given:
            room = NEAR if self.metric.unit == "%" else NEAR * abs(best)
        near = [e for e in fit if self.good(e) >= best - room]
        return min(near, key=lambda e: (self.figures(e).size, -self.good(e)))

    @property
    def nearest(self) -> Entry:
        """What comes nearest to meeting the budget."""
        there = {n: self.figures(e) for n, e in self.entries.items() if e.taken and not e.why}
        return self.entries[nearest(there, self.budget)]

    @property
    def large(self) -> Entry:
        return self.entries[Candidate(LARGE).slug]


def figures(entry: Entry, scale: Scale) -> Figures:
    assert entry.taken is not None
    scaled = scale(entry.taken)
    size = scaled.size if entry.size is None else entry.size
    return Figures(size, scaled.p50, scaled.p95, scaled.memory)


@np.errstate(invalid="ignore")  # an error may be endless: a difference of two is none
def quality(scores: Scores, metric: Metric) -> Quality:
    seeds = [[s for s in seed if not math.isnan(s)] for seed in scores]
    filled = [seed for seed in seeds if seed]
    if not filled:
        return Quality(math.nan, math.nan, math.nan, None)
    means = [float(np.mean(seed)) for seed in filled]
    up = metric.higher_is_better
    return Quality(
        float(np.mean(means)),
        float(np.mean([p10(seed, up) for seed in filled])),
        float(np.mean([worst10(seed, up) for seed in filled])),
        float(np.std(means, ddof=1)) if len(means) > 1 else None,
    )


@np.errstate(invalid="ignore")
def change(now: Scores, before: Scores, rows: Sequence[int], metric: Metric) -> Change:
    """`rows`: of each user."""
    sign = 1.0 if metric.higher_is_better else -1.0
    new, old = (sign * np.mean(np.asarray(s, float), axis=0) for s in (now, before))
    each = new - old
    known = ~np.isnan(each)
    if not known.any():
        return Change(each.tolist(), math.nan, math.nan, math.nan, math.nan, ())
    worth = 1 / np.asarray(rows, float) if metric.unit == "%" else np.zeros(len(each))
    worth = worth + 1e-9  # of the rounding of equal scores
    mine = each[known]
    # Ranked by both: who is ranked by one of them alone seems to move towards the middle.
    order = np.argsort((new + old)[known], kind="stable")
    quarters = [float(mine[part].mean()) for part in np.array_split(order, 4) if len(part)]
    error = float(mine.std(ddof=1) / math.sqrt(len(mine))) if len(mine) > 1 else math.nan
    return Change(
        each.tolist(), float(mine.mean()), error, float((mine < -worth[known]).mean()),
        float((mine > worth[known]).mean()), quarters,
    )  # fmt: skip


def _two(seconds: float) -> float:
    return float(f"{seconds:.2g}")
