"""`grace teacher-cache` and training from what it wrote: the same losses, no teacher, stale caches refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from grace import cli, teacher_cache
from grace.config import load_recipe
from grace.data.record_key import content_key, text_key
from grace.data.records import load_records
from grace.distill.cache_store import RecordKey, TeacherCache, read_index
from grace.errors import UserError
from grace.step import NonFiniteLoss
from grace.train import main as train
from grace.train import train as run_training

VOCABULARY = 512  # of the tiny models


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_world_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_world_dir, tmp_path_factory.mktemp("cached") / "world"))


@pytest.fixture(scope="module")
def overrides(world: Path, tiny_student_dir: Path, tiny_teacher_dir: Path) -> list[str]:
    return [
        f"student.path={tiny_student_dir}", f"teacher.path={tiny_teacher_dir}", f"data.path={world / 'qat_train.json'}",
        "data.validation_path=null", "data.max_length=1024", "optim.batch_size=8", "run.micro_batch_size=3",
        "run.max_steps=3", "run.log_every=1",
    ]  # fmt: skip


def recipe_of(overrides: list[str], *more: str):
    return load_recipe("small_world/grace_w4.yaml", [*overrides, *more])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, overrides: list[str]) -> Path:
    """All 32 records in four shards, all other tokens kept. Do not write into it."""
    out = tmp_path_factory.mktemp("cached") / "cache"
    recipe = recipe_of(overrides, f"teacher.cache_top_k={VOCABULARY - 1}")
    summary = teacher_cache.fill_cache(recipe, out, Accelerator(cpu=True), records_per_shard=9)
    assert summary["records"] == summary["added"] == 32
    assert [shard.records for shard in read_index(out).shards] == [9, 9, 9, 5]
    return out


def losses(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("loss/total", "loss/ce", "loss/gdkd", "loss/rcka", "gate/mean", "optim/grad_norm")
    return [{name: line[name] for name in names} for line in lines if "loss/total" in line]


# ---------------------------------------------------------------- training from it


@pytest.mark.parametrize(
    ("kind", "sharpness", "workers"),
    [("gdkd", 1, 0), ("gdkd", 8, 2), ("kl", 1, 2), ("gkl", 8, 0)],
)
def test_all_tokens_kept_trains_as_the_living_teacher(
    cache: Path, overrides: list[str], tmp_path: Path, kind: str, sharpness: int, workers: int
) -> None:
    """Left are what float16 loses of the Gram matrices, and padding."""
    shared = [
        *overrides, f"distill.loss={kind}", f"distill.gate_sharpness={sharpness}", f"data.num_workers={workers}",
    ]  # fmt: skip
    online = recipe_of(shared, f"run.output_dir={tmp_path / 'online'}")
    cached = recipe_of(
        shared, f"run.output_dir={tmp_path / 'cached'}", f"teacher.cache={cache}", "teacher.path=null",
        f"teacher.cache_top_k={VOCABULARY - 1}",
    )  # fmt: skip
    run_training(online)
    run_training(cached)
    for one, two in zip(losses(tmp_path / "online"), losses(tmp_path / "cached"), strict=True):
        assert two == pytest.approx(one, rel=2e-3)
    first = [losses(tmp_path / name)[0] for name in ("online", "cached")]
    assert first[0]["loss/gdkd"] == pytest.approx(first[1]["loss/gdkd"], rel=1e-5)
    assert first[0]["loss/rcka"] > 1e-3  # so that its tolerance means something


def test_fewer_tokens_are_an_approximation_from_below(
    cache: Path, overrides: list[str], tmp_path: Path
) -> None:
    values = []
    for k in (4, 64, VOCABULARY - 1):
        more = [f"run.output_dir={tmp_path / str(k)}", f"teacher.cache={cache}", f"teacher.cache_top_k={k}"]
        run_training(recipe_of(overrides, *more, "run.max_steps=1"))
        values.append(losses(tmp_path / str(k))[0]["loss/gdkd"])
    assert values == sorted(values) and values[0] < values[-1]


def test_a_gate_over_the_likeliest_tokens_needs_the_living_teacher(
    cache: Path, overrides: list[str], tmp_path: Path
) -> None:
    recipe = recipe_of(
        overrides, f"teacher.cache={cache}", f"run.output_dir={tmp_path / 'run'}", "distill.gate_top_k=16"
    )
    with pytest.raises(UserError, match="gate_top_k=16 needs the living teacher"):
        run_training(recipe)


def test_no_teacher_is_loaded(cache: Path, overrides: list[str], tmp_path: Path, monkeypatch) -> None:
    def refuse(*_args, **_options):
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr("grace.run.placed_teacher", refuse)
    run_training(
        recipe_of(
            overrides, f"teacher.cache={cache}", f"run.output_dir={tmp_path / 'run'}", "run.max_steps=1"
        )
    )


def test_two_processes_train_as_one(cache: Path, overrides: list[str], tmp_path: Path) -> None:
    shared = [*overrides, f"teacher.cache={cache}", "teacher.path=null", "run.max_steps=2"]
    run_training(recipe_of(shared, f"run.output_dir={tmp_path / 'one'}"))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "grace.train",
        "small_world/grace_w4.yaml", *shared, f"run.output_dir={tmp_path / 'two'}",
    ]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


# ---------------------------------------------------------------- stale and damaged


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (["data.max_pixels=2048"], "another image processor"),
        (["distill.temperature=3.0"], "at temperature 2.0, distill.temperature is 3.0"),
        (["teacher.dtype=bfloat16"], "ran in float32, the recipe's runs in bfloat16"),
        ([f"teacher.cache_top_k={VOCABULARY}"], "keeps 511 tokens"),
    ],
)
def test_another_recipe_is_refused_with_the_reason(
    cache: Path, overrides: list[str], tmp_path: Path, capsys, change: list[str], reason: str
) -> None:
    arguments = [*overrides, f"teacher.cache={cache}", f"run.output_dir={tmp_path / 'run'}", *change]
    assert train(["small_world/grace_w4.yaml", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {cache} is stale: ") and reason in error and error.count("\n") == 1


def altered_model(source: Path, out: Path, change) -> Path:
    """A copy of a model directory in which `change(directory)` was made."""
    shutil.copytree(source, out)
    change(out)
    return out


def other_weights(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = tensors[name] * 1.001
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_another_teacher_is_refused(cache, overrides, tiny_teacher_dir, tmp_path, capsys) -> None:
    other = altered_model(tiny_teacher_dir, tmp_path / "other", other_weights)
    arguments = [
        *overrides,
        f"teacher.cache={cache}",
        f"run.output_dir={tmp_path / 'run'}",
        f"teacher.path={other}",
    ]
    assert train(["small_world/grace_w4.yaml", *arguments]) == 2
    assert "holds other weights than the teacher that made it" in capsys.readouterr().err


def other_tokenizer(directory: Path) -> None:
    path = directory / "tokenizer.json"
    value = json.loads(path.read_text())
    value["added_tokens"][-1]["content"] = "<|something else|>"
    path.write_text(json.dumps(value))


def test_another_tokenizer_is_refused(cache, overrides, tiny_student_dir, tmp_path, capsys) -> None:
    other = altered_model(tiny_student_dir, tmp_path / "other", other_tokenizer)
    arguments = [
        *overrides,
        f"teacher.cache={cache}",
        "teacher.path=null",
        f"run.output_dir={tmp_path / 'run'}",
    ]
    assert train(["small_world/grace_w4.yaml", *arguments, f"student.path={other}"]) == 2
    assert "made with another tokenizer" in capsys.readouterr().err


def test_changed_records_are_refused_and_then_added(cache, overrides, world, tmp_path, capsys) -> None:
    mine = Path(shutil.copytree(world, tmp_path / "world"))
    data = mine / "qat_train.json"
    entries = json.loads(data.read_text())
    changed = next(entry for entry in entries if entry.get("image"))
    answer = changed["conversations"][-1]
    answer["value"] += " Indeed."
    data.write_text(json.dumps(entries))
    own = Path(shutil.copytree(cache, tmp_path / "cache"))
    arguments = [
        *overrides,
        f"teacher.cache={own}",
        f"data.path={data}",
        f"run.output_dir={tmp_path / 'run'}",
    ]
    assert train(["small_world/grace_w4.yaml", *arguments]) == 2
    assert (
        f"1 of 32 records of {data} are not in it as they are now, such as {changed['id']}"
        in capsys.readouterr().err
    )
    # The same command fills what is missing, at the cache's own settings.
    assert (
        cli.main(["teacher-cache", "small_world/grace_w4.yaml", *arguments, "--out", str(own), "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["added"] == 1
    assert train(["small_world/grace_w4.yaml", *arguments]) == 0
    # A picture that changes later is found when its record comes up.
    (mine / changed["image"]).write_bytes((mine / changed["image"]).read_bytes() + b"\0")
    arguments[-1] = f"run.output_dir={tmp_path / 'again'}"
    capsys.readouterr()
    assert train(["small_world/grace_w4.yaml", *arguments, "run.max_steps=4"]) == 2
    assert f"the pictures of record {changed['id']} have changed" in capsys.readouterr().err


def test_no_cache_there(overrides, tmp_path, capsys) -> None:
    arguments = [*overrides, f"teacher.cache={tmp_path / 'none'}", f"run.output_dir={tmp_path / 'run'}"]
    assert train(["small_world/grace_w4.yaml", *arguments]) == 2
    assert "holds no teacher cache: make it with grace teacher-cache" in capsys.readouterr().err


def test_a_cache_without_gram_matrices(overrides, tmp_path, capsys) -> None:
    arguments = ["small_world/grace_w4.yaml", *overrides, "distill.rcka_weight=0"]
    assert cli.main(["teacher-cache", *arguments, "--out", str(tmp_path / "cache")]) == 0
    arguments += [
        f"teacher.cache={tmp_path / 'cache'}",
        f"run.output_dir={tmp_path / 'run'}",
        "run.max_steps=1",
    ]
    assert train(arguments) == 0
    capsys.readouterr()
    assert train([*arguments, "distill.rcka_weight=3.0", f"run.output_dir={tmp_path / 'other'}"]) == 2
    assert "it has no Gram matrices, which distill.rcka_weight above 0 needs" in capsys.readouterr().err


# ---------------------------------------------------------------- writing it


def test_keeps_what_is_there_and_mends_what_is_damaged(cache, overrides, tmp_path) -> None:
    own = Path(shutil.copytree(cache, tmp_path / "cache"))
    path = own / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    untouched = (own / "shard-00000.safetensors").stat().st_mtime_ns
    summary = teacher_cache.fill_cache(recipe_of(overrides), own, Accelerator(cpu=True), records_per_shard=9)
    assert summary["added"] == 9 and summary["records"] == 32
    assert (own / "shard-00000.safetensors").stat().st_mtime_ns == untouched
    assert not path.exists()  # the new shard has a number of its own
    first, second = TeacherCache(cache), TeacherCache(own)
    for record in load_records(recipe_of(overrides).data.path):
        key = RecordKey(text_key(record), content_key(record))
        one, two = first.read(key), second.read(key)
        torch.testing.assert_close(one.top_k.gate_T, two.top_k.gate_T)


def test_other_settings_and_other_directories_are_refused(cache, overrides, tmp_path, capsys) -> None:
    arguments = ["teacher-cache", "small_world/grace_w4.yaml", *overrides]
    assert cli.main([*arguments, "distill.temperature=1.0", "--out", str(cache)]) == 2
    assert "is stale: it was made at temperature 2.0" in capsys.readouterr().err
    (tmp_path / "letter").touch()
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 2
    assert "holds files that are not a teacher cache's: choose another --out" in capsys.readouterr().err
    assert (
        cli.main(
            [
                *arguments,
                "distill.loss=none",
                "distill.rcka_weight=0",
                "teacher.path=null",
                "--out",
                str(tmp_path / "x"),
            ]
        )
        == 2
    )
    assert "set teacher.path" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_bad_record_is_one_line_also_from_a_worker(overrides, world, tmp_path, capsys) -> None:
    mine = Path(shutil.copytree(world, tmp_path / "world"))
    name = next(
        entry["image"] for entry in json.loads((mine / "qat_train.json").read_text()) if entry.get("image")
    )
    (mine / name).write_bytes(b"no picture")
    arguments = [
        "teacher-cache",
        "small_world/grace_w4.yaml",
        *overrides,
        f"data.path={mine / 'qat_train.json'}",
    ]
    assert cli.main([*arguments, "data.num_workers=1", "--out", str(tmp_path / "cache")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: record ") and "cannot be decoded" in error[-1]


def test_a_teacher_that_says_nan_stops_with_the_record(overrides, tiny_teacher_dir, tmp_path) -> None:
    def spoil(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        tensors["model.language_model.norm.weight"][0] = torch.nan
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    broken = altered_model(tiny_teacher_dir, tmp_path / "broken", spoil)
    with pytest.raises(NonFiniteLoss, match="not finite for record"):
        teacher_cache.fill_cache(
            recipe_of(overrides, f"teacher.path={broken}"), tmp_path / "cache", Accelerator(cpu=True)
        )
    assert not read_index(tmp_path / "cache").shards


def test_in_use_by_another(overrides, tmp_path) -> None:
    from grace.files import locked

    with locked(tmp_path / "cache", "--out"), pytest.raises(UserError, match="in use by another run"):
        teacher_cache.fill_cache(recipe_of(overrides), tmp_path / "cache", Accelerator(cpu=True))


CHILD = """
import sys
from accelerate import Accelerator
from grace.config import load_recipe
from grace.teacher_cache import fill_cache
fill_cache(load_recipe("small_world/grace_w4.yaml", sys.argv[2:]), __import__("pathlib").Path(sys.argv[1]),
           Accelerator(cpu=True), records_per_shard=1)
"""


@pytest.mark.slow
def test_kills_lose_at_most_a_shard(overrides: list[str], tmp_path: Path) -> None:
    """SIGKILL at some moments; whatever it leaves opens, and the next run goes on from there."""
    out, recipe = tmp_path / "cache", [*overrides, "teacher.cache_top_k=8"]
    held = 0
    for shards in (1, 4, 11):
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(out), *recipe], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while len(list(out.glob("shard-*.safetensors"))) < shards and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(TeacherCache(out)) >= max(held, shards - 1)
        held = len(TeacherCache(out))
    summary = teacher_cache.fill_cache(recipe_of(recipe), out, Accelerator(cpu=True), records_per_shard=1)
    assert summary["records"] == 32 and summary["added"] == 32 - held
    assert not list(out.glob(".*.tmp-*"))


@pytest.mark.slow
def test_two_processes_fill_one_cache(cache: Path, overrides: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "grace.teacher_cache",
        "small_world/grace_w4.yaml", *overrides, f"teacher.cache_top_k={VOCABULARY - 1}", "--out", str(tmp_path / "two"),
        "--records-per-shard", "9",
    ]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = TeacherCache(cache), TeacherCache(tmp_path / "two")
    assert len(two) == 32
    for record in load_records(recipe_of(overrides).data.path):
        key = RecordKey(text_key(record), content_key(record))
        torch.testing.assert_close(
            one.read(key).top_k.target_T2, two.read(key).top_k.target_T2, rtol=1e-4, atol=1e-4
        )


# ---------------------------------------------------------------- mixtures


def test_of_a_mixture_the_records_that_come_up_are_taught(
    overrides: list[str], world: Path, tmp_path: Path
) -> None:
    files = f"{{{world / 'qat_train.json'}: 0.25, {world / 'test.json'}: {{cap: 6}}}}"  # 8 and 6 in an epoch
    mixed = [*overrides, f"data.path={files}", "optim.batch_size=7", "run.max_steps=2"]
    cache = tmp_path / "cache"
    summary = teacher_cache.fill_cache(recipe_of(mixed), cache, Accelerator(cpu=True))
    assert summary["records"] == 14
    given = [*mixed, f"teacher.cache={cache}", "teacher.path=null"]
    run_training(recipe_of(given, f"run.output_dir={tmp_path / 'run'}"))
    assert len(losses(tmp_path / "run")) == 2
    longer = recipe_of(given, "run.max_steps=4", f"run.output_dir={tmp_path / 'longer'}")
    with pytest.raises(
        UserError, match="is stale: 1[0-4] of 2[0-8] records of .*qat_train.json and .*test.json"
    ):
        run_training(longer)
