"""Two tokenizers: which token of one stands for which of the other, and what is taught then."""

from __future__ import annotations

from functools import cache, partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kitestring.compress.distil.text.align import across, align, distances, nearest, targets
from kitestring.compress.distil.text.divergences import Divergence, forward_kl
from kitestring.compress.distil.train import Settings, distil
from kitestring.errors import DataError
from text_models import llama

words = st.lists(st.text("ab ", max_size=5), min_size=1, max_size=6)


@cache
def _levenshtein(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    replaced = _levenshtein(a[1:], b[1:]) + (a[0] != b[0])
    return min(_levenshtein(a[1:], b) + 1, _levenshtein(a, b[1:]) + 1, replaced)


def test_edit_distances_as_everybody_knows_them() -> None:
    """kitten -> sitting is the textbook's example, of three edits."""
    found = distances(["kitten", "flaw", "", "same"], ["sitting", "lawn", "abc", "same"])
    assert np.diag(found).tolist() == [3, 2, 3, 0]
    assert found[2].tolist() == [7, 4, 3, 4]


@given(words, words)
def test_edit_distances_are_what_their_definition_says(a: list[str], b: list[str]) -> None:
    assert distances(a, b).tolist() == [[_levenshtein(x, y) for y in b] for x in a]


@given(words, words)
def test_the_nearest_piece_is_the_first_of_the_nearest(a: list[str], b: list[str]) -> None:
    wanted = [min(range(len(b)), key=lambda j: (_levenshtein(x, b[j]), j)) for x in a]
    assert nearest(a, b).tolist() == wanted


def test_a_piece_that_is_there_is_its_own_nearest() -> None:
    assert nearest(["ut", "utilise", "", "ize"], ["utilize", "ize", "ut", "size"]).tolist() == [
        2,
        0,
        2,
        1,
    ]
    with pytest.raises(DataError, match="no pieces"):
        nearest(["a"], [])


def _cut(text: str, at: set[int]) -> list[str]:
    places = [0, *sorted(i for i in at if 0 < i < len(text)), len(text)]
    return [text[i:j] for i, j in pairwise(places)]


def _spans(tokens: list[str]) -> list[tuple[int, int]]:
    ends = np.cumsum([len(token) for token in tokens]).tolist()
    return [(end - len(token), end) for end, token in zip(ends, tokens, strict=True)]


def test_hello_world_cut_in_two_ways() -> None:
    assert align(["hel", "lo", " wor", "ld"], ["hello", " ", "world"]) == [[0], [0], [1, 2], [2]]
    assert align(["hello", " ", "world"], ["hel", "lo", " wor", "ld"]) == [[0, 1], [2], [2, 3]]


def test_tokens_of_no_text_and_other_spellings() -> None:
    assert align(["", "he", "llo"], ["", "hello"]) == [[0], [1], [1]]
    assert align(["", "hello"], ["he", "", "llo", ""]) == [[0], [0, 2]]
    assert align(["a", "", ""], ["a", ""]) == [[0], [1], [1]]
    assert align(["hello", " world"], ["", "Hello", " World", ""]) == [[0, 1], [2, 3]]
    assert align(["a", "b", "c"], ["a", "x", "b", "c"])[2] == [3]
    with pytest.raises(DataError, match="no tokens"):
        align([], ["a"])


@given(words)
def test_with_itself_every_token_is_alone(tokens: list[str]) -> None:
    assert align(tokens, tokens) == [[i] for i in range(len(tokens))]


@given(
    st.text("ab ", min_size=1, max_size=20),
    st.sets(st.integers(1, 19)),
    st.sets(st.integers(1, 19)),
)
def test_cuts_of_one_text_overlap(text: str, here: set[int], there: set[int]) -> None:
    student, teacher = _cut(text, here), _cut(text, there)
    theirs = _spans(teacher)
    for (start, end), found in zip(_spans(student), align(student, teacher), strict=True):
        assert found == [j for j, (a, b) in enumerate(theirs) if a < end and start < b]


@given(words, words)
def test_every_token_has_another_and_none_cross(a: list[str], b: list[str]) -> None:
    found = align(a, b)
    assert len(found) == len(a)
    assert all(found)
    if "".join(a) != "".join(b):
        assert sorted({j for line in found for j in line}) == list(range(len(b)))
    pairs = [(i, j) for i, line in enumerate(found) for j in line]
    assert all(j <= k for (_, j), (_, k) in pairwise(pairs))


@given(words, words)
def test_another_spelling_is_warped_at_the_least_cost(a: list[str], b: list[str]) -> None:
    @cache
    def least(i: int, j: int) -> int:
        before = [least(*way) for way in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if min(way) >= 0]
        return _levenshtein(a[i], b[j]) + min(before, default=0)

    if "".join(a) != "".join(b):
        cost = sum(_levenshtein(a[i], b[j]) for i, line in enumerate(align(a, b)) for j in line)
        assert cost == least(len(a) - 1, len(b) - 1)


PIECES = ["a", "b", "ab", " "]


@pytest.mark.parametrize("top_k", [None, 4])
def test_the_same_tokenizer_teaches_the_teachers_distribution(top_k: int | None) -> None:
    ids, logits = [0, 2, 3, 1, 1], torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    found = targets(ids, ids, logits, PIECES, PIECES, top_k=top_k)
    torch.testing.assert_close(found, logits.log_softmax(-1))
    assert forward_kl(logits[None], found[None]).abs().max() < 1e-6
    half = targets(ids, ids, logits.half(), PIECES, PIECES, top_k=top_k)
    torch.testing.assert_close(half, logits.half().float().log_softmax(-1))


def test_what_is_taught_by_hand() -> None:
    """ "ab a": the student has a, b, " ", a; the teacher ab, " ", a, and an entry "aa" as well."""
    student, teacher = ["a", "b", " "], ["aa", "ab", "a", " "]
    assert nearest(teacher, student).tolist() == [0, 0, 0, 2]
    logits = torch.tensor([[0.1, 0.6, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.4, 0.3]]).log()
    found = targets([0, 1, 2, 0], [1, 3, 2], logits, student, teacher, top_k=None).exp()
    never = torch.tensor([[1.0, 0, 0], [0, 1, 0]])  # one token for two: what the text says
    torch.testing.assert_close(found[:2], never)
    torch.testing.assert_close(found[2:], torch.tensor([[0.6, 0, 0.4], [0.7, 0, 0.3]]))
    two = targets([0, 1, 2, 0], [1, 3, 2], logits, student, teacher, top_k=2).exp()
    torch.testing.assert_close(two[2:], torch.tensor([[3 / 7, 0, 4 / 7], [4 / 7, 0, 3 / 7]]))
    with pytest.raises(DataError, match=r"logits \[2, 4\] for 3 of 4 tokens"):
        targets([0], [1, 3, 2], logits[:2], student, teacher)


def _encoded(text: str, known: list[str]) -> list[int]:
    """The longest piece that fits, again and again, after one for the beginning."""
    ids = [0]
    while text:
        ids.append(max((i for i, p in enumerate(known) if p and text.startswith(p)),
                       key=lambda i: len(known[i])))  # fmt: skip
        text = text[len(known[ids[-1]]) :]
    return ids


OURS = ["", "a", "b", "c", " "]
THEIRS = ["", "a", "b", "c", " ", "ab", "ca", "bca"]
TEXTS = ["abc ab", "a bca c", "ab", "cab cab", "b c a b", "bcabca", "c", "aab b"]


def _across(teacher: nn.Module, known: list[str], batch: int = 8) -> Tensor:
    ours, theirs = (partial(_encoded, known=pieces) for pieces in (OURS, known))
    made = across(teacher, TEXTS, ours, theirs, OURS, known, batch=batch, top_k=None)
    batch_of = made(0, teacher)
    assert batch_of.teacher is not None
    assert batch_of.y is not None
    longest = max(len(_encoded(text, OURS)) for text in TEXTS) - 1
    assert batch_of.teacher.shape == (8, longest, 5)
    assert torch.equal(
        (batch_of.y >= 0).sum(1).sort().values, torch.tensor(sorted(map(len, TEXTS)))
    )
    assert batch_of.x[batch_of.y >= 0].max() < 5
    real = batch_of.y >= 0
    torch.testing.assert_close(
        batch_of.teacher[real].softmax(-1).sum(-1), torch.ones(int(real.sum()))
    )
    return (batch_of.teacher - teacher(batch_of.x).log_softmax(-1))[real] if known is OURS else real


def test_batches_across_one_tokenizer_are_plain_distillation() -> None:
    teacher = llama(5)
    with torch.no_grad():
        assert _across(teacher.train(), OURS).abs().max() < 1e-4
    assert teacher.training


def test_a_student_learns_from_a_teacher_with_other_tokens() -> None:
    teacher, student = llama(8).eval(), llama(5, layers=1, stir=1)
    _across(teacher, THEIRS)
    ours, theirs = (partial(_encoded, known=pieces) for pieces in (OURS, THEIRS))
    batches = across(teacher, TEXTS, ours, theirs, OURS, THEIRS, batch=8)
    found = distil(student, None, batches, Divergence(), Settings(steps=40, lr=2e-2))
    assert found.losses[-1] < 0.5 * found.losses[0]


def test_texts_of_one_token_are_refused() -> None:
    ours = partial(_encoded, known=OURS)
    with pytest.raises(DataError, match="'' is fewer than two tokens"):
        across(llama(5), ["ab", ""], ours, ours, OURS, OURS)
