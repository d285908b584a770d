"""How far drafts go by the acceptance seen: the same text, and a pace that a simulation bears out."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from offramp import ExitPolicy, LanguageModel
from offramp.core.plan import resolve
from offramp.core.verifying import MORE, Pace
from test_brute_force import NO_END, batch_of, deep, lively
from tiny import greedy, inputs_for, tiny


def pace_of(lm, **options):
    policy = ExitPolicy(skipped="verify", draft="adaptive", **options)
    return Pace.of(resolve(policy, lm.num_layers, lm.vocabulary), lm.split.shape)


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5", "whisper"])
@pytest.mark.parametrize("options", [{"threshold": 0.1, "min_layer": 1}, {"confidence": "static", "min_layer": 2}])
def test_the_text_is_the_full_models(name, options):
    model, inputs = lively(name), batch_of(name)
    policy = ExitPolicy(skipped="verify", draft="adaptive", **options)
    out = LanguageModel(model).generate(inputs, policy=policy, max_new_tokens=12, eos_token_id=NO_END)
    full = LanguageModel(model).generate(inputs, max_new_tokens=12, eos_token_id=NO_END)
    assert out.tokens == full.tokens


def test_rows_of_a_batch_do_not_depend_on_their_neighbours_text():
    inputs = inputs_for("llama", 3, padded=True)
    policy = ExitPolicy(skipped="verify", draft="adaptive", threshold=0.1, min_layer=3, vocabulary="fixed")
    out = LanguageModel(deep()).generate(inputs, policy=policy, max_new_tokens=20)
    assert out.sequences.tolist() == greedy(deep(), inputs, 20).tolist()


def test_costs_are_those_of_the_model():
    lm = LanguageModel(tiny("llama"))
    pace = pace_of(lm, confidence="static", min_layer=2)
    shape = lm.split.shape
    weights = [block.weights for block in shape.blocks]
    assert pace.spent[2] == (sum(weights[:2]) + shape.readout_weights()) / (sum(weights) + shape.readout_weights())


@pytest.mark.parametrize("right", [0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("spent", [0.2, 0.5, 0.8])
def test_the_pace_is_near_the_best_fixed_length(right, spent):
    """Drafts right with a known chance: the tokens per cost that the rule reaches, against every fixed length."""

    def rate(length):  # tokens and cost of a cycle that goes deep with its last token
        tokens = sum(right**i for i in range(length + 1))
        return tokens / (length * spent + 1 + MORE * length)

    best = max(rate(length) for length in range(17))
    draw = random.Random(7)
    pace = Pace({1: -math.inf}, {1: spent})
    tokens = cost = 0.0
    for _ in range(3000):
        drafts = []
        while len(drafts) < 16 and pace.leaves(1, 1.0, drafts):
            drafts.append((1, 1.0))
        wins = [draw.random() < right for _ in drafts]
        accepted = next((i for i, win in enumerate(wins) if not win), len(wins))
        for win in wins[: accepted + 1]:
            pace.observe(1, 1.0, win)
        before = pace.tokens, pace.cost
        pace.checked([1] * len(drafts) + [2], accepted + 1)
        tokens, cost = tokens + pace.tokens - before[0], cost + pace.cost - before[1]
    assert tokens / cost >= 0.93 * best


def test_only_drafts_have_a_pace():
    with pytest.raises(ValueError, match="draft='adaptive' needs skipped='verify', not 'defer'"):
        ExitPolicy(skipped="defer", draft="adaptive")
    with pytest.raises(ValueError, match="for each row of a batch alone; leave batch='all' out"):
        ExitPolicy(skipped="verify", draft="adaptive", batch="all")
    with pytest.raises(ValueError, match="draft is 'fast'; "):
        ExitPolicy(skipped="verify", draft="fast")
    lm = LanguageModel(tiny("llama"))
    plan = resolve(ExitPolicy(skipped="verify"), lm.num_layers, lm.vocabulary)
    assert Pace.of(plan, SimpleNamespace()) is None
    adaptive = replace(plan.policy, draft="adaptive")
    assert ExitPolicy.from_dict(adaptive.to_dict()) == adaptive
