"""The CUDA engine gives torch's tokens and layers, and its segments wait for nothing; on a CPU none is captured."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offramp import ExitPolicy, LanguageModel
from offramp.core.decoding import batch_of, decode
from offramp.core.running import RunningBatch
from offramp.core.sampling import Sampler
from offramp.cuda.model import FAMILIES, CudaError, CudaModel
from offramp.cuda.segment import Ahead, Launch
from offramp.families import SplitModel
from offramp.families.state import Frame, State
from offramp.lm.scripted import Script, Scripted
from test_running import EOS, requests, served
from tiny import VOCABULARY, inputs_for, tiny

NAMES = (
    "gemma",
    "gemma2",
    "gemma3",
    "granite",
    "llama",
    "llama-3",
    "mistral",
    "mt5",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "t5",
    "t5-v1.1",
)
POLICIES = {
    "full": None,
    "static": ExitPolicy(confidence="static", min_layer=2),
    "propagate": ExitPolicy(confidence="max", threshold=0.25, min_layer=1, skipped="propagate"),
    "defer": ExitPolicy(confidence="max", threshold=0.25, min_layer=1, skipped="defer"),
    "verify": ExitPolicy(confidence="max", threshold=0.25, min_layer=1, skipped="verify"),
}


SCRIPT = Script((1, 3, 2, 4, 4, 2, 1, 3, 3, 1, 4, 2, 2, 2, 1), tokens=5)


def policy_of(name, kind):
    """One under which rows leave after different layers.

    Soft-capped logits make no high probabilities; rows of a small T5 are all as sure, and leave as a script has it.
    """
    policy = POLICIES[kind]
    if name in ("mt5", "t5", "t5-v1.1") and policy is not None and policy.confidence == "max":
        return replace(policy, confidence=Scripted(SCRIPT), threshold=0.5)
    capped = name in ("gemma2", "gemma3") and policy is not None and policy.confidence == "max"
    return replace(policy, threshold=0.12) if capped else policy


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def device(request):
    return torch.device(request.param)


def placed(name, device):
    return tiny(name) if device.type == "cpu" else copy.deepcopy(tiny(name)).to(device)


@torch.no_grad()
def decoded(split, inputs, policy, new=12):
    ids, mask = inputs["input_ids"].to(split.device), inputs["attention_mask"].to(split.device)
    heard = {"mask": mask}
    if split.is_encoder_decoder:
        heard = {"memory": split.encode(ids, mask), "memory_mask": mask}
        ids = torch.full_like(ids[:, :1], split.model.config.decoder_start_token_id)
    steps = list(decode(split, ids, policy, max_new_tokens=new, **heard))
    return [[step.token.tolist(), step.exit_layer.tolist()] for step in steps]


def test_the_names_are_all_that_it_says_it_runs():
    assert {tiny(name).config.model_type for name in NAMES} == set(FAMILIES)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_layers_are_those_of_torch(name, policy, device):
    model, split = CudaModel(placed(name, device)), SplitModel(placed(name, device))
    for batch, padded in ((1, False), (4, False), (4, True)):
        inputs = inputs_for(name, batch, padded=padded)
        assert decoded(model, inputs, policy_of(name, policy)) == decoded(split, inputs, policy_of(name, policy))
    assert sum(memory.launched for memory in model.memories) > 0


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_leave_after_different_layers(name, device):
    steps = decoded(CudaModel(placed(name, device)), inputs_for(name, 4), policy_of(name, "propagate"))
    assert any(len(set(layers)) > 1 for _, layers in steps[1:])


def alone(split, policy, asked):
    ids = torch.tensor([list(asked.ids)], device=split.device)
    steps = decode(split, ids, policy, max_new_tokens=asked.max_new_tokens, sampler=asked.sampler)
    return [(int(step.token[0]), int(step.exit_layer[0])) for step in steps]


@pytest.mark.parametrize("policy", ["full", "propagate", "defer", "verify"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rows_that_join_and_leave_get_the_tokens_that_torch_gives_them_alone(name, policy, device):
    model, split, asked = CudaModel(placed(name, device)), SplitModel(placed(name, device)), requests(8, VOCABULARY)
    batch = RunningBatch(model, policy_of(name, policy), rows=3, longest=40, chunk=6, eos=(EOS,))
    with torch.no_grad():
        made, expected = served(batch, asked), [alone(split, policy_of(name, policy), one) for one in asked]
    if policy == "verify":  # which layer drafted depends on how many rows there are, the text does not
        made, expected = ([[token for token, _ in row] for row in rows] for rows in (made, expected))
    assert made == expected
    assert sum(memory.launched for memory in model.memories) > 0


@pytest.mark.parametrize("policy", ["full", "propagate", "defer"])
def test_capacity_grows_and_what_was_captured_is_captured_anew(policy, device):
    model, split, inputs = (
        CudaModel(placed("llama", device)),
        SplitModel(placed("llama", device)),
        inputs_for("llama", 2),
    )
    assert decoded(model, inputs, POLICIES[policy], new=140) == decoded(split, inputs, POLICIES[policy], new=140)
    (memory,) = model.memories
    assert memory.capacity == 256
    assert model.memories[0].valid.shape[1] == 256


def test_a_second_generation_uses_the_memory_and_the_segments_of_the_first(device):
    model, inputs = CudaModel(placed("qwen3", device)), inputs_for("qwen3", 4, padded=True)
    first = decoded(model, inputs, None)
    (memory,) = model.memories
    captured = memory.captured
    assert decoded(model, inputs, None) == first
    assert model.memories == [memory]
    assert memory.captured == captured == 1
    assert memory.launched == 2 * 11  # one launch a token, but for the prompt's


@pytest.mark.parametrize("policy", POLICIES)
def test_an_input_of_another_length_is_heard_whole(policy, device):
    model, split = CudaModel(placed("t5", device)), SplitModel(placed("t5", device))
    for length in (9, 4, 150, 9):  # beyond 128 tokens buffers move
        inputs = inputs_for("t5", 2, length=length, padded=True, seed=length)
        assert decoded(model, inputs, policy_of("t5", policy)) == decoded(split, inputs, policy_of("t5", policy))
    (memory,) = model.memories
    assert memory.heard.capacity == 256
    assert memory.launched > 0


def test_two_batches_at_once_do_not_share_memory(device):
    model, inputs = CudaModel(placed("llama", device)), inputs_for("llama", 2)
    ids = inputs["input_ids"].to(device)
    with torch.no_grad():
        alone = [step.token.tolist() for step in decode(model, ids, None, max_new_tokens=8)]
        both = [decode(model, ids, None, max_new_tokens=8) for _ in range(2)]
        pairs = [(a.token.tolist(), b.token.tolist()) for a, b in zip(*both, strict=True)]
    assert pairs == [(token, token) for token in alone]
    assert len(model.memories) == 2


def test_what_a_broken_generation_left_does_not_reach_the_next(device):
    model, inputs = CudaModel(placed("llama", device)), inputs_for("llama", 2)
    first = decoded(model, inputs, None)
    for layer in model.memories[0].layers:
        layer._keys.fill_(torch.nan)
        layer._values.fill_(torch.nan)
    assert decoded(model, inputs, None) == first


class Waits(AssertionError):
    pass


class NothingWaits(TorchDispatchMode):
    """Refuses what would wait for the device, or read the host's memory, in a capture."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh", "_unique2", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        chosen = args[1] if func.overloadpacket.__name__ in ("index", "index_put", "index_put_") else ()
        if func.overloadpacket.__name__ in self.names or any(i is not None and i.dtype == torch.bool for i in chosen):
            raise Waits(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_a_segment_waits_for_nothing(name, device, monkeypatch):
    model, inputs, through, passed = (
        CudaModel(placed(name, device)),
        inputs_for(name, 4, padded=True),
        CudaModel._through,
        [],
    )

    def watched(*args):
        with NothingWaits():
            passed.append(1)
            return through(*args)

    monkeypatch.setattr(CudaModel, "_through", watched)
    decoded(model, inputs, POLICIES["propagate"])
    assert passed


@pytest.mark.parametrize(
    "asks", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: bool(x.any()), lambda x: x[x > 0]]
)
def test_what_waits_would_be_found(asks):
    with pytest.raises(Waits), NothingWaits():
        asks(torch.ones(3))


def test_rows_that_a_segment_does_not_concern_keep_their_keys_and_values(device):
    model = CudaModel(placed("llama", device))
    ids = torch.randint(3, VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        state = model.start(ids)
        model.run(state, 0, model.num_layers)
        memory = model.memory_of(state.context)
        before = [(layer._keys.clone(), layer._values.clone()) for layer in memory.layers]
        rows = torch.tensor([0, 2], device=device)
        after = model.run(model.start(ids[rows, :1], context=state.context, rows=rows), 0, model.num_layers)
    assert after.hidden.shape == (2, 1, 32)
    for layer, (keys, values) in zip(memory.layers, before, strict=True):
        assert torch.equal(layer._keys[1, :, :-1], keys[1, :, :-1])
        assert torch.equal(layer._values[1, :, :-1], values[1, :, :-1])
        assert not torch.equal(layer._keys[0, :, 5], keys[0, :, 5])


def test_what_it_cannot_run_is_said(device):
    for name in ("bart", "mixtral", "gpt2"):
        with pytest.raises(CudaError, match="are not among gemma, .*use engine='torch'"):
            CudaModel(placed(name, device))
    hooked = copy.deepcopy(placed("llama", device))
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(CudaError, match="hooks"):
        CudaModel(hooked)


def test_hooks_by_which_transformers_collects_states_are_let_pass(device):
    model = copy.deepcopy(placed("llama", device))
    with torch.no_grad():
        model(torch.tensor([[5, 6]], device=device), output_hidden_states=True)  # they stay behind
    assert any(block._forward_hooks for block in model.model.layers)
    assert CudaModel(model).is_current


def test_it_knows_when_weights_have_moved(device):
    model = copy.deepcopy(placed("llama", device))
    made = CudaModel(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert made.is_current
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(model.model.layers[0].mlp.up_proj.weight.clone())
    assert not made.is_current


def test_asked_for_without_a_gpu():
    with pytest.raises(CudaError, match=r"engine is 'cuda', but the model is on cpu; load it with device='cuda' on a"):
        LanguageModel(tiny("llama"), engine="cuda")
    with pytest.raises(ValueError, match="int8 is not available with engine='cuda'"):
        LanguageModel(tiny("llama"), engine="cuda", rounded="int8")


# ---------------------------------------------------------------- segments that run ahead of an answer


def counts(model):
    """Launches, those ahead of being asked for, and those of them that were used."""
    found = [(memory.launched, memory.ahead.launched, memory.ahead.used) for memory in model.memories]
    return [sum(numbers) for numbers in zip(*found, strict=True)]


@pytest.mark.parametrize("policy", ["propagate", "defer", "verify"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_segments_that_run_ahead_change_no_token_and_no_layer(name, batch, policy, device):
    inputs, policy = inputs_for(name, batch, padded=batch > 1), policy_of(name, policy)
    model, other = CudaModel(placed(name, device)), CudaModel(placed(name, device), ahead=False)
    expected = decoded(SplitModel(placed(name, device)), inputs, policy, new=40)
    assert decoded(model, inputs, policy, new=40) == decoded(other, inputs, policy, new=40) == expected
    launched, ahead, used = counts(model)
    needed, never, _ = counts(other)
    assert never == 0
    assert launched == needed + ahead - used


def in_turn(model, policy, answers, new):
    """One row whose tests answer in turn: its tokens, their layers, and the keys of all layers."""
    ids, given = inputs_for("llama")["input_ids"].to(model.device), iter(answers)

    class Turn:
        restricts = False

        def __call__(self, reading):
            return reading.hidden.new_full((1,), next(given), dtype=torch.float32)

        def select(self, rows):
            pass

    batch = batch_of(model, ids, policy, Sampler(), new)
    batch.measure = SimpleNamespace(begin=Turn)
    steps = [batch.settle(batch.first())]
    while batch.rows:
        steps.append(batch.settle(batch.read()))
    slots = batch.lengths[0] - 1
    found = [layer._keys[:, :, :slots] for layer in batch.context.cache.layers]
    return [int(s.token[0]) for s in steps], [int(s.exit_layer[0]) for s in steps], found


@torch.no_grad()
@pytest.mark.parametrize("way", ["propagate", "defer"])
def test_what_runs_ahead_is_used_after_a_token_that_went_on_and_only_then(way, device):
    """One test per token, after layer 2: stays, stays, leaves, stays, stays, stays; the last one shows all keys."""
    policy = ExitPolicy(threshold=0.5, exit_layers=(2,), min_layer=2, skipped=way)
    answers = [0, 0, 1, 0, 0, 0]
    model, split = CudaModel(placed("llama", device)), SplitModel(placed("llama", device))
    tokens, layers, keys = in_turn(model, policy, answers, 7)
    assert layers == [4, 4, 4, 2, 4, 4, 4]
    # the second token's (used), the third's (it left), none for the fourth; for the fifth and the sixth (used): where
    # the fourth took two positions through layers 3 and 4 together, as "defer" does, that was no launch to learn from
    ahead = {"propagate": [2 + 2, 3], "defer": [2 + 1, 2]}[way]
    assert counts(model)[1:] == ahead
    expected = in_turn(split, policy, answers, 7)
    assert (tokens, layers) == expected[:2]
    for mine, theirs in zip(keys, expected[2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_keys_and_values_that_come_in_between_spoil_what_ran_ahead():
    ahead, context = Ahead(), None
    launch = Launch(2, [slice(0, 1)], 1, torch.zeros(1, 1, 4))
    state = State(context, Frame(slice(0, 1), 5, 1), torch.zeros(1, 1, 4), 2, origin=launch)
    ahead.last = launch
    assert ahead.next() is None  # nothing is known yet
    assert ahead.take([state], 4) is None
    assert ahead.next() == (2, 4)
    launch.ahead = Launch(4, [], 0, torch.zeros(1, 1, 4))
    assert ahead.next() is None  # it runs already
    assert ahead.take([state], 3) is None  # another segment was meant
    assert ahead.take([replace(state, origin=None)], 4) is None  # of other states
    assert ahead.take([state], 4) is launch.ahead
    ahead.spoil()
    assert ahead.take([state], 4) is None
    assert (ahead.launched, ahead.used) == (0, 1)
