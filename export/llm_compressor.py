"""python export/llm_compressor.py MODEL --method awq|gptq --data FILE.json --out DIR [--records 128]

Post-training baselines that are not GRACE's own code: AWQ or GPTQ by llm-compressor, 4 bits, groups of 128,
symmetric, vision tower and head left alone; the result is a compressed-tensors directory for vLLM, SGLang and
transformers. MODEL is a full-precision Qwen3-VL directory, FILE.json holds calibration records (ShareGPT4V).

llm-compressor wants an older transformers than GRACE, so it runs in an environment of its own, made with pip
on the first call (--folder says where). GRACE encodes the records as in training and hands tensors over:
no processor is needed on the other side.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

PACKAGES = ("torch==2.13.0", "transformers==5.17.0", "llmcompressor==0.14.0.1", "pillow")
IGNORED = ["lm_head", "re:.*lm_head$", "re:.*visual.*"]
GROUP_SIZE = 128


def main() -> int:
    """Reads, checks and encodes here; quantizes there; publishes the directory when it is whole."""
    args = arguments()
    from grace.checkpoint import copy_verbatim_files
    from grace.errors import UserError
    from grace.export.quantize import rounded_source
    from grace.files import new_directory, require_free

    try:
        require_free(args.out)
        source = rounded_source(args.model, 4, GROUP_SIZE, "absmax")  # refuses what cannot be quantized
        with tempfile.TemporaryDirectory() as name:
            samples = Path(name) / "samples.safetensors"
            count = write_samples(args, source.directory, samples)
            print(f"{count} calibration records; the rest is llm-compressor's", file=sys.stderr)
            python = python_of(args.folder)
            with new_directory(args.out) as scratch:
                quantize(python, args.method, source.directory, samples, scratch)
                copy_verbatim_files(source.directory, scratch)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {Path(error.cmd[0]).name} failed ({error.returncode}), see above", file=sys.stderr)
        return 1
    print(f"wrote {args.out}", file=sys.stderr)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", type=Path)
    parser.add_argument("--method", choices=("awq", "gptq"), required=True)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE.json", help="calibration records")
    parser.add_argument("--image-root", type=Path, metavar="DIR", help="where the records' pictures are")
    parser.add_argument("--records", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="default: the processor's own bound")
    parser.add_argument("--max-length", type=int, default=4096, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new directory")
    parser.add_argument(
        "--folder", type=Path, default=Path.home() / ".cache" / "grace-llm-compressor",
        help="where the environment is kept; default: %(default)s",
    )  # fmt: skip
    return parser.parse_args()


def write_samples(args: argparse.Namespace, model: Path, target: Path) -> int:
    """The first records with pictures as the tensors that a forward pass takes; returns how many.

    llm-compressor traces the model on the first of them, and runs the others through the same graph: records
    without a picture have no place in it.
    """
    from safetensors.torch import save_file

    from grace.data.records import load_records
    from grace.data.template import encode
    from grace.errors import UserError
    from grace.models.processor import load_processor
    from grace.runtime.generate import model_inputs

    processor = load_processor(model, None, args.max_pixels)
    records = [record for record in load_records(args.data, args.image_root) if record.images]
    records = records[: args.records]
    if not records:
        raise UserError(f"{args.data} has no records with pictures: give others as --data")
    tensors = {}
    for index, record in enumerate(records):
        inputs = model_inputs(encode(record, processor, args.max_length), "cpu")
        tensors |= {f"{index}.{name}": tensor.contiguous() for name, tensor in inputs.items()}
    save_file(tensors, target)
    return len(records)


def python_of(folder: Path) -> Path:
    """The Python of the environment, made with pip if it is not there yet."""
    python, done = folder / "bin" / "python", folder / ".installed"
    wanted = json.dumps(PACKAGES)
    if not done.is_file() or done.read_text() != wanted:
        print(f"installing {' '.join(PACKAGES)} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        done.write_text(wanted)
    return python


def quantize(python: Path, method: str, model: Path, samples: Path, out: Path) -> None:
    """Starts the other half; its output goes to stderr.

    Raises:
        CalledProcessError: it failed, and has said why.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, __file__, "--inside", method, model, samples, out]
    subprocess.run([str(part) for part in command], env=environment, check=True, stdout=sys.stderr)


# ---------------------------------------------------------------- the other half, without GRACE


def inside(method: str, model_path: str, samples: str, out: str) -> None:
    """Quantizes with llm-compressor and saves a compressed-tensors directory."""
    import torch
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.gptq import GPTQModifier  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.quantization import (  # pyright: ignore[reportMissingImports]
        QuantizationModifier,
    )
    from llmcompressor.modifiers.transform.awq import AWQModifier  # pyright: ignore[reportMissingImports]
    from llmcompressor.pipelines.cache import IntermediatesCache  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    if not torch.accelerator.is_available():  # its AWQ pins memory for a device whether there is one or not
        IntermediatesCache.pin_memory = lambda self, index: None
    stored = load_file(samples)
    count = 1 + max(int(name.split(".")[0]) for name in stored)
    batches: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, tensor in stored.items():
        index, _, part = name.partition(".")
        batches[int(index)][part] = tensor
    model = AutoModelForImageTextToText.from_pretrained(model_path, dtype="auto")
    scheme = {"targets": ["Linear"], "ignore": IGNORED, "scheme": "W4A16"}
    if method == "gptq":
        recipe: list[Any] = [GPTQModifier(**scheme)]
    else:
        recipe = [AWQModifier(), QuantizationModifier(**scheme)]
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(model_path),  # asked for, and not used on ready tensors
        recipe=recipe,
        dataset=torch.utils.data.DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
        num_calibration_samples=count,
        sequential_targets=["Qwen3VLTextDecoderLayer"],
        pipeline="sequential",
    )
    model.save_pretrained(out, save_compressed=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(*sys.argv[2:])
    else:
        sys.exit(main())
