"""A benchmark's rows from local files or from the Hub, cell by cell: pictures are read when they are asked for.

| given | read as |
| --- | --- |
| `FILE.parquet`, or a folder with such | parquet |
| a folder made by `Dataset.save_to_disk` | Arrow |
| `FILE.jsonl`, `FILE.json` | a JSON object a line; a JSON list of objects |
| `FILE.tsv` | a table with a header, as MMBench is published |
"""

import bisect
import contextlib
import csv
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from grace.checked_files import reason_of
from grace.errors import UserError

SPLITS = ("train", "dev", "val", "validation", "test", "image", "non_image")


class Table(Protocol):
    """Rows of a dataset.

    Attributes:
        origin: what to call it in messages.
        folder: where relative paths of pictures start.
        columns: their names.
    """

    origin: str
    folder: Path

    @property
    def columns(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def column(self, name: str) -> list[Any]:
        """All values of a column that holds no pictures."""
        ...

    def cell(self, row: int, name: str) -> Any:
        """One value, pictures not decoded."""
        ...


class ListTable:
    """Rows held in memory."""

    def __init__(self, origin: str, folder: Path, rows: Sequence[Mapping[str, Any]]):
        self.origin, self.folder, self.rows = origin, folder, rows
        self.columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """All values; None where a row has none."""
        return [row.get(name) for row in self.rows]

    def cell(self, row: int, name: str) -> Any:
        """One value, None where the row has none."""
        return self.rows[row].get(name)


class ParquetTable:
    """Rows of parquet files, one row group of each column in memory at a time."""

    def __init__(self, origin: str, folder: Path, paths: Sequence[Path]):
        import pyarrow.parquet as pq

        self.origin, self.folder = origin, folder
        self.files = [pq.ParquetFile(path) for path in paths]
        self.columns = list(self.files[0].schema_arrow.names)
        for path, file in zip(paths, self.files, strict=True):
            if list(file.schema_arrow.names) != self.columns:
                raise UserError(
                    f"{path} has other columns than {paths[0]}: give the files of one dataset and split"
                )
        self.starts = [0]  # of each row group, over all files
        self.groups: list[tuple[int, int]] = []
        for number, file in enumerate(self.files):
            for group in range(file.num_row_groups):
                self.groups.append((number, group))
                self.starts.append(self.starts[-1] + file.metadata.row_group(group).num_rows)
        self._last: dict[str, tuple[int, Any]] = {}  # of each column the row group that was read last

    def __len__(self) -> int:
        return self.starts[-1]

    def column(self, name: str) -> list[Any]:
        """All values of one column.

        Raises:
            UserError: damaged.
        """
        with readable(self.origin):
            return [value for file in self.files for value in file.read(columns=[name])[name].to_pylist()]

    def cell(self, row: int, name: str) -> Any:
        """One value.

        Raises:
            UserError: damaged.
        """
        at = bisect.bisect_right(self.starts, row) - 1
        if self._last.get(name, (-1, None))[0] != at:
            number, group = self.groups[at]
            with readable(self.origin):
                self._last[name] = at, self.files[number].read_row_group(group, columns=[name])[name]
        return self._last[name][1][row - self.starts[at]].as_py()


class DatasetTable:
    """Rows of a `datasets.Dataset`, pictures as their bytes."""

    def __init__(self, origin: str, folder: Path, dataset: Any):
        self.origin, self.folder = origin, folder
        self.columns = list(dataset.column_names)
        arrow = dataset.with_format("arrow")
        self._of_column = {name: arrow.select_columns([name]) for name in self.columns}
        self._rows = len(arrow)

    def __len__(self) -> int:
        return self._rows

    def column(self, name: str) -> list[Any]:
        """All values of one column."""
        return self._of_column[name][:][name].to_pylist()

    def cell(self, row: int, name: str) -> Any:
        """One value."""
        return self._of_column[name][row : row + 1][name][0].as_py()


@contextlib.contextmanager
def readable(origin: str) -> Iterator[None]:
    """For reading a file: what goes wrong in the block is that it is damaged; each reader has its own types for that.

    Raises:
        UserError: it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{origin} cannot be read ({reason_of(error)}): download it again") from error


# ---------------------------------------------------------------- opening


def open_local(path: Path, split: str, config: str | None = None) -> Table:
    """The rows of a file or folder.

    Args:
        split, config: which files of a folder to take, where it holds several of either.

    Raises:
        UserError: not there, not readable, or nothing that is known.
    """
    if not path.exists():
        raise UserError(f"there is no {path}: give --data the path of a file or folder")
    with readable(str(path)):
        table = _open_folder(path, split, config) if path.is_dir() else _open_file(path)
    if not len(table):
        raise UserError(f"{path} holds no rows: give another file")
    return table


def open_hub(repo: str, revision: str, split: str, config: str | None) -> Table:
    """The rows of a dataset on the Hub, or in its cache; `repo` may be a local copy of such a repository.

    Raises:
        UserError: it cannot be had.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(repo, config, split=split, revision=revision)
    except Exception as error:  # network, names and formats have a dozen types
        raise UserError(
            f"{repo} cannot be loaded from the Hub ({reason_of(error)}): go online, or give a local copy with --data NAME=PATH"
        ) from error
    return DatasetTable(f"{repo} ({split})", Path.cwd(), dataset)


def _open_file(path: Path) -> Table:
    kind = path.suffix.lower()
    if kind == ".parquet":
        return ParquetTable(str(path), path.parent, [path])
    if kind == ".tsv":
        return ListTable(str(path), path.parent, list(_tsv_rows(path)))
    if kind in (".json", ".jsonl"):
        return ListTable(str(path), path.parent, _json_rows(path))
    raise UserError(
        f"{path} is of no known kind: give .parquet, .jsonl, .json, .tsv or a saved dataset's folder"
    )


def _open_folder(path: Path, split: str, config: str | None) -> Table:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        import datasets

        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.DatasetDict):
            if split not in dataset:
                raise UserError(
                    f"{path} has no split {split} (it has {', '.join(map(str, dataset))}): give one split's folder"
                )
            dataset = dataset[split]
        return DatasetTable(str(path), path, dataset)
    parquet = sorted(path.rglob("*.parquet"))
    if parquet:
        return ParquetTable(str(path), path, _of_split(path, _of_config(path, parquet, config), split))
    others = sorted(one for one in path.iterdir() if one.suffix.lower() in (".tsv", ".jsonl", ".json"))
    if len(others) != 1:
        found = ", ".join(one.name for one in others[:3]) or "none"
        raise UserError(
            f"{path} must hold parquet files, or one .tsv, .jsonl or .json (found: {found}): name the file"
        )
    return _open_file(others[0])


def _of_config(root: Path, paths: list[Path], config: str | None) -> list[Path]:
    """Those in a folder of that name, if some are."""
    return [path for path in paths if config in path.relative_to(root).parts[:-1]] or paths


def _of_split(root: Path, paths: list[Path], split: str) -> list[Path]:
    """Those whose name, or folder, is that of the split; all, if no name is that of any split."""
    splits = {path: _split_of(path.relative_to(root)) for path in paths}
    known = {name for name in splits.values() if name}
    if not known:
        return paths
    if split not in known:
        raise UserError(
            f"{root} has no files of split {split} (it has {', '.join(sorted(known))}): name the file"
        )
    return [path for path in paths if splits[path] == split]


def _split_of(path: Path) -> str | None:
    stem = re.sub(r"[-.]\d{3,}(-of-\d+(-[0-9a-f]{8,})?)?$", "", path.stem)  # some bring a digest
    return next((name for name in (stem, *reversed(path.parts[:-1])) if name in SPLITS), None)


def _tsv_rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows as texts; an empty field is an empty text."""
    csv.field_size_limit(sys.maxsize)  # a field holds a whole picture
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t")
        header = next(reader, [])
        for number, fields in enumerate(reader):
            if len(fields) != len(header):
                raise UserError(
                    f"{path}: row {number} has {len(fields)} fields, its header {len(header)}: download it again"
                )
            yield dict(zip(header, fields, strict=True))


def _json_rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json":
        rows = json.loads(text)
    else:
        rows = [
            _json_line(path, number, line) for number, line in enumerate(text.split("\n")) if line.strip()
        ]
    if not isinstance(rows, list):
        raise UserError(f"{path} holds a JSON {type(rows).__name__}: a list of objects is needed")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number} is a JSON {type(row).__name__}: an object is needed")
    return rows


def _json_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{path}: line {number + 1} is not readable JSON ({error}): download it again"
        ) from error
