"""A teacher cache on disk: what is written comes back, and what is damaged is named."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grace.distill.cache_store import (
    INDEX,
    Index,
    RecordKey,
    Shard,
    TeacherCache,
    intact_shards,
    read_index,
    write_shard,
)
from grace.distill.cached import CachedRecord, cached_record
from grace.errors import UserError

SETTINGS = {"temperature": 2.0, "vocabulary": 40, "top_k": 8}


def key(number: int) -> RecordKey:
    return RecordKey(number.to_bytes(8, "big"), number.to_bytes(16, "big"))


def record(number: int, tokens: int = 3, images: tuple[int, ...] = (4,)) -> CachedRecord:
    torch.manual_seed(number)
    head, targets = torch.randn(40, 6), torch.randint(40, (tokens,))
    return cached_record(torch.randn(tokens, 6), head, targets, [torch.randn(n, 6) for n in images], 8)


# Without tokens, without images, with several of different sizes.
RECORDS = [record(0), record(1, 0), record(2, 5, ()), record(3, 1, (1, 9, 2)), record(4)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two shards: records 0 to 2, and 3 and 4."""
    shards = tuple(
        write_shard(tmp_path, number, [key(i) for i in part], [RECORDS[i] for i in part])
        for number, part in enumerate([(0, 1, 2), (3, 4)])
    )
    Index(SETTINGS, shards).write(tmp_path)
    return tmp_path


def same(one: CachedRecord, two: CachedRecord) -> bool:
    tensors = zip(one.top_k.tensors().values(), two.top_k.tensors().values(), strict=True)
    grams = zip(one.grams, two.grams, strict=True)
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in (*tensors, *grams))


def test_every_record_comes_back(cache: Path) -> None:
    store = TeacherCache(cache)
    assert len(store) == 5 and store.temperature == 2.0 and store.vocabulary == 40
    for number in (4, 0, 2, 1, 3):
        assert key(number) in store and key(number).text in store.texts
        assert same(store.read(key(number)), RECORDS[number])
    assert key(7) not in store
    with pytest.raises(KeyError):
        store.read(key(7))


def test_a_worker_process_gets_one_that_reads(cache: Path) -> None:
    store = TeacherCache(cache)
    store.read(key(0))
    assert same(pickle.loads(pickle.dumps(store)).read(key(3)), RECORDS[3])


def test_fewer_tokens_than_kept(cache: Path) -> None:
    kept = TeacherCache(cache, top_k=3).read(key(0)).top_k
    assert kept.ids_TK.shape == (3, 3)
    assert torch.equal(kept.residual_T2, RECORDS[0].top_k.keep(3).residual_T2)


@pytest.mark.parametrize("name", ["gate_T", "ids_TK", "log_prob_TK", "residual_T2", "grams"])
def test_a_flipped_bit_is_found_when_its_record_is_read(cache: Path, name: str) -> None:
    path = cache / "shard-00001.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1).view(torch.uint8)[0] ^= 1
    save_file(tensors, path)
    store = TeacherCache(cache)
    assert same(store.read(key(0)), RECORDS[0]) and same(store.read(key(4)), RECORDS[4])
    with pytest.raises(
        UserError, match=r"shard-00001.safetensors is damaged \(a record's checksum is wrong\)"
    ):
        store.read(key(3))


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "noise", "header", "records", "sizes"])
def test_a_damaged_shard_is_named(cache: Path, damage: str) -> None:
    path = cache / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage in ("records", "sizes"):
        tensors = load_file(path)
        name = "tokens" if damage == "records" else "gram_sizes"
        tensors[name] = tensors[name] + 1
        save_file(tensors, path)
    else:
        path.write_bytes(
            {
                "cut": data[:-1],
                "empty": b"",
                "noise": bytes(len(data)),
                "header": (2**62).to_bytes(8, "little") + data[8:],
            }[damage]
        )
    with pytest.raises(UserError, match=r"shard-00001.safetensors is damaged.*run grace teacher-cache again"):
        TeacherCache(cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("absent", "holds no teacher cache"),
        ("[1", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "is not the index"),
        ({"version": 2}, "is not the index"),
        ({"format": "other"}, "is not the index"),
        ({"settings": {"vocabulary": 3}}, "is damaged"),
        ({"settings": {"vocabulary": "many", "temperature": 1}}, "is damaged"),
        ({"shards": [{"file": "shard-00000.safetensors"}]}, "is damaged"),
        ({"shards": 3}, "is damaged"),
        ({"file": "../../etc/shard-00000.safetensors"}, "is damaged"),
        ({"file": 5}, "is damaged"),
        ({"bytes": -1}, "is damaged"),
        ({"records": "3"}, "is damaged"),
    ],
)
def test_an_index_that_cannot_be_used(cache: Path, change, message: str) -> None:
    path = cache / INDEX
    if change == "absent":
        path.unlink()
    elif isinstance(change, str):
        path.write_text(change)
    else:
        value = json.loads(path.read_text())
        target = value if change.keys() & value.keys() else value["shards"][0]
        path.write_text(
            json.dumps(value | change if target is value else value | {"shards": [target | change]})
        )
    with pytest.raises(UserError, match=message):
        read_index(cache)


def test_a_writer_goes_on_from_what_is_intact(cache: Path) -> None:
    index = read_index(cache)
    (cache / ".shard-00002.safetensors.tmp-x").write_bytes(b"half")  # killed in the middle of a shard
    (cache / "shard-00002.safetensors").write_bytes(b"never entered in the index")
    path = cache / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert intact_shards(cache, index.shards) == index.shards[1:]
    left = sorted(path.name for path in cache.iterdir())
    assert left == ["index.json", "shard-00001.safetensors"]


def test_an_index_survives_being_written(cache: Path) -> None:
    index = read_index(cache)
    index.write(cache)
    assert read_index(cache) == index
    assert index.shards[0] == Shard("shard-00000.safetensors", *list(vars(index.shards[0]).values())[1:])
    assert (index.shards[0].records, index.shards[0].tokens, index.shards[0].images) == (3, 8, 2)
