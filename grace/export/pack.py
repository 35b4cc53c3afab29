"""`grace export RUN --out DIR [--format NAME]...`: publishes a trained model, codes and scales untouched.

The integer codes and scales that are read are the ones written; nothing is quantized here. RUN may also be an
export, or a checkpoint by others (`grace.export.source`); what a format cannot hold exactly it refuses
(`grace.export.fit`). A parity gate runs on the written files before they get their final name: if the packed
model is not the one that was read, nothing is published.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from grace.checkpoint import QAT_FOLDER
from grace.data.audit_list import list_path, read_list
from grace.data.faults import Policies
from grace.data.records import Record, load_records
from grace.errors import UserError
from grace.export import awq, compressed_tensors, mlx, parity, qat
from grace.export.card_inputs import NOTHING, CardInputs, card_inputs
from grace.export.contents import Source
from grace.export.fit import fitted
from grace.export.model_card import model_card
from grace.export.probe import probe_records, scraps
from grace.export.record import CARD, write_record
from grace.export.reference import Reference
from grace.export.source import open_source, read_back
from grace.files import new_directory, require_free
from grace.recipe_parts import paths_of

FORMATS = ("awq", "compressed-tensors", "gguf", "mlx", "qat")
PARITY_RECORDS = 16


def run_export(args: argparse.Namespace) -> int:
    """Entry point of `grace export`."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    records = load_records(Path(args.parity_data)) if args.parity_data else None
    card = card_inputs(args.base_model, args.results)
    report = export_run(
        Path(args.run),
        Path(args.out),
        tuple(args.format or ("awq",)),
        records,
        max_shard_bytes=args.max_shard_size,
        card=card,
    )
    for written in report["formats"].values():
        print(f"wrote {written['path']}", file=sys.stderr)
    if args.json:
        print(json.dumps(report))
    return 0


def export_run(
    source: Path,
    out: Path,
    formats: Sequence[str] = ("awq",),
    validation_records: Sequence[Record] | None = None,
    image_root: str | Path | None = None,
    max_shard_bytes: int | None = None,
    card: CardInputs = NOTHING,
) -> dict[str, Any]:
    """Exports a quantized model.

    Args:
        source: a run directory, its `model/`, an export, or another's quantized checkpoint.
        out: the new directory; with several formats, its sub-directories are named after them.
        formats: of `FORMATS`.
        validation_records: what the parity gate compares on; None takes the recipe's validation data
            (its training data if it has none), or noise where no recipe is known.
        image_root: where the images of the recipe's data are; None takes the recipe's own.
        max_shard_bytes: cuts the weights into files of at most this size; None writes one.
        card: what the model card cannot know from the source.

    Returns:
        `{"source", "kind", "formats": {name: {"path", "modules", "bits", "group_size", "parity"}}}`, JSON-able.

    Raises:
        UserError: the source, the output directory, the formats or the parity data are unusable.
        RuntimeError: the parity gate failed; nothing was published.
    """
    source, out, formats = Path(source), Path(out), tuple(dict.fromkeys(formats))
    for name in formats:
        writer(name)
    if not formats:
        raise UserError(f"no format: choose from {', '.join(FORMATS)}")
    require_free(out)
    opened = open_source(source)
    if out.resolve().is_relative_to((opened.directory / QAT_FOLDER).resolve()):
        raise UserError(f"{out} is a part of the checkpoint that is exported: choose another --out")
    fits = {name: fitted(opened, name) for name in formats}
    with scraps() as folder:
        reference = None
        if any(name != "qat" for name in formats):
            reference = Reference(opened, parity_records(opened, validation_records, image_root, folder))
        qat.require_consistent(opened)
        written = publish(fits, out, reference, max_shard_bytes, card)
    return {"source": str(source), "kind": opened.kind, "formats": written}


def publish(
    fits: Mapping[str, tuple[Source, float]],
    out: Path,
    reference: Reference | None,
    max_shard_bytes: int | None = None,
    card: CardInputs = NOTHING,
) -> dict[str, Any]:
    """Writes, gates and describes each format, and then shows the whole directory under its name.

    Args:
        fits: by format what it will hold, see `grace.export.fit`.
        reference: what packed formats are asked the same questions as; None compares their tensors alone.
        card: what the model card cannot know from the source.

    Returns:
        `{name: {"path", "modules", "bits", "group_size", "parity"}}`.

    Raises:
        UserError: the source cannot be written in a format, or the disk is full.
        RuntimeError: the parity gate failed; nothing was published.
    """
    report: dict[str, Any] = {}
    with new_directory(out) as scratch:
        for name, (source, rounding) in fits.items():
            directory, final = (scratch, out) if len(fits) == 1 else (scratch / name, out / name)
            directory.mkdir(exist_ok=True)
            writer(name).write(source, directory, max_shard_bytes)
            figures = gate(source, rounding, name, directory, reference)
            print(parity.describe(name, figures), file=sys.stderr)
            (directory / CARD).write_text(model_card(source, name, figures, card), encoding="utf-8")
            about = {
                "modules": len(source.qat.modules), "bits": source.qat.bits, "group_size": source.qat.group_size,
                "parity": figures,
            }  # fmt: skip
            write_record(directory, {"format": name, **about})
            report[name] = {"path": str(final), **about}
    return report


def writer(name: str) -> ModuleType:
    """The module of a format: `write(source, directory, max_shard_bytes)`.

    Raises:
        UserError: no such format.
        ModuleNotFoundError: it needs a package that is not installed.
    """
    if name == "gguf":
        from grace.export import gguf  # needs the gguf package, which nothing else here does

        return gguf
    modules = {"awq": awq, "compressed-tensors": compressed_tensors, "mlx": mlx, "qat": qat}
    if name not in modules:
        raise UserError(f"unknown format {name}: choose from {', '.join(FORMATS)}")
    return modules[name]


def gate(
    source: Source, rounding: float, name: str, directory: Path, reference: Reference | None
) -> dict[str, Any]:
    """The parity gate that fits a format; see `grace.export.parity`.

    Args:
        source: what the format was given, its scales rounded where it has no others.
        rounding: by how much, at most, relative to a scale.
        reference: the source itself; None where tensors alone are compared.

    Raises:
        RuntimeError: what was written is not that.
    """
    try:
        stored = read_back(directory, name)
    except UserError as error:
        raise RuntimeError(f"parity: {name} cannot be read back ({error}); nothing was published") from error
    if name == "qat":
        figures = qat.check(source, directory, stored.qat.modules)
        return {**figures, **({"scale_rounding": {"largest_relative": rounding}} if rounding else {})}
    if reference is None:
        return parity.check_tensors(source, stored)
    given = reference.rescaled(source) if rounding else reference
    figures = (
        parity.check_loaded(given, stored, directory) if name == "awq" else parity.check_filled(given, stored)
    )
    if rounding:
        moved = parity.compare_exact(reference.fp32.logits_TV, given.fp32.logits_TV)
        figures["scale_rounding"] = {
            "dtype": str(source.scale_dtype).removeprefix("torch."),
            "largest_relative": rounding,
            "logits_relative": moved["relative"],
        }
    return figures


def parity_records(
    source: Source, given: Sequence[Record] | None, image_root: str | Path | None, folder: Path
) -> list[Record]:
    """The records that the gate compares on, read now so that a missing file stops before any work.

    A source whose recipe is not known is asked about noise.

    Args:
        folder: a folder for pictures of noise.

    Raises:
        UserError: none can be had; says how to name others.
    """
    data = source.recipe.get("data") or {}
    if given is None and not data.get("path"):
        given = probe_records(folder)
    if given is None:
        files = paths_of(data["path"])
        path = data.get("validation_path") or files[0]
        root = image_root or data.get("image_root")
        try:
            policies = Policies(data.get("skip") or (), data.get("accept") or ())
            audit = read_list(list_path(files, data.get("audit"))) if policies.need_audit() else None
            left_out = audit.left_out(path, root, None, policies) if audit else {}
            given = load_records(Path(path), Path(root) if root else None, policies, left_out)
        except UserError as error:
            raise UserError(f"no parity samples ({error}): pass --parity-data FILE.json") from error
    if not given:
        raise UserError("the parity data holds no records: pass --parity-data FILE.json")
    chosen = list(given[:PARITY_RECORDS])
    missing = [image for record in chosen for image in record.images if not Path(image).is_file()]
    if missing:
        raise UserError(f"the parity samples' image {missing[0]} is missing: pass --parity-data FILE.json")
    return chosen
