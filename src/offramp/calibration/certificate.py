"""The certificate of a policy: what is promised, how it was found, and what it holds for.

It stands beside the policy in one JSON file, under "certificate": `ExitPolicy.load` reads the policy and leaves the
certificate alone, `load` reads the certificate.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.bounded import read_object
from offramp.calibration.drift import Drift, unpacked
from offramp.calibration.evidence import require_evidence
from offramp.calibration.promise import CRC, Promise
from offramp.calibration.room import Room
from offramp.core.exits import fingerprint
from offramp.core.policy import WRITE, ExitPolicy
from offramp.digests import of as digest
from offramp.files import write_json

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.tasks import Task

SCHEMA = "offramp/certificate/2"
EARLIER = "offramp/certificate/1"
"""Kept no losses, so that nothing follows from what is in it; it is read, and applies to nothing."""
KEYS = frozenset(("model", "weights", "dtype", "exits", "chat_template", "task", "settings", "batch_size"))
"""Of `conditions`."""


PROMPTS_ALONE = "prompts or lengths save, exits do not"
COSTS_MORE = "THE POLICY COSTS MORE than the full model, which loses nothing: use that"
OF_EARLIER = "it is of an earlier version, which did not keep the losses that a promise follows from; calibrate again"


@dataclass(frozen=True)
class Certificate:
    """What is known about a policy.

    Attributes:
        certified: Whether anything is promised; if not, the policy never leaves early.
        promise: Tolerance, failure, kind of loss, metric, margin, bound and unit.
        policy: The certified policy, as JSON values.
        order: "path", "chains" or "pareto": how the grid was gone through.
        n: Independent draws that certified: prompts, or groups of them.
        splits: Examples and groups by part, as [examples, groups].
        seed: Of the splits and of the order of draws.
        base: The policy whose open values the grid filled in.
        grid: What was tried.
        tests: The settings that were looked at, in their order: name, value on the grid (`knob`), what their policies
            change of the base, mean loss, p-value, passed, cost (FLOPs over the full model's) of those that passed, and
            the losses, packed (`offramp.calibration.evidence`).
        selected: Which of them was chosen; None: none.
        level: At which each sequence was tested.
        needed: If nothing is certified, about how many draws would certify one of the settings that were looked at, if
            losses stay as they are: their mean, or for the bound "wsr" all of them, repeated and shuffled
            (`Promise.needed_like`). None: no number would, or none within reason.
        conditions: Model, its weights' and exits' fingerprints, dtype, task, chat template, decoding settings, batch
            size: what the promise holds for.
        data: Name and SHA-256 of the examples.
        estimates: By part, mean loss and costs with 95 % bootstrap intervals, and the histogram of exit layers. On the
            part "test", which nothing was chosen by, also an upper limit of the mean loss by the promise's bound.
        versions: Of offramp, torch and transformers.
        room: What there was to lose (`offramp.calibration.room.Room`), as JSON values; None in earlier versions.
        reference: What losses and costs are relative to.
        exits: Where the tokens of each answer left (`offramp.calibration.drift.packed`), for `drift`: of the held-out
            part, or without one of the certification part. None: nothing was certified, prompts of one group may be
            alike, or the certificate is of an earlier version.
    """

    certified: bool
    promise: Promise
    policy: dict[str, Any]
    order: str
    n: int
    splits: dict[str, list[int]]
    seed: int
    base: dict[str, Any]
    grid: dict[str, Any]
    tests: list[dict[str, Any]]
    selected: int | None
    level: float
    needed: int | None
    conditions: dict[str, Any]
    data: dict[str, Any]
    estimates: dict[str, Any]
    versions: dict[str, str]
    room: dict[str, Any] | None = None
    reference: str = "the full model"
    exits: list[str] | None = None

    # ------------------------------------------------------------ files

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with a digest; conformal risk control has no failure probability."""
        values = {"schema": SCHEMA if self.keeps_losses else EARLIER, **asdict(self)}
        if self.promise.bound == CRC:
            values["promise"]["failure"] = values["level"] = None
        return {**values, "digest": digest(_json(values), ())}

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
        if schema not in (SCHEMA, EARLIER):
            raise ValueError(f"this is no certificate of schema {SCHEMA!r}, or one of another version; calibrate again")
        try:
            certificate = cls._read(values)
            if schema == SCHEMA:
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
        if have - names or names - have - optional:
            raise ValueError(f"fields are missing or unknown: {', '.join(sorted(have ^ names))}")
        promise = {name: value for name, value in values["promise"].items() if (name, value) != ("failure", None)}
        given = {name: values[name] for name in have} | {"promise": Promise(**promise)}
        given["level"] = given["promise"].failure if given["level"] is None else given["level"]
        if set(given["conditions"]) != KEYS:
            raise ValueError(f"conditions are {', '.join(map(str, given['conditions']))}")
        return cls(**given)

    @property
    def keeps_losses(self) -> bool:
        """Whether the statement follows from what is kept; it does not in the first version."""
        return self.room is not None and all("losses" in test for test in self.tests)

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
            reasons += _differences("policy", self.policy, _json(policy.to_dict()))
        if task is not None:
            reasons += _differences("task", have["task"], now["task"])
        if settings is not None:
            reasons += _differences("setting", have["settings"], now["settings"])
        return reasons

    def drift(self, *, false_alarm: float = 0.01, seed: int = 0) -> Drift | None:
        """What watches live answers for tokens that leave elsewhere than they did; one per stream of answers.

        Args:
            false_alarm: See `Drift`.
            seed: See `Drift`.

        Returns:
            A new one; None if there is nothing to compare with.
        """
        if not self.exits:
            return None
        return Drift(map(unpacked, self.exits), false_alarm=false_alarm, seed=seed)

    # ------------------------------------------------------------ in words

    def words(self) -> str:
        """The statement in plain English, and what it rests on."""
        room = [] if self.room is None else [Room(**self.room).words(self.promise)]
        if self.certified:
            return " ".join([self._statement(), self._search(), self._found(), *room, self._scope()])
        if self.room is not None and not self.tests:
            why = Room(**self.room).refusal(self.promise)
            return f"{self._refused()} The promise would say nothing. {why}"
        return " ".join([self._refused(), self._nothing(), self._search(), *room])

    def _refused(self) -> str:
        p = self.promise
        wanted = f"mean loss at most {p.tolerance:g}" + ("" if p.bound == CRC else f", failure {p.failure:g}")
        return f"Nothing was certified ({wanted}): the policy never leaves early, which is the full model."

    def _statement(self) -> str:
        p = self.promise
        mean = {
            "risk": f"lose at most {p.tolerance:g} of {p.metric} on average by leaving early, where a prompt that "
            "gains counts as one that loses nothing",
            "signed": f"lose at most {p.tolerance:g} of {p.metric} on average by leaving early, where prompts that "
            "gain make up for others that lose",
            "textual": f"get answers at most {p.tolerance:g} away from the full model's on average, where 1 - "
            f"{p.metric} of the two texts is their distance",
            "tail": f"lose more than {p.margin} of {p.metric} by leaving early with a probability of at most "
            f"{p.tolerance:g}, which says nothing about how much those lose",
        }[p.kind]
        who = "New prompts" if p.unit == "prompt" else "New groups of prompts, each counted once,"
        if p.bound == CRC:
            return (
                f"{who} {mean}: a guarantee on the mean over calibrations (conformal risk control). It has no failure "
                "probability, and a single calibration such as this one may exceed the tolerance."
            )
        return (
            f"{who} {mean}. This holds with probability at least {1 - p.failure:g} over the draw of the {self.n} "
            f"certification {p.unit}s, which must be independent and like the new ones."
        )

    def _search(self) -> str:
        how = {
            "path": "a sequence fixed in advance",
            "chains": f"sequences fixed in advance, each at level {self.level:.3g}",
            "pareto": "a sequence found on other prompts, the tuning part",
        }[self.order]
        passed = sum(test["passed"] for test in self.tests)
        text = f"{len(self.tests)} settings were tested in {how}, bound {self.promise.bound}; {passed} passed."
        examples, groups = self.splits["certification"]
        if self.promise.unit == "prompt" and groups < examples:
            text += f" The {examples} prompts come from {groups} groups and were taken to be independent."
        return text

    def _found(self) -> str:
        part = "test" if "test" in self.estimates else "certification"
        seen = self.estimates[part]
        loss, flops = seen["loss"], seen["flops_ratio"]
        where = "held-out" if part == "test" else "certification (which it was chosen by)"
        limit = f", at most {seen['upper']:.3g} with confidence {1 - self.promise.failure:g}" if "upper" in seen else ""
        mean = "mean loss" if self.promise.unit == "prompt" else "mean of their groups' mean losses"
        text = f"On the {seen['examples']} {where} prompts the {mean} was {loss['value']:.3g}{limit}, at "
        text += f"{flops['value']:.3f} of the full model's FLOPs, prompts included"
        if flops["low"] is not None:
            text += f" ({flops['low']:.3f} to {flops['high']:.3f})"
        token = seen.get("flops_per_token_ratio")
        if token is not None:
            text += f", and {token['value']:.3f} of its FLOPs per generated token, without encoder and prompt"
        if not self.saves:
            return f"{text}: {COSTS_MORE}."
        return f"{text}: {PROMPTS_ALONE}." if token is not None and token["value"] >= 1 else f"{text}."

    @property
    def saves(self) -> bool:
        """Whether the policy was certified and costs fewer FLOPs than the full model, on the held-out part if any."""
        seen = self.estimates.get("test", self.estimates["certification"])
        return self.certified and bool(seen["flops_ratio"]["value"] < 1)

    def _scope(self) -> str:
        c = self.conditions
        exits = "without trained exits" if c["exits"] is None else f"with the exits {c['exits'][:12]}"
        tokens = c["settings"].get("max_new_tokens")
        return (
            f"It is about prompts on average, not about each, and only for {c['model']} (weights {c['weights'][:12]}) "
            f"in {c['dtype']} {exits}, {c['task']['name']}, answers of at most {tokens} tokens, {c['batch_size']} at a "
            f"time. Losses and costs are relative to {self.reference}."
        )

    def _nothing(self) -> str:
        p, safest = self.promise, self.tests[0]
        lowest = min(test["loss"] for test in self.tests)
        if self.needed is None and lowest < p.tolerance:
            return (
                f"The lowest mean loss, {lowest:.4g}, is so close to the tolerance that no reasonable number of "
                "prompts would tell them apart."
            )
        if self.needed is None:
            return (
                f"No number of prompts would change that: the mean loss of {safest['name']}, the safest that was "
                f"looked at, is {safest['loss']:.3g} (lowest of all: {lowest:.3g})."
            )
        stay = "losses stay as they are (lowest mean" if p.bound == "wsr" else "mean losses stay as they are (lowest"
        return (
            f"If {stay}: {lowest:.3g}), about {self.needed} certification {p.unit}s would be needed; there were "
            f"{self.n}."
        )


def load(path: str | os.PathLike[str]) -> Certificate | None:
    """Read the certificate of a policy file.

    Args:
        path: A file that `ExitPolicy.load` reads.

    Returns:
        The certificate; None if the policy has none.

    Raises:
        ValueError: The file is no policy, or its certificate is of another version, damaged, or says something else
            than follows from its losses.
    """
    ExitPolicy.load(path)
    values = read_object(Path(path), WRITE)
    if "certificate" not in values:
        return None
    try:
        return Certificate.from_dict(values["certificate"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def reference_of(num_layers: int) -> str:
    """What losses and costs are relative to, in words."""
    return (
        "the full model: the same weights, prompts and settings, with every token read out after layer "
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
        "task": None if task is None else _json(vars(task)),
        "settings": None if settings is None else _json(dict(settings)),
        "batch_size": batch_size,
    }


def _json(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def _differences(what: str, have: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{what} {name.replace('_', ' ')} was {have.get(name)!r:.60} and is {now.get(name)!r:.60}"
        for name in dict.fromkeys([*have, *now])
        if have.get(name) != now.get(name)
    ]
