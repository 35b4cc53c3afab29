"""The sample table: what people see next to the numbers."""

from pathlib import Path

from PIL import Image

from grace.data.records import load_records
from grace.evaluation.samples import greedy_answer, sample_table
from grace.models import qwen3vl
from grace.models.processor import load_processor


def test_rows_hold_picture_question_truth_and_greedy_answer(
    tiny_student_dir: Path, tiny_world_dir: Path
) -> None:
    model, processor = qwen3vl.load_model(str(tiny_student_dir)), load_processor(tiny_student_dir)
    records = load_records(tiny_world_dir / "test.json")[:3]
    rows = sample_table(model, processor, records, max_new_tokens=4)
    assert len(rows) == 3
    for record, (image, question, truth, prediction) in zip(records, rows, strict=True):
        assert isinstance(image, Image.Image) and image.size == (96, 96)
        assert "<image>\n" + question == record.turns[0].text and truth == record.turns[1].text
        assert prediction == greedy_answer(model, processor, record.turns[:1], [image], 4)


def test_text_alone_has_no_picture(tiny_student_dir: Path, tmp_path: Path) -> None:
    model, processor = qwen3vl.load_model(str(tiny_student_dir)), load_processor(tiny_student_dir)
    (tmp_path / "x.json").write_text(
        '[{"id": 1, "conversations": [{"from": "human", "value": "What is 1 plus 2?"}, {"from": "gpt", "value": "3"}]}]'
    )
    ((image, question, truth, _),) = sample_table(model, processor, load_records(tmp_path / "x.json"), 2)
    assert image is None and question == "What is 1 plus 2?" and truth == "3"
