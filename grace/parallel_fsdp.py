"""The student in shards (FSDP2): weights, gradients and optimizer state, a part in each process.

`fully_shard` is applied here and not by `Accelerator.prepare`: on the CPU that one takes DDP without a word,
and it would cast the latent weights to 16 bits before the quantizer sees them. Weights travel in float32.
"""

import contextlib
from typing import Any, cast

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from grace.errors import UserError
from grace.models import qwen3vl
from grace.models.shared_work import whole_copy
from grace.parallel import MakeOptimizer, Replicas


class FullySharded(Replicas):
    """FSDP2: a decoder layer or vision block is whole only while it runs."""

    def place(self, student: nn.Module, make_optimizer: MakeOptimizer) -> None:
        plugin = FullyShardedDataParallelPlugin()  # reads what the launcher set
        if plugin.fsdp_version != 2:
            raise UserError("FSDP1 is not supported: set fsdp_version: 2 in the launcher's file")
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            raise UserError(
                "FSDP with CPU offload is not supported: launch with recipes/accelerate/zero3_offload.yaml"
            )
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        for unit in units(self.model):
            fully_shard(unit, mesh=mesh, reshard_after_forward=bool(plugin.reshard_after_forward))
        # The rest: embedding, tied to the output layer, and mergers. Whole from here to the end of backward.
        self.student = cast(nn.Module, fully_shard(student, mesh=mesh))
        self.optimizer = make_optimizer(self.model)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients travel in every micro-batch: keeping them would need a whole student's worth of memory."""
        return contextlib.nullcontext()

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()

    def part(self, whole: Tensor, parameter: Tensor) -> Tensor:
        shard = cast(DTensor, parameter)
        # Every process has read the whole: each cuts out its own part, nothing travels.
        return distribute_tensor(
            whole.to(shard.device), shard.device_mesh, shard.placements, src_data_rank=None
        )

    @torch.no_grad()
    def for_evaluation(self) -> qwen3vl.Qwen3VLForConditionalGeneration:
        """A copy, for as long as it is used: processes may then evaluate different numbers of records."""
        return whole_copy(self.model, dict(self.weights()))


def units(model: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: the blocks that the library says run in one piece."""
    names = cast(list[str], model._no_split_modules)
    return [module for module in model.modules() if type(module).__name__ in names]
