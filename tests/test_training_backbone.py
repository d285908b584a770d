"""Training the model itself: gradients against plain autograd on transformers' outputs, adapters against algebra."""

import copy
import errno
import json
import math
import re
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

import offramp
import training_runs
from offramp import ExitPolicy, ModelError
from offramp.families import SplitModel
from offramp.runs import folder as run_folder
from offramp.runs import tensor_files
from offramp.runs.digests import fingerprint
from offramp.runs.folder import TrainingError
from offramp.training.data import Data, Windows, batch
from offramp.training.objectives import OBJECTIVES, layerwise_loss
from offramp.training.passes import dropout_rates, dropping, states_behind_prompts
from offramp.training.trainer import train
from test_brute_force import Row
from tiny import LAYERS, inputs_for, tiny
from training_runs import config, model, windows

NAMES = ("llama", "t5", "bart")
RATE = 0.25
WEIGHTS = (1 / 8, 3 / 8, 4 / 8)
"""Of the readouts after layers 1, 3 and L, proportional to the layer."""


@pytest.fixture
def plain_steps(monkeypatch):
    """Gradient descent instead of Adam: the change of a weight tells its gradient."""
    monkeypatch.setattr(
        "offramp.training.trainer.adamw", lambda params, rate, _: torch.optim.SGD(list(params), lr=rate)
    )


def one_step(**options):
    return config(
        **{"steps": 1, "warmup": 0, "schedule": "constant", "clip": None, "learning_rate": RATE, "batch_size": 6,
           "objective": "labels", "weights": "layer", **options},
    )  # fmt: skip


def unequal(name):
    """Windows with prompts and sources of different lengths, in two parts."""
    options = {"sources": name != "llama", "prompts": 6}
    return Data(windows(6, **options), windows(4, seed=1, **options))


def states_of(hf, part):
    """States after every layer and logits, by transformers; the last state of all but BART is normed."""
    ids = part.ids[:, :-1]
    if part.sources is None:
        output = hf(input_ids=ids, output_hidden_states=True)
        return output.hidden_states, output.logits
    output = hf(
        input_ids=part.sources, attention_mask=part.present.long(), decoder_input_ids=ids, output_hidden_states=True
    )
    return output.decoder_hidden_states, output.logits


def head(hf, hidden):
    """Norm and head from the modules of the model."""
    if hf.config.model_type == "t5":
        return hf.lm_head(hf.decoder.final_layer_norm(hidden) * hf.config.d_model**-0.5)
    if hf.config.model_type == "bart":
        return hf.lm_head(hidden) + hf.final_logits_bias
    return hf.lm_head(hf.model.norm(hidden))


def losses_of(hf, part, layers=(1, 3)):
    """Mean cross-entropy at the counted positions of each exit and of the model, with agreement and accuracy."""
    states, logits = states_of(hf, part)
    where, labels = part.counted[:, 1:], part.ids[:, 1:]
    readouts = [*(head(hf, states[layer]) for layer in layers), logits]
    losses = [F.cross_entropy(readout[where], labels[where]) for readout in readouts]
    agreement = [float((r.argmax(-1) == logits.argmax(-1))[where].float().mean()) for r in readouts[:-1]]
    return losses, agreement


def gradient_of(hf, part, weights=WEIGHTS):
    hf.zero_grad()
    losses, _ = losses_of(hf, part)
    sum(weight * loss for weight, loss in zip(weights, losses, strict=True)).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in hf.named_parameters()}


def as_the_model_judges(hf, part, result):
    """The numbers of a result are those of this model."""
    losses, agreement = losses_of(hf, part)
    *early, last = (float(loss.detach()) for loss in losses)
    assert result.loss_after == pytest.approx(early, rel=1e-4)
    assert result.full_after == pytest.approx(last, rel=1e-4)
    assert result.agreement_after == pytest.approx(agreement)


# ---------------------------------------------------------------- whole backbones


@pytest.mark.parametrize("weights", ["layer", "last"])
@pytest.mark.parametrize("micro_batch", [None, 1, 4])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("plain_steps")
def test_all_is_the_gradient_of_the_weighted_losses(tmp_path, name, micro_batch, weights):
    lm, parts = model(name, still=True), unequal(name)
    shares = WEIGHTS if weights == "layer" else (0, 0, 1)  # the same training without exits
    before, expected = copy.deepcopy(lm.model.state_dict()), gradient_of(copy.deepcopy(lm.model), parts.train, shares)
    result = train(lm, parts, one_step(trainable="all", micro_batch=micro_batch, weights=weights), tmp_path)
    (row,) = [r for r in run_folder.RunFolder(tmp_path).rows() if r["kind"] == "step"]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    assert row["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    for key, value in lm.model.named_parameters():
        torch.testing.assert_close(value.detach(), before[key] - RATE * expected[key], rtol=1e-4, atol=2e-5)
    assert result.model == tmp_path / "model"
    as_the_model_judges(lm.model, parts.held_out, result)
    assert not lm.model.training


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("plain_steps")
def test_lora_is_low_rank_steps_of_the_linear_layers(tmp_path, name):
    """As B begins at 0, one step gives B = -rate · 2 G A^T for the gradient G of the weight, and leaves A."""
    lm, parts = model(name, still=True), unequal(name)
    before, full = copy.deepcopy(lm.model.state_dict()), gradient_of(copy.deepcopy(lm.model), parts.train)
    inside = [lm.split.decoder, *([lm.model.get_encoder()] if name != "llama" else [])]
    linears = {id(m.weight) for part in inside for m in part.modules() if isinstance(m, torch.nn.Linear)}
    names = {key.removesuffix(".weight") for key, p in lm.model.named_parameters() if id(p) in linears}
    result = train(lm, parts, one_step(trainable="lora", lora_rank=3, micro_batch=4), tmp_path)
    learnt = load_file(tmp_path / "checkpoint.safetensors")
    learnt = {key.removeprefix("weights.model."): value for key, value in learnt.items() if key[:7] == "weights"}
    assert set(learnt) == {f"{key}.lora_{side}.default.weight" for key in names for side in "AB"}
    assert len(names) >= 6 * LAYERS
    for key, value in lm.model.state_dict().items():
        stem = key.removesuffix(".weight")
        if stem not in names:
            assert torch.equal(value, before[key]), key
            continue
        a, b = (learnt[f"{stem}.lora_{side}.default.weight"] for side in "AB")
        assert a.shape[0] == 3
        torch.testing.assert_close(b, -RATE * 2 * full[key] @ a.T, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(value, before[key] + 2 * b @ a)
    as_the_model_judges(lm.model, parts.held_out, result)  # judged with adapters, here they are merged
    assert result.full_after != result.full_before


@pytest.mark.parametrize(("name", "trainable"), [("llama", "all"), ("llama", "lora"), ("t5", "lora"), ("bart", "all")])
def test_the_saved_model_and_its_exits_are_those_that_were_trained(tmp_path, name, trainable):
    lm, parts = model(name), unequal(name)
    keys, drawn = list(lm.model.state_dict()), torch.random.get_rng_state()
    result = train(lm, parts, config(steps=3, trainable=trainable, objective="labels"), tmp_path)
    assert list(lm.model.state_dict()) == keys
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())
    loaded = offramp.load(result.model, exits=result.exits)
    assert fingerprint(loaded.model) == fingerprint(lm.model) == loaded.exits.fingerprint != fingerprint(tiny(name))
    assert loaded.exits.rank == 0
    with torch.no_grad():
        assert torch.equal(states_of(loaded.model, parts.train)[1], states_of(lm.model, parts.train)[1])
    as_the_model_judges(loaded.model, parts.held_out, result)
    policy = ExitPolicy(threshold=0.1)
    assert loaded.generate(inputs_for(name), policy=policy, max_new_tokens=3).exit_layers
    tiny(name).save_pretrained(tmp_path / "before")
    with pytest.raises(ModelError, match=f"were made for {re.escape(str(result.model))} with weights"):
        offramp.load(tmp_path / "before", exits=result.exits)


def test_lenses_may_be_trained_with_the_model(tmp_path):
    lm, parts = model(), unequal("llama")
    result = train(lm, parts, config(steps=3, trainable="lora", rank=2), tmp_path)
    loaded = offramp.load(result.model, exits=result.exits)
    assert loaded.exits.rank == 2
    assert all(bool(lens.up.weight.any()) for lens in loaded.exits.lenses.values())


@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_tied_weights_stay_tied(tmp_path, trainable):
    lm = model("llama-tied", still=False)
    result = train(lm, unequal("llama"), config(steps=2, trainable=trainable), tmp_path)
    loaded = offramp.load(result.model, exits=result.exits)
    assert loaded.model.lm_head.weight.data_ptr() == loaded.model.model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        ids = windows(2).ids
        assert torch.equal(loaded.model(ids).logits, lm.model(ids).logits)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_failed_run_takes_its_adapters_out(tmp_path, monkeypatch, name):
    lm, parts = model(name), unequal(name)
    before, modules = copy.deepcopy(lm.model.state_dict()), [str(m) for m in lm.model.modules()]
    logits = states_of(lm.model, parts.train)[1]
    calls, sound = [], OBJECTIVES["labels"]

    def breaks(*args):
        calls.append(1)
        return sound(*args) * (math.nan if len(calls) == 3 * 5 else 1)

    with monkeypatch.context() as patch:
        patch.setitem(OBJECTIVES, "labels", breaks)
        with pytest.raises(TrainingError, match="the last good checkpoint is kept"):
            train(lm, parts, config(steps=8, trainable="lora", objective="labels"), tmp_path)
    assert [str(m) for m in lm.model.modules()] == modules
    after = lm.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())
    assert torch.equal(states_of(lm.model, parts.train)[1], logits)
    assert not (tmp_path / "model").exists()
    train(lm, parts, config(steps=8, trainable="lora", objective="labels"), tmp_path)  # the fault is gone


def test_without_peft_the_model_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    lm = model()
    with pytest.raises(ModuleNotFoundError, match=r"needs peft.*pip install 'offramp\[lora\]'"):
        train(lm, unequal("llama"), config(trainable="lora"), tmp_path)
    assert all(p.requires_grad for p in lm.model.parameters())
    assert not lm.model.training


def test_bfloat16_computes_in_it_and_keeps_the_weights(tmp_path):
    lm, parts = model(), unequal("llama")
    result = train(lm, parts, config(steps=30, trainable="all", precision="bf16", learning_rate=3e-3), tmp_path / "b")
    exact = train(model(), parts, config(steps=30, trainable="all", learning_rate=3e-3), tmp_path / "f")
    assert lm.model.dtype == torch.float32
    first = [r for r in run_folder.RunFolder(tmp_path / "b").rows() if r["kind"] == "validation"][0]
    assert first["loss"] != pytest.approx(exact.loss_before, rel=1e-7)
    assert first["loss"] == pytest.approx(exact.loss_before, rel=0.05)
    assert result.loss_after[0] < result.loss_before[0]


# ---------------------------------------------------------------- FREE's hidden-state term


def by_loops(shallow, deep):
    """(1/S) Σ_i min_j mean over n, d of (h_i - h_j)²."""
    total = 0.0
    for own in shallow:
        distances = []
        for other in deep:
            squares = [(a - b) ** 2 for x, y in zip(own, other, strict=True) for a, b in zip(x, y, strict=True)]
            distances.append(sum(squares) / len(squares))
        total += min(distances)
    return total / len(shallow)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_the_term_is_its_formula(shallow, deep, count, seed):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(shallow + deep, count, 3, generator=generator, dtype=torch.float64)
    states = [state.requires_grad_() for state in states.clone()]
    loss = layerwise_loss(states[:shallow], states[shallow:])
    plain = [state.detach().tolist() for state in states]
    assert float(loss.detach()) == pytest.approx(by_loops(plain[:shallow], plain[shallow:]))
    loss.backward()
    for index, own in enumerate(states):
        if index >= shallow:
            assert own.grad is None  # teachers
            continue
        nearest = min(states[shallow:], key=lambda other: float((own - other).detach().square().mean()))  # noqa: B023
        torch.testing.assert_close(own.grad, (2 * (own - nearest) / own.numel() / shallow).detach())


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize(("layer", "micro_batch"), [(2, None), (3, 4)])  # with one deep layer there is no choice
@pytest.mark.usefixtures("plain_steps")
def test_the_term_reaches_the_shallow_layers_only(tmp_path, name, layer, micro_batch):
    parts, changed, options = unequal(name), {}, {"layers": (layer,), "micro_batch": micro_batch, "trainable": "all"}
    for weight in (0.0, 0.7):
        lm = model(name, still=True)
        train(lm, parts, one_step(hidden_loss=weight, **options), tmp_path / str(weight))
        changed[weight] = lm.model.state_dict()
    lm = model(name, still=True)
    hf, where = lm.model, parts.train.counted[:, 1:]
    last = []
    hook = lm.split.blocks[-1].register_forward_hook(
        lambda _, __, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    states = [*states_of(hf, parts.train)[0][:-1], *last]  # the last one before its norm
    hook.remove()
    taken = [state[where] for state in states]
    term = 0
    for own in taken[1 : layer + 1]:
        distances = [((own - other.detach()) ** 2).mean() for other in taken[layer + 1 :]]
        term = term + torch.stack(distances).min() / layer
    (0.7 * term).backward()
    deep = [*lm.split.blocks[layer:], lm.split.norm, *([] if name == "t5" else [lm.split.head])]
    behind = {id(p) for module in deep for p in module.parameters()}
    for key, parameter in hf.named_parameters():
        difference = changed[0.0][key] - changed[0.7][key]
        if id(parameter) in behind:
            assert not difference.any(), key
        else:
            torch.testing.assert_close(difference, RATE * parameter.grad, rtol=2e-3, atol=3e-6)
    assert changed[0.0].keys() == changed[0.7].keys()


def test_a_wrong_option_leaves_the_folder_free(tmp_path):
    for options, message in [
        ({"hidden_loss": 1.0}, r"hidden_loss is for one exit .* not for those after \(1, 3\); give one layer"),
        ({"prompt_layer": LAYERS}, rf"a prompt can stop after layers 1\.\.{LAYERS - 1}"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(model(), unequal("llama"), config(trainable="all", **options), tmp_path)
    with pytest.raises(ValueError, match="an encoder-decoder has no prompt"):
        train(model("t5"), unequal("t5"), config(trainable="all", prompt_layer=1), tmp_path)
    assert train(model(), unequal("llama"), config(steps=1), tmp_path).steps == 1


# ---------------------------------------------------------------- layer dropout


def test_rates_by_hand():
    """LayerSkip, equation 1: exp(l ln 2 / (L - 1)) - 1, times the largest."""
    assert dropout_rates(3, 0.5) == pytest.approx([0, 0.5 * (math.sqrt(2) - 1), 0.5])
    assert dropout_rates(1, 0.5) == [0]
    for depth in (2, 12, 30):
        expected = [0.2 * (math.exp(layer * math.log(2) / (depth - 1)) - 1) for layer in range(depth)]
        assert dropout_rates(depth, 0.2) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_dropped_blocks_are_skipped_for_whole_rows(name):
    """Each row's states are those of a pass without the blocks it dropped, which it does as often as it should."""
    lm = model(name, still=True)
    split, part, largest = lm.split, windows(600, 5, sources=name == "t5"), 0.999999
    lm.model.eval()
    assert dropping(split, largest) is None
    lm.model.train()
    torch.manual_seed(0)
    memory = (
        {} if name == "llama" else {"memory": split.encode(part.sources, part.present), "memory_mask": part.present}
    )
    with torch.no_grad():
        states = split.states(part.ids[:, :-1], range(1, LAYERS + 1), edit=dropping(split, largest), **memory)
        first = split.states(part.ids[:, :-1], [1], **memory)[0]
    assert torch.equal(states[0], first)  # the first block is never dropped
    same = torch.stack([(a == b).flatten(1).all(1) for a, b in zip(states[:-1], states[1:], strict=True)])  # [L - 1, B]
    rates = dropout_rates(LAYERS, largest)
    assert (same.float().mean(1) - torch.tensor(rates[1:])).abs().max() < 0.06
    assert bool(same[-1].all())
    for pattern in same.T.unique(dim=0).tolist():  # rows that dropped the same blocks, without these blocks
        rows = (same.T == torch.tensor(pattern)).all(1).nonzero()[:4, 0]
        short = model(name, still=True)
        kept = [block for block, dropped in zip(short.split.blocks, [False, *pattern], strict=True) if not dropped]
        decoder = short.split.decoder
        setattr(decoder, short.split.family.layers, torch.nn.ModuleList(kept))
        if name == "llama":
            decoder.config.num_hidden_layers = len(kept)
        again = SplitModel(short.model)
        inside = {key: value[rows] for key, value in memory.items()}
        with torch.no_grad():
            expected = again.states(part.ids[rows, :-1], [len(kept)], **inside)[0]
        torch.testing.assert_close(states[-1][rows], expected, rtol=1e-5, atol=1e-5)


def test_drops_depend_on_seed_and_step_alone(tmp_path):
    parts, losses = Data(windows(4), windows(4)), []
    for run, seed in enumerate((0, 0, 5)):
        torch.manual_seed(run)
        options = {"trainable": "all", "layer_dropout": 0.6, "learning_rate": 1e-30, "steps": 3, "seed": seed}
        train(model(), parts, config(**options), tmp_path / str(run))
        rows = run_folder.RunFolder(tmp_path / str(run)).rows()
        losses.append([row["full_loss"] for row in rows if row["kind"] == "step"])
        assert rows[0]["full_loss"] == pytest.approx(rows[-1]["full_loss"])  # nothing was learnt, or dropped there
    assert losses[0] == losses[1]
    assert len({*losses[0], *losses[2]}) == 6


def test_rows_drop_for_themselves_whatever_goes_through_at_once(tmp_path, monkeypatch):
    alike = windows(1).ids.expand(8, -1).contiguous()
    counted = windows(8).counted
    seen, plain = [], SplitModel.states

    def spy(self, *args, **keywords):
        states = plain(self, *args, **keywords)
        if self.model.training:
            seen.extend(states[-1].detach().sum((1, 2)).tolist())
        return states

    monkeypatch.setattr(SplitModel, "states", spy)
    parts = Data(Windows(alike, counted), Windows(alike, counted))
    options = {"trainable": "all", "layer_dropout": 0.6, "steps": 1, "batch_size": 8}
    for micro in (8, 1):
        seen.clear()
        train(model(), parts, config(micro_batch=micro, **options), tmp_path / str(micro))
        assert len(seen) == 8
        assert len({round(value, 3) for value in seen}) > 2


# ---------------------------------------------------------------- prompts that stop early


def conversations():
    """Prompts of different lengths, and what the model answers when they stop after layer 2."""
    lm, policy = model(), ExitPolicy(threshold=None, prompt_layer=2)
    inputs = inputs_for("llama", 4, padded=True)
    out = lm.generate(inputs, policy=policy, max_new_tokens=7, eos_token_id=96)
    prompts = [row[mask.bool()] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    ids = torch.zeros(4, 16, dtype=torch.long)
    counted = torch.zeros(4, 16, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, out.tokens, strict=True)):
        whole = [*prompt.tolist(), *answer]
        ids[row, : len(whole)], counted[row, len(prompt) : len(whole)] = torch.tensor(whole), True
    return lm, Windows(ids, counted), out.tokens


def states_with_prompt_layer(split, part, layer=2):
    """States [B, T - 1, D] after every layer, of the positions that predict."""
    with torch.no_grad():
        found, labels = states_behind_prompts(split, part, range(1, LAYERS + 1), layer)
    where = part.counted[:, 1:]
    assert torch.equal(labels, part.ids[:, 1:][where])
    whole = [torch.full((*where.shape, hidden.shape[-1]), math.nan) for hidden in found]
    for states, hidden in zip(whole, found, strict=True):
        states[where] = hidden
    return whole


def test_states_after_short_prompts_are_those_of_decoding():
    """Against the brute-force reference of decoding, one position at a time."""
    lm, part, answers = conversations()
    states = states_with_prompt_layer(lm.split, part)
    changed = False
    for index, answer in enumerate(answers):
        start = int(part.counted[index].int().argmax())
        prompt = part.ids[index, :start]
        row = Row(lm.model, {"input_ids": prompt[None], "attention_mask": torch.ones(1, start)}, 0, prompt=2)
        for at, token in enumerate(answer):
            logits, expected = row.readouts()
            for layer in range(LAYERS):
                got = states[layer][index, start - 1 + at].double()
                torch.testing.assert_close(got, expected[layer], rtol=1e-4, atol=1e-4)
            assert token == int(logits[-1].argmax())
            assert token == int(lm.split.readout(states[-1][index, start - 1 + at]).argmax())  # and so when trained
            row.append(token, LAYERS, 1.0, math.inf)
        full = lm.split.states(part.ids[index : index + 1, :-1], [LAYERS])[0]
        changed |= not torch.allclose(full[0, start - 1], states[-1][index, start - 1], atol=1e-3)
    assert changed


def test_drawn_positions_do_not_move_the_end_of_the_prompt():
    lm, part, _ = conversations()
    drawn = batch(part, 0, 4, seed=3, most=2)
    order = [int((part.ids[:, : drawn.ids.shape[1]] == row).all(1).nonzero()) for row in drawn.ids]
    assert drawn.counted.sum(1).tolist() == part.counted[order].sum(1).clamp(max=2).tolist()
    assert bool((drawn.counted.int().argmax(1) > part.first[order]).any())  # else nothing is shown
    assert torch.equal(drawn.first, part.first[order])
    assert torch.equal(drawn[torch.tensor([2, 0])].first, part.first[[order[2], order[0]]])
    got, expected = states_with_prompt_layer(lm.split, drawn)[-1], states_with_prompt_layer(lm.split, part)[-1]
    where = drawn.counted[:, 1:]
    torch.testing.assert_close(got[where], expected[order, : got.shape[1]][where])


def test_training_for_short_prompts_is_judged_with_them(tmp_path):
    lm, part, answers = conversations()
    result = train(lm, Data(part, part), config(steps=1, prompt_layer=2), tmp_path)
    states = states_with_prompt_layer(lm.split, part)[-1][part.counted[:, 1:]]
    loss = F.cross_entropy(lm.split.readout(states), part.ids[part.counted])
    assert result.full_after == pytest.approx(float(loss.detach()), rel=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["prompt_layer"] == 2


@pytest.mark.parametrize("trainable", ["all", "exits"])
def test_short_prompts_are_trained_for_in_bfloat16_too(trainable, tmp_path):
    """Under autocast rotated keys are float32 and values are not."""
    ends = []
    for precision in (None, "bf16"):
        lm, part, _ = conversations()
        options = {"steps": 20, "trainable": trainable, "prompt_layer": 2, "learning_rate": 3e-3}
        ends.append(train(lm, Data(part, part), config(precision=precision, **options), tmp_path / str(precision)))
    for before, exact, rounded in zip(ends[0].loss_before, ends[0].loss_after, ends[1].loss_after, strict=True):
        assert exact < before - 0.1  # it does learn
        assert rounded == pytest.approx(exact, abs=0.2 * (before - exact))


# ---------------------------------------------------------------- interruptions


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    whole, folder = tmp_path / "whole", tmp_path / "full"
    training_runs.run(whole, steps=6)
    kept, replace = [], tensor_files.replace_file

    def full(path, write):
        def half(temporary):
            write(temporary)
            temporary.write_bytes(temporary.read_bytes()[:99])
            raise OSError(errno.ENOSPC, "No space left on device")

        kept.extend([path] if path.name == "checkpoint.safetensors" else [])
        replace(path, half if len(kept) == 3 else write)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "replace_file", full)
        with pytest.raises(OSError, match="No space left"):
            training_runs.run(folder, steps=6)
    assert {path.name for path in folder.iterdir()} - {".lock"} == {
        "config.json", "metrics.jsonl", "checkpoint.safetensors",
    }  # fmt: skip
    assert load_file(folder / "checkpoint.safetensors")["optimizer.0.step"] == 3
    training_runs.run(folder, steps=6)
    ends = [load_file(place / "exits" / "exits.safetensors") for place in (whole, folder)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
