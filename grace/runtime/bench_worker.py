"""One side of `grace bench`: a process that holds one model and measures it when told to.

Two such processes take turns, so that each has its own peak of memory and neither sees the other's allocator.
"""

import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace.data.template import Sample, encode_ids
from grace.errors import UserError

SIDES = ("engine", "library")


@dataclass(frozen=True)
class Setup:
    """What a worker runs.

    Attributes:
        side: `engine` is ours, `library` transformers' own model and `generate`.
        threads: None leaves them as torch sets them.
    """

    directory: Path
    side: str
    kernel: str = "auto"
    head: str = "bf16"
    device: str = "cpu"
    threads: int | None = None


class Worker:
    """Measures one model. Every method returns plain values, for a pipe."""

    def __init__(self, setup: Setup):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if setup.threads:
            torch.set_num_threads(setup.threads)
        self.setup = setup
        self._model: Any = None
        self._decoder: Any = None
        from grace.models.qwen3vl import config_for, skeleton
        from grace.runtime.engine import usable_device

        usable_device(setup.device)
        skeleton(config_for(str(setup.directory)))  # imports what loading would import

    def load(self, cold: bool) -> float:
        """Seconds from nothing to the first token of a prompt of one token.

        Args:
            cold: drops the files from the page cache first, so that they come from disk.
        """
        self._model = self._decoder = None
        gc.collect()
        files = sorted(self.setup.directory.glob("*.safetensors"))
        for file in files:
            _drop(file) if cold else file.read_bytes()
        start = time.perf_counter()
        self._load()
        self._first_token(encode_ids([1]))
        return time.perf_counter() - start

    def prefill(self, tokens: int) -> float:
        """Seconds to the first token after a prompt of so many."""
        sample = _prompt(tokens, 0)
        self._make_room(1, tokens + 1)
        start = time.perf_counter()
        self._first_token(sample)
        return time.perf_counter() - start

    def decode(self, batch: int, context: int, new_tokens: int) -> float:
        """Seconds per decoding step of a batch, prompts of `context` tokens before it: mean over `new_tokens` - 1."""
        samples = [_prompt(context, row) for row in range(batch)]
        times = (
            self._decode_ours(samples, new_tokens) if self._decoder else self._generate(samples, new_tokens)
        )
        return (times[-1] - times[0]) / (len(times) - 1)

    def about(self) -> dict[str, Any]:
        """What runs, the bytes of its weights and of those that one step reads, and the peak of memory so far."""
        from grace.models.qwen3vl import VISION
        from grace.runtime.int4_linear import describe_kernels

        vision = _bytes(self._model.get_submodule(VISION))
        head = self._decoder.head if self._decoder else None
        extra = head.weight_bytes() if head is not None and head.kind != "bf16" else 0
        language = _bytes(self._model) - vision + extra
        embedding: Tensor = self._model.get_input_embeddings().weight
        tied = embedding.data_ptr() == self._model.get_output_embeddings().weight.data_ptr()
        return {
            "side": self.setup.side,
            "kernel": describe_kernels(self._model),
            "language_bytes": language,
            "step_bytes": language if tied and not extra else language - embedding.nbytes,
            "vision_bytes": vision,
            "peak_memory_bytes": _peak(self.setup.device),
            "threads": torch.get_num_threads(),
        }

    def copy_bandwidth(self) -> float:
        """Bytes per second of a copy on this device, read and written ones counted; the median of nine."""
        size = 1 << 28
        source = torch.ones(size, dtype=torch.int8, device=self.setup.device)
        target = torch.empty_like(source)
        times = []
        for _ in range(10):
            self._wait()
            start = time.perf_counter()
            target.copy_(source)
            self._wait()
            times.append(time.perf_counter() - start)
        return 2 * size / sorted(times[1:])[4]

    # ------------------------------------------------------------ parts

    def _load(self) -> None:
        from grace.runtime.graphs import decoder_for
        from grace.runtime.head import Head
        from grace.runtime.int4_linear import set_kernel
        from grace.runtime.loading import load_model

        model = load_model(self.setup.directory, torch.bfloat16)
        if self.setup.device != "cpu":
            model = model.to(self.setup.device)
        self._model = model
        if self.setup.side == "engine":
            set_kernel(model, self.setup.kernel)
            self._decoder = decoder_for(model, 1, 64)
            self._decoder.head = Head(self._decoder.parts.head_VD, self.setup.head)

    def _first_token(self, sample: Sample) -> None:
        if self._decoder:
            int(self._decoder.prefill(0, sample).argmax())
        else:
            self._generate([sample], 1)

    def _make_room(self, rows: int, context: int) -> None:
        from grace.runtime.graphs import prepare

        if self._decoder:
            if self._decoder.rows != rows or self._decoder.context < context:
                self._decoder.resize(rows, context)
            prepare(self._decoder)

    def _decode_ours(self, samples: list[Sample], new_tokens: int) -> list[float]:
        decoder, rows = self._decoder, list(range(len(samples)))
        self._make_room(len(rows), len(samples[0].input_ids_L) + new_tokens)
        tokens = [int(decoder.prefill(row, sample).argmax()) for row, sample in enumerate(samples)]
        times = []
        for _ in range(new_tokens):
            times.append(time.perf_counter())  # of the token before
            tokens = decoder.decode(rows, tokens).argmax(-1).tolist()
        return times

    def _generate(self, samples: list[Sample], new_tokens: int) -> list[float]:
        """When each token was there, by transformers' own `generate`."""
        from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

        times: list[float] = []

        class Clock(StoppingCriteria):
            def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
                times.append(time.perf_counter())
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        ids = torch.stack([sample.input_ids_L for sample in samples]).to(self.setup.device)
        self._model.generation_config.eos_token_id = None  # it would fill in what `config` leaves out
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        with torch.inference_mode():
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=torch.zeros_like(ids),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([Clock()]),
            )
        return times

    def _wait(self) -> None:
        if self.setup.device != "cpu":
            torch.cuda.synchronize(self.setup.device)


def serve(setup: Setup, pipe: Any) -> None:
    """The process: answers (method, arguments) with (result, failure) until it is told None; first of all that it is ready.

    A failure is a `UserError`, or the text of another one.
    """
    try:
        worker = Worker(setup)
        answer: tuple[Any, Any] = None, None
    except Exception as error:  # noqa: BLE001 - told to the other side, as below
        pipe.send((None, _told(error)))
        return
    while True:
        pipe.send(answer)
        if (call := pipe.recv()) is None:
            return
        name, args = call
        try:
            answer = getattr(worker, name)(*args), None
        except Exception as error:  # noqa: BLE001
            answer = None, _told(error)


def _told(error: Exception) -> UserError | str:
    return UserError(str(error)) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _prompt(tokens: int, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    return encode_ids(torch.randint(0, 500, (tokens,), generator=generator).tolist())


def _bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's tensors, each storage once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _drop(file: Path) -> None:
    """Takes a file out of the page cache."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _peak(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
