"""Decoding on CUDA: one captured graph per batch size, replayed for every token.

A graph serves every step of its size: tokens, rows and places are read from one small tensor on the device, which is
all that a step writes. A batch between two sizes is filled up with rows that attend to nothing and write to the spare
place behind the context.

Shape suffixes: those of `fused_step`.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grace.kernels import w4a16
from grace.kernels.w4a16_tuning import bucket
from grace.runtime.decoder import Decoder
from grace.runtime.device_sampling import Draw, drawn, packed
from grace.runtime.fused_step import fused_step, join_linears
from grace.runtime.int4_linear import Int4Linear

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
PREFILL_TOKENS = (128, 256, 512, 1024, 2048)  # prompts that `tune` times
_MAX_SPLITS = 16
_PLACES_PER_SPLIT = 64

Run = Callable[[], None]
Capture = Callable[[Run], Run]
"""Takes work on fixed tensors, returns what does it again."""


class CudaCapture:
    """Captures work into CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Run) -> Run:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # compiles kernels and lets libraries allocate what they keep
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        self._pool = graph.pool()
        return graph.replay


class _Bucket:
    """The step of one batch size, captured: its inputs, and its outputs after a replay."""

    def __init__(
        self,
        step: Callable[[Tensor], Tensor],
        size: int,
        sampled: bool,
        idle_5: Tensor,
        device: torch.device,
        capture: Capture,
    ):
        self.inputs_5B = idle_5[:, None].repeat(1, size).to(device)
        self.draws_4B = packed([Draw()] * size, device)
        self.logits_BV: Tensor
        self.tokens_B: Tensor

        def run() -> None:
            self.logits_BV = step(self.inputs_5B)
            self.tokens_B = drawn(self.logits_BV, self.draws_4B) if sampled else self.logits_BV.argmax(-1)

        self._run = capture(run)

    def replay(self, inputs_5R: Tensor, idle_5: Tensor) -> None:
        rows = inputs_5R.shape[1]
        padded = torch.cat([inputs_5R, idle_5[:, None].expand(-1, self.inputs_5B.shape[1] - rows)], 1)
        self.inputs_5B.copy_(padded)
        self._run()


class GraphDecoder(Decoder):
    """A `Decoder` whose steps are replayed graphs over fused kernels.

    A graph keeps the kernels that it was captured with: choose them (`set_kernel`) before.

    Args:
        capture: how a step is captured; None is a CUDA graph.

    Raises:
        ValueError: a device that the kernels cannot run on.
        UserError: as `Decoder`.
    """

    def __init__(self, model: Any, rows: int = 1, context: int = 4096, capture: Capture | None = None):
        self._graphs: dict[tuple[int, bool], _Bucket] = {}
        super().__init__(model, rows, context)
        obstacle = w4a16.device_obstacle(self.device)
        if obstacle:
            raise ValueError(obstacle)
        self._capture = capture or CudaCapture()
        join_linears(self)

    def resize(self, rows: int | None = None, context: int | None = None) -> None:
        self._graphs.clear()  # they hold the old cache
        super().resize(rows, context)

    def buckets(self) -> list[int]:
        """The batch sizes that are captured: powers of two as far as the cache has rows."""
        sizes = [*BUCKETS]
        while sizes[-1] < self.rows:
            sizes.append(2 * sizes[-1])
        return [size for size in sizes if size < 2 * self.rows]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Captures every batch size now, the largest first, instead of when it first comes up."""
        for size in reversed(self.buckets()):
            self._bucket(size, sampled=False)

    @torch.inference_mode()
    def decode_tokens(self, rows: Sequence[int], tokens: Sequence[int], draws: Sequence[Draw]) -> list[int]:
        """One step whose next tokens are chosen on the device; they alone come back.

        Raises:
            ValueError, UserError: as `decode`.
        """
        self.check_step(rows, tokens)
        if len(draws) != len(rows):
            raise ValueError(f"{len(rows)} rows with {len(draws)} draws")
        graph = self._bucket(len(rows), sampled=any(one.temperature > 0 for one in draws))
        graph.draws_4B[:, : len(rows)] = packed(list(draws), self.device)
        self._replay(graph, list(rows), list(tokens))
        found = graph.tokens_B[: len(rows)].tolist()
        self.advance(rows)
        return found

    def _step(self, rows: list[int], tokens: list[int]) -> Tensor:
        graph = self._bucket(len(rows), sampled=False)
        self._replay(graph, rows, tokens)
        return graph.logits_BV[: len(rows)].clone()  # the next replay writes over them

    def _replay(self, graph: _Bucket, rows: list[int], tokens: list[int]) -> None:
        places = [self._lengths[row] for row in rows]
        turns = [place + self._offsets[row] for row, place in zip(rows, places, strict=True)]
        counts = [place + 1 for place in places]
        graph.replay(torch.tensor([tokens, rows, places, turns, counts]), self._idle())

    def _idle(self) -> Tensor:
        """What a row that only fills up the batch reads: it writes to the spare place and attends to nothing."""
        return torch.tensor([0, 0, self.context, 0, 0])

    def _bucket(self, rows: int, sampled: bool) -> _Bucket:
        size = next(size for size in self.buckets() if size >= rows)
        key = (size, sampled)
        if key not in self._graphs:
            step = functools.partial(fused_step, self, splits=self._splits(size))
            with w4a16.on_device(self.device):
                self._graphs[key] = _Bucket(step, size, sampled, self._idle(), self.device, self._capture)
        return self._graphs[key]

    def _splits(self, size: int) -> int:
        """Programs per row and head in attention: two on each multiprocessor, a power of two."""
        wanted = 2 * w4a16.processors(self.device) // (size * self.parts.kv_heads)
        most = max(1, min(_MAX_SPLITS, wanted, self.context // _PLACES_PER_SPLIT))
        return 1 << (most.bit_length() - 1)


def decoder_for(model: Any, rows: int, context: int) -> Decoder:
    """A decoder of replayed graphs where the model is on CUDA and triton is installed, else a plain one."""
    device = next(model.parameters()).device
    usable = device.type == "cuda" and w4a16.device_obstacle(device) is None
    return GraphDecoder(model, rows, context) if usable else Decoder(model, rows, context)


def prepare(decoder: Decoder) -> None:
    """Does ahead of the first token what a decoder of graphs needs once; says on stderr what takes long."""
    if isinstance(decoder, GraphDecoder):
        tune(decoder, lambda line: print(f"kernel timed, once per device: {line}", file=sys.stderr))
        decoder.warm_up()


def tune(decoder: GraphDecoder, report: Callable[[str], None]) -> None:
    """Times the Triton settings of every packed shape that a decoder meets, where the device's table lacks them.

    Args:
        report: gets one line per shape that was timed.
    """
    layers = [linear.modules[0] for layer in decoder.layers
              for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)]  # fmt: skip
    device, dtype = decoder.device, decoder.dtype
    sizes = dict.fromkeys(bucket(tokens) for tokens in [*decoder.buckets(), *PREFILL_TOKENS])
    packed_layers = [layer for layer in layers if isinstance(layer, Int4Linear)]
    for shape in dict.fromkeys(layer.shape for layer in packed_layers if layer.kernel in ("auto", "triton")):
        for tokens in sizes:
            if w4a16.is_tuned(*shape, tokens, dtype, device):
                continue
            config, seconds = w4a16.tune(*shape, tokens, dtype, device)
            report(
                f"{shape.in_features} -> {shape.out_features}, {tokens} tokens: {1e6 * seconds:.1f} us by {config}"
            )
