"""Numbers on groups against hand-made tables, brute force, and other libraries."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offramp.metrics.group_effects import (
    ALL,
    QUANTILES,
    ExitsByGroup,
    budgets_by_group,
    exits_by_group,
    group_changes,
    minority_rows,
    weight_diagnostics,
)
from offramp.metrics.groups import Groups, flip_rate, group_report
from offramp.metrics.intervals import CHANGES, SHARES, compare, holm, paired, summarise_seeds, t_interval
from offramp.metrics.selection import RULES, Epoch, Judged, LabelBudget, choices, judge, select
from offramp.report.groups import (
    changes_table,
    exits_table,
    groups_table,
    seeds_table,
    selection_table,
    weights_table,
)  # fmt: skip
from offramp.runs.codec import decode, encode
from offramp.uncertainty.outputs import ExitOutputs


def logits_of(answers, classes, sure=2.0):
    """Logits whose argmax is the answer, with a probability that is the same for all rows."""
    return sure * torch.nn.functional.one_hot(torch.as_tensor(answers), classes).float()


# ---------------------------------------------------------------- members


def test_groups_are_numbered_as_group_dro_does():
    y, a = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 0, 1, -1])
    groups = Groups.crossed(y, ["land bird", "water bird", "fish"], a, ["land", "water"])
    assert groups.numbers().tolist() == [0, 1, 2, 3, -1]
    assert groups.names[3] == "water bird, water"
    assert groups.counts.tolist() == [1, 1, 1, 1, 0, 0]


@given(st.data())
def test_numbers_and_members_say_the_same(data):
    count, rows = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 20))
    numbers = torch.tensor(data.draw(st.lists(st.integers(-1, count - 1), min_size=rows, max_size=rows)))
    groups = Groups.by_number(numbers.long(), [f"g{g}" for g in range(count)])
    assert groups.numbers().tolist() == numbers.tolist()
    assert not groups.overlap


def test_groups_that_cannot_be():
    with pytest.raises(ValueError, match=r"the group of row 1 is 2; allowed are 0..1, and -1 for none"):
        Groups.by_number(torch.tensor([0, 2]), ["a", "b"])
    with pytest.raises(ValueError, match=r"the attribute of row 0 is 3; allowed are -1..1"):
        Groups.crossed(torch.tensor([0]), ["a", "b"], torch.tensor([3]), ["x", "y"])
    with pytest.raises(ValueError, match=r"the label of row 0 is -1; allowed are 0..1"):
        Groups.crossed(torch.tensor([-1]), ["a", "b"], torch.tensor([0]), ["x", "y"])
    with pytest.raises(ValueError, match="two groups are named 'a'"):
        Groups.by_number(torch.tensor([0]), ["a", "a"])
    both = Groups(("a", "b"), torch.tensor([[True, True]]))
    with pytest.raises(ValueError, match="row 0 is in the groups 'a' and 'b'"):
        both.numbers()


# ---------------------------------------------------------------- the report


def test_a_table_made_by_hand():
    labels = torch.tensor([0] * 6 + [1] * 4)
    place = torch.tensor([0, 0, 0, 0, 1, 1, 0, 1, 1, 1])
    answers = torch.tensor([0, 0, 0, 1, 0, 1, 0, 1, 1, 1])
    groups = Groups.crossed(labels, ["y0", "y1"], place, ["a0", "a1"])
    counts = dict(zip(groups.names, (60, 20, 15, 5), strict=True))
    report = group_report(
        logits_of(answers, 2), labels, groups, split="test", attribute=place, train_counts=counts, smallest=1
    )
    assert [g.n for g in report.groups] == [4, 2, 1, 3]
    assert [g.accuracy for g in report.groups] == [0.75, 0.5, 0.0, 1.0]
    assert [g.tpr for g in report.groups] == [None, None, 0.0, 1.0]
    assert [g.fpr for g in report.groups] == [0.25, 0.5, None, None]
    assert [g.shortcut for g in report.groups] == [0.75, 0.5, 1.0, 1.0]
    assert report.average == 0.7
    assert report.group_mean == pytest.approx(2.25 / 4)
    assert report.adjusted == pytest.approx((60 * 0.75 + 20 * 0.5 + 15 * 0 + 5 * 1) / 100)
    assert (report.worst.name, report.gap, report.pairwise_gap, report.pairwise_ratio) == ("y1, a0", 0.7, 1.0, 0.0)
    p = math.exp(2) / (math.exp(2) + 1)
    assert report.groups[0].nll == pytest.approx(-(3 * math.log(p) + math.log(1 - p)) / 4)
    assert report.groups[0].ece is None  # too few rows


def test_the_adjusted_average_is_that_of_wilds():
    """The formula of WILDS for Waterbirds: accuracies weighted by 3498, 184, 56 and 1057."""
    draw = torch.Generator().manual_seed(0)
    numbers = torch.tensor([0] * 225 + [1] * 225 + [2] * 64 + [3] * 64)
    labels = numbers // 2
    right = torch.rand(len(labels), generator=draw) < torch.tensor([0.99, 0.8, 0.6, 0.95])[numbers]
    groups = Groups.by_number(numbers, ["landbird, land", "landbird, water", "waterbird, land", "waterbird, water"])
    counts = dict(zip(groups.names, (3498, 184, 56, 1057), strict=True))
    report = group_report(
        logits_of(torch.where(right, labels, 1 - labels), 2), labels, groups, split="test", train_counts=counts
    )
    acc = [float(right[numbers == g].double().mean()) for g in range(4)]
    wilds = (acc[0] * 3498 + acc[1] * 184 + acc[2] * 56 + acc[3] * 1057) / (3498 + 184 + 56 + 1057)
    assert report.adjusted == pytest.approx(wilds)
    assert report.worst.name == "landbird, water"  # 64 rows are too few to be the worst
    assert [g.small for g in report.groups] == [False, False, True, True]
    with pytest.raises(ValueError, match="group 'fish' is known in only one of the splits"):
        group_report(
            logits_of(labels, 2), labels, groups, split="test", train_counts={**counts, "fish": 3}
        )  # fmt: skip


@given(st.integers(1, 400), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_intervals_are_wilsons(n, share, level):
    hits = round(n * share)
    labels = torch.zeros(n, dtype=torch.long)
    answers = torch.tensor([0] * hits + [1] * (n - hits))
    groups = Groups.by_number(labels, ["all"])
    right = group_report(logits_of(answers, 2), labels, groups, split="test", level=level).groups[0].right
    z, p = stats.norm.ppf((1 + level) / 2), hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert right.low == pytest.approx(max(0, (middle - half) / (1 + z * z / n)), abs=1e-9)
    assert right.high == pytest.approx(min(1, (middle + half) / (1 + z * z / n)), abs=1e-9)


def test_groups_that_overlap_are_judged_on_their_own_members():
    labels = torch.tensor([0, 0, 1, 1])
    answers = torch.tensor([0, 1, 1, 1])
    attributes = {"old": torch.tensor([1, 1, 1, 0]), "rich": torch.tensor([0, 1, 1, 0])}
    groups = Groups.mentioned(labels, ["no", "yes"], attributes)
    report = group_report(logits_of(answers, 2), labels, groups, split="test", train_counts={}, smallest=1)
    found = {g.name: (g.n, g.accuracy) for g in report.groups}
    assert found == {"old, no": (2, 0.5), "old, yes": (1, 1.0), "rich, no": (1, 0.0), "rich, yes": (1, 1.0)}
    assert report.adjusted is None
    assert report.average == 0.75  # over all rows, also the one in no group


def test_calibration_error_of_a_group_by_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    draw = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(500, 3, generator=draw), torch.randint(3, (500,), generator=draw)
    groups = Groups.by_number((torch.arange(500) < 300).long(), ["few", "many"])
    report = group_report(logits, labels, groups, split="test")
    expected = torchmetrics.multiclass_calibration_error(logits[:300].softmax(-1), labels[:300], 3, n_bins=15)
    assert report.groups[1].ece == pytest.approx(float(expected), abs=1e-6)


def test_an_empty_group_is_named_with_its_split():
    groups = Groups.by_number(torch.tensor([0, 0]), ["here", "nowhere"])
    with pytest.raises(ValueError, match="group 'nowhere' has no row in split 'validation'"):
        group_report(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long), groups, split="validation")


def test_no_group_is_the_worst_if_all_are_too_small():
    labels = torch.tensor([0, 1])
    report = group_report(logits_of([0, 0], 2), labels, Groups.by_number(labels, ["a", "b"]), split="test")
    assert report.worst is None
    assert report.gap is None
    assert "too small" in str(groups_table(report))
    assert "no group is large enough to be called the worst" in str(groups_table(report))


def test_flip_rate():
    answers = torch.tensor([0, 0, 1, 0, 2, 2, 0, 1, 2])
    pairs = torch.tensor([7, 7, 3, 3, 9, 9, 1, 1, 1])
    share, things = flip_rate(answers, pairs)
    assert (share.value, things) == (0.5, 4)  # 3 flips, and 1, with three answers, counts once
    with pytest.raises(ValueError, match="shown only once"):
        flip_rate(answers, torch.arange(9))


# ---------------------------------------------------------------- teacher to student


def test_changes_against_a_bootstrap_of_rows():
    draw = np.random.default_rng(0)
    before, after = torch.tensor(draw.random(300) < 0.9), torch.tensor(draw.random(300) < 0.7)
    numbers = torch.tensor(draw.integers(0, 2, 300))
    changes = group_changes(before, after, Groups.by_number(numbers, ["a", "b"]), split="test")
    assert [c.name for c in changes] == [ALL, "a", "b"]
    for change, inside in zip(changes, (numbers >= 0, numbers == 0, numbers == 1), strict=True):
        d = (after[inside].double() - before[inside].double()).numpy()
        means = d[draw.integers(0, len(d), (4000, len(d)))].mean(1)
        assert change.change == pytest.approx(d.mean())
        np.testing.assert_allclose((change.low, change.high), np.quantile(means, [0.025, 0.975]), atol=0.012)
        assert change.shown == (change.high < 0)
    assert changes == group_changes(before, after, Groups.by_number(numbers, ["a", "b"]), split="test")


def test_things_that_are_shown_twice_are_drawn_once():
    """Against a bootstrap of things, whose two rows agree: its interval is wider than that of rows."""
    random = np.random.default_rng(5)
    things = np.repeat(np.arange(150), 2)
    before, after = (torch.from_numpy(np.repeat(random.random(150) < p, 2)) for p in (0.6, 0.7))
    groups = Groups.by_number(torch.arange(300) % 2, ["a", "b"])
    change = group_changes(before, after, groups, split="test", units=torch.from_numpy(things))[0]
    d = after.double().numpy() - before.double().numpy()
    means = [d.reshape(150, 2)[random.integers(0, 150, 150)].mean() for _ in range(4000)]
    np.testing.assert_allclose((change.low, change.high), np.quantile(means, [0.025, 0.975]), atol=0.012)
    alone = group_changes(before, after, groups, split="test")[0]
    assert alone.high - alone.low < 0.8 * (change.high - change.low)
    assert alone.change == change.change


def test_the_same_answers_are_no_change():
    right = torch.tensor([True, False, True])
    groups = Groups.by_number(torch.zeros(3, dtype=torch.long), ["a"])
    change = group_changes(right, right, groups, split="test")[1]
    assert (change.change, change.low, change.high, change.shown) == (0, 0, 0, False)
    assert "no difference shown" in str(changes_table([change]))


# ---------------------------------------------------------------- exits


def outputs_of(answers, labels):
    logits = torch.stack([logits_of(a, 3, sure) for a, sure in zip(answers, (1.0, 3.0), strict=True)])
    rows = len(labels)
    return ExitOutputs([torch.zeros(rows, 1)] * 2, logits, labels, torch.tensor([10.0, 50.0]))


def test_exits_by_group_against_a_loop():
    draw = torch.Generator().manual_seed(3)
    labels, answers = torch.randint(3, (60,), generator=draw), torch.randint(3, (2, 60), generator=draw)
    numbers, chosen = torch.randint(3, (60,), generator=draw), torch.randint(2, (60,), generator=draw)
    outputs, groups = outputs_of(answers, labels), Groups.by_number(numbers, ["group 0", "group 1", "group 2"])
    table = exits_by_group(outputs, chosen, groups, split="test")
    assert table.names == ("group 0", "group 1", "group 2")
    for g in range(3):
        rows = [i for i in range(60) if numbers[i] == g]
        for e, sure in enumerate((1.0, 3.0)):
            right = [bool(answers[e, i] == labels[i]) for i in rows]
            leaving = [i for i in rows if chosen[i] == e]
            assert float(table.accuracy[e, g]) == pytest.approx(sum(right) / len(rows))
            assert float(table.exit_rate[e, g]) == pytest.approx(len(leaving) / len(rows))
            assert float(table.confidence[e, g]) == pytest.approx(math.exp(sure) / (math.exp(sure) + 2))
            hits = [bool(answers[e, i] == labels[i]) for i in leaving]
            assert float(table.early_accuracy[e, g]) == pytest.approx(sum(hits) / len(hits))
        at = [bool(answers[chosen[i], i] == labels[i]) for i in rows]
        assert float(table.chosen_accuracy[g]) == pytest.approx(sum(at) / len(rows))
        assert float(table.depth[g]) == pytest.approx(sum(int(chosen[i]) + 1 for i in rows) / len(rows))
        assert float(table.flops[g]) == pytest.approx(sum((10.0, 50.0)[chosen[i]] for i in rows) / len(rows))
    assert table.worst() is None  # of 60 rows
    worst = table.worst(smallest=1)
    assert worst == (table.names[int(table.chosen_accuracy.argmin())], float(table.chosen_accuracy.min()))
    assert "group 2" in str(exits_table(table))
    assert (read := decode(ExitsByGroup, encode(table))).flops.tolist() == table.flops.tolist()
    assert str(exits_table(read)) == str(exits_table(table))  # after a turn through JSON
    first, second = budgets_by_group(outputs, [torch.zeros(60).long(), chosen], groups, split="test", smallest=1)
    assert (first.flops, first.worst) == (10.0, pytest.approx(float(table.accuracy[0].min())))
    assert (second.group, second.average) == (worst[0], pytest.approx(table.average[0]))


def test_groups_of_exits_may_overlap():
    labels = torch.tensor([0, 1, 2])
    groups = Groups(("a", "b"), torch.tensor([[True, True], [True, False], [False, True]]))
    table = exits_by_group(outputs_of([[0, 0, 0], [0, 1, 2]], labels), torch.tensor([0, 1, 1]), groups, split="test")
    assert table.chosen_accuracy.tolist() == [1.0, 1.0]
    assert table.accuracy.tolist() == [[0.5, 0.5], [1.0, 1.0]]
    assert table.flops.tolist() == [30.0, 30.0]


def test_exits_that_cannot_be():
    labels = torch.tensor([0, 1, 2])
    outputs = outputs_of([[0, 0, 0], [0, 1, 2]], labels)
    groups = Groups.by_number(torch.zeros(3).long(), ["a"])
    with pytest.raises(ValueError, match=r"one in 0..1 for each of the 3 rows is needed"):
        exits_by_group(outputs, torch.full((3,), 2), groups, split="test")
    with pytest.raises(ValueError, match="groups are of 2 rows, outputs of 3"):
        exits_by_group(outputs, torch.zeros(3).long(), groups.take(torch.tensor([0, 1])), split="test")


# ---------------------------------------------------------------- weights


@given(st.lists(st.tuples(st.sampled_from([1.0, 2.0, 5.0]), st.booleans()), min_size=0, max_size=40))
def test_auroc_counts_pairs(rows):
    rows = [*rows, (1.0, False)]  # that no gate holds for
    weights, minority = torch.tensor([w for w, _ in rows]), torch.tensor([m for _, m in rows])
    found = weight_diagnostics(weights, minority=minority)
    pairs = [(a > b) + 0.5 * (a == b) for a, m in rows if m for b, n in rows if not n]
    assert found.auroc == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)
    touched = [m for w, m in rows if w != 1]
    assert found.reweighted == pytest.approx(len(touched) / len(rows))
    assert found.precision == (pytest.approx(sum(touched) / len(touched)) if touched else None)
    heavy = [w != 1 for w, m in rows if m]
    assert found.recall == (pytest.approx(sum(heavy) / len(heavy)) if heavy else None)
    assert found.quantiles == pytest.approx(np.quantile(weights.numpy(), QUANTILES))


@given(st.integers(1, 30), st.floats(1.5, 60))
def test_a_division_by_the_mean_hides_no_weight(heavy, factor):
    weights, minority = torch.ones(1000), torch.arange(1000) < heavy
    weights[minority] = factor
    found = weight_diagnostics(weights / weights.mean(), minority=minority)
    assert (found.reweighted, found.precision, found.recall) == (pytest.approx(heavy / 1000), 1.0, 1.0)
    assert found.too_few == (heavy < 5)
    assert ("too few" in str(weights_table({1: found}))) == found.too_few


def test_mean_weight_of_each_group():
    groups = Groups(("a", "b"), torch.tensor([[True, False], [True, True], [False, True]]))
    found = weight_diagnostics(torch.tensor([1.0, 3.0, 1.0]), groups)
    assert found.by_group == {"a": 2.0, "b": 2.0}
    assert (found.mean, found.auroc) == (pytest.approx(5 / 3), None)
    assert weight_diagnostics(torch.ones(10)).too_few
    assert weight_diagnostics(torch.full((10,), 3.0)).reweighted == 0  # none counts more than another
    with pytest.raises(ValueError, match=r"the weight of row 1 is nan"):
        weight_diagnostics(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="groups are given for 3 rows, weights for 2"):
        weight_diagnostics(torch.ones(2), groups)


@pytest.mark.parametrize(
    ("counts", "minority"),
    [
        ([[3498, 184], [56, 1057]], [[0, 1], [1, 0]]),  # Waterbirds
        ([[71629, 66874], [22880, 1387]], [[0, 0], [0, 1]]),  # CelebA
        ([[574, 112], [674, 15], [666, 20]], [[0, 0], [0, 1], [0, 1]]),  # MultiNLI, hundredths
        ([[96, 1, 1], [1, 96, 1], [2, 2, 96]], [[0, 1, 1], [1, 0, 1], [1, 1, 0]]),
        ([[5, 5], [5, 5]], [[0, 0], [0, 0]]),
    ],
)
def test_minority_is_where_the_shortcut_fails(counts, minority):
    cells = [(y, a) for y, row in enumerate(counts) for a in range(len(row))]
    labels = torch.cat([torch.full((counts[y][a],), y) for y, a in cells])
    attribute = torch.cat([torch.full((counts[y][a],), a) for y, a in cells])
    found = minority_rows(labels, attribute)
    for y, a in cells:
        assert set(found[(labels == y) & (attribute == a)].tolist()) == {bool(minority[y][a])}
    attribute[0] = -1
    assert not minority_rows(labels, attribute)[0]


# ---------------------------------------------------------------- selection


def epoch(number, average, loss, worst_class, mean=None, worst=None, test=0.5):
    return Epoch(number, Judged(average, loss, worst_class, mean, worst), Judged(0.9, 1.0, 0.5, 0.7, test))


HISTORY = [
    epoch(1, 0.90, 0.30, 0.60, 0.70, 0.55, test=0.50), epoch(2, 0.95, 0.20, 0.80, 0.82, 0.60, test=0.58),
    epoch(3, 0.94, 0.40, 0.85, 0.80, 0.65, test=0.66), epoch(4, 0.95, 0.50, 0.70, 0.79, 0.40, test=0.41),
]  # fmt: skip


def test_what_each_rule_chooses():
    chosen = {rule: found.number for rule, found in choices(HISTORY).items()}
    assert chosen == {
        "last": 4, "val_average": 2, "val_worst_class": 3, "val_group_mean": 2, "val_worst_group": 3, "val_loss": 2,
    }  # fmt: skip
    lines = str(selection_table(HISTORY)).splitlines()
    assert [cell.strip() for cell in lines[6].split("|")[1:-1]] == [
        "val_worst_group", "3", "94.0%", "65.0%", "90.0%", "66.0%"
    ]  # fmt: skip


def test_of_epochs_that_are_alike_the_best_on_average_is_chosen():
    """With a group that no epoch gets right, the first epoch would be a model that has learnt nothing."""
    history = [epoch(1, 0.3, 1, 0, 0.3, 0), epoch(2, 0.8, 1, 0, 0.8, 0), epoch(3, 0.8, 1, 0, 0.8, 0)]
    assert {select(history, rule).number for rule in ("val_worst_group", "val_worst_class", "val_loss")} == {2}


def test_rules_that_need_groups():
    blind = [epoch(1, 0.9, 0.3, 0.6), epoch(2, 0.8, 0.2, 0.7)]
    assert list(choices(blind)) == ["last", "val_average", "val_worst_class", "val_loss"]
    with pytest.raises(ValueError, match="the rule val_worst_group needs groups of validation rows"):
        select(blind, "val_worst_group")
    with pytest.raises(ValueError, match=f"the selection rule is 'best'; allowed are {', '.join(map(repr, RULES))}"):
        select(blind, "best")
    with pytest.raises(ValueError, match="has recorded no epoch"):
        select([], "last")


def test_judged_numbers():
    labels, answers = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 0, 2])
    logits = logits_of(answers, 4)
    groups = Groups.by_number(torch.tensor([0, 1, 1, 1, 0, 0]), ["a", "b"])
    found = judge(logits, labels, groups, split="val")
    assert (found.average, found.worst_class) == (pytest.approx(4 / 6), 0.5)
    assert (found.group_mean, found.worst_group) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert found.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))
    assert judge(logits, labels, split="val").worst_group is None
    with pytest.raises(ValueError, match="split 'val' has no rows"):
        judge(logits[:0], labels[:0], split="val")


def test_label_budget():
    budget = LabelBudget().plus("reporting", "test", 5794)
    assert budget.label_free
    used = budget.plus("selection", "val", 1199).plus("teacher training", "train", 4795).plus("selection", "val", 1)
    assert not used.label_free
    assert used.line() == (
        "Group labels used (not label-free): teacher training train 4,795; student training none; weights none; "
        "selection val 1,200; calibration none; reporting test 5,794."
    )
    with pytest.raises(ValueError, match="the use is 'tuning'; allowed are 'teacher training', "):
        budget.plus("tuning", "val", 3)


# ---------------------------------------------------------------- seeds


def test_the_two_kinds_of_worst_group():
    found = summarise_seeds([[0.6, 0.9, 0.8], [0.9, 0.5, 0.8], [0.9, 0.9, 0.6]], ["a", "b", "c"])
    assert found.mean_of_minima.mean == pytest.approx((0.6 + 0.5 + 0.6) / 3)
    assert found.mean_of_minima.sd == pytest.approx(np.std([0.6, 0.5, 0.6], ddof=1))
    assert (found.minimum_of_means, found.minimum_group) == (pytest.approx(2.2 / 3), "c")


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=8))
def test_the_mean_of_minima_is_never_above_the_minimum_of_means(table):
    found = summarise_seeds(table, ["a", "b", "c"])
    assert found.mean_of_minima.mean <= found.minimum_of_means + 1e-9


def test_paired_comparison_by_scipy():
    draw = np.random.default_rng(0)
    first, second = draw.normal(0.8, 0.1, 9), draw.normal(0.7, 0.1, 9)
    found = paired(first, second)
    test = stats.ttest_rel(first, second)
    interval = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert t_interval(first - second) == pytest.approx((interval.low, interval.high))
    assert all(math.isnan(end) for end in t_interval([0.5]))
    assert found.t_p == pytest.approx(test.pvalue)
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(first, second).pvalue)
    assert found.difference.sd == pytest.approx(np.std(first - second, ddof=1))


def test_comparisons_without_a_difference():
    same = paired([0.5, 0.6, 0.7], [0.5, 0.6, 0.7])
    assert (same.t_p, same.wilcoxon_p, same.verdict) == (None, 1.0, "no difference shown")
    shifted = paired([0.6, 0.7, 0.8], [0.5, 0.6, 0.7])
    assert (shifted.t_p, shifted.verdict) == (None, "not tested")  # a t test of no spread
    some = paired([0.5, 0.6, 0.9, 0.4], [0.5, 0.6, 0.7, 0.3])  # Wilcoxon leaves out the zeros, quietly
    assert some.wilcoxon_p == pytest.approx(0.5)
    with pytest.raises(ValueError, match="for two seeds or more"):
        paired([0.5], [0.4])
    with pytest.raises(ValueError, match="not finite"):
        paired([0.5, math.nan], [0.4, 0.4])


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_steps_down(p_values):
    corrected = holm(p_values)
    for level in (0.01, 0.05, 0.2):
        rejected = set()
        for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):  # Holm, 1979
            if p_values[i] > level / (len(p_values) - rank):
                break
            rejected.add(i)
        sure = {i for i, p in enumerate(corrected) if abs(p - level) > 1e-12}
        assert {i for i in sure if corrected[i] <= level} == rejected & sure


def test_compare_corrects_for_the_number_of_methods():
    draw = np.random.default_rng(1)
    reference = draw.normal(0.7, 0.05, 6)
    methods = {name: reference + draw.normal(shift, 0.05, 6) for name, shift in (("a", 0.1), ("b", 0.02), ("c", 0))}
    found = compare(methods, reference)
    assert [found[n].holm_p for n in methods] == pytest.approx(holm([found[n].t_p for n in methods]))
    table = seeds_table({n: summarise_seeds(np.c_[v, v], ["x", "y"]) for n, v in methods.items()}, found)
    assert str(table).count("|") == 8 * 5


def test_verdicts_follow_holms_p_and_not_the_interval():
    """Four methods of five seeds whose t tests have p = .03, .02, .6, .001: by Holm's method the last is left."""
    reference = np.full(5, 0.5)
    draw = np.random.default_rng(2).normal(0, 1, 5)
    unit = (draw - draw.mean()) / draw.std(ddof=1)
    wanted = {"a": 0.03, "b": 0.02, "c": 0.6, "d": 0.001}
    methods = {}
    for name, p in wanted.items():
        t = stats.t.isf(p / 2, 4)
        methods[name] = reference + 0.02 * (unit + t / 5**0.5) * (-1 if name == "b" else 1)
    found = compare(methods, reference)
    assert [found[n].t_p for n in wanted] == pytest.approx(list(wanted.values()))
    assert found["a"].low > 0
    assert found["b"].high < 0
    verdicts = [found[n].verdict for n in wanted]
    assert verdicts == ["no difference shown"] * 3 + ["higher"]
    alone = [paired(values, reference).verdict for values in methods.values()]  # nothing to correct for
    assert alone == ["higher", "lower", "no difference shown", "higher"]


def test_intervals_of_shares_stay_in_their_bounds():
    high, low = [0.99, 1.0, 0.95, 1.0], [0.02, 0.0, 0.9, 0.0]
    assert t_interval(high)[1] > 1
    assert t_interval(high, bounds=SHARES)[1] == 1
    assert t_interval(high, bounds=SHARES)[0] == t_interval(high)[0]
    free = paired(high, low)
    found = paired(high, low, bounds=CHANGES)
    assert free.high > 1
    assert (found.low, found.high) == (free.low, 1)
    assert found.t_p == free.t_p
    assert compare({"a": high}, low, bounds=CHANGES)["a"].high == 1
    assert all(math.isnan(end) for end in t_interval([0.5], bounds=SHARES))


# ---------------------------------------------------------------- pictures


MANY = [f"an attribute with a long name, {n}" for n in range(7)]


@pytest.fixture(params=[["a", "b"], MANY], ids=["few", "many"])
def everything(request):
    draw = torch.Generator().manual_seed(0)
    labels, answers = torch.randint(3, (400,), generator=draw), torch.randint(3, (2, 400), generator=draw)
    other = torch.randint(len(request.param), (400,), generator=draw)
    groups = Groups.crossed(labels, ["x", "y", "z"], other, request.param)
    outputs = outputs_of(answers, labels)
    report = group_report(outputs.logits[1], labels, groups, split="test", smallest=20)
    exits = exits_by_group(outputs, torch.randint(2, (400,), generator=draw), groups, split="test")
    weights = 1 + torch.rand(400, generator=draw)
    return report, exits, weights, groups


def test_pictures_are_drawn_and_not_cut_off(tmp_path, everything):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from offramp.report import distillation, drawing

    report, exits, weights, groups = everything
    drawings = {
        "groups": lambda: distillation.groups_figure({"teacher": report, "student": report}),
        "exits": lambda: distillation.exits_figure(exits),
        "weights": lambda: distillation.weights_figure(weights, groups, epoch=3),
    }
    paths = drawing.save_figures(drawings, tmp_path)
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in drawings for kind in ("svg", "png")]
    before = [path.read_bytes() for path in paths]
    for path in paths:
        if path.suffix == ".svg":
            assert "<dc:date>" not in path.read_text()
            continue
        pixels = imread(path)[:, :, :3]
        assert min(pixels.shape[:2]) > 400
        for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
            assert (edge == 1).all(), path.name
    assert [path.read_bytes() for path in drawing.save_figures(drawings, tmp_path)] == before
