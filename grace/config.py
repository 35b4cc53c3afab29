"""Recipes: one YAML file of nested frozen dataclasses, checked when it is loaded.

A recipe says *what* is trained; `recipes/accelerate/*.yaml` says *where*. Every field can be
overridden as `section.key=value`. An unknown key names the nearest known one; a value out of
range names the range.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grace.errors import UserError
from grace.recipe_check import build, dump_yaml, matching, number, parse_yaml, read_by, show, suggest
from grace.recipe_parts import EvalTasks, Part, parts_of


@dataclass(frozen=True)
class Student:
    """The model that is trained."""

    path: str  # model directory, or the name of a published model
    base: str | None = None  # a model of the same shape, for --dry-run while `path` is absent
    train_vision: bool = False  # the mergers are trained either way


@dataclass(frozen=True)
class Teacher:
    """The frozen model that is learned from; no path, no teacher."""

    path: str | None = None
    base: str | None = None  # as the student's
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # cpu, cuda:N, cuda:+N (the GPU N places after this process's own), or spread (layer by layer over the
    # GPUs on which no process trains); default: beside the student
    device: str | None = matching(
        r"cpu|spread|cuda:(0|\+?[1-9][0-9]{0,3})", "cpu or cuda:N or cuda:+N or spread", None
    )
    load_in: Literal["8bit", "4bit"] | None = None  # the decoder linears, by bitsandbytes; the rest as dtype
    micro_batch_size: int | None = number("[1, inf)", default=None)
    cache: str | None = None  # made by `grace teacher-cache`; training then holds no teacher in memory
    cache_top_k: int = number("[1, inf)", default=64)  # likeliest tokens kept beside the target, and used


@dataclass(frozen=True)
class Data:
    """ShareGPT4V records and how they become tokens."""

    # A file, or several: {FILE: WEIGHT, FILE: {weight: WEIGHT, cap: RECORDS}, ...} (data/README.md)
    path: str | tuple[Part, ...] = read_by(parts_of)
    image_root: str | None = None  # default: the folder of the file
    validation_path: str | None = None
    min_pixels: int | None = number("[1, inf)", default=None)
    max_pixels: int | None = number("[1, inf)", default=None)
    max_length: int = number("[1, inf)", default=4096)
    packing: bool = True  # a micro-batch's records side by side in one row, without padding
    num_workers: int = number("[0, inf)", default=0)
    # Classes of fault (data/README.md): records to leave out, and faults to live with. The rest are errors.
    skip: tuple[str, ...] = ()
    accept: tuple[str, ...] = ()
    audit: str | None = None  # list written by `grace data audit`; default: beside `path`
    # What --dry-run reckons with while `path` is absent:
    expected_records: int | None = number("[1, inf)", default=None)  # of an epoch
    expected_tokens_per_record: int | None = number("[1, inf)", default=None)  # images included
    expected_supervised_per_record: int | None = number("[1, inf)", default=None)  # those with a label

    @property
    def parts(self) -> tuple[Part, ...]:
        """The annotation files and what an epoch takes of each."""
        return (Part(self.path),) if isinstance(self.path, str) else self.path

    @property
    def files(self) -> list[str]:
        """The annotation files, for messages and for what is made of all of them."""
        return [part.path for part in self.parts]


@dataclass(frozen=True)
class Quant:
    """The weight grid; `bits: null` trains in full precision."""

    bits: int | None = number("[2, 8]", default=None)
    group_size: int = number("[1, inf)", default=128)
    scale_lr_multiplier: float = number("[0, inf)", default=10.0)  # 0 keeps the scales as they start


@dataclass(frozen=True)
class Distill:
    """The loss beside cross-entropy, and its controller (DESIGN section 4)."""

    loss: Literal["none", "kl", "gkl", "gdkd"] = "none"  # KL, the same gated, or gated decoupled KD
    temperature: float = number("(0, inf)", default=2.0)
    tckd_weight: float = number("[0, inf)", default=1.0)
    nckd_weight: float = number("[0, inf)", default=4.0)
    gate_sharpness: float = number("[0, inf)", default=1.0)  # k of exp(-k h); 0 believes every token alike
    gate_top_k: int | None = number("[2, inf)", default=None)  # h over the likeliest tokens alone
    beta_init: float = number("[0, inf)", default=0.0)
    beta_min: float = number("[0, inf)", default=0.0)
    beta_max: float = number("[0, inf)", default=0.0)
    eta: float = number("[0, inf)", default=0.0)  # 0 keeps beta where it starts
    tau: float | Literal["auto"] = number("[0, inf)", default="auto")
    tau_fraction: float = number("(0, inf)", default=0.9)
    tau_warmup_steps: int = number("[1, inf)", default=50)
    ema_decay: float = number("[0, 1)", default=0.99)
    rcka_weight: float = number("[0, inf)", default=0.0)
    rcka_warmup_steps: int = number("[0, inf)", default=0)


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedule."""

    lr: float = number("(0, inf)")
    weight_decay: float = number("[0, inf)")
    batch_size: int = number("[1, 1000000]")  # records per optimizer step over all ranks
    warmup_ratio: float = number("[0, 1]")
    max_grad_norm: float = number("(0, inf)")
    schedule: Literal["cosine", "constant"] = "cosine"
    beta1: float = number("[0, 1)", default=0.9)
    beta2: float = number("[0, 1)", default=0.999)
    eps: float = number("(0, inf)", default=1e-8)
    epochs: float = number("(0, 1000000]", default=1.0)


@dataclass(frozen=True)
class Run(EvalTasks):
    """Where the run lives, how long it is, what it reports."""

    output_dir: str
    seed: int = number("[0, 4294967295]", default=0)
    max_steps: int | None = number("[1, 1000000000]", default=None)  # default: from optim.epochs
    save_every: int = number("[1, inf)", default=500)
    log_every: int = number("[1, inf)", default=10)
    micro_batch_size: int = number("[1, inf)", default=1)  # records per forward pass, a rank's share at most
    micro_batch_tokens: int | None = number("[1, inf)", default=None)  # if set, tokens are counted instead
    keep_last: int = number("[1, inf)", default=2)
    keep_best: int = number("[0, inf)", default=0)  # besides, the checkpoints of the lowest val/ce
    gradient_checkpointing: bool = False
    precision: Literal["fp32", "bf16"] = "bf16"
    kernels: Literal["auto", "torch", "triton"] = "auto"  # auto: Triton on CUDA, torch operations elsewhere
    eval_every: int = number("[0, inf)", default=0)  # 0: only at the end
    eval_records: int = number("[0, inf)", default=256)
    eval_samples: int = number("[0, inf)", default=8)
    wandb: Literal["online", "offline", "disabled"] = "disabled"
    wandb_project: str = "grace"
    wandb_model: bool = False  # uploads the finished model; else W&B is told of its place alone


@dataclass(frozen=True)
class Recipe:
    """Everything a run needs to know."""

    student: Student
    data: Data
    optim: Optim
    run: Run
    teacher: Teacher = Teacher()
    quant: Quant = Quant()
    distill: Distill = Distill()

    @property
    def distils(self) -> bool:
        """Whether there is anything to learn from a teacher."""
        return self.distill.loss != "none" or self.distill.rcka_weight > 0


# ---------------------------------------------------------------- loading


def resource(path: str | Path) -> Path:
    """A file or directory on disk, or else the packaged one of that name under `recipes/`.

    Raises:
        UserError: neither is there.
    """
    given = Path(path)
    if os.path.exists(given):  # unlike Path.exists, never raises: a name may be too long to exist
        return given
    package = Path(__file__).parent
    for root in (package / "recipes", package.parent / "recipes"):
        for name in (given, Path(*given.parts[1:]) if given.parts[:1] == ("recipes",) else given):
            if not name.is_absolute() and os.path.exists(root / name):
                return root / name
    raise UserError(f"there is no {path}: give the path of a file, or the name of a packaged recipe")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, applies `section.key=value` overrides (the last one wins) and checks every field.

    Raises:
        UserError: one line saying what is wrong and how to mend it.
    """
    file = resource(path)
    values = _read(file)
    sources: dict[str, str] = {}  # "section" or "section.key" -> the override that gave it, for messages
    for override in overrides:
        section, key, value = _parse_override(override)
        if section not in values:
            sources[section] = f"override {show(override)}"
        content = values.get(section) or {}
        if not isinstance(content, dict):
            raise UserError(f"{file}: section {section} must hold keys and values")
        values[section] = {**content, key: value}
        sources[f"{section}.{key}"] = f"override {show(override)}"
    recipe = build(Recipe, values, lambda name: sources.get(name, str(file)))
    _check_together(recipe, str(file))
    return _with_packaged_models(recipe)


def _with_packaged_models(recipe: Recipe) -> Recipe:
    """Models under recipes/ come with the package: found from any directory."""

    def found(path: str) -> str:
        return str(resource(path)) if path.startswith("recipes/") else path

    student, teacher = recipe.student, recipe.teacher
    student = dataclasses.replace(student, path=found(student.path))
    if teacher.path is not None:
        teacher = dataclasses.replace(teacher, path=found(teacher.path))
    return dataclasses.replace(recipe, student=student, teacher=teacher)


def _read(file: Path) -> dict[str, Any]:
    """The sections of a recipe file, unchecked."""
    if file.is_dir():
        raise UserError(f"{file} is a directory: give the YAML file in it")
    try:
        values = parse_yaml(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): give a YAML recipe") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}): give a YAML recipe") from error
    except ValueError as error:
        raise UserError(f"{file} is not valid YAML ({error}): correct it") from error
    if not isinstance(values, dict):
        held = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{file} holds {held}: a recipe holds sections such as student, data and optim")
    return values


def _parse_override(override: str) -> tuple[str, str, Any]:
    """Section, key and YAML-typed value of `section.key=value`."""
    name, equals, text = override.partition("=")
    section, _, key = name.partition(".")
    if not equals or not section or not key:
        nearest = suggest(Recipe, name.rpartition(".")[2])
        raise UserError(
            f"override {show(override)} is not of the form section.key=value, such as {nearest}=..."
        )
    try:
        return section, key, parse_yaml(text)
    except ValueError as error:
        raise UserError(f"override {show(override)}: the value is not valid YAML ({error})") from error


def _check_together(recipe: Recipe, source: str) -> None:
    """What no single field can tell."""
    distill, data = recipe.distill, recipe.data
    if recipe.distils and recipe.teacher.path is None and recipe.teacher.cache is None:
        raise UserError(
            f"{source}: distill needs a teacher, set teacher.path or teacher.cache, "
            "or distill.loss=none and distill.rcka_weight=0"
        )
    if recipe.teacher.path is None and (recipe.teacher.device or recipe.teacher.load_in):
        raise UserError(
            f"{source}: teacher.device and teacher.load_in need a teacher, set teacher.path, or both to null"
        )
    if not distill.beta_min <= distill.beta_init <= distill.beta_max:
        raise UserError(
            f"{source}: distill.beta_init={distill.beta_init:g} is out of range: it must be in "
            f"[beta_min, beta_max] = [{distill.beta_min:g}, {distill.beta_max:g}]"
        )
    if distill.loss != "none" and distill.beta_max == 0:
        raise UserError(
            f"{source}: distill.loss={distill.loss} has no weight, "
            "set distill.beta_init and distill.beta_max above 0, or distill.loss=none"
        )
    if data.min_pixels is not None and data.max_pixels is not None and data.min_pixels > data.max_pixels:
        raise UserError(
            f"{source}: data.min_pixels={data.min_pixels} is out of range: "
            f"it must be at most data.max_pixels={data.max_pixels}"
        )


# ---------------------------------------------------------------- writing and comparing


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every field written out."""
    return dump_yaml(dataclasses.asdict(recipe))


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of the resolved values."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(recipe), sort_keys=True).encode()).hexdigest()


def recipe_diff(old: Recipe, new: Recipe) -> list[str]:
    """Fields that differ, as `section.key: old -> new`."""
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    return [
        f"{section}.{key}: {before[section][key]!r} -> {after[section][key]!r}"
        for section in before
        for key in before[section]
        if before[section][key] != after[section][key]
    ]
