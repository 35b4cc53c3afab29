"""Greedy answers to several prompts side by side."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from grace.data.records import Turn
from grace.data.template import Sample, encode_prompt
from grace.runtime.decoder import Decoder
from grace.runtime.library_generate import generation_config
from grace.runtime.text_stream import TextStream

CACHE_TOKENS = 16_384  # of all rows together: 1.9 GB at the 2B shape in bfloat16
STEP = 256  # rows are made for whole multiples of so many tokens


@torch.inference_mode()
def greedy_answers(
    decoder: Decoder,
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    max_new_tokens: int,
) -> list[str]:
    """The model's likeliest answers, as text without special tokens.

    Args:
        decoder: of any size; it is resized where prompts need more.
        prompts: a user's words, with one `<image>` for each picture.
        images: the pictures of each prompt.

    Raises:
        UserError: a prompt that the model's context cannot hold.
    """
    samples = [
        encode_prompt([Turn("user", prompt)], pictures, processor)
        for prompt, pictures in zip(prompts, images, strict=True)
    ]
    ends = generation_config(decoder.model, processor, max_new_tokens).eos_token_id
    texts = []
    for part, context in fitting(samples, max_new_tokens):
        make_room(decoder, len(part), context)
        room = [decoder.context + 1 - len(sample.input_ids_L) for sample in part]
        limits = [max(1, min(max_new_tokens, one)) for one in room]
        texts += _answered(
            decoder, part, [TextStream(processor.tokenizer, (), ends, limit) for limit in limits]
        )
    return texts


def fitting(samples: Sequence[Sample], max_new_tokens: int) -> Iterator[tuple[list[Sample], int]]:
    """Consecutive prompts whose rows fit the cache together, at least one at a time; and the length of their rows."""
    part: list[Sample] = []
    context = 0
    for sample in samples:
        needed = -(-(len(sample.input_ids_L) + max_new_tokens) // STEP) * STEP
        if part and (len(part) + 1) * max(context, needed) > CACHE_TOKENS:
            yield part, context
            part, context = [], 0
        part, context = [*part, sample], max(context, needed)
    if part:
        yield part, context


def make_room(decoder: Decoder, rows: int, context: int) -> None:
    """Gives the cache another size, if it is too small, or larger than it should be."""
    held = decoder.rows * decoder.context
    too_small = rows > decoder.rows or context > decoder.context
    if too_small or held > max(CACHE_TOKENS, rows * context):
        decoder.resize(rows, min(context, decoder.parts.max_context))


def _answered(decoder: Decoder, samples: Sequence[Sample], streams: Sequence[TextStream]) -> list[str]:
    texts = [""] * len(samples)
    tokens = [int(decoder.prefill(row, sample).argmax()) for row, sample in enumerate(samples)]
    going = list(range(len(samples)))
    while going:
        for row in going:
            texts[row] += streams[row].push(tokens[row])
        going = [row for row in going if streams[row].finish_reason is None]
        if going:
            logits_RV = decoder.decode(going, [tokens[row] for row in going])
            for row, token in zip(going, logits_RV.argmax(-1).tolist(), strict=True):
                tokens[row] = token
    for row in range(len(samples)):
        decoder.release(row)
    return texts
