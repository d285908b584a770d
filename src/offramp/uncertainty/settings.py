"""What a posterior is made of, before anything is fitted."""

from __future__ import annotations

from dataclasses import dataclass

from offramp.values import choice

METHODS = ("vanilla", "temperature", "mie", "mie+temperature", "laplace", "mie+laplace")
"""From the network's own softmax to the published method; "mie" is the model-internal ensemble."""


@dataclass(frozen=True)
class Settings:
    """What is fitted, and how.

    Attributes:
        method: One of `METHODS`; with "laplace", temperature and prior variance are tuned together.
        n_mc: Draws of the logits, the same in tuning and use.
        damping: "factored", as published, or "exact".
        predictive: "mc", means over draws, or "probit", none.
        grid: None: any temperature, prior variances from 1e-6 to 100; "meronen": the published 10 x 10.
        evidence: Multiplies the number of rows, in (0, 1]; below 1 where rows depend on each other.
        seed: Of the draws.
        memory: Bytes that the work on chunks of rows and draws may take.
        bias: Whether the exits' last layers have a bias.
    """

    method: str = "mie+laplace"
    n_mc: int = 50
    damping: str = "factored"
    predictive: str = "mc"
    grid: str | None = None
    evidence: float = 1.0
    seed: int = 0
    memory: int = 256 * 2**20
    bias: bool = True

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str | None, ...]] = {
            "method": METHODS, "damping": ("factored", "exact"), "predictive": ("mc", "probit"),
            "grid": (None, "meronen"),
        }  # fmt: skip
        for name, allowed in choices.items():
            choice(name, getattr(self, name), allowed)
        if self.n_mc < 1:
            raise ValueError(f"n_mc is {self.n_mc}; it must be at least 1 (50 are customary)")
        if not 0 < self.evidence <= 1:
            raise ValueError(f"evidence is {self.evidence}; it must be in (0, 1]")
        if self.memory < 1:
            raise ValueError(f"memory is {self.memory}; it is a number of bytes, such as {256 * 2**20}")

    @property
    def is_laplace(self) -> bool:
        """Whether there is a prior variance."""
        return self.method.endswith("laplace")

    @property
    def is_ensemble(self) -> bool:
        """Whether earlier exits have a say."""
        return self.method.startswith("mie")
