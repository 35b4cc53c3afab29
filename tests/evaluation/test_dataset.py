"""Data of every kind, local or as the Hub gives it; what is damaged is one line that names row and column."""

import base64
import json
from pathlib import Path

import pytest
from benchmark_fixtures import ROWS, png, write, write_predictions

from grace import cli
from grace.errors import UserError
from grace.evaluation.dataset import open_hub, open_local
from grace.evaluation.pictures import Pictures, read_bytes
from grace.evaluation.question import Picture


def changed(name: str, row: int, **values) -> list[dict]:
    rows = ROWS[name]()
    rows[row] |= values
    return rows


def without(name: str, column: str) -> list[dict]:
    return [{key: value for key, value in row.items() if key != column} for row in ROWS[name]()]


DAMAGED = {
    "no column": ("mmstar", without("mmstar", "l2_category"), ["no column l2_category", "it has index"]),
    "no options": ("mmbench", without("mmbench", "B"), ["no column B"]),
    "letter": ("mmbench", changed("mmbench", 1, answer="E"), ["row 1", "column answer", "one of A, B", "'E'"]),
    "letter of an absent option": ("mmbench", changed("mmbench", 1, answer="C"), ["row 1", "column answer"]),
    "index": ("mmbench", changed("mmbench", 0, index="x7"), ["row 0", "column index", "'x7'"]),
    "index twice": ("mmbench", changed("mmbench", 1, index=241), ["row 1", "column index", "row 0"]),
    "rotation of nothing": ("mmbench", changed("mmbench", 2, index=1_000_777), ["row 2", "777"]),
    "picture of nothing": ("mmbench", changed("mmbench", 2, image="999"), ["row 2", "column image", "999"]),
    "gap in the options": ("mmbench", changed("mmbench", 0, B="nan"), ["row 0", "column B"]),
    "no answer": ("seedbench", changed("seedbench", 2, answer=None), ["row 2", "column answer", "found nothing"]),
    "two pictures": ("seedbench", changed("seedbench", 0, image=[]), ["row 0", "column image"]),
    "number out of range": ("scienceqa", changed("scienceqa", 2, answer=5), ["row 2", "column answer", "from 0 to 4", "5"]),
    "choices no list": ("scienceqa", [r | {"choices": "whale"} for r in ROWS["scienceqa"]()], ["row 0", "column choices"]),
    "answer in words": ("ai2d", changed("ai2d", 1, answer="rabbit"), ["row 1", "column answer", "rabbit"]),
    "gold neither 0 nor 1": ("hallusionbench", changed("hallusionbench", 4, gt_answer="yes"), ["row 4", "column gt_answer"]),
    "picture gone": ("hallusionbench", changed("hallusionbench", 3, image=None), ["row 3", "column image"]),
    "options not spelled": ("mmmu", changed("mmmu", 0, options="['$10', "), ["row 0", "column options"]),
    "option missing": ("mmmu", changed("mmmu", 0, options=["x", None]), ["row 0", "column options", "found nothing"]),
    "picture named, not there": ("mmmu", changed("mmmu", 1, image_3=None), ["row 1", "column image_3", "<image 3>"]),
    "type": ("mmmu", changed("mmmu", 2, question_type="essay"), ["row 2", "column question_type", "essay"]),
    "id": ("mmmu", changed("mmmu", 2, id="17"), ["row 2", "column id"]),
    "category": ("mmstar", changed("mmstar", 1, category=None), ["row 1", "column category"]),
    "picture cut off": ("ai2d", changed("ai2d", 2, image={"bytes": png(7, (300, 300))[:200], "path": None}), ["row 2", "column image", "cannot be read"]),
    "no picture": ("mmstar", changed("mmstar", 2, image={"bytes": b"GIF?", "path": None}), ["row 2", "column image"]),
    "path of nothing": ("mmstar", [r | {"image": "gone.png"} for r in ROWS["mmstar"]()], ["row 0", "column image", "gone.png"]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "rows", "mentioned"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_one_line_that_names_row_and_column(name, rows, mentioned, tmp_path: Path, capsys):
    data = write(rows, tmp_path / "rows.jsonl")
    ids = ["0", "1", "2", "101_0", "101_1", "102_0"] + [str(row.get("id")) for row in rows]
    predictions = write_predictions(tmp_path / "a.jsonl", dict.fromkeys(ids, "A"))
    command = [
        "eval",
        "--predictions",
        str(predictions),
        "--tasks",
        name,
        "--data",
        f"{name}={data}",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("error: "), err
    assert str(data) in err and all(text in err for text in mentioned), err


@pytest.mark.parametrize(
    ("name", "content", "mentioned"),
    [
        ("x.jsonl", '{"index": 1}\n{"index"', "line 2"), ("x.json", '{"index": 1}', "a list of objects"), ("x.json", "[1]", "row 0"),
        ("x.json", "", "cannot be read"), ("x.tsv", "index\tquestion\n1\n", "row 0 has 1 fields"), ("x.tsv", "index\tquestion\n", "no rows"),
        ("x.parquet", "PAR1", "cannot be read"), ("x.csv", "index", "no known kind"), ("empty/y.txt", "", "parquet files"),
    ],
)  # fmt: skip
def test_unreadable_files_are_one_line(name, content, mentioned, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(UserError, match=mentioned):
        open_local(path.parent if path.suffix == ".txt" else path, "test")
    with pytest.raises(UserError, match="there is no"):
        open_local(tmp_path / "absent.parquet", "test")


def test_a_folder_gives_the_files_of_the_wanted_split_and_configuration(tmp_path):
    """The layouts of lmms-lab/ScienceQA and lmms-lab/HallusionBench."""
    rows = ROWS["mmstar"]()
    for name in (
        "ScienceQA-IMG/test-00000-of-00001",
        "ScienceQA-IMG/train-00000-of-00001",
        "ScienceQA-FULL/test-00000-of-00001",
    ):
        write(rows[: 1 if "IMG/test" in name else 3], tmp_path / "a" / f"{name}.parquet")
    assert len(open_local(tmp_path / "a", "test", "ScienceQA-IMG")) == 1
    with pytest.raises(UserError, match="no files of split validation"):
        open_local(tmp_path / "a", "validation", "ScienceQA-IMG")
    for name, count in (("test", 2), ("train", 3)):  # as derek-thomas/ScienceQA has them
        write(rows[:count], tmp_path / "c/data" / f"{name}-00000-of-00001-f0e719df791966ff.parquet")
    assert len(open_local(tmp_path / "c", "test")) == 2
    for part in range(2):
        write(rows[part : part + 2], tmp_path / "b" / f"{part:04d}.parquet")
    table = open_local(tmp_path / "b", "test")
    assert [table.cell(row, "index") for row in (3, 0, 2, 1)] == [2, 0, 1, 1] and table.column("index") == [
        0,
        1,
        1,
        2,
    ]


def test_damaged_pages_are_found_when_they_are_read(tmp_path):
    path = write(ROWS["mmstar"](), tmp_path / "x.parquet")
    content = bytearray(path.read_bytes())
    content[4:1000] = b"\xff" * 996  # the footer, and with it the opening, stays right
    path.write_bytes(content)
    table = open_local(path, "val")
    for read in (table.column, lambda name: table.cell(0, name)):
        with pytest.raises(UserError, match=r"x.parquet cannot be read \(.*\): download it again"):
            read(table.columns[0])


def test_a_saved_dataset_of_several_splits(tmp_path):
    import datasets

    rows = ROWS["mmstar"]()
    datasets.DatasetDict({"val": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "saved"))
    assert open_local(tmp_path / "saved", "val").cell(1, "image")["bytes"] == png(2)
    with pytest.raises(UserError, match="no split test"):
        open_local(tmp_path / "saved", "test")


def test_the_hub_is_read_by_its_own_library_with_pictures_left_encoded(tmp_path, monkeypatch):
    """A local copy of a repository goes through the same code as one on the Hub; the image feature included."""
    import datasets
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {
            "index": datasets.Value("int64"),
            "image": datasets.Image(),
            "images": datasets.List(datasets.Image()),
        }
    )
    made = datasets.Dataset.from_list(
        [{"index": i, "image": {"bytes": png(i), "path": None}, "images": [{"bytes": png(i + 1), "path": None}]} for i in range(3)], features=features
    )  # fmt: skip
    (tmp_path / "repo" / "data").mkdir(parents=True)
    made.to_parquet(str(tmp_path / "repo" / "data" / "val-00000-of-00001.parquet"))
    table = open_hub(str(tmp_path / "repo"), "0" * 40, "val", None)
    assert (
        len(table) == 3
        and list(table.columns) == ["index", "image", "images"]
        and table.column("index") == [0, 1, 2]
    )
    assert table.cell(2, "image")["bytes"] == png(2)
    assert Pictures(table).image(Picture(1, "images", 0)).size == (12, 10)


def test_without_network_the_hub_is_one_line(tmp_path, monkeypatch, capsys):
    import datasets

    def unreachable(*arguments, **options):
        raise ConnectionError(f"no route to host\nfor {arguments[0]} at {options['revision']}")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    predictions = write_predictions(tmp_path / "a.jsonl", {"0": "A"})
    assert (
        cli.main(
            ["eval", "--predictions", str(predictions), "--tasks", "mmstar", "--out", str(tmp_path / "out")]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1
        and "Lin-Chen/MMStar" in err
        and "no route to host" in err
        and "--data NAME=PATH" in err
    )


@pytest.mark.parametrize(
    "form", ["bytes", "dict", "dict path", "base64", "data url", "path", "absolute path"]
)
def test_pictures_come_in_every_form(form, tmp_path):
    content, path = png(5), tmp_path / "5.png"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()
    value = {
        "bytes": content, "dict": {"bytes": content, "path": None}, "dict path": {"bytes": None, "path": "5.png"}, "base64": text,
        "data url": f"data:image/png;base64,{text}", "path": "5.png", "absolute path": str(path),
    }[form]  # fmt: skip
    assert read_bytes(value, tmp_path) == content


def test_rows_of_json_may_lack_what_others_have(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"a": 1}, {"b": 2}]))
    table = open_local(tmp_path / "x.json", "test")
    assert table.columns == ["a", "b"] and table.column("b") == [None, 2]
