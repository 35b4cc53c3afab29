"""Scores of one model of the demo: accuracy by question type, bytes, speed, sample answers.

Every function takes paths and plain values, so that it can run in a worker process.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from grace.data.batch import collate
from grace.data.records import Record, load_records
from grace.data.template import encode
from grace.distill.teacher import supervised, teacher_signals
from grace.evaluation.exact_match import by_type, evaluate, summarize
from grace.evaluation.samples import greedy_answer, sample_table
from grace.models import qwen3vl
from grace.models.processor import load_processor
from grace.quant import grid

BATCH = 64


def load(path: Path, kind: str) -> Any:
    """Loads a model as `kind`: "dense" (fp32), "rtnN" (fp32, rounded to nearest at N bits), or "packed"."""
    if kind == "packed":
        import grace.runtime  # noqa: F401 - registers the packed layers with transformers

        return transformers.AutoModelForImageTextToText.from_pretrained(path).eval()
    model = qwen3vl.load_model(str(path), torch.float32)
    if kind.startswith("rtn"):
        round_to_nearest(model, int(kind.removeprefix("rtn")))
    return model


@torch.no_grad()
def round_to_nearest(model: Any, bits: int, group_size: int = 128) -> None:
    """Rounds every decoder linear in place, at the scales that quantized training starts from."""
    for layer in qwen3vl.decoder_linears(model).values():
        theta_OG = grid.init_theta(layer.weight, group_size, bits)
        codes_OI, scales_OG = grid.quantize(layer.weight, theta_OG, group_size, bits)
        layer.weight.copy_(grid.dequantize(codes_OI, scales_OG, group_size))


def batches(records: Sequence[Record], processor: Any) -> Any:
    """Padded batches of records in their order."""
    for start in range(0, len(records), BATCH):
        samples = [encode(record, processor, max_length=1024) for record in records[start : start + BATCH]]
        yield collate(samples, processor.tokenizer.pad_token_id)


def score(path: Path, kind: str, data: Path, examples: int, limit: int | None = None) -> dict[str, Any]:
    """Exact match, standard error, CE and the same by question type, with a few answers to look at."""
    start = time.perf_counter()
    model, processor = load(path, kind), load_processor(str(path))
    records = load_records(data)[:limit]
    scores = evaluate(model, batches(records, processor))
    types = by_type(scores)
    answers = [prediction for *_, prediction in sample_table(model, processor, picked(records, examples))]
    return {
        **summarize(scores),
        "by_type": dict(types),
        "answers": answers,
        "seconds": time.perf_counter() - start,
    }


def picked(records: Sequence[Record], count: int) -> list[Record]:
    """The first `count` records, taking question types in turn."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.id.rsplit("-", 1)[-1], []).append(record)
    rounds = zip(*groups.values(), strict=False)
    return [record for group in rounds for record in group][:count]


def weight_bytes(path: Path, bits: int | None, group_size: int = 128) -> int:
    """Bytes of all weights as deployed: bf16, or codes + fp16 scale + 4-bit zero per group for the decoder."""
    model = qwen3vl.skeleton(qwen3vl.config_for(str(path)))
    total = sum(parameter.numel() for parameter in model.parameters()) * 2
    if bits is None:
        return total
    linears = sum(layer.weight.numel() for layer in qwen3vl.decoder_linears(model).values())
    return total - 2 * linears + (linears * bits) // 8 + (linears // group_size) * 5 // 2


def decode_speed(path: Path, kind: str, data: Path, new_tokens: int = 48, repeats: int = 3) -> float:
    """Greedy decode tokens/s at batch 1 after one prompt with an image: the median of `repeats`."""
    model, processor = load(path, kind), load_processor(str(path))
    if kind != "packed":
        model = model.to(torch.bfloat16)
    record = load_records(data)[0]
    model.generation_config.min_new_tokens = new_tokens
    from grace.data.records import open_image

    images = [open_image(p, record.id) for p in record.images]
    speeds = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        greedy_answer(model, processor, record.turns[:-1], images, new_tokens)
        speeds.append(new_tokens / (time.perf_counter() - start))
    return sorted(speeds[1:])[repeats // 2]


@torch.no_grad()
def gate_values(teacher: Path, data: Path, limit: int) -> list[float]:
    """The teacher's confidence gate at every supervised token of the first `limit` records."""
    model, processor = load(teacher, "dense"), load_processor(str(teacher))
    values: list[float] = []
    for batch in batches(load_records(data)[:limit], processor):
        hidden_TE, _ = supervised(qwen3vl.hidden_states(model, batch).final_BLD, batch.labels_BL)
        vocabulary = model.config.text_config.vocab_size
        values += teacher_signals(hidden_TE, qwen3vl.head_weight(model), (), vocabulary).gate_T.tolist()
    return values


def set_up_process(threads: int) -> None:
    """Set-up of a process: a fixed number of threads, so that numbers do not depend on the pool, and no chatter."""
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def train_in_worker(recipe: str, overrides: Sequence[str], log: Path) -> float:
    """Runs `grace.train` with its progress lines in `log`; returns seconds."""
    from grace.config import load_recipe
    from grace.train import train

    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("a") as file:
        keep, sys.stderr = sys.stderr, file
        try:
            train(load_recipe(recipe, list(overrides)))
        finally:
            sys.stderr = keep
    return time.perf_counter() - start
