"""The generation loop: control flow on scripted logits, everything else against `transformers` or a simulation."""

import math

import pytest
import torch
from transformers import LogitsProcessorList, NoBadWordsLogitsProcessor

from offramp import Contrast, ExitPolicy, LanguageModel
from offramp.core.decoding import decode
from offramp.core.sampling import Sampler
from scripted import ScriptedModel
from tiny import LAYERS, VOCABULARY, greedy, inputs_for, tiny

V, EOS = 5, 4
PROMPT = torch.tensor([[1, 1, 1]])


def sure(token):
    return [9.0 if v == token else 0.0 for v in range(V)]


def unsure(token):
    return [0.1 if v == token else 0.0 for v in range(V)]


def run(model, policy, n, ids=PROMPT, **choosing):
    return list(decode(model, ids, policy, max_new_tokens=n, sampler=Sampler(**choosing)))


def ran(model, position):
    """Layers that ran for the step predicting output token `position`."""
    return [layer for layer, _, positions in model.calls if position in positions]


# ---------------------------------------------------------------- who leaves when


def test_exits_alternate_and_skipped_layers_do_not_run():
    script = [
        [sure(0)] * 3,
        [sure(1), unsure(2), unsure(2)],
        [unsure(2), unsure(2), sure(3)],
        [unsure(1), sure(2), sure(0)],
    ]
    model = ScriptedModel(script)
    steps = run(model, ExitPolicy(threshold=0.9, min_layer=1), 4)
    assert [s.token.item() for s in steps] == [0, 1, 3, 2]
    assert [s.exit_layer.item() for s in steps] == [3, 1, 3, 2]
    assert [s.prefill for s in steps] == [True, False, False, False]
    assert [ran(model, t) for t in range(4)] == [[1, 2, 3], [1], [1, 2, 3], [1, 2]]
    assert model.filled == [(2, [1]), (3, [1])]  # token 1's layers 2 and 3, when token 2 visits them


def test_layers_nobody_visits_again_are_never_filled():
    model = ScriptedModel([[sure(0)] * 3] * 4)
    run(model, ExitPolicy(threshold=0.9, min_layer=1), 4)
    assert model.filled == []


def test_the_test_is_strict_and_nan_never_exits():
    model = ScriptedModel([[sure(0)] * 3] * 3)
    for value, expected in [(0.9, 3), (math.nextafter(0.9, 1), 1), (math.nan, 3), (math.inf, 1), (-math.inf, 3)]:
        policy = ExitPolicy(lambda r, value=value: torch.full((len(r.hidden),), value, dtype=torch.float64), 0.9, 1)
        assert run(model, policy, 3)[1].exit_layer.item() == expected
    nan = ScriptedModel([[sure(0)] * 3, [[math.nan] * V, sure(1), sure(1)]])
    assert run(nan, ExitPolicy(threshold=-math.inf, min_layer=1), 2)[1].exit_layer.item() == 2
    infinite = ScriptedModel([[sure(0)] * 3, [[math.inf, 0, 0, 0, 0], sure(1), sure(1)]])
    assert run(infinite, ExitPolicy(threshold=0.1, min_layer=1), 2)[1].exit_layer.item() == 2


def test_thresholds_by_exit_and_chosen_exits():
    model = ScriptedModel([[sure(0)] * 5] * 3)
    assert run(model, ExitPolicy(threshold=(1.0, 0.9, 0.9, 0.9), min_layer=1), 2)[1].exit_layer.item() == 2
    assert run(model, ExitPolicy(threshold=0.9, min_layer=1, exit_layers=(3,)), 2)[1].exit_layer.item() == 3


def test_a_decaying_threshold_lets_later_tokens_leave():
    gap = [2.0, 0, 0, 0, 0]
    model = ScriptedModel([[gap] * 3] * 8)
    p = torch.tensor(gap).softmax(-1)
    tau = float(p[0] - p[1]) + 0.01
    constant = run(model, ExitPolicy(threshold=tau, min_layer=1), 8)
    falling = run(model, ExitPolicy(threshold=tau, min_layer=1, decay="multiplicative"), 8)
    assert [s.exit_layer.item() for s in constant] == [3] * 8
    expected = [0.9 * tau + 0.1 * tau * math.exp(-4 * t / 8) < tau - 0.01 for t in range(8)]
    assert [s.exit_layer.item() == 1 for s in falling[1:]] == expected[1:]


def test_rows_leave_at_their_own_layers_and_deep_layers_run_the_others_only():
    a = [[sure(0)] * 3, [sure(1)] * 3, [sure(1)] * 3]
    b = [[sure(0)] * 3, [unsure(1), unsure(1), sure(2)], [unsure(1), sure(3), sure(2)]]
    model = ScriptedModel([a, b, a])
    steps = run(model, ExitPolicy(threshold=0.9, min_layer=1), 3, PROMPT.expand(3, 3))
    assert [s.exit_layer.tolist() for s in steps] == [[3, 3, 3], [1, 3, 1], [1, 2, 1]]
    assert [s.token.tolist() for s in steps] == [[0, 0, 0], [1, 2, 1], [1, 3, 1]]
    assert [rows for _, rows, positions in model.calls if positions == [1]] == [[0, 1, 2], [1], [1]]
    together = run(
        ScriptedModel([a, b, a]), ExitPolicy(threshold=0.9, min_layer=1, batch="all"), 3, PROMPT.expand(3, 3)
    )
    assert [s.exit_layer.tolist() for s in together] == [[3, 3, 3], [3, 3, 3], [2, 2, 2]]


def test_finished_rows_are_padded_and_cost_no_depth():
    a = [[sure(0)] * 3, [sure(EOS)] * 3, [unsure(1)] * 3]
    b = [[sure(0)] * 3, [sure(1)] * 3, [sure(2)] * 3]
    model = ScriptedModel([a, b])
    steps = run(model, ExitPolicy(threshold=0.9, min_layer=1), 4, PROMPT.expand(2, 3), eos=(EOS,), pad=3)
    assert [s.token.tolist() for s in steps] == [[0, 0], [EOS, 1], [3, 2], [3, 2]]
    assert [s.active.tolist() for s in steps] == [[True, True], [True, True], [False, True], [False, True]]
    assert [s.exit_layer.tolist() for s in steps] == [[3, 3], [1, 1], [0, 1], [0, 1]]
    assert [rows for _, rows, positions in model.calls if positions == [2]] == [[1]]


def test_generation_ends_with_the_last_row():
    model = ScriptedModel([[sure(0)] * 3, [sure(EOS)] * 3])
    assert len(run(model, None, 9, eos=(EOS,))) == 2
    assert len(run(model, None, 9, stopping=lambda ids: ids[:, -1] == 0)) == 1


# ---------------------------------------------------------------- defer and verify


def test_deferred_positions_go_deep_together():
    script = [[sure(0)] * 3, [sure(1)] * 3, [unsure(1), sure(2), sure(2)], [unsure(1), unsure(1), sure(3)]]
    model = ScriptedModel(script)
    steps = run(model, ExitPolicy(threshold=0.9, min_layer=1, skipped="defer"), 4)
    assert [s.exit_layer.item() for s in steps] == [3, 1, 2, 3]
    deep = [(layer, positions) for layer, _, positions in model.calls if positions[-1] > 0]
    assert deep == [(1, [1]), (1, [2]), (2, [1, 2]), (1, [3]), (2, [3]), (3, [1, 2, 3])]


def test_each_row_goes_deep_with_its_own_tokens_alone():
    """The second row never leaves; the first waits until its last token goes deep and takes the others along."""
    leaves, stays = [sure(0), sure(0)], [unsure(0), sure(0)]
    script = [[[sure(0)] * 2, leaves, leaves, stays], [[sure(0)] * 2, stays, stays, stays]]
    model = ScriptedModel(script)
    ids = torch.ones(2, 3, dtype=torch.long)
    steps = run(model, ExitPolicy(threshold=0.9, min_layer=1, skipped="defer"), 4, ids)
    assert [step.exit_layer.tolist() for step in steps] == [[2, 2], [1, 2], [1, 2], [2, 2]]
    deep = [(rows, positions) for layer, rows, positions in model.calls if layer == 2]
    assert deep[1:] == [([1], [1]), ([1], [2]), ([0], [1, 2, 3]), ([1], [3])]


def test_rows_whose_drafts_are_right_run_ahead():
    """The first row is right for four tokens and asks twice; the second is always wrong, and asks each time."""
    right, wrong = [sure(0), sure(0)], [sure(0), sure(1)]
    script = [[[sure(0)] * 2, *[right] * 4], [[sure(0)] * 2, *[wrong] * 4]]
    model = ScriptedModel(script)
    ids = torch.ones(2, 3, dtype=torch.long)
    policy = ExitPolicy(threshold=0.9, min_layer=1, skipped="verify", draft_length=2)
    steps = run(model, policy, 5, ids)
    assert [step.token.tolist() for step in steps] == [[0, 0], *[[0, 1]] * 4]
    assert [step.exit_layer.tolist() for step in steps] == [[2, 2], [1, 2], [1, 2], [2, 2], [1, 2]]
    deep = [(rows, positions) for layer, rows, positions in model.calls if layer == 2][1:]
    assert [positions for rows, positions in deep if 0 in rows] == [[1, 2, 3], [4]]
    assert [positions for rows, positions in deep if 1 in rows] == [[1, 2, 3], [2, 3, 4], [3, 4], [4]]


def test_verify_accepts_corrects_and_takes_back():
    agree, wrong = [sure(1)] * 3, [sure(1), sure(1), sure(2)]
    model = ScriptedModel([[sure(0)] * 3, agree, wrong, agree, agree])
    policy = ExitPolicy(threshold=0.9, min_layer=1, skipped="verify", draft_length=3)
    steps = run(model, policy, 5)
    assert [s.token.item() for s in steps] == [0, 1, 2, 1, 1]
    assert [s.exit_layer.item() for s in steps] == [3, 1, 3, 1, 1]
    deep = [positions for layer, _, positions in model.calls if layer == 3]
    assert deep == [[-2, -1, 0], [1, 2, 3, 4], [3, 4]]  # position 3 was drafted behind the error, and again


def test_verify_yields_nothing_uncertain():
    model = ScriptedModel([[sure(0)] * 3] + [[sure(1), sure(1), sure(2)]] * 4)
    stream = decode(model, PROMPT, ExitPolicy(threshold=0.9, min_layer=1, skipped="verify"), max_new_tokens=5)
    next(stream)
    assert next(stream).token.item() == 2  # never the drafted 1
    assert max(layer for layer, _, _ in model.calls) == 3


def test_a_drafted_end_is_checked_before_it_ends():
    script = [[sure(0)] * 3, [sure(EOS), sure(EOS), sure(1)], [sure(EOS)] * 3]
    model = ScriptedModel(script)
    steps = run(model, ExitPolicy(threshold=0.9, min_layer=1, skipped="verify"), 9, eos=(EOS,))
    assert [s.token.item() for s in steps] == [0, 1, EOS]
    assert [s.exit_layer.item() for s in steps] == [3, 3, 1]


def test_verify_stops_at_the_length_with_all_drafts_checked():
    model = ScriptedModel([[sure(0)] * 3] * 2 + [[sure(1), sure(1), sure(2)]] * 9)
    for n in range(1, 7):
        steps = run(model, ExitPolicy(threshold=0.9, min_layer=1, skipped="verify", draft_length=4), n)
        assert [s.token.item() for s in steps] == ([0, 0] + [2] * 9)[:n]


@pytest.mark.parametrize("draft_length", [1, 2, 8])
@pytest.mark.parametrize("kind", [None, "fixed", "decaying", "adaptive"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "t5", "whisper"])
def test_verify_is_lossless_with_processors(name, kind, draft_length):
    """The repetition rules read the drafted prefix; the result must still be plain greedy's."""
    options = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 6}
    policy = ExitPolicy(threshold=0.1, min_layer=1, vocabulary=kind, skipped="verify", draft_length=draft_length)
    inputs = inputs_for(name, 3, padded=True)
    out = LanguageModel(tiny(name)).generate(inputs, policy=policy, max_new_tokens=16, **options)
    assert out.sequences.tolist() == greedy(tiny(name), inputs, 16, **options).tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_a_static_exit_that_is_verified_drafts_every_token(name):
    inputs = inputs_for(name, 2, padded=True)
    policy = ExitPolicy("static", min_layer=2, skipped="verify", draft_length=3)
    out = LanguageModel(tiny(name)).generate(inputs, policy=policy, max_new_tokens=12)
    assert out.sequences.tolist() == greedy(tiny(name), inputs, 12).tolist()
    assert {layer for row in out.exit_layers for layer in row} <= {2, LAYERS}


def total_variation_bound(n, cells, failure):
    """Distance an empirical distribution of n draws exceeds with probability at most `failure` (Weissman, 2003)."""
    return math.sqrt(2 / n * (cells * math.log(2) - math.log(failure))) / 2


def test_verify_samples_from_the_full_model():
    """Two sampled tokens against the product of the full model's distributions; fails by chance 1 time in 10^6."""
    torch.manual_seed(0)
    full, early = torch.randn(3, 4) * 1.5, torch.randn(3, 4) * 1.5
    model = ScriptedModel(torch.stack([early, early, full], dim=1))  # [T, L, V]
    policy = ExitPolicy(threshold=-math.inf, min_layer=1, skipped="verify")
    p = full.softmax(-1)
    expected = (p[1][:, None] * p[2]).flatten()
    n, counts = 1500, torch.zeros(16)
    choosing = Sampler(sample=True, generator=torch.Generator().manual_seed(1))
    ids = torch.ones(2, 3, dtype=torch.long)  # two rows: drafts of both must be judged alone
    for _ in range(n):
        _, a, b = (s.token for s in decode(model, ids, policy, max_new_tokens=3, sampler=choosing))
        counts += torch.bincount(a * 4 + b, minlength=16)
    distance = (counts / counts.sum() - expected).abs().sum() / 2
    assert distance < total_variation_bound(2 * n, 16, 1e-6)
    assert (
        total_variation_bound(2 * n, 16, 1e-6) < 0.5 * (early[1].softmax(-1) - p[1]).abs().sum() / 2
    )  # the test can fail


# ---------------------------------------------------------------- sampling and processors


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8, "repetition_penalty": 1.3}])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_sampling_draws_as_transformers_does(name, options):
    inputs = inputs_for(name, 3, padded=True)
    torch.manual_seed(7)
    expected = greedy(tiny(name), inputs, 10, **{**options, "do_sample": True})
    torch.manual_seed(7)
    out = LanguageModel(tiny(name)).generate(inputs, policy=ExitPolicy(threshold=1.0), max_new_tokens=10, **options)
    assert out.sequences.tolist() == expected.tolist()


def test_a_seed_repeats_a_sample():
    lm, inputs = LanguageModel(tiny("llama")), inputs_for("llama")
    policy = ExitPolicy(threshold=0.2, min_layer=1, vocabulary="fixed", vocabulary_size=30)
    a, b, c = (lm.generate(inputs, policy=policy, max_new_tokens=12, top_p=0.9, seed=seed).tokens for seed in (1, 1, 2))
    assert a == b
    assert a != c


@pytest.mark.parametrize("name", ["llama", "bart", "whisper"])
def test_length_limits_hold_with_exits(name):
    lm, inputs = LanguageModel(tiny(name)), inputs_for(name, 3)
    policy = ExitPolicy(threshold=-math.inf, min_layer=1, vocabulary="adaptive", vocabulary_size=4)
    out = lm.generate(inputs, policy=policy, max_new_tokens=20, min_new_tokens=20)
    assert [len(row) for row in out.tokens] == [20] * 3
    eos = tiny(name).generation_config.eos_token_id
    assert all(eos not in row[:-1] for row in out.tokens)


def test_a_forced_token_survives_pruning():
    """BART forces its end token at the length limit, whatever two tokens were kept."""
    lm, inputs = LanguageModel(tiny("bart")), inputs_for("bart", 3)
    policy = ExitPolicy(threshold=-math.inf, min_layer=1, exit_layers=(1, 3), vocabulary="fixed", vocabulary_size=2)
    out = lm.generate(inputs, policy=policy, max_new_tokens=9, min_new_tokens=8)
    assert [row[-1] for row in out.tokens] == [tiny("bart").config.eos_token_id] * 3


def test_where_processors_leave_no_kept_token_the_full_vocabulary_is_read():
    first, second = [0.0, 3.0, 2.9, 1.0, 0.5], [5.0, 0.2, 0.1, 4.0, 0.0]
    model = ScriptedModel([[sure(0)] * 3, [first, second, sure(3)]])
    policy = ExitPolicy(threshold=(1.0, -math.inf), min_layer=1, vocabulary="fixed", vocabulary_size=2)
    assert run(model, policy, 2)[1].token.item() == 1  # of the kept 1 and 2
    forbid = LogitsProcessorList([NoBadWordsLogitsProcessor([[1], [2]], eos_token_id=EOS)])
    assert run(model, policy, 2, processors=forbid)[1].token.item() == 0  # the best of all that is allowed, same exit


def test_the_end_token_survives_pruning():
    first, second = [3.0, 2.9, 2.8, 0.0, 0.0], [0.0, 0.1, 0.2, 5.0, 7.0]
    model = ScriptedModel([[sure(0)] * 3, [first, second, sure(3)]])
    policy = ExitPolicy(threshold=(1.0, -math.inf), min_layer=1, vocabulary="fixed", vocabulary_size=2)
    assert run(model, policy, 2)[1].token.item() == 1  # of the kept 0 and 1
    step = run(model, policy, 2, eos=(EOS,))[1]
    assert step.token.item() == EOS
    p = torch.tensor([0.0, 0.1, 7.0]).softmax(-1)
    assert step.confidence.item() == pytest.approx((p[2] - p[1]).item(), abs=1e-6)


def test_pruned_winner_with_the_highest_id_survives_every_decay():
    """The reference code slices an id-sorted set and loses it."""
    size = 64
    low, winner = torch.zeros(size), torch.zeros(size)
    low[[0, 1, 2, size - 1]] = torch.tensor([1.0, 1.1, 1.2, 1.3])
    winner[size - 1] = 2.0
    model = ScriptedModel(torch.stack([winner.repeat(6, 1), torch.stack([low, *[winner] * 5])]))
    for kind in ("fixed", "decaying", "adaptive"):
        policy = ExitPolicy(
            threshold=(1.0, 1.0, 1.0, 1.0, -math.inf),
            min_layer=1,
            vocabulary=kind,
            vocabulary_size=16,
            vocabulary_floor=2,
        )
        step = run(model, policy, 2)[1]
        assert (step.token.item(), step.exit_layer.item()) == (size - 1, 5)


def test_emission_from_contrastive_scores():
    """argmax over M of log p_expert - log p_amateur, computed in full."""
    torch.manual_seed(3)
    script = torch.randn(6, 4, 12)
    for options in (Contrast(alpha=0.3, amateur=1), Contrast(alpha=0.05, amateur=2)):
        policy = ExitPolicy("contrastive", -math.inf, 3, decode_from="contrastive", contrast=options)
        tokens = [s.token.item() for s in run(ScriptedModel(script), policy, 6)]
        log_p, log_q = script[:, 2].log_softmax(-1), script[:, options.amateur - 1].log_softmax(-1)
        outside = log_p.exp() < options.alpha * log_p.exp().amax(-1, keepdim=True)
        expected = (log_p - log_q).masked_fill(outside, -math.inf).argmax(-1).tolist()
        assert tokens[1:] == expected[1:]
        assert tokens[0] == script[0, 3].argmax().item()  # the prompt's own pass: plain logits


def test_contrast_at_full_depth():
    torch.manual_seed(4)
    script = torch.randn(6, 4, 12)
    options = Contrast(alpha=0.05, amateur=1, full=True)
    policy = ExitPolicy("contrastive", 1.0, 3, decode_from="contrastive", contrast=options)
    tokens = [s.token.item() for s in run(ScriptedModel(script), policy, 6)]
    log_p, log_q = script[:, 3].log_softmax(-1), script[:, 0].log_softmax(-1)
    outside = log_p.exp() < 0.05 * log_p.exp().amax(-1, keepdim=True)
    assert tokens[1:] == (log_p - log_q).masked_fill(outside, -math.inf).argmax(-1).tolist()[1:]


@pytest.mark.parametrize("measure", ["softmax", "max", "entropy", "state", "contrastive", "jsd"])
@pytest.mark.parametrize("kind", [None, "fixed", "adaptive"])
@pytest.mark.parametrize("skipped", ["propagate", "defer", "verify"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_every_measure_decodes_with_every_option(name, skipped, kind, measure):
    lm, inputs = LanguageModel(tiny(name)), inputs_for(name, 3, padded=True)
    policy = ExitPolicy(measure, 0.3, 2, vocabulary=kind, vocabulary_size=kind and 25, skipped=skipped)
    out = lm.generate(inputs, policy=policy, max_new_tokens=10)
    assert all(2 <= layer <= LAYERS for row in out.exit_layers for layer in row)
    assert all(c <= 1 for row in out.confidences for c in row if c == c)
    if skipped == "verify":
        assert out.sequences.tolist() == greedy(tiny(name), inputs, 10).tolist()


def test_scores_and_confidences_of_an_exit_are_those_of_the_readout():
    """The recorded confidence is the gap of the truncated model's own logits at that position."""
    lm, inputs = LanguageModel(tiny("qwen3")), inputs_for("qwen3")
    out = lm.generate(inputs, policy=ExitPolicy(threshold=-math.inf, min_layer=2), max_new_tokens=6, eos_token_id=None)
    hidden = lm.split.start(out.sequences)
    with torch.no_grad():
        logits = lm.split.readout(lm.split.run(hidden, 0, 2).hidden)[0]
    top = logits.softmax(-1).topk(2).values
    gaps = (top[:, 0] - top[:, 1])[inputs["input_ids"].shape[1] : -1]
    assert out.confidences[0][1:] == pytest.approx(gaps.tolist(), abs=1e-5)
    assert logits.shape[-1] == VOCABULARY
