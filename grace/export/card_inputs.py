"""What a model card says that the run itself does not know: the base model's name on the Hub, benchmark scores."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from grace.checked_files import read_text
from grace.errors import UserError

RESULTS = "results.json"


@dataclass(frozen=True)
class CardInputs:
    """Both may be absent.

    Attributes:
        base_model: OWNER/NAME of the model that training or rounding began with.
        results: what `grace eval` measured: `{"tasks": {name: {"metric", "score", "ci_low", "ci_high", "n"}},
            "harness", "command"}`; of a task only the score is needed.
    """

    base_model: str | None = None
    results: Mapping[str, Any] | None = None


NOTHING = CardInputs()


def card_inputs(base_model: str | None, results: Path | None) -> CardInputs:
    """From the command line.

    Raises:
        UserError: no name that the Hub could know, or a file without scores.
    """
    if base_model is not None:
        try:
            validate_repo_id(base_model)
        except HFValidationError as error:
            raise UserError(f"--base-model {base_model!r} is no model of the Hub: give OWNER/NAME") from error
        if base_model.count("/") != 1:
            raise UserError(f"--base-model {base_model!r} is no model of the Hub: give OWNER/NAME")
    return CardInputs(base_model, None if results is None else read_results(results))


def read_results(path: Path) -> dict[str, Any]:
    """The scores that `grace eval` wrote, from the file or the directory that holds it.

    Raises:
        UserError: absent, not JSON, or a task without a score.
    """
    file = path / RESULTS if path.is_dir() else path
    try:
        results = json.loads(read_text(file))
        tasks = results["tasks"]
        for name, task in tasks.items():
            if not isinstance(name, str) or not math.isfinite(task["score"]):
                raise ValueError(f"{name} has no score")
        if not tasks:
            raise ValueError("no tasks")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{file} holds no scores ({error!r}): give what `grace eval` wrote") from error
    return results
