"""The layering of DESIGN section 2, read from the source with `ast`: imports inside functions count too."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "grace"

FLOOR = {"errors", "files", "progress", "arguments"}
LEAVES = {"config", "data", "models", "quant", "distill", "kernels", "checkpoint", "tracking"}
TRAINING = {"train", "run", "step", "parallel", "plan", "teacher_cache"}
ASSEMBLERS = TRAINING | {"export", "runtime", "evaluation"}
COMMANDS = {"cli", "demo", "study", "report", "__main__"}
# Files split off a part of another name.
BELONGS_TO = {
    "checkpoint_saver": "checkpoint", "checkpoint_files": "checkpoint", "resume_checkpoint": "checkpoint", "recipe_check": "config", "recipe_parts": "config",
    "plan_memory": "plan", "plan_text": "plan", "plan_modes": "plan", "run_save": "run", "run_data": "run", "run_files": "files", "checked_files": "files", "memory": "files",
    "run_info": "run", "validation": "run", "agreement": "run", "run_tasks": "run", "watch": "run", "preemption": "run", "step_inputs": "train", "step_stats": "step",
    "student": "step", "schedule": "train", "cache_settings": "teacher_cache", "tracking_wandb": "tracking",
    "parallel_fsdp": "parallel", "parallel_zero": "parallel",
    "cli_data": "cli", "cli_audit": "cli", "cli_eval": "cli", "cli_publish": "cli", "cli_runtime": "cli", "cli_serve": "cli",
}  # fmt: skip
# Leaves that may import another: models wrap linears with quant's module class.
BETWEEN_LEAVES = {("models", "quant")}

MAX_FILE_LINES = 310
MAX_FUNCTION_LINES = 60  # without the docstring

ROUNDING = {"round", "round_", "rint", "rint_"}
# Names of Hugging Face modules in other files: texts of a file format or a table, not ways into a model.
NAMED_ELSEWHERE = {
    ("grace/runtime/inspect.py", "model.language_model."),  # left out of the names it prints
}


@dataclass(frozen=True)
class Import:
    """One imported name of one line: `module` is absolute, `name` what is taken from it (or None)."""

    file: Path
    line: int
    module: str
    name: str | None

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.module}{f' ({self.name})' if self.name else ''}"


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to: `grace/data/batch.py` and `grace/data.py` are `data`."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return BELONGS_TO.get(name, name)


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file, at any depth; relative ones made absolute."""
    package = ["grace", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(path, node.lineno, module, alias.name)


def imported_part(item: Import) -> str | None:
    """The part of grace that an import reaches, None for other packages and `grace` itself."""
    names = item.module.split(".")
    if names[0] != "grace":
        return None
    if len(names) > 1:
        return BELONGS_TO.get(names[1], names[1])
    is_part = item.name and ((PACKAGE / item.name).is_dir() or (PACKAGE / f"{item.name}.py").is_file())
    return BELONGS_TO.get(item.name, item.name) if item.name and is_part else None


def all_imports() -> list[Import]:
    return [item for path in sources() for item in imports_of(path)]


def breaches(allowed: dict[str, set[str]]) -> list[str]:
    """Imports from a part in `allowed` to a part that is neither itself nor in its set."""
    found = []
    for item in all_imports():
        source, target = part_of(item.file), imported_part(item)
        if source in allowed and target is not None and target not in allowed[source] | {source}:
            found.append(str(item))
    return found


def test_every_part_has_a_layer():
    parts = {part_of(path) for path in sources()} - {"__init__"}
    assert parts <= FLOOR | LEAVES | ASSEMBLERS | COMMANDS


def test_the_floor_imports_nothing_of_grace():
    assert breaches(dict.fromkeys(FLOOR, FLOOR) | {"__init__": set()}) == []


def test_leaves_do_not_import_each_other():
    exceptions = {name: {target for source, target in BETWEEN_LEAVES if source == name} for name in LEAVES}
    assert breaches({name: FLOOR | exceptions[name] for name in LEAVES}) == []


def test_nothing_below_imports_the_commands():
    assert breaches(dict.fromkeys(ASSEMBLERS, FLOOR | LEAVES | ASSEMBLERS)) == []


def test_train_and_export_never_reach_each_other():
    graph: dict[str, set[str]] = {}
    for item in all_imports():
        graph.setdefault(part_of(item.file), set()).add(imported_part(item) or "")

    def reached(start: set[str]) -> set[str]:
        seen, todo = set(), list(start)
        while todo:
            part = todo.pop()
            if part not in seen:
                seen.add(part)
                todo.extend(graph.get(part, ()))
        return seen

    assert "export" not in reached(TRAINING)
    assert not TRAINING & reached({"export"})


def test_only_config_train_and_commands_know_recipes():
    found = [
        str(item)
        for item in all_imports()
        if item.name == "Recipe" and part_of(item.file) not in {"config"} | TRAINING | COMMANDS
    ]
    assert found == []


@pytest.mark.parametrize("part", ["quant", "distill"])
def test_numerics_never_import_transformers(part):
    found = [
        str(item)
        for item in all_imports()
        if part_of(item.file) == part and item.module.split(".")[0] == "transformers"
    ]
    assert found == []


def test_only_the_grid_rounds():
    """`round` of torch, numpy or Python, called or handed on, by any spelling."""
    found = []
    for path in sources():
        if path == PACKAGE / "quant" / "grid.py":
            continue
        for node in ast.walk(parse(path)):
            name = (
                node.id
                if isinstance(node, ast.Name)
                else node.attr
                if isinstance(node, ast.Attribute)
                else None
            )
            if isinstance(node, ast.Name | ast.Attribute) and name in ROUNDING:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
        found += [str(item) for item in imports_of(path) if item.name in ROUNDING]
    assert found == []


def test_only_models_name_hugging_face_modules():
    """Outside models/: no Qwen class, no transformers.models, no way into `visual` or `language_model`."""
    found = []
    for path in sources():
        if part_of(path) == "models":
            continue
        for item in imports_of(path):
            if item.module.startswith("transformers.models") or (
                item.module.startswith("transformers") and "qwen" in (item.name or "").lower()
            ):
                found.append(str(item))
        tree, relative = parse(path), str(path.relative_to(ROOT))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node).endswith(
                ("language_model", "model.visual")
            ):
                found.append(f"{relative}:{node.lineno}: {ast.unparse(node)}")
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and node.value.split() == [node.value]  # a name, not prose
                and any(part in node.value for part in ("language_model", "model.visual"))
                and (relative, node.value) not in NAMED_ELSEWHERE
            ):
                found.append(f"{relative}:{node.lineno}: {node.value!r}")
    assert found == []


def test_named_exceptions_are_still_needed():
    for relative, text in NAMED_ELSEWHERE:
        assert f'"{text}"' in (ROOT / relative).read_text()
    pairs = {(part_of(item.file), imported_part(item)) for item in all_imports()}
    assert pairs >= BETWEEN_LEAVES


@pytest.mark.parametrize("folder", ["data", "export", "recipes", "benchmarks"])
def test_top_level_folders_are_not_packages(folder):
    assert not list((ROOT / folder).rglob("__init__.py"))
    assert [str(item) for item in all_imports() if item.module.split(".")[0] == folder] == []


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert {path: length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_are_short():
    found = {}
    for path in sources():
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            first = node.body[0]
            documented = ast.get_docstring(node, clean=False) is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            length = (node.end_lineno or 0) - node.lineno + 1 - docstring
            if length > MAX_FUNCTION_LINES:
                found[f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"] = length
    assert found == {}
