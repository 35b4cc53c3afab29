"""The parity gate: is an export, re-loaded from its files, the model that was trained?

Comparisons on real samples, at the positions that predict an answer's tokens:

- exact: both in fp32, non-quantized tensors rounded to bfloat16 in both. The weights are then the same
  numbers, so logits may differ by summation order only: `EXACT_LIMIT`, relative to the largest logit.
- deployed (AWQ, which has kernels here): both in bfloat16, the packed one on its int4 kernels. bfloat16
  arithmetic itself moves logits; how far is measured on the trained model (its bfloat16 against its fp32
  logits), and `NOISE_MARGIN` times that is the tolerance. Where the best token differs, the gap between
  the two candidates must be below the tolerance.
- greedy: the same decoding from both; where they part, the gap between the two tokens at that step must
  be below the tolerance of that type.

And everything read back from the files must equal the trained model bit for bit: integer codes, scales,
and the dense tensors after rounding to bfloat16.

Shape suffixes: T positions, V vocabulary.
"""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grace.checkpoint import QuantizedWeight
from grace.errors import UserError
from grace.export.contents import Source
from grace.export.directory import dense_names, dense_pieces
from grace.export.reference import Reference, model_of
from grace.runtime.generate import load_model
from grace.runtime.int4_linear import int4_linears, set_kernel

EXACT_LIMIT = 1e-4
NOISE_MARGIN = 4.0


def check_loaded(reference: Reference, stored: Source, directory: Path) -> dict[str, Any]:
    """Runs the whole gate on a written AWQ directory, loaded by GRACE's own runtime; returns its figures.

    Raises:
        RuntimeError: the packed model is not that of the source.
    """
    check_stored(reference.source, stored)
    packed = load_model(directory, torch.float32)
    set_kernel(packed, "dequant")
    figures = exact_figures(reference, packed)
    packed = load_model(directory, torch.bfloat16)
    kernel = use_fused_kernel(packed)
    packed_bf16_TV = reference.logits(packed)
    set_kernel(packed, "auto")
    packed_greedy = reference.greedy(packed)
    trained = reference.bf16
    deployed = compare_deployed(reference.fp32.logits_TV, trained.logits_TV, packed_bf16_TV)
    figures["deployed"] = {"kernel": kernel, **deployed}
    figures["greedy"] = compare_greedy(trained.greedy, packed_greedy, deployed["tolerance"])
    require_parity(figures)
    return figures


def check_filled(reference: Reference, stored: Source) -> dict[str, Any]:
    """Runs the gate on a format that has no kernels here: a model made of its tensors in fp32.

    Raises:
        RuntimeError: the stored model is not that of the source.
    """
    check_stored(reference.source, stored)
    figures = exact_figures(reference, model_of(stored, torch.float32))
    require_parity(figures)
    return figures


def check_tensors(source: Source, stored: Source) -> dict[str, Any]:
    """The gate without samples: everything that was written, bit for bit.

    Raises:
        RuntimeError: something differs.
    """
    check_stored(source, stored)
    return {"codes_identical": True, "dense_identical": True, "modules": len(source.qat.modules)}


def check_stored(source: Source, stored: Source) -> None:
    """Compares everything that was written with the source, bit for bit.

    Raises:
        RuntimeError: something differs.
    """
    for name, weight in source.qat.modules.items():
        try:
            same = _same(weight, stored.qat.modules[name])
        except (KeyError, UserError) as error:
            raise RuntimeError(f"parity: {name} reads back wrong ({error}); nothing was published") from error
        if not same:
            raise RuntimeError(f"parity: {name} was not written as it was read; nothing was published")
    for name in dense_names(source):
        start, written = 0, stored.weights.read(name)
        for piece in dense_pieces(source, name):
            rows = written[start : start + len(piece)] if piece.ndim else written
            start += len(piece) if piece.ndim else 1
            if not torch.equal(rows.to(piece.dtype), piece):
                raise RuntimeError(f"parity: {name} was not written as it was read; nothing was published")


def _same(weight: QuantizedWeight, stored: QuantizedWeight) -> bool:
    """Whether two linears have the same codes, scales (whatever their type) and zero points."""
    zeros = [torch.zeros(()) if held.zeros_OG is None else held.zeros_OG.float() for held in (weight, stored)]
    return (
        torch.equal(weight.codes_OI, stored.codes_OI)
        and torch.equal(weight.scales_OG.float(), stored.scales_OG.float())
        and bool((zeros[0] == zeros[1]).all())
    )


def exact_figures(reference: Reference, model: Any) -> dict[str, Any]:
    """The comparison in fp32: logits and greedy answers."""
    trained, packed = reference.fp32, reference.ask(model)
    exact = compare_exact(trained.logits_TV, packed.logits_TV)
    gc.collect()
    return {
        "records": len(reference.samples),
        "positions": len(trained.logits_TV),
        "codes_identical": True,
        "dense_identical": True,
        "exact": exact,
        "exact_greedy": compare_greedy(trained.greedy, packed.greedy, exact["tolerance"]),
    }


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
    exact = figures["exact"]
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
    ]
    if "deployed" in figures:
        deployed = figures["deployed"]
        tolerance = deployed["tolerance"]
        gaps = [item["gap"] for item in deployed["top1_differences"] + figures["greedy"]["parted"]]
        faults += [
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
    exact, fp32 = figures["exact"], figures["exact_greedy"]
    rounded = figures.get("scale_rounding")
    text = (
        f"parity {name}: codes {'' if rounded else 'and scales '}identical, dense tensors too; "
        f"{figures['positions']} positions of {figures['records']} records\n"
        f"  fp32:     largest logit difference {exact['relative']:.1e} "
        f"of the largest logit (limit {exact['limit']:.0e}), "
        f"identical greedy answers {fp32['identical']} of {fp32['records']}{_gaps(fp32['parted'])}"
    )
    if rounded:
        text += (
            f"\n  float32 scales rounded to {rounded['dtype']}: by up to {rounded['largest_relative']:.1e}, "
            f"which moves logits by up to {rounded['logits_relative']:.1e} of the largest"
        )
    if "deployed" not in figures:
        return text
    deployed, decoded = figures["deployed"], figures["greedy"]
    return (
        f"{text}\n"
        f"  bfloat16: logit difference max {deployed['max_abs']:.3g}, mean {deployed['mean_abs']:.3g} "
        f"(tolerance {deployed['tolerance']:.3g}), KL mean {deployed['kl_mean']:.1e}, "
        f"same best token {deployed['top1_agreement']:.2%}{_gaps(deployed['top1_differences'])}, "
        f"kernel {deployed['kernel']}, "
        f"identical greedy answers {decoded['identical']} of {decoded['records']}{_gaps(decoded['parted'])}"
    )


def _gaps(differences: Sequence[dict[str, Any]]) -> str:
    """How close the two candidates were wherever the models disagree."""
    if not differences:
        return ""
    shown = ", ".join(f"{item['gap']:.3g}" for item in differences[:8])
    return f" (top-2 gaps where they part: {shown})"
