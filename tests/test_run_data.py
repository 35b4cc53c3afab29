"""Mixtures: recipe, order, audit, plan and training agree on what an epoch takes of each file."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from planted_faults import JPEG, entry, talk

from grace import cli
from grace.config import load_recipe, recipe_diff, recipe_hash, to_yaml
from grace.data.records import mixture_of
from grace.data.sampler import epoch_order
from grace.data.template import IGNORED, encode
from grace.errors import UserError
from grace.export.pack import parity_records
from grace.models.processor import load_processor
from grace.plan import format_plan, plan
from grace.recipe_parts import Part
from grace.run_data import load_run_data
from grace.step_inputs import StepBatches
from grace.train import train

RECIPE = "small_world/qat_w4.yaml"


@pytest.fixture
def mixed(tmp_path: Path, tiny_student_dir: Path) -> Any:
    """A file of 20 text records, one of 10 with a picture (two have no answer), one of 4 with two pictures each."""
    (tmp_path / "p.jpg").write_bytes(JPEG)
    texts = [
        entry(f"t{i}", None, conversations=talk(("human", "?"), ("gpt", "yes " * i + "."))) for i in range(20)
    ]
    images = [entry(f"i{i}", "p.jpg") for i in range(10)]
    for i in (3, 8):
        images[i]["conversations"] = images[i]["conversations"][:1]
    two = talk(("human", "<image>, <image>?"), ("gpt", "Both."))
    pairs = [entry(f"p{i}", ["p.jpg"] * 2, conversations=two) for i in range(4)]
    for name, entries in {"texts": texts, "images": images, "pairs": pairs}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))

    def arguments(*extra: str) -> list[str]:
        parts = {
            f"{tmp_path}/texts.json": 0.25,
            f"{tmp_path}/images.json": {"cap": 6},
            f"{tmp_path}/pairs.json": 2,
        }
        return [
            RECIPE, f"data.path={json.dumps(parts)}", "data.validation_path=null", f"student.path={tiny_student_dir}",
            "run.max_steps=null", "optim.batch_size=4", "optim.epochs=1.5", f"run.output_dir={tmp_path / 'run'}",
            "data.skip=one_sided", *extra,
        ]  # fmt: skip

    return arguments


def test_forms_of_a_mixture(mixed: Any, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, mixed()[1:])
    at = str(tmp_path)
    expected = (
        Part(f"{at}/texts.json", 0.25),
        Part(f"{at}/images.json", 1.0, 6),
        Part(f"{at}/pairs.json", 2.0),
    )
    assert recipe.data.path == recipe.data.parts == expected
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe and recipe_hash(again) == recipe_hash(recipe) and not recipe_diff(again, recipe)
    listed = load_recipe(RECIPE, mixed("data.path=[a.json, {path: b.json, cap: 3}]")[1:])
    assert listed.data.path == (Part("a.json"), Part("b.json", 1.0, 3))
    assert any("data.path" in change for change in recipe_diff(recipe, listed))
    one = load_recipe(RECIPE, mixed("data.path=a.json")[1:])
    assert one.data.path == "a.json" and one.data.parts == (Part("a.json"),)
    assert yaml.safe_load(to_yaml(one))["data"]["path"] == "a.json"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        *(
            ("", "expected a file"),
            ("[]", "expected a file"),
            ("{}", "expected a file"),
            ("7", "expected a file"),
        ),
        *(
            ("null", "expected a file"),
            ("{a: {wieght: 1}}", "expected a file"),
            ("[{weight: 1}]", "expected a file"),
        ),
        *(
            ("{a: 0}", "a weight above 0 and at most 1000 for a"),
            ("{a: -1}", "above 0"),
            ("{a: x}", "above 0"),
            ("{a: .nan}", "above 0"),
        ),
        *(("{a: .inf}", "at most 1000"), ("{a: true}", "above 0"), ("{a: null}", "above 0")),
        *(("{a: {cap: 0}}", "a cap of at least 1"), ("{a: {cap: 1.5}}", "a cap of at least 1")),
        ("[a, a]", "each file once: a is there twice"),
    ],
)
def test_what_is_no_mixture_is_one_line(mixed: Any, value: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        load_recipe(RECIPE, mixed(f"data.path={value}")[1:])
    assert "data.path is" in str(caught.value) and "\n" not in str(caught.value)


def test_run_plan_and_audit_agree_to_the_token(mixed: Any, tmp_path: Path, capsys: Any) -> None:
    given = mixed()
    assert cli.main(["data", "audit", *given, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    recipe = load_recipe(RECIPE, given[1:])
    processor = load_processor(recipe.student.path)
    data = load_run_data(recipe, processor)
    mixture = mixture_of(data.records)
    assert mixture.sizes == (20, 8, 4) and mixture.takes == (5, 6, 8)
    run = report["run"]
    assert [(file["records"], file["taken"]) for file in run["files"]] == [(20, 5), (8, 6), (4, 8)]
    assert (run["records"], run["steps"]) == (19, 8)  # 1.5 epochs of 19 records, 4 at a time
    assert Path(report["list"]).name == "texts+2.audit.jsonl"
    planned = plan(recipe)
    assert planned["data"]["records"] == 19 and planned["schedule"]["steps"] == 8
    assert "images.json" in format_plan(planned)
    samples = [encode(record, processor, 4096) for record in data.records]
    inputs = stream(recipe, data.records, processor, run["steps"])
    seen = Counter(name for step in inputs for name in step)
    ids = [record.id for record in data.records]
    for name, of in {
        "tokens": lambda s: len(s.input_ids_L),
        "image_tokens": lambda s: int(s.mm_token_type_ids_L.sum()),
        "supervised": lambda s: int((s.labels_L != IGNORED).sum()),
    }.items():
        assert run["whole_run"][name] == sum(of(s) * seen[i] for s, i in zip(samples, ids, strict=True))
        assert run[name] == sum(of(samples[i]) for i in epoch_order(mixture, 0, recipe.run.seed))
    assert cli.main(["data", "audit", *given]) == 0
    text = capsys.readouterr().out
    assert "taken in an epoch" in text and "first epoch" in text
    assert (
        "an epoch takes 19 records: 5 of 20 of texts.json, 6 of 8 of images.json, 8 of 4 of pairs.json"
        in data.notes()
    )
    assert "left out by data.skip: 2 records (one_sided 2)" in data.notes()


def stream(recipe: Any, records: Any, processor: Any, steps: int, ranks: int = 1) -> list[list[str]]:
    """Ids of the records of each step, by rank."""
    found = []
    for step in range(steps):
        names = []
        for rank in range(ranks):
            accelerator = SimpleNamespace(process_index=rank, num_processes=ranks)
            run: Any = SimpleNamespace(recipe=recipe, accelerator=accelerator, teacher=None, cache=None)
            inputs = StepBatches(run, records, processor).inputs(step)
            names += [name for batch in inputs.student if batch for name in batch.record_ids]
        found.append(names)
    return found


def test_the_order_does_not_depend_on_processes(mixed: Any) -> None:
    recipe = load_recipe(RECIPE, mixed()[1:])
    processor = load_processor(recipe.student.path)
    records = load_run_data(recipe, processor).records
    one = stream(recipe, records, processor, 6)
    assert [sorted(step) for step in one] == [
        sorted(step) for step in stream(recipe, records, processor, 6, 3)
    ]
    assert len({tuple(step) for step in one}) > 4


def test_training_on_a_mixture(mixed: Any, tmp_path: Path, capsys: Any) -> None:
    train(load_recipe(RECIPE, mixed("run.log_every=1", "run.max_steps=3", "data.num_workers=1")[1:]))
    assert "an epoch takes 19 records" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss/total" in line for line in lines) == 3


def test_the_parity_gate_takes_the_first_file(mixed: Any, tmp_path: Path) -> None:
    recipe = json.loads(json.dumps(asdict(load_recipe(RECIPE, mixed()[1:]))))
    source: Any = SimpleNamespace(recipe=recipe, directory=tmp_path)
    assert {record.id[0] for record in parity_records(source, None, None, tmp_path)} == {"t"}


def test_a_file_of_which_nothing_is_left(mixed: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "images.json"
    path.write_text(json.dumps(json.loads(path.read_text())[3:4]))
    assert cli.main(["data", "audit", *mixed(), "--json"]) == 2
    assert f"no record of {path} is left" in capsys.readouterr().err
    with pytest.raises(UserError, match="images.json: data.skip leaves no record"):
        load_run_data(load_recipe(RECIPE, mixed()[1:]))


def test_a_file_that_is_not_there(mixed: Any, tmp_path: Path) -> None:
    (tmp_path / "pairs.json").unlink()
    recipe = load_recipe(RECIPE, mixed("data.expected_records=11")[1:])
    with pytest.raises(UserError, match="pairs.json does not exist"):
        load_run_data(recipe)
    assert plan(recipe)["data"]["records"] == 11
