"""Ready-made metrics of one user's rows (answer [n, ...], truth [n, ...])."""

from __future__ import annotations

import numpy as np

from kitestring.tasks.task import Array, Metric


def _accuracy(answer: Array, truth: Array) -> float:
    guess = answer.argmax(-1) if answer.ndim > truth.ndim else answer > 0
    return float((guess == truth).mean())


def _auc(answer: Array, truth: Array) -> float:
    """Area under the ROC curve by ranks (Mann-Whitney U), ties counted half; NaN for one class."""
    truth = truth.astype(bool)
    positive, negative = int(truth.sum()), int((~truth).sum())
    if not positive or not negative:
        return float("nan")
    _, inverse, counts = np.unique(answer, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((rank[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


def _rank(answer: Array, truth: Array) -> Array:
    """1 + the number of items scored above the true one, over all items (full rank)."""
    own = np.take_along_axis(answer, truth[:, None].astype(np.int64), axis=1)
    ties = (answer == own).sum(1) - 1
    rank: Array = 1 + (answer > own).sum(1) + ties / 2
    return rank


def _hit(answer: Array, truth: Array) -> float:
    return float((_rank(answer, truth) <= 10).mean())


def _ndcg(answer: Array, truth: Array) -> float:
    rank = _rank(answer, truth)
    return float(np.where(rank <= 10, 1 / np.log2(rank + 1), 0).mean())


def _perplexity(answer: Array, truth: Array) -> float:
    top = answer.max(-1, keepdims=True)
    normal = top[..., 0] + np.log(np.exp(answer - top).sum(-1))
    own = np.take_along_axis(answer, truth[..., None].astype(np.int64), axis=-1)[..., 0]
    return float(np.exp((normal - own).mean()))


def _rmse(answer: Array, truth: Array) -> float:
    return float(np.sqrt(((answer - truth) ** 2).mean()))


accuracy = Metric("accuracy", _accuracy)
auc = Metric("AUC", _auc)
hit_at_10 = Metric("HR@10", _hit)
ndcg_at_10 = Metric("NDCG@10", _ndcg)
perplexity = Metric("perplexity", _perplexity, higher_is_better=False, unit="")
rmse = Metric("RMSE", _rmse, higher_is_better=False, unit="")
