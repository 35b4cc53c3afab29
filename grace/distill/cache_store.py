"""A teacher cache on disk: shards of safetensors and an index.

    DIR/index.json                 {"format", "version", "settings", "shards": [{file, sha256, bytes, ...}]}
    DIR/shard-00000.safetensors    per token:  gate_T, target_T2, residual_T2, ids_TK, log_prob_TK, shift_T
                                   per image:  gram_sizes, and grams, their entries one after the other
                                   per record: contents, texts (its key), tokens, images, checksums

A shard is written under a temporary name, synced, renamed and only then entered in the index, so a killed writer
loses the shard it was at. Every record has a CRC-32 of its numbers, checked when it is read; a shard's SHA-256 is
checked when a writer goes on from it.

`settings` are what the numbers depend on beside the record: a reader states its own, and what differs is the reason
for which the cache is refused.

Suffixes: T tokens and K kept of each, as in `grace.distill.top_k`.
"""

import itertools
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grace.distill.cached import CachedRecord
from grace.distill.top_k import TopK, concatenate
from grace.errors import UserError
from grace.files import new_file, remove_leftovers, sha256_of, write_text

FORMAT, VERSION = "grace-teacher-cache", 1
INDEX = "index.json"
PER_TOKEN = ("gate_T", "target_T2", "residual_T2", "ids_TK", "log_prob_TK", "shift_T")
PER_RECORD = ("contents", "texts", "tokens", "images", "checksums")


@dataclass(frozen=True)
class RecordKey:
    """Identifies a record: 8 bytes of a hash of its text, 16 of text and pictures."""

    text: bytes
    content: bytes


@dataclass(frozen=True)
class Shard:
    """An entry of the index."""

    file: str
    sha256: str
    bytes: int
    records: int
    tokens: int
    images: int


@dataclass(frozen=True)
class Index:
    """What a cache holds."""

    settings: Mapping[str, Any]
    shards: tuple[Shard, ...]

    def write(self, directory: Path) -> None:
        """Replaces the index of a cache."""
        value = {"format": FORMAT, "version": VERSION, "settings": dict(self.settings)}
        value["shards"] = [asdict(shard) for shard in self.shards]
        write_text(directory / INDEX, json.dumps(value, indent=1) + "\n")


def read_index(directory: Path) -> Index:
    """The index of a cache.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = directory / INDEX
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{directory} holds no teacher cache: make it with grace teacher-cache") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): make the cache again") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
        raise UserError(
            f"{path} is not the index of a teacher cache of version {VERSION}: make the cache again"
        )
    try:
        shards = tuple(Shard(**entry) for entry in value["shards"])
        settings = dict(value["settings"])
        well_formed = (
            float(settings["temperature"]) > 0
            and int(settings["vocabulary"]) > 0
            and all(
                re.fullmatch(r"shard-\d+\.safetensors", shard.file)
                and all(
                    isinstance(n, int) and n >= 0
                    for n in (shard.bytes, shard.records, shard.tokens, shard.images)
                )
                for shard in shards
            )
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}): make the cache again") from error
    if not well_formed:
        raise UserError(f"{path} is damaged (an entry makes no sense): make the cache again")
    return Index(settings, shards)


# ---------------------------------------------------------------- writing


def write_shard(
    directory: Path, number: int, keys: Sequence[RecordKey], records: Sequence[CachedRecord]
) -> Shard:
    """Writes one shard; the caller enters it in the index.

    Args:
        keys, records: the same number of each, at least one.
    """
    tokens = concatenate([record.top_k for record in records])
    grams = [gram for record in records for gram in record.grams]
    tensors = tokens.tensors() | {
        "grams": torch.cat(grams) if grams else torch.zeros(0, dtype=torch.float16),
        "gram_sizes": torch.tensor([len(gram) for gram in grams], dtype=torch.int64),
        "contents": _bytes([key.content for key in keys]),
        "texts": _bytes([key.text for key in keys]),
        "tokens": torch.tensor([len(record.top_k.gate_T) for record in records]),
        "images": torch.tensor([len(record.grams) for record in records]),
        "checksums": torch.tensor([checksum(record) for record in records]),
    }
    path = directory / f"shard-{number:05d}.safetensors"
    with new_file(path) as scratch:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch)
    return Shard(
        path.name, sha256_of(path), path.stat().st_size, len(records), len(tokens.gate_T), len(grams)
    )


def checksum(record: CachedRecord) -> int:
    """CRC-32 of a record's numbers."""
    value = 0
    for tensor in (*record.top_k.tensors().values(), *record.grams):
        value = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return value


def intact_shards(directory: Path, shards: Iterable[Shard]) -> tuple[Shard, ...]:
    """Those shards whose bytes are what they were when they were written; the files of the others are removed."""
    remove_leftovers(directory)
    intact = []
    for shard in shards:
        path = directory / shard.file
        if path.is_file() and path.stat().st_size == shard.bytes and sha256_of(path) == shard.sha256:
            intact.append(shard)
    for path in directory.glob("shard-*.safetensors"):
        if path.name not in {shard.file for shard in intact}:
            path.unlink()
    return tuple(intact)


def _bytes(values: Sequence[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(values)), dtype=torch.uint8).view(len(values), -1)


# ---------------------------------------------------------------- reading


class TeacherCache:
    """The records of a cache, read one by one; safe to hand to worker processes.

    Raises:
        UserError: the cache is damaged.
    """

    def __init__(self, directory: Path, top_k: int | None = None):
        """Args:
        top_k: tokens to give of those kept; None gives all.
        """
        self.directory, self.top_k = directory, top_k
        self.index = read_index(directory)
        self.temperature = float(self.index.settings["temperature"])
        self.vocabulary = int(self.index.settings["vocabulary"])
        self.texts: set[bytes] = set()
        self._rows: dict[bytes, tuple[int, int]] = {}  # content -> shard, row
        self._offsets: list[dict[str, Tensor]] = []
        self._files: dict[int, Any] = {}
        for number, shard in enumerate(self.index.shards):
            contents, texts = self._read_keys(number, shard)
            self.texts.update(texts)
            self._rows.update((content, (number, row)) for row, content in enumerate(contents))

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: RecordKey) -> bool:
        return key.content in self._rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # a worker opens its own

    def read(self, key: RecordKey) -> CachedRecord:
        """One record.

        Raises:
            KeyError: it is not in the cache.
            UserError: its numbers are damaged.
        """
        number, row = self._rows[key.content]
        offsets, file = self._offsets[number], self._file(number)
        first, last = (int(offsets["tokens"][i]) for i in (row, row + 1))
        images = [
            int(offsets["grams"][i])
            for i in range(int(offsets["images"][row]), int(offsets["images"][row + 1]) + 1)
        ]
        try:
            tokens = {name: file.get_slice(name)[first:last] for name in PER_TOKEN}
            grams = tuple(file.get_slice("grams")[a:b] for a, b in itertools.pairwise(images))
        except (SafetensorError, OSError) as error:
            raise self._damaged(number, error) from error
        record = CachedRecord(TopK(**tokens, temperature=self.temperature, vocabulary=self.vocabulary), grams)
        if checksum(record) != int(offsets["checksums"][row]):
            raise self._damaged(number, "a record's checksum is wrong")
        return CachedRecord(record.top_k.keep(self.top_k), grams) if self.top_k else record

    def _read_keys(self, number: int, shard: Shard) -> tuple[list[bytes], list[bytes]]:
        path = self.directory / shard.file
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise self._damaged(number, "missing or of another size than when it was written")
        try:
            file = self._file(number)
            values = {name: file.get_tensor(name) for name in (*PER_RECORD, "gram_sizes")}
            ends = {name: file.get_slice(name).get_shape()[0] for name in (*PER_TOKEN, "grams")}
        except (SafetensorError, OSError) as error:
            raise self._damaged(number, error) from error
        offsets = {name: _offsets(values[name]) for name in ("tokens", "images")} | {
            "grams": _offsets(values["gram_sizes"]), "checksums": values["checksums"]
        }  # fmt: skip
        if (
            {len(values[name]) for name in PER_RECORD} != {shard.records}
            or {ends[name] for name in PER_TOKEN} != {int(offsets["tokens"][-1])}
            or len(values["gram_sizes"]) != int(offsets["images"][-1])
            or ends["grams"] != int(offsets["grams"][-1])
        ):
            raise self._damaged(number, "its parts do not fit together")
        self._offsets.append(offsets)
        return [[bytes(row.tolist()) for row in values[name]] for name in ("contents", "texts")]  # type: ignore[return-value]

    def _file(self, number: int) -> Any:
        if number not in self._files:
            self._files[number] = safe_open(self.directory / self.index.shards[number].file, "pt")
        return self._files[number]

    def _damaged(self, number: int, reason: object) -> UserError:
        return UserError(
            f"{self.directory / self.index.shards[number].file} is damaged ({reason}): "
            "run grace teacher-cache again, it makes damaged shards anew"
        )


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
