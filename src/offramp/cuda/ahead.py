"""Segments that are launched before the answer of the test in front of them is read, and not used if the token left.

Without this a GPU does nothing while an answer travels to the host and Python decides. A segment that was launched for
nothing takes its time on the device all the same, so that it is done only where it is likely to be used: where the
token before went on, in all rows. Then, too, no earlier token's keys and values have yet to be filled in there. If
others turn out to be written in between, what ran ahead has not seen them, and is not used.

What it wrote for tokens that left is written anew, by `fill` or by a later run, before any query sees that slot.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from offramp.families.state import Rows, State


@dataclass(eq=False)
class Launch:
    """A segment that ran.

    Attributes:
        stop: Up to which layer.
        rows: Those that it concerned, state by state, and `count`, how many.
        out: The states of all rows of the batch, [B, 1, D], until the next launch.
        ahead: The segment behind it, if that was launched before it was asked for.
    """

    stop: int
    rows: list[Rows]
    count: int
    out: Tensor
    ahead: Launch | None = None


class Ahead:
    """What ran last in a `Memory`, and what is likely to be asked for next.

    Attributes:
        last: The last launch; None if something else ran since.
        launched: How many segments were launched before they were asked for.
        used: How many of these then were asked for.
    """

    def __init__(self) -> None:
        self.last: Launch | None = None
        self.launched = self.used = 0
        self._follows: dict[int, int] = {}  # by layer, up to where the last token went on from there, in all rows

    def begin(self) -> None:
        """Know nothing: another batch."""
        self.last = None
        self._follows.clear()

    def spoil(self) -> None:
        """Keys and values were written: what was launched ahead has not seen them."""
        if self.last is not None:
            self.last.ahead = None

    def next(self) -> tuple[int, int] | None:
        """The segment that is worth launching now, as its first and its last layer; None: there is none."""
        last = self.last
        if last is None or last.ahead is not None or last.stop not in self._follows:
            return None
        return last.stop, self._follows[last.stop]

    def take(self, states: list[State], stop: int) -> Launch | None:
        """Note that states go on up to `stop`.

        Returns:
            What ran ahead of being asked for, if it is just this.
        """
        last = self.last
        if last is None:
            return None
        here = all(state.origin is last for state in states)
        if here and sum(len(state.hidden) for state in states) == last.count:
            self._follows[last.stop] = stop
        else:
            self._follows.pop(last.stop, None)
        if not here or last.ahead is None or last.ahead.stop != stop:
            return None
        self.used += 1
        return last.ahead
