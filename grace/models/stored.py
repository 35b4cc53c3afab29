"""Qwen3-VL as it lies in files: its config, the shapes that follow from it, and whether the weights have them."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from grace.checked_files import MEND, model_tensors, reason_of, shown
from grace.errors import UserError
from grace.models.config_check import read_config, require_possible
from grace.models.published import PUBLISHED_SHAPES, PUBLISHED_TEXT


def config_for(path: str) -> Qwen3VLConfig:
    """Configuration of a local model directory, or of a published model by name, offline.

    Raises:
        UserError: neither a directory with a Qwen3-VL config.json nor a known name.
    """
    if (Path(path) / "config.json").exists():
        return config_of(read_config(Path(path)), path)
    if path not in PUBLISHED_SHAPES:
        known = ", ".join(PUBLISHED_SHAPES)
        raise UserError(f"no model at {path}: give a directory with config.json, or one of {known}")
    shape = PUBLISHED_SHAPES[path]
    text = {**PUBLISHED_TEXT, **shape["text"]}
    vision = {"num_heads": 16, "out_hidden_size": shape["text"]["hidden_size"], **shape["vision"]}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape["tied"])


def config_of(stored: Mapping[str, Any], path: str | Path) -> Qwen3VLConfig:
    """The configuration that a config.json stands for.

    Raises:
        UserError: not Qwen3-VL's, or values that it refuses.
    """
    require_possible(stored, Path(path))
    try:
        return Qwen3VLConfig.from_dict(copy.deepcopy(dict(stored)))  # it writes into what it is given
    except Exception as error:  # the library raises several types for values that do not fit each other
        raise UserError(
            f"{path}/config.json cannot be read ({reason_of(error)}): give a Qwen3-VL directory"
        ) from error


def vocabulary_size(path: str) -> int:
    """Entries of the output layer; path and errors as `config_for`."""
    text: Any = config_for(path).text_config
    return text.vocab_size


def skeleton(config: Qwen3VLConfig) -> Qwen3VLForConditionalGeneration:
    """The model on the meta device: all shapes, no memory."""
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    model.tie_weights()
    return model


def parameter_shapes(config: Qwen3VLConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint, by name; a tied head is not among them.

    Raises:
        UserError: no model can be made of this config.
    """
    try:
        model = skeleton(config)
    except Exception as error:  # whatever a module makes of settings that it never expected
        raise UserError(
            f"config.json makes no model ({reason_of(error)}): give a Qwen3-VL directory"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


def from_tensors(
    config: Qwen3VLConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Qwen3VLForConditionalGeneration:
    """A model of these tensors, which it shares where they have its `dtype`, in evaluation mode.

    Raises:
        ValueError: one is missing, has another shape, or is no tensor of the model.
    """
    loaded = Qwen3VLForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        dtype=dtype,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    model, info = cast(tuple[Any, dict[str, Any]], loaded)
    faults = [f"{fault}: {sorted(map(str, info[fault]))[0]}" for fault in info if info[fault]]
    if faults:
        raise ValueError(f"tensors do not make a model ({faults[0]})")
    return model.eval()


def require_loadable(directory: Path) -> None:
    """Looks at every file of a model directory that a library will open, and compares shapes with the config.

    What from_pretrained does not find it makes up, whatever memory that takes.

    Raises:
        UserError: damaged files, or weights that are not those of the config.
    """
    stored = {name: tensor.shape for name, tensor in model_tensors(directory).items()}
    for name, shape in parameter_shapes(config_for(str(directory))).items():
        module = name.removesuffix(".weight")
        expected = {name: shape}
        if f"{module}.qweight" in stored and len(shape) == 2:  # an AWQ linear
            groups = (stored.get(f"{module}.scales") or (0,))[0]
            outputs, inputs = shape
            expected = {
                f"{module}.qweight": (inputs, outputs // 8),
                f"{module}.qzeros": (groups, outputs // 8),
                f"{module}.scales": (groups, outputs),
            }
        missing = sorted(set(expected) - set(stored))
        if missing:
            raise UserError(f"{directory} is damaged (missing keys, e.g. {missing[0]}): {MEND}")
        for part, wanted in expected.items():
            if stored[part] != wanted:
                raise UserError(
                    f"{directory} is damaged ({shown(part)} is {stored[part]}, its config.json says {wanted}): {MEND}"
                )
