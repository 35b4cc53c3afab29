"""Whether what `grace.distill.fused` was given fits together.

Shape suffixes: T supervised tokens, D / E student / teacher width, V vocabulary.
"""

from torch import Tensor

from grace.distill.top_k import TopK


def check_inputs(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    teacher_hidden_TE: Tensor | None,
    teacher_head_VE: Tensor | None,
    targets_T: Tensor,
    gates_T: Tensor | None,
    top_k: TopK | None,
) -> None:
    """Raises ValueError unless everything fits together."""
    tokens = targets_T.shape
    sides = {"student": (student_hidden_TD, student_head_VD)}
    if (teacher_hidden_TE is None) != (teacher_head_VE is None):
        raise ValueError("the teacher's hidden states and its head go together: give both or neither")
    if teacher_hidden_TE is not None and top_k is not None:
        raise ValueError("the teacher is there or cached: give its hidden states and head, or teacher_top_k")
    if teacher_hidden_TE is not None and teacher_head_VE is not None:
        sides["teacher"] = (teacher_hidden_TE, teacher_head_VE)
    for side, (hidden, head) in sides.items():
        if (
            hidden.ndim != 2
            or head.ndim != 2
            or hidden.shape[1] != head.shape[1]
            or hidden.shape[:1] != tokens
        ):
            raise ValueError(
                f"{side} hidden states {tuple(hidden.shape)}, head {tuple(head.shape)} and targets "
                f"{tuple(tokens)} do not fit: expected [T, width], [vocabulary, width] and [T]"
            )
    if gates_T is not None and gates_T.shape != tokens:
        raise ValueError(f"gates {tuple(gates_T.shape)} do not fit {tuple(tokens)} targets")


def check_top_k(top_k: TopK, tokens: int, vocabulary: int, temperature: float) -> None:
    """Raises ValueError unless what is known of the teacher fits the student and the loss."""
    if len(top_k.gate_T) != tokens or top_k.vocabulary > vocabulary or top_k.temperature != temperature:
        raise ValueError(
            f"what is known of {len(top_k.gate_T)} tokens over {top_k.vocabulary} entries at temperature "
            f"{top_k.temperature:g} does not fit {tokens} tokens, {vocabulary} entries and temperature {temperature:g}"
        )


def check_targets(targets_T: Tensor, shared: int) -> None:
    """On the CPU only: elsewhere it would wait for the device, whose own indexing checks them."""
    if targets_T.device.type == "cpu" and len(targets_T):
        low, high = (int(value) for value in targets_T.aminmax())
        if low < 0 or high >= shared:
            raise ValueError(f"targets span [{low}, {high}], outside the shared vocabulary of {shared}")
