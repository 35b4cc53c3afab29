"""python benchmarks/audit.py [--records N] [--pictures N] [--out benchmarks/results/audit.json]

What `grace data audit` does in a second on this machine: N made-up records shaped like ShareGPT4V's captions
(a question, and 120 to 200 words about one picture), each with a file of its own name. The pictures are JPEGs
of 640 x 480 in about 100 kB, as COCO's are; hard links give the few made here their many names, so that
contents come from the page cache and the disk is not what is measured. Checked in one process, then in as
many as there are cores, by headers and tails; then, on fewer records, with every picture decoded (`--deep`).

The tokenizer is the small world's: of 512 entries, so that a caption makes some three times the tokens that
Qwen's makes; to hold its cost apart, the checks are also timed without counting tokens.

The clock of one process is its CPU time, which other work on the machine hardly touches; with more it is the
wall's, the seconds in which the processes start included.

Prints a table and, last, one line of JSON.
"""

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import high_water, machine, report
from PIL import Image

from grace.data.annotations import open_annotations
from grace.data.audit import audit_file
from grace.data.image_check import check_image
from grace.models.processor import load_processor
from grace.models.tiny import write_tiny_model

GOAL = 2000  # records/s per core, headers and tails
DEEP_SHARE = 60  # decode every picture of one record in so many
WORDS = [
    *(
        "a",
        "the",
        "of",
        "in",
        "with",
        "and",
        "on",
        "picture",
        "shows",
        "large",
        "small",
        "red",
        "blue",
        "bright",
    ),
    *(
        "street",
        "building",
        "window",
        "tree",
        "person",
        "table",
        "light",
        "shadow",
        "behind",
        "between",
        "standing",
    ),
    *("holding", "wearing", "background", "foreground", "reflecting"),
]


def make_tree(folder: Path, records: int, pictures: int) -> Path:
    """Writes the records and their pictures; returns the annotation file."""
    rng, numbers = random.Random(0), np.random.default_rng(0)
    images = folder / "coco" / "train2017"
    images.mkdir(parents=True)
    for i in range(pictures):
        coarse = numbers.integers(0, 256, size=(60, 80, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((640, 480)).save(images / f"made{i}.jpg", quality=90)
    entries = []
    for i in range(records):
        os.link(images / f"made{i % pictures}.jpg", images / f"{i:012}.jpg")
        caption = " ".join(rng.choices(WORDS, k=rng.randint(120, 200)))
        turns = [
            {"from": "human", "value": "<image>\nWrite a detailed description of this picture."},
            {"from": "gpt", "value": caption},
        ]
        entries.append({"id": f"{i:012}", "image": f"coco/train2017/{i:012}.jpg", "conversations": turns})
    path = folder / "records.json"
    path.write_text(json.dumps(entries))
    return path


def measure(folder: Path, records: int, pictures: int) -> list[dict[str, Any]]:
    """Rates of each way to check, the one process first."""
    path = make_tree(folder / "data", records, pictures)
    fewer = folder / "data" / "fewer.json"
    fewer.write_text(json.dumps(json.loads(path.read_text())[: max(1, records // DEEP_SHARE)]))
    processor = load_processor(write_tiny_model(folder / "model", "student", seed=0))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core
    rows = [timed("records and pictures, no tokens", 1, lambda: without_tokens(path))]
    cores = len(os.sched_getaffinity(0))
    for name, file, workers, deep in (
        ("headers and tails", path, 1, False),
        ("headers and tails", path, cores, False),
        ("every picture decoded", fewer, 1, True),
    ):
        run = lambda file=file, workers=workers, deep=deep: checked(file, processor, workers, deep)  # noqa: E731
        rows.append(timed(name, workers, run))
    return rows


def without_tokens(path: Path) -> int:
    """Parses every record and checks its picture."""
    annotations = open_annotations(path)
    for i in range(len(annotations)):
        parsed = annotations.parsed(i, path.parent)
        assert not parsed.faults
        assert not check_image(path.parent / parsed.image_names[0]).faults
    return len(annotations)


def checked(path: Path, processor: Any, workers: int, deep: bool) -> int:
    """The whole audit, reading the file and starting the workers included."""
    audit = audit_file(path, None, processor, 4096, deep, workers)
    assert audit.findings == []
    return len(audit.sources)


def timed(name: str, workers: int, work: Any) -> dict[str, Any]:
    clock = time.process_time if workers == 1 else time.perf_counter
    start = clock()
    records = work()
    seconds = clock() - start
    rate = records / seconds
    return {"what": name, "processes": workers, "records": records, "seconds": seconds,
            "records_per_s": rate, "records_per_s_per_core": rate / workers}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=120_000)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args.records, args.pictures)
    print(f"{'what':32} {'processes':>9} {'records':>8} {'seconds':>8} {'records/s':>10} {'per core':>9}")
    for row in rows:
        print(
            f"{row['what']:32} {row['processes']:9} {row['records']:8,} {row['seconds']:8.1f} "
            f"{row['records_per_s']:10,.0f} {row['records_per_s_per_core']:9,.0f}"
        )
    rate = next(row["records_per_s"] for row in rows if row["what"] == "headers and tails")
    print(f"goal: {GOAL:,} records/s per core by headers and tails; found: {rate:,.0f}")
    result = {"benchmark": "audit", "goal": GOAL, "met": rate >= GOAL, "rows": rows,
              "high_water_gb": high_water() / 1e9, **machine()}  # fmt: skip
    report(result, args.out)


if __name__ == "__main__":
    main()
