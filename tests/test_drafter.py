"""A drafter, which proposes tokens from before the first block: against its own rule written down without caches."""

import copy
import dataclasses
from collections import Counter

import pytest
import torch

from offramp import ExitPolicy, LanguageModel
from offramp.cli import options as o
from offramp.core.adapters import Drafter
from offramp.core.exits import Exits
from offramp.core.plan import resolve
from offramp.core.policy import DRAFTER, DRAFTS
from offramp.core.verifying import Pace
from offramp.evaluation import document_arms
from offramp.evaluation.arms import drafting_arms
from offramp.families import SplitModel
from offramp.hub.exit_files import load_exits, save_exits
from offramp.hub.messages import ModelError
from offramp.lm.bench import default_arms, run_bench
from offramp.training.data import Data
from offramp.training.drafts import Unrolled
from offramp.training.trainer import train
from test_branches import CASES
from tiny import FAMILIES, LAYERS, VOCABULARY, greedy, inputs_for, tiny
from training_runs import config, data, model, windows

NEW = 12
DECODERS = [name for name in FAMILIES if not tiny(name).config.is_encoder_decoder]
POLICY = ExitPolicy("static", min_layer=DRAFTER, skipped="verify", draft_length=3)
POLICIES = {
    "one": dataclasses.replace(POLICY, draft_length=1),
    "three": POLICY,
    "while sure": dataclasses.replace(POLICY, confidence="max", threshold=0.02, draft_length=8),
    "adaptive": dataclasses.replace(POLICY, confidence="softmax", threshold=0.0, draft="adaptive"),
}


def drafting(split, blocks=1, *, frequent=None, seed=0):
    """A drafter of random weights; it is right now and then where few tokens are frequent."""
    torch.manual_seed(seed)
    exits = Exits(split.num_layers, split.shape.width, (), 0, drafter=blocks).with_drafter(split, blocks)
    with torch.no_grad():
        for parameter in exits.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return exits if frequent is None else exits.with_frequent(frequent)


def likely(name, inputs, most=40):
    """Tokens that the model generates most often, at least two."""
    said = Counter(greedy(tiny(name), inputs, NEW)[:, -NEW:].flatten().tolist())
    found = {token for token, _ in said.most_common(most)}
    return sorted(found if len(found) > 1 else {*found, 5, 6})


@pytest.mark.parametrize(("engine", "name"), [case for case in CASES if case[1] in DECODERS])
def test_the_text_is_the_full_models(engine, name):
    """For each way of drafting, in a batch with padding, where rows stand at different positions."""
    lm, inputs = LanguageModel(copy.deepcopy(tiny(name)), engine=engine), inputs_for(name, 3, padded=True)
    want = greedy(tiny(name), inputs, NEW)
    lm.attach_exits(drafting(lm.split, frequent=likely(name, inputs)))
    for policy in POLICIES.values():
        policy = dataclasses.replace(policy, vocabulary="frequent")
        assert lm.generate(inputs, policy=policy, max_new_tokens=NEW).sequences.tolist() == want.tolist()


@torch.no_grad()
def drafted_by_the_rule(lm, ids, count, frequent):
    """`count` drafts behind a text, each by a whole pass without any cache, from what the full model read there."""
    split, exits = lm.split, lm.exits
    read = split.readout_input(split.states(ids[:, :-1], [split.num_layers])[0])
    before = torch.cat([torch.zeros_like(read[:, :1]), read], dim=1)
    found = []
    for _ in range(count):
        own = split.branch_of(DRAFTER, exits.drafter(split.start(ids).hidden, before))
        own = split.readout_input(own[:, -1:], DRAFTER)
        scores = split.project(own)[0, 0]
        token = max(frequent, key=lambda token: float(scores[token]))
        found.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        before = torch.cat([before, own], dim=1)
    return found


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "cohere"])
def test_drafts_are_those_of_the_rule(name, length, engine):
    """Which tokens are drafts that stood says which were drafted: round by round, as written down above."""
    lm, total = LanguageModel(copy.deepcopy(tiny(name)), engine=engine), 0
    for seed in range(4):
        inputs = {"input_ids": inputs_for(name, seed=seed)["input_ids"]}
        frequent = likely(name, inputs, 3)
        lm.attach_exits(drafting(lm.split, 2 if name == "llama" else 1, frequent=frequent, seed=seed))
        policy = dataclasses.replace(POLICY, draft_length=length, vocabulary="frequent")
        got = lm.generate(inputs, policy=policy, max_new_tokens=NEW, eos_token_id=None)
        ids, start = got.sequences, inputs["input_ids"].shape[1]
        reference = LanguageModel(tiny(name), engine="torch")
        reference.attach_exits(lm.exits)
        want, at = [LAYERS], start + 1  # the prompt's own token is not drafted
        while at < ids.shape[1]:
            left = ids.shape[1] - at
            drafts = drafted_by_the_rule(reference, ids[:, :at], min(length, left), frequent)
            right = 0
            while right < len(drafts) and drafts[right] == int(ids[0, at + right]):
                right += 1
            want += [DRAFTER] * right + [LAYERS] * (right < left)
            at += right + 1
        assert got.exit_layers[0] == want
        total += want.count(DRAFTER)
    assert total > 0


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_rows_of_a_batch_are_as_alone(name, engine):
    lm, inputs = LanguageModel(copy.deepcopy(tiny(name)), engine=engine), inputs_for(name, 3, padded=True)
    lm.attach_exits(drafting(lm.split, frequent=likely(name, inputs, 3)))
    policy = dataclasses.replace(POLICY, vocabulary="frequent")
    together = lm.generate(inputs, policy=policy, max_new_tokens=NEW)
    for row in range(3):
        alone = lm.generate({k: v[row : row + 1] for k, v in inputs.items()}, policy=policy, max_new_tokens=NEW)
        assert alone.tokens[0] == together.tokens[row]
        assert alone.exit_layers[0] == together.exit_layers[row]


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_draws_keep_the_full_models_distribution(engine):
    """Of 2 tokens from a distribution of few likely ones; total variation against exact probabilities."""
    lm = LanguageModel(copy.deepcopy(tiny("llama")), engine=engine)
    lm.attach_exits(drafting(lm.split))
    ids, draws = torch.tensor([[5, 9, 3]]).repeat(500, 1), []
    for seed in range(4):
        torch.manual_seed(seed)
        out = lm.generate(
            {"input_ids": ids}, policy=POLICY, max_new_tokens=3, do_sample=True, top_k=3, eos_token_id=None
        )  # fmt: skip
        draws += out.tokens
    with torch.no_grad():
        logits = tiny("llama")(torch.tensor([[5, 9, 3]])).logits[0, -1].topk(3)
        first = dict(zip(logits.indices.tolist(), logits.values.softmax(-1).tolist(), strict=True))
    exact = {}
    for token, p in first.items():
        with torch.no_grad():
            after = tiny("llama")(torch.tensor([[5, 9, 3, token]])).logits[0, -1].topk(3)
        for second, q in zip(after.indices.tolist(), after.values.softmax(-1).tolist(), strict=True):
            exact[token, second] = p * q
    seen = {pair: sum((a, b) == pair for a, b, _ in draws) / len(draws) for pair in exact}
    distance = sum(abs(seen[pair] - p) for pair, p in exact.items()) / 2
    assert sum(seen.values()) == pytest.approx(1)
    assert distance < 0.07  # 9 cells, 2,000 draws: expected .03, above .07 with probability < 1e-6 (Bretagnolle-Huber)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt-neox", "qwen2-moe", "gpt-oss"])
def test_later_passes_attend_to_what_decoding_would(name):
    """Pass s at a position: true inputs up to s before it, then of each pass in between those of one position."""
    split = SplitModel(copy.deepcopy(tiny(name)))
    split.exits = drafting(split, 1 if name == "gpt-oss" else 2)
    torch.manual_seed(1)
    width, length = split.shape.width, 9
    mixed = [torch.randn(2, length, width) for _ in range(3)]
    places = torch.tensor([[4, 5, 6, 7], [3, 4, 5, 6]])
    unrolled = Unrolled(split, mixed[0], places)
    torch.testing.assert_close(unrolled.first, split.branch_of(DRAFTER, mixed[0]), atol=1e-4, rtol=1e-4)
    at = torch.arange(2)[:, None]
    for number in (1, 2):
        found = unrolled.again(mixed[number][at, places])
        for row in range(2):
            for column, place in enumerate(places[row].tolist()):
                if column < number:
                    continue
                inputs = mixed[0][row : row + 1, : place + 1].clone()
                for back in range(number):  # the last `number` positions have been made by passes 1..number
                    inputs[:, place - back] = mixed[number - back][row, place - back]
                want = split.branch_of(DRAFTER, inputs)[0, -1]
                torch.testing.assert_close(found[row, column], want, atol=1e-4, rtol=1e-4)


def test_training_teaches_the_full_models_tokens(tmp_path):
    lm, texts = model(), Data(windows(40, prompts=4), windows(40, prompts=4))
    before = copy.deepcopy(lm.model.state_dict())
    settings = config(layers=None, trainable="drafter", steps=240, learning_rate=5e-3, unroll=2)
    result = train(lm, texts, settings, tmp_path / "run", coverage=1.0)
    assert result.layers == (1, 2)
    assert result.agreement_after[0] > max(0.5, 3 * result.agreement_before[0])
    assert result.loss_after[1] < 0.7 * result.loss_before[1]
    assert len(result.in_a_row) == 2
    assert 0 < result.in_a_row[1] <= result.in_a_row[0] <= 1
    assert result.in_a_row[0] == result.agreement_after[0]
    assert "drafts of 2 tokens" in result.table()
    for name, tensor in lm.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    exits = load_exits(result.exits)
    assert (exits.layers, len(exits.drafter.branch.blocks())) == ((), 1)
    lm.attach_exits(exits)
    policy = dataclasses.replace(POLICY, vocabulary="frequent")
    ids = {"input_ids": texts.train.ids[:8, :6]}
    got = lm.generate(ids, policy=policy, max_new_tokens=NEW)
    assert got.tokens == lm.generate(ids, max_new_tokens=NEW).tokens
    assert sum(layer == DRAFTER for layers in got.exit_layers for layer in layers) > 3


def test_a_drafter_is_added_to_exits_that_stay_as_they_are(tmp_path):
    lm = model()
    exits = Exits.fresh(lm.split, (1, 3)).with_frequent(range(3, 60))
    exits.settings = {"how": "by hand"}
    with torch.no_grad():
        for parameter in exits.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    lm.attach_exits(exits)
    texts = Data(windows(12, prompts=4), windows(4, seed=1, prompts=4))
    result = train(lm, texts, config(layers=None, trainable="drafter", steps=4, blocks=2), tmp_path / "run")
    made = load_exits(result.exits)
    assert made.layers == (1, 3)
    assert made.settings["exits"] == {"how": "by hand"}
    assert made.frequent.tolist() == list(range(3, 60))
    for name, tensor in exits.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor)
    lm.attach_exits(made)
    inputs = inputs_for("llama")
    for policy in (POLICY, ExitPolicy(threshold=0.1, skipped="verify")):
        assert lm.generate(inputs, policy=policy, max_new_tokens=NEW).tokens == lm.generate(
            inputs, max_new_tokens=NEW
        ).tokens  # fmt: skip


def test_a_bfloat16_model_learns_in_its_format(tmp_path):
    """Blocks of the exits' own have float32 weights; float16 has no range for their gradients."""
    texts = Data(windows(12, prompts=4), windows(4, seed=1, prompts=4))
    for number, options in enumerate(({"layers": None, "trainable": "drafter"}, {"blocks": 1})):
        lm = LanguageModel(model().model.to(torch.bfloat16))
        result = train(lm, texts, config(steps=3, **options), tmp_path / str(number))
        assert all(torch.isfinite(p).all() for p in load_exits(result.exits).parameters())
        with pytest.raises(ValueError, match="trained on float32 or bfloat16, not torch.float16"):
            train(LanguageModel(model().model.half()), texts, config(steps=3, **options), tmp_path / "half")


def test_bench_and_evaluation_have_it_where_there_is_one():
    lm = LanguageModel(copy.deepcopy(tiny("llama")))
    assert not drafting_arms(lm)
    lm.attach_exits(drafting(lm.split))
    assert drafting_arms(lm)["drafts"].vocabulary is None
    lm.attach_exits(drafting(lm.split, frequent=range(3, 9)))
    for arms in (default_arms, document_arms):
        assert arms(lm)["drafts"] == DRAFTS
    words = dict(zip(*[iter(o.DRAFTING.replace("--", "").replace("-", "_").split())] * 2, strict=True))
    given = {name: int(value) if value.isdecimal() else value for name, value in words.items()}
    assert o.policy_from(None, **given) == DRAFTS
    result = run_bench(lm, torch.tensor([[5, 6, 7]]), {"drafts": DRAFTS}, max_new_tokens=6, repeats=1)
    assert result.arm("drafts").agreement == 1


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(tmp_path):
    texts = Data(windows(12, prompts=4), windows(4, seed=1, prompts=4))
    settings = config(layers=None, trainable="drafter", steps=9, save_every=2)
    whole = train(model(), texts, settings, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stopping(done, *_):
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        train(model(), texts, settings, tmp_path / "stopped", progress=stopping)
    again = train(model(), texts, settings, tmp_path / "stopped")
    one, other = (load_exits(result.exits).state_dict() for result in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_files_keep_a_drafter_in_bfloat16(tmp_path):
    split = SplitModel(copy.deepcopy(tiny("llama")))
    exits = drafting(split, 2, frequent=range(20))
    save_exits(exits, tmp_path / "exits")
    loaded = load_exits(tmp_path / "exits")
    assert loaded.layers == ()
    for name, tensor in exits.state_dict().items():
        kept = tensor.bfloat16().float() if tensor.is_floating_point() else tensor
        assert torch.equal(loaded.state_dict()[name], kept)
    split.exits = loaded
    assert split.branches == {DRAFTER: range(LAYERS, LAYERS + 2)}
    exits.drafter.branch = type(exits.drafter.branch)(exits.drafter.branch.blocks()[:1])
    exits.drafter.branch.blocks = lambda: [{}, {}]  # the description then speaks of two
    save_exits(exits, tmp_path / "damaged")
    with pytest.raises(ModelError, match="lacks blocks of the drafter"):
        load_exits(tmp_path / "damaged")


def test_as_made_it_says_what_the_readout_before_said():
    split = SplitModel(tiny("llama"))
    drafter = Exits(LAYERS, 32, (), drafter=1).with_drafter(split, 1).drafter
    assert isinstance(drafter, Drafter)
    before = torch.randn(2, 3, 32)
    mixed = drafter(torch.randn(2, 3, 32), before)
    torch.testing.assert_close(mixed, before / before.pow(2).mean(-1, keepdim=True).sqrt(), atol=1e-5, rtol=1e-4)


def test_what_it_costs():
    """Both engines count the same, and the pace of drafts the same weights."""
    found = []
    for engine in ("torch", "native"):
        lm = LanguageModel(copy.deepcopy(tiny("llama")), engine=engine)
        lm.attach_exits(drafting(lm.split, frequent=range(3, 20)))
        policy = dataclasses.replace(POLICY, vocabulary="frequent")
        for kind, rows in (("static", 2), ("static", 1), ("max", 1)):
            policy = dataclasses.replace(policy, confidence=kind, threshold=0.02)
            costs = lm.generate(inputs_for("llama", rows, padded=rows > 1), policy=policy, max_new_tokens=NEW).costs
            found.append((costs.flops, costs.bytes, costs.tests, costs.draft_flops))
    assert [flops for flops, *_ in found[:3]] == [flops for flops, *_ in found[3:]]
    assert [rest[1:] for _, *rest in found[:3]] == [rest[1:] for _, *rest in found[3:]]
    shape = lm.split.shape
    own = shape.blocks[-1].weights + 3 * shape.width**2
    pace = Pace.of(resolve(POLICIES["adaptive"], LAYERS, VOCABULARY), shape)
    full = sum(block.weights for block in shape.blocks) + shape.readout_weights()
    assert pace.spent == {DRAFTER: pytest.approx((own + shape.readout_weights()) / full)}


def test_what_is_refused(tmp_path):
    for options, words in (
        ({"min_layer": 0}, "what it drafts must be checked, but skipped is 'propagate'"),
        ({"min_layer": 0, "skipped": "verify", "exit_layers": (0, 2)}, "no other exits beside it"),
        ({"exit_layers": (0,), "skipped": "verify", "confidence": "jsd"}, "cannot judge its drafts"),
    ):
        with pytest.raises(ValueError, match=words):
            ExitPolicy(**options)
    lm = LanguageModel(tiny("llama"))
    with pytest.raises(ValueError, match="have no drafter; train one"):
        lm.generate(inputs_for("llama"), policy=POLICY, max_new_tokens=4)
    with pytest.raises(ValueError, match="no drafters for encoder-decoders"):
        train(model("t5"), data("t5"), config(layers=None, trainable="drafter"), tmp_path)
    for name, value in (("rank", 2), ("objective", "labels"), ("weights", "layer")):
        with pytest.raises(ValueError, match=f"{name} is .* a drafter does not use"):
            config(**{"layers": None, "trainable": "drafter", name: value})
    assert ExitPolicy.from_dict(POLICY.to_dict()) == POLICY


def test_inside_the_models_own_generate():
    own = copy.deepcopy(tiny("llama"))
    exits = drafting(SplitModel(own), frequent=likely("llama", inputs_for("llama", 2, padded=True)))
    inputs = inputs_for("llama", 2, padded=True)
    policy = dataclasses.replace(POLICY, vocabulary="frequent")
    got = own.generate(**inputs, max_new_tokens=NEW, do_sample=False, custom_generate=policy.custom_generate(exits))
    assert got.tolist() == own.generate(**inputs, max_new_tokens=NEW, do_sample=False).tolist()


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_a_draft_that_ends_the_text_is_checked_and_ends_it(engine):
    """An end that is drafted, and a limit in the middle of drafts, for each number of tokens."""
    lm = LanguageModel(copy.deepcopy(tiny("llama")), engine=engine)
    inputs = inputs_for("llama")
    free = lm.generate(inputs, max_new_tokens=NEW, eos_token_id=None).tokens[0]
    lm.attach_exits(drafting(lm.split, frequent=sorted(set(free))))
    policy = dataclasses.replace(POLICY, vocabulary="frequent", draft_length=4)
    for end in sorted(set(free)):
        for new in range(1, NEW + 1):
            want = lm.generate(inputs, max_new_tokens=new, eos_token_id=end).tokens
            assert lm.generate(inputs, policy=policy, max_new_tokens=new, eos_token_id=end).tokens == want
