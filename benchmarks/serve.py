"""python benchmarks/serve.py DIR [--clients 1 4 16] [--repeats 3] [--out benchmarks/results/serve.json]

Throughput of `grace serve` by number of clients at once, as a ratio over one client. The server is a process of its
own; each client asks about a picture and reads the streamed answer, again and again, all answers of the same length
(`ignore_eos`). Client counts take turns and the median of the repeats is taken. Without DIR, `--synthetic` serves random
weights: the small world's student, dense, or a published shape, packed (with the small world's tokenizer: its
vocabulary's other rows are text of no length).

Prints a table and, last, one line of JSON.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from measure import machine, report
from PIL import Image
from random_weights import write_published_shape

from grace.models.tiny import write_tiny_model
from grace.runtime.synthetic import NAMES


@dataclass(frozen=True)
class Run:
    """One measurement: what all clients together got, and what one answer cost."""

    tokens_per_s: float
    first_token_s: float
    requests: int


def body(tokens: int, pixels: int) -> bytes:
    """A request about a picture."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((pixels, pixels)).convert("RGB").save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Describe the picture."},
    ]
    wanted = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0}
    return json.dumps(
        wanted | {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    ).encode()


async def client(port: int, request: bytes, answers: int) -> list[tuple[int, float]]:
    """Tokens and seconds to the first one of each answer."""
    found = []
    for _ in range(answers):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(request)}\r\n\r\n"
        start = time.perf_counter()
        writer.write(head.encode() + request)
        status = await reader.readline()
        if b" 200 " not in status:
            raise SystemExit(f"the server answers {status!r}: {(await reader.read())[-500:]!r}")
        await reader.readuntil(b'"content": ')  # the opening chunk, which goes out with the first token
        first = time.perf_counter() - start
        rest = await reader.read()
        writer.close()
        (tokens,) = re.findall(rb'"completion_tokens": (\d+)', rest)
        found.append((int(tokens), first))
    return found


async def measure(port: int, clients: int, request: bytes, answers: int) -> Run:
    start = time.perf_counter()
    lists = await asyncio.gather(*(client(port, request, answers) for _ in range(clients)))
    found = [one for answers_of_one in lists for one in answers_of_one]
    seconds = time.perf_counter() - start
    return Run(sum(tokens for tokens, _ in found) / seconds, median(first for _, first in found), len(found))


def start_server(words: list[str]) -> tuple[subprocess.Popen[str], int]:
    server = subprocess.Popen(
        [sys.executable, "-m", "grace", "serve", *words, "--port", "0"], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    said = []
    for line in server.stderr:
        said.append(line)
        if found := re.search(r" at http://127.0.0.1:(\d+) ", line):
            return server, int(found[1])
    raise SystemExit("".join(said))


def synthetic(name: str, scratch: Path) -> Path:
    """A model directory with random weights."""
    directory = scratch / name
    if name == "student":
        return write_tiny_model(directory, "student")
    return write_published_shape(name, directory, packed=True)


def resident_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, nargs="?", metavar="DIR", help="an exported model")
    parser.add_argument("--synthetic", choices=("student", *NAMES), default="student", help="without DIR")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="default: 1 4 16")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer; default: %(default)s")
    parser.add_argument("--pixels", type=int, default=96, help="edge of the picture; default: %(default)s")
    parser.add_argument("--answers", type=int, default=4, help="of each client; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--max-batch", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.directory or synthetic(args.synthetic, Path(scratch))
        server, port = start_server([str(directory), "--max-batch", str(args.max_batch)])
        try:
            request = body(args.tokens, args.pixels)
            asyncio.run(measure(port, max(args.clients), request, 1))  # warm-up
            runs: dict[int, list[Run]] = {clients: [] for clients in args.clients}
            for _ in range(args.repeats):
                for clients in args.clients:
                    runs[clients].append(asyncio.run(measure(port, clients, request, args.answers)))
            resident = resident_mb(server.pid)
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
    rates = {clients: median(run.tokens_per_s for run in found) for clients, found in runs.items()}
    base = rates[args.clients[0]]
    print(
        f"{directory.name}, {args.tokens} tokens an answer, {args.pixels} x {args.pixels} pixels, {os.cpu_count()} cores"
    )
    print(f"{'clients':>7} {'tokens/s':>9} {'ratio':>6} {'first token, s':>15}")
    for clients, rate in rates.items():
        first = median(run.first_token_s for run in runs[clients])
        print(f"{clients:7} {rate:9.1f} {rate / base:6.2f} {first:15.3f}")
    result = {
        "benchmark": "serve",
        **machine(),
        "model": directory.name,
        "tokens": args.tokens,
        "max_batch": args.max_batch,
        "tokens_per_s": {str(clients): rate for clients, rate in rates.items()},
        "ratio": {str(clients): rate / base for clients, rate in rates.items()},
        "first_token_s": {str(c): median(run.first_token_s for run in found) for c, found in runs.items()},
        "resident_mb": resident,
        "exit_code": code,
    }
    report(result, args.out)


if __name__ == "__main__":
    main()
