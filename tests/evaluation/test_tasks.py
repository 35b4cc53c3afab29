"""Each benchmark on rows in its published schema, with answers as models give them and the score counted by hand."""

import json
from pathlib import Path

import pytest
from benchmark_fixtures import ROWS, png, write, write_predictions

from grace import cli
from grace.evaluation.dataset import open_local
from grace.evaluation.question import Picture
from grace.evaluation.tasks import TASKS, task_named

MILLION = 1_000_000
# By task: answers by id, what each metric is, and how many cannot be read.
ANSWERS = {
    # 241 is right in all four rotations (the dog is at B, A, D, C), 252 only as it is.
    "mmbench": (
        {"241": "B", "1000241": "The answer is (A).", "2000241": "D. a dog", "3000241": "It is a dog.", "252": "day", "1000252": "A"},
        {"circular": (1, 2), "vanilla": (2, 2), "vanilla_all_rotations": (5, 6)}, 0,
    ),
    "seedbench": ({"101_0": "B", "101_1": "b) Two", "102_0": "A and B"}, {"accuracy": (1, 3)}, 1),
    "scienceqa": ({"0": "B", "2": "Texas"}, {"accuracy": (2, 2)}, 0),
    "ai2d": ({"0": "rabbit", "1": "D", "2": "I cannot tell."}, {"accuracy": (2, 3)}, 1),
    # Figures 0_1 (both right), 0_2 (one wrong), 3_0, 3_1 (one wrong): of 4 two are right. Questions 0.0, 0.1, 3.0: 0.0 is
    # right on both figures, 0.1 wrong on one, 3.0 wrong on one.
    "hallusionbench": (
        {"VS_chart_0_1_0": "Yes.", "VS_chart_0_1_1": "No, it is not.", "VS_chart_0_2_0": "no", "VS_chart_0_2_1": "Yes",
         "VD_illusion_3_0_0": "yes", "VD_illusion_3_1_0": "Hard to say"},
        {"aAcc": (4, 6), "fAcc": (2, 4), "qAcc": (1, 3)}, 1,
    ),
    "mmmu": (
        {"validation_Accounting_1": "(B) $20", "validation_Art_Theory_12": "A", "validation_Electronics_3": "The current is 8.40 A",
         "validation_Chemistry_30": "mgs"},
        {"accuracy": (3, 4)}, 0,
    ),
    "mmstar": ({"0": "An oil painting.", "1": "**D**", "2": "2"}, {"accuracy": (2, 3)}, 1),
}  # fmt: skip


def evaluated(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    """The results of `grace eval --json`."""
    assert cli.main(["eval", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


FORMS = [*((name, ending) for name in ROWS for ending in (".parquet", ".jsonl", "")), ("mmbench", ".tsv")]


@pytest.mark.parametrize(("name", "ending"), FORMS)
def test_scores_are_those_counted_by_hand(name, ending, tmp_path: Path, capsys):
    if ending == "" and name == "hallusionbench":
        rows = [{key: value for key, value in row.items() if key != "image"} for row in ROWS[name]()]
        for number, row in enumerate(rows):  # as HallusionBench.json with its folder of pictures
            path = tmp_path / "data" / row["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(number))
        data = write(rows, tmp_path / "data" / "HallusionBench.json")
    else:
        data = write(ROWS[name](), tmp_path / "data" / f"rows{ending}")
    outputs, expected, unread = ANSWERS[name]
    predictions = write_predictions(tmp_path / "answers.jsonl", outputs)
    arguments = [
        "--predictions",
        str(predictions),
        "--tasks",
        name,
        "--data",
        f"{name}={data}",
        "--out",
        str(tmp_path / "out"),
    ]
    task = evaluated(arguments, capsys)["tasks"][name]
    for metric, (right, count) in expected.items():
        assert task["metrics"][metric]["score"] == pytest.approx(right / count), metric
        assert task["metrics"][metric]["n"] == count
    primary = next(iter(expected))
    assert task["metric"] == primary and task["score"] == task["metrics"][primary]["score"]
    assert task["unextractable"] == unread
    assert task["ci_low"] is None or 0 <= task["ci_low"] <= task["score"] <= task["ci_high"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
    assert {line["id"]: line["output"] for line in lines} == outputs
    assert sum(line["extracted"] is None for line in lines) == unread
    assert all(len(line["prompt_sha256"]) == 64 and line["gold"] for line in lines)


# The exact words that a model is asked, from the published templates with the first row filled in.
DIRECTLY = "Answer with the option's letter from the given choices directly."
PROMPTS = {
    "mmbench": f"<image>\nIt barks. Which animal is it? There are several options:\nA. a cat\nB. a dog\nC. a fox\nD. a cow\n\n{DIRECTLY}",
    "seedbench": f"<image>\nHow many are there in 101_0?\nA. One\nB. Two\nC. Three\nD. Four\n{DIRECTLY}",
    "scienceqa": f"<image>\nContext: It breathes air.\nWhich is a mammal?\nA. trout\nB. whale\nC. frog\n{DIRECTLY}",
    "ai2d": f"<image>\nWhat eats the grass?\nA. hawk\nB. rabbit\nC. fungus\nD. sun\n{DIRECTLY}",
    "hallusionbench": "<image>\nIs 0.0 so? Please answer yes or no.",
    "mmmu": f"<image> What is the total?\nA. $10\nB. $20\nC. $30\nD. none's\n\n{DIRECTLY}",
    "mmstar": f"<image>\nWhich style is it?\nOptions: A: oil painting, B: sketch, C: photo, D: pastel\n{DIRECTLY[:-1]}",
}


@pytest.mark.parametrize("name", ROWS)
def test_prompts_are_the_published_ones(name, tmp_path):
    table = open_local(write(ROWS[name](), tmp_path / "rows.parquet"), "test")
    asked, _ = task_named(name).questions(table)
    assert asked[0].prompt == PROMPTS[name]
    assert all(question.prompt.count("<image>") == len(question.pictures) for question in asked)


def test_mmmu_places_several_pictures_where_they_are_first_named(tmp_path):
    asked, _ = task_named("mmmu").questions(
        open_local(write(ROWS["mmmu"](), tmp_path / "rows.parquet"), "validation")
    )
    assert asked[1].prompt.startswith(
        "Compare <image> with <image>. Which is older?\nA. <image 1>\nB. <image>\nC. both\n\n"
    )
    assert asked[1].pictures == (Picture(1, "image_1"), Picture(1, "image_2"), Picture(1, "image_3"))
    assert (
        asked[2].prompt
        == "Find the current in <image>.\n\nAnswer the question using a single word or phrase."
    )
    assert [question.labels["subject"] for question in asked] == [
        "Accounting",
        "Art_Theory",
        "Electronics",
        "Chemistry",
    ]


def test_mmbench_without_rotations_is_rotated(tmp_path):
    """The same questions, in the same numbering, as where the dataset brings the rotations."""
    whole = ROWS["mmbench"]()
    base = [row for row in whole if row["index"] < MILLION]
    made, _ = task_named("mmbench").questions(open_local(write(base, tmp_path / "base.tsv"), "dev"))
    given, _ = task_named("mmbench").questions(open_local(write(whole, tmp_path / "whole.tsv"), "dev"))
    assert {q.id: (q.prompt, q.gold) for q in made} == {q.id: (q.prompt, q.gold) for q in given}
    assert {q.pictures for q in given if q.id.endswith("241")} == {(Picture(0, "image"),)}


def test_answers_to_unrotated_mmbench_alone_give_the_vanilla_score(tmp_path, capsys):
    base = [row for row in ROWS["mmbench"]() if row["index"] < MILLION]
    data = write(base, tmp_path / "base.tsv")
    predictions = write_predictions(tmp_path / "answers.jsonl", {"241": "B", "252": "B"})
    arguments = [
        "eval",
        "--predictions",
        str(predictions),
        "--tasks",
        "mmbench",
        "--data",
        f"mmbench={data}",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    task = json.loads(out)["tasks"]["mmbench"]
    assert (task["metric"], task["score"], task["n"]) == ("vanilla", 0.5, 2)
    assert "only vanilla is scored" in err


def test_a_limit_keeps_rotations_and_pairs_together(tmp_path, capsys):
    data = write(ROWS["mmbench"](), tmp_path / "mmbench.tsv")
    pairs = write(ROWS["hallusionbench"](), tmp_path / "hallusionbench.parquet")
    predictions = write_predictions(
        tmp_path / "a.jsonl", ANSWERS["mmbench"][0] | ANSWERS["hallusionbench"][0]
    )
    arguments = [
        "--predictions",
        str(predictions),
        "--tasks",
        "mmbench",
        "hallusionbench",
        "--data-root",
        str(tmp_path),
        "--limit",
        "1",
    ]
    tasks = evaluated([*arguments, "--out", str(tmp_path / "out")], capsys)["tasks"]
    assert (data.exists(), pairs.exists()) == (True, True)
    assert tasks["mmbench"]["questions"] == 4 and tasks["mmbench"]["n"] == 1
    assert tasks["hallusionbench"]["questions"] == 4 and tasks["hallusionbench"]["metrics"]["qAcc"]["n"] == 2


def test_what_is_left_out_is_counted(tmp_path, capsys):
    for name in ("seedbench", "scienceqa"):
        write(ROWS[name](), tmp_path / f"{name}.parquet")
    predictions = write_predictions(tmp_path / "a.jsonl", ANSWERS["seedbench"][0] | ANSWERS["scienceqa"][0])
    tasks = evaluated(["--predictions", str(predictions), "--tasks", "seedbench", "scienceqa", "--data-root", str(tmp_path),
                       "--out", str(tmp_path / "out")], capsys)["tasks"]  # fmt: skip
    assert tasks["seedbench"]["data"]["left_out"] == {"not about a picture": 1}
    assert tasks["scienceqa"]["data"]["left_out"] == {"without a picture": 1}
    assert tasks["seedbench"]["breakdown"]["dimension"] == {
        "instances counting": {"score": 0.0, "n": 2}, "scene understanding": {"score": 1.0, "n": 1},
    }  # fmt: skip


def test_hallusionbench_asks_without_a_picture_where_there_is_none(tmp_path):
    rows = [
        {**row, "visual_input": "0", "figure_id": "0", "image": None} for row in ROWS["hallusionbench"]()[:1]
    ]
    asked, _ = task_named("hallusionbench").questions(
        open_local(write(rows, tmp_path / "rows.json"), "image")
    )
    assert asked[0].prompt == "Is 0.0 so? Please answer yes or no." and asked[0].pictures == ()


@pytest.mark.parametrize("name", ["hallusionbench", "mmmu"])
def test_rows_without_ids_are_named_by_their_number(name, tmp_path, capsys):
    """HallusionBench has none of its own: the authors' name for a question, or its row."""
    data = write(ROWS[name](), tmp_path / "rows.parquet")
    of_id, by_row = ANSWERS[name][0], tmp_path / "by_row.jsonl"
    write_predictions(by_row, {str(row): answer for row, answer in enumerate(of_id.values())})
    by_id = write_predictions(tmp_path / "by_id.jsonl", of_id)
    one, other = (
        evaluated(["--predictions", str(path), "--tasks", name, "--data", f"{name}={data}", "--out", str(tmp_path / path.stem)], capsys)
        for path in (by_id, by_row)
    )  # fmt: skip
    assert one["tasks"] == other["tasks"] and 0 < one["tasks"][name]["score"] < 1


def test_mmbench_may_number_its_rows_as_it_likes(tmp_path, capsys):
    """With `g_index`, the row that another one is a rotation of."""
    rows = ROWS["mmbench"]()
    place = {row["index"]: number for number, row in enumerate(rows)}
    outputs = {str(place[int(index)]): answer for index, answer in ANSWERS["mmbench"][0].items()}
    for row in rows:
        row |= {"index": place[row["index"]], "g_index": place[row["index"] % MILLION]}
        if len(row["image"]) < 9:
            row["image"] = str(place[int(row["image"])])
    data = write(rows, tmp_path / "rows.tsv")
    answers = write_predictions(tmp_path / "answers.jsonl", outputs)
    task = evaluated(["--predictions", str(answers), "--tasks", "mmbench", "--data", f"mmbench={data}",
                      "--out", str(tmp_path / "out")], capsys)["tasks"]["mmbench"]  # fmt: skip
    assert (task["metric"], task["n"], task["questions"]) == ("circular", 2, 6)


@pytest.mark.parametrize("name", TASKS)
def test_the_manual_names_every_task(name):
    assert f"| `{name}` |" in (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(
        encoding="utf-8"
    )


def test_every_task_says_where_it_comes_from():
    specs = [task_named(name) for name in TASKS]
    assert len({task.spec_sha256 for task in specs}) == len(TASKS)
    for task in specs:
        assert task.name in TASKS and task.title and task.source
        assert task.hub is None or len(task.hub.revision) == 40
