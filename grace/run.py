"""The state of one training run, how it is set up, and whose directory it writes to.

`grace.train` drives it; this file knows what a run consists of and where it lives on disk.
"""

import contextlib
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import get_int_from_env
from torch import Tensor

from grace import checkpoint
from grace.agreement import agreed
from grace.config import Recipe, Teacher, load_recipe, recipe_diff
from grace.data.sampler import steps_of
from grace.distill.cache_store import TeacherCache
from grace.distill.controller import IBController
from grace.distill.gate import GateShape
from grace.errors import UserError
from grace.files import locked, remove_leftovers
from grace.models import qwen3vl
from grace.models.placement import load_teacher, teacher_devices
from grace.models.processor import load_processor
from grace.parallel import Replicas, placed
from grace.quant.fake_quant import Kernels, TorchKernels, use_kernels
from grace.recipe_check import require_field
from grace.resume_checkpoint import checkpoint_paths
from grace.run_files import RECIPE_FILE
from grace.student import Objective, StudentWithLoss, row_kernel
from grace.watch import Watch

# Settings that may differ between the two halves of an interrupted run: they do not touch its numbers.
RESUME_MAY_CHANGE = (
    "run.log_every",
    "run.save_every",
    "run.keep_last",
    "run.wandb",
    "run.wandb_project",
    "run.wandb_model",
    "run.eval_tasks",
    "run.eval_data",
    "run.eval_limit",
    "data.num_workers",
    "data.accept",
    "data.audit",
    "teacher.device",
)


@dataclass
class Run:
    """Everything a step needs; `step` is the number of optimizer steps done."""

    recipe: Recipe
    accelerator: Accelerator
    model: qwen3vl.Qwen3VLForConditionalGeneration
    parallel: Replicas  # the model with its loss and optimizer, on the processes in use
    teacher: qwen3vl.Qwen3VLForConditionalGeneration | None
    controller: IBController
    objective: Objective
    total_steps: int
    base_config: Any
    kernels: str  # torch | triton
    watch: Watch
    cache: TeacherCache | None = None  # in place of a teacher
    records: str = ""  # digest of which records are trained on
    step: int = 0
    validation: dict[str, float] | None = None


def set_up(
    recipe: Recipe, accelerator: Accelerator, tokenizer: Any, steps: int, cache: TeacherCache | None = None
) -> Run:
    """Loads the models, puts the quantizer in, builds optimizer and controller.

    Args:
        cache: what stands in for a teacher.
    """
    device, options = accelerator.device, recipe.distill
    with agreed(accelerator):
        model, base_config = loaded_student(recipe, device)
        teacher, vocabulary = None, qwen3vl.head_weight(model).shape[0]
        if cache is not None:
            vocabulary = cache.vocabulary
        elif recipe.distils:
            assert recipe.teacher.path is not None  # the recipe was validated
            require_same_tokenizer(tokenizer, recipe.teacher.path)
            teacher = placed_teacher(recipe.teacher, device, accelerator.num_processes)
            vocabulary = min(vocabulary, qwen3vl.head_weight(teacher).shape[0])
        kernels = chosen_kernels(recipe.run.kernels, device.type)
    use_kernels(device.type, quantizer_kernels(kernels))
    objective = Objective(
        options.loss, options.temperature, options.tckd_weight, options.nckd_weight, vocabulary,
        row_kernel(kernels), GateShape(options.gate_sharpness, options.gate_top_k),
    )  # fmt: skip
    controller = IBController(
        options.tau, options.eta, options.beta_init, options.beta_min, options.beta_max,
        ema_decay=options.ema_decay, tau_fraction=options.tau_fraction, tau_warmup_steps=options.tau_warmup_steps,
    )  # fmt: skip
    student = StudentWithLoss(model, objective, compute_dtype(recipe))
    with agreed(accelerator):  # what is wrong here is the same in all
        parallel = placed(
            accelerator, student, lambda m: make_optimizer(m, recipe), recipe.optim.max_grad_norm
        )
    return Run(
        recipe, accelerator, model, parallel, teacher, controller, objective, steps, base_config, kernels,
        Watch(recipe, accelerator, model, teacher, parallel.optimizer), cache,
    )  # fmt: skip


def loaded_student(
    recipe: Recipe, device: torch.device
) -> tuple[qwen3vl.Qwen3VLForConditionalGeneration, Any]:
    """The student, quantized as the recipe says, and its configuration as it was read."""
    model = qwen3vl.load_model(recipe.student.path, torch.float32, device)
    base_config = copy.deepcopy(model.config)
    if not recipe.student.train_vision:
        qwen3vl.freeze_vision(model)
    if recipe.quant.bits is not None:
        put_quantizer(model, recipe)
    qwen3vl.put_loss_head(model)
    if recipe.run.gradient_checkpointing:
        qwen3vl.enable_checkpointing(model)
    return model, base_config


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """What products are computed in; parameters are float32."""
    return torch.bfloat16 if recipe.run.precision == "bf16" else torch.float32


def placed_teacher(
    teacher: Teacher, own: torch.device, processes: int
) -> qwen3vl.Qwen3VLForConditionalGeneration:
    """This process's teacher, where and in as many bits as the recipe says.

    Args:
        own: where this process's student is.
        processes: of the whole run, for launchers that do not say how many are on this machine.

    Raises:
        UserError: it cannot be there, or not be loaded.
    """
    assert teacher.path is not None  # the recipe was validated
    here = get_int_from_env(["LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"], processes)
    devices = teacher_devices(teacher.device, own, here, torch.cuda.device_count())
    return load_teacher(teacher.path, getattr(torch, teacher.dtype), devices, own, teacher.load_in)


def chosen_kernels(asked: str, device_type: str) -> str:
    """ "torch" or "triton".

    Raises:
        UserError: Triton was asked for where it cannot run.
    """
    if asked == "auto":
        return "triton" if device_type == "cuda" else "torch"
    if asked == "triton" and device_type != "cuda":
        raise UserError(
            f"run.kernels=triton needs a CUDA device, this is {device_type}: set it to auto or torch"
        )
    return asked


def quantizer_kernels(kernels: str) -> Kernels:
    """The fake quantizer's two directions: "torch" operations, or the "triton" kernels."""
    if kernels == "torch":
        return TorchKernels()
    from grace.kernels import fake_quant_triton

    return fake_quant_triton


def put_quantizer(model: qwen3vl.Qwen3VLForConditionalGeneration, recipe: Recipe) -> None:
    """Quantizes the decoder; a student that is a QAT checkpoint brings its latents along."""
    bits, group_size = cast(int, recipe.quant.bits), recipe.quant.group_size
    source = Path(recipe.student.path)
    earlier = checkpoint.read_qat(source, latents=True) if checkpoint.is_qat(source) else None
    if earlier is not None:
        linears = qwen3vl.decoder_linears(model)
        for name, weight in earlier.modules.items():
            if weight.latent_OI is not None:
                linears[name].weight.data.copy_(weight.latent_OI)
    quantized = qwen3vl.quantize_decoder(model, bits, group_size)
    if earlier is not None and (earlier.bits, earlier.group_size) == (bits, group_size):
        for name, weight in earlier.modules.items():
            if weight.theta_OG is not None:
                quantized[name].theta.data.copy_(weight.theta_OG)


def require_same_tokenizer(tokenizer: Any, teacher_path: str) -> None:
    """Distillation compares vocabularies entry by entry: they must be the same.

    Raises:
        UserError: the teacher's tokenizer maps some token to another id.
    """
    other = load_processor(teacher_path).tokenizer.get_vocab()
    ours = tokenizer.get_vocab()
    if ours != other:
        different = [token for token in ours if other.get(token) != ours[token]] or sorted(
            set(other) - set(ours)
        )
        raise UserError(
            f"student and teacher have different tokenizers (e.g. {different[0]!r}): "
            "use a teacher of the same model family, with its own tokenizer files"
        )


def make_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW in three groups: matrices (decayed), vectors (not decayed), scales (own rate, not decayed)."""
    optim = recipe.optim
    groups: dict[str, list[Tensor]] = {"matrices": [], "vectors": [], "scales": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "scales" if name.endswith(".theta") else "matrices" if parameter.ndim > 1 else "vectors"
            groups[kind].append(parameter)
    rates = {"matrices": 1.0, "vectors": 1.0, "scales": recipe.quant.scale_lr_multiplier}
    settings = [
        {
            "name": kind,
            "params": parameters,
            "lr": optim.lr * rates[kind],
            "base_lr": optim.lr * rates[kind],
            "weight_decay": optim.weight_decay if kind == "matrices" else 0.0,
        }
        for kind, parameters in groups.items()
        if parameters
    ]
    if not settings:
        raise UserError("nothing is trainable in this recipe")
    return torch.optim.AdamW(settings, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def total_steps(recipe: Recipe, records: int) -> int:
    """Optimizer steps of the whole run: `run.max_steps`, else what `optim.epochs` needs."""
    return recipe.run.max_steps or steps_of(recipe.optim.epochs, records, recipe.optim.batch_size)


@contextlib.contextmanager
def claimed(
    run_dir: Path, recipe: Recipe, is_main: bool, allow_changed: Sequence[str] = ()
) -> Iterator[None]:
    """Holds a run directory: one writer at a time, one recipe per directory.

    Args:
        allow_changed: fields `section.key` in which the recipe may differ.

    Raises:
        UserError: another process holds it, it cannot be written, or it belongs to something else.
    """
    if not is_main:
        yield
        return
    with locked(run_dir, "run.output_dir"):
        for folder in (run_dir, run_dir / "checkpoints"):
            remove_leftovers(folder)
        require_same_recipe(run_dir, recipe, allow_changed)
        yield


def require_same_recipe(run_dir: Path, recipe: Recipe, allow_changed: Sequence[str] = ()) -> None:
    """Checks a recipe against that of the run found in the directory, if one is there.

    A run that has saved nothing yet has nothing to lose: its recipe may be corrected.

    Raises:
        UserError: the directory belongs to another recipe, or to something that is no run.
    """
    for name in allow_changed:
        require_field(Recipe, name)
    written = run_dir / RECIPE_FILE
    if not written.exists():
        if any(not path.name.startswith(".") for path in run_dir.iterdir()):  # but for locks and temporaries
            raise UserError(
                f"{run_dir} holds files that are not a run's: set run.output_dir to a new directory"
            )
        return
    if not checkpoint_paths(run_dir) and not (run_dir / "model").exists():
        return
    changes = recipe_diff(load_recipe(written), recipe)
    refused = [
        change for change in changes if change.split(":")[0] not in (*RESUME_MAY_CHANGE, *allow_changed)
    ]
    if refused:
        raise UserError(
            f"{run_dir} belongs to a run with another recipe ({'; '.join(refused)}): set run.output_dir, give the same "
            f"settings to continue it, or allow the change with --allow-changed {refused[0].split(':')[0]}"
        )
    if changes:
        print(f"{run_dir} goes on with a changed recipe ({'; '.join(changes)})", file=sys.stderr)
