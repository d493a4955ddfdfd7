"""Distilling between models that cut the same text into different tokens.

Wan, Huang, Cai, Quan, Bi, Shi 2024, "Knowledge Fusion of Large Language Models" (FuseLLM), ICLR,
arXiv 2401.10491, section 3.2, and Fan, Ma, Kang, Gu, Song, Fan, Chen, Yang 2024, "FedMKT", COLING
2025, arXiv 2406.02224: positions are matched by dynamic programming and entries of the vocabularies
by their text, both at the minimum edit distance (MinED). Where one token of the teacher stands for
just one of the student's, the teacher's distribution is taught; elsewhere the token itself.

Tokens are pieces of text, `pieces[id]`; what marks a space in a vocabulary ("Ġ", "▁") should be a
space, and a token for the beginning or end no text, "".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kitestring.compress.distil.batches import Batches, rows
from kitestring.compress.distil.objective import Batch
from kitestring.compress.distil.pair import device_of
from kitestring.compress.distil.taps import evaluating
from kitestring.compress.distil.text.divergences import wide
from kitestring.errors import DataError

_NEVER = -1e9  # the logit of what is not in a target


def distances(a: Sequence[str], b: Sequence[str]) -> NDArray[np.int32]:
    """Levenshtein distances [len(a), len(b)]: insertions, deletions and replacements of letters."""
    of_a, long_a = _letters(a)
    of_b, long_b = _letters(b)
    found = np.zeros((len(a), len(b)), np.int32)
    # above[j]: from the first i letters of each of a to the first j of each of b.
    above = [np.full_like(found, j) for j in range(of_b.shape[1] + 1)]
    for i in range(of_a.shape[1] + 1):
        if i:
            row = [np.full_like(found, i)]
            for j in range(1, len(above)):
                differ = of_a[:, i - 1, None] != of_b[None, :, j - 1]
                step = np.minimum(above[j], row[j - 1]) + 1
                row.append(np.minimum(step, above[j - 1] + differ))
            above = row
        ends = np.flatnonzero(long_a == i)
        for j in np.unique(long_b) if len(ends) else ():
            at = np.ix_(ends, np.flatnonzero(long_b == j))
            found[at] = above[j][at]
    return found


def nearest(teacher: Sequence[str], student: Sequence[str]) -> Tensor:
    """For each of the teacher's pieces the id of the student's nearest: int64 [len(teacher)].

    That with the same text, else the first of those at the least edit distance."""
    same: dict[str, int] = {}
    for i, piece in enumerate(student):
        same.setdefault(piece, i)
    found = np.array([same.get(piece, -1) for piece in teacher], np.int64)
    missing = np.flatnonzero(found < 0).tolist()
    if missing and not student:
        raise DataError("the student has no pieces", "align", "Give its vocabulary")
    lengths = np.array([len(piece) for piece in student])
    for size in {len(teacher[i]) for i in missing}:
        alike = [i for i in missing if len(teacher[i]) == size]
        # The shortest piece is within max(size, its length), so that much longer ones are not it.
        near = np.flatnonzero(lengths <= size + max(size, lengths.min())).tolist()
        pieces = [student[j] for j in near]
        chunk = max(1, 2**18 // len(near))
        for at in range(0, len(alike), chunk):
            part = alike[at : at + chunk]
            apart = distances([teacher[i] for i in part], pieces)
            found[part] = np.take(near, apart.argmin(1))
    return torch.from_numpy(found)


def align(student: Sequence[str], teacher: Sequence[str]) -> list[list[int]]:
    """For each of the student's tokens the positions of the teacher's that stand for it, in order.

    Where both are cuts of one text, those that share a letter with it; a token of no text stands
    for another at the same place, else for what is there. Of texts that differ, the warping of the
    one sequence onto the other whose pairs differ least in edit distance: each token of either is
    then in a pair."""
    if not student or not teacher:
        raise DataError("no tokens", "align", "Give one at least on both sides")
    text = "".join(student)
    same = text and text == "".join(teacher)
    return _by_letters(student, teacher) if same else _by_warping(student, teacher)


def targets(
    student: Sequence[int],
    teacher: Sequence[int],
    logits: Tensor,
    student_pieces: Sequence[str],
    teacher_pieces: Sequence[str],
    same: Tensor | None = None,
    *,
    top_k: int | None = 10,
) -> Tensor:
    """What the student should give for its tokens, from the other tokenizer's model.

    `student` [k] and `teacher` [m] are the ids of one text, `logits` [m, teacher's vocabulary] what
    the teacher gave for each of its own, that is, one position earlier. Returned are logits
    [k, student's vocabulary]: of the teacher's `top_k` likeliest (None: all), renormalised and
    moved to the student's entries by `same` (of `nearest`; computed if None), where one token
    stands for one and is `same`; of the student's own token elsewhere. What is not in a target has
    -1e9: divergences that ask for log p everywhere, as reverse KL does, are of no use here."""
    if len(logits) != len(teacher) or logits.shape[-1] != len(teacher_pieces):
        what = f"logits {list(logits.shape)} for {len(teacher)} of {len(teacher_pieces)} tokens"
        raise DataError(what, "align", "Give one row of logits for each of the teacher's tokens")
    logits = wide(logits)
    same = nearest(teacher_pieces, student_pieces) if same is None else same
    matched = align([student_pieces[i] for i in student], [teacher_pieces[i] for i in teacher])
    pairs = _one_to_one(matched, student, teacher, same)
    likely = logits.new_zeros(len(student), len(student_pieces))
    likely[torch.arange(len(student)), torch.as_tensor(student)] = 1
    if pairs:
        ours, theirs = torch.tensor(pairs, device=logits.device).T
        logs = logits[theirs]
        if top_k is not None and top_k < logs.shape[-1]:
            kept = logs.topk(top_k, -1)
            logs = torch.full_like(logs, -torch.inf).scatter(-1, kept.indices, kept.values)
        moved = torch.zeros_like(likely[ours])
        likely[ours] = moved.index_add(1, same.to(logits.device), logs.softmax(-1))
    return likely.log().clamp(min=_NEVER)


def across(
    teacher: nn.Module,
    texts: Sequence[str],
    encode_student: Callable[[str], Sequence[int]],
    encode_teacher: Callable[[str], Sequence[int]],
    student_pieces: Sequence[str],
    teacher_pieces: Sequence[str],
    *,
    batch: int = 32,
    seed: int = 0,
    top_k: int | None = 10,
) -> Batches:
    """Batches of texts for a student with another tokenizer than `teacher`, with what it should
    give: `distil(student, None, across(...), Divergence(), settings)`.

    Both encoders should begin with a token for the beginning or with the same first piece: the
    first token of a text has nothing before it, and is not learned. Shorter texts of a batch are
    padded; texts must fit the models' longest contexts."""
    coded = [(list(encode_student(text)), list(encode_teacher(text))) for text in texts]
    for text, pair in zip(texts, coded, strict=True):
        if min(map(len, pair)) < 2:
            raise DataError(f"{text!r} is fewer than two tokens", "across", "Give longer texts")
    same = nearest(teacher_pieces, student_pieces)
    chosen = rows(torch.arange(len(coded)), batch=batch, seed=seed)

    @lru_cache(maxsize=1)
    @torch.no_grad()
    def made(picked: tuple[int, ...]) -> Batch:
        ours, theirs = ([coded[i][side] for i in picked] for side in (0, 1))
        with evaluating(teacher):
            given = teacher(_padded(theirs, 0)[:, :-1].to(device_of(teacher))).cpu()
        ids, truth = _padded(ours, 0), _padded(ours, -1)
        wanted = torch.zeros(len(picked), ids.shape[1] - 1, len(student_pieces))
        for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            wanted[i, : len(our) - 1] = targets(
                our[1:], their[1:], given[i, : len(their) - 1], student_pieces, teacher_pieces,
                same, top_k=top_k,
            )  # fmt: skip
        return Batch(ids[:, :-1], truth[:, 1:], teacher=wanted)

    return lambda step, student: made(tuple(chosen(step, student).x.tolist()))


def _letters(pieces: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Code points [n, longest], 0 after the end, and lengths [n]."""
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    found = np.zeros((len(pieces), int(lengths.max(initial=0))), np.int32)
    for row, piece in zip(found, pieces, strict=True):
        row[: len(piece)] = [ord(letter) for letter in piece]
    return found, lengths


def _by_letters(student: Sequence[str], teacher: Sequence[str]) -> list[list[int]]:
    owner = [j for j, piece in enumerate(teacher) for _ in piece]
    silent: dict[int, list[int]] = {}  # tokens of no text, by the letter before which they stand
    at = 0
    for j, piece in enumerate(teacher):
        if not piece:
            silent.setdefault(at, []).append(j)
        at += len(piece)
    found, at = [], 0
    for piece in student:
        if piece:
            found.append(list(dict.fromkeys(owner[at : at + len(piece)])))
        elif at in silent:
            found.append([silent[at].pop(0) if len(silent[at]) > 1 else silent[at][0]])
        else:
            found.append([owner[min(at, len(owner) - 1)]])
        at += len(piece)
    return found


def _by_warping(student: Sequence[str], teacher: Sequence[str]) -> list[list[int]]:
    kinds = [sorted(set(side)) for side in (student, teacher)]
    ours, theirs = ([kind.index(piece) for piece in side]
                    for side, kind in zip((student, teacher), kinds, strict=True))  # fmt: skip
    cost = distances(*kinds)[np.ix_(ours, theirs)].tolist()
    # total[i][j]: the least cost of a path of pairs from (0, 0) to (i, j).
    total: list[list[int]] = []
    for i, line in enumerate(cost):
        row: list[int] = []
        for j, here in enumerate(line):
            before = [total[i - 1][j - 1] if i and j else None,
                      total[i - 1][j] if i else None, row[j - 1] if j else None]  # fmt: skip
            row.append(here + min((value for value in before if value is not None), default=0))
        total.append(row)
    i, j = len(student) - 1, len(teacher) - 1
    found: list[list[int]] = [[] for _ in student]
    found[i].append(j)
    while i or j:
        ways = [(a, b) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if a >= 0 and b >= 0]
        i, j = min(ways, key=lambda way: total[way[0]][way[1]])
        found[i].append(j)
    return [line[::-1] for line in found]


def _one_to_one(
    matched: Sequence[Sequence[int]], student: Sequence[int], teacher: Sequence[int], same: Tensor
) -> list[tuple[int, int]]:
    """Positions (student's, teacher's) of pairs that have no other partner and the same entry."""
    partners = np.bincount([j for line in matched for j in line], minlength=len(teacher))
    return [
        (i, line[0])
        for i, line in enumerate(matched)
        if len(line) == 1 and partners[line[0]] == 1 and int(same[teacher[line[0]]]) == student[i]
    ]


def _padded(ids: Sequence[Sequence[int]], fill: int) -> Tensor:
    """[n, longest]"""
    found = torch.full((len(ids), max(map(len, ids))), fill)
    for row, line in zip(found, ids, strict=True):
        row[: len(line)] = torch.as_tensor(line)
    return found
