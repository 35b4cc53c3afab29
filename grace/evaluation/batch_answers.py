"""Greedy answers to several prompts side by side."""

from collections.abc import Sequence

import torch
from PIL import Image

from grace.data.records import Turn
from grace.runtime.engine import Engine
from grace.runtime.sampling import Sampling


@torch.inference_mode()
def greedy_answers(
    engine: Engine, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]], max_new_tokens: int
) -> list[str]:
    """The model's likeliest answers, as text without special tokens.

    Args:
        engine: with at least as many rows as there are prompts.
        prompts: a user's words, with one `<image>` for each picture.
        images: the pictures of each prompt.

    Raises:
        UserError: a prompt that the model's context cannot hold.
    """
    samples = [
        engine.encode([Turn("user", prompt)], pictures)
        for prompt, pictures in zip(prompts, images, strict=True)
    ]
    engine.make_room(max(len(sample.input_ids_L) for sample in samples) + max_new_tokens)
    streams = [engine.text_stream(sample, Sampling(max_new_tokens)) for sample in samples]
    decoder = engine.decoder
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
