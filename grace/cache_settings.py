"""What a teacher cache depends on beside its records, and why one is refused."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from grace.config import Recipe
from grace.data.record_key import content_key, text_key
from grace.data.records import Record, text_keys
from grace.data.template import CHAT_TEMPLATE
from grace.distill.cache_store import RecordKey, TeacherCache
from grace.distill.cached import CachedRecord
from grace.errors import UserError
from grace.models import qwen3vl
from grace.run_data import taken_in_run

# What of an image processor decides which numbers a picture becomes.
IMAGE_SETTINGS = (
    "size", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std",
    "do_resize", "do_rescale", "rescale_factor", "do_normalize", "resample",
)  # fmt: skip


def cache_settings(recipe: Recipe, processor: Any) -> dict[str, Any]:
    """The settings under which a recipe's teacher speaks; of JSON types.

    `teacher.weights` is None where the teacher is not a local directory.
    """
    student = qwen3vl.vocabulary_size(recipe.student.path)
    path = recipe.teacher.path
    teacher = student if path is None else qwen3vl.vocabulary_size(path)
    return {
        "tokenizer": _sha256(processor.tokenizer.backend_tokenizer.to_str()),
        "processor": _sha256(
            json.dumps(
                {name: _plain(getattr(processor.image_processor, name, None)) for name in IMAGE_SETTINGS}
            )
            + CHAT_TEMPLATE
        ),
        "teacher": path,
        "teacher_weights": weights_fingerprint(Path(path)) if path and Path(path).is_dir() else None,
        "teacher_precision": recipe.teacher.load_in or recipe.teacher.dtype,
        "teacher_vocabulary": teacher,
        "vocabulary": min(student, teacher),
        "temperature": recipe.distill.temperature,
        "top_k": recipe.teacher.cache_top_k,
        "grams": recipe.distill.rcka_weight > 0,
    }


def weights_fingerprint(directory: Path) -> str:
    """SHA-256 over a model's configuration and the first and last row of each tensor of its weight files.

    Training changes every row of what it trains; reading all of 16 GB would take minutes.

    Raises:
        UserError: a file cannot be read.
    """
    total = hashlib.sha256((directory / "config.json").read_bytes())
    try:
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in sorted(file.keys()):
                    tensor = file.get_slice(name)
                    shape = tensor.get_shape()
                    total.update(f"{name} {tensor.get_dtype()} {shape}".encode())
                    if shape and 0 not in shape:
                        for row in (tensor[:1], tensor[shape[0] - 1 :]):
                            total.update(row.contiguous().view(-1).view(torch.uint8).numpy().data)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory} cannot be read ({error}): check teacher.path") from error
    return total.hexdigest()


def refuse_other_settings(directory: Path, cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Checks a cache's settings against those of a recipe.

    Raises:
        UserError: the cache says something else than the recipe's teacher would; names the first reason.
    """
    reason = _difference(cached, wanted)
    if reason:
        raise UserError(
            f"{directory} is stale: {reason}. Make another with grace teacher-cache, or change the recipe back"
        )


def _difference(cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    if cached.get("tokenizer") != wanted["tokenizer"]:
        return "it was made with another tokenizer"
    if cached.get("processor") != wanted["processor"]:
        return "it was made with another image processor or chat template (data.min_pixels, data.max_pixels)"
    weights = [settings.get("teacher_weights") for settings in (cached, wanted)]
    if None not in weights and weights[0] != weights[1]:
        return (
            f"{wanted['teacher']} holds other weights than the teacher that made it ({cached.get('teacher')})"
        )
    precision = [settings.get("teacher_precision") for settings in (cached, wanted)]
    if wanted["teacher"] and precision[0] != precision[1]:
        return f"its teacher ran in {precision[0]}, the recipe's runs in {precision[1]} (teacher.dtype, teacher.load_in)"
    if wanted["teacher"] is None:  # taken on trust, as far as the student can tell
        wanted = {**wanted, "vocabulary": min(wanted["vocabulary"], cached.get("teacher_vocabulary", 0))}
    if cached.get("vocabulary") != wanted["vocabulary"]:
        return f"it compares {cached.get('vocabulary')} vocabulary entries, student and teacher share {wanted['vocabulary']}"
    if cached.get("temperature") != wanted["temperature"]:
        return f"it was made at temperature {cached.get('temperature')}, distill.temperature is {wanted['temperature']}"
    if not isinstance(cached.get("top_k"), int) or cached["top_k"] < wanted["top_k"]:
        return f"it keeps {cached.get('top_k')} tokens, teacher.cache_top_k is {wanted['top_k']}"
    if wanted["grams"] and not cached.get("grams"):
        return "it has no Gram matrices, which distill.rcka_weight above 0 needs"
    return None


def open_cache(recipe: Recipe, processor: Any, records: Sequence[Record]) -> TeacherCache:
    """The cache that a recipe names, checked for its settings and for holding every record's text.

    Pictures are checked when they are read.

    Raises:
        UserError: there is none, it is damaged, it is stale, or it cannot hold what the recipe wants.
    """
    assert recipe.teacher.cache is not None
    if recipe.distill.gate_top_k is not None:
        raise UserError(
            f"{recipe.teacher.cache} keeps gates over the whole vocabulary, distill.gate_top_k={recipe.distill.gate_top_k} "
            "needs the living teacher: set distill.gate_top_k=null or teacher.cache=null"
        )
    directory = Path(recipe.teacher.cache)
    records = taken_in_run(recipe, records)
    cache = TeacherCache(directory, recipe.teacher.cache_top_k)
    refuse_other_settings(directory, cache.index.settings, cache_settings(recipe, processor))
    missing = [i for i, key in enumerate(text_keys(records)) if key not in cache.texts]
    if missing:
        raise UserError(
            f"{directory} is stale: {len(missing)} of {len(records)} records of {' and '.join(recipe.data.files)} are not in it as they "
            f"are now, such as {records[missing[0]].id}. Run grace teacher-cache again, it adds what is missing"
        )
    return cache


def cached_record(cache: TeacherCache, record: Record) -> CachedRecord:
    """What a cache holds of a record.

    Raises:
        UserError: the record's pictures have changed since, or the cache is damaged.
    """
    key = RecordKey(text_key(record), content_key(record))
    if key not in cache:
        raise UserError(
            f"{cache.directory} is stale: the pictures of record {record.id} have changed since it was made. "
            "Run grace teacher-cache again, it adds what is missing"
        )
    return cache.read(key)


def _plain(value: Any) -> Any:
    """A value of JSON types."""
    if hasattr(value, "items"):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | float | str) else int(value)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
