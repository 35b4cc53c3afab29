"""The plan: parameter counts against arithmetic and real models, memory against real graphs."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grace import plan_memory
from grace.config import load_recipe
from grace.errors import UserError
from grace.models import qwen3vl
from grace.plan import format_plan, parameter_counts, plan
from grace.plan_memory import GIB, Sizes, activation_bytes
from grace.plan_modes import launched_mode
from grace.run import make_optimizer

PUBLISHED = "qwen3vl_2b_w4g128.yaml"
SMALL = "small_world/grace_w4.yaml"


@pytest.fixture
def small(tiny_student_dir, tiny_teacher_dir, tiny_world_dir) -> list[str]:
    return [
        f"student.path={tiny_student_dir}",
        f"teacher.path={tiny_teacher_dir}",
        f"data.path={tiny_world_dir / 'qat_train.json'}",
        "run.max_steps=null",
    ]


def decoder_parts(
    layers: int, width: int, feed_forward: int, heads: int, kv_heads: int, head: int, vocabulary: int
):
    linears = layers * (2 * width * heads * head + 2 * width * kv_heads * head + 3 * width * feed_forward)
    norms = layers * (2 * width + 2 * head) + width
    return {"decoder_linears": linears, "norms": norms, "embeddings": vocabulary * width}


def vision_parts(depth: int, width: int, feed_forward: int, out: int, positions: int = 2304):
    patch = 3 * 2 * 16 * 16 * width + width
    attention = 3 * width * width + 3 * width + width * width + width
    mlp = 2 * width * feed_forward + feed_forward + width
    tower = patch + positions * width + depth * (attention + mlp + 4 * width)
    merged = 4 * width
    linears = merged * merged + merged + merged * out + out
    # the last merger normalises before it merges 2 x 2 patches, the three deepstack ones after
    mergers = 4 * linears + 2 * width + 3 * 2 * merged
    return {"vision_tower": tower, "mergers": mergers}


@pytest.mark.parametrize(
    ("name", "decoder", "vision", "tied"),
    [
        ("2B", (28, 2048, 6144, 16, 8, 128, 151936), (24, 1024, 4096, 2048), True),
        ("8B", (36, 4096, 12288, 32, 8, 128, 151936), (27, 1152, 4304, 4096), False),
    ],
)
def test_published_models_have_the_parameters_their_dimensions_give(name, decoder, vision, tied):
    counts = parameter_counts(qwen3vl.skeleton(qwen3vl.config_for(f"Qwen/Qwen3-VL-{name}-Instruct")))
    expected = decoder_parts(*decoder) | vision_parts(*vision)
    assert counts == expected | {"head": 0 if tied else expected["embeddings"]}


def test_published_recipe():
    result = plan(load_recipe(PUBLISHED), world_size=16)
    assert result["student"]["parameters"] == 2_127_532_032
    assert result["teacher"]["parameters"] == 8_767_123_696
    assert result["quantization"] == {
        "bits": 4, "group_size": 128, "linears": 196, "weights": 1_409_286_144, "scales": 11_010_048,
    }  # fmt: skip
    schedule = result["schedule"]
    assert (schedule["steps"], schedule["warmup_steps"]) == (200, 6)  # ceil(102025 / 512), 3 %
    assert (schedule["records_per_process"], schedule["accumulation"]) == (32, 4)
    assert schedule["tokens"] == 200 * 512 * 431
    assert result["student"]["trained"] + result["student"]["frozen"] == 2_127_532_032 + 11_010_048
    assert [group["lr"] for group in result["optimizer"]] == pytest.approx([1e-5, 1e-5, 1e-4])
    assert any("rcka_warmup_steps=400 is more than 200 steps" in note for note in result["notes"])
    json.dumps(result)


def test_full_precision_stage_has_no_scales():
    result = plan(load_recipe("qwen3vl_2b_bf16.yaml"), world_size=1)
    assert result["quantization"] is None and len(result["optimizer"]) == 2
    assert result["student"]["trained"] + result["student"]["frozen"] == result["student"]["parameters"]
    assert "none: full precision" in format_plan(result)


def test_tiny_plan_equals_the_real_run(small, tiny_student_dir):
    recipe = load_recipe(SMALL, small)
    result = plan(recipe, world_size=1)
    model = qwen3vl.load_model(str(tiny_student_dir))
    assert result["student"]["parameters"] == sum(p.numel() for p in model.parameters())
    qwen3vl.freeze_vision(model)
    layers = qwen3vl.quantize_decoder(model, 4, 128)
    assert result["quantization"]["scales"] == sum(layer.theta.numel() for layer in layers.values())
    assert result["quantization"]["weights"] == sum(layer.weight.numel() for layer in layers.values())
    assert result["student"]["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    real = [
        (sum(p.numel() for p in group["params"]), group["lr"], group["weight_decay"])
        for group in make_optimizer(model, recipe).param_groups
    ]
    assert [(g["parameters"], g["lr"], g["weight_decay"]) for g in result["optimizer"]] == real


def test_data_that_is_there_is_counted_and_measured(small):
    result = plan(
        load_recipe(SMALL, [*small, "data.expected_records=7", "optim.batch_size=10"]), world_size=4
    )
    data, schedule = result["data"], result["schedule"]
    assert (data["records"], data["records_from"], data["tokens_from"]) == (32, "counted", "measured")
    assert 0 < data["supervised_per_record"] < data["tokens_per_record"]
    assert 0 < data["image_tokens_per_record"] < data["tokens_per_record"]
    # 10 records over 4 processes: 3 at most, although the recipe allows micro-batches of 16
    assert (schedule["records_per_process"], schedule["micro_batch_size"], schedule["accumulation"]) == (
        3,
        3,
        1,
    )
    assert schedule["steps"] == 4 and schedule["epochs"] == pytest.approx(40 / 32)
    assert any("run.micro_batch_size=16" in note for note in result["notes"])


def test_unknown_data_gives_a_plan_without_steps(small):
    result = plan(
        load_recipe(SMALL, [*small, "data.path=absent.json", "data.expected_records=null"]), world_size=1
    )
    assert result["schedule"]["steps"] is None and "unknown" in format_plan(result)


def test_groups_that_do_not_divide_name_the_layer(small):
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj: 128 inputs .* groups of 96"):
        plan(load_recipe(SMALL, [*small, "quant.group_size=96"]))


def test_shapes_that_cannot_be_known(small, tmp_path):
    with pytest.raises(UserError, match=r"student\.path: no model at nowhere.* set student\.base"):
        plan(load_recipe(SMALL, [*small, "student.path=nowhere", "student.base=null"]))
    with pytest.raises(UserError, match=r"teacher\.path: no model at nowhere"):
        plan(load_recipe(SMALL, [*small, "teacher.path=nowhere", "teacher.base=null"]))
    with pytest.raises(UserError, match=r"student\.base: no model at elsewhere"):
        plan(load_recipe(SMALL, [*small, "student.path=nowhere", "student.base=elsewhere"]))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"student\.path: .*config\.json cannot be read"):
        plan(load_recipe(SMALL, [*small, f"student.path={tmp_path}", "student.base=small_world/student"]))


def test_small_world_shapes_need_no_files(small):
    bases = ["student.base=small_world/student", "teacher.base=small_world/teacher"]
    absent = plan(load_recipe(SMALL, ["student.path=no/a", "teacher.path=no/b", *bases]))
    there = plan(load_recipe(SMALL, small))
    for role in ("student", "teacher"):
        assert absent[role]["parts"] == there[role]["parts"]


def test_world_size_comes_from_the_launcher(small, monkeypatch):
    recipe = load_recipe(SMALL, small)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert plan(recipe)["schedule"]["processes"] == 2
    assert any(item["name"] == "DDP buckets" for item in plan(recipe)["memory"]["items"])
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE"):
        plan(recipe)


LAUNCHES = {
    "single": {},
    "ddp": {"WORLD_SIZE": "8"},
    "fsdp2": {"WORLD_SIZE": "8", "ACCELERATE_USE_FSDP": "true"},
    "zero2": {"WORLD_SIZE": "8", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"WORLD_SIZE": "8", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "zero3_offload": {
        "WORLD_SIZE": "8", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
    },
}  # fmt: skip


@pytest.mark.parametrize("mode", LAUNCHES)
def test_memory_is_that_of_the_way_it_was_launched(monkeypatch, mode):
    for name, value in LAUNCHES[mode].items():
        monkeypatch.setenv(name, value)
    result = plan(load_recipe(PUBLISHED))
    memory, student = result["memory"], result["student"]
    assert memory["mode"] == mode
    table = {row["mode"]: row for row in result["memory_by_mode"]}
    assert set(table) == set(LAUNCHES) - {"single"} and {row["processes"] for row in table.values()} == {8}
    if mode != "single":
        assert table[mode]["gib"] == memory["total_gib"] and table[mode]["host_gib"] == memory["host_gib"]
    gib = {item["name"]: item["gib"] * GIB for item in memory["items"] + memory["host_items"]}
    parts = 1 if mode in ("single", "ddp") else 8
    assert gib["Adam moments"] == 8 * student["trained"] // parts
    assert gib["student weights"] == 4 * student["parameters"] // (1 if mode == "zero2" else parts)
    assert ("optimizer's copy" in gib) == mode.startswith("zero")
    assert ("DDP buckets" in gib) == (mode == "ddp")
    assert bool(memory["host_gib"]) == (mode == "zero3_offload")
    text = format_plan(result)
    assert all(f"  {name} " in text for name in table) and max(map(len, text.splitlines())) <= 120


def test_sharding_takes_less_of_a_gpu_the_more_is_cut_up():
    rows = plan(load_recipe(PUBLISHED), world_size=1)["memory_by_mode"]
    gib = {row["mode"]: row["gib"] for row in rows}
    assert gib["ddp"] > gib["zero2"] > gib["zero3"] > gib["zero3_offload"] and gib["ddp"] > gib["fsdp2"]
    more = plan(load_recipe(PUBLISHED), world_size=16)["memory_by_mode"]
    assert all(row["gib"] <= gib[row["mode"]] for row in more)


def test_mode_of_a_deepspeed_configuration(tmp_path):
    path = tmp_path / "zero.json"
    told = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}))
    assert launched_mode(2, told) == "zero3_offload"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert launched_mode(2, told) == "zero2"
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        launched_mode(2, told)


def test_memory_items_add_up_and_follow_their_formulas():
    result = plan(load_recipe(PUBLISHED), world_size=1)
    gib = {item["name"]: item["gib"] * GIB for item in result["memory"]["items"]}
    trained = result["student"]["trained"]
    assert gib["student weights"] == 4 * 2_127_532_032
    assert gib["theta"] == 4 * 11_010_048
    assert (gib["gradients"], gib["Adam moments"]) == (4 * trained, 8 * trained)
    assert gib["teacher weights"] == 2 * 8_767_123_696
    assert gib["teacher signals"] == 2 * 512 * (206 + 196) * 4096
    assert gib["logits"] == 512 * 2**20 * 5 // 4  # a chunk: nine records of a row have more
    assert gib["head gradient"] == 4 * 151_936 * 2048
    assert result["memory"]["total_gib"] * GIB == pytest.approx(sum(gib.values()))
    checkpointed, kept = (result["memory"]["activations"][key] for key in ("checkpointed_gib", "kept_gib"))
    assert gib["activations"] == checkpointed * GIB and kept > 5 * checkpointed


@pytest.mark.parametrize(
    ("load_in", "bytes_a_weight"), [("null", 2), ("8bit", 1 + 8 / 6144), ("4bit", 0.5 + 4 / 64)]
)
def test_memory_of_a_teacher_of_few_bits(load_in, bytes_a_weight):
    result = plan(load_recipe(PUBLISHED, [f"teacher.load_in={load_in}"]), world_size=1)
    (item,) = [item for item in result["memory"]["items"] if item["name"] == "teacher weights"]
    linears = result["teacher"]["parts"]["decoder_linears"]
    rest = result["teacher"]["parameters"] - linears
    assert item["gib"] * GIB == pytest.approx(2 * rest + bytes_a_weight * linears, rel=1e-3)
    assert result["teacher_memory"] is None
    assert (f"decoder linears in {load_in}" in format_plan(result)) == (load_in != "null")


@pytest.mark.parametrize("device", ["cpu", "cuda:+4", "spread"])
def test_memory_of_a_teacher_elsewhere(device):
    beside = plan(load_recipe(PUBLISHED), world_size=1)
    result = plan(load_recipe(PUBLISHED, [f"teacher.device={device}"]), world_size=1)
    before, items = (
        {item["name"]: item["gib"] * GIB for item in p["memory"]["items"]} for p in (beside, result)
    )
    head = 2 * 151_936 * 4096
    assert items == {k: v for k, v in before.items() if k != "teacher weights"} | {"teacher head": head}
    total, *spreads = (row["gib"] * GIB for row in result["teacher_memory"])
    assert total == before["teacher weights"] - head
    assert [round(total / size) for size in spreads] == ([1, 3, 7] if device == "spread" else [])
    text = format_plan(result)
    assert "memory of its teacher on " in text and max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_autograd_saves(tiny_student_dir, precision, checkpointing):
    """Text only, so that the decoder's coefficients stand alone; differences cancel what is fixed."""
    model = qwen3vl.load_model(str(tiny_student_dir))
    if checkpointing:
        qwen3vl.enable_checkpointing(model)

    def saved(tokens: int) -> int:
        return saved_bytes(model, tokens, precision)

    def estimate(tokens: int) -> int:
        sizes = Sizes(model, None, 0, 0, 1, 1, tokens, tokens, 0, 1)
        return activation_bytes(model.config, sizes, precision, checkpointing)

    measured, expected = saved(128) - saved(64), estimate(128) - estimate(64)
    if checkpointing:  # the estimate also holds the one layer that is being rebuilt
        widths = {"D": 128, "Q": 256, "K": 128, "F": 256}  # of the tiny student
        expected -= 64 * sum(plan_memory.DECODER[precision][name] * width for name, width in widths.items())
    assert measured == pytest.approx(expected, rel=0.05)


def saved_bytes(model, tokens: int, precision: str) -> int:
    """Distinct storage that a forward pass keeps for its backward pass, parameters excluded."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    ids_BL = torch.randint(0, 300, (1, tokens))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        model.model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("recipe", ["qwen3vl_2b_bf16.yaml", PUBLISHED, "qwen3vl_2b_w8g128.yaml"])
def test_dry_run_from_an_empty_directory(tmp_path, recipe):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "grace.train", recipe, "--dry-run"]
    if "PYTHONPATH" not in environment:  # the package may be on the path by the working directory alone
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    # The processor's time, not the clock's: other tests run beside this one.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start < 20
    assert not list(tmp_path.iterdir())
    for words in ("2,127,532,032", "8,767,123,696", "102,025", "total"):
        assert words in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120


def test_dry_run_complains_in_one_line(tmp_path):
    command = [sys.executable, "-m", "grace.train", PUBLISHED, "--dry-run", "quant.group_size=100"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1 and "q_proj" in result.stderr
