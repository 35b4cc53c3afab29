"""Damaged and hostile model directories: one line, exit code 2, no output, no hang, bounded memory.

The fuzz corpus changes real files (headers above all) at random, the same way on every run: some hundred cases
by default, 10,000 in the slow test.
"""

import errno
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from foreign_checkpoints import (  # pyright: ignore[reportMissingImports] - tests/ is on the path
    write_awq,
    write_reference_qat,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from grace.checked_files import DamagedFile, parse_json, safetensors_header
from grace.checkpoint import read_qat
from grace.data.records import load_records
from grace.errors import UserError
from grace.export.checked_gguf import gguf_header
from grace.export.pack import export_run
from grace.export.provenance import provenance
from grace.export.push import open_upload
from grace.export.quantize import quantize_model
from grace.export.source import open_source
from grace.export.torch_archive import TorchFile
from grace.files import sha256_of
from grace.models import qwen3vl
from grace.models.config_check import require_possible
from grace.models.processor import load_processor
from grace.runtime.generate import load
from grace.runtime.inspect import inspect_checkpoint

SIDECAR = "qat_quantized_weights.bin"
SECONDS = 20  # for one case, on a machine that has other things to do
MEGABYTES = 600  # that the whole corpus may add to the process


@pytest.fixture(scope="module")
def directories(
    qat_run: Path, tiny_student_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One directory of every kind that is read. Not to be written into."""
    folder = tmp_path_factory.mktemp("whole")
    formats = ("awq", "compressed-tensors", "gguf", "mlx")
    export_run(qat_run, folder / "x", formats)
    write_awq(tiny_student_dir, folder / "foreign", 64)
    write_reference_qat(tiny_student_dir, folder / "refqat")
    own = {"qat": qat_run / "model", "plain": tiny_student_dir, "foreign": folder / "foreign"}
    return {**own, "refqat": folder / "refqat", **{name: folder / "x" / name for name in formats}}


def copied(directory: Path, out: Path) -> Path:
    """A copy whose files may be replaced one by one."""
    shutil.copytree(directory, out, copy_function=os.link)
    return out


def replace(path: Path, content: bytes | str) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def one_line(function: Callable[..., object], *arguments: object) -> str:
    """The message of the `UserError` that a call raises, in time."""
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert time.perf_counter() - start < SECONDS
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


def refused(directory: Path, tmp_path: Path, message: str, format: str = "awq") -> None:
    """`grace export` refuses a directory and leaves nothing."""
    out = tmp_path / "out"
    said = one_line(export_run, directory, out, (format,))
    assert re.search(message, said), said
    assert not out.exists() and not list(tmp_path.glob(".out*"))


# ---------------------------------------------------------------- configs


def config_with(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (config[section] if section else config)[key] = value
    replace(directory / "config.json", json.dumps(config))


CONFIGS = {
    "an absurd width": ({"text_config__hidden_size": 10**12}, "hidden_size is '1000000000000'"),
    "many layers": ({"text_config__num_hidden_layers": 10**9}, "num_hidden_layers"),
    "a deep tower": ({"vision_config__depth": 10**7}, "depth"),
    "a large vocabulary": ({"text_config__vocab_size": 2**22}, "its config.json says"),
    "more layers": ({"text_config__num_hidden_layers": 5}, "layers.4.* missing|missing keys"),
    "fewer layers": ({"text_config__num_hidden_layers": 3}, "does not have|unexpected|no linear layer"),
    "another width": ({"text_config__intermediate_size": 512}, "its config.json says"),
    "a negative width": ({"text_config__hidden_size": -1}, "hidden_size"),
    "a width in words": ({"text_config__hidden_size": "128"}, "hidden_size"),
    "true layers": ({"text_config__num_hidden_layers": True}, "num_hidden_layers"),
    "heads that do not fit": ({"text_config__num_attention_heads": 7}, "its config.json says|cannot be read"),
    "no text": ({"text_config": 7}, "text_config"),
    "deepstack beyond the tower": ({"vision_config__deepstack_visual_indexes": [99]}, "deepstack"),
    "another model": ({"model_type": "llava"}, "a llava model"),
    "code of its own": (
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}},
        "an? evil model",
    ),
    "a billion labels": ({"num_labels": 10**9}, "num_labels"),
    "a billion labels of text": ({"text_config__num_labels": 10**9}, "text_config.num_labels"),
    "a billion labels of pictures": ({"vision_config__num_labels": 10**9}, "vision_config.num_labels"),
    "labels that are none": ({"id2label": 10**9}, "id2label"),
    "a tower of no type": ({"vision_config__model_type": []}, "vision_config.model_type"),
    "turned by nothing": ({"text_config__rope_theta": 0}, "rope_theta"),
    "turned backwards": ({"text_config__rope_parameters": {"rope_theta": -1}}, "rope_theta"),
    "turned by a word": ({"text_config__rope_scaling": "mrope"}, "rope_scaling"),
    **{
        f"positions of {sections}": (
            {"text_config__rope_scaling": {"mrope_section": sections}},
            "mrope_section",
        )
        for sections in (None, [], {}, 24, "24")
    },
    "a picture token beyond all": ({"image_token_id": 10**9}, "image_token_id"),
    "an end in words": ({"text_config__eos_token_id": "x"}, "eos_token_id"),
    "no model type": ({"model_type": ["qwen3_vl"]}, "model of unknown type"),
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("kind", ["awq", "plain"])
def test_a_config_that_cannot_be(directories, tmp_path: Path, kind: str, case: str):
    changes, message = CONFIGS[case]
    directory = copied(directories[kind], tmp_path / "m")
    config_with(directory, **changes)
    if kind == "awq":
        refused(directory, tmp_path, message)
    said = one_line(load, directory)
    assert re.search(message, said), said
    if kind == "plain" and case != "fewer layers":  # what training does not ask for it leaves aside
        one_line(qwen3vl.load_model, str(directory))


def test_another_token_for_pictures(directories, tmp_path: Path):
    directory = copied(directories["mlx"], tmp_path / "m")
    config_with(directory, image_token_id=0)
    refused(directory, tmp_path, "image_token_id is 0, its tokenizer has", "mlx")


BLOCKS = {
    "awq": ({"bits": 4.0}, {"bits": True}, {"group_size": 0}, {"group_size": 128.0}),
    "mlx": ({"bits": 4.0}, {"bits": [4]}, {"group_size": 128.0}),
    "compressed-tensors": ({"num_bits": 4.0}, {"num_bits": [4]}, {"group_size": "128"}),
}


@pytest.mark.parametrize(("kind", "changes"), [(kind, one) for kind, all in BLOCKS.items() for one in all])
def test_bits_and_groups_that_are_no_whole_numbers(directories, tmp_path: Path, kind: str, changes: dict):
    directory = copied(directories[kind], tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    block = config["quantization" if kind == "mlx" else "quantization_config"]
    if kind == "compressed-tensors":
        (block,) = (group["weights"] for group in block["config_groups"].values())
    block |= changes
    config_with(directory, **{key: config[key] for key in config if key.startswith("quantization")})
    if kind == "awq":
        (directory / "awq_quantized_modules.json").unlink(missing_ok=True)
        one_line(inspect_checkpoint, directory)
    refused(directory, tmp_path, "AWQ with|is MLX with|another compressed|a group size", "mlx")


FACTS = [
    {"sections": "Training"}, {"sections": [1]}, {"recipe": {"data": {"path": 7}}}, {"recipe": {"data": []}},
    {"recipe": {"student": "x"}}, {"recipe": {"teacher": {"path": {}}}}, {"recipe": {"optim": [1]}},
    {"recipe": {"data": {"path": "x.json", "validation_path": 3}}}, {"recipe": {"data": {"max_length": "x"}}},
    {"recipe": {"data": {"path": "x.json", "skip": 3}}}, {"base_model": {}}, {"metrics": [1]},
]  # fmt: skip


@pytest.mark.parametrize("facts", FACTS)
def test_a_history_that_cannot_be(directories, tmp_path: Path, facts: dict):
    directory = copied(directories["qat"], tmp_path / "m")
    path = directory / "grace_qat" / "info.json"
    replace(path, json.dumps({**json.loads(path.read_text()), **facts}))
    for format in ("qat", "mlx"):
        refused(directory, tmp_path, "in info.json is", format)


def test_a_card_that_begins_with_a_section(directories, tmp_path: Path):
    directory = copied(directories["mlx"], tmp_path / "m")
    replace(directory / "README.md", "## Training\n\nx\n\n# a, GRACE W4G128\n")
    assert provenance(directory)["sections"] == ["## Training\n\nx\n\n# a, GRACE W4G128"]
    replace(directory / "README.md", "## \n# a, GRACE W4G128\n")
    assert provenance(directory)["sections"] == []


@pytest.mark.parametrize(
    "name", ["config.json", "awq_quantized_modules.json", "processor_config.json", "tokenizer.json"]
)
@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{", "[" * 50_000, '{"a": NaN}', "\xff\xfe".encode("latin-1")]
)
def test_texts_that_are_no_objects(directories, tmp_path: Path, name: str, content: str | bytes):
    directory = copied(directories["awq"], tmp_path / "m")
    replace(directory / name, content)
    refused(directory, tmp_path, "damaged|cannot be read|cannot load|impossible|not a Qwen3-VL")
    one_line(load, directory)


def test_modules_that_the_model_does_not_have(directories, tmp_path: Path):
    directory = copied(directories["awq"], tmp_path / "m")
    listed = {"bits": 4, "group_size": 128, "modules": ["model.visual.merger", "os.system"]}
    replace(directory / "awq_quantized_modules.json", json.dumps(listed))
    refused(directory, tmp_path, "lists other modules")
    assert "no linear layer" in one_line(load, directory)
    directory = copied(directories["qat"], tmp_path / "q")
    path = directory / "grace_qat" / "info.json"
    replace(path, json.dumps({**json.loads(path.read_text()), "modules": ["../../x", "model.nothing"]}))
    refused(directory, tmp_path, "damaged")


PROCESSORS = {
    "blown up": ({"size": {"shortest_edge": 10**12, "longest_edge": 10**13}}, "shortest_edge"),
    "a large patch": ({"patch_size": 10**9}, "patch_size"),
    "no mean": ({"image_mean": ["a", 0, 0]}, "image_mean"),
    "merged by nothing": ({"merge_size": 0}, "merge_size"),
    "of no type": ({"image_processor_type": None}, "its image processor is a None"),
    "of types": ({"image_processor_type": {}}, "its image processor is a"),
    "resized by a table": ({"do_resize": {}}, "do_resize"),
    "scaled by words": ({"rescale_factor": "x"}, "rescale_factor"),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_an_image_processor_that_cannot_be(directories, tmp_path: Path, case: str):
    changes, message = PROCESSORS[case]
    directory = copied(directories["awq"], tmp_path / "m")
    stored = json.loads((directory / "processor_config.json").read_text())
    stored["image_processor"] |= changes
    replace(directory / "processor_config.json", json.dumps(stored))
    assert message in one_line(load, directory)
    refused(directory, tmp_path, message)


@pytest.mark.parametrize("length", ["x", [1], True])
def test_a_tokenizer_of_no_length(directories, tmp_path: Path, length: object):
    directory = copied(directories["awq"], tmp_path / "m")
    stored = json.loads((directory / "tokenizer_config.json").read_text())
    replace(directory / "tokenizer_config.json", json.dumps({**stored, "model_max_length": length}))
    refused(directory, tmp_path, "model_max_length|cannot load a Qwen3-VL processor", "mlx")


def test_parity_data_that_does_not_end():
    assert "no regular file" in one_line(load_records, Path("/dev/zero"))


@pytest.mark.parametrize("ends", ["x", [7, "x"], -1, 10**9, [[1]], 1.5])
def test_tokens_that_end_nothing(directories, tmp_path: Path, ends: object):
    directory = copied(directories["awq"], tmp_path / "m")
    replace(directory / "generation_config.json", json.dumps({"eos_token_id": ends}))
    one_line(load, directory)


# ---------------------------------------------------------------- files that are none


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "awq_quantized_modules.json", "merges.txt"]
)
@pytest.mark.parametrize("kind", ["pipe", "loop", "zeros", "folder"])
def test_what_is_no_file(directories, tmp_path: Path, name: str, kind: str):
    directory = copied(directories["awq"], tmp_path / "m")
    path = directory / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "loop" else "/dev/zero")
    refused(directory, tmp_path, "damaged|cannot be read|no config.json")
    one_line(load, directory)
    if name != "merges.txt":
        one_line(inspect_checkpoint, directory)


def test_a_gigabyte_of_config(directories, tmp_path: Path):
    directory = copied(directories["awq"], tmp_path / "m")
    (directory / "config.json").unlink()
    with (directory / "config.json").open("wb") as file:
        file.truncate(2**30)
    refused(directory, tmp_path, "more than")
    one_line(load, directory)


def test_an_export_into_its_own_source(directories, tmp_path: Path):
    directory = copied(directories["qat"], tmp_path / "m")
    out = directory / "grace_qat" / "sub"
    assert "a part of the checkpoint" in one_line(export_run, directory, out, ("qat",))
    assert not out.exists()


def test_a_directory_that_one_may_not_look_into(directories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Root may look anywhere, so that the refusal is made up."""

    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    for call in (
        lambda: export_run(directories["awq"], tmp_path / "out"),
        lambda: quantize_model(directories["plain"], tmp_path / "out"),
        lambda: inspect_checkpoint(directories["awq"]),
        lambda: open_upload(directories["awq"]),
    ):
        assert "cannot be read ([Errno 13] Permission denied" in one_line(call)


@pytest.mark.parametrize("fault", ["no folder", "no room"])
def test_no_room_for_temporary_files(
    directories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
):
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fault == "no folder":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    else:
        monkeypatch.setattr(Image.Image, "save", full)
    directory = copied(directories["mlx"], tmp_path / "m")
    refused(directory, tmp_path, "cannot write temporary files .*set TMPDIR", "mlx")


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.5])
@pytest.mark.parametrize("kind", ["awq", "compressed-tensors", "mlx", "qat"])
def test_scales_that_cannot_be(directories, tmp_path: Path, kind: str, value: float):
    directory = copied(directories[kind], tmp_path / "m")
    file = directory / ("grace_qat/state.safetensors" if kind == "qat" else "model.safetensors")
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith(("scales", "weight_scale")))
    tensors[name].view(-1)[-1] = value
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    if kind == "qat":
        info = directory / "grace_qat" / "info.json"
        replace(info, json.dumps({**json.loads(info.read_text()), "state_sha256": sha256_of(file)}))
        one_line(read_qat, directory)
    refused(directory, tmp_path, "scales must be finite and positive", "mlx")


def test_codes_out_of_range_and_a_wrong_hash(directories, tmp_path: Path):
    directory = copied(directories["qat"], tmp_path / "m")
    file, info = directory / "grace_qat" / "state.safetensors", directory / "grace_qat" / "info.json"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("codes"))
    tensors[name][0, 0] = 8
    file.unlink()
    save_file(tensors, file)
    refused(directory, tmp_path, "does not match its checksum")
    replace(info, json.dumps({**json.loads(info.read_text()), "state_sha256": sha256_of(file)}))
    refused(directory, tmp_path, r"outside \[-8, 7\]")
    replace(info, json.dumps({**json.loads(info.read_text()), "state_sha256": "../x", "group_size": 10**9}))
    refused(directory, tmp_path, "damaged")


def test_weights_that_are_not_what_the_codes_say(directories, tmp_path: Path):
    directory = copied(directories["qat"], tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.language_model.layers.0.mlp.up_proj.weight"] *= 1.25
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    refused(directory, tmp_path, "not scale \\* code", "qat")
    refused(directory, tmp_path, "not scale \\* code", "awq")


@pytest.mark.parametrize("kind", ["awq", "qat", "refqat", "foreign"])
def test_dense_weights_that_are_no_numbers(directories, tmp_path: Path, kind: str):
    directory = copied(directories[kind], tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.language_model.norm.weight"][0] = float("nan")
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for format in ("mlx",) if kind == "foreign" else ("mlx", "qat"):  # QAT holds no zero points
        refused(directory, tmp_path, "NaN or infinite", format)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
@pytest.mark.parametrize("kind", ["awq", "compressed-tensors", "mlx", "qat"])
def test_dense_weights_that_are_integers(directories, tmp_path: Path, kind: str, dtype: torch.dtype):
    directory = copied(directories[kind], tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("patch_embed.proj.bias"))
    tensors[name] = tensors[name].to(dtype)
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for format in ("awq", "compressed-tensors", "gguf", "mlx", "qat"):
        refused(directory, tmp_path, "no weights", format)


@pytest.mark.parametrize("kind", ["awq", "compressed-tensors", "mlx", "gguf", "qat", "refqat", "foreign"])
def test_a_tensor_missing_cut_or_of_another_shape(directories, tmp_path: Path, kind: str):
    directory = copied(directories[kind], tmp_path / "m")
    weights = sorted(directory.glob("*.gguf" if kind == "gguf" else "*.safetensors"))[0]
    whole = weights.read_bytes()
    replace(weights, whole[: len(whole) // 2])
    refused(directory, tmp_path, "damaged", "mlx")
    weights.unlink()
    refused(directory, tmp_path, "damaged", "mlx")
    if kind == "gguf":
        return
    tensors = load_file(directories[kind] / "model.safetensors")
    name = next(name for name in sorted(tensors) if "embed_tokens" in name)
    for changed in ({}, {name: tensors[name][:-1].contiguous()}, {name: tensors[name][None].contiguous()}):
        save_file(
            {**{key: t for key, t in tensors.items() if key != name}, **changed},
            weights,
            metadata={"format": "pt"},
        )
        refused(directory, tmp_path, "damaged", "mlx")
        weights.unlink()
    save_file({**tensors, "model.more": torch.zeros(3)}, weights, metadata={"format": "pt"})
    refused(directory, tmp_path, "does not have|damaged", "mlx")


def test_an_index_that_leads_elsewhere_is_not_followed(directories, tmp_path: Path):
    directory = copied(directories["awq"], tmp_path / "m")
    names = safetensors_header(directory / "model.safetensors")
    (directory / "model.safetensors").rename(tmp_path / "model-00001.safetensors")
    for target in (
        "../model-00001.safetensors",
        str(tmp_path / "model-00001.safetensors"),
        "gone.safetensors",
    ):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
        replace(directory / "model.safetensors.index.json", json.dumps(index))
        refused(directory, tmp_path, "no file beside it|No such file")
        one_line(load, directory)


# ---------------------------------------------------------------- pickles


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, call: Callable[..., object], *arguments: object):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


def archive(payload: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """What torch.save would make of a pickle."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as file:
        file.writestr("archive/data.pkl", payload)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/data/0", bytes(64))
    return content.getvalue()


def saved(value: object) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def pickles(mark: Path) -> Iterator[tuple[str, bytes, str]]:
    """(what, content of the file, what is said about it)."""
    touch = Evil(os.system, f"touch {mark}")
    yield "a call", saved({"x.log_scale": touch}), "nothing of it was run"
    yield "a call in a plain pickle", pickle.dumps(touch), "not what torch.save writes"
    yield "a call by another opcode", archive(pickle.dumps(touch, protocol=4)), "nothing of it was run"
    yield (
        "a call through builtins",
        archive(pickle.dumps(Evil(eval, "1+1"), protocol=2)),
        "nothing of it was run",
    )
    yield "much memory", archive(pickle.dumps(Evil(bytearray, 10**11), protocol=2)), "nothing of it was run"
    yield "a bomb", archive(b"\x80\x02" + b"N0" * 2**23 + b"}.", zipfile.ZIP_DEFLATED), "compressed"
    yield "no tensors", saved({"x.log_scale": 7}), "not a tensor"
    yield "a list", saved([torch.zeros(2)]), "not tensors by name"
    yield "a tensor", saved(torch.zeros(2)), "not tensors by name"
    yield "a stretched tensor", saved({"x.log_scale": torch.zeros(1).expand(10**9)}), "does not fit its bytes"
    yield "numbers for names", saved({7: torch.zeros(2)}), "not a tensor"
    yield "nothing quantized", saved({"x.weight": torch.zeros(2, 2)}), "no log_scale"
    yield "no weight", saved({"x.log_scale": torch.zeros(2)}), "no 'x.weight'"
    yield (
        "a scale too many",
        saved({"x.log_scale": torch.zeros(3), "x.weight": torch.zeros(2, 2)}),
        "beside a weight",
    )
    yield (
        "an unknown layer",
        saved({"x.log_scale": torch.zeros(2), "x.weight": torch.zeros(2, 128)}),
        "is missing|not have",
    )
    yield "an empty pickle", archive(b""), "not what torch.save writes|cannot be read"
    yield "not a pickle", archive(b"\x80\x02garbage"), "not what torch.save writes|cannot be read"
    yield "deep", archive(b"\x80\x02" + b"(" * 10**5 + b"."), "not what torch.save writes|cannot be read"
    yield "no archive", b"PK" + bytes(1000), "not what torch.save writes"
    yield "nothing", b"", "not what torch.save writes"


def test_pickles_are_never_run(directories, tmp_path: Path):
    mark = tmp_path / "was-run"
    directory = copied(directories["refqat"], tmp_path / "m")
    for what, content, message in pickles(mark):
        replace(directory / SIDECAR, content)
        said = one_line(open_source, directory)
        assert re.search(message, said), (what, said)
        assert not mark.exists(), what
    refused(directory, tmp_path, "not what torch.save writes")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 200.0])
def test_logarithms_that_give_no_scale(directories, tmp_path: Path, value: float):
    directory = copied(directories["refqat"], tmp_path / "m")
    tensors = torch.load(directory / SIDECAR, weights_only=True)
    next(tensor for name, tensor in sorted(tensors.items()) if name.endswith("log_scale"))[0] = value
    replace(directory / SIDECAR, saved(tensors))
    refused(directory, tmp_path, "scales must be finite and positive", "mlx")


def test_weights_of_a_pickle_that_are_no_numbers(directories, tmp_path: Path):
    directory = copied(directories["refqat"], tmp_path / "m")
    tensors = torch.load(directory / SIDECAR, weights_only=True)
    sorted((name, tensor) for name, tensor in tensors.items() if name.endswith("weight"))[-1][1][0, 0] = (
        float("nan")
    )
    replace(directory / SIDECAR, saved(tensors))
    refused(directory, tmp_path, "NaN or infinite", "mlx")


# ---------------------------------------------------------------- the corpus

EXTREMES = (
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"18446744073709551616",
    b"99999999999999999999999",
    b"null",
    b"[]",
    b'"x"',
    b"1.5",
    b"true",
)
WORDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)


def mutated(content: bytes, header: int, chance: random.Random) -> bytes:
    """One of a handful of small changes to the first `header` bytes, or a cut."""
    at = chance.randrange(max(1, header))
    match chance.randrange(8):
        case 0:
            return content[:at]
        case 1:
            changed = bytearray(content)
            for _ in range(chance.randint(1, 8)):
                changed[chance.randrange(min(header, len(changed)))] = chance.randrange(256)
            return bytes(changed)
        case 2:
            return content[:at] + chance.choice(WORDS).to_bytes(8, "little") + content[at + 8 :]
        case 3:
            return content[:at] + content[at + chance.randint(1, 64) :]
        case 4:
            return content[:at] + content[at : at + chance.randint(1, 64)] + content[at:]
        case 5:
            numbers = list(re.finditer(rb"\d+", content[:header]))
            found = chance.choice(numbers) if numbers else None
            return (
                content[: found.start()] + chance.choice(EXTREMES) + content[found.end() :]
                if found
                else content[:at]
            )
        case 6:
            other = chance.randrange(max(1, header))
            size = chance.randint(1, 64)
            return content[:at] + content[other : other + size] + content[at + size :]
        case _:
            return chance.choice(WORDS).to_bytes(8, "little") + content[8:]


def header_size(path: Path) -> int:
    """How much of a file is worth changing."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return 8 + int.from_bytes(content[:8], "little")
    return min(len(content), 2**16)


def noticed(error: Exception) -> None:
    """Checks the message of one case of the corpus."""
    assert str(error) and "\n" not in str(error) and len(str(error)) < 1500


def read_config_text(path: Path) -> None:
    require_possible(
        parse_json(path.read_text(encoding="utf-8", errors="surrogateescape"), path.name), path.parent
    )


def corpus(directories: dict[str, Path]) -> list[tuple[str, str, Callable[[Path], object]]]:
    """(kind of directory, file in it, the first of grace's functions that looks at it)."""
    (text,) = directories["gguf"].glob("model-*.gguf")
    return [
        ("awq", "model.safetensors", safetensors_header),
        ("qat", "grace_qat/state.safetensors", safetensors_header),
        ("gguf", text.name, gguf_header),
        ("gguf", "mmproj-BF16.gguf", gguf_header),
        ("refqat", SIDECAR, TorchFile),
        ("awq", "config.json", read_config_text),
        ("mlx", "config.json", read_config_text),
        ("compressed-tensors", "config.json", read_config_text),
        ("awq", "awq_quantized_modules.json", read_config_text),
        ("qat", "grace_qat/info.json", read_config_text),
    ]


def fuzz(directories: dict[str, Path], tmp_path: Path, cases: int, seed: int) -> tuple[int, int]:
    """Runs the corpus; gives how many changes were noticed at once, and how many by reading the whole directory."""
    chance = random.Random(seed)
    files = corpus(directories)
    copies = {kind: copied(directories[kind], tmp_path / kind) for kind in {kind for kind, *_ in files}}
    originals = {(kind, name): (directories[kind] / name).read_bytes() for kind, name, _ in files}
    sizes = {(kind, name): header_size(directories[kind] / name) for kind, name, _ in files}
    before, at_once, later = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, 0
    for _ in range(cases):
        kind, name, look = chance.choice(files)
        path, content = copies[kind] / name, originals[kind, name]
        replace(path, mutated(content, sizes[kind, name], chance))
        start = time.perf_counter()
        try:
            look(path)
        except (DamagedFile, UserError) as error:
            at_once += 1
            noticed(error)
        else:
            try:
                open_source(copies[kind])
            except UserError as error:
                later += 1
                noticed(error)
        assert time.perf_counter() - start < SECONDS, (kind, name)
        replace(path, content)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES, f"{grown:.0f} MB more"
    return at_once, later


def test_a_few_hundred_changed_files(directories, tmp_path: Path):
    at_once, later = fuzz(directories, tmp_path, 400, seed=1)
    assert at_once > 200 and later > 10


@pytest.mark.slow
def test_ten_thousand_changed_files(directories, tmp_path: Path):
    at_once, later = fuzz(directories, tmp_path, 10_000, seed=2)
    assert at_once > 5000 and later > 500


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"]
)
def test_changed_processor_files(directories, tmp_path: Path, name: str):
    """What the libraries make of them: a processor, or one line."""
    chance = random.Random(name)
    directory = copied(directories["awq"], tmp_path / "m")
    content = (directory / name).read_bytes()
    for _ in range(25):
        replace(directory / name, mutated(content, len(content), chance))
        try:
            load_processor(directory)
        except UserError as error:
            noticed(error)


# ---------------------------------------------------------------- from outside

COMMANDS = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
from grace.cli import main
for command in json.load(sys.stdin):
    print("run", *command, file=sys.stderr)
    print(main(command), flush=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_commands_from_outside(directories, tmp_path: Path):
    """Exit code 2 and one line each, no directory, and no more memory than a tiny model takes."""
    made = {
        name: copied(directories[name if name in directories else "awq"], tmp_path / name)
        for name in ("pipe", "wide", "cut", "refqat", "gguf")
    }
    (made["pipe"] / "model.safetensors").unlink()
    os.mkfifo(made["pipe"] / "model.safetensors")
    config_with(made["wide"], text_config__hidden_size=2**17, text_config__vocab_size=2**22)
    whole = (made["cut"] / "model.safetensors").read_bytes()
    replace(made["cut"] / "model.safetensors", (2**63).to_bytes(8, "little") + whole[8:])
    replace(made["refqat"] / SIDECAR, archive(b"\x80\x02" + b"N0" * 2**23 + b"}.", zipfile.ZIP_DEFLATED))
    (text,) = made["gguf"].glob("model-*.gguf")
    replace(text, text.read_bytes()[:8] + (2**60).to_bytes(8, "little") * 2 + text.read_bytes()[24:])
    out = str(tmp_path / "out")
    commands = [["export", str(path), "--out", out, "--format", "mlx"] for path in made.values()]
    commands += [["generate", str(made[name]), "--prompt", "x"] for name in ("pipe", "wide", "cut")]
    commands += [["inspect", str(made[name])] for name in ("pipe", "wide", "cut")]
    result = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=120,
    )
    *codes, megabytes = result.stdout.split()
    assert codes == ["2"] * len(commands), result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (
        len(errors) == len(commands) and not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    )
    assert int(megabytes) < 1500
