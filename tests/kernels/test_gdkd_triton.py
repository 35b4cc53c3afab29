"""The loss kernel against the torch version that it repeats; on a CPU under Triton's interpreter."""

import pytest
import torch
from hopper import compile_kernel  # pyright: ignore[reportMissingImports] - tests/ is on the path
from torch import Tensor

from grace.distill.rows import RowLosses, RowSettings, loss_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gdkd_triton = pytest.importorskip("grace.kernels.gdkd_triton")


def logits(tokens: int, vocabulary: int, seed: int, dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, vocabulary, generator=generator) * scale).to(dtype)


def both(student: Tensor, teacher: Tensor | None, targets: Tensor, gates: Tensor | None, **changes):
    """(torch's losses and gradient, the kernel's)."""
    options = {"temperature": 2.0, "tckd_weight": 1.0, "nckd_weight": 4.0, **changes}
    gradient = options.pop("with_gradient", True)
    shared = student.shape[1] if teacher is None else teacher.shape[1]
    settings = RowSettings(ce_scale=0.3, kd_scale=0.7, shared=shared, **options)
    expected_CV = student.to(torch.float32, copy=True)
    expected = loss_rows(
        expected_CV, None if teacher is None else teacher.float(), targets, gates, settings, gradient
    )
    got_CV = torch.full(
        (len(student), student.shape[1] + 3), torch.nan, dtype=student.dtype
    )  # poisoned margins
    got_CV[:, : student.shape[1]] = student
    got_CV = got_CV.to(DEVICE)
    window = got_CV[:, : student.shape[1]]
    moved = [None if t is None else t.to(DEVICE) for t in (teacher, targets, gates)]
    got = RowLosses(*gdkd_triton.loss_rows(window, *moved, **vars(settings), with_gradient=gradient))
    assert got_CV[:, student.shape[1] :].isnan().all()
    return (expected, expected_CV), (got, window.cpu())


def assert_same(pair, rel: float = 2e-6) -> None:
    # A KL is a difference of sums that are right to some 1e-7, times T^2 nckd.
    (expected, expected_CV), (got, got_CV) = pair
    for name in ("ce_C", "kd_C", "gate_C"):
        one, two = getattr(expected, name), getattr(got, name).cpu()
        torch.testing.assert_close(
            two, one, rtol=10 * rel, atol=5e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    worst = (got_CV.double() - expected_CV.double()).norm() / expected_CV.double().norm()
    rounding = 0.0 if got_CV.dtype == torch.float32 else torch.finfo(got_CV.dtype).eps / 2
    assert worst <= rel + rounding, worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocabulary", "shared"), [(2, 2), (37, 37), (300, 290), (9000, 9000), (9000, 8190)])
def test_losses_and_gradient(dtype, vocabulary, shared):
    targets = torch.arange(3) * 5 % shared
    student, teacher = logits(3, vocabulary, 0, dtype), logits(3, shared, 1, dtype)
    assert_same(both(student, teacher, targets, None))


@pytest.mark.parametrize("changes", [{"temperature": 1.0}, {"temperature": 3.0}, {"nckd_weight": None},
                                     {"nckd_weight": 0.25, "tckd_weight": 0.0}, {"with_gradient": False}])  # fmt: skip
def test_settings(changes):
    student, teacher = logits(4, 5000, 0, torch.float32), logits(4, 5000, 1, torch.float32)
    gates = torch.ones(4) if "nckd_weight" in changes and changes["nckd_weight"] is None else None
    pair = both(student, teacher, torch.tensor([0, 4999, 4095, 4096]), gates, **changes)
    assert_same(pair)
    if changes == {"with_gradient": False}:
        assert torch.equal(pair[1][1], student)


def test_given_gates_and_cross_entropy_alone():
    student, teacher = logits(4, 50, 0, torch.float32), logits(4, 50, 1, torch.float32)
    targets = torch.tensor([0, 49, 7, 7])
    assert_same(both(student, teacher, targets, torch.tensor([0.5, 0.9, 0.4, 1.0])))
    assert_same(both(student, None, targets, None))


@pytest.mark.parametrize("margin", [40.0, 80.0, 700.0])
@pytest.mark.parametrize("who", ["teacher", "student", "both"])
@pytest.mark.parametrize("right", [True, False])
def test_extreme_logits(margin, who, right):
    student, teacher = logits(4, 70, 0, torch.float32), logits(4, 70, 1, torch.float32)
    targets = torch.arange(4)
    peak = targets if right else targets + 1
    if who != "teacher":
        student[torch.arange(4), peak] += margin
    if who != "student":
        teacher[torch.arange(4), peak] += margin
    assert_same(both(student, teacher, targets, None), rel=1e-5)


def test_maximum_that_moves_from_block_to_block():
    rise = torch.linspace(-30, 30, 9000).repeat(2, 1)
    assert_same(both(rise, rise.flip(1).contiguous(), torch.tensor([3, 8999]), None), rel=1e-5)
    assert_same(both(rise, rise.clone(), torch.tensor([3, 8999]), None), rel=1e-5)


def test_nan_shows():
    student, teacher = logits(2, 5000, 0, torch.float32), logits(2, 5000, 1, torch.float32)
    student[0, 4500] = torch.nan
    teacher[1, 10] = torch.nan
    _, (got, gradient) = both(student, teacher, torch.tensor([0, 1]), None)
    assert got.ce_C.isnan().tolist() == [True, False] and got.kd_C.isnan().all()
    assert gradient.isnan().any(1).all()


def test_no_rows_and_unfit_rows():
    empty = torch.zeros(0, 8, device=DEVICE)
    options = {"ce_scale": 1.0, "kd_scale": 1.0, "temperature": 2.0, "tckd_weight": 1.0, "nckd_weight": 4.0,
               "shared": 8, "with_gradient": True}  # fmt: skip
    targets = torch.zeros(0, dtype=torch.long, device=DEVICE)
    assert all(part.shape == (0,) for part in gdkd_triton.loss_rows(empty, empty, targets, None, **options))
    for unfit in (torch.zeros(2, 8, dtype=torch.float64), torch.zeros(8, 2).T):
        with pytest.raises(ValueError, match="contiguous rows"):
            gdkd_triton.loss_rows(unfit, None, torch.zeros(2, dtype=torch.long), None, **options)


TYPES = {
    "student_ptr": "*bf16", "teacher_ptr": "*bf16", "target_ptr": "*i64", "student_stride": "i64", "teacher_stride": "i64",
    "vocabulary": "i32", "shared": "i32",
}  # fmt: skip
FLAGS = ("HAS_TEACHER", "HAS_GATE", "PLAIN_KL", "WITH_GRADIENT", "SQUARED")


@pytest.mark.slow
def test_compiles_for_hopper_without_one():
    """The interpreter accepts what the compiler may not."""
    settings = [
        dict(zip(FLAGS, map(bool, values), strict=True)) | {"BLOCK": 4096}
        for values in ((1, 1, 0, 1, 1), (1, 0, 0, 1, 0), (1, 1, 1, 0, 1), (0, 0, 0, 1, 0))
    ]
    compile_kernel("grace.kernels.gdkd_triton", "_rows_kernel", TYPES, settings)
