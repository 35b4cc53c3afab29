"""The loss kernel of a cached teacher against the torch version; on a CPU under Triton's interpreter."""

import pytest
import torch
from hopper import compile_kernel  # pyright: ignore[reportMissingImports] - tests/ is on the path
from torch import Tensor

from grace.distill.cached import teacher_top_k
from grace.distill.rows import RowSettings, loss_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.importorskip("grace.kernels.gdkd_top_k_triton")


def check(
    student_CV: Tensor, teacher_CS: Tensor, targets_C: Tensor, k: int, rel: float = 2e-6, **changes
) -> None:
    """Losses and gradient of kernel and torch are the same; what lies beside the rows is not touched."""
    gradient = changes.pop("with_gradient", True)
    options = {"temperature": 2.0, "tckd_weight": 1.0, "nckd_weight": 4.0, **changes}
    vocabulary, shared = student_CV.shape[1], teacher_CS.shape[1]
    settings = RowSettings(ce_scale=0.3, kd_scale=0.7, shared=shared, **options)
    kept = teacher_top_k(teacher_CS, torch.eye(shared), targets_C, k, temperature=options["temperature"])
    expected_CV = student_CV.to(torch.float32, copy=True)
    expected = loss_rows(expected_CV, kept.rows(), targets_C, kept.gate_T, settings, gradient)
    got_CV = torch.full(
        (len(student_CV), vocabulary + 3), torch.nan, dtype=student_CV.dtype
    )  # poisoned margins
    got_CV[:, :vocabulary] = student_CV
    got_CV = got_CV.to(DEVICE)
    moved = [part.to(DEVICE) for part in (*kept.rows(), targets_C, kept.gate_T)]
    ce_C, kd_C = kernels.loss_rows(got_CV[:, :vocabulary], *moved, **vars(settings), with_gradient=gradient)
    torch.testing.assert_close(ce_C.cpu(), expected.ce_C, rtol=10 * rel, atol=5e-6)
    torch.testing.assert_close(kd_C.cpu(), expected.kd_C, rtol=10 * rel, atol=5e-6)
    assert got_CV[:, vocabulary:].isnan().all()
    rounding = 0.0 if got_CV.dtype == torch.float32 else torch.finfo(got_CV.dtype).eps / 2
    difference = (got_CV[:, :vocabulary].cpu().double() - expected_CV.double()).norm()
    assert difference <= (rel + rounding) * expected_CV.double().norm()


def logits(tokens: int, vocabulary: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, vocabulary, generator=generator) * 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("vocabulary", "shared", "k"), [(2, 2, 1), (37, 37, 5), (300, 290, 64), (9000, 8190, 100)]
)
def test_losses_and_gradient(dtype, vocabulary, shared, k):
    check(logits(3, vocabulary, 0, dtype), logits(3, shared, 1), torch.arange(3) * 5 % shared, k)


@pytest.mark.parametrize("changes", [{"temperature": 1.0}, {"temperature": 3.0}, {"nckd_weight": None},
                                     {"nckd_weight": 0.25, "tckd_weight": 0.0}, {"with_gradient": False}])  # fmt: skip
def test_settings(changes):
    targets = torch.tensor([0, 4999, 4095, 4096])
    check(logits(4, 5000, 0), logits(4, 5000, 1), targets, 16, **changes)


@pytest.mark.parametrize("k", [1, 2, 3, 69])
def test_few_and_all_others_kept(k):
    check(logits(4, 70, 0), logits(4, 70, 1), torch.arange(4), k)


@pytest.mark.parametrize("margin", [40.0, 80.0, 700.0])
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_extreme_logits(margin, who):
    student, teacher = logits(4, 70, 0), logits(4, 70, 1)
    (student if who == "student" else teacher)[torch.arange(4), torch.arange(4) + 1] += margin
    check(student, teacher, torch.arange(4), 8, rel=1e-5)


def test_maximum_among_the_known_and_moving_from_block_to_block():
    rise = torch.linspace(-30, 30, 9000).repeat(2, 1)
    check(rise, rise.clone(), torch.tensor([3, 8999]), 32, rel=1e-5)
    check(rise, rise.flip(1).contiguous(), torch.tensor([3, 8999]), 32, rel=1e-5)


def test_no_rows_and_unfit_rows():
    options = {"ce_scale": 1.0, "kd_scale": 1.0, "temperature": 2.0, "tckd_weight": 1.0, "nckd_weight": 4.0,
               "shared": 8, "with_gradient": True}  # fmt: skip
    ids = torch.zeros(0, 2, dtype=torch.long)
    nothing = torch.zeros(0, 1)
    parts = (nothing, ids, torch.zeros(0, 2), nothing, ids[:, 0], nothing[:, 0])
    assert all(part.shape == (0,) for part in kernels.loss_rows(torch.zeros(0, 8), *parts, **options))
    with pytest.raises(ValueError, match="contiguous rows"):
        kernels.loss_rows(torch.zeros(2, 8, dtype=torch.float64), *parts, **options)


TYPES = {
    "student_ptr": "*bf16", "target_ptr": "*i64", "student_stride": "i64", "vocabulary": "i32", "shared": "i32", "k": "i32",
}  # fmt: skip
FLAGS = ("PLAIN_KL", "WITH_GRADIENT", "SQUARED")


@pytest.mark.slow
def test_compiles_for_hopper_without_one():
    """The interpreter accepts what the compiler may not."""
    settings = [
        dict(zip(FLAGS, map(bool, values), strict=True)) | {"BLOCK": 4096, "K": 64}
        for values in ((0, 1, 1), (1, 0, 0))
    ]
    compile_kernel("grace.kernels.gdkd_top_k_triton", "_top_k_kernel", TYPES, settings)
