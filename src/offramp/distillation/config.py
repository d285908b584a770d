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
from offramp.metrics.selection import RULES, WITH_GROUPS
from offramp.runs import digests
from offramp.runs.codec import decode
from offramp.values import choice

SCHEMA = "offramp/distill/1"
EARLY_EXITS = ("readout", "joint")
TRAINED_TEACHERS = ("erm", "group_balanced", "group_dro", "jtt", "dfr")
PUBLISHED = ("waterbirds", "celeba", "multinli", "civilcomments")
"""Sets whose published settings are in `offramp/data/distill`."""
BUNDLED = (*PUBLISHED, "digits-on-colour", "mnist-on-colour", "spuco-mnist", "template-nli", "snli-negation")
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
        training: Training of students; its seed is the run's.
        teacher_training: Training of teachers.
        select: The rule by which a run's epoch is chosen, one of `offramp.metrics.selection.RULES`.
        teacher_select: The same for teachers that use group labels anyway; others go by "val_average".
        early_exits: "readout": exits before the last are fitted when training is over and do not change the student;
            "joint": they are trained with it, by the same loss, where that is of labels or of a teacher's logits; those
            of GroupDRO, LfF, SimKD and DeTT look at the last exit alone, so that others are fitted then too.
        threshold: A row leaves at the first exit whose largest probability is above it, in the table of exits.
        pad: Augmentation by random crops from a frame of so many pixels.
        flip: Augmentation by exchanging left and right.
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
            choice(name, getattr(self, name), allowed)
        for training in (self.training, self.teacher_training):
            if training.label_smoothing or training.weights != "uniform":
                raise ValueError(
                    f"training has label_smoothing {training.label_smoothing} and weights {training.weights!r}; "
                    "methods have losses of their own, which know neither; leave both out"
                )

    @property
    def augments(self) -> bool:
        """Whether training inputs differ from epoch to epoch, so that nothing about them can be kept."""
        return self.flip or self.pad > 0


@dataclass(frozen=True)
class Run:
    """One student.

    Attributes:
        study: What it shares with others.
        name: Name of the method, as it was asked for.
        method: What the name means.
        teacher: A method in `TRAINED_TEACHERS`, "folder:PATH" of a saved classifier, "logits:FILE"; None: none.
        seed: Seed of data that is drawn, first values and the order of rows.
        apart: Added to the seed for the last two: a teacher is not to begin as its student does.
        taught: How a teacher that is trained here learns; None: as its name says in `METHODS`.
    """

    study: Study
    name: str
    method: Method
    teacher: str | None
    seed: int
    apart: int = 0
    taught: Method | None = None

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
        self._require_rate()
        fixed = "the teacher's features" if self.method.loss == "features" else (self.teacher or "")
        if self.study.augments and (self.method.loss == "features" or fixed.startswith("logits:")):
            raise ValueError(
                f"{self.name} learns from {fixed} of images as they are, but the study has pad {self.study.pad} and "
                f"flip {self.study.flip}; leave both out, or choose kd with a network or a folder as the teacher"
            )

    def _require_rate(self) -> None:
        """Refuse a readout that would take over the student's learning rate for an optimiser it is not meant for."""
        weights, training = self.method.weights, self.study.training
        if weights is None or weights.control == "oracle" or weights.readout.learning_rate is not None:
            return
        if weights.readout.optimiser not in (None, training.optimiser):
            rate = self.method.learning_rate or training.learning_rate
            raise ValueError(
                f"{self.name}: the readout learns by {weights.readout.optimiser}, but the student's learning rate, "
                f"{rate}, is one of {training.optimiser}, by which it may learn nothing; give a readout.learning_rate"
            )

    @property
    def key(self) -> str:
        """Name of its folder."""
        teacher = "" if self.teacher is None else f"--{_short(self.teacher)}"
        return f"{self.name}{teacher}--seed{self.seed}".replace("/", "_")

    @property
    def joint(self) -> bool:
        """Whether its early exits are trained with it."""
        return self.study.early_exits == "joint" and self.method.loss in ("labels", "kd")

    @property
    def needs_val_groups(self) -> bool:
        """Whether it cannot do without groups of validation rows."""
        return self.method.refit or self.study.select in WITH_GROUPS

    def to_dict(self) -> dict[str, Any]:
        """JSON values; without `taught` where it is None."""
        values = asdict(self)
        return {"schema": SCHEMA, **{name: value for name, value in values.items() if name != "taught" or value}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Run:
        """From `to_dict`, also after a turn through JSON."""
        return decode(cls, {name: value for name, value in values.items() if name != "schema"})

    @property
    def digest(self) -> str:
        """Of everything."""
        return digests.of(self.to_dict())[:12]

    # ------------------------------------------------------------ what it needs

    def teacher_run(self) -> Run | None:
        """The run that trains the teacher; None: it is given, or there is none."""
        if self.teacher not in TRAINED_TEACHERS:
            return None
        own = self.taught or METHODS[self.teacher]
        rule = self.study.teacher_select if own.needs_groups or own.refit else "val_average"
        study = replace(
            self.study, student=self.study.teacher, training=self.study.teacher_training, select=rule
        )  # fmt: skip
        return Run(study, self.teacher, own, None, self.seed, APART)

    def first_run(self) -> Run | None:
        """The plain student whose errors count, or whose features are kept; None: not needed."""
        study, own = self.study, self.method
        if own.errors is not None:
            study = replace(study, training=replace(study.training, epochs=own.errors.epochs), select="last")
        elif not own.refit:
            return None
        # as fast and with as much decay as its method says, as in JTT's code
        plain = replace(METHODS["erm"], learning_rate=own.learning_rate, weight_decay=own.weight_decay)
        return Run(study, "erm", plain, None, self.seed, self.apart)


def _short(teacher: str) -> str:
    """A teacher in the name of a folder; saved classifiers, which all are called "model", by run and path."""
    kind, _, path = teacher.partition(":")
    place = Path(path or teacher)
    if kind != "folder":
        return place.name
    name = place.parent.name if place.name == "model" else place.name
    return f"{name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def study_from(values: Mapping[str, Any], base: Study) -> Study:
    """A study with the nested values of a file of `offramp/data/distill` put into this one."""
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
        seeds: Seeds of the runs.
        settings: Changes of methods by name, from a file, also for teachers that are trained here; those under "*" are
            for all that have such a part.

    Returns:
        The runs, ordered so that seeds are finished one by one.

    Raises:
        ValueError: There is no such method, or one needs a teacher and there is none, or nothing is to be done.
    """
    found, given = [], settings or {}
    taught = {name: method(name, _settings(given, name)) for name in teachers if name in TRAINED_TEACHERS}
    taught = {name: made for name, made in taught.items() if made != METHODS[name]}
    for seed in seeds:
        for name in methods:
            plain = name.partition("+")[0]
            made = method(name, _settings(given, plain))
            for teacher in (teachers if made.needs_teacher else [None]) or [None]:
                found.append(Run(study, name, made, _placed(teacher), seed, taught=taught.get(teacher or "")))
    if not found:
        raise ValueError(f"{len(methods)} methods and {len(seeds)} seeds make no run; give one of each at least")
    return found


def _placed(teacher: str | None) -> str | None:
    """A teacher; its folder by one path, from wherever it is asked for."""
    if teacher is None or not teacher.startswith("folder:"):
        return teacher
    return f"folder:{Path(teacher[7:]).expanduser().resolve()}"


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
    return _merged(merged, settings.get(name, {}))


def _merged(general: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, Any]:
    """Both, also inside of each other; where they differ, what is special counts."""
    both = dict(general)
    for key, value in special.items():
        inside = isinstance(value, Mapping) and isinstance(general.get(key), Mapping)
        both[key] = _merged(general[key], value) if inside else value
    return both


def bundled(name: str) -> dict[str, Any]:
    """The settings that come with the library for a set in `BUNDLED`, JSON values for `study_from` and `runs`."""
    from importlib.resources import files

    found: dict[str, Any] = json.loads((files("offramp") / "data" / "distill" / f"{name}.json").read_text("utf-8"))
    return found
