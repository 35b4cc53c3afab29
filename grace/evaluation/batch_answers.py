"""Greedy answers to several prompts side by side."""

from collections.abc import Iterator, Sequence

import torch
from PIL import Image

from grace.data.records import Turn
from grace.data.template import Sample
from grace.runtime.engine import Engine
from grace.runtime.sampling import Sampling

CACHE_TOKENS = 16_384  # of all rows together: 1.9 GB at the 2B shape in bfloat16
STEP = 256  # rows are made for whole multiples of so many tokens


@torch.inference_mode()
def greedy_answers(
    engine: Engine, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]], max_new_tokens: int
) -> list[str]:
    """The model's likeliest answers, as text without special tokens.

    Args:
        prompts: a user's words, with one `<image>` for each picture.
        images: the pictures of each prompt.

    Raises:
        UserError: a prompt that the model's context cannot hold.
    """
    samples = [
        engine.encode([Turn("user", prompt)], pictures)
        for prompt, pictures in zip(prompts, images, strict=True)
    ]
    return [
        text
        for part, context in fitting(samples, max_new_tokens)
        for text in _answered(engine, part, context, max_new_tokens)
    ]


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


def _answered(engine: Engine, samples: Sequence[Sample], context: int, max_new_tokens: int) -> list[str]:
    decoder = engine.decoder
    held = decoder.rows * decoder.context
    too_small = len(samples) > decoder.rows or context > decoder.context
    if too_small or held > max(CACHE_TOKENS, len(samples) * context):
        decoder.resize(len(samples), min(context, decoder.parts.max_context))
    streams = [engine.text_stream(sample, Sampling(max_new_tokens)) for sample in samples]
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
