"""python tests/interop/gguf_llama_cpp.py RUN [--records N] [--folder DIR]

Exports RUN to GGUF and asks llama.cpp (llama-cpp-python, built from source on the first call: minutes, a C++
compiler) the questions of its validation data, with pictures through libmtmd and without. Compared with
the trained model in fp32: prompt tokens, greedy tokens, logits at every step. The model card's Python is
run as it stands there.

Two files are asked. `deployed` is the export; llama.cpp rounds activations to 8 bits before a Q4_0 or Q8_0
product, to bfloat16 before a bfloat16 one, so that its logits differ by that noise. `widened` is the same
export with every tensor expanded to float32 by the gguf package's own dequantizer: what differs there is
names, rotation, deepstack or preprocessing, and must be rounding only.

Prints a table and, last, one line of JSON; exits with 1 where a bound is missed.
"""

import ctypes
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGES = ("llama-cpp-python==0.3.36",)
WIDENED_LIMIT = (
    5e-3  # of the largest logit: llama.cpp tabulates GELU in fp16 and uses its tanh form in mergers
)
DEPLOYED_LIMIT = 0.1
MAX_TOKENS = 16


def main() -> int:
    from environment import (
        arguments,
        card_blocks,
        python_of,
        report,
        run_card,
        run_inside,
        trained_answers,
    )

    from grace.export.pack import export_run

    args = arguments(__doc__)
    python = python_of("llama-cpp", PACKAGES, args.folder)
    with tempfile.TemporaryDirectory() as name:
        source, ours = trained_answers(args.run, args.records, Path(name))
        export = Path(name) / "deployed"
        export_run(args.run, export, ("gguf",))
        (card,) = card_blocks(export, "python")
        said = run_card(python, card, export)
        print(f"the card's Python says: {said.strip()}")
        widened = Path(name) / "widened"
        widened.mkdir()
        for path in export.glob("*.gguf"):
            widen(path, widened / path.name)
        questions = [{key: answer[key] for key in ("text", "image")} for answer in ours]
        asked = Path(name) / "questions.json"
        asked.write_text(json.dumps(questions))
        result: dict[str, Any] = {"reader": PACKAGES[0], "bits": source.qat.bits}
        for kind, directory in (("deployed", export), ("widened", widened)):
            theirs = run_inside(python, __file__, directory, asked)["answers"]
            result["prompt_tokens_identical"] = result.get("prompt_tokens_identical", True) and all(
                unpadded(mine["ids"]) == unpadded(other["ids"])
                for mine, other in zip(ours, theirs, strict=True)
            )
            print(kind)
            result[kind] = {}
            report(result[kind], theirs, ours)
    result["met"] = result["prompt_tokens_identical"] and all(
        result[kind][what]["largest_relative"] <= limit
        for kind, limit in (("deployed", DEPLOYED_LIMIT), ("widened", WIDENED_LIMIT))
        for what in ("image", "text")
    )
    print(json.dumps(result))
    return 0 if result["met"] else 1


def unpadded(ids: list[int]) -> list[int]:
    """Token ids with a run of equal ones (the places of a picture) counted once."""
    return [token for i, token in enumerate(ids) if i == 0 or token != ids[i - 1]]


def widen(source: Path, target: Path) -> None:
    """Copies a GGUF file with every tensor as float32, expanded by the gguf package."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = field.contents()
        if field.name == "general.file_type":
            value = int(gguf.LlamaFileType.ALL_F32)
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        wide = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, wide.reshape(tuple(int(n) for n in reversed(tensor.shape))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------- the other half, without GRACE


class LlamaCpp:
    """A language model and its vision tower in llama.cpp, asked greedily."""

    def __init__(self, directory: Path):
        import llama_cpp  # pyright: ignore[reportMissingImports]
        from llama_cpp import mtmd_cpp  # pyright: ignore[reportMissingImports]

        self.lib, self.mtmd = llama_cpp, mtmd_cpp
        (text,) = directory.glob("model-*.gguf")
        self.llama = llama_cpp.Llama(
            str(text), n_ctx=512, n_batch=512, n_threads=1, type_k=0, type_v=0, verbose=False
        )
        options = mtmd_cpp.mtmd_context_params_default()
        options.use_gpu, options.n_threads, options.warmup = False, 1, False
        options.image_min_tokens = 1  # the small world's pictures have fewer than llama.cpp's usual least
        path = str(directory / "mmproj-BF16.gguf").encode()
        self.vision = mtmd_cpp.mtmd_init_from_file(path, self.llama._model.model, options)
        if not self.vision:
            raise RuntimeError("libmtmd cannot load the vision tower")
        self.marker = mtmd_cpp.mtmd_default_marker().decode()

    def chunks(self, text: str, image: str | None) -> Any:
        """Tokenizes a prompt whose picture stands between vision marks."""
        mtmd = self.mtmd
        text = re.sub(r"<\|vision_start\|>(<\|image_pad\|>)+<\|vision_end\|>", self.marker, text)
        raw = text.encode()
        given = mtmd.mtmd_input_text(text=raw, text_len=len(raw), add_special=False, parse_special=True)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)()
        if image is not None:
            bitmaps[0] = mtmd.mtmd_helper_bitmap_init_from_file(self.vision, image.encode(), False)
        chunks = mtmd.mtmd_input_chunks_init()
        count = 0 if image is None else 1
        if mtmd.mtmd_tokenize(self.vision, chunks, ctypes.byref(given), bitmaps, count):
            raise RuntimeError(f"libmtmd cannot tokenize {text!r}")
        return chunks

    def ids(self, chunks: Any, pad: int) -> list[int]:
        """Token ids of a prompt, `pad` standing for a picture."""
        found: list[int] = []
        for index in range(self.mtmd.mtmd_input_chunks_size(chunks)):
            chunk = self.mtmd.mtmd_input_chunks_get(chunks, index)
            count = ctypes.c_size_t()
            tokens = self.mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
            found += [tokens[i] for i in range(count.value)] if tokens else [pad]
        return found

    def ask(self, text: str, image: str | None) -> dict[str, Any]:
        """Greedy tokens and the logits that each was taken from."""
        lib, context = self.lib, self.llama._ctx.ctx
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        chunks, past = self.chunks(text, image), lib.llama_pos()
        (pad,) = self.llama.tokenize(b"<|image_pad|>", add_bos=False, special=True)
        ids = self.ids(chunks, pad)
        if self.mtmd.mtmd_helper_eval_chunks(
            self.vision, context, chunks, 0, 0, 512, True, ctypes.byref(past)
        ):
            raise RuntimeError("llama.cpp cannot evaluate the prompt")
        vocab = lib.llama_model_get_vocab(self.llama._model.model)
        size = lib.llama_vocab_n_tokens(vocab)
        tokens, logits = [], []
        while len(tokens) < MAX_TOKENS and not (tokens and lib.llama_vocab_is_eog(vocab, tokens[-1])):
            if tokens:
                self.step(tokens[-1], past.value + len(tokens) - 1)
            row = lib.llama_get_logits_ith(context, -1)[:size]
            logits.append(list(row))
            tokens.append(max(range(size), key=row.__getitem__))
        self.mtmd.mtmd_input_chunks_free(chunks)
        return {"ids": ids, "tokens": tokens, "logits": logits}

    def step(self, token: int, position: int) -> None:
        batch = self.lib.llama_batch_init(1, 0, 1)
        batch.n_tokens, batch.token[0], batch.pos[0] = 1, token, position
        batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, 0, True
        if self.lib.llama_decode(self.llama._ctx.ctx, batch):
            raise RuntimeError("llama.cpp cannot decode a token")
        self.lib.llama_batch_free(batch)


def inside(directory: Path, questions: Path) -> None:
    model = LlamaCpp(directory)
    answers = [model.ask(item["text"], item["image"]) for item in json.loads(questions.read_text())]
    print(json.dumps({"answers": answers}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())
