"""`grace generate DIR --image FILE... --prompt TEXT`: answers about pictures, from any GRACE directory.

An AWQ directory runs on packed weights; a QAT or a plain one runs dense.
"""

import argparse
import json
import sys
from dataclasses import asdict

from grace.runtime.engine import Engine, GenerationResult, load, question
from grace.runtime.int4_linear import describe_kernels
from grace.runtime.library_generate import generate_tokens, generation_config, model_inputs
from grace.runtime.loading import checkpoint_kind, load_model, require_tokenizer
from grace.runtime.sampling import Sampling

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


def run_generate(args: argparse.Namespace) -> int:
    """Entry point of `grace generate`."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, seed=args.seed)
    question(args.prompt, 0)  # before anything is loaded
    engine = load(args.directory, kernel=args.kernel)
    result = engine.generate(args.image or [], args.prompt, sampling=sampling)
    # Only now: a picture that cannot be read is one line on stderr, not a second one.
    about = f"{engine.kind}, {engine.model.dtype}, {describe_kernels(engine.model)}"
    print(f"{args.directory}: {about}", file=sys.stderr)
    rate = f", {result.tokens_per_s:.1f} tokens/s" if result.tokens_per_s else ""
    print(f"{len(result.tokens)} tokens, first after {result.first_token_s:.2f} s{rate}", file=sys.stderr)
    print(json.dumps({**asdict(result), "kind": engine.kind}) if args.json else result.text)
    return 0
