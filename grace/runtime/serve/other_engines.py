"""The same directory served by vLLM or SGLang: their exact commands, with this server's options in their words."""

import argparse
import importlib.util
import os
import sys
from typing import NoReturn

from grace.errors import UserError

ENGINES = ("vllm", "sglang")
# Options that only our own engine has, with their defaults.
_OURS = {
    "kernel": "auto", "head": "bf16", "max_queue": None, "max_body": None, "request_timeout": None, "max_pixels": None,
    "allow_urls": False, "device": None,
}  # fmt: skip


def command(args: argparse.Namespace, key: str | None = None) -> list[str]:
    """The command line that serves `args.directory` with `args.engine`.

    Args:
        key: SGLang takes an API key as an argument only; vLLM reads it from the environment.

    Raises:
        UserError: an option that the other engine does not have.
    """
    for name, default in _OURS.items():
        if getattr(args, name, default) != default:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} is for the engine grace: leave it out with --engine {args.engine}")
    name = args.served_model_name or args.directory.resolve().name
    where = ["--host", args.host, "--port", str(args.port), "--served-model-name", name]
    if args.engine == "vllm":
        sizes = _given({"--max-model-len": args.context, "--max-num-seqs": args.max_batch})
        root = _given({"--allowed-local-media-path": args.image_root and str(args.image_root.resolve())})
        # No domain is called so: requests may not make the server fetch anything.
        closed = ["--allowed-media-domains", "none.invalid"]
        return [
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            str(args.directory),
            *where,
            *sizes,
            *root,
            *closed,
        ]
    if args.image_root:
        raise UserError(
            "--image-root is for the engines grace and vllm: SGLang cannot be held to one directory"
        )
    sizes = _given(
        {"--context-length": args.context, "--max-running-requests": args.max_batch, "--api-key": key}
    )
    # Its AWQ kernels multiply fp16 only.
    return [
        sys.executable,
        "-m",
        "sglang.launch_server",
        "--model-path",
        str(args.directory),
        "--dtype",
        "float16",
        *where,
        *sizes,
    ]


def _given(options: dict[str, object]) -> list[str]:
    return [text for name, value in options.items() if value is not None for text in (name, str(value))]


def start(args: argparse.Namespace, key: str | None) -> NoReturn:
    """Replaces this process by the other server.

    Raises:
        UserError: it is not installed, or cannot do what an option asks.
    """
    words = command(args, key)
    if importlib.util.find_spec(args.engine) is None:
        raise UserError(f"{args.engine} is not installed in this environment: pip install {args.engine}")
    shown = " ".join("KEY" if word == key else word for word in words)
    print(shown, file=sys.stderr, flush=True)
    environment = (
        dict(os.environ) | {"VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0"} | ({"VLLM_API_KEY": key} if key else {})
    )
    os.execve(words[0], words, environment)
