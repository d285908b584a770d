"""The benchmark's structure and counts on tiny random models; no test looks at how long anything took."""

import json
import random
import re
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from offramp import ExitPolicy, LanguageModel
from offramp.lm import bench_playing, bench_rounds
from offramp.lm.bench import default_arms, run_batch_sizes, run_bench
from offramp.lm.bench_arms import COMPILED, FULL, REFERENCE, Spread
from offramp.lm.bench_playing import Players
from offramp.lm.bench_results import sizes_table
from offramp.lm.bench_rounds import Turn
from offramp.lm.scripted import (
    SHAPES,
    Script,
    Scripted,
    filled,
    random_model,
    random_prompts,
    scripted_arms,
    scripted_depths,
)

LAYERS, TOKENS, REPEATS = 6, 7, 2


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return LanguageModel(LlamaForCausalLM(config).eval())


@pytest.fixture(scope="module")
def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LanguageModel(T5ForConditionalGeneration(config).eval())


@pytest.fixture(scope="module")
def bench(llama):
    """All default arms on three prompts, two at a time, with a threshold that some random tokens pass."""
    arms = default_arms(llama, threshold=0.05, min_layer=2)
    calls = []
    named = LanguageModel(llama.model, name="tiny")
    result = run_bench(
        named, random_prompts(llama, 3, length=5), arms, max_new_tokens=TOKENS, repeats=REPEATS, batch_size=2,
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    return arms, result, calls


@pytest.fixture(scope="module", params=["llama", "t5"])
def scripted(request):
    """(model, arms, result, layers the script asks for)."""
    lm = request.getfixturevalue(request.param)
    arms = scripted_arms(lm, tokens=TOKENS, mean=4, min_layer=2, seed=3)
    result = run_bench(lm, random_prompts(lm, 2, length=5), arms, max_new_tokens=TOKENS, repeats=REPEATS, warmup=0)
    depths = list(arms["softmax"].confidence.script.depths)
    # A decoder-only prompt runs at full depth, and its token is not tested.
    return lm, arms, result, depths if lm.split.is_encoder_decoder else [LAYERS, *depths[1:]]


# Arms and rounds


def test_every_kind_of_arm_is_there(llama):
    arms = default_arms(llama)
    assert list(arms)[:2] == [REFERENCE, FULL]
    assert [name for name in arms if name.startswith("static")] == ["static 3", "static 4"]
    assert {policy.vocabulary for policy in arms.values() if policy} == {None, "fixed", "decaying", "adaptive"}
    assert {policy.skipped for policy in arms.values() if policy} == {"propagate", "defer", "verify"}
    assert {p.confidence for p in arms.values() if p} == {"static", "softmax", "contrastive", "jsd"}


def test_results_stand_in_the_order_of_the_arms(bench):
    arms, result, _ = bench
    assert [arm.name for arm in result.arms] == list(arms)


def test_the_full_models_run_even_if_not_asked_for(llama):
    result = run_bench(
        llama, random_prompts(llama, 1), {"half": ExitPolicy("static", min_layer=3)}, max_new_tokens=2, repeats=1
    )
    assert [arm.name for arm in result.arms] == [REFERENCE, FULL, "half"]


def test_each_batch_of_each_round_meets_each_arm_once(bench):
    arms, result, _ = bench
    assert [len(round_) for round_ in result.order] == [2] * REPEATS  # three prompts, two at a time
    ran = [tuple(batch) for round_ in result.order for batch in round_]
    assert all(sorted(batch) == sorted(arms) for batch in ran)
    assert len(set(ran)) > 1


def test_progress_counts_every_generation(bench):
    arms, _, calls = bench
    total = (1 + REPEATS * 2) * len(arms)
    assert [done for done, _, _ in calls] == list(range(total + 1))
    assert {call[1] for call in calls} == {total}
    assert sum(label.startswith("warm-up") for _, _, label in calls) == len(arms)


# Rounds that are kept


def kept(lm, folder, progress=None, **options):
    arms = {"static 2": ExitPolicy("static", min_layer=2)}
    options = {"max_new_tokens": 3, "repeats": 3, "folder": folder, "progress": progress, **options}
    return run_bench(lm, random_prompts(lm, 2, length=4), arms, **options)


def stopping(at):
    def stop(_done, _total, what):
        if what.startswith(at):
            raise KeyboardInterrupt

    return stop


def test_an_interrupted_bench_goes_on_behind_its_last_round(llama, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        kept(llama, tmp_path, stopping("round 3/3"))
    path = tmp_path / "rounds.jsonl"
    before = path.read_bytes()
    assert before.count(b"\n") == 3  # the header and two rounds
    path.write_bytes(before + b'{"order": [["st')  # killed while it wrote
    calls = []
    result = kept(llama, tmp_path, lambda *call: calls.append(call))
    assert path.read_bytes().startswith(before)
    assert sum(what.startswith("round 3/3") for *_, what in calls) == 2 * 3  # batches, arms
    assert sum(what.startswith("warm-up") for *_, what in calls) == 3
    assert len(calls) == 2 * 3 + 3 + 1
    assert calls[-1][0] == calls[-1][1] == 3 + 3 * 2 * 3
    rounds = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert result.arm("static 2").seconds == tuple(played["arms"]["static 2"]["seconds"] for played in rounds)
    assert result.order == [played["order"] for played in rounds]
    whole = kept(llama, None)  # without a folder, in one go: the same but for the time
    assert result.order == whole.order
    for name in ("exit_layers", "flops_ratio", "agreement", "tests", "confidence_flops"):
        assert getattr(result.arm("static 2"), name) == getattr(whole.arm("static 2"), name)


def test_a_finished_bench_is_read_and_more_rounds_can_be_added(llama, tmp_path):
    first, calls = kept(llama, tmp_path), []
    assert kept(llama, tmp_path, lambda *call: calls.append(call)) == first
    assert [what for *_, what in calls] == ["done"]
    more = kept(llama, tmp_path, repeats=4)
    assert more.arm(FULL).seconds[:3] == first.arm(FULL).seconds
    assert len(more.arm(FULL).seconds) == 4
    assert kept(llama, tmp_path).arm(FULL).seconds == first.arm(FULL).seconds


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_new_tokens": 4}, "new_tokens was 3 and is now 4"), ({"seed": 1}, "seed was 0 and is now 1")],
)
def test_another_bench_is_refused(llama, tmp_path, options, message):
    kept(llama, tmp_path, repeats=1)
    with pytest.raises(ValueError, match=f"holds rounds made otherwise .*{message}.*or use another folder"):
        kept(llama, tmp_path, **options)


# What an arm reports


def test_speeds_are_positive_and_refer_to_generate(bench):
    _, result, _ = bench
    for arm in result.arms:
        assert len(arm.seconds) == REPEATS
        assert 0 < arm.ratio.low <= arm.ratio.median <= arm.ratio.high
        assert arm.tokens_per_second.median > 0
    assert result.arm(REFERENCE).ratio == Spread(1, 1, 1)


@pytest.mark.parametrize("name", [FULL, "verify + fixed"])
def test_exact_arms_agree_with_transformers(bench, name):
    _, result, _ = bench
    arm = result.arm(name)
    assert (arm.agreement, arm.identical, arm.common_prefix) == (1, 1, TOKENS)
    assert result.notes == []


def test_all_arms_generate_the_same_number_of_tokens(bench):
    _, result, _ = bench
    for arm in result.arms:
        assert [len(row) for row in arm.exit_layers] == [TOKENS] * 3, arm.name


def test_no_token_ends_a_text(llama):
    """Here the end of sequence is what the model says first."""
    prompt = random_prompts(llama, 1, length=4)
    said = llama.generate(prompt, max_new_tokens=4, min_new_tokens=4).tokens[0]
    llama.model.generation_config.eos_token_id = said[0]
    try:
        result = run_bench(llama, prompt, {}, max_new_tokens=4, repeats=1, warmup=0)
        assert llama.model.generation_config.eos_token_id == said[0]
    finally:
        llama.model.generation_config.eos_token_id = 2
    assert [len(row) for arm in result.arms for row in arm.exit_layers] == [4, 4]
    assert result.arm(FULL).agreement == 1


def test_static_arms_leave_where_they_should(bench):
    _, result, _ = bench
    for layer in (3, 4):
        arm = result.arm(f"static {layer}")
        assert {layer for row in arm.exit_layers for layer in row} == {layer}
        assert arm.tests == 0
        assert arm.flops_ratio < 1


def test_counts_of_the_full_model(bench):
    _, result, _ = bench
    full, reference = result.arm(FULL), result.arm(REFERENCE)
    assert full.mean_exit_layer == reference.mean_exit_layer == LAYERS
    assert (full.flops, full.bytes, full.tests) == (reference.flops, reference.bytes, 0)
    assert full.flops_ratio == full.bytes_ratio == 1
    assert reference.shares == {}


def test_what_a_generated_token_costs_leaves_the_prompt_out(bench):
    """Prompts are longer and of another depth than tokens."""
    lm, result, _ = bench
    full = result.arm(FULL)
    assert full.token_flops_ratio == result.arm(REFERENCE).token_flops_ratio == 1
    assert full.token_seconds == Spread(1, 1, 1)
    for name in ("static 3", "softmax"):
        arm = result.arm(name)
        assert arm.token_flops_ratio != pytest.approx(arm.flops_ratio, abs=1e-6)
        assert arm.token_seconds.median > 0
    assert "FLOPs/token ×" in result.table()


def test_rounds_of_an_earlier_version_say_nothing_of_tokens(bench):
    _, result, _ = bench
    old = [replace(arm, token_flops_ratio=None, token_seconds=None) for arm in result.arms]
    assert "–" in replace(result, arms=old).table()
    counts = {"flops": 9, "bytes": 9, "tests": 0}
    assert bench_rounds._token_flops(counts, counts, 3) is None
    assert bench_rounds._per_later_token(Turn(seconds=3.0, tokens=[[1, 2]])) is None
    assert bench_rounds._per_later_token(Turn(seconds=3.0, tokens=[[1, 2], [3, 4, 5]], first=[0.5, 1.0])) == 0.5


def test_a_tested_arm_pays_for_its_tests(bench):
    _, result, _ = bench
    arm = result.arm("softmax")
    assert arm.tests > 0
    assert arm.draft_flops == arm.tests * 32**2 * 300
    assert arm.confidence_flops > result.arm(FULL).confidence_flops


def test_shares_of_time_sum_to_one(bench):
    _, result, _ = bench
    for arm in result.arms:
        if arm.name != REFERENCE:
            assert sum(arm.shares.values()) == pytest.approx(1)
            assert min(arm.shares.values()) >= 0


def test_a_mismatch_with_transformers_is_noted_not_raised(bench):
    _, result, _ = bench
    arms = [replace(arm, agreement=0.75) if arm.name == FULL else arm for arm in result.arms]
    (note,) = replace(result, arms=arms).notes
    assert "25.0%" in note
    assert "bug" in note
    assert note in replace(result, arms=arms).table()


def test_agreement_counts_positions_and_prefixes(llama, monkeypatch):
    """Against hand-made outputs: the reference says 0 1 2 3 and 4 5 6 7; ours differs at the second token of one."""
    outputs = iter([[0, 9, 2, 3], [4, 5, 6, 7]])

    class Answered:
        def __init__(self, *_, **__):
            self.stream, self.tokens = real(random_prompts(llama, 1, length=3), max_new_tokens=4), iter(next(outputs))

        def __iter__(self):
            return (step._replace(token=torch.tensor([next(self.tokens)])) for step in self.stream)

        @property
        def costs(self):
            return self.stream.costs

    real = llama.stream
    references = iter([torch.tensor([[8, 0, 1, 2, 3]]), torch.tensor([[8, 4, 5, 6, 7]])])
    monkeypatch.setattr(llama, "stream", Answered)
    monkeypatch.setattr(llama.model, "generate", lambda **_: next(references))
    result = run_bench(llama, random_prompts(llama, 2, length=1), {}, max_new_tokens=4, repeats=1, warmup=0)
    arm = result.arm(FULL)
    assert (arm.agreement, arm.identical, arm.common_prefix) == (7 / 8, 1 / 2, (1 + 4) / 2)


def test_quartiles():
    assert Spread.of([3.0]) == Spread(3, 3, 3)
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3, 2, 4)
    assert str(Spread(1, 0.5, 1.25)) == "1.00 (0.50–1.25)"


# Scripts


def test_scripted_tokens_leave_where_the_script_says(scripted):
    _, arms, result, expected = scripted
    assert len(set(expected)) > 2
    for name, policy in arms.items():
        if policy is not None and policy.confidence != "static":
            assert result.arm(name).exit_layers == [expected, expected], name


def test_pruning_saves_flops_and_bytes_and_no_tests(scripted):
    _, _, result, _ = scripted
    plain = result.arm("softmax")
    for kind in ("fixed", "decaying", "adaptive"):
        pruned = result.arm(f"softmax + {kind}")
        assert pruned.flops < plain.flops
        assert pruned.confidence_flops < plain.confidence_flops
        assert pruned.draft_flops < plain.draft_flops
        assert pruned.tests == plain.tests
    assert result.arm("softmax + adaptive").flops < result.arm("softmax + fixed").flops


def test_every_pruned_arm_is_set_against_its_unpruned_twin(scripted):
    _, _, result, _ = scripted
    pairs = {(saving.pruned, saving.unpruned): saving for saving in result.savings}
    softmax = [(f"softmax + {kind}", "softmax") for kind in ("fixed", "decaying", "adaptive")]
    assert set(pairs) == {*softmax, ("jsd + adaptive", "jsd")}
    for saving in pairs.values():
        assert saving.tests == 1
        assert saving.flops > 1
        # The source's count leaves the first, full readout out, so it promises more than there is.
        assert saving.draft_flops > saving.flops
        assert saving.seconds.median > 0


def test_savings_need_policies_that_differ_in_pruning_alone(bench):
    _, result, _ = bench
    pairs = {(saving.pruned, saving.unpruned) for saving in result.savings}
    assert ("softmax + fixed", "softmax") in pairs
    assert not {("defer + fixed", "softmax"), ("jsd + adaptive", "softmax")} & pairs


def test_scripted_measures_do_the_real_work(t5):
    """A script that never lets a token leave costs what a threshold that is never passed costs."""
    prompt = random_prompts(t5, 1, length=4)
    script = Script((LAYERS,))
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    paid = t5.generate(prompt, policy=ExitPolicy(Scripted(script), 0.5, min_layer=2), **options).costs
    real = t5.generate(prompt, policy=ExitPolicy(threshold=1.0, min_layer=2), **options).costs
    assert (paid.flops, paid.bytes, paid.tests) == (real.flops, real.bytes, real.tests)


def test_depths_are_drawn_once_and_clipped():
    depths = scripted_depths(200, mean=5, spread=3, low=3, high=8, seed=1)
    assert depths == scripted_depths(200, mean=5, spread=3, low=3, high=8, seed=1)
    assert (min(depths), max(depths)) == (3, 8)
    assert sum(depths) / 200 == pytest.approx(5.2, abs=0.4)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_rows_of_a_batch_leave_by_scripts_of_their_own(name, request):
    lm = request.getfixturevalue(name)
    arms = scripted_arms(lm, tokens=5, rows=3, mean=4, min_layer=2, seed=3)
    depths = arms["softmax"].confidence.script.depths
    rows = [list(depths[i : i + 5]) for i in (0, 5, 10)]
    if name == "llama":  # a prompt's own token is not tested
        rows = [[LAYERS, *row[1:]] for row in rows]
    assert len(set(map(tuple, rows))) == 3
    prompts = random_prompts(lm, 3, length=4)
    for arm in ("softmax", "softmax + fixed", "jsd + adaptive"):
        found = lm.generate(prompts, policy=arms[arm], max_new_tokens=5, min_new_tokens=5)
        assert found.exit_layers == rows, arm


def test_a_mean_that_is_no_layer_is_refused(llama):
    with pytest.raises(ValueError, match="mean exit layer is 9"):
        scripted_arms(llama, tokens=3, mean=9)


# Several batch sizes, and models computed in other ways


def test_batch_sizes_take_turns_and_keep_their_rounds(llama, tmp_path):
    prompts, said = random_prompts(llama, 3, length=4), []

    def arms(rows):
        return scripted_arms(llama, tokens=3, rows=rows, mean=4, min_layer=2)

    def run(repeats, **options):
        return run_batch_sizes(
            llama, prompts, lambda rows: {"softmax": arms(rows)["softmax"]}, (1, 3), max_new_tokens=3,
            repeats=repeats, folder=tmp_path, **options,
        )  # fmt: skip

    one, three = run(2, progress=lambda *call: said.append(call))
    assert (one.conditions["prompts"], three.conditions["prompts"]) == (1, 3)
    assert three.conditions["scripted_exits"].startswith("mean layer ")
    labels = [what.rpartition(":")[0] for *_, what in said]
    turns = list(dict.fromkeys(labels))
    assert turns == [
        "1 together, warm-up", "1 together, round 1/2", "3 together, warm-up", "3 together, round 1/2",
        "1 together, round 2/2", "3 together, round 2/2",
    ] + turns[6:]  # fmt: skip
    assert said[-1][0] == said[-1][1] == 2 * 3 * (1 + 2)  # sizes, arms, warm-up and rounds
    again = run(2)
    assert [bench.arm(FULL).seconds for bench in again] == [bench.arm(FULL).seconds for bench in (one, three)]
    table = sizes_table([one, three])
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + 2 * 3
    assert "Conditions: model LlamaForCausalLM" in table
    ratio = one.seconds_ratio(one.arm("softmax"))
    assert ratio.median == pytest.approx(
        sum(a / b for a, b in zip(one.arm("softmax").seconds, one.arm(FULL).seconds, strict=True)) / 2
    )
    with pytest.raises(ValueError, match="a batch of 4 is asked for, but there are 3 prompts"):
        run_batch_sizes(llama, prompts, arms, (1, 4))


def test_variants_run_all_arms_but_the_reference(llama):
    half = LanguageModel(llama.model)
    result = run_bench(
        llama, random_prompts(llama, 1, length=4), {"static 3": ExitPolicy("static", min_layer=3)}, max_new_tokens=2,
        repeats=1, warmup=0, variants={"other": half},
    )  # fmt: skip
    assert [arm.name for arm in result.arms] == [REFERENCE, FULL, "static 3", f"other {FULL}", "other static 3"]
    assert result.arm("other static 3").exit_layers == result.arm("static 3").exit_layers
    assert result.notes == []


# Random models


def test_a_random_t5_has_the_shape_of_the_checkpoint():
    state = torch.get_rng_state()
    lm = random_model("t5-small")
    assert torch.equal(torch.get_rng_state(), state)
    assert (lm.num_layers, lm.vocabulary, lm.tokenizer) == (6, 32128, None)
    assert sum(p.numel() for p in lm.model.parameters()) == 60_506_624  # that of the published t5-small
    assert not lm.model.training


def test_an_unknown_shape_names_the_known_ones():
    with pytest.raises(ValueError, match="'t5-huge'; allowed are 't5-small', .*'llama-3.2-1b'"):
        random_model("t5-huge")


# What is written


def test_json_has_everything_and_no_nan(bench, scripted):
    for arms, result in (bench[:2], scripted[1:3]):
        values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert values["schema"] == "offramp/bench/1"
        assert [arm["name"] for arm in values["arms"]] == list(arms)
        conditions = values["conditions"]
        assert {"dtype", "threads", "torch", "transformers", "seed", "repeats", "prompts"} <= set(conditions)
        assert "/" not in json.dumps(conditions)  # no path
    assert values["arms"][3]["policy"]["script"] == list(arms["softmax"].confidence.script.depths)


def test_infinite_thresholds_are_written_as_text(llama):
    arms = {"first": ExitPolicy(threshold=float("-inf")), "each": ExitPolicy(threshold=(0.5, float("-inf"), 1.0))}
    result = run_bench(llama, random_prompts(llama, 1), arms, max_new_tokens=2, repeats=1, warmup=0)
    first, each = json.loads(json.dumps(result.to_dict(), allow_nan=False))["arms"][2:]
    assert first["policy"]["threshold"] == "-inf"
    assert each["policy"]["threshold"] == [0.5, "-inf", 1.0]


def test_the_table_mentions_every_arm_and_is_aligned(bench):
    arms, result, _ = bench
    table = result.table()
    for arm in arms:
        assert re.search(rf"^\| {re.escape(arm)} +\|", table, re.MULTILINE), arm
    for block in table.split("\n\n")[:3]:
        lines = block.splitlines()
        assert len({len(line) for line in lines}) == 1
        assert len({line.count("|") for line in lines}) == 1
        assert set(lines[1]) <= set("|-: ")
    assert "model tiny" in table


# Wrong arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats is 0; it must be at least 1"),
        ({"warmup": -1}, "warmup is -1; it must be at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_counts_are_checked(llama, options, message):
    with pytest.raises(ValueError, match=message):
        run_bench(llama, random_prompts(llama, 1), {}, **options)


def test_policies_are_checked_before_anything_runs(llama):
    with pytest.raises(ValueError, match="min_layer is 9"):
        run_bench(llama, random_prompts(llama, 1), {"deep": ExitPolicy("static", min_layer=9)}, progress=pytest.fail)


def test_no_prompts(llama):
    with pytest.raises(ValueError, match="no prompts"):
        run_bench(llama, [], {})


# What cannot run, and memory


class Full(torch.OutOfMemoryError):
    """As a device raises it."""


def running_out(monkeypatch, *layers):
    """Generation runs out of memory where a policy leaves after one of these layers, None: at full depth."""
    stream = LanguageModel.stream

    def streamed(self, inputs, *, policy=None, **options):
        if (policy and policy.min_layer) in layers:
            raise Full("CUDA out of memory. Tried to allocate 9 GiB.")
        return stream(self, inputs, policy=policy, **options)

    monkeypatch.setattr(LanguageModel, "stream", streamed)


def test_an_arm_that_memory_is_too_little_for_is_a_row_without_numbers(llama, tmp_path, monkeypatch):
    arms = {f"static {layer}": ExitPolicy("static", min_layer=layer) for layer in (2, 3)}
    running_out(monkeypatch, 2)
    options = {"max_new_tokens": 3, "repeats": 2, "batch_size": 2, "folder": tmp_path}
    result = run_bench(llama, random_prompts(llama, 2), arms, **options)
    assert [arm.name for arm in result.arms] == [REFERENCE, FULL, "static 3"]
    assert result.left_out == {"static 2": "memory is too little, with 2 prompts together"}
    (row,) = (line for line in result.table().splitlines() if line.startswith("| static 2 "))
    assert "left out" in row
    assert "Note: static 2 is left out: memory is too little, with 2 prompts together." in result.table()
    monkeypatch.undo()
    again = run_bench(llama, random_prompts(llama, 2), arms, **options)  # kept rounds still lack it
    assert "it failed in 2 of 2 rounds" in again.left_out["static 2"]


def test_other_errors_of_an_arm_are_raised(llama, monkeypatch):
    monkeypatch.setattr(LanguageModel, "stream", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_bench(llama, random_prompts(llama, 1), {}, max_new_tokens=3, repeats=1)


def test_a_batch_that_the_full_model_does_not_fit_is_left_out(llama, monkeypatch):
    stream = LanguageModel.stream

    def streamed(self, inputs, **options):
        if len(inputs["input_ids"]) > 1:
            raise MemoryError
        return stream(self, inputs, **options)

    monkeypatch.setattr(LanguageModel, "stream", streamed)
    prompts, options = random_prompts(llama, 2), {"max_new_tokens": 2, "repeats": 1}
    (one,) = run_batch_sizes(llama, prompts, lambda _: {}, (1, 2), **options)
    assert f"of {FULL}, memory is too little, with 2 prompts together" in one.left_out["a batch of 2"]
    assert re.search(r"\| 1 +\| +a batch of 2 \| +left out \|", sizes_table([one]))
    with pytest.raises(ValueError, match="take fewer or shorter prompts"):
        run_batch_sizes(llama, prompts, lambda _: {}, (2,), **options)


class Cuda:
    """What PyTorch tells of a device's memory: each call allocates 100 bytes for good and 1000 for a moment."""

    def __init__(self, monkeypatch, lm):
        self.now = self.most = 10_000
        monkeypatch.setattr(type(lm.split), "device", torch.device("cuda"))
        for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def memory_allocated(self, _):
        return self.now

    def max_memory_allocated(self, _):
        return self.most

    def reset_peak_memory_stats(self, _):
        self.most = self.now

    def work(self, *_):
        self.now += 100
        self.most = self.now + 1000


def test_memory_is_the_weights_what_an_engine_keeps_and_the_most_of_a_turn(llama, monkeypatch):
    weights = sum(weight.nbytes for weight in llama.model.parameters())
    twin = LanguageModel(llama.model)
    players = Players({FULL: None, "other": None}, {FULL: llama, "other": twin}, {}, None, 2)
    cuda = Cuda(monkeypatch, llama)
    monkeypatch.setattr(bench_playing, "run", cuda.work)
    inputs = [{"input_ids": torch.ones(1, 2)}]
    found = [players.play(inputs, random.Random(0), lambda *_: None) for _ in range(2)]
    for number, played in enumerate(found, start=1):  # what other engines keep is not counted
        assert [played.arms[name].memory for name in (FULL, "other")] == [weights + 100 * number + 1000] * 2


def test_without_cuda_memory_has_no_column(bench):
    _, result, _ = bench
    assert "peak GB" not in result.table()
    first, *others = result.arms
    assert "peak GB" in replace(result, arms=[replace(first, memory=5_250_000_000), *others]).table()
    assert "5.25" in sizes_table([replace(result, arms=[replace(first, memory=5_250_000_000), *others])])


# Compiled


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_transformers_compiled_says_the_same_at_every_batch_size(name, request, monkeypatch):
    monkeypatch.setattr(bench_playing, "BACKEND", "eager")  # traced, not built: that takes minutes
    lm = request.getfixturevalue(name)
    had = set(vars(lm.model))
    one, two = run_batch_sizes(
        lm, random_prompts(lm, 2, length=4), lambda _: {COMPILED: None}, (1, 2), max_new_tokens=4, repeats=2
    )
    for result in (one, two):
        assert result.left_out == {}
        arm = result.arm(COMPILED)
        assert (arm.agreement, arm.mean_exit_layer, arm.flops_ratio) == (1, LAYERS, 1)
        assert arm.shares == {}
    assert set(vars(lm.model)) == had


def test_a_model_that_cannot_be_compiled_is_left_out_with_the_reason(llama, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler\nat all")

    monkeypatch.setattr(bench_playing.Compiled, "generate", broken)
    result = run_bench(llama, random_prompts(llama, 1), {COMPILED: None}, max_new_tokens=2, repeats=1)
    assert [arm.name for arm in result.arms] == [REFERENCE, FULL]
    assert "it cannot be compiled here (no C++ compiler" in result.left_out[COMPILED]


@pytest.mark.parametrize(
    ("shape", "weights"),
    [
        ("smollm2", 134_515_008),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-8b", 8_030_261_248),
        ("t5-large", 737_668_096),
    ],
)
def test_shapes_are_built_where_they_are_to_be(shape, weights):
    """On a device without memory: nothing as large is ever made on the CPU."""
    model = filled(SHAPES[shape], torch.bfloat16, torch.device("meta"))
    assert {(part.device.type, part.dtype) for part in model.parameters()} == {("meta", torch.bfloat16)}
    assert sum(part.numel() for part in model.parameters()) == weights
