"""Every setting of the W4A16 kernels compiled for sm_90, without one: no register is spilt, and shared memory fits."""

from collections.abc import Sequence

import pytest
from hopper import Resources, compile_kernel  # pyright: ignore[reportMissingImports] - tests/ is on the path

from grace.kernels.w4a16_tuning import EXPAND_TILE, MATRIX_TILES, VECTOR_TILES, Config

MODULE = "grace.kernels.w4a16_triton"
SHARED = 227 * 1024  # of one sm_90 program, at most
REGISTERS = 65536  # of one multiprocessor
TYPES = {
    "qweight_ptr": "*i32", "qzeros_ptr": "*i32", "scales_ptr": "*fp16", "tokens": "i32", "outputs": "i32",
    "x_stride": "i32", "q_stride": "i32", "z_stride": "i32", "s_stride": "i32", "groups": "i32",
    "groups_per_split": "i32", "one": "i32", "count": "i32",
}  # fmt: skip
ALIGNED = [name for name in TYPES if name not in ("tokens", "groups", "groups_per_split", "count")]
POINTERS = ["x_ptr", "bias_ptr", "out_ptr", "parts_ptr"]
pytestmark = pytest.mark.slow


def compiled(kernel: str, tiles: Sequence[Config], dtype: str, **constants: bool | int) -> list[Resources]:
    types = TYPES | dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), f"*{dtype}")
    settings = []
    for tile in tiles:
        sizes = {"ROWS": min(tile.rows, constants["GROUP"]), "WORDS": tile.words}
        settings.append(constants | sizes | ({"TOKENS": tile.tokens} if tile.way == "matrix" else {}))
    options = [{"num_warps": tile.warps, "num_stages": tile.stages} for tile in tiles]
    return compile_kernel(MODULE, kernel, types, settings, options, [*ALIGNED, *POINTERS])


def check(tiles: Sequence[Config], found: Sequence[Resources], matmuls: bool) -> None:
    for tile, resources in zip(tiles, found, strict=True):
        assert resources.spilt == 0, (tile, resources)
        assert resources.shared <= SHARED, (tile, resources)
        assert resources.registers * 32 * tile.warps <= REGISTERS, (tile, resources)
        assert (resources.matmuls > 0) == matmuls, (tile, resources)


# (type of the activations, group size): each of both.
LAYERS = [("bf16", 128), ("fp16", 32), ("bf16", 64)]


@pytest.mark.parametrize(("dtype", "group_size"), LAYERS)
def test_matrix(dtype: str, group_size: int):
    layer = {"GROUP": group_size, "HAS_BIAS": group_size == 128, "FP32": False}
    found = compiled("_matrix_kernel", MATRIX_TILES, dtype, **layer)
    check(MATRIX_TILES, found, matmuls=True)
    assert max(one.shared for one in found[:5]) <= 99 * 1024  # the rule's: they fit a consumer card too


@pytest.mark.parametrize(("dtype", "group_size"), LAYERS[:2])
def test_vector(dtype: str, group_size: int):
    layer = {
        "GROUP": group_size,
        "HAS_BIAS": group_size == 128,
        "groups_per_split": 1,
    }  # Triton makes a 1 a constant
    check(VECTOR_TILES, compiled("_vector_kernel", VECTOR_TILES, dtype, **layer), matmuls=False)


def test_expand_and_sum():
    check([EXPAND_TILE], compiled("_expand_kernel", [EXPAND_TILE], "bf16", GROUP=128), matmuls=False)
    types = TYPES | {"bias_ptr": "*bf16", "out_ptr": "*bf16"}
    settings = [{"SPLITS": splits, "HAS_BIAS": True, "BLOCK": 256} for splits in (2, 16)]
    options = [{"num_warps": 4}] * 2
    for resources in compile_kernel(MODULE, "_sum_kernel", types, settings, options, [*ALIGNED, *POINTERS]):
        assert resources.spilt == 0 and resources.registers <= 64
