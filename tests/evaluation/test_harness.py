"""A run of an evaluation: resumed after a kill, never mixed with another one's answers, compared with another."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_fixtures import ROWS, write, write_predictions

from grace import cli
from grace.errors import UserError
from grace.evaluation import question
from grace.evaluation.command import evaluate
from grace.evaluation.harness import prepare
from grace.evaluation.judge import judged
from grace.evaluation.question import Question
from grace.evaluation.store import SampleFile, read_samples
from grace.evaluation.tasks import task_named

RUN = """
import os, signal, sys
from pathlib import Path
from grace.evaluation.command import evaluate
from grace.evaluation.harness import prepare
from grace.evaluation.tasks import task_named

class Canned:
    about = {"path": "canned", "kind": "plain", "sha256": sys.argv[3]}
    asked = 0
    def begin(self, task):
        pass
    def answer(self, questions, images):
        assert all(image.size == (12, 10) for pictures in images for image in pictures)
        self.asked += len(questions)
        if self.asked > int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
        return [{"241": "B", "252": "A"}.get(q.id, "D") for q in questions]

out, data = Path(sys.argv[1]), sys.argv[2]
answerer = Canned()
evaluate([prepare(task_named("mmbench"), {"mmbench": data}, None, None, out)], answerer, out, 1)
print(answerer.asked)
"""


def canned(out: Path, data: Path, model: str = "m1", most: int = 99) -> subprocess.CompletedProcess[str]:
    """Answers MMBench in a process of its own that kills itself before the answer after `most`."""
    out.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", RUN, str(out), str(data), model, str(most)], capture_output=True, text=True
    )


@pytest.fixture
def mmbench(tmp_path: Path) -> Path:
    return write(ROWS["mmbench"](), tmp_path / "mmbench.tsv")


def test_a_killed_run_goes_on_where_it_was(tmp_path, mmbench):
    whole = canned(tmp_path / "whole", mmbench)
    assert whole.returncode == 0 and whole.stdout.split() == ["6"], whole.stderr
    killed = canned(tmp_path / "killed", mmbench, most=4)
    assert killed.returncode == -signal.SIGKILL
    path = tmp_path / "killed" / "mmbench.jsonl"
    assert len(path.read_text().splitlines()) == 4 and not (tmp_path / "killed" / "results.json").exists()
    with path.open("a") as file:
        file.write('{"id": "2000241", "outp')  # as a kill in the middle of a line leaves it
    again = canned(tmp_path / "killed", mmbench)
    assert again.returncode == 0 and again.stdout.split() == ["2"], again.stderr
    assert "4 of 6 are already answered" in again.stderr
    for name in ("mmbench.jsonl", "results.json", "results.md", "run.json"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text(), name
    finished = canned(tmp_path / "killed", mmbench)
    assert finished.stdout.split() == ["0"]


def test_another_model_another_spec_or_other_data_is_refused(tmp_path, mmbench):
    out = tmp_path / "out"
    assert canned(out, mmbench, most=3).returncode == -signal.SIGKILL
    kept = (out / "mmbench.jsonl").read_text()
    other = canned(out, mmbench, model="m2")
    assert "holds answers of another model" in other.stderr and "sha256" in other.stderr
    task = task_named("mmbench")
    longer = dataclasses.replace(task, decoding=dataclasses.replace(task.decoding, max_new_tokens=7))
    with pytest.raises(UserError, match="other settings"):
        evaluate([prepare(longer, {"mmbench": str(mmbench)}, None, None, out)], Fixed("m1"), out, 1)
    rows = ROWS["mmbench"]()
    rows[0]["question"] = "What is it?"
    with pytest.raises(UserError, match="another question with id '241'"):
        evaluate(
            [prepare(task, {"mmbench": str(write(rows, tmp_path / "b.tsv"))}, None, None, out)],
            Fixed("m1"),
            out,
            1,
        )
    data = {"mmbench": str(write(ROWS["mmbench"]()[1:2], tmp_path / "c.tsv"))}
    with pytest.raises(UserError, match="smaller --limit"):
        evaluate([prepare(task, data, None, None, out)], Fixed("m1"), out, 1)
    repainted = [dict(row, image=ROWS["mmbench"]()[1]["image"]) for row in ROWS["mmbench"]()[:1]]
    data = {"mmbench": str(write([*repainted, *ROWS["mmbench"]()[1:]], tmp_path / "d.tsv"))}
    with pytest.raises(UserError, match="id '241' about another picture"):
        evaluate([prepare(task, data, None, None, out)], Fixed("m1"), out, 1)
    assert (out / "mmbench.jsonl").read_text() == kept


def test_a_run_without_any_answer_leaves_the_directory_free(tmp_path):
    rows = ROWS["ai2d"]()
    broken = [dict(row, image={"bytes": b"no picture", "path": None}) for row in rows]
    out, task = tmp_path / "out", task_named("ai2d")
    out.mkdir()
    with pytest.raises(UserError, match=r"cannot be read \(cannot identify image file\): "):
        evaluate(
            [prepare(task, {"ai2d": str(write(broken, tmp_path / "a.parquet"))}, None, None, out)],
            Fixed("m1"),
            out,
            1,
        )
    longer = dataclasses.replace(task, decoding=dataclasses.replace(task.decoding, max_new_tokens=7))
    ready = [prepare(longer, {"ai2d": str(write(rows, tmp_path / "b.parquet"))}, None, None, out)]
    assert evaluate(ready, Fixed("m2"), out, 1)["tasks"]["ai2d"]["questions"] == len(rows)


class Fixed:
    """Says B to everything."""

    def __init__(self, model: str):
        self.about = {"path": model, "kind": "plain", "sha256": model}

    def begin(self, task):
        pass

    def answer(self, questions, images):
        return ["B"] * len(questions)


def test_a_damaged_line_is_named(tmp_path):
    file = SampleFile(tmp_path / "x.jsonl")
    asked = Question("1", "p", (), ("x", "y"), ("A",))
    file.add([judged(asked, f"A\n{text} \u2028", ()) for text in ("é", "\ud800")])
    assert [sample.output for sample in read_samples(file.path)] == ["A\né \u2028", "A\n? \u2028"]
    lines = file.path.read_text().split("\n")
    file.path.write_text("\n".join([lines[0][:20], *lines[1:]]))
    with pytest.raises(UserError, match="line 1 is damaged"):
        file.read()


def test_everything_that_may_change_a_score_changes_the_spec(monkeypatch):
    task = task_named("mmbench")
    changed = [
        dataclasses.replace(task, prompts={"question": task.prompts["question"] + " "}),
        dataclasses.replace(task, rules="other"), dataclasses.replace(task, primary="vanilla"), dataclasses.replace(task, name="x"),
        *(dataclasses.replace(task, decoding=dataclasses.replace(task.decoding, **{field: 1})) for field in ("max_new_tokens", "min_pixels", "max_pixels")),
    ]  # fmt: skip
    hashes = {task.spec_sha256, *(one.spec_sha256 for one in changed)}
    monkeypatch.setattr(question, "HARNESS", 999)
    hashes.add(task.spec_sha256)
    assert len(hashes) == len(changed) + 2


# What these scores were measured with when they were first published: a change here must be meant, and then also raise HARNESS
# or the name of the rules.
SPECS = {
    "mmbench": "c65b04cf21bcc00e",
    "seedbench": "3b1ab59d9ed02103",
    "scienceqa": "6e69cb37ec034424",
    "hallusionbench": "0a4134c845ac9d11",
    "ai2d": "07b8f5deb4baef0d",
    "mmmu": "3fd3c285cdbad093",
    "mmstar": "72813a115a596d09",
    "small_world": "8165192b8f492ffb",
}


def test_specs_are_the_published_ones():
    assert {name: task_named(name).spec_sha256[:16] for name in SPECS} == SPECS


# ---------------------------------------------------------------- several results


def scored(tmp_path: Path, name: str, outputs: dict[str, str], *more: str) -> Path:
    """Scores MMBench answers into a directory and returns it."""
    predictions = write_predictions(tmp_path / f"{name}.jsonl", outputs)
    out = tmp_path / name
    assert cli.main(["eval", "--predictions", str(predictions), "--tasks", "mmbench", "--data", f"mmbench={tmp_path / 'mmbench.tsv'}",
                     "--out", str(out), *more]) == 0  # fmt: skip
    return out


RIGHT = {"241": "B", "1000241": "A", "2000241": "D", "3000241": "C", "252": "A", "1000252": "B"}


def test_two_results_are_compared_question_by_question(tmp_path, mmbench, capsys):
    first = scored(tmp_path, "first", RIGHT | {"252": "B", "3000241": "A"})
    second = scored(tmp_path, "second", RIGHT | {"1000252": "A"})
    capsys.readouterr()
    assert cli.main(["eval", "--compare", str(first), str(second), "--json"]) == 0
    task = json.loads(capsys.readouterr().out)["tasks"]["mmbench"]
    assert (task["metric"], task["n"], task["first"], task["second"], task["difference"]) == (
        "circular",
        2,
        0,
        0.5,
        0.5,
    )
    assert (task["only_first_right"], task["only_second_right"], task["mcnemar_p"]) == (0, 1, 1.0)
    assert task["ci_low"] <= 0.5 <= task["ci_high"]
    assert cli.main(["eval", "--compare", str(first), str(second)]) == 0
    assert "| mmbench | circular | 0.0 | 50.0 | +50.0 |" in capsys.readouterr().out


def test_what_was_asked_differently_is_not_compared(tmp_path, mmbench, capsys):
    first = scored(tmp_path, "first", RIGHT)
    other = scored(tmp_path, "other", RIGHT, "--max-pixels", "100352")
    short = scored(tmp_path, "short", RIGHT, "--limit", "1")
    capsys.readouterr()
    for second, mentioned in (
        (other, "asked differently"),
        (short, "other questions"),
        (tmp_path, "no results.json"),
    ):
        assert cli.main(["eval", "--compare", str(first), str(second)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and mentioned in err


def test_other_pictures_or_other_rows_are_not_compared(tmp_path, capsys):
    """AI2D is published with and without its regions masked, ScienceQA with and without questions that have no picture."""
    rows = ROWS["ai2d"]()
    versions = {
        "one": rows, "repainted": [dict(row, image=rows[0]["image"]) for row in rows], "shifted": [dict(rows[0], question="x"), *rows],
    }  # fmt: skip
    answers = write_predictions(tmp_path / "p.jsonl", dict.fromkeys("0123", "B"))
    for name, of in versions.items():
        data = write(of, tmp_path / f"{name}.parquet")
        arguments = ["--predictions", str(answers), "--tasks", "ai2d", "--data", f"ai2d={data}"]
        assert cli.main(["eval", *arguments, "--out", str(tmp_path / name)]) == 0
    capsys.readouterr()
    for other in ("repainted", "shifted"):
        assert cli.main(["eval", "--compare", str(tmp_path / "one"), str(tmp_path / other)]) == 2
        assert "other questions" in capsys.readouterr().err


def test_results_of_tasks_run_one_by_one_are_kept_together(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("mmstar", "ai2d"):
        data = {name: str(write(ROWS[name](), tmp_path / f"{name}.parquet"))}
        evaluate([prepare(task_named(name), data, None, None, out)], Fixed("m1"), out, 2)
    results = json.loads((out / "results.json").read_text())
    assert list(results["tasks"]) == ["ai2d", "mmstar"]
    assert {"metric", "score", "ci_low", "ci_high", "n"} <= set(results["tasks"]["ai2d"])
    assert results["harness"]["version"] == question.HARNESS and results["model"]["sha256"] == "m1"
    text = (out / "results.md").read_text()
    assert (
        "| ai2d (AI2D test) | accuracy | 33.3 |" in text and "| mmstar (MMStar) | accuracy | 33.3 |" in text
    )


def test_answers_from_a_file_are_scored_anew(tmp_path, mmbench, capsys):
    assert "100.0" in (scored(tmp_path, "a", RIGHT) / "results.md").read_text()
    assert "| 50.0 |" in (scored(tmp_path, "a", RIGHT | {"252": "B"}) / "results.md").read_text()
    rescored = tmp_path / "a" / "mmbench.jsonl"  # what an evaluation keeps is itself a file of answers
    command = [
        "eval",
        "--predictions",
        str(rescored),
        "--tasks",
        "mmbench",
        "--data",
        f"mmbench={mmbench}",
        "--out",
        str(tmp_path / "b"),
        "--json",
    ]
    capsys.readouterr()
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["mmbench"]["score"] == 0.5


def test_answers_that_cannot_be_scored_leave_earlier_results_alone(tmp_path, capsys):
    """And those to several tasks may be scored one by one."""
    for name in ("ai2d", "mmstar"):
        write(ROWS[name](), tmp_path / f"{name}.parquet")
    out, path = tmp_path / "out", tmp_path / "p.jsonl"
    lines = [{"task": name, "id": i, "output": "B"} for name in ("ai2d", "mmstar") for i in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["eval", "--predictions", str(path), "--data-root", str(tmp_path), "--out", str(out), "--tasks"]
    assert cli.main([*command, "ai2d"]) == 0 and cli.main([*command, "mmstar"]) == 0
    before = {file.name: file.read_text() for file in out.iterdir()}
    assert list(json.loads(before["results.json"])["tasks"]) == ["ai2d", "mmstar"] and "ai2d.jsonl" in before
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    assert cli.main([*command, "ai2d", "mmstar"]) == 2
    assert {file.name: file.read_text() for file in out.iterdir()} == before
    (out / "mine.jsonl").write_text("")
    assert cli.main([*command, "ai2d"]) == 0  # other answers: what was scored of the earlier ones goes
    assert list(json.loads((out / "results.json").read_text())["tasks"]) == ["ai2d"]
    assert sorted(file.name for file in out.glob("*.jsonl")) == ["ai2d.jsonl", "mine.jsonl"]


@pytest.mark.parametrize(
    ("content", "mentioned"),
    [
        ("", "holds no answers"), ("{", "line 1 is no answer"), ('{"id": 1}', "line 1 is no answer"), ('{"output": "A"}', "line 1"),
        ('{"id": 241, "output": "B"}\n{"id": 241, "output": "C"}', "two answers for id 241"),
        ('{"id": 241, "output": "B"}\n{"id": 1000241, "output": "B"}', "no answer for id '252' of mmbench and 3 more"),
        ('{"task": "ai2d", "id": 241, "output": "B"}', "no answer for id '241'"), ('{"id": 241, "output": "B", "task": 7}', "line 1"),
        ('{"id": null, "output": "B"}', "line 1"), ("[" * 100_000, "line 1"), ("[]", "line 1"), (f'{{"id": "{"9" * 5000}", "output": "B"}}', "no answer"),
        ('{"id": 241, "output": "B", "task": null}', "no answer for id '252'"),
    ],
)  # fmt: skip
def test_wrong_files_of_answers_are_one_line(content, mentioned, tmp_path, mmbench, capsys):
    (tmp_path / "p.jsonl").write_text(content)
    command = [
        "eval",
        "--predictions",
        str(tmp_path / "p.jsonl"),
        "--tasks",
        "mmbench",
        "--data",
        f"mmbench={mmbench}",
        "--out",
        str(tmp_path / "o"),
    ]
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and mentioned in err


def test_an_answer_to_two_tasks_must_say_which(tmp_path, capsys):
    """Rows of several benchmarks have no ids but their numbers."""
    for name in ("scienceqa", "ai2d"):
        write(ROWS[name](), tmp_path / f"{name}.parquet")
    lines = [{"id": i, "output": "B"} for i in range(3)]
    command = [
        "eval",
        "--predictions",
        str(tmp_path / "p.jsonl"),
        "--tasks",
        "scienceqa",
        "ai2d",
        "--data-root",
        str(tmp_path),
        "--out",
        str(tmp_path / "o"),
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(command) == 2
    assert 'add "task"' in capsys.readouterr().err
    told = [line | {"task": name} for name in ("scienceqa", "ai2d") for line in lines]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    assert cli.main([*command, "--json"]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert (tasks["scienceqa"]["score"], tasks["ai2d"]["score"]) == (0.5, pytest.approx(1 / 3))


@pytest.mark.parametrize(
    ("arguments", "mentioned"),
    [
        ([], "give a model directory"), (["x"], "give --tasks"), (["x", "--predictions", "y", "--tasks", "ai2d"], "give a model directory"),
        (["x", "--tasks", "mmlu"], "'mmlu'"), (["x", "--tasks", "ai2d", "--data", "ai2d"], "TASK=PATH"),
        (["x", "--tasks", "ai2d", "--data", "mmlu=y"], "TASK=PATH"), (["x", "--compare", "a", "b"], "leave out the rest"),
        (["--predictions", "/nowhere.jsonl", "--tasks", "ai2d", "--data", "ai2d=/nowhere"], "there is no /nowhere"),
        (["/nowhere", "--tasks", "ai2d", "--data-root", "/nowhere"], "no ai2d"),
    ],
)  # fmt: skip
def test_wrong_commands_are_one_line(arguments, mentioned, tmp_path, capsys):
    extra = [] if "--compare" in arguments else ["--out", str(tmp_path / "o")]
    assert cli.main(["eval", *arguments, *extra]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and mentioned in err


def test_scoring_needs_no_torch(tmp_path, mmbench):
    predictions = write_predictions(tmp_path / "p.jsonl", RIGHT)
    code = f"import sys; from grace import cli; cli.main({['eval', '--predictions', str(predictions), '--tasks', 'mmbench', '--data', f'mmbench={mmbench}', '--out', str(tmp_path / 'o')]!r}); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
