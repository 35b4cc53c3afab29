"""Many answers from one decoder: each row takes the next prompt as soon as its answer is done."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from grace.data.template import Sample
from grace.errors import UserError
from grace.runtime.engine import Engine
from grace.runtime.sampling import Sampler, Sampling
from grace.runtime.text_stream import TextStream

Key = TypeVar("Key")


@dataclass(frozen=True)
class Finished(Generic[Key]):
    """An answer, or why there is none."""

    key: Key
    text: str = ""
    tokens: tuple[int, ...] = ()
    prompt_tokens: int = 0
    finish_reason: str = ""
    error: str | None = None


class _Row(Generic[Key]):
    def __init__(self, engine: Engine, key: Key, sample: Sample, sampling: Sampling):
        self.key, self.prompt_tokens = key, len(sample.input_ids_L)
        self.stream: TextStream = engine.text_stream(sample, sampling)
        self.sampler = Sampler(sampling, sample.input_ids_L.tolist(), engine.decoder.device)
        self.texts: list[str] = []

    def take(self, token: int) -> None:
        self.texts.append(self.stream.push(token))

    def finished(self) -> Finished[Key]:
        stream = self.stream
        return Finished(
            self.key,
            "".join(self.texts),
            tuple(stream.tokens),
            self.prompt_tokens,
            stream.finish_reason or "",
        )


def answers(engine: Engine, requests: Iterable[tuple[Key, Sample, Sampling]]) -> Iterator[Finished[Key]]:
    """Answers as they are done, not in the order of the requests.

    A prompt that does not fit the context is answered with the error. A context that may grow does so between
    answers, when no row is in use.
    """
    decoder, waiting = engine.decoder, iter(requests)
    rows: dict[int, _Row[Key]] = {}
    nxt = next(waiting, None)
    while nxt is not None or rows:
        while nxt is not None and len(rows) < decoder.rows:
            key, sample, sampling = nxt
            if rows and not engine.has_room(sample, sampling):
                break  # it grows when the rows are done
            nxt = next(waiting, None)
            try:
                engine.make_room(len(sample.input_ids_L) + sampling.max_new_tokens)
                row = next(free for free in range(decoder.rows) if free not in rows)
                logits_V = decoder.prefill(row, sample)
            except UserError as error:
                yield Finished(key, error=str(error))
                continue
            rows[row] = _Row(engine, key, sample, sampling)
            rows[row].take(rows[row].sampler.next(logits_V))
        yield from _done(engine, rows)
        if rows:
            last = {row: one.stream.tokens[-1] for row, one in rows.items()}
            logits_RV = decoder.decode([*last], [*last.values()])
            for one, logits_V in zip(rows.values(), logits_RV, strict=True):
                one.take(one.sampler.next(logits_V))
            yield from _done(engine, rows)


def _done(engine: Engine, rows: dict[int, _Row[Key]]) -> Iterator[Finished[Key]]:
    for row in [row for row, one in rows.items() if one.stream.finish_reason]:
        engine.decoder.release(row)
        yield rows.pop(row).finished()
