"""The student under DeepSpeed: optimizer state and gradients in parts (ZeRO-2), weights too (ZeRO-3).

Parameters stay float32 for DeepSpeed: its own bf16 mode would show the quantizer rounded latents and scales.
It also clips: by the same norm and with the same formula as torch.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from grace.errors import UserError
from grace.models import qwen3vl
from grace.models.shared_work import whole_copy
from grace.parallel import MOMENTS, MakeOptimizer, Replicas


def quieten() -> None:
    """Before DeepSpeed starts: no report of each of its parts, and nothing compiled on the way."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would warn that it finds nothing else
    warnings.filterwarnings("ignore", ".*_tensor` is deprecated", FutureWarning)  # its calls of torch
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # A way for processes of one machine to share memory, 92 s to compile; gloo does without.
    cast(Any, deepspeed.ops).__compatible_ops__["deepspeed_shm_comm"] = False


def load_whole() -> None:
    """From now on models are loaded whole, under ZeRO-3 too: the student is cut up when its scales are fitted."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


class Zero(Replicas):
    """DeepSpeed ZeRO-2 or ZeRO-3, with or without parts kept on the CPU."""

    def place(self, student: nn.Module, make_optimizer: MakeOptimizer) -> None:
        config = cast(Any, self.accelerator.state.deepspeed_plugin).deepspeed_config
        self.stage = check_config(config)
        config |= {
            "train_micro_batch_size_per_gpu": 1,  # its throughput counter's alone: our loop cuts batches itself
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.max_grad_norm,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU too, without a compiler
        }
        self.engine, _ = self.accelerator.prepare(student, make_optimizer(self.model))
        self.student, self.zero = self.engine, self.engine.optimizer
        self.optimizer = self.zero.optimizer
        # AdamW's state as its first step would make it. DeepSpeed looks for the state of all parameter groups
        # when the first group has taken its first step, and finds none for the others.
        for flat in self.flat_parts():
            state = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            self.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **state}
        if self.stage != 3:
            self.zero._lazy_init_hp_params_optimizer_state()  # views of the state by parameter

    # -------------------------------------------------------------- a step

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Gradients travel in every micro-batch, each process adds up its own part."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.accelerator.num_processes, scale_wrt_gas=False)

    def update(self) -> float:
        self.engine.step()  # which moves nothing where the norm is not finite
        return float(self.engine.get_global_grad_norm())

    # -------------------------------------------------------------- whole tensors

    def whole(self, tensor: Tensor) -> Tensor:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor], enabled=self.stage == 3):
            return tensor.detach().clone()

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        step = next(iter(self.optimizer.state.values()))["step"]
        for name, parameter in self.trainable().items():
            yield f"{name}.step", step.clone()
            for key in MOMENTS:
                yield f"{name}.{key}", cast(Tensor, safe_get_full_optimizer_state(parameter, key))

    def flat_parts(self) -> list[Tensor]:
        """This process's float32 parameters, end to end: what the optimizer moves."""
        parts = (
            self.zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.zero.single_partition_of_fp32_groups
        )
        return list(parts)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        names = self.trainable()
        step = moments[f"{next(iter(names))}.step"]
        for flat in self.flat_parts():
            self.optimizer.state[flat]["step"].copy_(step)
        for name, parameter in names.items():
            with GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
                parameter.copy_(weights[name])
            self.set_part(parameter, weights[name], None)
            for key in MOMENTS:
                self.set_part(parameter, moments[f"{name}.{key}"], key)

    def set_part(self, parameter: Tensor, whole: Tensor, key: str | None) -> None:
        """Puts this process's part of a whole tensor where the optimizer has it: float32 weights, or a moment."""
        from deepspeed import utils

        if self.stage != 3:
            args = (parameter, whole.to(parameter.device))
            _ = (
                utils.safe_set_full_fp32_param(*args)
                if key is None
                else utils.safe_set_full_optimizer_state(*args, key)
            )
            return
        size = cast(Any, parameter).ds_tensor.numel()  # equal parts, the last one filled up
        start = size * self.accelerator.process_index
        part = torch.zeros(size, dtype=whole.dtype, device=self.accelerator.device)
        mine = whole.flatten()[start : start + size]
        part[: len(mine)] = mine.to(part.device)
        _ = (
            utils.safe_set_local_fp32_param(parameter, part)
            if key is None
            else utils.safe_set_local_optimizer_state(parameter, part, key)
        )

    @torch.no_grad()
    def for_evaluation(self) -> qwen3vl.Qwen3VLForConditionalGeneration:
        """Under ZeRO-3 a copy, as with FSDP2; under ZeRO-2 every process has the whole student."""
        return whole_copy(self.model, dict(self.weights())) if self.stage == 3 else self.model


def check_config(config: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration.

    Raises:
        UserError: one under which training would go wrong.
    """
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (2, 3):
        raise UserError(
            f"DeepSpeed ZeRO stage {stage} is not supported: set zero_stage to 2 or 3 in the launcher's file"
        )
    for mode in ("bf16", "fp16"):
        if config.get(mode, {}).get("enabled") is True:
            raise UserError(
                f"DeepSpeed's own {mode} would round latent weights and scales: take it out, run.precision says how to compute"
            )
    if "optimizer" in config or "scheduler" in config:
        raise UserError(
            "optimizer and schedule are the recipe's: take them out of the DeepSpeed configuration"
        )
    return stage
