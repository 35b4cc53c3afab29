"""`grace report` as its user calls it: the page stands alone, and says what the log says."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from grace.cli import main

STEPS = [5, 10, 15]


def write_run(folder: Path, loss: float = 4.0, lr: float = 0.1, **values: object) -> Path:
    folder.mkdir(parents=True)
    lines: list[dict] = [
        {"step": step, "loss/total": loss / step, "loss/ce": 1.0, "loss/gdkd": 2.0, "loss/rcka": 0.1, "ib/beta": 0.5,
         "ib/m_minus_tau": None, "rcka/cka_mean": 0.9, "rcka/cka_min": 0.8, "rcka/cka_max": 0.95, "quant/snr_db": 20.0,
         "gate/histogram": [0.25, 0.75], "tokens_per_s": 1234.5, "perf/mfu": None, **values}
        for step in STEPS
    ]  # fmt: skip
    lines.append({"step": 15, "quant/snr/layers.0.mlp.up_proj": 20.5, "quant/snr/layers.1.mlp.up_proj": 19.0})
    lines.append({"step": 15, "val/ce": 1.5, "val/exact_match": 0.625, "val/exact_match_se": 0.01})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text(
        f"optim:\n  lr: {lr}\n  note: <b>&\nrun:\n  output_dir: {folder.name}\n"
    )
    return folder


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text, self.open = "", 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_page_of_one_run(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1] == str(run / "report.html")
    page = Page(run / "report.html")
    # Losses, validation, controller, gates, histograms, quantizer, layers, speed.
    assert page.tags.count("svg") == 8 and "script" not in page.tags and "link" not in page.tags
    for word in (
        "total loss",
        "beta, weight of distillation",
        "quantization SNR by layer, dB",
        "1234.5",
        "0.625",
        "unfinished: step 15",
    ):
        assert word in page.text, word
    assert "lr: 0.1" in page.text and "note: <b>&" in page.text  # the recipe, not taken for markup


def test_page_needs_nothing_from_elsewhere(tmp_path):
    run = write_run(tmp_path / "run")
    main(["report", str(run)])
    text = (run / "report.html").read_text()
    assert "http" not in text and "@import" not in text
    page = Page(run / "report.html")
    sources = [value or "" for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert sources and all(value.startswith(("#", "data:")) for value in sources)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))  # figures of one page do not take each other's clips and markers


def test_runs_against_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "$two_<i>", loss=8.0, lr=0.2)
    assert main(["report", str(one), str(two), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["report"] == "report.html" and [run["name"] for run in told["runs"]] == ["one", "$two_<i>"]
    assert told["runs"][1]["last"]["loss/total"] == pytest.approx(8 / 15)
    assert told["runs"][0]["snr_by_layer"] == {"layers.0.mlp.up_proj": 20.5, "layers.1.mlp.up_proj": 19.0}
    page = Page(tmp_path / "report.html")
    assert (
        "$two_<i>" in page.text
        and "optim.lr" in page.text
        and "run.output_dir" not in page.text.split("Recipe of")[0]
    )


def test_running_and_crashed_runs(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    log = run / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    assert main(["report", str(run), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["runs"]
    assert (told["finished"], told["unreadable_lines"], told["last_step"]) == (False, 1, 15)
    assert "1 lines of the log are no JSON object" in Page(run / "report.html").text
    log.write_bytes(b"")
    assert main(["report", str(run), "--json"]) == 0  # and over the earlier report
    (told,) = json.loads(capsys.readouterr().out)["runs"]
    assert told["log_lines"] == 0 and "nothing logged yet" in Page(run / "report.html").text


@pytest.mark.parametrize("value", ["text", None, True, [1, "x"], {}, float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_passed_over(tmp_path, value):
    run = write_run(tmp_path / "run", **{"loss/ce": value, "gate/histogram": value, "rcka/cka_min": value})
    assert main(["report", str(run)]) == 0
    assert "total loss" in Page(run / "report.html").text


def test_mistakes_are_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (tmp_path / "mine.html").write_text("<p>my notes</p>")
    for arguments, word in (
        ([str(tmp_path / "absent")], "there is no"),
        ([str(tmp_path)], "is no run"),
        ([str(run), str(run)], "given twice"),
        ([str(run), "--out", str(tmp_path)], "is a directory"),
        ([str(run), "--out", str(tmp_path / "mine.html")], "is no report"),
        ([str(run), "--out", str(tmp_path / "mine.html" / "x.html")], "cannot write"),
    ):
        assert main(["report", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and word in line
    assert (tmp_path / "mine.html").read_text() == "<p>my notes</p>"
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "recipe.yaml"]


def test_audit_of_the_data_is_shown(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "recipe.yaml").write_text(f"data:\n  path: {tmp_path}/records.json\n")
    summary = {"records": 41, "left_out": {"missing": 3}, "errors": {}, "run": {"records": 38, "steps": 15}}
    (tmp_path / "records.audit.summary.json").write_text(json.dumps(summary))
    assert main(["report", str(run)]) == 0
    page = Page(run / "report.html")
    assert "left out: missing" in page.text and "to train on: records" in page.text
