"""Quality per user in a few figures, for the table, the report and the decision alike.

A score of NaN means that the metric is undefined for that user (say, recall without a positive
row): it is left out and counted. "Better" follows the metric; the badly served users are at the
low end of accuracy and at the high end of perplexity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kitestring.comparison.results import Comparison, Row, SeedResult

REFERENCE = "device_only"


@dataclass(frozen=True)
class Quality:
    """One row's quality over users, each figure taken per seed and averaged over the seeds."""

    mean: float
    spread: float | None  # standard deviation over the seeds of the mean; None with one seed
    low: float  # the smallest and the largest mean of a seed
    high: float
    p10: float  # nine users in ten are served at least this well
    worst10: float  # mean over the worst tenth of the users
    better_off: float | None  # share of users with a better score than with device only
    users: int  # with a score in at least one seed
    undefined: int  # scores left out, counted over users and seeds
    seeds: int


@dataclass(frozen=True)
class Lead:
    """How far one row is ahead of another over the same users and seeds; negative: behind."""

    mean: float
    error: float  # standard error: the larger of the one over users and the one over seeds
    users: int

    @property
    def clear(self) -> bool:
        """More than two standard errors, and more than the rounding of equal scores."""
        return self.mean > 2 * self.error + 1e-12


def measured(comparison: Comparison) -> list[Row]:
    """The rows that ran."""
    return [row for row in comparison.rows if row.missing is None and row.seeds]


def find(comparison: Comparison, name: str) -> Row | None:
    """The row of that name, if it ran."""
    return next((row for row in measured(comparison) if row.name == name), None)


def defined(seed: SeedResult) -> dict[str, float]:
    """User -> score, without the users for whom the metric is undefined."""
    return {u: s for u, s in zip(seed.users, seed.scores, strict=True) if not math.isnan(s)}


def per_user(row: Row) -> dict[str, float]:
    """User -> score, averaged over the seeds in which it is defined."""
    scores: dict[str, list[float]] = {}
    for seed in row.seeds:
        for user, value in defined(seed).items():
            scores.setdefault(user, []).append(value)
    return {user: float(np.mean(values)) for user, values in scores.items()}


def p10(scores: list[float], higher_is_better: bool) -> float:
    """The score at the tenth percentile from the badly served end, interpolated."""
    return float(np.quantile(scores, 0.1 if higher_is_better else 0.9)) if scores else math.nan


def worst10(scores: list[float], higher_is_better: bool) -> float:
    """The mean over the worst tenth of the users, rounded up to whole users."""
    if not scores:
        return math.nan
    worst = sorted(scores, reverse=not higher_is_better)[: -(-len(scores) // 10)]
    return float(np.mean(worst))


def better_off(row: Row, reference: Row | None, higher_is_better: bool) -> float | None:
    """The share of users with a strictly better score than in `reference`, at the same seed."""
    if reference is None or reference.name == row.name:
        return None
    pairs = _pairs(row, reference, higher_is_better)
    return float(np.mean([d > 0 for d in pairs.values()])) if pairs else None


def quality(row: Row, comparison: Comparison) -> Quality:
    """The summary of one row that ran."""
    higher = comparison.higher_is_better
    seeds = [list(defined(seed).values()) for seed in row.seeds]
    filled = [scores for scores in seeds if scores]
    means = [float(np.mean(scores)) for scores in filled]
    return Quality(
        mean=float(np.mean(means)) if means else math.nan,
        spread=float(np.std(means, ddof=1)) if len(means) > 1 else None,
        low=min(means, default=math.nan),
        high=max(means, default=math.nan),
        p10=float(np.mean([p10(s, higher) for s in filled])) if filled else math.nan,
        worst10=float(np.mean([worst10(s, higher) for s in filled])) if filled else math.nan,
        better_off=better_off(row, find(comparison, REFERENCE), higher),
        users=len(per_user(row)),
        undefined=sum(len(seed.scores) for seed in row.seeds) - sum(map(len, seeds)),
        seeds=len(row.seeds),
    )


def lead(ahead: Row, behind: Row, comparison: Comparison) -> Lead:
    """The paired lead of one row over another, positive where `ahead` is better.

    Scores are paired by user and seed. The error over users takes each user's mean over the
    seeds; the error over seeds takes each seed's mean over the users, and sees what moves all
    users at once. With a single pair nothing tells a lead from chance: the error is infinite,
    as it is without any pair, where the lead is the difference of the two means."""
    pairs = _pairs(ahead, behind, comparison.higher_is_better)
    if not pairs:
        sign = 1.0 if comparison.higher_is_better else -1.0
        gap = quality(ahead, comparison).mean - quality(behind, comparison).mean
        return Lead(sign * gap, math.inf, 0)
    users: dict[str, list[float]] = {}
    seeds: dict[int, list[float]] = {}
    for (user, seed), difference in pairs.items():
        users.setdefault(user, []).append(difference)
        seeds.setdefault(seed, []).append(difference)
    by_user = [float(np.mean(d)) for d in users.values()]
    errors = [_error(by_user), _error([float(np.mean(d)) for d in seeds.values()])]
    known = [error for error in errors if error is not None]
    return Lead(float(np.mean(by_user)), max(known, default=math.inf), len(users))


def latency(row: Row) -> tuple[float, float]:
    """Simulated latency (p50, p95) of a request in seconds, means over the seeds."""
    served = [seed.serving for seed in row.seeds]
    return (
        float(np.mean([s.latency_p50 for s in served])),
        float(np.mean([s.latency_p95 for s in served])),
    )


def cloud_calls(row: Row) -> float:
    """The share of requests that reached the cloud, mean over the seeds."""
    return float(np.mean([seed.serving.cloud_calls for seed in row.seeds]))


def cloud_flops(row: Row) -> float:
    """The cloud's operations per request, mean over the seeds."""
    return float(np.mean([seed.serving.cloud_flops for seed in row.seeds]))


def _pairs(a: Row, b: Row, higher_is_better: bool) -> dict[tuple[str, int], float]:
    """(user, seed) -> how much better a is than b, where both have a score."""
    sign = 1.0 if higher_is_better else -1.0
    others = {seed.seed: defined(seed) for seed in b.seeds}
    return {
        (user, seed.seed): sign * (value - others[seed.seed][user])
        for seed in a.seeds
        if seed.seed in others
        for user, value in defined(seed).items()
        if user in others[seed.seed]
    }


def _error(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))
