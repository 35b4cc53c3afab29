"""Answers share the decoder's rows: each gets its own tokens, and nobody's trouble is the others'."""

import threading
import time
from typing import Any

import pytest
import torch
from live_server import MadeUpDecoder

from grace.data.template import encode_ids
from grace.errors import UserError
from grace.runtime.sampling import Sampler, Sampling
from grace.runtime.serve.errors import ApiError
from grace.runtime.serve.logits import Adjustments, alternatives
from grace.runtime.serve.metrics import Metrics
from grace.runtime.serve.scheduler import PREFILL_TOKENS, Job, Output, Scheduler


class Counting:
    """Stands for a TextStream: the text of a token is its number."""

    def __init__(self, limit: int):
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._limit = limit

    def push(self, token: int) -> str:
        self.tokens.append(token)
        if len(self.tokens) == self._limit:
            self.finish_reason = "length"
        return f"{token} "


class Desk:
    """A scheduler over a made-up decoder, and what its jobs have received."""

    def __init__(self, **options: Any):
        self.decoder = MadeUpDecoder(**options)
        self.metrics = Metrics("x", 0, self.decoder.rows)
        self.scheduler = Scheduler(self.decoder, self._deliver, self.metrics)
        self.received: dict[Job, list[Output]] = {}
        self._news = threading.Condition()

    def _deliver(self, outputs: list[tuple[Job, Output]]) -> None:
        with self._news:
            for job, output in outputs:
                self.received[job].append(output)
            self._news.notify_all()

    def job(self, prompt: list[int], limit: int, seconds: float = 60, **options: Any) -> Job:
        stream: Any = Counting(limit)
        job = Job(
            encode_ids(prompt),
            Sampler(Sampling()),
            stream,
            lambda _: None,
            time.monotonic() + seconds,
            **options,
        )
        self.received[job] = []
        return job

    def wait(self, *jobs: Job) -> None:
        with self._news:
            done = self._news.wait_for(
                lambda: all(self.received[job] and self.received[job][-1].last for job in jobs), 20
            )
        assert done

    def wait_until(self, holds: Any) -> None:
        with self._news:
            assert self._news.wait_for(holds, 20)

    def text(self, job: Job) -> str:
        return "".join(output.text for output in self.received[job])

    def __enter__(self) -> "Desk":
        self.scheduler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.decoder.gate.set()
        self.scheduler.stop()
        assert not self.scheduler.alive


def test_more_answers_than_rows_each_with_its_own_tokens():
    with Desk(rows=3) as desk:
        jobs = [desk.job([10 + i, 50 + i, 90 + i], limit=3 + i) for i in range(8)]
        desk.scheduler.submit(jobs)
        desk.wait(*jobs)
        for i, job in enumerate(jobs):
            prompt = [10 + i, 50 + i, 90 + i]
            assert desk.text(job).split() == [str(prompt[k % 3]) for k in range(3 + i)]
            assert desk.received[job][-1].finish == "length" and desk.received[job][-1].tokens == 3 + i
        assert max(map(len, desk.decoder.batches)) == 3
        assert desk.decoder.taken == 0


def test_answers_join_and_leave_while_others_run():
    with Desk(rows=4) as desk:
        desk.decoder.gate.clear()
        first = desk.job([1, 2], limit=50)
        desk.scheduler.submit([first])
        desk.wait_until(lambda: desk.received[first])
        second = desk.job([3, 4], limit=2)
        desk.scheduler.submit([second])
        desk.decoder.gate.set()
        desk.wait(second)
        desk.wait(first)
        sizes = [len(batch) for batch in desk.decoder.batches]
        assert sizes[0] == 1 and 2 in sizes and sizes[-1] == 1


def test_long_prompts_do_not_all_go_before_the_next_step():
    with Desk(rows=4, context=10**6, vocabulary=4000) as desk:
        desk.decoder.gate.clear()
        jobs = [desk.job([i] * PREFILL_TOKENS, limit=4) for i in range(3)]
        desk.scheduler.submit(jobs)
        desk.wait_until(lambda: desk.received[jobs[0]])
        assert len(desk.decoder.prompts_read) == 1  # the second waits for a step
        desk.decoder.gate.set()
        desk.wait(*jobs)
        assert [len(batch) for batch in desk.decoder.batches[:3]] == [1, 2, 3]


def test_cancelled_answers_free_their_rows():
    with Desk(rows=1) as desk:
        endless, waiting, after = desk.job([1], 10**9), desk.job([2], 5), desk.job([3], 2)
        desk.scheduler.submit([endless, waiting, after])
        desk.wait_until(lambda: len(desk.received[endless]) > 3)
        waiting.cancelled = endless.cancelled = True
        desk.wait(after, endless, waiting)
        assert desk.text(waiting) == "" and desk.text(after).split() == ["3", "3"]
        assert [2] not in desk.decoder.prompts_read
        assert "grace_cancelled_requests_total 2.0" in desk.metrics.text().decode()


def test_deadlines_end_waiting_and_running_answers():
    with Desk(rows=1) as desk:
        running, waiting = desk.job([1], 10**9, seconds=0.3), desk.job([2], 5, seconds=0.1)
        desk.scheduler.submit([running, waiting])
        desk.wait(running, waiting)
        for job in (running, waiting):
            error = desk.received[job][-1].error
            assert error is not None and (error.status, error.code) == (503, "timeout")


def test_a_failing_prompt_is_alone():
    with Desk(rows=2) as desk:
        desk.decoder.broken = {66}
        fine, broken, later = desk.job([1], 4), desk.job([66], 4), desk.job([2], 4)
        desk.scheduler.submit([fine, broken, later])
        desk.wait(fine, broken, later)
        assert desk.received[broken][0].error.status == 500  # type: ignore[union-attr]
        assert desk.text(fine).split() == ["1"] * 4 and desk.text(later).split() == ["2"] * 4


def test_a_failing_prompt_among_several_is_alone_too():
    with Desk(rows=4) as desk:
        desk.decoder.broken = {66}
        jobs = [desk.job([1], 3), desk.job([66], 3), desk.job([2], 3)]
        desk.decoder.gate.clear()
        first = desk.job([9], 3)
        desk.scheduler.submit([first])
        desk.wait_until(lambda: desk.received[first])
        desk.scheduler.submit(jobs)  # they are read in one pass
        desk.decoder.gate.set()
        desk.wait(first, *jobs)
        assert [desk.text(job).split() for job in jobs] == [["1"] * 3, [], ["2"] * 3]
        assert desk.received[jobs[1]][0].error.status == 500 and desk.decoder.taken == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("error", [RuntimeError("no memory"), UserError("the context is full")])
def test_a_failing_step_ends_its_answers_and_nothing_else(monkeypatch, error):
    with Desk(rows=2) as desk:
        decode = desk.decoder.decode
        failures = [error]
        monkeypatch.setattr(
            desk.decoder,
            "decode",
            lambda *a: decode(*a) if not failures else (_ for _ in ()).throw(failures.pop()),
        )
        lost = desk.job([1], 4)
        desk.scheduler.submit([lost])
        desk.wait(lost)
        found = desk.received[lost][-1].error
        assert found is not None and found.status == (400 if isinstance(error, UserError) else 500)
        assert "no memory" not in found.message
        after = desk.job([2], 4)
        desk.scheduler.submit([after])
        desk.wait(after)
        assert desk.text(after).split() == ["2"] * 4


def test_draining_finishes_what_runs_and_refuses_the_rest():
    with Desk(rows=1) as desk:
        desk.decoder.gate.clear()
        running, waiting = desk.job([1], 5), desk.job([2], 5)
        desk.scheduler.submit([running, waiting])
        desk.wait_until(lambda: desk.received[running])
        desk.scheduler.drain()
        with pytest.raises(ApiError) as refused:
            desk.scheduler.submit([desk.job([3], 1)])
        assert refused.value.status == 503
        desk.decoder.gate.set()
        desk.wait(running, waiting)
        assert len(desk.text(running).split()) == 5 and desk.received[waiting][-1].error.status == 503  # type: ignore[union-attr]


def test_stopping_breaks_off_what_runs():
    with Desk(rows=1) as desk:
        endless, waiting = desk.job([1], 10**9), desk.job([2], 5)
        desk.scheduler.submit([endless, waiting])
        desk.wait_until(lambda: desk.received[endless])
        desk.scheduler.stop()
        for job in (endless, waiting):
            assert desk.received[job][-1].error.status == 503  # type: ignore[union-attr]


def test_penalties_and_biases_follow_the_formula():
    logits_V = torch.tensor([1.0, 2.0, 3.0, 4.0])
    adjust = Adjustments(0.5, 0.25, {0: 10.0})
    assert adjust.needed and not Adjustments(0, 0, {}).needed
    for token in (3, 3, 1):
        adjust.count(token)
    torch.testing.assert_close(
        adjust.apply(logits_V), torch.tensor([11.0, 2.0 - 0.5 - 0.25, 3.0, 4.0 - 0.5 - 0.5])
    )
    assert logits_V.tolist() == [1, 2, 3, 4]


def test_alternatives_are_of_the_models_distribution():
    logits_V = torch.tensor([0.0, 1.0, 2.0, -1e30])
    found = alternatives(logits_V, 3, 2)
    expected = logits_V.double().log_softmax(-1)
    assert [token for token, _ in found.likeliest] == [2, 1]
    assert found.likeliest[0][1] == pytest.approx(float(expected[2]), abs=1e-6)
    assert len(alternatives(logits_V, 0, 20).likeliest) == 4


def test_penalties_change_what_is_drawn():
    with Desk(rows=1) as desk:
        desk.decoder.faithful = False
        job = desk.job([7], 4, adjustments=Adjustments(0, 15.0, {9: 30.0}), likeliest=1)
        desk.scheduler.submit([job])
        desk.wait(job)
        # 30 - 15 n for token 9 against 20 - 15 n for token 7; what is reported is the model's own view.
        assert desk.text(job).split() == ["9", "7", "9", "7"]
        assert all(output.alternatives.likeliest[0][0] == 7 for output in desk.received[job])  # type: ignore[union-attr]


def test_metrics_of_a_scheduler():
    with Desk(rows=2) as desk:
        jobs = [desk.job([1, 2, 3], 4), desk.job([4], 4)]
        desk.scheduler.submit(jobs)
        desk.wait(*jobs)
    text = desk.metrics.text().decode()
    for line in (
        "grace_prompt_tokens_total 4.0", "grace_generated_tokens_total 8.0", "grace_first_token_seconds_count 2.0",
        "grace_answer_seconds_count 2.0", 'grace_weight_bytes{model="x"} 0.0', 'grace_rows{model="x"} 2.0',
        "grace_batch_size_sum 6.0",
    ):  # fmt: skip
        assert line in text, line
