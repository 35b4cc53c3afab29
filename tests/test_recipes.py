"""The recipes that ship: they load, hold the published numbers, and differ only where they say so."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from grace.config import load_recipe, recipe_diff, resource

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
TRAINING = sorted(
    p for p in RECIPES.rglob("*.yaml") if p.parent.name not in ("accelerate", "slurm", "sweeps")
)
SWEEPS = sorted((RECIPES / "sweeps").glob("*.yaml"))
ACCELERATE = sorted((RECIPES / "accelerate").glob("*.yaml"))


def accelerate_config(path: Path) -> ClusterConfig:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    return config


def names(path: Path) -> str:
    return str(path.relative_to(RECIPES))


def changed(old: str, new: str) -> set[str]:
    return {line.split(":")[0] for line in recipe_diff(load_recipe(old), load_recipe(new))}


@pytest.mark.parametrize("path", TRAINING, ids=names)
def test_every_recipe_loads(path):
    assert load_recipe(path).run.output_dir


@pytest.mark.parametrize("path", TRAINING, ids=names)
def test_every_recipe_shows_its_own_command(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"grace.train recipes/{names(path)}" in line for line in header)


def test_published_settings():
    # DESIGN section 4; arXiv:2601.22709 and its reference code
    recipe = load_recipe("qwen3vl_2b_w4g128.yaml")
    optim, distill, quant = recipe.optim, recipe.distill, recipe.quant
    assert (optim.lr, optim.weight_decay, optim.schedule) == (1e-5, 1e-3, "cosine")
    assert (optim.warmup_ratio, optim.max_grad_norm, optim.batch_size) == (0.03, 1.0, 512)
    assert (distill.loss, distill.temperature) == ("gdkd", 2.0)
    assert (distill.tckd_weight, distill.nckd_weight) == (1.0, 4.0)
    assert (distill.tau, distill.eta, distill.ema_decay) == (3.0, 0.003, 0.99)
    assert (distill.beta_init, distill.beta_min, distill.beta_max) == (0.5, 0.1, 1.0)
    assert (distill.rcka_weight, distill.rcka_warmup_steps) == (3.0, 400)
    assert (quant.bits, quant.group_size, quant.scale_lr_multiplier) == (4, 128, 10.0)
    assert recipe.data.max_pixels == 200704 and recipe.data.expected_records == 102025
    assert (recipe.teacher.path, recipe.teacher.dtype) == ("Qwen/Qwen3-VL-8B-Instruct", "bfloat16")
    assert recipe.student.train_vision is False and recipe.run.precision == "bf16"


def test_w8_differs_in_bits_alone():
    assert changed("qwen3vl_2b_w4g128.yaml", "qwen3vl_2b_w8g128.yaml") == {"quant.bits", "run.output_dir"}
    assert load_recipe("qwen3vl_2b_w8g128.yaml").quant.bits == 8


def test_first_stage_differs_in_quantizer_and_start_alone():
    differences = changed("qwen3vl_2b_w4g128.yaml", "qwen3vl_2b_bf16.yaml")
    assert differences == {"quant.bits", "student.path", "student.base", "run.output_dir"}
    assert load_recipe("qwen3vl_2b_bf16.yaml").quant.bits is None


@pytest.mark.parametrize("second", ["qwen3vl_2b_w4g128.yaml", "qwen3vl_2b_w8g128.yaml"])
def test_second_stage_starts_where_the_first_one_ends(second):
    first, second = load_recipe("qwen3vl_2b_bf16.yaml"), load_recipe(second)
    assert second.student.path == f"{first.run.output_dir}/model"
    assert second.student.base == first.student.path == "Qwen/Qwen3-VL-2B-Instruct"


def test_estimates_follow_from_the_numbers_in_their_comment():
    data = load_recipe("qwen3vl_2b_w4g128.yaml").data
    manifest = yaml.safe_load((ROOT / "data" / "sharegpt4v.yaml").read_text())
    annotations = manifest["annotations"][0]
    caption = round(annotations["mean_caption_characters"] / 4.6)
    assert data.max_pixels is not None
    assert data.expected_tokens_per_record == data.max_pixels // 1024 + caption + 30
    assert data.expected_supervised_per_record == caption + 1
    assert data.expected_records == annotations["records"]
    assert data.path.endswith("/" + annotations["file"])


@pytest.mark.parametrize("path", ACCELERATE, ids=names)
def test_accelerate_reads_its_files(path):
    config = accelerate_config(path)
    assert config.num_processes >= 1 and config.mixed_precision in ("no", "bf16")
    assert f"--config_file recipes/{names(path)}" in path.read_text()


def test_accelerate_files_launch_what_they_are_named_after():
    configs = {path.stem: accelerate_config(path) for path in ACCELERATE}
    kinds = {name: str(config.distributed_type).split(".")[-1] for name, config in configs.items()}
    zero = dict.fromkeys(("zero2", "zero3", "zero3_offload", "multi_node"), "DEEPSPEED")
    assert kinds == {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"} | zero
    assert all(config.num_processes > 1 for name, config in configs.items() if name != "single")
    assert configs["fsdp2"].fsdp_config["fsdp_version"] == 2
    stages = {name: configs[name].deepspeed_config["zero_stage"] for name in zero}
    assert stages == {"zero2": 2, "zero3": 3, "zero3_offload": 3, "multi_node": 2}
    offload = {name: configs[name].deepspeed_config["offload_param_device"] for name in zero}
    assert {name for name, device in offload.items() if device == "cpu"} == {"zero3_offload"}
    assert configs["multi_node"].num_machines == 2


def sweep_argv(path: Path, tmp_path: Path, pick: str) -> list[str]:
    """What a run of a sweep executes: W&B's own agent builds its command, a stand-in for its program tells."""
    from wandb.sdk.launch.sweeps import utils

    config = yaml.safe_load(path.read_text())
    values = {
        name: parameter.get(pick, parameter.get("values", [None])[0 if pick == "min" else -1])
        for name, parameter in config["parameters"].items()
    }
    known = utils.create_sweep_command_args({"args": {name: {"value": v} for name, v in values.items()}})
    known |= {"env": ["/usr/bin/env"], "interpreter": ["python"]}
    argv: list[str] = []
    for word in map(str, utils.create_sweep_command(config["command"])):
        argv += known[word[2:-1]] if word.startswith("${") else [word]
    for program in ("python", "accelerate"):
        stub = tmp_path / program
        stub.write_text("#!/bin/sh\nfor word; do printf '%s\\n' \"$word\"; done\n")
        stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "ab12"}
    told = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return told.stdout.splitlines()


@pytest.mark.parametrize("path", SWEEPS, ids=names)
@pytest.mark.parametrize("pick", ["min", "max"])
def test_every_run_of_a_sweep_is_a_training(path, pick, tmp_path):
    argv = sweep_argv(path, tmp_path, pick)
    start = argv.index("grace.train") + 1
    assert argv[start - 2] == "-m"
    recipe = load_recipe(argv[start], argv[start + 1 :])
    assert recipe.run.output_dir == "runs/sweeps/ab12" and recipe.run.wandb == "online"
    lr = yaml.safe_load(path.read_text())["parameters"]["optim.lr"]
    assert recipe.optim.lr == lr[pick]


@pytest.mark.parametrize("path", SWEEPS, ids=names)
def test_wandb_takes_the_sweep(path):
    from wandb.apis.public import sweeps as api

    config = yaml.safe_load(path.read_text())
    assert (
        api._validate_config_and_fill_distribution(config)["parameters"].keys() == config["parameters"].keys()
    )
    assert config["method"] in ("grid", "random", "bayes") and config["metric"]["name"] == "val/ce"
    assert f"wandb sweep --project grace recipes/{names(path)}" in path.read_text()
    sweeps = pytest.importorskip("sweeps", reason="W&B's controller, with the schema, is not installed")
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(sweeps.__file__).parent / "config" / "schema.json").read_text())
    jsonschema.validate(config, schema)


def test_named_files_exist():
    for path in TRAINING:
        for word in path.read_text().replace(",", " ").split():
            if word.startswith("recipes/") and word.endswith(".yaml"):
                assert resource(ROOT / word).is_file(), f"{path} names {word}"
