"""Losses of distillation: 0 at equality, gradients, invariances, and values computed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kitestring.compress.distil.attention import Attention, attention
from kitestring.compress.distil.contrast import Contrast, nce
from kitestring.compress.distil.hints import Hints, hint
from kitestring.compress.distil.objective import (
    Batch,
    Seen,
    Sum,
    Supervised,
    binary,
    cross_entropy,
    squared,
)
from kitestring.compress.distil.relation import (
    Relation,
    angle_relation,
    angles,
    distance_relation,
    distances,
)
from kitestring.compress.distil.response import Response, binary_response, response
from kitestring.compress.distil.taps import HIDDEN, MAPS
from kitestring.errors import TaskError

REAL = torch.tensor([[True, True, False], [True, False, True]])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """float64."""
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=dice, dtype=torch.float64)


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "response": (lambda a, b: response(a, b, 3.0), (2, 5), (2, 5)),
    "response, sequences": (lambda a, b: response(a, b, 3.0, REAL), (2, 3, 5), (2, 3, 5)),
    "binary response": (lambda a, b: binary_response(a, b, 3.0), (4,), (4,)),
    "squared": (squared, (4, 2), (4, 2)),
    "hint": (hint, (3, 5), (3, 5)),
    "hint, sequences": (lambda a, b: hint(a, b, REAL), (2, 3, 5), (2, 3, 5)),
    "hint, maps": (hint, (2, 3, 2, 4), (2, 3, 2, 4)),
    "attention": (attention, (2, 3, 2, 4), (2, 5, 2, 4)),
    "attention, other sizes": (attention, (2, 3, 4, 2), (2, 5, 2, 4)),
    "attention, sequences": (lambda a, b: attention(a, b, REAL), (2, 3, 5), (2, 3, 4)),
    "distances": (distance_relation, (5, 3), (5, 4)),
    "angles": (angle_relation, (5, 3), (5, 4)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    loss, own, others = LOSSES[name]
    student, teacher = drawn(*own).requires_grad_(), drawn(*others, seed=1)
    assert torch.autograd.gradcheck(lambda a: loss(a, teacher), [student])


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_zero_at_equality_and_positive_elsewhere(name: str) -> None:
    loss, own, _ = LOSSES[name]
    student, other = drawn(*own), drawn(*own, seed=1)
    assert loss(student, student).abs().max() < 1e-14
    assert (loss(student, other) > 1e-4).all()
    slope = student.requires_grad_()
    loss(slope, student.detach()).sum().backward()
    assert slope.grad is not None
    assert slope.grad.abs().max() < 1e-12


# Response


def test_response_by_hand() -> None:
    """At T = 2 the teacher says 3/4 and 1/4, the student 1/2 and 1/2:
    4 (3/4 ln 3/2 + 1/4 ln 1/2) = 3 ln 3 - 4 ln 2."""
    teacher = torch.tensor([[2 * math.log(3), 0.0]])
    found = response(torch.zeros(1, 2), teacher, 2.0)
    assert found.tolist() == pytest.approx([3 * math.log(3) - 4 * math.log(2)])


def test_a_binary_response_is_that_of_two_classes() -> None:
    """A logit z is two logits, z and 0."""
    student, teacher = drawn(6), drawn(6, seed=1)

    def two(a: Tensor) -> Tensor:
        return torch.stack([a, torch.zeros_like(a)], 1)

    wanted = response(two(student), two(teacher), 2.5)
    torch.testing.assert_close(binary_response(student, teacher, 2.5), wanted)


def test_far_logits_stay_finite() -> None:
    far = torch.tensor([[1e4, -1e4]])
    assert response(far, -far, 1.0).tolist() == [2e4]
    assert binary_response(far, -far, 1.0).tolist() == [1e4]


@pytest.mark.parametrize("classes", [3, 10])
def test_its_gradient_keeps_its_size_as_the_temperature_rises(classes: int) -> None:
    """Hinton, Vinyals, Dean 2015, equation 4: at a high temperature the gradient of the cross
    entropy is (z - v) / (N T^2) for logits without mean; times T^2 it is (z - v) / N."""
    student, teacher = (a - a.mean() for a in (drawn(classes), drawn(classes, seed=1)))
    student.requires_grad_()
    response(student[None], teacher[None], 1e6).sum().backward()
    torch.testing.assert_close(
        student.grad, (student - teacher).detach() / classes, rtol=1e-3, atol=1e-5
    )


def seen(
    student: Tensor,
    teacher: Tensor | None = None,
    y: Tensor | None = None,
    at: tuple[Tensor, Tensor] | None = None,
    index: Tensor | None = None,
    weight: Tensor | None = None,
) -> Seen:
    batch = Batch(torch.zeros(len(student), 1), y, index, weight=weight)
    own, others = (
        ({}, {}) if at is None else ({HIDDEN: at[0], MAPS: at[0]}, {HIDDEN: at[1], MAPS: at[1]})
    )
    return Seen(batch, student, teacher, own, others)


def test_response_shares_between_truth_and_teacher() -> None:
    student, teacher, y = drawn(4, 3), drawn(4, 3, seed=1), torch.tensor([0, 2, 1, 1])
    truth, taught = F.cross_entropy(student, y), response(student, teacher, 4.0).mean()
    for share in (0.0, 0.3, 1.0):
        found = Response(share=share)(seen(student, teacher, y))
        torch.testing.assert_close(found, (1 - share) * truth + share * taught)


def test_response_of_one_logit_and_of_values() -> None:
    student, teacher = drawn(4), drawn(4, seed=1)
    yes = torch.tensor([0, 1, 1, 0])
    found = Response(2.0, 0.4, "binary")(seen(student, teacher, yes))
    truth = F.binary_cross_entropy_with_logits(student, yes.double())
    torch.testing.assert_close(
        found, 0.6 * truth + 0.4 * binary_response(student, teacher, 2.0).mean()
    )
    y = drawn(4, seed=2)
    wanted = 0.6 * F.mse_loss(student, y) + 0.4 * F.mse_loss(student, teacher)
    torch.testing.assert_close(
        Response(share=0.4, loss="squared")(seen(student, teacher, y)), wanted
    )
    own = Response(share=0.4, loss=lambda out, y: (out - y).abs())(seen(student, teacher, y))
    torch.testing.assert_close(
        own, 0.6 * F.l1_loss(student, y) + 0.4 * F.mse_loss(student, teacher)
    )


def test_whole_numbers_below_zero_are_values_to_a_squared_loss() -> None:
    """And padding to all others, where a teacher counts for nothing either."""
    out, teacher, y = drawn(3, 2), drawn(3, 2, seed=1), torch.tensor([[-3, 2], [-1, -2], [4, -1]])
    plain = F.mse_loss(out, y.double())
    torch.testing.assert_close(Supervised("squared")(seen(out, y=y)), plain)
    wanted = 0.6 * plain + 0.4 * F.mse_loss(out, teacher)
    found = Response(share=0.4, loss="squared")(seen(out, teacher, y))
    torch.testing.assert_close(found, wanted)
    own = Response(share=1.0, loss=lambda out, y: out.mean(1))
    each = (out - teacher).square()
    torch.testing.assert_close(own(seen(out, teacher, y)), (each[0, 1] + each[2, 0]) / 2)
    logits, taught = drawn(3, 2, 5), drawn(3, 2, 5, seed=1)
    each = (logits - taught).square().mean(-1)
    torch.testing.assert_close(own(seen(logits, taught, y)), (each[0, 1] + each[2, 0]) / 2)


def test_losses_on_the_truth_are_torchs() -> None:
    """Of sequences, the mean within each row first."""
    out, y = drawn(3, 4, 5), torch.tensor([[0, 4, 2, 1], [3, -1, -1, -1], [1, 1, -1, 0]])
    each = F.cross_entropy(out.transpose(1, 2), y, reduction="none", ignore_index=-1)
    wanted = torch.stack([each[0].mean(), each[1, 0], each[2].sum() / 3])
    torch.testing.assert_close(cross_entropy(out, y), wanted)
    torch.testing.assert_close(Supervised()(seen(out, y=y)), wanted.mean())
    logit, yes = drawn(4), torch.tensor([0, 1, -1, 0])
    wanted = F.binary_cross_entropy_with_logits(logit, yes.double(), reduction="none")
    torch.testing.assert_close(binary(logit, yes)[[0, 1, 3]], wanted[[0, 1, 3]])
    assert binary(logit, yes)[2] == 0
    with pytest.raises(TaskError, match=r"truths \[3\] do not fit logits \[3, 4, 5\]"):
        cross_entropy(out, y[:, 0])


def test_a_sum_weighs_its_terms() -> None:
    student, teacher, y = drawn(4, 3), drawn(4, 3, seed=1), torch.tensor([0, 2, 1, 1])
    one, two = Supervised(), Response(share=1.0)
    found = Sum((0.5, one), (3.0, two))
    assert found.needs_teacher
    assert not Sum((1.0, one)).needs_teacher
    what = seen(student, teacher, y)
    torch.testing.assert_close(found(what), 0.5 * one(what) + 3 * two(what))
    taps = Sum((1.0, Hints(student="a")), (1.0, Relation(student="b")), (1.0, Hints(student="a")))
    assert (taps.student_taps, taps.teacher_taps) == (("a", "b"), (HIDDEN,))


# Hints


def test_a_hint_by_hand() -> None:
    """(0 + 4) / 2; of a sequence, its first position alone: (1 + 9) / 2."""
    assert hint(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])).tolist() == [2]
    a, b = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 3.0], [7.0, 7.0]]])
    assert hint(a, b, torch.tensor([[True, False]])).tolist() == [5]


@pytest.mark.parametrize(
    ("own", "others", "kind"),
    [
        ((6, 3), (6, 5), nn.Linear),
        ((6, 4, 3), (6, 4, 5), nn.Linear),
        ((6, 3, 4, 4), (6, 5, 4, 4), nn.Conv2d),
        ((6, 3, 4, 4), (6, 5, 2, 2), nn.Conv2d),
        ((6, 3, 2, 2), (6, 5, 4, 6), nn.Conv2d),
    ],
)
def test_hints_go_through_a_regressor_that_can_be_right(
    own: tuple[int, ...], others: tuple[int, ...], kind: type[nn.Module]
) -> None:
    """Where the teacher has a linear map of what the student has, training the regressor alone
    brings the loss to 0; maps of other sizes are averaged down first."""
    student, maps = drawn(*own), len(own) == 4
    rule = (nn.Conv2d(3, 5, 1) if maps else nn.Linear(3, 5)).double()
    with torch.no_grad():
        teacher = rule(student)
        if maps:  # the averages of what is enlarged again are the same
            small = min(own[2], others[2]), min(own[3], others[3])
            teacher = F.interpolate(F.adaptive_avg_pool2d(teacher, small), others[2:])
    assert teacher.shape == others
    objective, what = Hints(3.0), seen(student, None, None, (student, teacher))
    objective.ready(what)
    (regressor,) = objective.regressors
    assert isinstance(regressor, kind)
    assert objective(what) > 1e-2
    size = teacher.square().mean().item()
    regressor.load_state_dict(rule.state_dict())
    assert objective(what) < 1e-20
    away = objective(seen(student, None, None, (student, teacher + 1)))
    assert away.item() == pytest.approx(3 / size)  # the weight, a distance of 1, and its unit


# Attention


def test_attention_by_hand() -> None:
    """Energies 9, 16 and 1, 0; divided by their lengths, the square root of 337 and 1."""
    student = torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]]])
    teacher = torch.tensor([[[[1.0, 0.0]]]])
    length = math.sqrt(337)
    wanted = ((9 / length - 1) ** 2 + (16 / length) ** 2) / 2
    assert attention(student, teacher).tolist() == pytest.approx([wanted])
    as_rows = [a.flatten(2).transpose(1, 2) for a in (student, teacher)]  # the same as sequences
    assert attention(*as_rows).tolist() == pytest.approx([wanted])
    longer = [F.pad(a, (0, 0, 0, 1), value=5.0) for a in as_rows]
    real = torch.tensor([[True, True, False]])
    assert attention(*longer, real).tolist() == pytest.approx([wanted])


@given(seed=st.integers(0, 99), scale=st.floats(0.1, 10))
def test_attention_sees_neither_scale_nor_order_nor_signs_of_channels(
    seed: int, scale: float
) -> None:
    student, teacher = drawn(2, 4, 3, 3, seed=seed), drawn(2, 6, 3, 3, seed=seed + 1)
    changed = -scale * student[:, [2, 0, 3, 1]]
    torch.testing.assert_close(attention(changed, teacher), attention(student, teacher))


def test_attention_needs_places_in_common() -> None:
    with pytest.raises(TaskError, match="have no places in common"):
        attention(drawn(2, 3, 5), drawn(2, 4, 5))
    with pytest.raises(TaskError, match="have no places in common"):
        attention(drawn(2, 3, 5), drawn(2, 4, 5, 5))
    with pytest.raises(TaskError, match="no places to attend to"):
        attention(drawn(2, 3), drawn(2, 3))


# Relation

LINE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
TRIANGLE = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3**0.5]])  # of equal sides


def test_relations_by_hand() -> None:
    """Distances 1, 1, 2 by their mean: 3/4, 3/4, 3/2, against 1, 1, 1: Huber's losses 1/32, 1/32,
    1/8. Cosines 1, -1, 1 against 1/2: 1/8, 3/2 - 1/2, 1/8."""
    assert distances(LINE)[0].tolist() == pytest.approx([0, 0.75, 1.5])
    assert angles(LINE)[1, 0].tolist() == pytest.approx([1, 0, -1])
    found = distance_relation(LINE, TRIANGLE), angle_relation(LINE, TRIANGLE)
    assert [f.item() for f in found] == pytest.approx([(1 / 32 + 1 / 32 + 1 / 8) / 3, 1.25 / 3])
    term = Relation()(seen(LINE, None, None, (LINE, TRIANGLE)))
    assert term.item() == pytest.approx(25 * found[0].item() + 50 * found[1].item())


@given(seed=st.integers(0, 99), n=st.integers(3, 6), scale=st.floats(0.1, 10))
def test_relations_see_neither_rotation_nor_shift_nor_scale(
    seed: int, n: int, scale: float
) -> None:
    a = drawn(n, 4, seed=seed)
    turn, _ = torch.linalg.qr(drawn(4, 4, seed=seed + 1))
    turned = scale * a @ turn + drawn(4, seed=seed + 2)
    for loss in (distance_relation, angle_relation):
        assert loss(turned, a) < 1e-12
        other = drawn(n, 5, seed=seed + 3)
        torch.testing.assert_close(loss(turned, other), loss(a, other))
        torch.testing.assert_close(loss(other, turned), loss(other, a))
    bent = a.clone()
    bent[0] += 1
    assert distance_relation(bent, a) > 1e-8


def test_relations_of_equal_and_of_few_rows_have_a_gradient_of_zero() -> None:
    for rows in (torch.ones(4, 3), torch.ones(2, 3), torch.ones(1, 3)):
        a = rows.clone().requires_grad_()
        total = distance_relation(a, drawn(len(rows), 2).float()) + angle_relation(a, rows)
        total.backward()  # type: ignore[no-untyped-call]
        assert a.grad is not None
        assert torch.equal(a.grad, torch.zeros_like(a))


def test_relations_of_rows_that_only_the_student_takes_for_one_have_a_small_gradient() -> None:
    """As a dead layer does: what divides by a length of 0 would have a slope without bounds."""
    for n in (2, 3, 5):
        student, teacher = drawn(n, 3).float(), drawn(n, 2, seed=1).float()
        student[1] = student[0]
        for a in (student, torch.zeros(n, 3)):
            a.requires_grad_()
            (25 * distance_relation(a, teacher) + 50 * angle_relation(a, teacher)).backward()
            assert a.grad is not None
            assert a.grad.abs().max() < 1e3


def test_relations_leave_out_rows_of_weight_zero() -> None:
    a, b = drawn(5, 3), drawn(5, 3, seed=1)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0])
    found = Relation()(seen(a, None, None, (a, b), weight=weight))
    some = weight > 0
    torch.testing.assert_close(found, Relation()(seen(a[some], None, None, (a[some], b[some]))))


# Contrast


def test_nce_by_its_definition() -> None:
    """p = exp(similarity) / Z, h = p / (p + N / M): -log h - sum log (1 - h)."""
    alike, unlike, z, m = [0.7, -0.3], [[0.1, 0.5, -2.0], [1.5, 0.0, 0.2]], 2.5, 10
    wanted = []
    for one, others in zip(alike, unlike, strict=True):
        h = [math.exp(s) / z / (math.exp(s) / z + 3 / m) for s in (one, *others)]
        wanted.append(-math.log(h[0]) - sum(math.log(1 - x) for x in h[1:]))
    found = nce(torch.tensor(alike), torch.tensor(unlike), torch.tensor(math.log(z)), m)
    assert found.tolist() == pytest.approx(wanted)


def test_nce_has_the_right_gradient_and_stays_finite() -> None:
    def loss(alike: Tensor, unlike: Tensor) -> Tensor:
        return nce(alike, unlike, torch.tensor(0.5), 7)

    assert torch.autograd.gradcheck(
        loss, [drawn(3).requires_grad_(), drawn(3, 4, seed=1).requires_grad_()]
    )
    assert torch.isfinite(loss(torch.tensor([-1e4]), torch.tensor([[1e4]]))).all()


def contrast(rows: int, negatives: int) -> tuple[Contrast, Seen, Tensor, Tensor]:
    a, b = drawn(3, 4), drawn(3, 5, seed=1)
    objective = Contrast(rows, negatives=negatives, width=6)
    what = seen(a, None, None, (a, b), torch.tensor([4, 0, 2]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        objective.ready(what)
    return objective, what, a, b


def test_contrast_by_its_definition() -> None:
    """Both anchors, each against the other's memory; 1 of 5 rows is its own, the rest may be
    drawn. Afterwards the memories have moved half of the way, and are of length 1 again."""
    objective, what, a, b = contrast(5, 4)
    before, log_z = objective.memory, objective.log_z
    assert torch.allclose(before.norm(dim=2), torch.ones(2, 5).double())
    own = [F.normalize(head(v)) for head, v in zip(objective.heads, (a, b), strict=True)]
    index = torch.tensor([4, 0, 2])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found = objective(what)
        torch.manual_seed(3)
        others = torch.randint(4, (2, 3, 4))
    total = 0.0
    for side in (0, 1):
        memory = before[1 - side]
        near = own[side] @ memory.T / 0.07
        assert log_z[side].item() == pytest.approx(math.log(5 * near.exp().mean().item()))
        for i, row in enumerate(index.tolist()):
            not_it = [j for j in range(5) if j != row]
            h = (near[i] - log_z[side]).exp()
            h = h / (h + 4 / 5)
            total -= math.log(h[row].item())
            total -= sum(math.log(1 - h[not_it[k]].item()) for k in others[side, i])
    assert found.item() == pytest.approx(0.8 * total / 3)
    for side in (0, 1):
        half = (before[side, index] + own[side]) / 2
        torch.testing.assert_close(objective.memory[side, index], F.normalize(half).detach())
        assert torch.equal(objective.memory[side, [1, 3]], before[side, [1, 3]])


def test_contrast_never_takes_a_row_for_its_own_opposite() -> None:
    """Of two rows the other is the only negative, and its similarity is all that counts."""
    a, b = drawn(1, 4), drawn(1, 5, seed=1)
    objective = Contrast(2, width=6)
    what = seen(a, None, None, (a, b), torch.tensor([1]))
    objective.ready(what)
    assert objective.negatives == 1
    own = [F.normalize(head(v)) for head, v in zip(objective.heads, (a, b), strict=True)]
    near = [own[i] @ objective.memory[1 - i].T / 0.07 for i in (0, 1)]
    wanted = sum(nce(n[:, 1], n[:, :1], objective.log_z[i], 2) for i, n in enumerate(near))
    torch.testing.assert_close(objective(what), 0.8 * wanted.sum())


def test_contrast_leaves_out_others_of_the_same_class() -> None:
    """Once it has seen them: of 4 rows in classes 0, 1, 0, 1 each has one other of its own. What
    is left counts for as many as were drawn. Nothing is left out where positions have classes."""
    a, b = drawn(4, 4), drawn(4, 5, seed=1)
    index, y = torch.arange(4), torch.tensor([0, 1, 0, 1])
    objective = Contrast(4, width=6, momentum=0.0)
    what = seen(a, None, y, (a, b), index)
    objective.ready(what)
    objective(what)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        others = torch.randint(3, (2, 4, 3))
    others += others >= index[:, None]
    assert ((others - index[:, None]) % 2 == 0).any()
    own = [F.normalize(head(v)) for head, v in zip(objective.heads, (a, b), strict=True)]
    wanted = []
    for side in (0, 1):
        near = own[side] @ objective.memory[1 - side].T / 0.07
        z = objective.log_z[side]
        for i in range(4):
            far = [near[i, j] for j in others[side, i].tolist() if (i - j) % 2]
            total = sum(nce(near[i, i], f[None], z + math.log(3), 4) for f in far)
            one = F.softplus(z + math.log(3 / 4) - near[i, i])
            wanted.append(one + (total - len(far) * one) * 3 / max(1, len(far)))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found = objective(what)
    torch.testing.assert_close(found, 0.8 * torch.stack(wanted).sum() / 4)
    assert objective.classes.tolist() == [0, 1, 0, 1]
    each = Contrast(4, width=6)
    tokens = drawn(4, 2, 4)
    what = seen(tokens, None, torch.zeros(4, 2, dtype=torch.int64), (tokens, tokens), index)
    each.ready(what)
    each(what)
    assert each.classes.tolist() == [-1] * 4


def test_contrast_remembers_in_training_alone_and_trains_both_heads() -> None:
    objective, what, _, _ = contrast(9, 4)
    before = objective.memory
    objective.eval()(what)
    assert torch.equal(objective.memory, before)
    objective.train()(what).backward()
    assert not torch.equal(objective.memory, before)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters())


def test_attention_and_hints_sum_over_pairs_of_taps() -> None:
    a, b = drawn(2, 3, 4, 4), drawn(2, 5, 4, 4, seed=1)
    batch = Batch(torch.zeros(2, 1))
    what = Seen(batch, a, None, {"p": a, "q": b}, {"r": b, "s": a})
    both = Attention(student=("p", "q"), teacher=("r", "s"))(what)
    wanted = 1000 * (attention(a, b).mean() + attention(b, a).mean())
    torch.testing.assert_close(both, wanted)
    hints = Hints(student=("p", "q"), teacher=("r", "s"))
    hints.ready(what)
    parts = [hint(hints.regressors[0](a), b).mean(), hint(hints.regressors[1](b), a).mean()]
    wanted = parts[0] / b.square().mean() + parts[1] / a.square().mean()
    torch.testing.assert_close(hints(what), 10 * wanted)
