"""The `grace` command from outside: what it accepts, how it refuses, and that it costs nothing to start."""

import subprocess
import sys

import pytest

from grace import cli
from grace import train as grace_train
from grace.errors import UserError
from grace.export.pack import FORMATS
from grace.runtime.int4_linear import KERNELS

GENERATE = ["generate", "somewhere", "--prompt", "What is this?"]
USAGE_ERRORS = {
    "no command": ([], "COMMAND"),
    "unknown command": (["exprot"], "'export'"),
    "unknown option": (["inspect", "somewhere", "--jsn"], "--jsn"),
    "abbreviated option": (["export", "run", "--ou", "x"], "--out"),
    "no data command": (["data"], "COMMAND"),
    "unknown data command": (["data", "big-world"], "'small-world'"),
    "audit: no recipe": (["data", "audit"], "RECIPE"),
    "audit: no workers": (["data", "audit", "r.yaml", "--workers", "0"], "at least 1"),
    "stats: no recipe": (["data", "stats", "--json"], "RECIPE"),
    "download: nothing chosen": (["data", "download", "--only"], "--only"),
    "no recipe": (["train"], "RECIPE"),
    "unknown train option": (["train", "recipe.yaml", "--steps", "run.max_steps=1"], "--steps"),
    "export: no run": (["export", "--out", "x"], "RUN"),
    "export: no out": (["export", "run"], "--out"),
    "export: unknown format": (["export", "run", "--out", "x", "--format", "awk"], "'awq'"),
    "export: size in words": (["export", "run", "--out", "x", "--max-shard-size", "big"], "2GiB"),
    "export: no size": (["export", "run", "--out", "x", "--max-shard-size", "0"], "above 0"),
    "export: a size beyond all": (
        ["export", "run", "--out", "x", "--max-shard-size", "9" * 400],
        "must be a size",
    ),
    "quantize: no out": (["quantize", "model"], "--out"),
    "quantize: one bit": (["quantize", "model", "--out", "x", "--bits", "1"], "--bits"),
    "quantize: odd groups": (["quantize", "model", "--out", "x", "--group-size", "100"], "--group-size"),
    "quantize: unknown method": (["quantize", "model", "--out", "x", "--method", "quip"], "'rtn'"),
    "quantize: unknown scales": (["quantize", "model", "--out", "x", "--scales", "max"], "'absmax'"),
    "push: no repository": (["push", "somewhere"], "REPO"),
    "generate: unknown preset": ([*GENERATE, "--preset", "wild"], "'open-ended'"),
    "generate: unknown head": ([*GENERATE, "--head", "int2"], "'int4'"),
    "bench: unknown size": (["bench", "--synthetic", "qwen3-vl-3b"], "'qwen3-vl-2b'"),
    "bench: no tokens": (["bench", "x", "--prefill", "0"], "at least 1"),
    "generate: image without files": ([*GENERATE, "--image"], "--image"),
    "generate: no tokens": ([*GENERATE, "--max-new-tokens", "0"], "at least 1"),
    "generate: half a token": ([*GENERATE, "--max-new-tokens", "1.5"], "whole number"),
    "generate: negative temperature": ([*GENERATE, "--temperature", "-1"], "at least 0"),
    "generate: infinite temperature": ([*GENERATE, "--temperature", "inf"], "at least 0"),
    "generate: temperature in words": ([*GENERATE, "--temperature", "warm"], "a number"),
    "generate: top-p 0": ([*GENERATE, "--top-p", "0"], "above 0 and at most 1"),
    "generate: top-p above 1": ([*GENERATE, "--top-p", "1.01"], "at most 1"),
    "generate: negative seed": ([*GENERATE, "--seed", "-1"], "at least 0"),
    "generate: unknown kernel": ([*GENERATE, "--kernel", "marlin"], "'dequant'"),
    "eval: limit 0": (["eval", "x", "--tasks", "ai2d", "--limit", "0"], "at least 1"),
    "eval: compare one": (["eval", "--compare", "a"], "--compare"),
    "eval: unknown kernel": (["eval", "x", "--kernel", "marlin"], "'dequant'"),
    "serve: no directory": (["serve"], "DIR"),
    "serve: port in words": (["serve", "x", "--port", "http"], "whole number"),
    "serve: unknown engine": (["serve", "x", "--engine", "ollama"], "'vllm'"),
    "serve: no batch": (["serve", "x", "--max-batch", "0"], "at least 1"),
    "demo: seed in words": (["demo", "--seed", "lucky"], "whole number"),
    "small world: no out": (["data", "small-world"], "--out"),
    "small world: split without size": (
        ["data", "small-world", "--out", "x", "--splits", "test"],
        "NAME=SIZE",
    ),
    "small world: split twice": (["data", "small-world", "--out", "x", "--splits", "test=1,test=2"], "once"),
    "a line break in the input": (["inspect", "somewhere", "one\ntwo"], "one two"),
}


@pytest.mark.parametrize(("arguments", "mentioned"), USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_usage_errors_are_one_line_and_exit_2(capsys, arguments, mentioned):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert not out
    assert err.count("\n") == 1 and err.endswith("\n") and err.startswith("error: ")
    assert mentioned in err and "--help" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "/nowhere"],
        ["generate", "/nowhere", "--prompt", "x"],
        ["generate", "/nowhere"],
        ["generate", "/nowhere", "--prompt", "x", "--chat"],
        ["generate", "/nowhere", "--batch", "/nowhere.jsonl"],
        ["generate", "/nowhere", "--batch", "/nowhere.jsonl", "--out", "{tmp}/out.jsonl"],
        ["bench"],
        ["bench", "/nowhere"],
        ["bench", "/nowhere", "--synthetic", "qwen3-vl-2b"],
        ["export", "/nowhere", "--out", "{tmp}/out"],
        ["export", "/nowhere", "--out", "{tmp}/out", "--format", "awq", "--format", "qat", "--json"],
        ["export", "/nowhere", "--out", "{tmp}/out", "--base-model", "not a name"],
        ["export", "/nowhere", "--out", "{tmp}/out", "--results", "/nowhere.json"],
        ["quantize", "/nowhere", "--out", "{tmp}/out"],
        ["quantize", "/nowhere", "--out", "{tmp}/out", "--method", "gptq"],
        ["push", "/nowhere", "owner/name"],
        ["push", "/nowhere", "name", "--dry-run"],
        ["train", "/nowhere.yaml"],
        ["eval", "/nowhere"],
        ["eval", "--compare", "/nowhere", "/nowhere"],
        ["train", "small_world/grace_w4.yaml", "run.sede=1", "--dry-run"],
        ["data", "audit", "/nowhere.yaml"],
        ["data", "stats", "/nowhere.yaml", "--json"],
        ["data", "download"],
        ["data", "download", "--out", "{tmp}/out", "--only", "nothing"],
        ["data", "download", "--out", "{tmp}/out", "--manifest", "/nowhere.yaml"],
        ["data", "small-world", "--out", "{tmp}/out", "--splits", "exam=3"],
        ["data", "small-world", "--out", "{tmp}/out", "--splits", "test=0"],
        ["demo", "--out", "{tmp}"],
    ],
    ids=" ".join,
)
def test_wrong_input_is_one_line_and_exit_2(capsys, tmp_path, arguments):
    (tmp_path / "something").touch()
    assert cli.main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


@pytest.mark.parametrize("module", ["grace", "grace.cli", "grace.train"])
def test_modules_run_as_commands(module):
    result = subprocess.run([sys.executable, "-m", module, "--frobnicate"], capture_output=True, text=True)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["demo"], ["study"], ["data"], ["train"], ["quantize"], ["export"], ["push"]),
        *(["generate"], ["serve"], ["eval"], ["bench"], ["inspect"]),
        *(["data", name] for name in ("audit", "stats", "download", "small-world")),
    ],
    ids=lambda arguments: " ".join(["grace", *arguments]),
)
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--help"])
    out, err = capsys.readouterr()
    assert stopped.value.code == 0 and not err
    assert out.startswith(" ".join(["usage: grace", *arguments]))


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"grace {cli.__version__}\n"


def test_choices_are_those_of_the_implementations():
    assert cli.KERNELS == KERNELS
    assert cli.FORMATS == FORMATS


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("500MB", 5 * 10**8),
        ("2GB", 2 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("10k", 10**4),
        ("7B", 7),
        ("2gb", 2 * 10**9),
    ],
)
def test_sizes(text: str, size: int):
    assert cli.byte_size(text) == size


def test_arguments_reach_the_implementations(monkeypatch):
    args = vars(
        cli.build_parser().parse_args([*GENERATE, "--image", "a", "b", "--image", "c", "--top-p", "1"])
    )
    assert args["image"] == ["a", "b", "c"] and args["top_p"] == 1.0 and args["temperature"] is None
    assert args["seed"] is None and args["kernel"] == "auto" and args["max_new_tokens"] is None
    args = vars(
        cli.build_parser().parse_args(["export", "r", "--out", "o", "--format", "qat", "--format", "awq"])
    )
    assert args["format"] == ["qat", "awq"] and args["parity_data"] is None and not args["json"]
    args = vars(
        cli.build_parser().parse_args(
            ["data", "small-world", "--out", "o", "--splits", "test=3, qat_train=4"]
        )
    )
    assert args["splits"] == {"test": 3, "qat_train": 4} and args["seed"] == 0
    given = []
    monkeypatch.setattr(grace_train, "main", lambda argv: given.extend(argv) or 0)
    assert cli.main(["train", "r.yaml", "optim.lr=1e-5", "--dry-run", "run.seed=-1"]) == 0
    assert given == ["r.yaml", "optim.lr=1e-5", "run.seed=-1", "--dry-run"]


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "grace.demo.pipeline", None)  # importing it raises ModuleNotFoundError
    assert cli.main(["demo"]) == 1  # a missing part of grace is our fault

    def no_sklearn(*_):
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")

    monkeypatch.setattr("grace.data.small_world.write_small_world", no_sklearn)
    capsys.readouterr()
    assert cli.main(["data", "small-world", "--out", "x"]) == 2
    assert capsys.readouterr().err == "error: sklearn is not installed: pip install 'grace[demo]'\n"


def test_our_fault_exits_1_with_a_trace(monkeypatch, capsys):
    def fails(_):
        raise ZeroDivisionError

    monkeypatch.setattr("grace.runtime.inspect.run_inspect", fails)
    assert cli.main(["inspect", "x"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_user_errors_inside_a_command_are_one_line(monkeypatch, capsys):
    def refuses(_):
        raise UserError("two\n  lines")

    monkeypatch.setattr("grace.runtime.inspect.run_inspect", refuses)
    assert cli.main(["inspect", "x"]) == 2
    assert capsys.readouterr().err == "error: two lines\n"


HEAVY = (
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "wandb",
    "datasets",
    "triton",
    "numpy",
    "PIL",
    "sklearn",
)


@pytest.mark.parametrize("module", ["grace", "grace.cli", "grace.config", "grace.errors", "grace.files"])
def test_importing_is_cheap(module):
    code = f"import sys, {module}; print(*[m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not result.stdout.split()


def test_parsing_is_cheap():
    code = f"import sys, grace.cli; grace.cli.build_parser().parse_args({GENERATE}); print(*[m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not result.stdout.split()
