"""What a policy's certificate promises, and whether it does for a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from offramp.core.generation_inputs import in_effect

if TYPE_CHECKING:
    from offramp.calibration.certificate import Certificate
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy

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
