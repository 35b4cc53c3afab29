"""README.md of an exported directory: what it is, how it was made, how true it is, how to run it.

The front matter is what the Hub reads; nothing here depends on the time or place of the export.
"""

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from grace.export.card_texts import FORMAT_TEXT, LIBRARY, LIMITS, LOAD
from grace.export.source import Source
from grace.recipe_parts import paths_of

_LICENSE = "apache-2.0"  # that of Qwen3-VL and of GRACE
# A base model that the Hub knows; any other text is a local path, which it would refuse as `base_model`.
_HUB_NAME = re.compile(r"Qwen/[\w.-]+")


def model_card(source: Source, format_name: str, parity: Mapping[str, Any]) -> str:
    """The whole README.md.

    Args:
        format_name: a key of `grace.export.pack.FORMATS`.
        parity: the gate's figures.
    """
    qat = source.qat
    base = str(qat.info.get("base_model") or "")
    front: dict[str, Any] = {
        "license": _LICENSE,
        "library_name": LIBRARY[format_name],
        "pipeline_tag": "image-text-to-text",
        "tags": [
            "grace",
            "qwen3_vl",
            "quantization",
            "int4" if qat.bits == 4 else f"int{qat.bits}",
            format_name,
        ],
    }
    if _HUB_NAME.fullmatch(base):
        front["base_model"] = base
        front["base_model_relation"] = "quantized"
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {PurePath(base).name or 'Qwen3-VL'}, GRACE W{qat.bits}G{qat.group_size}",
        "A vision-language model distilled at its deployed precision: every linear of the decoder "
        f"({len(qat.modules)} modules) was trained as {qat.bits}-bit codes in groups of {qat.group_size}. "
        "The vision tower, "
        f"embeddings and norms are not quantized.\n\n{FORMAT_TEXT[format_name]}",
        "## How to load\n\n" + LOAD[format_name].replace("TYPE", f"Q{qat.bits}_0"),
        _training(source, base),
        _metrics(qat.info.get("metrics")),
        _parity(parity),
        "## Limitations\n\nIt inherits the limits and biases of its base model and teacher, may describe "
        "what is not in a picture, and was measured only as listed above. The parity figures compare it with "
        "the model that was trained, "
        f"not with the full-precision one. {LIMITS[format_name]}",
        "## Citation\n\nThe method: GRACE, arXiv:2601.22709."
        + (" The weight format: AWQ, arXiv:2306.00978." if format_name == "awq" else ""),
    ]
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


def _training(source: Source, base: str) -> str:
    """Base model, data and recipe; file names without the folders they were in."""
    recipe, info = source.recipe, source.qat.info
    data, teacher = recipe.get("data") or {}, (recipe.get("teacher") or {}).get("path")
    facts = {
        "base model": base if _HUB_NAME.fullmatch(base) else PurePath(base).name,
        "teacher": PurePath(teacher).name if teacher else "none",
        "training data": ", ".join(
            PurePath(path).name for path in paths_of(data.get("path") or "not recorded")
        ),
        "validation data": PurePath(str(data.get("validation_path") or "none")).name,
        "optimizer steps": info.get("steps", "not recorded"),
        "recipe SHA-256": info.get("recipe_sha256", "not recorded"),
    }
    lines = ["## Training", "", *(f"- {name}: {value}" for name, value in facts.items())]
    settings = {name: dict(recipe[name]) for name in ("quant", "distill", "optim") if recipe.get(name)}
    if settings:
        lines += ["", "```yaml", yaml.safe_dump(settings, sort_keys=False).rstrip(), "```"]
    return "\n".join(lines)


def _metrics(metrics: Any) -> str:
    if not isinstance(metrics, Mapping) or not metrics:
        return "## Metrics\n\nNone were recorded during training."
    rows = [f"| {name} | {_number(value)} |" for name, value in sorted(metrics.items())]
    return "\n".join(
        [
            "## Metrics",
            "",
            "On the validation data, at the end of training.",
            "",
            "| metric | value |",
            "| --- | ---: |",
            *rows,
        ]
    )


def _parity(figures: Mapping[str, Any]) -> str:
    """The gate's figures as a table."""
    rows = [("codes and scales equal to the trained ones", "bit for bit")]
    if "exact" in figures:
        exact, fp32 = figures["exact"], figures["exact_greedy"]
        rows += [
            ("dense tensors equal to the trained ones, as bfloat16", "bit for bit"),
            ("positions compared", f"{figures['positions']} in {figures['records']} records"),
            ("fp32 logits, largest difference / largest logit", f"{exact['relative']:.1e}"),
            ("fp32 greedy answers identical", f"{fp32['identical']} of {fp32['records']}"),
        ]
    if "deployed" in figures:
        deployed, greedy = figures["deployed"], figures["greedy"]
        gaps = [item["gap"] for item in deployed["top1_differences"] + greedy["parted"]]
        rows += [
            ("bfloat16 logits, largest difference", f"{deployed['max_abs']:.3g}"),
            ("bfloat16 logits, mean difference", f"{deployed['mean_abs']:.3g}"),
            ("tolerance (4x the effect of bfloat16 itself)", f"{deployed['tolerance']:.3g}"),
            ("KL divergence, mean / max, nats", f"{deployed['kl_mean']:.1e} / {deployed['kl_max']:.1e}"),
            ("same best token", f"{deployed['top1_agreement']:.2%}"),
            ("bfloat16 greedy answers identical", f"{greedy['identical']} of {greedy['records']}"),
            ("largest logit gap where tokens differ", f"{max(gaps):.3g}" if gaps else "they do not"),
        ]
    table = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["## Parity with the trained model", "", "| figure | value |", "| --- | ---: |", *table])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
