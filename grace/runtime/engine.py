"""A loaded model that answers prompts about pictures.

import grace.runtime
engine = grace.runtime.load("runs/demo/awq")
engine.generate(["picture.png"], "Describe the picture.").text
for text in engine.stream(["picture.png"], "Describe the picture."): print(text, end="")
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grace.checked_files import reason_of
from grace.data.records import IMAGE_MARK, Turn
from grace.data.template import Sample, encode_prompt
from grace.errors import UserError
from grace.models.processor import load_processor
from grace.runtime.graphs import decoder_for, prepare
from grace.runtime.head import Head
from grace.runtime.int4_linear import set_kernel
from grace.runtime.loading import checkpoint_kind, load_model, require_tokenizer
from grace.runtime.pictures import Picture, load_picture
from grace.runtime.sampling import Sampler, Sampling
from grace.runtime.text_stream import TextStream

CONTEXT_STEP = 1024  # the cache grows by whole steps of so many tokens


@dataclass(frozen=True)
class GenerationResult:
    """One answer.

    Attributes:
        text: the answer without special tokens.
        tokens: its token ids, the end token included when the model gave one.
        prompt_tokens: length of the prompt, visual tokens included.
        first_token_s: seconds to the first token (pictures, prompt and one step).
        tokens_per_s: decoding rate after the first token; None for a single token.
        finish_reason: `stop` (an end token or a stop text) or `length`.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    first_token_s: float
    tokens_per_s: float | None
    finish_reason: str


class Answer:
    """One answer on its way: iterate to get its text piece by piece.

    Attributes:
        stream: tokens and the reason for the end.
    """

    def __init__(self, engine: "Engine", sample: Sample, sampling: Sampling):
        self.sample, self.stream = sample, engine.text_stream(sample, sampling)
        self._sampler = Sampler(sampling, sample.input_ids_L.tolist(), engine.decoder.device)
        self._decoder, self._texts = engine.decoder, list[str]()
        self._times = [time.perf_counter()]

    def __iter__(self) -> Iterator[str]:
        decoder, stream = self._decoder, self.stream
        if stream.finish_reason:
            return
        logits_V = decoder.prefill(0, self.sample)
        try:
            for token in stream.tokens:  # of an iteration that was broken off
                logits_V = decoder.decode([0], [token])[0]
            while True:
                token = self._sampler.next(logits_V)
                self._times.append(time.perf_counter())
                if text := stream.push(token):
                    self._texts.append(text)
                    yield text
                if stream.finish_reason:
                    return
                logits_V = decoder.decode([0], [token])[0]
        finally:
            decoder.release(0)

    def result(self) -> GenerationResult:
        """The whole answer; reads what is left of it."""
        for _ in self:
            pass
        start, first, *rest = self._times
        return GenerationResult(
            "".join(self._texts),
            self.stream.tokens,
            len(self.sample.input_ids_L),
            first - start,
            len(rest) / (rest[-1] - first) if rest else None,
            self.stream.finish_reason or "",
        )


class Engine:
    """A loaded model with its processor and its decoder.

    Args:
        kind: `awq`, `qat` or `plain`.
        context: tokens that prompt, pictures and answer may take together; None grows with what is asked, as
            far as the model goes.
        rows: sequences that the decoder holds side by side.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        kind: str,
        context: int | None = None,
        rows: int = 1,
        head: str = "bf16",
    ):
        self.model, self.processor, self.kind = model, processor, kind
        self._grows = context is None
        self.decoder = decoder_for(model, rows, context or CONTEXT_STEP)
        self.decoder.head = Head(self.decoder.parts.head_VD, head)
        stored = model.generation_config.eos_token_id
        ends = {stored} if isinstance(stored, int) else set(stored or ())
        self.ends = frozenset({*ends, processor.tokenizer.convert_tokens_to_ids("<|im_end|>")})

    def encode(self, turns: Sequence[Turn], images: Sequence[Picture] = ()) -> Sample:
        """A conversation as the decoder's input.

        Raises:
            UserError: a picture that cannot be read, or `<image>` marks that do not match the pictures.
        """
        return encode_prompt(turns, [load_picture(image) for image in images], self.processor)

    def text_stream(self, sample: Sample, sampling: Sampling) -> TextStream:
        """The text of an answer to `sample`, which ends at the latest where the context does."""
        room = self.decoder.context + 1 - len(sample.input_ids_L)
        limit = max(1, min(sampling.max_new_tokens, room))
        return TextStream(self.processor.tokenizer, sampling.stop, self.ends, limit)

    def answer(
        self, turns: Sequence[Turn], images: Sequence[Picture] = (), sampling: Sampling | None = None
    ) -> Answer:
        """Starts an answer to a conversation whose last turn is the user's; one at a time."""
        sampling = sampling or Sampling()
        sample = self.encode(turns, images)
        self.make_room(len(sample.input_ids_L) + sampling.max_new_tokens)
        return Answer(self, sample, sampling)

    def has_room(self, sample: Sample, sampling: Sampling) -> bool:
        """Whether `make_room` would leave the context as it is."""
        wanted = self._context_for(len(sample.input_ids_L) + sampling.max_new_tokens)
        return wanted <= self.decoder.context

    def make_room(self, tokens: int) -> None:
        """Lets the context grow to `tokens`, where it was not fixed and as far as the model goes. Empties all rows."""
        if (wanted := self._context_for(tokens)) > self.decoder.context:
            self.decoder.resize(context=wanted)

    def _context_for(self, tokens: int) -> int:
        if not self._grows:
            return self.decoder.context
        return min(-(-tokens // CONTEXT_STEP) * CONTEXT_STEP, self.decoder.parts.max_context)

    def generate(
        self,
        images: Sequence[Picture],
        prompt: str,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        sampling: Sampling | None = None,
    ) -> GenerationResult:
        """Answers one question about zero or more pictures.

        Args:
            prompt: may place the pictures with one `<image>` each; without marks they come first.
            temperature: 0 decodes greedily.
            top_p: sample from the smallest set of tokens with this probability.
            seed: makes sampling repeatable; the caller's random state is left alone.
            sampling: all settings, in place of the four before.

        Raises:
            UserError: a setting out of range, a picture that cannot be read, marks that do not match.
        """
        settings = sampling or Sampling(max_new_tokens, temperature, top_p, seed=seed)
        return self.answer([question(prompt, len(images))], images, settings).result()

    def stream(
        self,
        images: Sequence[Picture],
        prompt: str,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        sampling: Sampling | None = None,
    ) -> Iterator[str]:
        """As `generate`, but yields the text as it comes."""
        settings = sampling or Sampling(max_new_tokens, temperature, top_p, seed=seed)
        return iter(self.answer([question(prompt, len(images))], images, settings))


def load(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    kernel: str = "auto",
    context: int | None = None,
    rows: int = 1,
    device: str | torch.device | None = None,
    head: str = "bf16",
) -> Engine:
    """Loads an AWQ, QAT or plain Qwen3-VL directory.

    Args:
        dtype: None takes the stored one (bfloat16 for AWQ).
        kernel: for packed layers, see `grace.runtime.int4_linear.KERNELS`.
        context, rows: see `Engine`.
        device: where to run; None is the CPU.
        head: of the output layer, one of `grace.runtime.head.HEADS`: as stored, or rounded while loading.

    Raises:
        UserError: nothing there, damaged, of another model, or a kernel or device that cannot run it.
    """
    if device is not None:
        device = usable_device(device)
    directory = Path(directory)
    kind = checkpoint_kind(directory)
    if kind != "awq" and kernel != "auto":
        raise UserError(f"{directory} holds no packed weights: --kernel applies to AWQ directories only")
    require_tokenizer(directory)
    processor = load_processor(directory)
    model = load_model(directory, dtype)
    if device is not None:
        model = model.to(device)
    set_kernel(model, kernel)
    engine = Engine(model, processor, kind, context, rows, head)
    prepare(engine.decoder)
    return engine


def usable_device(name: str | torch.device) -> torch.device:
    """A device that this machine has.

    Raises:
        UserError: it has none of that name.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # an assertion where torch was built without it
        raise UserError(
            f"--device {name} cannot be used ({reason_of(error)}): give one that this machine has"
        ) from error
    return device


def question(prompt: str, pictures: int) -> Turn:
    """A prompt as the user's turn; pictures that it does not place come first.

    Raises:
        UserError: an empty prompt.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty: pass --prompt TEXT")
    if pictures and IMAGE_MARK not in prompt:
        prompt = f"{IMAGE_MARK}\n" * pictures + prompt
    return Turn("user", prompt)
