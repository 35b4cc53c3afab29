"""python benchmarks/post_training.py DEMO [--records 128] [--questions 3000] [--folder DIR]

Quantization after training against training at low precision, in the small world: DEMO is what `grace demo`
left (runs/demo). Its full-precision student goes through `grace quantize` (round to nearest, both kinds of
scales) and through AWQ and GPTQ by llm-compressor (`export/llm_compressor.py`, which makes an environment of
its own on the first call), calibrated on the records that its trained arms learn from. All at 4 bits in groups
of 128; everything runs in float32, so that rounded weights are the only difference.

Prints exact match and cross-entropy on the test questions, and last, one line of JSON.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import machine, report

from grace.data.records import load_records
from grace.demo.scoring import batches
from grace.evaluation.exact_match import evaluate, summarize
from grace.export.quantize import SCALES, quantize_model
from grace.models.processor import load_processor

METHODS = ("awq", "gptq")
SCRIPT = Path(__file__).parents[1] / "export" / "llm_compressor.py"


def score(directory: Path, processor: Any, records: list[Any]) -> dict[str, float]:
    """Exact match with its standard error, and cross-entropy, of a directory that transformers can load."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = torch.tensor([[1, 2]])
    model(
        input_ids=tokens, mm_token_type_ids=0 * tokens
    )  # compressed-tensors expands its weights at the first
    return dict(summarize(evaluate(model, batches(records, processor))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", metavar="DEMO", type=Path)
    parser.add_argument("--records", type=int, default=128, help="calibration records; default: %(default)s")
    parser.add_argument("--questions", type=int, help="of the test data; default: all")
    parser.add_argument("--folder", type=Path, help="of llm-compressor's environment")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    student, data = args.demo / "student", args.demo / "data"
    with tempfile.TemporaryDirectory() as name:
        models = {"student, full precision": student}
        for scales in SCALES:
            directory = Path(name) / scales
            quantize_model(student, directory, scales=scales, formats=["qat"])
            models[f"round to nearest, {scales} scales"] = directory
        for method in METHODS:
            directory = Path(name) / method
            command = [sys.executable, SCRIPT, student, "--method", method, "--data", data / "qat_train.json"]
            command += ["--records", args.records, "--out", directory]
            command += ["--folder", args.folder] if args.folder else []
            subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)
            models[f"{method.upper()}, llm-compressor"] = directory
        models["QAT"] = args.demo / "arms" / "qat" / "model"
        models["GRACE"] = args.demo / "qat"
        processor, records = load_processor(str(student)), load_records(data / "test.json")[: args.questions]
        rows = {}
        for label, directory in models.items():
            rows[label] = score(directory, processor, records)
            values = rows[label]
            print(
                f"{label:34} {values['exact_match']:.4f} ± {values['exact_match_se']:.4f}  CE {values['ce']:.4f}"
            )
    about = {"benchmark": "post_training", "records": args.records, "questions": len(records)}
    report(about | machine() | {"rows": rows}, args.out)


if __name__ == "__main__":
    main()
