"""The compiled int4 kernel against the oracle: every number of tokens, odd widths, any zero points, no stray writes."""

import copy
import ctypes
import subprocess

import pytest
import torch

from grace.kernels import compiled, native, reference
from grace.kernels.compiled import library

needs_kernel = pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle()))
EIGHTS = 0x88888888 - (1 << 32)


def stored(inputs: int, outputs: int, group: int, zeros: bool, bias: bool, seed: int = 0) -> native.Awq:
    generator = torch.Generator().manual_seed(seed)

    def words(rows: int) -> torch.Tensor:
        return torch.randint(
            -(2**31), 2**31 - 1, (rows, outputs // 8), dtype=torch.int32, generator=generator
        )

    qzeros = words(inputs // group) if zeros else torch.full((inputs // group, outputs // 8), EIGHTS).int()
    scales = (torch.rand(inputs // group, outputs, generator=generator) * 0.01 + 0.001).half()
    return native.Awq(
        words(inputs), qzeros, scales, torch.randn(outputs, generator=generator) if bias else None
    )


def oracle(x: torch.Tensor, one: native.Awq, group: int) -> torch.Tensor:
    y = reference.matmul(x, one.qweight, one.qzeros, one.scales, group)
    return y if one.bias is None else y + one.bias.double()


@needs_kernel
@pytest.mark.parametrize(
    ("inputs", "outputs", "group", "zeros", "bias"),
    [
        (256, 48, 128, False, False),
        (256, 8, 32, True, True),
        (512, 1160, 64, True, False),
        (128, 136, 128, False, True),
    ],
)
def test_against_the_oracle(inputs: int, outputs: int, group: int, zeros: bool, bias: bool):
    one, two = (stored(inputs, outputs, group, zeros, bias, seed) for seed in (1, 2))
    weight = native.prepare([one, two], group)
    for tokens in (*range(1, 15), 17, 65, 300):
        x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        expected = torch.cat([oracle(x, one, group), oracle(x, two, group)], 1)
        result = native.matmul(x, weight)
        # One rounding to bfloat16 at the end, and fp32 sums before it.
        bound = expected.abs() * 2**-8 + 1e-4 * expected.abs().max()
        assert ((result.double() - expected).abs() <= bound).all(), tokens
    assert native.matmul(torch.zeros(0, inputs).bfloat16(), weight).shape == (0, 2 * outputs)


@needs_kernel
def test_a_token_is_the_same_whatever_stands_beside_it_and_however_many_threads():
    weight = native.prepare([stored(512, 1160, 128, True, False)], 128)
    x = torch.randn(40, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole, threads = native.matmul(x, weight), torch.get_num_threads()
    for part in (x[:1], x[:2], x[:3], x[:4], x[:17]):
        assert torch.equal(native.matmul(part, weight), whole[: len(part)])
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(native.matmul(x, weight), whole)
    finally:
        torch.set_num_threads(threads)


@needs_kernel
def test_nothing_is_written_beside_the_result():
    """The kernel is handed the middle of a poisoned buffer."""
    one, tokens = stored(256, 72, 128, False, False), 7
    weight = native.prepare([one], 128)
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    buffer = torch.full((tokens + 2, 72), 777.0).bfloat16()
    x_GMg = x.view(tokens, 2, 128).transpose(0, 1).contiguous()
    call = native._Call(x_GMg.data_ptr(), buffer[1].data_ptr(), tokens, 256, 128, 72, None)
    assert (
        library().grace_int4_matmul(ctypes.byref(call), weight.parts, ctypes.c_int64(1), ctypes.c_int64(2))
        == 0
    )
    assert torch.equal(buffer[1:-1], native.matmul(x, weight))
    assert (buffer[0] == 777).all() and (buffer[-1] == 777).all()


@needs_kernel
def test_strided_activations_and_copies():
    one = stored(256, 48, 128, False, False)
    weight = native.prepare([one], 128)
    x = torch.randn(10, 256).bfloat16()
    assert torch.equal(native.matmul(x[::2], weight), native.matmul(x[::2].contiguous(), weight))
    assert torch.equal(native.matmul(x, copy.deepcopy(weight)), native.matmul(x, weight))


@needs_kernel
def test_what_does_not_fit_is_refused():
    one = stored(256, 48, 128, False, False)
    weight = native.prepare([one], 128)
    with pytest.raises(ValueError, match="bfloat16"):
        native.matmul(torch.zeros(1, 256), weight)
    with pytest.raises(ValueError, match="256 inputs"):
        native.matmul(torch.zeros(1, 128).bfloat16(), weight)
    with pytest.raises(ValueError, match="expected torch.float16"):
        native.prepare([native.Awq(one.qweight, one.qzeros, one.scales.float())], 128)
    with pytest.raises(ValueError, match="groups of"):
        native.prepare([stored(256, 48, 256, False, False)], 256)


def test_a_compiler_that_fails_is_an_obstacle(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setenv("GRACE_CACHE", str(tmp_path))
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho no such flag >&2; exit 1\n")
    broken.chmod(0o755)
    for compiler, reason in ((str(broken), "no such flag"), (str(tmp_path / "none"), "cannot be compiled")):
        monkeypatch.setenv("CC", compiler)
        compiled.obstacle.cache_clear()
        compiled.library.cache_clear()
        assert reason in str(compiled.obstacle())
    assert [path.name for path in tmp_path.iterdir()] == ["cc"]  # nothing half-written
    compiled.obstacle.cache_clear()
    compiled.library.cache_clear()


def test_another_processor_is_an_obstacle(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("compiled"))
    compiled.obstacle.cache_clear()
    assert "AVX512-BF16" in str(compiled.obstacle())
    compiled.obstacle.cache_clear()
