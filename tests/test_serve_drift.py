"""A server that compares answers with full depth, and says when a promise does not hold."""

import random
from dataclasses import replace

import numpy as np
import pytest

from serving import EOS, ScriptedBatch, until  # isort: skip

from offramp import ExitPolicy
from offramp.calibration import Promise, calibrate, decoded
from offramp.core.running import Asked
from offramp.core.sampling import Sampler
from offramp.report import drawing
from offramp.serve.answer import Answer, Finished
from offramp.serve.serving import Limits, Serving
from scripted_calibration import BASE, GRID, TASK, Script, at_most, examples
from scripted_calibration import model as word_model

TOLERANCE, FAILURE = 0.2, 0.1
PROMPT = (10, 11)
SAME, OTHER = [20, 21, EOS], [30, 31, EOS]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """By kind."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "available", lambda: False)
        patch.setattr(decoded, "decode_arms", Script(at_most({0.9: 0.0, 0.5: 0.0, 0.1: 0.9})).together)
        for kind in ("textual", "risk"):
            promise = Promise("f1", TOLERANCE, FAILURE, kind=kind)
            found[kind] = calibrate(
                word_model(), TASK, examples(200), BASE, promise, tmp_path_factory.mktemp(kind), grid=GRID,
                resamples=20, batch_size=2, max_new_tokens=5,
            ).certificate  # fmt: skip
            assert found[kind].certified
    return found


class Watched:
    """A server without HTTP: answers go straight to its engine."""

    def __init__(self, certificate, **options):
        lm, policy = word_model(), ExitPolicy(threshold=0.5)
        self.batch = ScriptedBatch({PROMPT: SAME}, {PROMPT: SAME})
        self.serving = Serving(
            lm, policy, certificate, limits=Limits(rows=4, longest=50, waiting=1000), batch=lambda: self.batch, seed=0,
            **{"check": 1.0, **options},
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.serving.engine.close()

    def ask(self, *, sampler=None, promised=True, **asked):
        """An answer, whole; and the comparison, if there is one, too."""
        ends = []

        def send(event):
            if isinstance(event, Finished):
                ends.append(event)

        answer = Answer(Asked(PROMPT, 5, sampler or Sampler(eos=(EOS,)), **asked), self.serving.text_of, send)
        answer.promised = promised
        before = self.serving.watch.compared
        self.serving.engine.submit([answer])
        until(lambda: ends)
        return answer, before

    def compared(self, count=1):
        for _ in range(count):
            _, before = self.ask()
            until(lambda before=before: self.serving.watch.compared == before + 1)


def test_answers_that_stay_as_full_depth_has_them_do_not_refute_the_promise(certificates):
    with Watched(certificates["textual"]) as live:
        assert live.serving.watch.state == "not tested"
        live.compared(30)
        watch = live.serving.watch
        assert (watch.state, watch.compared, watch.differing, watch.losses) == ("holds", 30, 0, [0.0] * 30)
        assert "does not refute" in watch.words()
        text = live.serving.metrics.text().decode()
        assert 'offramp_compared_answers_total{same="yes"} 30.0' in text
        assert 'offramp_compared_tokens_total{agree="yes"} 90.0' in text


@pytest.mark.parametrize("to_full", [False, True])
def test_a_broken_promise_is_said_and_may_end_early_exits(certificates, to_full):
    with Watched(certificates["textual"], to_full=to_full) as live:
        live.batch.full[PROMPT] = OTHER
        for _ in range(100):
            live.compared()
            if live.serving.watch.state == "broken":
                break
        watch = live.serving.watch
        assert watch.state == "broken"
        assert "breaks it" in watch.words()
        assert watch.compared < 30  # every answer is wholly another one, and one in five words may be
        assert not live.serving.promised.told(watch.against)["holds_for_this_request"]
        assert "offramp_promise_broken 1.0" in live.serving.metrics.text().decode()
        answer, _ = live.ask()
        assert answer.ids == (OTHER if to_full else SAME)


def test_where_references_would_be_needed_what_is_seen_is_told_and_no_alarm_rung(certificates):
    with Watched(certificates["risk"], to_full=True) as live:
        live.batch.full[PROMPT] = OTHER
        live.compared(40)
        watch = live.serving.watch
        assert (watch.state, watch.differing, watch.losses) == ("not tested", 40, [])
        assert "is about references" in watch.words()


@pytest.mark.parametrize("way", ["sampled", "full", "own threshold"])
def test_only_greedy_answers_of_the_policy_are_compared(certificates, way):
    with Watched(certificates["textual"]) as live:
        live.ask(**{
            "sampled": {"sampler": Sampler(eos=(EOS,), sample=True)}, "full": {"threshold": None},
            "own threshold": {"threshold": 0.1},
        }[way])  # fmt: skip
        live.compared()  # the next one is the first
        assert live.serving.watch.compared == 1


def test_an_answer_with_other_options_is_compared_but_is_no_evidence(certificates):
    with Watched(certificates["textual"]) as live:
        _, before = live.ask(promised=False)
        until(lambda: live.serving.watch.compared == before + 1)
        assert live.serving.watch.losses == []


def test_a_share_is_drawn(certificates):
    with Watched(certificates["textual"], check=0.3) as live:
        for _ in range(100):
            live.ask()
        until(lambda: not live.serving.watch._pending and not live.batch.active)
        assert live.serving.watch.compared == pytest.approx(30, abs=15)


def test_what_comparisons_cost_is_no_loss_of_the_savings(certificates):
    with Watched(certificates["textual"]) as live:
        live.compared(3)
        found = {
            kind: live.serving.metrics._flops.labels(kind)._value.get() for kind in ("spent", "full", "checks")
        }  # fmt: skip
        assert found["checks"] == 3 * 3000
        assert found["spent"] == 6 * 3000
        assert found["full"] == 3 * live.serving.lm.split.shape.generation_flops(2, 3)


@pytest.mark.parametrize(
    ("settings", "overridden", "reason"),
    [
        ({"max_new_tokens": 5}, False, None),
        ({"max_new_tokens": 6}, False, "max new tokens was 5 and is 6"),
        ({"max_new_tokens": 5, "temperature": 0.5}, False, "setting"),
        ({"max_new_tokens": 5}, True, "does not go by the certified policy"),
    ],
    ids=["same", "longer", "sampled", "overridden"],
)
def test_the_promise_is_about_requests_like_those_of_certification(certificates, settings, overridden, reason):
    with Watched(certificates["textual"]) as live:
        against = live.serving.promised.against(settings, overridden=overridden)
        assert bool(against) == (reason is not None)
        assert all(reason in line for line in against[-1:])
        assert live.serving.promised.told(against)["holds_for_this_request"] == (reason is None)
        assert live.serving.usual == 5  # a request that says nothing gets as many tokens as the promise is about


def test_another_model_is_said_at_once(certificates):
    other = replace(certificates["textual"], conditions=certificates["textual"].conditions | {"weights": "others"})
    with Watched(other) as live:
        assert any("weights are not those" in line for line in live.serving.notes())
        assert not live.serving.promised.testable


def test_false_alarms_are_as_rare_as_the_promise_says(certificates):
    """The watch itself, on losses that keep the promise exactly, many times over."""
    draw, alarms, runs = np.random.default_rng(0), 0, 60
    with Watched(certificates["textual"], check=0.0) as live:
        for _ in range(runs):
            watch = type(live.serving.watch)(
                live.serving.promised, live.serving.metrics, share=1.0, to_full=False, draw=random.Random(0)
            )  # fmt: skip
            for bad in draw.random(60) < TOLERANCE:
                early, full = (Answer(Asked(PROMPT, 5), str, print, promised=True) for _ in range(2))
                full.check, early.text, full.text = True, "w20 w21", "w30" if bad else "w20 w21"
                watch._pending.append(early)
                watch.next()
                watch.ended(full)
            alarms += watch.state == "broken"
    assert alarms <= 14  # P(Bin(60, 0.1) > 14) < 0.001
