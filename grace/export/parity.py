"""The parity gate: is the packed model, re-loaded from its files, the model that was trained?

Three comparisons, each on real samples at the positions that predict an answer's tokens:

- exact: both in fp32, non-quantized tensors rounded to bfloat16 in both. The weights are then the same
  numbers, so logits may differ by summation order only: `EXACT_LIMIT`, relative to the largest logit.
- deployed: both in bfloat16, the packed one on its int4 kernels. bfloat16 arithmetic itself moves
  logits; how far is measured on the trained model (its bfloat16 against its fp32 logits), and
  `NOISE_MARGIN` times that is the tolerance. Where the best token differs, the gap between the two
  candidates must be below the tolerance.
- greedy: the same decoding from both, in fp32 and in bfloat16; where they part, the gap between the two
  tokens at that step must be below the tolerance of that type.

And the integer codes and scales, read back from the files, must equal the trained ones bit for bit.

Shape suffixes: T positions, V vocabulary.
"""

import gc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grace.data.batch import collate
from grace.data.records import Record, open_image
from grace.data.template import Sample, encode, encode_prompt
from grace.distill.teacher import supervised
from grace.export import awq
from grace.export.source import WEIGHTS, Source
from grace.export.stream import TensorFile
from grace.models import qwen3vl
from grace.models.processor import load_processor
from grace.runtime.generate import generation_config, load_model, model_inputs
from grace.runtime.int4_linear import int4_linears, set_kernel

EXACT_LIMIT = 1e-4
NOISE_MARGIN = 4.0
MAX_POSITIONS = 512  # keeps the logits of a 152k vocabulary within 0.3 GB per model
GREEDY_RECORDS, GREEDY_TOKENS = 4, 16


def check(source: Source, directory: Path, records: Sequence[Record]) -> dict[str, Any]:
    """Runs the gate on a written AWQ directory and returns its figures.

    Raises:
        UserError: the samples cannot be encoded.
        RuntimeError: the packed model is not the trained one.
    """
    check_codes(source, directory)
    data = source.recipe.get("data") or {}
    processor = load_processor(source.directory, data.get("min_pixels"), data.get("max_pixels"))
    samples = [encode(record, processor, data.get("max_length") or 4096) for record in records]
    prompts = [prompt_of(record, processor) for record in records[:GREEDY_RECORDS]]
    pad = processor.tokenizer.pad_token_id

    trained = load_model(source.directory, torch.float32)
    round_unquantized(trained, source.qat.modules)
    trained_fp32_TV = logits_of(trained, samples, pad)
    trained_fp32_greedy = [greedy(trained, processor, prompt) for prompt in prompts]
    trained = load_model(source.directory, torch.bfloat16)
    trained_bf16_TV = logits_of(trained, samples, pad)
    trained_greedy = [greedy(trained, processor, prompt) for prompt in prompts]
    del trained
    gc.collect()
    packed = load_model(directory, torch.float32)
    set_kernel(packed, "dequant")
    packed_fp32_TV = logits_of(packed, samples, pad)
    packed_fp32_greedy = [greedy(packed, processor, prompt) for prompt in prompts]
    packed = load_model(directory, torch.bfloat16)
    kernel = use_fused_kernel(packed)
    packed_bf16_TV = logits_of(packed, samples, pad)
    set_kernel(packed, "auto")
    packed_greedy = [greedy(packed, processor, prompt) for prompt in prompts]

    exact = compare_exact(trained_fp32_TV, packed_fp32_TV)
    figures = {
        "records": len(samples),
        "positions": len(trained_fp32_TV),
        "codes_identical": True,
        "exact": exact,
        "exact_greedy": compare_greedy(trained_fp32_greedy, packed_fp32_greedy, exact["tolerance"]),
        "deployed": {"kernel": kernel, **compare_deployed(trained_fp32_TV, trained_bf16_TV, packed_bf16_TV)},
    }
    figures["greedy"] = compare_greedy(trained_greedy, packed_greedy, figures["deployed"]["tolerance"])
    require_parity(figures)
    return figures


def check_codes(source: Source, directory: Path) -> None:
    """Compares the written integers and scales with the trained ones, bit for bit.

    Raises:
        RuntimeError: one differs.
    """
    file = TensorFile(directory / WEIGHTS)
    for name, weight in source.qat.modules.items():
        stored = {part: file.read(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")}
        codes_OI, scales_OG = awq.unpack(stored, group_size=source.qat.group_size)
        if not torch.equal(codes_OI, weight.codes_OI) or not torch.equal(scales_OG, weight.scales_OG):
            raise RuntimeError(f"parity: {name} was not written as trained; nothing was published")


def prompt_of(record: Record, processor: Any) -> Sample:
    """A record up to its first answer."""
    first = next(index for index, turn in enumerate(record.turns) if turn.role == "assistant")
    turns = record.turns[:first]
    images = [open_image(path, record.id) for path in record.images]
    shown = sum(turn.text.count("<image>") for turn in turns if turn.role == "user")
    return encode_prompt(turns, images[:shown], processor)


def round_unquantized(model: torch.nn.Module, quantized: Iterable[str]) -> None:
    """Rounds every parameter that is stored as bfloat16 in the packed model, in place."""
    kept = {f"{name}.weight" for name in quantized}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in kept:
                parameter.copy_(parameter.bfloat16())


@torch.inference_mode()
def logits_of(model: Any, samples: Sequence[Sample], pad_token_id: int) -> Tensor:
    """fp32 logits [T, V] at supervised positions, sample after sample, at most `MAX_POSITIONS`."""
    parts: list[Tensor] = []
    room = MAX_POSITIONS
    for sample in samples:
        batch = collate([sample], pad_token_id)
        hidden_TD, _ = supervised(qwen3vl.hidden_states(model, batch).final_BLD, batch.labels_BL)
        parts.append(model.lm_head(hidden_TD[:room]).float())
        room -= len(parts[-1])
        if room <= 0:
            break
    return torch.cat(parts)


def use_fused_kernel(model: torch.nn.Module) -> str:
    """Puts every layer on the fused int4 kernel, or names what `auto` will use where one cannot."""
    kernels = set()
    for layer in int4_linears(model).values():
        try:
            layer.set_kernel("aten")
        except ValueError:  # a shape the fused kernel does not take: deployed as auto, and said so
            layer.set_kernel("auto")
        kernels.add(layer.kernel)
    return "+".join(sorted(kernels))


# ---------------------------------------------------------------- comparisons


def compare_exact(trained_TV: Tensor, packed_TV: Tensor) -> dict[str, float]:
    """Largest difference of the fp32 logits, absolute and relative to the largest logit."""
    largest = (packed_TV - trained_TV).abs().max().item()
    top = max(trained_TV.abs().max().item(), 1e-30)
    return {
        "max_abs": largest,
        "relative": largest / top,
        "limit": EXACT_LIMIT,
        "tolerance": EXACT_LIMIT * top,
    }


def compare_deployed(exact_TV: Tensor, trained_TV: Tensor, packed_TV: Tensor) -> dict[str, Any]:
    """The bfloat16 logits of the packed model against those of the trained one.

    Args:
        exact_TV: the trained model in fp32, for the noise that bfloat16 itself makes.
    """
    noise = (trained_TV - exact_TV).abs().max().item()
    difference_TV = (packed_TV - trained_TV).abs()
    kl_T = F.kl_div(
        packed_TV.log_softmax(-1), trained_TV.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    best_T, packed_best_T = trained_TV.argmax(-1), packed_TV.argmax(-1)
    parted_T = (best_T != packed_best_T).nonzero().flatten()
    gaps = [
        {"position": t, "gap": (trained_TV[t, best_T[t]] - trained_TV[t, packed_best_T[t]]).item()}
        for t in parted_T.tolist()
    ]
    return {
        "max_abs": difference_TV.max().item(),
        "mean_abs": difference_TV.mean().item(),
        "kl_mean": kl_T.mean().item(),
        "kl_max": kl_T.max().item(),
        "top1_agreement": 1.0 - len(gaps) / max(len(best_T), 1),
        "top1_differences": gaps,
        "bf16_noise_max": noise,
        "tolerance": NOISE_MARGIN * noise,
    }


def greedy(model: Any, processor: Any, prompt: Sample) -> tuple[list[int], Tensor]:
    """Greedy tokens after a prompt, and the logits [T, V] they were taken from."""
    config = generation_config(model, processor, GREEDY_TOKENS)
    config.output_logits = config.return_dict_in_generate = True
    with torch.inference_mode():
        output = model.generate(**model_inputs(prompt, model.device), generation_config=config)
    tokens = output.sequences[0, len(prompt.input_ids_L) :].tolist()
    return tokens, torch.cat(output.logits).float()


def compare_greedy(
    trained: Sequence[tuple[list[int], Tensor]], packed: Sequence[tuple[list[int], Tensor]], tolerance: float
) -> dict[str, Any]:
    """Where two greedy decodings part, and the gap between the two tokens at that step."""
    parted = []
    for index, ((tokens, logits_TV), (other, _)) in enumerate(zip(trained, packed, strict=True)):
        step = next((t for t, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b), None)
        if step is not None:
            gap = (logits_TV[step, tokens[step]] - logits_TV[step, other[step]]).item()
            parted.append({"record": index, "step": step, "gap": gap})
    return {
        "records": len(trained),
        "tokens": sum(len(tokens) for tokens, _ in trained),
        "identical": len(trained) - len(parted),
        "parted": parted,
        "tolerance": tolerance,
    }


def require_parity(figures: dict[str, Any]) -> None:
    """Raises `RuntimeError` naming the first figure that is out of bounds (NaN is)."""
    exact, deployed, decoded = figures["exact"], figures["deployed"], figures["greedy"]
    tolerance = deployed["tolerance"]
    gaps = [item["gap"] for item in deployed["top1_differences"] + decoded["parted"]]
    exact_gaps = [item["gap"] for item in figures["exact_greedy"]["parted"]]
    faults = [
        (
            not all(gap <= exact["tolerance"] for gap in exact_gaps),
            f"fp32 greedy answers part across a gap of {max(exact_gaps, default=0):.3g}",
        ),
        (
            not exact["relative"] <= exact["limit"],
            f"fp32 logits differ by {exact['relative']:.2e} of the largest",
        ),
        (
            not deployed["max_abs"] <= tolerance,
            f"bfloat16 logits differ by {deployed['max_abs']:.3g}, tolerance {tolerance:.3g}",
        ),
        (
            not all(gap <= tolerance for gap in gaps),
            f"best tokens differ across a gap of {max(gaps, default=0):.3g}, tolerance {tolerance:.3g}",
        ),
    ]
    for failed, text in faults:
        if failed:
            raise RuntimeError(f"parity gate: {text}; nothing was published")


def describe(name: str, figures: dict[str, Any]) -> str:
    """The figures in one or a few lines for people."""
    if "exact" not in figures:
        return f"parity {name}: codes, scales and weights of {figures['modules']} modules identical"
    exact, deployed, decoded = figures["exact"], figures["deployed"], figures["greedy"]
    fp32 = figures["exact_greedy"]
    return (
        f"parity {name}: codes and scales identical; "
        f"{figures['positions']} positions of {figures['records']} records\n"
        f"  fp32:     largest logit difference {exact['relative']:.1e} "
        f"of the largest logit (limit {exact['limit']:.0e})\n"
        f"  bfloat16: logit difference max {deployed['max_abs']:.3g}, mean {deployed['mean_abs']:.3g} "
        f"(tolerance {deployed['tolerance']:.3g}), KL mean {deployed['kl_mean']:.1e}, "
        f"same best token {deployed['top1_agreement']:.2%}{_gaps(deployed['top1_differences'])}, "
        f"kernel {deployed['kernel']}\n"
        f"  greedy:   identical answers of {decoded['records']}: "
        f"fp32 {fp32['identical']}{_gaps(fp32['parted'])}, "
        f"bfloat16 {decoded['identical']}{_gaps(decoded['parted'])}"
    )


def _gaps(differences: Sequence[dict[str, Any]]) -> str:
    """How close the two candidates were wherever the models disagree."""
    if not differences:
        return ""
    shown = ", ".join(f"{item['gap']:.3g}" for item in differences[:8])
    return f" (top-2 gaps where they part: {shown})"
