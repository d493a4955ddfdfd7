"""The search: what each candidate takes, which are worth training, how well they answer.

What a model takes of a device does not depend on what it has learnt, so it is measured first, with
nothing else running; what cannot meet the size of the budget in any precision is then not trained.
Validation rows of device users choose. Test rows are served to what is shown: the front, the
references, the choice.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import cached_property, lru_cache, partial
from typing import Any

from kitestring.devices.profiles import profile
from kitestring.errors import KitestringError
from kitestring.shrink.answer import Answer, answer
from kitestring.shrink.bench import Bench, Job, Judging
from kitestring.shrink.budget import Budget, Limit, nearest
from kitestring.shrink.candidates import LARGE, PRECISIONS, REFERENCES, SHAPES, Candidate, Shape
from kitestring.shrink.make import compressed
from kitestring.shrink.results import Entry, Found, figures
from kitestring.shrink.study import Study
from kitestring.shrink.taking import Scale, Taken, take
from kitestring.shrink.workers import Listener, work_off
from kitestring.tasks.validate import validate

SPLITS: tuple[Judging, ...] = ("validation", "test")


def search(
    bench: Bench, budget: Budget, study: Study, workers: int, listener: Listener | None = None,
    seconds: bool = True,
) -> Found:  # fmt: skip
    """Whatever of it the study knows already is not done again. `seconds`: whether the time that it
    takes says something."""
    started, order = time.perf_counter(), bench.order
    notes = [*validate(bench.task), *bench.task.notes]
    device = profile(order.profile)
    budget = limited(budget, device.name, device.memory)
    entries = {c.slug: Entry(c) for shape in SHAPES for c in of(shape)}
    if listener:
        listener.total(len(entries))
    entries = _taken(bench, study, entries, listener)
    large = entries[Candidate(LARGE).slug].taken
    assert large is not None
    scale = Scale(large, device)
    chosen = worthwhile(entries, budget, scale)
    jobs = [Job(Candidate(shape), seed) for shape in chosen for seed in range(order.seeds)]
    jobs += [
        Job(Candidate(shape, c.precision), seed, "validation")
        for shape in chosen for c in of(shape) if entries[c.slug].taken
        for seed in range(order.seeds)
    ]  # fmt: skip
    steps = len(entries)

    def work(jobs: list[Job]) -> None:
        nonlocal steps
        left = [job for job in jobs if study.get(job.name) is None]
        steps += len(left)
        if listener:
            listener.total(steps)
        work_off(bench, left, lambda job, found: study.put(job.name, found), listener, workers)

    work(jobs)
    found = Found(
        bench.task.name, bench.task.about, bench.task.metric, budget, scale,
        {n: _judged(study, e, order.seeds, "validation") for n, e in entries.items()},
        bench.judges.names, {split: bench.judges.rows(split) for split in SPLITS}, order.seeds,
        [m.name for m in bench.task.others], notes,
    )  # fmt: skip
    shown = {e.name for e in (*found.front, found.choice, found.nearest) if e and e.scores}
    shown |= {found.entries[n].candidate.plain.slug for n in shown}
    shown |= {c.slug for c in REFERENCES if found.entries[c.slug].scores}
    jobs = [
        Job(found.entries[name].candidate, seed, "test")
        for name in sorted(shown) for seed in range(order.seeds)
    ]  # fmt: skip
    work(jobs)
    tested = {
        n: _judged(study, e, order.seeds, "test") if n in shown else e
        for n, e in found.entries.items()
    }
    spent = time.perf_counter() - started if seconds else None
    return replace(found, entries=tested, seconds=spent)


def limited(budget: Budget, name: str, memory: int) -> Budget:
    """With what the device's profile says of memory, where the budget says nothing."""
    if budget.of("memory") is not None:
        return budget
    return Budget((*budget.each, Limit("memory", float(memory), name)))


def of(shape: Shape) -> list[Candidate]:
    return [Candidate(shape, precision) for precision in PRECISIONS]


def _taken(
    bench: Bench, study: Study, entries: Mapping[str, Entry], listener: Listener | None
) -> dict[str, Entry]:
    """What each takes, of a model that has learnt nothing; or why it cannot be made."""
    found, drafts = dict(entries), _Drafts(bench)
    around = 0.0
    for c in (entry.candidate for entry in entries.values()):
        if listener:
            listener.said(c.slug, f"measuring {c.title}", 0.0)
        # Whether it was taught makes no difference.
        form = Candidate(replace(c.shape, taught=False), c.precision)
        known = study.once(f"taken {form.slug}", partial(drafts.taken, form, around))
        if "why" in known:
            found[c.slug] = replace(found[c.slug], why=known["why"])
        else:
            found[c.slug] = replace(found[c.slug], taken=Taken(**known))
            around = around or known["p50"]
        if listener:
            listener.said(c.slug, f"measuring {c.title}", -1.0)
    return found


class _Drafts:
    """Candidates that have learnt nothing, made when they are needed."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._row = bench, bench.judges.example()
        self._whole = lru_cache(1)(bench.draft)  # precisions of one width come together

    def taken(self, c: Candidate, around: float) -> dict[str, Any]:
        """A `Taken` as a dictionary; or "why" there is none, which is no fault of the search."""
        try:
            reference = None if c == Candidate(LARGE) else self._reference
            return asdict(take(self._answer(c), self._row, reference, around))
        except KitestringError as problem:
            if c == Candidate(LARGE):
                raise
            return {"why": problem.what}

    @cached_property
    def _reference(self) -> Answer:
        return self._answer(Candidate(LARGE))

    def _answer(self, c: Candidate) -> Answer:
        whole, some = self._whole(c.shape), self._bench.pool.some
        return answer(self._bench.task, compressed(whole, c.precision, some, True), self._row)


def worthwhile(entries: Mapping[str, Entry], budget: Budget, scale: Scale) -> list[Shape]:
    """The widths to train, the cheapest first: those of which some precision has a size within the
    budget, the references, and what those start from. Where nothing at all meets the budget, only
    what comes nearest."""
    there = {n: figures(e, scale) for n, e in entries.items() if e.taken}
    most = budget.of("size")
    if any(budget.meets(f) for f in there.values()):
        fit = [n for n, f in there.items() if most is None or f.size <= most]
    else:
        fit = [nearest(there, budget)]
    wanted = [entries[n].candidate.shape for n in fit]
    wanted += [c.shape for c in REFERENCES if entries[c.slug].taken]
    wanted += [before for shape in wanted for before in shape.after]
    sizes = {shape: there[Candidate(shape).slug].size for shape in wanted}
    return sorted(sizes, key=lambda shape: sizes[shape])


def _judged(study: Study, entry: Entry, seeds: int, split: Judging) -> Entry:
    """With its scores, where it was judged with every seed."""
    found = [study.get(Job(entry.candidate, seed, split).name) for seed in range(seeds)]
    if not all(found):
        return entry
    if why := [one["why"] for one in found if "why" in one]:
        return replace(entry, why=why[0])
    scores = {metric: [one["scores"][metric] for one in found] for metric in found[0]["scores"]}
    if split == "test":
        return replace(entry, test=scores)
    return replace(entry, scores=scores, size=found[0]["size"])


def skipped(found: Found) -> Iterable[tuple[Entry, str]]:
    """What was not trained or could not be made, and why."""
    for entry in found.entries.values():
        if not entry.scores:
            yield entry, entry.why or "too large for the budget in every precision"
