"""A plan (`grace.plan`) as aligned text for people."""

from collections.abc import Mapping, Sequence
from typing import Any


def format_plan(plan: Mapping[str, Any]) -> str:
    """The plan as aligned text for people."""
    lines: list[str] = []
    for role in ("student", "teacher"):
        if plan[role] is not None:
            lines += _model_lines(role, plan[role])
    if plan["teacher_cache"] is not None:
        lines += ["", f"teacher: cached in {plan['teacher_cache']}, none in memory"]
    lines += ["", "quantization", *_quantization_lines(plan["quantization"])]
    lines += ["", "optimizer (AdamW)"] + [
        f"  {group['group']:<18}{group['parameters']:>15,}  lr {group['lr']:g}  "
        f"weight decay {group['weight_decay']:g}"
        for group in plan["optimizer"]
    ]
    lines += ["", "schedule", *_schedule_lines(plan["schedule"], plan["data"])]
    lines += ["", "distillation", *_distillation_lines(plan["distillation"])]
    lines += _memory_lines(plan["memory"], plan["memory_by_mode"])
    if plan["teacher_memory"]:
        lines += ["", f"memory of its teacher on {_place(plan['teacher']['device'])}, GiB"]
        lines += [_gib(row) for row in plan["teacher_memory"]]
    if plan["notes"]:
        lines += ["", "notes"] + [f"  {note}" for note in plan["notes"]]
    return "\n".join(lines).lstrip("\n")


def _memory_lines(memory: Mapping[str, Any], by_mode: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of one process as it was launched, item by item; then what it would be launched otherwise."""
    how = "one process" if memory["mode"] == "single" else f"one process of {memory['mode']}"
    lines = ["", f"memory of {how}, GiB (estimated)", *(_gib(item) for item in memory["items"])]
    lines.append(f"  {'total':<18}{memory['total_gib']:>15.2f}")
    if memory["host_items"]:
        lines += [
            "",
            "  in the machine's memory, for each process",
            *(_gib(item) for item in memory["host_items"]),
        ]
        lines.append(f"  {'total':<18}{memory['host_gib']:>15.2f}")
    processes = by_mode[0]["processes"]
    lines += ["", f"memory of one of {processes} processes by the files of recipes/accelerate/, GiB"]
    for row in by_mode:
        host = f"  and {row['host_gib']:.2f} of the machine's memory" if row["host_gib"] else ""
        lines.append(f"  {row['mode']:<18}{row['gib']:>15.2f}{host}")
    return lines


def _gib(row: Mapping[str, Any]) -> str:
    return f"  {row['name']:<18}{row['gib']:>15.2f}  {row['formula']}"


def _place(device: str) -> str:
    if device == "spread":
        return "the GPUs on which no process trains"
    return f"the GPU {device.removeprefix('cuda:+')} places after its own" if "+" in device else device


def _model_lines(role: str, model: Mapping[str, Any]) -> list[str]:
    shape = "" if model["shape_from"] == model["path"] else f" (absent; shape of {model['shape_from']})"
    decoder, vision = model["decoder"], model["vision"]
    lines = [
        "",
        f"{role}: {model['path']}{shape}",
        f"  decoder {decoder['layers']} layers x {decoder['width']}, vocabulary {decoder['vocabulary']:,}; "
        f"vision {vision['layers']} layers x {vision['width']}",
    ]
    for part, count in model["parts"].items():
        tied = "  tied to the embeddings" if part == "head" and model["head_tied"] else ""
        lines.append(f"  {part.replace('_', ' '):<18}{count:>15,}{tied}")
    lines.append(f"  {'parameters':<18}{model['parameters']:>15,}")
    if role == "student":
        lines.append(f"  {'trained':<18}{model['trained']:>15,}  scales included; {model['frozen']:,} frozen")
    else:
        lines.append(f"  {'trained':<18}{0:>15,}  frozen, {_precision(model)}")
    return lines


def _precision(teacher: Mapping[str, Any]) -> str:
    load_in = teacher["load_in"]
    return teacher["dtype"] + (f"; decoder linears in {load_in} (bitsandbytes)" if load_in else "")


def _quantization_lines(quantization: Mapping[str, int] | None) -> list[str]:
    if quantization is None:
        return ["  none: full precision"]
    bits, group_size = quantization["bits"], quantization["group_size"]
    return [
        f"  {quantization['linears']} decoder linears at {bits} bits, groups of {group_size} along the input",
        f"  {'weights':<18}{quantization['weights']:>15,}",
        f"  {'scales':<18}{quantization['scales']:>15,}",
        "  full precision: vision tower, mergers, embeddings, head, norms",
    ]


def _schedule_lines(schedule: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    is_counted = data["records_from"] == "counted"
    where = f"in {data['path']}" if is_counted else f"expected; {data['path']} is absent"
    return [
        _row("records", data["records"], where + ("" if data["records"] else ": set data.expected_records")),
        _row("steps", schedule["steps"], _if(schedule["epochs"], "epochs {:.3g}")),
        _row("warm-up steps", schedule["warmup_steps"], f"linear, then {schedule['schedule']}"),
        _row(
            "records per step",
            schedule["records_per_step"],
            f"{schedule['processes']} process{'es' * (schedule['processes'] > 1)}, "
            f"{schedule['accumulation']} micro-batches of "
            + (
                f"up to {schedule['micro_batch_size']} in each"
                if schedule["micro_batch_tokens"] is None
                else f"up to {schedule['micro_batch_tokens']:,} tokens in each"
            ),
        ),
        _row(
            "tokens",
            schedule["tokens"],
            _if(data["tokens_per_record"], "{} a record, " + data["tokens_from"]),
        ),
        _row("supervised", schedule["supervised_tokens"], _if(data["supervised_per_record"], "{} a record")),
        f"  gradient norm clipped at {schedule['clip']:g}; {schedule['precision']} compute",
    ]


def _row(name: str, value: int | None, remark: str) -> str:
    shown = "unknown" if value is None else f"{value:,}"
    return f"  {name:<18}{shown:>15}  {remark}".rstrip()


def _if(value: float | None, template: str) -> str:
    return "" if value is None else template.format(value)


def _distillation_lines(options: Mapping[str, Any] | None) -> list[str]:
    if options is None:
        return ["  none: cross-entropy alone"]
    start, low, high = options["beta"]
    tau = options["tau"] if isinstance(options["tau"], str) else f"{options['tau']:g}"
    return [
        f"  {options['loss']} at temperature {options['temperature']:g}, "
        f"alpha {options['tckd_weight']:g}, beta_dkd {options['nckd_weight']:g}",
        f"  beta from {start:g} in [{low:g}, {high:g}], eta {options['eta']:g}, tau {tau}, "
        f"moving average {options['ema_decay']:g}",
        f"  relational CKA: omega {options['rcka_weight']:g}, "
        f"warmed up over {options['rcka_warmup_steps']} steps",
    ]
