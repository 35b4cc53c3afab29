"""What a model card says about each format: what is in the directory, how to load it, what to know.

`DIR` stands for the directory (or the repository on the Hub), `TYPE` and `WIDE` for GGUF's types, `ASK` for the code
below, `MADE` for where codes and scales come from.
"""

LIBRARY = {
    "awq": "transformers",
    "compressed-tensors": "transformers",
    "gguf": "gguf",
    "mlx": "mlx",
    "qat": "transformers",
}

FORMAT_TEXT = {
    "awq": "AWQ (`gemm` layout): integer codes and scales exactly as MADE, everything else bfloat16.",
    "compressed-tensors": "compressed-tensors (`pack-quantized`, symmetric, no zero points): integer codes and "
    "scales exactly as MADE, everything else bfloat16.",
    "gguf": "GGUF for llama.cpp: `model-*.gguf` is the language model, its quantized tensors written block by "
    "block from the MADE codes and scales (never re-quantized), `mmproj-*.gguf` the vision tower.",
    "mlx": "MLX (affine): integer codes and scales exactly as MADE, `biases` the scales times a power of "
    "two, everything else bfloat16.",
    "qat": "QAT checkpoint: a plain directory with the dequantized weights, and `grace_qat/` with the "
    "MADE integer codes, scales and fp32 latents, for further training or export.",
}

STORED_SCALES = {
    "awq": "fp16",
    "compressed-tensors": "bfloat16",
    "gguf": "fp16, repeated in every block of 32",
    "mlx": "bfloat16",
    "qat": "bfloat16",
}

LIMITED = (
    "It inherits the limits and biases of its base model and teacher, may describe what is not in a picture, and "
    "was measured only as listed above. The parity figures compare it with what it was made from, not with the "
    "full-precision model."
)

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

CITATION = """```bibtex
@inproceedings{chen2026gated,
  title = {Gated Relational Alignment via Confidence-based Distillation for Efficient VLMs},
  author = {Chen, Yanlong and Habibian, Amirhossein and Benini, Luca and Li, Yawei},
  booktitle = {International Conference on Machine Learning},
  year = {2026},
  url = {https://arxiv.org/abs/2601.22709}
}
```"""

# Goes on from `model`.
ASK = """And then (its processor needs `pip install pillow torchvision`):

```python
from PIL import Image
from transformers import AutoProcessor

processor = AutoProcessor.from_pretrained("DIR")
picture = Image.new("RGB", (256, 256), "red")  # or Image.open("picture.png")
question = [{"type": "image", "image": picture}, {"type": "text", "text": "What is in the picture?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": question}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs.to(model.device), max_new_tokens=64)
answer = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer)
```
"""

_ENGINES = """With vLLM or SGLang, then asked as any OpenAI server on their port (8000, 30000):

```
vllm serve DIR
python -m sglang.launch_server --model-path DIR
```
"""

LOAD = {
    "awq": f"""With GRACE, on a CPU, no other package needed:

```python
import grace.runtime  # registers the packed layers
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("DIR")
```

ASK

```
grace generate DIR --image picture.png --prompt "What is in the picture?"
```

With transformers and gptqmodel (`pip install gptqmodel`), without GRACE: the same without its first line.

{_ENGINES}""",
    "compressed-tensors": f"""With transformers (`pip install compressed-tensors`):

```python
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("DIR")
```

ASK

{_ENGINES}""",
    "gguf": """With llama.cpp:

```
llama-mtmd-cli -m DIR/model-TYPE.gguf --mmproj DIR/mmproj-WIDE.gguf --image picture.png -p "What is in the picture?"
llama-server -m DIR/model-TYPE.gguf --mmproj DIR/mmproj-WIDE.gguf
```

With llama-cpp-python (`pip install llama-cpp-python`), text alone:

```python
from llama_cpp import Llama

model = Llama("DIR/model-TYPE.gguf", n_ctx=4096, verbose=False)
reply = model.create_chat_completion([{"role": "user", "content": "What is in a picture?"}], max_tokens=64)
print(reply["choices"][0]["message"]["content"])
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

ASK

`grace export DIR --out OTHER --format awq` packs it for deployment; `student.path=DIR` trains it further.
""",
}
