"""Drafts that stand as the full model's second choice, against the rule written down with transformers alone."""

import copy

import pytest
import torch

from offramp import ExitPolicy, LanguageModel
from tiny import greedy, inputs_for, tiny

NEW, EXIT, LENGTH = 16, 3, 3


@torch.no_grad()
def by_the_rule(model, ids, accept, threshold):
    """Tokens, and how many of them are second choices."""
    ids, seconds, pending = ids.clone(), 0, LENGTH  # the prompt's own token is not drafted
    for _ in range(NEW):
        out = model(ids, output_hidden_states=True)
        logits = out.logits[0, -1].double()
        best, second = logits.topk(2).indices.tolist()
        norm = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
        draft = model.lm_head(norm(out.hidden_states[EXIT][0, -1])).double()
        p = draft.softmax(-1).topk(2).values
        share = float((logits[second] - logits[best]).exp())
        assert abs(share - accept) > 1e-5
        drafted = pending < LENGTH and float(p[0] - p[1]) > threshold
        stands = drafted and int(draft.argmax()) == second and share >= accept
        pending = pending + 1 if drafted and (stands or int(draft.argmax()) == best) else 0
        seconds += stands
        ids = torch.cat([ids, torch.tensor([[second if stands else best]])], dim=1)
    return ids, seconds


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("penalty", [None, 1.000001])  # with a processor, scores are made
def test_the_second_choice_stands_with_its_share(name, engine, penalty):
    lm, found = LanguageModel(copy.deepcopy(tiny(name)), engine=engine), 0
    extra = {} if penalty is None else {"repetition_penalty": penalty}
    for seed in range(6):
        ids = inputs_for(name, seed=seed)["input_ids"]
        for accept, threshold in ((0.5, 0.0), (0.8, 0.0), (0.5, 0.03), (1.0, 0.0)):
            want, seconds = by_the_rule(tiny(name), ids, accept, threshold)
            policy = ExitPolicy(
                threshold=threshold, exit_layers=(EXIT,), skipped="verify", accept=accept, draft_length=LENGTH
            )  # fmt: skip
            got = lm.generate({"input_ids": ids}, policy=policy, max_new_tokens=NEW, eos_token_id=None, **extra)
            assert got.sequences.tolist() == want.tolist()
            found += seconds
    assert found > 0


def test_one_is_lossless_and_less_is_not_called_so():
    inputs, lm = inputs_for("llama", 3, padded=True), LanguageModel(tiny("llama"))
    policy = ExitPolicy(threshold=0.0, min_layer=1, skipped="verify")
    assert lm.generate(inputs, policy=policy, max_new_tokens=NEW).sequences.tolist() == greedy(
        tiny("llama"), inputs, NEW
    ).tolist()  # fmt: skip
    assert policy.is_lossless
    assert not ExitPolicy(threshold=0.0, min_layer=1, skipped="verify", accept=0.9).is_lossless
    assert not ExitPolicy(threshold=0.0, min_layer=1).is_lossless


def test_what_is_refused():
    for value in (0, -0.5, 1.5, float("nan"), "0.5"):
        with pytest.raises(ValueError, match="accept"):
            ExitPolicy(skipped="verify", accept=value)
    with pytest.raises(ValueError, match=r"accept=0.5 needs skipped='verify'"):
        ExitPolicy(accept=0.5)
    policy = ExitPolicy(threshold=0.0, min_layer=1, skipped="verify", accept=0.5)
    with pytest.raises(ValueError, match="for best tokens, but tokens are drawn"):
        LanguageModel(tiny("llama")).generate(inputs_for("llama"), policy=policy, max_new_tokens=4, temperature=0.9)
    assert ExitPolicy.from_dict(policy.to_dict()) == policy
    old = {name: value for name, value in policy.to_dict().items() if name != "accept"}
    assert ExitPolicy.from_dict(old).accept == 1
