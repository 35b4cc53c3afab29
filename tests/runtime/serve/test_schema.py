"""What requests may say, and what is said about those that may not."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace.runtime.serve.body import MAX_STRUCTURE, parse
from grace.runtime.serve.errors import ApiError
from grace.runtime.serve.schema import read_chat, read_completion

HELLO = [{"role": "user", "content": "Hello"}]


def part(kind: str, value) -> list:
    return [{"role": "user", "content": [{"type": kind, kind: value}]}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": ["Hello"]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content"),
        ({"messages": [{"content": "Hello"}]}, "messages.0.role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages.0.colour"),
        ({"messages": part("text", 7)}, "messages.0.content.0.text"),
        ({"messages": part("audio", {})}, "messages.0.content.0"),
        ({"messages": part("image_url", "data:,")}, "messages.0.content.0.image_url"),
        ({"messages": part("image_url", {"url": None})}, "messages.0.content.0.image_url.url"),
        ({"messages": part("image_url", {"url": "x", "detail": "much"})}, "messages.0.content.0.image_url.detail"),
        ({"messages": [{**part("image_url", {"url": "x"})[0], "role": "system"}]}, "messages.0.content"),
        ({"n": -1}, "n"), ({"n": 0}, "n"), ({"n": 1000}, "n"), ({"n": 1.0}, "n"), ({"n": "1"}, "n"), ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"), ({"max_completion_tokens": -5}, "max_completion_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"), ({"temperature": 2.1}, "temperature"), ({"temperature": "1"}, "temperature"),
        ({"temperature": float("inf")}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_p": 1.1}, "top_p"),
        ({"top_p": []}, "top_p"), ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": "x"}, "frequency_penalty"), ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"), ({"seed": 0.5}, "seed"), ({"stop": ""}, "stop"), ({"stop": [""]}, "stop.0"),
        ({"stop": 5}, "stop"), ({"stop": ["x"] * 99}, "stop"), ({"stop": [1]}, "stop.0"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"), ({"logit_bias": []}, "logit_bias"),
        ({"logprobs": 1}, "logprobs"), ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"), ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include": 1}}, "stream_options.include"),
        ({"model": 7}, "model"), ({"user": 7}, "user"),
        ({"response_format": {"type": "json_object"}}, "response_format"), ({"response_format": 1}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"), ({"tool_choice": "auto"}, "tool_choice"),
        ({"functions": [{}]}, "functions"), ({"modalities": ["audio"]}, "modalities"), ({"store": True}, "store"),
        ({"audio": {}}, "audio"), ({"frobnicate": 1}, "frobnicate"), ({"prompt": "x"}, "prompt"),
    ],
)  # fmt: skip
def test_wrong_chat_requests_name_the_field(fields, param):
    with pytest.raises(ApiError) as refused:
        read_chat({"messages": HELLO} | fields)
    error = refused.value.body()["error"]
    assert (refused.value.status, error["param"]) == (400, param), error
    assert error["type"] == "invalid_request_error" and "#" not in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": ["x", ""]}, "prompt"),
        ({"prompt": 7}, "prompt"), ({"prompt": {}}, "prompt"), ({"prompt": ["x", 7]}, "prompt.1"),
        ({"prompt": [1, "x"]}, "prompt.1"), ({"prompt": [[1], "x"]}, "prompt.1"), ({"prompt": [[]]}, "prompt"),
        ({"prompt": [True]}, "prompt"), ({"prompt": ["x"] * 65}, "prompt"),
        ({"logprobs": 6}, "logprobs"), ({"logprobs": True}, "logprobs"), ({"echo": True}, "echo"), ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"), ({"messages": HELLO}, "messages"), ({"max_completion_tokens": 4}, "max_completion_tokens"),
    ],
)  # fmt: skip
def test_wrong_completion_requests_name_the_field(fields, param):
    with pytest.raises(ApiError) as refused:
        read_completion({"prompt": "x"} | fields)
    assert (refused.value.status, refused.value.param) == (400, param), refused.value.message


def test_null_is_absent_and_what_asks_for_nothing_is_accepted():
    names = (
        "model temperature top_p n stop seed stream stream_options max_tokens max_completion_tokens logprobs "
        "top_logprobs tools tool_choice response_format logit_bias user metadata presence_penalty"
    )
    request = read_chat({"messages": HELLO} | dict.fromkeys(names.split()))
    assert request.limit() is None and request.likeliest() is None
    request = read_chat(
        {
            "messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}, *HELLO],
            "response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "store": False, "user": "me",
            "parallel_tool_calls": True, "service_tier": "auto", "modalities": ["text"], "n": 2, "temperature": 1,
            "max_tokens": 5, "max_completion_tokens": 3, "logprobs": True, "stop": ["a"], "seed": -1,
        }
    )  # fmt: skip
    assert request.limit() == 3 and request.likeliest() == 0 and request.temperature == 1.0
    assert read_completion({"prompt": "x", "echo": False, "best_of": 1, "suffix": None}).limit() == 16


def test_prompts_of_completions():
    assert read_completion({"prompt": "x"}).prompts() == ["x"]
    assert read_completion({"prompt": ["x", "y"]}).prompts() == ["x", "y"]
    assert read_completion({"prompt": [1, 2]}).prompts() == [[1, 2]]
    assert read_completion({"prompt": [[1], [2, 3]]}).prompts() == [[1], [2, 3]]


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b'"x"', b"1", b"null", b"{'a': 1}", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": -Infinity}',
        b'{"a": 1,}', b"\xff\xfe", b'{"a": "\xff"}', b'{"a": "\\ud800"}', b'{"a": "\\udc00x"}', b'{"a": ' + b"1" * 5000 + b"}",
        b'{"a": ' * 100_000, b'{"a": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", b"[" * (MAX_STRUCTURE + 1), b"\x00",
        b'{"a": [' + b"1," * MAX_STRUCTURE + b"1]}",
    ],
)  # fmt: skip
def test_what_is_no_json_object(raw):
    with pytest.raises(ApiError) as refused:
        parse(raw)
    assert refused.value.status == 400 and len(refused.value.message) < 300


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none() | st.lists(st.booleans())))
def test_json_objects(value):
    assert parse(json.dumps(value).encode()) == value
    assert parse(json.dumps(value, ensure_ascii=False).encode()) == value


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_value_of_any_field_is_read_or_refused(value):
    for read, whole in ((read_chat, {"messages": HELLO}), (read_completion, {"prompt": "x"})):
        for name in (
            "messages",
            "prompt",
            "n",
            "stop",
            "logit_bias",
            "stream_options",
            "response_format",
            "seed",
            "x",
        ):
            with contextlib.suppress(ApiError):  # and nothing else
                read(whole | {name: value})
