"""What one forward pass needs, and samples padded to the longest of them (`grace.data.packing` needs no padding).

Shape suffixes: B batch, L sequence, P image patches, D numbers per patch, N images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grace.data.template import IGNORED, Sample


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs; pictures of all samples follow one another.

    Attributes:
        input_ids_BL, labels_BL, mm_token_type_ids_BL: int64; padding is pad_token_id, -100, 0.
        attention_mask_BL: int64, 0 at padding; None where rows are packed.
        pixel_values_PD: float32 or None; image_grid_thw_N3: int64 or None.
        record_ids: in the order of their tokens.
        position_ids_3BL: int64, time, height and width of each token of packed rows; None leaves them to the model.
        lengths: of the samples of a packed row, in order.
    """

    input_ids_BL: Tensor
    attention_mask_BL: Tensor | None
    mm_token_type_ids_BL: Tensor
    labels_BL: Tensor
    pixel_values_PD: Tensor | None
    image_grid_thw_N3: Tensor | None
    record_ids: list[str]
    position_ids_3BL: Tensor | None = None
    lengths: list[int] | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on `device`."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def collate(samples: Sequence[Sample], pad_token_id: int, left_pad: bool = False) -> Batch:
    """Pads samples on the right (training) or on the left (generation) to the longest one.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("cannot collate zero samples")
    side = "left" if left_pad else "right"

    def pad(rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    pixels = [sample.pixel_values_PD for sample in samples if sample.pixel_values_PD is not None]
    grids = [sample.image_grid_thw_N3 for sample in samples if sample.image_grid_thw_N3 is not None]
    return Batch(
        input_ids_BL=pad([sample.input_ids_L for sample in samples], pad_token_id),
        attention_mask_BL=pad([torch.ones_like(sample.input_ids_L) for sample in samples], 0),
        mm_token_type_ids_BL=pad([sample.mm_token_type_ids_L for sample in samples], 0),
        labels_BL=pad([sample.labels_L for sample in samples], IGNORED),
        pixel_values_PD=torch.cat(pixels) if pixels else None,
        image_grid_thw_N3=torch.cat(grids) if grids else None,
        record_ids=[sample.record_id for sample in samples],
    )
