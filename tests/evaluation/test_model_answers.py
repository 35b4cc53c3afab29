"""The whole way on real models: every kind of checkpoint answers, in batches, and the small world's scores are right."""

import json
import re
from pathlib import Path

import pytest
import torch

from grace import cli
from grace.config import resource
from grace.data.batch import collate
from grace.data.records import load_records
from grace.data.small_world import write_small_world
from grace.data.template import encode
from grace.evaluation import batch_answers
from grace.evaluation.answers import ModelAnswerer
from grace.evaluation.batch_answers import greedy_answers
from grace.evaluation.exact_match import evaluate
from grace.evaluation.harness import prepare
from grace.evaluation.judge import read
from grace.evaluation.tasks import task_named
from grace.runtime.engine import load

STUDENT = "small_world/weights/student"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_world(tmp_path_factory.mktemp("world") / "w", splits={"test": 24}) / "test.json"


def test_decoded_answers_score_as_one_forward_pass_does(world: Path, tmp_path: Path):
    """Greedy decoding in batches against `grace.evaluation.exact_match`, on a trained model, in fp32."""
    engine = load(resource(STUDENT), torch.float32, rows=5)
    asked = prepare(task_named("small_world"), {"small_world": str(world)}, None, None, tmp_path)
    correct = {}
    for start in range(0, 24, 5):
        part = asked.questions[start : start + 5]
        images = [[asked.pictures.image(picture) for picture in question.pictures] for question in part]
        outputs = greedy_answers(
            engine.decoder, engine.processor, [question.prompt for question in part], images, 64
        )
        correct |= {q.id: read(q, output)[1] for q, output in zip(part, outputs, strict=True)}
    samples = [encode(record, engine.processor, 1024) for record in load_records(world)]
    scores = evaluate(engine.model, [collate(samples, engine.processor.tokenizer.pad_token_id)])
    assert correct == {score.record_id: score.exact for score in scores}
    assert 8 < sum(correct.values()) < 24


@pytest.mark.parametrize("kind", ["awq", "qat", "plain"])
def test_every_kind_of_checkpoint_is_scored(
    kind, awq_dir, qat_run, tiny_student_dir, world, tmp_path, capsys
):
    directory = {"awq": awq_dir, "qat": qat_run / "model", "plain": tiny_student_dir}[kind]
    command = ["eval", str(directory), "--tasks", "small_world", "--data", f"small_world={world}", "--limit", "3", "--batch-size", "2",
               "--max-new-tokens", "4", "--out", str(tmp_path / "out"), "--json"]  # fmt: skip
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    results = json.loads(out)
    assert results["model"]["kind"] == kind and results["tasks"]["small_world"]["n"] == 3
    assert re.search(r"packed|dense", results["model"]["kernels"])
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert str(tmp_path / "out" / "results.json") in err
    kept = (tmp_path / "out" / "small_world.jsonl").read_text()
    assert cli.main(command) == 0  # nothing is left to do
    assert (tmp_path / "out" / "small_world.jsonl").read_text() == kept


def test_answers_do_not_depend_on_what_is_asked_beside_them(world: Path, tmp_path: Path, monkeypatch):
    """Alone, side by side, and where the cache holds only some at a time."""
    engine = load(resource(STUDENT), torch.float32, rows=1)
    asked = prepare(task_named("small_world"), {"small_world": str(world)}, None, 6, tmp_path)
    prompts = [question.prompt for question in asked.questions]
    images = [
        [asked.pictures.image(picture) for picture in question.pictures] for question in asked.questions
    ]
    together = greedy_answers(engine.decoder, engine.processor, prompts, images, 40)
    assert [
        greedy_answers(engine.decoder, engine.processor, [p], [i], 40)[0]
        for p, i in zip(prompts, images, strict=True)
    ] == together
    monkeypatch.setattr(batch_answers, "CACHE_TOKENS", 600)
    assert greedy_answers(engine.decoder, engine.processor, prompts, images, 40) == together
    assert engine.decoder.rows == 2 and engine.decoder.context == 256


def test_a_task_sets_its_pixel_budget_and_length(tiny_student_dir: Path):
    answerer = ModelAnswerer(tiny_student_dir, "auto", 2)
    answerer.begin(task_named("ai2d"))
    assert answerer.processor.image_processor.size == {
        "shortest_edge": 200704,
        "longest_edge": 1605632,
    }
    assert answerer.max_new_tokens == 16
    answerer.begin(task_named("small_world"))
    assert answerer.processor.image_processor.size["shortest_edge"] < 200704


def test_the_small_world_is_made_where_it_is_not_given(tiny_student_dir, tmp_path, capsys):
    command = [
        "eval",
        str(tiny_student_dir),
        "--tasks",
        "small_world",
        "--limit",
        "2",
        "--max-new-tokens",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(command) == 0
    assert "| small_world (the small world, test) | exact_match |" in capsys.readouterr().out
    assert (tmp_path / "out" / "small_world_2" / "test.json").is_file()
