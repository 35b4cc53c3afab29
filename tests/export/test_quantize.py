"""`grace quantize`: against a float64 search on the same grid, format by format, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grace import cli, cli_publish
from grace.checkpoint import read_qat
from grace.data.records import load_records
from grace.errors import UserError
from grace.export import pack, quantize
from grace.export.quantize import quantize_model
from grace.quant.grid import dequantize
from grace.runtime.generate import load


def nearest_bf16(value: torch.Tensor) -> torch.Tensor:
    return value.clamp(2.0**-14, 2.0**15).float().bfloat16().double()


def oracle(
    weight: torch.Tensor, bits: int, group_size: int, scales: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales in float64, one candidate after another."""
    high = 2 ** (bits - 1) - 1
    groups = weight.double().reshape(len(weight), -1, group_size)
    largest = groups.abs().amax(-1) / high
    ratios = [1.0] if scales == "absmax" else torch.linspace(0.3, 1.2, 20, dtype=torch.float64).tolist()
    best = torch.full(largest.shape, torch.inf, dtype=torch.float64)
    codes, chosen = torch.zeros_like(groups), torch.zeros_like(largest)
    for ratio in ratios:
        scale = nearest_bf16(largest * ratio)
        rounded = (groups / scale[..., None]).round().clamp(-high - 1, high)
        error = (rounded * scale[..., None] - groups).square().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, scale, chosen)
        codes = torch.where(better[..., None], rounded, codes)
    return codes.reshape(weight.shape), chosen


@pytest.mark.parametrize(
    ("bits", "group_size", "scales"), [(4, 128, "mse"), (2, 32, "mse"), (8, 64, "absmax"), (3, 128, "absmax")]
)
def test_codes_and_scales_are_those_of_the_grid(
    tiny_student_dir: Path, tmp_path: Path, bits: int, group_size: int, scales: str
):
    report = quantize_model(
        tiny_student_dir, tmp_path / "out", bits, group_size, scales=scales, formats=["qat"]
    )
    json.dumps(report)
    weights = load_file(tiny_student_dir / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    state = read_qat(tmp_path / "out", latents=True)
    assert (state.bits, state.group_size, len(state.modules)) == (bits, group_size, 28)
    for name, weight in state.modules.items():
        codes, chosen = oracle(weights[f"{name}.weight"], bits, group_size, scales)
        error, least = (
            (
                dequantize(c.to(torch.int8), s.bfloat16(), group_size).double()
                - weights[f"{name}.weight"].double()
            )
            .square()
            .sum()
            for c, s in ((weight.codes_OI, weight.scales_OG), (codes, chosen))
        )
        assert error <= least * (1 + 1e-6)
        same = (weight.scales_OG.double() == chosen).double().mean()
        assert same > 0.999  # float32 sums may prefer the other of two equal errors
        assert torch.equal(
            written[f"{name}.weight"], dequantize(weight.codes_OI, weight.scales_OG, group_size)
        )
        assert weight.latent_OI is not None and torch.equal(
            weight.latent_OI, weights[f"{name}.weight"].float()
        )
    for name in set(weights) - {f"{name}.weight" for name in state.modules}:
        assert torch.equal(written[name], weights[name]) and written[name].dtype == weights[name].dtype


def test_every_format_at_once_holds_the_same_codes(
    tiny_student_dir: Path, tmp_path: Path, tiny_world_dir: Path
):
    records = load_records(tiny_world_dir / "validation.json")[:4]
    report = quantize_model(
        tiny_student_dir,
        tmp_path / "out",
        formats=pack.FORMATS,
        parity_records=records,
        max_shard_bytes=600_000,
    )
    for name, written in report["formats"].items():
        assert written["path"] == str(tmp_path / "out" / name) and written["parity"]["codes_identical"]
        if name != "qat":
            assert written["parity"]["exact"]["relative"] <= 1e-4
            assert written["parity"]["exact_greedy"]["identical"] == 4
    assert "kernel" in report["formats"]["awq"]["parity"]["deployed"]
    assert load(tmp_path / "out" / "awq").generate([], "What is this?", 2).tokens


def test_the_default_format_is_what_serves_these_bits(tiny_student_dir: Path, tmp_path: Path):
    found = {}
    for bits in (2, 4, 8):
        (found[bits],) = quantize_model(tiny_student_dir, tmp_path / str(bits), bits)["formats"]
    assert found == {2: "qat", 4: "awq", 8: "compressed-tensors"}
    card = (tmp_path / "4" / "README.md").read_text()
    assert "rounded to nearest, without training" in card and "GRACE W4" not in card
    assert "grace quantize MODEL --bits 4 --group-size 128 --scales mse" in card


def test_again_the_same_bytes_and_through_the_qat_directory_too(
    tiny_student_dir: Path, tmp_path: Path, tiny_world_dir: Path
):
    for out in ("one", "two"):
        quantize_model(tiny_student_dir, tmp_path / out, formats=["awq", "qat"])
    pack.export_run(
        tmp_path / "one" / "qat", tmp_path / "three", ("awq",), load_records(tiny_world_dir / "test.json")[:2]
    )
    for path in sorted((tmp_path / "one").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    three = tmp_path / "three" / "model.safetensors"
    assert three.read_bytes() == (tmp_path / "one" / "awq" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: (model / "config.json").unlink(), "no Qwen3-VL directory"),
        (lambda model: (model / "config.json").write_text('{"model_type": "llama"}'), "llama"),
        (lambda model: (model / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda model: (model / "model.safetensors").unlink(), "damaged"),
        (lambda model: (model / "model.safetensors").write_bytes(b"x" * 100), "damaged"),
        (lambda model: change(model, "q_proj.weight", lambda t: None), "q_proj.weight is missing"),
        (
            lambda model: change(model, "up_proj.weight", lambda t: t[:-8]),
            "up_proj.weight is .*its config.json says",
        ),
        (
            lambda model: change(model, "k_proj.weight", lambda t: t * torch.nan),
            "k_proj cannot be rounded.*NaN",
        ),
        (lambda model: change(model, "norm.weight", lambda t: t.int()), "norm.weight is int32"),
        (lambda model: change(model, "patch_embed.proj.bias", lambda t: t > 0), "proj.bias is bool"),
        (
            lambda model: change(model, "language_model.norm.weight", lambda t: t * 0 + 3.4e38),
            "norm.weight holds values too large for bfloat16",
        ),
        (lambda model: change(model, "norm.weight", lambda t: t, "model.extra.weight"), "does not have"),
        (lambda model: tied_inside_alone(model), "tie_word_embeddings inside text_config alone"),
        (lambda model: (model / "grace_qat").mkdir(), "use `grace export`"),
        (lambda model: (model / "x.gguf").touch(), "quantized already"),
    ],
)
def test_unusable_models_give_one_line_and_nothing_else(
    tiny_student_dir: Path, tmp_path: Path, damage, message: str
):
    model = tmp_path / "model"
    shutil.copytree(tiny_student_dir, model)
    damage(model)
    with pytest.raises(UserError, match=message) as caught:
        quantize_model(model, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def tied_inside_alone(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    tied = config.pop("tie_word_embeddings")
    config["text_config"]["tie_word_embeddings"] = tied
    (model / "config.json").write_text(json.dumps(config))


def change(model: Path, ending: str, how, more: str | None = None) -> None:
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(ending))
    changed = how(tensors.pop(name))
    if more is not None:
        tensors[more] = torch.zeros(3)
    if changed is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_groups_and_bits_that_do_not_fit(tiny_student_dir: Path, tmp_path: Path):
    with pytest.raises(UserError, match="AWQ holds 4 bits only and this run has 8"):
        quantize_model(tiny_student_dir, tmp_path / "out", 8, formats=["qat", "awq"])
    with pytest.raises(UserError, match="no multiple of 96: choose another --group-size"):
        quantize_model(tiny_student_dir, tmp_path / "out", group_size=96)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_other_methods_point_to_their_recipe(tiny_student_dir: Path, tmp_path: Path, capsys, method: str):
    arguments = ["quantize", str(tiny_student_dir), "--out", str(tmp_path / "out"), "--method", method]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1 and f"export/llm_compressor.py {tiny_student_dir} --method {method}" in error
    )
    assert (Path(__file__).parents[2] / quantize.RECIPE).is_file()


def test_the_command_and_its_copies(tiny_student_dir: Path, tmp_path: Path, capsys):
    assert cli.main(["quantize", str(tiny_student_dir), "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["formats"]["awq"]["bits"] == 4
    assert "identical" in printed.err and f"wrote {tmp_path / 'out'}" in printed.err
    assert cli_publish.FORMATS == pack.FORMATS
    assert cli_publish.METHODS == quantize.METHODS and cli_publish.GROUP_SIZES == quantize.GROUP_SIZES
    assert tuple(quantize.SCALES) == cli_publish.SCALES
