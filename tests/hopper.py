"""Compiles a Triton kernel for a GPU that need not be there: the interpreter accepts what the compiler may not."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

SCRIPT = """
import json, sys
from importlib import import_module
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
module, name, types, settings = json.loads(sys.argv[1])
kernel = getattr(import_module(module), name)
for constants in settings:
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_ptr") else "fp32")
                 for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16})
    assert len(compiled.asm["cubin"]) > 0
"""


def compile_kernel(
    module: str, name: str, types: Mapping[str, str], settings: Sequence[Mapping[str, bool | int]]
) -> None:
    """Compiles a kernel for sm_90 with each of `settings`, its constants.

    Args:
        types: Triton's names of the arguments' types; pointers are to float32 and numbers float32 otherwise.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, json.dumps([module, name, types, settings])]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
