"""One model behind the endpoints: admission, prompts, jobs, and their way back to the event loop."""

import asyncio
import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from grace.data.template import Sample
from grace.runtime.sampling import MAX_SEED, Sampler, Sampling
from grace.runtime.serve.body import Bodies
from grace.runtime.serve.errors import ApiError, bad_request
from grace.runtime.serve.images import ImageRules, Images
from grace.runtime.serve.logits import Adjustments
from grace.runtime.serve.metrics import Metrics
from grace.runtime.serve.prompts import Prompts
from grace.runtime.serve.scheduler import Job, Output, Scheduler, stopping
from grace.runtime.serve.schema import Request
from grace.runtime.text_stream import TextStream

# A token of a picture is 24 KB of pixels: a queue of prompts full of pictures would otherwise take many gigabytes.
MAX_PIXEL_BYTES = 2 << 30


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        queue: answers that may wait beyond those that have a row.
        body: bytes of one request.
        seconds: of one request, its arrival and waiting included.
        body_seconds: in which a request's body must arrive.
        pixels: larger pictures are scaled down to this area; None leaves it to the model and the context.
    """

    queue: int = 128
    body: int = 32 << 20
    seconds: float = 600.0
    body_seconds: float = 60.0
    pixels: int | None = None


class Answers:
    """The answers to one request, as they arrive."""

    def __init__(self, jobs: int, prompt_tokens: int):
        self.prompt_tokens = prompt_tokens
        self.jobs: list[Job] = []
        self._open = jobs
        self._arrived: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()

    def receive(self, index: int, output: Output) -> None:
        """Takes what a step added to one of them."""
        self._arrived.put_nowait((index, output))

    async def next(self) -> list[tuple[int, Output]]:
        """All that has arrived since the last call, at least one output; empty once all answers have ended.

        Raises:
            ApiError: one of them cannot be finished.
        """
        if not self._open:
            return []
        found = [await self._arrived.get()]
        while not self._arrived.empty():
            found.append(self._arrived.get_nowait())
        for _, output in found:
            if output.error is not None:
                raise output.error
            self._open -= output.last
        return found

    def cancel(self) -> None:
        """Frees the rows of what is not finished."""
        for job in self.jobs:
            job.cancelled = True


class Service:
    """Everything behind the endpoints.

    Args:
        engine: a loaded model: `processor`, `decoder`, `ends`.
        name: what clients call the model.
    """

    def __init__(self, engine: Any, name: str, weight_bytes: int, limits: Limits, rules: ImageRules):
        self.engine, self.name, self.limits = engine, name, limits
        self.context, self.rows, self.weight_bytes = engine.decoder.context, engine.decoder.rows, weight_bytes
        self.started = int(time.time())
        self.metrics = Metrics(name, weight_bytes, self.rows)
        self.bodies = Bodies(limits.body, seconds=min(limits.body_seconds, limits.seconds))
        self.images = Images(rules)
        self.prompts = Prompts(engine.processor, self.images, self.context, limits.pixels)
        self.scheduler = Scheduler(engine.decoder, self._deliver, self.metrics)
        self.taken = 0  # answers admitted and not finished
        self.pixels = 0  # bytes of their pictures
        self.stopping = False
        self._vocabulary = len(engine.processor.tokenizer)

    def start(self) -> None:
        """Starts the scheduler; to be called on the event loop."""
        self._loop = asyncio.get_running_loop()
        self.scheduler.start()

    def drain(self) -> None:
        """Takes no more requests; those that are being answered go on."""
        self.stopping = True
        self.scheduler.drain()

    async def stop(self) -> None:
        """Breaks off what is left."""
        self.stopping = True
        await asyncio.to_thread(self.scheduler.stop)
        self.prompts.close()
        await self.images.close()

    def check_model(self, name: str | None) -> None:
        """404 for another model's name."""
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"the model {name[:100]!r} does not exist: this server has {self.name!r}",
                "model",
                "model_not_found",
            )

    @contextlib.contextmanager
    def admitted(self, answers: int) -> Iterator[None]:
        """Holds places for a request until the block ends.

        Raises:
            ApiError: 429 where rows and queue are full, 503 while stopping.
        """
        if self.stopping:
            raise stopping()
        room = self.rows + self.limits.queue
        if answers > room:
            raise bad_request(f"{answers} answers are more than this server takes at once ({room})", "n")
        if self.taken + answers > room:
            self.metrics.refused.inc()
            raise ApiError(
                429, "the queue is full: try again later", code="queue_full", retry_after=self._retry_after()
            )
        self.taken += answers
        try:
            yield
        finally:
            self.taken -= answers

    def _retry_after(self) -> int:
        """Seconds in which a place becomes free, by what answers have taken so far."""
        (family,) = self.metrics.answer_seconds.collect()
        values = {sample.name: sample.value for sample in family.samples}
        count = values["grace_answer_seconds_count"]
        return min(60, max(1, math.ceil(values["grace_answer_seconds_sum"] / count if count else 1)))

    @contextlib.contextmanager
    def holding(self, samples: Sequence[Sample]) -> Iterator[None]:
        """Counts the pixels of waiting prompts until the block ends.

        Raises:
            ApiError: 429 where they would be more than the memory for them.
        """
        size = sum(sample.pixel_values_PD.nbytes for sample in samples if sample.pixel_values_PD is not None)
        if self.pixels + size > max(size, MAX_PIXEL_BYTES):
            self.metrics.refused.inc()
            raise ApiError(
                429,
                "too many pictures are waiting: try again later",
                code="overloaded",
                retry_after=self._retry_after(),
            )
        self.pixels += size
        try:
            yield
        finally:
            self.pixels -= size

    def submit(self, request: Request, samples: Sequence[Sample], arrived: float) -> Answers:
        """Starts `n` answers to each sample.

        Args:
            arrived: `time.monotonic()` when the request began.

        Raises:
            ApiError: settings that cannot be met.
        """
        answers = Answers(len(samples) * (request.n or 1), sum(len(sample.input_ids_L) for sample in samples))
        deadline = arrived + self.limits.seconds
        bias = self._bias(request)
        for sample in samples:
            sampling = self._sampling(request, len(sample.input_ids_L))
            for choice in range(request.n or 1):
                answers.jobs.append(self._job(request, sample, sampling, choice, answers, deadline, bias))
        self.scheduler.submit(answers.jobs)
        return answers

    def _job(
        self, request: Request, sample: Sample, sampling: Sampling, choice: int, answers: Answers,
        deadline: float, bias: dict[int, float],
    ) -> Job:  # fmt: skip
        if sampling.seed is not None:  # else all choices would be the same
            sampling = replace(sampling, seed=(sampling.seed + choice) & MAX_SEED)
        index = len(answers.jobs)
        adjustments = Adjustments(request.presence_penalty or 0.0, request.frequency_penalty or 0.0, bias)
        ends = () if request.ignore_eos else self.engine.ends
        return Job(
            sample,
            Sampler(sampling, sample.input_ids_L.tolist(), self.engine.decoder.device),
            TextStream(self.engine.processor.tokenizer, sampling.stop, ends, sampling.max_new_tokens),
            partial(answers.receive, index),
            deadline,
            adjustments if adjustments.needed else None,
            request.likeliest(),
        )

    def _sampling(self, request: Request, prompt_tokens: int) -> Sampling:
        room = self.context - prompt_tokens
        limit = request.limit() or room
        if limit > room:
            raise bad_request(
                f"{limit} tokens after a prompt of {prompt_tokens} are more than this server's context of {self.context}",
                "max_tokens",
                "context_length_exceeded",
            )
        stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
        return Sampling(
            limit,
            1.0 if request.temperature is None else request.temperature,
            1.0 if request.top_p is None else request.top_p,
            max(0, request.top_k or 0),
            1.0 if request.repetition_penalty is None else request.repetition_penalty,
            None if request.seed is None else request.seed & MAX_SEED,
            stop,
        )

    def _bias(self, request: Request) -> dict[int, float]:
        bias = {}
        for name, value in (request.logit_bias or {}).items():
            if not (name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < self._vocabulary):
                raise bad_request(f"{name[:20]!r} is no token id", "logit_bias")
            bias[int(name)] = value
        return bias

    def _deliver(self, outputs: list[tuple[Job, Output]]) -> None:
        """From the scheduler's thread to the event loop."""

        def receive() -> None:
            for job, output in outputs:
                job.receive(output)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(receive)
