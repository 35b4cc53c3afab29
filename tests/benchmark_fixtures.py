"""A few rows of each benchmark, in the columns and forms in which it is published; pictures are tiny and all different."""

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def png(number: int, size: tuple[int, int] = (12, 10)) -> bytes:
    """A picture of one colour, another for each number."""
    file = io.BytesIO()
    Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, number * 13 % 256)).save(file, "PNG")
    return file.getvalue()


def picture(number: int) -> dict[str, Any]:
    """As the Hub's image feature keeps it."""
    return {"bytes": png(number), "path": f"{number}.png"}


def mmbench() -> list[dict[str, Any]]:
    """Two questions in all their rotations, as in MMBench_DEV_EN.tsv: index + 1,000,000 per rotation, the picture once."""
    four = {
        "question": "Which animal is it?",
        "hint": "It barks.",
        "category": "identity",
        "l2-category": "perception",
    }
    two = {"question": "Is it day or night?", "hint": "nan", "category": "scene", "l2-category": "reasoning"}
    animals, times = ["a cat", "a dog", "a fox", "a cow"], ["day", "night"]
    rows = []
    for base, common, options, gold, image in ((241, four, animals, 1, 1), (252, two, times, 0, 2)):
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            row = {"index": base + 1_000_000 * turn, **common}
            row |= {mark: turned[i] if i < len(turned) else "nan" for i, mark in enumerate("ABCD")}
            row["answer"] = "ABCD"[(gold - turn) % len(options)]
            row["image"] = base64.b64encode(png(image)).decode() if turn == 0 else str(base)
            row |= {"source": "made up", "comment": "nan", "split": "dev"}
            rows.append(row)
    return sorted(rows, key=lambda row: row["index"])


def seedbench() -> list[dict[str, Any]]:
    """Three questions about two pictures, and one about a video."""
    about = [("101_0", "1", "image", 1, "B"), ("101_1", "5", "image", 1, "C"), ("102_0", "5", "image", 2, "A"), ("v9_0", "10", "video", 3, "A")]  # fmt: skip
    return [
        {
            "answer": answer, "choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four",
            "data_id": name.partition("_")[0], "data_type": kind, "question": f"How many are there in {name}?",
            "question_id": name, "question_type_id": int(dimension),
            "image": [picture(image)] * (1 if kind == "image" else 2), "segment": None,
        }
        for name, dimension, kind, image, answer in about
    ]  # fmt: skip


def scienceqa() -> list[dict[str, Any]]:
    """Three questions, one of them without a picture."""
    common = {"task": "closed choice", "grade": "grade2", "category": "c", "skill": "s", "lecture": "Read this first.", "solution": "So."}  # fmt: skip
    return [
        {"image": picture(1), "question": "Which is a mammal?", "choices": ["trout", "whale", "frog"], "answer": 1, "hint": "It breathes air.",
         "subject": "natural science", "topic": "biology", **common},
        {"image": None, "question": "What rhymes with cat?", "choices": ["hat", "dog"], "answer": 0, "hint": "",
         "subject": "language science", "topic": "rhymes", **common},
        {"image": picture(2), "question": "Which state is it?", "choices": ["Ohio", "Utah", "Iowa", "Maine", "Texas"], "answer": 4, "hint": "",
         "subject": "social science", "topic": "geography", **common},
    ]  # fmt: skip


def ai2d() -> list[dict[str, Any]]:
    """Three questions about two diagrams; one has letters for options."""
    return [
        {"question": "What eats the grass?", "options": ["hawk", "rabbit", "fungus", "sun"], "answer": "1", "image": picture(1)},
        {"question": "Which letter shows the root?", "options": ["c", "D", "b", "a"], "answer": "3", "image": picture(1)},
        {"question": "What phase is it?", "options": ["full moon", "new moon", "crescent", "half moon"], "answer": "0", "image": picture(2)},
    ]  # fmt: skip


def hallusionbench() -> list[dict[str, Any]]:
    """Two sets: a chart with and without an edit, two questions each; an illusion with one question on two pictures."""
    about = [
        ("VS", "chart", "1", "0", "1", "0", "1", "VS/chart/0_1.png", 1), ("VS", "chart", "1", "0", "1", "1", "0", "VS/chart/0_1.png", 1),
        ("VS", "chart", "2", "0", "2", "0", "0", "VS/chart/0_2.png", 2), ("VS", "chart", "2", "0", "2", "1", "0", "VS/chart/0_2.png", 2),
        ("VD", "illusion", "1", "3", "0", "0", "1", "VD/illusion/3_0.png", 3), ("VD", "illusion", "2", "3", "1", "0", "0", "VD/illusion/3_1.png", 4),
    ]  # fmt: skip
    names = (
        "category",
        "subcategory",
        "visual_input",
        "set_id",
        "figure_id",
        "question_id",
        "gt_answer",
        "filename",
    )
    return [
        {**dict(zip(names, row[:8], strict=True)), "sample_note": "made up", "question": f"Is {row[3]}.{row[5]} so?",
         "gt_answer_details": "It is.", "image": picture(row[8])}
        for row in about
    ]  # fmt: skip


def mmmu() -> list[dict[str, Any]]:
    """One picture; two pictures, one in an option; a number; a word with two right spellings."""
    empty = {f"image_{i}": None for i in range(1, 8)}
    common = {
        "explanation": "",
        "img_type": "['Diagrams']",
        "topic_difficulty": "Easy",
        "subfield": "Circuits",
    }
    return [
        {**common, **empty, "id": "validation_Accounting_1", "question": "<image 1> What is the total?", "options": "['$10', '$20', '$30', \"none's\"]",
         "answer": "B", "question_type": "multiple-choice", "image_1": picture(1)},
        {**common, **empty, "id": "validation_Art_Theory_12", "question": "Compare <image 1> with <image 2>. Which is older?",
         "options": "['<image 1>', '<image 3>', 'both']", "answer": "C", "question_type": "multiple-choice",
         "image_1": picture(2), "image_2": picture(3), "image_3": picture(4)},
        {**common, **empty, "id": "validation_Electronics_3", "question": "Find the current in <image 1>.", "options": "[]", "answer": "8.4",
         "question_type": "open", "image_1": picture(5)},
        {**common, **empty, "id": "validation_Chemistry_30", "question": "Name the salt in <image 1>.", "options": "[]", "answer": "['$MgS$', 'MgS']",
         "question_type": "open", "image_1": picture(6)},
    ]  # fmt: skip


def mmstar() -> list[dict[str, Any]]:
    """Three questions; the last one's options cannot be told from its text."""
    common = {"meta_info": {"source": "MMBench", "split": "val", "image_path": "images/0.jpg"}}
    return [
        {"index": 0, "question": "Which style is it?\nOptions: A: oil painting, B: sketch, C: photo, D: pastel", "image": picture(1),
         "answer": "A", "category": "coarse perception", "l2_category": "image style & quality", **common},
        {"index": 1, "question": "How many?\nOptions: A: 1, B: 2, C: 3, D: 4", "image": picture(2), "answer": "D",
         "category": "fine-grained perception", "l2_category": "object counting", **common},
        {"index": 2, "question": "Hint: answer with a letter.\nWhich is right?\n(A) 1\n(B) 2\n(D) 4", "image": picture(3), "answer": "B",
         "category": "math", "l2_category": "geometry", **common},
    ]  # fmt: skip


ROWS = {
    "mmbench": mmbench, "seedbench": seedbench, "scienceqa": scienceqa, "hallusionbench": hallusionbench, "ai2d": ai2d,
    "mmmu": mmmu, "mmstar": mmstar,
}  # fmt: skip


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Writes rows as the kind of file that the name says; a name without an ending is a saved dataset."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tsv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps([as_json(row) for row in rows]))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(as_json(row)) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=2)
    else:
        import datasets

        datasets.Dataset.from_list([dict(row) for row in rows]).save_to_disk(str(path))
    return path


def as_json(value: Any) -> Any:
    """Bytes as base64, in whatever holds them."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {name: as_json(one) for name, one in value.items()}
    return [as_json(one) for one in value] if isinstance(value, list) else value


def write_predictions(path: Path, outputs: Mapping[str, str]) -> Path:
    """Answers by id."""
    path.write_text(
        "".join(json.dumps({"id": name, "output": text}) + "\n" for name, text in outputs.items())
    )
    return path


def write_all(folder: Path, answers: Path) -> None:
    """Every benchmark as parquet, named like its task, and answers to MMBench."""
    for name, rows in ROWS.items():
        write(rows(), folder / f"{name}.parquet")
    write_predictions(answers, {str(row["index"]): "A" for row in mmbench()})
