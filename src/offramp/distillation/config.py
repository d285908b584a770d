"""All that makes a run, as frozen values that go to JSON and come back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from offramp.classifiers.config import ClassifierTrainConfig
from offramp.distillation.data import DataConfig
from offramp.distillation.methods import METHODS, Method, method, updated
from offramp.distillation.networks import Network
from offramp.metrics.selection import RULES

SCHEMA = "offramp/distill/1"
EARLY_EXITS = ("readout", "joint")
TRAINED_TEACHERS = ("erm", "group_balanced", "group_dro", "jtt", "dfr")
PUBLISHED = ("waterbirds", "celeba", "multinli", "civilcomments")
"""Sets whose published settings are in `offramp/data/distill`."""
BUNDLED = (*PUBLISHED, "digits-on-colour", "mnist-on-colour", "template-nli", "snli-negation")
"""All names of files there; those of stand-ins are ours."""

APART = 1_000_003
"""Between the seeds of networks that belong together."""


def _training() -> ClassifierTrainConfig:
    return ClassifierTrainConfig(
        epochs=15, batch_size=64, optimiser="adamw", learning_rate=2e-3, weight_decay=0.0, schedule="constant"
    )


@dataclass(frozen=True)
class Study:
    """What all runs of a grid share. The defaults are those of small stand-ins.

    Attributes:
        data: The set.
        student: The network of the students.
        teacher: The network of teachers that are trained here.
        training: Of students; its seed is the run's.
        teacher_training: Of teachers.
        select: The rule by which a run's epoch is chosen, one of `offramp.metrics.selection.RULES`.
        teacher_select: The same for teachers that use group labels anyway; others go by "val_average".
        early_exits: "readout": exits before the last are fitted when training is over and do not change the student;
            "joint": they are trained with it, by the same loss.
        threshold: A row leaves at the first exit whose largest probability is above it, in the table of exits.
        pad: Of augmentation: random crops from a frame of so many pixels.
        flip: Of augmentation: left and right exchanged.
    """

    data: DataConfig
    student: Network
    teacher: Network
    training: ClassifierTrainConfig = field(default_factory=_training)
    teacher_training: ClassifierTrainConfig = field(default_factory=_training)
    select: str = "val_worst_group"
    teacher_select: str = "val_worst_group"
    early_exits: str = "readout"
    threshold: float = 0.9
    pad: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("select", RULES), ("teacher_select", RULES), ("early_exits", EARLY_EXITS)):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")

    @property
    def augments(self) -> bool:
        """Whether training inputs differ from epoch to epoch, so that nothing about them can be kept."""
        return self.flip or self.pad > 0


@dataclass(frozen=True)
class Run:
    """One student.

    Attributes:
        study: What it shares with others.
        name: Of the method, as it was asked for.
        method: What the name means.
        teacher: A method in `TRAINED_TEACHERS`, "folder:PATH" of a saved classifier, "logits:FILE"; None: none.
        seed: Of data that is drawn, first values and the order of rows.
        apart: Added to the seed for the last two: a teacher is not to begin as its student does.
    """

    study: Study
    name: str
    method: Method
    teacher: str | None
    seed: int
    apart: int = 0

    def __post_init__(self) -> None:
        if self.teacher is not None and self.teacher not in TRAINED_TEACHERS:
            if not self.teacher.startswith(("folder:", "logits:")):
                raise ValueError(
                    f"the teacher is {self.teacher!r}; choose one of {', '.join(TRAINED_TEACHERS)}, a folder or logits"
                )
        if self.method.needs_teacher and self.teacher is None:
            raise ValueError(f"{self.name} needs a teacher; give one")
        if self.method.loss == "features" and (self.teacher or "").startswith("logits:"):
            raise ValueError(f"{self.name} needs the teacher itself, not its logits: it takes over its last layer")

    @property
    def key(self) -> str:
        """Name of its folder."""
        teacher = "" if self.teacher is None else f"--{Path(self.teacher.partition(':')[2] or self.teacher).name}"
        return f"{self.name}{teacher}--seed{self.seed}".replace("/", "_")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Run:
        """From `to_dict`, also after a turn through JSON."""
        from offramp.distillation.instance_weights import InstanceWeights
        from offramp.distillation.methods import ErrorSet
        from offramp.distillation.readout import ReadoutConfig

        known, made = dict(values["method"]), dict(values["study"])
        if known["weights"] is not None:
            inner = {**known["weights"], "readout": ReadoutConfig(**known["weights"]["readout"])}
            known["weights"] = InstanceWeights(**inner)
        if known["errors"] is not None:
            known["errors"] = ErrorSet(**known["errors"])
        made["data"] = DataConfig(**made["data"])
        for part in ("student", "teacher"):
            exits = made[part]["exits"]
            made[part] = Network(**{**made[part], "exits": None if exits is None else tuple(exits)})
        for part in ("training", "teacher_training"):
            weights = made[part]["weights"]
            fixed = weights if isinstance(weights, str) else tuple(weights)
            made[part] = ClassifierTrainConfig(**{**made[part], "weights": fixed})
        return cls(Study(**made), values["name"], Method(**known), values["teacher"], values["seed"], values["apart"])

    @property
    def digest(self) -> str:
        """Of everything."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]

    # ------------------------------------------------------------ what it needs

    def teacher_run(self) -> Run | None:
        """The run that trains the teacher; None: it is given, or there is none."""
        if self.teacher not in TRAINED_TEACHERS:
            return None
        rule = self.study.teacher_select if _debiased(self.teacher) else "val_average"
        study = replace(
            self.study, student=self.study.teacher, training=self.study.teacher_training, select=rule
        )  # fmt: skip
        return Run(study, self.teacher, METHODS[self.teacher], None, self.seed, APART)

    def first_run(self) -> Run | None:
        """The plain student whose errors count, or whose features are kept; None: not needed."""
        if self.method.errors is not None:
            training = replace(self.study.training, epochs=self.method.errors.epochs)
            return Run(
                replace(self.study, training=training, select="last"),
                "erm",
                METHODS["erm"],
                None,
                self.seed,
                self.apart,
            )
        if self.method.refit:
            return Run(self.study, "erm", METHODS["erm"], None, self.seed, self.apart)
        return None


def _debiased(teacher: str) -> bool:
    return METHODS[teacher].needs_groups or METHODS[teacher].refit


def study_from(values: Mapping[str, Any], base: Study) -> Study:
    """A study with the values of a file in it; "methods", "schema" and "sources" are not looked at.

    Args:
        values: Nested, as in the files of `offramp/data/distill`.
        base: What they are put into.

    Returns:
        The study.
    """
    own = {key: value for key, value in values.items() if key not in ("schema", "methods", "sources")}
    made: Study = updated(base, own, "the file")
    return made


def runs(
    study: Study, methods: list[str], teachers: list[str], seeds: list[int], settings: Mapping[str, Any] | None = None
) -> list[Run]:
    """All runs of a grid; a method without a teacher is run once per seed.

    Args:
        study: What they share.
        methods: Names, maybe with changes, see `offramp.distillation.methods.method`.
        teachers: See `Run`.
        seeds: Of the runs.
        settings: Changes of methods by name, from a file; those under "*" are for all that have such a part.

    Returns:
        The runs, ordered so that seeds are finished one by one.

    Raises:
        ValueError: There is no such method, or one needs a teacher and there is none.
    """
    found = []
    for seed in seeds:
        for name in methods:
            plain = name.partition("+")[0]
            made = method(name, _settings(settings or {}, plain))
            for teacher in (teachers if made.needs_teacher else [None]) or [None]:
                found.append(Run(study, name, made, teacher, seed))
    return found


def _settings(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Those for a method, those for all below them, without parts that it lacks."""
    if name not in METHODS:
        return {}
    merged: dict[str, Any] = {}
    own = METHODS[name]
    for key, value in settings.get("*", {}).items():
        if not isinstance(value, Mapping):
            merged[key] = value
        elif getattr(own, key, None) is not None:
            merged[key] = dict(value)
    if own.weights is not None and "alpha" in merged.get("weights", {}) and own.weights.alpha == 0:
        del merged["weights"]["alpha"]  # the control without the margin stays one
    for key, value in settings.get(name, {}).items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, Mapping) else value
    return merged


def bundled(name: str) -> dict[str, Any]:
    """The settings that come with the library for a set.

    Args:
        name: One of `BUNDLED`.

    Returns:
        JSON values, for `study_from` and `runs`.
    """
    from importlib.resources import files

    found: dict[str, Any] = json.loads((files("offramp") / "data" / "distill" / f"{name}.json").read_text("utf-8"))
    return found
