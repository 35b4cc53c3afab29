"""Checkpoints are complete or absent, whatever kills the writer, and garbage is told from data."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLConfig

from grace.checkpoint import (
    QAT_FOLDER,
    QatState,
    QuantizedWeight,
    checkpoint_paths,
    is_qat,
    load_newest_checkpoint,
    read_qat,
    save_checkpoint,
    save_model,
)
from grace.errors import UserError
from grace.files import sha256_of
from grace.quant.grid import dequantize, init_theta, quantize


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "trainable": {"a.weight": torch.full((4, 3), float(step)), "b": torch.arange(5) + step},
        "optimizer": {"a.weight.step": torch.tensor(float(step))},
    }


def save(run_dir: Path, step: int, keep_last: int = 3) -> Path:
    return save_checkpoint(run_dir, step, tensors(step), {"beta": step / 7, "none": None}, keep_last)


def assert_is(loaded, step: int) -> None:
    assert loaded.step == step and loaded.state == {"beta": step / 7, "none": None}
    for stem, group in tensors(step).items():
        assert loaded.tensors[stem].keys() == group.keys()
        assert all(torch.equal(loaded.tensors[stem][name], value) for name, value in group.items())


def test_round_trip_of_the_newest(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path) is None and checkpoint_paths(tmp_path) == []
    for step in (9, 10, 100):
        save(tmp_path, step)
    assert_is(load_newest_checkpoint(tmp_path), 100)
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-000009", "step-000010", "step-000100"]


def test_tensors_that_share_memory_or_are_strided_are_saved_as_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    leaf = torch.nn.Parameter(base.T)
    save_checkpoint(tmp_path, 1, {"trainable": {"a": leaf, "b": base.T[::2]}}, {}, 1)
    loaded = load_newest_checkpoint(tmp_path)
    assert loaded is not None
    assert torch.equal(loaded.tensors["trainable"]["a"], base.T)
    assert torch.equal(loaded.tensors["trainable"]["b"], base.T[::2])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep_last=2)
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-000004", "step-000005"]


def as_before(newest: Path) -> None:
    """Turns a checkpoint into what was written when checksums were SHA-256 and the library wrote the tensors."""
    record = json.loads((newest / "state.json").read_text())
    record["sha256"] = {}
    for name in record.pop("xxh3"):
        save_file(load_file(newest / name), newest / name)
        record["sha256"][name] = sha256_of(newest / name)
    (newest / "state.json").write_text(json.dumps(record))


def test_earlier_checkpoints_are_read_and_checked(tmp_path: Path, capsys) -> None:
    save(tmp_path, 1)
    as_before(save(tmp_path, 2))
    assert_is(load_newest_checkpoint(tmp_path), 2)
    one_bit(tmp_path / "checkpoints/step-000002/trainable.safetensors")
    assert_is(load_newest_checkpoint(tmp_path), 1)
    assert "does not match its checksum" in capsys.readouterr().err


def test_a_step_done_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    (save(tmp_path, 5) / "trainable.safetensors").write_bytes(b"damaged")
    save(tmp_path, 5)
    assert_is(load_newest_checkpoint(tmp_path), 5)


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import test_checkpoint as here
from grace import checkpoint, checkpoint_files, files

run_dir, moment = Path(sys.argv[1]), sys.argv[2]
here.save(run_dir, 1, keep_last=2)
here.save(run_dir, 2, keep_last=2)

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def half(target, chunk):
    os.write(target, chunk[: len(chunk) // 2])
    die()

def one_file(path, **_):
    next(path.iterdir()).unlink()
    die()

if moment == "writing tensors":
    checkpoint_files._write_all = half
elif moment == "writing the state":
    Path.write_text = die
elif moment == "syncing":
    files.sync = die
elif moment == "renaming":
    os.rename = die
elif moment == "removing the oldest":
    shutil.rmtree = one_file
here.save(run_dir, 3, keep_last=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "newest"),
    [
        ("writing tensors", 2),
        ("writing the state", 2),
        ("syncing", 2),
        ("renaming", 2),
        ("removing the oldest", 3),
    ],
)
def test_kill_leaves_complete_checkpoints_and_harmless_strays(
    tmp_path: Path, moment: str, newest: int, capsys
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), moment, str(Path(__file__).parent)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == -signal.SIGKILL, finished.stderr
    strays = [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith(".")]
    assert len(strays) == (newest == 2)  # the kill did come in the middle
    assert_is(load_newest_checkpoint(tmp_path), newest)
    assert capsys.readouterr().err == ""  # nothing damaged is even looked at
    save(tmp_path, 3)
    save(tmp_path, 4, keep_last=1)
    assert_is(load_newest_checkpoint(tmp_path), 4)
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-000004"]


def test_failed_save_leaves_no_trace(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 2, tensors(2), {"not": {"json"}}, 3)
    assert os.listdir(tmp_path / "checkpoints") == ["step-000001"]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "truncated tensors": ("trainable.safetensors", truncated),
    "one bit of a tensor": ("optimizer.safetensors", one_bit),
    "empty tensors": ("trainable.safetensors", lambda path: path.write_bytes(b"")),
    "missing tensors": ("optimizer.safetensors", Path.unlink),
    "truncated state": ("state.json", truncated),
    "missing state": ("state.json", Path.unlink),
    "binary state": ("state.json", lambda path: path.write_bytes(b"\x80\xff\x00")),
    "list for a state": ("state.json", lambda path: path.write_text("[]")),
    "null for a state": ("state.json", lambda path: path.write_text("null")),
    "state without its keys": ("state.json", lambda path: path.write_text("{}")),
    "list for checksums": (
        "state.json",
        lambda path: path.write_text('{"xxh3": [], "step": 1, "state": {}}'),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_is_named_and_passed_over(tmp_path: Path, damage: str, capsys) -> None:
    name, spoil = DAMAGE[damage]
    for step in (1, 2):
        save(tmp_path, step)
    newest = checkpoint_paths(tmp_path)[-1]
    spoil(newest / name)
    assert_is(load_newest_checkpoint(tmp_path), 1)
    told = capsys.readouterr().err
    assert str(newest) in told and "damaged" in told and told.count("\n") == 1


@pytest.mark.parametrize("damage", DAMAGE)
def test_nothing_but_damage_is_the_users_error(tmp_path: Path, damage: str) -> None:
    name, spoil = DAMAGE[damage]
    spoil(save(tmp_path, 1) / name)
    with pytest.raises(UserError, match="every checkpoint in .* is damaged: remove the folder"):
        load_newest_checkpoint(tmp_path)


# ---------------------------------------------------------------- model directories


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
