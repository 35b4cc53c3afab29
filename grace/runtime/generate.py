"""`grace generate DIR --image FILE... --prompt TEXT`: answers about pictures, from any GRACE directory.

An AWQ directory runs on packed weights; a QAT or a plain one runs dense. Shape suffix: L sequence.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from grace.data.records import IMAGE_MARK, Turn, open_image
from grace.data.template import Sample, encode_prompt
from grace.errors import UserError
from grace.models.processor import load_processor
from grace.runtime.hf_quantizer import register
from grace.runtime.int4_linear import describe_kernels, set_kernel
from grace.runtime.loading import checkpoint_kind, load_model, require_tokenizer

register()


@dataclass(frozen=True)
class GenerationResult:
    """One answer.

    Attributes:
        text: the answer without special tokens.
        tokens: its token ids, the end token included when the model gave one.
        prompt_tokens: length of the prompt, visual tokens included.
        first_token_s: seconds to the first token (pictures, prompt and one step).
        tokens_per_s: decoding rate after the first token; None for a single token.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    first_token_s: float
    tokens_per_s: float | None


class _Clock(BaseStreamer):
    """Notes when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class Engine:
    """A loaded model with its processor."""

    model: Any
    processor: Any
    kind: str

    def generate(
        self,
        images: Sequence[str | Path | Image.Image],
        prompt: str,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> GenerationResult:
        """Answers one question about zero or more pictures.

        Args:
            prompt: may place the pictures with one `<image>` each; without marks they come first.
            temperature: 0 decodes greedily.
            top_p: sample from the smallest set of tokens with this probability.
            seed: makes sampling repeatable; the caller's random state is left alone.

        Raises:
            UserError: a setting out of range, a picture that cannot be read, marks that do not match.
        """
        _check_settings(prompt, max_new_tokens, temperature, top_p)
        pictures = [_picture(image) for image in images]
        if pictures and IMAGE_MARK not in prompt:
            prompt = f"{IMAGE_MARK}\n" * len(pictures) + prompt
        sample = encode_prompt([Turn("user", prompt)], pictures, self.processor)
        config = generation_config(self.model, self.processor, max_new_tokens, temperature, top_p)
        clock, start = _Clock(), time.perf_counter()
        with _seeded(seed):
            tokens = generate_tokens(self.model, sample, config, streamer=clock)
        arrivals = clock.times[1:]  # the first `put` brings the prompt
        decoding = arrivals[-1] - arrivals[0]
        return GenerationResult(
            self.processor.tokenizer.decode(tokens, skip_special_tokens=True),
            tokens,
            len(sample.input_ids_L),
            arrivals[0] - start,
            (len(arrivals) - 1) / decoding if decoding > 0 else None,
        )


def load(directory: str | Path, dtype: torch.dtype | None = None, kernel: str = "auto") -> Engine:
    """Loads an AWQ, QAT or plain Qwen3-VL directory.

    Args:
        dtype: None takes the stored one (bfloat16 for AWQ).
        kernel: for packed layers, see `grace.runtime.int4_linear.KERNELS`.

    Raises:
        UserError: nothing there, damaged, of another model, or a kernel that cannot run it.
    """
    directory = Path(directory)
    kind = checkpoint_kind(directory)
    if kind != "awq" and kernel != "auto":
        raise UserError(f"{directory} holds no packed weights: --kernel applies to AWQ directories only")
    require_tokenizer(directory)
    processor = load_processor(directory)
    model = load_model(directory, dtype)
    set_kernel(model, kernel)
    return Engine(model, processor, kind)


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


def _picture(image: str | Path | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        return open_image(Path(image), "--image")
    except UserError as error:
        reason = "no such file" if isinstance(error.__cause__, FileNotFoundError) else error.__cause__
        raise UserError(
            f"the picture {image} cannot be read ({reason}): pass another with --image"
        ) from error


def _check_settings(prompt: str, max_new_tokens: int, temperature: float, top_p: float) -> None:
    if not prompt.strip():
        raise UserError("the prompt is empty: pass --prompt TEXT")
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens} is out of range: at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"--temperature {temperature} is out of range: 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p} is out of range: above 0, at most 1")


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def run_generate(args: argparse.Namespace) -> int:
    """Entry point of `grace generate`."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    _check_settings(args.prompt, args.max_new_tokens, args.temperature, args.top_p)
    engine = load(args.directory, kernel=args.kernel)
    result = engine.generate(
        args.image or [], args.prompt, args.max_new_tokens, args.temperature, args.top_p, args.seed
    )
    # Only now: a picture that cannot be read is one line on stderr, not a second one.
    about = f"{engine.kind}, {engine.model.dtype}, {describe_kernels(engine.model)}"
    print(f"{args.directory}: {about}", file=sys.stderr)
    rate = f", {result.tokens_per_s:.1f} tokens/s" if result.tokens_per_s else ""
    print(f"{len(result.tokens)} tokens, first after {result.first_token_s:.2f} s{rate}", file=sys.stderr)
    print(json.dumps({**asdict(result), "kind": engine.kind}) if args.json else result.text)
    return 0
