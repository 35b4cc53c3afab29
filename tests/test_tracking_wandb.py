"""What W&B is given, and that none of it can stop a run."""

import math
import sys
import types
from pathlib import Path

import pytest

from grace import tracking_wandb
from grace.tracking import Tracker

CALLS = (
    "import",
    "init",
    "log",
    "Histogram",
    "Artifact",
    "add_file",
    "add_reference",
    "log_artifact",
    "finish",
)


class Fake:
    """A wandb module and its run in one: remembers what it is given, and fails where it is told to."""

    def __init__(self, broken: str = ""):
        self.broken, self.id = broken, "ab12"
        self.logs: list[dict] = []
        self.artifacts: list[types.SimpleNamespace] = []
        self.settings: dict = {}

    def _call(self, name: str) -> None:
        if self.broken == name:
            raise ConnectionError("the server\nis away")

    def init(self, **settings: object) -> "Fake":
        self._call("init")
        self.settings = settings
        return self

    def log(self, values: dict, step: int) -> None:
        self._call("log")
        self.logs.append({"step": step, **values})

    def Histogram(self, np_histogram: tuple) -> tuple:
        self._call("Histogram")
        return np_histogram

    def Artifact(self, name: str, type: str, metadata: dict) -> types.SimpleNamespace:
        self._call("Artifact")
        kept = types.SimpleNamespace(name=name, type=type, metadata=metadata, files=[], references=[])

        def add_file(path: str, name: str) -> None:
            self._call("add_file")
            kept.files.append(name)

        def add_reference(uri: str, name: str, checksum: bool) -> None:
            self._call("add_reference")
            assert not checksum and uri.startswith("file:///")
            kept.references.append(name)

        kept.add_file, kept.add_reference = add_file, add_reference
        return kept

    def log_artifact(self, artifact: types.SimpleNamespace) -> None:
        self._call("log_artifact")
        self.artifacts.append(artifact)

    def finish(self) -> None:
        self._call("finish")


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A finished model's files, empty."""
    (tmp_path / "model" / "grace_qat").mkdir(parents=True)
    names = (
        "config.json",
        "model.safetensors",
        "chat_template.jinja",
        "grace_qat/info.json",
        "grace_qat/state.safetensors",
    )
    for name in names:
        (tmp_path / "model" / name).write_text("{}")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("broken", CALLS)
def test_whatever_fails_is_told_and_training_goes_on(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys, broken: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None if broken == "import" else Fake(broken))
    tracker = Tracker(tmp_path, 1, 1, True, {"gate/histogram": (0.36, 1.0)})
    tracker.start(0, None)
    tracker.start_wandb("online", "grace", {})
    tracker.add(1, {"loss/total": 4.0, "gate/histogram": [0.5, 0.5]}, 10)
    if tracker.run is not None:
        tracking_wandb.log_model(tracker.run, model_dir, {}, upload=False)
    tracker.finish()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if line.startswith("W&B") and "training goes on" in line]
    assert len(told) == 1 and (broken == "import" or "the server is away" in told[0])
    assert (tracker.run is None) == (broken in ("import", "init"))


def test_lists_become_histograms_and_unknown_values_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Fake()
    monkeypatch.setitem(sys.modules, "wandb", run)
    tracking_wandb.log(run, 3, {"a": 1.0, "b": None, "c": [0.25, 0.75]}, {"c": (0.0, 1.0)})
    (line,) = run.logs
    assert line.keys() == {"step", "a", "c"}
    shares, edges = line["c"]
    assert shares.tolist() == [0.25, 0.75] and edges.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("upload", [False, True])
def test_weights_are_uploaded_only_when_asked(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, upload: bool
) -> None:
    run = Fake()
    monkeypatch.setitem(sys.modules, "wandb", run)
    tracking_wandb.log_model(run, model_dir, {"val/ce": 1.5, "val/x": math.nan}, upload)
    (artifact,) = run.artifacts
    small, large = (
        ["chat_template.jinja", "config.json", "info.json"],
        ["model.safetensors", "state.safetensors"],
    )
    assert (artifact.name, artifact.type) == ("model-ab12", "model")
    assert sorted(artifact.files) == sorted(small + large if upload else small)
    assert sorted(artifact.references) == ([] if upload else large)
    assert artifact.metadata == {"val/ce": 1.5, "val/x": "nan"}


def test_run_of_a_sweep_has_the_id_that_the_agent_gave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Fake()
    monkeypatch.setitem(sys.modules, "wandb", run)
    monkeypatch.setenv("WANDB_RUN_ID", "fromagent")
    tracking_wandb.start(tmp_path / "one", "online", "grace", {})
    assert run.settings["id"] != "fromagent"  # left over from something else
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    tracking_wandb.start(tmp_path / "two", "online", "grace", {})
    assert run.settings["id"] == "fromagent" == (tmp_path / "two" / "wandb_id.txt").read_text()
