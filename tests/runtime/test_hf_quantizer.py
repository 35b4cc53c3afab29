"""`import grace.runtime` and stock `from_pretrained`: packed layers, nothing missing, nothing changed."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import grace.runtime
from grace.checkpoint import read_qat
from grace.data.records import load_records
from grace.data.template import encode
from grace.errors import UserError
from grace.models import qwen3vl
from grace.models.processor import load_processor
from grace.runtime.generate import generate_tokens, generation_config, load_model, model_inputs
from grace.runtime.int4_linear import set_kernel


def loaded(directory: Path, **options):
    model, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True, **options)
    return model.eval(), info


def test_only_the_trained_linears_are_packed(awq_dir: Path, qat_run: Path):
    model, info = loaded(awq_dir)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert set(grace.runtime.int4_linears(model)) == set(read_qat(qat_run / "model").modules)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_tensors_survive_loading_running_and_saving(awq_dir: Path, tmp_path: Path, dtype: torch.dtype):
    model, _ = loaded(awq_dir, dtype=dtype)
    sample = encode(load_records_of(awq_dir)[0], load_processor(awq_dir), 1024)
    with torch.inference_mode():
        logits = model(**model_inputs(sample, "cpu")).logits
    assert torch.isfinite(logits).all() and logits.dtype == dtype
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (awq_dir, tmp_path / "again"))
    assert set(before) == set(after)
    for name, tensor in before.items():
        if name.endswith(("qweight", "qzeros", "scales")) or dtype == torch.bfloat16:
            assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("awq", 4, 128)
    again, info = loaded(tmp_path / "again")  # without the module list: by the rules of transformers
    assert not info["missing_keys"]
    assert set(grace.runtime.int4_linears(again)) == set(grace.runtime.int4_linears(model))


def load_records_of(awq_dir: Path):
    return load_records(Path((awq_dir / "world.txt").read_text()))


@pytest.fixture(scope="module")
def awq_dir(awq_dir: Path, tiny_world_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that knows where the small world is."""
    own = tmp_path_factory.mktemp("hf") / "awq"
    shutil.copytree(awq_dir, own)
    (own / "world.txt").write_text(str(tiny_world_dir / "validation.json"))
    return own


def test_the_same_logits_and_tokens_as_the_trained_model(awq_dir: Path, qat_run: Path):
    """In fp32, with the unquantized tensors rounded as in the export, nothing but summation order differs."""
    trained, packed = load_model(qat_run / "model", torch.float32), load_model(awq_dir, torch.float32)
    quantized = read_qat(qat_run / "model").modules
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name.removesuffix(".weight") not in quantized:
                parameter.copy_(parameter.bfloat16())
    processor = load_processor(awq_dir)
    for record in load_records_of(awq_dir)[:4]:
        inputs = model_inputs(encode(record, processor, 1024), "cpu")
        with torch.inference_mode():
            expected, result = trained(**inputs).logits, packed(**inputs).logits
        assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()
        prompt = encode(record, processor, 1024)
        config = generation_config(packed, processor, 12)
        assert generate_tokens(packed, prompt, config) == generate_tokens(trained, prompt, config)


@pytest.mark.parametrize("kernel", ["aten", "dequant", "reference"])
def test_every_kernel_gives_the_same_answer_in_bfloat16(awq_dir: Path, kernel: str):
    packed, exact = load_model(awq_dir), load_model(awq_dir, torch.float32)
    set_kernel(packed, kernel)
    inputs = model_inputs(encode(load_records_of(awq_dir)[0], load_processor(awq_dir), 1024), "cpu")
    with torch.inference_mode():
        result, expected = packed(**inputs).logits.float(), exact(**inputs).logits
    assert (result - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "bits 8"),
        ({"group_size": 48}, "group_size 48"),
        ({"version": "gemv"}, "gemv"),
    ],
)
def test_other_awq_variants_are_refused(awq_dir: Path, tmp_path: Path, change: dict, message: str):
    shutil.copytree(awq_dir, tmp_path / "awq")
    path = tmp_path / "awq" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path / "awq")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ('{"modules": [1]}', "damaged"),
        ('{"modules": ["model.nothing"]}', "no linear layer"),
    ],
)
def test_a_wrong_module_list_is_named(awq_dir: Path, tmp_path: Path, content: str, message: str):
    shutil.copytree(awq_dir, tmp_path / "awq")
    (tmp_path / "awq" / "awq_quantized_modules.json").write_text(content)
    with pytest.raises(UserError, match=f"awq_quantized_modules.json.*{message}"):
        load_model(tmp_path / "awq")


def test_a_missing_tensor_is_an_error_not_a_warning(awq_dir: Path, tmp_path: Path):
    shutil.copytree(awq_dir, tmp_path / "awq")
    tensors = load_file(tmp_path / "awq" / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("scales"))
    del tensors[name]
    save_file(tensors, tmp_path / "awq" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing keys"):
        load_model(tmp_path / "awq")


def test_other_quantizers_are_left_alone(awq_dir: Path):
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert AUTO_QUANTIZER_MAPPING["awq"].__module__ == "grace.runtime.hf_quantizer"
    assert AUTO_QUANTIZER_MAPPING["gptq"].__module__.startswith("transformers.")


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is not None, reason="gptqmodel is installed")
def test_the_import_is_all_it_takes(awq_dir: Path):
    """In a fresh process: with the import it loads, and the import alone is what did it."""
    code = (
        "import sys\n{}\nfrom transformers import AutoModelForImageTextToText\n"
        "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])\n"
        "print(sum(type(module).__name__ == 'Int4Linear' for module in model.modules()))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code.format(line), str(awq_dir)], capture_output=True, text=True
        )
        for line in ("import grace.runtime", "")
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert int(runs[0].stdout) == len(qwen3vl.DECODER_LINEARS) * 4
    assert runs[1].returncode != 0
