"""Whether a format can hold a model exactly, and what becomes of scales that are float32.

Trained scales fit everywhere (DESIGN section 4, "Why snap"). Other people's need not:

| format             | scales                               | zero points |
| ------------------ | ------------------------------------ | ----------- |
| awq                | float16                              | any         |
| compressed-tensors | bfloat16, float16 or float32         | any         |
| gguf               | float16                              | none        |
| mlx                | bfloat16, float16 or float32         | any         |
| qat                | bfloat16                             | none        |

A format that cannot hold codes or zero points refuses the model. Scales of 16 bits are never rounded: they
fit or are refused. Float32 scales, which only checkpoints of the public GRACE code have, are rounded once,
to the nearest positive number of a 16-bit format, and the largest relative rounding is reported.

Shape suffixes: O output features, G groups.
"""

import torch
from torch import Tensor

from grace.errors import UserError
from grace.export.contents import Modules, Source, holds, modules_of

BITS = {"awq": (4,), "compressed-tensors": (4, 8), "gguf": (4, 8), "mlx": (4, 8)}
SCALES = {"awq": torch.float16, "gguf": torch.float16, "qat": torch.bfloat16}
SYMMETRIC_ONLY = {
    "gguf": "a Q4_0 block has no zero point, and a Q4_1 block would round -scale * zero to fp16",
    "qat": "training knows symmetric codes only",
}


def fitted(source: Source, name: str) -> tuple[Source, float]:
    """What a format will hold of a source, and the largest relative rounding of a scale.

    Groups whose codes are all 0 do not count for the rounding: their scale multiplies nothing.

    Raises:
        UserError: the format cannot hold it.
    """
    require_bits(name, source.qat.bits)
    if not source.symmetric and name in SYMMETRIC_ONLY:
        raise UserError(
            f"{source.directory} has zero points, which {name} cannot hold ({SYMMETRIC_ONLY[name]}): "
            "export it with --format awq or compressed-tensors or mlx"
        )
    wanted = SCALES.get(name)
    modules = modules_of(source)
    if wanted is None or all(holds(wanted, modules.grid(module)[0]) for module in modules):
        return source, 0.0
    if source.scale_dtype != torch.float32:
        raise UserError(
            f"{source.directory} has scales that {str(wanted).removeprefix('torch.')} cannot hold, and {name} has "
            "no other: export it with --format compressed-tensors or mlx"
        )
    largest = max(_rounding(modules, module, wanted) for module in modules)
    rounded = modules.mapped(lambda scales_OG, zeros_OG: (nearest(scales_OG, wanted), zeros_OG))
    return source.with_modules(rounded, scale_dtype=wanted), largest


def require_bits(name: str, bits: int) -> None:
    """Raises `UserError` where a format cannot hold codes of `bits` bits, naming those that can."""
    if name not in BITS or bits in BITS[name]:
        return
    held = " or ".join(map(str, BITS[name]))
    others = [other for other, of in BITS.items() if bits in of]
    raise UserError(
        f"{'AWQ' if name == 'awq' else name} holds {held} bits only and this run has {bits}: "
        f"export it with --format {' or '.join([*others, 'qat'])}"
    )


def nearest(scales_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest positive numbers of a narrower type.

    Raises:
        UserError: one is too large for it.
    """
    rounded_OG = scales_OG.to(dtype)
    if not bool(rounded_OG.isfinite().all()):
        raise UserError(
            f"a scale of {scales_OG.max().item():.3g} is too large for {str(dtype).removeprefix('torch.')}: "
            "export it with --format compressed-tensors or mlx"
        )
    return rounded_OG.clamp_min(torch.finfo(dtype).smallest_normal if dtype == torch.bfloat16 else 2.0**-24)


def _rounding(modules: Modules, name: str, dtype: torch.dtype) -> float:
    """Largest relative change of a scale of one linear, among groups that have any code but 0."""
    weight = modules[name]
    wide_OG = weight.scales_OG.double()
    change_OG = (nearest(weight.scales_OG, dtype).double() - wide_OG).abs() / wide_OG
    counts_OG = weight.codes_OI.view(*wide_OG.shape, -1).any(-1)
    return (change_OG * counts_OG).max().item()
