"""python benchmarks/pack_2b.py [--format NAME]... [--bits 8] [--latents] [--folder DIR]

What packing a 2B model costs, format by format (default: all): a QAT checkpoint with the shapes of
Qwen3-VL-2B and random codes is written to a temporary folder (10 GB; 16 GB with `--latents`, the checkpoint
a run ends with) and packed in a fresh process for each format. Bound: 20 s on 2 cores, 1.5 GB resident.
Counted: reading and checking the checkpoint (its SHA-256 included), packing, writing. Not counted: the
parity gate, which runs the model itself.

Prints a table and, last, one line of JSON.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import high_water, machine, report

from grace.checkpoint import QAT_FOLDER
from grace.export.fit import BITS
from grace.export.pack import FORMATS
from grace.export.stream import Entry, write_safetensors
from grace.files import sha256_of
from grace.models import qwen3vl
from grace.models.tiny import build_processor, build_tokenizer

BASE = "Qwen/Qwen3-VL-2B-Instruct"
GROUP_SIZE = 128
SECONDS, GIGABYTES = 20.0, 1.5


def write_checkpoint(folder: Path, bits: int, latents: bool) -> None:
    """A QAT directory of 2B shapes: W_hat and the rest in fp32, as a run saves it, all of it noise."""
    config = qwen3vl.config_for(BASE)
    model = qwen3vl.skeleton(config)
    linears = qwen3vl.decoder_linears(model)
    noise = torch.randn(2**22)
    half, spread = 2 ** (bits - 1), 0.4 * 2 ** (bits - 1)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        return noise.repeat(-(-torch.Size(shape).numel() // len(noise)))[: torch.Size(shape).numel()].view(
            shape
        )

    dense, state = [], []
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            shape = tuple(tensor.shape)
            dense.append(Entry(name, torch.float32, shape, lambda shape=shape: random(shape)))
    for name, layer in linears.items():
        codes, scales = (
            (layer.out_features, layer.in_features),
            (layer.out_features, layer.in_features // GROUP_SIZE),
        )
        state += [
            Entry(
                f"{name}.codes",
                torch.int8,
                codes,
                lambda s=codes: (random(s) * spread).clamp_(-half, half - 1).to(torch.int8),
            ),
            Entry(
                f"{name}.scales", torch.bfloat16, scales, lambda s=scales: (random(s).abs() + 1).bfloat16()
            ),
        ]
        if latents:
            state += [
                Entry(f"{name}.latent", torch.float32, codes, lambda s=codes: random(s)),
                Entry(f"{name}.theta", torch.float32, scales, lambda s=scales: random(s)),
            ]
    write_safetensors(folder / "model.safetensors", dense, {"format": "pt"})
    config.save_pretrained(folder)
    build_processor(build_tokenizer()).save_pretrained(folder)
    (folder / QAT_FOLDER).mkdir()
    write_safetensors(folder / QAT_FOLDER / "state.safetensors", state, {})
    info = {
        "format_version": 1,
        "bits": bits,
        "group_size": GROUP_SIZE,
        "modules": sorted(linears),
        "state_sha256": sha256_of(folder / QAT_FOLDER / "state.safetensors"),
    }
    (folder / QAT_FOLDER / "info.json").write_text(json.dumps(info))


def pack(name: str, source: Path, out: Path) -> dict[str, float]:
    """Packs `source` into the new directory `out`: seconds by phase and the peak resident memory."""
    from grace.export.pack import writer
    from grace.export.source import open_source
    from grace.files import new_directory

    module = writer(name)
    start, cpu = time.perf_counter(), time.process_time()
    opened = open_source(source)
    opened_at = time.perf_counter()
    with new_directory(out) as scratch:
        module.write(opened, scratch)
        written_at = time.perf_counter()
    end = time.perf_counter()
    return {
        "read_and_check_s": opened_at - start,
        "pack_and_write_s": written_at - opened_at,
        "sync_s": end - written_at,
        "total_s": end - start,
        "cpu_s": time.process_time() - cpu,  # without what a busy machine adds
        "peak_resident_gb": high_water() / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", action="append", choices=FORMATS, help="default: all that hold the bits")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--latents", action="store_true", help="with fp32 latents, as a run leaves them")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--pack", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pack:
        name, source, out = args.pack
        print(json.dumps(pack(name, Path(source), Path(out))))
        return
    formats: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "qat"
        source.mkdir()
        write_checkpoint(source, args.bits, args.latents)
        for name in args.format or [name for name, bits in BITS.items() if args.bits in bits]:
            os.sync()  # or what is still on its way to the disk would be waited for by the packer
            out = Path(folder) / name
            command = [sys.executable, __file__, "--pack", name, str(source), str(out)]
            figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            figures["written_gb"] = sum(path.stat().st_size for path in out.iterdir()) / 1e9
            figures["met"] = figures["total_s"] <= SECONDS and figures["peak_resident_gb"] <= GIGABYTES
            formats[name] = figures
            shutil.rmtree(out)
    columns = list(next(iter(formats.values())))
    print(f"{'':18}", *(f"{column:>17}" for column in columns))
    for name, figures in formats.items():
        print(
            f"{name:18}", *(f"{figures[column]:17.2f}" for column in columns[:-1]), f"{figures['met']!s:>17}"
        )
    met = all(figures["met"] for figures in formats.values())
    print(f"bound: {SECONDS:g} s, {GIGABYTES:g} GB resident: {'met' if met else 'MISSED'}")
    about = {
        "benchmark": "pack_2b",
        "bits": args.bits,
        "latents": args.latents,
        **machine(),
        "transformers": transformers.__version__,
        "met": met,
    }
    report(about | {"formats": formats}, args.out)


if __name__ == "__main__":
    main()
