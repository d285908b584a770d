"""The one thread that drives the running batch, and the line of those who wait for a row of it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from offramp.serve.answer import Answer, Finished
from offramp.serve.requests import ApiError, failed, late, stopping

if TYPE_CHECKING:
    from offramp.core.running import Emitted, RunningBatch
    from offramp.serve.answer import FullDepth
    from offramp.serve.metrics import Metrics
    from offramp.serve.promise import Watch

_LOG = logging.getLogger(__name__)


class Engine:
    """Answers take a row of the batch as one is free, first come, first served, and give it back when they end.

    Everything but `submit`, `cancel`, `drain`, `stop` and `close` happens in the engine's own thread.

    Args:
        batch: Makes the batch, and a new one where a step of it failed.
        full: What the full model would have spent.
        metrics: Is told of everything.
        watch: Compares some answers with full depth, and says when to go there.
        most_waiting: Answers that may wait for a row; more are refused.
        timeout: Of an answer, for the message.
    """

    def __init__(
        self,
        batch: Callable[[], RunningBatch],
        full: FullDepth,
        metrics: Metrics,
        watch: Watch,
        *,
        most_waiting: int,
        timeout: float,
    ) -> None:
        self._make, self._batch, self._full = batch, batch(), full
        self._metrics, self._watch = metrics, watch
        self._most_waiting, self._timeout = most_waiting, timeout
        self._waiting: deque[Answer] = deque()
        self._rows: dict[int, Answer] = {}
        self._gone: set[Answer] = set()
        self._expected = 0
        self._draining = self._stopping = self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="offramp-batch", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ from other threads

    @property
    def active(self) -> int:
        """Rows at work."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Answers without a row."""
        return len(self._waiting)

    @property
    def draining(self) -> bool:
        """Whether no more answers are taken."""
        return self._draining

    @contextmanager
    def expected(self, answers: int) -> Iterator[None]:
        """Keep places in the line while a request is prepared, which takes time, too.

        Raises:
            ApiError: The line is too long, or the server is stopping.
        """
        with self._wake:
            self._require_room(answers)
            self._expected += answers
        try:
            yield
        finally:
            with self._wake:
                self._expected -= answers

    def _require_room(self, answers: int) -> None:
        if self._draining:
            raise stopping()
        if len(self._waiting) + self._expected + answers > self._most_waiting + len(self._batch.free):
            self._metrics.refused.inc()
            raise ApiError(
                429,
                f"{len(self._waiting)} answers are waiting for {len(self._rows)} others; ask again later",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )

    def submit(self, answers: list[Answer]) -> None:
        """Put answers in the line, all of them or none.

        Raises:
            ApiError: The line is too long, or the server is stopping.
        """
        with self._wake:
            self._require_room(len(answers))
            self._waiting.extend(answers)
            self._wake.notify()

    def cancel(self, answers: Iterable[Answer]) -> None:
        """Forget answers, wherever they stand; those that have ended are no matter."""
        with self._wake:
            self._gone.update(answers)
            self._wake.notify()

    def drain(self) -> None:
        """Take no more answers; those there are go on."""
        with self._wake:
            self._draining = True

    def stop(self) -> None:
        """Take no more answers, and end those there are with an error."""
        with self._wake:
            self._draining = self._stopping = True
            self._wake.notify()

    def close(self) -> None:
        """Stop, and wait for the thread to end."""
        with self._wake:
            self._closing = True
        self.stop()
        self._thread.join()

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._rows or self._gone or self._stopping or self._closing or self._due):
                    self._wake.wait()
                gone, self._gone = self._gone, set()
                stop, self._stopping = self._stopping, False
                if self._closing and not (self._rows or self._waiting):
                    return
            try:
                self._forget(gone)
                self._expire(stopped=stop)
                self._admit()
                if self._rows:
                    self._step()
            except Exception:
                _LOG.exception("a step of the batch failed; its answers end with an error")
                self._fail()

    def _forget(self, gone: set[Answer]) -> None:
        """Those whose clients have left."""
        with self._wake:
            waiting = len(self._waiting)
            self._waiting = deque(answer for answer in self._waiting if answer not in gone)
            forgotten = waiting - len(self._waiting)
        for row in [row for row, answer in self._rows.items() if answer in gone]:
            self._leave(row)
            forgotten += 1
        self._metrics.cancelled.inc(forgotten)

    def _expire(self, *, stopped: bool) -> None:
        """End answers that took too long, or all of them."""
        now = time.monotonic()

        def out(answer: Answer) -> bool:
            return stopped or (answer.deadline is not None and answer.deadline < now)

        with self._wake:
            late_ones = [answer for answer in self._waiting if out(answer)]
            if late_ones:
                self._waiting = deque(answer for answer in self._waiting if not out(answer))
        for row in [row for row, answer in self._rows.items() if out(answer)]:
            late_ones.append(self._leave(row))
        for answer in late_ones:
            self._metrics.failed.inc()
            answer.send(stopping() if stopped else late(self._timeout))

    def _leave(self, row: int) -> Answer:
        """Take a row back before its answer's end."""
        answer = self._rows.pop(row)
        self._batch.release(row)
        if answer.check:
            self._metrics.checked(answer.flops)
        else:
            self._metrics.left(self._full_flops(answer))
        return answer

    def _admit(self) -> None:
        """Give free rows to those who wait; what is left, to a comparison."""
        while self._batch.free:
            with self._wake:
                answer = self._waiting.popleft() if self._waiting else None
            if answer is None:
                break
            self._seat(answer)
        if self._batch.free and self._due:
            self._seat(self._watch.next())

    @property
    def _due(self) -> bool:
        """Whether an answer is to be compared with full depth."""
        return self._watch.due and not self._draining

    def _seat(self, answer: Answer) -> None:
        """Give an answer a row; one that the batch refuses hears why."""
        if self._watch.full:
            answer.asked = replace(answer.asked, threshold=None)
        try:
            self._rows[self._batch.admit(answer.asked)] = answer
        except ValueError as error:
            self._metrics.failed.inc()
            answer.send(ApiError(400, str(error), code="invalid_value"))

    def _step(self) -> None:
        """One step of the batch."""
        weights, before = self._weights(), self._batch.ledger.costs.flops
        began = time.perf_counter()
        with self._batch.model.at_work():
            made = self._batch.step()
        spent = self._batch.ledger.costs.flops - before
        self._metrics.step(spent, time.perf_counter() - began, len(self._rows))
        for row, weight in weights.items():
            self._rows[row].flops += spent * weight / sum(weights.values())
        for token in made:
            if token.row in self._rows:  # else it ended within this step, before a stop string
                self._take(token)

    def _weights(self) -> dict[int, int]:
        """How many tokens the next step reads of each row, about."""
        pieces = {row: end - begin for row, begin, end in self._batch.pieces()}
        idle = self._batch.reading - pieces.keys()
        return {row: pieces.get(row, 1) for row in self._rows if row not in idle}

    def _take(self, token: Emitted) -> None:
        """Hand a token on, and with the last one the account."""
        answer = self._rows[token.row]
        if not answer.check:
            self._metrics.token(token.exit_layer)
            if not answer.tokens:
                self._metrics.first_token(time.monotonic() - answer.began)
        if (reason := answer.take(token)) is None:
            return
        del self._rows[token.row]
        if not token.ended:
            self._batch.release(token.row)
        end = Finished(reason, answer.flops, self._full_flops(answer), time.monotonic() - answer.began)
        if answer.check:
            self._metrics.checked(answer.flops)
        else:
            self._metrics.answered(answer, end)
        answer.send(end)
        self._watch.ended(answer)

    def _full_flops(self, answer: Answer) -> int:
        """What the full model spends on an answer, given what was known of its prompt."""
        return self._full.flops(len(answer.asked.ids), len(answer.tokens), answer.cached)

    def _fail(self) -> None:
        """End all answers at work, and begin anew."""
        answers = list(self._rows.values())
        self._rows.clear()
        for answer in answers:
            self._metrics.failed.inc()
            answer.send(failed())
        self._batch = self._make()
