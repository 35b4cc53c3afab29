"""INT4 inference. Importing this package lets transformers load AWQ directories by itself:

    import grace.runtime
    model = AutoModelForImageTextToText.from_pretrained("runs/demo/awq")

gives a model whose decoder is made of `Int4Linear` layers. The engine behind `grace generate` is faster:

    engine = grace.runtime.load("runs/demo/awq")
    engine.generate(["picture.png"], "Describe the picture.").text
"""

from grace.runtime.engine import Engine, load
from grace.runtime.hf_quantizer import register
from grace.runtime.int4_linear import Int4Linear, int4_linears, set_kernel

register()

__all__ = ["Engine", "Int4Linear", "int4_linears", "load", "set_kernel"]
