"""Comparisons in which T and λ differ, too, are called confounded; the run that has the same ones is named."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from offramp.distillation.methods import method
from offramp.distillation.results import confounded, confounded_note
from offramp.metrics.intervals import holm, paired
from offramp.report.grids import REFERENCE, by_method, matched_table, methods_table, summary
from offramp.runs.codec import encode

RULE = "val_worst_group"
ALIKE = "kd+temperature=3+fraction=1"


def grid(*names, worst=None, seeds=5):
    """Results with no more than what tables of worst groups read; worst groups by name, [S]."""
    draw = np.random.default_rng(0)
    found = []
    for name in names:
        values = (worst or {}).get(name, draw.uniform(0.4, 0.6, seeds))
        for seed in range(seeds):
            accuracies = [float(values[seed]), 0.9]
            chosen = {"epoch": 1, "groups": accuracies, "test": {"average": 0.8}}
            found.append({
                "name": name, "teacher": "erm", "seed": seed, "key": f"{name}--{seed}", "rules": {RULE: chosen},
                "method": encode(method(name)), "seconds": {"wall": 1.0},
                "groups": {"names": ["a", "b"], "test": [500, 500]},
            })  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["kd", "dedier"], {"dedier": ALIKE}),
        (["kd", "laplace", "avcs"], {"laplace": ALIKE, "avcs": ALIKE}),
        (["kd", "dedier", "kd+temperature=3.0+fraction=1.0"], {"dedier": "kd+temperature=3.0+fraction=1.0"}),
        (["kd", "dedier+temperature=4+fraction=0.9"], {}),  # the same T and λ
        (["kd", "dedier+fraction=0.9"], {"dedier+fraction=0.9": "kd+temperature=3+fraction=0.9"}),
        (["kd", "kd+temperature=2", "kd+fraction=0.1"], {}),  # about T and λ, and nothing else
        (["kd", "simkd", "dett", "erm", "group_dro"], {}),  # which have neither
        (["dedier", "erm"], {}),
    ],
)
def test_what_is_confounded_and_what_would_not_be(names, expected):
    found = confounded(by_method(grid(*names), "erm"), REFERENCE)
    assert found == expected
    for name, match in found.items():  # the spelling that is offered makes plain distillation with the same T and λ
        made, own = method(match), method(name)
        assert (made.temperature, made.fraction, made.weights) == (own.temperature, own.fraction, None)
        assert made.errors == method(REFERENCE).errors


def test_the_tables_say_so_and_offer_the_command():
    methods = by_method(grid("kd", "dedier", "erm"), "erm")
    table = methods_table(methods, RULE)
    verdicts = {row[0]: row[-1] for row in table.rows}
    assert verdicts["dedier"].endswith(", confounded")
    assert "confounded" not in verdicts["erm"]
    (said,) = confounded_note(methods, REFERENCE)
    assert said in table.notes
    assert "dedier has T = 3, λ = 1, kd has T = 4, λ = 0.9; a difference may be theirs" in said
    assert f"add --method {ALIKE} to the same command" in said
    assert not matched_table(methods, RULE).rows
    values = summary(grid("kd", "dedier", "erm"), RULE)["teachers"]["erm"]
    assert values["dedier"]["confounded"]
    assert values["dedier"]["same_temperature_and_fraction"] == ALIKE
    assert values["dedier"]["difference_to_same"] is None
    assert not values["erm"]["confounded"]


def test_with_the_matched_run_the_comparison_is_made():
    draw = np.random.default_rng(3)
    worst = {"kd": draw.uniform(0.3, 0.5, 5), ALIKE: draw.uniform(0.6, 0.7, 5)}
    worst |= {"dedier": worst[ALIKE] + draw.normal(0, 0.02, 5), "laplace": worst[ALIKE] + 0.1 + draw.normal(0, 0.01, 5)}
    results = grid("kd", ALIKE, "dedier", "laplace", worst=worst)
    rows = {row[0]: row for row in matched_table(by_method(results, "erm"), RULE).rows}
    tests = [stats.ttest_rel(worst[name], worst[ALIKE]) for name in ("dedier", "laplace")]
    corrected = holm([test.pvalue for test in tests])
    for (name, row), test, p in zip(rows.items(), tests, corrected, strict=True):
        assert row[1] == ALIKE
        assert row[2].startswith(f"{np.mean(worst[name] - worst[ALIKE]):+.1%} ({test.confidence_interval().low:+.1%}")
        assert row[3] == f"{p:.3f}"
    assert rows["dedier"][-1] == "no difference shown"  # though beside kd it is higher
    assert rows["laplace"][-1] == "higher"
    text = str(methods_table(by_method(results, "erm"), RULE))
    assert re.search(r"dedier .*higher, confounded", text)
    assert "which is compared below" in text
    found = summary(results, RULE)["teachers"]["erm"]["laplace"]
    assert (found["difference_to_same"]["verdict"], found["difference"]["verdict"]) == ("higher", "higher")


def evidence(*p_values, sign=1):
    """Parts whose t tests over five seeds have these p-values."""
    from fairness import Evidence

    draw = np.random.default_rng(4).normal(0, 1, 5)
    unit = (draw - draw.mean()) / draw.std(ddof=1)
    parts = [sign * 0.05 * (unit + stats.t.isf(p / 2, 4) / 5**0.5) for p in p_values]
    return [Evidence("a against b", paired(part, np.zeros(5))) for part in parts]


def test_the_answers_of_the_page_follow_holms_p(monkeypatch):
    """Claims hold if all parts do, so the largest p counts; .004, .02 and .03 times 4, 3, 2; one did not run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from fairness import answers, claims_list

    items = [
        ("one", evidence(0.004, 0.001)), ("two", evidence(0.03)), ("three", evidence(0.004, sign=-1)),
        ("four", evidence(0.001) + evidence(0.001, sign=-1)), ("five", [None, *evidence(0.02)]), ("six", [None]),
    ]  # fmt: skip
    said = answers(items)
    assert [words for words, _ in said] == [
        "yes",
        "undecided",
        "no",
        "undecided",
        "undecided (1 of 2 parts)",
        "not run",
    ]
    expected = holm([0.004, 0.03, 0.004, 1.0, 0.02])
    assert [p for _, p in said[:5]] == pytest.approx(expected)
    assert said[5][1] is None
    assert items[1][1][0].found.low > 0  # the interval alone would have said yes
    assert "- two: **undecided** (Holm p 0.0" in claims_list(items)
