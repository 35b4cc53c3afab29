"""Which modules an engine takes for quantized: the name-matching rules of those that read our exports.

Each engine decides by name, each by its own rule, and a vision tower or head taken for quantized need not
fail: it may load as noise. The rules are restated here, with the version they hold for (module names:
`grace.models.foreign_names`), and an export that one of them would misread is refused.

    transformers 5.23       quantizers/quantizers_utils.py should_convert_module; compressed-tensors 0.20
                            utils/match.py match_name for that format
    vLLM 0.33               quantization/utils/quant_utils.py is_layer_skipped (substrings), after
                            models/utils.py WeightsMapper on the list; compressed_tensors/utils.py
                            should_ignore_layer
    SGLang 0.5.23           quantization/awq.py is_layer_skipped_awq; compressed_tensors/utils.py
                            should_ignore_layer
"""

import re
from collections.abc import Callable, Sequence

from torch import nn

from grace.errors import UserError
from grace.export.contents import Source
from grace.models import qwen3vl
from grace.models.foreign_names import sglang_module, vllm_entry, vllm_module

Rule = Callable[[str, Sequence[str]], bool]


def transformers_skips(name: str, listed: Sequence[str]) -> bool:
    """AWQ: a path from the start to a module boundary, as a regular expression, or a suffix."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{entry}){boundary}", name) or name.endswith(entry) for entry in listed)


def vllm_skips(name: str, listed: Sequence[str]) -> bool:
    """AWQ: a substring of vLLM's own name, the entries renamed where a whole prefix matches."""
    return any(vllm_entry(entry) in vllm_module(name) for entry in listed)


def sglang_skips(name: str, listed: Sequence[str]) -> bool:
    """AWQ: a substring of SGLang's own name."""
    return any(entry in sglang_module(name) for entry in listed)


def compressed_tensors_ignores(name: str, listed: Sequence[str]) -> bool:
    """compressed-tensors in transformers: the exact name, or a regular expression after `re:`."""
    return any(_equal_or_regex(name, entry) for entry in listed)


def vllm_ignores(name: str, listed: Sequence[str]) -> bool:
    """compressed-tensors in vLLM: the same on vLLM's names, the entries renamed like them."""
    return any(_equal_or_regex(vllm_module(name), vllm_entry(entry)) for entry in listed)


def sglang_ignores(name: str, listed: Sequence[str]) -> bool:
    """compressed-tensors in SGLang: a regular expression after `re:`, or a substring in any case."""
    own = sglang_module(name)
    return any(
        re.match(entry[3:], own) if entry.startswith("re:") else entry.lower() in own.lower()
        for entry in listed
    )


AWQ_RULES: dict[str, Rule] = {
    "transformers": transformers_skips,
    "vLLM": vllm_skips,
    "SGLang": sglang_skips,
}
COMPRESSED_TENSORS_RULES: dict[str, Rule] = {
    "transformers": compressed_tensors_ignores,
    "vLLM": vllm_ignores,
    "SGLang": sglang_ignores,
}


def require_awq_names(source: Source, listed: Sequence[str]) -> None:
    """Raises `UserError` if an engine would misread an AWQ directory with this `modules_to_not_convert`."""
    _require(source, listed, AWQ_RULES, "AWQ")


def require_compressed_tensors_names(source: Source, listed: Sequence[str]) -> None:
    """Raises `UserError` if an engine would misread a compressed-tensors directory with this `ignore`."""
    _require(source, listed, COMPRESSED_TENSORS_RULES, "compressed-tensors")


def misread(
    linears: Sequence[str], quantized: Sequence[str], listed: Sequence[str], rules: dict[str, Rule]
) -> list[tuple[str, str, bool]]:
    """(engine, module, is it quantized) wherever an engine's rule and the truth differ."""
    truth = set(quantized)
    return [
        (engine, name, name in truth)
        for engine, skips in rules.items()
        for name in linears
        if skips(name, listed) == (name in truth)
    ]


def _require(source: Source, listed: Sequence[str], rules: dict[str, Rule], label: str) -> None:
    model = qwen3vl.skeleton(qwen3vl.config_of(source.config, source.directory))
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    unknown = sorted(set(source.qat.modules) - set(linears))
    if unknown:
        raise UserError(f"{source.directory} lists {unknown[0]}, which its config.json does not have")
    for engine, name, quantized in misread(linears, sorted(source.qat.modules), listed, rules):
        taken, true = ("dense", "quantized") if quantized else ("quantized", "dense")
        raise UserError(
            f"{label} cannot be written: {engine} would take {name} for {taken}, but it is {true}: "
            "export it with --format qat"
        )


def _equal_or_regex(name: str, entry: str) -> bool:
    return bool(re.match(entry[3:], name)) if entry.startswith("re:") else entry == name
