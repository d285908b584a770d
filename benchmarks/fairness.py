"""Write docs/results/fair-distillation.md: every method with biased and debiased teachers, group by group.

    .venv/bin/python benchmarks/fairness.py digits-on-colour [--seeds 5] [--processes 2] [--methods kd,dedier]
    .venv/bin/python benchmarks/fairness.py mnist-on-colour --data FOLDER   # Fashion-MNIST's four files
    .venv/bin/python benchmarks/fairness.py spuco-mnist --data FOLDER       # MNIST's four files
    .venv/bin/python benchmarks/fairness.py template-nli
    .venv/bin/python benchmarks/fairness.py snli-negation --data FILE       # MiniLM, packaged
    .venv/bin/python benchmarks/fairness.py page                            # from all grids in --out

A grid that was interrupted goes on. The page is made of the grids' results alone.
"""

# ruff: noqa: E501 - one claim, one line

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from difficulty import AVERAGE, GAIN, WORST
from fair_figures import exits_figure, worst_figure

import offramp
from offramp.distillation import DataConfig, Network, Study, run_grid, runs
from offramp.distillation.config import bundled, study_from
from offramp.distillation.results import Result, results_in
from offramp.metrics.intervals import CHANGES, SIGNIFICANT, Paired, holm, paired, spread
from offramp.report.drawing import require_matplotlib, save_figures
from offramp.report.grids import (
    by_method,
    detection_table,
    exits_of_methods,
    groups_of_methods,
    labels_table,
    methods_table,
    rules_table,
    worst,
)
from offramp.runs.tables import markdown

PAGE = Path(__file__).parents[1] / "docs" / "results" / "fair-distillation.md"
STUDIES = ("digits-on-colour", "mnist-on-colour", "spuco-mnist", "template-nli", "snli-negation")
IMAGES = STUDIES[:3]
TEACHERS = ("erm", "group_dro")
FEW_GROUPS = 8
PLAIN = ("erm", "group_balanced", "group_dro", "jtt", "lff", "dfr")
DISTILLED = ("kd", "simkd", "dett", "dedier")
SIGNALS = ("laplace", "laplace_entropy", "laplace_variance", "avcs", "avcs_size", "nested", "nested_size")
CONTROLS = ("dedier_gate", "dedier_permuted", "dedier_mean", "dedier_oracle")
AT_ONE = tuple(f"{name}+alpha=1" for name in ("dedier", *SIGNALS))
GATED_ALIKE = ("nested+alpha=1+gate=wrong", "avcs+alpha=1+gate=wrong")
UNGATED = ("dedier+gate=all+alpha=1", "laplace+gate=all+alpha=1", "laplace+gate=all")
TERMS = tuple(f"{name}+fraction=0.5" for name in ("kd", "dedier", "dedier_code", "dedier_permuted"))
SCALED = ("dedier_gate+normalise=mean", "dedier+alpha=1+normalise=mean", "dedier+alpha=1+control=gate-matched")
FRACTIONS = ("kd+fraction=0.1", "kd+fraction=1.0")
SELF = ("kd+self",)
ALIKE = "kd+temperature=3+fraction=1.0"  # KD with the T and λ of the methods with weights; published KD has 4 and 0.9
METHODS = (*PLAIN, *DISTILLED, ALIKE, *SIGNALS, *CONTROLS, *AT_ONE, *GATED_ALIKE, *UNGATED, *TERMS, *SCALED, *FRACTIONS)
RULE, FREE_RULE = "val_worst_group", "val_average"

# ---------------------------------------------------------------- running


def study_of(name: str, data: str | None) -> tuple[Study, Mapping[str, Any]]:
    """The study of the settings that come with the library."""
    values = bundled(name)
    stand_in = f"stand-in:{name}:{data}" if "mnist" in name else f"stand-in:{name}"
    path = data if name == "snli-negation" else stand_in
    if path is None or "None" in path:
        raise SystemExit(f"{name} needs --data, a local folder or file")
    own = {key: dict(values[key]) for key in ("data", "student", "teacher")}
    task = own["data"].pop("task", None)
    own["data"].pop("path", None)
    base = Study(DataConfig(path, task), Network(own["student"].pop("source")), Network(own["teacher"].pop("source")))
    return replace(study_from({**values, **own}, base), select=RULE), values["methods"]


def run(name: str, options: argparse.Namespace) -> None:
    """Train what is missing, seed by seed: finished seeds are a result already."""
    study, settings = study_of(name, options.data)
    root = Path(options.out) / name
    names = options.methods.split(",") if options.methods else [*METHODS, *SELF]
    others = [name for name in names if name not in SELF]
    teachers = options.teachers.split(",")
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    for seed in seeds:
        show = lambda done, total, key: print(f"seed {seed}: {done}/{total} {key}", flush=True)  # noqa: B023, E731
        if others:
            run_grid(runs(study, others, teachers, [seed], settings), root, processes=options.processes, progress=show)
    if set(SELF) & set(names):  # self-distillation: a teacher of the student's own size
        same = replace(study, teacher=study.student, teacher_training=study.training)
        run_grid(runs(same, ["kd"], teachers, seeds, settings), root / "self", processes=options.processes)


def with_self(root: Path) -> list[dict[str, Any]]:
    """All finished runs, with those of self-distillation under a name of their own."""
    places = [(place, suffix) for place, suffix in ((root, ""), (root / "self", "+self")) if (place / "runs").is_dir()]
    found = [{**r, "name": r["name"] + suffix} for place, suffix in places for r in results_in(place)[0]]
    order = {name: at for at, name in enumerate((*METHODS, *SELF))}
    return sorted(found, key=lambda r: (order.get(r["name"], 999), r["teacher"] or "", r["seed"]))


def teachers_in(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Results of the teachers themselves, by how they were trained: those that runs with a teacher waited for."""
    found: dict[str, list[dict[str, Any]]] = {}
    wanted = [json.loads(p.read_text("utf-8")) for p in sorted((root / "runs").glob("kd--*/result.json"))]
    sources = {(r["teacher"], r["seed"]): r["study"]["teacher"]["source"] for r in wanted}
    for path in sorted((root / "shared").glob("*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if sources.get((result["name"], result["seed"])) == result["study"]["student"]["source"]:
            found.setdefault(result["name"], []).append(result)
    return {name: sorted(own, key=lambda r: r["seed"]) for name, own in found.items()}


# ---------------------------------------------------------------- claims


@dataclass(frozen=True)
class Evidence:
    """A paired difference that a claim says is above 0."""

    what: str
    found: Paired

    def words(self) -> str:
        """What was compared, and the difference."""
        found = self.found
        return f"{self.what}: {found.difference.mean:+.1%} ({found.low:+.1%} to {found.high:+.1%}, {found.seeds} seeds)"


Kind = dict[str, list[Result]]


def difference(
    what: str, first: Sequence[Result], second: Sequence[Result], rule: str | None = RULE
) -> Evidence | None:
    """First minus second, worst group, over the seeds that both have; without a rule, by each one's own."""
    seeds = sorted({r["seed"] for r in first} & {r["seed"] for r in second})
    if len(seeds) < 2:
        return None
    a, b = (
        [worst([r], rule or r["study"]["select"])[0] for s in seeds for r in own if r["seed"] == s]
        for own in (first, second)
    )
    return Evidence(what, paired(a, b, bounds=CHANGES))


def claims(
    results: list[dict[str, Any]], teachers: Mapping[str, list[dict[str, Any]]]
) -> list[tuple[str, list[Evidence | None]]]:
    """Claims 1 to 10 with what speaks for each, None where it has not run; all parts above 0 is a yes."""
    methods = {teacher: by_method(results, teacher) for teacher in TEACHERS}
    biased, fair = methods["erm"], methods["group_dro"]

    def versus(own: Kind, a: str, b: str, rule: str = RULE, note: str = "") -> Evidence | None:
        if a not in own or b not in own:
            return None
        return difference(f"{a} against {b}{note}", own[a], own[b], rule)

    def both(a: str, b: str, rule: str = RULE) -> list[Evidence | None]:
        return [versus(methods[t], a, b, rule, f", {t} teacher") for t in TEACHERS]

    def exits(results: Sequence[Result], key: str) -> Evidence | None:
        """How much more the first exit depends on the shortcut than the last: gaps between best and worst group."""
        if len(results) < 2:
            return None
        table = np.array([r["exits"]["accuracy"] for r in results])  # [S, E, G]
        gap = table.max(2) - table.min(2)
        return Evidence(key, paired(gap[:, 0], gap[:, -1], bounds=CHANGES))

    taught = [(t, f"{t} teacher, at the epoch that taught", None) for t in TEACHERS]
    taught += [("erm", f"erm teacher, at the epoch that {RULE} chooses", RULE)]
    teacher_gap = [
        difference(f"{what}, against its kd student", teachers.get(t, []), methods[t].get("kd", []), rule)
        for t, what, rule in taught
    ]
    closer = [versus(methods[t], "kd+self", "kd", note=f", {t} teacher") for t in TEACHERS]
    debiased = (
        difference("kd of a group_dro teacher against dedier of an erm teacher", fair["kd"], biased["dedier"])
        if "kd" in fair and "dedier" in biased else None
    )  # fmt: skip
    confident = [
        exits(biased.get(name, []), f"gap between groups at the first exit against the last, {name}")
        for name in ("erm", "kd")
    ]
    items: list[tuple[str, list[Evidence | None]]] = [
        ("1. KD from a biased teacher lowers the worst group below the ERM student", [versus(biased, "erm", "kd")]),
        ("2. A debiased teacher is worth more than DEDIER's weights", [debiased]),
        ("3a. The student is below its teacher on the worst group", teacher_gap),
        ("3b. Self-distillation is above distillation from the larger teacher", closer),
        ("4. DEDIER is above KD with the same teacher, each with its published T and λ", both("dedier", "kd")),
        ("4a. … with the same T and λ", both("dedier", ALIKE)),
        ("4b. … above SimKD and DeTT", [*both("dedier", "simkd"), *both("dedier", "dett")]),
        ("4c. … above its permuted and its mean-matched weights", [*both("dedier", "dedier_permuted"), *both("dedier", "dedier_mean")]),
        ("5. Weights by the margin (α = 1) are above those of the gate alone", both("dedier+alpha=1", "dedier_gate")),
        ("5b. … both divided by their mean", both("dedier+alpha=1+normalise=mean", "dedier_gate+normalise=mean")),
        ("5c. … above one weight for all rows of the gate, the mean of theirs", both("dedier+alpha=1", "dedier+alpha=1+control=gate-matched")),
        ("6a. Laplace's margin is above the margin, gated, α = 1", both("laplace+alpha=1", "dedier+alpha=1")),
        ("6b. … not gated, α = 1", both("laplace+gate=all+alpha=1", "dedier+gate=all+alpha=1")),
        ("6c. … gated, at the published α", both("laplace", "dedier")),
        ("6d. Nested sets (conformal) are above the margin, α = 1, with a gate of their own", both("nested+alpha=1", "dedier+alpha=1")),
        ("6e. AVCS are above the margin, α = 1, likewise", both("avcs+alpha=1", "dedier+alpha=1")),
        ("6f. Nested sets with the margin's gate are above it, α = 1", both("nested+alpha=1+gate=wrong", "dedier+alpha=1")),
        ("6g. AVCS with the margin's gate are above it, α = 1", both("avcs+alpha=1+gate=wrong", "dedier+alpha=1")),
        ("6h. Laplace's entropy or variance on all rows is above KD with the same T and λ", [*both("laplace_entropy+alpha=1", ALIKE), *both("laplace_variance+alpha=1", ALIKE)]),
        ("7. Weights on both losses are above weights on KD alone (λ = 0.5)", both("dedier_code+fraction=0.5", "dedier+fraction=0.5")),
        ("8. Early exits rely on the shortcut more than the last", confident),
        ("9. DEDIER's gain over KD with the same T and λ survives selection without group labels", both("dedier", ALIKE, FREE_RULE)),
        ("10a. A larger λ helps with a debiased teacher (1 against 0.1)", [versus(fair, "kd+fraction=1.0", "kd+fraction=0.1")]),
        ("10b. A larger λ hurts with a biased teacher (0.1 against 1)", [versus(biased, "kd+fraction=0.1", "kd+fraction=1.0")]),
    ]  # fmt: skip
    return items


def largest_p(parts: Sequence[Evidence]) -> float:
    """Of the parts' t tests: what shows that all parts are on one side of 0; 1 if they are not."""
    same = len({part.found.difference.mean > 0 for part in parts}) == 1
    tests = [part.found.t_p for part in parts]
    return max((1.0 if p is None else p) for p in tests) if same else 1.0


def answers(found: Sequence[tuple[str, Sequence[Evidence | None]]]) -> list[tuple[str, float | None]]:
    """What the evidence says of claims.

    Args:
        found: Of one set.

    Returns:
        For each claim yes if all of its parts are shown to be above 0, no if all below, else undecided, of the parts that
        ran; and its p-value, corrected by Holm's method for the claims that ran; None for one that did not.
    """
    ran = [[part for part in parts if part is not None] for _, parts in found]
    corrected = iter(holm([largest_p(parts) for parts in ran if parts]))
    said: list[tuple[str, float | None]] = []
    for (_, all_parts), parts in zip(found, ran, strict=True):
        if not parts:
            said.append(("not run", None))
            continue
        p = next(corrected)
        shown = "undecided" if p >= SIGNIFICANT else "yes" if parts[0].found.difference.mean > 0 else "no"
        some = "" if len(parts) == len(all_parts) else f" ({len(parts)} of {len(all_parts)} parts)"
        said.append((shown + some, p))
    return said


def claims_list(found: list[tuple[str, list[Evidence | None]]]) -> str:
    """Claims, answers and evidence."""
    lines = []
    for (claim, evidence), (said, p) in zip(found, answers(found), strict=True):
        lines.append(f"- {claim}: **{said}**" + ("" if p is None else f" (Holm p {p:.3f})"))
        lines += [f"  - {part.words()}" for part in evidence if part is not None]
    return "\n".join(lines)


# ---------------------------------------------------------------- the page


def difficulty(name: str, own: Kind) -> str:
    """Whether the set can tell methods apart, at the epochs that `RULE` chooses."""
    seeds = {key: {r["seed"] for r in found} for key, found in own.items()}
    oracles = [key for key in ("group_dro", "group_balanced") if seeds.get(key) == seeds.get("erm")]
    if not oracles or len(own["erm"]) < 2:
        return "Difficulty not judged: plain training or an oracle is missing."
    erm, oracle = worst(own["erm"], RULE), max((worst(own[key], RULE) for key in oracles), key=np.mean)
    gain, plain = paired(oracle, erm, bounds=CHANGES), spread(erm)
    adjusted = [
        float(
            np.dot(r["rules"][RULE]["groups"], list(r["groups"]["train"].values())) / sum(r["groups"]["train"].values())
        )
        for r in own["erm"]
    ]
    wrong = []
    if not WORST[0] <= plain.mean <= WORST[1]:
        wrong.append(f"plain training's worst group should be at {WORST[0]:.0%} to {WORST[1]:.0%}")
    if gain.difference.mean < GAIN or gain.low <= 0:
        wrong.append(f"the oracle should gain {GAIN:.0%} with an interval above 0")
    if name in IMAGES and np.mean(adjusted) < AVERAGE:
        wrong.append(f"the adjusted average should be {AVERAGE:.0%}")
    return (
        f"Difficulty: plain training's worst group {plain.mean:.1%} ± {plain.sd:.1%}, adjusted average "
        f"{np.mean(adjusted):.1%}; the better oracle gains {gain.difference.mean:+.1%} ({gain.low:+.1%} to "
        f"{gain.high:+.1%}). " + ("The set can be used for claims." if not wrong else "**Not fit for claims**: " + "; ".join(wrong) + ".")
    )  # fmt: skip


def section(name: str, results: list[dict[str, Any]], teachers: Mapping[str, list[dict[str, Any]]]) -> str:
    """What was found on one set."""
    seconds = [r["seconds"]["cpu"] for r in results]
    study = results[0]["study"]
    parts = [
        f"## {name}",
        f"Student {study['student']['source']}, teacher {study['teacher']['source']}, {study['training']['epochs']} epochs; "
        f"{len(results)} runs, {np.median(seconds):.1f} s of one core each (median), {sum(seconds) / 3600:.2f} h in all. "
        f"One teacher per seed. Options of the data: {json.dumps(study['data']['options'])}.",
        difficulty(name, by_method(results, "erm")),
        claims_list(claims(results, teachers)),
        "Teachers themselves:", str(rules_table(teachers)) if teachers else "none",
    ]  # fmt: skip
    for teacher in TEACHERS:
        own = by_method(results, teacher)
        if not any(r["teacher"] == teacher for r in results):
            continue
        few = len(own["erm"][0]["groups"]["names"]) <= FEW_GROUPS
        shown = {key: own[key] for key in ("erm", "kd", "dedier") if key in own}
        tables = [groups_of_methods(own, RULE), exits_of_methods(shown), detection_table(own)] if few else []
        parts += [
            f"### {name}: {teacher} teacher", str(methods_table(own, RULE)), *(f"{table.title}:\n\n{table}" for table in tables),
            "Test worst group by selection rule:", str(rules_table(own)), str(labels_table(own)),
        ]  # fmt: skip
        if not few:
            parts.append(
                "Tables by group are too wide for this page: `offramp report` on the grid's folder shows them."
            )
    parts.append(
        f"![Worst group by method](pictures/fair-{name}.svg)\n\n![Exits by group](pictures/fair-{name}-exits.svg)"
    )
    return "\n\n".join(parts)


def page(out: Path, target: Path) -> None:
    """Write the page and its pictures from all finished runs."""
    found = {name: (with_self(out / name), teachers_in(out / name)) for name in STUDIES}
    found = {name: pair for name, pair in found.items() if pair[0]}
    if not found:
        raise SystemExit(f"{out} holds no finished run")
    require_matplotlib()
    drawings: dict[str, Callable[[], Any]] = {}
    for name, (results, _) in found.items():
        drawings[f"fair-{name}"] = partial(worst_figure, results, RULE, name)
        drawings[f"fair-{name}-exits"] = partial(exits_figure, results, name)
    save_figures(drawings, target.parent / "pictures")
    table = {name: claims(*pair) for name, pair in found.items()}
    said = [answers(own) for own in table.values()]
    names = [claim for claim, _ in next(iter(table.values()))]
    rows = [[claim, *(own[at][0] for own in said)] for at, claim in enumerate(names)]
    head = f"""# Fair distillation, really run

Made by `benchmarks/fairness.py` with offramp {offramp.__version__}, torch {torch.__version__},
Python {platform.python_version()}, {os.cpu_count()} cores. Students, teachers and data are drawn anew for every seed; all methods share a seed's data, order and
teacher. Figures are test accuracies of the worst group, in the mean over seeds of each run's minimum, at the epoch that
{RULE} chooses, unless said otherwise; ± is a standard deviation with S - 1 below.

**Rule for answers.** A claim says that some paired differences are above 0. *Yes*: all are, by t tests whose largest p-value is
below {SIGNIFICANT:g} when corrected by Holm's method for all claims of the set that ran; *no*: all are below 0 likewise;
*undecided* otherwise, that is, no difference was shown or parts disagree. Verdicts in the tables of methods follow Holm's p over
the methods of a table. Intervals are of one comparison each and not corrected: one that leaves out 0 is no answer. The variants
laplace*, avcs* and nested* are our reading of arXiv 2505.01070, which does not say what it weights by.

## Answers
"""
    text = (
        "\n\n".join(
            [head + "\n" + markdown(["claim", *table], rows), *(section(n, *pair) for n, pair in found.items())]
        )
        + "\n"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    notes = target.with_name(f"{target.stem}-notes.md")
    text += "\n" + notes.read_text(encoding="utf-8") if notes.exists() else ""
    target.write_text(text, encoding="utf-8")
    print(f"wrote {target}")


def main() -> None:
    """Parse, and train or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=(*STUDIES, "page"))
    parser.add_argument("--data", help="folder of MNIST's files, or SNLI's file")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", help="some only, with commas between them")
    parser.add_argument("--teachers", default=",".join(TEACHERS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", default="runs/fairness")
    parser.add_argument("--page", default=str(PAGE), help="file to write")
    options = parser.parse_args()
    if options.study == "page":
        page(Path(options.out), Path(options.page))
    else:
        run(options.study, options)


if __name__ == "__main__":
    main()
