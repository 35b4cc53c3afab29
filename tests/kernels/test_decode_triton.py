"""What a decode step does between its linears, against torch; on a CPU under Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from hopper import compile_kernel  # pyright: ignore[reportMissingImports] - tests/ is on the path
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
decode_triton = pytest.importorskip("grace.kernels.decode_triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def close(ours: Tensor, theirs: Tensor) -> None:
    tolerance = 1e-5 if ours.dtype == torch.float32 else 2e-3
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "width", "parts"), [(1, 128, 0), (3, 96, 1), (2, 200, 5)])
def test_add_norm(tokens: int, width: int, parts: int, dtype: torch.dtype):
    x_TD, weight_D = normal(tokens, width, dtype=dtype), normal(width, seed=1, dtype=dtype)
    parts_PTD = normal(parts, tokens, width, seed=2) if parts else None
    out_TD, normed_TD = decode_triton.add_norm(x_TD, parts_PTD, weight_D, 1e-6)
    expected_TD = x_TD.float() + (0 if parts_PTD is None else parts_PTD.sum(0))
    close(out_TD, expected_TD.to(dtype))
    close(normed_TD, F.rms_norm(expected_TD, (width,), weight_D.float(), 1e-6).to(dtype))


@pytest.mark.parametrize(("tokens", "width", "parts"), [(1, 16, 1), (3, 700, 3)])
def test_gate(tokens: int, width: int, parts: int):
    parts_PTI = normal(parts, tokens, 2 * width)
    gate_TI, up_TI = parts_PTI.sum(0).chunk(2, -1)
    close(decode_triton.gate(parts_PTI, torch.float16), (F.silu(gate_TI) * up_TI).half())


@pytest.mark.parametrize("parts", [1, 4])
def test_rotate(parts: int):
    queries, keys, size, rows, places = 4, 2, 32, 3, 5
    tokens, heads = 2, queries + keys
    parts_PTX = normal(parts, tokens, (heads + keys) * size)
    weight_XS, angle_TF = normal(heads, size, seed=1), normal(tokens, size // 2, seed=2)
    cos_TS, sin_TS = (torch.cat(pair, -1) for pair in (
        (angle_TF.cos(), angle_TF.cos()), (-angle_TF.sin(), angle_TF.sin())))  # fmt: skip
    cache = [torch.full((rows, keys, places, size), 7.0, device=DEVICE) for _ in range(2)]
    at_rows, at_places = torch.tensor([2, 0], device=DEVICE), torch.tensor([4, 1], device=DEVICE)
    query_TQS = decode_triton.rotate(
        parts_PTX, weight_XS, cos_TS, sin_TS, at_rows, at_places, *cache, queries, 1e-6
    )
    x_TXS = parts_PTX.sum(0).view(tokens, heads + keys, size)
    turned_TXS = F.rms_norm(x_TXS[:, :heads], (size,), None, 1e-6) * weight_XS
    turned_TXS = turned_TXS * cos_TS[:, None] + turned_TXS.roll(size // 2, -1) * sin_TS[:, None]
    close(query_TQS, turned_TXS[:, :queries])
    expected = [torch.full_like(one, 7.0) for one in cache]
    expected[0][at_rows, :, at_places] = turned_TXS[:, queries:]
    expected[1][at_rows, :, at_places] = x_TXS[:, heads:]
    for ours, theirs in zip(cache, expected, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attend(heads: int, splits: int, dtype: torch.dtype):
    keys, size, places = 2, 32, 150
    counts = [1, 0, 64, 65, 150]
    rows_T = torch.tensor([3, 0, 1, 2, 5], device=DEVICE)
    query_TQS = normal(len(counts), keys * heads, size, dtype=dtype)
    keys_RKCS, values_RKCS = (normal(6, keys, places, size, seed=seed, dtype=dtype) for seed in (1, 2))
    for row, count in zip(rows_T.tolist(), counts, strict=True):  # what was there before is never read
        keys_RKCS[row, :, count:] = values_RKCS[row, :, count:] = torch.nan
    counts_T = torch.tensor(counts, device=DEVICE)
    y_TX = decode_triton.attend(query_TQS, keys_RKCS, values_RKCS, rows_T, counts_T, splits)
    for token, (row, count) in enumerate(zip(rows_T.tolist(), counts, strict=True)):
        expected = torch.zeros(keys * heads * size, device=DEVICE)
        if count:
            k_KCS, v_KCS = (cache[row, :, :count].float() for cache in (keys_RKCS, values_RKCS))
            q_KGS = query_TQS[token].float().view(keys, heads, size)
            expected = F.scaled_dot_product_attention(q_KGS[None], k_KCS[None], v_KCS[None]).flatten()
        close(y_TX[token], expected.to(dtype))


TYPES = {
    "rows_ptr": "*i64", "places_ptr": "*i64", "counts_ptr": "*i64", "width": "i32", "part_stride": "i32",
    "row_stride": "i32", "head_stride": "i32", "queries": "i32", "keys": "i32", "heads": "i32",
}  # fmt: skip
BF16 = dict.fromkeys(
    ("x_ptr", "weight_ptr", "out_ptr", "normed_ptr", "cos_ptr", "sin_ptr", "query_ptr", "keys_ptr", "values_ptr"), "*bf16"
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "constants", "warps"),
    [
        ("_add_norm_kernel", {"PARTS": 8, "BLOCK": 4096}, 8),
        ("_rotate_kernel", {"PARTS": 8, "HALF": 64}, 1),
        ("_attend_kernel", {"HEADS": 2, "PADDED": 16, "SIZE": 128, "BLOCK": 64, "SPLITS": 16, "FP32": False}, 4),
        ("_attend_kernel", {"HEADS": 4, "PADDED": 16, "SIZE": 128, "BLOCK": 64, "SPLITS": 1, "FP32": False}, 4),
        ("_combine_kernel", {"SPLITS": 16, "SIZE": 128}, 1),
        ("_gate_kernel", {"PARTS": 8, "BLOCK": 512}, 4),
    ],
)  # fmt: skip
def test_compiles_for_hopper_without_spills(kernel: str, constants: dict[str, bool | int], warps: int):
    types = TYPES | BF16 | ({"sum_ptr": "*bf16"} if constants.get("SPLITS") == 1 else {})
    options = [{"num_warps": warps, "num_stages": 2}]
    found = compile_kernel("grace.kernels.decode_triton", kernel, types, [constants], options, list(types))
    assert found[0].spilt == 0 and found[0].shared <= 99 * 1024
    assert (found[0].matmuls > 0) == (kernel == "_attend_kernel")
