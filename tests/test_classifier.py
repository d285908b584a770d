"""Consistency classifiers: decoding by them against brute force, what they cost, and how they are kept; their loss."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import offramp
import test_brute_force
from offramp import ExitPolicy, Exits, LanguageModel, ModelError, cli
from offramp.hub.exit_files import load_exits, require_made_for, save_exits
from offramp.runs.digests import fingerprint
from offramp.training.consistency import consistency_loss, consistency_targets
from sealing import rewrite, without_digests
from test_brute_force import NO_END, batch_of, layers_of, lively
from test_costs import eager
from test_exits import LensRow, same
from tiny import LAYERS, VOCABULARY, greedy, inputs_for, tiny, tokenizer, truncated

NAMES = ("llama", "gemma3", "bart", "t5", "t5-v1.1")
ALWAYS = -math.inf
SETTINGS = settings(derandomize=True, deadline=None, max_examples=60, database=None)


def with_classifiers(model, layers=(1, 2, 3), rank=None, size=1.0, bias=None, seed=0, lens=0.1, engine="auto"):
    """The model with random lenses and random classifiers, or such as give every state the logit `bias`."""
    lm = LanguageModel(model, engine=engine)
    torch.manual_seed(seed)
    exits = Exits.fresh(lm.split, layers, rank).with_classifiers()
    scale = 1.0
    if lm.split.scale is not None:
        scale = 1 / lm.split.scale  # T5's readout inputs are smaller by this factor
    with torch.no_grad():
        for parameter in exits.lenses.parameters():
            parameter.normal_(0, lens)
        for linear in exits.classifiers.values():
            linear.weight.normal_(0, size * scale / 4) if bias is None else linear.weight.zero_()
            linear.bias.normal_() if bias is None else linear.bias.fill_(bias)
    lm.attach_exits(exits)
    return lm


# ---------------------------------------------------------------- decoding, by hand


def final_norm(model, h):
    """What the head multiplies, for one state, from the modules of the model itself."""
    decoder, config = model.get_decoder(), model.config
    norm = getattr(decoder, "final_layer_norm", None) or getattr(decoder, "norm", None) or (lambda x: x)
    x = norm(h.float())
    return x * config.d_model**-0.5 if config.model_type == "t5" and config.scale_decoder_outputs else x


class BartRow(LensRow):
    """BART has a bias behind its head and no final norm."""

    @torch.no_grad()
    def readouts(self):
        z, h = super(LensRow, self).readouts()
        for layer, lens in self.lenses.items():
            x = h[layer - 1] + lens.up.weight.double() @ h[layer - 1] + lens.up.bias.double()
            z[layer - 1] = self.model.lm_head.weight.double() @ x + self.model.final_logits_bias[0].double()
        return z, h


@pytest.fixture
def by_hand(monkeypatch):
    """Generate, and compare with the brute-force reference, told what a classifier says; its rows."""

    def compare(lm, inputs, policy, new=8):
        exits = lm.exits

        @torch.no_grad()
        def judge(policy, kept, z, h, layer, *_):
            x = h[layer - 1]
            if str(layer) in exits.lenses:
                lens = exits.lenses[str(layer)]
                w = lens.up.weight if lens.down is None else lens.up.weight @ lens.down.weight
                x = x + w.double() @ x + lens.up.bias.double()
            linear = exits.classifiers[str(layer)]
            logit = float(linear.weight[0].double() @ final_norm(lm.model, x).double() + linear.bias[0])
            return 1 / (1 + math.exp(-logit))

        row = BartRow if lm.model.config.model_type == "bart" else LensRow
        monkeypatch.setattr(test_brute_force, "confidence", judge)
        monkeypatch.setattr(test_brute_force, "Row", lambda *args: row(lm, *args))
        tested = exits.layers if policy.min_layer is None else None
        rows, _ = test_brute_force.reference(lm.model, inputs, replace(policy, exit_layers=tested), new, NO_END)
        out = lm.generate(inputs, policy=policy, max_new_tokens=new, eos_token_id=NO_END)
        assert out.tokens == [row.tokens for row in rows]
        assert out.exit_layers == [row.layers for row in rows]
        for got, row in zip(out.confidences, rows, strict=True):
            expected = torch.tensor(row.confidences)
            torch.testing.assert_close(torch.tensor(got), expected, rtol=0, atol=1e-4, equal_nan=True)
        return rows

    return compare


@pytest.mark.parametrize("skipped", ["propagate", "defer", "verify"])
@pytest.mark.parametrize("name", NAMES)
def test_decoding_by_hand(by_hand, name, skipped):
    layers = set()
    for seed, tau in enumerate((0.4, 0.6, 0.8)):
        lm = with_classifiers(lively(name), seed=seed)
        policy = ExitPolicy("classifier", threshold=tau, min_layer=1, skipped=skipped, draft_length=3)
        layers |= layers_of(by_hand(lm, batch_of(name), policy))
    assert skipped == "verify" or len(layers) >= 3


@pytest.mark.parametrize("options", [{"batch": "all"}, {"threshold": (0.8, 0.5)}, {"decay": "multiplicative"}], ids=str)
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_other_options_by_hand(by_hand, name, rank, options):
    """Exits after two layers, which are tested without being named; without lenses, too."""
    layers = set()
    for seed in range(3):
        lm = with_classifiers(lively(name), (1, 3), rank, seed=seed)
        policy = ExitPolicy("classifier", **{"threshold": 0.5, **options})
        layers |= layers_of(by_hand(lm, batch_of(name), policy))
    assert len(layers) >= 2


@pytest.mark.parametrize("skipped", ["propagate", "defer", "verify"])
@pytest.mark.parametrize("name", NAMES)
def test_a_threshold_of_one_is_the_full_model_however_sure_the_classifier(name, skipped):
    lm, inputs = with_classifiers(tiny(name), bias=1e4), inputs_for(name, 3, padded=True)
    policy = ExitPolicy("classifier", threshold=1, skipped=skipped)
    out = lm.generate(inputs, policy=policy, max_new_tokens=8, eos_token_id=NO_END)
    assert torch.equal(out.sequences, greedy(tiny(name), inputs, 8, eos_token_id=NO_END))
    assert {layer for row in out.exit_layers for layer in row} == {LAYERS}
    assert {c for row in out.confidences for c in row[1:]} == {1.0}  # and not above it


@pytest.mark.parametrize("skipped", ["propagate", "defer"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_a_sure_classifier_leaves_at_once_as_the_short_model_does(name, skipped):
    """After a prompt at full depth, which does not differ in the first layers, `transformers` goes on with those."""
    lm, inputs = with_classifiers(tiny(name), (2, 3), bias=50.0), inputs_for(name, 2)
    policy = ExitPolicy("classifier", threshold=0.9, skipped=skipped)
    out = lm.generate(inputs, policy=policy, max_new_tokens=8, eos_token_id=NO_END)
    short = truncated(tiny(name), 2)
    lens = copy.deepcopy(lm.exits.lenses["2"])
    norm = short.decoder.final_layer_norm if name == "t5" else short.model.norm
    norm.register_forward_pre_hook(lambda norm, args: (lens(args[0]),))
    if name == "t5":
        expected = greedy(short, inputs, 8, eos_token_id=NO_END)
    else:
        ids = out.sequences[:, : inputs["input_ids"].shape[1] + 1]
        expected = greedy(short, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 7, eos_token_id=NO_END)
    assert torch.equal(out.sequences, expected)
    assert {layer for row in out.exit_layers for layer in row[name != "t5" :]} == {2}


@pytest.mark.parametrize("skipped", ["propagate", "defer", "verify"])
def test_untrained_classifiers_say_one_half(skipped):
    lm = LanguageModel(tiny("llama"))
    lm.attach_exits(Exits.fresh(lm.split, (2,)).with_classifiers())
    for tau, layer in ((0.49, 2), (0.5, LAYERS)):
        policy = ExitPolicy("classifier", threshold=tau, skipped=skipped)
        out = lm.generate(inputs_for("llama"), policy=policy, max_new_tokens=4, eos_token_id=NO_END)
        assert set(out.confidences[0][1:]) == {0.5}
        assert skipped == "verify" or set(out.exit_layers[0][1:]) == {layer}


@pytest.mark.parametrize("skipped", ["propagate", "verify"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_row_of_a_batch_is_its_own_run(name, skipped):
    lm, inputs = with_classifiers(lively(name)), batch_of(name, 4)
    policy = ExitPolicy("classifier", threshold=0.6, skipped=skipped)
    together = lm.generate(inputs, policy=policy, max_new_tokens=8, eos_token_id=NO_END)
    for row in range(4):
        seen = inputs["attention_mask"][row].bool()
        own = {key: value[row][seen][None] for key, value in inputs.items()}
        alone = lm.generate(own, policy=policy, max_new_tokens=8, eos_token_id=NO_END)
        assert together.tokens[row] == alone.tokens[0]
        assert together.exit_layers[row] == alone.exit_layers[0]
        assert together.confidences[row] == pytest.approx(alone.confidences[0], abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("kind", ["fixed", "decaying", "adaptive"])
def test_pruning_does_nothing_without_logits(kind):
    lm, policy = with_classifiers(lively("llama")), ExitPolicy("classifier", threshold=0.6)
    outs = [
        lm.generate(batch_of("llama"), policy=p, max_new_tokens=8) for p in (policy, replace(policy, vocabulary=kind))
    ]
    same(*outs)
    assert outs[0].costs.flops == outs[1].costs.flops


def test_the_transformers_way():
    lm, inputs = with_classifiers(tiny("llama")), inputs_for("llama", 2)
    policy = ExitPolicy("classifier", threshold=0.6)
    ours = lm.generate(inputs, policy=policy, max_new_tokens=6)
    theirs = lm.model.generate(
        **inputs, max_new_tokens=6, do_sample=False, custom_generate=policy.custom_generate(lm.exits)
    )
    assert torch.equal(ours.sequences, theirs)
    with pytest.raises(ValueError, match="no trained exits"):
        lm.model.generate(**inputs, max_new_tokens=6, do_sample=False, custom_generate=policy.custom_generate())


def test_a_model_in_bfloat16_is_judged_in_float32():
    model = copy.deepcopy(tiny("llama")).bfloat16()
    lm = with_classifiers(model)
    x = torch.randn(3, 5, 32).bfloat16()
    got, linear = lm.split.exits.classify(2, x), lm.exits.classifiers["2"]
    assert got.dtype == torch.float32
    assert got.shape == (3, 5)
    expected = x.double() @ linear.weight[0].bfloat16().double() + linear.bias[0].bfloat16().double()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    out = lm.generate(inputs_for("llama"), policy=ExitPolicy("classifier", threshold=0.5), max_new_tokens=4)
    assert all(0 <= c <= 1 for c in out.confidences[0][1:])


# ---------------------------------------------------------------- costs


@pytest.mark.parametrize("skipped", ["propagate", "defer", "verify"])
@pytest.mark.parametrize("rank", [None, 0])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_flops_equal_the_counters(name, rank, skipped):
    lm, inputs = with_classifiers(eager(name), rank=rank, engine="torch"), inputs_for(name, 3, padded=True)
    policy = ExitPolicy("classifier", threshold=0.6, skipped=skipped)
    with FlopCounterMode(display=False) as counter:
        costs = lm.generate(inputs, policy=policy, max_new_tokens=6).costs
    assert costs.flops == pytest.approx(counter.get_total_flops(), rel=0.005 if name == "llama" else 1e-9)
    part = costs.parts["confidence"]
    assert part.flops == costs.tests * 2 * 32 > 0
    assert part.bytes > 0
    assert costs.draft_flops == 0


def test_one_readout_per_token_and_a_lens_and_a_classifier_per_test():
    for rank, lens in ((None, 32 * 32), (0, 0)):
        lm = with_classifiers(tiny("llama"), rank=rank, bias=-5.0)
        policy = ExitPolicy("classifier", threshold=0.6)
        costs = lm.generate(inputs_for("llama"), policy=policy, max_new_tokens=5, eos_token_id=NO_END).costs
        assert costs.tests == 4 * 3  # four tokens after the prompt's, three exits, never sure
        assert costs.parts["readout"].flops == 5 * 2 * 32 * VOCABULARY + 12 * 2 * lens
        assert costs.parts["confidence"].flops == 12 * 2 * 32
        assert costs.parts["confidence"].bytes == 12 * 32 * 4


# ---------------------------------------------------------------- without any


def test_exits_without_classifiers_are_refused():
    lm, policy = LanguageModel(tiny("llama")), ExitPolicy("classifier", threshold=0.6)
    with pytest.raises(ValueError, match=r"no trained exits; train some with: offramp train --objective consistency"):
        lm.generate(inputs_for("llama"), policy=policy, max_new_tokens=2)
    lm.attach_exits(Exits.fresh(lm.split, (1, 3)))
    with pytest.raises(ValueError, match=r"have no classifiers; train some with: offramp train --objective consist"):
        lm.generate(inputs_for("llama"), policy=policy, max_new_tokens=1)
    lm.attach_exits(lm.exits.with_classifiers())
    with pytest.raises(ValueError, match=r"after layer 2, but .* after layers 1, 3 only; name some .* exit_layers"):
        lm.generate(inputs_for("llama"), policy=replace(policy, min_layer=1), max_new_tokens=1)
    for taken in (policy, replace(policy, min_layer=3), replace(policy, threshold=None, min_layer=1)):
        lm.generate(inputs_for("llama"), policy=taken, max_new_tokens=2)


def test_a_measure_of_ones_own_may_ask_the_classifier():
    lm, inputs = with_classifiers(tiny("llama")), inputs_for("llama")

    def asks(reading):
        return lm.exits.classify(reading.layer, reading.input).sigmoid()

    named, own = (ExitPolicy(measure, threshold=0.6) for measure in ("classifier", asks))
    same(*(lm.generate(inputs, policy=policy, max_new_tokens=6) for policy in (named, own)))


# ---------------------------------------------------------------- exits without lenses


def test_exits_without_lenses_read_out_with_norm_and_head_alone():
    lm, plain = LanguageModel(tiny("t5")), LanguageModel(tiny("t5"))
    lm.attach_exits(Exits.fresh(lm.split, (1, 3), rank=0))
    assert list(lm.exits.parameters()) == []
    assert [lm.exits.weights(layer) for layer in range(1, 5)] == [lm.exits.flops(layer) for layer in range(1, 5)]
    assert lm.split.shape.lenses == (0, 0, 0, 0)
    policy, inputs = ExitPolicy(threshold=0.15), inputs_for("t5", 3)
    got = lm.generate(inputs, policy=policy, max_new_tokens=8)
    expected = plain.generate(inputs, policy=replace(policy, exit_layers=(1, 3)), max_new_tokens=8)
    same(got, expected)
    assert got.costs.flops == expected.costs.flops


@pytest.mark.parametrize("classifier", [False, True])
def test_a_round_trip_without_lenses(tmp_path, classifier):
    lm = LanguageModel(tiny("llama"))
    exits = Exits.fresh(lm.split, (1, 3), rank=0)
    exits = exits.with_classifiers() if classifier else exits
    save_exits(exits, tmp_path / "exits", settings={"steps": 3})
    again = load_exits(tmp_path / "exits")
    assert (again.layers, again.rank, again.settings) == ((1, 3), 0, {"steps": 3})
    assert again.fingerprint == fingerprint(lm.model)
    assert set(again.state_dict()) == set(exits.state_dict())
    assert (again.classifiers is not None) == classifier
    require_made_for(again, lm.split, "tiny", "exits")
    lm.attach_exits(again)
    lm.save_exits(tmp_path / "exits")


# ---------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def saved(folder, tmp_path):
    with_classifiers(offramp.load(folder).model, rank=4).save_exits(tmp_path / "exits")
    return tmp_path / "exits"


def test_saved_and_loaded_the_same(folder, tmp_path):
    lm = with_classifiers(offramp.load(folder).model, rank=4)
    lm.save_exits(tmp_path / "exits")
    ExitPolicy("classifier", threshold=0.6).save(tmp_path / "policy.json")
    policy = ExitPolicy.load(tmp_path / "policy.json")
    assert policy == ExitPolicy("classifier", threshold=0.6)
    assert json.loads((tmp_path / "exits" / "exits.json").read_text())["classifier"] is True
    again = offramp.load(folder, exits=tmp_path / "exits")
    for a, b in zip(again.exits.parameters(), lm.exits.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad
    outs = [m.generate(inputs_for("llama", 2), policy=policy, max_new_tokens=8) for m in (lm, again)]
    same(*outs)
    assert len({layer for row in outs[0].exit_layers for layer in row}) >= 2


def test_folders_written_before_there_were_classifiers(folder, tmp_path):
    lm = LanguageModel(offramp.load(folder).model)
    lm.attach_exits(Exits.fresh(lm.split, (1, 2)))
    lm.save_exits(tmp_path / "exits")
    without_digests(tmp_path / "exits")
    file = tmp_path / "exits" / "exits.json"
    values = json.loads(file.read_text())
    assert values.pop("classifier") is False
    file.write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="digest"):
        assert load_exits(tmp_path / "exits").classifiers is None


@pytest.mark.parametrize(
    ("change", "message"),
    [({"classifier": False}, "does not hold"), ({"classifier": "yes"}, "classifier is missing or of a wrong type")],
)
def test_a_description_that_is_wrong(saved, change, message):
    rewrite(saved / "exits.json", lambda values: values | change)
    with pytest.raises(ModelError, match=message):
        load_exits(saved)


def test_classifiers_that_diverged(saved):
    exits = load_exits(saved)
    with torch.no_grad():
        exits.classifiers["2"].bias.fill_(math.nan)
    save_exits(exits, saved)
    with pytest.raises(ModelError, match="diverged"):
        load_exits(saved)


def test_new_classifiers_leave_the_old_exits_alone():
    exits = with_classifiers(tiny("llama")).exits
    before = {name: value.clone() for name, value in exits.state_dict().items()}
    made = exits.with_classifiers()
    assert all(not bool(p.any()) for p in made.classifiers.parameters())
    assert all(p.requires_grad for p in made.parameters())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in exits.state_dict().items())
    assert (made.layers, made.fingerprint, made.model) == (exits.layers, exits.fingerprint, exits.model)


def test_the_command_says_that_the_head_is_not_needed(folder, saved):
    words = ["generate", folder, "the sky", "--confidence", "classifier", "--threshold", 0.6, "--max-new-tokens", 3]
    result = CliRunner().invoke(cli.app, [str(word) for word in [*words, "--exits", saved]])
    assert result.exit_code == 0, result.output
    assert "tested from layer 1 without the head, a token saves FLOPs by leaving before layer 3." in result.stderr


# ---------------------------------------------------------------- what they are trained for


@SETTINGS
@given(st.integers(1, 5), st.integers(0, 6), st.integers(1, 3), st.integers(0, 1000))
def test_targets_by_brute_force(exits, count, tokens, seed):
    choices = torch.randint(tokens, (exits + 1, count), generator=torch.Generator().manual_seed(seed))
    agree, settled = consistency_targets(choices), consistency_targets(choices, "settled")
    assert agree.dtype == settled.dtype == torch.bool
    assert agree.shape == settled.shape == (exits, count)
    rows = choices.tolist()
    for e in range(exits):
        for n in range(count):
            assert bool(agree[e, n]) == (rows[e][n] == rows[exits][n])
            assert bool(settled[e, n]) == all(rows[deeper][n] == rows[exits][n] for deeper in range(e, exits))


def test_targets_of_another_kind():
    with pytest.raises(ValueError, match="'oracle'; allowed are agree, settled"):
        consistency_targets(torch.zeros(2, 3), "oracle")


@SETTINGS
@given(st.lists(st.tuples(st.floats(-30, 30, width=32), st.booleans()), min_size=1, max_size=9), st.floats(0, 1))
def test_the_loss_is_its_formula(pairs, balance):
    logits, agrees = torch.tensor([z for z, _ in pairs]), torch.tensor([y for _, y in pairs])
    # -ln σ(z) of an agreeing position, -ln(1 - σ(z)) of another one; ln(1 + e^-x) without overflow
    plain = [math.log1p(math.exp(-abs(z))) + max(-z if y else z, 0) for z, y in pairs]
    assert consistency_loss(logits, agrees).tolist() == pytest.approx(plain, abs=1e-5)
    weights = [1 - balance if y else balance for _, y in pairs]
    got = consistency_loss(logits, agrees, torch.tensor(balance))
    assert got.tolist() == pytest.approx([w * loss for w, loss in zip(weights, plain, strict=True)], abs=1e-5)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_best_constant_is_the_log_odds_and_with_balance_zero(share):
    agrees = torch.arange(20) < 20 * share
    for balance, best in ((None, math.log(share / (1 - share))), (agrees.float().mean(), 0.0)):
        logit = torch.tensor(best, requires_grad=True)
        consistency_loss(logit.expand(20), agrees, balance).sum().backward()
        assert logit.grad.item() == pytest.approx(0, abs=1e-5)
        grid = torch.linspace(-4, 4, 161)
        losses = torch.stack([consistency_loss(z.expand(20), agrees, balance).mean() for z in grid])
        assert grid[losses.argmin()].item() == pytest.approx(best, abs=0.05)


@pytest.mark.parametrize("agrees", [True, False])
def test_one_class_alone_teaches_nothing(agrees):
    targets = torch.full((4,), agrees)
    assert consistency_loss(torch.randn(4), targets, targets.float().mean()).tolist() == [0, 0, 0, 0]


def test_a_classifier_learns_what_can_be_told_from_the_state():
    """Gradient descent on the loss, with 85 % agreement decided by a direction of the readout input."""
    torch.manual_seed(0)
    lm = LanguageModel(tiny("llama"))
    exits = Exits.fresh(lm.split, (2,), rank=0).with_classifiers()
    x = torch.randn(400, 32)
    agrees = x[:, 0] > -1.04
    optimizer = torch.optim.Adam(exits.classifiers.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        consistency_loss(exits.classify(2, x), agrees, agrees.float().mean()).mean().backward()
        optimizer.step()
    right = (exits.classify(2, x) > 0) == agrees
    assert right[agrees].float().mean() > 0.95
    assert right[~agrees].float().mean() > 0.95
