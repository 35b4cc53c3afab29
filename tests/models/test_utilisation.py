"""FLOPs equal what the framework counts of the real modules; peaks are found by whole words."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from grace.data.batch import collate
from grace.data.records import load_records
from grace.data.template import encode
from grace.models import qwen3vl
from grace.models.processor import load_processor
from grace.models.utilisation import Work, forward_flops, peak_flops, step_flops


def test_forward_pass_needs_what_the_framework_counts(tiny_student_dir, tiny_world_dir):
    processor = load_processor(str(tiny_student_dir))
    model = qwen3vl.load_model(str(tiny_student_dir))
    record = load_records(tiny_world_dir / "qat_train.json")[0]
    batch = collate([encode(record, processor, 1024)], processor.tokenizer.pad_token_id)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden = qwen3vl.hidden_states(model, batch).final_BLD
        model.lm_head(hidden[:, :7])
    tokens = batch.input_ids_BL.shape[1]
    assert batch.image_grid_thw_N3 is not None
    patches = [int(n) for n in batch.image_grid_thw_N3.prod(-1)]
    work = Work(tokens, tokens**2, 7, sum(patches), sum(n * n for n in patches))
    flops = forward_flops(model.config)
    ours = flops.decoder(work) + flops.vision(work) + flops.mergers(work)
    # Written out, causal attention is full attention; rotary tables are products for the counter as well.
    ours += flops.per_token_square * work.token_squares
    assert ours == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_trained_parts_count_three_times(tiny_student_dir):
    flops = forward_flops(qwen3vl.config_for(str(tiny_student_dir)))
    work = Work(100, 10_000, 20, 64, 4096)
    frozen, trained = (step_flops(work, flops, None, vision) for vision in (False, True))
    assert trained - frozen == pytest.approx(2 * flops.vision(work))
    assert trained == pytest.approx(3 * (flops.decoder(work) + flops.vision(work) + flops.mergers(work)))
    assert step_flops(work, flops, flops, True) == pytest.approx(trained * 4 / 3)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181.05e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA RTX A1000", None),
        ("cpu", None),
    ],
)
def test_peaks_are_found_by_whole_words(name, peak):
    assert peak_flops(name, "bf16") == peak
    assert peak_flops(name, "fp32") is None
