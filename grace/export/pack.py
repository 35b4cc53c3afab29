"""`grace export RUN --out DIR [--format awq|qat]`: publishes a trained model, codes and scales untouched.

The integer codes and scales of the QAT checkpoint are the ones written; nothing is quantized here. A
parity gate runs on the written files before they get their final name: if the packed model is not the
trained one, nothing is published.
"""

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from grace.checkpoint import QAT_FOLDER, QatState, QuantizedWeight, copy_verbatim_files
from grace.data.audit_list import list_path, read_list
from grace.data.faults import Policies
from grace.data.records import Record, load_records
from grace.errors import UserError
from grace.export import awq, parity
from grace.export.model_card import model_card
from grace.export.source import AWQ_MODULES, WEIGHTS, Source, StoredModules, open_source
from grace.export.stream import Entry, TensorFile, write_safetensors
from grace.files import new_directory, require_free
from grace.kernels.awq_layout import PER_WORD
from grace.quant.grid import dequantize
from grace.recipe_parts import paths_of

FORMATS = ("awq", "qat")
PARITY_RECORDS = 16
# Both names: transformers matches anchored paths, vLLM and SGLang substrings (DESIGN section 6).
NOT_CONVERTED = ["visual", "model.visual", "lm_head"]


def run_export(args: argparse.Namespace) -> int:
    """Entry point of `grace export`."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    records = load_records(Path(args.parity_data)) if args.parity_data else None
    report = export_run(Path(args.run), Path(args.out), tuple(args.format or ("awq",)), records)
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
) -> dict[str, Any]:
    """Exports a finished quantized run.

    Args:
        source: a run directory, or its `model/`.
        out: the new directory; with several formats, its sub-directories are named after them.
        formats: of `FORMATS`.
        validation_records: what the parity gate compares on; None takes the recipe's validation data
            (its training data if it has none).
        image_root: where the images of the recipe's data are; None takes the recipe's own.

    Returns:
        `{"source", "formats": {name: {"path", "modules", "bits", "group_size", "parity"}}}`, JSON-able.

    Raises:
        UserError: the source, the output directory, the formats or the parity data are unusable.
        RuntimeError: the parity gate failed; nothing was published.
    """
    source, out, formats = Path(source), Path(out), tuple(dict.fromkeys(formats))
    _check_formats(formats)
    require_free(out)
    opened = open_source(source)
    if "awq" in formats:
        _require_awq_bits(opened.qat)
    records = parity_records(opened, validation_records, image_root) if "awq" in formats else []
    report: dict[str, Any] = {"source": str(source), "formats": {}}
    with new_directory(out) as scratch:
        for name in formats:
            directory, final = (scratch, out) if len(formats) == 1 else (scratch / name, out / name)
            directory.mkdir(exist_ok=True)
            if name == "awq":
                write_awq(opened, directory)
                figures = parity.check(opened, directory, records)
            else:
                copy_qat(opened, directory)
                figures = check_weights(opened, directory)
            print(parity.describe(name, figures), file=sys.stderr)
            (directory / "README.md").write_text(model_card(opened, name, figures), encoding="utf-8")
            report["formats"][name] = {
                "path": str(final), "modules": len(opened.qat.modules), "bits": opened.qat.bits,
                "group_size": opened.qat.group_size, "parity": figures,
            }  # fmt: skip
    return report


def _check_formats(formats: Sequence[str]) -> None:
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise UserError(f"unknown format {', '.join(unknown) or '(none)'}: choose from {', '.join(FORMATS)}")


def _require_awq_bits(qat: QatState) -> None:
    if qat.bits != awq.BITS:
        raise UserError(f"AWQ holds 4 bits only and this run has {qat.bits}: export it with --format qat")


def parity_records(
    source: Source, given: Sequence[Record] | None, image_root: str | Path | None
) -> list[Record]:
    """The records that the gate compares on, read now so that a missing file stops before any work.

    Raises:
        UserError: none can be had; says how to name others.
    """
    if given is None:
        data = source.recipe.get("data") or {}
        if not data.get("path"):
            raise UserError(f"{source.directory} does not name its data: pass --parity-data FILE.json")
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


# ---------------------------------------------------------------- AWQ


def write_awq(source: Source, directory: Path) -> None:
    """Writes the deployment directory of DESIGN section 6, all but its README, one tensor at a time."""
    modules = cast(StoredModules, source.qat.modules)
    entries = _dense_entries(source)
    for name in modules:
        entries += _packed_entries(name, modules, source.qat.group_size)
    with _one_thread():
        write_safetensors(directory / WEIGHTS, entries, {"format": "pt"})
    _write_json(directory / "config.json", awq_config(source.config, source.qat.group_size))
    modules = {"bits": awq.BITS, "group_size": source.qat.group_size, "modules": sorted(source.qat.modules)}
    _write_json(directory / AWQ_MODULES, modules)
    copy_verbatim_files(source.directory, directory)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Packing waits for memory and disk: a second thread gains little, and on a busy machine costs much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _dense_entries(source: Source) -> list[Entry]:
    """Everything that is not quantized: floating tensors as bfloat16, others as they are."""
    tied, file = bool(source.config.get("tie_word_embeddings", False)), source.weights
    replaced = {f"{name}.weight" for name in source.qat.modules} | ({"lm_head.weight"} if tied else set())

    def pieces(name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        return (piece.to(dtype) for piece in file.pieces(name))

    entries = []
    for name, shape in file.shapes.items():
        if name not in replaced:
            dtype = torch.bfloat16 if file.dtypes[name].is_floating_point else file.dtypes[name]
            entries.append(Entry(name, dtype, shape, partial(pieces, name, dtype)))
    return entries


def _packed_entries(name: str, modules: StoredModules, group_size: int) -> list[Entry]:
    """The three AWQ tensors of one linear, each made when it is written."""
    out_features, in_features = modules.shapes[name]
    groups, words = in_features // group_size, out_features // PER_WORD

    def made(make: Callable[[QuantizedWeight], Tensor]) -> Tensor:
        weight = modules[name]
        try:
            awq.check_shapes(weight.codes_OI, weight.scales_OG, group_size)
            return make(weight)
        except ValueError as error:
            raise UserError(
                f"{name} cannot be written as AWQ ({error}): export it with --format qat"
            ) from error

    parts: list[tuple[str, torch.dtype, tuple[int, ...], Callable[[QuantizedWeight], Tensor]]] = [
        ("qweight", torch.int32, (in_features, words), lambda weight: awq.pack_codes(weight.codes_OI)),
        ("qzeros", torch.int32, (groups, words), lambda weight: awq.zero_words(weight.scales_OG)),
        ("scales", torch.float16, (groups, out_features), lambda weight: awq.pack_scales(weight.scales_OG)),
    ]
    return [Entry(f"{name}.{part}", dtype, shape, partial(made, make)) for part, dtype, shape, make in parts]


def awq_config(config: Mapping[str, Any], group_size: int) -> dict[str, Any]:
    """The model's config with bfloat16 as its type and the standard AWQ block."""

    def in_bfloat16(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            key: "bfloat16" if key in ("dtype", "torch_dtype") else in_bfloat16(item)
            for key, item in value.items()
        }

    block = {
        "quant_method": "awq",
        "bits": awq.BITS,
        "group_size": group_size,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": NOT_CONVERTED,
    }
    return {**in_bfloat16(config), "dtype": "bfloat16", "quantization_config": block}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- QAT


def copy_qat(source: Source, directory: Path) -> None:
    """The QAT checkpoint again, file by file, byte for byte."""
    for name in ("config.json", WEIGHTS):
        shutil.copyfile(source.directory / name, directory / name)
    copy_verbatim_files(source.directory, directory)
    shutil.copytree(source.directory / QAT_FOLDER, directory / QAT_FOLDER, copy_function=shutil.copyfile)


def check_weights(source: Source, directory: Path) -> dict[str, Any]:
    """Checks that the written W_hat of every quantized layer is exactly scale * code.

    Raises:
        RuntimeError: one is not.
    """
    written = TensorFile(directory / WEIGHTS)
    for name, weight in source.qat.modules.items():
        expected_OI = dequantize(weight.codes_OI, weight.scales_OG, source.qat.group_size)
        if not torch.equal(written.read(f"{name}.weight").float(), expected_OI):
            raise RuntimeError(f"parity: the weights of {name} are not scale * code; nothing was published")
    return {"codes_identical": True, "weights_identical": True, "modules": len(source.qat.modules)}
