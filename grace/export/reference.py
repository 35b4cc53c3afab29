"""The source's answers on the parity samples: what every exported format is compared with.

Computed once, however many formats are exported. A trained checkpoint is loaded as the ordinary model that
it also is; of any other source a model is made from its integers, scales and dense tensors. Shape suffixes: T positions, V vocabulary.
"""

import copy
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from grace.checked_files import MEND, reason_of
from grace.data.batch import collate
from grace.data.records import Record, open_image
from grace.data.template import Sample, encode, encode_prompt
from grace.distill.teacher import supervised
from grace.errors import UserError
from grace.export.contents import Source
from grace.export.directory import dense_names
from grace.models import qwen3vl
from grace.models.processor import load_processor
from grace.quant.grid import dequantize
from grace.runtime.generate import generation_config, load_model, model_inputs

MAX_POSITIONS = 512  # keeps the logits of a 152k vocabulary within 0.3 GB per model
GREEDY_RECORDS, GREEDY_TOKENS = 4, 16


class Answers:
    """Logits [T, V] at supervised positions, and greedy answers with the logits they were taken from."""

    def __init__(self, logits_TV: Tensor, greedy: list[tuple[list[int], Tensor]]):
        self.logits_TV, self.greedy = logits_TV, greedy


class Reference:
    """The source on samples that any other model can be asked too.

    Raises:
        UserError: the samples cannot be encoded.
    """

    def __init__(self, source: Source, records: Sequence[Record]):
        self.source = source
        data = source.recipe.get("data") or {}
        self.processor = load_processor(source.directory, data.get("min_pixels"), data.get("max_pixels"))
        stored = source.config.get("image_token_id", self.processor.image_token_id)
        if stored != self.processor.image_token_id:
            raise UserError(
                f"{source.directory} is damaged (image_token_id is {stored}, its tokenizer has "
                f"{self.processor.image_token_id}): {MEND}"
            )
        max_length = data.get("max_length") or 4096
        self.samples = [encode(record, self.processor, max_length) for record in records]
        self.prompts = [prompt_of(record, self.processor) for record in records[:GREEDY_RECORDS]]

    def ask(self, model: Any) -> Answers:
        """A model's answers to these samples."""
        return Answers(self.logits(model), self.greedy(model))

    def logits(self, model: Any) -> Tensor:
        return logits_of(model, self.samples, self.processor.tokenizer.pad_token_id)

    def greedy(self, model: Any) -> list[tuple[list[int], Tensor]]:
        return [greedy(model, self.processor, prompt) for prompt in self.prompts]

    @cached_property
    def fp32(self) -> Answers:
        """In float32, with what an export stores as bfloat16 rounded to it."""
        return self.ask(self.model(torch.float32))

    @cached_property
    def bf16(self) -> Answers:
        """In bfloat16, as deployed."""
        return self.ask(self.model(torch.bfloat16))

    def model(self, dtype: torch.dtype) -> Any:
        """The source as a model."""
        directory = self.source.directory
        try:
            model = load_model(directory, dtype) if self.source.trained else model_of(self.source, dtype)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise UserError(f"{directory} makes no model ({reason_of(error)}): {MEND}") from error
        if dtype == torch.float32 and self.source.ours:
            round_unquantized(model, self.source.qat.modules)
        return model

    def rescaled(self, source: Source) -> "Reference":
        """The same samples asked of the same model with other scales."""
        other = copy.copy(self)
        other.source = source
        for name in ("fp32", "bf16"):
            vars(other).pop(name, None)
        return other


def model_of(source: Source, dtype: torch.dtype) -> Any:
    """The model that codes, scales and dense tensors make."""
    tensors = {name: source.weights.read(name).to(dtype) for name in dense_names(source)}
    for name, weight in source.qat.modules.items():
        wide_OI = dequantize(weight.codes_OI, weight.scales_OG, source.qat.group_size, weight.zeros_OG)
        tensors[f"{name}.weight"] = wide_OI.to(dtype)
    return qwen3vl.from_tensors(qwen3vl.config_of(source.config, source.directory), tensors, dtype)


def prompt_of(record: Record, processor: Any) -> Sample:
    """A record up to its first answer."""
    first = next(index for index, turn in enumerate(record.turns) if turn.role == "assistant")
    turns = record.turns[:first]
    images = [open_image(path, record.id) for path in record.images]
    shown = sum(turn.text.count("<image>") for turn in turns if turn.role == "user")
    return encode_prompt(turns, images[:shown], processor)


def round_unquantized(model: torch.nn.Module, quantized: Iterable[str]) -> None:
    """Rounds every parameter that is stored as bfloat16 in the packed model, in place."""
    kept = {f"{name}.weight" for name in quantized}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in kept:
                parameter.copy_(parameter.bfloat16())


@torch.inference_mode()
def logits_of(model: Any, samples: Sequence[Sample], pad_token_id: int) -> Tensor:
    """fp32 logits [T, V] at supervised positions, sample after sample, at most `MAX_POSITIONS`."""
    parts: list[Tensor] = []
    room = MAX_POSITIONS
    for sample in samples:
        batch = collate([sample], pad_token_id)
        hidden_TD, _ = supervised(qwen3vl.hidden_states(model, batch).final_BLD, batch.labels_BL)
        parts.append(model.lm_head(hidden_TD[:room]).float())
        room -= len(parts[-1])
        if room <= 0:
            break
    return torch.cat(parts)


def greedy(model: Any, processor: Any, prompt: Sample) -> tuple[list[int], Tensor]:
    """Greedy tokens after a prompt, and the logits [T, V] they were taken from."""
    config = generation_config(model, processor, GREEDY_TOKENS)
    config.output_logits = config.return_dict_in_generate = True
    with torch.inference_mode():
        output = model.generate(**model_inputs(prompt, model.device), generation_config=config)
    tokens = output.sequences[0, len(prompt.input_ids_L) :].tolist()
    return tokens, torch.cat(output.logits).float()
