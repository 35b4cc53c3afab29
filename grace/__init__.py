"""GRACE: small vision-language models trained at 4 bits, exported code for code.

Importing this package is cheap: nothing here pulls in torch, transformers or any other
heavy library. Sub-modules import what they need.
"""

__version__ = "0.1.0"
