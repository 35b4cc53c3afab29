"""A world small enough to train in for a few steps."""

from pathlib import Path

import pytest

from grace.study.data import QUICK, write_world


@pytest.fixture(scope="session")
def study_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's directory with its data and no rows."""
    out = tmp_path_factory.mktemp("study")
    write_world(out, QUICK)
    return out
