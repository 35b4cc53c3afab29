"""Samplers draw from the distribution that was asked for; text streams give the text of all tokens, and stop in time."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grace.errors import UserError
from grace.models.tiny import build_tokenizer
from grace.runtime.sampling import PRESETS, Sampler, Sampling
from grace.runtime.text_stream import TextStream

TOKENIZER = build_tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 0}, {"temperature": -0.1}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.01},
        {"top_k": -1}, {"repetition_penalty": 0.0}, {"repetition_penalty": 1e-40}, {"repetition_penalty": 1e7}, {"repetition_penalty": math.inf}, {"seed": -1}, {"stop": ("",)},
    ],
)  # fmt: skip
def test_settings_out_of_range(change):
    with pytest.raises(UserError, match=next(iter(change)).replace("_", "-")):
        Sampling(**change)


def test_the_presets_are_those_of_the_card():
    assert PRESETS["deterministic"] == Sampling(max_new_tokens=256)
    assert PRESETS["open-ended"] == Sampling(max_new_tokens=512, temperature=0.7, top_p=0.9)


def shares(
    sampling: Sampling, logits: torch.Tensor, draws: int = 4000, prompt: tuple[int, ...] = ()
) -> torch.Tensor:
    counts = torch.zeros(len(logits))
    sampler = Sampler(sampling, prompt)
    for _ in range(draws):
        counts[sampler.next(logits)] += 1
    return counts / draws


LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0, 1.5])


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0, seed=0), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=0.5, seed=0), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=1.0, top_k=3, seed=0), [0, 5, 1]),
        (Sampling(temperature=1.0, top_p=0.6, seed=0), [0, 5]),  # .44 + .27
        (Sampling(temperature=1.0, top_k=4, top_p=0.75, seed=0), [0, 5, 1]),
        (Sampling(temperature=1.0, top_p=1e-6, seed=0), [0]),
    ],
)
def test_the_distribution(sampling: Sampling, kept: list[int]):
    expected = torch.zeros(6)
    expected[kept] = (LOGITS[kept] / sampling.temperature).softmax(-1)
    assert (shares(sampling, LOGITS) - expected).abs().max() < 0.03


@pytest.mark.parametrize("cold", [5e-324, 1e-46, 1e-40, 1e-30, 1e-6])
@pytest.mark.parametrize("penalty", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_coldest_temperature_takes_the_likeliest_token(cold: float, penalty: float, dtype: torch.dtype):
    sampling = Sampling(temperature=cold, top_p=0.9, top_k=5, repetition_penalty=penalty, seed=0)
    greedy = Sampler(Sampling(repetition_penalty=penalty), [1, 3]).next(300 * LOGITS.to(dtype))
    assert Sampler(sampling, [1, 3]).next(300 * LOGITS.to(dtype)) == greedy


def test_a_nucleus_beyond_the_likeliest_thousand():
    logits = torch.zeros(5000)
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.9, seed=0))
    assert max(sampler.next(logits) for _ in range(300)) > 1024


def test_repetition_is_penalised_prompt_included():
    logits = torch.tensor([2.0, 1.9, -1.0, -1.1])
    sampler = Sampler(Sampling(repetition_penalty=1.5), prompt=[0])
    assert sampler.next(logits) == 1  # 2.0 / 1.5 < 1.9
    assert sampler.next(logits) == 0  # now both are penalised
    only_negative = torch.tensor([-1.0, -1.1])
    assert Sampler(Sampling(repetition_penalty=1.5), prompt=[0]).next(only_negative) == 1
    assert torch.equal(logits, torch.tensor([2.0, 1.9, -1.0, -1.1]))  # the caller's tensor is left alone


def test_samplers_do_not_influence_each_other():
    sampling = Sampling(temperature=1.0, seed=3)
    alone = [Sampler(sampling).next(LOGITS)]
    one, other = Sampler(sampling), Sampler(Sampling(temperature=1.0, seed=4))
    mixed = []
    for _ in range(8):
        mixed.append(one.next(LOGITS))
        other.next(LOGITS)
    again = Sampler(sampling)
    assert mixed == [again.next(LOGITS) for _ in range(8)] and mixed[0] == alone[0]
    unseeded = [
        [Sampler(Sampling(temperature=1.0)).next(torch.zeros(500)) for _ in range(4)] for _ in range(4)
    ]
    assert len({tuple(draw) for draw in unseeded}) > 1


# ---------------------------------------------------------------- text


def streamed(tokens: list[int], **options) -> tuple[str, TextStream]:
    stream = TextStream(TOKENIZER, **options)
    text = ""
    for token in tokens:
        text += stream.push(token)
        if stream.finish_reason:
            return text, stream
    return text + stream.flush(), stream


@given(st.lists(st.integers(0, 511).filter(lambda token: token != END), max_size=40))
def test_the_pieces_are_the_text_of_all_tokens(tokens: list[int]):
    assert streamed(tokens)[0] == TOKENIZER.decode(tokens, skip_special_tokens=True)


@given(st.text(max_size=30))
def test_any_text_comes_through_whole(text: str):
    tokens = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert streamed(tokens)[0] == text


def test_no_half_characters():
    tokens = TOKENIZER("日本é🙂", add_special_tokens=False)["input_ids"]
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(token) for token in tokens]
    assert "�" not in "".join(pieces) and "".join(pieces) == "日本é🙂" and "" in pieces


@given(
    st.text("ab ", max_size=25),
    st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_texts_end_the_answer_at_the_first_of_them(text: str, stop: list[str]):
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    found, stream = streamed(tokens, stop=stop)
    # The first stop text that is complete, by where it ends; of those that end in one token, by where it begins.
    ends = list(itertools.accumulate(len(TOKENIZER.decode([token])) for token in tokens))
    expected = text
    for end in ends:
        hits = [at for one in stop if (at := text[:end].find(one)) >= 0]
        if hits:
            expected = text[: min(hits)]
            break
    assert found == expected
    assert stream.finish_reason == ("stop" if expected != text or any(one in text for one in stop) else None)


def test_ends():
    yes = TOKENIZER("yes no", add_special_tokens=False)["input_ids"]
    text, stream = streamed([*yes, END, *yes], ends={END})
    assert (text, stream.finish_reason, stream.tokens) == ("yes no", "stop", [*yes, END])
    with pytest.raises(ValueError, match="ended"):
        stream.push(1)
    text, stream = streamed(yes * 9, max_new_tokens=len(yes))
    assert (text, stream.finish_reason) == ("yes no", "length")
    text, stream = streamed(yes, stop=["nope"])  # what might have become a stop text is text after all
    assert (text, stream.finish_reason) == ("yes no", None)
