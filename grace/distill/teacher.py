"""What the teacher tells the student about one micro-batch, and how it is selected.

The teacher runs first over every micro-batch of an optimizer step, so that the step's normalisers
are known before the student runs (DESIGN section 4). Only what is used is kept.

Shape suffixes: B batch, L sequence, T supervised tokens, E teacher width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grace.distill.fused import teacher_gates
from grace.distill.gate import PUBLISHED, GateShape
from grace.distill.rcka import gram_is_degenerate

IGNORE_INDEX = -100


@dataclass(frozen=True)
class TeacherSignals:
    """The teacher's side of one micro-batch.

    Attributes:
        hidden_TE: final hidden states at supervised positions.
        gate_T: confidence gate of each supervised token.
        visual: hidden states of the visual tokens, one [n_i, E] per image.
        image_count: images whose teacher Gram matrix is not degenerate, a 0-d tensor.
    """

    hidden_TE: Tensor
    gate_T: Tensor
    visual: tuple[Tensor, ...]
    image_count: Tensor

    def loss_inputs(self, head_VE: Tensor | None, with_images: bool) -> dict[str, Any]:
        """The teacher's arguments of `grace.distill.objective.micro_batch_loss`."""
        inputs = {"teacher_hidden_TE": self.hidden_TE, "teacher_head_VE": head_VE, "gate_T": self.gate_T}
        return inputs | ({"teacher_visual": self.visual} if with_images else {})


def supervised(hidden_BLD: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states that predict a label, and those labels: ([T, D], [T]).

    Labels stand at the token they name; position i predicts the label at i + 1.
    """
    predicts_BL = labels_BL[:, 1:] != IGNORE_INDEX
    return hidden_BLD[:, :-1][predicts_BL], labels_BL[:, 1:][predicts_BL]


@torch.no_grad()
def teacher_signals(
    hidden_TE: Tensor,
    head_VE: Tensor,
    visual: Sequence[Tensor],
    vocabulary: int,
    gate: GateShape = PUBLISHED,
) -> TeacherSignals:
    """Computes gates over the first `vocabulary` entries, and image counts; logits exist chunk by chunk only."""
    gate_T = teacher_gates(hidden_TE, head_VE, shared=vocabulary, shape=gate)
    usable = [~gram_is_degenerate(image) for image in visual]
    image_count = (
        torch.stack(usable).sum() if usable else torch.zeros((), dtype=torch.long, device=hidden_TE.device)
    )
    return TeacherSignals(hidden_TE, gate_T, tuple(visual), image_count)
