"""What is exported, whatever it was read from: integer codes, scales and dense tensors under the base model's names.

Every format's reader gives a `Source`, every writer takes one; the parity gate reads what was written with
the same readers and compares the two.

Shape suffixes: O output features, I input features, G groups along the input.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from grace.checked_files import MEND, damage_of, shown
from grace.checkpoint import QatState, QuantizedWeight

OWN = "qat"  # the kind of a checkpoint with `grace_qat/`; one that GRACE trained knows its recipe
ROUNDED = "full-precision"  # that of a model whose codes `grace quantize` makes
# Keys of config.json that say how the weights are packed, which is for each writer to say anew.
PACKING_KEYS = ("quantization_config", "quantization", "awq_packing")
NARROW = (torch.bfloat16, torch.float16)


class Tensors(Protocol):
    """Tensors by name, each read when asked for: `grace.export.shards.Weights` or a view of it."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]: ...

    def read(self, name: str) -> Tensor: ...

    def pieces(self, name: str) -> Iterator[Tensor]: ...


class Modules(Mapping[str, QuantizedWeight]):
    """The quantized linears of a directory, each read and checked when asked for, and not kept.

    Args:
        where: the directory, for messages.
        shapes: [out, in] of each.
        codes: gives int8 codes [O, I] by name.
        grid: gives scales [O, G] of any floating type and zero points int8 [O, G], or None where all are 0.
    """

    def __init__(
        self,
        where: Path,
        shapes: Mapping[str, tuple[int, int]],
        bits: int,
        group_size: int,
        codes: Callable[[str], Tensor],
        grid: Callable[[str], tuple[Tensor, Tensor | None]],
    ):
        self.where, self.shapes, self.bits, self.group_size = where, dict(shapes), bits, group_size
        self._codes, self._grid = codes, grid

    def __getitem__(self, name: str) -> QuantizedWeight:
        """Codes, scales and zero points of one linear.

        Raises:
            KeyError: it is not quantized.
            UserError: what is stored cannot be codes, scales or zero points.
        """
        if name not in self.shapes:
            raise KeyError(name)
        scales_OG, zeros_OG = self.grid(name)
        with damage_of(self.where, MEND):
            codes_OI = self._codes(name)
            _require_codes(name, "codes", codes_OI, self.shapes[name], self.bits)
        return QuantizedWeight(codes_OI, scales_OG, zeros_OG=zeros_OG)

    def grid(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points alone; errors as of `[name]`."""
        outputs, inputs = self.shapes[name]
        with damage_of(self.where, MEND):
            scales_OG, zeros_OG = self._grid(name)
            shape = (outputs, inputs // self.group_size)
            if tuple(scales_OG.shape) != shape or not scales_OG.is_floating_point():
                raise ValueError(f"{name}: scales {tuple(scales_OG.shape)} do not fit {self.shapes[name]}")
            if not bool(torch.isfinite(scales_OG).all()) or not bool((scales_OG > 0).all()):
                raise ValueError(f"{name}: scales must be finite and positive")
            if zeros_OG is not None:
                _require_codes(name, "zero points", zeros_OG, shape, self.bits)
        return scales_OG, zeros_OG

    def without_codes(self, name: str) -> QuantizedWeight:
        """Scales and zero points of one linear, its codes left out; errors as of `[name]`."""
        scales_OG, zeros_OG = self.grid(name)
        return QuantizedWeight(torch.empty(0, dtype=torch.int8), scales_OG, zeros_OG=zeros_OG)

    def mapped(self, change: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]) -> "Modules":
        """The same codes with other scales and zero points."""
        return Modules(
            self.where,
            self.shapes,
            self.bits,
            self.group_size,
            self._codes,
            lambda name: change(*self.grid(name)),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True)
class Source:
    """A quantized model: what is stored as integers, the rest, and the directory with everything else.

    Attributes:
        config: config.json without what says how weights are packed.
        weights: the tensors; those that `qat.modules` holds may be among them.
        kind: what the directory is: `OWN`, `ROUNDED`, a format of `grace.export.pack.FORMATS`, or `reference-qat`.
        scale_dtype: the narrowest type that holds every scale: bfloat16, else float16, else float32.
        symmetric: whether W = scale * code, without zero points.
    """

    directory: Path
    qat: QatState
    config: Mapping[str, Any]
    weights: Tensors
    kind: str = OWN
    scale_dtype: torch.dtype = torch.bfloat16
    symmetric: bool = True

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The resolved recipe of the run, section by section; empty if the checkpoint does not say."""
        recipe = self.qat.info.get("recipe")
        return recipe if isinstance(recipe, Mapping) else {}

    @property
    def trained(self) -> bool:
        """Whether GRACE trained this very checkpoint, rather than made it from another format."""
        return self.kind == OWN and "converted_from" not in self.qat.info

    @property
    def rounded(self) -> Mapping[str, Any] | None:
        """How `grace quantize` made the codes; None where it did not."""
        rounded = self.qat.info.get("rounded")
        return rounded if isinstance(rounded, Mapping) else None

    @property
    def ours(self) -> bool:
        """Whether its codes were made here, in training or by rounding: the rest may be wider than it need be."""
        return self.trained or self.rounded is not None

    def with_modules(self, modules: Mapping[str, QuantizedWeight], **changes: Any) -> "Source":
        """This with other quantized linears."""
        return replace(self, qat=replace(self.qat, modules=modules), **changes)


def surveyed(source: Source) -> Source:
    """The same with `scale_dtype` and `symmetric` found out, every weight of the model in these terms.

    Raises:
        UserError: scales or zero points that cannot be.
    """
    modules = modules_of(source)
    choices, symmetric = list(NARROW), True
    for name in modules:
        scales_OG, zeros_OG = modules.grid(name)
        choices = [dtype for dtype in choices if holds(dtype, scales_OG)]
        symmetric = symmetric and (zeros_OG is None or not bool(zeros_OG.any()))
    dtype = choices[0] if choices else torch.float32

    def settled(scales_OG: Tensor, zeros_OG: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if symmetric:
            zeros_OG = None
        elif zeros_OG is None:
            zeros_OG = torch.zeros(scales_OG.shape, dtype=torch.int8)
        return scales_OG.to(dtype), zeros_OG

    return source.with_modules(modules.mapped(settled), scale_dtype=dtype, symmetric=symmetric)


def holds(dtype: torch.dtype, values: Tensor) -> bool:
    """Whether a type has every one of these numbers."""
    wide = values.float()
    return torch.equal(wide.to(dtype).float(), wide)


def modules_of(source: Source) -> Modules:
    """The quantized linears of a source that was read from files."""
    assert isinstance(source.qat.modules, Modules)
    return source.qat.modules


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether head and embeddings are one tensor, as loaders take it: see `grace.export.tensor_check`."""
    return bool(config.get("tie_word_embeddings", False))


def without_packing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own config."""
    return {key: value for key, value in config.items() if key not in PACKING_KEYS}


class View:
    """Some of the tensors of another set, under other names.

    Args:
        names: of each tensor here the name there.
        change: what to do to a tensor, or a piece of one, by its name here.
        shapes: where they differ from those there.
    """

    def __init__(
        self,
        inner: Tensors,
        names: Mapping[str, str],
        change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ):
        self._inner, self._names, self._change = inner, dict(names), change
        self.shapes = {name: inner.shapes[there] for name, there in names.items()} | dict(shapes or {})
        self.dtypes = {name: inner.dtypes[there] for name, there in names.items()}

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        return self._change(name, self._inner.read(self._names[name]))

    def pieces(self, name: str) -> Iterator[Tensor]:
        """One tensor in slices of its first dimension."""
        return (self._change(name, piece) for piece in self._inner.pieces(self._names[name]))


def require_group_size(group_size: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """`group_size`, if it is one that cuts the inputs of every linear.

    Raises:
        ValueError: it is not.
    """
    if type(group_size) is not int or not 1 <= group_size <= 2**20:
        raise ValueError(f"a group size of {shown(group_size)}")
    for name, shape in shapes.items():
        if len(shape) != 2 or math.prod(shape) == 0 or shape[1] % group_size:
            raise ValueError(f"{name} of shape {tuple(shape)} has no groups of {group_size}")
    return group_size


def _require_codes(name: str, what: str, codes: Tensor, shape: tuple[int, ...], bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if codes.dtype != torch.int8 or tuple(codes.shape) != tuple(shape):
        raise ValueError(f"{name}: {what} are {codes.dtype} {tuple(codes.shape)}, not int8 {tuple(shape)}")
    if codes.numel() and (codes.min() < low or codes.max() > high):
        raise ValueError(f"{name}: {what} outside [{low}, {high}]")
