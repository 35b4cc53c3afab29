"""A few questions with the model's own greedy answers, for people to look at."""

from collections.abc import Sequence
from typing import Any

import torch

from grace.data.records import Record, open_image
from grace.data.template import encode_prompt


def sample_table(
    model: Any, processor: Any, records: Sequence[Record], max_new_tokens: int = 64
) -> list[tuple[Any, str, str, str]]:
    """Rows of (image or None, question, true answer, greedy prediction) for each record's first question."""
    rows = []
    for record in records:
        first = next(i for i, turn in enumerate(record.turns) if turn.role == "assistant")
        images = [open_image(path, record.id) for path in record.images]
        prediction = greedy_answer(model, processor, record.turns[:first], images, max_new_tokens)
        question = record.turns[first - 1].text.replace("<image>", "").strip()
        rows.append((images[0] if images else None, question, record.turns[first].text, prediction))
    return rows


@torch.no_grad()
def greedy_answer(
    model: Any, processor: Any, turns: Sequence[Any], images: Sequence[Any], max_new_tokens: int
) -> str:
    """Greedy decoding of one answer after `turns`, as text without special tokens."""
    prompt = encode_prompt(turns, images, processor)
    device = next(model.parameters()).device
    inputs = {
        "input_ids": prompt.input_ids_L[None].to(device),
        "attention_mask": torch.ones_like(prompt.input_ids_L)[None].to(device),
        "mm_token_type_ids": prompt.mm_token_type_ids_L[None].to(device),
    }
    if prompt.pixel_values_PD is not None and prompt.image_grid_thw_N3 is not None:
        inputs["pixel_values"] = prompt.pixel_values_PD.to(device)
        inputs["image_grid_thw"] = prompt.image_grid_thw_N3.to(device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
