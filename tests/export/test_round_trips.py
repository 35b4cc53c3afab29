"""One export made from another: the same bytes as from the run itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_qat_run import write_qat_run  # pyright: ignore[reportMissingImports] - tests/ is on the path

from grace.checkpoint import read_qat
from grace.errors import UserError
from grace.export.pack import export_run
from grace.export.quantize import quantize_model
from grace.export.record import RECORD
from grace.export.source import kind_of, open_source

CHAINS = {
    4: ("awq", "gguf", "mlx", "compressed-tensors", "awq"),
    8: ("gguf", "compressed-tensors", "mlx", "gguf"),
}


@pytest.fixture(scope="module")
def direct(qat_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one sub-directory per packed format, all made from the run."""
    out = tmp_path_factory.mktemp("direct") / "out"
    export_run(qat_run, out, tuple(dict.fromkeys(CHAINS[4])))
    return out


def follow(chain: tuple[str, ...], direct: Path, folder: Path) -> None:
    """Makes each format from the one before it, and compares it with the one made from the run."""
    before = direct / chain[0]
    for step, name in enumerate(chain[1:]):
        assert kind_of(before) == chain[step]
        report = export_run(before, folder / str(step), (name,))
        assert report["kind"] == chain[step]
        figures = report["formats"][name]["parity"]
        assert figures["exact"]["relative"] <= 1e-6 and "scale_rounding" not in figures
        before = folder / str(step)
        assert {path.name for path in before.iterdir()} == {path.name for path in (direct / name).iterdir()}
        for path in before.iterdir():
            if path.name not in ("README.md", RECORD):  # which tell of other samples
                assert path.read_bytes() == (direct / name / path.name).read_bytes(), (name, path.name)


def test_from_format_to_format_and_back(direct: Path, tmp_path: Path):
    follow(CHAINS[4], direct, tmp_path)


def test_eight_bits_likewise(tiny_student_dir: Path, tiny_world_dir: Path, tmp_path: Path):
    run = write_qat_run(tmp_path / "w8", tiny_student_dir, tiny_world_dir, bits=8)
    export_run(run, tmp_path / "direct", tuple(dict.fromkeys(CHAINS[8])))
    follow(CHAINS[8], tmp_path / "direct", tmp_path)


def test_the_card_says_the_source_and_keeps_what_it_said(direct: Path, tmp_path: Path):
    export_run(direct / "gguf", tmp_path / "mlx", ("mlx",))
    text = (tmp_path / "mlx" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "Qwen/Qwen3-VL-2B-Instruct" and front["license"] == "apache-2.0"
    assert "Converted from GGUF files, `gguf`" in text and "GRACE W4G128" in text
    assert "## Training" in text and "- optimizer steps: 20" in text and "val/exact_match" in text


def test_a_qat_checkpoint_made_from_an_export(direct: Path, qat_run: Path, tmp_path: Path):
    export_run(direct / "mlx", tmp_path / "qat", ("qat",))
    made, trained = read_qat(tmp_path / "qat"), read_qat(qat_run / "model")
    assert set(made.modules) == set(trained.modules) and (made.bits, made.group_size) == (4, 128)
    weights, base = (load_file(path / "model.safetensors") for path in (tmp_path / "qat", qat_run / "model"))
    assert set(weights) == set(base)
    for name, weight in trained.modules.items():
        assert torch.equal(made.modules[name].codes_OI, weight.codes_OI)
        assert torch.equal(made.modules[name].scales_OG, weight.scales_OG)
        assert torch.equal(weights[f"{name}.weight"], base[f"{name}.weight"])
    export_run(tmp_path / "qat", tmp_path / "again", ("mlx",))
    for path in (tmp_path / "again").glob("*.safetensors"):
        assert path.read_bytes() == (direct / "mlx" / path.name).read_bytes()


@pytest.mark.parametrize("written_null", [False, True])
def test_a_model_without_a_history_through_a_qat_checkpoint(
    tiny_student_dir: Path, tmp_path: Path, written_null: bool
):
    """Its card says nothing of training, and what is not known is not asked for; older writers wrote null."""
    quantize_model(tiny_student_dir, tmp_path / "awq")
    export_run(tmp_path / "awq", tmp_path / "qat", ("qat",))
    path = tmp_path / "qat" / "grace_qat" / "info.json"
    info = json.loads(path.read_text())
    assert None not in info.values()
    if written_null:
        path.write_text(json.dumps({**info, "sections": None, "base_model": None, "license": None}))
    export_run(tmp_path / "qat", tmp_path / "mlx", ("mlx",))
    assert "Converted from a QAT checkpoint" in (tmp_path / "mlx" / "README.md").read_text()


def test_shards_are_read_like_one_file(direct: Path, tmp_path: Path):
    name = "compressed-tensors"
    export_run(direct / "gguf", tmp_path / "cut", (name, "gguf"), max_shard_bytes=300_000)
    assert len(list((tmp_path / "cut" / name).glob("*.safetensors"))) > 1
    assert len(list((tmp_path / "cut" / "gguf").glob("model-*.gguf"))) > 1
    for kind in (name, "gguf"):
        whole, parts = open_source(direct / kind), open_source(tmp_path / "cut" / kind)
        for module, weight in whole.qat.modules.items():
            assert torch.equal(parts.qat.modules[module].codes_OI, weight.codes_OI)
        for tensor in whole.weights.shapes:
            assert torch.equal(parts.weights.read(tensor), whole.weights.read(tensor))
    (next(iter((tmp_path / "cut" / "gguf").glob("model-*.gguf")))).unlink()
    with pytest.raises(UserError, match="split into"):
        open_source(tmp_path / "cut" / "gguf")


def test_without_the_group_size_every_block_is_a_group(direct: Path, tmp_path: Path):
    """As llama.cpp's own tools would leave it: still exact, in smaller groups."""
    shutil.copytree(direct / "gguf", tmp_path / "gguf")
    file = next((tmp_path / "gguf").glob("model-*.gguf"))
    file.write_bytes(file.read_bytes().replace(b"grace.group_size", b"other.group_size"))
    whole, blocks = open_source(direct / "gguf"), open_source(tmp_path / "gguf")
    assert (whole.qat.group_size, blocks.qat.group_size) == (128, 32)
    for module, weight in whole.qat.modules.items():
        again = blocks.qat.modules[module]
        assert torch.equal(again.codes_OI, weight.codes_OI)
        assert torch.equal(again.scales_OG, weight.scales_OG.repeat_interleave(4, 1))


def test_a_local_base_model_keeps_its_name(qat_run: Path, tmp_path: Path):
    shutil.copytree(qat_run, tmp_path / "run")
    path = tmp_path / "run" / "model" / "grace_qat" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model": "/somewhere/runs/my-student"}))
    export_run(tmp_path / "run", tmp_path / "x", ("mlx", "gguf"))
    export_run(tmp_path / "x" / "mlx", tmp_path / "gguf", ("gguf",))
    for file in (tmp_path / "gguf").glob("*.gguf"):
        assert file.read_bytes() == (tmp_path / "x" / "gguf" / file.name).read_bytes()
