"""`grace quantize MODEL --out DIR`: round to nearest, without training, onto the grid that training uses.

The baseline that every trained model is measured against, and the point from which its training starts:
per group the scale of least squared error (or that of the largest weight), snapped, then codes
(`grace.quant.grid`). Weights are read, rounded and written tensor by tensor; of the whole model only the
scales stay in memory. What is written goes through the same formats and the same gate as a trained model.

Shape suffixes: O output features, I input features, G groups along the input.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from grace.checked_files import damage_of, reading, require_regular
from grace.checkpoint import QatState, QuantizedWeight, is_qat
from grace.data.records import Record, load_records
from grace.errors import UserError
from grace.export.awq import AWQ_MODULES
from grace.export.card_inputs import NOTHING, CardInputs, card_inputs
from grace.export.contents import PACKING_KEYS, ROUNDED, Modules, Source
from grace.export.fit import BITS, fitted, require_bits
from grace.export.pack import publish, writer
from grace.export.progress import progress
from grace.export.reference import Reference
from grace.export.shards import Weights
from grace.export.tensor_check import require_tensors
from grace.files import require_free
from grace.models import qwen3vl
from grace.models.config_check import read_config
from grace.quant import grid
from grace.runtime.generate import require_tokenizer

METHODS = ("rtn", "awq", "gptq")
GROUP_SIZES = (32, 64, 128)
SCALES = {"mse": grid.init_theta, "absmax": grid.absmax_theta}
RECIPE = "export/llm_compressor.py"  # for the methods that are not ours
PARITY_RECORDS = 16
_QUANTIZED = "is quantized already: give the full-precision model it came from"


def run_quantize(args: argparse.Namespace) -> int:
    """Entry point of `grace quantize`."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    records = load_records(Path(args.parity_data)) if args.parity_data else None
    report = quantize_model(
        Path(args.model),
        Path(args.out),
        args.bits,
        args.group_size,
        args.method,
        args.scales,
        args.format,
        records,
        args.max_shard_size,
        card_inputs(args.base_model, args.results),
    )
    for written in report["formats"].values():
        print(f"wrote {written['path']}", file=sys.stderr)
    if args.json:
        print(json.dumps(report))
    return 0


def quantize_model(
    model: Path,
    out: Path,
    bits: int = 4,
    group_size: int = 128,
    method: str = "rtn",
    scales: str = "mse",
    formats: Sequence[str] | None = None,
    parity_records: Sequence[Record] | None = None,
    max_shard_bytes: int | None = None,
    card: CardInputs = NOTHING,
) -> dict[str, Any]:
    """Rounds the decoder linears of a full-precision model and writes it in one or several formats.

    Args:
        model: a plain Hugging Face directory; a finished run without `quant.bits` will do too.
        scales: a key of `SCALES`.
        formats: of `grace.export.pack.FORMATS`; None takes the one that serves these bits.
        parity_records: compares logits and answers as well, for which the model is loaded whole; None
            compares what was written bit for bit.
        card: what the model card cannot know from the model.

    Returns:
        As `grace.export.pack.export_run`.

    Raises:
        UserError: the model, the method, the formats or the output directory are unusable.
        RuntimeError: the parity gate failed; nothing was published.
    """
    if method != "rtn":
        raise UserError(
            f"--method {method} is not done here but by llm-compressor, in an environment of its own: "
            f"python {RECIPE} {model} --method {method} --data FILE.json --out DIR"
        )
    formats = tuple(dict.fromkeys(formats or (default_format(bits),)))
    for name in formats:
        writer(name)
        require_bits(name, bits)
    require_free(out)
    source = rounded_source(model, bits, group_size, scales)
    reference = None
    if parity_records is not None:
        reference = Reference(source, parity_records[:PARITY_RECORDS])
    written = publish({name: fitted(source, name) for name in formats}, out, reference, max_shard_bytes, card)
    return {"source": str(model), "method": method, "scales": scales, "formats": written}


def default_format(bits: int) -> str:
    """What serves a model of so many bits most widely."""
    return next((name for name in ("awq", "compressed-tensors") if bits in BITS[name]), "qat")


def rounded_source(model: Path, bits: int, group_size: int, scales: str = "mse") -> Source:
    """A full-precision directory as if it had been trained at few bits: its weights, rounded to nearest.

    Raises:
        UserError: no such model, one that is quantized already, or weights that do not fit its config.
    """
    with reading(model):
        directory = _find_plain(model)
        require_regular(directory)
        config = read_config(directory)
    built = qwen3vl.config_of(config, directory)
    with damage_of(directory, "download it again"):
        weights = Weights(directory)
    require_tokenizer(directory)
    require_tensors(directory, config, weights, qwen3vl.parameter_shapes(built))
    names = list(qwen3vl.decoder_linears(qwen3vl.skeleton(built)))
    for name in names:
        inputs = weights.shapes[f"{name}.weight"][1]
        if inputs % group_size:
            raise UserError(
                f"{name} has {inputs} inputs, no multiple of {group_size}: choose another --group-size"
            )
    modules = RoundedModules(directory, weights, names, bits, group_size, scales)
    info = {"base_model": directory.resolve().name, "rounded": {"scales": scales}, "metrics": {}}
    return Source(directory, QatState(bits, group_size, modules, info), config, weights, ROUNDED)


class RoundedModules(Modules):
    """The linears of a full-precision model at few bits: scales found once, codes made when asked for.

    Raises:
        UserError: a weight that holds NaN or infinite values.
    """

    def __init__(
        self, where: Path, weights: Weights, names: list[str], bits: int, group_size: int, scales: str
    ):
        shapes = {name: cast(tuple[int, int], weights.shapes[f"{name}.weight"]) for name in names}
        super().__init__(
            where,
            shapes,
            bits,
            group_size,
            lambda name: self[name].codes_OI,
            lambda name: (self._scales[name], None),
        )
        self.weights = weights
        self._last: tuple[str, QuantizedWeight] | None = None
        self._scales: dict[str, Tensor] = {}
        with progress(f"scales ({scales})", sum(self._bytes(name) for name in names)) as advance:
            for name in names:
                try:
                    theta_OG = SCALES[scales](weights.read(f"{name}.weight"), group_size, bits)
                except ValueError as error:
                    raise UserError(
                        f"{name} cannot be rounded ({error}): download the model again"
                    ) from error
                self._scales[name] = grid.snapped_scale(theta_OG).bfloat16()
                advance(self._bytes(name))

    def __getitem__(self, name: str) -> QuantizedWeight:
        """Codes and scales of one linear, with the latents that training would start from."""
        if self._last is None or self._last[0] != name:
            latent_OI = self.weights.read(f"{name}.weight").float()
            theta_OG = self._scales[name].float().log()
            codes_OI, scales_OG = grid.quantize(latent_OI, theta_OG, self.group_size, self.bits)
            self._last = name, QuantizedWeight(codes_OI, scales_OG, latent_OI, theta_OG)
        return self._last[1]

    def _bytes(self, name: str) -> int:
        outputs, inputs = self.shapes[name]
        return outputs * inputs * self.weights.dtypes[f"{name}.weight"].itemsize


def _find_plain(model: Path) -> Path:
    """The directory with the weights, of a run or a model.

    Raises:
        UserError: neither, or a model that has no full-precision weights any more.
    """
    directory = model / "model" if (model / "model").is_dir() else model
    if is_qat(directory):
        raise UserError(
            f"{directory} was trained at few bits, its codes are not to be made anew: use `grace export`"
        )
    if any(directory.glob("*.gguf")) or (directory / AWQ_MODULES).exists():
        raise UserError(f"{directory} {_QUANTIZED}")
    if not (directory / "config.json").is_file():
        raise UserError(
            f"{model} is no Qwen3-VL directory: give one with config.json and weights, as `hf download` leaves it"
        )
    if set(PACKING_KEYS) & set(read_config(directory)):
        raise UserError(f"{directory} {_QUANTIZED}")
    return directory
