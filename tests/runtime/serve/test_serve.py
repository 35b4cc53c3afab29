"""`grace serve` from outside: a real model, real clients, real signals."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from live_server import Serving, assert_refused, chat, data_url, picture, question, with_picture
from PIL import Image

from grace import cli, cli_serve
from grace.errors import UserError
from grace.runtime import load
from grace.runtime.serve import other_engines
from grace.runtime.serve.command import api_key, weight_bytes
from grace.runtime.serve.listener import bind, is_loopback

KEY = "sesame"


@pytest.fixture(scope="module")
def serving(awq_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    root = tmp_path_factory.mktemp("pictures")
    (root / "red.png").write_bytes(picture(size=(96, 96)))
    with Serving(awq_dir, "--image-root", str(root), "--max-batch", "4", GRACE_API_KEY=KEY) as serving:
        yield serving
        assert chat(serving.url, question(), headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        assert serving.stop() == 0
    assert "Traceback" not in serving.errors, serving.errors


@pytest.fixture(scope="module")
def client(serving: Serving) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{serving.url}/v1", api_key=KEY, max_retries=0)


def messages(text: str = "Which digit is in the top left cell?", **picture_options: Any) -> Any:
    return [
        {"role": "user", "content": with_picture(data_url(picture(size=(96, 96), **picture_options)), text)}
    ]


def test_the_openai_client(client, serving, awq_dir):
    (model,) = client.models.list().data
    assert model.id == "awq" and model.weight_bytes == weight_bytes(load(awq_dir).model)  # type: ignore[attr-defined]
    whole = client.chat.completions.create(model=model.id, messages=messages(), max_tokens=6, temperature=0)
    assert whole.choices[0].finish_reason in ("stop", "length") and whole.usage is not None
    stream = client.chat.completions.create(
        model=model.id,
        messages=messages(),
        max_tokens=6,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage == whole.usage
    with client.chat.completions.create(
        model=model.id, messages=messages(), max_tokens=500, stream=True
    ) as left:
        next(iter(left))  # and away
    plain = client.completions.create(model=model.id, prompt="What is", max_tokens=3, temperature=0)
    assert plain.usage is not None and plain.usage.completion_tokens <= 3
    drawn = [
        client.chat.completions.create(
            model=model.id,
            messages=messages(),
            max_tokens=8,
            temperature=1.5,
            seed=seed,
            n=2,
            logprobs=True,
            top_logprobs=3,
        )
        for seed in (1, 1, 2)
    ]
    texts = [[choice.message.content for choice in one.choices] for one in drawn]
    assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1]
    assert drawn[0].choices[0].logprobs is not None


def test_the_openai_clients_errors(client, serving):
    with pytest.raises(openai.NotFoundError, match="gpt"):
        client.chat.completions.create(model="gpt", messages=messages())
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="awq", messages=messages(), n=-1)
    assert refused.value.param == "n" and refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="Unrecognized request argument supplied: colour"):
        client.chat.completions.create(model="awq", messages=messages(), extra_body={"colour": "red"})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{serving.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_answers_are_those_of_the_engine(client, awq_dir, serving):
    """Greedy, many at once and in other company each time: the tokens of `generate`, one at a time."""
    engine = load(awq_dir)
    colours = ["red", "green", "blue", "white"]
    expected = {}
    for colour in colours:
        result = engine.generate(
            [Image.new("RGB", (96, 96), colour)], "Which digit is in the top left cell?", 12
        )
        expected[colour] = (result.text, len(result.tokens))
    found: dict[int, tuple[str, int]] = {}

    def ask(number: int) -> None:
        answer = client.chat.completions.create(
            model="awq", messages=messages(colour=colours[number % 4]), max_tokens=12, temperature=0
        )
        found[number] = (answer.choices[0].message.content, answer.usage.completion_tokens)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {number: expected[colours[number % 4]] for number in range(12)}


def test_curl(serving, tmp_path):
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"messages": messages(), "max_tokens": 4, "stream": True}))
    key = f"Authorization: Bearer {KEY}"
    words = ["curl", "-sS", "-N", "-H", key, "-H", "Content-Type: application/json", "-d", f"@{body}"]
    done = subprocess.run(
        [*words, f"{serving.url}/v1/chat/completions"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith("data: {") and done.stdout.endswith("data: [DONE]\n\n")
    words = ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}"]
    for path, options, status in (
        ("/health", [], "200"), ("/v1/models", [], "401"), ("/v1/models", ["-H", key], "200"), ("/metrics", ["-H", key], "200"),
        ("/v1/chat/completions", ["-H", key, "-d", "{"], "400"), ("/", [], "200"),
    ):  # fmt: skip
        done = subprocess.run(
            [*words, *options, serving.url + path], capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout == status, path


def test_files_and_metrics(serving, client):
    headers = {"Authorization": f"Bearer {KEY}"}
    response = chat(serving.url, question(with_picture("file:red.png")), headers=headers)
    assert response.status_code == 200
    assert_refused(chat(serving.url, question(with_picture("file:///etc/passwd")), headers=headers), 400)
    assert_refused(chat(serving.url, question(with_picture("http://127.0.0.1/x")), headers=headers), 400)
    text = httpx.get(f"{serving.url}/metrics", headers=headers).text
    assert 'grace_requests_total{path="/v1/chat/completions",status="200"}' in text


def test_sigterm_finishes_what_runs_and_an_open_door_is_said(awq_dir):
    with Serving(awq_dir, "--host", "0.0.0.0", "--served-model-name", "x", "--head", "int4") as serving:
        body = question(max_tokens=150, ignore_eos=True, stream=True)
        with httpx.stream("POST", f"{serving.url}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            serving.process.send_signal(signal.SIGTERM)
            text = "\n".join(lines)
        assert text.rstrip().endswith("data: [DONE]") and '"finish_reason": "length"' in text
        assert serving.process.wait(20) == 0
    assert "Traceback" not in serving.errors
    assert serving.errors.startswith("warning: http://0.0.0.0:") and "GRACE_API_KEY" in serving.errors


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_sigterm_breaks_off_what_does_not_end(awq_dir, again):
    with Serving(awq_dir, "--context", "4096") as serving:
        body = question(max_tokens=4000, ignore_eos=True, stream=True, n=16)
        with httpx.stream("POST", f"{serving.url}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            start = time.monotonic()
            serving.process.send_signal(signal.SIGTERM)
            if again:  # a second signal, of either kind, waits for nothing
                time.sleep(0.5)
                assert serving.stop(signal.SIGINT) == 0 and "Traceback" not in serving.errors
                return
            text = "\n".join(lines)
        assert "the server is stopping" in text and serving.process.wait(20) == 0
        assert 8 < time.monotonic() - start < 20


def test_a_port_in_use(awq_dir, capsys):
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(awq_dir), "--port", str(port)]) == 2
    assert capsys.readouterr().err == f"error: port {port} of 127.0.0.1 is in use: choose another --port\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["/nowhere"], "not a directory"),
        (["{awq}", "--image-root", "/nowhere"], "--image-root /nowhere is not a directory"),
        (["{awq}", "--host", "256.1.1.1"], "--host 256.1.1.1 is not known"),
        (["{awq}", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["{awq}", "--port", "70000"], "port"),
        (["{awq}", "--context", "100000000"], "context"),
        (["{awq}", "--max-batch", "100000000"], "lower --max-batch or --context"),
        (["{awq}", "--device", "toaster"], "--device toaster cannot be used"),
        (["{awq}", "--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["{awq}", "--engine", "vllm"], "vllm is not installed in this environment: pip install vllm"),
        (["{awq}", "--engine", "sglang"], "pip install sglang"),
        (["{awq}", "--engine", "vllm", "--kernel", "aten"], "--kernel is for the engine grace"),
        (["{awq}", "--engine", "sglang", "--image-root", "{awq}"], "--image-root"),
        (["{awq}", "--engine", "vllm", "--head", "int4"], "--head is for the engine grace"),
    ],
)
def test_wrong_options_are_one_line_and_exit_2(awq_dir, capsys, options, message):
    assert (
        cli.main(
            [
                "serve",
                *(option.format(awq=awq_dir) for option in options),
                *([] if "--port" in options else ["--port", "0"]),
            ]
        )
        == 2
    )
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_the_key_of_the_environment(monkeypatch):
    monkeypatch.delenv("GRACE_API_KEY", raising=False)
    assert api_key() is None
    monkeypatch.setenv("GRACE_API_KEY", "x")
    assert api_key() == "x"
    monkeypatch.setenv("GRACE_API_KEY", " ")
    with pytest.raises(UserError, match="GRACE_API_KEY is empty"):
        api_key()


def test_loopback_addresses():
    found = {
        host: is_loopback(host)
        for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "10.0.0.1", "example.org")
    }
    assert [host for host, inside in found.items() if inside] == ["127.0.0.1", "::1", "localhost"]


def test_ipv6():
    try:
        with bind("::1", 0) as listener:
            assert listener.family == socket.AF_INET6
    except UserError:
        pytest.skip("no IPv6 here")


# ---------------------------------------------------------------- other engines


def arguments(*options: str) -> Any:
    return cli.build_parser().parse_args(["serve", "runs/demo/awq", *options])


def test_the_commands_of_other_engines():
    command = other_engines.command(
        arguments("--engine", "vllm", "--context", "2048", "--max-batch", "8", "--port", "9")
    )
    assert command == [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "runs/demo/awq", "--host", "127.0.0.1", "--port", "9",
        "--served-model-name", "awq", "--max-model-len", "2048", "--max-num-seqs", "8",
        "--allowed-media-domains", "none.invalid",
    ]  # fmt: skip
    command = other_engines.command(arguments("--engine", "sglang", "--served-model-name", "x"), "key")
    assert command == [
        sys.executable, "-m", "sglang.launch_server", "--model-path", "runs/demo/awq", "--dtype", "float16", "--host", "127.0.0.1",
        "--port", "8000", "--served-model-name", "x", "--api-key", "key",
    ]  # fmt: skip
    assert ("grace", *other_engines.ENGINES) == cli_serve.ENGINES


def test_an_installed_engine_is_started(monkeypatch, capsys):
    started = {}
    monkeypatch.setattr(other_engines.importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(other_engines.os, "execve", lambda *call: started.update(call=call))
    other_engines.start(arguments("--engine", "vllm"), "secret")
    program, words, environment = started["call"]
    assert (
        program == sys.executable
        and "secret" not in " ".join(words)
        and environment["VLLM_API_KEY"] == "secret"
    )
    other_engines.start(arguments("--engine", "sglang"), "secret")
    assert "secret" in started["call"][1] and "secret" not in capsys.readouterr().err
