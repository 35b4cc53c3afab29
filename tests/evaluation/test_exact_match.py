"""Exact match from one forward pass equals exact match of real greedy decoding."""

import math
from dataclasses import replace

import pytest
import torch

from grace.data.batch import collate
from grace.data.records import Turn, load_records
from grace.data.template import encode
from grace.evaluation.exact_match import TurnScore, by_type, evaluate, summarize, turn_index
from grace.evaluation.samples import sample_table
from grace.models import qwen3vl
from grace.models.processor import load_processor


def test_turn_index_numbers_turns_in_reading_order():
    labels_BL = torch.tensor([[-100, 5, 6, -100, 7], [-100, -100, 8, -100, -100]])
    turn_T, row_N = turn_index(labels_BL)
    assert turn_T.tolist() == [0, 0, 1, 2]
    assert row_N.tolist() == [0, 0, 1]


def test_agrees_with_greedy_decoding(tiny_student_dir, tiny_world_dir):
    model = qwen3vl.load_model(str(tiny_student_dir))
    processor = load_processor(str(tiny_student_dir))
    records = [r for r in load_records(tiny_world_dir / "test.json") if r.images][:6]
    spoken = sample_table(model, processor, records, max_new_tokens=6)
    # Make the model's own greedy text the true answer of half the records: those must score as exact.
    records = [
        replace(r, turns=(r.turns[0], Turn("assistant", row[3] if i % 2 else row[3] + " 9")))
        for i, (r, row) in enumerate(zip(records, spoken, strict=True))
    ]
    again = sample_table(model, processor, records, max_new_tokens=6)
    assert [row[3] for row in again] == [row[3] for row in spoken]
    samples = [encode(r, processor, 512) for r in records]
    scores = evaluate(model, [collate(samples, processor.tokenizer.pad_token_id)])
    for score, record in zip(scores, records, strict=True):
        ids = processor.tokenizer(record.turns[1].text)["input_ids"]
        assert score.tokens == len(ids) + 1  # and the end marker
        assert math.isfinite(score.ce_sum) and score.ce_sum > 0
    assert not any(score.exact for score in scores[::2])


def test_summaries():
    scores = [TurnScore("test-1-sum", True, 1.0, 2), TurnScore("test-2-read", False, 3.0, 2)]
    total = summarize(scores)
    assert total["exact_match"] == 0.5
    assert total["exact_match_se"] == pytest.approx(math.sqrt(0.125))
    assert total["ce"] == 1.0
    assert by_type(scores)["sum"]["exact_match"] == 1.0
    assert math.isnan(summarize([])["ce"])
