"""python tests/interop/mlx_stock.py RUN [--records N] [--folder DIR]

Exports RUN to MLX and reads it with MLX on this machine's CPU (Linux wheels exist), without GRACE:
`mx.dequantize` of every linear against scale * code, bit for bit in float32; and mlx-vlm's own Qwen3-VL,
loaded from the directory as anyone would, against the trained model's greedy tokens and logits. The
command of the model card is run as it stands there.

It is asked as it comes, in bfloat16, whose rounding is in the figures, and once more with every float
widened to float32. Prints a table and, last, one line of JSON; exits with 1 where a bound is missed.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGES = ("mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-vlm==0.7.10")
LIMITS = {"bfloat16": 0.1, "float32": 1e-3}  # of the largest logit
MAX_TOKENS = 16


def main() -> int:
    from environment import (
        arguments,
        card_blocks,
        python_of,
        report,
        run_card,
        run_inside,
        trained_answers,
        write_expected,
    )

    from grace.export.pack import export_run

    args = arguments(__doc__)
    python = python_of("mlx", PACKAGES, args.folder)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, ours = trained_answers(args.run, args.records, folder)
        export_run(args.run, folder / "mlx", ("mlx",))
        write_expected(folder, source, ours)
        answer = run_inside(python, __file__, folder / "mlx", folder)
        picture = next(answer["image"] for answer in ours if answer["image"])
        (card,) = (line for line in card_blocks(folder / "mlx") if "mlx_vlm.generate" in line)
        said = run_card(python, card, folder / "mlx", picture)
    result: dict[str, Any] = {"reader": "mlx-vlm 0.7.10", "bits": source.qat.bits, **answer["exact"]}
    print(f"the card's command says: {said.splitlines()[-1]}")
    print(f"dequantized exactly: {result['exact']} of {result['modules']} modules")
    for dtype in LIMITS:
        print(dtype)
        result[dtype] = {}
        report(result[dtype], answer[dtype], ours)
    result["met"] = result["exact"] == result["modules"] == len(source.qat.modules) and all(
        result[dtype][what]["largest_relative"] <= limit
        for dtype, limit in LIMITS.items()
        for what in ("image", "text")
    )
    print(json.dumps(result))
    return 0 if result["met"] else 1


# ---------------------------------------------------------------- the other half, without GRACE


def inside(directory: Path, folder: Path) -> None:
    import mlx.core as mx  # pyright: ignore[reportMissingImports]
    import mlx_vlm.utils  # pyright: ignore[reportMissingImports]

    trained = mx.load(str(folder / "trained.safetensors"))
    exact = exact_modules(mx, directory, trained)
    model = mlx_vlm.utils.load_model(directory)
    questions = mx.load(str(folder / "questions.safetensors"))
    count = 1 + max(int(name.split(".")[0]) for name in questions)
    ends = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    result: dict[str, Any] = {"exact": exact}
    for dtype in LIMITS:
        model.set_dtype(getattr(mx, dtype))
        result[dtype] = [ask(mx, model, questions, i, ends) for i in range(count)]
    print(json.dumps(result))


def exact_modules(mx: Any, directory: Path, trained: dict[str, Any]) -> dict[str, int]:
    """How many linears `mx.dequantize` expands to exactly scale * code."""
    stored = mx.load(str(directory / "model.safetensors"))
    how = json.loads((directory / "config.json").read_text())["quantization"]
    names = [name.removesuffix(".codes") for name in trained if name.endswith(".codes")]
    same = 0
    for name in names:
        codes, scales = trained[f"{name}.codes"], trained[f"{name}.scales"]
        prefix = name.replace("model.language_model.", "language_model.model.")
        packed, *affine = (stored[f"{prefix}.{part}"] for part in ("weight", "scales", "biases"))
        wide = mx.dequantize(
            packed, *(part.astype(mx.float32) for part in affine), how["group_size"], how["bits"]
        )
        expected = codes.astype(mx.float32) * mx.repeat(scales, how["group_size"], axis=1)
        same += bool(mx.array_equal(wide, expected))
    return {"modules": len(names), "exact": same}


def ask(mx: Any, model: Any, questions: dict[str, Any], index: int, ends: list[int]) -> dict[str, Any]:
    """Greedy tokens and the logits that each was taken from; the whole prompt anew at each step."""
    ids = questions[f"{index}.input_ids"]
    pictures = {}
    if f"{index}.pixel_values" in questions:
        pictures = {
            "pixel_values": questions[f"{index}.pixel_values"],
            "image_grid_thw": questions[f"{index}.image_grid_thw"],
        }
    tokens: list[int] = []
    logits: list[list[float]] = []
    while len(tokens) < MAX_TOKENS and not (tokens and tokens[-1] in ends):
        so_far = mx.concatenate([ids, mx.array([tokens], dtype=ids.dtype)], axis=1) if tokens else ids
        output = model(
            so_far, pictures.get("pixel_values"), **{k: v for k, v in pictures.items() if k != "pixel_values"}
        )
        row = output.logits[0, -1].astype(mx.float32)
        logits.append(row.tolist())
        tokens.append(int(mx.argmax(row)))
    return {"tokens": tokens, "logits": logits}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())
