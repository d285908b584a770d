"""The certificate of a policy: what is promised, how it was found, and what it holds for.

It stands beside the policy in one JSON file, under "certificate": `ExitPolicy.load` reads the policy and leaves the
certificate alone, `load` reads the certificate.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.calibration.drift import Drift, unpacked
from offramp.calibration.evidence import Account, require_evidence
from offramp.calibration.promise import Promise
from offramp.calibration.statement import finding, words
from offramp.core.policy import WRITE, ExitPolicy
from offramp.risk import CRC
from offramp.runs.bounded import read_object
from offramp.runs.digests import fingerprint
from offramp.runs.digests import of as digest
from offramp.runs.files import write_json
from offramp.runs.resume import as_json
from offramp.runs.tables import as_html

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.tasks import Task

log = logging.getLogger(__name__)
File = str | os.PathLike[str]

SCHEMA = "offramp/certificate/3"
BEFORE = "offramp/certificate/2"
"""Went by all FLOPs, and took policies that cost more than the full model; it is read, and holds."""
EARLIER = "offramp/certificate/1"
"""Kept no losses, so that nothing follows from what is in it; it is read, and applies to nothing."""
ADDED = {"minimise": None, "must_pay": False}
"""Fields that earlier versions did not have, with what they stand for."""
KEYS = frozenset(("model", "weights", "dtype", "exits", "chat_template", "task", "settings", "batch_size"))
"""Of `conditions`."""


OF_EARLIER = "it is of an earlier version, which did not keep the losses that a promise follows from; calibrate again"


@dataclass(frozen=True)
class Certificate(Account):
    """What is known about a policy; see `Account` for the fields."""

    def __repr__(self) -> str:
        p = self.promise
        sure = "" if p.bound == CRC else f", failure {p.failure:g}"
        promised = f"{p.kind} loss of {p.metric} at most {p.tolerance:g}{sure}"
        return f"Certificate({promised}, by {self.n} {p.unit}s: {finding(self)})"

    def _repr_html_(self) -> str:
        return as_html(self.words())

    # ------------------------------------------------------------ files

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with a digest; conformal risk control has no failure probability."""
        values = {"schema": self._schema, **asdict(self)}
        if self.minimise is None:
            values = {name: value for name, value in values.items() if name not in ADDED}
        if self.promise.bound == CRC:
            values["promise"]["failure"] = values["level"] = None
        return {**values, "digest": digest(as_json(values), ())}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Certificate:
        """The inverse of `to_dict`. Whatever the certificate says is worked out again from what is in it.

        Returns:
            The certificate.

        Raises:
            ValueError: It is none, one of another version, damaged, or says something else than follows from its
                losses.
        """
        schema = values.get("schema") if isinstance(values, Mapping) else None
        if schema not in (SCHEMA, BEFORE, EARLIER):
            raise ValueError(f"this is no certificate of schema {SCHEMA!r}, or one of another version; calibrate again")
        try:
            certificate = cls._read(values)
            if schema != EARLIER:
                require_evidence(certificate)
                if certificate.to_dict() != dict(values):
                    raise ValueError("it is not what was written")
            certificate.words(), certificate.drift()  # whatever else is wanted of it is there
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(
                f"the certificate was changed or is damaged: {' '.join(what.split())}; calibrate again, or remove "
                '"certificate" from the file to use its policy without a promise'
            ) from error
        return certificate

    @classmethod
    def _read(cls, values: Mapping[str, Any]) -> Certificate:
        """Of the right fields."""
        have, names = set(values) - {"schema", "digest"}, {field.name for field in fields(cls)}
        optional = {"exits", "room", "reference"} if values["schema"] == EARLIER else set[str]()
        optional |= set(ADDED) if values["schema"] != SCHEMA else set()
        if have - names or names - have - optional:
            raise ValueError(f"fields are missing or unknown: {', '.join(sorted(have ^ names))}")
        promise = {name: value for name, value in values["promise"].items() if (name, value) != ("failure", None)}
        given = {name: values[name] for name in have} | {"promise": Promise(**promise)}
        given["level"] = given["promise"].failure if given["level"] is None else given["level"]
        if set(given["conditions"]) != KEYS:
            raise ValueError(f"conditions are {', '.join(map(str, given['conditions']))}")
        return cls(**given)

    @property
    def _schema(self) -> str:
        return EARLIER if not self.keeps_losses else BEFORE if self.minimise is None else SCHEMA

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy and, beside it, this certificate: a file for `ExitPolicy.load` and for `--policy`."""
        write_json(Path(path), {**self.policy, "certificate": self.to_dict()})

    # ------------------------------------------------------------ does it apply?

    def mismatches(
        self,
        lm: LanguageModel,
        *,
        policy: ExitPolicy | None = None,
        task: Task | None = None,
        settings: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
    ) -> list[str]:
        """Why the promise does not hold for a use of the policy.

        Args:
            lm: The model in use, with its exits.
            policy: The policy in use; None: the one of the file.
            task: What is asked; None: not compared.
            settings: Options of `LanguageModel.stream`, `max_new_tokens` among them; None: not compared.
            batch_size: Prompts answered together; None: not compared.

        Returns:
            One line for each reason; none if everything is as it was.
        """
        if not self.certified:
            early = policy is not None and policy.threshold is not None
            if self.other_format:
                return [f"nothing was certified, not even full depth in {self.conditions['dtype']}"]
            return ["nothing was certified, but the policy lets tokens leave early"] if early else []
        have, now = self.conditions, conditions_of(lm, task, settings, batch_size)
        reasons = [] if self.keeps_losses else [OF_EARLIER]
        for name, what in (
            ("weights", f"the model's weights are not those of {have['model']}"),
            ("exits", "the trained exits are others, or missing, or not wanted"),
            ("chat_template", "the tokenizer's chat template is another"),
        ):
            if have[name] != now[name]:
                reasons.append(what)
        compared = {"dtype": "dtype", "batch_size": "batch size"}
        reasons += [
            f"{words} was {have[name]} and is {now[name]}"
            for name, words in compared.items()
            if now[name] is not None and have[name] != now[name]
        ]
        if policy is not None:
            certified = ExitPolicy.from_dict(self.policy).to_dict()  # with fields that were not there when it was made
            reasons += _differences("policy", as_json(certified), as_json(policy.to_dict()))
        if task is not None:
            reasons += _differences("task", have["task"], now["task"])
        return reasons if settings is None else reasons + self.other_settings(settings)

    def other_settings(self, settings: Mapping[str, Any]) -> list[str]:
        """Of `mismatches`, those of the settings, which a server looks at for every request."""
        return _differences("setting", self.conditions["settings"], as_json(dict(settings)))

    def drift(self, *, false_alarm: float = 0.01, seed: int = 0) -> Drift | None:
        """A watch for live answers that leave elsewhere (see `Drift`), one per stream; None: nothing to compare."""
        if not self.exits:
            return None
        return Drift(map(unpacked, self.exits), false_alarm=false_alarm, seed=seed)

    # ------------------------------------------------------------ in words

    def words(self) -> str:
        """The statement in plain English, and what it rests on."""
        return words(self)

    def finding(self) -> str:
        """What was found, in one sentence without its full stop."""
        return finding(self)


def load(path: str | os.PathLike[str]) -> Certificate | None:
    """The certificate of a policy file; None if it has none; a ValueError if it is damaged or does not follow."""
    ExitPolicy.load(path)
    values = read_object(Path(path), WRITE)
    if "certificate" not in values:
        return None
    try:
        return Certificate.from_dict(values["certificate"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def reference_of(num_layers: int, number_format: str | None = None) -> str:
    """What losses and costs are relative to, in words; a number format is told where it is another one."""
    other = "" if number_format is None else f" in {number_format}"
    return (
        f"the full model{other}: the same weights, prompts and settings, with every token read out after layer "
        f"{num_layers} of {num_layers} and no exit tested"
    )


def conditions_of(
    lm: LanguageModel, task: Task | None, settings: Mapping[str, Any] | None, batch_size: int | None
) -> dict[str, Any]:
    """What a promise holds for, as JSON values."""
    template = getattr(lm.tokenizer, "chat_template", None)
    return {
        "model": lm.name,
        "weights": fingerprint(lm.model),
        "dtype": lm.number_format,
        "exits": None if lm.exits is None else fingerprint(lm.exits),
        "chat_template": None if template is None else hashlib.sha256(json.dumps(template).encode()).hexdigest(),
        "task": None if task is None else as_json(vars(task)),
        "settings": None if settings is None else as_json(dict(settings)),
        "batch_size": batch_size,
    }


def _differences(what: str, have: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{what} {name.replace('_', ' ')} was {have.get(name)!r:.60} and is {now.get(name)!r:.60}"
        for name in dict.fromkeys([*have, *now])
        if have.get(name) != now.get(name)
    ]


# ---------------------------------------------------------------- what is said to those who use the policy


def certified_task(file: File | None) -> str | None:
    """Name of the task that the promise of a policy file is about; None without a file or a promise."""
    certificate = _certificate(file)
    return None if certificate is None or not certificate.certified else str(certificate.conditions["task"]["name"])


def check_drift(file: File | None, answers: Iterable[Sequence[int]]) -> None:
    """Log a warning where the tokens of answers, given by their exit layers, left elsewhere than certified."""
    certificate = _certificate(file)
    drift = None if certificate is None else certificate.drift()
    if drift is not None and any([drift.add(answer) for answer in answers]):
        log.warning("certificate may not apply: %s", drift.words())


def check_certificate(
    file: File | None, lm: LanguageModel, policy: ExitPolicy | None, *, task: Task | None = None,
    settings: dict[str, Any] | None = None, batch_size: int | None = None,
) -> None:  # fmt: skip
    """Log a warning where a certificate in a policy file does not apply to how the policy is used."""
    certificate = _certificate(file)
    if certificate is not None:
        reasons = certificate.mismatches(lm, policy=policy, task=task, settings=settings, batch_size=batch_size)
        for reason in reasons:
            log.warning("certificate does not apply: %s", reason)


def _certificate(file: File | None) -> Certificate | None:
    """That of a policy file, if there is one."""
    return None if file is None else load(Path(file))
