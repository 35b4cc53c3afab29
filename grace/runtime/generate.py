"""`grace generate DIR`: answers about pictures from any GRACE directory; one, a chat, or a file of requests.

An AWQ directory runs on packed weights; a QAT or a plain one runs dense.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from typing import Any

from grace.data.records import Turn
from grace.errors import UserError
from grace.runtime.engine import Engine, GenerationResult, load, question
from grace.runtime.int4_linear import describe_kernels
from grace.runtime.library_generate import generate_tokens, generation_config, model_inputs
from grace.runtime.loading import checkpoint_kind, load_model, require_tokenizer
from grace.runtime.sampling import PRESETS, Sampling

__all__ = [
    "Engine",
    "GenerationResult",
    "checkpoint_kind",
    "generate_tokens",
    "generation_config",
    "load",
    "load_model",
    "model_inputs",
    "require_tokenizer",
    "run_generate",
]

_SETTINGS = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")


def run_generate(args: argparse.Namespace) -> int:
    """Entry point of `grace generate`."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sampling = sampling_of(args)
    _check_way(args)
    if args.batch is not None:
        from grace.runtime.batch import run_batch

        return run_batch(args, sampling)
    if args.chat:
        from grace.runtime.chat import run_chat

        return run_chat(_loaded(args), args, sampling)
    turns = [*_system(args), question(args.prompt, len(args.image))]  # before anything is loaded
    engine = _loaded(args)
    answer = engine.answer(turns, args.image, sampling)
    # Only now: a picture that cannot be read is one line on stderr, not a second one.
    print(about(engine, args), file=sys.stderr)
    if not args.json:
        for text in answer:
            print(text, end="", flush=True)
        print()
    result = answer.result()
    print(summary(result), file=sys.stderr)
    if args.json:
        print(json.dumps({**asdict(result), "kind": engine.kind}))
    return 0


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The settings of a command line: a preset, and over it what was given.

    Raises:
        UserError: a value out of range.
    """
    given: dict[str, Any] = {
        name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None
    }
    return replace(PRESETS[args.preset] if args.preset else Sampling(), **given, stop=tuple(args.stop))


def about(engine: Engine, args: argparse.Namespace) -> str:
    """What runs, on one line."""
    head = "" if engine.decoder.head.kind == "bf16" else f", head {engine.decoder.head.kind}"
    return f"{args.directory}: {engine.kind}, {engine.model.dtype}, {describe_kernels(engine.model)}{head}"


def summary(result: GenerationResult) -> str:
    """How fast it was, on one line."""
    rate = f", {result.tokens_per_s:.1f} tokens/s" if result.tokens_per_s else ""
    return f"{len(result.tokens)} tokens, first after {result.first_token_s:.2f} s{rate}"


def _check_way(args: argparse.Namespace) -> None:
    ways = [name for name in ("prompt", "chat", "batch") if getattr(args, name) not in (None, False)]
    if len(ways) != 1:
        raise UserError("give one of --prompt TEXT, --chat and --batch FILE")
    if (args.batch is None) != (args.out is None):
        raise UserError("--batch FILE and --out FILE go together")
    if args.batch is not None and args.image:
        raise UserError(
            "--image goes with --prompt or --chat: the requests of --batch name their own pictures"
        )
    if args.chat and args.json:
        raise UserError("--json prints one object: use it with --prompt or --batch, not with --chat")
    if args.chat and "-" in args.image:
        raise UserError("--chat reads standard input itself: give pictures as files or URLs")
    if args.image.count("-") > 1:
        raise UserError("standard input holds one picture: give - once")


def _loaded(args: argparse.Namespace) -> Engine:
    return load(
        args.directory, kernel=args.kernel, context=args.context, rows=1, device=args.device, head=args.head
    )


def _system(args: argparse.Namespace) -> list[Turn]:
    return [Turn("system", args.system)] if args.system else []
