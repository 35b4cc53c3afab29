"""Padding changes nothing but the shape."""

import pytest
import torch

from grace.data.batch import collate
from grace.data.template import Sample


def sample(length: int, images: int, record_id: str) -> Sample:
    ids = torch.arange(1, length + 1)
    labels = torch.where(ids > length - 2, ids, -100)
    types = (ids == 2).long()
    pixels = torch.full((4 * images, 6), float(length)) if images else None
    grid = torch.tensor([[1, 2, 2]] * images) if images else None
    return Sample(ids, labels, types, pixels, grid, record_id)


SAMPLES = [sample(3, 1, "a"), sample(5, 0, "b"), sample(4, 2, "c")]


@pytest.mark.parametrize("left_pad", [False, True])
def test_rows_are_the_samples_and_padding_is_marked(left_pad: bool) -> None:
    batch = collate(SAMPLES, pad_token_id=77, left_pad=left_pad)
    assert batch.input_ids_BL.shape == (3, 5) and batch.record_ids == ["a", "b", "c"]
    for row, one in enumerate(SAMPLES):
        kept = batch.attention_mask_BL[row].bool()
        length = len(one.input_ids_L)
        padding, real = [False] * (5 - length), [True] * length
        assert kept.tolist() == (padding + real if left_pad else real + padding)
        assert torch.equal(batch.input_ids_BL[row][kept], one.input_ids_L)
        assert torch.equal(batch.labels_BL[row][kept], one.labels_L)
        assert torch.equal(batch.mm_token_type_ids_BL[row][kept], one.mm_token_type_ids_L)
        assert (batch.input_ids_BL[row][~kept] == 77).all()
        assert (batch.labels_BL[row][~kept] == -100).all()
        assert (batch.mm_token_type_ids_BL[row][~kept] == 0).all()


def test_pictures_follow_one_another_in_row_order() -> None:
    batch = collate(SAMPLES, pad_token_id=0)
    assert batch.pixel_values_PD is not None and batch.image_grid_thw_N3 is not None
    assert batch.pixel_values_PD[:, 0].tolist() == [3.0] * 4 + [4.0] * 8
    assert batch.image_grid_thw_N3.tolist() == [[1, 2, 2]] * 3


def test_without_pictures_there_are_no_pixels() -> None:
    batch = collate([SAMPLES[1]], pad_token_id=0)
    assert batch.pixel_values_PD is None and batch.image_grid_thw_N3 is None
    assert batch.to("cpu").pixel_values_PD is None


def test_to_moves_every_tensor() -> None:
    moved = collate(SAMPLES, pad_token_id=0).to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6 and all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.record_ids == ["a", "b", "c"]


def test_nothing_to_collate() -> None:
    with pytest.raises(ValueError, match="zero samples"):
        collate([], pad_token_id=0)
