"""The Qwen3-VL processor, with or without torchvision.

The library's own class insists on a video processor, which needs torchvision. GRACE feeds it
pictures only, so this one has none; the image processor is always the PIL one, so that the
same picture gives the same pixels on every machine.
"""

import math
import re
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

from grace.checked_files import reason_of, require_regular, shown
from grace.errors import UserError

# The tokens the chat format is built from: a tokenizer without them belongs to another model.
STRUCTURE_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


_LARGEST_MINIMUM = 2**24  # pixels that any picture, however small, may be scaled up to


class Qwen3VLProcessor(transformers.Qwen3VLProcessor):
    """Image processor + tokenizer, no video. The name is what gets saved, so stock tools know it."""

    tokenizer: Any
    image_processor: Any
    image_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None):
        super().__init__(image_processor, tokenizer, video_processor=None, chat_template=chat_template)
        self.video_processor = None


def load_processor(
    path: str | Path, min_pixels: int | None = None, max_pixels: int | None = None
) -> Qwen3VLProcessor:
    """Loads a processor from a model directory (old or new layout) or from a Hub name.

    Args:
        path: directory with tokenizer.json and processor_config.json or preprocessor_config.json.
        min_pixels: smallest area (height x width) a picture is scaled up to; None keeps the stored one.
        max_pixels: largest area a picture is scaled down to; None keeps the stored one.

    Raises:
        UserError: nothing readable there, another model's processor, or an impossible pixel budget.
    """
    name = str(path)
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None
    if not Path(name).is_dir() and not is_hub_name:
        raise UserError(f"no processor at {name}: give a Qwen3-VL model directory")
    if Path(name).is_dir():
        require_regular(Path(name))
    try:
        stored, _ = Qwen2VLImageProcessorPil.get_image_processor_dict(name)
        image_processor: Any = Qwen2VLImageProcessorPil.from_dict(stored)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        chat_template = (
            Qwen3VLProcessor.get_processor_dict(name)[0].get("chat_template") or tokenizer.chat_template
        )
    except Exception as error:  # the library raises a dozen types for damaged input
        raise UserError(
            f"cannot load a Qwen3-VL processor from {name} ({reason_of(error)}): give a Qwen3-VL directory"
        ) from error
    kind = str(stored.get("image_processor_type", "Qwen2VLImageProcessor"))
    absent = [token for token in STRUCTURE_TOKENS if token not in tokenizer.get_vocab()]
    if not kind.startswith(("Qwen2VL", "Qwen3VL")) or absent:
        what = (
            f"its tokenizer has no {absent[0]}" if absent else f"its image processor is a {shown(kind)[1:-1]}"
        )
        raise UserError(f"{name} is not a Qwen3-VL directory ({what}): give one that is")
    _require_possible(image_processor, name)
    if type(tokenizer.model_max_length) not in (int, float):
        raise UserError(
            f"the tokenizer in {name} is impossible (model_max_length is {shown(tokenizer.model_max_length)}): "
            "restore it"
        )
    image_processor.size = _pixel_budget(image_processor, min_pixels, max_pixels)
    return Qwen3VLProcessor(image_processor, tokenizer, chat_template=chat_template)


def _require_possible(image_processor: Any, name: str) -> None:
    """Raises `UserError` for settings that would blow a picture up beyond any memory, or that are no numbers."""
    sizes = {"patch_size": 1024, "merge_size": 64, "temporal_patch_size": 64}
    values = {setting: getattr(image_processor, setting, None) for setting in sizes}
    good = {key: type(value) is int and 1 <= value <= sizes[key] for key, value in values.items()}
    edges = dict(image_processor.size or {})
    limits = {"shortest_edge": _LARGEST_MINIMUM, "longest_edge": 2**40}
    for edge, most in limits.items():
        values[edge], good[edge] = edges.get(edge), type(edges.get(edge)) is int and 1 <= edges[edge] <= most
    for setting in ("image_mean", "image_std"):
        values[setting] = getattr(image_processor, setting, None)
        good[setting] = _three_numbers(values[setting])
    for setting in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        values[setting] = getattr(image_processor, setting, None)
        good[setting] = values[setting] is None or isinstance(values[setting], bool)
    values["rescale_factor"] = getattr(image_processor, "rescale_factor", None)
    good["rescale_factor"] = type(values["rescale_factor"]) in (int, float)
    bad = next((key for key, fine in good.items() if not fine), None)
    if bad is not None:
        raise UserError(
            f"the image processor in {name} is impossible ({bad} is {shown(values[bad])}): restore it"
        )


def _three_numbers(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(type(item) in (int, float) and math.isfinite(item) for item in value)
    )


def _pixel_budget(image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> dict[str, int]:
    """The image processor's `size`, whose two edges are areas in pixels in spite of their names."""
    tile = (image_processor.patch_size * image_processor.merge_size) ** 2  # pixels behind one visual token
    smallest = image_processor.size["shortest_edge"] if min_pixels is None else min_pixels
    largest = image_processor.size["longest_edge"] if max_pixels is None else max_pixels
    if max_pixels is not None and min_pixels is None:
        smallest = min(smallest, largest)
    if min_pixels is not None and max_pixels is None:
        largest = max(smallest, largest)
    if smallest < 1 or largest < max(smallest, tile):
        raise UserError(
            f"data.min_pixels={smallest} and data.max_pixels={largest} leave no room for a picture: "
            f"max_pixels must be at least min_pixels and {tile} (one visual token)"
        )
    return {"shortest_edge": smallest, "longest_edge": largest}
