"""What a decoder layer does between its matrix products, on the CPU in bfloat16: the passes of `layer_cpu.c`.

Shape suffixes: T tokens, D width, R rows of the cache, C places in a row, Q query heads, K key heads, S head size,
X = Q + K, I width of the gate.
"""

import ctypes

import torch
from torch import Tensor

from grace.kernels.compiled import library

WIDTH_MULTIPLE = 32


class _Rotation(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "weight", "cosine", "sine", "query", "key", "value")),
        *((name, ctypes.c_void_p) for name in ("rows", "places")),
        *((name, ctypes.c_int64) for name in ("tokens", "queries", "keys", "size", "context")),
        ("epsilon", ctypes.c_float),
    ]


def add_norm(x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, epsilon: float) -> Tensor:
    """Adds delta to x in place; x / rms(x) * weight."""
    _check(x_TD, weight_D, *([] if delta_TD is None else [delta_TD]))
    y_TD = torch.empty_like(x_TD)
    library().grace_add_norm(
        ctypes.c_void_p(x_TD.data_ptr()),
        ctypes.c_void_p(None if delta_TD is None else delta_TD.data_ptr()),
        ctypes.c_void_p(weight_D.data_ptr()),
        ctypes.c_void_p(y_TD.data_ptr()),
        ctypes.c_int64(x_TD.shape[0]),
        ctypes.c_int64(x_TD.shape[1]),
        ctypes.c_float(epsilon),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return y_TD


def rotate(
    qkv_TZ: Tensor,
    weight_XS: Tensor,
    cos_TS: Tensor,
    sin_TS: Tensor,
    keys_RKCS: Tensor,
    values_RKCS: Tensor,
    rows_T: Tensor,
    places_T: Tensor,
    epsilon: float,
) -> Tensor:
    """Norms and turns queries and keys, and puts keys and values into the cache.

    Args:
        qkv_TZ: queries, keys and values side by side, Z = (Q + 2 K) S.
        sin_TS: negative in the first half, so that x cos + roll(x) sin turns.
        rows_T, places_T: int64, where each token goes.

    Returns:
        the queries [T, Q, S].
    """
    _, keys, context, size = keys_RKCS.shape
    queries = len(weight_XS) - keys
    _check(qkv_TZ, weight_XS, cos_TS, sin_TS, keys_RKCS, values_RKCS)
    query_TQS = torch.empty(len(qkv_TZ), queries, size, dtype=torch.bfloat16)
    tensors = (qkv_TZ, weight_XS, cos_TS, sin_TS, query_TQS, keys_RKCS, values_RKCS, rows_T, places_T)
    numbers = (len(qkv_TZ), queries, keys, size, context)
    job = _Rotation(*(tensor.data_ptr() for tensor in tensors), *numbers, epsilon)
    library().grace_rotate(ctypes.byref(job), ctypes.c_int64(torch.get_num_threads()))
    return query_TQS


def gate(both_TJ: Tensor) -> Tensor:
    """silu(gate) * up of gate and up side by side: [T, 2 I] to [T, I]."""
    _check(both_TJ)
    tokens, both = both_TJ.shape
    y_TI = torch.empty(tokens, both // 2, dtype=torch.bfloat16)
    library().grace_gate(
        ctypes.c_void_p(both_TJ.data_ptr()),
        ctypes.c_void_p(y_TI.data_ptr()),
        ctypes.c_int64(tokens),
        ctypes.c_int64(both // 2),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return y_TI


def _check(*tensors: Tensor) -> None:
    """Raises `ValueError` for what the passes would read wrongly."""
    for tensor in tensors:
        if tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(
                f"expected contiguous bfloat16 on the CPU, not {tensor.dtype} on {tensor.device}"
            )
        if tensor.shape[-1] % WIDTH_MULTIPLE:
            raise ValueError(f"a width of {tensor.shape[-1]} is not a multiple of {WIDTH_MULTIPLE}")
