"""Divergences between next-token distributions: at equality, by hand, at their limits."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kitestring.compress.distil.objective import Batch, Seen
from kitestring.compress.distil.text.divergences import (
    Divergence,
    forward_kl,
    jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from kitestring.errors import SettingError, TaskError

ALL = (forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, total_variation)
each = pytest.mark.parametrize("divergence", ALL, ids=lambda f: f.__name__)
# p = (3/4, 1/4) of the teacher, q = (1/2, 1/2) of the student.
TEACHER = torch.tensor([[[math.log(3.0), 0.0]]], dtype=torch.float64)
STUDENT = torch.zeros(1, 1, 2, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@each
def test_equal_models_are_no_distance_apart(divergence: Callable[..., Tensor]) -> None:
    logits = torch.randn(2, 3, 7, dtype=torch.float64)
    assert divergence(logits, logits + 5).shape == (2, 3)
    torch.testing.assert_close(divergence(logits, logits + 5), torch.zeros(2, 3).double())
    assert (divergence(logits, torch.randn(2, 3, 7).double()) > 1e-3).all()


def test_a_coin_by_hand() -> None:
    """KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 log 3/2 + 1/4 log 1/2, and so on."""
    p, q = [0.75, 0.25], [0.5, 0.5]
    by_hand = {
        forward_kl: 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
        reverse_kl: 0.5 * math.log(2 / 3) + 0.5 * math.log(2),
        jsd: 0.5 * _kl(p, [0.625, 0.375]) + 0.5 * _kl(q, [0.625, 0.375]),
        skew_kl: _kl(p, [0.1 * 0.75 + 0.9 * 0.5, 0.1 * 0.25 + 0.9 * 0.5]),
        skew_reverse_kl: _kl(q, [0.9 * 0.75 + 0.1 * 0.5, 0.9 * 0.25 + 0.1 * 0.5]),
        total_variation: 0.25,
    }
    for divergence, value in by_hand.items():
        assert divergence(STUDENT, TEACHER).item() == pytest.approx(value, abs=1e-12)


def test_the_mixture_of_jsd_has_beta_of_the_teacher() -> None:
    middle = [0.2 * 0.75 + 0.8 * 0.5, 0.2 * 0.25 + 0.8 * 0.5]
    value = 0.2 * _kl([0.75, 0.25], middle) + 0.8 * _kl([0.5, 0.5], middle)
    assert jsd(STUDENT, TEACHER, beta=0.2).item() == pytest.approx(value, abs=1e-12)


def test_jsd_nears_forward_and_reverse_kl() -> None:
    forward, reverse = forward_kl(STUDENT, TEACHER).item(), reverse_kl(STUDENT, TEACHER).item()
    assert jsd(STUDENT, TEACHER, beta=1e-6).item() / 1e-6 == pytest.approx(forward, rel=1e-4)
    assert jsd(STUDENT, TEACHER, beta=1 - 1e-6).item() / 1e-6 == pytest.approx(reverse, rel=1e-4)
    assert jsd(STUDENT, TEACHER, beta=0).item() == forward
    assert jsd(STUDENT, TEACHER, beta=1).item() == reverse


def test_without_skew_it_is_kl() -> None:
    student, teacher = torch.randn(2, 4, 9), torch.randn(2, 4, 9)
    assert skew_kl(student, teacher, alpha=0.0).equal(forward_kl(student, teacher))
    assert skew_reverse_kl(student, teacher, alpha=0.0).equal(reverse_kl(student, teacher))


@each
def test_temperature_divides_both_logits(divergence: Callable[..., Tensor]) -> None:
    student, teacher = torch.randn(2, 3, 5).double(), torch.randn(2, 3, 5).double()
    torch.testing.assert_close(
        divergence(student, teacher, 2.5), divergence(student / 2.5, teacher / 2.5)
    )
    with pytest.raises(SettingError, match="temperature"):
        divergence(student, teacher, 0.0)


@each
def test_gradients(divergence: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: divergence(s, teacher, 1.5), (student,))


@each
@pytest.mark.parametrize("never", [-1e9, -math.inf])
def test_logits_far_below_give_finite_numbers(
    divergence: Callable[..., Tensor], never: float
) -> None:
    student = torch.tensor([[[0.0, never, 1.0], [0.0, 1.0, 2.0]]], requires_grad=True)
    teacher = torch.tensor([[[0.0, never, 2.0], [never, 1.0, 2.0]]])
    found = divergence(student, teacher)
    found.sum().backward()
    assert found.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@each
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_logits_of_half_the_width(divergence: Callable[..., Tensor], narrow: torch.dtype) -> None:
    """As large teachers give them: what is computed of them is of full width."""
    student, teacher = torch.randn(2, 3, 7), torch.randn(2, 3, 7).to(narrow)
    found = divergence(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, divergence(student, teacher.float()))
    both = divergence(student.to(narrow), teacher)
    torch.testing.assert_close(both, divergence(student.to(narrow).float(), teacher.float()))


def test_skew_is_bounded_where_kl_is_not() -> None:
    """KL(p || a p + (1 - a) q) <= log(1 / a): DistiLLM, section 3.1."""
    student, teacher = torch.tensor([[[0.0, -80.0]]]), torch.tensor([[[-80.0, 0.0]]])
    assert forward_kl(student, teacher).item() == pytest.approx(80)
    assert skew_kl(student, teacher).item() == pytest.approx(math.log(10))
    assert skew_reverse_kl(student, teacher).item() == pytest.approx(math.log(10))


@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
def test_none_is_negative(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 1, 2, 6, generator=generator, dtype=torch.float64) * 3
    for divergence in ALL:
        assert (divergence(student, teacher) >= 0).all()
    assert (jsd(student, teacher, beta=share) >= 0).all()
    assert (jsd(student, teacher, beta=share) <= math.log(2) + 1e-9).all()
    assert (skew_kl(student, teacher, alpha=share) <= -math.log(share) + 1e-9).all()


def test_shares_out_of_range_are_refused() -> None:
    for value in (-0.1, 1.1):
        with pytest.raises(SettingError, match=f"beta is {value}. Give 0 to 1"):
            jsd(STUDENT, TEACHER, beta=value)
        with pytest.raises(SettingError, match="alpha"):
            skew_kl(STUDENT, TEACHER, alpha=value)


def test_the_objective_counts_tokens_with_a_truth() -> None:
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    y = torch.tensor([[-1, 2, 3], [-1, -1, 0]])
    x = torch.zeros(2, 3, dtype=torch.long)
    apart = forward_kl(student, teacher)
    wanted = ((apart[0, 1] + apart[0, 2]) / 2 + apart[1, 2]) / 2
    found = Divergence()(Seen(Batch(x, y), student, teacher, {}, {}))
    torch.testing.assert_close(found, wanted)
    weighed = Batch(x, y, weight=torch.tensor([3.0, 1.0]))
    wanted = (3 * (apart[0, 1] + apart[0, 2]) / 2 + apart[1, 2]) / 4
    torch.testing.assert_close(Divergence()(Seen(weighed, student, teacher, {}, {})), wanted)
    found = Divergence()(Seen(Batch(x), student, teacher, {}, {}))
    torch.testing.assert_close(found, apart.mean())


def test_the_objective_hands_on_settings_and_keeps_the_size_of_gradients() -> None:
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    seen = Seen(Batch(torch.zeros(2, 3)), student, teacher, {}, {})
    found = Divergence(jsd, temperature=3.0, beta=0.1)(seen)
    torch.testing.assert_close(found, jsd(student, teacher, 3.0, 0.1).mean() * 9)


def test_models_of_other_vocabularies_are_refused() -> None:
    seen = Seen(Batch(torch.zeros(2, 3)), torch.zeros(2, 3, 4), torch.zeros(2, 3, 1), {}, {})
    with pytest.raises(TaskError, match=r"\[2, 3, 4\] is compared with \[2, 3, 1\]"):
        Divergence()(seen)
