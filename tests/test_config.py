"""Recipes: every kind of mistake is one helpful line; what loads survives a round trip."""

import contextlib
import os
import string
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grace.config import Recipe, load_recipe, recipe_diff, recipe_hash, resource, to_yaml
from grace.errors import UserError
from grace.recipe_check import Interval

MINIMAL = {
    "student": {"path": "models/student"},
    "data": {"path": "data.json"},
    "optim": {
        "lr": 1e-4,
        "weight_decay": 0.0,
        "batch_size": 8,
        "warmup_ratio": 0.1,
        "max_grad_norm": 1.0,
    },
    "run": {"output_dir": "runs/x"},
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def complaint(path: Path | str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    return message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("optim.warmup=0.1", "did you mean optim.warmup_ratio?"),
        ("quant.lr=1e-5", "did you mean optim.lr?"),
        ("optim.micro_batch_size=4", "did you mean run.micro_batch_size?"),
        ("optim.micro_batchsize=4", "did you mean run.micro_batch_size?"),
        ("run.batch_size=4", "did you mean optim.batch_size?"),
        ("optm.lr=1", "unknown section 'optm', did you mean optim?"),
        ("xyzzy.lr=1", "expected one of student, data, optim, run, teacher, quant, distill"),
        ("optim.lr.x=1", "unknown key optim.lr.x"),
    ],
)
def test_unknown_key_names_the_nearest_known_one(recipe_file, override, expected):
    assert expected in complaint(recipe_file, override)


def test_key_at_the_top_level_names_its_section(recipe_file):
    recipe_file.write_text(yaml.safe_dump({**MINIMAL, "batch_size": 4}))
    assert "unknown section 'batch_size', did you mean optim.batch_size?" in complaint(recipe_file)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=0", "optim.lr is 0, out of range: it must be more than 0"),
        ("optim.lr=-1e-5", "must be more than 0"),
        ("optim.weight_decay=-1", "must be at least 0"),
        ("optim.batch_size=0", "must be in [1, 1000000]"),
        ("optim.epochs=0", "must be in (0, 1000000]"),
        ("optim.max_grad_norm=0", "must be more than 0"),
        ("optim.warmup_ratio=1.5", "must be in [0, 1]"),
        ("optim.beta2=1", "must be in [0, 1)"),
        ("optim.eps=0", "must be more than 0"),
        ("quant.bits=1", "must be in [2, 8]"),
        ("quant.bits=9", "must be in [2, 8]"),
        ("quant.group_size=0", "must be at least 1"),
        ("distill.ema_decay=1.0", "must be in [0, 1)"),
        ("distill.temperature=0", "must be more than 0"),
        ("distill.tau=-1", "must be at least 0"),
        ("run.micro_batch_size=0", "must be at least 1"),
        ("run.seed=-1", "must be in [0, 4294967295]"),
        (f"quant.bits={'9' * 400}", "must be in [2, 8]"),
        (f"optim.batch_size={'9' * 20}", "must be in [1, 1000000]"),
        (f"run.max_steps={'9' * 20}", "must be in [1, 1000000000]"),
    ],
)
def test_out_of_range_names_the_range(recipe_file, override, expected):
    assert expected in complaint(recipe_file, override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=fast", "optim.lr is 'fast', expected a number"),
        ("optim.lr=true", "expected a number"),
        ("optim.lr=", "optim.lr is null, expected a number"),
        ("optim.lr={a: 1}", "expected a number"),
        ("optim.lr='1.0'", "expected a number"),
        ("quant.bits=4.0", "expected a whole number or null"),
        ("quant.bits=true", "quant.bits is true, expected a whole number"),
        ("optim.batch_size=8.5", "expected a whole number"),
        ("run.output_dir=7", "expected text"),
        ("run.output_dir=' '", "not empty"),
        ("run.wandb=off", "run.wandb is false, expected online or offline or disabled"),
        ("distill.loss=mse", "expected none or kl or gkl or gdkd"),
        ("distill.tau=soon", "expected a number or auto"),
        ("run.gradient_checkpointing=1", "expected true or false"),
        ("teacher.load_in=4", "teacher.load_in is 4, expected 8bit or 4bit or null"),
        ("teacher.device=1", "teacher.device is 1, expected text"),
        ("student.path=null", "expected text"),
        ("student.path=[a, b]", "expected text"),
    ],
)
def test_wrong_type_names_the_expected_one(recipe_file, override, expected):
    assert expected in complaint(recipe_file, override)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999", "9" * 400, "nan"])
def test_numbers_must_be_finite(recipe_file, value):
    complaint(recipe_file, f"optim.lr={value}")
    complaint(recipe_file, f"distill.tau={value}")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr", "not of the form section.key=value, such as optim.lr=..."),
        ("lr=1", "such as optim.lr=..."),
        ("batchsize=1", "such as optim.batch_size=..."),
        ("", "not of the form"),
        ("=1", "not of the form"),
        (".lr=1", "not of the form"),
        ("optim.=1", "not of the form"),
        ("optim.lr=[1", "not valid YAML"),
        ("optim.lr=a: b: c", "not valid YAML"),
        ("optim.lr=2024-13-45", "not valid YAML"),
        ("optim.lr=" + "[" * 100_000, "not valid YAML"),
        ("optim.lr={a: 1, a: 2}", "given twice"),
        ("optim.lr=\0", "not valid YAML"),
    ],
)
def test_malformed_overrides(recipe_file, override, expected):
    message = complaint(recipe_file, override)
    assert expected in message and "override" in message


def test_a_fault_names_where_it_was_written(recipe_file):
    assert complaint(recipe_file, "optim.lr=0").startswith("override 'optim.lr=0': ")
    recipe_file.write_text(yaml.safe_dump({**MINIMAL, "quant": {"bits": 99}}))
    assert complaint(recipe_file, "optim.lr=1").startswith(f"{recipe_file}: ")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds nothing"),
        (b"# only a comment\n", "holds nothing"),
        (b"- a\n- b\n", "holds a list"),
        (b"just text", "holds a str"),
        (b"\xff\xfe\x00binary", "not UTF-8"),
        (b"\x7fELF\x02\x01\x01\x00\x00", "not valid YAML"),
        (b"student: {path: a\n", "not valid YAML"),
        (b"student: {path: a}\nstudent: {path: b}\n", "'student' is given twice, again in line 2"),
        (b"student:\n  path: a\n  path: b\n", "'path' is given twice, again in line 3"),
        (b"student: [a]\n", "section student is ['a'], expected keys and values"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
        (b"!!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"? [a, b]\n: c\n", "not valid YAML"),
        (b"1: 2\n", "unknown section 1"),
        (b"[" * 50_000, "not valid YAML"),
        (b"student: &a {path: *a}\n", "student.path"),
    ],
)
def test_unreadable_files(tmp_path, content, expected):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    message = complaint(path)
    assert expected in message and str(path) in message


def test_files_that_are_not_files(tmp_path):
    assert "is a directory" in complaint(tmp_path)
    assert "there is no" in complaint(tmp_path / "absent.yaml")
    assert "there is no" in complaint("x" * 300)  # longer than a file name may be
    assert "there is no" in complaint("a\0b")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(recipe_file):
    recipe_file.chmod(0)
    assert "cannot be read (Permission denied)" in complaint(recipe_file)


@pytest.mark.parametrize("missing", ["student.path", "data.path", "optim.lr", "run.output_dir"])
def test_missing_field_is_named(tmp_path, missing):
    section, key = missing.split(".")
    values = {name: dict(content) for name, content in MINIMAL.items()}
    del values[section][key]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    assert f"{missing} is missing" in complaint(path)
    del values[section]
    path.write_text(yaml.safe_dump(values))
    assert f"{section}." in complaint(path)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["distill.loss=kl", "distill.beta_max=1"], "needs a teacher"),
        (["distill.rcka_weight=1"], "needs a teacher"),
        (["distill.beta_min=0.5"], "[beta_min, beta_max] = [0.5, 0]"),
        (["distill.loss=kl", "teacher.path=t"], "has no weight"),
        (["data.min_pixels=10", "data.max_pixels=5"], "at most data.max_pixels=5"),
        (["teacher.device=cpu"], "need a teacher, set teacher.path"),
        (["teacher.load_in=4bit"], "need a teacher, set teacher.path"),
    ],
)
def test_fields_that_do_not_fit_together(recipe_file, overrides, expected):
    assert expected in complaint(recipe_file, *overrides)


@pytest.mark.parametrize(
    "value",
    ["cuda", "gpu:1", "cuda:", "cuda:+0", "cuda:01", "cuda:-1", "cuda:1 ", "CPU", "cuda:\u0663", "meta"],
)
def test_places_that_are_none(recipe_file, value):
    message = complaint(recipe_file, "teacher.path=t", f"teacher.device='{value}'")
    assert f"teacher.device is {value!r}, expected cpu or cuda:N or cuda:+N or spread or null" in message


@pytest.mark.parametrize("value", ["cpu", "cuda:0", "cuda:15", "cuda:+1", "spread", None])
def test_places_of_a_teacher(recipe_file, value):
    given = "null" if value is None else value
    recipe = load_recipe(recipe_file, ["teacher.path=t", f"teacher.device={given}"])
    assert recipe.teacher.device == value
    recipe_file.write_text(to_yaml(recipe))
    assert load_recipe(recipe_file) == recipe


def test_overrides_are_typed_by_yaml_and_the_last_one_wins(recipe_file):
    recipe = load_recipe(
        recipe_file,
        [
            "optim.lr=3",
            "optim.lr=1e-5",
            "quant.bits=4",
            "run.max_steps=null",
            "student.path=a=b.c",
            "distill.tau=3",
            "run.gradient_checkpointing=true",
        ],
    )
    assert recipe.optim.lr == 1e-5 and recipe.quant.bits == 4 and recipe.run.max_steps is None
    assert recipe.student.path == "a=b.c" and recipe.run.gradient_checkpointing is True
    assert recipe.distill.tau == 3.0 and isinstance(recipe.distill.tau, float)
    assert load_recipe(recipe_file, ["distill.tau=auto"]).distill.tau == "auto"


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.e-5", "1.0e-5", "0.00001", "+1e-5"])
def test_every_spelling_of_a_small_number(recipe_file, text):
    assert load_recipe(recipe_file, [f"optim.lr={text}"]).optim.lr == pytest.approx(1e-5)


def test_empty_section_and_byte_order_mark_are_fine(recipe_file):
    recipe_file.write_text("\ufeff" + recipe_file.read_text() + "quant:\n", encoding="utf-8")
    assert load_recipe(recipe_file).quant.bits is None
    assert load_recipe(recipe_file, ["quant.bits=8"]).quant.bits == 8


def test_packaged_models_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("small_world/grace_w4.yaml")
    for path in (recipe.student.path, recipe.teacher.path):
        assert path is not None and (Path(path) / "model.safetensors").is_file()
    with pytest.raises(UserError, match="there is no recipes/no/such/model"):
        load_recipe("small_world/grace_w4.yaml", ["student.path=recipes/no/such/model"])


numbers = st.floats(min_value=1e-12, max_value=1e12)
paths = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(deadline=None, max_examples=60)
@given(lr=numbers, tau=st.one_of(numbers, st.just("auto")), path=paths, seed=st.integers(0, 2**32 - 1))
@example(lr=1.0, tau="auto", path="a\x85b\u2028c\ufeff", seed=0)  # line breaks to YAML, not to Python
def test_round_trip_through_yaml(tmp_path_factory, lr, tau, path, seed):
    folder = tmp_path_factory.getbasetemp()
    (folder / "a.yaml").write_text(yaml.safe_dump(MINIMAL))
    plain = load_recipe(folder / "a.yaml")
    recipe = replace(
        plain,
        student=replace(plain.student, path=path),
        optim=replace(plain.optim, lr=lr),
        distill=replace(plain.distill, tau=tau),
        run=replace(plain.run, seed=seed),
    )
    (folder / "b.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    again = load_recipe(folder / "b.yaml")
    assert again == recipe and recipe_hash(again) == recipe_hash(recipe) and not recipe_diff(recipe, again)


@settings(deadline=None, max_examples=150)
@given(st.one_of(st.text(), st.text(string.ascii_letters + ".=[]{}:-# \n'\"&*!", max_size=30)))
def test_no_override_does_anything_but_load_or_complain(tmp_path_factory, override):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with contextlib.suppress(UserError):
        assert isinstance(load_recipe(path, [override]), Recipe)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200))
def test_no_file_does_anything_but_load_or_complain(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError):
        load_recipe(path)


def test_hash_is_that_of_the_values(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe_hash(recipe) == recipe_hash(load_recipe(recipe_file, ["optim.lr=1.0e-4"]))
    assert recipe_hash(recipe) != recipe_hash(load_recipe(recipe_file, ["optim.lr=2e-4"]))
    # 3 and 3.0 are the same setting
    assert recipe_hash(load_recipe(recipe_file, ["distill.eta=3"])) == recipe_hash(
        load_recipe(recipe_file, ["distill.eta=3.0"])
    )
    program = f"from grace.config import *; print(recipe_hash(load_recipe({str(recipe_file)!r})))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert other.stdout.strip() == recipe_hash(recipe), other.stderr


def test_diff_names_fields(recipe_file):
    old, new = load_recipe(recipe_file), load_recipe(recipe_file, ["optim.lr=1", "quant.bits=4"])
    assert recipe_diff(old, new) == ["optim.lr: 0.0001 -> 1.0", "quant.bits: None -> 4"]
    assert recipe_diff(old, old) == []


def test_config_does_not_import_torch():
    program = "import sys, grace.config; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_packaged_recipes_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("small_world/grace_w4.yaml", "recipes/small_world/grace_w4.yaml"):
        assert resource(name).is_file()
    assert asdict(load_recipe("small_world/grace_w4.yaml"))["quant"]["bits"] == 4


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [("[0, 1)", [0, 0.5], [-1, 1]), ("(0, inf)", [1e-300, 1e300], [0, -1]), ("[2, 8]", [2, 8], [1, 9])],
)
def test_intervals(interval, inside, outside):
    assert all(value in Interval(interval) for value in inside)
    assert not any(value in Interval(interval) for value in outside)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[missing, truncated]", ("missing", "truncated")),
        ("missing, truncated", ("missing", "truncated")),
        ("missing", ("missing",)),
        ("[missing, missing]", ("missing",)),
        ("[]", ()),
        ("null", ()),
    ],
)
def test_lists_of_names(recipe_file, text, names):
    recipe = load_recipe(recipe_file, [f"data.skip={text}"])
    assert recipe.data.skip == names and recipe.data.accept == ()
    recipe_file.write_text(to_yaml(recipe))
    assert load_recipe(recipe_file) == recipe and recipe_diff(load_recipe(recipe_file), recipe) == []


@pytest.mark.parametrize("text", ["3", "[3]", "{a: b}", "true", "[[missing]]", "[null]"])
def test_what_is_no_list_of_names(recipe_file, text):
    assert "expected a list of names" in complaint(recipe_file, f"data.skip={text}")
