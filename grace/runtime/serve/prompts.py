"""From a request to token ids and patches. Nothing in a client's text is structure."""

import asyncio
import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from grace.data.template import (
    Message,
    Pixels,
    Sample,
    encode_ids,
    encode_messages,
    encode_pixels,
    image_token_count,
    text_ids,
)
from grace.errors import UserError
from grace.runtime.serve.errors import ApiError, bad_request
from grace.runtime.serve.images import MAX_IMAGES, Images
from grace.runtime.serve.schema import Message as ClientMessage


class Prompts:
    """Encodes prompts, on one thread of its own: tokenizers do not like two.

    Args:
        processor: copied, since the scheduler's thread uses the original's tokenizer.
        context: tokens that a prompt and its answer may take together.
        max_pixels: larger pictures are scaled down to this area; None is the model's own limit, and at most half
            of the context for one picture.
    """

    def __init__(self, processor: Any, images: Images, context: int, max_pixels: int | None = None):
        self.processor, self.images, self.context = copy.deepcopy(processor), images, context
        _limit_pixels(self.processor.image_processor, context, max_pixels)
        self._thread = ThreadPoolExecutor(1, "grace-prompts")
        vocabulary = self.processor.tokenizer.get_vocab()
        self._longest = max(len(token) for token in vocabulary)  # bytes: the names are byte-level
        self._known = len(vocabulary)
        self._visual = {
            self.processor.tokenizer.convert_tokens_to_ids(name)
            for name in (
                "<|vision_start|>",
                "<|vision_end|>",
                "<|vision_pad|>",
                "<|image_pad|>",
                "<|video_pad|>",
            )
        }

    async def chat(self, messages: Sequence[ClientMessage]) -> Sample:
        """A conversation up to where the assistant answers.

        Raises:
            ApiError: a picture that cannot be used, or more tokens than the context holds.
        """
        converted, urls = [], []
        for at, message in enumerate(messages):
            texts, found = _split(message, f"messages.{at}.content")
            role = "system" if message.role == "developer" else message.role
            converted.append(Message(role, tuple(texts)))
            urls += found
        if len(urls) > MAX_IMAGES:
            raise bad_request(f"a request may have {MAX_IMAGES} pictures", "messages", "too_many_images")
        self._check_length([text for message in converted for text in message.texts], "messages")
        pixels, room = [], self.context
        for url, param in urls:
            async with self.images.load(url, param) as image:
                pixels.append(await self._run(self._pixels, image, room, param))
            room -= _tokens(pixels[-1], self.processor)
        sample = await self._run(encode_messages, converted, pixels, self.processor)
        return self._fitting(sample, "messages")

    async def plain(self, prompt: str | list[int]) -> Sample:
        """A text to be continued, or its tokens.

        Raises:
            ApiError: tokens that are none, or too many.
        """
        if isinstance(prompt, str):
            self._check_length([prompt], "prompt")
            ids = await self._run(text_ids, prompt, self.processor)
        else:
            ids = prompt
            if not all(0 <= token < self._known for token in ids):
                raise bad_request(f"token ids range from 0 to {self._known - 1}", "prompt")
            if not self._visual.isdisjoint(ids):
                raise bad_request("the tokens of pictures need pictures: use /v1/chat/completions", "prompt")
        return self._fitting(encode_ids(ids), "prompt")

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    def _pixels(self, image: Image.Image, room: int, param: str) -> Pixels:
        try:
            tokens = image_token_count(image.size, self.processor)
            if tokens >= room:  # known before any pixel is touched
                raise self._too_long(f"a picture takes {tokens} tokens", param)
            return encode_pixels(image, self.processor)
        except (UserError, ValueError) as error:
            raise bad_request(
                f"a picture of {image.width} x {image.height} pixels cannot be used", param, "invalid_image"
            ) from error

    def _check_length(self, texts: list[str], param: str) -> None:
        """Refuses what cannot fit however well it is tokenised, before it is."""
        # Normalising may make a text shorter, to a third at most (Hangul).
        if sum(len(text.encode()) for text in texts) > 3 * self._longest * self.context:
            raise self._too_long("the prompt is far longer", param)

    def _fitting(self, sample: Sample, param: str) -> Sample:
        if (tokens := len(sample.input_ids_L)) >= self.context:
            raise self._too_long(f"the prompt has {tokens} tokens", param)
        return sample

    def _too_long(self, what: str, param: str) -> ApiError:
        return bad_request(
            f"{what}, this server's context holds {self.context}: shorten it, or use fewer or smaller pictures",
            param,
            "context_length_exceeded",
        )


def _limit_pixels(image_processor: Any, context: int, max_pixels: int | None) -> None:
    tile = (image_processor.patch_size * image_processor.merge_size) ** 2  # pixels of one token
    size = image_processor.size
    largest = min(size["longest_edge"], context // 2 * tile) if max_pixels is None else max_pixels
    largest = max(largest, tile)
    image_processor.size = {"shortest_edge": min(size["shortest_edge"], largest), "longest_edge": largest}


def _split(message: ClientMessage, param: str) -> tuple[list[str], list[tuple[str, str]]]:
    """The texts around a message's pictures, and each picture's URL with its place in the request."""
    if isinstance(message.content, str):
        return [message.content], []
    texts, urls = [""], []
    for at, part in enumerate(message.content):
        if part.type == "text":
            texts[-1] += part.text
        else:
            urls.append((part.image_url.url, f"{param}.{at}.image_url.url"))
            texts.append("")
    return texts, urls


def _tokens(pixels: Pixels, processor: Any) -> int:
    return int(pixels.image_grid_thw_13.prod()) // processor.image_processor.merge_size**2
