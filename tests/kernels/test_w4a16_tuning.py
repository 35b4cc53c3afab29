"""Settings of the W4A16 kernels: what is timed, and the table of what was fastest."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace.kernels.w4a16_tuning import (
    MAX_SPLITS,
    TOKEN_BUCKETS,
    Config,
    Problem,
    Table,
    bucket,
    candidates,
    fastest,
    rule,
    table_path,
)

PROBLEM = Problem(16, 2048, 4096, 128, "bfloat16")
CONFIG = Config("matrix", 16, 128, 16, splits=4, stages=3)


def table(path: Path, device: str = "NVIDIA H200", triton: str = "3.7.1") -> Table:
    return Table(path, device, triton)


def test_what_is_put_is_found_again(tmp_path: Path):
    path = tmp_path / "deep" / "table.json"
    table(path).put(PROBLEM, CONFIG, 12e-6)
    assert table(path).get(PROBLEM) == CONFIG
    assert table(path).get(dataclasses.replace(PROBLEM, dtype="float16")) is None
    assert json.loads(path.read_text())["settings"][PROBLEM.key]["microseconds"] == 12.0
    assert [name.name for name in path.parent.iterdir()] == ["table.json"]


def test_two_processes_keep_what_each_found(tmp_path: Path):
    one, two = table(tmp_path / "t.json"), table(tmp_path / "t.json")
    other = dataclasses.replace(PROBLEM, tokens=1)
    one.put(PROBLEM, CONFIG, 1e-6)
    two.put(other, Config("vector", 16, 32), 2e-6)
    assert table(tmp_path / "t.json").get(PROBLEM) == CONFIG
    assert table(tmp_path / "t.json").get(other) == Config("vector", 16, 32)


def damage(text: str, how: str) -> str:
    stored = json.loads(text)
    entry = stored["settings"][PROBLEM.key]
    if how == "cut":
        return text[: len(text) // 2]
    if how == "list":
        return "[1, 2]"
    if how == "no settings":
        del stored["settings"]
    elif how == "settings are a list":
        stored["settings"] = [1]
    elif how == "unknown field":
        entry["banana"] = 1
    elif how == "missing field":
        del entry["words"]
    else:
        name, value = how.split("=")
        entry[name] = json.loads(value)
    return json.dumps(stored)


FAULTS = ["cut", "list", "no settings", "settings are a list", "unknown field", "missing field", 'way="x"', "words=12",
          "words=0", 'rows="4"', "splits=1.5", "warps=true", "tokens=8", "microseconds=null"]  # fmt: skip


@pytest.mark.parametrize("how", FAULTS)
def test_a_damaged_table_is_ignored_aloud_and_made_anew(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "t.json"
    table(path).put(PROBLEM, CONFIG, 1e-6)
    path.write_text(damage(path.read_text(), how))
    with caplog.at_level(logging.WARNING):
        again = table(path)
    assert again.get(PROBLEM) is None and f"{path} are ignored" in caplog.text
    again.put(PROBLEM, CONFIG, 1e-6)
    assert table(path).get(PROBLEM) == CONFIG


def test_a_table_of_another_device_or_version_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    table(tmp_path / "t.json").put(PROBLEM, CONFIG, 1e-6)
    for other in ({"device": "NVIDIA A100"}, {"triton": "3.6.0"}):
        assert table(tmp_path / "t.json", **other).get(PROBLEM) is None
        assert "another device or version" in caplog.text


def test_a_place_that_cannot_be_written_to_costs_the_file_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_text("")
    one = table(tmp_path / "file" / "t.json")
    one.put(PROBLEM, CONFIG, 1e-6)
    assert one.get(PROBLEM) == CONFIG and "cannot write" in caplog.text


def test_where_tables_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = "w4a16-nvidia-h200-nvl-triton-3.7.1.json"
    monkeypatch.setenv("GRACE_CACHE", str(tmp_path))
    assert table_path("NVIDIA H200 NVL", "3.7.1") == tmp_path / name
    monkeypatch.delenv("GRACE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert table_path("NVIDIA H200 NVL", "3.7.1") == tmp_path / "grace" / name


def test_the_fastest_that_fits():
    times = {Config("vector", 8, 32): 3e-6, Config("vector", 16, 32): 1e-6, CONFIG: float("inf")}
    assert fastest(times, times.__getitem__) == (Config("vector", 16, 32), 1e-6)
    with pytest.raises(RuntimeError, match="no setting"):
        fastest([CONFIG], lambda config: float("inf"))


def test_buckets():
    assert [bucket(tokens) for tokens in (1, 2, 16, 17, 64, 65, 9999)] == [1, 16, 16, 32, 64, 128, 2048]


@given(
    tokens=st.sampled_from(TOKEN_BUCKETS), groups=st.integers(1, 100), words=st.integers(1, 20000),
    group_size=st.sampled_from([32, 64, 128]), processors=st.integers(1, 200),
)  # fmt: skip
def test_every_setting_offered_fits_the_shape(
    tokens: int, groups: int, words: int, group_size: int, processors: int
):
    problem = Problem(tokens, groups * group_size, 8 * words, group_size, "float16")
    offered = candidates(problem, processors)
    assert offered[0] == rule(problem, processors) and len(offered) == len(set(offered)) <= 40
    for config in offered:
        assert group_size % config.rows == 0 and config.splits <= min(groups, MAX_SPLITS)
        assert config.way != "vector" or tokens == 1
        assert config.way == "expand" or config.splits == 1 or tokens <= 2048
