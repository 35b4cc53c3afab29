"""Hashes by which a cache knows a record again."""

import hashlib
import json

from grace.data.image_file import read_image
from grace.data.record_parse import Record

TEXT_BYTES, CONTENT_BYTES = 8, 16


def text_key(record: Record) -> bytes:
    """Hash of a record's id, turns and number of pictures: what can be had without opening a picture."""
    said = [record.id, [[turn.role, turn.text] for turn in record.turns], len(record.images)]
    text = json.dumps(said, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=TEXT_BYTES).digest()


def content_key(record: Record) -> bytes:
    """Hash of a record's text and the bytes of its pictures.

    Raises:
        UserError: a picture that is not there or cannot be read.
    """
    whole = hashlib.blake2b(text_key(record), digest_size=CONTENT_BYTES)
    for path in record.images:
        whole.update(hashlib.blake2b(read_image(path, record.id)).digest())
    return whole.digest()
