"""`grace inspect`: the figures, against a plain computation of each."""

import argparse
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_qat_run import write_qat_run  # pyright: ignore[reportMissingImports] - tests/ is on the path

from grace.checkpoint import read_qat
from grace.errors import UserError
from grace.files import sha256_of
from grace.runtime.inspect import inspect_checkpoint, run_inspect


@pytest.fixture(scope="module")
def report(qat_run: Path):
    return inspect_checkpoint(qat_run / "model")


def test_figures_of_every_layer(report, qat_run: Path):
    state = read_qat(qat_run / "model", latents=True)
    assert [layer["name"] for layer in report["layers"]] == sorted(state.modules)
    assert (report["kind"], report["bits"], report["group_size"]) == ("qat", 4, 128)
    for layer in report["layers"]:
        weight = state.modules[layer["name"]]
        codes, scales, latent = weight.codes_OI, weight.scales_OG.float(), weight.latent_OI
        assert latent is not None
        assert layer["shape"] == list(codes.shape) and layer["bits"] == 4 and layer["group_size"] == 128
        assert layer["scale_min"] == scales.min().item() and layer["scale_max"] == scales.max().item()
        assert layer["histogram"] == [int((codes == code).sum()) for code in range(-8, 8)]
        rounded = codes.double() * scales.double().repeat_interleave(128, 1)
        noise = (latent.double() - rounded).square().sum()
        assert layer["snr_db"] == pytest.approx(10 * math.log10(latent.double().square().sum() / noise))
        assert layer["bytes"] == codes.numel() + 2 * scales.numel()


def test_totals(report, qat_run: Path):
    layers, totals = report["layers"], report["totals"]
    assert totals["layers"] == len(layers) == 28
    assert totals["weights"] == sum(math.prod(layer["shape"]) for layer in layers)
    assert totals["quantized_bytes"] == sum(layer["bytes"] for layer in layers)
    assert totals["bits_per_weight"] == pytest.approx(8 + 16 / 128)
    assert totals["safetensors_bytes"] == sum(
        path.stat().st_size for path in (qat_run / "model").rglob("*.safetensors")
    )
    known = [layer["snr_db"] for layer in layers]
    assert totals["snr_db_min"] == min(known) and totals["snr_db_mean"] == pytest.approx(sum(known) / 28)


def test_the_packed_directory_holds_the_same(report, awq_dir: Path):
    packed = inspect_checkpoint(awq_dir)
    assert sum(kernel["count"] for kernel in packed["kernels"]) == 28 and report["kernels"] == []
    assert all(kernel["kernel"] and kernel["device"] in ("cpu", "cuda") for kernel in packed["kernels"])
    assert packed["kind"] == "awq"
    same = ("name", "bits", "group_size", "shape", "scale_min", "scale_max", "histogram")
    for layer, trained in zip(packed["layers"], report["layers"], strict=True):
        assert {key: layer[key] for key in same} == {key: trained[key] for key in same}
        assert layer["snr_db"] is None and "no fp32 latents" in layer["snr_reason"]
    # 4 bits of code, and per group of 128 an fp16 scale and a 4-bit zero point
    assert packed["totals"]["bits_per_weight"] == pytest.approx(4 + 20 / 128)
    assert packed["totals"]["snr_db_mean"] is None


def test_eight_bits(tmp_path: Path, tiny_student_dir: Path, tiny_world_dir: Path):
    run = write_qat_run(tmp_path / "w8", tiny_student_dir, tiny_world_dir, bits=8)
    layer = inspect_checkpoint(run / "model")["layers"][0]
    codes = read_qat(run / "model").modules[layer["name"]].codes_OI.int()
    assert layer["bits"] == 8
    assert layer["histogram"] == torch.bincount((codes.flatten() + 128) // 16, minlength=16).tolist()


def test_a_published_copy_without_latents(qat_run: Path, tmp_path: Path):
    shutil.copytree(qat_run / "model", tmp_path / "m")
    file, info = (tmp_path / "m" / "grace_qat" / name for name in ("state.safetensors", "info.json"))
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if not name.endswith(("latent", "theta"))}, file)
    info.write_text(json.dumps(json.loads(info.read_text()) | {"state_sha256": sha256_of(file)}))
    layers = inspect_checkpoint(tmp_path / "m")["layers"]
    assert all(layer["snr_db"] is None and layer["snr_reason"] for layer in layers)


def test_the_command_prints_a_table_or_json(qat_run: Path, awq_dir: Path, capsys):
    assert run_inspect(argparse.Namespace(directory=qat_run / "model", json=True)) == 0
    assert json.loads(capsys.readouterr().out) == inspect_checkpoint(qat_run / "model")
    assert run_inspect(argparse.Namespace(directory=awq_dir, json=False)) == 0
    text = capsys.readouterr().out
    assert "layers.0.self_attn.q_proj" in text and "4.16 bits per quantized weight" in text
    assert "SNR unknown: no fp32 latents" in text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shutil.rmtree(path), "not a directory"),
        (lambda path: (path / "config.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "model.safetensors").write_bytes(b"x" * 99), "damaged"),
        (lambda path: (path / "model.safetensors").unlink(), "no quantized layers"),
        (lambda path: drop(path, "scales"), "damaged"),
        (lambda path: drop(path, "scales", float("nan")), "scales hold NaN"),
        (lambda path: edit_block(path, group_size=0), "groups of '0'"),
        (lambda path: edit_block(path, bits=4.0), "'4.0' bits"),
    ],
)
def test_what_cannot_be_inspected(awq_dir: Path, tmp_path: Path, damage, message: str):
    shutil.copytree(awq_dir, tmp_path / "awq")
    damage(tmp_path / "awq")
    with pytest.raises(UserError, match=message) as caught:
        inspect_checkpoint(tmp_path / "awq")
    assert "\n" not in str(caught.value)


def edit_block(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    block = config["quantization_config"]
    config["quantization_config"] = {
        key: value for key, value in {**block, **changes}.items() if value != "gone"
    }
    (path / "config.json").write_text(json.dumps(config))


def test_the_older_names_of_bits_and_groups(awq_dir: Path, tmp_path: Path):
    shutil.copytree(awq_dir, tmp_path / "awq")
    edit_block(tmp_path / "awq", bits="gone", group_size="gone", w_bit=4, q_group_size=128)
    assert inspect_checkpoint(tmp_path / "awq")["layers"] == inspect_checkpoint(awq_dir)["layers"]


def test_latents_that_are_no_numbers_or_not_whole(qat_run: Path, tmp_path: Path):
    shutil.copytree(qat_run / "model", tmp_path / "m")
    file, info = (tmp_path / "m" / "grace_qat" / name for name in ("state.safetensors", "info.json"))
    tensors = load_file(file)
    for name in list(tensors):
        if name.endswith(".latent"):
            tensors[name][0, 0] = float("nan")
    for left_out, reason in ((".nothing", "NaN or infinite"), (".theta", "no fp32 latents")):
        save_file({name: t for name, t in tensors.items() if not name.endswith(left_out)}, file)
        info.write_text(json.dumps({**json.loads(info.read_text()), "state_sha256": sha256_of(file)}))
        report = inspect_checkpoint(tmp_path / "m")
        assert all(reason in layer["snr_reason"] for layer in report["layers"])
        json.dumps(report, allow_nan=False)


def drop(path: Path, suffix: str, value: float | None = None) -> None:
    """Leaves a tensor out, or fills it with a value instead."""
    tensors = load_file(path / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(suffix))
    if value is None:
        del tensors[name]
    else:
        tensors[name].fill_(value)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_full_precision_and_damaged_state(tiny_student_dir: Path, qat_run: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no quantized weights"):
        inspect_checkpoint(tiny_student_dir)
    shutil.copytree(qat_run / "model", tmp_path / "m")
    file = tmp_path / "m" / "grace_qat" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="damaged"):
        inspect_checkpoint(tmp_path / "m")
