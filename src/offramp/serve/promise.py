"""What a policy's certificate promises, whether it does for a request, and whether the promise is kept.

Some answers are made again at full depth, and a bet is made that too much is lost. The loss of an answer is its
distance from full depth's, as in the promise; the bet is `offramp.risk.wealth`. It may be looked at after every
comparison: as long as the promise is kept, it ever says otherwise with at most the probability with which the promise
itself may fail. Which answers are compared is drawn when they end, and they are compared one at a time in that order,
so that the order has no part in what is lost.

Where the promise is about something that full depth does not show, what is seen is told, and no alarm is rung.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from offramp.core.generation_inputs import in_effect
from offramp.core.running import OWN
from offramp.risk import lower_limit, wealth
from offramp.serve.answer import Answer, Event
from offramp.serve.requests import ApiError

if TYPE_CHECKING:
    from offramp.calibration.certificate import Certificate
    from offramp.calibration.drift import Drift
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy
    from offramp.serve.metrics import Metrics

NONE_ON_FILE = (
    "No certificate is on file for this policy: nothing is promised about answers that leave early. "
    "offramp calibrate makes one."
)
CHECKED = (
    "The full model checks every draft, so answers are the full model's own. No certificate is on file, and none is "
    "needed for that; nothing is promised about time."
)
FULL = "No exit is tested: every token is the full model's, and nothing is lost by leaving early."
"""What is said where there is no policy."""


class Standing:
    """A promise, and what it is about.

    Args:
        lm: The model in use.
        policy: The policy in use; None: the full model.
        certificate: Of the policy's file; None: it has none.

    Attributes:
        against_all: Why it is about no request here, one line for each reason.
        statement: It, in words.
    """

    def __init__(self, lm: LanguageModel, policy: ExitPolicy | None, certificate: Certificate | None) -> None:
        self.certificate = certificate
        self._own = lm.model.generation_config
        self.against_all = [] if certificate is None else certificate.mismatches(lm, policy=policy)
        if certificate is not None and not certificate.certified:
            self.against_all.append("nothing was certified")
        checked = policy is not None and policy.skipped == "verify" and policy.accept == 1
        self.statement = FULL if policy is None else CHECKED if checked else NONE_ON_FILE
        if certificate is not None:
            self.statement = certificate.words()

    @property
    def most_new_tokens(self) -> int | None:
        """Most tokens of the answers that it is about; None: nothing is promised, or of any number."""
        if self.certificate is None:
            return None
        most = self.certificate.conditions["settings"].get("max_new_tokens")
        return most if isinstance(most, int) else None

    @property
    def testable(self) -> bool:
        """Whether answers at full depth show if it is kept: it is about their distance, of prompts one by one."""
        c = self.certificate
        return (
            c is not None and not self.against_all and not c.other_format
            and c.promise.kind == "textual" and c.promise.unit == "prompt"
        )  # fmt: skip

    @property
    def untestable(self) -> str:
        """Why not."""
        if (c := self.certificate) is None:
            return "no certificate is on file"
        if self.against_all:
            return f"the certificate does not apply: {'; '.join(self.against_all)}"
        if c.other_format:
            return "the promise is relative to the full model in another number format, which is not loaded"
        if c.promise.kind != "textual":
            return f"the promise ({c.promise.kind}) is about references, which nobody gives a server"
        return "the promise is about groups of prompts, and which group a request is of is not known"

    def against(self, settings: Mapping[str, Any], *, overridden: bool) -> list[str]:
        """Why the promise is not about a request.

        Args:
            settings: Its options, by their names in `LanguageModel.generate`; that it is greedy left out.
            overridden: Whether it goes by another threshold than the policy's.

        Returns:
            One line for each reason; none if it is, as far as can be seen: whether its prompt is like those of
            certification cannot.
        """
        if self.certificate is None:
            return []
        reasons = [*self.against_all, *self.certificate.other_settings(in_effect(settings, self._own))]
        return [*reasons, "the request does not go by the certified policy"] if overridden else reasons

    def told(self, against: list[str]) -> dict[str, Any]:
        """The part of an answer about it, as JSON values."""
        told: dict[str, Any] = {
            "holds_for_this_request": self.certificate is not None and not against,
            "statement": self.statement,
        }
        if self.certificate is not None:
            told["reasons"] = against
        return told


# ---------------------------------------------------------------- is it kept?

HOLDS, NOT_TESTED, BROKEN = "holds", "not tested", "broken"
"""Of a promise: not refuted by any comparison; none was made; refuted."""
_MOST_PENDING = 16
_ANSWERS = 20_000
"""Answers after which the look at exit layers begins anew, since it keeps a number for each."""
_LEVEL = 0.05
"""Where a promise has no failure probability, or there is none: of the limit that is told."""


class Watch:
    """Compares a share of the greedy answers with full depth.

    Args:
        promised: What is promised, if anything.
        metrics: Is told what was compared.
        share: Of greedy answers that go by the policy, in [0, 1].
        to_full: Go to full depth for good when the promise is found broken.
        draw: Which answers are compared.
    """

    def __init__(
        self, promised: Standing, metrics: Metrics, *, share: float, to_full: bool, draw: random.Random
    ) -> None:
        self._promised, self._metrics = promised, metrics
        self._share, self._to_full, self._draw = share, to_full, draw
        self._pending: deque[Answer] = deque()
        self._early: Answer | None = None
        self.compared = self.differing = 0
        self.losses: list[float] = []
        self.most = 1.0
        self._layers: Drift | None = self._new_layers()
        self._elsewhere = ""

    # ------------------------------------------------------------ what is seen

    @property
    def failure(self) -> float:
        """Most probability of a false alarm."""
        c = self._promised.certificate
        return c.promise.failure if c is not None and c.promise.bound != "crc" else _LEVEL

    @property
    def state(self) -> str:
        """`HOLDS`, `NOT_TESTED` or `BROKEN`."""
        if self.most >= 1 / self.failure:
            return BROKEN
        return HOLDS if self.losses else NOT_TESTED

    @property
    def full(self) -> bool:
        """Whether answers go to full depth from now on."""
        return self._to_full and self.state == BROKEN

    @property
    def against(self) -> list[str]:
        """What speaks against the promise for the answers of today."""
        found = [self.words()] if self.state == BROKEN else []
        return [*found, self._elsewhere] if self._elsewhere else found

    def words(self) -> str:
        """What the comparisons say, in one line."""
        if not self.compared:
            return "no answer was compared with full depth's yet"
        seen = f"{self.differing} of {self.compared} answers differ from full depth's"
        if not self._promised.testable:
            return f"{seen}; the promise itself is not tested: {self._promised.untestable}"
        assert self._promised.certificate is not None
        promise, losses = self._promised.certificate.promise, self.losses
        if not losses:
            return f"{seen}; none of them is one that the promise is about"
        low = lower_limit(losses, failure=self.failure)
        mean = (
            f"mean loss {sum(losses) / len(losses):.3g} over {len(losses)} that the promise is about, above {low:.3g}"
        )
        verdict = "which breaks it" if self.state == BROKEN else "which does not refute it"
        return (
            f"{seen}; {mean} at all times with probability {1 - self.failure:g}; promised is at most "
            f"{promise.tolerance:g}, {verdict}"
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return {
            "promise": self.state, "words": self.words(), "compared": self.compared, "differing": self.differing,
            "exit_layers": None if self._layers is None else self._elsewhere or self._layers.words(),
            "full_depth": self.full,
        }  # fmt: skip

    # ------------------------------------------------------------ in the thread of the batch

    def ended(self, answer: Answer) -> None:
        """Take note of an answer; perhaps it will be compared."""
        if answer.check:
            self._compare(answer)
            return
        asked = answer.asked
        if asked.threshold != OWN or asked.sampler.sample:
            return
        if answer.promised:
            self._look(answer)
        if self._draw.random() >= self._share:
            return
        if len(self._pending) < _MOST_PENDING:
            self._pending.append(answer)
        else:
            self._metrics.checks_skipped.inc()

    @property
    def due(self) -> bool:
        """Whether there is an answer to compare, and no other is at work."""
        return self._early is None and bool(self._pending)

    def next(self) -> Answer:
        """The next answer to make at full depth; only where one is due."""
        early = self._early = self._pending.popleft()
        full = replace(early.asked, threshold=None, top=0)
        return Answer(full, early.decode, self._heard, stop=early.stop, check=True)

    def _heard(self, event: Event) -> None:
        if isinstance(event, ApiError):  # it will not end
            self._early = None

    def _compare(self, full: Answer) -> None:
        early, self._early = self._early, None
        if early is None:
            return
        self.compared += 1
        self.differing += early.ids != full.ids
        self._metrics.compared(early.ids, full.ids)
        c = self._promised.certificate
        if c is None or not self._promised.testable or not early.promised:
            return
        self.losses.append(c.promise.distance(early.text, full.text))
        self.most = max(self.most, wealth(self.losses, c.promise.tolerance, failure=self.failure))
        self._metrics.limit.set(lower_limit(self.losses, failure=self.failure))
        self._metrics.broken.set(self.state == BROKEN)

    def _new_layers(self) -> Drift | None:
        c = self._promised.certificate
        return None if c is None else c.drift(seed=self._draw.randrange(2**32))

    def _look(self, answer: Answer) -> None:
        """At where its tokens left."""
        if self._layers is None or self._elsewhere:
            return
        if self._layers.answers >= _ANSWERS:
            self._layers = self._new_layers()
        if self._layers is not None and self._layers.add([token.exit_layer for token in answer.tokens]):
            self._elsewhere = self._layers.words()
