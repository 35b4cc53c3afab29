"""What clients get: OpenAI's objects, whole and in chunks."""

import time
import uuid
from itertools import accumulate
from typing import Any

from grace.runtime.serve.logits import Alternatives
from grace.runtime.serve.scheduler import Output
from grace.runtime.text_stream import token_bytes


class Writer:
    """Writes the answers of one request.

    Args:
        tokenizer: names the tokens in log-probabilities.
        choices: how many there are.
    """

    kind = chunk_kind = prefix = ""

    def __init__(self, model: str, tokenizer: Any, choices: int, prompt_tokens: int):
        self._tokenizer, self._prompt_tokens = tokenizer, prompt_tokens
        self._tokens, self._offsets = [0] * choices, [0] * choices
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._outputs: list[list[Output]] = [[] for _ in range(choices)]

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        return []

    def chunk(self, index: int, output: Output) -> dict[str, Any] | None:
        """One step of one answer; None where it changes nothing that shows."""
        self._tokens[index] = output.tokens
        if not (output.text or output.finish or output.alternatives):
            return None
        logprobs = self._logprobs(index, [output])
        return self._chunk([self._delta(index, output.text, output.finish, logprobs)])

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk that follows the last with `stream_options.include_usage`."""
        return self._chunk([]) | {"usage": self._usage()}

    def add(self, index: int, output: Output) -> None:
        """Keeps a step for `whole`."""
        self._tokens[index] = output.tokens
        self._outputs[index].append(output)

    def whole(self) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = [
            self._choice(
                index,
                "".join(one.text for one in outputs),
                outputs[-1].finish,
                self._logprobs(index, outputs),
            )
            for index, outputs in enumerate(self._outputs)
        ]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def _usage(self) -> dict[str, int]:
        tokens = sum(self._tokens)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self._prompt_tokens + tokens,
        }

    def _delta(self, index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        raise NotImplementedError

    def _choice(self, index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, index: int, outputs: list[Output]) -> dict[str, Any] | None:
        known = [output.alternatives for output in outputs if output.alternatives is not None]
        return self._logprobs_of(index, known) if known else None

    def _logprobs_of(self, index: int, known: list[Alternatives]) -> dict[str, Any]:
        raise NotImplementedError

    def _name(self, token: int) -> str:
        return token_bytes(self._tokenizer, token).decode("utf-8", "replace")


class ChatWriter(Writer):
    """/v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self) -> list[dict[str, Any]]:
        return [
            self._chunk(
                [
                    {
                        "index": index,
                        "delta": {"role": "assistant", "content": ""},
                        "logprobs": None,
                        "finish_reason": None,
                    }
                ]
            )
            for index in range(len(self._tokens))
        ]

    def _delta(self, index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _choice(self, index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs_of(self, index: int, known: list[Alternatives]) -> dict[str, Any]:
        return {
            "content": [
                self._entry(one.token, one.logprob)
                | {"top_logprobs": [self._entry(token, value) for token, value in one.likeliest]}
                for one in known
            ],
            "refusal": None,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(self._tokenizer, token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": [*raw]}


class CompletionWriter(Writer):
    """/v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def _delta(self, index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    _choice = _delta

    def _logprobs_of(self, index: int, known: list[Alternatives]) -> dict[str, Any]:
        names = [self._name(one.token) for one in known]
        *offsets, self._offsets[index] = accumulate(map(len, names), initial=self._offsets[index])
        return {
            "tokens": names,
            "token_logprobs": [_finite(one.logprob) for one in known],
            "top_logprobs": [
                {self._name(token): _finite(value) for token, value in one.likeliest} for one in known
            ],
            "text_offset": offsets,
        }


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what is all but impossible."""
    return max(logprob, -9999.0)
