"""Separate environments for other people's runtimes, and the questions that both sides answer.

A driver (run by GRACE's own Python) exports a run, writes the trained model's answers as JSON, and starts
its other half under the Python of an environment that has never heard of GRACE.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEFAULT_FOLDER = Path.home() / ".cache" / "grace-interop"


def arguments(description: str | None) -> argparse.Namespace:
    """A driver's: the run, how many of its records, and the folder of environments."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--records", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where environments are kept")
    return parser.parse_args()


def python_of(
    name: str, packages: Sequence[str], folder: Path, options: Sequence[str] = (), after: Sequence[str] = ()
) -> Path:
    """The Python of the environment `name`, made with pip if it is not there yet.

    Args:
        options: for pip, with `packages`.
        after: packages installed first, without `options`.
    """
    home = folder / name
    python, done = home / "bin" / "python", home / ".installed"
    wanted = json.dumps([*after, *options, *packages])
    if done.is_file() and done.read_text() == wanted:
        return python
    if not python.exists():
        venv.create(home, with_pip=True)
    print(f"installing {' '.join(packages)} into {home}", file=sys.stderr)
    for names in ([*after], [*options, *packages]):
        if names:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *names], check=True)
    done.write_text(wanted)
    return python


def run_inside(python: Path, script: str, *arguments: str | Path) -> dict[str, Any]:
    """Runs a script's other half with `--inside`; its last line of stdout is its JSON answer."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, Path(script), "--inside", *arguments]
    result = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{script} failed under {python}:\n{result.stderr[-4000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def card_blocks(directory: Path, language: str = "") -> list[str]:
    """The code of a model card in one language; without one, its commands line by line."""
    text = (directory / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return blocks if language else [line for block in blocks for line in block.splitlines()]


def run_card(python: Path, code: str, directory: Path, picture: str | None = None) -> str:
    """Runs a piece of a model card with nothing changed but its placeholders; returns what it prints.

    `python -m ...` is a command, everything else a Python program.
    """
    code = code.replace("DIR", str(directory)).replace("picture.png", str(picture))
    command = shlex.split(code)[1:] if code.startswith("python ") else ["-c", code]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([str(python), *command], env=environment, capture_output=True, text=True)
    if result.returncode or not result.stdout.strip():
        sys.exit(f"the model card's code failed under {python}:\n{code}\n{result.stderr[-4000:]}")
    return result.stdout


def trained_answers(run: Path, records: int, folder: Path) -> tuple[Any, list[dict[str, Any]]]:
    """The source of a run, and what the trained model (fp32, dense tensors as bfloat16) says.

    Every record is asked twice, with its picture and without it; of every second picture only the upper two
    thirds are shown, so that it is not square and the table of positions is interpolated. Each answer holds the prompt's text, its
    token ids, the picture's path or None, the model's input tensors, the greedy tokens and the logits that
    each was taken from.
    """
    import torch

    from grace.data.records import Record, load_records
    from grace.data.template import encode_prompt
    from grace.export.reference import greedy, prompt_of, round_unquantized
    from grace.export.source import open_source
    from grace.models.processor import load_processor
    from grace.runtime.generate import load_model, model_inputs

    source = open_source(run)
    data = source.recipe["data"]
    path = data.get("validation_path") or data["path"]
    asked: list[Record] = load_records(
        Path(path), Path(data["image_root"]) if data.get("image_root") else None
    )
    processor = load_processor(source.directory, data.get("min_pixels"), data.get("max_pixels"))
    model = load_model(source.directory, torch.float32)
    round_unquantized(model, source.qat.modules)
    answers = []
    for index, record in enumerate(asked[:records]):
        if index % 2:
            record = dataclasses.replace(record, images=(cropped(Path(record.images[0]), folder),))
        question = next(turn for turn in record.turns if turn.role == "user")
        bare = type(question)("user", question.text.replace("<image>", "").strip())
        prompts = [
            (prompt_of(record, processor), str(record.images[0])),
            (encode_prompt([bare], [], processor), None),
        ]
        for prompt, image in prompts:
            tokens, logits_TV = greedy(model, processor, prompt)
            ids = prompt.input_ids_L.tolist()
            text = processor.tokenizer.decode(ids)
            answers.append(
                {
                    "text": text,
                    "ids": ids,
                    "image": image,
                    "inputs": model_inputs(prompt, "cpu"),
                    "tokens": tokens,
                    "logits": logits_TV.tolist(),
                }
            )
    return source, answers


def cropped(picture: Path, folder: Path) -> Path:
    """The upper two thirds of a picture, as a file in `folder`."""
    from PIL import Image

    with Image.open(picture) as image:
        part = image.convert("RGB").crop((0, 0, image.width, image.height * 2 // 3))
    part.save(folder / f"{picture.stem}-cropped.png")
    return folder / f"{picture.stem}-cropped.png"


def write_expected(folder: Path, source: Any, answers: Sequence[dict[str, Any]]) -> None:
    """What the other half needs, without pickles: questions as tensors, and the trained codes and scales."""
    from safetensors.torch import save_file

    inputs = {
        f"{i}.{name}": tensor for i, answer in enumerate(answers) for name, tensor in answer["inputs"].items()
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in inputs.items()}, folder / "questions.safetensors"
    )
    state = {}
    for name, weight in source.qat.modules.items():
        state |= {f"{name}.codes": weight.codes_OI, f"{name}.scales": weight.scales_OG.float()}
    save_file(state, folder / "trained.safetensors")


def report(result: dict[str, Any], theirs: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> None:
    """Adds the comparison with pictures and without to `result`, and prints it."""
    for what in ("image", "text"):
        chosen = [i for i, answer in enumerate(ours) if (answer["image"] is None) == (what == "text")]
        figures = compare([ours[i] for i in chosen], [theirs[i] for i in chosen])
        result[what] = figures
        print(
            f"{what:6} identical answers {figures['identical_answers']}/{figures['prompts']}, "
            f"logits {figures['largest_relative']:.1e} of the largest, KL {figures['kl_mean']:.1e}, "
            f"gaps {[f'{gap:.3g}' for gap in figures['gaps_where_parted']]}"
        )


def compare(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Greedy tokens and logits of two runtimes, over the steps before they part.

    Returns:
        prompts, identical answers, tokens, and for the logits the largest difference relative to the
        largest logit, the mean KL divergence in nats, and the gaps between the two candidates where
        answers part.
    """
    import torch

    largest, top, divergence, steps, gaps = 0.0, 0.0, 0.0, 0, []
    for mine, other in zip(ours, theirs, strict=True):
        same = next(
            (i for i, (a, b) in enumerate(zip(mine["tokens"], other["tokens"], strict=False)) if a != b), None
        )
        shared = min(len(mine["logits"]), len(other["logits"])) if same is None else same + 1
        left, right = (torch.tensor(side["logits"][:shared]).double() for side in (mine, other))
        largest = max(largest, (left - right).abs().max().item())
        top = max(top, left.abs().max().item())
        divergence += (left.softmax(-1) * (left.log_softmax(-1) - right.log_softmax(-1))).sum().item()
        steps += shared
        if same is not None:
            gaps.append((left[same][mine["tokens"][same]] - left[same][other["tokens"][same]]).item())
    return {
        "prompts": len(ours),
        "identical_answers": len(ours) - len(gaps),
        "steps_compared": steps,
        "largest_relative": largest / top,
        "kl_mean": divergence / steps,
        "gaps_where_parted": gaps,
    }
