"""The quantization grid: the one place that rounds.

    s     = snap(exp(theta))
    q     = clip(round(W / s), -2^(b-1), 2^(b-1) - 1)      round half to even
    W_hat = s * q

DESIGN section 4 (arXiv:2601.22709); learned step sizes after LSQ (Esser et al. 2020). `snap` rounds
a scale to bfloat16 inside [2^-14, 2^15], where it is exact in float16 too: the trained codes and
scales are the exported ones, and s * q is exact in float32.

Shape suffixes: O output features, I input features, G groups along the input, S the elements of one
group (G * S = I).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SCALE_MIN, SCALE_MAX = 2.0**-14, 2.0**15
INIT_RATIOS = 20
INIT_RATIO_RANGE = (0.3, 1.2)

# Elementwise passes over a slice of this many weights per thread stay in a CPU's caches: 2-4x faster than
# whole-matrix passes, where each goes to memory. Smaller slices lose more to starting and joining the
# threads (measured on 2 cores, 32 MB of L3). Accelerators want the whole matrix and get it.
_CPU_BLOCK = 2**18


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code, e.g. (-8, 7) for 4 bits.

    Raises:
        ValueError: `bits` outside 2..8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must lie in 2..8, got {bits}")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def compute_dtype(weight: Tensor) -> torch.dtype:
    """float64 for float64 weights (oracles), else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def grouped(weight_OI: Tensor, group_size: int) -> Tensor:
    """Views [O, I] as [O, G, S] (a copy only where the layout forces one).

    Raises:
        ValueError: not a matrix, or `group_size` does not divide I.
    """
    if weight_OI.ndim != 2 or group_size < 1 or weight_OI.shape[1] % group_size:
        raise ValueError(
            f"a weight of shape {tuple(weight_OI.shape)} cannot be cut into groups of {group_size} along its input"
        )
    outputs, inputs = weight_OI.shape
    return weight_OI.reshape(outputs, inputs // group_size, group_size)


def check_scales(weight_OI: Tensor, scales_OG: Tensor, group_size: int, what: str = "theta") -> None:
    """Raises ValueError unless `scales_OG` has one entry per group of the weight."""
    grouped(weight_OI, group_size)
    expected = (weight_OI.shape[0], weight_OI.shape[1] // group_size)
    if tuple(scales_OG.shape) != expected:
        raise ValueError(
            f"{what} of shape {tuple(scales_OG.shape)} does not fit a weight of shape {tuple(weight_OI.shape)} "
            f"in groups of {group_size}: expected {expected}"
        )


def snap(scale: Tensor) -> Tensor:
    """Clamps to [2^-14, 2^15] and rounds to bfloat16, half to even. Same shape, float32."""
    return scale.float().clamp(SCALE_MIN, SCALE_MAX).to(torch.bfloat16).float()


def snapped_scale(theta_OG: Tensor) -> Tensor:
    """The scale that `theta` (natural log of a scale) stands for: snap(exp(theta)), float32.

    The exponential is float64's: devices differ in the last bit of float32's, and near a midpoint
    that bit decides which bfloat16 is trained, exported and resumed.
    """
    return snap(theta_OG.detach().double().exp())


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Slices of rows that elementwise work should go through one at a time."""
    rows = weight.shape[0]
    per_row = max(1, weight[:1].numel())
    block = _CPU_BLOCK * torch.get_num_threads()
    step = max(1, block // per_row) if weight.device.type == "cpu" else max(1, rows)
    return (slice(start, start + step) for start in range(0, rows, step))


def rounded_ratio(weight_OGS: Tensor, scale_OG: Tensor, out_OGS: Tensor | None = None) -> Tensor:
    """round(W / s) before clipping: ties go to even; a true division, not W * (1 / s)."""
    return torch.div(weight_OGS, scale_OG.unsqueeze(-1), out=out_OGS).round_()


def whole(ratio: Tensor) -> Tensor:
    """The nearest whole numbers, ties to even, in the same type."""
    return torch.round(ratio)


def divided_codes(weight_OI: Tensor, scales_OG: Tensor, bits: int) -> tuple[Tensor, bool, bool]:
    """Codes of a weight under scales that are given as they are, and what they tell about it.

    Returns:
        codes [O, I] int8, round(W / s) clipped to `bits`; whether any was clipped; whether W lies on the grid
        of its scales, as far as a bfloat16 can (its 8 digits make a ratio wrong by up to 2^-8 of itself).

    Raises:
        ValueError: shapes do not fit, or a weight is NaN or infinite.
    """
    low, high = code_range(bits)
    weight_OGS = grouped(weight_OI, weight_OI.shape[1] // max(1, scales_OG.shape[1]))
    codes_OGS = torch.empty(weight_OGS.shape, dtype=torch.int8)
    clipped, on_grid = False, True
    for rows in row_blocks(weight_OGS):
        block_OGS = weight_OGS[rows].float()
        _require_finite(block_OGS, "weight")
        ratio_OGS = block_OGS / scales_OG[rows].float().unsqueeze(-1)
        rounded_OGS = torch.round(ratio_OGS)
        off_OGS = (ratio_OGS - rounded_OGS).abs() - ratio_OGS.abs() * 2.0**-8
        on_grid = on_grid and not bool((off_OGS > 0).any())
        codes_OGS[rows] = rounded_OGS.clamp(low, high)
        clipped = clipped or bool((rounded_OGS < low).any()) or bool((rounded_OGS > high).any())
    return codes_OGS.reshape(weight_OI.shape), clipped, on_grid


def init_theta(weight_OI: Tensor, group_size: int = 128, bits: int = 4) -> Tensor:
    """Initial log-scales: per group the MSE-best of 20 ratios of max|W| / (2^(b-1) - 1).

    The ratios are linspace(0.3, 1.2) (DESIGN section 4). Errors are those of the *snapped* scales,
    the ones that will be used; the first of equal ones wins. A group of zeros gets the smallest
    scale, hence codes 0.

    Args:
        weight_OI: any floating dtype; computed in float32 (float64 stays).

    Returns:
        theta [O, G] float32 = log(snapped scale), so snap(exp(theta)) is that scale again.

    Raises:
        ValueError: `group_size` does not divide I, `bits` outside 2..8, or a weight is NaN or infinite.
    """
    low, high = code_range(bits)
    source_OGS = grouped(weight_OI.detach(), group_size)
    theta_OG = torch.empty(source_OGS.shape[:2], dtype=torch.float32, device=weight_OI.device)
    if weight_OI.is_meta:
        return theta_OG
    _require_finite(weight_OI, "weight")
    for rows in row_blocks(source_OGS):
        block_OGS = source_OGS[rows].to(compute_dtype(weight_OI))
        theta_OG[rows] = _best_scale(block_OGS, low, high).log()
    return theta_OG


def absmax_theta(weight_OI: Tensor, group_size: int = 128, bits: int = 4) -> Tensor:
    """Log-scales that put the largest weight of each group on the largest code: snap(max|W| / (2^(b-1) - 1)).

    Arguments, result and errors as `init_theta`, which this is the usual rival of.
    """
    _, high = code_range(bits)
    _require_finite(weight_OI, "weight")
    return snap(grouped(weight_OI.detach(), group_size).abs().amax(-1).double() / high).log()


def _best_scale(weight_OGS: Tensor, low: int, high: int) -> Tensor:
    """The snapped candidate scale [O, G] with the least squared error."""
    # Candidates in float64, so that which bfloat16 they snap to does not hang on float32 rounding.
    base_OG = weight_OGS.abs().amax(-1).double() / high
    ratios = torch.linspace(*INIT_RATIO_RANGE, INIT_RATIOS, dtype=torch.float64).tolist()
    best_OG, least_OG = snap(base_OG * ratios[0]), None
    work_OGS = torch.empty_like(weight_OGS)
    for ratio in ratios:
        scale_OG = snap(base_OG * ratio)
        wide_OG = scale_OG.to(weight_OGS.dtype)
        codes_OGS = rounded_ratio(weight_OGS, wide_OG, out_OGS=work_OGS).clamp_(low, high)
        error_OGS = codes_OGS.mul_(wide_OG.unsqueeze(-1)).sub_(weight_OGS)
        error_OG = torch.linalg.vecdot(error_OGS, error_OGS)
        if least_OG is None:
            least_OG = error_OG
            continue
        better_OG = error_OG < least_OG
        least_OG = torch.where(better_OG, error_OG, least_OG)
        best_OG = torch.where(better_OG, scale_OG, best_OG)
    return best_OG


def quantize(
    weight_OI: Tensor, theta_OG: Tensor, group_size: int = 128, bits: int = 4
) -> tuple[Tensor, Tensor]:
    """The codes and scales that training uses and every export format stores.

    Args:
        weight_OI: latent weight; computed in float32 (float64 stays).
        theta_OG: natural log of the scales, one per group.

    Returns:
        codes [O, I] int8 in [-2^(b-1), 2^(b-1) - 1], scales [O, G] bfloat16.

    Raises:
        ValueError: shapes do not fit, `bits` outside 2..8, or a NaN or infinity in weight or theta.
    """
    low, high = code_range(bits)
    check_scales(weight_OI, theta_OG, group_size)
    _require_finite(weight_OI, "weight")
    _require_finite(theta_OG, "theta")
    source_OGS = grouped(weight_OI.detach(), group_size)
    scale_OG = snapped_scale(theta_OG)
    codes_OGS = torch.empty(source_OGS.shape, dtype=torch.int8, device=weight_OI.device)
    dtype = compute_dtype(weight_OI)
    for rows in row_blocks(source_OGS):
        block_OGS = rounded_ratio(source_OGS[rows].to(dtype), scale_OG[rows].to(dtype))
        codes_OGS[rows] = block_OGS.clamp_(low, high)
    return codes_OGS.reshape(weight_OI.shape), scale_OG.to(torch.bfloat16)


def dequantize(
    codes_OI: Tensor, scales_OG: Tensor, group_size: int = 128, zeros_OG: Tensor | None = None
) -> Tensor:
    """W_hat = s * q [O, I] in float32, exact for int8 codes and scales of 16 bits.

    Args:
        zeros_OG: zero points, for s * (q - z); None is 0 everywhere.

    Raises:
        ValueError: shapes do not fit.
    """
    check_scales(codes_OI, scales_OG, group_size, what="scales")
    weight_OGS = grouped(codes_OI, group_size).float()
    if zeros_OG is not None:
        weight_OGS = weight_OGS - zeros_OG.float().unsqueeze(-1)
    return (weight_OGS * scales_OG.float().unsqueeze(-1)).reshape(codes_OI.shape)


def _require_finite(tensor: Tensor, what: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{what} of shape {tuple(tensor.shape)} holds {bad} NaN or infinite values")
