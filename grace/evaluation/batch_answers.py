"""Greedy answers to several prompts at once.

Shape suffixes: B batch, L sequence.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from grace.data.records import Turn
from grace.data.template import Sample, encode_prompt
from grace.runtime.generate import generation_config


@torch.inference_mode()
def greedy_answers(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    max_new_tokens: int,
) -> list[str]:
    """The model's likeliest answers, as text without special tokens.

    Args:
        prompts: a user's words, with one `<image>` for each picture.
        images: the pictures of each prompt.
    """
    samples = [
        encode_prompt([Turn("user", prompt)], pictures, processor)
        for prompt, pictures in zip(prompts, images, strict=True)
    ]
    inputs = {name: tensor.to(model.device) for name, tensor in left_padded(samples, processor).items()}
    output_BL = model.generate(
        **inputs, generation_config=generation_config(model, processor, max_new_tokens)
    )
    new_BL = output_BL[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(new_BL, skip_special_tokens=True)


def left_padded(samples: Sequence[Sample], processor: Any) -> dict[str, Any]:
    """Prompts of different lengths as the model's keyword arguments: their ends are aligned, so that all go on at once."""
    longest = max(len(sample.input_ids_L) for sample in samples)

    def padded(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        return torch.stack(
            [torch.nn.functional.pad(row, (longest - len(row), 0), value=value) for row in rows]
        )

    inputs = {
        "input_ids": padded([s.input_ids_L for s in samples], processor.tokenizer.pad_token_id),
        "attention_mask": padded([torch.ones_like(s.input_ids_L) for s in samples], 0),
        "mm_token_type_ids": padded([s.mm_token_type_ids_L for s in samples], 0),
    }
    pixels = [s.pixel_values_PD for s in samples if s.pixel_values_PD is not None]
    grids = [s.image_grid_thw_N3 for s in samples if s.image_grid_thw_N3 is not None]
    return inputs | (
        {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)} if pixels else {}
    )
