"""When to leave the network: an `ExitPolicy` is the whole rule, frozen and saved as JSON.

`offramp.core.plan.resolve` checks it against a model's depth and vocabulary, once, and gives what decoding follows.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from offramp.core.confidence import NAMES, RANGES, Confidence, Contrast
from offramp.core.vocabulary import FREQUENT, VOCABULARIES, rule_of
from offramp.values import choice, flag, nearest, number, plain, whole

Skipped = Literal["propagate", "defer", "verify"]
DRAFTER = 0
"""The layer that a drafter is said to stand after (`offramp.core.adapters`): before the first block."""
_DRAFTS = ("softmax", "max", "entropy", "static")
"""Confidences that need nothing but the scores of one readout."""

_SCHEMA = "offramp/policy/1"
_FAR = 2**31 - 1  # of a layer that no model has; `resolve` knows the model's own
_KEPT = "at least 2 tokens must be kept"
WRITE = "write a policy with ExitPolicy.save"
"""What to do about a damaged file."""
_WHOLE = {
    "min_layer": (0, "layers count from 1; 0 is the drafter"), "prompt_layer": (-_FAR, ""),
    "vocabulary_size": (2, _KEPT), "vocabulary_floor": (2, _KEPT), "vocabulary_start": (2, _KEPT),
    "draft_length": (1, "at least one token must be drafted"),
}  # fmt: skip
"""Fields that are whole numbers: the smallest allowed, and what is said of smaller ones."""


@dataclass(frozen=True)
class ExitPolicy:
    """When a token leaves the network, on which vocabulary it is judged, and what happens to the layers it skips.

    Attributes:
        confidence: "softmax" (gap of the two largest probabilities), "max", "entropy", "state", "classifier" (of the
            model's trained exits, which must have some; test only after their layers), "contrastive", "jsd", "laplace",
            "conformal", "avcs" (these three of the exits' posterior, see `offramp.hub.exit_posterior`; test only where
            it was fitted), "static" (always leaves after `min_layer`; under "verify", every token is drafted there), or
            a callable (see `offramp.core.confidence.Confidence`).
        threshold: Leave when the confidence is strictly above it: one number, or one per exit layer. At or above the
            measure's maximum (1), and with None, no token leaves early; -inf lets every token leave at the first exit.
        min_layer: Exits are tested after layers min_layer .. L-1. None: the first of `exit_layers`, or half the depth
            (see there for models with trained exits). 0: the drafter of the model's exits, and no other exit, proposes
            tokens from before the first block (see `offramp.core.adapters`); needs skipped="verify".
        vocabulary: None (all V tokens are scored at each test), "fixed", "decaying" or "adaptive" (all at the first
            test of a token, then fewer; no effect for "state" and "classifier", whose tests score none). "frequent":
            the exits' frequent tokens at every test, and where a token leaves, so that others are chosen by the last
            layer only (unless logits processors leave none of the frequent ones); "frequent-fixed",
            "frequent-decaying", "frequent-adaptive": at the first test, then fewer of them.
        vocabulary_size: Tokens kept after the first test, 2..V; None: the decay function's value at `min_layer`.
        skipped: Keys and values of skipped layers. "propagate": projected from the frozen state (approximate).
            "defer": the state waits and goes through the deep layers with the next token that goes deep (exact cache).
            "verify": as "defer", and the deep pass checks the tokens; output equals the full model's (up to rounding:
            in low precision, ties of a chunk's and a single token's products may fall differently). Logits processors
            must depend on nothing but the ids and scores they are given. Each row of a batch waits and drafts on its
            own.
        exit_layers: Test only after these layers (each in min_layer .. L-1); None: after all of them, or, if the model
            has trained exits and `min_layer` is None too, after those.
        decode_from: "logits", or "contrastive": the emitted token comes from the contrastive scores.
        contrast: Options of the contrastive measures.
        vocabulary_floor: Smallest size the decaying and adaptive rules reach; None: ⌈V / 128⌉, at least 2.
        vocabulary_start: k_1 of the decaying rule; None: V. (35000 with floor 250 in the source documents.)
        vocabulary_shrink: Strength s of the adaptive rule, in (0, 1].
        vocabulary_recursive: Let the decaying rule start from the previous layer's size.
        decay: None, or lower the threshold along the output: "multiplicative" 0.9τ + 0.1τ·exp(-θt/N) (the code of CALM
            and FREE) or "additive" 0.9τ + 0.1·exp(-θt/N) clipped to [0, 1] (the CALM paper).
        decay_rate: θ.
        draft_length: Under "verify", most tokens drafted before a deep pass.
        draft: Under "verify": "fixed", tokens are drafted where they pass the threshold; or "adaptive", where one more
            draft is likely to pay by the acceptance seen so far (`offramp.core.verifying.Pace`), the thresholds being
            what is believed at first. The text is the same.
        accept: Under "verify", a drafted token also stands where it is the full model's second choice with at least
            this share of the first one's probability, in (0, 1]. 1: only the first choice does, and the text is the
            full model's. Below, more drafts stand and the text may be another one: `offramp.calibration` can certify
            how far from it (a token at a time, the idea of Medusa's typical acceptance, Cai et al. 2024, arXiv
            2401.10774, section 2.3.1, which has another rule). Best tokens only, not draws.
        batch: "rows": each row of a batch leaves at its own layer. "all": no row leaves before all would.
        adaptive: FREE's adaptive threshold (see `offramp.core.adaptive_threshold`): `threshold` is where it starts, and
            what the deep layers say about tokens that left moves it from sequence to sequence. A heuristic without any
            guarantee, whose results depend on what was generated before. Needs skipped="defer" and a single exit: the
            one of `exit_layers`, or `min_layer`.
        prompt_layer: Layers that the whole prompt goes through; behind them only its last position goes on, and the
            others' keys and values are projected from where they stopped (approximate, as in SwiftKV, arXiv
            2410.03960). None or L: the prompt runs at full depth (a static policy's: up to `min_layer`, and not
            deeper). Decoder-only models, "propagate" and "defer" only.
    """

    confidence: str | Confidence = "softmax"
    threshold: float | tuple[float, ...] | None = 0.9
    min_layer: int | None = None
    vocabulary: str | None = None
    vocabulary_size: int | None = None
    skipped: Skipped = "propagate"
    exit_layers: tuple[int, ...] | None = None
    decode_from: Literal["logits", "contrastive"] = "logits"
    contrast: Contrast = field(default_factory=Contrast)
    vocabulary_floor: int | None = None
    vocabulary_start: int | None = None
    vocabulary_shrink: float = 0.9
    vocabulary_recursive: bool = False
    decay: Literal["multiplicative", "additive"] | None = None
    decay_rate: float = 4.0
    draft_length: int = 8
    draft: Literal["fixed", "adaptive"] = "fixed"
    accept: float = 1.0
    batch: Literal["rows", "all"] = "rows"
    adaptive: bool = False
    prompt_layer: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.confidence):
            choice("confidence", self.confidence, (*NAMES, "static"))
        choice("skipped", self.skipped, get_args(Skipped))
        choice("decode_from", self.decode_from, ("logits", "contrastive"))
        choice("decay", self.decay, (None, "multiplicative", "additive"))
        choice("batch", self.batch, ("rows", "all"))
        choice("draft", self.draft, ("fixed", "adaptive"))
        if self.draft == "adaptive" and self.skipped != "verify":
            raise ValueError(f"draft='adaptive' needs skipped='verify', not {self.skipped!r}: else nothing is drafted")
        if self.draft == "adaptive" and self.batch == "all":
            raise ValueError("draft='adaptive' decides for each row of a batch alone; leave batch='all' out")
        choice("vocabulary", self.vocabulary, (None, *VOCABULARIES))
        self._take_numbers()
        if self.accept < 1 and self.skipped != "verify":
            raise ValueError(
                f"accept={self.accept} needs skipped='verify', not {self.skipped!r}: else nothing is checked"
            )
        self._check_layers()
        self._check_drafter()
        self._check_thresholds()
        self._check_vocabulary()
        self._check_adaptive()
        if self.decode_from == "contrastive" and self.confidence not in ("contrastive", "jsd"):
            raise ValueError(
                f"decode_from='contrastive' needs confidence 'contrastive' or 'jsd', but it is {self.confidence!r}"
            )
        if (self.skipped == "verify" or self.adaptive) and self.contrast.full:
            way = "adaptive" if self.adaptive else "skipped='verify'"
            raise ValueError(f"{way} checks tokens against the full model's own logits; leave contrast full away")

    def __repr__(self) -> str:
        """What differs from the defaults: the expression that makes an equal policy, if its measure has a name."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {name: given[name] for name in given if given[name] != getattr(_PLAIN, name)}
        return f"ExitPolicy({', '.join(f'{name}={value!r}' for name, value in plain.items())})"

    @property
    def drafter(self) -> bool:
        """Whether tokens are drafted before the first block."""
        return self.min_layer == DRAFTER or self.exit_layers == (DRAFTER,)

    def _check_drafter(self) -> None:
        if not self.drafter:
            return
        name = "min_layer" if self.min_layer == DRAFTER else "exit_layers"
        where = f"{name} is {getattr(self, name)}: layer 0 is the drafter, behind which exits count from 1"
        if self.skipped != "verify":
            raise ValueError(
                f"{where}; what it drafts must be checked, but skipped is {self.skipped!r}: give 'verify', or a layer "
                "from 1 on"
            )
        if self.exit_layers not in (None, (DRAFTER,)):
            raise ValueError(f"{where}, and exit_layers is {self.exit_layers}; there are no other exits beside it")
        if self.threshold is not None and isinstance(self.confidence, str) and self.confidence not in _DRAFTS:
            raise ValueError(
                f"{where}; confidence {self.confidence!r} cannot judge its drafts, choose one of {', '.join(_DRAFTS)}"
            )

    @property
    def is_lossless(self) -> bool:
        """Whether the text is the full model's, up to rounding: what is drafted is checked, and must be its choice."""
        return self.skipped == "verify" and self.accept == 1

    def _take_numbers(self) -> None:
        """Numbers as plain Python ones, lists as tuples: equal policies are equal, and all of them can be saved.

        Files come from anywhere: a number in quotes must be called so, here and not in the middle of decoding.

        Raises:
            ValueError: A value is of another kind, or outside what is allowed.
        """
        taken: dict[str, Any] = {}
        for name, (least, why) in _WHOLE.items():
            if (value := getattr(self, name)) is not None or name == "draft_length":
                taken[name] = whole(name, value, least, why=why)
        taken["vocabulary_shrink"] = number("vocabulary_shrink", self.vocabulary_shrink, 0, 1, above=True)
        why = "it is a share of the first choice's probability, in (0, 1]; 1 is lossless"
        taken["accept"] = number("accept", self.accept, 0, 1, above=True, why=why)
        taken["decay_rate"] = number("decay_rate", self.decay_rate, 0)
        taken |= {name: flag(name, getattr(self, name)) for name in ("vocabulary_recursive", "adaptive")}
        several = isinstance(self.threshold, list | tuple)
        values = self.threshold if several else (self.threshold,)
        numbers = tuple(map(plain, values))  # type: ignore[arg-type]
        if self.threshold is not None:
            if None in numbers:
                raise ValueError(f"threshold is {self.threshold!r}; it must be a number, one number per exit, or None")
            taken["threshold"] = numbers if several else numbers[0]
        if (layers := self.exit_layers) is not None:
            if not isinstance(layers, list | tuple):
                raise ValueError(f"exit_layers is {layers!r}; it must be ascending layer numbers, or None for all")
            taken["exit_layers"] = tuple(whole("a layer of exit_layers", layer, -_FAR, _FAR) for layer in layers)
        if not isinstance(self.contrast, Contrast):
            raise ValueError(f"contrast is {self.contrast!r}; it must be a Contrast")
        for name, value in taken.items():
            object.__setattr__(self, name, value)

    def _check_layers(self) -> None:
        if self.confidence == "static" and self.min_layer is None:
            raise ValueError("a static policy always leaves after min_layer: give it, e.g. min_layer=20")
        if self.prompt_layer is None:
            return
        if self.skipped == "verify":
            raise ValueError(
                "skipped='verify' gives the full model's text, which no shortened prompt does; leave prompt_layer away"
            )
        if self.confidence == "static" and self.min_layer is not None and self.prompt_layer > self.min_layer:
            raise ValueError(
                f"prompt_layer is {self.prompt_layer}; a static policy leaves after min_layer, {self.min_layer}, and "
                "its prompt goes no deeper: give a prompt_layer up to there, or none"
            )

    def _check_vocabulary(self) -> None:
        if self.vocabulary_size is not None and rule_of(self.vocabulary) is None:
            raise ValueError(
                f"vocabulary_size is {self.vocabulary_size} but vocabulary is {self.vocabulary!r}; choose one of "
                f"{', '.join(name for name in VOCABULARIES if rule_of(name))}"
            )
        if self.frequent and self.confidence == "static" and self.skipped != "verify":
            raise ValueError(
                f"a static policy emits every token at its exit, but vocabulary={self.vocabulary!r} leaves others than "
                "frequent tokens to the last layer; add skipped='verify', or leave vocabulary away"
            )

    @property
    def frequent(self) -> bool:
        """Whether tests score the exits' frequent tokens only."""
        return self.vocabulary is not None and self.vocabulary.startswith(FREQUENT)

    def _check_thresholds(self) -> None:
        if self.threshold is None or self.confidence == "static":
            return
        low, high = RANGES.get(self.confidence, (-math.inf, math.inf)) if isinstance(self.confidence, str) else (-1, 1)
        values = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        for value in values:
            if not (low <= value <= high or value == -math.inf):
                raise ValueError(
                    f"threshold is {value}; the values of confidence {self.confidence!r} lie in [{low:g}, {high:g}] "
                    f"({high:g} or None: never leave early; -inf: always)"
                )

    def _check_adaptive(self) -> None:
        if not self.adaptive:
            return
        if self.skipped != "defer":
            raise ValueError(
                f"adaptive learns where skipped positions go deep: it needs skipped='defer', not {self.skipped!r}"
            )
        if self.threshold is None or isinstance(self.threshold, tuple):
            raise ValueError(f"adaptive starts at a threshold that is one number, but it is {self.threshold!r}")
        if self.confidence in ("static", "state"):
            raise ValueError(
                f"adaptive needs a confidence that a single exit has, but it is {self.confidence!r}; use e.g. 'softmax'"
            )
        if self.exit_layers is not None and len(self.exit_layers) != 1:
            raise ValueError(
                f"adaptive is for a single exit, but exit_layers is {self.exit_layers}; choose one of them"
            )

    # ------------------------------------------------------------ files

    def to_dict(self) -> dict[str, Any]:
        """The policy as JSON values.

        Returns:
            All fields and a `schema`; an infinite threshold as a string.

        Raises:
            ValueError: The confidence is a callable, which has no name to save.
        """
        if not isinstance(self.confidence, str):
            raise ValueError(
                f"a policy with the callable confidence {self.confidence!r} cannot be saved; use a named one"
            )
        values = asdict(self)
        if isinstance(self.threshold, tuple):
            values["threshold"] = [str(t) if math.isinf(t) else t for t in self.threshold]
        elif self.threshold is not None and math.isinf(self.threshold):
            values["threshold"] = str(self.threshold)
        return {"schema": _SCHEMA, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExitPolicy:
        """The inverse of `to_dict`; a certificate beside the policy is left to `offramp.calibration.load`.

        Returns:
            The policy.

        Raises:
            ValueError: A key is unknown or a value is not allowed.
        """
        if (schema := values.get("schema", _SCHEMA)) != _SCHEMA:
            raise ValueError(f"the schema is {schema!r}, not {_SCHEMA!r}: this is no policy, or one of another version")
        given = _known(cls, {key: value for key, value in values.items() if key not in ("schema", "certificate")})
        threshold = given.get("threshold")
        if isinstance(threshold, list):
            given["threshold"] = tuple(-math.inf if t == "-inf" else t for t in threshold)
        elif threshold == "-inf":
            given["threshold"] = -math.inf
        if isinstance(given.get("contrast"), Mapping):
            given["contrast"] = Contrast(**_known(Contrast, given["contrast"]))
        return cls(**given)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as a JSON file.

        Raises:
            ValueError: The confidence is a callable.
        """
        from offramp.runs.files import write_json  # decoding touches no files

        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExitPolicy:
        """Read a policy that `save` wrote.

        Returns:
            The policy.

        Raises:
            ValueError: The file is not a policy.
            FileNotFoundError: There is no such file.
        """
        from offramp.runs.bounded import read_object

        try:
            return cls.from_dict(read_object(Path(path), WRITE))
        except (ValueError, TypeError) as error:
            raise ValueError(
                str(error) if str(path) in str(error) else f"{path} is no policy: {' '.join(str(error).split())}"
            ) from error

    @classmethod
    def of(cls, policy: ExitPolicy | str | os.PathLike[str] | None) -> ExitPolicy | None:
        """The policy, read if it is the name of a file; None for None.

        Returns:
            The policy.

        Raises:
            ValueError: It is something else, or the file is not a policy.
        """
        if policy is None or isinstance(policy, ExitPolicy):
            return policy
        if isinstance(policy, str | os.PathLike):
            return cls.load(policy)
        raise ValueError(f"the policy is a {type(policy).__name__}; give an ExitPolicy, the file of one, or None")

    # ------------------------------------------------------------ use

    def custom_generate(self, exits: Any = None) -> Any:
        """A decoding method for `model.generate(**inputs, custom_generate=policy.custom_generate())`.

        Args:
            exits: Exits trained for the model, such as `lm.exits`.

        Returns:
            An `offramp.core.custom_generate.CustomGenerate`, which is what `generate` takes. Keep it for many calls if
            the policy is adaptive: it holds what was learnt.
        """
        home = importlib.import_module("offramp.core.custom_generate")  # by name: a policy knows no decoder
        return home.CustomGenerate(self, exits)


_PLAIN = ExitPolicy()
DRAFTS = ExitPolicy("static", min_layer=DRAFTER, vocabulary=FREQUENT, skipped="verify", draft_length=2)
"""Two drafts in a row by a drafter, checked by the full model, whose text it is: with SmolLM2, more paid only for a
drafter that agreed at 60 % of the positions, and thresholds for neither."""


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, all of them fields of `cls`."""
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"unknown policy fields {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            f"{nearest(unknown[0], known)}"
        )
    return dict(values)
