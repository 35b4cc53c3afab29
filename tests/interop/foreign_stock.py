"""python tests/interop/foreign_stock.py [--folder DIR]

Other people's checkpoints, made here from a tiny model (asymmetric AWQ in groups of 64; a trained and a packed
checkpoint as the public GRACE code writes them), exported and read without GRACE:

- MLX's own `mx.dequantize` expands every linear to what the source means, bit for bit;
- AutoAWQ's code unpacks every linear to the source's codes and zero points, its scales to the source's (of the
  trained one: to the nearest fp16);
- stock transformers with gptqmodel loads the AWQ directories, without warnings about keys, and its logits on
  a fixed prompt are those of a dense model with the same weights, within fp16.

Prints a table and, last, one line of JSON; exits with 1 where something differs.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from awq_stock import AUTOAWQ, GPTQMODEL, LIMIT, TORCH
from mlx_stock import PACKAGES as MLX

IDS = [429, 3, 17, 99, 200, 5, 5, 61]
SOURCES = {"asymmetric AWQ": 64, "reference QAT": 128, "reference AWQ": 128}


def main() -> int:
    from environment import DEFAULT_FOLDER, python_of, run_inside

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where environments are kept")
    args = parser.parse_args()
    mlx = python_of("mlx", MLX, args.folder)
    awq = python_of("awq", AUTOAWQ, args.folder, ["--no-deps"], [*TORCH, *GPTQMODEL])
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for source, exported in make_all(Path(name)).items():
            rows[source] = {
                **run_inside(mlx, __file__, "mlx", exported / "mlx", exported),
                **run_inside(awq, __file__, "autoawq", exported / "awq", exported),
                **run_inside(awq, __file__, "transformers", exported / "awq", exported),
            }
            print(f"{source}: {rows[source]}")
    met = all(
        row["modules"] == row["mlx_exact"] == row["autoawq_exact"]
        and not row["faults"]
        and row["logits"] <= LIMIT
        for row in rows.values()
    )
    print(json.dumps({"readers": [*MLX, *AUTOAWQ, *GPTQMODEL, *TORCH], **rows, "met": met}))
    return 0 if met else 1


def make_all(folder: Path) -> dict[str, Path]:
    """Every source, its exports, and what the readers should find."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import foreign_checkpoints as foreign  # pyright: ignore[reportMissingImports] - tests/ is on the path
    import torch
    from safetensors.torch import save_file

    from grace.export.pack import export_run
    from grace.export.reference import model_of
    from grace.export.source import open_source
    from grace.models.tiny import write_tiny_model

    model = write_tiny_model(folder / "model", "student", seed=3)
    made = {
        "asymmetric AWQ": foreign.write_awq(model, folder / "asymmetric AWQ", SOURCES["asymmetric AWQ"]),
        "reference QAT": foreign.write_reference_qat(model, folder / "reference QAT"),
        "reference AWQ": foreign.write_reference_awq(model, folder / "reference AWQ"),
    }
    exports = {}
    for source, linears in made.items():
        out = exports[source] = folder / f"{source} exported"
        export_run(folder / source, out, ("awq", "mlx"))
        expected = {}
        for name, linear in linears.items():
            offset = 8 if source == "reference QAT" else 0  # its codes are written around 0
            expected[f"{name}.codes"] = linear["codes"].int() + offset
            expected[f"{name}.zeros"] = linear["zeros"].int() + offset
            expected[f"{name}.scales"] = linear["scales"].float()
        ids = torch.tensor([IDS])
        with torch.inference_mode():
            dense = model_of(open_source(folder / source), torch.float32)
            output = dense(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids))
        expected["logits"] = output.logits[0].contiguous()
        save_file(expected, out / "expected.safetensors")
    return exports


# ---------------------------------------------------------------- the other half, without GRACE


def by_mlx(directory: Path, folder: Path) -> dict[str, Any]:
    import mlx.core as mx  # pyright: ignore[reportMissingImports]

    stored = mx.load(str(directory / "model.safetensors"))
    expected = mx.load(str(folder / "expected.safetensors"))
    how = json.loads((directory / "config.json").read_text())["quantization"]
    names = [name.removesuffix(".codes") for name in expected if name.endswith(".codes")]
    exact = 0
    for name in names:
        prefix = name.replace("model.language_model.", "language_model.model.")
        packed, *grid = (stored[f"{prefix}.{part}"] for part in ("weight", "scales", "biases"))
        # With float32 scales one product is rounded before the bias is added: whole numbers show that all is there.
        ones = mx.ones(grid[0].shape, dtype=mx.float32)
        codes = mx.dequantize(packed, ones, 0 * ones, how["group_size"], how["bits"])
        same = mx.array_equal(codes, expected[f"{name}.codes"].astype(mx.float32))
        scales, zeros = expected[f"{name}.scales"], expected[f"{name}.zeros"].astype(mx.float32)
        scales_same = mx.array_equal(grid[0].astype(mx.float32), scales)
        biases_same = mx.array_equal(grid[1].astype(mx.float32), -zeros * scales)
        wide = mx.dequantize(
            packed, *(part.astype(mx.float32) for part in grid), how["group_size"], how["bits"]
        )
        size = how["group_size"]
        meant = (expected[f"{name}.codes"] - mx.repeat(expected[f"{name}.zeros"], size, axis=1)) * mx.repeat(
            scales, size, axis=1
        )
        close = mx.abs(wide - meant).max() <= mx.abs(meant).max() * 2.0**-20
        exact += bool(same) and bool(scales_same) and bool(biases_same) and bool(close)
    return {"modules": len(names), "mlx_exact": exact}


def by_autoawq(directory: Path, folder: Path) -> dict[str, Any]:
    from awq.utils.packing_utils import reverse_awq_order, unpack_awq  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file

    stored, expected = load_file(directory / "model.safetensors"), load_file(folder / "expected.safetensors")
    names = [name.removesuffix(".codes") for name in expected if name.endswith(".codes")]
    exact = 0
    for name in names:
        codes, zeros = reverse_awq_order(
            *unpack_awq(stored[f"{name}.qweight"], stored[f"{name}.qzeros"], 4), 4
        )
        exact += (
            bool(((codes & 15).int().t() == expected[f"{name}.codes"]).all())
            and bool(((zeros & 15).int().t() == expected[f"{name}.zeros"]).all())
            and bool((stored[f"{name}.scales"].t() == expected[f"{name}.scales"].half()).all())
        )
    return {"autoawq_exact": exact}


def by_transformers(directory: Path, folder: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float16, output_loading_info=True, device_map="cpu"
    )
    model, info = loaded
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        logits = model(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids)).logits[0].float()
    expected = load_file(folder / "expected.safetensors")["logits"]
    faults = [name for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]]
    return {"faults": faults, "logits": ((logits - expected).abs().max() / expected.abs().max()).item()}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        by = {"mlx": by_mlx, "autoawq": by_autoawq, "transformers": by_transformers}[sys.argv[2]]
        print(json.dumps(by(Path(sys.argv[3]), Path(sys.argv[4]))))
    else:
        sys.exit(main())
