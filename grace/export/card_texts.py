"""What a model card says about each format: what is in the directory, how to load it, what to know."""

LIBRARY = {
    "awq": "transformers",
    "compressed-tensors": "transformers",
    "gguf": "gguf",
    "mlx": "mlx",
    "qat": "transformers",
}

FORMAT_TEXT = {
    "awq": "AWQ (`gemm` layout): integer codes and scales exactly as trained, everything else bfloat16.",
    "compressed-tensors": "compressed-tensors (`pack-quantized`, symmetric, no zero points): integer codes and "
    "scales exactly as trained, everything else bfloat16.",
    "gguf": "GGUF for llama.cpp: `model-*.gguf` is the language model, its quantized tensors written block by "
    "block from the trained codes and scales (never re-quantized), `mmproj-BF16.gguf` the vision tower.",
    "mlx": "MLX (affine): integer codes and scales exactly as trained, `biases` the scales times a power of "
    "two, everything else bfloat16.",
    "qat": "QAT checkpoint: a plain directory with the dequantized weights, and `grace_qat/` with the "
    "trained integer codes, scales and fp32 latents, for further training or export.",
}

# Of what was made from another export or another's checkpoint; SCALES stands for what became of them.
CONVERTED_TEXT = {
    "awq": "AWQ (`gemm` layout): the integer codes of the source and its SCALES, everything else as it was.",
    "compressed-tensors": "compressed-tensors (`pack-quantized`): the integer codes of the source and its SCALES, "
    "everything else as it was.",
    "gguf": "GGUF for llama.cpp: `model-*.gguf` is the language model, its quantized tensors written block by block "
    "from the integer codes of the source and its SCALES, `mmproj-*.gguf` the vision tower.",
    "mlx": "MLX (affine): the integer codes of the source and its SCALES, `biases` the scales times the zero points, "
    "everything else as it was.",
    "qat": "QAT checkpoint: a plain directory with the dequantized weights, and `grace_qat/` with the integer codes of "
    "the source and its SCALES, for further training or export. There are no fp32 latents.",
}

LIMITS = {
    "awq": "AWQ holds 4 bits only.",
    "compressed-tensors": "In bfloat16 a runtime rounds scale * code once, as training did.",
    "gguf": "llama.cpp rounds activations to 8 bits before its quantized products, so that its logits differ "
    "slightly from those above. It reads a picture with at least 8 visual tokens.",
    "mlx": "In bfloat16 a runtime rounds scale * code once, as training did.",
    "qat": "",
}

LOAD = {
    "awq": """With GRACE, on a CPU, no other package needed:

```python
import grace.runtime  # registers the packed layers
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("DIR")
```

```
grace generate DIR --image picture.png --prompt "What is in the picture?"
```

With transformers and gptqmodel (`pip install gptqmodel`), without GRACE: the same `from_pretrained`.

With vLLM or SGLang:

```
vllm serve DIR
python -m sglang.launch_server --model-path DIR
```
""",
    "compressed-tensors": """With transformers (`pip install compressed-tensors`):

```python
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("DIR")
```

With vLLM or SGLang:

```
vllm serve DIR
python -m sglang.launch_server --model-path DIR
```
""",
    "gguf": """With llama.cpp:

```
llama-mtmd-cli -m DIR/model-TYPE.gguf --mmproj DIR/mmproj-BF16.gguf --image picture.png -p "What is in the picture?"
llama-server -m DIR/model-TYPE.gguf --mmproj DIR/mmproj-BF16.gguf
```
""",
    "mlx": """With mlx-vlm (`pip install mlx-vlm`):

```
python -m mlx_vlm.generate --model DIR --image picture.png --prompt "What is in the picture?"
```
""",
    "qat": """As an ordinary model, without GRACE:

```python
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("DIR")
```

`grace export DIR --out OTHER --format awq` packs it for deployment; `student.path=DIR` trains it further.
""",
}
