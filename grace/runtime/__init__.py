"""INT4 inference. Importing this package lets transformers load AWQ directories by itself:

    import grace.runtime
    model = AutoModelForImageTextToText.from_pretrained("runs/demo/awq")

gives a model whose decoder is made of `Int4Linear` layers.
"""

from grace.runtime.hf_quantizer import register
from grace.runtime.int4_linear import Int4Linear, int4_linears, set_kernel

register()

__all__ = ["Int4Linear", "int4_linears", "set_kernel"]
