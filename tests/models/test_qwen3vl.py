"""Where GRACE finds things inside Qwen3-VL, checked against forwards made by other means."""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from grace.data.batch import Batch, collate
from grace.data.packing import collate_packed
from grace.data.records import Record, Turn
from grace.data.template import encode
from grace.errors import UserError
from grace.models import qwen3vl
from grace.models.processor import load_processor
from grace.quant.fake_quant import QuantLinear
from grace.quant.grid import init_theta

SIZES = [(96, 96), (64, 128), (160, 64)]


@pytest.fixture
def student(tiny_student_dir: Path) -> Qwen3VLForConditionalGeneration:
    return qwen3vl.load_model(str(tiny_student_dir))


@pytest.fixture
def make_batch(tiny_student_dir: Path, tmp_path: Path) -> Callable[..., Batch]:
    """A batch of one record per argument, each with so many pictures, of different sizes."""
    processor = load_processor(tiny_student_dir)

    def record(index: int, pictures: int) -> Record:
        paths = []
        for k in range(pictures):
            size = SIZES[(index + k) % len(SIZES)]
            paths.append(tmp_path / f"{index}-{k}.png")
            noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(k))
            Image.fromarray(noise.byte().numpy()).save(paths[-1])
        question = "<image>\n" * pictures + "What colour is it?"
        turns = (Turn("user", question), Turn("assistant", "red " * (index + 1)))
        return Record(f"r{index}", tuple(paths), turns)

    def make(*pictures: int, packed: bool = False) -> Batch:
        samples = [encode(record(index, n), processor, 1024) for index, n in enumerate(pictures)]
        if packed:
            return collate_packed(samples, processor.image_processor.merge_size)
        return collate(samples, processor.tokenizer.pad_token_id)

    return make


@pytest.mark.parametrize("pictures", [(1,), (0, 0), (2, 0, 1, 3)])
@torch.no_grad()
def test_packed_rows_are_the_padded_ones(
    tiny_student_dir: Path, make_batch, pictures: tuple[int, ...]
) -> None:
    """Positions are the library's own, and no sample sees another."""
    model = qwen3vl.load_model(str(tiny_student_dir))
    padded, packed = make_batch(*pictures), make_batch(*pictures, packed=True)
    kept = padded.attention_mask_BL.bool()
    positions, _ = model.model.get_rope_index(
        padded.input_ids_BL, padded.mm_token_type_ids_BL, padded.image_grid_thw_N3, attention_mask=padded.attention_mask_BL
    )  # fmt: skip
    assert torch.equal(packed.position_ids_3BL[:, 0], positions[:, kept])
    one, two = qwen3vl.hidden_states(model, padded), qwen3vl.hidden_states(model, packed)
    for name in ("final_BLD", "last_layer_input_BLD"):
        torch.testing.assert_close(getattr(two, name)[0], getattr(one, name)[kept], rtol=1e-5, atol=1e-5)
    visual = [
        qwen3vl.visual_tokens(model, s.last_layer_input_BLD, b) for s, b in ((one, padded), (two, packed))
    ]
    for padded_image, packed_image in zip(*visual, strict=True):
        torch.testing.assert_close(packed_image, padded_image, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_packed_rows_are_not_mixed_in_silence(tiny_student_dir: Path, make_batch) -> None:
    plain = Qwen3VLForConditionalGeneration.from_pretrained(tiny_student_dir)
    with pytest.raises(ValueError, match="packed rows need the attention packed_sdpa, this model has sdpa"):
        qwen3vl.hidden_states(plain, make_batch(1, 0, packed=True))
    batch = dataclasses.replace(make_batch(1, 0, packed=True), lengths=[3, 4])
    with pytest.raises(ValueError, match="do not fill a row"):
        qwen3vl.hidden_states(qwen3vl.load_model(str(tiny_student_dir)), batch)


def manual_forward(model: Qwen3VLForConditionalGeneration, batch: Batch, **options: bool):
    """The library's own forward pass, hooks and grace left out."""
    return model.model(
        input_ids=batch.input_ids_BL,
        attention_mask=batch.attention_mask_BL,
        mm_token_type_ids=batch.mm_token_type_ids_BL,
        pixel_values=batch.pixel_values_PD,
        image_grid_thw=batch.image_grid_thw_N3,
        **options,
    )


def without_last_layer(model: Qwen3VLForConditionalGeneration) -> Qwen3VLForConditionalGeneration:
    """A copy whose output is what the last layer of `model` is given."""
    shorter = copy.deepcopy(model)
    shorter.model.language_model.layers = shorter.model.language_model.layers[:-1]
    shorter.model.language_model.norm = nn.Identity()
    return shorter


@pytest.mark.parametrize("layers", [4, 2])
@torch.no_grad()
def test_hidden_states_are_those_of_a_model_without_its_last_layer(student, make_batch, layers: int) -> None:
    student.model.language_model.layers = student.model.language_model.layers[:layers]
    batch = make_batch(1, 0, 2)
    states = qwen3vl.hidden_states(student, batch)
    outputs = manual_forward(student, batch, output_hidden_states=True)
    expected_BLD = manual_forward(without_last_layer(student), batch).last_hidden_state
    kept = batch.attention_mask_BL.bool()
    torch.testing.assert_close(states.last_layer_input_BLD[kept], expected_BLD[kept])
    torch.testing.assert_close(states.final_BLD[kept], outputs.last_hidden_state[kept])
    if layers == 2:  # the deepstack addition falls between the two layers, where the library does not look
        assert not torch.allclose(outputs.hidden_states[-2][kept], expected_BLD[kept])


@torch.no_grad()
def test_hook_is_gone_afterwards_also_when_the_forward_fails(student, make_batch) -> None:
    batch = make_batch(1)
    qwen3vl.hidden_states(student, batch)
    broken = copy.copy(batch)
    object.__setattr__(broken, "image_grid_thw_N3", batch.image_grid_thw_N3[:, :2])
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the library raises
        qwen3vl.hidden_states(student, broken)
    assert not any(layer._forward_pre_hooks for layer in student.model.language_model.layers)


@torch.no_grad()
def test_visual_tokens_of_each_image_in_order(student, make_batch) -> None:
    batch = make_batch(1, 0, 2)
    counts = qwen3vl.image_token_counts(student, batch.image_grid_thw_N3)
    assert len(counts) == 3 and len(set(counts)) > 1, "the test wants images of different sizes"
    # Marks every position with its row and column; the images must come out as runs of image tokens.
    rows, columns = batch.input_ids_BL.shape
    place_BL2 = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
    images = qwen3vl.visual_tokens(student, place_BL2, batch)
    assert [len(image) for image in images] == counts
    for image, row in zip(images, (0, 2, 2), strict=True):
        start = int(image[0, 1])
        assert image.tolist() == [[row, start + i] for i in range(len(image))]
        ids_L = batch.input_ids_BL[row]
        assert (ids_L[start : start + len(image)] == student.config.image_token_id).all()
        assert ids_L[start - 1] == student.config.vision_start_token_id
        assert ids_L[start + len(image)] == student.config.vision_end_token_id


@torch.no_grad()
def test_text_only_batch_has_no_visual_tokens(student, make_batch) -> None:
    batch = make_batch(0, 0)
    states = qwen3vl.hidden_states(student, batch)
    assert qwen3vl.visual_tokens(student, states.last_layer_input_BLD, batch) == ()
    assert qwen3vl.image_token_counts(student, None) == []


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_head_turns_final_states_into_the_librarys_logits(student, make_batch, tied: bool) -> None:
    if not tied:
        student.lm_head.weight = nn.Parameter(torch.randn_like(student.lm_head.weight))
    batch = make_batch(1)
    logits_BLV = qwen3vl.hidden_states(student, batch).final_BLD @ qwen3vl.head_weight(student).T
    outputs = student(
        input_ids=batch.input_ids_BL,
        attention_mask=batch.attention_mask_BL,
        mm_token_type_ids=batch.mm_token_type_ids_BL,
        pixel_values=batch.pixel_values_PD,
        image_grid_thw=batch.image_grid_thw_N3,
    )
    torch.testing.assert_close(logits_BLV, outputs.logits)
    embedding = student.model.language_model.embed_tokens.weight
    assert (qwen3vl.head_weight(student) is embedding) == tied


def test_quantized_are_exactly_the_decoder_projections(student, make_batch) -> None:
    before = {name: m.weight.clone() for name, m in student.named_modules() if isinstance(m, nn.Linear)}
    quantized = qwen3vl.quantize_decoder(student, 4, 128)
    expected = {
        f"model.language_model.layers.{layer}.{part}_proj"
        for layer in range(4)
        for part in (*(f"self_attn.{x}" for x in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    }
    assert set(quantized) == expected == set(qwen3vl.quantized_linears(student))
    for name, module in student.named_modules():
        assert isinstance(module, QuantLinear) == (name in expected)
        if isinstance(module, nn.Linear):
            assert torch.equal(module.weight, before[name])
    for name, module in quantized.items():
        assert student.get_submodule(name) is module and module.name == name
        assert torch.equal(module.theta, init_theta(before[name]))
    thetas = [name for name, _ in student.named_parameters() if name.endswith(".theta")]
    assert sorted(thetas) == sorted(f"{name}.theta" for name in expected)
    assert torch.isfinite(qwen3vl.hidden_states(student, make_batch(1)).final_BLD).all()


def test_width_that_the_group_does_not_divide_names_the_layer(student) -> None:
    with pytest.raises(
        UserError, match=r"layers\.0\.self_attn\.q_proj: 128 inputs .* groups of 96.*group_size"
    ):
        qwen3vl.quantize_decoder(student, 4, 96)
    linear = next(iter(qwen3vl.decoder_linears(student).values()))
    linear.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="1 NaN or infinite values: give a student whose weights are whole"):
        qwen3vl.quantize_decoder(student, 4, 128)


def test_frozen_vision_leaves_the_mergers_and_the_decoder(student, make_batch) -> None:
    qwen3vl.freeze_vision(student)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    vision = {name for name in trained if qwen3vl.is_vision(name)}
    assert {name.split(".")[2] for name in vision} == {"merger", "deepstack_merger_list"}
    assert len(trained - vision) == sum(
        not name.startswith("model.visual.") for name, _ in student.named_parameters()
    )
    qwen3vl.hidden_states(student, make_batch(1)).final_BLD.square().sum().backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in trained), name


def gradients(model: Qwen3VLForConditionalGeneration, batch: Batch) -> dict[str, Tensor]:
    states = qwen3vl.hidden_states(model, batch)
    visual = torch.cat(qwen3vl.visual_tokens(model, states.last_layer_input_BLD, batch))
    (states.final_BLD.square().mean() + visual.square().mean()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [True, False])
def test_checkpointed_activations_give_identical_gradients(student, make_batch, frozen: bool) -> None:
    batch = make_batch(1, 0, 2)
    qwen3vl.quantize_decoder(student, 4, 128)
    if frozen:
        qwen3vl.freeze_vision(student)
    checkpointed = copy.deepcopy(student)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qwen3vl.enable_checkpointing(checkpointed)
    layers_run = []
    layer = checkpointed.model.language_model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: layers_run.append(1))
    plain, again = gradients(student, batch), gradients(checkpointed, batch)
    assert len(layers_run) == 2, "the layer was not computed again in the backward pass"
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name


# ---------------------------------------------------------------- finding and loading models


def test_published_shapes_are_known_offline() -> None:
    model = qwen3vl.skeleton(qwen3vl.config_for("Qwen/Qwen3-VL-2B-Instruct"))
    assert all(p.is_meta for p in model.parameters())
    assert 2.0e9 < sum(p.numel() for p in model.parameters()) < 2.2e9
    linears = qwen3vl.decoder_linears(model)
    assert len(linears) == 28 * 7
    assert {(m.in_features, m.out_features) for n, m in linears.items() if n.endswith("down_proj")} == {
        (6144, 2048)
    }


def test_skeleton_has_the_names_and_shapes_of_the_model(student, tiny_student_dir: Path) -> None:
    skeleton = qwen3vl.skeleton(qwen3vl.config_for(str(tiny_student_dir)))
    real, meta = ({n: p.shape for n, p in m.named_parameters()} for m in (student, skeleton))
    assert real == meta


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model at .*nowhere"):
        qwen3vl.config_for(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="cannot load .*nowhere"):
        qwen3vl.load_model(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        qwen3vl.config_for(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="llama model"):
        qwen3vl.config_for(str(tmp_path))
