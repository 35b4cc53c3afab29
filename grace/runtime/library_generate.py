"""The library's own `generate` on one of our prompts: what the engine is compared with.

Shape suffix: L sequence.
"""

from typing import Any

import torch
from transformers import GenerationConfig

from grace.data.template import Sample


def generation_config(
    model: Any, processor: Any, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0
) -> GenerationConfig:
    """Plain decoding: what the caller asked for, and of the model's own defaults only the end tokens."""
    tokenizer = processor.tokenizer
    stored = model.generation_config.eos_token_id
    ends = {stored} if isinstance(stored, int) else set(stored or ())
    ends.add(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    )
    return GenerationConfig(
        **{"do_sample": False, **sampling},
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.inference_mode()
def generate_tokens(model: Any, sample: Sample, config: GenerationConfig, streamer: Any = None) -> list[int]:
    """The new token ids after a prompt.

    `model.generate` sets the rotary offset of each call itself, so that a prompt with pictures leaves
    nothing behind for the next one.
    """
    output = model.generate(**model_inputs(sample, model.device), generation_config=config, streamer=streamer)
    return output[0, len(sample.input_ids_L) :].tolist()


def model_inputs(sample: Sample, device: Any) -> dict[str, Any]:
    """One prompt as the model's keyword arguments, batch dimension added."""
    inputs = {
        "input_ids": sample.input_ids_L[None],
        "attention_mask": torch.ones_like(sample.input_ids_L)[None],
        "mm_token_type_ids": sample.mm_token_type_ids_L[None],
    }
    if sample.pixel_values_PD is not None and sample.image_grid_thw_N3 is not None:
        inputs |= {"pixel_values": sample.pixel_values_PD, "image_grid_thw": sample.image_grid_thw_N3}
    return {name: tensor.to(device) for name, tensor in inputs.items()}
