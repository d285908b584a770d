"""Drafts and their checks, several times over in one call of the engine, are those of one after another."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from few_bits import model_in, rounded
from offramp import ExitPolicy, LanguageModel
from offramp.core.policy import DRAFTER
from offramp.families.finite import NotFiniteError
from offramp.native.model import NativeModel
from test_drafter import drafting, likely
from test_stretch import bills
from tiny import inputs_for, tiny

NEW = 29
THREE = ExitPolicy("static", min_layer=DRAFTER, skipped="verify", draft_length=3, vocabulary="frequent")
POLICIES = {
    "three": THREE,
    "one, all tokens": replace(THREE, draft_length=1, vocabulary=None),
    "largest": replace(THREE, confidence="max", threshold=0.4, draft_length=8),
    "lead": replace(THREE, confidence="softmax", threshold=0.2),
    "second choices": replace(THREE, accept=0.3),
}
CYCLES = NativeModel.cycles


def language_model(form="float32"):
    """With a drafter that is right now and then."""
    model = tiny("llama") if form == "float32" else model_in("bfloat16", tiny("llama"))
    lm = LanguageModel(model_in(form, model), engine="native", rounded=rounded(form))
    lm.attach_exits(drafting(lm.split, 2, frequent=likely("llama", inputs_for("llama", 1), 3)))
    return lm


def both(monkeypatch, lm, **options):
    """What calls of several cycles make, and what is drafted and checked call by call."""
    inputs = inputs_for("llama", 1)
    with monkeypatch.context() as patch:
        patch.setattr(NativeModel, "cycles", lambda *where, **options: None)
        want = lm.generate(inputs, max_new_tokens=NEW, **options)
    return lm.generate(inputs, max_new_tokens=NEW, **options), want


def counted(monkeypatch):
    """How many cycles each call is to make at most, from now on."""
    counts = []
    monkeypatch.setattr(
        NativeModel, "cycles", lambda self, *where, **options: counts.append(options["count"]) or CYCLES(
            self, *where, **options
        ),
    )  # fmt: skip
    return counts


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_drafts_and_costs_are_those_of_single_calls(monkeypatch, policy, form):
    got, want = both(monkeypatch, language_model(form), policy=POLICIES[policy], eos_token_id=None)
    assert got.tokens == want.tokens
    assert got.exit_layers == want.exit_layers
    assert bills(got) == bills(want)
    for one, other in zip(got.confidences[0], want.confidences[0], strict=True):
        assert math.isclose(one, other, abs_tol=1e-4) or math.isnan(one) and math.isnan(other)
    if policy == "three":
        assert 0 < got.exit_layers[0].count(DRAFTER) < NEW - 1


@pytest.mark.parametrize("at", [1, 2, 3, 8, 14])
def test_the_text_ends_with_its_end(monkeypatch, at):
    lm = language_model()
    token = lm.generate(inputs_for("llama", 1), max_new_tokens=NEW, eos_token_id=None).tokens[0][at]
    got, want = both(monkeypatch, lm, policy=THREE, eos_token_id=token)
    assert got.tokens == want.tokens
    assert got.tokens[0][-1] == token
    assert bills(got) == bills(want)


def test_streams_get_their_first_tokens_in_small_calls_and_all_of_the_bill(monkeypatch):
    lm, counts = language_model(), counted(monkeypatch)
    steps = list(stream := lm.stream(inputs_for("llama", 1), policy=THREE, max_new_tokens=NEW, eos_token_id=None))
    assert counts[:3] == [1, 2, 4]
    assert set(counts[3:]) == {4}
    assert sum(step.flops for step in steps) == stream.costs.flops
    for part in ("blocks", "readout"):
        assert stream.costs.parts[part].seconds > 0


def test_nothing_is_made_ahead_of_a_criterion_that_may_stop_the_text(monkeypatch):
    lm, counts = language_model(), counted(monkeypatch)
    whole = lm.generate(inputs_for("llama", 1), max_new_tokens=NEW, eos_token_id=None).tokens[0]
    stops = [lambda ids, scores: torch.tensor([ids[0, -2:].tolist() == whole[8:10]])]
    options = {"policy": THREE, "stopping_criteria": stops, "eos_token_id": None}
    got, want = both(monkeypatch, lm, **options)
    assert got.tokens == want.tokens
    assert got.tokens[0][-2:] == whole[8:10]
    assert set(counts) == {1}


def test_a_token_chosen_by_no_number_is_refused_behind_those_that_were_right():
    model = copy.deepcopy(tiny("llama"))
    lm, inputs = LanguageModel(model, engine="native"), inputs_for("llama", 1)
    tokens = lm.generate(inputs, max_new_tokens=NEW).tokens[0]
    known = inputs["input_ids"][0].tolist()
    broken = next(i for i in range(3, len(tokens) - 1) if tokens[i] not in [*known, *tokens[:i]])
    with torch.no_grad():
        model.get_input_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.clone())
        model.get_input_embeddings().weight[tokens[broken]] = math.nan
    others = sorted({*known, *tokens[:broken]})
    lm.attach_exits(drafting(lm.split, frequent=others))
    stream, made = lm.stream(inputs, policy=THREE, max_new_tokens=NEW), []
    with pytest.raises(NotFiniteError):
        made.extend(int(step.token) for step in stream)
    assert 0 < len(made) <= broken + 1
    assert made == tokens[: len(made)]
