"""python benchmarks/fake_sharegpt4v.py --out DIR [--records 665058] [--pictures 64] [--links] [--seed 0]

Made-up data in the shape of ShareGPT4V's mixture: DIR/records.json and DIR/images. For benchmarks; there is
nothing to learn from it.

Shares, sizes and lengths by source are rounded from what is published of sharegpt4v_mix665k (LLaVA-1.5's mixture,
arXiv:2310.03744 table 7, with 23k conversations replaced by captions of 942 characters on average,
arXiv:2311.12793 table 1): about 6 % text only, one picture else; captions of hundreds of characters, and questions
with short answers over several turns. Lengths are log-normal about those means. Words are made of random letters,
so that a tokenizer has as hard a time as it can.

A picture has one of `--pictures` contents of each source, JPEGs at the usual size of that source. Records share those
files; with --links each record has a name of its own, a hard link, as an audit of many files needs. Records are
written one by one: a million of them takes no memory.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RECORDS = 665_058  # of sharegpt4v_mix665k


@dataclass(frozen=True)
class Source:
    """Records that are alike.

    Attributes:
        share: of all records, in percent.
        size: width and height of a picture; None is text only.
        rounds: questions and answers of a record, on average.
        question, answer: characters of each, on average.
    """

    share: float
    size: tuple[int, int] | None
    rounds: float
    question: int
    answer: int


SOURCES = {
    "": Source(6.1, None, 3.0, 220, 900),  # ShareGPT's conversations
    "coco/train2017": Source(54.7, (640, 480), 3.5, 55, 160),
    "gqa/images": Source(10.8, (500, 375), 9.0, 45, 5),
    "ocr_vqa/images": Source(12.0, (350, 490), 5.0, 45, 18),
    "textvqa/train_images": Source(3.3, (1024, 768), 1.0, 190, 12),
    "vg/VG_100K": Source(9.7, (500, 400), 12.0, 90, 28),
    "sam/images": Source(1.4, (1500, 1000), 1.0, 60, 942),
    "llava/llava_pretrain/images": Source(1.4, (336, 336), 1.0, 60, 942),
    "share_textvqa/images": Source(0.6, (1024, 768), 1.0, 60, 942),
}
SPREAD = 0.6  # sigma of the log of a length


def text(rng: np.random.Generator, characters: int) -> str:
    """Random words of about so many characters in all, one at least."""
    letters = rng.integers(97, 123, size=max(1, characters), dtype=np.uint8)
    letters[5::6] = 32  # words of five letters
    return letters.tobytes().decode().strip() or "a"


def about(rng: np.random.Generator, mean: float) -> int:
    """A whole number that is `mean` on average, log-normal, at least 1."""
    return max(1, int(rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD) + 0.5))


def records(
    count: int, pictures: int, links: bool, seed: int, sources: Mapping[str, Source] = SOURCES
) -> Iterator[dict[str, Any]]:
    """Records in random order of source."""
    rng = np.random.default_rng(seed)
    names = list(sources)
    shares = np.array([sources[name].share for name in names])
    for i, which in enumerate(rng.choice(len(names), size=count, p=shares / shares.sum()).tolist()):
        name = names[which]
        source = sources[name]
        turns = []
        for _ in range(about(rng, source.rounds)):
            turns.append({"from": "human", "value": text(rng, about(rng, source.question)) + "?"})
            turns.append({"from": "gpt", "value": text(rng, about(rng, source.answer)) + "."})
        entry: dict[str, Any] = {"id": f"{i:012}"}
        if source.size is not None:
            entry["image"] = f"{name}/{i:012}.jpg" if links else f"{name}/{i % pictures:03}.jpg"
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        yield entry | {"conversations": turns}


def write_pictures(folder: Path, pictures: int, seed: int, sources: Mapping[str, Source] = SOURCES) -> None:
    """The contents of each source: blurred noise, which makes JPEGs of a photograph's size."""
    rng = np.random.default_rng(seed)
    for name, source in sources.items():
        if source.size is None:
            continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(pictures):
            width, height = source.size
            coarse = rng.integers(0, 256, size=(height // 6, width // 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((width, height)).save(folder / name / f"{i:03}.jpg", quality=88)


def write(
    out: Path,
    count: int = RECORDS,
    pictures: int = 64,
    links: bool = False,
    seed: int = 0,
    sources: Mapping[str, Source] = SOURCES,
) -> Path:
    """Writes records and pictures; returns the annotation file."""
    images = out / "images"
    write_pictures(images, pictures, seed, sources)
    path = out / "records.json"
    with path.open("w", encoding="utf-8") as file:
        for i, entry in enumerate(records(count, pictures, links, seed, sources)):
            file.write("[" if i == 0 else ",\n")
            file.write(json.dumps(entry))
            if links and "image" in entry:
                target = images / entry["image"]
                target.unlink(missing_ok=True)
                os.link(target.parent / f"{i % pictures:03}.jpg", target)
        file.write("]\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument(
        "--pictures", type=int, default=64, help="contents of each source; default: %(default)s"
    )
    parser.add_argument("--links", action="store_true", help="a file name for each record")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.records < 1 or args.pictures < 1:
        parser.error("--records and --pictures must be at least 1")
    path = write(args.out, args.records, args.pictures, args.links, args.seed)
    print(f"wrote {args.records:,} records, {path.stat().st_size / 1e6:,.0f} MB, to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
