"""One optimizer step: the teacher over all micro-batches, global normalisers, then the student.

Losses are sums divided by counts of the *whole* step (every micro-batch, every rank), so the
numbers do not depend on how a batch is cut. Equations: DESIGN section 4, arXiv:2601.22709.

Shape suffixes: T supervised tokens, E teacher width, V vocabulary.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from grace import step_stats
from grace.data.batch import Batch
from grace.distill.gate import PUBLISHED, GateShape
from grace.distill.objective import GATED
from grace.distill.teacher import IGNORE_INDEX, TeacherSignals, supervised, teacher_signals
from grace.models import qwen3vl
from grace.parallel import Replicas
from grace.student import Signals, StepCounts, Weights


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is NaN or infinite; raised before the optimizer step."""


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


@dataclass(frozen=True)
class StepTotals:
    """What is known of a step before its student runs, over all ranks.

    Attributes:
        micro_batches: the most of a rank.
        gates, work: as in `StepResult`.
    """

    counts: StepCounts
    micro_batches: int
    gates: list[float]
    work: list[float]


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
    gate: GateShape = PUBLISHED,
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
        results.append(teacher_signals(next(parts), head_VE, mine, vocabulary, gate))
    return results


def count_step(
    accelerator: Accelerator,
    batches: Sequence[Batch | None],
    signals: Sequence[Signals | None],
    work: Sequence[float] = (),
) -> StepTotals:
    """Sums over the step, and the most micro-batches of a rank; one unconditional collective."""
    mine = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    gates = torch.zeros(2 + step_stats.GATE_BINS, dtype=torch.float64, device=accelerator.device)
    mine[0] = len(batches)
    for batch in batches:
        if batch is not None:
            mine[1] += supervised_tokens(batch)
    for signal in signals:
        if signal is not None:
            mine[2] += signal.image_count
            gates += step_stats.gate_sums(signal.gate_T)
    done = torch.tensor(work, dtype=torch.float64, device=accelerator.device)
    ranks = torch.atleast_2d(accelerator.gather(torch.cat([mine, gates, done]).unsqueeze(0)))  # type: ignore[arg-type]
    most = ranks[:, :1].amax(0)
    micro_batches, _, tokens, images, gate_sum, *rest = torch.cat([most, ranks.sum(0)]).tolist()
    counts = StepCounts(max(tokens, 1.0), max(gate_sum, 1e-12), max(images, 1.0))
    end = 1 + step_stats.GATE_BINS
    return StepTotals(counts, int(micro_batches), [gate_sum, *rest[:end]], rest[end:])


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
    parallel: Replicas,
    batches: Sequence[Batch | None],
    signals: Sequence[Signals | None],
    weights: Weights,
    kind: str,
    head_VE: Tensor | None = None,
    work: Sequence[float] = (),
) -> StepResult:
    """Accumulates the step's gradients; the caller then lets `parallel` update.

    Args:
        batches: this rank's micro-batches.
        signals: the teacher's side of each (`run_teacher`, or from a cache), or None.
        head_VE: the teacher's head; None with cached signals.
        work: numbers of this rank to be added up over ranks.

    Raises:
        NonFiniteLoss: names the records of the micro-batches concerned.
    """
    accelerator = parallel.accelerator
    totals = count_step(accelerator, batches, signals, work)
    counts, most = totals.counts, totals.micro_batches
    if not math.isfinite(counts.gate_sum):
        raise NonFiniteLoss(
            f"the teacher's output is not finite; records concerned: {non_finite(batches, signals)}"
        )
    # Packed rows may be more on another rank, and collectives must stay in step.
    short = [None] * (most - len(batches))
    batches, signals = [*batches, *short], [*signals, *short]
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    seen = step_stats.no_image_sums(accelerator.device)
    suspects: list[str] = []
    for index, (batch, signal) in enumerate(zip(batches, signals, strict=True)):
        with parallel.micro_batch(last=index == len(batches) - 1):
            total, part_sums, part_seen = parallel.student(batch, signal, head_VE, counts, weights)
            parallel.backward(total)
        if batch is not None and not bool(torch.isfinite(part_sums).all()):
            suspects.extend(batch.record_ids)
        sums += part_sums
        seen = step_stats.add_image_sums(seen, part_seen)
    slots = step_stats.in_slots(seen, accelerator.process_index, accelerator.num_processes)
    ce_sum, kd_sum, rcka_sum, degenerate, *images = reduce_sum(accelerator, torch.cat([sums, slots])).tolist()
    kd_norm = counts.gate_sum if kind in GATED else counts.tokens
    ce, kd, rcka = ce_sum / counts.tokens, kd_sum / kd_norm, rcka_sum / counts.images
    total_loss = ce + weights.beta * kd + weights.omega * rcka
    cka = step_stats.image_stats(images, rcka_sum)
    result = StepResult(total_loss, ce, kd, rcka, degenerate, counts, totals.gates, cka, totals.work)
    if not torch.isfinite(torch.tensor([ce, kd, rcka])).all():
        raise NonFiniteLoss(
            f"the loss is not finite (ce {ce}, kd {kd}, rcka {rcka}); records of this batch: {suspects}"
        )
    return result
