"""Turns YAML into checked dataclasses; knows nothing of what the fields mean.

`grace.config` declares the fields. Every error is one line that says what is wrong and what to write
instead.
"""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import yaml

from grace.errors import UserError

# YAML 1.1 wants a dot in a float, so that 1e-5 is text to it. People write 1e-5.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_TYPE_NAMES = {
    str: "text (put it in quotes)",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


@dataclasses.dataclass(frozen=True)
class Interval:
    """A range of numbers in the usual notation, such as "[0, 1)" or "(0, inf)"."""

    text: str

    def __contains__(self, value: float) -> bool:
        low, high = (float(bound) for bound in self.text[1:-1].split(","))
        above = value > low if self.text[0] == "(" else value >= low
        below = value < high if self.text[-1] == ")" else value <= high
        return above and below

    def __str__(self) -> str:
        low, high = (bound.strip() for bound in self.text[1:-1].split(","))
        if high == "inf":
            return f"more than {low}" if self.text[0] == "(" else f"at least {low}"
        return f"in {self.text}"


def number(interval: str, default: Any = dataclasses.MISSING) -> Any:
    """A numeric dataclass field that must lie in `interval` (see `Interval`)."""
    return dataclasses.field(default=default, metadata={"interval": Interval(interval)})


def matching(pattern: str, expected: str, default: Any = dataclasses.MISSING) -> Any:
    """A text field that must match `pattern` as a whole; messages call what does so `expected`."""
    return dataclasses.field(default=default, metadata={"pattern": pattern, "expected": expected})


def read_by(reader: Callable[[Any], Any]) -> Any:
    """A field whose value `reader` makes; it raises ValueError saying what was expected."""
    return dataclasses.field(metadata={"reader": reader})


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses a key given twice; plain YAML keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"key {key_node.value!r} is given twice, again in line {line}")
            seen.add(key_node.value if isinstance(key_node, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: not valid YAML; the message is one line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{error.problem}{line}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: impossible dates and the like
        raise ValueError(" ".join(str(error).split())) from error


class _Dumper(yaml.SafeDumper):
    """Quotes text with characters that YAML would take for line breaks (such as U+0085) or drop."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
    ),
)


def dump_yaml(value: Any) -> str:
    """A value of plain types as YAML that reads back the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def build(kind: type, values: Mapping[Any, Any], where: Callable[[str], str]) -> Any:
    """An instance of `kind`, a dataclass of dataclasses ("sections"), from nested mappings.

    Args:
        values: section name -> {key: value}; a section may be absent or null.
        where: what to call the place a "section" or "section.key" was given in, for messages.

    Raises:
        UserError: an unknown or missing key, a value of another type or out of its range.
    """
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise UserError(f"{where(str(name))}: unknown section {name!r}, {_nearest(kind, str(name))}")
    sections = {}
    for name, section in hints.items():
        content = values.get(name)
        if not isinstance(content, dict | None):
            raise UserError(f"{where(name)}: section {name} is {show(content)}, expected keys and values")
        sections[name] = _build_section(kind, section, name, content or {}, where)
    return kind(**sections)


def suggest(kind: type, key: str) -> str:
    """The known "section.key" most like `key`, whatever its section."""
    names = [
        f"{name}.{known}" for name, hint in typing.get_type_hints(kind).items() for known in _fields(hint)
    ]
    return max(names, key=lambda name: _likeness(key, name.partition(".")[2]))


def require_field(kind: type, name: str) -> None:
    """Checks that `name`, "section.key", is a field.

    Raises:
        UserError: it is not; names the nearest.
    """
    section, _, key = name.partition(".")
    hint = typing.get_type_hints(kind).get(section)
    if hint is None or key not in _fields(hint):
        raise UserError(f"unknown key {name}, {_nearest(kind, name)}")


def _build_section(
    kind: type, section_kind: type, section: str, content: Mapping[Any, Any], where: Callable[[str], str]
) -> Any:
    fields, hints = _fields(section_kind), typing.get_type_hints(section_kind)
    built = {}
    for key, value in content.items():
        name = f"{section}.{key}"
        if key not in fields:
            raise UserError(f"{where(name)}: unknown key {name}, {_nearest(kind, name)}")
        try:
            built[key] = _checked(value, hints[key], fields[key].metadata)
        except ValueError as error:
            raise UserError(f"{where(name)}: {name} is {show(value)}, {error}") from error
    for key, one in fields.items():
        if key not in built and one.default is dataclasses.MISSING:
            raise UserError(
                f"{where(section)}: {section}.{key} is missing, add it or give {section}.{key}=..."
            )
    return section_kind(**built)


def _checked(value: Any, hint: Any, limits: Mapping[str, Any]) -> Any:
    """`value` as its field's type. Raises ValueError saying what was expected."""
    if "reader" in limits:
        return limits["reader"](value)
    if typing.get_origin(hint) is tuple:
        return _as_names(value)
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    allowed = typing.get_args(hint) if is_union else (hint,)
    choices = [c for kind in allowed if typing.get_origin(kind) is Literal for c in typing.get_args(kind)]
    plain = tuple(kind for kind in allowed if kind in _TYPE_NAMES)
    if (isinstance(value, str) and value in choices) or (value is None and type(None) in allowed):
        return value
    if float in plain:
        value = _as_float(value)
    # bool is an int to Python, never to a reader of recipes
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        expected = [_TYPE_NAMES[kind] for kind in plain] + [str(choice) for choice in choices]
        expected += ["null"] if type(None) in allowed else []
        raise ValueError(f"expected {' or '.join(expected)}")
    if isinstance(value, str) and not value.strip():
        raise ValueError("expected text that is not empty")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number")
    if "pattern" in limits and isinstance(value, str) and not re.fullmatch(limits["pattern"], value):
        raise ValueError(f"expected {limits['expected']}{' or null' * (type(None) in allowed)}")
    interval = limits.get("interval")
    if interval is not None and isinstance(value, int | float) and value not in interval:
        raise ValueError(f"out of range: it must be {interval}")
    return value


def _as_names(value: Any) -> tuple[str, ...]:
    """A list of names, or text with commas between them; each name once."""
    names = value.split(",") if isinstance(value, str) else [] if value is None else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError("expected a list of names, such as [missing, truncated]")
    return tuple(dict.fromkeys(name.strip() for name in names if name.strip()))


def _as_float(value: Any) -> Any:
    """Whole numbers and texts such as 1e-5 as floats; anything else as it is."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if not is_number and not (isinstance(value, str) and _EXPONENT.fullmatch(value)):
        return value
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


def _fields(kind: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(kind)}


def _nearest(kind: type, name: str) -> str:
    """ "did you mean ...?" for an unknown section, or an unknown "section.key" of any section."""
    hints = typing.get_type_hints(kind)
    section, dot, key = name.partition(".")
    scores = {} if dot else {known: _likeness(name, known) for known in hints}
    for known, hint in hints.items():
        # a slip of the pen is likelier than a wrong section
        bonus = 0.1 if dot and known == section else 0.0
        scores |= {f"{known}.{field}": _likeness(key or name, field) + bonus for field in _fields(hint)}
    best = max(scores, key=lambda known: scores[known])
    if not dot and scores[best] < 0.6:
        return f"expected one of {', '.join(hints)}"
    return f"did you mean {best}?"


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def show(value: Any) -> str:
    """`value` as YAML would have it, cut to a length that fits a message."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
