"""Batched relational CKA, in token and in feature space, against the image-by-image definition in float64.

That definition is itself held to the textbook form in `test_rcka`.
"""

import contextlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grace.distill import rcka_fused
from grace.distill.rcka import (
    gram_is_degenerate,
    rcka_in_space,
    rcka_loss,
    rcka_per_image,
    rcka_per_image_plain,
)
from grace.distill.rcka_fused import ImageShape, cheaper_space, multiply_adds, plan_batches, symmetric_product

SPACES = ("tokens", "features", None)
in_every_space = pytest.mark.parametrize("space", SPACES)
SIZES = st.one_of(st.sampled_from([0, 1, 2, 3, 17, 33, 65]), st.integers(2, 40), st.integers(100, 300))
# A gradient in 16 bits is rounded once.
GRADIENT_RTOL = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def tokens(n: int, d: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) * scale).to(dtype)


def leaves(images: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [image.detach().to(dtype or image.dtype).clone().requires_grad_() for image in images]


def grads_of(loss_N: Tensor, weight_N: Tensor, student: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((loss_N * weight_N).sum(), student))


def summand(image: Tensor) -> float:
    """1 / (|v| |R|), the size of what adds up to a gradient: to zero where relations cannot change, as
    with two tokens or one feature, and then its rounding is all there is."""
    length_n1 = image.double().norm(dim=-1, keepdim=True).clamp(min=1e-30)
    rows = image.double() / length_n1
    return (1 / (length_n1.min() * (rows - rows.mean(0)).norm().clamp(min=1e-5))).item()


def check(student: list[Tensor], teacher: list[Tensor], space, rel: float = 1e-5) -> None:
    """Losses, validity and weighted gradients. `rel` is of the loss, and of an image's largest gradient."""
    mine, wide = leaves(student), leaves(student, torch.float64)
    weight_N = torch.linspace(0.5, 3.0, len(student), dtype=torch.float64)
    loss_N, valid_N = rcka_in_space(mine, teacher, space)
    expected_N, expected_valid_N = rcka_per_image_plain(wide, [t.double() for t in teacher])
    assert torch.equal(valid_N, expected_valid_N)
    exact = student[0].dtype == torch.float64
    assert loss_N.dtype == (torch.float64 if exact else torch.float32)
    torch.testing.assert_close(loss_N.double(), expected_N, rtol=rel, atol=1e-14 if exact else 1e-10)
    pairs = zip(grads_of(loss_N, weight_N, mine), grads_of(expected_N, weight_N, wide), student, strict=True)
    for grad, expected, image in pairs:
        assert grad.dtype == image.dtype and grad.shape == image.shape
        size = max(expected.abs().max().item(), 0.1 * summand(image)) if image.numel() else 0.0
        tiny = 2**-24 if image.dtype == torch.float16 else 0.0
        torch.testing.assert_close(
            grad.double(), expected, rtol=GRADIENT_RTOL[image.dtype], atol=rel * size + tiny
        )


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=5),
    d_student=st.integers(1, 64),
    d_teacher=st.integers(1, 64),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1e-2, 1.0, 1e2]),
    space=st.sampled_from(SPACES),
    seed=st.integers(0, 999),
)
def test_losses_and_gradients(sizes, d_student, d_teacher, dtype, scale, space, seed) -> None:
    student = [tokens(n, d_student, seed + i, scale, dtype) for i, n in enumerate(sizes)]
    teacher = [tokens(n, d_teacher, seed + 500 + i, dtype=dtype) for i, n in enumerate(sizes)]
    check(student, teacher, space, rel=1e-9 if dtype == torch.float64 else 1e-5)


@in_every_space
@pytest.mark.parametrize("widths", [(300, 500), (500, 300)])
def test_images_large_enough_for_products_in_blocks(widths: tuple[int, int], space) -> None:
    sizes = (196, 195, 70)
    student = [tokens(n, widths[0], i) for i, n in enumerate(sizes)]
    teacher = [tokens(n, widths[1], 10 + i) for i, n in enumerate(sizes)]
    check(student, teacher, space)


@in_every_space
@pytest.mark.parametrize("n", [12, 200])
def test_nearly_the_same_relations_keep_their_digits(n: int, space) -> None:
    # The losses are about 1e-8: 1 - CKA in float32 would have no digit of them.
    teacher = [tokens(n, 16, 0)]
    student = [teacher[0] + tokens(n, 16, 1, scale=1e-4)]
    assert rcka_per_image_plain(student, teacher)[0].item() < 1e-7
    check(student, teacher, space, rel=1e-2)


@in_every_space
def test_in_float64_both_spaces_are_the_same(space) -> None:
    student = [tokens(n, 12, n, dtype=torch.float64) for n in (40, 39, 37)]
    teacher = [tokens(n, 20, 50 + n, dtype=torch.float64) for n in (40, 39, 37)]
    check(student, teacher, space, rel=1e-11)


@pytest.mark.parametrize("space", ["tokens", "features"])
def test_analytic_gradients_are_those_of_finite_differences(space) -> None:
    sizes = (5, 4, 6)
    student = [tokens(n, 4, n, dtype=torch.float64).requires_grad_() for n in sizes]
    teacher = [tokens(n, 3, 10 + n, dtype=torch.float64) for n in sizes]
    assert len(rcka_fused.batches(student, teacher, space)) == 1
    assert torch.autograd.gradcheck(lambda *s: rcka_in_space(s, teacher, space)[0], student)


@in_every_space
def test_bad_images_leave_the_others_of_their_batch_alone(space) -> None:
    sizes = (9, 8, 7, 9, 8, 1)
    student = [tokens(n, 6, i) for i, n in enumerate(sizes)]
    teacher = [tokens(n, 5, 10 + i) for i, n in enumerate(sizes)]
    student[1] = student[1][:1].expand(8, 6)
    student[2][3, 2] = torch.nan
    teacher[4] = torch.ones(8, 5)
    student[3][4] = 0
    assert len(rcka_fused.batches(student, teacher, "tokens")[0][1]) == 5
    mine = leaves(student)
    loss_N, valid_N = rcka_in_space(mine, teacher, space)
    assert valid_N.tolist() == [True, False, True, True, False, False]
    assert loss_N.isnan().tolist() == [False, False, True, False, False, False]
    grads = grads_of(loss_N, torch.ones(6), mine)
    for i in (1, 4, 5):
        assert loss_N[i].item() == 0 and not grads[i].any()
    assert grads[2].isnan().any() and not grads[3][4].any()
    for i in (0, 3):
        check([student[i]], [teacher[i]], space)
        alone = leaves([student[i]])
        loss_1, _ = rcka_in_space(alone, [teacher[i]], space)
        torch.testing.assert_close(loss_N[i], loss_1[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(grads[i], grads_of(loss_1, torch.ones(1), alone)[0], rtol=1e-4, atol=1e-7)


@in_every_space
@pytest.mark.parametrize("d", [16, 2000])
def test_a_thousand_tokens_in_one_direction_are_degenerate(d: int, space) -> None:
    flat = tokens(1, d, 0).expand(1024, d) * torch.linspace(0.1, 9.0, 1024)[:, None]
    _, valid_N = rcka_in_space([flat], [tokens(1024, 8, 1)], space)
    assert not valid_N.item() and gram_is_degenerate(flat).item()


@in_every_space
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lengths_that_cannot_be_squared_in_float32(scale: float, space) -> None:
    student, teacher = tokens(6, 8, 0), tokens(6, 8, 1)
    (near,), (far,) = leaves([student]), leaves([student * scale])
    expected_N, _ = rcka_in_space([near], [teacher], space)
    loss_N, _ = rcka_in_space([far], [teacher * scale], space)
    torch.testing.assert_close(loss_N, expected_N, rtol=1e-5, atol=0)
    one = torch.ones(1)
    (grad,), (expected,) = grads_of(loss_N, one, [far]), grads_of(expected_N, one, [near])
    torch.testing.assert_close(grad * scale, expected, rtol=1e-4, atol=1e-5)


def test_a_loss_scale_reaches_float16_gradients_before_they_vanish() -> None:
    student, teacher = tokens(30, 8, 0, scale=3e3, dtype=torch.float16), tokens(30, 8, 1)
    (mine,), (wide,) = leaves([student]), leaves([student], torch.float64)
    (rcka_loss([mine], [teacher]) * 2**16).backward()
    rcka_loss([wide], [teacher]).backward()
    assert mine.grad is not None and wide.grad is not None
    torch.testing.assert_close(mine.grad.double() / 2**16, wide.grad, rtol=2e-3, atol=2**-24 / 2**10)


def test_dtypes_and_widths_may_differ_between_images() -> None:
    student = [tokens(5, 8, 0), tokens(5, 6, 1, dtype=torch.bfloat16), tokens(5, 8, 2, dtype=torch.float64)]
    teacher = [tokens(5, 9, 3, dtype=torch.bfloat16), tokens(5, 9, 4), tokens(5, 9, 5)]
    mine = leaves(student)
    loss_N, valid_N = rcka_per_image(mine, teacher)
    expected_N, _ = rcka_per_image_plain(leaves(student, torch.float64), teacher)
    assert loss_N.dtype == torch.float64 and valid_N.all()
    torch.testing.assert_close(loss_N, expected_N, rtol=1e-5, atol=1e-8)
    assert [g.dtype for g in grads_of(loss_N, torch.ones(3), mine)] == [s.dtype for s in student]


def test_who_gets_a_gradient() -> None:
    teacher = [tokens(6, 5, i) for i in range(3)]
    shared, fixed = tokens(6, 4, 3).requires_grad_(), tokens(6, 4, 4)
    loss_N, valid_N = rcka_per_image([shared, fixed, shared], teacher)
    assert not valid_N.requires_grad
    once = torch.autograd.grad(loss_N[0], shared, retain_graph=True)[0]
    twice = torch.autograd.grad(loss_N[2], shared, retain_graph=True)[0]
    both = torch.autograd.grad(loss_N.sum(), shared, retain_graph=True)[0]
    torch.testing.assert_close(once + twice, both)
    torch.testing.assert_close(torch.autograd.grad(-3 * loss_N[0], shared)[0], -3 * once)
    assert not rcka_per_image([fixed], teacher[:1])[0].requires_grad
    with torch.no_grad():
        assert torch.equal(
            rcka_per_image([shared], teacher[:1])[0], rcka_per_image([fixed * 0 + shared], teacher[:1])[0]
        )


def test_a_second_derivative_is_refused() -> None:
    student, weight = tokens(6, 4, 0).requires_grad_(), torch.ones(()).requires_grad_()
    loss = weight * rcka_loss([student], [tokens(6, 5, 1)])
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@in_every_space
def test_nothing_waits_for_the_device(space, monkeypatch: pytest.MonkeyPatch) -> None:
    # A meta tensor has no values: every way of asking for one is an error.
    with pytest.raises(RuntimeError):
        bool(torch.ones((), device="meta"))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no meta device
    sizes = (0, 1, 5, 9, 9, 300)
    student = [torch.empty(n, 8, device="meta", requires_grad=True) for n in sizes]
    teacher = [torch.empty(n, 12, device="meta") for n in sizes]
    loss_N, valid_N = rcka_in_space(student, teacher, space)
    rcka_loss(student, teacher).backward()
    assert loss_N.shape == valid_N.shape == (6,) and student[3].grad is not None
    assert gram_is_degenerate(teacher[3]).is_meta


def peak_memory(reset: bool = False) -> int:
    """Bytes of this process resident at the most since the last reset."""
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pytest.skip("no way to measure peak memory here")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


@in_every_space
def test_memory_for_64_images_of_1024_tokens(space) -> None:
    student = [tokens(1024, 48, i).requires_grad_() for i in range(64)]
    teacher = [tokens(1024, 64, 100 + i) for i in range(64)]
    rcka_per_image_plain(student[:1], teacher[:1])[0].sum().backward()
    before = peak_memory(reset=True)
    rcka_in_space(student, teacher, space)[0].sum().backward()
    # The gradients take 12 MB, and 12 MB more while they are kept; the matrices of 64 images would be 800 MB. How
    # much of what is freed the C library gives back varies: 27 to 190 MB were seen.
    assert peak_memory() - before < 300 * 2**20


WIDTHS = st.integers(1, 512)


@given(n=st.integers(1, 4096), d_student=WIDTHS, d_teacher=WIDTHS)
def test_feature_space_is_for_images_with_many_tokens(n, d_student, d_teacher) -> None:
    space = cheaper_space(ImageShape(n, d_student, d_teacher))
    if space == "features":
        assert n > min(d_student, d_teacher)
        assert cheaper_space(ImageShape(n + 1, d_student, d_teacher)) == "features"
    if n <= 3 * min(d_student, d_teacher) // 2:
        assert space == "tokens"


def test_spaces_of_real_shapes() -> None:
    assert cheaper_space(ImageShape(196, 2048, 4096)) == "tokens"
    assert cheaper_space(ImageShape(1024, 2048, 4096)) == "tokens"
    assert cheaper_space(ImageShape(1024, 64, 96)) == "features"
    assert multiply_adds(ImageShape(10, 3, 5), "tokens") == 10 * 10 * (3 + 5) // 2 + 10 * 10 * 3
    assert multiply_adds(ImageShape(10, 3, 5), "features") == 10 * (9 + 25) // 2 + 10 * 15 + 10 * 3 * 8


@given(
    sizes=st.lists(st.integers(1, 1024), max_size=70),
    max_bytes=st.sampled_from([0, 2**20, 2**28]),
    slack=st.sampled_from([0, 10**6, 10**9]),
    space=st.sampled_from(["tokens", "features"]),
)
def test_batches_hold_every_image_once_and_little_padding(sizes, max_bytes, slack, space) -> None:
    shapes = [ImageShape(n, 64, 96) for n in sizes]
    plan = plan_batches(shapes, space, max_bytes, slack)
    assert sorted(i for batch in plan for i in batch) == list(range(len(sizes)))
    for batch in plan:
        costs = [multiply_adds(shapes[i], space) for i in batch]
        assert sum(max(costs) - cost for cost in costs) <= slack
        assert max(sizes[i] for i in batch) <= 2 * min(sizes[i] for i in batch)
        assert len(batch) == 1 or 4 * sum(sizes[i] for i in batch) * (64 + 96) <= max_bytes


def test_images_of_one_size_are_one_batch_and_large_ones_are_not_held_at_once() -> None:
    small, large = [ImageShape(9, 128, 256)] * 64, [ImageShape(1024, 2048, 4096)] * 64
    assert [len(b) for b in plan_batches(small, "tokens", 16 * 2**20, 0)] == [64]
    assert {len(b) for b in plan_batches(large, "tokens", 256 * 2**20, 10**9)} <= {1, 2, 3, 4, 5}


@pytest.mark.parametrize(("n", "d"), [(1, 300), (64, 300), (65, 300), (127, 300), (331, 256), (90, 7)])
def test_symmetric_product_is_the_product(n: int, d: int) -> None:
    rows = torch.stack([tokens(n, d, i, dtype=torch.float64) for i in range(2)])
    for view in (rows, rows.transpose(1, 2).contiguous().transpose(1, 2)):
        torch.testing.assert_close(symmetric_product(view), rows @ rows.transpose(1, 2))
