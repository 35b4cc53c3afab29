"""The model card: what it says of a trained and of a rounded model, and that the Hub can read it."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from grace.checkpoint import QatState
from grace.errors import UserError
from grace.export.card_inputs import CardInputs, card_inputs, read_results
from grace.export.model_card import model_card
from grace.export.pack import FORMATS, export_run
from grace.export.push import require_card
from grace.export.source import Source, open_source

FIGURES = {"codes_identical": True, "dense_identical": True, "modules": 28}
RESULTS = {
    "tasks": {
        "ai2d": {"metric": "accuracy", "score": 0.71234, "ci_low": 0.69, "ci_high": 0.73, "n": 3088},
        "mmstar": {"score": 0.5},
    },
    "harness": {"name": "lmms-eval", "version": "0.7.3"},
}
SHAREGPT4V = "data/sharegpt4v/sharegpt4v_instruct_gpt4-vision_cap100k.json"


@pytest.fixture(scope="module")
def source(qat_run: Path) -> Source:
    return open_source(qat_run)


def with_info(source: Source, **changes: Any) -> Source:
    qat: QatState = dataclasses.replace(source.qat, info={**source.qat.info, **changes})
    return dataclasses.replace(source, qat=qat)


def with_recipe(source: Source, **sections: dict[str, Any]) -> Source:
    recipe = {**source.recipe, **{k: {**(source.recipe.get(k) or {}), **v} for k, v in sections.items()}}
    return with_info(source, recipe=recipe)


def front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("name", FORMATS)
def test_the_hub_reads_every_card(source: Source, tmp_path: Path, name: str):
    text = model_card(source, name, FIGURES)
    (tmp_path / "README.md").write_text(text)
    require_card(tmp_path / "README.md")
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "Qwen/Qwen3-VL-2B-Instruct" and data["base_model_relation"] == "quantized"
    assert data["pipeline_tag"] == "image-text-to-text" and data["license"] == "apache-2.0"
    assert {"grace", "int4", name} <= set(data["tags"])
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == [
        *("How to load", "Quantization", "Training", "Metrics", "Parity with the source"),
        *("Limitations", "Citation"),
    ]
    assert "ASK" not in text and "TYPE" not in text and "WIDE" not in text and "MADE" not in text


def test_data_of_a_known_set_comes_with_its_licence(source: Source):
    trained = with_recipe(source, data={"path": {SHAREGPT4V: 1, "/home/me/own.json": 0.5}})
    card = model_card(trained, "awq", FIGURES)
    assert "sharegpt4v_instruct_gpt4-vision_cap100k.json (ShareGPT4V, https://huggingface.co" in card
    assert "CC BY-NC 4.0" in card and "own.json (licence: its owner's)" in card and "/home/me" not in card
    assert front(card)["datasets"] == ["Lin-Chen/ShareGPT4V"]
    assert "datasets" not in front(model_card(source, "awq", FIGURES))


def test_the_base_model_is_the_one_on_the_hub(source: Source):
    second_stage = with_info(source, base_model="runs/qwen3vl_2b_bf16/model")
    assert "base_model" not in front(model_card(second_stage, "awq", FIGURES))
    named = with_recipe(second_stage, student={"base": "Qwen/Qwen3-VL-4B-Instruct"})
    assert front(model_card(named, "awq", FIGURES))["base_model"] == "Qwen/Qwen3-VL-4B-Instruct"
    given = CardInputs(base_model="me/my-qwen")
    assert front(model_card(named, "awq", FIGURES, given))["base_model"] == "me/my-qwen"
    for wrong in ("name", "a b/c", "a/b/c", ""):
        with pytest.raises(UserError, match="no model of the Hub: give OWNER/NAME"):
            card_inputs(wrong, None)


def test_metrics_come_with_what_made_them(source: Source):
    card = model_card(source, "awq", FIGURES, CardInputs(results=RESULTS))
    assert "Measured by `grace eval DIR --tasks ai2d,mmstar --out RESULTS` (lmms-eval 0.7.3):" in card
    assert (
        "| ai2d | accuracy | 0.7123 | 0.69 to 0.73 | 3088 |" in card and "| mmstar |  | 0.5 |  |  |" in card
    )
    assert "by `grace train` with the recipe above" in card and "| val/exact_match | 0.5 |" in card
    assert "None were recorded" in model_card(with_info(source, metrics={}), "awq", FIGURES)


def test_results_of_an_evaluation_reach_the_export(qat_run: Path, tmp_path: Path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    export_run(qat_run, tmp_path / "out", ("qat",), card=card_inputs("me/my-qwen", tmp_path))
    assert "| ai2d | accuracy | 0.7123 |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"tasks": {}}',
        '{"tasks": []}',
        '{"tasks": {"a": {}}}',
        '{"tasks": {"a": {"score": NaN}}}',
        '{"tasks": {"a": {"score": 1' + "0" * 400 + "}}}",
        "[" * 100_000,
    ],
)
def test_files_without_scores(tmp_path: Path, content: str):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match="holds no scores"):
        read_results(tmp_path / "x.json")
    with pytest.raises(UserError, match="holds no scores"):
        read_results(tmp_path / "absent.json")
