"""The student and its loss in one forward pass: what is wrapped for the processes of a run.

Shape suffixes: T supervised tokens, V vocabulary, C tokens of a chunk, E teacher width.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grace.data.batch import Batch
from grace.distill.cached import CachedSignals
from grace.distill.fused import RowKernel
from grace.distill.gate import PUBLISHED, GateShape
from grace.distill.objective import micro_batch_loss
from grace.distill.rows import RowLosses, RowSettings, TopKRows, loss_rows
from grace.distill.teacher import IGNORE_INDEX, TeacherSignals, supervised
from grace.models import qwen3vl
from grace.models.shared_work import idle_vision
from grace.step_stats import image_sums

Signals = TeacherSignals | CachedSignals


@dataclass(frozen=True)
class Objective:
    """The constants of the loss."""

    kind: str  # none | kl | gkl | gdkd
    temperature: float
    tckd_weight: float
    nckd_weight: float
    vocabulary: int  # shared by teacher and student
    row_kernel: RowKernel = loss_rows
    gate: GateShape = PUBLISHED


@dataclass(frozen=True)
class Weights:
    """The multipliers that change from step to step."""

    beta: float
    omega: float


@dataclass(frozen=True)
class StepCounts:
    """Normalisers of one optimizer step, over all micro-batches and ranks."""

    tokens: float
    gate_sum: float
    images: float


def row_kernel(kernels: str) -> RowKernel:
    """What takes a chunk's losses and gradient: "torch" operations, or the "triton" kernel."""
    if kernels == "torch":
        return loss_rows
    from grace.kernels import gdkd_top_k_triton, gdkd_triton

    def rows(
        student_CV: Tensor,
        teacher: Tensor | TopKRows | None,
        targets_C: Tensor,
        gate_C: Tensor | None,
        settings: RowSettings,
        with_gradient: bool,
    ) -> RowLosses:
        options = {**vars(settings), "with_gradient": with_gradient}
        if isinstance(teacher, TopKRows):
            assert gate_C is not None  # a cache holds the gates too
            losses = gdkd_top_k_triton.loss_rows(student_CV, *teacher, targets_C, gate_C, **options)
            return RowLosses(*losses, gate_C)
        return RowLosses(*gdkd_triton.loss_rows(student_CV, teacher, targets_C, gate_C, **options))

    return rows


class StudentWithLoss(nn.Module):
    """The student and its loss in one forward, so that wrappers (DDP and others) see both."""

    def __init__(
        self,
        model: qwen3vl.Qwen3VLForConditionalGeneration,
        objective: Objective,
        compute_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.model, self.objective, self.compute_dtype = model, objective, compute_dtype

    def forward(
        self,
        batch: Batch | None,
        signals: Signals | None,
        head_VE: Tensor | None,
        counts: StepCounts,
        weights: Weights,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The micro-batch's share of the step's loss, detached sums [ce, kd, rcka, degenerate], and `image_sums`.

        Whatever the batch holds, and without one (this rank has fewer), every layer runs in the same order:
        weights are gathered and gradients reduced by all ranks together.
        """
        device = qwen3vl.input_device(self.model)
        with autocast(device, self.compute_dtype):
            return self.losses(
                empty_batch(device) if batch is None else batch, signals, head_VE, counts, weights
            )

    def losses(
        self,
        batch: Batch,
        signals: Signals | None,
        head_VE: Tensor | None,
        counts: StepCounts,
        weights: Weights,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `forward` returns."""
        with idle_vision(self.model) if batch.pixel_values_PD is None else contextlib.nullcontext():
            hidden = qwen3vl.hidden_states(self.model, batch)
        hidden_TD, targets_T = supervised(hidden.final_BLD, batch.labels_BL)
        student_visual: tuple[Tensor, ...] = ()
        if signals is not None and weights.omega > 0:
            student_visual = qwen3vl.visual_tokens(self.model, hidden.last_layer_input_BLD, batch)
        teacher = {} if signals is None else signals.loss_inputs(head_VE, with_images=bool(student_visual))
        total, parts = qwen3vl.loss_through_head(
            self.model,
            micro_batch_loss,
            hidden_TD,
            targets_T,
            token_count=counts.tokens,
            gate_sum=counts.gate_sum,
            beta=weights.beta,
            kind=self.objective.kind if signals is not None else "none",
            temperature=self.objective.temperature,
            tckd_weight=self.objective.tckd_weight,
            nckd_weight=self.objective.nckd_weight,
            student_visual=student_visual,
            image_count=counts.images,
            omega=weights.omega,
            row_kernel=self.objective.row_kernel,
            **teacher,
        )
        sums = torch.stack(
            [t.double() for t in (parts.ce_sum, parts.kd_sum, parts.rcka_sum, parts.degenerate)]
        )
        return total, sums, image_sums(parts)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Products in `dtype`; float32 changes nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def empty_batch(device: torch.device) -> Batch:
    """One row of two tokens, nothing to learn."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    return Batch(tokens, torch.ones_like(tokens), torch.zeros_like(tokens), labels, None, None, [])
