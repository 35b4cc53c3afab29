"""Relational distillation of visual tokens: centred kernel alignment, image by image.

DESIGN section 4 (arXiv:2601.22709); CKA after Kornblith et al. 2019. Per image, with the hidden
states of its visual tokens as rows, l2-normalised:

    K = V V^T,   K_c = H K H,  H = I - 1 1^T / n
    L = 1 - <K_T, K_S> / (|K_T| |K_S|) = 1/2 | K_T / |K_T| - K_S / |K_S| |^2

(Frobenius; K_c on both sides.) The right-hand form is the one computed: it does not lose its digits
where teacher and student nearly agree. `grace.distill.rcka_fused` computes it for many images at once;
`rcka_per_image_plain` says the same image by image, for tests to compare with.

An image is degenerate when its tokens are all the same up to scale, which includes having one token
or none: |K_c| <= DEGENERATE_TOLERANCE * n for the teacher or the student. It contributes neither
to the sum nor to the number of images, and gets a zero gradient.

Shape suffixes: N images, B images of a batch, n tokens of one image, d features, S the student's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grace.distill.rcka_fused import DEGENERATE_TOLERANCE, Form, Space, batch_loss, batches

__all__ = [
    "DEGENERATE_TOLERANCE",
    "gram_is_degenerate",
    "rcka_in_space",
    "rcka_loss",
    "rcka_per_image",
    "rcka_per_image_plain",
    "rcka_to_grams",
    "teacher_gram",
]


def rcka_loss(student_visual: Sequence[Tensor], teacher_visual: Sequence[Tensor]) -> Tensor:
    """Mean over the non-degenerate images of 1 - CKA, in [0, 2]; 0 with zero gradients if there are none.

    Args:
        student_visual, teacher_visual: per image the hidden states of the same n_i tokens,
            [n_i, d_student] and [n_i, d_teacher]. The teacher gets no gradient.

    Raises:
        ValueError: the images or their tokens do not pair up.
    """
    loss_N, valid_N = rcka_per_image(student_visual, teacher_visual)
    return loss_N.sum() / valid_N.sum().clamp(min=1)


def rcka_per_image(
    student_visual: Sequence[Tensor], teacher_visual: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """1 - CKA of every image [N] (0 where degenerate), and which images are not degenerate [N] bool.

    Args and errors as `rcka_loss`. Float32, or float64 where an input is; never waits for the device.
    """
    return rcka_in_space(student_visual, teacher_visual, None)


def rcka_to_grams(student_visual: Sequence[Tensor], teacher_grams: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """As `rcka_per_image`, from the teacher's Gram matrices [n_i, n_i] (`teacher_gram`, up to any factor)."""
    _check_count(student_visual, teacher_grams)
    for student, gram in zip(student_visual, teacher_grams, strict=True):
        if student.ndim != 2 or gram.shape != (len(student), len(student)):
            raise ValueError(
                f"visual tokens of student {tuple(student.shape)} do not fit a Gram matrix {tuple(gram.shape)}"
            )
    return _compare(student_visual, teacher_grams, "gram")


@torch.no_grad()
def teacher_gram(visual: Tensor) -> Tensor:
    """K_c [n, n] of an image's tokens [n, d], divided by its largest entry; zeros where it is degenerate.

    CKA does not see the factor; with it the entries keep their digits in 16 bits.
    """
    gram_nn = _product(_centred_rows(visual))
    if not len(gram_nn):
        return gram_nn
    peak = torch.where(_is_degenerate(gram_nn, len(visual)), torch.inf, gram_nn.abs().amax())
    return gram_nn / peak


def rcka_in_space(
    student_visual: Sequence[Tensor], teacher_visual: Sequence[Tensor], space: Space | None
) -> tuple[Tensor, Tensor]:
    """As `rcka_per_image`, all images in the space given; None is the cheaper one of each image."""
    _check(student_visual, teacher_visual)
    return _compare(student_visual, teacher_visual, space)


def _compare(
    student_visual: Sequence[Tensor], teacher_visual: Sequence[Tensor], space: Form | None
) -> tuple[Tensor, Tensor]:
    if not student_visual:
        return torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    teacher = tuple(visual.detach() for visual in teacher_visual)
    # Inside `forward` autograd is always off: whether a gradient is wanted can only be seen here.
    gradient = torch.is_grad_enabled()
    return _RelationalCka.apply(teacher, space, gradient, *student_visual)  # type: ignore[return-value]


@torch.no_grad()
def gram_is_degenerate(visual: Tensor) -> Tensor:
    """Whether an image's tokens [n, d] carry no relations: a 0-d bool tensor, without a host sync."""
    rows = _centred_rows(visual)
    if rows.shape[0] > rows.shape[1]:
        rows = rows.T  # |R^T R| = |R R^T|
    return _is_degenerate(_product(rows), len(visual))


def rcka_per_image_plain(
    student_visual: Sequence[Tensor], teacher_visual: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The definition, one image after the other and differentiated by autograd; as `rcka_per_image`."""
    _check(student_visual, teacher_visual)
    if not student_visual:
        return torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    pairs = [_image_loss(s, t) for s, t in zip(student_visual, teacher_visual, strict=True)]
    losses, valid = zip(*pairs, strict=True)
    return torch.stack(losses), torch.stack(valid)


class _RelationalCka(torch.autograd.Function):
    """The gradient is formed in the forward pass, while an image's matrices are there, and only scaled in
    the backward pass: between the two, one float32 tensor of the student's shape is kept."""

    @staticmethod
    def forward(
        ctx: Any, teacher: tuple[Tensor, ...], space: Form | None, gradient: bool, *student: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if torch.float64 in {v.dtype for v in (*student, *teacher)} else torch.float32
        nothing = student[0].new_zeros((), dtype=dtype)
        losses, valid = [nothing] * len(student), [nothing.bool()] * len(student)
        ctx.like = [(s.shape, s.dtype, s.device) for s in student]
        ctx.batches, gradients = [], []
        for batch_space, batch in batches(student, teacher, space):
            images = [student[i] for i in batch], [teacher[i] for i in batch]
            wanted = gradient and any(ctx.needs_input_grad[3 + i] for i in batch)
            result = batch_loss(*images, batch_space, gradient=wanted)
            parts = result.loss_B.to(dtype).unbind(), result.valid_B.unbind()
            for i, loss, is_valid in zip(batch, *parts, strict=True):
                losses[i], valid[i] = loss, is_valid
            if result.gradient_BnS is not None:
                ctx.batches.append(batch)
                # Not in 16 bits: it would be rounded twice, and in float16 vanish before it meets the loss scale.
                kept = torch.promote_types(images[0][0].dtype, torch.float32)
                gradients.append(result.gradient_BnS.to(kept))
        ctx.save_for_backward(*gradients)
        valid_N = torch.stack(valid)
        ctx.mark_non_differentiable(valid_N)
        return torch.stack(losses), valid_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads: dict[int, Tensor] = {}
        upstream = grad_N.unbind()
        for batch, gradient_BnS in zip(ctx.batches, ctx.saved_tensors, strict=True):
            scale_B11 = torch.stack([upstream[i] for i in batch])[:, None, None]
            scaled_BnS = (gradient_BnS * scale_B11).to(ctx.like[batch[0]][1])
            for i, image_nS in zip(batch, scaled_BnS.unbind(), strict=True):
                grads[i] = image_nS[: ctx.like[i][0][0]]
        results: list[Tensor | None] = []
        for i, (shape, dtype, device) in enumerate(ctx.like):
            if not ctx.needs_input_grad[3 + i]:
                results.append(None)
            else:  # an image without tokens or features is in no batch
                results.append(grads[i] if i in grads else torch.zeros(shape, dtype=dtype, device=device))
        return None, None, None, *results


def _check_count(student_visual: Sequence[Tensor], teacher_visual: Sequence[Tensor]) -> None:
    if len(student_visual) != len(teacher_visual):
        raise ValueError(
            f"{len(student_visual)} images of the student against {len(teacher_visual)} of the teacher"
        )


def _check(student_visual: Sequence[Tensor], teacher_visual: Sequence[Tensor]) -> None:
    _check_count(student_visual, teacher_visual)
    for student, teacher in zip(student_visual, teacher_visual, strict=True):
        if student.ndim != 2 or teacher.ndim != 2 or student.shape[0] != teacher.shape[0]:
            raise ValueError(
                f"visual tokens of student {tuple(student.shape)} and teacher {tuple(teacher.shape)} do not pair up"
            )


def _image_loss(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - CKA or 0, valid), both 0-d."""
    n = len(student)
    student_nn = _product(_centred_rows(student))
    with torch.no_grad():
        teacher_nn = _product(_centred_rows(teacher))
        valid = ~(_is_degenerate(teacher_nn, n) | _is_degenerate(student_nn, n))
    difference_nn = _unit(teacher_nn, valid) - _unit(student_nn, valid)
    return torch.where(valid, 0.5 * difference_nn.square().sum(), 0.0), valid


def _centred_rows(visual: Tensor) -> Tensor:
    """H V [n, d] of the l2-normalised rows; a zero row counts as zero and gets a zero gradient."""
    visual = visual if visual.dtype == torch.float64 else visual.float()
    if visual.numel() == 0:
        return visual
    # Scaled by their peak first, rows neither overflow nor vanish when squared.
    peak_n1 = visual.detach().abs().amax(-1, keepdim=True)
    empty_n1 = peak_n1 == 0
    scaled = visual / torch.where(empty_n1, 1.0, peak_n1)
    length_n1 = torch.where(empty_n1, 1.0, scaled.square().sum(-1, keepdim=True)).sqrt()
    rows = torch.where(empty_n1, 0.0, scaled / length_n1)
    return rows - rows.mean(0, keepdim=True)


def _product(rows: Tensor) -> Tensor:
    """R R^T."""
    with torch.autocast(rows.device.type, enabled=False):  # low precision would swamp near-equal tokens
        return rows @ rows.T


def _is_degenerate(gram: Tensor, tokens: int) -> Tensor:
    # `<=`, so that NaN is not degenerate: it must reach the loss and stop the run.
    return torch.linalg.matrix_norm(gram) <= DEGENERATE_TOLERANCE * tokens


def _unit(gram_nn: Tensor, valid: Tensor) -> Tensor:
    """gram / |gram|; where invalid a harmless stand-in whose gradient is finite."""
    square = torch.where(valid, gram_nn.square().sum(), 1.0)
    return gram_nn * square.rsqrt()
