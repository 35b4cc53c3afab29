"""`grace teacher-cache RECIPE --out DIR`: what the teacher says about every record, computed once.

    grace teacher-cache recipes/qwen3vl_2b_w4g128.yaml --out runs/teacher_cache
    accelerate launch -m grace.teacher_cache RECIPE --out DIR                        several devices
    accelerate launch -m grace.train RECIPE teacher.cache=DIR                        no teacher in memory

Records go through in stretches, one shard each (`grace.distill.cache_store`). What is in the cache is passed over, so
the same command goes on after a kill, and adds records that are new.
"""

import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from grace.agreement import agreed, same_in_all
from grace.arguments import RECORDS_PER_SHARD, add_teacher_cache
from grace.cache_settings import cache_settings, refuse_other_settings
from grace.config import Recipe, load_recipe
from grace.data.batch import Batch, collate
from grace.data.record_key import content_key, text_key
from grace.data.records import Record, text_length
from grace.data.template import encode
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
from grace.distill.cached import CachedRecord, pack_gram, teacher_top_k
from grace.distill.teacher import IGNORE_INDEX
from grace.errors import Parser, UserError, run_command
from grace.files import locked, writing_to
from grace.models import qwen3vl
from grace.models.processor import load_processor
from grace.parallel import leave, make_accelerator
from grace.run import placed_teacher, require_same_tokenizer
from grace.run_data import load_run_data, taken_in_run
from grace.step import NonFiniteLoss, teacher_outputs


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `grace teacher-cache`; returns the process exit code."""
    parser = Parser(
        prog="grace teacher-cache", description="Compute a recipe's teacher once.", rest="overrides"
    )
    add_teacher_cache(parser)
    args = parser.parse_args(argv)

    def command() -> int:
        with same_in_all():
            recipe = load_recipe(args.recipe, args.overrides)
            accelerator = make_accelerator()
        summary = fill_cache(recipe, args.out, accelerator, args.records_per_shard)
        if accelerator.is_main_process:
            print("{cache}: {records} records, {tokens} tokens, {images} images, {bytes:,} bytes; {added} records "
                  "added in {seconds:.0f} s".format(**summary), file=sys.stderr)  # fmt: skip
            if args.json:
                print(json.dumps(summary))
        return 0

    return run_command(command)


def fill_cache(
    recipe: Recipe, out: Path, accelerator: Accelerator, records_per_shard: int = RECORDS_PER_SHARD
) -> dict[str, Any]:
    """Adds every record of a recipe's data that is not in the cache yet; returns counts.

    Of a mixture, the records that come up in the recipe's steps.

    Raises:
        UserError: no teacher, unusable data, or `out` holds something else or a cache made otherwise.
        NonFiniteLoss: the teacher's output is NaN or infinite; names the records.
    """
    start = time.perf_counter()
    with agreed(accelerator):
        if recipe.teacher.path is None:
            raise UserError("the recipe names no teacher: set teacher.path")
        processor = load_processor(recipe.student.path, recipe.data.min_pixels, recipe.data.max_pixels)
        require_same_tokenizer(processor.tokenizer, recipe.teacher.path)
        records = taken_in_run(recipe, load_run_data(recipe, processor, validation=False).records)
    with contextlib.ExitStack() as stack:
        with agreed(accelerator):
            if accelerator.is_main_process:
                stack.enter_context(locked(out, "--out"))
                prepare(out, cache_settings(recipe, processor))
        with agreed(accelerator):
            cache = TeacherCache(out)
            teacher = placed_teacher(recipe.teacher, accelerator.device, accelerator.num_processes)
        # As many stretches at a time as there are processes, then one line in the index for each.
        starts = range(0, len(records), records_per_shard)
        stretches = [range(start, min(start + records_per_shard, len(records))) for start in starts]
        rounds = math.ceil(len(stretches) / accelerator.num_processes)
        mine = stretches[accelerator.process_index :: accelerator.num_processes]
        loader = load(recipe, records, mine, processor, cache)
        index = cache.index
        first = 1 + max((int(Path(shard.file).stem[6:]) for shard in index.shards), default=-1)
        for turn in progress(range(rounds), "shards", accelerator.is_main_process):
            number = first + turn * accelerator.num_processes + accelerator.process_index
            with agreed(accelerator), writing_to(out, "--out"):
                found = teach(teacher, next(loader, ()), index.settings, accelerator.device)
                shard = write_shard(out, number, *zip(*found, strict=True)) if found else None
            added = [shard for shard in gather_object([shard]) if shard is not None]
            index = replace(index, shards=(*index.shards, *added))
            with agreed(accelerator), writing_to(out, "--out"):
                if accelerator.is_main_process and added:
                    index.write(out)
    totals = {
        name: sum(getattr(shard, name) for shard in index.shards)
        for name in ("records", "tokens", "images", "bytes")
    }
    return {
        "cache": str(out),
        **totals,
        "added": totals["records"] - len(cache),
        "seconds": time.perf_counter() - start,
    }


def prepare(out: Path, settings: Mapping[str, Any]) -> None:
    """Makes `out` a cache of these settings, without shards that are damaged or that a killed run left.

    Raises:
        UserError: it holds a cache of other settings, or something else.
    """
    shards: tuple[Shard, ...] = ()
    if (out / INDEX).exists():
        index = read_index(out)
        refuse_other_settings(out, index.settings, settings)
        settings, shards = index.settings, index.shards  # it may keep more tokens than are asked for
    elif any(not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(f"{out} holds files that are not a teacher cache's: choose another --out")
    Index(settings, intact_shards(out, shards)).write(out)


@dataclass(frozen=True)
class TeacherInputs:
    """Records for one pass of the teacher.

    Attributes:
        images: number of pictures of each record.
    """

    keys: list[RecordKey]
    images: list[int]
    batch: Batch


class MissingRecords(Dataset):
    """Records by lists of positions, without those that are in the cache."""

    def __init__(self, recipe: Recipe, records: Sequence[Record], processor: Any, cache: TeacherCache):
        self.records, self.processor, self.cache = records, processor, cache
        self.max_length = recipe.data.max_length

    def __getitem__(self, positions: list[int]) -> TeacherInputs | UserError | None:
        try:
            return self.inputs([self.records[i] for i in positions])
        except UserError as error:  # raised in a worker process, it would arrive with the worker's trace
            return error

    def inputs(self, records: Sequence[Record]) -> TeacherInputs | None:
        """What the teacher reads of these records; None where they are all there."""
        keyed = [(RecordKey(text_key(record), content_key(record)), record) for record in records]
        missing = [(key, record) for key, record in keyed if key not in self.cache]
        if not missing:
            return None
        samples = [encode(record, self.processor, self.max_length) for _, record in missing]
        batch = collate(samples, self.processor.tokenizer.pad_token_id)
        return TeacherInputs(
            [key for key, _ in missing], [len(record.images) for _, record in missing], batch
        )


def load(
    recipe: Recipe, records: Sequence[Record], stretches: Sequence[range], processor: Any, cache: TeacherCache
) -> Iterator[Iterator[TeacherInputs]]:
    """The inputs of one stretch of records after the other, alike lengths together; no stretch is read ahead of time."""
    size = recipe.teacher.micro_batch_size or recipe.run.micro_batch_size

    def batches() -> Iterator[list[int]]:
        for stretch in stretches:
            order = sorted(stretch, key=lambda i: text_length(records[i]))
            yield from (order[i : i + size] for i in range(0, len(order), size))

    loader = iter(DataLoader(
        MissingRecords(recipe, records, processor, cache), batch_size=None, sampler=batches(),  # type: ignore[arg-type]
        num_workers=recipe.data.num_workers,
    ))  # fmt: skip
    for stretch in stretches:
        yield usable(itertools.islice(loader, math.ceil(len(stretch) / size)))


def usable(items: Iterator[TeacherInputs | UserError | None]) -> Iterator[TeacherInputs]:
    """Those with something to do; an error is raised here."""
    for item in items:
        if isinstance(item, UserError):
            raise item
        if item is not None:
            yield item


@torch.inference_mode()
def teach(
    teacher: qwen3vl.Qwen3VLForConditionalGeneration,
    inputs: Iterable[TeacherInputs],
    settings: Mapping[str, Any],
    device: torch.device,
) -> list[tuple[RecordKey, CachedRecord]]:
    """What the teacher says about records, on the CPU, by the settings of their cache.

    Raises:
        NonFiniteLoss: NaN or infinite; names the records.
    """
    results = []
    for item in inputs:
        batch = item.batch.to(device)
        hidden_TE, targets_T, visual = teacher_outputs(teacher, batch)
        top_k = teacher_top_k(
            hidden_TE, qwen3vl.head_weight(teacher), targets_T, settings["top_k"],
            temperature=settings["temperature"], shared=settings["vocabulary"],
        ).to("cpu")  # fmt: skip
        grams = iter([pack_gram(image).cpu() for image in visual] if settings["grams"] else [])
        tokens = (batch.labels_BL[:, 1:] != IGNORE_INDEX).sum(-1).tolist()
        for key, name, known, images in zip(
            item.keys, batch.record_ids, top_k.split(tokens), item.images, strict=True
        ):
            record = CachedRecord(known, tuple(itertools.islice(grams, images)))
            if not all(values.isfinite().all() for values in (known.gate_T, known.target_T2, *record.grams)):
                raise NonFiniteLoss(f"the teacher's output is not finite for record {name}")
            results.append((key, record))
    return results


def progress(items: Sequence[int], what: str, is_main: bool) -> Iterable[int]:
    """The items, with a progress bar on a terminal and a line each elsewhere."""
    if is_main and sys.stderr.isatty():
        yield from track(items, what, console=Console(stderr=True))
        return
    for done, item in enumerate(items, 1):
        yield item
        if is_main:
            print(f"{what} {done}/{len(items)}", file=sys.stderr)


if __name__ == "__main__":
    leave(main())
