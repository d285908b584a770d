"""Losses from records, bounds by kind, numbers of prompts, and the grid of settings."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offramp import ExitPolicy
from offramp.calibration import THRESHOLDS, Grid, Promise, layer_thresholds, settings_of
from offramp.calibration.grid import chains_of, paths_of
from offramp.risk import conformal_risk_control
from offramp.tasks import TASKS, Example
from scripted_calibration import Script, examples, model
from tiny import LAYERS

SCRIPT = Script(lambda policy: 0.0)


def records(scores, texts=None):
    made = [SCRIPT._record(example, "arm", 0.0, 1) for example in examples(len(scores))]
    texts = texts or [""] * len(scores)
    return [replace(r, scores={"f1": s}, text=t) for r, s, t in zip(made, scores, texts, strict=True)]


# ---------------------------------------------------------------- losses


def test_losses_of_each_kind():
    early, full = records([0.2, 1.0, 0.5]), records([0.5, 0.5, 0.6])

    def losses(**options):
        return Promise("f1", **options).losses(early, full)

    np.testing.assert_allclose(losses(), [0.3, 0.0, 0.1])
    np.testing.assert_allclose(losses(kind="signed"), [0.3, -0.5, 0.1])
    np.testing.assert_allclose(losses(kind="tail", margin=0.2), [1, 0, 0])
    np.testing.assert_allclose(losses(kind="tail", margin=0.1), [1, 0, 0])  # 0.1 is not more than 0.1


def test_textual_losses_compare_with_the_full_answer_and_equal_texts_lose_nothing():
    early = records([0, 0, 0], ["the sky", "a", "sky"])
    full = records([1, 1, 1], ["blue sky", "a", ""])
    np.testing.assert_allclose(Promise("f1", kind="textual").losses(early, full), [1 / 3, 0, 1])
    same = records([0, 0], ["", "."])
    np.testing.assert_allclose(Promise("rouge1", kind="textual").losses(same, same), [0, 0])


def test_a_loss_outside_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match="allowed are finite values in"):
        Promise("f1").losses(records([1.5]), records([1.0]))
    with pytest.raises(ValueError, match="different examples"):
        Promise("f1").losses(records([1.0, 1.0])[1:], records([1.0]))


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from("abc")), min_size=1), st.integers(0, 1000))
def test_units_are_the_losses_or_the_means_of_groups_in_another_order(pairs, seed):
    losses, groups = np.array([loss for loss, _ in pairs]), [group for _, group in pairs]
    prompts = Promise("f1").units(losses, groups, seed)
    np.testing.assert_allclose(sorted(prompts), sorted(losses))
    means = [np.mean([loss for loss, group in pairs if group == g]) for g in sorted(set(groups))]
    np.testing.assert_allclose(sorted(Promise("f1", unit="group").units(losses, groups, seed)), sorted(means))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "rouge"}, "metric is 'rouge'; allowed are 'exact_match'"),
        ({"kind": "mean"}, "kind is 'mean'"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"failure": 1}, "failure is 1"),
        ({"margin": 0.1}, "'tail', and only that"),
        ({"kind": "tail"}, "'tail', and only that"),
        ({"kind": "tail", "margin": 1.0}, "margin is 1.0"),
        ({"bound": "binomial"}, "losses that are 0 or 1"),
        ({"bound": "binomial", "metric": "exact_match", "unit": "group"}, "losses that are 0 or 1"),
        ({"kind": "signed", "bound": "hoeffding-bentkus"}, "allowed for 'signed' losses are wsr, hoeffding"),
        ({"kind": "signed", "bound": "crc"}, "allowed for 'signed' losses"),
        ({"unit": "token"}, "unit is 'token'"),
    ],
)
def test_promises_that_nothing_can_keep_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Promise(**{"metric": "f1", **options})


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({}, "hoeffding-bentkus"),
        ({"kind": "textual"}, "hoeffding-bentkus"),
        ({"kind": "signed"}, "wsr"),
        ({"kind": "tail", "margin": 0.1}, "binomial"),
        ({"kind": "tail", "margin": 0.1, "unit": "group"}, "hoeffding-bentkus"),
        ({"metric": "exact_match"}, "binomial"),
        ({"metric": "exact_match", "kind": "textual"}, "binomial"),
        ({"metric": "exact_match", "kind": "signed"}, "wsr"),
        ({"metric": "exact_match", "unit": "group"}, "hoeffding-bentkus"),
        ({"metric": "exact_match", "bound": "wsr"}, "wsr"),
    ],
)
def test_the_bound_is_chosen_by_what_losses_can_be(options, bound):
    assert Promise(**{"metric": "f1", **options}).bound == bound


# ---------------------------------------------------------------- numbers of prompts, limits


@pytest.mark.parametrize(("tolerance", "mean"), [(0.05, 0.0), (0.1, 0.0), (0.1, 0.04), (0.25, 0.2)])
def test_the_number_that_conformal_risk_control_needs(tolerance, mean):
    needed = Promise("f1", tolerance, bound="crc").needed(0.5, mean)
    for n, allowed in ((needed, True), (needed - 1, False)):
        assert (conformal_risk_control([[mean] * n], tolerance).index is not None) is allowed


def test_the_upper_limit_of_coins_is_the_exact_one():
    losses = np.array([1.0] * 4 + [0.0] * 76)
    expected = stats.binomtest(4, 80).proportion_ci(0.9, "exact").high  # two-sided 90 %: one-sided 95 %
    assert Promise("f1", kind="tail", margin=0.0).upper_limit(losses) == pytest.approx(expected, abs=1e-9)
    assert Promise("f1").upper_limit(np.ones(5)) == 1.0


# ---------------------------------------------------------------- the grid


def test_the_default_grid_falls_and_is_finer_near_one():
    steps = -np.diff(THRESHOLDS)
    assert (steps > 0).all()
    assert steps[0] < 0.01 < steps[-1]
    assert Grid((0.1, 0.9, 0.5, 0.9)).knobs == (0.9, 0.5, 0.1)


@given(
    st.sets(st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.999]), min_size=1),
    st.sets(st.integers(1, LAYERS - 1), min_size=1),
    st.sets(st.integers(2, 90), min_size=1, max_size=3),
)
def test_paths_and_chains_go_from_safe_to_bold(thresholds, layers, sizes):
    base = ExitPolicy(vocabulary="fixed", skipped="defer")
    grid = Grid(tuple(thresholds), tuple(layers), tuple(sizes))
    settings = settings_of(model(), base, grid)
    assert len(settings) == grid.size(base) == len(thresholds) * len(layers) * len(sizes)
    assert len({s.file_name for s in settings}) == len({s.policy for s in settings}) == len(settings)
    assert all(s.policy.skipped == "defer" for s in settings)
    places = {index: place for place, index in enumerate(paths_of(settings)[0])}

    def values(setting):
        return setting.policy.threshold, setting.policy.min_layer, setting.policy.vocabulary_size

    for i, a in enumerate(settings):
        for j, b in enumerate(settings):
            if i != j and all(x >= y for x, y in zip(values(a), values(b), strict=True)):
                assert places[i] < places[j]
    groups = chains_of(settings)
    assert len(groups) == len(layers) * len(sizes) == grid.chains(base)
    for group in groups:
        assert [settings[i].knob for i in group] == sorted(thresholds, reverse=True)
        assert len({values(settings[i])[1:] for i in group}) == 1


def test_file_names_tell_negative_thresholds_apart():
    settings = settings_of(model(), ExitPolicy("state"), Grid((0.5, -0.5)))
    assert len({s.file_name for s in settings}) == 2


def test_exits_of_the_policy_stay_if_the_grid_moves_its_first_layer():
    settings = settings_of(model(), ExitPolicy(exit_layers=(1, 3)), Grid((0.5,), (1, 2)))
    assert [s.policy.exit_layers for s in settings] == [(3,), (1, 3)]


# ---------------------------------------------------------------- thresholds per layer


TASK = TASKS["question-answering"]
ASKED = [Example(f"q{i}", f"w{20 + i} the sky w{30 + i}", ("sky",), f"g{i}", "why ?") for i in range(6)]


def test_thresholds_per_layer_are_quantiles_of_wrong_tokens():
    # Independently: the full model's answer, teacher-forced through `transformers`, read out at every layer.
    lm, shares, tokens = model(), (1.0, 0.5, 0.1), 8
    wrong = {layer: [] for layer in (1, 2, 3)}
    for prompt in TASK.prompts(lm, ASKED):
        answer = lm.generate([prompt], max_new_tokens=tokens)
        hidden = lm.model(answer.sequences, output_hidden_states=True).hidden_states
        new = len(answer.tokens[0])
        for layer in wrong:
            logits = lm.model.lm_head(lm.model.model.norm(hidden[layer]))[0, -new:-1].float()
            top = logits.softmax(-1).topk(2).values
            missed = logits.argmax(-1) != answer.sequences[0, -new + 1 :]
            wrong[layer] += (top[:, 0] - top[:, 1])[missed].tolist()
    found = layer_thresholds(lm, TASK, ASKED, ExitPolicy(min_layer=1), shares, max_new_tokens=tokens)
    for share, thresholds in zip(shares, found, strict=True):
        expected = [np.sort(wrong[layer])[int(np.ceil(share * (len(wrong[layer]) - 1)))] for layer in (1, 2, 3)]
        np.testing.assert_allclose(thresholds, expected, atol=1e-5)


@pytest.mark.parametrize(
    "policy",
    [
        ExitPolicy(min_layer=1),
        ExitPolicy("jsd", min_layer=2, vocabulary="fixed", vocabulary_size=20),
        ExitPolicy("max", min_layer=1, vocabulary="adaptive", vocabulary_size=40),
        ExitPolicy("state", min_layer=1),
    ],
    ids=lambda policy: policy.confidence,
)
def test_keeping_all_wrong_tokens_in_changes_no_answer(policy):
    lm = model()
    (thresholds,) = layer_thresholds(lm, TASK, ASKED, policy, [1.0], max_new_tokens=8)
    exact = replace(policy, threshold=thresholds, skipped="defer")  # with exact keys and values of skipped layers
    prompts = TASK.prompts(lm, ASKED)
    for prompt in prompts:
        early, full = (lm.generate([prompt], policy=p, max_new_tokens=8).tokens for p in (exact, None))
        assert early == full


def test_layers_that_are_never_wrong_let_all_leave():
    lm = model()
    found = layer_thresholds(lm, TASK, ASKED[:1], ExitPolicy(min_layer=3), [0.5], max_new_tokens=1)
    assert found == [(0.0,)]  # the one token comes from the prompt's own pass: nothing was tested
    with pytest.raises(ValueError, match="tests nothing"):
        layer_thresholds(lm, TASK, ASKED, ExitPolicy("static", min_layer=2), [1.0], max_new_tokens=1)
