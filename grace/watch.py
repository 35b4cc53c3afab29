"""What is measured when a run logs: gradients by group, the quantizer's health, memory; and a step's FLOPs.

Every process measures, one small collective joins them, and the device is waited for once.
"""

import math
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from grace import step_stats
from grace.config import Recipe
from grace.distill.controller import IBController
from grace.models import qwen3vl
from grace.models.utilisation import Work, forward_flops, peak_flops, step_flops
from grace.quant.health import Health, QuantHealth
from grace.step import reduce_sum

HISTOGRAM_EDGES = {"gate/histogram": step_stats.GATE_RANGE, "rcka/cka_histogram": step_stats.CKA_RANGE}
GIB = 2.0**30


class Watch:
    """Measures one process's part of a run.

    Args:
        model, teacher: as they train; a teacher that runs on other devices does not count for the FLOPs.
        optimizer: its groups have a `name`.

    Attributes:
        peak: FLOP/s that the devices of all processes could do, None where that is not known.
        quant: None without a quantizer.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        model: qwen3vl.Qwen3VLForConditionalGeneration,
        teacher: qwen3vl.Qwen3VLForConditionalGeneration | None,
        optimizer: torch.optim.Optimizer,
    ):
        self.accelerator, self.optimizer = accelerator, optimizer
        self.train_vision = recipe.student.train_vision
        self.student_flops = forward_flops(model.config)
        beside = teacher is not None and recipe.teacher.device is None
        self.teacher_flops = forward_flops(teacher.config) if teacher is not None and beside else None
        device = accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        peak = peak_flops(name, recipe.run.precision)
        self.peak = None if peak is None else peak * accelerator.num_processes
        layers = qwen3vl.quantized_linears(model)
        self.quant = QuantHealth(layers) if layers else None

    def totals(self, work: Sequence[float], supervised: float) -> dict[str, float]:
        """Of a step, what to log the rates of.

        Args:
            work: `grace.step_stats.step_work` over all processes.
            supervised: tokens with a label.
        """
        known = dict(zip(step_stats.WORK, work, strict=True))
        needed = Work(
            known["tokens"], known["token_squares"], supervised, known["patches"], known["patch_squares"]
        )
        flops = step_flops(needed, self.student_flops, self.teacher_flops, self.train_vision)
        return {"tokens": supervised, "input_tokens": known["tokens"], "images": known["images"],
                "records": known["records"], "flops": flops}  # fmt: skip

    @torch.no_grad()
    def grad_norms(self) -> dict[str, Tensor]:
        """The gradient's norm by optimizer group, on the device; to be called before it is clipped."""
        norms = {}
        for group in self.optimizer.param_groups:
            grads = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            if grads:
                norm: Any = nn.utils.get_total_norm(grads)
                norms[f"grad_norm/{group['name']}"] = (
                    norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                )
        return norms

    def measure(self, norms: dict[str, Tensor], by_layer: bool = False) -> dict[str, float | None]:
        """The numbers of a log line; every process must call it.

        Args:
            norms: as `grad_norms` gave them.
            by_layer: tells the quantization SNR of every layer too.
        """
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        memory = torch.zeros(ranks, 2, dtype=torch.float64)
        memory[rank] = torch.tensor(memory_used(self.accelerator.device))
        sums = torch.zeros(0, 6) if self.quant is None else self.quant.sums()
        parts = (memory.flatten(), sums.flatten())
        joined = torch.cat([part.to(self.accelerator.device, torch.float64) for part in parts])
        everything = torch.cat(
            [reduce_sum(self.accelerator, joined), *(n.double()[None] for n in norms.values())]
        )
        numbers = everything.tolist()
        host, device = (max(numbers[i : 2 * ranks : 2]) / GIB for i in (0, 1))
        values: dict[str, float | None] = {"perf/host_memory_gib": host}
        if self.accelerator.device.type == "cuda":
            values["perf/device_memory_gib"] = device
        values |= dict(zip(norms, numbers[len(joined) :], strict=True))
        if self.quant is not None:
            table = torch.tensor(numbers[2 * ranks : len(joined)], dtype=torch.float64).view(-1, 6)
            values |= health_values(self.quant.health(table), by_layer)
        return values

    def state(self) -> dict[str, Tensor]:
        """What an interrupted run needs to measure the same numbers."""
        return {} if self.quant is None else self.quant.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes over a `state`."""
        if self.quant is not None:
            self.quant.load_state(state)


def health_values(health: Health, by_layer: bool = False) -> dict[str, float | None]:
    """The quantizer's health by name: all layers together, the extreme ones, each if asked; nothing, if none was measured."""
    if health.together is None:
        return {}
    ratios = [layer.snr_db for layer in health.layers.values()]
    layers = {f"quant/snr/{short(name)}": finite(layer.snr_db) for name, layer in health.layers.items()}
    return {
        "quant/snr_db": finite(health.together.snr_db),
        "quant/snr_db_min": finite(min(ratios)),
        "quant/snr_db_max": finite(max(ratios)),
        "quant/clipped": health.together.clipped,
        "quant/flipped": health.together.flipped,
        "quant/scale_drift": health.together.scale_drift,
        **(layers if by_layer else {}),
    }


def controller_values(controller: IBController) -> dict[str, float | None]:
    """How far the moving average of the distillation loss is from its target; null until that is known."""
    m, tau = controller.m, controller.tau
    return {"ib/m_minus_tau": None if m is None or tau is None else m - tau}


def memory_used(device: torch.device) -> tuple[float, float]:
    """Bytes of this process now, and the most of its GPU since the last call (0 without one)."""
    peak = 0
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    return float(psutil.Process().memory_info().rss), float(peak)


def short(name: str) -> str:
    """A decoder layer's name from `layers.` on."""
    return f"layers.{name.rpartition('layers.')[2]}"


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None
