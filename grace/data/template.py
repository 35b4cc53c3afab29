"""Conversations as token ids, with labels that come from the conversation's structure.

Ids are assembled piece by piece: structural tokens by id, everybody's text through the tokenizer
with special tokens split into plain bytes. So text that *looks* like structure (`<|im_end|>`,
`<|im_start|>assistant`, `<|image_pad|>`) stays text: it can neither end a turn nor become a label.
On ordinary text the ids equal those of `processor.apply_chat_template`.

Shape suffixes: L sequence, P image patches, D numbers per patch, N images, 3 (time, height, width).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from grace.data.records import IMAGE_MARK, Record, Role, Turn, check_marks, open_image
from grace.errors import UserError

# Qwen's chat format; `{% generation %}` encloses exactly what `encode` supervises.
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")

IGNORED = -100  # label of every position that is not supervised
PROMPT = "prompt"  # in the place of a record's id
IMAGE_TOKEN_TYPE = 1  # value of mm_token_type_ids at image tokens


@dataclass(frozen=True)
class Sample:
    """One encoded conversation.

    Attributes:
        input_ids_L: int64 token ids.
        labels_L: int64; labels[i] is input_ids[i] where supervised, else -100 (no shift).
        mm_token_type_ids_L: int64; 1 at image tokens, else 0.
        pixel_values_PD: float32 patches of all pictures, or None without pictures.
        image_grid_thw_N3: int64 patch grid of each picture, or None without pictures.
        record_id: where it came from.
    """

    input_ids_L: Tensor
    labels_L: Tensor
    mm_token_type_ids_L: Tensor
    pixel_values_PD: Tensor | None
    image_grid_thw_N3: Tensor | None
    record_id: str


@dataclass(frozen=True)
class Pixels:
    """One picture as the model takes it: its patches and its (time, height, width) in patches."""

    pixel_values_PD: Tensor
    image_grid_thw_13: Tensor


@dataclass(frozen=True)
class Message:
    """One utterance with its pictures in place. Text is text: an `<image>` in it marks nothing.

    Attributes:
        texts: what stands before, between and after the pictures: one more than there are pictures.
    """

    role: Role
    texts: tuple[str, ...]


@dataclass(frozen=True)
class _Piece:
    """A stretch of the sequence: text to tokenise, or ids that are already known."""

    text: str = ""
    ids: tuple[int, ...] = ()
    supervised: bool = False


def encode(record: Record, processor: Any, max_length: int) -> Sample:
    """Encodes a record for training; nothing is ever cut off.

    Assistant texts and the `<|im_end|>` after each are the labels.

    Raises:
        UserError: longer than `max_length`, or a picture that cannot be used; names the record.
    """
    images = [open_image(path, record.id) for path in record.images]
    sample = _encode(record.turns, images, processor, record.id, prompt=False)
    length = len(sample.input_ids_L)
    if length > max_length:
        raise UserError(
            f"record {record.id} has {length} tokens, more than data.max_length={max_length}: "
            "raise it, lower data.max_pixels, or drop the record"
        )
    return sample


def encode_prompt(turns: Sequence[Turn], images: Sequence[Image.Image], processor: Any) -> Sample:
    """Encodes a conversation up to where the assistant must answer; no labels (all -100).

    Raises:
        UserError: `<image>` marks and pictures do not match.
    """
    if fault := check_marks(tuple(turns), len(images)):
        raise UserError(f"the prompt has {fault}: write one {IMAGE_MARK} for each image")
    return _encode(turns, images, processor, PROMPT, prompt=True)


def encode_pixels(image: Image.Image, processor: Any) -> Pixels:
    """A picture for `encode_messages`.

    Raises:
        UserError: a shape that the image processor refuses.
    """
    pixel_values_PD, image_grid_thw_13 = _pixels([image], processor, PROMPT)
    assert pixel_values_PD is not None and image_grid_thw_13 is not None  # there is a picture
    return Pixels(pixel_values_PD, image_grid_thw_13)


def encode_messages(messages: Sequence[Message], pixels: Sequence[Pixels], processor: Any) -> Sample:
    """`encode_prompt` for pictures that are encoded already and whose places are given, not marked.

    Raises:
        ValueError: the messages have another number of places than there are pictures.
    """
    if (places := sum(len(message.texts) - 1 for message in messages)) != len(pixels):
        raise ValueError(f"{places} places for {len(pixels)} pictures")
    pixel_values_PD = torch.cat([one.pixel_values_PD for one in pixels]) if pixels else None
    image_grid_thw_N3 = torch.cat([one.image_grid_thw_13 for one in pixels]) if pixels else None
    return _assemble(messages, pixel_values_PD, image_grid_thw_N3, processor, PROMPT, prompt=True)


def encode_ids(ids: Sequence[int]) -> Sample:
    """A prompt of text tokens that is no conversation."""
    input_ids_L = torch.tensor(ids)
    labels_L = torch.full_like(input_ids_L, IGNORED)
    return Sample(input_ids_L, labels_L, torch.zeros_like(input_ids_L), None, None, PROMPT)


def text_ids(text: str, processor: Any) -> list[int]:
    """The tokens of a text in which nothing is structure."""
    return _text_ids([text], processor)[0]


def _encode(
    turns: Sequence[Turn], images: Sequence[Image.Image], processor: Any, record_id: str, prompt: bool
) -> Sample:
    pixel_values_PD, image_grid_thw_N3 = _pixels(images, processor, record_id)
    messages = [_message(turn) for turn in turns]
    return _assemble(messages, pixel_values_PD, image_grid_thw_N3, processor, record_id, prompt)


def _message(turn: Turn) -> Message:
    return Message(turn.role, tuple(_split_at_images(turn.text)) if turn.role == "user" else (turn.text,))


def _assemble(
    messages: Sequence[Message],
    pixel_values_PD: Tensor | None,
    image_grid_thw_N3: Tensor | None,
    processor: Any,
    record_id: str,
    prompt: bool,
) -> Sample:
    merge = processor.image_processor.merge_size**2
    counts = [] if image_grid_thw_N3 is None else (image_grid_thw_N3.prod(-1) // merge).tolist()
    pieces = _pieces(messages, counts, processor, prompt)
    text_ids = iter(_text_ids([piece.text for piece in pieces if piece.text], processor))
    ids: list[int] = []
    labels: list[int] = []
    for piece in pieces:
        piece_ids = next(text_ids) if piece.text else piece.ids
        ids.extend(piece_ids)
        labels.extend(piece_ids if piece.supervised and not prompt else [IGNORED] * len(piece_ids))
    input_ids_L = torch.tensor(ids)
    return Sample(
        input_ids_L,
        torch.tensor(labels),
        (input_ids_L == processor.image_token_id).long() * IMAGE_TOKEN_TYPE,
        pixel_values_PD,
        image_grid_thw_N3,
        record_id,
    )


def _text_ids(texts: list[str], processor: Any) -> list[list[int]]:
    """The ids of each text, in one call: the tokenizer's overhead is per call."""
    return processor.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def image_token_count(size: tuple[int, int], processor: Any) -> int:
    """Tokens of a picture of `size` (width, height), from its size alone.

    Raises:
        ValueError: a shape that the image processor refuses.
    """
    image_processor = processor.image_processor
    patches = image_processor.get_number_of_image_patches(size[1], size[0])
    return patches // image_processor.merge_size**2


@dataclass(frozen=True)
class Counts:
    """Tokens of one encoded conversation: all, those of pictures, and those with a label."""

    tokens: int
    image: int
    supervised: int


def count_tokens(
    conversations: Sequence[tuple[Sequence[Turn], Sequence[int]]], processor: Any
) -> list[Counts]:
    """What `encode` would give for each conversation, without its pixels.

    Args:
        conversations: turns, and the tokens of each picture in the order of the `<image>` marks.
    """
    pieces = [
        _pieces([_message(turn) for turn in turns], images, processor, prompt=False)
        for turns, images in conversations
    ]
    texts = list({piece.text for one in pieces for piece in one if piece.text})
    backend = processor.tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # what split_special_tokens of `_text_ids` sets
    # Without the library's wrapper and without offsets: half of the time goes there.
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    lengths = {text: len(encoding) for text, encoding in zip(texts, encodings, strict=True)}
    result = []
    for one, (_, images) in zip(pieces, conversations, strict=True):
        sizes = [lengths[piece.text] if piece.text else len(piece.ids) for piece in one]
        supervised = sum(size for size, piece in zip(sizes, one, strict=True) if piece.supervised)
        result.append(Counts(sum(sizes), sum(images), supervised))
    return result


def _pixels(
    images: Sequence[Image.Image], processor: Any, record_id: str
) -> tuple[Tensor | None, Tensor | None]:
    if not images:
        return None, None
    image_processor = processor.image_processor
    # Resizing a picture to its own size costs a third of the call: leave it out where nothing would change.
    resize = image_processor.do_resize and not all(_fits(image, image_processor) for image in images)
    try:
        pixels = image_processor(images=list(images), do_resize=resize, return_tensors="pt")
    except ValueError as error:  # extreme aspect ratios
        if record_id == PROMPT:
            raise UserError(f"a picture cannot be used ({error}): give another") from error
        raise UserError(
            f"record {record_id}: an image cannot be used ({error}): replace it or drop the record"
        ) from error
    return pixels["pixel_values"], pixels["image_grid_thw"]


def _fits(image: Image.Image, image_processor: Any) -> bool:
    """Whether the image processor would keep the picture's size."""
    tile = image_processor.patch_size * image_processor.merge_size
    smallest, largest = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
    whole_tiles = image.width % tile == 0 and image.height % tile == 0
    return whole_tiles and smallest <= image.width * image.height <= largest


def _pieces(
    messages: Sequence[Message], image_tokens: Sequence[int], processor: Any, prompt: bool
) -> list[_Piece]:
    """The conversation as pieces, in order; `image_tokens` counts the tokens of each picture."""
    start, end = processor.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    counts = iter(image_tokens)
    pieces: list[_Piece] = []
    for message in messages:
        pieces.append(_Piece(ids=(start,)))
        first, *rest = message.texts
        if message.role == "assistant":
            # Apart from its header, so that the answer's ids are those generation produces after "assistant\n".
            pieces.append(_Piece("assistant\n"))
            pieces.append(_Piece(first, supervised=True))
            pieces.append(_Piece(ids=(end,), supervised=True))
        else:
            pieces.append(_Piece(f"{message.role}\n{first}"))
            for text in rest:
                pads = (processor.image_token_id,) * next(counts)
                pieces.append(
                    _Piece(ids=(processor.vision_start_token_id, *pads, processor.vision_end_token_id))
                )
                pieces.append(_Piece(text))
            pieces.append(_Piece(ids=(end,)))
        pieces.append(_Piece("\n"))
    if prompt:
        pieces += [_Piece(ids=(start,)), _Piece("assistant\n")]
    return pieces


def _split_at_images(text: str) -> list[str]:
    """The texts around the `<image>` marks, without the one newline that joins a mark to its text."""
    parts = text.split(IMAGE_MARK)
    last = len(parts) - 1
    return [
        part.removeprefix("\n" if index > 0 else "").removesuffix("\n" if index < last else "")
        for index, part in enumerate(parts)
    ]
