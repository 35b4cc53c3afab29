"""README.md of an exported directory: what it is, how it was made, how true it is, how to run it.

The front matter is what the Hub reads; nothing here depends on the time or place of the export.
"""

import math
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from grace.data.manifest import published_as
from grace.export.card_inputs import NOTHING, CardInputs
from grace.export.card_texts import ASK, CITATION, FORMAT_TEXT, LIBRARY, LIMITS, LOAD, STORED_SCALES
from grace.export.source import Source
from grace.quant.grid import SCALE_MAX, SCALE_MIN, code_range
from grace.recipe_parts import paths_of

_LICENSE = "apache-2.0"  # that of Qwen3-VL and of GRACE
# A base model that the Hub knows; any other text is a local path, which it would refuse as `base_model`.
_HUB_NAME = re.compile(r"Qwen/[\w.-]+")
Rows = list[tuple[str, Any]]


def model_card(
    source: Source, format_name: str, parity: Mapping[str, Any], card: CardInputs = NOTHING
) -> str:
    """The whole README.md.

    Args:
        format_name: a key of `grace.export.pack.FORMATS`.
        parity: the gate's figures.
        card: what the run does not know of itself.
    """
    qat = source.qat
    base = card.base_model or _base_model(source)
    made = "trained" if _rounded(source) is None else "rounded"
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(source, format_name, base, card), sort_keys=False)}---",
        f"# {PurePath(base).name or 'Qwen3-VL'}, {_origin(source)} W{qat.bits}G{qat.group_size}",
        f"{_about(source)} The vision tower, its mergers, embeddings, head and norms are not quantized.\n\n"
        f"{FORMAT_TEXT[format_name].replace('MADE', made)}",
        "## How to load\n\n"
        + LOAD[format_name].replace("TYPE", f"Q{qat.bits}_0").replace("ASK", ASK.rstrip()),
        _quantization(source, format_name),
        _making(source, base),
        _metrics(source, card),
        _parity(parity, made),
        "## Limitations\n\nIt inherits the limits and biases of its base model"
        f"{' and teacher' if source.recipe else ''}, may describe what is not in a picture, and was measured only "
        "as listed above. The parity figures compare it with the model before packing, not with the "
        f"full-precision one. {LIMITS[format_name]}",
        "## Citation\n\n"
        + ("" if _rounded(source) is not None else "The method: GRACE, arXiv:2601.22709. ")
        + f"The base model: Qwen3-VL.{' The weight format: AWQ, arXiv:2306.00978.' if format_name == 'awq' else ''}"
        + ("" if _rounded(source) is not None else f"\n\n{CITATION}"),
    ]
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


# ---------------------------------------------------------------- what it is


def _front_matter(source: Source, format_name: str, base: str, card: CardInputs) -> dict[str, Any]:
    bits = source.qat.bits
    tags = ["grace", "qwen3_vl", "quantization", f"int{bits}", format_name]
    front: dict[str, Any] = {
        "license": _LICENSE,
        "library_name": LIBRARY[format_name],
        "pipeline_tag": "image-text-to-text",
        "tags": tags,
    }
    if card.base_model or _HUB_NAME.fullmatch(base):
        front["base_model"] = base
        front["base_model_relation"] = "quantized"
    repositories = [data["repository"] for data in _data_sets(source) if "repository" in data]
    names = [address.partition("huggingface.co/datasets/")[2] for address in repositories]
    if datasets := sorted({name for name in names if name}):
        front["datasets"] = datasets
    return front


def _base_model(source: Source) -> str:
    """The model that training or rounding began with: by its name on the Hub where the run says that."""
    began = str(source.qat.info.get("base_model") or "")
    shape = str((source.recipe.get("student") or {}).get("base") or "")
    return shape if not _HUB_NAME.fullmatch(began) and _HUB_NAME.fullmatch(shape) else began


def _rounded(source: Source) -> Mapping[str, Any] | None:
    """How the codes were rounded, if they were not trained."""
    rounded = source.qat.info.get("rounded")
    return rounded if isinstance(rounded, Mapping) else None


def _origin(source: Source) -> str:
    return "GRACE" if _rounded(source) is None else "round-to-nearest"


def _about(source: Source) -> str:
    qat, count = source.qat, len(source.qat.modules)
    if _rounded(source) is None:
        return (
            "A vision-language model distilled at its deployed precision: every linear of the decoder "
            f"({count} modules) was trained as {qat.bits}-bit codes in groups of {qat.group_size}."
        )
    return (
        "A vision-language model rounded to nearest, without training: the baseline that trained ones are "
        f"measured against. Every linear of the decoder ({count} modules) is {qat.bits}-bit codes in groups of "
        f"{qat.group_size}."
    )


def _quantization(source: Source, format_name: str) -> str:
    qat = source.qat
    low, high = code_range(qat.bits)
    kinds = sorted({name.rpartition(".")[2] for name in qat.modules})
    rows: Rows = [
        ("quantized", f"{len(qat.modules)} linears of the decoder ({', '.join(kinds)})"),
        ("codes", f"{qat.bits}-bit integers in [{low}, {high}], symmetric"),
        ("group size", f"{qat.group_size} along the input"),
        (
            "scales",
            f"one per group, bfloat16 within [2^{math.log2(SCALE_MIN):.0f}, 2^{math.log2(SCALE_MAX):.0f}]; "
            f"here {STORED_SCALES[format_name]}, the same numbers",
        ),
        ("not quantized", "vision tower, mergers, embeddings, head, norms"),
    ]
    return "## Quantization\n\n" + _table(("", ""), rows)


# ---------------------------------------------------------------- how it was made


def _making(source: Source, base: str) -> str:
    """Base model, data and recipe; file names without the folders they were in."""
    recipe, info, rounded = source.recipe, source.qat.info, _rounded(source)
    facts: Rows = [("base model", base if base.count("/") == 1 else PurePath(base).name)]
    if rounded is not None:
        command = f"grace quantize MODEL --bits {source.qat.bits} --group-size {source.qat.group_size}"
        facts += [("training and data", "none"), ("made by", f"`{command} --scales {rounded.get('scales')}`")]
        return _list("## Making", facts)
    data, teacher = recipe.get("data") or {}, (recipe.get("teacher") or {}).get("path")
    facts += [
        ("teacher", _short(teacher) if teacher else "none"),
        ("training data", "; ".join(_with_licence(path) for path in _data_files(source)) or "not recorded"),
        ("validation data", PurePath(str(data.get("validation_path") or "none")).name),
        ("optimizer steps", info.get("steps", "not recorded")),
        ("recipe SHA-256", info.get("recipe_sha256", "not recorded")),
    ]
    text = _list("## Training", facts)
    settings = {name: dict(recipe[name]) for name in ("quant", "distill", "optim") if recipe.get(name)}
    if settings:
        text += f"\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=False).rstrip()}\n```"
    return text


def _data_files(source: Source) -> list[str]:
    path = (source.recipe.get("data") or {}).get("path")
    return paths_of(path) if path else []


def _data_sets(source: Source) -> list[dict[str, str]]:
    return [found for path in _data_files(source) if (found := published_as(path))]


def _with_licence(path: str) -> str:
    found = published_as(path)
    known = f"{found['name']}, {found['repository']}: {found['licence']}" if found else "licence: its owner's"
    return f"{PurePath(path).name} ({known})"


def _short(path: str) -> str:
    return path if _HUB_NAME.fullmatch(path) else PurePath(path).name


# ---------------------------------------------------------------- how good and how true it is


def _metrics(source: Source, card: CardInputs) -> str:
    metrics = source.qat.info.get("metrics")
    parts = ["## Metrics"]
    if card.results is not None:
        parts.append(_scores(card.results))
    if isinstance(metrics, Mapping) and metrics:
        made = "On the validation data, at the end of training, by `grace train` with the recipe above."
        rows: Rows = [(name, _number(value)) for name, value in sorted(metrics.items())]
        parts.append(f"{made}\n\n{_table(('metric', 'value'), rows)}")
    if len(parts) == 1:
        parts.append("None were recorded.")
    return "\n\n".join(parts)


def _scores(results: Mapping[str, Any]) -> str:
    """Benchmark scores with their 95 % intervals, and the command that made them."""
    lines = ["| task | metric | score | 95 % interval | questions |", "| --- | --- | ---: | ---: | ---: |"]
    for name, task in sorted(results["tasks"].items()):
        low, high = task.get("ci_low"), task.get("ci_high")
        interval = "" if low is None or high is None else f"{_number(low)} to {_number(high)}"
        lines.append(
            f"| {name} | {task.get('metric', '')} | {_number(task['score'])} | {interval} | {task.get('n', '')} |"
        )
    command = (
        results.get("command") or f"grace eval DIR --tasks {','.join(sorted(results['tasks']))} --out RESULTS"
    )
    harness = f" ({_harness(results['harness'])})" if results.get("harness") else ""
    return f"Measured by `{command}`{harness}:\n\n" + "\n".join(lines)


def _harness(value: Any) -> str:
    return " ".join(map(str, value.values())) if isinstance(value, Mapping) else str(value)


def _parity(figures: Mapping[str, Any], made: str) -> str:
    """The gate's figures as a table."""
    rows: Rows = [(f"codes and scales equal to the {made} ones", "bit for bit")]
    if figures.get("dense_identical"):
        rows.append(("dense tensors equal to those before packing, as bfloat16", "bit for bit"))
    if "exact" in figures:
        exact, fp32 = figures["exact"], figures["exact_greedy"]
        rows += [
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
    said = "Checked by the export on its own files before they were published; `grace_export.json` has the figures."
    return f"## Parity with the model before packing\n\n{said}\n\n{_table(('figure', 'value'), rows)}"


# ---------------------------------------------------------------- Markdown


def _list(title: str, facts: Rows) -> str:
    return "\n".join([title, "", *(f"- {name}: {value}" for name, value in facts)])


def _table(head: tuple[str, str], rows: Rows) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "| --- | --- |", *lines])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
