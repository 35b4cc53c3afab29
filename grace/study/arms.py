"""The grid of the study: what is compared with what, in the order in which it is worth knowing.

Every arm that distils has its weight chosen on validation, on seeds of its own, unless it says whose weight it takes.
All arms train the packaged student on the same records for as many steps; `COMMON` says how many.

An arm stands in as many tables as compare it, and is trained once.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from grace.study.data import NOISES, NOISY_KINDS
from grace.study.trial import Trial

COMMON = ("run.max_steps=100", "optim.batch_size=16", "run.micro_batch_size=16")
KL_WEIGHTS = (1.0, 2.0, 4.0, 8.0)
DKD_WEIGHTS = (0.5, 1.0, 2.0, 4.0)
ADAPTIVE = {"beta_init": 0.5, "beta_min": 0.1, "beta_max": 1.0, "eta": 0.003}  # as published
BITS = 2  # of every table but the first: where quantization hurts


@dataclass(frozen=True)
class Arm:
    """One row of a table.

    Attributes:
        name: of its own.
        label: how tables call it.
        trial: what is run; seed, split and weight apart.
        weights: the distillation weights tried.
        adaptive: the weight scales the controller's whole interval; else it is beta.
        weight_of: the arm whose chosen weight it takes.
        against: the arm of the same table that it is compared with, if not the table's.
    """

    name: str
    label: str
    trial: Trial
    weights: tuple[float, ...] = ()
    adaptive: bool = False
    weight_of: str | None = None
    against: str | None = None

    def weighted(self, weight: float | None, seed: int, split: str) -> Trial:
        """The trial at a weight."""
        values: dict[str, float] = {}
        if weight is not None and self.adaptive:
            values = {key: value * weight for key, value in ADAPTIVE.items()}
        elif weight is not None:
            values = {"beta_init": weight, "beta_min": weight, "beta_max": weight, "eta": 0.0}
        given = [override.partition("=")[0] for override in self.trial.overrides]
        scaled = [f"distill.{k}={v:g}" for k, v in values.items() if f"distill.{k}" not in given]
        return replace(self.trial, overrides=(*self.trial.overrides, *scaled), seed=seed, split=split)


@dataclass(frozen=True)
class Table:
    """One question, and the arms that answer it.

    Attributes:
        name, title: of the section.
        arms: rows in order.
        against: the arm that differences are taken to.
        note: what a reader must know to read it.
        kinds: question kinds to be scored on their own.
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    against: str | None = None
    note: str = ""
    kinds: tuple[str, ...] = ()

    def units(self) -> list[list[Arm]]:
        """The arms in groups to be finished one after the other, by their bits."""
        groups = itertools.groupby(self.arms, key=lambda arm: arm.trial.setting("quant.bits"))
        return [list(group) for _, group in groups]


def arm(
    name: str, label: str, recipe: str, *overrides: str, weights: Sequence[float] = (), adaptive: bool = False,
    weight_of: str | None = None, against: str | None = None, bits: int | None = BITS, **trial: str | bool,
) -> Arm:  # fmt: skip
    """An arm by the name of its small-world recipe."""
    quantized = () if bits is None else (f"quant.bits={bits}",)
    common = Trial(f"small_world/{recipe}.yaml", (*COMMON, *quantized, *overrides), **trial)  # type: ignore[arg-type]
    return Arm(name, label, common, tuple(weights), adaptive, weight_of, against)


def kl(name: str, label: str, *overrides: str, **options: Any) -> Arm:
    """QAT + KL at a fixed weight."""
    if "weight_of" not in options:
        options = {"weights": KL_WEIGHTS, **options}
    return arm(name, label, "kd_w4", *overrides, **options)


def grace(name: str, label: str, *overrides: str, adaptive: bool = True, **options: Any) -> Arm:
    """GRACE, or what is left of it after `overrides`."""
    if "weight_of" not in options:
        options = {"weights": DKD_WEIGHTS, **options}
    return arm(name, label, "grace_w4", *overrides, adaptive=adaptive, **options)


# ---------------------------------------------------------------- tables

KD, GRACE, QAT = f"kd_w{BITS}", f"grace_w{BITS}", f"qat_w{BITS}"
NO_RCKA = "distill.rcka_weight=0"
GATED_KL = "distill.loss=gkl"


def main_table() -> Table:
    """Table 4 of the paper in miniature."""
    arms = [
        arm("student", "student", "student_control", bits=None, trained=False),
        arm("control", "student trained on, no quantizer", "student_control", bits=None),
    ]
    for bits in (2, 3, 4, 8):
        like: dict[str, Any] = {"weight_of": "kd_w4"} if bits == 8 else {}
        like_grace: dict[str, Any] = {"weight_of": "grace_w4"} if bits == 8 else {}
        arms += [
            arm(f"rtn_w{bits}", f"W{bits}, round to nearest", "qat_w4", bits=bits, trained=False),
            arm(f"qat_w{bits}", f"W{bits}, QAT", "qat_w4", bits=bits),
            kl(f"kd_w{bits}", f"W{bits}, QAT + plain KL", bits=bits, **like),
            grace(f"grace_w{bits}", f"W{bits}, GRACE", bits=bits, **like_grace),
        ]
        arms[-4:] = [replace(one, against=f"kd_w{bits}") for one in arms[-4:]]
    note = (
        "Round to nearest takes the scales that training starts from. Differences are to QAT + plain KL of the same bits, the "
        "control's to that of 8. "
        "W8 takes the weights chosen for W4."
    )
    return Table("main", "Bits and methods (Table 4 in miniature)", tuple(arms), "kd_w8", note)


def parts_table() -> Table:
    """Table 3: every subset of the three parts, each at its own weight."""
    rcka = ("distill.rcka_weight=3", "distill.rcka_warmup_steps=20")
    auto = ("distill.tau=auto", "distill.tau_warmup_steps=20", "distill.ema_decay=0.9")
    arms = (
        kl(KD, "plain KL"),
        grace("gdkd", "gate + DKD", NO_RCKA, adaptive=False),
        kl("kd_rcka", "KL + RCKA", *rcka),
        kl("kd_adaptive", "KL + adaptive beta", *auto, adaptive=True),
        grace("gdkd_rcka", "gate + DKD + RCKA", adaptive=False),
        grace("gdkd_adaptive", "gate + DKD + adaptive beta", NO_RCKA),
        kl("kd_rcka_adaptive", "KL + RCKA + adaptive beta", *rcka, *auto, adaptive=True),
        grace(GRACE, "gate + DKD + RCKA + adaptive beta (GRACE)"),
    )
    return Table("parts", "The parts of GRACE (Table 3 in miniature)", arms, KD)


def nckd_table() -> Table:
    """The weight of what the teacher says about the other tokens."""
    arms = [kl(KD, "plain KL")]
    for value in (0, 0.25, 1, 4, 8):
        name = "gdkd" if value == 4 else f"gdkd_n{value:g}"
        weights = DKD_WEIGHTS if value == 4 else (1.0, 4.0)
        arms.append(
            grace(
                name, f"gate + DKD, NCKD weight {value:g}", NO_RCKA,
                *(() if value == 4 else (f"distill.nckd_weight={value:g}",)), adaptive=False, weights=weights,
            )
        )  # fmt: skip
    return Table(
        "nckd", "NCKD weight (published: 4)", tuple(arms), KD, "Weights tried: 1 and 4; .5 to 4 at 4."
    )


def gate_arms() -> list[Arm]:
    """With the gate and without, on KL and on DKD; each at the weight of its kind."""
    k8, off = "distill.gate_sharpness=8", "distill.gate_sharpness=0"
    against_dkd = {"adaptive": False, "against": "dkd"}
    return [
        kl(KD, "plain KL"),
        kl("gkl", "gated KL, k = 1", GATED_KL, weight_of=KD),
        kl("gkl_k8", "gated KL, k = 8", GATED_KL, k8, weight_of=KD),
        grace("dkd", "DKD without gate", NO_RCKA, off, adaptive=False, weight_of="gdkd"),
        grace("gdkd", "gated DKD, k = 1 (published)", NO_RCKA, **against_dkd),
        grace("gdkd_k8", "gated DKD, k = 8", NO_RCKA, k8, weight_of="gdkd", **against_dkd),
    ]


DKD_NOTE = "Gated DKD is compared with DKD without gate, all else with plain KL."


def noise_tables() -> list[Table]:
    """The gate against a teacher that is wrong about some kinds of question."""
    tables = []
    kinds = " and ".join(f"`{kind}`" for kind in NOISY_KINDS)
    k8 = grace("grace_k8", "GRACE, k = 8", "distill.gate_sharpness=8", weight_of=GRACE)
    for name, noise in NOISES.items():
        how = "the next result in their order" if noise.next else "another result, any"
        note = (
            f"The teacher was trained on for 300 steps with {noise.share:.0%} of the answers to {kinds} questions "
            f"replaced by {how}; its own scores are in the first row. Weights as chosen under the packaged teacher. {DKD_NOTE}"
        )
        teacher = arm(
            f"teacher_{name}", "the teacher itself", "student_control", bits=None, trained=False, start=name
        )
        taught = [
            replace(
                one, name=f"{one.name}_{name}", trial=replace(one.trial, teacher=name), weights=(),
                weight_of=one.weight_of or one.name, against=one.against and f"{one.against}_{name}",
            )
            for one in [*gate_arms(), grace(GRACE, "GRACE"), k8]
        ]  # fmt: skip
        arms = (teacher, arm(QAT, "QAT, no teacher", "qat_w4"), *taught)
        title = f"The gate against a teacher that is {name}"
        tables.append(Table(f"noise_{name}", title, arms, f"{KD}_{name}", note, NOISY_KINDS))
    return tables


def gate_table() -> Table:
    """Shapes of the gate, under a teacher that is not misled."""
    k32, top8 = "distill.gate_sharpness=32", "distill.gate_top_k=8"
    like_dkd = {"adaptive": False, "weight_of": "gdkd", "against": "dkd"}
    arms = [
        *gate_arms(),
        kl("gkl_k32", "gated KL, k = 32", GATED_KL, k32, weight_of=KD),
        kl("gkl_top8", "gated KL, among the 8 likeliest", GATED_KL, top8, weight_of=KD),
        grace("gdkd_top8", "gated DKD, among the 8 likeliest", NO_RCKA, top8, **like_dkd),
    ]
    note = (
        "g = exp(-k h), h the entropy over the whole vocabulary, or over the 8 likeliest tokens among themselves. Weights of "
        f"plain KL and of gated DKD as published. {DKD_NOTE}"
    )
    return Table("gate", "Shapes of the gate", tuple(arms), KD, note)


def sweeps() -> list[Table]:
    """One setting of GRACE after the other, at the weight that GRACE has."""
    full = grace(GRACE, "as recipe")

    def varied(name: str, label: str, *overrides: str) -> Arm:
        return grace(f"grace_{name}", label, *overrides, weight_of=GRACE)

    tau = [varied(f"tau{value:g}", f"tau {value:g}", f"distill.tau={value:g}") for value in (0.3, 3, 10)]
    omega = [varied(f"omega{v:g}", f"omega {v:g}", f"distill.rcka_weight={v:g}") for v in (0, 10, 30)]
    rate = [
        varied(f"scale{v:g}", f"scales learn at {v:g}x the rate", f"quant.scale_lr_multiplier={v:g}")
        for v in (0, 1)
    ]
    auto = replace(full, label="tau auto (.9 of m after 20 steps)")
    return [
        Table("tau", "tau of the controller", (auto, *tau), GRACE),
        Table("omega", "omega, the weight of RCKA", (replace(full, label="omega 3"), *omega), GRACE),
        Table("scales", "Learning rate of the scales", (replace(full, label="10x"), *rate), GRACE),
    ]


def export_table() -> Table:
    """Whether the lossless export costs accuracy."""
    arms = (
        arm(QAT, "QAT", "qat_w4", against=QAT),
        arm("qat_unsnapped", "QAT, scales never rounded", "qat_w4", kernels="unsnapped", against=QAT),
        grace(GRACE, "GRACE"),
        grace("grace_unsnapped", "GRACE, scales never rounded", weight_of=GRACE, kernels="unsnapped"),
    )
    note = (
        'Scales that are never rounded to bfloat16 train freely, but no format of section 6 holds them: "rounded at '
        'export" is the score after rounding them then.'
    )
    return Table("export", "Snapped scales: is the lossless export free?", arms, GRACE, note)


def equal_table() -> Table:
    """Ways to compute the same thing."""
    cut = "run.micro_batch_size=8"
    arms = (
        grace(GRACE, "living teacher, quantized in every micro-batch"),
        grace("grace_cut", "the same in two micro-batches", cut, weight_of=GRACE),
        grace(
            "grace_once", "in two micro-batches, quantized once a step", cut, weight_of=GRACE, kernels="once"
        ),
        grace("grace_cached", "cached teacher, 64 tokens", weight_of=GRACE, cached=True),
    )
    return Table("equal", "The same thing computed otherwise", arms, GRACE)


def teacher_trial(noise: str) -> Trial:
    """How a noisy teacher is made: the packaged one, trained on with wrong lessons."""
    overrides = ("run.max_steps=300", "optim.batch_size=16", "run.micro_batch_size=16", "optim.lr=1.0e-3")
    return Trial("small_world/student_control.yaml", overrides, start="teacher", saved_as=noise)


def all_tables() -> list[Table]:
    """In the order in which they are filled."""
    return [
        main_table(), parts_table(), nckd_table(), *noise_tables(), gate_table(), *sweeps(), export_table(), equal_table(),
    ]  # fmt: skip


def quick_tables() -> list[Table]:
    """A study in a minute that shows the way: one table, one weight each."""
    arms = [
        arm("rtn_w2", "W2, round to nearest", "qat_w4", trained=False),
        replace(kl(KD, "W2, QAT + plain KL"), weights=(2.0, 4.0)),
        replace(grace(GRACE, "W2, GRACE"), weights=(1.0,)),
    ]
    short = [
        replace(one, trial=replace(one.trial, overrides=(*one.trial.overrides, "run.max_steps=3")))
        for one in arms
    ]
    return [Table("main", "Bits and methods, far too short to tell", tuple(short), KD)]
