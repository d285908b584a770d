"""Policies on disk, policies that are refused, and the thresholds of those that are not."""

import contextlib
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.core.confidence import NAMES, Contrast
from offramp.core.plan import resolve
from offramp.core.policy import ExitPolicy

SETTINGS = settings(derandomize=True, deadline=None, max_examples=100, database=None)
LAYERS, VOCABULARY = 12, 1000
ALWAYS = -math.inf


def resolved(**options):
    return resolve(ExitPolicy(**options), LAYERS, VOCABULARY)


def my_measure(reading):
    return torch.ones(len(reading.hidden))


# ------------------------------------------------------------ files

contrasts = st.builds(
    Contrast,
    score=st.sampled_from(["mass", "text", "head"]),
    alpha=st.floats(0.001, 1),
    alpha_schedule=st.sampled_from([None, "hyperbolic"]),
    alpha_decay=st.none() | st.floats(0, 5),
    plausibility=st.sampled_from(["alpha", "pruned"]),
    amateur=st.none() | st.integers(1, 30),
    candidates=st.sampled_from(["below", "all"]),
    stride=st.none() | st.integers(1, 9),
    support=st.sampled_from(["all", "head", "head_renorm"]),
    full=st.booleans(),
)
one_threshold = st.floats(0, 1) | st.just(ALWAYS) | st.sampled_from([0, 1])


@st.composite
def policies(draw):
    confidence = draw(st.sampled_from([*NAMES, "static"]))
    min_layer = draw(st.integers(1, 30) if confidence == "static" else st.none() | st.integers(1, 30))
    exit_layers = None
    if confidence != "static":
        layers = st.lists(st.integers(min_layer or 1, 40), min_size=1, max_size=6, unique=True)
        exit_layers = draw(st.none() | layers.map(sorted).map(tuple))
    several = st.lists(one_threshold, min_size=1, max_size=6).map(tuple)
    if exit_layers is not None:
        several = st.lists(one_threshold, min_size=len(exit_layers), max_size=len(exit_layers)).map(tuple)
    vocabulary = draw(st.sampled_from([None, "fixed", "decaying", "adaptive"]))
    contrastive = confidence in {"contrastive", "jsd"}
    contrast = draw(contrasts) if contrastive else Contrast()
    skipped = ["propagate", "defer", *([] if contrast.full else ["verify"])]  # which are refused together
    return ExitPolicy(
        confidence=confidence,
        threshold=draw(st.none() | one_threshold | several),
        min_layer=min_layer,
        vocabulary=vocabulary,
        vocabulary_size=draw(st.none() | st.integers(2, 10**6)) if vocabulary else None,
        skipped=draw(st.sampled_from(skipped)),
        exit_layers=exit_layers,
        decode_from=draw(st.sampled_from(["logits", "contrastive"])) if contrastive else "logits",
        contrast=contrast,
        vocabulary_floor=draw(st.none() | st.integers(2, 10**6)) if vocabulary else None,
        vocabulary_start=draw(st.none() | st.integers(2, 10**6)) if vocabulary else None,
        vocabulary_shrink=draw(st.floats(0.01, 1)) if vocabulary else 0.9,
        vocabulary_recursive=draw(st.booleans()) if vocabulary else False,
        decay=draw(st.sampled_from([None, "multiplicative", "additive"])),
        decay_rate=draw(st.floats(0, 20)),
        draft_length=draw(st.integers(1, 64)),
        batch=draw(st.sampled_from(["rows", "all"])),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("policies")


@SETTINGS
@given(policy=policies())
def test_a_saved_policy_comes_back_equal(folder, policy):
    path = folder / "policy.json"
    policy.save(path)
    loaded = ExitPolicy.load(path)
    assert loaded == policy
    assert hash(loaded) == hash(policy)
    assert ExitPolicy.from_dict(policy.to_dict()) == policy
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["confidence"] == policy.confidence


@pytest.mark.parametrize("threshold", [ALWAYS, (0.5, ALWAYS), (ALWAYS,) * 3])
def test_thresholds_that_always_exit_survive_a_file(tmp_path, threshold):
    path = tmp_path / "policy.json"
    ExitPolicy(threshold=threshold).save(path)
    assert ExitPolicy.load(path).threshold == threshold


def test_lists_become_tuples_so_that_equal_policies_are_equal():
    policy = ExitPolicy(threshold=[0.5, 0.6], exit_layers=[7, 9])
    assert policy == ExitPolicy(threshold=(0.5, 0.6), exit_layers=(7, 9))
    assert hash(policy) == hash(ExitPolicy(threshold=(0.5, 0.6), exit_layers=(7, 9)))


def test_a_file_with_only_some_fields_has_the_defaults_for_the_others():
    assert ExitPolicy.from_dict({"threshold": 0.7}) == ExitPolicy(threshold=0.7)
    assert ExitPolicy.from_dict({"contrast": {"alpha": 0.2}}) == ExitPolicy(contrast=Contrast(alpha=0.2))


def test_an_unknown_field_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"treshold.*\bmin_layer\b.*\bthreshold\b"):
        ExitPolicy.from_dict({"treshold": 0.7})


def test_an_unknown_field_of_the_contrast_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"(?s)alfa.*\balpha\b"):
        ExitPolicy.from_dict({"contrast": {"alfa": 0.2}})


@pytest.mark.parametrize("content", [b"", b"{", b"exit early", b"\xff\xfe\x00", b"[1, 2]", b'"softmax"', b"3", b"null"])
def test_what_is_no_policy_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "garbage.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"garbage\.json.*ExitPolicy\.save"):
        ExitPolicy.load(path)


@pytest.mark.parametrize(
    "values",
    [
        {"threshold": "high"},
        {"threshold": [0.5, "high"]},
        {"threshold": {"7": 0.5}},
        {"min_layer": "seven"},
        {"vocabulary": "fixed", "vocabulary_size": "many"},
        {"exit_layers": 5},
        {"exit_layers": ["a"]},
        {"contrast": 5},
        {"contrast": {"alpha": "big"}},
        {"draft_length": None},
        {"confidence": None},
        {"confidence": ["softmax"]},
    ],
    ids=repr,
)
def test_fields_of_the_wrong_type_in_a_file_are_refused_as_values(tmp_path, values):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"."):
        ExitPolicy.load(path).resolve(LAYERS, VOCABULARY)


def test_a_document_of_another_kind_is_not_a_policy(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"schema": "someone/else/1"}))
    with pytest.raises(ValueError, match=r"someone/else/1"):
        ExitPolicy.load(path)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        ExitPolicy.load(tmp_path / "none.json")


def test_a_callable_confidence_cannot_be_saved_and_leaves_no_file(tmp_path):
    policy = ExitPolicy(confidence=my_measure)
    with pytest.raises(ValueError, match=r"my_measure.*cannot be saved"):
        policy.save(tmp_path / "policy.json")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------ what is refused


def refused(*words, **options):
    """The options are refused, at once or for a model, in a message that has all words (as whole words)."""
    with pytest.raises(ValueError, match=r".") as error:
        resolved(**options)
    for word in words:
        assert re.search(rf"(?<![\w.-]){re.escape(word)}(?![\w-])", str(error.value)), f"{word} not in: {error.value}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threshold", [1.5, 1.0001, -1.5, math.inf, math.nan, 90])
def test_a_threshold_outside_the_range_of_its_measure_is_refused(name, threshold):
    low = "-1" if name == "state" else "0"
    refused(str(threshold), f"{low}, 1", confidence=name, threshold=threshold)
    refused(str(threshold), f"{low}, 1", confidence=name, threshold=(0.5,) * 5 + (threshold,))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_cosine_has_thresholds_below_zero(name):
    if name == "state":
        assert set(resolved(confidence=name, threshold=-0.5).thresholds.values()) == {-0.5}
    else:
        refused("-0.5", "0, 1", confidence=name, threshold=-0.5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threshold", [0, 0.5, 1, 1.0, ALWAYS])
def test_thresholds_in_the_range_are_taken(name, threshold):
    assert dict(resolved(confidence=name, threshold=threshold).thresholds) == dict.fromkeys(range(6, 12), threshold)


@pytest.mark.parametrize("name", [*NAMES, "static"])
@pytest.mark.parametrize("min_layer", [-1, 0, 12, 13, 99])
def test_a_minimum_layer_outside_the_model_is_refused(name, min_layer):
    words = ["1..11"] if min_layer > 0 else ["1"]
    refused(str(min_layer), *words, confidence=name, min_layer=min_layer)


@pytest.mark.parametrize("kind", ["fixed", "decaying", "adaptive"])
def test_a_vocabulary_size_below_two_or_above_v_is_refused(kind):
    for size in (-3, 0, 1):
        refused(str(size), "2", vocabulary=kind, vocabulary_size=size)
    for size in (VOCABULARY + 1, 10**6):
        refused(str(size), str(VOCABULARY), vocabulary=kind, vocabulary_size=size)
    for size in (2, VOCABULARY):
        assert resolved(vocabulary=kind, vocabulary_size=size).pruning.first_size() == size


def test_a_vocabulary_size_needs_a_kind():
    refused("100", "fixed", "decaying", "adaptive", vocabulary_size=100)


@pytest.mark.parametrize(
    "layers", [(9, 7), (7, 7), (5, 8), (0, 8), (-1,), (8, 12), (13,), ()], ids=lambda layers: str(layers)
)
@pytest.mark.parametrize("threshold", [0.9, None])
def test_exit_layers_that_are_unsorted_or_outside_are_refused(layers, threshold):
    refused(*map(str, layers), "6..11", min_layer=6, exit_layers=layers, threshold=threshold)


@pytest.mark.parametrize("options", [{"exit_layers": (9, 7)}, {"exit_layers": (40,)}], ids=str)
def test_bad_layers_are_refused_even_if_no_token_would_leave(options):
    refused(str(options["exit_layers"][0]), threshold=None, **options)


def test_a_vocabulary_above_v_is_refused_even_if_no_token_would_leave():
    refused("1001", "1000", threshold=None, vocabulary="fixed", vocabulary_size=1001)


@pytest.mark.parametrize(
    ("options", "given", "wanted"),
    [
        ({"threshold": (0.5, 0.6)}, "2", "6"),
        ({"threshold": (0.5,) * 7}, "7", "6"),
        ({"threshold": ()}, "0", "6"),
        ({"threshold": (0.5,), "exit_layers": (7, 9)}, "1", "2"),
        ({"threshold": (0.5,) * 3, "min_layer": 10}, "3", "2"),
    ],
)
def test_a_wrong_number_of_thresholds_is_refused(options, given, wanted):
    refused(given, wanted, **options)


def test_static_needs_a_minimum_layer():
    refused("min_layer", "static", confidence="static")


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"confidence": "margin"}, [*NAMES, "static"]),
        ({"vocabulary": "growing"}, ["None", "fixed", "decaying", "adaptive"]),
        ({"skipped": "forget"}, ["propagate", "defer", "verify"]),
        ({"decode_from": "noise"}, ["logits", "contrastive"]),
        ({"decay": "linear"}, ["None", "multiplicative", "additive"]),
        ({"batch": "columns"}, ["rows", "all"]),
    ],
    ids=str,
)
def test_unknown_names_are_refused_with_the_known_ones(options, allowed):
    refused(*options.values(), *allowed, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocabulary": "adaptive", "vocabulary_shrink": 0.0}, ["0.0", "(0, 1"]),
        ({"vocabulary": "adaptive", "vocabulary_shrink": 1.5}, ["1.5", "(0, 1"]),
        ({"vocabulary": "adaptive", "vocabulary_shrink": math.nan}, ["nan", "(0, 1"]),
        ({"vocabulary": "decaying", "vocabulary_floor": 0}, ["0", "2"]),
        ({"vocabulary": "decaying", "vocabulary_start": 1}, ["1", "2"]),
        ({"draft_length": 0}, ["0"]),
        ({"decode_from": "contrastive", "confidence": "max"}, ["max", "contrastive", "jsd"]),
        ({"decode_from": "contrastive", "confidence": my_measure}, ["contrastive", "jsd"]),
    ],
)
def test_other_values_that_make_no_sense_are_refused(options, words):
    refused(*words, **options)


@pytest.mark.parametrize("confidence", ["softmax", "static"])
def test_a_model_of_one_layer_has_no_exit(confidence):
    with pytest.raises(ValueError, match="1 layer"):
        resolve(ExitPolicy(confidence=confidence, min_layer=1), 1, VOCABULARY)


def test_never_leaving_works_for_a_model_of_one_layer():
    assert dict(resolve(ExitPolicy(threshold=None), 1, VOCABULARY).thresholds) == {}


# ------------------------------------------------------------ what is resolved


@pytest.mark.parametrize(("num_layers", "first"), [(2, 1), (3, 1), (4, 2), (7, 3), (24, 12)])
def test_by_default_exits_are_tested_from_half_the_depth_to_the_last_but_one(num_layers, first):
    plan = resolve(ExitPolicy(), num_layers, VOCABULARY)
    assert dict(plan.thresholds) == dict.fromkeys(range(first, num_layers), 0.9)
    assert (plan.min_layer, plan.last, plan.num_layers, plan.vocabulary) == (first, num_layers, num_layers, VOCABULARY)
    assert plan.pruning is None
    assert plan.candidates == ()
    assert plan.stops == tuple(range(first, num_layers))


def test_exit_layers_and_their_thresholds_go_together():
    plan = resolved(min_layer=3, exit_layers=(4, 7, 11), threshold=(0.9, 0.5, ALWAYS))
    assert list(plan.thresholds.items()) == [(4, 0.9), (7, 0.5), (11, ALWAYS)]
    assert [plan.threshold(layer, 0, 10) for layer in (4, 7, 11)] == [0.9, 0.5, ALWAYS]


def test_no_threshold_means_no_test():
    for options in ({}, {"min_layer": 4}, {"vocabulary": "fixed"}, {"confidence": "jsd"}):
        plan = resolved(threshold=None, **options)
        assert dict(plan.thresholds) == {}
        assert plan.last == LAYERS


def test_a_static_policy_needs_no_layer_behind_its_exit():
    plan = resolved(confidence="static", min_layer=5, threshold=None)
    assert plan.last == 5
    assert plan.measure is None
    assert dict(plan.thresholds) == {}


def test_a_callable_is_the_measure():
    assert resolved(confidence=my_measure).measure is my_measure


@pytest.mark.parametrize("kind", ["fixed", "decaying", "adaptive"])
def test_pruning_gets_the_fields_of_the_policy(kind):
    pruning = resolve(ExitPolicy(
        min_layer=7, vocabulary=kind, vocabulary_floor=250, vocabulary_start=35000, vocabulary_shrink=0.5
    ), 24, 32128).pruning  # fmt: skip
    assert (pruning.kind, pruning.vocabulary, pruning.num_layers, pruning.first_layer) == (kind, 32128, 24, 7)
    assert pruning.first_size() == 842
    assert pruning.next_size(8, 842, 1.0) == {"fixed": 842, "decaying": 739, "adaptive": 421}[kind]


def test_a_recursive_decay_is_passed_on():
    pruning = resolve(ExitPolicy(
        min_layer=7, vocabulary="decaying", vocabulary_floor=250, vocabulary_start=35000, vocabulary_recursive=True
    ), 24, 32128).pruning  # fmt: skip
    assert pruning.next_size(8, 842, 0.0) == 470


def test_candidates_of_the_contrast_are_stops_as_well():
    plan = resolved(confidence="jsd", min_layer=6)
    assert plan.candidates == (2, 3, 4, 5)
    assert plan.stops == tuple(range(2, 12))


# ------------------------------------------------------------ thresholds that decay


@SETTINGS
@given(
    tau=st.floats(0, 1), t=st.integers(0, 200), n=st.integers(1, 200), theta=st.floats(0, 20),
    layer=st.integers(6, 11),
)  # fmt: skip
def test_both_forms_of_decay_are_their_formulas(tau, t, n, theta, layer):
    t = min(t, n)
    code = resolved(threshold=tau, decay="multiplicative", decay_rate=theta).threshold(layer, t, n)
    paper = resolved(threshold=tau, decay="additive", decay_rate=theta).threshold(layer, t, n)
    falling = math.exp(-theta * t / n)
    assert code == pytest.approx(tau * (0.9 + 0.1 * falling), abs=1e-12)
    assert paper == pytest.approx(min(max(0.9 * tau + falling / 10, 0), 1), abs=1e-12)
    assert 0 <= code <= tau + 1e-12
    assert 0 <= paper <= 1


def test_decay_in_numbers():
    code = resolved(threshold=0.8, decay="multiplicative")
    paper = resolved(threshold=0.8, decay="additive")
    assert code.threshold(6, 0, 100) == pytest.approx(0.8)
    assert paper.threshold(6, 0, 100) == pytest.approx(0.82)
    assert code.threshold(6, 25, 100) == pytest.approx(0.72 + 0.08 * 0.36787944)  # θ = 4 is the default
    assert paper.threshold(6, 25, 100) == pytest.approx(0.72 + 0.1 * 0.36787944)


@pytest.mark.parametrize("form", ["multiplicative", "additive"])
def test_a_threshold_of_one_can_be_passed_from_the_second_token_on(form):
    plan = resolved(threshold=1.0, decay=form)
    assert plan.threshold(6, 0, 50) == pytest.approx(1)
    taus = [plan.threshold(6, t, 50) for t in range(51)]
    assert all(a > b for a, b in zip(taus, taus[1:], strict=False))
    assert taus[1] < 1


def test_the_additive_form_is_clipped_to_probabilities():
    assert resolved(threshold=-0.9, confidence="state", decay="additive").threshold(6, 50, 50) == 0
    assert resolved(threshold=1.0, decay="additive", decay_rate=0.0).threshold(6, 50, 50) == pytest.approx(1)


@pytest.mark.parametrize("form", [None, "multiplicative", "additive"])
def test_always_stays_always_and_a_constant_stays_constant(form):
    plan = resolved(threshold=ALWAYS, decay=form)
    assert {plan.threshold(6, t, 20) for t in range(21)} == {ALWAYS}
    assert {resolved(threshold=0.7).threshold(9, t, 20) for t in range(21)} == {0.7}


@pytest.mark.parametrize("form", ["multiplicative", "additive"])
def test_each_exit_decays_from_its_own_threshold(form):
    several = resolved(exit_layers=(7, 9), threshold=(0.9, 0.2), decay=form)
    for layer, tau in ((7, 0.9), (9, 0.2)):
        assert several.threshold(layer, 3, 20) == resolved(threshold=tau, decay=form).threshold(layer, 3, 20)


# ------------------------------------------------------------ frozen


def test_policies_plans_and_options_are_frozen():
    policy = ExitPolicy()
    for record, name in ((policy, "threshold"), (resolve(policy, 12, 100), "thresholds"), (Contrast(), "alpha")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, 0.5)


def test_a_policy_is_checked_again_when_it_is_changed():
    with pytest.raises(ValueError, match=r"1\.5"):
        dataclasses.replace(ExitPolicy(), threshold=1.5)
    assert dataclasses.replace(ExitPolicy(), threshold=0.5) == ExitPolicy(threshold=0.5)


def test_chosen_exits_set_the_first_layer():
    plan = resolve(ExitPolicy(exit_layers=(3, 6)), 30, 1000)
    assert (plan.min_layer, tuple(plan.thresholds)) == (3, (3, 6))


def test_verify_and_contrast_at_full_depth_contradict_each_other():
    with pytest.raises(ValueError, match="full model's own logits; leave contrast full away"):
        ExitPolicy("jsd", skipped="verify", contrast=Contrast(full=True))


NONSENSE = [
    math.nan, math.inf, -math.inf, -(2**63), 2**63, 10**30, -1, 0, 1, 2.5, "x", "0.5", "-inf", b"x", True, False, [],
    [1], ["x"], [math.nan], [None], {}, {"a": 1}, None, np.float32(0.5), np.float64("nan"), np.int64(7), np.bool_(True),
    np.array([0.5, 0.6]), 1j, object(),
]  # fmt: skip


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: f"{type(value).__name__} {value!r:.20}".split(" at ")[0])
@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ExitPolicy)])
def test_any_value_of_any_field_is_refused_or_works(tmp_path, name, value):
    """What is taken is plain, can be saved and read again, and can be resolved or is refused in words there."""
    try:
        policy = ExitPolicy(**{"confidence": "softmax", "min_layer": 6, name: value})
    except ValueError as error:
        said = str(error)
    else:
        said = None
    if said is not None:
        assert name in said
        return
    got, default = (json.loads(json.dumps(p.to_dict())) for p in (policy, ExitPolicy(min_layer=6)))
    assert got == default | {name: got[name]}
    policy.save(tmp_path / "policy.json")
    assert ExitPolicy.load(tmp_path / "policy.json") == policy
    with contextlib.suppress(ValueError):
        resolve(policy, LAYERS, VOCABULARY)


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: f"{type(value).__name__} {value!r:.20}".split(" at ")[0])
@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Contrast)])
def test_any_value_of_a_contrast_is_refused_or_works(name, value):
    try:
        contrast = Contrast(**{name: value})
    except ValueError as error:
        said = str(error)
    else:
        said = None
    if said is not None:
        assert f"contrast {name}" in said
        return
    policy = ExitPolicy("jsd", contrast=contrast)
    assert ExitPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    with contextlib.suppress(ValueError):
        resolve(policy, LAYERS, VOCABULARY)


def test_a_misspelt_name_is_told_the_nearest():
    refused("sofmax", "did you mean 'softmax'?", confidence="sofmax")
    refused("verfy", "did you mean 'verify'?", skipped="verfy")
    with pytest.raises(ValueError, match="did you mean 'threshold'?"):
        ExitPolicy.from_dict({"treshold": 0.7})
