"""The loss of a step is the sum over its micro-batches, and is the equation in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grace.distill.gdkd import confidence_gate, gated_dkd, kl_per_token
from grace.distill.objective import LossParts, micro_batch_loss
from grace.distill.rcka import rcka_loss

BETA, OMEGA, VOCABULARY = 0.7, 3.0, 13


def plain_head(logits_TV: Tensor) -> Tensor:
    """The head that makes hidden states their own logits."""
    return torch.eye(logits_TV.shape[-1], dtype=logits_TV.dtype)


def loss_of(student_TV: Tensor, targets_T: Tensor, teacher_TV: Tensor | None = None, **options: Any):
    """`micro_batch_loss` of logits."""
    teacher = (
        {}
        if teacher_TV is None
        else {"teacher_hidden_TE": teacher_TV, "teacher_head_VE": plain_head(teacher_TV)}
    )
    return micro_batch_loss(student_TV, plain_head(student_TV), targets_T, **teacher, **options)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


class Step:
    """Eight tokens and three images (one of them degenerate), to be cut into micro-batches."""

    def __init__(self) -> None:
        self.student_TV = randn(8, VOCABULARY, seed=0).requires_grad_()
        self.teacher_TV = randn(8, VOCABULARY, seed=1)
        self.targets_T = torch.tensor([0, 3, 12, 5, 5, 1, 7, 2])
        sizes = (5, 4, 6)
        self.visual = [randn(n, 8, seed=10 + n).requires_grad_() for n in sizes]
        self.teacher_visual = [randn(n, 6, seed=20 + n) for n in sizes]
        self.teacher_visual[1] = torch.ones(4, 6)
        self.gate_T = confidence_gate(self.teacher_TV)

    def leaves(self) -> list[Tensor]:
        return [self.student_TV, *self.visual]

    def loss(
        self, kind: str, tokens: slice = slice(None), images: slice = slice(None)
    ) -> tuple[Tensor, LossParts]:
        return loss_of(
            self.student_TV[tokens],
            self.targets_T[tokens],
            self.teacher_TV[tokens],
            token_count=8.0,
            gate_T=self.gate_T[tokens],
            gate_sum=self.gate_T.sum().item(),
            beta=BETA,
            kind=kind,
            student_visual=self.visual[images],
            teacher_visual=self.teacher_visual[images],
            image_count=2.0,
            omega=OMEGA,
        )

    def expected(self, kind: str) -> Tensor:
        student_TV, teacher_TV = self.student_TV.double(), self.teacher_TV.double()
        ce = -F.log_softmax(student_TV, -1)[range(8), self.targets_T].mean()
        kd = {
            "none": 0.0,
            "kl": kl_per_token(student_TV, teacher_TV).mean(),
            "gkl": (oracle_T := confidence_gate(teacher_TV))
            @ kl_per_token(student_TV, teacher_TV)
            / oracle_T.sum(),
            "gdkd": gated_dkd(student_TV, teacher_TV, self.targets_T),
        }[kind]
        good = [0, 2]
        rcka = rcka_loss([self.visual[i].double() for i in good], [self.teacher_visual[i] for i in good])
        return ce + BETA * kd + OMEGA * rcka


def gradients(total: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total, leaves, retain_graph=True, materialize_grads=True))


@pytest.mark.parametrize("kind", ["none", "kl", "gkl", "gdkd"])
def test_whole_step_is_the_equation(kind: str) -> None:
    step = Step()
    total, parts = step.loss(kind)
    expected = step.expected(kind)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for got, want in zip(gradients(total, step.leaves()), gradients(expected, step.leaves()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert (parts.images.item(), parts.degenerate.item()) == (3, 1)
    kd_norm = {"none": 1.0, "kl": 8.0}.get(kind, step.gate_T.sum().item())
    again = parts.ce_sum / 8 + BETA * parts.kd_sum / kd_norm + OMEGA * parts.rcka_sum / 2
    assert again.item() == pytest.approx(total.item(), rel=1e-6)
    assert not any(part.requires_grad for part in vars(parts).values())
    by_image = {"relation_N": parts.relation_N, "compared_N": parts.compared_N}
    assert all(part.shape == () for name, part in vars(parts).items() if name not in by_image)
    assert all(part.shape == (3,) for part in by_image.values())
    assert parts.relation_N.sum() == parts.rcka_sum and (~parts.compared_N).sum() == parts.degenerate


CUTS = {
    "2 x 4": [(slice(0, 4), slice(0, 1)), (slice(4, 8), slice(1, 3))],
    "uneven, one without images": [(slice(0, 1), slice(0, 0)), (slice(1, 8), slice(0, 3))],
    "one without tokens": [(slice(0, 0), slice(0, 2)), (slice(0, 8), slice(2, 3))],
    "one empty": [(slice(0, 8), slice(0, 3)), (slice(8, 8), slice(3, 3))],
    "single tokens": [(slice(i, i + 1), slice(i, i + 1)) for i in range(8)],
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["none", "kl", "gkl", "gdkd"])
def test_micro_batches_add_up_to_the_step(kind: str, cut: str) -> None:
    step = Step()
    whole, parts = step.loss(kind)
    pieces = [step.loss(kind, tokens, images) for tokens, images in CUTS[cut]]
    total = torch.stack([piece for piece, _ in pieces]).sum()
    assert total.item() == pytest.approx(whole.item(), rel=1e-6)
    for got, want in zip(gradients(total, step.leaves()), gradients(whole, step.leaves()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    for name, value in vars(parts).items():
        assert sum(getattr(p, name).sum().item() for _, p in pieces) == pytest.approx(
            value.sum().item(), rel=1e-5
        )


@pytest.mark.parametrize("kind", ["none", "kl", "gdkd"])
def test_empty_micro_batch_gives_zero_with_a_graph(kind: str) -> None:
    student_TV = torch.zeros(0, VOCABULARY, requires_grad=True)
    total, parts = loss_of(
        student_TV, torch.zeros(0, dtype=torch.long), torch.zeros(0, VOCABULARY),
        token_count=5.0, gate_sum=4.0, beta=BETA, kind=kind,
    )  # fmt: skip
    total.backward()
    assert total.item() == 0 and student_TV.grad is not None
    assert all(part.sum().item() == 0 for part in vars(parts).values())


def test_gates_default_to_the_teachers_confidence() -> None:
    step = Step()
    arguments = {"token_count": 8.0, "gate_sum": 5.0, "beta": BETA, "kind": "gdkd"}
    given, _ = loss_of(step.student_TV, step.targets_T, step.teacher_TV, gate_T=step.gate_T, **arguments)
    taken, _ = loss_of(step.student_TV, step.targets_T, step.teacher_TV, **arguments)
    torch.testing.assert_close(given, taken)


@pytest.mark.parametrize(("student", "teacher"), [(13, 16), (16, 13)])
@pytest.mark.parametrize("kind", ["kl", "gdkd"])
def test_distillation_compares_the_vocabulary_that_both_have(kind: str, student: int, teacher: int) -> None:
    student_TV, teacher_TV = randn(4, student, seed=0), randn(4, teacher, seed=1)
    targets_T = torch.tensor([0, 3, 12, 5])
    arguments = {"token_count": 4.0, "gate_sum": 4.0, "gate_T": torch.ones(4), "kind": kind}
    _, parts = loss_of(student_TV, targets_T, teacher_TV, **arguments)
    _, cut = loss_of(student_TV[:, :13], targets_T, teacher_TV[:, :13], **arguments)
    torch.testing.assert_close(parts.kd_sum, cut.kd_sum)
    ce_sum = F.cross_entropy(student_TV.double(), targets_T, reduction="sum")
    assert parts.ce_sum.item() == pytest.approx(ce_sum.item(), rel=1e-6)


def test_bfloat16_logits_are_computed_in_float32() -> None:
    step = Step()
    student_TV = step.student_TV.detach().bfloat16().requires_grad_()
    total, _ = loss_of(student_TV, step.targets_T, token_count=8.0)
    total.backward()
    expected = F.cross_entropy(student_TV.detach().double(), step.targets_T)
    assert total.dtype == torch.float32 and total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert student_TV.grad is not None and student_TV.grad.dtype == torch.bfloat16


def test_the_teacher_gets_no_gradient() -> None:
    step = Step()
    step.teacher_TV.requires_grad_()
    step.gate_T = confidence_gate(step.teacher_TV)
    total, _ = step.loss("gdkd")
    total.backward()
    assert step.teacher_TV.grad is None


TEACHER = {"teacher_hidden_TE": torch.zeros(2, 5), "teacher_head_VE": torch.zeros(3, 5)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "dkd"}, 'kind must be "none", "kl", "gkl" or "gdkd"'),
        ({"token_count": 0.0}, "token_count must be positive"),
        ({"token_count": math.nan}, "token_count must be positive"),
        ({"kind": "gdkd"}, "needs teacher_hidden_TE"),
        ({"kind": "kl"}, "needs teacher_hidden_TE"),
        ({"kind": "gkl", **TEACHER}, "needs gate_T"),
        ({"kind": "gdkd", **TEACHER}, "gate_sum must be positive, got None"),
        (
            {
                "kind": "gdkd",
                **TEACHER,
                "gate_sum": 1.0,
                "gate_T": torch.ones(3),
            },
            "gates",
        ),
        ({"targets_T": torch.zeros(3, dtype=torch.long)}, "do not fit"),
        (
            {"student_visual": [torch.eye(2)], "teacher_visual": [torch.eye(2)], "image_count": 0.0},
            "image_count must be positive",
        ),
        ({"teacher_visual": [torch.eye(2)]}, "0 images of the student against 1"),
    ],
)
def test_missing_or_unfit_ingredients_are_refused(change: dict, message: str) -> None:
    arguments = {
        "student_hidden_TD": torch.zeros(2, 4),
        "student_head_VD": torch.zeros(3, 4),
        "targets_T": torch.zeros(2, dtype=torch.long),
        "token_count": 2.0,
    }
    with pytest.raises(ValueError, match=message):
        micro_batch_loss(**{**arguments, **change})
