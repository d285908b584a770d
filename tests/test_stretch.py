"""Several tokens in one call of the engine are the tokens, exits and costs of one after another."""

import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch

import offramp.core.decoding as decoding
from few_bits import model_in, rounded
from offramp import ExitPolicy, LanguageModel
from offramp.core.decoding import Stretch, stretch_of
from offramp.core.exits import Exits
from offramp.families.finite import NotFiniteError
from offramp.lm.scripted import Script, Scripted
from tiny import LAYERS, VOCABULARY, inputs_for, tiny

NEW = 21  # calls of 1, 2, 4, 8 and fewer tokens
EXITS = ExitPolicy(threshold=0.04, min_layer=1)
POLICIES = {
    "full": None,
    "static": ExitPolicy("static", min_layer=2),
    "softmax": EXITS,
    "max": ExitPolicy("max", 0.06, 1),
    "never": ExitPolicy("max", 1.0, 1),
    "one exit": ExitPolicy(threshold=0.03, exit_layers=(2,)),
    "by layer": ExitPolicy(threshold=(0.05, 0.02), exit_layers=(1, 3)),
    "decay": replace(EXITS, decay="multiplicative"),
    "fixed": replace(EXITS, vocabulary="fixed", vocabulary_size=12),
    "all kept": replace(EXITS, vocabulary="fixed", vocabulary_size=VOCABULARY),
    "frequent": replace(EXITS, vocabulary="frequent"),
    "frequent-fixed": replace(EXITS, vocabulary="frequent-fixed", vocabulary_size=5),
    "script": ExitPolicy(Scripted(Script((1, 3, 2, LAYERS, 1, LAYERS))), 0.5, 1),
    "script, fixed": ExitPolicy(Scripted(Script((1, 3, 2, LAYERS, 1))), 0.5, 1, vocabulary="fixed", vocabulary_size=9),
}


@dataclass
class Own:
    """A measure of somebody's own, which cannot be a key."""

    seen: list

    def __call__(self, reading):
        self.seen.append(reading.layer)
        return reading.top.gap


@pytest.fixture(params=["llama", "t5", "qwen2", "mistral"])
def name(request):
    return request.param


def language_model(name, form="float32", *, exits=False):
    lm = LanguageModel(model_in(form, tiny(name)), engine="native", rounded=rounded(form))
    if exits:
        own = Exits.fresh(lm.split, (1, 2, 3), rank=4)
        torch.manual_seed(0)
        for weight in own.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        lm.attach_exits(own.with_frequent(torch.arange(0, VOCABULARY, 3)))
    return lm


def both(monkeypatch, lm, inputs, **options):
    """What calls of several tokens make, and what single steps make."""
    begun = []

    def counted(batch):
        stretch = stretch_of(batch)
        begun.extend([stretch] if stretch else [])
        return stretch

    monkeypatch.setattr(decoding, "stretch_of", counted)
    got = lm.generate(inputs, max_new_tokens=NEW, **options)
    deep = (
        max(map(max, got.exit_layers)) == lm.num_layers
    )  # else a decoder has blocks that never saw the encoder's output
    assert len(begun) == 1 or (lm.split.is_encoder_decoder and not deep)
    monkeypatch.setattr(decoding, "stretch_of", lambda batch: None)
    return got, lm.generate(inputs, max_new_tokens=NEW, **options)


def bills(generation):
    costs = generation.costs
    parts = {name: (part.flops, part.bytes) for name, part in costs.parts.items()}
    return (
        parts,
        costs.tokens,
        costs.tests,
        costs.exit_layers,
        costs.executed_layers,
        costs.draft_flops,
        costs.prompt_flops,
    )


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_exits_and_costs_are_those_of_single_steps(monkeypatch, name, policy, form):
    lm = language_model(name, form, exits="frequent" in policy)
    got, want = both(monkeypatch, lm, inputs_for(name, 1), policy=POLICIES[policy])
    assert got.tokens == want.tokens
    assert got.exit_layers == want.exit_layers
    for one, other in zip(got.confidences[0], want.confidences[0], strict=True):
        assert math.isclose(one, other, abs_tol=1e-6) or math.isnan(one) and math.isnan(other)
    assert bills(got) == bills(want)
    assert got.sequences.tolist() == want.sequences.tolist()


@pytest.mark.parametrize("at", [1, 2, 3, 8, 14])
def test_the_text_ends_with_its_end(monkeypatch, at):
    lm, inputs = language_model("llama"), inputs_for("llama", 1)
    token = lm.generate(inputs, max_new_tokens=NEW).tokens[0][at]
    got, want = both(monkeypatch, lm, inputs, policy=EXITS, eos_token_id=token)
    assert got.tokens == want.tokens
    assert bills(got) == bills(want)


def test_tokens_come_in_small_calls_and_may_be_left(monkeypatch):
    lm = language_model("llama")
    whole = lm.generate(inputs_for("llama", 1), max_new_tokens=NEW).tokens[0]
    counts = []
    run = Stretch._run
    monkeypatch.setattr(Stretch, "_run", lambda self, count: counts.append(count) or run(self, count))
    stream = lm.stream(inputs_for("llama", 1), max_new_tokens=NEW)
    assert [int(next(stream).token) for _ in range(9)] == whole[:9]
    assert counts == [1, 2, 4, 8]  # behind the prompt's own token


def test_flops_of_steps_add_up(monkeypatch):
    lm = language_model("llama")
    stream = lm.stream(inputs_for("llama", 1), policy=EXITS, max_new_tokens=NEW)
    assert sum(step.flops for step in stream) == stream.costs.flops


def test_a_token_chosen_by_no_number_is_refused_behind_those_that_were_right():
    model = copy.deepcopy(tiny("llama"))
    lm, inputs = LanguageModel(model, engine="native"), inputs_for("llama", 1)
    tokens = lm.generate(inputs, max_new_tokens=NEW).tokens[0]
    broken = next(
        i for i in range(3, len(tokens) - 1) if tokens[i] not in tokens[:i] and tokens[i] not in inputs["input_ids"][0]
    )
    with torch.no_grad():
        model.get_input_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.clone())
        model.get_input_embeddings().weight[tokens[broken]] = math.nan
    stream = lm.stream(inputs, max_new_tokens=NEW)
    assert [int(next(stream).token) for _ in range(broken + 1)] == tokens[: broken + 1]
    with pytest.raises(NotFiniteError):
        next(stream)


def test_a_hook_on_the_embeddings_is_called():
    model = copy.deepcopy(tiny("llama"))
    lm, seen = LanguageModel(model, engine="native"), []
    lm.generate(inputs_for("llama", 1), max_new_tokens=5)
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(output) or 2 * output
    )
    bent = lm.generate(inputs_for("llama", 1), max_new_tokens=9).tokens
    assert len(seen) == 9
    assert bent == LanguageModel(model, engine="torch").generate(inputs_for("llama", 1), max_new_tokens=9).tokens
    hook.remove()
    lm.generate(inputs_for("llama", 1), max_new_tokens=9)
    assert len(seen) == 18  # of both engines


STEP_BY_STEP = {
    "defer": {"policy": replace(EXITS, skipped="defer")},
    "verify": {"policy": replace(EXITS, skipped="verify")},
    "another measure": {"policy": ExitPolicy("entropy", 0.1, 1)},
    "one's own": {"policy": ExitPolicy(Own([]), 0.1, 1)},
    "sizes that change": {"policy": replace(EXITS, vocabulary="decaying", vocabulary_size=12)},
    "draws": {"do_sample": True, "seed": 0},
    "processors": {"repetition_penalty": 1.3},
    "stops": {"stopping_criteria": [lambda ids, scores: torch.zeros(len(ids), dtype=torch.bool)]},
}


@pytest.mark.parametrize("options", STEP_BY_STEP.values(), ids=STEP_BY_STEP)
def test_what_needs_python_between_tokens_is_done_step_by_step(monkeypatch, options):
    monkeypatch.setattr(Stretch, "steps", lambda self: pytest.fail("in one call"))
    assert len(language_model("llama").generate(inputs_for("llama", 1), max_new_tokens=5, **options).tokens[0]) == 5


def test_rows_of_a_batch_go_step_by_step(monkeypatch):
    monkeypatch.setattr(Stretch, "steps", lambda self: pytest.fail("in one call"))
    language_model("llama").generate(inputs_for("llama", 2), max_new_tokens=5)


def test_time_is_booked_on_its_parts():
    lm = language_model("llama")
    costs = lm.generate(inputs_for("llama", 1), policy=POLICIES["fixed"], max_new_tokens=NEW).costs
    for part in ("blocks", "readout", "pruned_readout", "select", "fill"):
        assert costs.parts[part].seconds > 0, part
    assert sum(part.seconds for part in costs.parts.values()) <= costs.seconds
