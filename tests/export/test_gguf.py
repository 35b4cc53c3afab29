"""GGUF files, as the gguf package reads them. What llama.cpp says to them: tests/interop/gguf_llama_cpp.py."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file
from small_qat_run import write_qat_run  # pyright: ignore[reportMissingImports] - tests/ is on the path

from grace.checkpoint import read_qat
from grace.errors import UserError
from grace.export import gguf as gguf_export
from grace.export.gguf_metadata import require_supported, vocabulary
from grace.export.pack import export_run
from grace.models import qwen3vl
from grace.quant.grid import dequantize

KINDS = {4: "Q4_0", 8: "Q8_0"}


@pytest.fixture(scope="module")
def exported(run_of_bits: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory):
    """(run, export directory, bits)."""
    folder = tmp_path_factory.mktemp("gguf")
    run, bits = run_of_bits
    report = export_run(run, folder / "out", ("gguf",))
    figures = report["formats"]["gguf"]["parity"]
    assert figures["codes_identical"] and figures["dense_identical"] and figures["exact"]["relative"] <= 1e-4
    return run, folder / "out", bits


def text_reader(out: Path, bits: int) -> gguf.GGUFReader:
    return gguf.GGUFReader(out / f"model-{KINDS[bits]}.gguf")


def values(reader: gguf.GGUFReader) -> dict:
    return {name: field.contents() for name, field in reader.fields.items()}


def test_the_package_dequantizes_to_the_trained_weights(exported):
    run, out, bits = exported
    state = read_qat(run / "model")
    tensors = {tensor.name: tensor for tensor in text_reader(out, bits).tensors}
    layers = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    layers |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    for name, weight in state.modules.items():
        _, _, _, layer, _, part = name.split(".")
        tensor = tensors.pop(f"blk.{layer}.{layers[part.removesuffix('_proj')]}.weight")
        assert tensor.tensor_type.name == KINDS[bits]
        wide = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(wide, dequantize(weight.codes_OI, weight.scales_OG, state.group_size).numpy())
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {"BF16", "F32"}


def test_dense_tensors_of_the_language_model(exported):
    run, out, bits = exported
    base = load_file(run / "model" / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in text_reader(out, bits).tensors}
    names = {
        "token_embd.weight": "embed_tokens.weight",
        "output_norm.weight": "norm.weight",
        "blk.3.attn_norm.weight": "layers.3.input_layernorm.weight",
        "blk.3.ffn_norm.weight": "layers.3.post_attention_layernorm.weight",
        "blk.0.attn_q_norm.weight": "layers.0.self_attn.q_norm.weight",
        "blk.0.attn_k_norm.weight": "layers.0.self_attn.k_norm.weight",
    }
    for stored, name in names.items():
        tensor, expected = tensors[stored], base[f"model.language_model.{name}"].bfloat16().float().numpy()
        wide = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(wide, expected) and tensor.tensor_type.name == (
            "F32" if wide.ndim == 1 else "BF16"
        )
    assert "output.weight" not in tensors  # tied embeddings stay tied


def test_the_vision_tower_with_its_deepstack(exported):
    run, out, _ = exported
    base = load_file(run / "model" / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out / "mmproj-BF16.gguf").tensors}
    names = {
        "v.position_embd.weight": "pos_embed.weight",
        "v.patch_embd.bias": "patch_embed.proj.bias",
        "v.blk.2.attn_qkv.weight": "blocks.2.attn.qkv.weight",
        "v.blk.0.attn_out.bias": "blocks.0.attn.proj.bias",
        "v.blk.1.ln1.weight": "blocks.1.norm1.weight",
        "v.blk.1.ln2.bias": "blocks.1.norm2.bias",
        "v.blk.0.ffn_up.weight": "blocks.0.mlp.linear_fc1.weight",
        "v.blk.0.ffn_down.weight": "blocks.0.mlp.linear_fc2.weight",
        "v.post_ln.weight": "merger.norm.weight",
        "mm.0.weight": "merger.linear_fc1.weight",
        "mm.2.bias": "merger.linear_fc2.bias",
        # named after the vision layer it listens to, not after its place in the list
        "v.deepstack.1.norm.weight": "deepstack_merger_list.0.norm.weight",
        "v.deepstack.1.fc1.weight": "deepstack_merger_list.0.linear_fc1.weight",
        "v.deepstack.1.fc2.bias": "deepstack_merger_list.0.linear_fc2.bias",
    }
    for stored, name in names.items():
        tensor = tensors[stored]
        expected = base[f"model.visual.{name}"].bfloat16().float().numpy()
        assert np.array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), expected)
    patches = base["model.visual.patch_embed.proj.weight"].bfloat16().float()
    for time, stored in enumerate(("v.patch_embd.weight", "v.patch_embd.weight.1")):
        assert tensors[stored].tensor_type.name == "F32"
        assert np.array_equal(tensors[stored].data, patches[:, :, time].numpy())
    vision = [name for name in base if ".visual." in name]
    assert len(tensors) == len(vision) + 1  # the patch convolution is two


def test_metadata_of_the_language_model(exported):
    _, out, bits = exported
    found = values(text_reader(out, bits))
    assert found["general.architecture"] == "qwen3vl" and found["general.type"] == "model"
    assert found["general.file_type"] == {4: 2, 8: 7}[bits]
    expected = {
        "block_count": 4, "embedding_length": 128, "feed_forward_length": 256, "context_length": 4096,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 64,
        "attention.value_length": 64, "rope.dimension_sections": [12, 10, 10, 0], "rope.freq_base": 10000.0,
        "n_deepstack_layers": 1,
    }  # fmt: skip
    assert {name: found[f"qwen3vl.{name}"] for name in expected} == expected
    assert found["qwen3vl.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_tokenizer(exported):
    run, out, bits = exported
    found, stored = values(text_reader(out, bits)), json.loads((run / "model" / "tokenizer.json").read_text())
    tokens = found["tokenizer.ggml.tokens"]
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == "qwen2"
    assert len(tokens) == 512 and all(tokens[id] == token for token, id in stored["model"]["vocab"].items())
    assert found["tokenizer.ggml.merges"] == [" ".join(merge) for merge in stored["model"]["merges"]]
    kinds = found["tokenizer.ggml.token_type"]
    for added in stored["added_tokens"]:
        assert tokens[added["id"]] == added["content"] and kinds[added["id"]] == gguf.TokenType.CONTROL
    assert (
        tokens[-1] == "[PAD511]" and kinds[-1] == gguf.TokenType.UNUSED and kinds[0] == gguf.TokenType.NORMAL
    )
    assert tokens[found["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert tokens[found["tokenizer.ggml.padding_token_id"]] == "<|endoftext|>"
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == (run / "model" / "chat_template.jinja").read_text()


def test_metadata_of_the_vision_tower(exported):
    found = values(gguf.GGUFReader(exported[1] / "mmproj-BF16.gguf"))
    assert found["general.architecture"] == "clip" and found["general.type"] == "mmproj"
    expected = {
        "has_vision_encoder": True, "projector_type": "qwen3vl_merger", "use_gelu": True,
        "vision.image_size": 96, "vision.patch_size": 16, "vision.embedding_length": 96, "vision.block_count": 3,
        "vision.feed_forward_length": 192, "vision.projection_dim": 128, "vision.attention.head_count": 4,
        "vision.spatial_merge_size": 2, "vision.image_mean": [0.5] * 3, "vision.image_std": [0.5] * 3,
        "vision.is_deepstack_layers": [False, True, False],
    }  # fmt: skip
    assert {name: found[f"clip.{name}"] for name in expected} == expected


def test_same_run_same_bytes(exported, tmp_path: Path):
    run, out, _ = exported
    export_run(run, tmp_path / "again", ("gguf",))
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_a_split_file_holds_the_same_tensors(exported, tmp_path: Path):
    run, out, bits = exported
    export_run(run, tmp_path / "split", ("gguf",), max_shard_bytes=150_000)
    parts = sorted((tmp_path / "split").glob("model-*-of-*.gguf"))
    assert len(parts) > 2 and not (tmp_path / "split" / f"model-{KINDS[bits]}.gguf").exists()
    found = {tensor.name: tensor for part in parts for tensor in gguf.GGUFReader(part).tensors}
    whole = {tensor.name: tensor for tensor in text_reader(out, bits).tensors}
    assert set(found) == set(whole)
    assert all(np.array_equal(found[name].data, whole[name].data) for name in whole)


def test_token_types_as_the_converter_gives_them():
    added = [("<think>", False), ("<|fim_pad|>", False), ("<|im_end|>", True)]
    stored = {
        "model": {"vocab": {"a": 0, "b": 1}},
        "added_tokens": [{"id": 2 + i, "content": text, "special": s} for i, (text, s) in enumerate(added)],
    }
    kind = gguf.TokenType
    tokens, types = vocabulary(stored, 6)
    assert tokens == ["a", "b", "<think>", "<|fim_pad|>", "<|im_end|>", "[PAD5]"]
    assert types == [kind.NORMAL, kind.NORMAL, kind.USER_DEFINED, kind.CONTROL, kind.CONTROL, kind.UNUSED]
    with pytest.raises(ValueError, match="beyond the 4 rows"):
        vocabulary(stored, 4)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("text_config", "attention_bias", True, "attention biases"),
        ("text_config", "hidden_act", "gelu", "activation gelu"),
        ("vision_config", "hidden_act", "silu", "vision activation silu"),
        ("vision_config", "temporal_patch_size", 1, "temporal patch"),
        ("vision_config", "spatial_merge_size", 4, "spatial merge"),
        ("vision_config", "num_position_embeddings", 35, "not square"),
        ("vision_config", "num_heads", 16, "4 does not divide"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(qat_run: Path, part, field, value, message: str):
    config = qwen3vl.config_for(str(qat_run / "model"))
    require_supported(config)
    setattr(getattr(config, part), field, value)
    with pytest.raises(UserError, match=message):
        require_supported(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\s+"),
            "split text otherwise",
        ),
        (lambda t: t["model"].update(type="Unigram"), "byte-level BPE"),
        (lambda t: t["model"].pop("merges"), "cannot be read"),
        (lambda t: t["added_tokens"][0].update(id=600), "beyond the 512 rows"),
    ],
)
def test_another_tokenizer_is_refused(qat_run: Path, tmp_path: Path, change, message: str):
    shutil.copytree(qat_run, tmp_path / "run")
    path = tmp_path / "run" / "model" / "tokenizer.json"
    stored = json.loads(path.read_text())
    change(stored)
    writer = gguf.GGUFWriter(None, "qwen3vl")
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=message):
        gguf_export.add_tokenizer(writer, qwen3vl.config_for(str(qat_run / "model")), path.parent)


def test_groups_that_are_not_whole_blocks_are_refused(
    tmp_path: Path, tiny_student_dir: Path, tiny_world_dir: Path
):
    run = write_qat_run(tmp_path / "g16", tiny_student_dir, tiny_world_dir, group_size=16)
    with pytest.raises(UserError, match="blocks of 32 and this run has 16"):
        export_run(run, tmp_path / "out", ("gguf",))
    assert not (tmp_path / "out").exists()


def test_a_wrong_block_stops_the_export(qat_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pack = gguf_export.pack_blocks
    monkeypatch.setattr(
        gguf_export, "pack_blocks", lambda codes, scales, bits: pack(codes.flip(0), scales, bits)
    )
    with pytest.raises(RuntimeError, match="nothing was published"):
        export_run(qat_run, tmp_path / "out", ("gguf",))
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_one_line_says_what_to_install(qat_run: Path, tmp_path: Path):
    code = (
        "import sys\nsys.modules['gguf'] = None\nfrom grace.cli import main\n"
        "sys.exit(main(['export', sys.argv[1], '--out', sys.argv[2], '--format', 'gguf']))"
    )
    command = [sys.executable, "-c", code, str(qat_run), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "pip install 'grace[export]'" in result.stderr
    assert result.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []
