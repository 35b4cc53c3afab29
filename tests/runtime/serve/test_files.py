"""Files below a root: nothing outside of it, and no word about what is there."""

import os
from pathlib import Path

import pytest

from grace.runtime.serve.files import FileRefused, read_below


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "x y.png").write_bytes(b"picture")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "z").write_bytes(b"secret")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "up").symlink_to("..")
    (root / "in").symlink_to("a")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "pipe")
    return root


def test_files_below(root: Path):
    for path in ("a/x%20y.png", "in/x y.png", "a/../a/x%20y.png"):
        assert read_below(root, f"file://{root}/{path}", 7) == b"picture"
    assert read_below(root, f"file://localhost{root}/a/x%20y.png", 7) == b"picture"
    assert read_below(root, "file:a/x y.png", 7) == b"picture"  # relative to the root


@pytest.mark.parametrize(
    "path",
    [
        "{root}/../secret", "{root}/a/../../secret", "{root}/%2e%2e/secret", "{root}/..%2fsecret", "/etc/passwd",
        "{root}/out", "{root}/up/secret", "{root}/loop", "{root}/pipe", "{root}/a", "{root}", "{root}/none", "/",
        "{root}2/z", "{root}/a%00", "{root}/%ff", "{root}/" + "a" * 5000, "", "/dev/zero", "/proc/self/environ",
    ],
)  # fmt: skip
def test_everything_else_is_refused_in_the_same_words(root: Path, path):
    with pytest.raises(FileRefused) as refused:
        read_below(root, "file://" + path.format(root=root), 100)
    assert str(refused.value) == "the file is no picture below this server's image root"


def test_what_is_no_url(root: Path):
    with pytest.raises(FileRefused, match="no picture below"):
        read_below(root, "file://[", 100)


def test_hosts_and_sizes(root: Path):
    with pytest.raises(FileRefused, match="no host"):
        read_below(root, f"file://example.org{root}/a/x%20y.png", 7)
    with pytest.raises(FileRefused, match="more than 6 bytes"):
        read_below(root, f"file://{root}/a/x%20y.png", 6)


def test_a_link_put_there_in_between_is_not_followed(root: Path, tmp_path: Path, monkeypatch):
    """The path is checked, then swapped for a link, then opened."""
    resolve = Path.resolve

    def swap(self: Path, strict: bool = False) -> Path:
        found = resolve(self, strict=strict)
        if found.name == "x y.png":
            found.unlink()
            found.symlink_to(tmp_path / "secret")
        return found

    monkeypatch.setattr(Path, "resolve", swap)
    with pytest.raises(FileRefused):
        read_below(root, f"file://{root}/a/x%20y.png", 100)
