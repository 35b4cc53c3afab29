"""What a recipe would do, worked out from shapes alone: `python -m grace.train RECIPE --dry-run`.

Nothing is downloaded or allocated: models stand on the meta device, and while the data file is absent
the recipe's expectations (`data.expected_*`) stand in for it. Parameter counts are exact. Tokens and
memory are estimates; every line of memory states its formula.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from grace.config import Recipe
from grace.data.records import Record, mixture_of
from grace.data.template import encode
from grace.errors import UserError
from grace.models import qwen3vl
from grace.models.processor import load_processor
from grace.models.tiny import build_tokenizer, tiny_config
from grace.plan_memory import Sizes, memory, memory_by_mode, teacher_elsewhere
from grace.plan_modes import launched_mode
from grace.plan_text import format_plan
from grace.run import total_steps
from grace.run_data import load_run_data

__all__ = ["format_plan", "parameter_counts", "plan"]

PARTS = ("vision_tower", "mergers", "decoder_linears", "embeddings", "head", "norms")
SMALL_WORLD = {"small_world/student": "student", "small_world/teacher": "teacher"}  # names for `base`
PIXELS_PER_TOKEN = 32**2  # patches of 16 x 16 pixels, merged 2 x 2
MEASURED_RECORDS = 16  # encoded to measure the tokens of a record, where model and pictures are there


def plan(recipe: Recipe, world_size: int | None = None) -> dict[str, Any]:
    """Models, quantization, schedule and memory of a run, as JSON-able values.

    Args:
        world_size: processes; None takes the WORLD_SIZE of the launcher, or 1.

    Raises:
        UserError: a shape is unknown, the data file is malformed, or a layer's inputs cannot be cut
            into groups.
    """
    world_size = _world_size() if world_size is None else world_size
    student, shape_from = _skeleton(recipe.student.path, recipe.student.base, "student")
    if not recipe.student.train_vision:
        qwen3vl.freeze_vision(student)
    quantization = _quantization(student, recipe)
    teacher = teacher_plan = None
    if recipe.distils and recipe.teacher.cache is None:
        assert recipe.teacher.path is not None  # the recipe was validated
        teacher, teacher_from = _skeleton(recipe.teacher.path, recipe.teacher.base, "teacher")
        teacher_plan = _describe(teacher, recipe.teacher.path, teacher_from)
        teacher_plan |= {key: getattr(recipe.teacher, key) for key in ("dtype", "load_in", "device")}
    scales = quantization["scales"] if quantization else 0
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    data = _data(recipe)
    schedule = _schedule(recipe, data, world_size)
    sizes = Sizes(
        student=student,
        teacher=teacher,
        trained=trained,
        scales=scales,
        records=schedule["micro_batch_size"],
        share=schedule["records_per_process"],
        tokens=data["tokens_per_record"] or recipe.data.max_length,
        supervised=data["supervised_per_record"] or recipe.data.max_length,
        images=data["image_tokens_per_record"] or recipe.data.max_length,
        world_size=world_size,
    )
    return {
        "student": {
            **_describe(student, recipe.student.path, shape_from),
            "trained": trained + scales,
            "frozen": sum(p.numel() for p in student.parameters() if not p.requires_grad),
        },
        "teacher": teacher_plan,
        "teacher_cache": recipe.teacher.cache if recipe.distils else None,
        "quantization": quantization,
        "optimizer": _optimizer_groups(student, scales, recipe),
        "data": data,
        "schedule": schedule,
        "distillation": _distillation(recipe),
        "memory": memory(sizes, recipe, launched_mode(world_size)),
        "memory_by_mode": memory_by_mode(sizes, recipe),
        "teacher_memory": teacher_elsewhere(sizes, recipe),
        "notes": _notes(recipe, schedule),
    }


def _world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"WORLD_SIZE is {text!r}: unset it, or set it to the number of processes")
    return int(text)


def _skeleton(path: str, base: str | None, role: str) -> tuple[Any, str]:
    """The model on the meta device, and the directory or name its shape is taken from."""
    # A directory that is there but unreadable is a fault to report, not a reason to look elsewhere.
    field, source = ("path", path) if base is None or Path(path).exists() else ("base", base)
    try:
        config = qwen3vl.config_for(path)
        source = path
    except UserError:
        try:
            small = SMALL_WORLD.get(source)
            config = tiny_config(small, build_tokenizer()) if small else qwen3vl.config_for(source)
        except UserError as error:
            hint = f", or set {role}.base to a model of its shape" if field == "path" else ""
            raise UserError(f"{role}.{field}: {error}{hint}") from error
    return qwen3vl.skeleton(config), source


def parameter_counts(model: Any) -> dict[str, int]:
    """Parameters by part; they add up to the model's, tied weights counted once."""
    linears = {f"{name}.weight" for name in qwen3vl.decoder_linears(model)}
    embedding, head = model.get_input_embeddings().weight, qwen3vl.head_weight(model)
    parts: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():  # yields a tied weight once
        if qwen3vl.is_vision(name):
            part = "mergers" if qwen3vl.is_merger(name) else "vision_tower"
        elif name in linears:
            part = "decoder_linears"
        elif parameter is embedding:
            part = "embeddings"
        else:
            part = "head" if parameter is head else "norms"
        parts[part] += parameter.numel()
    return parts


def _describe(model: Any, path: str, shape_from: str) -> dict[str, Any]:
    text, vision = model.config.text_config, model.config.vision_config
    parts = parameter_counts(model)
    return {
        "path": path,
        "shape_from": shape_from,
        "parameters": sum(parts.values()),
        "parts": parts,
        "head_tied": qwen3vl.head_weight(model) is model.get_input_embeddings().weight,
        "decoder": {
            "layers": text.num_hidden_layers,
            "width": text.hidden_size,
            "vocabulary": text.vocab_size,
        },
        "vision": {"layers": vision.depth, "width": vision.hidden_size},
    }


def _quantization(student: nn.Module, recipe: Recipe) -> dict[str, int] | None:
    """Counts of what is quantized. Raises UserError for a layer that groups do not divide."""
    bits, group_size = recipe.quant.bits, recipe.quant.group_size
    if bits is None:
        return None
    linears = qwen3vl.decoder_linears(student)
    for name, linear in linears.items():
        if linear.in_features % group_size:
            raise UserError(
                f"{name}: {linear.in_features} inputs cannot be cut into groups of {group_size}: "
                "choose a quant.group_size that divides it"
            )
    weights = sum(linear.weight.numel() for linear in linears.values())
    return {
        "bits": bits,
        "group_size": group_size,
        "linears": len(linears),
        "weights": weights,
        "scales": weights // group_size,
    }


def _optimizer_groups(student: nn.Module, scales: int, recipe: Recipe) -> list[dict[str, Any]]:
    """The groups of `grace.run.make_optimizer`."""
    sizes = {"matrices": 0, "vectors": 0, "scales": scales}
    for parameter in student.parameters():
        if parameter.requires_grad:
            sizes["matrices" if parameter.ndim > 1 else "vectors"] += parameter.numel()
    optim, multiplier = recipe.optim, recipe.quant.scale_lr_multiplier
    return [
        {
            "group": group,
            "parameters": size,
            "lr": optim.lr * (multiplier if group == "scales" else 1.0),
            "weight_decay": optim.weight_decay if group == "matrices" else 0.0,
        }
        for group, size in sizes.items()
        if size
    ]


def _data(recipe: Recipe) -> dict[str, Any]:
    """Records and tokens per record: counted where the files are there, else as the recipe expects."""
    data = recipe.data
    there = all(Path(file).exists() for file in data.files)
    records = load_run_data(recipe, validation=False).records if there else None
    measured = _measured_tokens(records, recipe) if records else None
    tokens = measured or (data.expected_tokens_per_record, data.expected_supervised_per_record, None)
    images = tokens[2]
    if images is None and data.max_pixels is not None:
        images = data.max_pixels // PIXELS_PER_TOKEN
    return {
        "path": " + ".join(data.files),
        "records": mixture_of(records).epoch if records is not None else data.expected_records,
        "records_from": "counted" if records is not None else "expected",
        "tokens_per_record": tokens[0],
        "supervised_per_record": tokens[1],
        "image_tokens_per_record": images,
        "tokens_from": "measured" if measured else "expected",
    }


def _measured_tokens(records: Sequence[Record], recipe: Recipe) -> tuple[int, int, int] | None:
    """Mean tokens (all, supervised, image) of a few records, or None without processor or pictures."""
    if not Path(recipe.student.path).is_dir():
        return None
    try:
        processor = load_processor(recipe.student.path, recipe.data.min_pixels, recipe.data.max_pixels)
        chosen = records[:: max(1, len(records) // MEASURED_RECORDS)][:MEASURED_RECORDS]
        samples = [encode(record, processor, recipe.data.max_length) for record in chosen]
    except UserError:  # training will say what is wrong with it; a plan can do without
        return None
    counts = (
        [len(sample.input_ids_L) for sample in samples],
        [int((sample.labels_L != -100).sum()) for sample in samples],
        [int((sample.mm_token_type_ids_L == qwen3vl.IMAGE_TOKEN_TYPE).sum()) for sample in samples],
    )
    mean = [math.ceil(sum(values) / len(values)) for values in counts]
    return mean[0], mean[1], mean[2]


def _schedule(recipe: Recipe, data: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """Steps, epochs and how a step is cut; None where the number of records is not known."""
    optim, records = recipe.optim, data["records"]
    steps = total_steps(recipe, records) if records else recipe.run.max_steps
    share = math.ceil(optim.batch_size / world_size)
    budget = recipe.run.micro_batch_tokens
    asked = max(1, budget // (data["tokens_per_record"] or recipe.data.max_length)) if budget else None
    micro_batch_size = min(asked or recipe.run.micro_batch_size, share)
    seen = steps * optim.batch_size if steps else None

    def tokens(per_record: int | None) -> int | None:
        return seen * per_record if seen and per_record else None

    return {
        "steps": steps,
        "epochs": seen / records if seen and records else None,
        "records_per_step": optim.batch_size,
        "processes": world_size,
        "records_per_process": share,
        "micro_batch_size": micro_batch_size,
        "micro_batch_tokens": budget,
        "accumulation": math.ceil(share / micro_batch_size),
        "tokens": tokens(data["tokens_per_record"]),
        "supervised_tokens": tokens(data["supervised_per_record"]),
        "schedule": optim.schedule,
        "warmup_steps": math.ceil(optim.warmup_ratio * steps) if steps else None,
        "clip": optim.max_grad_norm,
        "precision": recipe.run.precision,
    }


def _distillation(recipe: Recipe) -> dict[str, Any] | None:
    options = recipe.distill
    if not recipe.distils:
        return None
    return {
        "loss": options.loss,
        "temperature": options.temperature,
        "tckd_weight": options.tckd_weight,
        "nckd_weight": options.nckd_weight,
        "beta": [options.beta_init, options.beta_min, options.beta_max],
        "eta": options.eta,
        "tau": options.tau,
        "ema_decay": options.ema_decay,
        "rcka_weight": options.rcka_weight,
        "rcka_warmup_steps": options.rcka_warmup_steps,
    }


def _notes(recipe: Recipe, schedule: Mapping[str, Any]) -> list[str]:
    """What a reader of the plan should not overlook."""
    steps, options = schedule["steps"], recipe.distill
    notes = []
    if recipe.run.micro_batch_tokens is None and schedule["micro_batch_size"] < recipe.run.micro_batch_size:
        notes.append(
            f"run.micro_batch_size={recipe.run.micro_batch_size} is more than "
            f"a process's {schedule['records_per_process']} records of a step"
        )
    if steps is None:
        return notes
    if options.rcka_weight > 0 and steps < options.rcka_warmup_steps:
        notes.append(
            f"distill.rcka_warmup_steps={options.rcka_warmup_steps} is more than {steps} steps: "
            f"omega ends at {options.rcka_weight * steps / options.rcka_warmup_steps:g}"
        )
    if (
        options.loss != "none"
        and options.tau == "auto"
        and options.eta > 0
        and steps <= options.tau_warmup_steps
    ):
        notes.append(
            f"distill.tau_warmup_steps={options.tau_warmup_steps} is not less than {steps} steps: beta never moves"
        )
    return notes
