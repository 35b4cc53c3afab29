"""Continuous batching: answers share the decoder's rows, and join and leave at any step.

One thread owns the decoder. Between two decoding steps it reads waiting prompts into free rows, a bounded number of
tokens at a time, so that who is being answered does not wait long for who arrives. What it produces leaves in one
batch per step through `deliver`, which must not block.
"""

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from grace.data.template import Sample
from grace.errors import UserError
from grace.runtime.sampling import Sampler
from grace.runtime.serve.errors import ApiError
from grace.runtime.serve.logits import Adjustments, Alternatives, alternatives
from grace.runtime.serve.metrics import Metrics
from grace.runtime.text_stream import TextStream

log = logging.getLogger("grace.serve")

FAILED_STEPS = 3  # in a row: the server is not well
PREFILL_TOKENS = 1024  # read between two decoding steps; a longer prompt goes alone


class Rows(Protocol):
    """What the scheduler needs of a decoder: `grace.runtime.decoder.Decoder` has it."""

    rows: int

    def prefill_all(self, rows: Sequence[int], samples: Sequence[Sample]) -> Tensor: ...
    def decode(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor: ...
    def release(self, row: int) -> None: ...


@dataclass(frozen=True)
class Output:
    """What one step adds to an answer.

    Attributes:
        text: certain by now; may be empty.
        tokens: generated so far.
        alternatives: of this step's token, where wanted.
        finish: `stop` or `length` with the last output.
        error: the answer ends here without having finished.
    """

    text: str = ""
    tokens: int = 0
    alternatives: Alternatives | None = None
    finish: str | None = None
    error: ApiError | None = None

    @property
    def last(self) -> bool:
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class Job:
    """One answer.

    Attributes:
        likeliest: alternatives wanted beside each token; None where no log-probabilities are.
        receive: takes the outputs, on whatever thread `deliver` chooses.
        deadline: `time.monotonic()` after which it is broken off.
        cancelled: set by anybody at any time; the row is free at the next step.
    """

    sample: Sample
    sampler: Sampler
    stream: TextStream
    receive: Callable[[Output], None]
    deadline: float
    adjustments: Adjustments | None = None
    likeliest: int | None = None
    cancelled: bool = False
    submitted: float = field(default_factory=time.monotonic)
    row: int = -1
    token: int = -1  # the next one to be decoded

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is the next one, with nothing added to it."""
        sampling = self.sampler.sampling
        return sampling.temperature == 0 and sampling.repetition_penalty == 1 and self.adjustments is None


Deliver = Callable[[list[tuple[Job, Output]]], None]


class Scheduler:
    """Runs jobs on a decoder.

    Args:
        deliver: takes what a step produced; the jobs' `receive` is called by it.
    """

    def __init__(self, decoder: Rows, deliver: Deliver, metrics: Metrics):
        self._decoder, self._deliver, self._metrics = decoder, deliver, metrics
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._free = [*range(decoder.rows)]
        self._outputs: list[tuple[Job, Output]] = []
        self._wake = threading.Condition()
        self._refuses = self._stops = False
        self._failed_steps = 0  # in a row
        self._thread = threading.Thread(target=self._run, name="grace-scheduler", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def well(self) -> bool:
        """Whether it answers: it runs, and its last steps did not all fail, as they do on a lost device."""
        return self.alive and self._failed_steps < FAILED_STEPS

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues jobs, in order.

        Raises:
            ApiError: the server is stopping.
        """
        with self._wake:
            if self._refuses:
                raise stopping()
            self._waiting.extend(jobs)
            self._wake.notify()

    def drain(self) -> None:
        """Takes no more jobs and breaks off those that still wait; the running ones go on."""
        with self._wake:
            self._refuses = True
            self._wake.notify()

    def halt(self) -> None:
        """Breaks everything off; the thread ends after its current step."""
        with self._wake:
            self._refuses = self._stops = True
            self._wake.notify()

    def stop(self) -> None:
        """`halt`, and waits for the thread."""
        self.halt()
        self._thread.join()

    def _run(self) -> None:
        while self._wait_for_work():
            self._drop()
            self._admit()
            self._flush()
            self._step()
            self._flush()
        self._flush()

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._stops or self._waiting or self._running):
                self._wake.wait()
            if self._stops:
                self._outputs += [(job, Output(error=stopping())) for job in (*self._running, *self._waiting)]
            return not self._stops

    def _drop(self) -> None:
        """Ends what nobody waits for any more, what took too long and, when stopping, what has not begun."""
        now = time.monotonic()
        with self._wake:
            waiting = [*self._waiting]
            gone = {job: error for job in waiting if (error := self._over(job, now)) or job.cancelled}
            self._waiting = deque(job for job in waiting if job not in gone)
        for job in [job for job in self._running if job.cancelled or self._over(job, now)]:
            gone[job] = self._over(job, now)
            self._leave(job)
        for job, error in gone.items():
            if job.cancelled:
                self._metrics.cancelled.inc()
            self._outputs.append((job, Output(error=error or _left())))

    def _over(self, job: Job, now: float) -> ApiError | None:
        if now >= job.deadline:
            return ApiError(
                503, "the request took longer than the server allows", code="timeout", retry_after=5
            )
        return stopping() if self._refuses and job.row < 0 else None

    def _admit(self) -> None:
        """Reads prompts into free rows until the tokens of one turn are used up."""
        jobs: list[Job] = []
        budget = PREFILL_TOKENS
        with self._wake:
            while self._waiting and len(jobs) < len(self._free) and budget > 0:
                jobs.append(self._waiting.popleft())
                budget -= len(jobs[-1].sample.input_ids_L)
            self._metrics.queued.set(len(self._waiting))
        for job in jobs:
            self._metrics.queue_seconds.observe(time.monotonic() - job.submitted)
        if jobs:
            self._read(jobs)
        self._metrics.running.set(len(self._running))

    def _read(self, jobs: list[Job]) -> None:
        """Prompts into free rows, in one pass, up to their first tokens."""
        start = time.monotonic()
        for job in jobs:
            job.row = heapq.heappop(self._free)  # the lowest: rows side by side are decoded in one piece
        self._running += jobs
        try:
            logits_RV = self._decoder.prefill_all([job.row for job in jobs], [job.sample for job in jobs])
        except Exception as error:  # noqa: BLE001 - one prompt's failure is not the others'
            if len(jobs) == 1:
                self._fail(jobs, error)
                return
            for job in jobs:  # which one is it? each again, alone
                self._leave(job)
            for job in jobs:
                self._read([job])
            return
        now = time.monotonic()
        self._metrics.prefill_seconds.observe(now - start)
        for job, logits_V in zip(jobs, logits_RV, strict=True):
            self._metrics.first_token_seconds.observe(now - job.submitted)
            self._metrics.prompt_tokens.inc(len(job.sample.input_ids_L))
            job.sample = replace(job.sample, pixel_values_PD=None)  # they are read, and large
            self._try_to_advance(job, logits_V)

    def _step(self) -> None:
        """One token for every running answer."""
        if not self._running:
            return
        jobs = sorted(self._running, key=lambda job: job.row)
        start = time.monotonic()
        try:
            logits_RV = self._decoder.decode([job.row for job in jobs], [job.token for job in jobs])
        except Exception as error:  # noqa: BLE001 - the answers are lost, the server is not
            self._failed_steps += not isinstance(error, UserError)
            self._fail(jobs, error)
            return
        self._failed_steps = 0
        best = logits_RV.argmax(-1).tolist() if any(job.greedy for job in jobs) else []  # one call for all
        for index, job in enumerate(jobs):
            self._try_to_advance(job, logits_RV[index], best[index] if job.greedy else None)
        self._metrics.batch_size.observe(len(jobs))
        self._metrics.step_seconds.observe(time.monotonic() - start)

    def _try_to_advance(self, job: Job, logits_V: Tensor, token: int | None = None) -> None:
        try:
            self._advance(job, logits_V, token)
        except Exception as error:  # noqa: BLE001 - one answer's failure is not the others'
            self._fail([job], error)

    def _advance(self, job: Job, logits_V: Tensor, token: int | None = None) -> None:
        """Draws an answer's next token, where it is not known yet."""
        if token is None:
            adjusted_V = logits_V if job.adjustments is None else job.adjustments.apply(logits_V)
            token = job.sampler.next(adjusted_V)
        job.token = token
        if job.adjustments is not None:
            job.adjustments.count(token)
        known = None if job.likeliest is None else alternatives(logits_V, token, job.likeliest)
        text = job.stream.push(token)
        finish = job.stream.finish_reason
        self._outputs.append((job, Output(text, len(job.stream.tokens), known, finish)))
        if finish:
            self._metrics.answer_seconds.observe(time.monotonic() - job.submitted)
            self._leave(job)

    def _leave(self, job: Job) -> None:
        self._running.remove(job)
        self._decoder.release(job.row)
        heapq.heappush(self._free, job.row)
        self._metrics.running.set(len(self._running))

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        if isinstance(error, UserError):  # what the decoder says of a prompt
            reason = ApiError(400, str(error), code="invalid_prompt")
        else:
            log.error("an answer failed", exc_info=error)
            reason = ApiError(500, "the answer failed: this is the server's fault, its log says more")
        for job in jobs:
            self._outputs.append((job, Output(error=reason)))
            self._leave(job)

    def _flush(self) -> None:
        outputs, self._outputs = self._outputs, []
        if outputs:
            self._metrics.generated_tokens.inc(sum(output.error is None for _, output in outputs))
            self._deliver(outputs)


def stopping() -> ApiError:
    """503: the server is about to end."""
    return ApiError(503, "the server is stopping", code="stopping", retry_after=5)


def _left() -> ApiError:
    return ApiError(499, "the client went away")
