"""Trained exits: what a lens does to decoding, by hand; and what a folder of them may be."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import offramp
import test_brute_force
from offramp import Contrast, ExitPolicy, Exits, LanguageModel, ModelError, cli
from offramp.core.adapters import Lens
from offramp.core.costs import break_even, exit_flops
from offramp.core.exits import default_layers
from offramp.core.plan import resolve
from offramp.hub.exit_files import load_exits, save_exits
from offramp.lm.probe import probe
from offramp.runs.digests import fingerprint
from sealing import rewrite
from test_brute_force import NO_END, Row, batch_of, deep, layers_of, lively, thresholds
from tiny import LAYERS, VOCABULARY, greedy, inputs_for, tiny, tokenizer, truncated

POLICIES = {
    "static": ExitPolicy("static", min_layer=2),
    "propagate": ExitPolicy(threshold=0.15, min_layer=1),
    "defer": ExitPolicy(threshold=0.15, min_layer=1, skipped="defer"),
    "verify": ExitPolicy(threshold=0.15, min_layer=1, skipped="verify"),
    "pruned": ExitPolicy(threshold=0.15, min_layer=1, vocabulary="adaptive", vocabulary_size=20),
    "jsd": ExitPolicy("jsd", threshold=0.15, min_layer=3),
}


def with_exits(model, layers=(1, 2, 3), rank=None, size=0.1, seed=0):
    """The model with random lenses."""
    lm = LanguageModel(model)
    torch.manual_seed(seed)
    exits = Exits.fresh(lm.split, layers, rank)
    with torch.no_grad():
        for parameter in exits.parameters():
            parameter.normal_(0, size)
    lm.attach_exits(exits)
    return lm


def same(a, b):
    assert a.tokens == b.tokens
    assert a.exit_layers == b.exit_layers
    assert str(a.confidences) == str(b.confidences)  # NaN included


# ---------------------------------------------------------------- lenses


@pytest.mark.parametrize("rank", [None, 3])
def test_a_lens_is_what_its_formula_says(rank):
    lens = Lens(8, rank)
    h = torch.randn(5, 2, 8)
    assert torch.equal(lens(h), h)
    with torch.no_grad():
        for p in lens.parameters():
            p.normal_()
    w = lens.up.weight if rank is None else lens.up.weight @ lens.down.weight
    torch.testing.assert_close(lens(h), h + h @ w.T + lens.up.bias)
    assert lens.weights == (64 if rank is None else 2 * 8 * 3)
    assert lens(h.bfloat16()).dtype == torch.bfloat16


def test_every_weight_is_trained():
    exits = Exits.fresh(LanguageModel(tiny("llama")).split, (2,), rank=4)
    assert {p.dtype for p in exits.parameters()} == {torch.float32}
    for _ in range(2):  # the down-projection gets a gradient as soon as the up-projection is not zero
        exits.adapt(2, torch.randn(3, 32)).square().sum().backward()
        with torch.no_grad():
            for p in exits.parameters():
                p -= 0.1 * p.grad
    assert all(bool(p.grad.any()) for p in exits.parameters())


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(1, ()), (2, (1,)), (4, (1, 2, 3)), (12, tuple(range(4, 12))), (30, (10, 13, 16, 19, 22, 25, 28))],
)
def test_default_layers(depth, layers):
    assert default_layers(depth) == layers


@pytest.mark.parametrize("depth", range(2, 200))
def test_default_layers_are_few_and_inside(depth):
    layers = default_layers(depth)
    assert 1 <= len(layers) <= 8
    assert 1 <= layers[0] <= layers[-1] < depth
    assert depth < 9 or len(layers) >= 5


@pytest.mark.parametrize("layers", [(), (0, 1), (3, 4), (2, 1), (1, 1, 2)])
def test_layers_that_are_none_are_refused(layers):
    with pytest.raises(ValueError, match="exit layers are"):
        Exits.fresh(LanguageModel(tiny("llama")).split, layers)


@pytest.mark.parametrize("rank", [-1, 33])
def test_ranks_that_are_none_are_refused(rank):
    with pytest.raises(ValueError, match=r"1\.\.32"):
        Exits.fresh(LanguageModel(tiny("llama")).split, (1,), rank)


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_fresh_lenses_change_nothing(name, policy, rank):
    plain, lm = LanguageModel(lively(name)), LanguageModel(lively(name))
    lm.attach_exits(Exits.fresh(lm.split, (1, 2, 3), rank))
    inputs = batch_of(name)
    same(*(m.generate(inputs, policy=POLICIES[policy], max_new_tokens=8) for m in (plain, lm)))


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_the_full_model_is_untouched(name):
    model, inputs = lively(name), inputs_for(name, 3, padded=True)
    before = fingerprint(model)
    lm = with_exits(model)
    out = lm.generate(inputs, max_new_tokens=8)
    assert torch.equal(out.sequences, greedy(model, inputs, 8))
    state = lm.split.start(inputs["input_ids"]) if name != "t5" else None
    if state is not None:
        state = lm.split.run(state, 0, LAYERS)
        assert torch.equal(lm.split.readout(state.hidden, LAYERS), LanguageModel(model).split.readout(state.hidden))
    assert fingerprint(model) == before


class LensRow(Row):
    """The brute-force row (no cache, the untouched model, hooks), its exits read through their lenses by hand."""

    def __init__(self, lm, *args):
        super().__init__(*args)
        self.lenses = {int(layer): lens for layer, lens in lm.exits.lenses.items()}

    @torch.no_grad()
    def readouts(self):
        z, h = super().readouts()
        config, decoder = self.model.config, self.model.get_decoder()
        norm = decoder.final_layer_norm if hasattr(decoder, "final_layer_norm") else decoder.norm
        for layer, lens in self.lenses.items():
            w = lens.up.weight if lens.down is None else lens.up.weight @ lens.down.weight
            x = norm((h[layer - 1] + w.double() @ h[layer - 1] + lens.up.bias.double()).float())
            if config.model_type == "t5" and config.scale_decoder_outputs:
                x = x * config.d_model**-0.5
            logits = self.model.lm_head(x)
            if cap := getattr(config, "final_logit_softcapping", None):
                logits = torch.tanh(logits / cap) * cap
            z[layer - 1] = logits.double()
        return z, h


@pytest.fixture
def by_hand(monkeypatch):
    """Generate, and compare with `reference` on such rows; the rows."""

    def compare(lm, inputs, policy, new=10):
        monkeypatch.setattr(test_brute_force, "Row", lambda *args: LensRow(lm, *args))
        rows, _ = test_brute_force.reference(lm.model, inputs, policy, new, NO_END)
        out = lm.generate(inputs, policy=policy, max_new_tokens=new, eos_token_id=NO_END)
        assert out.tokens == [row.tokens for row in rows]
        assert out.exit_layers == [row.layers for row in rows]
        for got, row in zip(out.confidences, rows, strict=True):
            expected = torch.tensor(row.confidences)
            torch.testing.assert_close(torch.tensor(got), expected, rtol=0, atol=1e-4, equal_nan=True)
        return rows

    return compare


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("skipped", ["propagate", "defer", "verify"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_decoding_with_lenses_by_hand(by_hand, name, skipped, rank):
    lm, layers = with_exits(lively(name), (1, 3), rank, size=0.2), set()
    for tau in thresholds(name)[:2]:
        policy = ExitPolicy(threshold=tau, min_layer=1, skipped=skipped, draft_length=3)  # layer 2 has no lens
        rows = by_hand(lm, batch_of(name), policy)
        layers |= layers_of(rows)
        plain = LanguageModel(lm.model).generate(batch_of(name), policy=policy, max_new_tokens=10, eos_token_id=NO_END)
        assert plain.confidences != [row.confidences for row in rows]
    assert skipped == "verify" or len(layers) >= 2


@pytest.mark.parametrize("kind", ["fixed", "decaying", "adaptive"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_pruned_readouts_with_lenses_by_hand(by_hand, name, kind):
    lm = with_exits(lively(name), size=0.2)
    policy = ExitPolicy(threshold=thresholds(name)[1], min_layer=1, vocabulary=kind, vocabulary_size=20)
    assert len(layers_of(by_hand(lm, batch_of(name), policy))) >= 2


@pytest.mark.parametrize("kind", [None, "fixed"])
@pytest.mark.parametrize("source", ["logits", "contrastive"])
@pytest.mark.parametrize(
    ("measure", "options"), [("contrastive", {}), ("contrastive", {"full": True}), ("jsd", {"candidates": "all"})]
)
def test_contrasts_between_lenses_by_hand(by_hand, measure, options, source, kind):
    """Experts and amateurs are read through their lenses (layer 5 has none); full depth never is."""
    lm = with_exits(deep(), (2, 3, 4, 6))
    policy = ExitPolicy(
        measure, threshold=0.3, min_layer=4, contrast=Contrast(**options), decode_from=source, vocabulary=kind
    )
    assert len(layers_of(by_hand(lm, batch_of("llama", 2), policy, 8))) >= 2


@pytest.mark.parametrize("measure", ["max", "entropy", "state"])
def test_other_measures_with_lenses_by_hand(by_hand, measure):
    """The cosine of states is that of the states themselves, not of what a lens makes of them."""
    lm = with_exits(deep(), (3, 4, 6))
    policy = ExitPolicy(measure, threshold={"max": 0.3, "entropy": 0.4, "state": 0.9}[measure], min_layer=3)
    assert len(layers_of(by_hand(lm, batch_of("llama"), policy))) >= 2


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_static_exit_is_the_short_model_with_a_lens(name):
    lm, short = with_exits(tiny(name), (2,)), truncated(tiny(name), 2)
    lens = copy.deepcopy(lm.exits.lenses["2"])
    short.model.norm.register_forward_pre_hook(lambda norm, args: (lens(args[0]),))
    inputs = inputs_for(name, 3, padded=True)
    out = lm.generate(inputs, policy=ExitPolicy("static", min_layer=2), max_new_tokens=10)
    assert torch.equal(out.sequences, greedy(short, inputs, 10))
    assert not torch.equal(out.sequences, greedy(truncated(tiny(name), 2), inputs, 10))


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
@pytest.mark.parametrize(
    "options",
    [{}, {"vocabulary": "fixed"}, {"vocabulary": "adaptive"}, {"confidence": "jsd"}, {"threshold": -math.inf}],
)
def test_verify_is_lossless_with_any_lenses(name, options):
    for seed in range(3):
        lm, inputs = with_exits(tiny(name), size=0.3, seed=seed), inputs_for(name, 3, padded=True, seed=seed)
        policy = ExitPolicy(**{"threshold": 0.1, "min_layer": 2, "skipped": "verify", **options})
        out = lm.generate(inputs, policy=policy, max_new_tokens=10)
        assert torch.equal(out.sequences, greedy(tiny(name), inputs, 10))


def test_a_policy_without_layers_tests_at_the_exits():
    lm = with_exits(deep(), (2, 5))
    always = ExitPolicy(threshold=-math.inf)
    inputs = inputs_for("llama")

    def first(policy):
        return set(lm.generate(inputs, policy=policy, max_new_tokens=4).exit_layers[0][1:])

    assert first(always) == {2}
    assert first(ExitPolicy(threshold=-math.inf, min_layer=4)) == {4}
    assert first(ExitPolicy(threshold=-math.inf, exit_layers=(3, 6))) == {3}
    assert tuple(resolve(always, 7, VOCABULARY, (2, 5)).thresholds) == (2, 5)
    assert resolve(always, 7, VOCABULARY).min_layer == 3
    assert resolve(ExitPolicy(threshold=(0.1, 0.2)), 7, VOCABULARY, (2, 5)).thresholds == {2: 0.1, 5: 0.2}
    assert resolve(ExitPolicy("static", min_layer=4), 7, VOCABULARY, (2, 5)).last == 4
    lm.attach_exits(None)
    assert lm.exits is None
    assert first(always) == {3}


def test_the_transformers_way_takes_exits():
    lm, policy, inputs = with_exits(tiny("llama")), POLICIES["propagate"], inputs_for("llama", 2)
    ours = lm.generate(inputs, policy=policy, max_new_tokens=6)
    theirs = lm.model.generate(
        **inputs, max_new_tokens=6, do_sample=False, custom_generate=policy.custom_generate(lm.exits)
    )
    assert torch.equal(ours.sequences, theirs)
    same(ours, lm.generate(inputs, policy=policy, max_new_tokens=6))


def test_exits_outlive_a_resized_head():
    lm = with_exits(copy.deepcopy(tiny("llama")))
    lm.model.resize_token_embeddings(VOCABULARY + 3)
    assert lm.split.exits is lm.exits
    assert lm.split.shape.lenses == (1024, 1024, 1024, 0)


def test_exits_of_another_shape_are_not_attached():
    lm, other = LanguageModel(tiny("llama")), LanguageModel(deep())
    with pytest.raises(ValueError, match="7 layers of width 32, but the model has 4"):
        lm.attach_exits(Exits.fresh(other.split))
    assert lm.exits is None
    assert lm.split.exits is None
    with pytest.raises(ValueError, match="no trained exits"):
        lm.save_exits("anywhere")


def test_a_model_in_bfloat16_works_with_a_copy():
    lm = LanguageModel(copy.deepcopy(tiny("llama")).bfloat16())
    master = with_exits(tiny("llama"), size=0.3).exits
    lm.attach_exits(master)
    assert lm.exits is master
    assert {p.dtype for p in master.parameters()} == {torch.float32}
    assert {p.dtype for p in lm.split.exits.parameters()} == {torch.bfloat16}
    out = lm.generate(inputs_for("llama"), policy=ExitPolicy("static", min_layer=2), max_new_tokens=5)
    plain = LanguageModel(lm.model).generate(
        inputs_for("llama"), policy=ExitPolicy("static", min_layer=2), max_new_tokens=5
    )
    assert out.tokens != plain.tokens


# ---------------------------------------------------------------- probe and costs


def test_the_probe_reads_through_lenses():
    model = tiny("llama")
    lm, plain = with_exits(model, (1, 3)), LanguageModel(model)
    ids = inputs_for("llama", 2)["input_ids"]
    found, before = probe(lm, ids, max_new_tokens=4), probe(plain, ids, max_new_tokens=4)
    changed = [a.rank != b.rank or a.gap != b.gap for a, b in zip(found.layers, before.layers, strict=True)]
    assert changed == [True, False, True, False]
    assert found.model == "LlamaForCausalLM with trained exits"


def crossing(low, high, costs, full):
    """Where the straight line through the costs of two layers reaches the full model's."""
    return low + (full - costs[low]) * (high - low) / (costs[high] - costs[low])


@pytest.mark.parametrize("first", [1, 2])
def test_break_even_counts_lenses(first):
    shape = with_exits(tiny("llama"), rank=5).split.shape
    plain = LanguageModel(tiny("llama")).split.shape
    lens = 2 * 2 * 32 * 5
    assert exit_flops(shape, 2, None) == exit_flops(plain, 2, None) + lens
    full = exit_flops(shape, 4, None)
    assert full == exit_flops(plain, 4, None)
    costs = {layer: exit_flops(shape, layer, first) for layer in range(first, 5)}
    for layer in range(first, 5):
        assert costs[layer] == exit_flops(plain, layer, first) + (min(layer, 3) - first + 1) * lens
    assert break_even(shape, first) == pytest.approx(crossing(first, 3, costs, full))


def test_break_even_of_few_exits():
    """n tests spread evenly: the straight line through the exits and L, as when every layer is tested."""
    lm = LanguageModel(deep())
    plain, lens = lm.split.shape, 2 * 32 * 32
    assert break_even(plain, 1, tests=6) == break_even(plain, 1)
    lm.attach_exits(Exits.fresh(lm.split, (1, 3, 5)))
    full = exit_flops(plain, 7, None)

    def costs(trained):
        made = {layer: len([exit for exit in (1, 3, 5) if exit <= layer]) for layer in (1, 3, 5, 7)}
        return {
            layer: exit_flops(plain, layer, None) + (n - (layer < 7)) * plain.readout_flops() + trained * n * lens
            for layer, n in made.items()
        }

    assert break_even(plain, 1, tests=3) == pytest.approx(crossing(1, 5, costs(False), full))
    assert break_even(plain, 1, tests=3) == pytest.approx(crossing(3, 7, costs(False), full))
    assert break_even(lm.split.shape, 1, tests=3) == pytest.approx(crossing(1, 5, costs(True), full))


# ---------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with weights that bfloat16 can hold."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    copy.deepcopy(tiny("llama")).bfloat16().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def saved(folder, tmp_path):
    lm = with_exits(offramp.load(folder).model, rank=4)
    lm.save_exits(tmp_path / "exits", {"steps": 10, "objective": "kl"})
    return tmp_path / "exits"


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_in_both_formats(folder, tmp_path, dtype):
    lm = offramp.load(folder, dtype=dtype)
    lm = with_exits(lm.model)
    lm.name = "tiny-llama"
    lm.save_exits(tmp_path / "exits", {"steps": 10})
    for other in ("float32", "bfloat16"):
        again = offramp.load(folder, dtype=other, exits=tmp_path / "exits")
        assert again.exits.settings == {"steps": 10}
        assert (again.exits.layers, again.exits.rank, again.exits.model) == ((1, 2, 3), None, "tiny-llama")
        for a, b in zip(again.exits.parameters(), lm.exits.parameters(), strict=True):
            assert a.dtype == torch.float32
            assert a.requires_grad
            assert torch.equal(a, b)
    again = offramp.load(folder, dtype=dtype, exits=tmp_path / "exits")
    policy, inputs = POLICIES["propagate"], inputs_for("llama", 2)
    same(*(m.generate(inputs, policy=policy, max_new_tokens=8) for m in (lm, again)))
    assert everything_in(tmp_path) == ["exits", "exits/exits.json", "exits/exits.safetensors"]
    for path in (tmp_path / "exits").iterdir():
        assert path.stat().st_mode & 0o044 == 0o044


def test_the_file_says_what_it_is(saved):
    values = json.loads((saved / "exits.json").read_text())
    assert values.pop("fingerprint").isalnum()
    assert len(values.pop("digest")) == len(values["files"].pop("exits.safetensors")) == 64
    assert values.pop("files") == {}
    assert values == {
        "schema": "offramp/exits/1", "model": "LlamaForCausalLM", "num_layers": 4, "width": 32, "layers": [1, 2, 3],
        "rank": 4, "classifier": False, "settings": {"steps": 10, "objective": "kl"},
    }  # fmt: skip


def test_settings_survive_a_second_saving(folder, saved):
    lm = offramp.load(folder, exits=saved)
    lm.save_exits(saved)
    assert load_exits(saved).settings == {"steps": 10, "objective": "kl"}


def test_fingerprints_see_every_value(folder):
    model = offramp.load(folder).model
    before = fingerprint(model)
    assert before == fingerprint(offramp.load(folder, dtype="bfloat16").model)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[-1, -1] += 0.1
    assert fingerprint(model) != before
    assert fingerprint(tiny("llama-tied")) == fingerprint(copy.deepcopy(tiny("llama-tied")))


def test_exits_of_another_model_are_refused(folder, saved, tmp_path):
    deep().save_pretrained(tmp_path / "deep")
    with pytest.raises(ModelError, match=r"for LlamaForCausalLM \(4 layers of width 32\), but deep has 7 of width 32"):
        offramp.load(tmp_path / "deep", exits=saved)
    torch.manual_seed(77)
    copy.deepcopy(tiny("llama-tied")).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"with weights \w{12}, but those of other are \w{12}.*load the model they"):
        offramp.load(tmp_path / "other", exits=saved)
    rewrite(saved / "exits.json", lambda values: values | {"width": 64})
    with pytest.raises(ModelError, match="does not hold the lenses"):
        offramp.load(folder, exits=saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "offramp/exits/2"}, "another version"),
        ({"schema": None}, "schema None"),
        ({"layers": "1, 2"}, "layers is missing or of a wrong type"),
        ({"layers": [1, 2, "3"]}, "layers is missing or of a wrong type"),
        ({"layers": [3, 2, 1]}, "ascending"),
        ({"layers": [1, 2, 3, 4]}, "1..3"),
        ({"layers": [1, 2]}, "does not hold the lenses"),
        ({"rank": None}, "does not hold the lenses"),
        ({"rank": 0}, "does not hold the lenses"),
        ({"rank": "4"}, "rank is missing or of a wrong type"),
        ({"classifier": True}, "does not hold the lenses"),
        ({"classifier": 1}, "classifier is missing or of a wrong type"),
        ({"width": 10**12}, "does not hold the lenses"),
        ({"width": -32, "rank": None}, "exits.json is damaged"),
        ({"width": 10**30, "rank": None}, "exits.json is damaged"),
        ({"settings": None}, "settings is missing or of a wrong type"),
        ({"fingerprint": 3}, "fingerprint is missing or of a wrong type"),
    ],
    ids=str,
)
def test_a_description_that_is_wrong(saved, change, message):
    rewrite(saved / "exits.json", lambda values: values | change)
    with pytest.raises(ModelError, match=message):
        load_exits(saved)


@pytest.mark.parametrize("file", ["exits.json", "exits.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "binary"])
def test_a_folder_that_is_damaged(folder, saved, file, damage):
    path = saved / file
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut off": data[: len(data) // 2], "binary": b"\xff\xfe\x80" * 99}[damage])
    with pytest.raises(ModelError, match=r"exits\.(json|safetensors)") as caught:
        offramp.load(folder, exits=saved)
    assert "\n" not in str(caught.value)


def test_a_path_that_leads_nowhere(folder, tmp_path):
    for path in (tmp_path / "none", folder, folder / "config.json"):
        with pytest.raises(ModelError, match="holds no exits"):
            offramp.load(folder, exits=path)


def test_the_folder_above_is_told_what_lies_in_it(folder, saved):
    with pytest.raises(ModelError, match=rf"holds no exits: .*; did you mean {saved}\?$"):
        offramp.load(folder, exits=saved.parent)


def test_numbers_that_are_not_finite(saved):
    exits = load_exits(saved)
    with torch.no_grad():
        exits.lenses["2"].up.bias[3] = math.nan
    save_exits(exits, saved)
    with pytest.raises(ModelError, match="diverged"):
        load_exits(saved)


def test_only_exits_are_replaced(folder, saved, tmp_path):
    exits = load_exits(saved)
    save_exits(exits, saved)
    (tmp_path / "empty").mkdir()
    save_exits(exits, tmp_path / "empty")
    assert load_exits(tmp_path / "empty").layers == exits.layers
    save_exits(exits, tmp_path / "a" / "b")
    (tmp_path / "file").write_text("mine")
    (saved / "notes.txt").write_text("mine")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "exits.json").write_text("{")
    before = everything_in(tmp_path), everything_in(folder)
    for path in (tmp_path / "file", saved, folder, tmp_path, tmp_path / "half"):
        with pytest.raises(FileExistsError, match="not replaced"):
            save_exits(exits, path)
    assert (everything_in(tmp_path), everything_in(folder)) == before
    assert (tmp_path / "file").read_text() == (saved / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["write", "rename"])
def test_an_interrupted_save_leaves_the_old_exits(saved, tmp_path, monkeypatch, error, where):
    exits, before = load_exits(saved), (saved / "exits.json").read_text()

    def stop(*args, **kwargs):
        raise error("stopped")

    if where == "write":
        monkeypatch.setattr("offramp.runs.artefact.write_tensors", stop)
    else:
        monkeypatch.setattr("offramp.runs.files._exchange", lambda *_: False)  # as where the system cannot
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda a, b: stop() if a.name == "new" else rename(a, b))
    with pytest.raises(error, match="stopped"):
        save_exits(exits, saved, settings={"new": True})
    with pytest.raises(error, match="stopped"):
        save_exits(exits, tmp_path / "first")
    assert (saved / "exits.json").read_text() == before
    assert everything_in(tmp_path) == ["exits", "exits/exits.json", "exits/exits.safetensors"]


@pytest.mark.parametrize("value", [object(), math.nan])
def test_settings_that_are_not_json_lose_nothing(saved, value):
    exits, before = load_exits(saved), everything_in(saved.parent)
    with pytest.raises((TypeError, ValueError)):
        save_exits(exits, saved, settings={"a": value})
    assert everything_in(saved.parent) == before
    load_exits(saved)


# ---------------------------------------------------------------- commands


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_the_commands_take_exits(folder, saved, tmp_path):
    common = ("--exits", saved, "--max-new-tokens", 4, "--json")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("why is the sky\n")
    result = run("generate", folder, "the sky", "--threshold", 0.2, *common, "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["trained_exits"] == [1, 2, 3]
    result = run("probe", folder, "--prompts", prompts, "--out", tmp_path / "out", *common, tmp_path / "probe.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "probe.json").read_text())["model"] == "tiny-llama with trained exits"
    result = run("bench", folder, "--prompts", prompts, "--repeats", 1, *common, tmp_path / "bench.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "bench.json").read_text())["conditions"]["trained_exits"] == [1, 2, 3]
    assert run("bench", "--random", "t5-small", "--exits", saved).exit_code == 2


def test_few_exits_are_named(folder, tmp_path):
    lm = with_exits(offramp.load(folder).model, (1, 3))
    lm.save_exits(tmp_path / "few")
    result = run("generate", folder, "the", "--threshold", 0.2, "--exits", tmp_path / "few", "--max-new-tokens", 2)
    assert "tested after layers 1, 3 on all tokens" in result.stderr


def test_wrong_exits_are_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["offramp", "generate", str(folder), "the", "--exits", "no-such-folder"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "offramp: error: no-such-folder holds no exits" in capsys.readouterr().err
