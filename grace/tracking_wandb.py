"""The W&B side of a run: history, histograms, the sample table, artifacts.

Every call into W&B is guarded: whatever it raises is told on stderr and training goes on. Nothing here is
called before `start` succeeded, and nothing but `start` imports wandb.
"""

import math
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from grace.files import write_text

ID_FILE = "wandb_id.txt"
_MODEL_TEXT = (".json", ".jinja", ".md", ".txt", ".yaml")  # sent even where the weights stay here

# Bin edges of the histograms by metric: (low, high) of equal bins.
Edges = Mapping[str, tuple[float, float]]


def start(run_dir: Path, mode: str, project: str, config: Mapping[str, Any]) -> Any:
    """The W&B run, new or continued; None if W&B will not have it.

    An agent of a sweep gives the id of the run; else it is the one in `wandb_id.txt`, or a new one.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_DATA_DIR", str(run_dir.resolve() / "wandb"))  # pictures too stay in the run
    id_file = run_dir / ID_FILE
    given = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    try:
        import wandb

        run_id = given or (id_file.read_text().strip() if id_file.exists() else uuid.uuid4().hex[:8])
        write_text(id_file, run_id)
        return wandb.init(
            project=project,
            mode=cast(Any, mode),
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
        )
    except Exception as error:  # noqa: BLE001 - W&B raises many types; training must not depend on it
        reason = " ".join(str(error).split())
        print(f"W&B is not available ({reason}); training goes on without it", file=sys.stderr)
        return None


def guarded(send: Callable[[], Any]) -> None:
    """Calls `send`; a failure is told, and that is all."""
    try:
        send()
    except Exception as error:  # noqa: BLE001 - see `start`
        reason = " ".join(str(error).split())
        print(f"W&B refused a log ({reason}); training goes on", file=sys.stderr)


def log(run: Any, step: int, values: Mapping[str, Any], edges: Edges) -> None:
    """Values by name; lists become histograms between their `edges`, and what is not known is left out."""

    def send() -> None:
        shown = {}
        for name, value in values.items():
            if isinstance(value, Sequence):
                shown[name] = _histogram(value, *edges[name])
            elif value is not None:
                shown[name] = value
        run.log(shown, step=step)

    guarded(send)


def _histogram(shares: Sequence[float], low: float, high: float) -> Any:
    import numpy as np
    import wandb

    return wandb.Histogram(np_histogram=(np.asarray(shares), np.linspace(low, high, len(shares) + 1)))


def log_samples(run: Any, step: int, rows: Sequence[Sequence[Any]]) -> None:
    """A table of (image, question, answer, prediction)."""

    def send() -> None:
        import wandb

        table = wandb.Table(columns=["image", "question", "answer", "prediction"])
        for image, *texts in rows:
            table.add_data(wandb.Image(image) if image is not None else None, *texts)
        run.log({"samples": table}, step=step)

    guarded(send)


def log_artifact(
    run: Any,
    kind: str,
    files: Sequence[Path],
    metadata: Mapping[str, Any] | None = None,
    references: Sequence[Path] = (),
) -> None:
    """An artifact `KIND-RUNID` of some files; `references` are named in it, with their size, and stay where they are."""

    def send() -> None:
        import wandb

        artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind, metadata=_plain(dict(metadata or {})))
        for file in files:
            artifact.add_file(str(file), name=file.name)
        for file in references:  # no checksum: reading gigabytes again would take minutes
            artifact.add_reference(file.resolve().as_uri(), name=file.name, checksum=False)
        run.log_artifact(artifact)

    guarded(send)


def log_model(run: Any, directory: Path, metadata: Mapping[str, Any], upload: bool) -> None:
    """The finished model as an artifact: its small files, and its weights either uploaded or referred to."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    small = [path for path in files if path.suffix in _MODEL_TEXT]
    large = [path for path in files if path not in small]
    qat = directory / "grace_qat"
    large += sorted(qat.glob("*.safetensors"))
    small += sorted(qat.glob("*.json"))
    log_artifact(run, "model", [*small, *(large if upload else [])], metadata, [] if upload else large)


def _plain(value: Any) -> Any:
    """What JSON can hold: paths as text, numbers that are not finite as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
