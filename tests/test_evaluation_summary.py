"""Summaries against brute force, and intervals against what they promise."""

import math
import random
import statistics

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from offramp.evaluation import Bootstrap, Record, summarise
from offramp.evaluation.arms import FULL
from offramp.evaluation.result import Evaluation

WORDS = "the a cat dog sat on mat barks loud here there hello my friend".split()
STATIC = {"confidence": "static"}


def record(index, draw, arm="arm", *, depth=4, **changes):
    tokens = [draw.randrange(9) for _ in range(draw.randint(1, 5))]
    parts = {"encoder": draw.randint(0, 9), "blocks": draw.randint(10, 99), "readout": 7, "prefill": draw.randint(1, 9)}
    return Record(
        **{
            "id": f"{index}", "group": f"g{index // 3}", "arm": arm, "text": " ".join(draw.choices(WORDS, k=6)),
            "tokens": tokens, "exit_layers": [draw.randint(1, depth) for _ in tokens],
            "scores": {"bleu": draw.random(), "chrf": draw.random()}, "agreement": draw.random(),
            "same": draw.random() < 0.5, "flops": sum(parts.values()), "bytes": draw.randint(5, 50),
            "seconds": draw.random(), "parts": parts, **changes,
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
    for ratio in (s.flops_ratio, s.decode_flops_ratio, s.bytes_ratio, s.seconds_ratio):
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
        policy = None if name == FULL else STATIC if name.startswith("static") else {"confidence": "softmax"}
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
    assert "good" in e.table().split("Neither the full model nor a static exit shown")[1]
    matched = evaluation({name: POINTS[name] for name in (FULL, "static 2", "bad")})
    assert matched.ahead() == []
    assert "Every policy is matched by a static exit shown" in matched.table()


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
