"""1 - CKA of many images at once with its gradient, in padded batches and whichever space is cheaper.

With the l2-normalised, centred rows R [n, d] of an image, K = R R^T, A = K_S / |K_S|, B = K_T / |K_T|
(Frobenius norms), equations of `grace.distill.rcka`:

    tokens    L = 1/2 |A - B|^2,         dL/dR_S = 2 ((A - B) - L A) R_S / |K_S|
    features  L = 1 - c,                 dL/dR_S = 2 (c R_S (R_S^T R_S) / |K_S| - R_T (R_T^T R_S) / |K_T|) / |K_S|
              c = |R_T^T R_S|^2 / (|K_S| |K_T|),   |K| = |R^T R|

Back through the centring, dL/dR_S loses the mean of its rows, which is zero but for rounding: in token
space it is taken from the columns of the n x n factor, in feature space float64 makes it negligible. Back
through r = v / |v|: dv = (dr - r <r, dr>) / |v|.

Everything that decides what to compute is a shape, so that nothing waits for the device.

Shape suffixes: B images of a batch, n tokens (padded to the largest of the batch), S / T
features of student / teacher, d either's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Space = Literal["tokens", "features"]
# What a batch is computed from: rows of both models in one of the spaces, or the teacher's Gram as it is.
Form = Space | Literal["gram"]

# Unit rows that deviate from their mean by r each have |K_c| <= n r^2. 1e-10 is r = 1e-5: a hundred
# times float32 rounding, and far below what distinguishes real tokens.
DEGENERATE_TOLERANCE = 1e-10

# Bytes of a batch's intermediate tensors; one image may exceed it. On a CPU they then stay in cache.
BATCH_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
# Multiply-adds wasted on padding that cost no more than another batch does: some 50 calls.
PADDING_SLACK = {"cpu": 10**7, "cuda": 2 * 10**9}
# A symmetric product of more rows than this is cut in blocks, of which those above the diagonal are copied.
SYMMETRIC_LEAF = {"cpu": 64, "cuda": 512}


class ImageShape(NamedTuple):
    """Tokens of an image, and features of student and teacher."""

    tokens: int
    student: int
    teacher: int


def multiply_adds(shape: ImageShape, space: Form) -> int:
    """Of the matrix products, forward and backward: three symmetric or plain Grams and the gradient's."""
    n, s, t = shape
    if space != "features":
        return n * n * (s + t) // 2 + n * n * s
    return n * (s * s + t * t) // 2 + n * s * t + n * s * (s + t)


def cheaper_space(shape: ImageShape) -> Space:
    """The space that costs less for an image.

    Feature space counts twice because it runs in float64: its loss is 1 - c, which in float32 would have
    no digit left where teacher and student nearly agree. It is for images with several times more tokens
    than features, and then also the one without an n x n matrix.
    """
    return "features" if 2 * multiply_adds(shape, "features") < multiply_adds(shape, "tokens") else "tokens"


def plan_batches(shapes: Sequence[ImageShape], space: Form, max_bytes: int, slack: int) -> list[list[int]]:
    """Cuts images of the same widths into batches to be padded to their largest; returns indices.

    Largest first; an image joins unless the batch would then exceed `max_bytes`, waste more than
    `slack` multiply-adds on padding, or hold that image with more padding than tokens.
    """
    plan: list[list[int]] = []
    largest, waste = ImageShape(0, 0, 0), 0
    for index in sorted(range(len(shapes)), key=lambda i: -shapes[i].tokens):
        shape = shapes[index]
        more = waste + multiply_adds(largest, space) - multiply_adds(shape, space)
        fits = plan and _image_bytes(largest, space) * (len(plan[-1]) + 1) <= max_bytes
        if fits and more <= slack and largest.tokens <= 2 * shape.tokens:
            plan[-1].append(index)
            waste = more
        else:
            plan.append([index])
            largest, waste = shape, 0
    return plan


def _image_bytes(shape: ImageShape, space: Form) -> int:
    n, s, t = shape
    if space != "features":
        return 4 * (n * (2 * s + t) + 3 * n * n)
    return 8 * (n * (3 * s + t) + s * s + s * t + t * t)


@dataclass(frozen=True)
class _Rows:
    """The rows of a batch. Padded rows are zero and so are their factors.

    Attributes:
        centred_Bnd: normalised and centred.
        mean_B1d: what centring took away.
        per_length_Bn: 1 / |v|; 0 for a row of zeros, which gets no gradient.
        count_B: tokens of each image.
    """

    centred_Bnd: Tensor
    mean_B1d: Tensor
    per_length_Bn: Tensor
    count_B: Tensor


class BatchResult(NamedTuple):
    """Per image of a batch: 1 - CKA or 0 [B], not degenerate [B], gradient [B, n, S] (padded) if wanted."""

    loss_B: Tensor
    valid_B: Tensor
    gradient_BnS: Tensor | None


def batches(
    student: Sequence[Tensor], teacher: Sequence[Tensor], space: Form | None = None
) -> list[tuple[Form, list[int]]]:
    """Batches (form, indices) of images with the same widths and dtypes.

    Args:
        student, teacher: per image [n_i, S] and [n_i, T] (Gram matrices [n_i, n_i] in form "gram"), all on
            one device. An image without tokens or features is in no batch.
        space: None takes the cheaper one, image by image.
    """
    pairs = zip(student, teacher, strict=True)
    # A Gram counts as one feature: its size is that of the tokens.
    shapes = [ImageShape(s.shape[0], s.shape[1], 1 if space == "gram" else t.shape[1]) for s, t in pairs]
    groups: dict[tuple[Form, tuple[Any, ...]], list[int]] = {}
    for i, shape in enumerate(shapes):
        if 0 not in shape:
            alike = (shape.student, shape.teacher, student[i].dtype, teacher[i].dtype)
            groups.setdefault((space or cheaper_space(shape), alike), []).append(i)
    return [
        (key[0], [group[i] for i in batch])
        for key, group in groups.items()
        for batch in plan_batches(
            [shapes[i] for i in group],
            key[0],
            _by_device(BATCH_BYTES, student[0]),
            _by_device(PADDING_SLACK, student[0]),
        )
    ]


def batch_loss(student: list[Tensor], teacher: list[Tensor], space: Form, *, gradient: bool) -> BatchResult:
    """Losses and, if wanted, gradients of the images of one of `batches`; float64 in or of feature space."""
    wide = space == "features" or torch.float64 in (student[0].dtype, teacher[0].dtype)
    dtype = torch.float64 if wide else torch.float32
    # Autocast off: low precision would swamp tokens that are nearly the same.
    with torch.autocast(student[0].device.type, enabled=False):
        if space == "features":
            return _feature_space(student, teacher, dtype, gradient)
        if space == "gram":
            return _token_space(student, _padded_grams(teacher, dtype), dtype, gradient)
        b_Bnn = symmetric_product(_centred_rows(teacher, dtype).centred_Bnd)
        return _token_space(student, b_Bnn, dtype, gradient)


def _by_device(values: dict[str, int], tensor: Tensor) -> int:
    return values.get(tensor.device.type, values["cuda"])


def _centred_rows(images: list[Tensor], dtype: torch.dtype) -> _Rows:
    """l2-normalised rows less their mean, padded with zeros."""
    sizes = [image.shape[0] for image in images]
    padded = min(sizes) < max(sizes)
    rows_Bnd = (pad_sequence(images, batch_first=True) if padded else torch.stack(images)).to(dtype)
    # Not `torch.tensor(sizes, device=...)`, which waits until the copy has been made.
    count_B = torch.tensor(sizes).to(rows_Bnd.device, non_blocking=True)
    # Scaled by their peak first, rows neither overflow nor vanish when squared.
    peak_Bn1 = torch.maximum(rows_Bnd.amax(-1, keepdim=True), -rows_Bnd.amin(-1, keepdim=True))
    empty_Bn1 = peak_Bn1 == 0
    peak_Bn1.masked_fill_(empty_Bn1, 1.0)
    rows_Bnd.div_(peak_Bn1)
    length_Bn1 = torch.linalg.vector_norm(rows_Bnd, dim=-1, keepdim=True).masked_fill_(empty_Bn1, 1.0)
    rows_Bnd.div_(length_Bn1)
    mean_B1d = rows_Bnd.sum(1, keepdim=True).div_(count_B[:, None, None])
    rows_Bnd.sub_(mean_B1d)
    if padded:
        padding_Bn = torch.arange(rows_Bnd.shape[1], device=rows_Bnd.device) >= count_B[:, None]
        rows_Bnd.masked_fill_(padding_Bn[:, :, None], 0.0)
    per_length_Bn = length_Bn1.mul_(peak_Bn1).reciprocal_().masked_fill_(empty_Bn1, 0.0).squeeze(-1)
    return _Rows(rows_Bnd, mean_B1d, per_length_Bn, count_B)


def _padded_grams(grams: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Copies [B, n, n], padded with zeros."""
    largest = max(len(gram) for gram in grams)
    padded_Bnn = grams[0].new_zeros(len(grams), largest, largest, dtype=dtype)
    for padded_nn, gram in zip(padded_Bnn, grams, strict=True):
        padded_nn[: len(gram), : len(gram)] = gram
    return padded_Bnn


def _token_space(student: list[Tensor], b_Bnn: Tensor, dtype: torch.dtype, gradient: bool) -> BatchResult:
    """From the teacher's Gram matrices, which are consumed."""
    rows_S = _centred_rows(student, dtype)
    student_BnS = rows_S.centred_Bnd
    a_Bnn = symmetric_product(student_BnS)
    norm_S, norm_T = frobenius(a_Bnn), frobenius(b_Bnn)
    valid_B = _both_valid(norm_S, norm_T, rows_S.count_B)
    # A degenerate image keeps finite numbers, for a gradient that is multiplied by zero.
    norm_S, norm_T = torch.where(valid_B, norm_S, 1.0), torch.where(valid_B, norm_T, 1.0)
    a_Bnn.div_(norm_S[:, None, None])
    b_Bnn.div_(norm_T[:, None, None])
    slope_Bnn = torch.sub(a_Bnn, b_Bnn, out=b_Bnn)
    loss_B = torch.where(valid_B, 0.5 * frobenius(slope_Bnn).square(), 0.0)
    if not gradient:
        return BatchResult(loss_B, valid_B, None)
    slope_Bnn.addcmul_(a_Bnn, loss_B[:, None, None], value=-1)
    # From here on |K_S| H dL/dK_S: with near-equal tokens the rounding that H removes is the larger part.
    slope_Bnn.sub_(slope_Bnn.sum(1, keepdim=True).div_(rows_S.count_B[:, None, None]))
    # <r, dr> of each row without a pass over the features: r = R + mean, dr = 2 H dL/dK_S R, R R^T = |K_S| A.
    scale_B1 = (2 / norm_S)[:, None]
    along_Bn = 2 * (slope_Bnn * a_Bnn).sum(-1)
    mean_BS1 = rows_S.mean_B1d.transpose(1, 2)
    along_Bn += scale_B1 * (slope_Bnn @ (student_BnS @ mean_BS1)).squeeze(-1)
    # dv = (2 H dL/dK_S R - <r, dr> (R + mean)) / |v| as one product and one outer product.
    per_length_Bn = torch.where(valid_B[:, None], rows_S.per_length_Bn, 0.0)
    along_Bn *= per_length_Bn
    slope_Bnn.mul_((scale_B1 * per_length_Bn)[:, :, None])
    slope_Bnn.diagonal(dim1=1, dim2=2).sub_(along_Bn)
    gradient_BnS = torch.bmm(slope_Bnn, student_BnS)
    gradient_BnS.baddbmm_(along_Bn[:, :, None], rows_S.mean_B1d, alpha=-1)
    return BatchResult(loss_B, valid_B, gradient_BnS)


def _feature_space(
    student: list[Tensor], teacher: list[Tensor], dtype: torch.dtype, gradient: bool
) -> BatchResult:
    rows_S = _centred_rows(student, dtype)
    student_BnS, teacher_BnT = rows_S.centred_Bnd, _centred_rows(teacher, dtype).centred_Bnd
    teacher_BTn = teacher_BnT.transpose(1, 2)
    own_BSS = symmetric_product(student_BnS.transpose(1, 2))
    cross_BTS = torch.bmm(teacher_BTn, student_BnS)
    norm_S, norm_T = frobenius(own_BSS), frobenius(symmetric_product(teacher_BTn))
    valid_B = _both_valid(norm_S, norm_T, rows_S.count_B)
    norm_S, norm_T = torch.where(valid_B, norm_S, 1.0), torch.where(valid_B, norm_T, 1.0)
    cka_B = frobenius(cross_BTS).square() / (norm_S * norm_T)
    loss_B = torch.where(valid_B, (1 - cka_B).clamp_(min=0.0), 0.0)
    if not gradient:
        return BatchResult(loss_B, valid_B, None)
    own_BSS.mul_((2 * cka_B / norm_S.square())[:, None, None])
    cross_BTS.mul_((2 / (norm_S * norm_T))[:, None, None])
    slope_BnS = torch.bmm(student_BnS, own_BSS).baddbmm_(teacher_BnT, cross_BTS, alpha=-1)
    unit_BnS = student_BnS + rows_S.mean_B1d
    along_Bn1 = (unit_BnS * slope_BnS).sum(-1, keepdim=True)
    per_length_Bn = torch.where(valid_B[:, None], rows_S.per_length_Bn, 0.0)
    gradient_BnS = slope_BnS.addcmul_(unit_BnS, along_Bn1, value=-1).mul_(per_length_Bn[:, :, None])
    return BatchResult(loss_B, valid_B, gradient_BnS)


def _both_valid(norm_S: Tensor, norm_T: Tensor, count_B: Tensor) -> Tensor:
    # `<=`, so that NaN is not degenerate: it must reach the loss and stop the run.
    limit_B = DEGENERATE_TOLERANCE * count_B
    return ~((norm_S <= limit_B) | (norm_T <= limit_B))


def symmetric_product(rows_Bnd: Tensor) -> Tensor:
    """X X^T [B, n, n]; of a large one little more than the lower half is multiplied out."""
    count, n, _ = rows_Bnd.shape
    product_Bnn = rows_Bnd.new_empty(count, n, n)
    _fill_symmetric(product_Bnn, rows_Bnd, _by_device(SYMMETRIC_LEAF, rows_Bnd))
    return product_Bnn


def _fill_symmetric(out_Bnn: Tensor, rows_Bnd: Tensor, leaf: int) -> None:
    _, n, d = rows_Bnd.shape
    if n <= leaf or d < 4 * leaf:  # with few features copying costs what multiplying does
        torch.bmm(rows_Bnd, rows_Bnd.transpose(1, 2), out=out_Bnn)
        return
    half = (n // 2 + 15) // 16 * 16  # whole tiles of a matrix kernel
    upper, lower = rows_Bnd[:, :half], rows_Bnd[:, half:]
    _fill_symmetric(out_Bnn[:, :half, :half], upper, leaf)
    _fill_symmetric(out_Bnn[:, half:, half:], lower, leaf)
    corner = out_Bnn[:, half:, :half]
    torch.bmm(lower, upper.transpose(1, 2), out=corner)
    out_Bnn[:, :half, half:] = corner.transpose(1, 2)


def frobenius(matrix_Bij: Tensor) -> Tensor:
    """Frobenius norm [B]; row by row, so that long sums keep their digits in float32."""
    return torch.linalg.vector_norm(torch.linalg.vector_norm(matrix_Bij, dim=-1), dim=-1)
