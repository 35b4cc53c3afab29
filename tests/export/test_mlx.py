"""MLX directories: the documented layout in float64, and MLX itself where it is installed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_qat_run import write_qat_run  # pyright: ignore[reportMissingImports] - tests/ is on the path

from grace.checkpoint import read_qat
from grace.errors import UserError
from grace.export.pack import export_run
from grace.models.foreign_names import mlx_name
from grace.quant.grid import dequantize


@pytest.fixture(scope="module")
def exported(run_of_bits: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory):
    """(run, export directory, bits)."""
    folder = tmp_path_factory.mktemp("mlx")
    run, bits = run_of_bits
    report = export_run(run, folder / "out", ("mlx",))
    assert report["formats"]["mlx"]["parity"]["exact"]["relative"] <= 1e-4
    return run, folder / "out", bits


def affine(weight: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int) -> np.ndarray:
    """The documented formula, w = scale * c + bias, element by element in float64."""
    words = weight.view(torch.int32).numpy().view(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words[..., None] >> shifts & np.uint32(2**bits - 1)).reshape(len(words), -1).astype(np.float64)
    wide = [
        np.repeat(tensor.double().numpy(), codes.shape[1] // tensor.shape[1], axis=1)
        for tensor in (scales, biases)
    ]
    return wide[0] * codes + wide[1]


def test_the_documented_layout_gives_the_trained_weights(exported):
    run, out, bits = exported
    tensors, state = load_file(out / "model.safetensors"), read_qat(run / "model")
    for name, weight in state.modules.items():
        parts = [tensors[f"{mlx_name(name)}.{part}"] for part in ("weight", "scales", "biases")]
        assert [part.dtype for part in parts] == [torch.uint32, torch.bfloat16, torch.bfloat16]
        expected = dequantize(weight.codes_OI, weight.scales_OG, state.group_size)
        assert np.array_equal(affine(*parts[:3], bits=bits), expected.double().numpy())


def test_mlx_itself_dequantizes_to_the_trained_weights(exported):
    mx = pytest.importorskip("mlx.core")
    run, out, bits = exported
    tensors, state = mx.load(str(out / "model.safetensors")), read_qat(run / "model")
    for name, weight in state.modules.items():
        packed, scales, biases = (
            tensors[f"{mlx_name(name)}.{part}"] for part in ("weight", "scales", "biases")
        )
        wide = mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), 128, bits)
        expected = dequantize(weight.codes_OI, weight.scales_OG, state.group_size)
        assert np.array_equal(np.array(wide), expected.numpy())


def test_names_and_dense_tensors(exported):
    run, out, bits = exported
    tensors, base = load_file(out / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    quantized = set(read_qat(run / "model").modules)
    for name, tensor in base.items():
        if name.removesuffix(".weight") not in quantized:
            stored = tensors.pop(mlx_name(name))
            if "patch_embed.proj.weight" in name:
                assert stored.shape == (96, 2, 16, 16, 3)
                stored = stored.movedim(-1, 1)
            assert torch.equal(stored, tensor.bfloat16())
    assert len(tensors) == 3 * len(quantized)
    assert all(name.startswith("language_model.model.layers.") for name in tensors)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"] == {"group_size": 128, "bits": bits, "mode": "affine"}


def test_a_group_size_without_kernels_is_refused(
    tmp_path: Path, tiny_student_dir: Path, tiny_world_dir: Path
):
    run = write_qat_run(tmp_path / "g16", tiny_student_dir, tiny_world_dir, group_size=16)
    with pytest.raises(UserError, match="groups of 32, 64, 128 and this run has 16"):
        export_run(run, tmp_path / "out", ("mlx",))
    assert not (tmp_path / "out").exists()


def test_smaller_groups(tmp_path: Path, tiny_student_dir: Path, tiny_world_dir: Path):
    run = write_qat_run(tmp_path / "g32", tiny_student_dir, tiny_world_dir, group_size=32)
    assert export_run(run, tmp_path / "out", ("mlx",))["formats"]["mlx"]["group_size"] == 32


def test_same_run_same_bytes(exported, tmp_path: Path):
    run, out, _ = exported
    export_run(run, tmp_path / "again", ("mlx",))
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
