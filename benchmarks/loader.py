"""python benchmarks/loader.py [--records N] [--steps N] [--data DIR] [--out benchmarks/results/loader.json]

What it takes to feed the published run (recipes/qwen3vl_2b_w4g128.yaml: 512 records a step over 16 processes, rows of
4,096 tokens, 200,704 pixels) from made-up records in the shape of the 665k mixture (benchmarks/fake_sharegpt4v.py).

- Start-up: the annotations opened for the first time (read, checked and put into a table) and again, each in a
  process of its own, with the most memory it held. Without `datasets` both read the file into memory.
- Rate of one core: what a worker does for one process's share of a step, from the record to packed rows; CPU time.
- Memory of a worker while it makes steps: all that is resident (the libraries and whatever else of the parent's it
  shares, and the batches of 32 pictures that wait), what is its own, and the same with 1,000 records for comparison.
  Also that of a process that reads 200,000 records in random order.
- Fill: the share of the rows' budget that holds tokens, where a whole step of 512 records, 128 or a process's 32 are
  packed together. Rows are not padded, so what is not filled costs nothing by itself. 32 records make four rows and a
  bit, hence five: no way of packing can fill those. But it can share the room out: "even" is the same with the longest
  row of each step for the budget, as training cuts it (`pack_evenly`). Lengths as Qwen's tokenizer would make them: 4.6 characters a token
  (the recipe's figure), and the image processor's own count.
- Would a GPU wait? The published run takes a day for 665k records on 16 A100s (arXiv:2601.22709), so that a GPU asks
  for 665,058 / 86,400 / 16 = 0.48 records a second, every 66.5 s for 32 of them. The rate of one core over that is how
  many times faster GPUs could be before one worker for each held them up.

The tokenizer is the small world's, of 512 entries: a text makes some three to four times the tokens that Qwen's makes.

Prints a table and, last, one line of JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_sharegpt4v
import numpy as np
import torch
from measure import high_water, machine, report
from PIL import Image
from torch.utils.data import DataLoader

from grace.config import load_recipe
from grace.data.annotations import TextsInMemory
from grace.data.packing import pack, pack_evenly
from grace.data.records import Records, load_records, text_length
from grace.data.sampler import step_indices
from grace.data.template import image_token_count
from grace.models.processor import load_processor
from grace.models.tiny import write_tiny_model
from grace.step_inputs import StepBatches

RANKS, DAY = 16, 86_400
PUBLISHED = fake_sharegpt4v.RECORDS / DAY / RANKS  # records/s that a GPU asks for
CHARACTERS_PER_TOKEN, TEMPLATE_TOKENS = 4.6, 15
FILL_GOAL, MEMORY_GOAL = 0.97, 500e6
START = """
import json, sys, time
start = time.perf_counter(), time.process_time()
from measure import high_water
from grace.data.records import load_records
records = load_records(sys.argv[1], sys.argv[2])
print(json.dumps({"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1],
                  "records": len(records), "high_water_mb": high_water() / 1e6}))
"""


def resident(pid: int | str = "self") -> int:
    """Bytes of a process that are in memory now (Linux)."""
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS:")) * 1024


def own(pid: int) -> int:
    """Bytes of a process in memory that no other process shares (Linux)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


def start_up(path: Path) -> list[dict[str, Any]]:
    """The first and the second opening of a file, each in a new process."""
    command = [sys.executable, "-c", START, str(path), str(path.parent / "images")]
    rows = []
    for name in ("first", "later"):
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
        rows.append({"start": name, **json.loads(done.stdout.splitlines()[-1])})
    return rows


def batches(records: Records, processor: Any, student: Path) -> StepBatches:
    """The inputs of the published run's steps, as its first of 16 processes makes them."""
    overrides = [f"student.path={student}", "data.max_length=1000000"]
    run: Any = SimpleNamespace(
        recipe=load_recipe("qwen3vl_2b_w4g128.yaml", overrides),
        accelerator=SimpleNamespace(process_index=0, num_processes=RANKS),
        teacher=None, cache=None,
    )  # fmt: skip
    return StepBatches(run, records, processor)


def rate(steps: StepBatches, count: int) -> dict[str, float]:
    """What one core makes in a second of CPU time."""
    steps.inputs(0)
    totals = dict.fromkeys(("records", "images", "tokens"), 0)
    start = time.process_time()
    for step in range(1, count + 1):
        for batch in steps.inputs(step).student:
            if batch is not None:
                totals["records"] += len(batch.record_ids)
                totals["images"] += 0 if batch.image_grid_thw_N3 is None else len(batch.image_grid_thw_N3)
                totals["tokens"] += batch.input_ids_BL.numel()
    seconds = time.process_time() - start
    return {f"{name}_per_s": total / seconds for name, total in totals.items()} | {"cpu_seconds": seconds}


def _first(items: list[Any]) -> Any:
    return items[0]


def worker_memory(steps: StepBatches, count: int) -> dict[str, list[float]]:
    """Megabytes of a worker process after each tenth of the steps: all that is resident, and what no other shares."""
    loader: Any = DataLoader(
        steps, batch_size=1, collate_fn=_first, sampler=range(count), num_workers=1  # type: ignore[arg-type]
    )  # fmt: skip
    marks = set(np.linspace(0, count - 1, 10).astype(int).tolist())
    found: dict[str, list[float]] = {"resident_mb": [], "own_mb": []}
    iterator = iter(loader)
    for step in range(count):
        next(iterator)
        if step in marks:
            pid = iterator._workers[0].pid
            found["resident_mb"].append(resident(pid) / 1e6)
            found["own_mb"].append(own(pid) / 1e6)
    return found


def reading_memory(records: Records, count: int) -> list[float]:
    """Megabytes of this process after each tenth of so many records, in random order."""
    found = []
    for part in np.array_split(np.random.default_rng(0).integers(0, len(records), count), 10):
        for i in part.tolist():
            records[i]
        found.append(resident() / 1e6)
    return found


def lengths_of(records: Records, indices: list[int], processor: Any, sizes: dict[str, int]) -> list[int]:
    """Tokens of records, as Qwen's tokenizer would about make them."""
    found = []
    for i in indices:
        record = records[i]
        tokens = text_length(record) / CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS * len(record.turns)
        for path in record.images:
            key = str(path.parent)
            if key not in sizes:
                with Image.open(path) as image:
                    sizes[key] = image_token_count(image.size, processor)
            tokens += sizes[key]
        found.append(int(tokens))
    return found


def fill(records: Records, processor: Any, budget: int, share: int, steps: int) -> dict[str, float]:
    """Share of the budget in use where `share` records are packed together."""
    tokens = rows = room = 0
    sizes: dict[str, int] = {}
    for step in range(steps):
        lengths = lengths_of(records, step_indices(step, share, len(records), 0), processor, sizes)
        lengths = [length for length in lengths if length <= budget]
        tokens += sum(lengths)
        rows += len(pack(lengths, budget))
        loads = [sum(lengths[i] for i in row) for row in pack_evenly(lengths, budget)]
        room += len(loads) * max(loads)
    return {"packed_together": share, "rows": rows, "tokens": tokens, "fill": tokens / (rows * budget), "even": tokens / room}  # fmt: skip


def measure(folder: Path, records: int, steps: int) -> dict[str, Any]:
    """All figures."""
    path = folder / "records.json"
    if not path.exists():
        fake_sharegpt4v.write(folder, records)
    starts = start_up(path)
    loaded = load_records(path, folder / "images")
    with tempfile.TemporaryDirectory() as model:
        student = write_tiny_model(Path(model) / "student", "student", seed=0)
        processor = load_processor(student, None, 200_704)
        made = batches(loaded, processor, student)
        speed = rate(made, steps)
        workers = {"all records": worker_memory(made, steps)}
        few = Path(model) / "few.json"
        few.write_text(json.dumps([json.loads(text) for text in loaded.sources[0].annotations.read(0, 1000)]))
        made = batches(load_records(few, folder / "images"), processor, student)
        workers["1,000 records"] = worker_memory(made, steps)
    texts = loaded.sources[0].annotations.texts
    return {
        "records": len(loaded),
        "file_mb": path.stat().st_size / 1e6,
        "held": "memory" if isinstance(texts, TextsInMemory) else "table",
        "start_up": starts,
        "per_core": speed,
        "worker": workers,
        "reading_mb": reading_memory(loaded, 200_000),
        "fill": [fill(loaded, processor, 4096, share, 8192 // share) for share in (512, 128, 32)],
        "gpu": {
            "asks_records_per_s": PUBLISHED,
            "one_core_over_it": speed["records_per_s"] / PUBLISHED,
            "waits": speed["records_per_s"] < PUBLISHED,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=fake_sharegpt4v.RECORDS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--data", type=Path, help="where the data lies, or is made if it is not there")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(args.data or Path(scratch), args.records, args.steps)
    print(f"{found['records']:,} records, {found['file_mb']:,.0f} MB, held in a {found['held']}")
    for row in found["start_up"]:
        print(
            f"{row['start']} start: {row['seconds']:.1f} s ({row['cpu_seconds']:.1f} s CPU), "
            f"at most {row['high_water_mb']:.0f} MB"
        )
    print(
        "one core: "
        + ", ".join(f"{found['per_core'][f'{n}_per_s']:,.0f} {n}/s" for n in ("records", "images", "tokens"))
    )
    series = {f"worker, {name}, {kind.removesuffix('_mb')}": one for name, both in found["worker"].items()
              for kind, one in both.items()}  # fmt: skip
    for name, values in {**series, "a process that only reads, resident": found["reading_mb"]}.items():
        print(f"{name}, MB over time: " + " ".join(f"{one:.0f}" for one in values))
    for row in found["fill"]:
        print(
            f"{row['packed_together']} records packed together: {row['fill']:.1%} of {row['rows']} rows; even: {row['even']:.1%}"
        )
    print(
        f"a GPU asks for {PUBLISHED:.2f} records/s: one core makes {found['gpu']['one_core_over_it']:.0f} times that"
    )
    goals = {
        "fill": found["fill"][0]["fill"] >= FILL_GOAL,
        "memory": max(found["worker"]["all records"]["own_mb"]) * 1e6 < MEMORY_GOAL,
        "gpu_never_waits": not found["gpu"]["waits"],
    }
    result = {"benchmark": "loader", "goals": {"fill": FILL_GOAL, "worker_mb": MEMORY_GOAL / 1e6}, "met": goals,
              **found, "high_water_gb": high_water() / 1e9, **machine()}  # fmt: skip
    report(result, args.out)


if __name__ == "__main__":
    main()
