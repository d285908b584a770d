"""Exits with transformer blocks of their own, against the model that has these blocks in its place."""

import copy

import pytest
import torch

from offramp import ExitPolicy, LanguageModel
from offramp.core.adapters import Branch
from offramp.core.exits import Exits
from offramp.core.plan import resolve
from offramp.core.verifying import Pace
from offramp.families import SplitModel
from offramp.hub.exit_files import load_exits, save_exits
from offramp.hub.messages import ModelError
from offramp.lm.probe import text_states
from offramp.native.families import FAMILIES as DESCRIBED
from offramp.runs.digests import fingerprint
from offramp.training.trainer import train
from tiny import FAMILIES, LAYERS, greedy, inputs_for, tiny, truncated
from training_runs import config, data, model

NEW = 10
FEW = ("llama", "gemma3", "gpt-neox", "t5", "whisper")
LEFT_OUT = ("opt-350m", *(["gemma2"] if tiny("gemma2").config._attn_implementation == "sdpa" else []))
"""Not native; the latter before transformers 5.24, which gives it an attention that has its cap."""
NATIVE = [name for name in FAMILIES if tiny(name).config.model_type in DESCRIBED and name not in LEFT_OUT]
CASES = [("torch", name) for name in FAMILIES] + [("native", name) for name in NATIVE]


@pytest.fixture(params=CASES, ids="-".join)
def lm(request):
    """A tiny model; its exits after layers 1 and 2 have the second block's and the last two blocks' weights."""
    engine, name = request.param
    made = LanguageModel(copy.deepcopy(tiny(name)), engine=engine)
    made.case = name
    return made


def weights(split, index):
    """Those of one block."""
    return {name: p.detach().clone() for name, p in split.blocks[index].named_parameters()}


def after(split, layer, *like):
    """An exit after a layer whose blocks have the weights of some of the model's."""
    exits = Exits(LAYERS, split.shape.width, (layer,), 0, blocks=len(like))
    exits.branches[str(layer)] = Branch([weights(split, index) for index in like])
    return exits


def two_exits(split, blocks=1):
    """Exits after layers 1 and 3 whose blocks are not like any of the model's."""
    torch.manual_seed(0)
    exits = Exits.fresh(split, (1, 3), blocks=blocks)
    with torch.no_grad():
        for parameter in exits.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return exits


def test_a_static_exit_is_the_truncated_model_that_ends_with_its_blocks(lm):
    inputs, policy = inputs_for(lm.case, 3, padded=True), ExitPolicy("static", min_layer=2)
    lm.attach_exits(after(lm.split, 2, 2, 3))
    whole = lm.generate(inputs, max_new_tokens=NEW)
    got = lm.generate(inputs, policy=policy, max_new_tokens=NEW)
    assert got.sequences.tolist() == whole.sequences.tolist()  # blocks 1, 2, and then 3 and 4 as its own
    assert got.costs.flops == whole.costs.flops


def test_a_static_exit_is_the_shorter_model(lm):
    if lm.split.types[1] != lm.split.types[3] or lm.case in ("gpt2", "qwen2-moe"):
        pytest.skip("its second and last block are of different kinds")
    inputs = inputs_for(lm.case, 3, padded=True)
    lm.attach_exits(after(lm.split, 1, 1))
    got = lm.generate(inputs, policy=ExitPolicy("static", min_layer=1), max_new_tokens=NEW)
    assert got.sequences.tolist() == greedy(truncated(tiny(lm.case), 2), inputs, NEW).tolist()


def test_verify_is_greedy(lm):
    inputs = inputs_for(lm.case, 3, padded=True)
    full = lm.generate(inputs, max_new_tokens=NEW)
    lm.attach_exits(two_exits(lm.split, 2))
    assert lm.generate(inputs, max_new_tokens=NEW).sequences.tolist() == full.sequences.tolist()
    for length, threshold in ((1, 0.0), (3, 0.1), (4, 0.3)):
        policy = ExitPolicy(threshold=threshold, skipped="verify", draft_length=length)
        assert lm.generate(inputs, policy=policy, max_new_tokens=NEW).tokens == full.tokens
    policy = ExitPolicy(threshold=0.1, skipped="verify", draft="adaptive")
    assert lm.generate(inputs, policy=policy, max_new_tokens=NEW).tokens == full.tokens


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("skipped", ["propagate", "defer"])
def test_rows_of_a_batch_are_as_alone(name, engine, skipped):
    """What an exit's blocks have cached of earlier positions does not depend on the company."""
    lm, inputs = LanguageModel(copy.deepcopy(tiny(name)), engine=engine), inputs_for(name, 3, padded=True)
    lm.attach_exits(two_exits(lm.split, 2))
    policy = ExitPolicy(threshold=0.12, skipped=skipped)
    together = lm.generate(inputs, policy=policy, max_new_tokens=NEW)
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        got = lm.generate(alone, policy=policy, max_new_tokens=NEW)
        assert got.tokens[0] == together.tokens[row]
        assert got.exit_layers[0] == together.exit_layers[row]
    if name in ("llama", "gpt-neox"):
        assert len({layer for layers in together.exit_layers for layer in layers[1:]}) > 1


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("skipped", ["propagate", "defer", "verify"])
def test_both_engines_do_the_same(name, skipped):
    inputs, found = inputs_for(name, 3, padded=True), []
    for engine in ("native", "torch"):
        lm = LanguageModel(copy.deepcopy(tiny(name)), engine=engine)
        lm.attach_exits(two_exits(lm.split, 2))
        found.append(lm.generate(inputs, policy=ExitPolicy(threshold=0.12, skipped=skipped), max_new_tokens=NEW))
    native, torch_ = found
    assert native.tokens == torch_.tokens
    assert native.exit_layers == torch_.exit_layers
    assert native.costs.flops == torch_.costs.flops


@torch.no_grad()
def test_a_deferred_branch_is_that_of_the_whole_text():
    """Positions that come by an exit one at a time, late or together get the branch of one whole pass."""
    lm = LanguageModel(copy.deepcopy(tiny("llama")), engine="torch")
    lm.attach_exits(two_exits(lm.split, 2))
    seen = []
    lm.split.branched = lambda states: [seen.append(s) or s for s in SplitModel.branched(lm.split, states)]
    out = lm.generate(inputs_for("llama"), policy=ExitPolicy(threshold=0.12, skipped="defer"), max_new_tokens=NEW)
    del lm.split.branched
    whole = lm.split.states(out.sequences, [1, 3])
    places = {1: set(), 3: set()}
    for state in seen:
        want = whole[(1, 3).index(state.depth)]
        for at in range(state.frame.queries):
            slot = state.frame.start + at
            assert slot not in places[state.depth]
            places[state.depth].add(slot)
            torch.testing.assert_close(state.branch[:, at], want[:, slot], atol=1e-3, rtol=1e-3)
    assert places[1] == set(range(out.sequences.shape[1] - 1))
    assert len(places[3]) > out.sequences.shape[1] // 2


def test_prompts_that_stop_early_fill_deeper_branches():
    """On both engines alike; the only exit is behind the place where the prompt stops."""
    policy, inputs, found = ExitPolicy(threshold=0.1, prompt_layer=2), inputs_for("llama", 2, padded=True), []
    for engine in ("torch", "native"):
        lm = LanguageModel(copy.deepcopy(tiny("llama")), engine=engine)
        lm.attach_exits(two_exits(lm.split, 1).only((3,)))
        found.append(lm.generate(inputs, policy=policy, max_new_tokens=NEW))
    assert found[0].tokens == found[1].tokens
    assert found[0].exit_layers == found[1].exit_layers
    assert found[0].costs.flops == found[1].costs.flops
    assert any(3 in layers for layers in found[0].exit_layers)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "gemma3", "qwen2-moe", "t5", "whisper"])
def test_fresh_blocks_leave_states_alone(name):
    split, inputs = SplitModel(tiny(name)), inputs_for(name)
    memory = split.encode(next(iter(inputs.values()))) if split.is_encoder_decoder else None
    ids = torch.arange(3, 10)[None]
    plain = split.states(ids, [1, 3], memory=memory)
    split.exits = Exits.fresh(split, (1, 3), blocks=2)
    for state, own in zip(plain, split.states(ids, [1, 3], memory=memory), strict=True):
        assert torch.equal(state, own)


def test_files_keep_branches_in_bfloat16(tmp_path):
    split = SplitModel(copy.deepcopy(tiny("llama")))
    exits = two_exits(split, 2)
    save_exits(exits, tmp_path / "exits")
    loaded = load_exits(tmp_path / "exits")
    assert loaded.blocks == 2
    assert loaded.state_dict().keys() == exits.state_dict().keys()
    for name, tensor in exits.state_dict().items():
        kept = tensor.bfloat16().float() if name.startswith("branches.") else tensor
        assert torch.equal(loaded.state_dict()[name], kept)
    split.exits = loaded
    assert split.branches == {1: range(4, 6), 3: range(6, 8)}
    assert len(split.blocks) == 8
    split.exits = None
    assert (split.branches, len(split.blocks), split.shape.branches) == ({}, 4, ())


def test_exits_of_another_model_are_refused():
    wide, split = SplitModel(tiny("llama")), SplitModel(tiny("gpt2"))
    exits = two_exits(wide)
    with pytest.raises(ValueError, match=r"other weights than block 4|for 4 layers of width"):
        split.exits = exits
    with pytest.raises(ValueError, match=r"0\.\.4 blocks"):
        Exits(4, 8, (1,), blocks=5)


def test_a_file_that_lacks_a_block_is_damaged(tmp_path):
    exits = two_exits(SplitModel(tiny("llama")), 2)
    exits.branches["3"] = Branch(exits.branches["3"].blocks()[:1])
    save_exits(exits, tmp_path / "exits")
    with pytest.raises(ModelError, match="lacks blocks of the exit after layer 3"):
        load_exits(tmp_path / "exits")


def test_the_pace_of_drafts_counts_blocks_of_the_exits_own():
    lm = LanguageModel(copy.deepcopy(tiny("llama")))
    lm.attach_exits(two_exits(lm.split, 2))
    shape, blocks = lm.split.shape, [block.weights for block in lm.split.shape.blocks]
    own, head = 2 * blocks[3] + lm.split.shape.lens_weights(1), shape.readout_weights()
    for confidence, reads in (("softmax", (1, 2)), ("state", (1, 1))):
        policy = ExitPolicy(confidence, 0.5, skipped="verify", draft="adaptive")
        spent = Pace.of(resolve(policy, LAYERS, lm.vocabulary, (1, 3)), shape).spent
        want = [blocks[0] + own + reads[0] * head, sum(blocks[:3]) + 2 * own + reads[1] * head]
        assert [spent[layer] * (sum(blocks) + head) for layer in (1, 3)] == pytest.approx(want)


@torch.no_grad()
def test_the_probe_reads_what_blocks_make_of_states():
    lm = LanguageModel(copy.deepcopy(tiny("llama")), engine="torch")
    lm.attach_exits(two_exits(lm.split, 2))
    ids = torch.arange(3, 12)[None]
    found = text_states(lm, {"input_ids": ids})
    for layer, want in zip(range(1, 5), lm.split.states(ids, range(1, 5)), strict=True):
        torch.testing.assert_close(found[layer - 1], want[0], atol=2e-5, rtol=1e-4)


def test_classifiers_learn_behind_blocks(tmp_path):
    lm = model()
    lm.attach_exits(two_exits(lm.split, 1))
    result = train(lm, data(), config(objective="consistency", steps=12), tmp_path)
    exits = load_exits(result.exits)
    assert (exits.blocks, exits.classifiers is not None) == (1, True)
    for name, tensor in lm.exits.branches.state_dict().items():
        assert torch.equal(exits.branches.state_dict()[name], tensor.bfloat16().float())
    lm.attach_exits(exits)
    out = lm.generate(inputs_for("llama"), policy=ExitPolicy("classifier", 0.2, skipped="verify"), max_new_tokens=NEW)
    assert out.tokens == lm.generate(inputs_for("llama"), max_new_tokens=NEW).tokens


def test_adapters_are_told_apart_by_their_blocks():
    split = SplitModel(tiny("llama"))
    one, other = two_exits(split), two_exits(split)
    assert fingerprint(one.adapters) == fingerprint(other.adapters)
    with torch.no_grad():
        next(iter(other.branches.parameters())).add_(1)
    assert fingerprint(one.adapters) != fingerprint(other.adapters)
    assert Exits.fresh(split).adapters.state_dict().keys() == Exits.fresh(split).lenses.state_dict().keys()
