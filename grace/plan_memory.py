"""Memory of one training process, estimated line by line from shapes.

Weights, gradients and optimizer state are exact. The activation coefficients are bytes that autograd
saves per token, fitted to the real modules by counting saved tensors over widths (transformers 5.23,
torch 2.13, SDPA) and held to them by tests/test_plan.py. What a GPU's allocator adds is not in here.

Letters in the formulas: D width, Q query width, K key width, F feed-forward width of the decoder,
T tokens of a micro-batch, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any

from grace.config import Recipe
from grace.distill.fused import CHUNK_BYTES
from grace.models import qwen3vl
from grace.models.placement import block_bytes, spread, weight_bytes
from grace.plan_modes import MODES, state_rows

GIB = 2**30
PROCESSES = 8  # of the files in recipes/accelerate/

# Bytes saved per token and decoder layer, by width; the residual stream is float32 in both cases.
DECODER = {"bf16": {"D": 26, "Q": 10, "K": 10, "F": 8}, "fp32": {"D": 24, "Q": 16, "K": 16, "F": 16}}
# Bytes saved per patch and vision layer (width D, feed-forward F), and per patch, merger and width.
VISION = {"bf16": {"D": 22, "F": 4}, "fp32": {"D": 44, "F": 8}}
MERGER = {"bf16": 8, "fp32": 16}
EMBEDDING = 9  # bytes per token and width around the decoder: embedding output, final norm
PATCHES_PER_TOKEN = 4
SPREAD_SHOWN = (1, 3, 7)  # GPUs of a teacher where 8 are shared by 4, 2 or 1 processes


@dataclass(frozen=True)
class Sizes:
    """What memory depends on beside the recipe.

    Attributes:
        student, teacher: skeletons on the meta device; no teacher, None.
        trained: trained parameters of the student, scales not included.
        scales: learned group scales.
        records: records of a micro-batch.
        share: records of a step that this process sees.
        tokens, supervised, images: per record; image tokens are part of `tokens`.
        world_size: number of processes.
    """

    student: Any
    teacher: Any
    trained: int
    scales: int
    records: int
    share: int
    tokens: int
    supervised: int
    images: int
    world_size: int


def memory(sizes: Sizes, recipe: Recipe, mode: str) -> dict[str, Any]:
    """Items {name, gib, formula} and their sum, for one process at its fullest moment, and what it holds on the host.

    Args:
        mode: how it was launched, of `grace.plan_modes`.
    """
    precision, width = recipe.run.precision, 4 if recipe.run.precision == "fp32" else 2
    checkpointing = recipe.run.gradient_checkpointing
    linears = {name: m.weight.numel() for name, m in qwen3vl.decoder_linears(sizes.student).items()}
    items, host = state_rows(mode, sizes.student, sizes.trained, sizes.scales, sizes.world_size)
    if sizes.teacher is not None:
        items += _teacher_items(sizes, recipe)
    elif recipe.distils:
        k = recipe.teacher.cache_top_k
        cached = sizes.share * (sizes.supervised * (8 * k + 28) + 2 * sizes.images**2)
        items.append(
            (
                "cached teacher",
                cached,
                f"(8 x {k} + 28) bytes x supervised tokens of a step, 2 x image tokens^2",
            )
        )
    items.append(_copies(linears, sizes, recipe, width))
    items.append(
        (
            "activations",
            activation_bytes(
                sizes.student.config, sizes, precision, checkpointing, recipe.student.train_vision
            ),
            _activation_formula(precision, checkpointing),
        )
    )
    items += _loss_items(sizes, width)
    rows, host_rows = (
        [{"name": name, "gib": size / GIB, "formula": formula} for name, size, formula in some if size]
        for some in (items, host)
    )
    return {
        "mode": mode,
        "items": rows,
        "total_gib": sum(row["gib"] for row in rows),
        "host_items": host_rows,
        "host_gib": sum(row["gib"] for row in host_rows),
        "activations": _both(sizes, recipe),
    }


def memory_by_mode(sizes: Sizes, recipe: Recipe) -> list[dict[str, Any]]:
    """Rows {mode, processes, gib, host_gib} of a process for each way of launching several.

    With as many processes as there are, or as the files of `recipes/accelerate/` ask for.
    """
    processes = sizes.world_size if sizes.world_size > 1 else PROCESSES
    share = -(-recipe.optim.batch_size // processes)
    there = replace(sizes, world_size=processes, share=share, records=min(sizes.records, share))
    found = {mode: memory(there, recipe, mode) for mode in MODES}
    return [
        {"mode": mode, "processes": processes, "gib": one["total_gib"], "host_gib": one["host_gib"]}
        for mode, one in found.items()
    ]


def activation_bytes(
    config: Any, sizes: Sizes, precision: str, checkpointing: bool, train_vision: bool = False
) -> int:
    """Bytes that a micro-batch's forward pass leaves for its backward pass, head and loss excluded."""
    text, vision = config.text_config, config.vision_config
    tokens = sizes.records * sizes.tokens
    patches = PATCHES_PER_TOKEN * sizes.records * sizes.images
    widths = {
        "D": text.hidden_size,
        "Q": text.num_attention_heads * text.head_dim,
        "K": text.num_key_value_heads * text.head_dim,
        "F": text.intermediate_size,
    }
    layer = sum(DECODER[precision][name] * width for name, width in widths.items())
    layers = text.num_hidden_layers
    # Checkpointing keeps each layer's input, and rebuilds one layer at a time.
    decoder = layers * 4 * text.hidden_size + layer if checkpointing else layers * layer
    mergers = MERGER[precision] * vision.hidden_size * (1 + len(vision.deepstack_visual_indexes))
    tower = 0
    if train_vision:
        block = (
            VISION[precision]["D"] * vision.hidden_size + VISION[precision]["F"] * vision.intermediate_size
        )
        tower = vision.depth * 4 * vision.hidden_size + block if checkpointing else vision.depth * block
    return tokens * (decoder + EMBEDDING * text.hidden_size) + patches * (mergers + tower)


def _loss_items(sizes: Sizes, width: int) -> list[tuple[str, int, str]]:
    """What `grace.distill.fused` holds beside its inputs."""
    text = sizes.student.config.text_config
    dense = width * sizes.records * sizes.supervised * text.vocab_size
    chunk = min(dense, CHUNK_BYTES["cuda"]) * 5 // 4  # the teacher's logits come a quarter at a time
    return [
        ("logits", chunk, f"one chunk, at most 5/4 x {CHUNK_BYTES['cuda'] // 2**20} MiB"),
        ("head gradient", 4 * text.vocab_size * text.hidden_size, "4 bytes x V x D, of one micro-batch"),
    ]


def _both(sizes: Sizes, recipe: Recipe) -> dict[str, float]:
    """Activations in GiB with and without checkpointing, to compare."""
    return {
        name: activation_bytes(
            sizes.student.config, sizes, recipe.run.precision, checkpointing, recipe.student.train_vision
        )
        / GIB
        for name, checkpointing in {"checkpointed_gib": True, "kept_gib": False}.items()
    }


def _activation_formula(precision: str, checkpointing: bool) -> str:
    layer = " + ".join(f"{factor}{name}" for name, factor in DECODER[precision].items())
    if checkpointing:
        return f"T x (4D x layers + {layer}), checkpointed; mergers per image"
    return f"T x layers x ({layer}), all kept; mergers per image"


def _teacher_items(sizes: Sizes, recipe: Recipe) -> list[tuple[str, int, str]]:
    """What lies beside the student: the weights, or the output layer alone if they are elsewhere."""
    width, text = _teacher_width(recipe), sizes.teacher.config.text_config
    hidden = sizes.share * (sizes.supervised + sizes.images) * text.hidden_size
    signals = "teacher signals", hidden * width, f"{width} bytes x D x (supervised + image tokens of a step)"
    if recipe.teacher.device is None:
        held = sum(weight_bytes(sizes.teacher, width, recipe.teacher.load_in).values())
        return [("teacher weights", held, _teacher_formula(recipe)), signals]
    head = text.vocab_size * text.hidden_size * width
    return [("teacher head", head, f"{width} bytes x V x D, beside the student"), signals]


def teacher_elsewhere(sizes: Sizes, recipe: Recipe) -> list[dict[str, Any]] | None:
    """Rows {name, gib, formula} of the teacher's weights on devices of its own; None if it has none."""
    asked = recipe.teacher.device
    if sizes.teacher is None or asked is None:
        return None
    held = weight_bytes(sizes.teacher, _teacher_width(recipe), recipe.teacher.load_in)
    blocks = block_bytes(sizes.teacher, held)
    rows = [{"name": "weights", "gib": sum(blocks.values()) / GIB, "formula": _teacher_formula(recipe)}]
    for count in SPREAD_SHOWN if asked == "spread" else ():
        on = dict.fromkeys(range(count), 0)
        for block, place in spread(sizes.teacher, held, list(on)).items():
            on[place] += blocks[block]
        where = f"spread over {count} GPU{'s' * (count > 1)}"
        rows.append({"name": where, "gib": max(on.values()) / GIB, "formula": "on the fullest"})
    return rows


def _teacher_width(recipe: Recipe) -> int:
    return 4 if recipe.teacher.dtype == "float32" else 2


def _teacher_formula(recipe: Recipe) -> str:
    width, but_head = _teacher_width(recipe), ", head left out" * (recipe.teacher.device is not None)
    if recipe.teacher.load_in is None:
        return f"{width} bytes x parameters{but_head}"
    linears = {"8bit": "1 byte (and 4 a row)", "4bit": "9/16 byte"}[recipe.teacher.load_in]
    return f"{linears} x decoder linears, {width} bytes x the rest{but_head}"


def _copies(linears: dict[str, int], sizes: Sizes, recipe: Recipe, width: int) -> tuple[str, int, str]:
    """Weights in the dtype of the matrix products, beside the float32 latents."""
    decoder = sum(linears.values())
    head = sizes.student.config.text_config.vocab_size * sizes.student.config.text_config.hidden_size
    cast_head = head * 2 if recipe.run.precision == "bf16" else 0
    if recipe.quant.bits is None:
        if recipe.run.precision == "fp32":
            return "compute copies", 0, ""
        return (
            "compute copies",
            decoder * 2 + cast_head,
            "2 bytes x (decoder linears + head), cached by autocast",
        )
    if recipe.run.gradient_checkpointing:
        largest = max(linears.values()) * 4
        size = width * decoder // sizes.student.config.text_config.num_hidden_layers + largest + cast_head
        return "compute copies", size, f"{width} bytes x (one layer's linears + head) + one float32 W_hat"
    return "compute copies", width * decoder + cast_head, f"{width} bytes x (decoder linears' W_hat + head)"
