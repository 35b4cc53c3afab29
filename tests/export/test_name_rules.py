"""The engines' name rules: against the libraries that are here, and against lists known to fail."""

import pytest
import torch
from transformers.quantizers.quantizers_utils import should_convert_module

from grace.errors import UserError
from grace.export import compressed_tensors, name_rules
from grace.export.source import Source, open_source
from grace.models import qwen3vl
from grace.models.foreign_names import AWQ_NOT_CONVERTED, mlx_name, sglang_module, vllm_module

DECODER = [f"model.language_model.layers.0.self_attn.{part}_proj" for part in "qkvo"]
TOWER = [
    "model.visual.blocks.0.attn.qkv",
    "model.visual.blocks.10.mlp.linear_fc1",
    "model.visual.merger.linear_fc2",
]
LINEARS = [*DECODER, *TOWER, "lm_head"]
LISTS = (
    ["visual"],
    ["model.visual"],
    ["visual", "model.visual", "lm_head"],
    [],
    ["model.visual.blocks.1"],
    ["fc1"],
)


@pytest.mark.parametrize("listed", LISTS, ids=str)
def test_the_transformers_rule_is_the_library_s(listed: list[str]):
    for name in LINEARS:
        assert name_rules.transformers_skips(name, listed) == (not should_convert_module(name, listed))


def test_the_compressed_tensors_rule_is_the_library_s():
    match = pytest.importorskip("compressed_tensors.utils.match")
    for listed in (
        compressed_tensors.IGNORED,
        ["re:visual"],
        ["re:.*visual"],
        ["model.visual"],
        ["lm_head"],
        TOWER,
    ):
        for name in LINEARS:
            expected = any(match.match_name(name, entry) for entry in listed)
            assert name_rules.compressed_tensors_ignores(name, listed) == expected, (name, listed)


def test_what_engines_call_the_modules():
    assert vllm_module(TOWER[0]) == "visual.blocks.0.attn.qkv"
    assert vllm_module(DECODER[0]) == "language_model.model.layers.0.self_attn.q_proj"
    assert vllm_module("lm_head") == "language_model.lm_head"
    assert sglang_module(TOWER[0]) == "visual.blocks.0.attn.qkv_proj"
    assert sglang_module(DECODER[0]) == "model.layers.0.self_attn.q_proj"
    assert mlx_name("model.visual.pos_embed.weight") == "vision_tower.pos_embed.weight"
    assert mlx_name("lm_head.weight") == "language_model.lm_head.weight"


def engines_that_misread(listed: list[str], rules: dict) -> set[str]:
    return {engine for engine, _, _ in name_rules.misread(LINEARS, DECODER, listed, rules)}


def test_the_published_lists_are_read_right_by_all():
    assert not engines_that_misread(AWQ_NOT_CONVERTED, name_rules.AWQ_RULES)
    assert not engines_that_misread(compressed_tensors.IGNORED, name_rules.COMPRESSED_TENSORS_RULES)


@pytest.mark.parametrize(
    ("listed", "rules", "engines"),
    [
        (["visual", "lm_head"], name_rules.AWQ_RULES, {"transformers"}),
        (["model.visual", "lm_head"], name_rules.AWQ_RULES, {"vLLM", "SGLang"}),
        (["visual", "model.visual"], name_rules.AWQ_RULES, {"transformers", "vLLM", "SGLang"}),
        (["lm_head", *TOWER], name_rules.COMPRESSED_TENSORS_RULES, {"vLLM", "SGLang"}),
        (["lm_head", "re:visual.*"], name_rules.COMPRESSED_TENSORS_RULES, {"transformers", "vLLM"}),
        (["re:.*"], name_rules.COMPRESSED_TENSORS_RULES, {"transformers", "vLLM", "SGLang"}),
    ],
    ids=range(6),
)
def test_lists_that_fail_are_noticed(listed: list[str], rules: dict, engines: set[str]):
    assert engines_that_misread(listed, rules) == engines


def test_an_export_that_an_engine_would_misread_is_refused(qat_run):
    source = open_source(qat_run)
    name_rules.require_awq_names(source, AWQ_NOT_CONVERTED)
    with pytest.raises(UserError, match="vLLM would take model.visual.* for quantized"):
        name_rules.require_awq_names(source, ["model.visual", "lm_head"])
    with pytest.raises(UserError, match="transformers would take lm_head for quantized"):
        name_rules.require_compressed_tensors_names(source, ["re:.*visual.*"])


def test_a_decoder_linear_left_dense_is_refused(qat_run):
    whole = open_source(qat_run)
    modules = dict(list(whole.qat.modules.items())[1:])
    state = type(whole.qat)(whole.qat.bits, whole.qat.group_size, modules, whole.qat.info)
    part = Source(whole.directory, state, whole.config, whole.weights)
    with pytest.raises(UserError, match="for quantized, but it is dense"):
        name_rules.require_awq_names(part, AWQ_NOT_CONVERTED)


def test_every_linear_of_the_model_is_judged(qat_run):
    model = qwen3vl.skeleton(qwen3vl.config_for(str(qat_run / "model")))
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    quantized = list(open_source(qat_run).qat.modules)
    assert set(quantized) < set(linears)
    for rules, listed in (
        (name_rules.AWQ_RULES, AWQ_NOT_CONVERTED),
        (name_rules.COMPRESSED_TENSORS_RULES, compressed_tensors.IGNORED),
    ):
        assert name_rules.misread(linears, quantized, listed, rules) == []
