"""What happens to files: shared by the tests of those who read them."""

from pathlib import Path


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
