"""What a forward pass needs, whoever made it."""

from typing import Protocol

from torch import Tensor


class ModelInputs(Protocol):
    """What a forward pass needs; `grace.data.batch.Batch` has it."""

    @property
    def input_ids_BL(self) -> Tensor: ...
    @property
    def attention_mask_BL(self) -> Tensor | None: ...
    @property
    def mm_token_type_ids_BL(self) -> Tensor: ...
    @property
    def pixel_values_PD(self) -> Tensor | None: ...
    @property
    def image_grid_thw_N3(self) -> Tensor | None: ...
    @property
    def position_ids_3BL(self) -> Tensor | None: ...
    @property
    def lengths(self) -> list[int] | None: ...
