"""Model directories with random weights for benchmarks, with the small world's tokenizer and image processor.

Of a published shape's vocabulary that tokenizer knows the first 512 entries; the others are text of no length.
"""

import shutil
from pathlib import Path

from grace.models.tiny import build_processor, build_tokenizer
from grace.runtime.synthetic import SyntheticModel


def write_published_shape(name: str, directory: Path, packed: bool) -> Path:
    """A model of one of `grace.runtime.synthetic.NAMES`: packed as AWQ, or its dense twin in bfloat16."""
    twin = directory.with_name(f"{directory.name}-twin")
    SyntheticModel(name).write(*((directory, twin) if packed else (twin, directory)))
    shutil.rmtree(twin)
    build_processor(build_tokenizer()).save_pretrained(directory)
    return directory
