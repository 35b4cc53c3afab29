"""The Triton W4A16 kernels against the oracle in float64; on a CPU under Triton's interpreter."""

import dataclasses

import pytest
import torch
from awq_layers import check, layer, normal, words  # pyright: ignore[reportMissingImports] - tests/ is on the path
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grace.kernels import reference, w4a16
from grace.kernels.w4a16_tuning import EXPAND_TILE, MATRIX_TILES, VECTOR_TILES, Config, Problem, fitted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
w4a16_triton = pytest.importorskip("grace.kernels.w4a16_triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def run(x: Tensor, stored: tuple[Tensor, ...], group_size: int, config: Config, bias: Tensor | None = None):
    x, *parts = on_device(x, *stored)
    return w4a16_triton.matmul(x, *parts, group_size, None if bias is None else bias.to(DEVICE), config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "groups", "outputs", "group_size"),
    [
        (1, 1, 8, 32), (1, 5, 24, 64), (1, 9, 72, 64), (2, 3, 136, 32), (3, 1, 24, 128), (5, 4, 8, 64),
        (15, 2, 24, 32), (16, 3, 8, 32), (17, 1, 136, 32), (33, 2, 24, 64), (33, 7, 8, 32),
    ],
)  # fmt: skip
def test_the_operator(tokens: int, groups: int, outputs: int, group_size: int, dtype: torch.dtype):
    inputs = groups * group_size
    stored, x = layer(inputs, outputs, group_size, seed=tokens), normal(tokens, inputs, dtype=dtype)
    for bias in (None, normal(outputs, dtype=torch.float32)):
        y = w4a16.matmul(*on_device(x, *stored), group_size, None if bias is None else bias.to(DEVICE))
        check(y, x, stored, group_size, bias)


TILES = [*VECTOR_TILES, *MATRIX_TILES, EXPAND_TILE]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.way}-{tile.words}-{tile.rows}-{tile.tokens}")
def test_every_setting(tile: Config, splits: int):
    """Two blocks of columns and of tokens, the second of each begun only; parts of two, two and one groups."""
    tokens, outputs = 1 if tile.way == "vector" else tile.tokens + 3, 8 * tile.words + 24
    if tile.way == "expand":
        tokens, splits = 5, 1
    problem = Problem(tokens, 5 * 32, outputs, 32, "float16")
    config = dataclasses.replace(fitted(tile, problem), splits=splits)
    stored, x = layer(5 * 32, outputs, 32), normal(tokens, 5 * 32, dtype=torch.float16)
    bias = normal(outputs, dtype=torch.float16)
    if tile.way != "expand":
        check(run(x, stored, 32, config, bias), x, stored, 32, bias)
        return
    y, dense_IO = run(x, stored, 32, config, bias), reference.dequantize(*stored, 32).half().double()
    torch.testing.assert_close(y.cpu().double(), x.double() @ dense_IO + bias.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [Config("matrix", 4, 32, 16), Config("vector", 4, 16)])
def test_weights_are_read_exactly(config: Config, dtype: torch.dtype):
    """One-hot activations give the weights back, rounded once."""
    stored, rows = layer(32, 40, 32), [0, 15, 16, 31]
    one_hot = torch.eye(32, dtype=dtype)[rows]
    together = [one_hot] if config.way == "matrix" else list(one_hot[:, None])
    y = torch.cat([run(row, stored, 32, config) for row in together])
    assert torch.equal(y.cpu(), reference.dequantize(*stored, 32, torch.float32)[rows].to(dtype))


def test_the_same_input_gives_the_same_bits():
    stored, x = layer(320, 40, 32), normal(3, 320, dtype=torch.bfloat16)
    config = Config("matrix", 4, 32, 16, splits=4)
    assert torch.equal(run(x, stored, 32, config), run(x, stored, 32, config))


def test_parts_without_a_group_add_nothing():
    stored, x = layer(96, 24, 32), normal(1, 96, dtype=torch.float16)
    for config in (Config("vector", 4, 32, splits=8), Config("matrix", 4, 32, 16, splits=8)):
        check(run(x, stored, 32, config), x, stored, 32)


def test_views_and_nothing_at_all():
    stored = layer(64, 48, 32)
    x = normal(64, 6, dtype=torch.bfloat16).t()
    check(w4a16.matmul(*on_device(x, *stored), 32), x, stored, 32)
    x = normal(9, 128, dtype=torch.bfloat16)[::3, ::2]
    check(w4a16.matmul(*on_device(x, *stored), 32), x, stored, 32)
    one = (stored[0][:, 2:5], stored[1][:, 2:5], stored[2][:, 16:40])  # columns of a wider layer
    check(w4a16.matmul(*on_device(x), *(part.to(DEVICE) for part in one), 32), x, one, 32)
    qweight, qzeros, scales = (part.t().contiguous().t() for part in stored)
    turned = (qweight, qzeros, scales)
    check(w4a16.matmul(*on_device(x, *turned), 32), x, turned, 32)
    assert w4a16.matmul(*on_device(x[:0], *stored), 32).shape == (0, 48)


def test_large_activations_and_what_is_no_number():
    stored = layer(64, 24, 32)
    x = normal(3, 64, dtype=torch.bfloat16)
    big = x * 2.0**60
    check(w4a16.matmul(*on_device(big, *stored), 32) / 2.0**60, x, stored, 32)
    x[1, 40] = torch.nan
    y = w4a16.matmul(*on_device(x, *stored), 32)
    assert y.isnan().any(1).tolist() == [False, True, False] and y[1].isnan().all()


@pytest.mark.parametrize("tokens", [1, 3])
def test_torch_checks_the_operator(tokens: int):
    """Schema, fake tensors and tracing with dynamic shapes."""
    stored, bias = layer(64, 24, 32), normal(24, dtype=torch.float16)
    x = normal(tokens, 64, dtype=torch.float16)
    torch.library.opcheck(w4a16.matmul, (*on_device(x, *stored), 32, bias.to(DEVICE)))


def test_compiles_whole():
    stored = on_device(*layer(64, 24, 32))

    def block(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(w4a16.matmul(x, *stored, 32)) + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for tokens in (1, 3, 4):
        x = normal(tokens, 64, dtype=torch.bfloat16).to(DEVICE)
        assert torch.equal(compiled(x), block(x))


def test_what_cannot_run_is_said():
    stored, x = on_device(*layer(64, 24, 32)), normal(1, 64, dtype=torch.float16).to(DEVICE)
    for bad, message in [
        ((x.float(), *stored, 32), "bfloat16 and float16, the activations are torch.float32"),
        ((x, *stored, 16), "groups of"),
        ((x, *stored, 64), "qzeros are"),
        ((x[:, :32], *stored, 32), "activations are"),
        ((x, stored[0].float(), *stored[1:], 32), "AWQ tensors are int32"),
        ((x, *stored[:2], stored[2].float(), 32), "not float16"),
        ((x, *stored, 32, x[0, :8]), "bias are"),
    ]:
        with pytest.raises(ValueError, match=message):
            w4a16.matmul(*bad)


def test_no_interpreter_no_kernel_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="run on a CUDA device, the weights are on cpu"):
        w4a16.matmul(normal(1, 64, dtype=torch.float16), *layer(64, 24, 32), 32)


@given(
    tokens=st.integers(1, 20), groups=st.integers(1, 3), words_=st.integers(1, 5), seed=st.integers(0, 2**20),
    group_size=st.sampled_from([32, 64]),
)  # fmt: skip
@settings(max_examples=10, deadline=None)
def test_any_shape(tokens: int, groups: int, words_: int, seed: int, group_size: int):
    inputs, outputs = groups * group_size, 8 * words_
    stored = layer(inputs, outputs, group_size, seed)
    x = normal(tokens, inputs, dtype=torch.float16, seed=seed)
    check(w4a16.matmul(*on_device(x, *stored), group_size), x, stored, group_size)


def test_the_oracle_is_not_moved_by_zero_points():
    """The layers here do have zero points other than 8."""
    assert len(reference.nibbles(words(1, 64)).unique()) > 4


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 64, 300, 2100])
@pytest.mark.parametrize(("inputs", "outputs"), [(2048, 4096), (6144, 2048), (4096, 24576), (12288, 4096)])
def test_deployed_shapes(inputs: int, outputs: int, tokens: int, dtype: torch.dtype):
    """Sizes that no interpreter gets through, against a float64 product on the device."""
    stored = on_device(*layer(inputs, outputs, 128))
    x = normal(tokens, inputs, dtype=dtype).to(DEVICE)
    expected = x.double() @ reference.dequantize(stored[0], stored[1], stored[2], 128)
    y = w4a16.matmul(x, *stored, 128)
    assert (y.double() - expected).norm() / expected.norm() < torch.finfo(dtype).eps
    assert torch.equal(y, w4a16.matmul(x, *stored, 128))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 16])
def test_replayed_in_a_graph(tokens: int):
    stored = on_device(*layer(2048, 2048, 128))
    x = normal(tokens, 2048, dtype=torch.bfloat16).to(DEVICE)
    w4a16.matmul(x, *stored, 128)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = w4a16.matmul(x, *stored, 128)
    for seed in (1, 2):
        x.copy_(normal(tokens, 2048, dtype=torch.bfloat16, seed=seed))
        graph.replay()
        assert torch.equal(y, w4a16.matmul(x, *stored, 128))
