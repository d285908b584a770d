"""FREE's adaptive threshold: the fit against scipy, its pairs against teacher-forced runs of the whole model."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from offramp import ExitPolicy, LanguageModel, cli
from offramp.core.adaptive_threshold import GRID, AdaptiveThreshold
from offramp.core.decoding import decode
from offramp.core.plan import resolve
from offramp.core.sampling import Sampler
from scripted import ScriptedModel
from test_brute_force import Row, batch_of, gap, lively
from test_classifier import with_classifiers
from tiny import LAYERS, greedy, inputs_for, tiny, tokenizer

SETTINGS = settings(derandomize=True, deadline=None, max_examples=100, database=None)
NO_END = 96


# ---------------------------------------------------------------- the fit


def reference_fit(pairs, *, zeta=0.4, priors=False):
    """τ by the paper's formulas on the whole list of pairs; None where there is no fit, NaN where it is too near."""
    classes = [np.clip([c for c, y in pairs if y == label], 1e-4, 1 - 1e-4) for label in (1, 0)]
    if min(map(len, classes)) < 10:
        return None
    densities = []
    for x in classes:
        mean, variance = x.mean(), x.var()
        if np.ptp(x) == 0 or variance >= mean * (1 - mean):
            return None
        a = mean * (mean * (1 - mean) / variance - 1)
        densities.append(stats.beta(a, a * (1 - mean) / mean).logpdf(np.linspace(0.3, 0.9, 10)))
    agree, disagree = densities
    if priors:
        agree, disagree = agree + np.log(len(classes[0])), disagree + np.log(len(classes[1]))
    odds = agree - disagree - np.log(zeta / (1 - zeta))
    if np.abs(odds).min() < 1e-6:
        return math.nan
    above = np.flatnonzero(odds > 0)
    return np.linspace(0.3, 0.9, 10)[above[0] if len(above) else -1]


beta_pairs = st.builds(
    lambda seed, n, shapes: [
        (float(c), y)
        for y, (a, b) in zip((1, 0), shapes, strict=True)
        for c in np.random.default_rng(seed + y).beta(a, b, n[y])
    ],
    st.integers(0, 10**6),
    st.tuples(st.integers(8, 60), st.integers(8, 60)),
    st.tuples(*[st.tuples(st.floats(0.3, 9), st.floats(0.3, 9))] * 2),
)
any_pairs = st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 1)), min_size=18, max_size=50)


@SETTINGS
@given(pairs=beta_pairs | any_pairs, zeta=st.sampled_from([0.4, 0.2, 0.7]), priors=st.booleans(), start=st.floats(0, 1))
def test_the_fit_is_the_papers(pairs, zeta, priors, start):
    expected = reference_fit(pairs, zeta=zeta, priors=priors)
    assume(expected is None or not math.isnan(expected))
    threshold = AdaptiveThreshold(start, zeta=zeta, use_priors=priors)
    half = len(pairs) // 2
    for part in (pairs[:half], pairs[half:]):  # running sums: it may come in pieces, in any order
        threshold.add([c for c, _ in part], [y == 1 for _, y in part])
    assert threshold.refit() == (start if expected is None else pytest.approx(expected, abs=1e-12))
    assert threshold.fits == (expected is not None)


def test_the_grid():
    assert pytest.approx(np.linspace(0.3, 0.9, 10)) == GRID


@pytest.mark.parametrize(
    ("agree", "disagree"),
    [
        ([0.9, 0.8] * 20, [0.2, 0.3, 0.4] * 3),  # nine pairs in a class
        ([0.7] * 30, [0.2, 0.3] * 10),  # no variance
        ([0.0, 1.0] * 10, [0.2, 0.3] * 10),  # after clipping still below x̄(1-x̄): a fit
        ([math.nan] * 30, [0.2, 0.3] * 10),  # NaN is no pair
    ],
)
def test_without_a_fit_the_threshold_stays(agree, disagree):
    threshold = AdaptiveThreshold(0.77)
    threshold.add(agree, [True] * len(agree))
    threshold.add(disagree, [False] * len(disagree))
    assert (threshold.refit() == 0.77) is (0.0 not in agree)


def test_fits_end_and_can_be_forgotten():
    threshold = AdaptiveThreshold(0.8, most_fits=2)
    spread = np.linspace(0, 0.1, 20)
    threshold.add([*(0.8 + spread), *(0.3 + spread)], [True] * 20 + [False] * 20)
    fitted = threshold.refit()
    assert fitted < 0.7
    threshold.refit()
    threshold.add([0.85 + x for x in spread] * 40, [False] * 800)
    assert threshold.refit() == fitted
    threshold.reset()
    assert (threshold.value, threshold.fits, threshold.agree.count) == (0.8, 0, 0)


# ---------------------------------------------------------------- the pairs of a generation


class Watched(AdaptiveThreshold):
    """Keeps the pairs it is given."""

    def add(self, confidences, agreed):
        confidences, agreed = list(confidences), list(agreed)
        self.__dict__.setdefault("pairs", []).extend(zip(confidences, agreed, strict=True))
        super().add(confidences, agreed)


def generated(model, inputs, policy, **options):
    """A generation and the pairs it taught."""
    lm = LanguageModel(model, engine="torch")
    watched = lm._adaptive[policy] = Watched.of(policy)
    return lm.generate(inputs, policy=policy, **options), watched.__dict__.get("pairs", [])


def expected_pairs(model, inputs, out, layer):
    """Pairs by teacher forcing without a cache: deferred positions have the full model's keys and values."""
    pairs = []
    for i, tokens in enumerate(out.tokens):
        row, waiting = Row(model, inputs, i), []
        for t, token in enumerate(tokens):
            z = row.readouts()[0]
            c = gap(z[layer - 1].softmax(-1))
            row.append(token, out.exit_layers[i][t], c, math.inf)
            if t == 0 and row.memory is None:
                continue  # the prompt's own pass
            waiting.append((c, bool(z[layer - 1].argmax() == z[-1].argmax())))
            if out.exit_layers[i][t] > layer:
                if len(waiting) > 1:  # something left before: all positions of this row's pass are compared
                    pairs += waiting
                waiting = []
    return sorted(pairs)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "t5", "bart", "whisper"])
def test_pairs_are_those_of_the_full_model(name, batch):
    model, inputs, count, layers = lively(name), batch_of(name, batch), 0, set()
    taus = (0.06, 0.02, 0.028) if name == "gemma3" else (0.1, 0.06, 0.2)  # a soft cap keeps the gaps small
    for layer, tau in enumerate(taus, start=1):
        policy = ExitPolicy(threshold=tau, min_layer=layer, skipped="defer", adaptive=True)
        out, pairs = generated(model, inputs, policy, max_new_tokens=10, eos_token_id=NO_END)
        expected, pairs = expected_pairs(model, inputs, out, layer), sorted(pairs)
        assert [y for _, y in pairs] == [y for _, y in expected]
        assert [c for c, _ in pairs] == pytest.approx([c for c, _ in expected], abs=1e-4)
        count += len(pairs)
        layers |= {x for row in out.exit_layers for x in row}
    assert count >= 4
    assert len(layers) >= 3


def test_rows_that_end_teach_no_more():
    model, inputs = lively("llama"), batch_of("llama", 4)
    policy = ExitPolicy(threshold=0.1, min_layer=2, skipped="defer", adaptive=True)
    free = LanguageModel(model).generate(inputs, policy=policy, max_new_tokens=12, eos_token_id=NO_END)
    ends = [row[3 + 2 * i] for i, row in enumerate(free.tokens[:2])]
    out, pairs = generated(model, inputs, policy, max_new_tokens=12, eos_token_id=ends)
    assert len({len(row) for row in out.tokens}) > 1
    expected = expected_pairs(model, inputs, out, 2)
    assert [c for c, _ in sorted(pairs)] == pytest.approx([c for c, _ in expected], abs=1e-4)


def test_what_is_compared_step_by_step():
    """Sure and unsure steps, and whether the last layer agrees."""
    sure, unsure = [4.0, 0.0, 0.0], [0.0, 0.1, 0.0]
    script = [[sure] * 2, [unsure, sure], [sure, unsure], [sure, sure], [unsure, unsure], [unsure, unsure]]
    policy = ExitPolicy(threshold=0.9, min_layer=1, skipped="defer", adaptive=True)
    watched = Watched.of(policy)
    ids = torch.ones(1, 3, dtype=torch.long)
    steps = list(decode(ScriptedModel(script), ids, policy, max_new_tokens=6, sampler=Sampler(), adaptive=watched))
    assert [int(step.exit_layer) for step in steps] == [2, 2, 1, 1, 2, 2]
    # Step 1 goes deep with nothing waiting: no pair. Steps 2 and 3 leave and are compared with step 4's pass; step 5
    # finds nothing waiting again.
    assert [y for _, y in watched.pairs] == [False, True, True]
    assert [c > 0.9 for c, _ in watched.pairs] == [True, True, False]


def test_a_threshold_of_one_never_exits_and_learns_nothing():
    model, inputs = tiny("llama"), inputs_for("llama", 3, padded=True)
    policy = ExitPolicy(threshold=1.0, min_layer=2, skipped="defer", adaptive=True)
    out, pairs = generated(model, inputs, policy, max_new_tokens=10)
    assert out.sequences.tolist() == greedy(model, inputs, 10).tolist()
    assert pairs == []
    fixed = dataclasses.replace(policy, adaptive=False, exit_layers=(2,))
    assert out.costs.flops == LanguageModel(model).generate(inputs, policy=fixed, max_new_tokens=10).costs.flops


@pytest.mark.parametrize("name", ["llama", "mistral", "t5"])
def test_tokens_are_those_of_the_same_fixed_threshold(name):
    """Comparing changes no cache and no token; it costs the readouts of the positions compared."""
    lm, inputs = LanguageModel(lively(name)), batch_of(name)
    layer = 3 if name == "t5" else 2
    fixed = ExitPolicy(threshold=0.1, min_layer=layer, skipped="defer", exit_layers=(layer,))
    adaptive = dataclasses.replace(fixed, adaptive=True)
    a, b = (lm.generate(inputs, policy=p, max_new_tokens=12, eos_token_id=NO_END) for p in (fixed, adaptive))
    assert (a.tokens, a.exit_layers) == (b.tokens, b.exit_layers)
    for got, expected in zip(a.confidences, b.confidences, strict=True):
        assert got == pytest.approx(expected, abs=1e-6, nan_ok=True)
    learnt = lm.adaptive_threshold(adaptive)
    deep = sum(layer == LAYERS for row in a.exit_layers for layer in row)
    extra = (b.costs.flops - a.costs.flops) // lm.split.shape.readout_flops()
    assert 0 < extra <= learnt.agree.count + learnt.disagree.count <= extra + deep
    assert b.costs.parts["readout"].flops - a.costs.parts["readout"].flops == b.costs.flops - a.costs.flops


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_flops_equal_the_counters(name, batch):
    model = copy.deepcopy(lively(name))
    model.set_attn_implementation("eager")
    policy = ExitPolicy(threshold=0.2, min_layer=3, skipped="defer", adaptive=True)
    with FlopCounterMode(display=False) as counter:
        out, pairs = generated(model, batch_of(name, batch), policy, max_new_tokens=12)
    assert pairs
    slack = 0.005 if name == "llama" else 1e-9  # the rotation's angles, which the ledger leaves out
    assert out.costs.flops == pytest.approx(counter.get_total_flops(), rel=slack)


def test_a_classifier_reads_the_choices_it_is_judged_by():
    """Its test scores no tokens, so every test costs a readout; the counter has seen them all."""
    model = copy.deepcopy(lively("llama"))
    model.set_attn_implementation("eager")
    lm = with_classifiers(model, layers=(2,), engine="torch")
    policy = ExitPolicy("classifier", threshold=0.5, skipped="defer", adaptive=True)
    with FlopCounterMode(display=False) as counter:
        out = lm.generate(batch_of("llama", 1), policy=policy, max_new_tokens=12, eos_token_id=NO_END)
    learnt = lm.adaptive_threshold(policy)
    assert 0 < learnt.agree.count + learnt.disagree.count <= 11
    assert {2, LAYERS} == set(out.exit_layers[0][1:])
    assert out.costs.flops == pytest.approx(counter.get_total_flops(), rel=0.005)


# ---------------------------------------------------------------- across generations


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_threshold_follows_all_generations_before(name):
    model, seen, taus = lively(name), [], []
    start = 0.1 if name == "t5" else 0.25
    policy = ExitPolicy(threshold=start, min_layer=3, skipped="defer", adaptive=True)
    lm = LanguageModel(model, engine="torch")
    watched = lm._adaptive[policy] = Watched.of(policy)
    for seed in range(8):
        expected = reference_fit(seen)
        out = lm.generate(inputs_for(name, 2, seed=seed), policy=policy, max_new_tokens=20, eos_token_id=NO_END)
        taus.append(watched.value)
        assert watched.value == pytest.approx(start if expected is None else expected)
        for layers, confidences in zip(out.exit_layers, out.confidences, strict=True):
            tested = [(a, c) for a, c in zip(layers, confidences, strict=True) if not math.isnan(c)]
            assert all((a == 3) == (c > watched.value) for a, c in tested)
        seen = list(watched.pairs)
    assert taus[0] == start
    assert len(set(taus)) >= 2


def test_each_policy_and_each_model_learns_for_itself():
    lm = LanguageModel(lively("llama"))
    policy = ExitPolicy(threshold=0.1, min_layer=2, skipped="defer", adaptive=True)
    lm.generate(batch_of("llama"), policy=policy, max_new_tokens=10)
    learnt = lm.adaptive_threshold(ExitPolicy.from_dict(policy.to_dict()))
    assert learnt.agree.count + learnt.disagree.count > 0
    other = lm.adaptive_threshold(dataclasses.replace(policy, min_layer=3))
    assert other.agree.count + other.disagree.count == 0
    lm.attach_exits(None)
    assert lm.adaptive_threshold(policy).agree.count == 0
    with pytest.raises(ValueError, match="adaptive is False in this policy"):
        lm.adaptive_threshold(ExitPolicy())


def test_custom_generate_learns_across_its_calls():
    model, policy = lively("llama"), ExitPolicy(threshold=0.1, min_layer=3, skipped="defer", adaptive=True)
    method, lm = policy.custom_generate(), LanguageModel(model, engine="torch")
    for seed in range(6):
        inputs = inputs_for("llama", 2, seed=seed)
        options = {"max_new_tokens": 20, "eos_token_id": NO_END}
        sequences = model.generate(**inputs, **options, do_sample=False, custom_generate=method)
        assert sequences.tolist() == lm.generate(inputs, policy=policy, **options).sequences.tolist()
    assert method.adaptive == lm.adaptive_threshold(policy)
    assert method.adaptive.fits > 0
    assert ExitPolicy().custom_generate().adaptive is None


@pytest.mark.parametrize("options", [{"temperature": 0.8, "seed": 1}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("measure", ["max", "entropy", "contrastive", "jsd", lambda r: (r.hidden[:, 0] > 0).float()])
def test_other_measures_and_sampling(measure, options):
    lm = LanguageModel(lively("llama"))
    policy = ExitPolicy(measure, threshold=0.2, min_layer=2, skipped="defer", adaptive=True, vocabulary="fixed")
    for _ in range(2):
        lm.generate(batch_of("llama"), policy=policy, max_new_tokens=8, **options)
    learnt = lm.adaptive_threshold(policy)
    assert learnt.agree.count + learnt.disagree.count > 0


# ---------------------------------------------------------------- where it is asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skipped": "propagate"}, "needs skipped='defer', not 'propagate'"),
        ({"skipped": "verify"}, "needs skipped='defer', not 'verify'"),
        ({"threshold": None}, "starts at a threshold that is one number, but it is None"),
        ({"threshold": (0.5,)}, "one number, but it is"),
        ({"confidence": "static", "min_layer": 2}, "a confidence that a single exit has, but it is 'static'"),
        ({"confidence": "state"}, "a single exit has, but it is 'state'"),
        ({"exit_layers": (2, 3)}, "for a single exit, but exit_layers is"),
        ({"adaptive": "yes"}, "adaptive is 'yes'; allowed are True and False"),
    ],
)
def test_bad_policies_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ExitPolicy(**{"skipped": "defer", "adaptive": True, **options})


def test_an_adaptive_policy_has_one_exit_and_survives_a_file(tmp_path):
    policy = ExitPolicy(min_layer=2, skipped="defer", adaptive=True)
    assert dict(resolve(policy, 12, 100).thresholds) == {2: 0.9}
    assert dict(resolve(ExitPolicy(skipped="defer", adaptive=True), 12, 100).thresholds) == {6: 0.9}
    assert dict(resolve(ExitPolicy(skipped="defer", adaptive=True), 12, 100, exits=(4,)).thresholds) == {4: 0.9}
    with pytest.raises(ValueError, match="for a single exit"):
        resolve(ExitPolicy(skipped="defer", adaptive=True), 12, 100, exits=(4, 8))
    policy.save(tmp_path / "free.json")
    assert ExitPolicy.load(tmp_path / "free.json") == policy


def test_the_command_says_where_it_ended(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["generate", tmp_path / "model", "the sky", "why is the sky", "--no-chat", "--max-new-tokens", 8]
    arguments += ["--adaptive", "--skipped", "defer", "--threshold", 0.1, "--min-layer", 2, "--json", tmp_path / "o"]
    run = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert run.exit_code == 0, run.output
    assert "adaptive threshold: 0.1 at first, " in run.stderr
    result = json.loads((tmp_path / "o").read_text())
    assert result["policy"]["adaptive"] is True
    learnt = result["adaptive_threshold"]
    assert learnt["agree"] + learnt["disagree"] > 0
    assert set(learnt) == {"start", "value", "fits", "agree", "disagree"}
