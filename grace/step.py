"""One optimizer step: the teacher over all micro-batches, global normalisers, then the student.

Losses are sums divided by counts of the *whole* step (every micro-batch, every rank), so the
numbers do not depend on how a batch is cut. Equations: DESIGN section 4, arXiv:2601.22709.

Shape suffixes: T supervised tokens, V vocabulary.
"""

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from grace import step_stats
from grace.data.batch import Batch
from grace.distill.cached import CachedSignals
from grace.distill.fused import RowKernel
from grace.distill.objective import micro_batch_loss
from grace.distill.rows import RowLosses, RowSettings, TopKRows, loss_rows
from grace.distill.teacher import IGNORE_INDEX, TeacherSignals, supervised, teacher_signals
from grace.models import qwen3vl

Signals = TeacherSignals | CachedSignals


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is NaN or infinite; raised before the optimizer step."""


@dataclass(frozen=True)
class Objective:
    """The constants of the loss."""

    kind: str  # none | kl | gdkd
    temperature: float
    tckd_weight: float
    nckd_weight: float
    vocabulary: int  # shared by teacher and student
    row_kernel: RowKernel = loss_rows


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


@dataclass(frozen=True)
class StepResult:
    """Global means of one optimizer step (floats), before the optimizer moved.

    Attributes:
        gates: `gate_sums` of the step.
        images: `image_stats` of the step.
        work: what `forward_backward` was given, added up over ranks.
    """

    total: float
    ce: float
    kd: float
    rcka: float
    degenerate_images: float
    counts: StepCounts
    gates: Sequence[float] = ()
    images: step_stats.Stats = field(default_factory=dict)
    work: Sequence[float] = ()


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

    def __init__(self, model: qwen3vl.Qwen3VLForConditionalGeneration, objective: Objective):
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(
        self,
        batch: Batch | None,
        signals: Signals | None,
        head_VE: Tensor | None,
        counts: StepCounts,
        weights: Weights,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The micro-batch's share of the step's loss, detached sums [ce, kd, rcka, degenerate], and `image_sums`."""
        if batch is None:  # this rank has fewer micro-batches: keep the collectives in step
            nothing = sum(p.sum() * 0.0 for p in self.model.parameters() if p.requires_grad)
            assert isinstance(nothing, Tensor)
            zeros = torch.zeros(4, dtype=torch.float64, device=nothing.device)
            return nothing, zeros, step_stats.no_image_sums(nothing.device)
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
        return total, sums, step_stats.image_sums(parts)


@torch.inference_mode()
def teacher_outputs(
    teacher: qwen3vl.Qwen3VLForConditionalGeneration, batch: Batch
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Final hidden states at supervised positions, their targets, and the visual tokens' states of each image.

    All on the batch's device, wherever the teacher's layers are.
    """
    states = qwen3vl.hidden_states(teacher, batch.to(qwen3vl.input_device(teacher)))
    home = batch.labels_BL.device
    hidden_TE, targets_T = supervised(states.final_BLD.to(home), batch.labels_BL)
    return hidden_TE, targets_T, qwen3vl.visual_tokens(teacher, states.last_layer_input_BLD.to(home), batch)


@torch.inference_mode()
def run_teacher(
    teacher: qwen3vl.Qwen3VLForConditionalGeneration,
    batches: Sequence[Batch | None],
    vocabulary: int,
    teacher_batches: Sequence[Batch | None] | None = None,
) -> list[TeacherSignals | None]:
    """The teacher over every micro-batch of the step, keeping only what the student needs.

    Args:
        teacher: wherever its layers are; its output layer is where the batches are, and so are the signals.
        batches: the student's micro-batches.
        teacher_batches: the same records in the same order, cut otherwise; None runs on the student's.
    """
    hidden: list[Tensor] = []
    visual: list[Tensor] = []
    for batch in batches if teacher_batches is None else teacher_batches:
        if batch is not None:
            hidden_TE, _, images = teacher_outputs(teacher, batch)
            hidden.append(hidden_TE)
            visual += images
    if teacher_batches is not None and hidden:
        counts = [int(supervised_tokens(batch)) for batch in batches if batch is not None]
        hidden = list(torch.cat(hidden).split(counts))
    results: list[TeacherSignals | None] = []
    parts, pictures, head_VE = iter(hidden), iter(visual), qwen3vl.head_weight(teacher)
    for batch in batches:
        if batch is None:
            results.append(None)
            continue
        grids = batch.image_grid_thw_N3
        mine = tuple(itertools.islice(pictures, 0 if grids is None else len(grids)))
        results.append(teacher_signals(next(parts), head_VE, mine, vocabulary))
    return results


def count_step(
    accelerator: Accelerator,
    batches: Sequence[Batch | None],
    signals: Sequence[Signals | None],
    work: Sequence[float] = (),
) -> tuple[StepCounts, list[float], list[float]]:
    """Sums tokens, usable images, `gate_sums` and `work` over the step; one unconditional collective."""
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    gates = torch.zeros(2 + step_stats.GATE_BINS, dtype=torch.float64, device=accelerator.device)
    for batch in batches:
        if batch is not None:
            sums[0] += supervised_tokens(batch)
    for signal in signals:
        if signal is not None:
            sums[1] += signal.image_count
            gates += step_stats.gate_sums(signal.gate_T)
    done = torch.tensor(work, dtype=torch.float64, device=accelerator.device)
    tokens, images, *rest = reduce_sum(accelerator, torch.cat([sums, gates, done])).tolist()
    counts = StepCounts(max(tokens, 1.0), max(rest[0], 1e-12), max(images, 1.0))
    return counts, rest[: 2 + step_stats.GATE_BINS], rest[2 + step_stats.GATE_BINS :]


def supervised_tokens(batch: Batch) -> Tensor:
    """Number of positions that predict a label (as `supervised` selects them), 0-d: counting waits for nothing."""
    return (batch.labels_BL[:, 1:] != IGNORE_INDEX).sum()


def non_finite(batches: Sequence[Batch | None], signals: Sequence[Signals | None]) -> list[str]:
    """Records of this rank's micro-batches in which the teacher's gates are NaN."""
    return [
        record_id
        for batch, signal in zip(batches, signals, strict=True)
        if batch is not None and signal is not None and not bool(signal.gate_T.isfinite().all())
        for record_id in batch.record_ids
    ]


def reduce_sum(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Sum over ranks."""
    return accelerator.reduce(values, reduction="sum")  # type: ignore[return-value]


def forward_backward(
    accelerator: Accelerator,
    student: nn.Module,
    batches: Sequence[Batch | None],
    signals: Sequence[Signals | None],
    weights: Weights,
    kind: str,
    head_VE: Tensor | None = None,
    work: Sequence[float] = (),
) -> StepResult:
    """Accumulates the step's gradients into the student; the caller moves the optimizer.

    Args:
        batches: this rank's micro-batches.
        signals: the teacher's side of each (`run_teacher`, or from a cache), or None.
        head_VE: the teacher's head; None with cached signals.
        work: numbers of this rank to be added up over ranks.

    Raises:
        NonFiniteLoss: names the records of the micro-batches concerned.
    """
    counts, gates, all_work = count_step(accelerator, batches, signals, work)
    if not math.isfinite(counts.gate_sum):
        raise NonFiniteLoss(
            f"the teacher's output is not finite; records concerned: {non_finite(batches, signals)}"
        )
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    seen = step_stats.no_image_sums(accelerator.device)
    suspects: list[str] = []
    for index, (batch, signal) in enumerate(zip(batches, signals, strict=True)):
        last = index == len(batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(student):
            total, part_sums, part_seen = student(batch, signal, head_VE, counts, weights)
            # Data-parallel wrappers average gradients over ranks; our normalisers are global already.
            accelerator.backward(total * accelerator.num_processes)
        if batch is not None and not bool(torch.isfinite(part_sums).all()):
            suspects.extend(batch.record_ids)
        sums += part_sums
        seen = step_stats.add_image_sums(seen, part_seen)
    slots = step_stats.in_slots(seen, accelerator.process_index, accelerator.num_processes)
    ce_sum, kd_sum, rcka_sum, degenerate, *images = reduce_sum(accelerator, torch.cat([sums, slots])).tolist()
    kd_norm = counts.gate_sum if kind == "gdkd" else counts.tokens
    ce, kd, rcka = ce_sum / counts.tokens, kd_sum / kd_norm, rcka_sum / counts.images
    total_loss = ce + weights.beta * kd + weights.omega * rcka
    cka = step_stats.image_stats(images, rcka_sum)
    result = StepResult(total_loss, ce, kd, rcka, degenerate, counts, gates, cka, all_work)
    if not torch.isfinite(torch.tensor([ce, kd, rcka])).all():
        raise NonFiniteLoss(
            f"the loss is not finite (ce {ce}, kd {kd}, rcka {rcka}); records of this batch: {suspects}"
        )
    return result
