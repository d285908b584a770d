"""What `offramp distill` prints and `offramp report` shows of a grid, against its runs' predictions."""

import copy
import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from typer.testing import CliRunner

from distillation_runs import READOUT, small_study
from offramp import cli
from offramp.distillation import DataConfig, run_grid, runs
from offramp.distillation.data import load_set
from offramp.distillation.grid import ensure
from offramp.distillation.judging import THRESHOLDS, kept_weights, suggested
from offramp.distillation.results import budgets_of, mean_exits, mean_report, report_of, results_in
from offramp.distillation.teacher import save_logits
from offramp.metrics.intervals import binomial
from offramp.report.grids import by_method, changes_of_methods, detection_table, tables, write_groups
from offramp.runs.digests import sealed

pytest.importorskip("sklearn")
STUDY = small_study(2)
METHODS, RULE = ["erm", "kd", "dedier"], "val_worst_group"


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    root = tmp_path_factory.mktemp("grid")
    return root, run_grid(runs(STUDY, METHODS, ["erm"], [0, 1], READOUT), root)


def named(results, name, seed=0):
    return next(r for r in results if (r["name"], r["seed"]) == (name, seed))


def right_of(folder, data):
    return load_file(folder / "predictions.safetensors")["selected"][-1].argmax(-1) == data.test.rows.labels


def rows_of(text, title):
    """The cells of a table under a title, by the first cell."""
    block = text.split(f"### {title}\n\n")[1].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in block]
    return {row[0]: row[1:] for row in [cells[0], *cells[2:]]}


def older(results):
    """As a version without reports by group wrote them."""
    return [{k: v for k, v in r.items() if k not in ("report", "changes", "budgets")} for r in results]


# ---------------------------------------------------------------- what a run finds


def test_changes_and_budgets_are_those_of_the_predictions(grid):
    root, results = grid
    result, data = named(results, "kd"), load_set(STUDY.data, 0)
    asked = runs(STUDY, ["kd"], ["erm"], [0], READOUT)[0]
    before = right_of(ensure(asked.teacher_run(), root, place="shared"), data)
    after = right_of(root / "runs" / result["key"], data)
    for place, name in enumerate(data.test.groups.names):
        inside, change = data.test.groups.members[:, place], result["changes"][place + 1]
        assert change["name"] == name
        assert (change["before"], change["after"]) == pytest.approx(
            (float(before[inside].double().mean()), float(after[inside].double().mean()))
        )
        assert change["low"] <= change["after"] - change["before"] <= change["high"]
        share = binomial(int(after[inside].sum()), int(inside.sum()), method="wilson")
        assert report_of(result).groups[place].right == share
    counts = torch.tensor([data.counts()["train"][name] for name in data.test.groups.names]).double()
    shares = after.double() @ data.test.groups.members.double() / data.test.groups.counts
    assert result["adjusted"] == report_of(result).adjusted == pytest.approx(float(shares @ counts / counts.sum()))
    assert named(results, "erm")["changes"] is None
    budgets = budgets_of(result)
    assert list(budgets) == list(THRESHOLDS)
    costs = result["exits"]["costs"]
    assert budgets[1.0].flops == pytest.approx(costs[-1])
    assert all(
        a.flops <= b.flops + 1e-9 for a, b in zip(list(budgets.values()), list(budgets.values())[1:], strict=False)
    )
    at = budgets[STUDY.threshold]
    assert (at.average, at.flops) == pytest.approx(tuple(result["exits"]["average"]))


def test_a_given_teacher_answers_test_rows_too(grid, tmp_path):
    root, results = grid
    data = load_set(STUDY.data, 0)
    asked = runs(STUDY, ["kd"], ["erm"], [0], READOUT)[0]
    teacher = ensure(asked.teacher_run(), root, place="shared")
    known = [change["before"] for change in named(results, "kd")["changes"]]
    folder = run_grid(runs(STUDY, ["kd"], [f"folder:{teacher / 'model'}"], [0]), tmp_path / "folder")[0]
    assert [change["before"] for change in folder["changes"]] == pytest.approx(known)
    train = data.train.rows
    save_logits(tmp_path / "t.safetensors", torch.randn(len(train), 2), train.ids, train.classes, "elsewhere")
    logits = run_grid(runs(STUDY, ["kd"], [f"logits:{tmp_path / 't.safetensors'}"], [0]), tmp_path / "logits")
    assert logits[0]["changes"] is None  # they are of training rows alone
    assert "no answers of the teacher" in tables(logits, RULE)


def test_the_last_weights_are_kept(grid):
    root, results = grid
    for result in (r for r in results if r["name"] == "dedier"):
        weights, groups, epoch = kept_weights(root / "runs" / result["key"])
        said = result["history"][-1]["weights"]
        assert epoch == result["history"][-1]["epoch"]
        means = weights.double() @ groups.members.double() / groups.counts
        assert dict(zip(groups.names, means.tolist(), strict=True)) == pytest.approx(said["by_group"])
    assert kept_weights(root / "runs" / named(results, "kd")["key"]) is None


def test_what_the_shortcut_suggests():
    data = load_set(STUDY.data, 0)
    agree = (suggested(data) == data.test.rows.labels).double() @ data.test.groups.members.double()
    assert (agree / data.test.groups.counts).tolist() == [1, 0, 0, 1]
    nli = DataConfig("stand-in:template-nli", options={"train": 300, "val": 60, "test": 60})
    assert suggested(load_set(nli, 0)) is None  # two values, three classes


# ---------------------------------------------------------------- what is printed


def test_readouts_stand_beside_their_weights(grid):
    _, results = grid
    own = [named(results, "dedier", seed) for seed in (0, 1)]
    read = [row["readout"] for result in own for row in result["history"] if row.get("readout")]
    assert len(read) == 2  # of two epochs each, behind the last there is none
    cells = rows_of(tables(results, RULE), "Weights of training rows")
    accuracy, chance = (np.mean([row[name] for row in read]) for name in ("accuracy", "chance"))
    assert cells["dedier"][0] == f"{accuracy:.1%} (chance {chance:.1%})"
    text = tables(results, RULE)
    assert "Readout: its accuracy on the training rows" in text
    low = [stats.binomtest(round(r["accuracy"] * 64), 64).proportion_ci(method="wilson").low for r in read]
    near = sum(end <= r["chance"] for end, r in zip(low, read, strict=True))
    assert ("Near chance:" in text) == bool(near)
    assert (f"near chance in {near} of 2" in cells["dedier"][-1]) == bool(near)

    changed = copy.deepcopy(own)
    for result in changed:
        for row in result["history"]:
            if row.get("readout"):
                row["readout"] |= {"accuracy": 0.52, "chance": 0.5, "gated": 1.0, "empty": True}
    text = str(detection_table({"dedier": changed}))
    assert "near chance in 2 of 2; nearly all gated in 2 of 2; sets empty in 2 of 2" in text
    for note in (
        "Near chance: in a batch",
        "Nearly all gated: above 99.5% of the rows",
        "Sets empty: those of all rows",
    ):
        assert note in text
    for result in changed:  # as an older version wrote them
        for row in result["history"]:
            row.pop("readout", None)
    assert "Readout:" not in str(detection_table({"dedier": changed}))


def test_every_table_is_printed_for_each_teacher(grid):
    _, results = grid
    text = tables(results, RULE)
    groups = rows_of(text, "Every group")
    names, counts = results[0]["groups"]["names"], results[0]["groups"]["test"]
    assert groups["method"] == [*names, "average", "adjusted", "average - worst", "best - worst"]
    assert groups["test rows"][:4] == [str(count) for count in counts]
    found = np.array([named(results, "kd", seed)["rules"][RULE]["groups"] for seed in (0, 1)])
    assert [cell.split("%")[0] for cell in groups["kd"][:4]] == [f"{100 * mean:.1f}" for mean in found.mean(0)]
    assert mean_report([named(results, "kd", s) for s in (0, 1)], RULE).groups[0].right.value == found.mean(0)[0]
    changes = rows_of(text, "What distillation cost each group")
    assert set(changes) == {"student minus teacher", "the teacher's accuracy", "kd", "dedier"}
    deltas = np.array([[c["after"] - c["before"] for c in named(results, "kd", seed)["changes"]] for seed in (0, 1)])
    assert [cell.split("%")[0] for cell in changes["kd"]] == [f"{100 * mean:+.1f}" for mean in deltas.mean(0)]
    exits = rows_of(text, "Exits by group")
    kd = [named(results, "kd", seed)["exits"] for seed in (0, 1)]
    for place, key in enumerate(("accuracy", "confidence", "exit_rate")):
        share = float(exits["kd"][1].split(" / ")[place].rstrip("%"))
        assert share == pytest.approx(100 * np.mean([e[key][0][0] for e in kd]), abs=0.51)
    assert exits["method"][-1] == "FLOPs"
    weights = rows_of(text, "Weights of training rows")
    assert set(weights) == {"method", "dedier"}
    assert "Group labels used" in text.split("### Where group labels were used")[1]


def test_long_tables_are_cut_for_a_terminal(grid):
    _, results = grid
    few = tables(results, RULE, 1)
    assert "2 more methods are in report.md." in few
    assert len(tables(results, RULE).splitlines()) - len(few.splitlines()) == 2 * 4 - 2
    assert "more methods" not in tables(results, RULE, 3)


def test_one_seed_has_intervals_of_its_rows(grid):
    _, results = grid
    own = [r for r in results if r["seed"] == 0]
    cell = rows_of(tables(own, RULE), "Every group")["kd"][0]
    right = report_of(named(own, "kd")).groups[0].right
    assert cell == f"{right.value:.1%} ({100 * right.low:.1f} to {100 * right.high:.1f})"
    change = named(own, "kd")["changes"][0]
    low, high = (f"{100 * change[end]:+.1f}" for end in ("low", "high"))
    assert changes_of_methods(by_method(own, "erm")).rows[1][1].endswith(f"({low} to {high})")


def test_weights_that_touch_nothing_are_warned_of(grid):
    _, results = grid
    own = copy.deepcopy([r for r in results if r["name"] == "dedier"])
    clean = [
        replaced for replaced in own if not any(row["weights"]["reweighted"] < 0.005 for row in replaced["history"])
    ]
    assert len(clean) == 2
    assert "too few" not in str(detection_table({"dedier": own}))
    own[0]["history"][0]["weights"]["reweighted"] = 0.001
    said = str(detection_table({"dedier": own}))
    assert "too few in 1 of 2" in said
    assert "hardly an error left" in said
    for result in own:
        result["method"]["weights"]["control"] = "mean-matched"  # all rows weigh the same, as they should
    assert "too few" not in str(detection_table({"dedier": own}))
    for result in own:
        result["method"]["weights"]["warmup"] = 1
    assert not detection_table({"dedier": own}).rows  # of two epochs the second has a readout no more


def test_older_results_lack_only_what_they_did_not_keep(grid):
    _, results = grid
    text, old = tables(results, RULE), tables(older(results), RULE)
    assert "Unknown: the runs have no answers of the teacher" in old
    for title in ("Worst group", "Every group", "Exits by group", "Weights of training rows"):
        assert rows_of(old, title) == rows_of(text, title)


def test_groups_as_csv(grid, tmp_path):
    _, results = grid
    write_groups(results, tmp_path / "groups.csv")
    rows = list(csv.DictReader((tmp_path / "groups.csv").read_text().splitlines()))
    assert len(rows) == len(results) * 4
    row = next(r for r in rows if (r["method"], r["seed"], r["group"]) == ("kd", "1", "low, blue"))
    result = named(results, "kd", 1)
    place = result["groups"]["names"].index("low, blue")
    assert float(row["accuracy"]) == pytest.approx(result["rules"][RULE]["groups"][place])
    assert float(row["mean_flops"]) == result["exits"]["flops"][place]
    assert float(row["low"]) < float(row["accuracy"]) < float(row["high"])
    write_groups(older(results), tmp_path / "groups.csv")
    assert next(csv.DictReader((tmp_path / "groups.csv").read_text().splitlines()))["nll"] == ""


# ---------------------------------------------------------------- what is shown


def report(*arguments):
    found = CliRunner().invoke(cli.app, ["report", *map(str, arguments)])
    return found.exit_code, " ".join((found.stderr + str(found.exception or "")).replace("│", " ").split())


def titles(text):
    return re.findall("<h3.*?>(.*?)</h3>", text)


def test_a_grid_has_one_page_with_tables_and_pictures(grid, tmp_path):
    pytest.importorskip("matplotlib")
    root, results = grid
    shutil.copytree(root / "runs", tmp_path / "grid" / "runs")
    (tmp_path / "grid" / "runs" / "kd--erm--seed1" / "result.json").unlink()
    assert report(tmp_path / "grid", "--out", tmp_path / "all.html")[0] == 0
    text = (tmp_path / "all.html").read_text()
    assert titles(text)[:5] == [
        "What was run", "Teacher erm: worst group", "Teacher erm: every group",
        "Teacher erm: what distillation cost each group", "Teacher erm: exits by group",
    ]  # fmt: skip
    assert "1 runs (kd--erm--seed1)" in text
    assert text.count("<svg") == 1 + 3 + 1  # groups; exits of three methods; weights of dedier
    assert "http" not in text
    assert len(results_in(tmp_path / "grid")[0]) == len(results) - 1


def test_a_run_has_a_page_too_old_or_new(grid, tmp_path):
    pytest.importorskip("matplotlib")
    root, results = grid
    folder = tmp_path / "run"
    shutil.copytree(root / "runs" / named(results, "dedier")["key"], folder)
    assert report(folder, "--out", tmp_path / "new.html")[0] == 0
    new = (tmp_path / "new.html").read_text()
    wanted = [
        "Every group", "What distillation cost each group", "Exits by group", "The worst group at each budget",
        "Weights after each epoch", "What each rule would have chosen", "Where group labels were used",
    ]  # fmt: skip
    assert titles(new)[:7] == wanted
    assert new.count("<svg") == 3
    (folder / "result.json").write_text(json.dumps(sealed(older([named(results, "dedier")])[0])))
    (folder / "weights.safetensors").unlink()
    assert report(folder, "--out", tmp_path / "old.html")[0] == 0
    old = (tmp_path / "old.html").read_text()
    assert titles(old)[:5] == [wanted[0], *wanted[2:3], *wanted[4:7]]
    assert old.count("<svg") == 2


def test_runs_that_are_not_finished_say_so(grid, tmp_path):
    root, results = grid
    shutil.copytree(root / "runs" / results[0]["key"], tmp_path / "runs" / "erm--seed0")
    (tmp_path / "runs" / "erm--seed0" / "result.json").unlink()
    for place in (tmp_path, tmp_path / "runs" / "erm--seed0"):
        code, said = report(place)
        assert code != 0
        assert "not finished; start it again" in said or "is finished; start offramp distill again" in said


def test_means_over_runs(grid):
    _, results = grid
    own = by_method(results, "erm")["dedier"]
    found = mean_exits(own)
    assert found.depth.tolist() == pytest.approx(np.mean([r["exits"]["depth"] for r in own], 0).tolist())
    assert found.names == tuple(own[0]["groups"]["names"])
