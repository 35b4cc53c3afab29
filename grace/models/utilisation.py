"""Model FLOPs, and what a device could do at most: the two sides of model FLOPs utilisation (MFU).

Counted is what the models need, however it is computed: two FLOPs per multiply-add of every matrix product,
attention once per visible pair (half of them in the causal decoder), three times the forward pass where weights
are trained (PaLM, arXiv:2204.02311, appendix B), once where they are frozen. Not counted: recomputed
activations, padding, quantizing, losses, elementwise work.
"""

import re
from dataclasses import dataclass
from typing import Any

# Dense bfloat16 FLOP/s by words of `torch.cuda.get_device_name`; the first that fits. Sources: NVIDIA's data
# sheets of these products (half of the figure "with sparsity" where that is the one printed), and for GeForce
# the Ampere and Ada architecture white papers (with float32 accumulation).
PEAK_BF16 = (
    ("GB200", 2500e12),
    ("GH200", 989.4e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.4e12),
    ("H100 NVL", 835.5e12),
    ("H100 PCIe", 756.5e12),
    ("H100", 989.4e12),
    ("H800", 989.4e12),
    ("H20", 148e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362.05e12),
    ("L40", 181.05e12),
    ("L4", 121e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak of a device, FLOP/s; None where it is not known, as for "fp32" and CPUs."""
    if precision != "bf16":
        return None
    words = set(re.split(r"[\s-]+", device_name.casefold()))
    return next((peak for name, peak in PEAK_BF16 if words.issuperset(name.casefold().split())), None)


@dataclass(frozen=True)
class Work:
    """What a step's FLOPs follow from, summed over its samples and pictures.

    Attributes:
        tokens, token_squares: lengths of the samples without padding, and their squares.
        supervised: tokens that go through the head.
        patches, patch_squares: of the pictures, and their squares.
    """

    tokens: float
    token_squares: float
    supervised: float
    patches: float
    patch_squares: float


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one model's forward pass, per unit of `Work`."""

    per_token: float
    per_token_square: float
    per_supervised: float
    per_patch: float
    per_patch_square: float
    per_patch_merged: float  # in the mergers

    def decoder(self, work: Work) -> float:
        """Decoder and head."""
        return (
            self.per_token * work.tokens
            + self.per_token_square * work.token_squares
            + self.per_supervised * work.supervised
        )

    def vision(self, work: Work) -> float:
        """Vision tower without its mergers."""
        return self.per_patch * work.patches + self.per_patch_square * work.patch_squares

    def mergers(self, work: Work) -> float:
        """The patch merger and those of deepstack."""
        return self.per_patch_merged * work.patches


def forward_flops(config: Any) -> ForwardFlops:
    """Counts the matrix products of a Qwen3-VL model from its configuration."""
    text, vision = config.text_config, config.vision_config
    width, feed_forward, head = text.hidden_size, text.intermediate_size, text.head_dim
    query, key = text.num_attention_heads * head, text.num_key_value_heads * head
    layer = 2 * (width * (query + 2 * key) + query * width + 3 * width * feed_forward)
    merged = vision.hidden_size * vision.spatial_merge_size**2
    merger = 2 * (merged * merged + merged * vision.out_hidden_size) / vision.spatial_merge_size**2
    tower = 2 * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size)
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return ForwardFlops(
        per_token=text.num_hidden_layers * layer,
        per_token_square=text.num_hidden_layers * 2 * query,
        per_supervised=2 * width * text.vocab_size,
        per_patch=vision.depth * tower + 2 * pixels * vision.hidden_size,
        per_patch_square=vision.depth * 4 * vision.hidden_size,
        per_patch_merged=merger * (1 + len(vision.deepstack_visual_indexes)),
    )


def step_flops(work: Work, student: ForwardFlops, teacher: ForwardFlops | None, train_vision: bool) -> float:
    """FLOPs of an optimizer step.

    Args:
        teacher: None without one, with a cached one, and where it runs on other devices.
        train_vision: whether the student's vision tower is trained; its mergers and decoder always are.
    """
    total = 3 * (student.decoder(work) + student.mergers(work))
    total += (3 if train_vision else 1) * student.vision(work)
    if teacher is not None:
        total += teacher.decoder(work) + teacher.mergers(work) + teacher.vision(work)
    return total
