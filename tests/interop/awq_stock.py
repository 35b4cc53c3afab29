"""python tests/interop/awq_stock.py RUN [--records N] [--folder DIR]

Exports RUN to AWQ and reads it in an environment without GRACE:

- AutoAWQ's own code (`awq.utils.packing_utils`, as `awq.modules.linear.gemm` uses it) unpacks every linear:
  integers and scales must be the trained ones, and `WQLinear_GEMM` must hold the tensors as they are;
- stock transformers with gptqmodel loads the directory and answers the questions of the validation data:
  greedy tokens and logits against the trained model. It computes in fp16, whose rounding is in the figures.

Prints a table and, last, one line of JSON; exits with 1 where a bound is missed.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

TORCH = ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "pillow")
GPTQMODEL = ("gptqmodel==7.6.0",)
AUTOAWQ = ("autoawq==0.2.9",)
LIMIT = 2e-2  # of the largest logit, for fp16
MAX_TOKENS = 16


def main() -> int:
    from environment import arguments, python_of, report, run_inside, trained_answers, write_expected

    from grace.export.pack import export_run

    args = arguments(__doc__)
    after = [*TORCH, *GPTQMODEL]
    python = python_of("awq", AUTOAWQ, args.folder, ["--no-deps"], after)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        source, ours = trained_answers(args.run, args.records, scratch)
        export_run(args.run, scratch / "awq", ("awq",))
        write_expected(scratch, source, ours)
        unpacked = run_inside(python, __file__, "autoawq", scratch / "awq", scratch)
        answer = run_inside(python, __file__, "transformers", scratch / "awq", scratch)
    result: dict[str, Any] = {"readers": [*AUTOAWQ, *GPTQMODEL, *TORCH], **unpacked, **answer["about"]}
    print(f"AutoAWQ: codes and scales exact in {unpacked['exact']} of {unpacked['modules']} modules")
    print(f"transformers: {answer['about']}")
    report(result, answer["answers"], ours)
    result["met"] = unpacked["exact"] == unpacked["modules"] == len(source.qat.modules) and all(
        result[what]["largest_relative"] <= LIMIT for what in ("image", "text")
    )
    print(json.dumps(result))
    return 0 if result["met"] else 1


# ---------------------------------------------------------------- the other half, without GRACE


def by_autoawq(directory: Path, folder: Path) -> dict[str, Any]:
    """Every linear put into AutoAWQ's layer and unpacked by AutoAWQ's functions."""
    import torch
    from awq.modules.linear import gemm  # pyright: ignore[reportMissingImports]
    from awq.utils.packing_utils import reverse_awq_order, unpack_awq  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file

    gemm.TRITON_AVAILABLE = False  # there is no GPU here; its plain path is used
    stored, trained = load_file(directory / "model.safetensors"), load_file(folder / "trained.safetensors")
    how = json.loads((directory / "config.json").read_text())["quantization_config"]
    names = [name.removesuffix(".codes") for name in trained if name.endswith(".codes")]
    exact, largest = 0, 0.0
    for name in names:
        codes, scales = trained[f"{name}.codes"], trained[f"{name}.scales"]
        layer = gemm.WQLinear_GEMM(
            how["bits"], how["group_size"], codes.shape[1], codes.shape[0], False, "cpu"
        )
        layer.load_state_dict({part: stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")})
        weight, zeros = reverse_awq_order(*unpack_awq(layer.qweight, layer.qzeros, how["bits"]), how["bits"])
        mask = 2 ** how["bits"] - 1
        integers = (weight & mask).int().t() - (zeros & mask).int().repeat_interleave(
            how["group_size"], 0
        ).t()
        exact += torch.equal(integers, codes.int()) and torch.equal(layer.scales.float().t(), scales)
        probe = torch.eye(codes.shape[1], dtype=torch.float16)[:8]
        wide = codes.float() * scales.repeat_interleave(how["group_size"], 1)
        with torch.inference_mode():
            largest = max(largest, (layer(probe).float() - wide[:, :8].t()).abs().max().item())
    return {"modules": len(names), "exact": exact, "layer_output_difference": largest}


def by_transformers(directory: Path, folder: Path) -> dict[str, Any]:
    """The directory in stock transformers with gptqmodel's layers."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    loaded = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float16, output_loading_info=True, device_map="cpu"
    )
    model, info = cast(Any, loaded)
    kinds = {type(module).__name__ for module in model.modules() if hasattr(module, "qweight")}
    faults = [name for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]]
    questions = load_file(folder / "questions.safetensors")
    count = 1 + max(int(name.split(".")[0]) for name in questions)
    answers = []
    for index in range(count):
        prefix = f"{index}."
        inputs = {name.removeprefix(prefix): t for name, t in questions.items() if name.startswith(prefix)}
        output = model.generate(
            **inputs,
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        answers.append({"tokens": tokens, "logits": torch.cat(output.logits).float().tolist()})
    return {"about": {"layers": sorted(kinds), "faults": faults}, "answers": answers}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        by = {"autoawq": by_autoawq, "transformers": by_transformers}[sys.argv[2]]
        print(json.dumps(by(Path(sys.argv[3]), Path(sys.argv[4]))))
    else:
        sys.exit(main())
