"""The figures of `grace bench` for people: a table and a plot."""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def machine(device: str) -> dict[str, Any]:
    """Device and versions."""
    import transformers

    return {
        "device": cpu_name() if device == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cpu_name() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(result: dict[str, Any]) -> str:
    """Every figure, in columns."""
    int4, bf16 = result["int4"], result["bf16"]
    lines = [
        f"{result['model']} on {result['device']}, {int4['threads']} threads, torch {result['torch']}; "
        f"copy {result['copy_gb_s']:.1f} GB/s",
        f"int4: {int4['side']}, {int4['kernel']}, head {result['head']}",
        f"bf16: {'transformers generate' if bf16['side'] == 'library' else 'this engine'}",
        "",
        f"{'':26}{'int4 tok/s':>12}{'bf16 tok/s':>12}{'ratio':>8}{'int4 GB/s':>11}{'of copy':>9}{'bf16 GB/s':>11}{'of copy':>9}",
    ]
    for row in result["decode"]:
        name = f"decode, batch {row['batch']}, at {row['context']}"
        lines.append(
            f"{name:26}{row['int4_tokens_per_s']:12.1f}{row['bf16_tokens_per_s']:12.1f}{row['ratio']:8.2f}"
            f"{row['int4_gb_s']:11.1f}{row['int4_of_copy']:9.0%}{row['bf16_gb_s']:11.1f}{row['bf16_of_copy']:9.0%}"
        )
    for row in result["prefill"]:
        name = f"prefill, {row['tokens']} tokens"
        lines.append(
            f"{name:26}{row['int4_tokens_per_s']:12.1f}{row['bf16_tokens_per_s']:12.1f}{row['ratio']:8.2f}"
            f"   first token after {row['int4_s']:.2f} s and {row['bf16_s']:.2f} s"
        )
    lines += ["", f"{'':26}{'int4':>12}{'bf16':>12}{'ratio':>8}"]
    sizes: Sequence[tuple[str, float, float, float, str]] = [
        (
            "weights, GB",
            int4["language_bytes"] / 1e9,
            bf16["language_bytes"] / 1e9,
            result["weight_bytes_ratio"],
            ".3f",
        ),
        (
            "with vision tower, GB",
            (int4["language_bytes"] + int4["vision_bytes"]) / 1e9,
            (bf16["language_bytes"] + bf16["vision_bytes"]) / 1e9,
            result["weight_bytes_ratio_with_vision"],
            ".3f",
        ),
        ("peak memory, GB", int4["peak_memory_bytes"] / 1e9, bf16["peak_memory_bytes"] / 1e9, 0.0, ".2f"),
        (
            "load from disk, s",
            result["load_s"]["int4"],
            result["load_s"]["bf16"],
            result["load_ratio"],
            ".2f",
        ),
        (
            "load from page cache, s",
            result["load_cached_s"]["int4"],
            result["load_cached_s"]["bf16"],
            result["load_cached_ratio"],
            ".2f",
        ),
    ]
    for name, ours, theirs, ratio, form in sizes:
        lines.append(f"{name:26}{ours:12{form}}{theirs:12{form}}{ratio or ours / theirs:8.2f}")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of tokens/s, decoding on the left, prompts on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    decode = [(f"batch {row['batch']}\nat {row['context']}", row) for row in result["decode"]]
    prefill = [(f"{row['tokens']} tokens", row) for row in result["prefill"]]
    for axis, rows, title in zip(axes, (decode, prefill), ("Decoding", "Prompts"), strict=True):
        places = range(len(rows))
        for shift, side in ((-0.2, "bf16"), (0.2, "int4")):
            heights = [row[f"{side}_tokens_per_s"] for _, row in rows]
            bars = axis.bar([place + shift for place in places], heights, 0.38, label=side)
            labels = [f"{row['ratio']:.2f}x" for _, row in rows] if side == "int4" else [""] * len(rows)
            axis.bar_label(bars, labels)
        axis.set_xticks(list(places), [name for name, _ in rows])
        axis.set_title(title)
        axis.set_ylabel("tokens/s")
        axis.legend()
    figure.suptitle(f"{result['model']}, head {result['head']}, {result['device']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
