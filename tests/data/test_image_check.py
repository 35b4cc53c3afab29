"""Whatever bytes a picture has: the check answers, and what it calls usable training can use."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planted_faults import FILES, JPEG, PNG

from grace.data.image_check import check_image
from grace.data.records import open_image
from grace.errors import UserError

CONTENTS = [contents for contents, _ in FILES.values() if contents]
FIXTURES = [HealthCheck.function_scoped_fixture]  # the file is written anew by every example


@settings(max_examples=300, suppress_health_check=FIXTURES, deadline=None)
@given(
    contents=st.sampled_from(CONTENTS),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    kept=st.one_of(st.just(1.0), st.floats(0.01, 1)),
)
@pytest.mark.filterwarnings("ignore")  # Pillow's, about damaged files
def test_damaged_bytes(tmp_path: Path, contents: bytes, edits: list[tuple[float, int]], kept: float) -> None:
    damaged = bytearray(contents)
    for share, byte in edits:
        damaged[int(share * len(damaged))] = byte
    path = tmp_path / "picture"
    path.write_bytes(damaged[: max(1, int(kept * len(damaged)))])
    header, deep = check_image(path), check_image(path, deep=True)
    for picture in (header, deep):
        assert picture.size is not None or picture.faults
    try:
        size = open_image(path, "r").size
    except UserError:
        assert deep.size is None
    else:
        assert deep.size in (size, None) and header.size in (size, None)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", ["jpg", "progressive", "png", "gif", "webp"])
def test_a_cut_is_seen_without_decoding(tmp_path: Path, name: str, share: float) -> None:
    whole = {
        "jpg": JPEG,
        "png": PNG,
        "progressive": FILES["progressive.jpg"][0],
        "gif": FILES["gif_inside.jpg"][0],
        "webp": FILES["sound.webp"][0],
    }[name]
    path = tmp_path / "picture"
    path.write_bytes(whole[: int(share * len(whole))])
    assert "truncated" in {fault.kind for fault in check_image(path).faults}
