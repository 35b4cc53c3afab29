"""Relational distillation of visual tokens: centred kernel alignment, image by image.

DESIGN section 4 (arXiv:2601.22709); CKA after Kornblith et al. 2019. Per image, with the hidden
states of its visual tokens as rows, l2-normalised:

    K = V V^T,   K_c = H K H,  H = I - 1 1^T / n
    L = 1 - <K_T, K_S> / (|K_T| |K_S|) = 1/2 | K_T / |K_T| - K_S / |K_S| |^2

(Frobenius; K_c on both sides.) The right-hand form is the one computed: it does not lose its digits
where teacher and student nearly agree.

An image is degenerate when its tokens are all the same up to scale, which includes having one token
or none: |K_c| <= DEGENERATE_TOLERANCE * n for the teacher or the student. It contributes neither
to the sum nor to the number of images, and gets a zero gradient.

Shape suffixes: N images, n tokens of one image, d features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Unit rows that deviate from their mean by r each have |K_c| <= n r^2. 1e-10 is r = 1e-5: a hundred
# times float32 rounding, and far below what distinguishes real tokens.
DEGENERATE_TOLERANCE = 1e-10


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
    if len(student_visual) != len(teacher_visual):
        raise ValueError(
            f"{len(student_visual)} images of the student against {len(teacher_visual)} of the teacher"
        )
    if not student_visual:
        return torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    pairs = [_image_loss(s, t) for s, t in zip(student_visual, teacher_visual, strict=True)]
    losses, valid = zip(*pairs, strict=True)
    return torch.stack(losses), torch.stack(valid)


@torch.no_grad()
def gram_is_degenerate(visual: Tensor) -> Tensor:
    """Whether an image's tokens [n, d] carry no relations: a 0-d bool tensor, without a host sync."""
    return _is_degenerate(_centred_gram(visual))


def _image_loss(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - CKA or 0, valid), both 0-d."""
    if student.ndim != 2 or teacher.ndim != 2 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"visual tokens of student {tuple(student.shape)} and teacher {tuple(teacher.shape)} do not pair up"
        )
    student_nn = _centred_gram(student)
    with torch.no_grad():
        teacher_nn = _centred_gram(teacher)
        valid = ~(_is_degenerate(teacher_nn) | _is_degenerate(student_nn))
    difference_nn = _unit(teacher_nn, valid) - _unit(student_nn, valid)
    return torch.where(valid, 0.5 * difference_nn.square().sum(), 0.0), valid


def _centred_gram(visual: Tensor) -> Tensor:
    """H V V^T H [n, n] of the l2-normalised rows; a zero row stays zero and gets a zero gradient."""
    visual = visual if visual.dtype == torch.float64 else visual.float()
    if visual.numel() == 0:
        return visual.sum() + visual.new_zeros(visual.shape[0], visual.shape[0])
    # Scaled by their peak first, rows neither overflow nor vanish when squared.
    peak_n1 = visual.detach().abs().amax(-1, keepdim=True)
    empty_n1 = peak_n1 == 0
    scaled = visual / torch.where(empty_n1, 1.0, peak_n1)
    length_n1 = torch.where(empty_n1, 1.0, scaled.square().sum(-1, keepdim=True)).sqrt()
    rows = torch.where(empty_n1, 0.0, scaled / length_n1)
    rows = rows - rows.mean(0, keepdim=True)
    with torch.autocast(visual.device.type, enabled=False):  # low precision would swamp near-equal tokens
        return rows @ rows.T


def _is_degenerate(gram_nn: Tensor) -> Tensor:
    # `<=`, so that NaN is not degenerate: it must reach the loss and stop the run.
    return torch.linalg.matrix_norm(gram_nn) <= DEGENERATE_TOLERANCE * gram_nn.shape[0]


def _unit(gram_nn: Tensor, valid: Tensor) -> Tensor:
    """gram / |gram|; where invalid a harmless stand-in whose gradient is finite."""
    square = torch.where(valid, gram_nn.square().sum(), 1.0)
    return gram_nn * square.rsqrt()
