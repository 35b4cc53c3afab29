"""Compiles a Triton kernel for a GPU that need not be there: the interpreter accepts what the compiler may not."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SCRIPT = """
import json, re, subprocess, sys, tempfile
from importlib import import_module
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
module, name, types, settings, options, aligned = json.loads(sys.argv[1])
kernel = getattr(import_module(module), name)
found = []
for constants, option in zip(settings, options):
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_ptr") else "fp32")
                 for name in kernel.arg_names}
    attributes = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names)
                  if name in aligned and name not in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=option)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\\d+)", text)[1]) for key in ("REG", "STACK"))
    found.append([registers, stack, compiled.metadata.shared, compiled.asm["ptx"].count("mma.sync") +
                  compiled.asm["ptx"].count("wgmma.mma_async")])
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Resources:
    """What a compiled program takes: registers and bytes of spilt ones per thread, bytes of shared memory."""

    registers: int
    spilt: int
    shared: int
    matmuls: int  # tensor-core instructions


def compile_kernel(
    module: str,
    name: str,
    types: Mapping[str, str],
    settings: Sequence[Mapping[str, bool | int]],
    options: Sequence[Mapping[str, int]] | None = None,
    aligned: Sequence[str] = (),
) -> list[Resources]:
    """Compiles a kernel for sm_90 with each of `settings`, its constants.

    Args:
        types: Triton's names of the arguments' types; pointers are to float32 and numbers float32 otherwise.
        options: warps and stages of each; 16 warps otherwise.
        aligned: arguments that are multiples of 16.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    options = options or [{"num_warps": 16}] * len(settings)
    task = json.dumps([module, name, types, settings, options, aligned])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, task], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [Resources(*figures) for figures in json.loads(result.stdout.splitlines()[-1])]
