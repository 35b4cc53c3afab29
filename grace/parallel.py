"""One student on the processes of a launch: placed, stepped, read whole and put back.

The launcher's file (`recipes/accelerate/`) says how. Every way gives the same numbers: gradients are means
over processes of float32 sums, clipped by their global norm, and what is saved are whole tensors under their
plain names, so that a run may be resumed in another way or on another number of processes.

    Replicas      one process, or a whole student in each (DDP)
    FullySharded  FSDP2, grace/parallel_fsdp.py
    Zero          DeepSpeed ZeRO-2 and ZeRO-3, grace/parallel_zero.py
"""

import atexit
import contextlib
import importlib.util
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, DistributedType, PartialState
from torch import Tensor, nn

from grace.errors import UserError
from grace.models import qwen3vl

MOMENTS = ("exp_avg", "exp_avg_sq")
MakeOptimizer = Callable[[nn.Module], torch.optim.AdamW]


class Replicas:
    """The whole student in every process; DDP averages the gradients where there are several.

    Attributes:
        student: calls the student with its loss, through whatever wraps it.
        model: the bare student inside.
        optimizer: its `param_groups` are the recipe's.
    """

    model: qwen3vl.Qwen3VLForConditionalGeneration
    student: nn.Module
    optimizer: torch.optim.AdamW

    def __init__(
        self, accelerator: Accelerator, student: Any, make_optimizer: MakeOptimizer, max_grad_norm: float
    ):
        """
        Args:
            student: a module with the bare student as its `model`; whole, in float32.
            make_optimizer: called with the bare student when its parameters are what they will be.
        """
        self.accelerator, self.model, self.max_grad_norm = accelerator, student.model, max_grad_norm
        self.place(student, make_optimizer)

    def place(self, student: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Sets `student` and `optimizer`."""
        self.optimizer = make_optimizer(self.model)
        self.student = self.accelerator.prepare(student)

    # -------------------------------------------------------------- a step

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Holds around forward and backward of one micro-batch; gradients travel in the step's `last`."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.student)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this process's share of a global sum."""
        (loss * self.accelerator.num_processes).backward()  # gradients are averaged, sums are wanted

    def update(self) -> float:
        """Clips the gradients, moves the optimizer and clears them; returns their norm, over all processes.

        A norm that is not finite moves nothing.
        """
        trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(self.whole(torch.nn.utils.clip_grad_norm_(trainable, self.max_grad_norm)))
        if math.isfinite(norm):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return norm

    # -------------------------------------------------------------- whole tensors

    def whole(self, tensor: Tensor) -> Tensor:
        """A parameter or its optimizer state, whole; called by all processes together."""
        return tensor.detach()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, as they lie in this process."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters, whole, one after the other; all processes go through them together."""
        for name, parameter in self.model.named_parameters():
            yield name, self.whole(parameter)

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's state as `NAME.step`, `NAME.exp_avg`, `NAME.exp_avg_sq`; otherwise as `weights`."""
        for name, parameter in self.trainable().items():
            for key, value in self.optimizer.state[parameter].items():
                yield f"{name}.{key}", self.whole(value)

    def for_main(self, tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Goes through `weights` or `moments`: to the main process as a dictionary, to the others an empty one."""
        kept = {}
        for name, tensor in tensors:
            if self.accelerator.is_main_process:
                kept[name] = tensor.cpu()
        return kept

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Takes over whole trained parameters and optimizer state, by the names above."""
        for name, parameter in self.trainable().items():
            parameter.copy_(self.part(weights[name], parameter))
            step = moments[f"{name}.step"].to(parameter.device)
            parts = {key: self.part(moments[f"{name}.{key}"], parameter) for key in MOMENTS}
            self.optimizer.state[parameter] = {"step": step, **parts}

    def part(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """What this process keeps of a whole tensor that belongs to `parameter`."""
        return whole.to(parameter.device)

    def for_evaluation(self) -> qwen3vl.Qwen3VLForConditionalGeneration:
        """A model that this process can run by itself; called by all processes together."""
        return self.model


def placed(
    accelerator: Accelerator, student: nn.Module, make_optimizer: MakeOptimizer, max_grad_norm: float
) -> Replicas:
    """The student on the processes of this launch; arguments as for `Replicas`.

    Raises:
        UserError: the launcher's settings are ones under which training would go wrong.
    """
    kind: type[Replicas] = Replicas
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from grace.parallel_zero import Zero

        kind = Zero
    elif asked_for("FSDP") and torch.distributed.is_initialized():
        from grace.parallel_fsdp import FullySharded

        kind = FullySharded
    return kind(accelerator, student, make_optimizer, max_grad_norm)


def asked_for(what: str) -> bool:
    """Whether the launcher asked for "DEEPSPEED" or "FSDP"."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def make_accelerator() -> Accelerator:
    """The Accelerator of this launch; precision is no matter of its, the student casts for itself.

    Raises:
        UserError: a mode in which training would go wrong, or DeepSpeed is missing.
    """
    if asked_for("DEEPSPEED"):
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError(
                "this launch asks for DeepSpeed, which is missing: pip install 'grace[deepspeed]'"
            )
        from grace.parallel_zero import quieten

        quieten()
    if not torch.accelerator.is_available() and "LOCAL_RANK" in os.environ:
        PartialState(cpu=True)  # otherwise every process without a GPU would think itself alone
    # Or only the first process would load the student, the others wait for weights we do not send.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        accelerator = Accelerator(mixed_precision="no")
    except ValueError as error:
        raise UserError(f"the launcher's settings do not go together: {error}".splitlines()[0]) from error
    supported = (
        DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP,
        DistributedType.DEEPSPEED,
    )  # fmt: skip
    if accelerator.distributed_type not in supported:
        raise UserError(
            f"{accelerator.distributed_type} is not supported: launch with a file of recipes/accelerate/"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from grace.parallel_zero import load_whole

        load_whole()
    elif asked_for("DEEPSPEED"):
        raise UserError(
            "DeepSpeed does not start with ACCELERATE_USE_CPU set: unset it (without a GPU the CPU is used)"
        )
    return accelerator


def leave(code: int) -> NoReturn:
    """Ends this process: all that Python does at its end, but with several processes the interpreter stays up.

    A thread of Gloo may hold the tensors of the last collective a little longer than that took, and needs the
    interpreter to let go of them; one that finds it going down aborts the process (pytorch issue 190489). Destroying the
    group first would wait for these threads, but not under FSDP2, where caches of DTensor keep the group.
    """
    if not torch.distributed.is_initialized():
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # as at the end of multiprocessing's own processes
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
