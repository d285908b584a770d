"""Summaries against brute force, and intervals against what they promise."""

import math
import random
import statistics
from dataclasses import replace

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from offramp.evaluation import Record, summarise
from offramp.evaluation.arms import FULL
from offramp.evaluation.result import Evaluation
from offramp.metrics.intervals import Bootstrap, Interval

WORDS = "the a cat dog sat on mat barks loud here there hello my friend".split()
STATIC, SOFTMAX = ({"confidence": name, "threshold": 0.9} for name in ("static", "softmax"))


def record(index, draw, arm="arm", *, depth=4, **changes):
    tokens = [draw.randrange(9) for _ in range(draw.randint(1, 5))]
    parts = {"encoder": draw.randint(0, 9), "blocks": draw.randint(10, 99), "readout": 7, "prefill": draw.randint(1, 9)}
    return Record(
        **{
            "id": f"{index}", "group": f"g{index // 3}", "arm": arm, "text": " ".join(draw.choices(WORDS, k=6)),
            "tokens": tokens, "exit_layers": [draw.randint(1, depth) for _ in tokens],
            "scores": {"bleu": draw.random(), "chrf": draw.random()}, "agreement": draw.random(),
            "same": draw.random() < 0.5, "flops": sum(parts.values()), "bytes": draw.randint(5, 50),
            "seconds": 1 + draw.random(), "prompt_seconds": draw.random(), "round": float(index),
            "parts": parts, **changes,
        }
    )  # fmt: skip


def arms(count, seed=0):
    draw = random.Random(seed)
    return [record(i, draw) for i in range(count)], [record(i, draw, FULL) for i in range(count)]


def summary(mine, full, policy=None, **options):
    bootstrap = options.pop("bootstrap", None) or Bootstrap([r.group for r in full], resamples=200)
    return summarise(mine, full, policy=policy, num_layers=4, bootstrap=bootstrap, **options)


@given(st.integers(1, 12), st.integers(0, 99))
def test_estimates_equal_plain_sums(count, seed):
    mine, full = arms(count, seed)
    s = summary(mine, full, STATIC)
    tokens = sum(len(r.tokens) for r in mine)
    assert s.quality["bleu"].value == pytest.approx(statistics.fmean(r.scores["bleu"] for r in mine))
    difference = statistics.fmean(a.scores["bleu"] - b.scores["bleu"] for a, b in zip(mine, full, strict=True))
    assert s.difference["bleu"].value == pytest.approx(difference)
    assert s.identical.value == pytest.approx(sum(r.same for r in mine) / count)
    assert s.exit_layer.value == pytest.approx(sum(sum(r.exit_layers) for r in mine) / tokens)
    assert s.histogram == [sum(r.exit_layers.count(layer) for r in mine) for layer in (1, 2, 3, 4)]
    assert s.length.value == pytest.approx(tokens / count)
    assert s.flops_ratio.value == pytest.approx(sum(r.flops for r in mine) / sum(r.flops for r in full))
    decoding = [sum(r.parts["blocks"] + r.parts["readout"] for r in rs) for rs in (mine, full)]
    assert s.decode_flops_ratio.value == pytest.approx(decoding[0] / decoding[1])
    assert s.bytes_ratio.value == pytest.approx(sum(r.bytes for r in mine) / sum(r.bytes for r in full))
    assert sum(s.parts.values()) == pytest.approx(s.flops_ratio.value)


@given(st.integers(4, 12), st.integers(0, 99))
def test_against_itself_an_arm_is_certain(count, seed):
    full = arms(count, seed)[1]
    s = summary(full, full)
    assert all((i.value, i.low, i.high) == (0, 0, 0) for i in s.difference.values())
    for ratio in (
        s.flops_ratio, s.decode_flops_ratio, s.bytes_ratio, s.seconds_ratio, s.seconds_per_token_ratio
    ):  # fmt: skip
        assert ratio.value == pytest.approx(1)
        assert ratio.low == pytest.approx(1) == ratio.high


@given(st.integers(4, 15), st.integers(0, 99))
def test_intervals_equal_a_loop_over_draws_of_groups(count, seed):
    mine, full = arms(count, seed)
    bootstrap = Bootstrap([r.group for r in full], resamples=60, seed=seed)
    s = summary(mine, full, bootstrap=bootstrap)
    names = sorted({r.group for r in full})
    ratios, differences = [], []
    for weights in bootstrap.weights:
        drawn = [
            i
            for name, w in zip(names, weights, strict=True)
            for i in range(count)
            if mine[i].group == name
            for _ in range(w)
        ]
        ratios.append(sum(mine[i].flops for i in drawn) / sum(full[i].flops for i in drawn))
        differences.append(statistics.fmean(mine[i].scores["chrf"] - full[i].scores["chrf"] for i in drawn))
    for interval, values in ((s.flops_ratio, ratios), (s.difference["chrf"], differences)):
        assert [interval.low, interval.high] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist())


@pytest.mark.parametrize("several", [False, True])
def test_corpus_scores_equal_sacrebleu_on_every_draw(several):
    mine, full = arms(7)
    draw = random.Random(5)
    references = [
        [r.text + " on the mat", *(["a cat"] if several and i % 2 else [])] for i, r in enumerate(arms(7, 1)[1])
    ]
    references = [
        [" ".join(draw.sample(r.text.split(), 5)), *rest[1:]] for r, rest in zip(mine, references, strict=True)
    ]
    bootstrap = Bootstrap([r.group for r in full], resamples=12)
    s = summary(mine, full, bootstrap=bootstrap, references=references)

    def score(records, which, kind):
        streams = [[references[i][0] for i in which]]
        if several:
            streams.append([references[i][1] if len(references[i]) > 1 else None for i in which])
        return getattr(sacrebleu, f"corpus_{kind}")([records[i].text for i in which], streams).score

    for kind in ("bleu", "chrf"):
        whole = score(mine, range(7), kind)
        assert s.quality[f"{kind} (corpus)"].value == pytest.approx(whole)
        assert s.difference[f"{kind} (corpus)"].value == pytest.approx(whole - score(full, range(7), kind))
        values = []
        for weights in bootstrap.weights:
            which = [i for i in range(7) for _ in range(weights[i // 3])]
            values.append(score(mine, which, kind))
        expected = np.percentile(values, [2.5, 97.5]).tolist()
        assert [s.quality[f"{kind} (corpus)"].low, s.quality[f"{kind} (corpus)"].high] == pytest.approx(expected)


def coverage(grouped):
    """How often a 95% interval holds the true mean 0 of 40 groups of 5 that share half of their variance."""
    draw = np.random.default_rng(7)
    hits, runs = 0, 300
    groups = [f"{i // 5}" if grouped else f"{i}" for i in range(200)]
    bootstrap = Bootstrap(groups, resamples=400)
    for _ in range(runs):
        values = np.repeat(draw.normal(size=40), 5) + draw.normal(size=200)
        interval = bootstrap.mean(values.tolist())
        hits += interval.low <= 0 <= interval.high
    return hits / runs


def test_intervals_hold_the_truth_as_often_as_they_say_only_if_groups_stay_together():
    assert 0.91 <= coverage(grouped=True) <= 0.98
    assert coverage(grouped=False) < 0.85


def test_draws_repeat_with_the_seed_and_a_single_group_has_no_interval():
    values = [0.1, 0.5, 0.7, 0.2]
    again = [Bootstrap("abcd", resamples=50, seed=seed).mean(values) for seed in (3, 3, 4)]
    assert again[0] == again[1] != again[2]
    assert Bootstrap("aaaa").mean(values) == again[0].__class__(pytest.approx(0.375), None, None)
    assert Bootstrap("ab").ratio([0, 0], [0, 0]).value == 1


def test_bad_input():
    mine, full = arms(4)
    with pytest.raises(ValueError, match="different examples"):
        summary(mine[::-1], full)
    with pytest.raises(ValueError, match="no examples"):
        Bootstrap([])
    with pytest.raises(ValueError, match="resamples is 0"):
        Bootstrap("ab", resamples=0)
    with pytest.raises(ValueError, match="level is 95"):
        Bootstrap("ab", level=95)


# ---------------------------------------------------------------- fronts and tables


def evaluation(points, metric="f1", kind="bleu"):
    """Arms by name: (score, FLOPs); "full model" and "static …" are what they say."""
    made = []
    for name, (score, flops) in points.items():
        policy = None if name == FULL else STATIC if name.startswith("static") else SOFTMAX
        changes = {"scores": {metric: score}, "flops": flops, "seconds": flops / 10, "exit_layers": [1], "tokens": [5]}
        if metric == "perplexity":
            changes |= {"scores": {"accuracy": 0.5}, "sums": {"nats": math.log(score), "outside": 0}}
        made.append((policy, [record(i, random.Random(0), name, **changes) for i in range(6)]))
    bootstrap = Bootstrap([r.group for r in made[0][1]], resamples=20)
    summaries = [summarise(rs, made[0][1], policy=p, num_layers=4, bootstrap=bootstrap) for p, rs in made]
    return Evaluation({"model": "tiny", "task": "x", "examples": 6}, metric, 4, summaries)


POINTS = {FULL: (0.9, 100), "static 2": (0.5, 50), "static 3": (0.6, 80), "good": (0.7, 70), "bad": (0.5, 60)}


@given(st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1))
def test_the_front_is_what_nothing_beats(points):
    e = evaluation({FULL: (5, 5), **points})
    on = set(e.front())
    everything = {FULL: (5, 5), **points}
    for name, (score, cost) in everything.items():
        beaten = any(s >= score and c <= cost and (s, c) != (score, cost) for s, c in everything.values())
        if beaten:
            assert name not in on
        else:
            assert any(everything[other] == (score, cost) for other in on)


def test_policies_ahead_of_static_exits():
    e = evaluation(POINTS)
    assert e.front() == ["static 2", "good", FULL]
    assert e.ahead() == ["good"]
    matched = evaluation({name: POINTS[name] for name in (FULL, "static 2", "bad")})
    assert matched.ahead() == []


def test_prompts_that_stop_early_without_exits_are_a_baseline():
    mine, full = arms(5)
    assert summary(mine, full, SOFTMAX | {"threshold": None, "prompt_layer": 2}).is_static
    assert not summary(mine, full, SOFTMAX | {"prompt_layer": 2}).is_static


# ---------------------------------------------------------------- per token, and seconds


def decoded(index, arm, tokens, each, prompt, **changes):
    """A record of so many tokens, the first off the prompt's pass, the others at `each` FLOPs and seconds."""
    passes = tokens - (prompt > 0)
    parts = {"encoder": 0, "blocks": passes * each, "readout": 0, "prefill": prompt}
    changes = {
        "tokens": [1] * tokens, "exit_layers": [4] * tokens, "flops": prompt + passes * each, "parts": parts,
        "prompt_seconds": float(prompt), "seconds": float(prompt + passes * each), **changes,
    }  # fmt: skip
    return record(index, random.Random(index), arm, **changes)


@pytest.mark.parametrize("prompt", [0, 500])
def test_what_a_generated_token_costs_depends_on_no_length(prompt):
    """An arm with longer answers and shorter prompts, whose tokens cost 7 where the full model's cost 10."""
    full = [decoded(i, FULL, 3 + i, 10, prompt) for i in range(4)]
    mine = [decoded(i, "arm", 9 - i, 7, prompt // 5) for i in range(4)]
    s = summary(mine, full)
    for ratio in (s.flops_per_token_ratio, s.seconds_per_token_ratio):
        assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.7, 0.7, 0.7))
    assert s.flops_ratio.value == pytest.approx(sum(r.flops for r in mine) / sum(r.flops for r in full))


def test_a_saving_that_is_all_prompt_is_seen_as_one():
    """Prompts that stop halfway, tokens dearer than the full model's: .6 of all, 1.2 of a token."""
    full = [decoded(i, FULL, 11, 10, 400) for i in range(4)]
    mine = [decoded(i, "arm", 11, 12, 180) for i in range(4)]
    s = summary(mine, full)
    assert (s.flops_ratio.value, s.flops_per_token_ratio.value) == pytest.approx((0.6, 1.2))


def test_a_shortened_prompt_is_compared_with_itself_too():
    """Tokens at 12 beside 10 of the full model and 8 of the same prompt without exits: 1.2 and 1.5."""
    full = [decoded(i, FULL, 11, 10, 400) for i in range(4)]
    same = [decoded(i, "prompt to 2", 7 + i, 8, 200) for i in range(4)]
    mine = [decoded(i, "arm", 9 - i, 12, 200) for i in range(4)]
    s = summary(mine, full, SOFTMAX | {"prompt_layer": 2}, same_prompt=same)
    for ratio in (s.own_flops_per_token_ratio, s.own_seconds_per_token_ratio):
        assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert s.flops_per_token_ratio.value == pytest.approx(1.2)
    assert summary(mine, full, SOFTMAX).own_flops_per_token_ratio is None
    apart = [replace(r, round=99.0) for r in same]
    assert summary(mine, full, SOFTMAX, same_prompt=apart).own_seconds_per_token_ratio is None


def test_columns_of_the_own_prompt_are_there_where_one_is_shortened():
    e = evaluation(POINTS)
    assert "own prompt" not in e.table()
    arms = [replace(arm, own_flops_per_token_ratio=Interval(1.5, 1.4, 1.6)) for arm in e.arms]
    told = Evaluation(e.conditions, e.metric, e.num_layers, arms)
    assert "FLOPs/token, own prompt" in told.cost_table().head
    assert "1.500 (1.400–1.600)" in told.table()
    assert "over the same shortened prompt without any exits" in told.reading()
    assert Evaluation.from_dict(told.to_dict()).arms == told.arms


def test_without_tokens_of_their_own_nothing_is_said_of_them():
    one = [decoded(i, FULL, 1, 10, 400) for i in range(4)]
    assert summary(one, one).flops_per_token_ratio is None
    assert summary(one, one).seconds_per_token_ratio is None


def test_seconds_are_compared_only_where_arms_took_turns():
    full = [decoded(i, FULL, 5, 10, 100, round=float(i)) for i in range(6)]
    mine = [decoded(i, "arm", 5, 5, 100, round=float(i if i < 4 else 100 + i)) for i in range(6)]
    s = summary(mine, full)
    assert s.seconds_ratio.value == pytest.approx(sum(r.seconds for r in mine[:4]) / sum(r.seconds for r in full[:4]))
    assert s.seconds_per_token_ratio.value == pytest.approx(0.5)
    for rounds in (None, -1.0):  # of an earlier version; of another time
        apart = [replace(r, round=rounds) for r in mine[:4]] + mine[4:]
        s = summary(apart, full)
        assert (s.seconds_ratio, s.seconds_per_token_ratio) == (None, None)
        assert s.flops_ratio.value < 1
    old = [replace(r, round=None) for r in full]
    assert summary(old, old).seconds_ratio is None


def test_results_of_an_earlier_version_are_read_without_their_seconds():
    e = evaluation(POINTS)
    assert e.front("seconds_ratio")
    values = e.to_dict()
    for arm in values["arms"]:
        del arm["flops_per_token_ratio"], arm["seconds_per_token_ratio"]
    old = Evaluation.from_dict(values)
    assert {arm.seconds_ratio for arm in old.arms} == {None}
    assert old.front("seconds_ratio") == []
    assert old.front() == e.front()
    assert "–: arms that did not take turns" in old.table()
    assert "–: arms" not in e.table()


# ---------------------------------------------------------------- what is said of policies


def told(differences, *, flops=0.8, token=0.9, seconds=0.9, groups=200, low=None, metric="f1"):
    """An evaluation of the full model, at 0.5, and one policy "arm"; differences are (value, low, high)."""
    mine, full = arms(8)
    base = [summary(records, full, policy) for records, policy in ((full, None), (mine, SOFTMAX))]
    costs = {"flops_ratio": flops, "flops_per_token_ratio": token, "seconds_ratio": seconds}
    ratio = {name: Interval(value, value - 0.01, value + 0.01) for name, value in costs.items() if value}
    quality, none = {metric: Interval(10.0 if metric == "perplexity" else 0.5, 0, 1)}, {metric: Interval(0, 0, 0)}
    changes = {"quality": quality, "seconds_ratio": None, "flops_per_token_ratio": None, **ratio}
    summaries = [
        replace(base[0], name=FULL, quality=quality, difference=none),
        replace(base[1], name="arm", difference={metric: Interval(*differences)}, **changes),
    ]
    conditions = {"model": "tiny", "task": "x", "examples": 2 * groups, "groups": groups}
    return Evaluation(conditions, metric, 4, summaries)


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({}, "near for less", "-0.5, at least -1.5; 0.800 of the FLOPs, 0.900 per generated token, 0.90 of the sec"),
        ({"seconds": None}, "near for less", "seconds do not compare"),
        ({"groups": 3}, "open", "about 300 examples would tell, 6 are there"),  # 150 groups of two
        ({"differences": (-0.005, -0.045, 0.035)}, "open", "-0.5; about 2,900 examples would tell, 400 are there"),
        ({"differences": (-0.005, None, None)}, "open", "-0.5"),
        ({"differences": (-0.4, -0.5, -0.3)}, "far", "-40.0"),
        ({"differences": (0.1, -0.02, 0.38), "flops": 1.1}, "dear", "1.100"),
        ({"flops": 0.995}, "unsaved", "0.995"),
        ({"token": 1.44}, "prompt", "1.440; 0.800 of all FLOPs"),
        ({"seconds": 2.4}, "slow", "2.40"),
        ({"differences": (0.1, -0.1, 0.1), "metric": "perplexity"}, "near for less", "-1.0%, at least -1.0"),
        ({"differences": (9.0, 8.0, 9.5), "metric": "perplexity"}, "far", "-90.0%"),
    ],
)
def test_praise_needs_quality_costs_and_an_interval(changes, reason, words):
    e = told(**{"differences": (-0.005, -0.015, 0.005), **changes})
    (found,) = e.findings()
    assert found.reason == reason
    assert words in found.words
    assert e.recommended() == (["arm"] if reason == "near for less" else [])
    said = e.verdict()
    assert ("No policy here is shown" in said[0]) == (reason != "near for less")
    assert f"arm ({found.words})" in said[-1]
    assert e.to_dict()["findings"] == [{"arm": "arm", "reason": reason, "words": found.words}]


def test_so_few_examples_say_nothing_even_if_they_agree():
    """Three identical answers have an interval without width, which shows nothing."""
    (found,) = told((0.0, 0.0, 0.0), groups=3).findings()
    assert found.reason == "open"


def test_a_metric_that_cannot_read_shows_nothing():
    e = told((0.0, 0.0, 0.0))
    assert e.recommended() == ["arm"]
    e.conditions["unread"] = {"f1": 7}
    assert e.recommended() == []
    assert any(line.startswith("f1 cannot read the references of 7 of 400 examples") for line in e.verdict())


def test_long_lists_are_cut():
    e = evaluation({FULL: (0.9, 100), **{f"p{i}": (0.1, 200 + i) for i in range(9)}})
    assert "p3 (2.030); and 5 more" in e.table()
    assert "p4 (" not in e.table()


def test_lower_perplexity_is_better():
    e = evaluation({FULL: (10.0, 100), "static 2": (30.0, 50), "a": (20.0, 40), "b": (40.0, 55)}, "perplexity")
    assert e.arm("a").quality["perplexity"].value == pytest.approx(20)
    assert e.front() == ["a", FULL]
    assert e.ahead() == ["a"]


def test_tables_are_markdown():
    text = evaluation(POINTS).table()
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for lines in tables:
        assert len(lines) == 2 + len(POINTS)
        assert len({line.count("|") for line in lines}) == 1
        assert len({len(line) for line in lines}) == 1
