"""The model directory that a run ends with: complete, readable by others, and checked when read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import one_bit, truncated
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLConfig

from grace.checkpoint import (
    QAT_FOLDER,
    QatState,
    QuantizedWeight,
    is_qat,
    read_qat,
    save_model,
)
from grace.errors import UserError
from grace.files import sha256_of
from grace.quant.grid import dequantize, init_theta, quantize


def weight(
    seed: int, bits: int = 4, group_size: int = 8, shape: tuple[int, int] = (6, 16)
) -> QuantizedWeight:
    latent_OI = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    theta_OG = init_theta(latent_OI, group_size, bits) + 0.01
    return QuantizedWeight(*quantize(latent_OI, theta_OG, group_size, bits), latent_OI, theta_OG)


def write_model(out: Path, base: Path, bits: int = 4, latents: bool = True) -> QatState:
    modules = {f"layers.{i}.q_proj": weight(i, bits) for i in range(2)}
    if not latents:
        modules = {name: QuantizedWeight(w.codes_OI, w.scales_OG) for name, w in modules.items()}
    qat = QatState(bits, 8, modules, {"metrics": {"val/ce": 1.5}, "steps": 20})
    state = {f"{name}.weight": dequantize(w.codes_OI, w.scales_OG, 8) for name, w in modules.items()}
    save_model(out, state, Qwen3VLConfig(), base, qat)
    return qat


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model's directory: some files that travel, one that does not."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(b'{"odd":   "spacing"}\r\n')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_text("not this")
    return folder


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("latents", [True, False])
def test_qat_round_trip(tmp_path: Path, base: Path, bits: int, latents: bool) -> None:
    written = write_model(tmp_path / "model", base, bits)
    assert is_qat(tmp_path / "model") and not is_qat(base)
    read = read_qat(tmp_path / "model", latents)
    assert (read.bits, read.group_size) == (bits, 8)
    assert read.info["metrics"] == {"val/ce": 1.5} and read.info["modules"] == sorted(written.modules)
    assert read.modules.keys() == written.modules.keys()
    state = load_file(tmp_path / "model" / "model.safetensors")
    for name, one in written.modules.items():
        two = read.modules[name]
        assert two.codes_OI.dtype == torch.int8 and torch.equal(two.codes_OI, one.codes_OI)
        assert two.scales_OG.dtype == torch.bfloat16 and torch.equal(two.scales_OG, one.scales_OG)
        assert torch.equal(state[f"{name}.weight"], dequantize(two.codes_OI, two.scales_OG, 8))
        if latents:
            assert torch.equal(two.latent_OI, one.latent_OI) and torch.equal(two.theta_OG, one.theta_OG)
        else:
            assert two.latent_OI is None and two.theta_OG is None


def test_model_directory_holds_what_a_loader_needs(tmp_path: Path, base: Path) -> None:
    write_model(tmp_path / "model", base)
    names = {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", QAT_FOLDER}
    assert set(os.listdir(tmp_path / "model")) == names
    assert set(os.listdir(tmp_path / "model" / QAT_FOLDER)) == {"state.safetensors", "info.json"}
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    info = json.loads((tmp_path / "model" / QAT_FOLDER / "info.json").read_text())
    assert info["state_sha256"] == sha256_of(tmp_path / "model" / QAT_FOLDER / "state.safetensors")


def test_model_is_never_written_over_another(tmp_path: Path, base: Path) -> None:
    write_model(tmp_path / "model", base)
    with pytest.raises(UserError, match=r"choose another run\.output_dir"):
        write_model(tmp_path / "model", base)


def test_latents_that_were_not_kept_cannot_be_read(tmp_path: Path, base: Path) -> None:
    write_model(tmp_path / "model", base, latents=False)
    assert read_qat(tmp_path / "model").modules
    with pytest.raises(UserError, match="latent"):
        read_qat(tmp_path / "model", latents=True)


def spoilt(folder: Path, change: Callable[[dict, dict], object]) -> None:
    """Rewrites `grace_qat/` with other contents and a checksum that fits them."""
    file, info_file = folder / "state.safetensors", folder / "info.json"
    state, info = load_file(file), json.loads(info_file.read_text())
    change(state, info)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    info_file.write_text(json.dumps({**info, "state_sha256": sha256_of(file)}))


Q = "layers.0.q_proj"
INCONSISTENT: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "codes of another type": (
        lambda s, _: s.update({f"{Q}.codes": s[f"{Q}.codes"].int()}),
        "codes must be int8",
    ),
    "scales of another type": (
        lambda s, _: s.update({f"{Q}.scales": s[f"{Q}.scales"].float()}),
        "scales bfloat16",
    ),
    "code out of range": (lambda s, _: s[f"{Q}.codes"].fill_(8), r"codes outside \[-8, 7\]"),
    "zero scale": (lambda s, _: s[f"{Q}.scales"].zero_(), "finite and positive"),
    "infinite scale": (lambda s, _: s[f"{Q}.scales"].fill_(torch.inf), "finite and positive"),
    "missing row of scales": (lambda s, _: s.update({f"{Q}.scales": s[f"{Q}.scales"][1:]}), "do not fit"),
    "columns beyond the groups": (
        lambda s, _: s.update({f"{Q}.codes": s[f"{Q}.codes"].repeat(1, 2)[:, :20]}),
        "do not fit",
    ),
    "flat codes": (lambda s, _: s.update({f"{Q}.codes": s[f"{Q}.codes"].flatten()}), "do not fit"),
    "flat scales": (lambda s, _: s.update({f"{Q}.scales": s[f"{Q}.scales"].flatten()}), "do not fit"),
    "latent of another shape": (
        lambda s, _: s.update({f"{Q}.latent": s[f"{Q}.latent"][1:]}),
        "latent .* do not fit",
    ),
    "theta of another shape": (
        lambda s, _: s.update({f"{Q}.theta": s[f"{Q}.theta"].T}),
        "theta .* do not fit",
    ),
    "tensor absent": (lambda s, _: s.pop(f"{Q}.codes"), Q),
    "group size of zero": (lambda _, i: i.update(group_size=0), "grace_qat"),
    "bits as text": (lambda _, i: i.update(bits="four"), "four"),
    "modules no list": (lambda _, i: i.update(modules=3), "grace_qat"),
    "unknown module": (lambda _, i: i.update(modules=["layers.9.q_proj"]), "layers.9"),
    "no group size": (lambda _, i: i.pop("group_size"), "group_size"),
}


@pytest.mark.parametrize("fault", INCONSISTENT)
def test_inconsistent_state_is_refused(tmp_path: Path, base: Path, fault: str) -> None:
    change, message = INCONSISTENT[fault]
    write_model(tmp_path / "model", base)
    spoilt(tmp_path / "model" / QAT_FOLDER, change)
    with pytest.raises(UserError, match=message):
        read_qat(tmp_path / "model", latents=True)


QAT_DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "truncated state": ("state.safetensors", truncated),
    "one bit": ("state.safetensors", one_bit),
    "missing state": ("state.safetensors", Path.unlink),
    "truncated info": ("info.json", truncated),
    "missing info": ("info.json", Path.unlink),
    "binary info": ("info.json", lambda path: path.write_bytes(b"\x80\xff")),
    "list for info": ("info.json", lambda path: path.write_text("[]")),
    "null for info": ("info.json", lambda path: path.write_text("null")),
}


@pytest.mark.parametrize("damage", QAT_DAMAGE)
def test_damaged_state_is_the_users_error(tmp_path: Path, base: Path, damage: str) -> None:
    name, spoil = QAT_DAMAGE[damage]
    write_model(tmp_path / "model", base)
    spoil(tmp_path / "model" / QAT_FOLDER / name)
    with pytest.raises(UserError, match="grace_qat is missing or damaged .*: export again or retrain"):
        read_qat(tmp_path / "model")


def test_directory_without_the_folder_is_the_users_error(tmp_path: Path, base: Path) -> None:
    write_model(tmp_path / "model", base)
    shutil.rmtree(tmp_path / "model" / QAT_FOLDER)
    with pytest.raises(UserError, match="missing or damaged"):
        read_qat(tmp_path / "model")
