"""Qwen3-VL as GRACE sees it: the only file that names a Hugging Face module path.

Everything else asks this file where the decoder linears, the head, the visual tokens and the
penultimate hidden states are.

Shape suffixes: B batch, L sequence, D hidden width, V vocabulary.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from grace.checked_files import reason_of
from grace.errors import UserError
from grace.models.attention import PACKED
from grace.models.inputs import ModelInputs
from grace.models.stored import config_for as config_for
from grace.models.stored import config_of as config_of
from grace.models.stored import from_tensors as from_tensors
from grace.models.stored import parameter_shapes as parameter_shapes
from grace.models.stored import require_loadable
from grace.models.stored import skeleton as skeleton
from grace.models.stored import vocabulary_size as vocabulary_size
from grace.quant.fake_quant import QuantLinear

DECODER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VISION, HEAD = "model.visual", "lm_head"
VISION_TYPE = "qwen3_vl_vision"  # what transformers 5 calls the tower in config.json
IMAGE_TOKEN_TYPE = 1  # value of mm_token_type_ids at image tokens


@dataclass(frozen=True)
class HiddenStates:
    """What GRACE needs from one forward pass, for teacher and student alike.

    Attributes:
        final_BLD: after the last decoder layer and the final norm; the head's input.
        last_layer_input_BLD: input of the last decoder layer, deepstack additions included;
            the relational loss looks at its visual tokens.
    """

    final_BLD: Tensor
    last_layer_input_BLD: Tensor


def load_model(
    path: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **options: Any
) -> Qwen3VLForConditionalGeneration:
    """Loads a plain or QAT checkpoint as an ordinary model, in evaluation mode.

    Args:
        options: for the library's `from_pretrained`; with a `device_map` among them `device` is not used.

    Raises:
        UserError: no model there, or one that cannot be read.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if Path(path).is_dir():
        require_loadable(Path(path))
    try:
        model = Qwen3VLForConditionalGeneration.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation={"": "sdpa", "text_config": PACKED},
            use_safetensors=True,
            **options,
        )
    except Exception as error:
        raise UserError(
            f"cannot load a Qwen3-VL model from {path} ({reason_of(error)}): check student.path / teacher.path"
        ) from error
    if "device_map" not in options:
        nn.Module.to(model, device)  # in place; the class's own `to` hides its types
    return model.eval()


def blocks(model: Qwen3VLForConditionalGeneration) -> list[str]:
    """Names of the parts that make up the model, in the order of a forward pass; none can be cut further."""
    decoder = "model.language_model"
    layers = [f"{decoder}.layers.{index}" for index in range(len(model.model.language_model.layers))]
    return [
        VISION,
        f"{decoder}.embed_tokens",
        f"{decoder}.rotary_emb",
        *layers,
        f"{decoder}.norm",
        HEAD,
    ]


def input_device(model: Qwen3VLForConditionalGeneration) -> torch.device:
    """Where a batch must be for `hidden_states`: models may be spread over several devices."""
    return model.model.language_model.embed_tokens.weight.device


def put_head_on(model: Qwen3VLForConditionalGeneration, device: torch.device) -> None:
    """Moves the output layer alone to `device`; a tied one is copied there, and no longer tied."""
    _put_head(model, nn.Linear, nn.Parameter(head_weight(model).detach().to(device), requires_grad=False))


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that GRACE quantizes, by their full names in the checkpoint."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith("model.language_model.layers.")
        and name.rsplit(".", 1)[-1] in DECODER_LINEARS
    }


def quantize_decoder(model: nn.Module, bits: int, group_size: int) -> dict[str, QuantLinear]:
    """Replaces every decoder linear by a `QuantLinear` in place and returns them by name.

    Raises:
        UserError: a layer's input width is not a multiple of `group_size`, or its weights are not finite.
    """
    quantized = {}
    for name, linear in decoder_linears(model).items():
        try:
            quantized[name] = QuantLinear.from_linear(linear, bits, group_size, name)
        except ValueError as error:
            mend = "choose a quant.group_size that divides it"
            if linear.in_features % group_size == 0:
                mend = "give a student whose weights are whole"
            raise UserError(f"{error}: {mend}") from error
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantized[name])
    return quantized


def quantized_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """The `QuantLinear` layers of a model by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def freeze_vision(model: Qwen3VLForConditionalGeneration) -> None:
    """Freezes the vision tower; its mergers stay trainable (they are the bridge to the decoder)."""
    for name, parameter in model.model.visual.named_parameters():
        parameter.requires_grad_(is_merger(name))


def is_merger(name: str) -> bool:
    """Whether a parameter name belongs to the patch merger or a deepstack merger."""
    return "merger" in name


def is_vision(name: str) -> bool:
    """Whether a full parameter name belongs to the vision tower (mergers included)."""
    return name.startswith(f"{VISION}.")


class LossHead(nn.Linear):
    """An output layer whose forward pass can hand its weight to a loss: `head(hidden, loss=f, ...)`.

    The full logits never exist then, and whatever gathers a sharded weight around a module's forward
    (FSDP, ZeRO-3) has gathered it.
    """

    def forward(
        self, input: Tensor, *args: Any, loss: Callable[..., Any] | None = None, **options: Any
    ) -> Any:
        """Logits, or `loss(input, weight, *args, **options)`."""
        if loss is None:
            return super().forward(input)
        return loss(input, self.weight, *args, **options)


def put_loss_head(model: Qwen3VLForConditionalGeneration) -> None:
    """Makes the output layer a `LossHead` on the same weight, which stays tied where it is."""
    _put_head(model, LossHead, head_weight(model))


def _put_head(model: Qwen3VLForConditionalGeneration, kind: type[nn.Linear], weight_VD: Any) -> None:
    with torch.device("meta"):
        head = kind(weight_VD.shape[1], weight_VD.shape[0], bias=False)
    head.weight = weight_VD
    model.lm_head = head


def loss_through_head(
    model: Qwen3VLForConditionalGeneration,
    loss: Callable[..., Any],
    hidden: Tensor,
    *args: Any,
    **options: Any,
) -> Any:
    """`loss(hidden, head weight, *args, **options)`, called inside the output layer's forward pass."""
    return model.lm_head(hidden, *args, loss=loss, **options)


def head_weight(model: Qwen3VLForConditionalGeneration) -> Tensor:
    """Output embedding [V, D]; tied models share it with the input embedding."""
    return model.lm_head.weight


def enable_checkpointing(model: Qwen3VLForConditionalGeneration) -> None:
    """Recomputes decoder and vision activations in the backward pass."""
    model.config.use_cache = False
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()  # the library recomputes only in training mode; there is no dropout to wake


def hidden_states(model: Qwen3VLForConditionalGeneration, batch: ModelInputs) -> HiddenStates:
    """One forward pass without logits.

    The last layer's *input* is taken with one hook for teacher and student: the library's own
    `hidden_states[-2]` misses the deepstack addition in shallow models.

    Raises:
        ValueError: a packed batch, and a model whose attention would mix its samples.
    """
    implementation = model.model.language_model.config._attn_implementation
    if batch.lengths is not None and implementation != PACKED:
        raise ValueError(
            f"packed rows need the attention {PACKED}, this model has {implementation}: use load_model"
        )
    captured: list[Tensor] = []

    def keep_input(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        captured.append(args[0] if args else kwargs["hidden_states"])

    last_layer = model.model.language_model.layers[-1]
    handle = last_layer.register_forward_pre_hook(keep_input, with_kwargs=True)
    try:
        outputs = model.model(
            input_ids=batch.input_ids_BL,
            attention_mask=batch.attention_mask_BL,
            position_ids=batch.position_ids_3BL,
            mm_token_type_ids=batch.mm_token_type_ids_BL,
            pixel_values=batch.pixel_values_PD,
            image_grid_thw=batch.image_grid_thw_N3,
            use_cache=False,
            lengths=batch.lengths,
        )
    finally:
        handle.remove()
    return HiddenStates(outputs.last_hidden_state, captured[0])


def image_token_counts(model: Qwen3VLForConditionalGeneration, image_grid_thw_N3: Tensor | None) -> list[int]:
    """Number of decoder tokens of each image, in the order of their appearance."""
    if image_grid_thw_N3 is None:
        return []
    vision: Any = model.config.vision_config
    merge = vision.spatial_merge_size
    return (image_grid_thw_N3.prod(-1) // merge**2).tolist()


def visual_tokens(
    model: Qwen3VLForConditionalGeneration, hidden_BLD: Tensor, batch: ModelInputs
) -> tuple[Tensor, ...]:
    """Hidden states at image tokens, one tensor [n_i, D] per image."""
    visual = hidden_BLD[batch.mm_token_type_ids_BL == IMAGE_TOKEN_TYPE]
    return torch.split(visual, image_token_counts(model, batch.image_grid_thw_N3))
