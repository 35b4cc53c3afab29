"""README.md of an exported directory: what it is, how it was made, how true it is, how to run it.

The front matter is what the Hub reads; nothing here depends on the time or place of the export.
"""

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from grace.export.card_texts import CONVERTED_TEXT, FORMAT_TEXT, LIBRARY, LIMITS, LOAD
from grace.export.contents import Source
from grace.export.provenance import KIND_NAMES
from grace.export.reference_qat import KIND as REFERENCE_QAT
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
    license = _LICENSE if source.trained else qat.info.get("license")
    front: dict[str, Any] = {
        **({"license": license} if license else {}),
        "library_name": LIBRARY[format_name],
        "pipeline_tag": "image-text-to-text",
        "tags": [
            *(["grace"] if _by_grace(source) else []),
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
        f"# {title(source, base)}",
        f"{_about(source)}\n\n{_format_text(source, format_name, parity)}",
        "## How to load\n\n" + LOAD[format_name].replace("TYPE", f"Q{qat.bits}_0"),
        *_origin(source, base),
        _parity(parity),
        "## Limitations\n\nIt inherits the limits and biases of its base model and teacher, may describe "
        "what is not in a picture, and was measured only as listed above. The parity figures compare it with "
        f"{'the model that was trained' if source.trained else 'what it was made from'}, "
        f"not with the full-precision one. {LIMITS[format_name]}",
        *_citation(source, format_name),
    ]
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


def title(source: Source, base: str) -> str:
    """What the card is called; `grace.export.provenance` reads it back."""
    name = PurePath(base).name or ("Qwen3-VL" if _by_grace(source) else source.directory.name)
    method = "GRACE " if _by_grace(source) else ""
    return f"{name}, {method}W{source.qat.bits}G{source.qat.group_size}"


def _by_grace(source: Source) -> bool:
    """Whether the model was trained by this method: by us, exported by us, or by the public code."""
    return source.trained or source.kind == REFERENCE_QAT or bool(source.qat.info.get("sections"))


def _about(source: Source) -> str:
    bits, groups, count = source.qat.bits, source.qat.group_size, len(source.qat.modules)
    rest = "The vision tower, embeddings and norms are not quantized."
    if _by_grace(source):
        return (
            f"A vision-language model distilled at its deployed precision: every linear of the decoder ({count} "
            f"modules) was trained as {bits}-bit codes in groups of {groups}. {rest}"
        )
    zeros = "" if source.symmetric else ", with zero points"
    return (
        f"A vision-language model whose decoder's linears ({count} modules) are {bits}-bit codes in groups of "
        f"{groups}{zeros}, taken over as another tool quantized them. {rest}"
    )


def _format_text(source: Source, format_name: str, parity: Mapping[str, Any]) -> str:
    if source.trained:
        return FORMAT_TEXT[format_name]
    rounded = "scale_rounding" in parity
    scales = "scales rounded once, to the nearest that the format has" if rounded else "scales"
    return CONVERTED_TEXT[format_name].replace("SCALES", scales)


def _origin(source: Source, base: str) -> list[str]:
    """Of a run what it was trained on; of anything else what it was made from, and what that said of itself."""
    if source.trained:
        return [_training(source, base), _metrics(source.qat.info.get("metrics"))]
    made = (
        f"## Source\n\nConverted from {KIND_NAMES[source.kind]}, `{source.directory.name}`: the same integer codes, "
        "nothing was quantized again."
    )
    return [made, *source.qat.info.get("sections", [])]


def _citation(source: Source, format_name: str) -> list[str]:
    method = ["The method: GRACE, arXiv:2601.22709."] if _by_grace(source) else []
    layout = ["The weight format: AWQ, arXiv:2306.00978."] if format_name == "awq" else []
    return [f"## Citation\n\n{' '.join([*method, *layout])}"] if method or layout else []


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
    rounded = figures.get("scale_rounding")
    rows = [("codes and scales equal to those of the source", "bit for bit")]
    if rounded:
        largest = f"{rounded['largest_relative']:.1e}"
        rows = [
            ("codes equal to those of the source", "bit for bit"),
            ("float32 scales, to the nearest that the format has", f"within {largest} of themselves"),
        ]
    if rounded and "logits_relative" in rounded:
        rows.append(
            ("which moves logits, largest difference / largest logit", f"{rounded['logits_relative']:.1e}")
        )
    if "exact" in figures:
        exact, fp32 = figures["exact"], figures["exact_greedy"]
        rows += [
            ("dense tensors equal to those of the source", "bit for bit"),
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
    return "\n".join(["## Parity with the source", "", "| figure | value |", "| --- | ---: |", *table])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
