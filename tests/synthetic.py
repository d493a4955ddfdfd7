"""A made-up comparison for the tests of the table, the report and the decision.

Nothing in it was measured: the scores are drawn at random around chosen means.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kitestring.comparison.results import (
    Comparison,
    Learning,
    Row,
    SeedResult,
    Serving,
    Spent,
    Times,
    Traffic,
)

PROFILE: dict[str, Any] = {
    "name": "synthetic phone",
    "flops": 2e10,
    "up_mbit": 10.0,
    "down_mbit": 40.0,
    "round_trip_s": 0.05,
    "note": "made up",
}

# name: title, family, mean accuracy, up and down of learning, up and down per request,
# share of cloud calls, deploy bytes
ROWS: dict[str, tuple[Any, ...]] = {
    "cloud_only": ("Cloud only", "baseline", 0.80, {}, {}, {"data.x": 3e3}, 1.0, 0.0),
    "device_only": ("Device only", "baseline", 0.66, {}, {}, {}, 0.0, 0.0),
    "pooled": ("Pooled", "baseline", 0.83, {"data.x": 9e5, "data.y": 300.0}, {}, {}, 0.0, 8e5),
    "shipped": ("Shipped", "baseline", 0.70, {}, {}, {}, 0.0, 8e5),
    "fedavg": (
        "FedAvg",
        "parameters",
        0.765,
        {"parameters.w": 1.6e7, "scalars.n": 160.0},
        {"parameters.w": 1.6e7},
        {},
        0.0,
        8e5,
    ),
    "splitnn": (
        "SplitNN",
        "features",
        0.775,
        {"features.h": 2.4e7, "data.y": 3e3},
        {"features.gradient": 2.4e7},
        {"features.h": 2e3},
        1.0,
        9e4,
    ),
    "fedgkt": (
        "FedGKT",
        "features",
        0.79,
        {"features.h": 9e6, "features.logits": 2e5, "data.y": 3e3},
        {"features.logits": 2e5},
        {},
        0.0,
        8e5,
    ),
    "coda": ("CoDA", "data", 0.72, {"data.x": 9e4}, {"data.x": 1.8e6}, {}, 0.0, 0.0),
    "cascade": ("Cascade", "request", 0.775, {}, {}, {"data.x": 900.0}, 0.3, 8e5),
}
CURVES = {"fedavg": 20, "splitnn": 12, "fedgkt": 10, "coda": 3}


def comparison(
    *,
    seeds: int = 3,
    users: int = 40,
    higher_is_better: bool = True,
    missing: tuple[str, ...] = (),
    only: tuple[str, ...] = tuple(ROWS),
) -> Comparison:
    """The made-up comparison; with `higher_is_better=False` its metric is a perplexity."""
    rows = []
    for name in only:
        title, family = ROWS[name][:2]
        lost = f"the synthetic task brings no column for {title}" if name in missing else None
        rows.append(
            Row(
                name=name,
                title=title,
                family=family,
                source="made up",
                says=f"{title} as the tests imagine it",
                missing=lost,
                settings={} if family == "baseline" else {"lr": 0.05, "epochs": 2},
                trials=[
                    {"settings": {"lr": 0.05, "epochs": 2}, "score": 0.76},
                    {"settings": {"lr": 0.2, "epochs": 2}, "score": 0.71},
                ],
                seeds=[]
                if lost
                else [seed_result(name, s, users, higher_is_better) for s in range(seeds)],
            )
        )
    return Comparison(
        task="synthetic",
        about="A made-up task. Its figures were drawn at random and mean nothing.",
        metric="accuracy" if higher_is_better else "perplexity",
        higher_is_better=higher_is_better,
        unit="%" if higher_is_better else "",
        pool_users=20,
        device_users=users,
        rows_per_device=(20.0, 60.0, 240.0),
        request="one made-up image",
        small_parameters=200_000,
        large_parameters=11_000_000,
        budget="at most 400 local steps per device",
        trials=4,
        profile=PROFILE,
        version="0.0.0",
        machine="a made-up machine, 2 cores",
        rows=rows,
        notes=["All users are made up.", "Latency and energy are modelled."],
        times=Times([Spent("FedAvg", True, {"fit small": 3.0, "rest": 1.0})], 2, 2.5),
    )


def seed_result(name: str, seed: int, users: int, higher_is_better: bool = True) -> SeedResult:
    """One made-up seed of one of `ROWS`; users are hard or easy alike in every row."""
    _, _, mean, up, down, ask, calls, deploy = ROWS[name]
    hard = np.random.default_rng(7).normal(0, 0.08, users)
    own = np.random.default_rng([seed, *name.encode()]).normal(0.004 * seed, 0.02, users)
    scores = np.clip(mean + hard + own, 0.02, 1.0)
    if not higher_is_better:
        scores = 4.0 / scores
    rounds = CURVES.get(name, 1)
    grow = [(r, *_point(scores, 0.6 + 0.4 * r / rounds)) for r in range(1, rounds + 1)]
    return SeedResult(
        seed=seed,
        users=[f"user-{u}" for u in range(users)],
        scores=[float(s) for s in scores],
        others={"loss": [float(1.5 - 0.5 * s) for s in scores]},
        learning=Learning(
            up=traffic(up),
            down=traffic(down),
            seconds=40.0 * rounds,
            clock=60.0 * rounds,
            flops=3e11,
            joules=(30.0, 90.0),
            cloud_flops=5e14 if name in ("fedgkt", "splitnn") else 1e11,
            rounds=rounds,
            lost=seed,
            refused=0,
        ),
        serving=Serving(
            up=traffic(ask),
            down=traffic({"data.answer": 40.0} if ask else {}),
            deploy_bytes=deploy,
            requests=users * 10,
            cloud_calls=calls,
            cloud_flops=calls * 1.1e9,
            flops=0.0 if name == "cloud_only" else 4e7,
            latency_p50=0.09 if calls == 1.0 else 0.004,
            latency_p95=0.16 if calls > 0 else 0.006,
            joules=(0.002, 0.006) if calls < 1 else (0.02, 0.08),
        ),
        curve=grow if name in CURVES else [],
        large_before=0.74 if name in ("cloud_only", "fedgkt", "cascade") else None,
        large_after=0.79 if name == "fedgkt" else 0.74 if name == "cloud_only" else None,
        computed="vmap",
        wall_s=12.5 + seed,
    )


def traffic(leaves: dict[str, float]) -> Traffic:
    """Compartments summed from "compartment.leaf" -> bytes."""
    kinds: dict[str, float] = {}
    for leaf, size in leaves.items():
        kinds[leaf.split(".")[0]] = kinds.get(leaf.split(".")[0], 0.0) + size
    return Traffic(kinds, dict(leaves))


def _point(scores: np.ndarray[Any, Any], grown: float) -> tuple[float, float]:
    return float(scores.mean() * grown), float(np.quantile(scores, 0.1) * grown)
