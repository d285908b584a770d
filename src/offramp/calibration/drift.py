"""Do tokens still leave where they left when the policy was certified? A promise is about prompts like those.

The answers of certification and of live use are compared as whole prompts, since the tokens of one answer are not
independent of each other. As long as live prompts are like those of certification, and independent, the order in which
all of them came says nothing; a conformal test martingale bets that it does, and grows without bound where it does.
"""

from __future__ import annotations

import bisect
import random
from collections import Counter
from collections.abc import Iterable, Sequence

from offramp.values import check_level

JUMP = 0.01
"""Share of the stake that changes sides before each bet; the value of the paper."""
SIDES = (-1.0, 0.0, 1.0)
"""Bets on small p-values, on none, on large ones."""


def packed(exit_layers: Sequence[int]) -> str:
    """An answer's tokens by exit layer, such as "14:3 30:20"; empty for an empty answer."""
    return " ".join(f"{layer}:{count}" for layer, count in sorted(Counter(exit_layers).items()))


def unpacked(text: str) -> list[int]:
    """The inverse of `packed`, in ascending order."""
    pairs = (pair.split(":") for pair in text.split())
    return [layer for layer, count in ((int(layer), int(count)) for layer, count in pairs) for _ in range(count)]


class Martingale:
    """A bet that numbers, coming one by one, are not exchangeable with those before them.

    The simple jumper of Vovk et al. (2021), "Retrain or not retrain: conformal test martingales for change-point
    detection", arXiv 2102.10439, on conformal p-values with ties broken at random. Under exchangeability these are
    independent and uniform, so the wealth is a martingale that begins with 1, and by Ville's inequality ever exceeds
    1 / a with probability at most a.

    Args:
        seen: Numbers of the reference.
        draw: For ties.
    """

    def __init__(self, seen: Iterable[float], draw: random.Random) -> None:
        self._seen, self._draw = sorted(seen), draw
        self._stakes = [1 / len(SIDES)] * len(SIDES)
        self.wealth = self.most = 1.0

    def add(self, value: float) -> float:
        """Bet on one more number.

        Returns:
            Its p-value: the share of all numbers so far, itself included, that are above it, and some of its equals.
        """
        low, high = bisect.bisect_left(self._seen, value), bisect.bisect_right(self._seen, value)
        equal, above = high - low + 1, len(self._seen) - high
        p = (above + self._draw.random() * equal) / (len(self._seen) + 1)
        moved = JUMP * self.wealth / len(SIDES)
        self._stakes = [
            ((1 - JUMP) * stake + moved) * (1 + side * (p - 0.5))
            for stake, side in zip(self._stakes, SIDES, strict=True)
        ]
        self.wealth = sum(self._stakes)
        self.most = max(self.most, self.wealth)
        self._seen.insert(high, value)
        return p


class Drift:
    """Watches where the tokens of live answers leave, beside those of certification.

    Watched are an answer's mean exit layer and, for each layer that tokens left after, the share of its tokens that
    left there or before; the probability of a false alarm is divided evenly among them. It is that of ever ringing:
    the alarm may be looked at after every answer, and for as long as one likes. A server adds answers as they end; each
    costs a number per layer of memory.

    Args:
        reference: Exit layers of each answer of certification, 1..L; empty answers are left out.
        false_alarm: Most probability of ever ringing while prompts are like those of certification, in (0, 1).
        seed: Of the draws that break ties.

    Raises:
        ValueError: No reference, or a probability outside (0, 1).
    """

    def __init__(self, reference: Iterable[Sequence[int]], *, false_alarm: float = 0.01, seed: int = 0) -> None:
        answers = [answer for answer in reference if answer]
        if not answers:
            raise ValueError("there are no answers to compare with; give the exit layers of at least one")
        check_level("false_alarm", false_alarm)
        self.false_alarm, self.answers = false_alarm, 0
        self._layers = sorted({layer for answer in answers for layer in answer})[:-1]  # behind the last, all have left
        columns = list(zip(*map(self._scores, answers), strict=True))
        draw = random.Random(seed)
        self._bets = [Martingale(column, draw) for column in columns]
        self._before = [sum(column) / len(answers) for column in columns]
        self._sums = [0.0] * len(columns)

    def _scores(self, answer: Sequence[int]) -> list[float]:
        shares = [sum(exit <= layer for exit in answer) / len(answer) for layer in self._layers]
        return [sum(answer) / len(answer), *shares]

    def add(self, exit_layers: Sequence[int]) -> bool:
        """Take note of the exit layers, 1..L, of a live answer; whether the alarm has rung, now or before."""
        if exit_layers:
            self.answers += 1
            for index, (bet, score) in enumerate(zip(self._bets, self._scores(exit_layers), strict=True)):
                bet.add(score)
                self._sums[index] += score
        return self.detected

    @property
    def detected(self) -> bool:
        """Whether the alarm has rung."""
        return max(bet.most for bet in self._bets) >= len(self._bets) / self.false_alarm

    def words(self) -> str:
        """One line: what is seen, and what it says."""
        now = [total / max(self.answers, 1) for total in self._sums]
        most = max(range(len(self._bets)), key=lambda index: self._bets[index].most)
        if most:
            what = f"{now[most]:.0%} of an answer's tokens leave by layer {self._layers[most - 1]}"
            then = f"{self._before[most]:.0%}"
        else:
            what, then = f"an answer's tokens leave after layer {now[0]:.1f} on average", f"{self._before[0]:.1f}"
        if not self.detected:
            return f"no drift seen in {self.answers} answers ({what}; in certification {then})"
        return (
            f"drift: {what}, in certification {then} (over {self.answers} answers; a false alarm has probability "
            f"{self.false_alarm:g} at most); these prompts are not like those the promise is about"
        )
