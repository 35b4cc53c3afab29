"""Where a teacher may lie; that it says the same there; what bitsandbytes makes of it."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grace.errors import UserError
from grace.models import qwen3vl
from grace.models.placement import (
    block_bytes,
    load_teacher,
    quantization,
    spread,
    teacher_devices,
    weight_bytes,
)

CPU = torch.device("cpu")
PUBLISHED = "Qwen/Qwen3-VL-8B-Instruct"


def gpu(index: int) -> torch.device:
    return torch.device("cuda", index)


# ---------------------------------------------------------------- which devices


@pytest.mark.parametrize(
    ("asked", "own", "processes", "gpus", "expected"),
    [
        (None, gpu(3), 4, 4, [gpu(3)]),
        (None, CPU, 2, 0, [CPU]),
        ("cpu", gpu(1), 2, 2, [CPU]),
        ("cpu", CPU, 2, 0, [CPU]),
        ("cuda:1", gpu(0), 1, 2, [gpu(1)]),
        ("cuda:0", CPU, 1, 1, [gpu(0)]),  # the student may stay on the CPU
        ("cuda:+4", gpu(2), 4, 8, [gpu(6)]),
        ("cuda:+1", torch.device("cuda"), 1, 2, [gpu(1)]),  # as a lone process calls its GPU
        ("spread", gpu(0), 1, 4, [gpu(1), gpu(2), gpu(3)]),
        ("spread", gpu(1), 2, 8, [gpu(3), gpu(5), gpu(7)]),
    ],
)
def test_devices(asked, own, processes, gpus, expected) -> None:
    assert teacher_devices(asked, own, processes, gpus) == expected


@pytest.mark.parametrize(
    ("asked", "own", "processes", "gpus", "expected"),
    [
        ("cuda:1", CPU, 1, 0, r"cuda:1 does not exist .* 0 GPUs are there: .* cpu or null"),
        ("cuda:2", gpu(0), 1, 2, "does not exist"),
        ("cuda:+2", gpu(0), 1, 2, "does not exist"),
        ("cuda:+2", gpu(0), 2, 3, "does not exist for 2 processes"),  # not for the other one
        ("cuda:1", gpu(0), 2, 2, r"one GPU for the teachers of 2 processes .* teacher\.device=cuda:\+2"),
        ("cuda:+1", gpu(0), 2, 4, r"trains on: set teacher\.device=cuda:\+2"),
        ("cuda:+1", CPU, 1, 2, "the student is on cpu"),
        ("spread", CPU, 1, 2, "the student is on cpu"),
        ("spread", gpu(0), 1, 1, "at least 2 GPUs for 1 process on this machine, there are 1"),
        ("spread", gpu(1), 4, 7, "at least 8 GPUs for 4 processes"),
    ],
)
def test_devices_that_cannot_be(asked, own, processes, gpus, expected) -> None:
    with pytest.raises(UserError, match=expected):
        teacher_devices(asked, own, processes, gpus)


@pytest.mark.parametrize(("processes", "gpus"), list(itertools.product([1, 2, 3, 4], range(9))))
@pytest.mark.parametrize("asked", ["spread", "cuda:+1", "cuda:+2", "cuda:+4", "cuda:1"])
def test_processes_agree_and_share_no_gpu(asked: str, processes: int, gpus: int) -> None:
    """All refuse, or all have devices of their own that are there and on which nobody trains."""
    taken: list[int] = list(range(processes))
    refused = 0
    for rank in range(processes):
        try:
            taken += [place.index for place in teacher_devices(asked, gpu(rank), processes, gpus)]
        except UserError:
            refused += 1
    assert refused in (0, processes)
    if not refused:
        assert len(taken) == len(set(taken)) and max(taken) < gpus


# ---------------------------------------------------------------- how it is spread


@pytest.mark.parametrize("load_in", [None, "8bit", "4bit"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_spread_is_even_and_in_order(load_in: str | None, count: int) -> None:
    model = qwen3vl.skeleton(qwen3vl.config_for(PUBLISHED))
    sizes = weight_bytes(model, 2, load_in)
    held, places = block_bytes(model, sizes), spread(model, sizes, range(count))
    assert list(places) == list(held) and list(places.values()) == sorted(places.values())
    on = Counter[int]()
    for block, place in places.items():
        on[place] += held[block]
    assert set(on) == set(range(count))
    assert max(on.values()) <= sum(held.values()) / count + max(held.values())
    # Every parameter lies somewhere, but for the output layer.
    covered = [n for n, _ in model.named_parameters() if any(n.startswith(f"{block}.") for block in places)]
    assert [n for n, _ in model.named_parameters() if n not in covered] == ["lm_head.weight"]
    assert sum(held.values()) == sum(sizes.values()) - sizes["lm_head.weight"]


def test_bytes_follow_from_the_bits() -> None:
    model = qwen3vl.skeleton(qwen3vl.config_for(PUBLISHED))
    linears = sum(linear.weight.numel() for linear in qwen3vl.decoder_linears(model).values())
    whole, eight, four = (sum(weight_bytes(model, 2, kind).values()) for kind in (None, "8bit", "4bit"))
    assert whole == 2 * sum(p.numel() for p in model.parameters())
    assert whole - eight == pytest.approx(linears, rel=2e-3)
    assert whole - four == linears * (2 - 0.5 - 4 / 64)


# ---------------------------------------------------------------- what it says


@pytest.fixture
def inputs(tiny_world_dir: Path, tiny_teacher_dir: Path):
    """A padded batch of pictures of the small world."""
    from grace.data.batch import collate
    from grace.data.records import load_records
    from grace.data.template import encode
    from grace.models.processor import load_processor

    processor = load_processor(tiny_teacher_dir)
    records = load_records(tiny_world_dir / "qat_train.json")[:3]
    return collate([encode(r, processor, 1024) for r in records], processor.tokenizer.pad_token_id)


@torch.inference_mode()
def states(model: Any, batch) -> tuple[Tensor, Tensor]:
    result = qwen3vl.hidden_states(model, batch)
    return result.final_BLD, result.last_layer_input_BLD


@pytest.mark.parametrize("own", ["cpu", "cpu:0"])  # cpu:0 is what a process among others is given
def test_alone_on_the_students_device_is_the_plain_model(tiny_teacher_dir: Path, inputs, own: str) -> None:
    plain = qwen3vl.load_model(str(tiny_teacher_dir))
    teacher = load_teacher(str(tiny_teacher_dir), torch.float32, [CPU], torch.device(own), None)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    # No copy of a tied output layer.
    assert qwen3vl.head_weight(teacher) is teacher.get_input_embeddings().weight
    for one, other in zip(states(plain, inputs), states(teacher, inputs), strict=True):
        assert torch.equal(one, other)


def test_layers_in_two_places_say_the_same(tiny_teacher_dir: Path, tmp_path: Path, inputs) -> None:
    """Memory and a disk from which weights come at each use stand in for two devices."""
    plain = qwen3vl.load_model(str(tiny_teacher_dir))
    places = spread(plain, weight_bytes(plain, 4, None), ["cpu", "disk"])
    assert places[f"{qwen3vl.VISION}"] == "cpu" and list(places.values())[-1] == "disk"
    teacher = qwen3vl.load_model(
        str(tiny_teacher_dir),
        torch.float32,
        device_map=places | {qwen3vl.HEAD: "cpu"},
        offload_folder=tmp_path,
    )
    assert {p.device.type for p in teacher.parameters()} == {"cpu", "meta"}
    assert qwen3vl.input_device(teacher) == CPU
    qwen3vl.put_head_on(teacher, CPU)
    assert torch.equal(qwen3vl.head_weight(teacher), qwen3vl.head_weight(plain))
    for one, other in zip(states(plain, inputs), states(teacher, inputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("tied", [True, False])
def test_head_moves_alone(tiny_teacher_dir: Path, tied: bool) -> None:
    model = qwen3vl.load_model(str(tiny_teacher_dir))
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    qwen3vl.put_head_on(model, torch.device("meta"))
    assert qwen3vl.head_weight(model).is_meta and not qwen3vl.head_weight(model).requires_grad
    assert qwen3vl.input_device(model) == CPU
    assert [n for n, p in model.named_parameters() if p.is_meta] == ["lm_head.weight"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_teacher_on_the_cpu_of_a_student_on_a_gpu(tiny_teacher_dir: Path, inputs) -> None:
    teacher = load_teacher(str(tiny_teacher_dir), torch.float32, [CPU], gpu(0), None)
    assert qwen3vl.input_device(teacher) == CPU and qwen3vl.head_weight(teacher).device == gpu(0)
    plain = qwen3vl.load_model(str(tiny_teacher_dir))
    for one, other in zip(states(plain, inputs), states(teacher, inputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three CUDA devices")
@pytest.mark.parametrize("load_in", [None, "8bit", "4bit"])
def test_teacher_spread_over_two_gpus(tiny_teacher_dir: Path, inputs, load_in: str | None) -> None:
    if load_in is not None:
        pytest.importorskip("bitsandbytes")
    alone, over = (
        load_teacher(str(tiny_teacher_dir), torch.bfloat16, places, gpu(0), load_in)
        for places in ([gpu(0)], [gpu(1), gpu(2)])
    )
    assert {p.device for p in over.parameters()} == {gpu(0), gpu(1), gpu(2)}
    for one, other in zip(states(alone, inputs.to(gpu(0))), states(over, inputs.to(gpu(1))), strict=True):
        assert torch.equal(one, other.to(gpu(0)))


# ---------------------------------------------------------------- 8 and 4 bits


def dequantized(linear: nn.Linear) -> Tensor:
    """The weight that a bitsandbytes layer stands for, before its first use (which may repack it)."""
    import bitsandbytes

    weight: Any = linear.weight
    if hasattr(weight, "quant_state"):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.data.float() * weight.SCB[:, None] / 127


def scale_bytes(linear: nn.Linear) -> int:
    weight: Any = linear.weight
    return (weight.quant_state.absmax if hasattr(weight, "quant_state") else weight.SCB).nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("load_in", "weights_off"), [("8bit", 0.01), ("4bit", 0.1)])
def test_few_bits(tiny_teacher_dir: Path, inputs, load_in: str, weights_off: float, dtype) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    plain = qwen3vl.load_model(str(tiny_teacher_dir), dtype)
    teacher = load_teacher(str(tiny_teacher_dir), dtype, [CPU], CPU, load_in)
    names = qwen3vl.decoder_linears(teacher)
    assert len(names) == 28 and not any(p.requires_grad for p in teacher.parameters())
    sizes, expected = weight_bytes(plain, dtype.itemsize, load_in), dict(plain.named_parameters())
    for name, parameter in teacher.named_parameters():
        linear = names.get(name.removesuffix(".weight"))
        if linear is None:  # vision tower, embeddings and with them the head, norms
            assert torch.equal(parameter, expected[name]), name
            assert parameter.nbytes == sizes[name]
            continue
        weight, stands_for = expected[name].float(), dequantized(linear)
        assert parameter.element_size() == 1 and parameter.nbytes + scale_bytes(linear) == sizes[name], name
        assert 0 < (weight - stands_for).norm() < weights_off * weight.norm(), name
        expected[name].data.copy_(stands_for)
    # A plain model with the weights that the quantized one stands for says nearly the same.
    for one, other in zip(states(plain, inputs), states(teacher, inputs), strict=True):
        kept = inputs.attention_mask_BL.bool()
        assert (one[kept] - other[kept]).float().norm() < 0.06 * one[kept].float().norm()


def test_missing_bitsandbytes_is_named(tiny_teacher_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match=r"4bit needs bitsandbytes .*: pip install 'grace\[bitsandbytes\]'"):
        load_teacher(str(tiny_teacher_dir), torch.float32, [CPU], CPU, "4bit")


@pytest.mark.parametrize(("places", "load_in"), [([CPU, CPU], None), ([CPU], "8bit")])
def test_no_model_there(tmp_path: Path, places, load_in) -> None:
    if load_in is not None:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with pytest.raises(UserError, match="no model at .*nowhere"):
        load_teacher(str(tmp_path / "nowhere"), torch.float32, places, CPU, load_in)


def test_few_bits_of_what_is_quantized_already(awq_dir: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with pytest.raises(UserError, match=r"quantized already, set teacher\.load_in=null"):
        quantization(str(awq_dir), "4bit", torch.float32)
