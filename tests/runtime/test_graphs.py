"""The captured decode step: the plain decoder's numbers, whatever the batch; on a CPU under Triton's interpreter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from awq_layers import layer as random_layer  # pyright: ignore[reportMissingImports] - tests/ is on the path
from torch import Tensor, nn

from grace.data.records import Turn
from grace.data.template import encode_prompt
from grace.errors import UserError
from grace.models.processor import load_processor
from grace.runtime.decoder import Decoder
from grace.runtime.device_sampling import Draw
from grace.runtime.graphs import GraphDecoder, tune
from grace.runtime.hf_quantizer import put_int4_linears
from grace.runtime.int4_linear import int4_linears, set_kernel
from grace.runtime.loading import load_model

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMPTS = ["What is the digit at top left?", "Which colour is the middle cell?", "Where is red?"]


class Directly:
    """Stands in for a CUDA graph: what was captured is called again. Counts both."""

    def __init__(self) -> None:
        self.captured, self.replayed = 0, 0

    def __call__(self, run: Any) -> Any:
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            run()

        return replay


def dense_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(directory, dtype).to(DEVICE)


def packed_model(directory: Path) -> Any:
    """Every decoder linear with random codes."""
    model = load_model(directory, torch.float16)
    shapes = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    put_int4_linears(model, list(shapes), 64)
    for seed, (name, packed) in enumerate(int4_linears(model).items()):
        stored = random_layer(*shapes[name], 64, seed)
        packed.qweight, packed.qzeros, packed.scales = (*stored[:2], stored[2] * 0.3)
    return model.to(DEVICE)


def graph_decoder(model: Any, rows: int, context: int = 64) -> tuple[GraphDecoder, Directly]:
    capture = Directly()
    return GraphDecoder(model, rows, context, capture if DEVICE.type == "cpu" else None), capture


def samples(directory: Path) -> list[Any]:
    processor = load_processor(directory)
    return [encode_prompt([Turn("user", prompt)], [], processor) for prompt in PROMPTS]


def assert_same(ours_RV: Tensor, theirs_RV: Tensor, tolerance: float) -> None:
    assert ours_RV.dtype == torch.float32 and ours_RV.shape == theirs_RV.shape
    assert (ours_RV - theirs_RV).abs().max() <= tolerance * theirs_RV.abs().max()


def test_the_plain_decoders_numbers_at_every_batch(tiny_student_dir: Path):
    """Rows come and go, out of order; a batch of three runs padded to four."""
    plain = Decoder(dense_model(tiny_student_dir), 4, 64)
    ours, capture = graph_decoder(dense_model(tiny_student_dir), 4)
    prompts = samples(tiny_student_dir)
    for row, sample in zip((0, 2, 3), prompts, strict=True):
        assert_same(ours.prefill(row, sample), plain.prefill(row, sample), 1e-5)
    ours.keys_LRKCS[:, 1] = ours.values_LRKCS[:, 1] = torch.nan  # a row that nobody reads
    for rows in ([0, 2, 3], [3, 0, 2], [2], [3, 2], [2]):
        tokens = [7 + row for row in rows]
        assert_same(ours.decode(rows, tokens), plain.decode(rows, tokens), 1e-4)
    if DEVICE.type == "cpu":
        assert (capture.captured, capture.replayed) == (3, 5)


def test_packed_layers_joined(tiny_student_dir: Path):
    model = packed_model(tiny_student_dir)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = Decoder(packed_model(tiny_student_dir), 2, 64)
    ours, _ = graph_decoder(model, 2)
    assert ours.layers[0].gate_up.modules[0].kernel == "auto"
    for decoder in (plain, ours):
        decoder.layers = decoder.layers[:1]  # the interpreter is slow
    for layer in ours.layers:
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
            set_kernel(linear.modules[0], "triton")
    for row, sample in enumerate(samples(tiny_student_dir)[:2]):
        plain.prefill(row, sample)
        ours.prefill(row, sample)
    for rows in ([1], [0, 1]):
        assert_same(ours.decode(rows, rows), plain.decode(rows, rows), 1e-2)
    after = model.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].is_contiguous() for name, tensor in before.items()
    )


def test_tokens_chosen_on_the_device(tiny_student_dir: Path):
    plain, (ours, _) = (
        Decoder(dense_model(tiny_student_dir), 2, 64),
        graph_decoder(dense_model(tiny_student_dir), 2),
    )
    for row, sample in enumerate(samples(tiny_student_dir)[:2]):
        plain.prefill(row, sample)
        ours.prefill(row, sample)
    likeliest = plain.decode([0, 1], [5, 6]).argmax(-1).tolist()
    assert ours.decode_tokens([0, 1], [5, 6], [Draw(), Draw()]) == likeliest
    logits_2V = plain.decode([0, 1], likeliest)
    draws = [Draw(temperature=0.7, top_k=1, uniform=0.99), Draw(temperature=5.0, uniform=0.999999)]
    first, second = ours.decode_tokens([0, 1], likeliest, draws)
    order_V = logits_2V[1].argsort()
    assert first == logits_2V[0].argmax() and second in order_V[: len(order_V) // 10]
    assert ours.length(0) == plain.length(0)
    with pytest.raises(ValueError, match="2 rows with 1 draws"):
        ours.decode_tokens([0, 1], [1, 1], [Draw()])


def test_captured_ahead_and_again_for_another_size(tiny_student_dir: Path):
    ours, capture = graph_decoder(dense_model(tiny_student_dir), 3)
    assert ours.buckets() == [1, 2, 4]
    ours.warm_up()
    ours.warm_up()
    sample = samples(tiny_student_dir)[0]
    ours.prefill(1, sample)
    ours.decode([1], [3])
    ours.resize(rows=70, context=len(sample.input_ids_L))
    assert ours.buckets()[-2:] == [64, 128]
    ours.prefill(69, sample)
    with pytest.raises(UserError, match="full"):
        ours.decode([69], [3])
    if DEVICE.type == "cpu":
        assert (capture.captured, capture.replayed) == (3, 1)


def test_a_cpu_without_the_interpreter_is_refused(tiny_student_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = load_model(tiny_student_dir, torch.float32)
    with pytest.raises(ValueError, match="run on a CUDA device"):
        GraphDecoder(model, 1, 64)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
def test_tuning_changes_nothing_but_time(
    tiny_student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GRACE_CACHE", str(tmp_path))
    plain, (ours, _) = (
        Decoder(packed_model(tiny_student_dir), 1, 64),
        graph_decoder(packed_model(tiny_student_dir), 1),
    )
    lines: list[str] = []
    tune(ours, lines.append)
    assert lines and len(list(tmp_path.iterdir())) == 1
    tune(ours, pytest.fail)
    sample = samples(tiny_student_dir)[0]
    assert_same(ours.prefill(0, sample), plain.prefill(0, sample), 1e-2)
    assert_same(ours.decode([0], [3]), plain.decode([0], [3]), 1e-2)
