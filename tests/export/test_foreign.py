"""Other people's checkpoints, read by nothing but their own formats' rules and re-exported exactly or refused."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from foreign_checkpoints import (  # pyright: ignore[reportMissingImports] - tests/ is on the path
    ORDER,
    dequantized,
    write_awq,
    write_reference_awq,
    write_reference_qat,
)
from safetensors.torch import load_file, save_file

from grace.checkpoint import read_qat
from grace.data.records import load_records
from grace.errors import UserError
from grace.export.pack import export_run
from grace.export.source import kind_of, open_source
from grace.models.foreign_names import mlx_name

Linears = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("foreign")


@pytest.fixture(scope="module")
def asymmetric(folder: Path, tiny_student_dir: Path) -> tuple[Path, Linears]:
    return folder / "awq64", write_awq(tiny_student_dir, folder / "awq64", 64)


@pytest.fixture(scope="module")
def reference(folder: Path, tiny_student_dir: Path) -> tuple[Path, Linears]:
    return folder / "refqat", write_reference_qat(tiny_student_dir, folder / "refqat")


def awq_values(
    directory: Path, name: str, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, zero points (0..15) and scales of a written AWQ linear, nibble by nibble."""
    tensors = load_file(directory / "model.safetensors")
    found = []
    for part in ("qweight", "qzeros"):
        words = tensors[f"{name}.{part}"].long() % 2**32
        values = torch.empty(words.shape[0], words.shape[1] * 8, dtype=torch.long)
        for nibble, column in enumerate(ORDER):
            values[:, column::8] = words >> (4 * nibble) & 15
        found.append(values.t())
    assert found[0].shape[1] == found[1].shape[1] * group_size
    return found[0], found[1], tensors[f"{name}.scales"].t()


def decompressed(directory: Path, name: str) -> torch.Tensor:
    """W of a written compressed-tensors linear by that library, from fp32 scales."""
    tensors = load_file(directory / "model.safetensors")
    block = json.loads((directory / "config.json").read_text())["quantization_config"]
    (group,) = block["config_groups"].values()
    compressor: Any = BaseCompressor.get_value_from_registry(block["format"])
    parts: dict[str, Any] = {
        key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")
    }
    parts["weight_scale"] = parts["weight_scale"].float()
    return compressor.decompress(parts, QuantizationScheme.model_validate(group))["weight"]


def affine(directory: Path, name: str, bits: int) -> np.ndarray:
    """W of a written MLX linear by the documented formula in float64."""
    tensors = load_file(directory / "model.safetensors")
    packed, scales, biases = (tensors[f"{mlx_name(name)}.{part}"] for part in ("weight", "scales", "biases"))
    words = packed.view(torch.int32).numpy().view(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words[..., None] >> shifts & np.uint32(2**bits - 1)).reshape(len(words), -1).astype(np.float64)
    size = codes.shape[1] // scales.shape[1]
    wide = [np.repeat(tensor.double().numpy(), size, axis=1) for tensor in (scales, biases)]
    return wide[0] * codes + wide[1]


def test_asymmetric_awq_goes_exactly_where_zero_points_fit(asymmetric, tmp_path: Path, tiny_world_dir: Path):
    directory, linears = asymmetric
    formats = ("awq", "compressed-tensors", "mlx")
    records = load_records(tiny_world_dir / "validation.json")
    report = export_run(directory, tmp_path / "x", formats, records)
    for name in formats:
        figures = report["formats"][name]["parity"]
        assert figures["records"] == 16 and figures["exact"]["relative"] <= 1e-6
        config = json.loads((tmp_path / "x" / name / "config.json").read_text())
        assert config["dtype"] == "float16"
    assert any(int(linear["zeros"].min()) != int(linear["zeros"].max()) for linear in linears.values())
    for name, linear in linears.items():
        again = awq_values(tmp_path / "x" / "awq", name, 64)
        assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(again, linear.values(), strict=True))
        expected = dequantized(linear)
        assert torch.equal(decompressed(tmp_path / "x" / "compressed-tensors", name).double(), expected)
        assert np.array_equal(affine(tmp_path / "x" / "mlx", name, 4), expected.numpy())
    theirs, ours = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "x" / "awq"))
    assert set(theirs) == set(ours) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    card = (tmp_path / "x" / "mlx" / "README.md").read_text()
    assert "with zero points" in card and "Converted from an AWQ checkpoint" in card and "license" not in card
    assert "GRACE W4" not in card
    export_run(tmp_path / "x" / "compressed-tensors", tmp_path / "mlx", ("mlx",))
    export_run(tmp_path / "x" / "mlx", tmp_path / "compressed-tensors", ("compressed-tensors",))
    for name in ("mlx", "compressed-tensors"):  # and back, with nothing lost
        again, first = (path / name / "model.safetensors" for path in (tmp_path, tmp_path / "x"))
        assert again.read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    ("target", "reason"),
    [("gguf", "zero points.*Q4_0 block has no zero point"), ("qat", "zero points.*symmetric")],
)
def test_zero_points_are_refused_with_the_reason(asymmetric, tmp_path: Path, target: str, reason: str):
    with pytest.raises(UserError, match=reason) as caught:
        export_run(asymmetric[0], tmp_path / "out", (target,))
    assert "--format awq or compressed-tensors or mlx" in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("group_size", [32, 128])
def test_symmetric_awq_of_other_groups(tiny_student_dir: Path, tmp_path: Path, group_size: int):
    linears = write_awq(tiny_student_dir, tmp_path / "awq", group_size, symmetric=True)
    export_run(tmp_path / "awq", tmp_path / "gguf", ("gguf",))
    (file,) = (tmp_path / "gguf").glob("model-*.gguf")
    assert (tmp_path / "gguf" / "mmproj-F16.gguf").is_file()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    name = "model.language_model.layers.1.mlp.up_proj"
    wide = gguf.quants.dequantize(tensors["blk.1.ffn_up.weight"].data, gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(wide, dequantized(linears[name]).float().numpy())
    base = load_file(tiny_student_dir / "model.safetensors")["model.language_model.embed_tokens.weight"]
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    assert np.array_equal(tensors["token_embd.weight"].data, base.half().numpy())
    again = open_source(tmp_path / "gguf")
    assert again.scale_dtype == torch.float16 and again.qat.group_size == group_size
    with pytest.raises(UserError, match="scales that bfloat16 cannot hold"):
        export_run(tmp_path / "awq", tmp_path / "qat", ("qat",))


def test_linears_that_others_left_dense_stay_dense(tiny_student_dir: Path, tmp_path: Path):
    left = ("layers.0.mlp.down_proj", "layers.2.self_attn.q_proj")
    linears = write_awq(tiny_student_dir, tmp_path / "awq", 128, dense=left)
    report = export_run(tmp_path / "awq", tmp_path / "x", ("awq", "compressed-tensors"))
    assert {written["modules"] for written in report["formats"].values()} == {26} == {len(linears)}
    config = json.loads((tmp_path / "x" / "awq" / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"][-2:] == list(left)
    tensors = load_file(tmp_path / "x" / "compressed-tensors" / "model.safetensors")
    assert tensors["model.language_model.layers.0.mlp.down_proj.weight"].dtype == torch.float16


def test_packed_checkpoints_of_the_public_code(tiny_student_dir: Path, tmp_path: Path):
    linears = write_reference_awq(tiny_student_dir, tmp_path / "packed")
    assert kind_of(tmp_path / "packed") == "awq"
    export_run(tmp_path / "packed", tmp_path / "x", ("awq", "compressed-tensors"))
    config = json.loads((tmp_path / "x" / "awq" / "config.json").read_text())
    assert "awq_packing" not in config and config["quantization_config"]["zero_point"] is True
    theirs, ours = (
        load_file(path / "model.safetensors") for path in (tmp_path / "packed", tmp_path / "x" / "awq")
    )
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    for name, linear in linears.items():
        wide = decompressed(tmp_path / "x" / "compressed-tensors", name)
        assert torch.equal(wide.double(), dequantized(linear))


def test_trained_checkpoints_of_the_public_code(reference, tmp_path: Path):
    """Codes everywhere theirs; scales exact where the format has float32, else the nearest, and reported."""
    directory, linears = reference
    report = export_run(directory, tmp_path / "x", ("awq", "compressed-tensors", "gguf", "mlx", "qat"))[
        "formats"
    ]
    state = read_qat(tmp_path / "x" / "qat")
    (file,) = (tmp_path / "x" / "gguf").glob("model-*.gguf")
    blocks = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    for name, linear in linears.items():
        codes, zeros, scales = awq_values(tmp_path / "x" / "awq", name, 128)
        assert torch.equal(codes - 8, linear["codes"].long()) and bool((zeros == 8).all())
        assert torch.equal(scales, linear["scales"].half())
        assert torch.equal(state.modules[name].codes_OI, linear["codes"])
        assert torch.equal(state.modules[name].scales_OG, linear["scales"].bfloat16())
        wide = decompressed(tmp_path / "x" / "compressed-tensors", name)
        assert torch.equal(wide, linear["codes"].float() * linear["scales"].repeat_interleave(128, 1))
        again = affine(tmp_path / "x" / "mlx", name, 4)
        assert np.array_equal(again, dequantized(linear).numpy())
    name = "model.language_model.layers.0.self_attn.k_proj"
    wide = gguf.quants.dequantize(blocks["blk.0.attn_k.weight"], gguf.GGMLQuantizationType.Q4_0)
    halves = linears[name]["scales"].half().float().repeat_interleave(128, 1)
    assert np.array_equal(wide, (linears[name]["codes"].float() * halves).numpy())
    for name in ("awq", "gguf"):
        rounding = report[name]["parity"]["scale_rounding"]
        assert 0 < rounding["largest_relative"] <= 2**-11 and rounding["dtype"] == "float16"
        assert 0 < rounding["logits_relative"] < 0.02
        assert "within" in (tmp_path / "x" / name / "README.md").read_text()
    assert 2**-11 < report["qat"]["parity"]["scale_rounding"]["largest_relative"] <= 2**-8
    for name in ("compressed-tensors", "mlx"):
        assert "scale_rounding" not in report[name]["parity"]
        assert "SCALES" not in (tmp_path / "x" / name / "README.md").read_text()


def test_eight_bits_of_the_public_code_are_noticed(tiny_student_dir: Path, tmp_path: Path):
    linears = write_reference_qat(tiny_student_dir, tmp_path / "ref", bits=8)
    report = export_run(tmp_path / "ref", tmp_path / "ct", ("compressed-tensors",))
    assert report["formats"]["compressed-tensors"]["bits"] == 8
    for name, linear in linears.items():
        wide = decompressed(tmp_path / "ct", name)
        assert torch.equal(wide, linear["codes"].float() * linear["scales"].repeat_interleave(128, 1))
    with pytest.raises(UserError, match="4 bits only"):
        export_run(tmp_path / "ref", tmp_path / "awq", ("awq",))


def test_weights_off_the_grid_are_rounded_and_clipped(tiny_student_dir: Path, tmp_path: Path):
    """As the public code's own packer does with a sidecar that was written before the weights were baked."""
    linears = write_reference_qat(tiny_student_dir, tmp_path / "ref", on_grid=False)
    source = open_source(tmp_path / "ref")
    assert source.qat.bits == 4
    clipped = 0
    for name, linear in linears.items():
        codes = source.qat.modules[name].codes_OI
        assert torch.equal(codes, linear["codes"])
        clipped += int((codes == -8).sum()) + int((codes == 7).sum())
    assert clipped > 1000


def test_a_group_of_zeros_has_any_scale(tiny_student_dir: Path, tmp_path: Path):
    """1e-8, what the public code gives it, is 0 in fp16; neither the export nor its next reader minds."""
    write_reference_qat(tiny_student_dir, tmp_path / "ref")
    file = tmp_path / "ref" / "qat_quantized_weights.bin"
    sidecar = torch.load(file, weights_only=True)
    name = "model.language_model.layers.0.mlp.up_proj"
    sidecar[f"{name}.weight"][0] = 0
    sidecar[f"{name}.log_scale"][0] = torch.tensor(1e-8).log()
    torch.save(sidecar, file)
    report = export_run(tmp_path / "ref", tmp_path / "awq")
    assert report["formats"]["awq"]["parity"]["scale_rounding"]["largest_relative"] <= 2**-11
    weight = open_source(tmp_path / "awq").qat.modules[name]
    assert weight.scales_OG[0, 0] == 2.0**-24 and not bool(weight.codes_OI[0].any())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "AWQ with '3' bits"),
        ({"version": "gemv"}, "version 'gemv'"),
        ({"group_size": -1}, "group size of '-1'"),
        ({"group_size": 100}, "no groups of 100"),
        ({"group_size": 32}, "do not fit"),
        ({"quant_method": "gptq"}, "quantized with gptq"),
        ({"quant_method": None}, "quantized with None"),
    ],
)
def test_variants_that_are_not_read(asymmetric, tmp_path: Path, change: dict, message: str):
    directory, _ = asymmetric
    for path in directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_mlx_biases_that_are_no_zero_points_are_refused(asymmetric, tmp_path: Path):
    export_run(asymmetric[0], tmp_path / "mlx", ("mlx",))
    tensors = load_file(tmp_path / "mlx" / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("biases"))
    tensors[name] *= 1.01
    save_file(tensors, tmp_path / "mlx" / "model.safetensors", metadata={"format": "mlx"})
    with pytest.raises(UserError, match="biases are not zero points times scales"):
        open_source(tmp_path / "mlx")
