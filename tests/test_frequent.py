"""Tests on the exits' frequent tokens alone: against brute force, the full model, simulation, and what is saved."""

import json
import math
from collections import Counter

import pytest
import torch

from few_bits import model_in, rounded
from offramp import Contrast, ExitPolicy, Exits, LanguageModel, ModelError
from offramp.calibration.grid import Grid, settings_of
from offramp.core.costs import break_even
from offramp.core.plan import resolve
from offramp.core.verifying import Pace
from offramp.core.vocabulary import FREQUENT, VOCABULARIES, rule_of
from offramp.evaluation import document_arms, grid
from offramp.evaluation.records import TaskArm
from offramp.hub.exit_files import load_exits, save_exits
from offramp.lm.bench import default_arms, run_bench
from offramp.tasks import TASKS
from posteriors import with_posterior
from sealing import rewrite
from test_brute_force import NO_END, batch_of, compare, deep, layers_of, lively, reference, thresholds
from test_exits import with_exits
from tiny import VOCABULARY, eager, greedy, inputs_for, tiny, tokenizer

FREQUENT_KINDS = [name for name in VOCABULARIES if name.startswith(FREQUENT)]
SOME = sorted({2, *range(5, VOCABULARY, 3), *range(40, 60)})
"""Frequent tokens of the tiny models, the end among them; many tokens are not."""
ENGINES = ("torch", "native")
WAYS = [("frequent", "torch"), *((kind, "native") for kind in FREQUENT_KINDS), ("frequent-decaying", "torch")]


def listed(model, engine="auto", tokens=SOME, **options):
    """The model with exits that have a list, and nothing else."""
    lm = LanguageModel(model, engine=engine, **options)
    lm.attach_exits(Exits.fresh(lm.split, rank=0).with_frequent(tokens))
    return lm


# ---------------------------------------------------------------- what is scored


@pytest.mark.parametrize(("kind", "engine"), WAYS)
@pytest.mark.parametrize(
    ("measure", "tau"),
    [("softmax", 0.2), ("max", 0.3), ("entropy", 0.4), ("state", 0.9), ("contrastive", 0.3), ("jsd", 0.3)],
)
def test_every_measure_on_all_logits_but_those_of_the_list_masked(measure, tau, kind, engine):
    for skipped in ("propagate", "defer"):
        policy = ExitPolicy(measure, tau, min_layer=3, vocabulary=kind, skipped=skipped)
        rows, sizes = compare(deep(), batch_of("llama"), policy, frequent=SOME, engine=engine)
        assert len(layers_of(rows)) >= 2
        early = {t for row in rows for t, layer in list(zip(row.tokens, row.layers, strict=True))[1:] if layer < 7}
        assert early
        assert early <= set(SOME)
        if rule_of(kind) is not None and measure != "state":
            assert min(sizes) < len(SOME)


@pytest.mark.parametrize("kind", ["frequent", "frequent-adaptive"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "phi3", "t5", "bart", "whisper"])
def test_families(name, kind):
    policy = ExitPolicy(threshold=thresholds(name)[1], min_layer=1, vocabulary=kind)
    rows, _ = compare(lively(name), batch_of(name), policy, frequent=SOME, eos_token_id=NO_END)
    assert len(layers_of(rows)) >= 2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("source", ["logits", "contrastive"])
@pytest.mark.parametrize("measure", ["contrastive", "jsd"])
@pytest.mark.parametrize(
    "options", [{"candidates": "all"}, {"support": "head"}, {"full": True}, {"amateur": 2}], ids=str
)
def test_contrast_is_within_the_list(measure, options, source, engine):
    for kind in ("frequent", "frequent-decaying"):
        policy = ExitPolicy(
            measure, 0.3, min_layer=4, vocabulary=kind, decode_from=source, contrast=Contrast(**options)
        )  # fmt: skip
        compare(deep(), batch_of("llama", 2), policy, new=6, frequent=SOME, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [
        {"threshold": (0.3, 0.2, 0.1, 0.05)},
        {"exit_layers": (3, 5)},
        {"threshold": 0.1, "batch": "all"},
        {"threshold": 0.3, "decay": "multiplicative"},
        {"vocabulary": "frequent-adaptive", "vocabulary_size": 9, "vocabulary_shrink": 0.5, "exit_layers": (3, 4, 6)},
        {"vocabulary": "frequent-fixed", "vocabulary_size": 90},  # more than there are
        {"prompt_layer": 4},
    ],
    ids=str,
)
def test_other_options(options, engine):
    policy = ExitPolicy(**{"threshold": 0.15, "min_layer": 3, "vocabulary": "frequent", **options})
    compare(deep(), batch_of("llama"), policy, frequent=SOME, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_list_of_all_tokens_changes_nothing(engine):
    every = listed(deep(), engine, range(VOCABULARY))
    for measure, kind in (("softmax", "frequent"), ("jsd", "frequent-fixed"), ("entropy", "frequent-adaptive")):
        policy = ExitPolicy(measure, 0.2, min_layer=3, vocabulary=kind)
        plain = ExitPolicy(measure, 0.2, min_layer=3, vocabulary=rule_of(kind))
        got, want = (every.generate(batch_of("llama"), policy=p, max_new_tokens=10) for p in (policy, plain))
        assert (got.tokens, got.exit_layers) == (want.tokens, want.exit_layers)


def test_an_end_that_is_not_listed_comes_from_the_last_layer():
    model, inputs = deep(), batch_of("llama", 4)
    policy = ExitPolicy(threshold=0.05, min_layer=1, vocabulary="frequent-fixed", vocabulary_size=4)
    ends = [row.tokens[4] for row in reference(model, inputs, policy, eos=NO_END, frequent=SOME)[0]]
    assert set(ends) - set(SOME) or set(ends) & set(SOME)
    compare(model, inputs, policy, new=14, frequent=[v for v in SOME if v not in ends[:2]], eos_token_id=ends)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_classifier_decides_and_only_a_leaving_token_is_read(engine):
    torch.manual_seed(3)
    lm = listed(deep(), engine)
    exits = lm.exits.with_classifiers()
    for parameter in exits.classifiers.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    lm.attach_exits(exits)
    layers = lm.split.exit_layers
    plain, few = (
        lm.generate(batch_of("llama"), policy=ExitPolicy("classifier", 0.5, vocabulary=v), max_new_tokens=1 + 1)
        for v in (None, "frequent")
    )
    assert plain.exit_layers == few.exit_layers  # of the one token behind the prompt's: the classifier reads no logits
    left = [row[1] for row in few.exit_layers]
    assert set(left) & set(layers)
    assert all(row[1] in SOME for row in few.tokens if row is not None and left[few.tokens.index(row)] < 7)
    before = [row[:1] for row in few.tokens]
    for row, (inputs, layer) in enumerate(zip(_alone(batch_of("llama")), left, strict=True)):
        state = lm.split.start(torch.tensor([[*inputs, *before[row]]]))
        z = lm.split.readout(lm.split.run(state, 0, layer).hidden[:, -1])[0]
        keep = torch.zeros(VOCABULARY, dtype=torch.bool)
        keep[SOME if layer < 7 else slice(None)] = True
        assert few.tokens[row][1] == int(z.masked_fill(~keep, -math.inf).argmax())
    assert few.costs.parts["pruned_readout"].flops == 2 * 32 * len(SOME) * sum(layer < 7 for layer in left)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_measure_of_ones_own_sees_the_list(engine):
    lm, seen = listed(deep(), engine), []

    def own(reading):
        seen.append((reading.kept, reading.ids.tolist(), reading.logits.shape[1]))
        return reading.logits.softmax(-1).amax(-1)

    for kind in ("frequent", "frequent-fixed"):
        got, want = (
            lm.generate(batch_of("llama"), policy=ExitPolicy(c, 0.3, min_layer=3, vocabulary=kind), max_new_tokens=8)
            for c in (own, "max")
        )
        assert (got.tokens, got.exit_layers) == (want.tokens, want.exit_layers)
        assert seen[0] == (True, [SOME] * 3, len(SOME))


def test_frees_threshold_learns_from_the_list():
    lm = listed(deep())
    policy = ExitPolicy(min_layer=4, skipped="defer", adaptive=True, threshold=0.2, vocabulary="frequent")
    for seed in range(3):
        lm.generate(inputs_for("llama", 3, seed=seed), policy=policy, max_new_tokens=20)
    learnt = lm.adaptive_threshold(policy)
    assert learnt.agree.count + learnt.disagree.count > 0


def test_inside_the_generate_of_transformers():
    lm = listed(deep())
    policy, inputs = ExitPolicy(threshold=0.2, min_layer=3, vocabulary="frequent"), batch_of("llama")
    ids = deep().generate(
        **inputs, max_new_tokens=8, do_sample=False, custom_generate=policy.custom_generate(lm.exits)
    )  # fmt: skip
    assert ids.tolist() == lm.generate(inputs, policy=policy, max_new_tokens=8).sequences.tolist()


def _alone(inputs):
    return [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


# ---------------------------------------------------------------- lossless


@pytest.mark.parametrize(("kind", "engine"), [*WAYS[:2], ("frequent-adaptive", "native")])
@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.1, "min_layer": 1},
        {"threshold": 0.1, "min_layer": 1, "draft": "adaptive"},
        {"confidence": "state", "threshold": 0.5, "min_layer": 1},
        {"confidence": "jsd", "threshold": 0.1, "min_layer": 3},
        {"confidence": "static", "min_layer": 4},
        {"confidence": "static", "min_layer": 4, "draft": "adaptive", "draft_length": 3},
    ],
    ids=str,
)
def test_verify_is_greedy(options, kind, engine):
    inputs = batch_of("llama", 4)
    policy = ExitPolicy(**options, vocabulary=kind, skipped="verify")
    out = listed(deep(), engine).generate(inputs, policy=policy, max_new_tokens=20)
    assert out.sequences.tolist() == greedy(deep(), inputs, 20).tolist()
    left = [
        (t, layer) for ts, ls in zip(out.tokens, out.exit_layers, strict=True) for t, layer in zip(ts, ls, strict=True)
    ]
    assert all(token in SOME for token, layer in left[1:] if layer < 7)


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
def test_verify_is_its_own_full_depth_in_other_formats(form):
    lm, inputs = listed(model_in(form, deep()), "native", rounded=rounded(form)), batch_of("llama", 3)
    policy = ExitPolicy("static", min_layer=6, vocabulary="frequent", skipped="verify")
    out, full = (lm.generate(inputs, policy=p, max_new_tokens=16) for p in (policy, None))
    assert out.tokens == full.tokens
    assert any(layer < 7 for row in out.exit_layers for layer in row)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_never_leaving_is_the_full_model(name):
    inputs = inputs_for(name, 3, padded=True)
    for threshold in (None, 1.0):
        policy = ExitPolicy(threshold=threshold, vocabulary="frequent")
        out = listed(tiny(name)).generate(inputs, policy=policy, max_new_tokens=8)
        assert out.sequences.tolist() == greedy(tiny(name), inputs, 8).tolist()


def test_verified_samples_have_the_full_models_distribution():
    """The frequency of each second token, over many rows, beside its probability; all of them are drafted."""
    count, model = 1200, deep()
    ids = inputs_for("llama", 1, length=4)["input_ids"]
    policy = ExitPolicy("static", min_layer=3, vocabulary="frequent", skipped="verify")
    inputs = {"input_ids": ids.expand(count, -1), "attention_mask": torch.ones(count, 4, dtype=torch.long)}
    options = {"do_sample": True, "top_k": 0, "temperature": 3.0, "seed": 1, "max_new_tokens": 2, "eos_token_id": None}
    out = listed(model).generate(inputs, policy=policy, **options)
    assert sum(layers[1] < 7 for layers in out.exit_layers) > count / 10
    with torch.no_grad():
        first = (model(ids).logits[0, -1] / 3).softmax(-1)
        pairs = torch.cat([ids.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], 1)
        second = first @ (model(pairs).logits[:, -1] / 3).softmax(-1)
    seen = Counter(row[1] for row in out.tokens)
    for token in range(VOCABULARY):
        p = float(second[token])
        assert abs(seen[token] / count - p) < 5 * math.sqrt(p * (1 - p) / count) + 1e-3
    outside = sum(n for token, n in seen.items() if token not in SOME) / count
    assert abs(outside - float(second.sum() - second[SOME].sum())) < 4 * 0.5 / math.sqrt(count)


def test_processors_and_draws_stay_within_the_list():
    lm, inputs = listed(deep()), batch_of("llama", 4)
    policy = ExitPolicy(threshold=0.02, min_layer=3, vocabulary="frequent")
    out = lm.generate(inputs, policy=policy, max_new_tokens=8, temperature=2.0, seed=0, repetition_penalty=1.1)
    pairs = [p for t, ls in zip(out.tokens, out.exit_layers, strict=True) for p in list(zip(t, ls, strict=True))[1:]]
    assert any(layer < 7 for _, layer in pairs)
    assert all(token in SOME for token, layer in pairs if layer < 7)
    # Where they leave none of the list, all tokens are read out at the same exit.
    banned = [[token] for token in SOME if token != 2]
    out = lm.generate(
        inputs, policy=policy, max_new_tokens=8, bad_words_ids=banned, eos_token_id=None, suppress_tokens=[2]
    )  # fmt: skip
    assert not {token for row in out.tokens for token in row} & set(SOME)


# ---------------------------------------------------------------- costs


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", FREQUENT_KINDS)
@pytest.mark.parametrize("name", ["llama", "t5", "gpt2", "opt-350m"])
def test_flops_equal_the_counters(name, kind, batch):
    from torch.utils.flop_counter import FlopCounterMode

    lm = listed(eager(name), "torch")
    policy = ExitPolicy(threshold=0.15, min_layer=1, vocabulary=kind)
    with FlopCounterMode(display=False) as counter:
        out = lm.generate(inputs_for(name, batch, padded=True), policy=policy, max_new_tokens=6)
    assert out.costs.flops == pytest.approx(
        counter.get_total_flops(), rel=0.005 if lm.split.rotary is not None else 1e-9
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_the_bill_by_hand(engine):
    lm, new = listed(tiny("llama"), engine), 5
    policy = ExitPolicy(threshold=-math.inf, min_layer=2, vocabulary="frequent")
    for batch in (1, 3):
        costs = lm.generate(inputs_for("llama", batch), policy=policy, max_new_tokens=new).costs
        tests, size = new - 1, lm.split.shape.element_size
        assert costs.parts["pruned_readout"].flops == batch * tests * 2 * 32 * len(SOME)
        assert costs.parts["pruned_readout"].bytes == tests * 32 * len(SOME) * size  # rows are read once for all states
        assert costs.parts["readout"].flops == batch * 2 * 32 * VOCABULARY  # of the prompt's token
        assert costs.draft_flops == batch * tests * 32**2 * len(SOME)
        assert costs.parts["select"].bytes == (0 if engine == "native" else 2 * 32 * len(SOME) * size)  # once in all


def test_a_pace_knows_what_the_first_test_costs():
    lm = LanguageModel(tiny("llama"))
    shape = lm.split.shape
    weights = [block.weights for block in shape.blocks]
    full = sum(weights) + shape.readout_weights()
    for options, rows in (
        ({"vocabulary": "frequent"}, [20, 40]),
        ({"vocabulary": "frequent-fixed", "vocabulary_size": 7}, [20, 27]),
        ({"vocabulary": "frequent-fixed", "vocabulary_size": 50}, [20, 40]),
        ({"confidence": "static", "vocabulary": "frequent"}, [20]),
    ):
        policy = ExitPolicy(skipped="verify", draft="adaptive", min_layer=2, **options)
        spent = Pace.of(resolve(policy, lm.num_layers, lm.vocabulary), shape, 20).spent
        assert list(spent.values()) == [(sum(weights[: 2 + i]) + 32 * k) / full for i, k in enumerate(rows)]


def test_break_even_is_where_costs_are_equal():
    shape = LanguageModel(tiny("llama")).split.shape
    block, readout, fill = 2 * shape.blocks[0].weights, shape.readout_flops, shape.fill_flops(0)
    for kept in (10, 20, 0):
        layer = break_even(shape, 1, kept, None, 20)
        cost = layer * block + readout(20) + (layer - 1) * readout(kept) + (4 - layer) * fill
        assert cost == pytest.approx(4 * block + readout())


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("engine", ENGINES)
def test_exits_without_a_list_are_refused(engine):
    policy, inputs = ExitPolicy(threshold=0.5, vocabulary="frequent"), inputs_for("llama")
    for lm in (LanguageModel(tiny("llama"), engine=engine), with_exits(tiny("llama"))):
        have = "the model's exits have no such list" if lm.exits else "the model has no trained exits"
        with pytest.raises(ValueError, match=f"vocabulary is 'frequent', but {have}; train exits with offramp train"):
            lm.generate(inputs, policy=policy, max_new_tokens=2)
        never = ExitPolicy(threshold=None, vocabulary="frequent")
        assert lm.generate(inputs, policy=never, max_new_tokens=2).tokens  # nothing is tested


def test_exits_without_a_list_are_refused_before_anything_is_decoded(tmp_path):
    lm, policy = LanguageModel(tiny("llama"), tokenizer()), ExitPolicy(threshold=0.5, vocabulary="frequent-fixed")
    message = "vocabulary is 'frequent-fixed', but the model has no trained exits"
    with pytest.raises(ValueError, match=message):
        settings_of(lm, policy, Grid(thresholds=(0.5,)))
    with pytest.raises(ValueError, match=message):
        run_bench(lm, ["the sky"], {"full": None, "few": policy}, max_new_tokens=2, repeats=1)
    with pytest.raises(ValueError, match=message):
        TaskArm(lm, "few", policy, TASKS["question-answering"], {}).check()


def test_arms_and_grids_have_the_list_where_there_is_one():
    lm = listed(tiny("llama"))
    for arms in (default_arms, document_arms):
        assert arms(lm)["softmax + frequent"].vocabulary == "frequent"
        assert "softmax + frequent" not in arms(LanguageModel(tiny("llama")))
    made = grid(lm, vocabularies=(None, "frequent", "frequent-fixed"), vocabulary_size=9)
    assert [policy.vocabulary_size for policy in made.values()] == [None, None, 9]
    settings = settings_of(lm, ExitPolicy(vocabulary="frequent-fixed"), Grid((0.5,), vocabulary_sizes=(9, 5)))
    assert {s.policy.vocabulary_size for s in settings if s.policy.vocabulary} == {9, 5}
    with pytest.raises(ValueError, match="does not prune after its first test"):
        settings_of(lm, ExitPolicy(vocabulary="frequent"), Grid((0.5,), vocabulary_sizes=(9, 5)))


def test_policies_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="vocabulary is 'rare'; "):
        ExitPolicy(vocabulary="rare")
    with pytest.raises(ValueError, match=r"vocabulary_size is 9 but vocabulary is 'frequent'; choose one of fixed, .*"):
        ExitPolicy(vocabulary="frequent", vocabulary_size=9)
    with pytest.raises(ValueError, match="a static policy emits every token at its exit, but vocabulary='frequent'"):
        ExitPolicy("static", min_layer=2, vocabulary="frequent")
    for kind in FREQUENT_KINDS:
        policy = ExitPolicy(vocabulary=kind)
        assert ExitPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


@pytest.mark.parametrize("method", ["laplace", "conformal"])
def test_a_posterior_is_for_other_readouts(method):
    lm = with_posterior("llama")
    lm.attach_exits(lm.exits.with_frequent(SOME))
    policy = lm.exits.posterior.policy(ExitPolicy(method, 0.5))
    lm.generate(inputs_for("llama"), policy=policy, max_new_tokens=2)
    policy = ExitPolicy(method, 0.5, exit_layers=policy.exit_layers, vocabulary="frequent")
    with pytest.raises(ValueError, match=f"confidence '{method}' is fitted for readouts whose first test scores all"):
        lm.generate(inputs_for("llama"), policy=policy, max_new_tokens=2)


@pytest.mark.parametrize("tokens", [[], [3], [-1, 4], [0.5, 1.0], [[1, 2], [3, 4]], [True, False]])
def test_lists_that_are_none_are_refused(tokens):
    exits = Exits.fresh(LanguageModel(tiny("llama")).split, (1, 2))
    with pytest.raises(ValueError, match="frequent tokens are "):
        exits.with_frequent(torch.tensor(tokens))


def test_tokens_that_the_model_has_not_are_refused():
    lm = LanguageModel(tiny("llama"))
    lm.attach_exits(Exits.fresh(lm.split, (1, 2)).with_frequent([3, VOCABULARY]))
    policy, inputs = ExitPolicy(vocabulary="frequent"), inputs_for("llama")
    with pytest.raises(ValueError, match=rf"go up to {VOCABULARY}, but the model's are 0\.\.{VOCABULARY - 1}"):
        lm.generate(inputs, policy=policy, max_new_tokens=2)


# ---------------------------------------------------------------- files and copies


def test_copies_keep_the_list_and_files_give_it_back(tmp_path):
    lm = with_exits(tiny("llama"))
    assert lm.exits.frequent is None
    exits = lm.exits.with_frequent([9, 2, 5, 9])
    assert lm.exits.frequent is None
    assert exits.frequent.dtype == torch.int64
    for made in (exits, exits.only((2,)), exits.with_classifiers(), exits.with_posterior(None)):
        assert made.frequent.tolist() == [2, 5, 9]
    placed = exits.placed(torch.bfloat16, torch.device("cpu"))
    assert placed.frequent.dtype == torch.int64
    save_exits(exits, tmp_path / "exits")
    loaded = load_exits(tmp_path / "exits")
    assert loaded.frequent.tolist() == [2, 5, 9]
    assert json.loads((tmp_path / "exits" / "exits.json").read_text())["frequent"] == 3
    save_exits(loaded.with_frequent(None), tmp_path / "without")
    assert load_exits(tmp_path / "without").frequent is None
    assert "frequent" not in json.loads((tmp_path / "without" / "exits.json").read_text())


def test_a_list_that_does_not_belong_to_its_description_is_refused(tmp_path):
    save_exits(with_exits(tiny("llama")).exits.with_frequent([2, 5, 9]), tmp_path / "exits")
    rewrite(tmp_path / "exits" / "exits.json", lambda values: values | {"frequent": 4})
    with pytest.raises(ModelError, match="the frequent tokens in .* are damaged"):
        load_exits(tmp_path / "exits")
