"""The decoder against the library's own `generate`: texts, pictures, batches, rows that come and go."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from grace.data.records import Turn
from grace.data.template import Sample, encode_ids, encode_prompt
from grace.errors import UserError
from grace.models.processor import load_processor
from grace.runtime import row_attention
from grace.runtime.decoder import Decoder
from grace.runtime.head import Head
from grace.runtime.library_generate import generate_tokens, generation_config, model_inputs
from grace.runtime.loading import load_model

TOKENS = 24


@pytest.fixture(scope="module")
def processor(awq_dir: Path):
    return load_processor(awq_dir)


@pytest.fixture(scope="module")
def prompts(processor) -> list[Sample]:
    """Text alone, one picture, several of different shapes, two turns; of different lengths."""
    generator = torch.Generator().manual_seed(0)

    def picture(width: int, height: int) -> Image.Image:
        noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
        return Image.fromarray(noise.numpy())

    one, wide, high = picture(96, 96), picture(96, 64), picture(32, 96)
    turns = [Turn("user", "<image>\nWhich digit?"), Turn("assistant", "3"), Turn("user", "And <image> here?")]
    return [
        encode_prompt([Turn("user", "Say yes")], [], processor),
        encode_prompt([Turn("user", "<image>\nWhich colour is the top left cell?")], [one], processor),
        encode_prompt([Turn("user", "First <image> then <image> and <image>")], [wide, one, high], processor),
        encode_prompt([Turn("system", "Be brief."), *turns], [high, wide], processor),
    ]


@pytest.fixture(scope="module")
def fake_quant(qat_run: Path):
    """The trained model, in fp32."""
    return load_model(qat_run / "model", torch.float32)


def decoded(decoder: Decoder, row: int, sample: Sample, count: int) -> list[int]:
    tokens = [int(decoder.prefill(row, sample).argmax())]
    while len(tokens) < count:
        tokens.append(int(decoder.decode([row], [tokens[-1]])[0].argmax()))
    return tokens


def expected_tokens(model, processor, sample: Sample) -> list[int]:
    config = generation_config(model, processor, TOKENS)
    config.eos_token_id = None
    return generate_tokens(model, sample, config)


def test_the_greedy_tokens_of_the_fake_quant_model(fake_quant, processor, prompts):
    """In fp32 nothing but the order of sums differs."""
    decoder = Decoder(fake_quant, 2, 512)
    for sample in prompts:
        with torch.inference_mode():
            logits_V = fake_quant(**model_inputs(sample, "cpu")).logits[0, -1]
        assert (decoder.prefill(1, sample) - logits_V).abs().max() <= 1e-5 * logits_V.abs().max()
        assert decoded(decoder, 0, sample, TOKENS) == expected_tokens(fake_quant, processor, sample)


def test_the_packed_model_up_to_ties(awq_dir: Path, fake_quant, processor, prompts):
    """In bfloat16 on the fused kernels: where a greedy token differs from the trained model's, the two were close."""
    packed, decoder = load_model(awq_dir), None
    decoder = Decoder(packed, 1, 512)
    for sample in prompts:
        tokens = expected_tokens(fake_quant, processor, sample)
        ids = torch.cat([sample.input_ids_L, torch.tensor(tokens)])
        with torch.inference_mode():
            inputs = model_inputs(sample, "cpu") | {
                "input_ids": ids[None],
                "attention_mask": torch.ones_like(ids)[None],
            }
            types = torch.cat([sample.mm_token_type_ids_L, torch.zeros(TOKENS, dtype=torch.int64)])
            exact_TV = fake_quant(**inputs | {"mm_token_type_ids": types[None]}).logits[0, -TOKENS - 1 : -1]
        logits_V = decoder.prefill(0, sample)
        for token, exact_V in zip(tokens, exact_TV, strict=True):
            noise = 0.06 * exact_V.abs().max()
            assert (logits_V - exact_V).abs().max() <= noise
            assert exact_V.max() - exact_V[logits_V.argmax()] <= noise
            logits_V = decoder.decode([0], [token])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_decode_together_as_they_do_alone(awq_dir: Path, prompts, dtype):
    decoder = Decoder(load_model(awq_dir, dtype), 4, 512)
    alone = [decoded(decoder, 0, sample, TOKENS) for sample in prompts]
    together = [[int(decoder.prefill(row, sample).argmax())] for row, sample in enumerate(prompts)]
    order = [2, 0, 3, 1]
    for _ in range(TOKENS - 1):
        logits_RV = decoder.decode(order, [together[row][-1] for row in order])
        for row, logits_V in zip(order, logits_RV, strict=True):
            together[row].append(int(logits_V.argmax()))
    assert together == alone


def test_rows_come_and_go_and_leave_nothing_behind(fake_quant, prompts):
    decoder = Decoder(fake_quant, 2, 512)
    fresh = [decoded(Decoder(fake_quant, 1, 512), 0, sample, TOKENS) for sample in prompts]
    long, short = prompts[2], prompts[0]
    decoder.keys_LRKCS.fill_(float("nan"))  # what was never written is never read
    decoder.values_LRKCS.fill_(float("nan"))
    first = decoder.prefill(1, prompts[1])
    assert decoded(decoder, 0, long, TOKENS) == fresh[2]
    decoder.release(0)
    assert decoder.length(0) == 0
    assert decoded(decoder, 0, short, TOKENS) == fresh[0]
    tokens = [int(first.argmax())]
    while len(tokens) < TOKENS:  # meanwhile the other row stood still
        tokens.append(int(decoder.decode([1], [tokens[-1]])[0].argmax()))
    assert tokens == fresh[1]


def test_the_context_is_a_limit(fake_quant, prompts):
    length = len(prompts[0].input_ids_L)
    decoder = Decoder(fake_quant, 1, length + 1)
    assert decoder.length(0) == 0
    token = int(decoder.prefill(0, prompts[0]).argmax())
    assert decoder.length(0) == length
    decoder.decode([0], [token])
    assert decoder.length(0) == length + 1
    with pytest.raises(UserError, match=f"context of {length + 1} tokens is full"):
        decoder.decode([0], [token])
    with pytest.raises(
        UserError, match=f"has {len(prompts[2].input_ids_L)} tokens, the context holds {length + 1}"
    ):
        decoder.prefill(0, prompts[2])
    assert decoder.length(0) == 0
    with pytest.raises(UserError, match="4097 tokens is more than the model's 4096"):
        Decoder(fake_quant, 1, 4097)


def test_calls_that_make_no_sense(fake_quant, prompts):
    decoder = Decoder(fake_quant, 2, 64)
    decoder.prefill(0, prompts[0])
    for rows, tokens in (([], []), ([0, 0], [1, 1]), ([0], [1, 2]), ([1], [1])):
        with pytest.raises(ValueError, match="rows"):
            decoder.decode(rows, tokens)


def test_the_model_is_as_it_was_after_it_has_run(awq_dir: Path, prompts):
    model = load_model(awq_dir)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decoder = Decoder(model, 1, 512)
    decoder.head = Head(decoder.parts.head_VD, "int4")
    decoded(decoder, 0, prompts[1], 4)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(("kind", "step"), [("int8", 1 / 127), ("int4", 1 / 7)])
def test_a_rounded_head_is_off_by_half_a_step_at_most(kind: str, step: float):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(530, 256, generator=generator).bfloat16()
    unit = torch.eye(256).bfloat16()
    rounded = Head(weight, kind)(unit).float().T
    groups = weight.float().view(530, -1, 256 if kind == "int8" else 128)
    bound = (groups.abs().amax(-1, keepdim=True) * step * 0.51 + groups.abs() * 2**-6).flatten(1)
    assert rounded.shape == weight.shape and ((rounded - weight.float()).abs() <= bound).all()
    assert torch.equal(Head(weight)(unit).T, weight)
    with pytest.raises(UserError, match="unknown head"):
        Head(weight, "int2")
    with pytest.raises(UserError, match="groups of 128"):
        Head(weight[:, :64], "int4")


def test_a_prompt_of_one_token(fake_quant):
    assert Decoder(fake_quant, 1, 8).prefill(0, encode_ids([5])).isfinite().all()


def test_prompts_read_together_are_as_read_alone(fake_quant, prompts):
    together, alone = Decoder(fake_quant, 6, 256), Decoder(fake_quant, 6, 256)
    rows = [4, 0, 5, 2]
    logits_RV = together.prefill_all(rows, prompts)
    for row, sample, logits_V in zip(rows, prompts, logits_RV, strict=True):
        torch.testing.assert_close(logits_V, alone.prefill(row, sample), rtol=1e-4, atol=1e-4)
    tokens = logits_RV.argmax(-1).tolist()
    for _ in range(6):
        logits_RV = together.decode(rows, tokens)
        for row, token, logits_V in zip(rows, tokens, logits_RV, strict=True):
            torch.testing.assert_close(logits_V, alone.decode([row], [token])[0], rtol=1e-4, atol=1e-4)
        tokens = logits_RV.argmax(-1).tolist()


@pytest.mark.parametrize("waste", [0.0, 1e9], ids=["one by one", "together"])
def test_both_ways_of_attending_agree(fake_quant, prompts, monkeypatch, waste):
    """Rows of very different lengths, out of order, with used and unused rows between them."""
    expected = [decoded(Decoder(fake_quant, 1, 256), 0, sample, 6) for sample in prompts]
    monkeypatch.setattr(row_attention, "_WASTE", waste)
    decoder = Decoder(fake_quant, 8, 256)
    decoder.prefill(3, prompts[2])
    decoder.release(3)
    rows = [6, 1, 4, 0]
    tokens = [int(decoder.prefill(row, sample).argmax()) for row, sample in zip(rows, prompts, strict=True)]
    found = [[token] for token in tokens]
    for _ in range(5):
        tokens = decoder.decode(rows, tokens).argmax(-1).tolist()
        for answer, token in zip(found, tokens, strict=True):
            answer.append(token)
    assert found == expected
