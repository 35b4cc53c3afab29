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
from grace.export.card_tables import Rows, bullets, metrics, parity_table, scores, table
from grace.export.card_texts import (
    ASK,
    CITATION,
    CONVERTED_TEXT,
    FORMAT_TEXT,
    LIBRARY,
    LIMITED,
    LIMITS,
    LOAD,
    STORED_SCALES,
)
from grace.export.contents import Source
from grace.export.directory import deployed_dtype
from grace.export.provenance import KIND_NAMES
from grace.export.reference_qat import KIND as REFERENCE_QAT
from grace.quant.grid import SCALE_MAX, SCALE_MIN, code_range
from grace.recipe_parts import paths_of

_LICENSE = "apache-2.0"  # that of Qwen3-VL and of GRACE
# A base model that the Hub knows; any other text is a local path, which it would refuse as `base_model`.
_HUB_NAME = re.compile(r"Qwen/[\w.-]+")


def model_card(
    source: Source, format_name: str, parity: Mapping[str, Any], card: CardInputs = NOTHING
) -> str:
    """The whole README.md.

    Args:
        format_name: a key of `grace.export.pack.FORMATS`.
        parity: the gate's figures.
        card: what the run does not know of itself.
    """
    base = card.base_model or _base_model(source)
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(source, format_name, base, card), sort_keys=False)}---",
        f"# {title(source, base)}",
        f"{_about(source)} The vision tower, its mergers, embeddings, head and norms are not quantized.\n\n"
        f"{_format_text(source, format_name, parity)}",
        "## How to load\n\n"
        + LOAD[format_name]
        .replace("TYPE", f"Q{source.qat.bits}_0")
        .replace("WIDE", {"bfloat16": "BF16", "float16": "F16"}[deployed_dtype(source)])
        .replace("ASK", ASK.rstrip()),
        _quantization(source, format_name),
        *_origin(source, base, card),
        parity_table(parity),
        f"## Limitations\n\n{LIMITED} {LIMITS[format_name]}",
        *_citation(source, format_name),
    ]
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


# ---------------------------------------------------------------- what it is


def _front_matter(source: Source, format_name: str, base: str, card: CardInputs) -> dict[str, Any]:
    bits = source.qat.bits
    method = ["grace"] if _by_grace(source) else []
    tags = [*method, "qwen3_vl", "quantization", f"int{bits}", format_name]
    license = _LICENSE if source.ours else source.qat.info.get("license")
    front: dict[str, Any] = {
        **({"license": license} if license else {}),
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


def _by_grace(source: Source) -> bool:
    """Whether the model was trained by this method: by us, exported by us, or by the public code."""
    return source.trained or source.kind == REFERENCE_QAT or bool(source.qat.info.get("sections"))


def _made(source: Source) -> str:
    """Where codes and scales come from, in one word."""
    if _by_grace(source):
        return "trained"
    return "read" if source.rounded is None else "rounded"


def title(source: Source, base: str) -> str:
    """What the card is called; `grace.export.provenance` reads it back."""
    name = PurePath(base).name or ("Qwen3-VL" if _by_grace(source) else source.directory.name)
    method = {"trained": "GRACE ", "rounded": "round-to-nearest ", "read": ""}[_made(source)]
    return f"{name}, {method}W{source.qat.bits}G{source.qat.group_size}"


def _about(source: Source) -> str:
    bits, groups, count = source.qat.bits, source.qat.group_size, len(source.qat.modules)
    if _by_grace(source):
        return (
            f"A vision-language model distilled at its deployed precision: every linear of the decoder ({count} "
            f"modules) was trained as {bits}-bit codes in groups of {groups}."
        )
    if source.rounded is not None:
        return (
            "A vision-language model rounded to nearest, without training: the baseline that trained ones are "
            f"measured against. Every linear of the decoder ({count} modules) is {bits}-bit codes in groups of "
            f"{groups}."
        )
    zeros = "" if source.symmetric else ", with zero points"
    return (
        f"A vision-language model whose decoder's linears ({count} modules) are {bits}-bit codes in groups of "
        f"{groups}{zeros}, taken over as another tool quantized them."
    )


def _format_text(source: Source, format_name: str, parity: Mapping[str, Any]) -> str:
    """What is in the directory."""
    if source.ours:
        return FORMAT_TEXT[format_name].replace("MADE", _made(source))
    rounded = "scale_rounding" in parity
    scales = "scales rounded once, to the nearest that the format has" if rounded else "scales"
    return CONVERTED_TEXT[format_name].replace("SCALES", scales)


def _quantization(source: Source, format_name: str) -> str:
    qat = source.qat
    low, high = code_range(qat.bits)
    kinds = sorted({name.rpartition(".")[2] for name in qat.modules})
    scales = "one per group"
    if source.ours:
        scales += (
            f", bfloat16 within [2^{math.log2(SCALE_MIN):.0f}, 2^{math.log2(SCALE_MAX):.0f}]; here "
            f"{STORED_SCALES[format_name]}, the same numbers"
        )
    rows: Rows = [
        ("quantized", f"{len(qat.modules)} linears of the decoder ({', '.join(kinds)})"),
        (
            "codes",
            f"{qat.bits}-bit integers in [{low}, {high}]" + (", symmetric" if source.symmetric else ""),
        ),
        ("group size", f"{qat.group_size} along the input"),
        ("scales", scales),
        *([] if source.symmetric else [("zero points", "one per group")]),
        ("not quantized", "vision tower, mergers, embeddings, head, norms"),
    ]
    return "## Quantization\n\n" + table(("", ""), rows)


# ---------------------------------------------------------------- how it was made


def _origin(source: Source, base: str, card: CardInputs) -> list[str]:
    """How a model was made and what it scored; of a conversion what it was made from, and what that said of itself."""
    rounded = source.rounded
    if not source.ours:
        made = (
            f"## Source\n\nConverted from {KIND_NAMES[source.kind]}, `{source.directory.name}`: the same integer "
            "codes, nothing was quantized again."
        )
        scored = [] if card.results is None else [f"## Scores\n\n{scores(card.results)}"]
        return [made, *(source.qat.info.get("sections") or []), *scored]
    made = _training(source, base) if rounded is None else _rounding(source, base, rounded)
    return [made, metrics(source.qat.info.get("metrics"), card.results)]


def _rounding(source: Source, base: str, how: Mapping[str, Any]) -> str:
    command = f"grace quantize MODEL --bits {source.qat.bits} --group-size {source.qat.group_size}"
    facts: Rows = [
        ("base model", _short(base)),
        ("training and data", "none"),
        ("made by", f"`{command} --scales {how.get('scales')}`"),
    ]
    return bullets("## Making", facts)


def _training(source: Source, base: str) -> str:
    """Base model, data and recipe; file names without the folders they were in."""
    recipe, info = source.recipe, source.qat.info
    data, teacher = recipe.get("data") or {}, (recipe.get("teacher") or {}).get("path")
    facts: Rows = [
        ("base model", _short(base)),
        ("teacher", _short(teacher) if teacher else "none"),
        ("training data", "; ".join(_with_licence(path) for path in _data_files(source)) or "not recorded"),
        ("validation data", PurePath(str(data.get("validation_path") or "none")).name),
        ("optimizer steps", info.get("steps", "not recorded")),
        ("recipe SHA-256", info.get("recipe_sha256", "not recorded")),
    ]
    text = bullets("## Training", facts)
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


def _citation(source: Source, format_name: str) -> list[str]:
    method = ["The method: GRACE, arXiv:2601.22709."] if _by_grace(source) else []
    layout = ["The weight format: AWQ, arXiv:2306.00978."] if format_name == "awq" else []
    text = " ".join([*method, *layout])
    return [f"## Citation\n\n{text}" + (f"\n\n{CITATION}" if method else "")] if text else []
