"""What all confidence measures promise, and each of them against plain Python loops in double precision."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.core.confidence import (
    HEADLESS,
    LEARNED,
    MEASURES,
    NAMES,
    RANGES,
    Contrast,
    Contrastive,
    gap_of,
    jensen_shannon,
)  # fmt: skip
from offramp.core.exits import Consistency
from offramp.core.plan import resolve
from offramp.core.policy import ExitPolicy
from offramp.families.readouts import best_of
from offramp.hub.exit_posterior import Laplace, NestedSets
from offramp.uncertainty import candidates, token_sets

SETTINGS = settings(derandomize=True, deadline=None, max_examples=40, database=None)
ROWS, WIDTH, VOCABULARY, LAYERS, LAYER = 5, 7, 23, 12, 8
CANDIDATES = (2, 3, 5)
ALWAYS = -math.inf


def measure_named(name, options=None):
    if name == "classifier":
        return Consistency(Fitted)
    if name == "laplace":
        return Laplace(Fitted)
    return NestedSets(Fitted, name) if name in LEARNED else MEASURES[name](options or Contrast())


class Fitted:
    """Exits and their posterior in one: classifiers whose logit is the input's only number, a posterior that is certain
    (so that its numbers are those of the trained head), and sets of all tokens of probability 0.2 or more."""

    width, candidates = 1, 1000

    def classify(layer, x):
        return x[:, 0]

    def laplace(layer):
        return candidates.TokenLaplace(torch.eye(1), None, None, torch.zeros(1000), torch.ones(3, 1000))

    def sets(kind):
        return token_sets.ConformalSets(0.1, -math.log(0.2), {})


class Scripted:
    """A reading with prepared states and logits, which writes down what it was asked for."""

    def __init__(
        self, logits, amateurs=None, *, layer=LAYER, mask=None, hidden=None, previous=None, candidates=None,
        verdicts=None,
    ):  # fmt: skip
        self.layer, self.num_layers, self.position, self.ids = layer, LAYERS, 0, None
        self.amateurs, self.mask = amateurs or {}, mask
        self.candidates = tuple(sorted(self.amateurs)) if candidates is None else candidates
        self.hidden, self.previous, self.verdicts = hidden, previous, verdicts
        self._logits = logits
        self.kept = mask is not None
        self.asked = []  # (layer, number of columns or None)
        self.reads = 0

    @property
    def logits(self):
        self.reads += 1
        return self._logits

    @property
    def top(self):
        return best_of(self.logits)

    def plausible(self):
        return self.mask

    @property
    def input(self):
        return self.verdicts[:, None]

    def of(self, ids):
        return self.logits.gather(1, ids)

    def bill(self, flops, shared, own=0):
        assert flops > 0

    def earlier(self, layer, columns=None):
        self.asked.append((layer, None if columns is None else columns.shape[1]))
        return self.amateurs[layer] if columns is None else self.amateurs[layer].gather(1, columns)

    def rows(self, index):
        """The same reading for some rows, in that order."""
        rows = (self._logits, self.mask, self.hidden, self.previous, self.verdicts)
        pick = [None if x is None else x[index] for x in rows]
        amateurs = {layer: z[index] for layer, z in self.amateurs.items()}
        return Scripted(
            pick[0], amateurs, layer=self.layer, mask=pick[1], hidden=pick[2], previous=pick[3],
            candidates=self.candidates, verdicts=pick[4],
        )  # fmt: skip

    def changed(self, change):
        """The same reading with `change` applied to the logits of all layers."""
        amateurs = {layer: change(z) for layer, z in self.amateurs.items()}
        return Scripted(
            change(self._logits), amateurs, layer=self.layer, mask=self.mask, hidden=self.hidden,
            previous=self.previous, candidates=self.candidates, verdicts=self.verdicts,
        )  # fmt: skip


def randoms(seed):
    return torch.Generator().manual_seed(seed)


def scripted(seed=0, rows=ROWS, scale=3.0, layers=(*CANDIDATES, LAYER // 2)):
    """A reading with random states, random logits, and earlier logits that resemble them a little."""
    g = randoms(seed)
    logits = torch.randn(rows, VOCABULARY, generator=g) * scale
    amateurs = {layer: 0.4 * logits + torch.randn(rows, VOCABULARY, generator=g) * scale / 2 for layer in layers}
    hidden = torch.randn(rows, WIDTH, generator=g)
    previous = hidden + 0.5 * torch.randn(rows, WIDTH, generator=g)
    mask = torch.rand(rows, VOCABULARY, generator=g) < 0.6
    mask[:, :2] = True
    verdicts = scale * torch.randn(rows, generator=g)
    return Scripted(
        logits, amateurs, mask=mask, hidden=hidden, previous=previous, candidates=CANDIDATES, verdicts=verdicts
    )


OPTIONS = {
    "": Contrast(),
    "text": Contrast(score="text"),
    "head": Contrast(score="head"),
    "hyperbolic": Contrast(alpha_schedule="hyperbolic"),
    "pruned": Contrast(plausibility="pruned"),
    "amateur": Contrast(amateur=3),
    "support head": Contrast(support="head"),
    "support head_renorm": Contrast(support="head_renorm"),
}


@dataclass(frozen=True)
class Case:
    name: str
    options: Contrast

    @property
    def measure(self):
        return measure_named(self.name, self.options)


CASES = [
    pytest.param(Case(name, options), id=f"{name} {label}".strip())
    for name in NAMES
    for label, options in OPTIONS.items()
    if not label or name in {"contrastive", "jsd"}
]
ON_LOGITS = [case for case in CASES if case.values[0].name not in HEADLESS]
every_measure = pytest.mark.parametrize("case", CASES)
every_measure_of_logits = pytest.mark.parametrize("case", ON_LOGITS)


# ------------------------------------------------------------ what all measures promise


@every_measure
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 10.0, 300.0, 1e4])
def test_one_float32_number_per_row_in_the_range_of_the_measure(case, scale):
    low, high = RANGES[case.name]
    for seed in range(10):
        c = case.measure(scripted(seed, scale=scale))
        assert c.shape == (ROWS,)
        assert c.dtype == torch.float32
        assert (c >= low - 1e-6).all()
        assert (c <= high).all(), "above 1 a threshold of 1 would exit"


@every_measure
def test_a_state_or_distribution_that_is_certain_never_passes_a_threshold_of_one(case):
    g = randoms(5)
    hidden = torch.randn(400, 64, generator=g)
    logits = torch.randn(400, VOCABULARY, generator=g)
    logits[torch.arange(400), torch.arange(400) % VOCABULARY] += torch.linspace(0, 60, 400)
    amateurs = {layer: torch.randn(400, VOCABULARY, generator=g) * 20 for layer in (*CANDIDATES, LAYER // 2)}
    mask = torch.ones_like(logits, dtype=torch.bool)
    reading = Scripted(
        logits, amateurs, mask=mask, hidden=hidden, previous=3 * hidden, candidates=CANDIDATES,
        verdicts=torch.linspace(0, 200, 400),
    )  # fmt: skip
    c = case.measure(reading)
    assert not (c > 1).any(), f"{int((c > 1).sum())} rows are above 1, by up to {float(c.max() - 1):.1e}"


@every_measure
def test_permuted_rows_give_permuted_numbers(case):
    reading, order = scripted(1), [3, 0, 4, 1, 2]
    torch.testing.assert_close(case.measure(reading)[order], case.measure(reading.rows(order)), atol=1e-6, rtol=1e-5)


@every_measure
@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
def test_a_batch_gives_what_its_rows_give_one_by_one(case, scale):
    reading = scripted(2, scale=scale)
    single = torch.cat([case.measure(reading.rows([row])) for row in range(ROWS)])
    torch.testing.assert_close(case.measure(reading), single, atol=1e-6, rtol=1e-5)


@every_measure_of_logits
def test_a_constant_added_to_all_logits_changes_nothing(case):
    reading = scripted(3)
    moved = reading.changed(lambda z: z + 7.5)
    torch.testing.assert_close(case.measure(moved), case.measure(reading), atol=1e-5, rtol=1e-4)


@every_measure_of_logits
def test_a_constant_per_layer_changes_nothing(case):
    reading = scripted(3)
    moved = scripted(3)
    moved.amateurs = {layer: z + layer for layer, z in moved.amateurs.items()}
    torch.testing.assert_close(case.measure(moved), case.measure(reading), atol=1e-5, rtol=1e-4)


def poisoned(kind):
    def change(z):
        z = z.clone()
        if kind == "-inf row":
            z[1] = -math.inf
        else:
            z[1, 4] = float(kind)
        return z

    return change


@every_measure_of_logits
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf row"])
@pytest.mark.parametrize("where", ["everywhere", "at this layer"])
def test_rows_without_meaning_never_exit_and_leave_the_others_alone(case, kind, where):
    reading = scripted(4)
    bad = reading.changed(poisoned(kind))
    if where == "at this layer":
        bad.amateurs = reading.amateurs
    expected, got = case.measure(reading), case.measure(bad)
    assert not bool(got[1] > ALWAYS)
    others = [0, 2, 3, 4]
    torch.testing.assert_close(got[others], expected[others], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case.values[0].name in {"contrastive", "jsd"}])
def test_a_nan_in_every_earlier_layer_never_exits(case):
    reading = scripted(4)
    for z in reading.amateurs.values():
        z[1] = math.nan
    got = case.measure(reading)
    assert not bool(got[1] > ALWAYS)
    assert got[[0, 2, 3, 4]].isfinite().all()


@every_measure_of_logits
def test_masked_tokens_leave_the_measure_finite_and_equal_to_scoring_the_others_only(case):
    reading = scripted(6)
    masked = [0, 7, 8, 20]
    rest = [v for v in range(VOCABULARY) if v not in masked]
    reading.mask[:, masked] = False
    reading.mask[:, rest[:2]] = True
    got = case.measure(reading.changed(lambda z: z.index_fill(1, torch.tensor(masked), -math.inf)))
    short = reading.changed(lambda z: z[:, rest])
    short.mask = reading.mask[:, rest]
    assert got.isfinite().all()
    torch.testing.assert_close(got, case.measure(short), atol=1e-6, rtol=1e-5)


@every_measure_of_logits
def test_a_single_possible_token_is_certain_or_at_least_finite(case):
    reading = scripted(7)
    reading.mask[:] = False
    reading.mask[:, 22] = True
    got = case.measure(reading.changed(lambda z: z.index_fill(1, torch.arange(22), -math.inf)))
    torch.testing.assert_close(got, torch.ones(ROWS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_measure
def test_states_of_low_precision_are_judged_in_float32(case, dtype):
    reading = scripted(8)
    reading.hidden, reading.previous = (300 * reading.hidden).to(dtype), (300 * reading.previous).to(dtype)
    c = case.measure(reading)
    assert c.dtype == torch.float32
    if case.name == "state":
        expected = [cosine(a, b) for a, b in zip(reading.hidden.tolist(), reading.previous.tolist(), strict=True)]
        torch.testing.assert_close(c, torch.tensor(expected), atol=2e-6, rtol=0)


# ------------------------------------------------------------ the simple measures


def softmax_of(row):
    """Probabilities of a list of logits; 0 for -inf."""
    top = max(row)
    powers = [math.exp(z - top) for z in row]
    return [x / math.fsum(powers) for x in powers]


def gap(values):
    first, second = sorted(values)[-1:-3:-1]
    return first - second


def cosine(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


logits_of_one_row = st.lists(st.floats(-60, 60, width=32), min_size=2, max_size=12)


@SETTINGS
@given(row=logits_of_one_row)
def test_gap_max_and_entropy_are_those_of_the_softmax_in_double_precision(row):
    reading, p = Scripted(torch.tensor([row])), softmax_of(row)
    spread = -math.fsum(x * math.log(x) for x in p if x > 0)
    for name, expected in {"softmax": gap(p), "max": max(p), "entropy": 1 - spread / math.log(len(row))}.items():
        assert measure_named(name)(reading).item() == pytest.approx(expected, abs=5e-6), name
    assert gap_of(torch.tensor([row])).item() == pytest.approx(gap(p), abs=5e-6)


@pytest.mark.parametrize("n", [2, 3, 1000])
def test_uniform_logits_are_worth_nothing_and_a_single_peak_everything(n):
    peak = torch.zeros(1, n).index_fill(1, torch.tensor([n - 1]), 200.0)
    for name, uniform in {"softmax": 0, "max": 1 / n, "entropy": 0}.items():
        assert measure_named(name)(Scripted(torch.full((1, n), 2.5))).item() == pytest.approx(uniform, abs=1e-6)
        assert measure_named(name)(Scripted(peak)).item() == pytest.approx(1, abs=1e-6)


@SETTINGS
@given(row=logits_of_one_row, mask=st.lists(st.booleans(), min_size=12, max_size=12))
def test_pruned_gap_is_the_full_one_over_the_kept_mass(row, mask):
    mask = mask[: len(row)]
    best = max(range(len(row)), key=row.__getitem__)
    second = max((v for v in range(len(row)) if v != best), key=row.__getitem__)
    mask[best] = mask[second] = True
    p = softmax_of(row)
    mass = math.fsum(x for x, kept in zip(p, mask, strict=True) if kept)
    pruned = torch.tensor([row]).masked_fill(~torch.tensor([mask]), -math.inf)
    got = measure_named("softmax")(Scripted(pruned)).item()
    assert got == pytest.approx(gap(p) / mass, abs=5e-6)
    assert got >= measure_named("softmax")(Scripted(torch.tensor([row]))).item() - 1e-6


def test_state_is_the_cosine_needs_no_head_and_never_exits_at_the_first_exit():
    reading = scripted(9)
    expected = [cosine(a, b) for a, b in zip(reading.hidden.tolist(), reading.previous.tolist(), strict=True)]
    torch.testing.assert_close(measure_named("state")(reading), torch.tensor(expected), atol=1e-6, rtol=0)
    opposite = Scripted(None, hidden=reading.hidden, previous=-2 * reading.hidden)
    torch.testing.assert_close(measure_named("state")(opposite), -torch.ones(ROWS))
    reading.previous = None
    first = measure_named("state")(reading)
    assert first.shape == (ROWS,)
    assert first.dtype == torch.float32
    assert not (first > ALWAYS).any()
    assert reading.reads == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_states_with_nan_or_inf_never_exit(bad):
    reading = scripted(9)
    reading.hidden[1, 2] = bad
    got = measure_named("state")(reading)
    assert not bool(got[1] > ALWAYS)
    assert got[[0, 2, 3, 4]].isfinite().all()


def test_state_survives_squares_that_overflow_half_precision():
    hidden = torch.full((1, 64), 6e4, dtype=torch.float16)
    assert measure_named("state")(Scripted(None, hidden=hidden, previous=hidden)).item() == pytest.approx(1, abs=1e-5)


@SETTINGS
@given(logit=st.floats(-200, 200, width=32))
def test_a_classifier_is_believed_by_the_logistic_function_and_needs_no_head(logit):
    reading = Scripted(None, verdicts=torch.tensor([logit]))
    expected = 1 / (1 + math.exp(-logit))
    assert measure_named("classifier")(reading).item() == pytest.approx(expected, abs=1e-6)
    assert reading.reads == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_classifiers_that_overflow_never_exit(bad):
    got = measure_named("classifier")(Scripted(None, verdicts=torch.tensor([2.0, bad, 50.0])))
    assert not bool(got[1] > ALWAYS)
    assert got[[0, 2]].tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1])
    assert not bool(got[2] > 1)


def test_every_named_measure_has_a_range_up_to_one():
    assert set(NAMES) == set(RANGES) == {
        *HEADLESS, "softmax", "max", "entropy", "contrastive", "jsd", "laplace", "conformal", "avcs",
    }  # fmt: skip
    assert {name: low for name, (low, _) in RANGES.items()} == {name: -(name == "state") for name in NAMES}
    assert {high for _, high in RANGES.values()} == {1.0}


# ------------------------------------------------------------ contrastive scores, against the formulas


def divergence(a, b):
    """JSD of two lists of non-negative numbers, in nats."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        mean = (x + y) / 2
        total += (x * math.log(x / mean) if x > 0 else 0) / 2 + (y * math.log(y / mean) if y > 0 else 0) / 2
    return total


def head_of(p, options, layer, mask):
    """The head set M as token numbers."""
    if options.plausibility == "pruned" and mask is not None:
        return [v for v, kept in enumerate(mask) if kept]
    alpha = options.alpha
    if options.alpha_schedule == "hyperbolic":
        rho = 1 / LAYERS if options.alpha_decay is None else options.alpha_decay
        alpha = max(1e-3, alpha / (1 + rho * layer) * (1 - gap(p)))
    assert all(abs(x / (alpha * max(p)) - 1) > 1e-5 for x in p if x != max(p)), "too close to the edge of M to test"
    return [v for v, x in enumerate(p) if x >= alpha * max(p)]


def amateur_of(p, earlier, head, options, layer, discounted):
    """The chosen amateur layer, from softmaxes of whole logit rows."""
    if not discounted:
        return layer // 2 if options.amateur is None else options.amateur
    ranking = []
    for m, logits in earlier.items():
        a, b = p, softmax_of(logits)
        if options.support != "all":
            a, b = [a[v] for v in head], [b[v] for v in head]
        if options.support == "head_renorm":
            a, b = [x / math.fsum(a) for x in a], [x / math.fsum(b) for x in b]
        ranking.append((divergence(a, b) / (layer - m), m))
    return max(ranking)[1]


def scores_by_hand(row, earlier, options, discounted, layer=LAYER, mask=None):
    """Contrastive scores of one row of logits, with all normalisers and without any shortcut."""
    p = softmax_of(row)
    head = head_of(p, options, layer, mask)
    q = softmax_of(earlier[amateur_of(p, {m: earlier[m] for m in CANDIDATES}, head, options, layer, discounted)])
    r = softmax_of([math.log(p[v]) - math.log(q[v]) for v in head])
    mass = math.fsum(p[v] for v in head)
    scores = [0.0] * len(p) if options.score == "head" else list(p)
    for v, x in zip(head, r, strict=True):
        scores[v] = x if options.score == "text" else mass * x
    return scores


CONTRASTS = [
    pytest.param(
        Contrastive(replace(options, **more), discounted), id=" ".join([kind, label, *map(str, more.values())])
    )
    for kind, discounted in (("contrastive", False), ("jsd", True))
    for label, options in OPTIONS.items()
    for more in ({}, {"alpha": 0.01}, {"alpha": 0.9})
]


@pytest.mark.parametrize("measure", CONTRASTS)
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_contrastive_scores_are_those_of_the_full_formula(measure, scale):
    for seed in range(4):
        reading = scripted(100 + seed, scale=scale)
        expected = [
            scores_by_hand(
                reading._logits[a].tolist(),
                {m: z[a].tolist() for m, z in reading.amateurs.items()},
                measure.options,
                measure.discounted,
                mask=reading.mask[a].tolist(),
            )
            for a in range(ROWS)
        ]
        torch.testing.assert_close(measure.scores(reading), torch.tensor(expected), atol=3e-6, rtol=1e-4)
        gaps = torch.tensor([gap(row) for row in expected])
        torch.testing.assert_close(measure(reading), gaps, atol=5e-6, rtol=1e-4)


@SETTINGS
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 50), alpha=st.floats(1e-3, 1), discounted=st.booleans())
def test_mass_scores_sum_to_one_text_scores_to_two_less_the_mass_and_head_scores_to_it(seed, scale, alpha, discounted):
    reading = scripted(seed, scale=scale)
    by_score = {s: Contrastive(Contrast(score=s, alpha=alpha), discounted).scores(reading) for s in OPTIONS_OF_SCORE}
    mass = by_score["head"].sum(-1)
    torch.testing.assert_close(by_score["mass"].sum(-1), torch.ones(ROWS), atol=1e-5, rtol=0)
    torch.testing.assert_close(by_score["text"].sum(-1), 2 - mass, atol=1e-5, rtol=0)
    assert all((scores >= 0).all() for scores in by_score.values())


OPTIONS_OF_SCORE = ("mass", "text", "head")


@pytest.mark.parametrize("discounted", [False, True])
def test_a_head_set_of_one_token_degenerates_as_the_reference_says(discounted):
    # p_(1) = .30, p_(2) = .029, everything else below; 0.029 < 0.1 · 0.30, so |M| = 1.
    p = torch.tensor([[0.30, 0.029] + [0.671 / 30] * 30])
    amateurs = {layer: torch.randn(1, 32, generator=randoms(layer)) for layer in (*CANDIDATES, LAYER // 2)}
    reading = Scripted(p.log(), amateurs, candidates=CANDIDATES)
    for score, expected in {"mass": 0.271, "text": 0.971, "head": 0.300}.items():
        got = Contrastive(Contrast(score=score), discounted)(reading)
        assert got.item() == pytest.approx(expected, abs=1e-6), score


@pytest.mark.parametrize("discounted", [False, True])
def test_mass_equals_the_gap_wherever_the_head_set_is_one_token(discounted):
    reading = scripted(11)
    reading = reading.changed(lambda z: z)
    reading._logits[:, 3] += 12
    measure = Contrastive(Contrast(), discounted)
    torch.testing.assert_close(measure(reading), measure_named("softmax")(reading), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [("contrastive", Contrast()), ("contrastive", Contrast(amateur=3)), ("jsd", Contrast(support="head_renorm"))],
)
def test_only_the_rows_of_the_head_set_are_asked_of_earlier_layers(name, options):
    reading = scripted(12)
    p = reading._logits.double().softmax(-1)
    widest = int((p >= 0.1 * p.amax(-1, keepdim=True)).sum(-1).max())
    assert widest < VOCABULARY
    measure_named(name, options)(reading)
    assert {columns for _, columns in reading.asked} == {widest}
    expected = set(CANDIDATES) if name == "jsd" else {options.amateur or LAYER // 2}
    assert {layer for layer, _ in reading.asked} == expected


@pytest.mark.parametrize("layer", range(2, LAYERS))
def test_the_fixed_amateur_is_half_the_exit_layer(layer):
    reading = scripted(13, layers=range(1, LAYERS))
    reading.layer = layer
    measure_named("contrastive")(reading)
    assert {m for m, _ in reading.asked} == {layer // 2}


@pytest.mark.parametrize("name", ["contrastive", "jsd"])
@pytest.mark.parametrize("score", OPTIONS_OF_SCORE)
def test_without_an_earlier_layer_it_is_the_gap(name, score):
    reading = scripted(14)
    reading.candidates, reading.layer = (), 1
    c = measure_named(name, Contrast(score=score))(reading)
    torch.testing.assert_close(c, measure_named("softmax")(reading), atol=1e-6, rtol=0)
    assert reading.asked == []


def test_a_fixed_amateur_that_is_not_earlier_gives_the_gap():
    reading = scripted(14)
    for amateur in (LAYER, LAYER + 1):
        c = measure_named("contrastive", Contrast(amateur=amateur))(reading)
        torch.testing.assert_close(c, measure_named("softmax")(reading), atol=1e-6, rtol=0)


def test_pruned_plausibility_without_pruning_uses_the_alpha_rule():
    reading = scripted(15)
    expected = measure_named("contrastive")(reading)
    reading.mask = None
    got = measure_named("contrastive", Contrast(plausibility="pruned"))(reading)
    torch.testing.assert_close(got, expected)


# ------------------------------------------------------------ the amateur of "jsd"

FAR = -1e4  # a logit whose probability is exactly 0


def dyadic(*tokens):
    """A row of logits that spreads its mass evenly over some of four tokens, [1, 4]."""
    return torch.tensor([[0.0 if v in tokens else FAR for v in range(4)]])


def test_the_discount_prefers_the_deeper_layer_and_ties_go_to_the_deepest():
    # Disjoint supports: JSD = ln 2. Supports that share one of two tokens: JSD = ln 2 / 2. Contrasted with the first,
    # both head tokens stay equal (c = 0); with the second, the token that it lacks wins (c = 1).
    expert, disjoint, half = dyadic(0, 1), dyadic(2, 3), dyadic(0, 2)
    jsd = measure_named("jsd")
    # ln 2 / 2 = (ln 2 / 2) / 1: a tie, to the deepest.
    assert jsd(Scripted(expert, {6: disjoint, 7: half}, layer=8)).item() == pytest.approx(1)
    # ln 2 / 1 > (ln 2 / 2) / 2
    assert jsd(Scripted(expert, {6: half, 7: disjoint}, layer=8)).item() == pytest.approx(0, abs=1e-6)
    # ln 2 / 3 < (ln 2 / 2) / 1: without the discount the first would win.
    assert jsd(Scripted(expert, {5: disjoint, 7: half}, layer=8)).item() == pytest.approx(1)
    # ln 2 / 3 > (ln 2 / 2) / 2
    assert jsd(Scripted(expert, {5: disjoint, 6: half}, layer=8)).item() == pytest.approx(0, abs=1e-6)


def test_each_row_has_its_own_amateur():
    expert = torch.cat([dyadic(0, 1)] * 2)
    reading = Scripted(expert, {5: torch.cat([dyadic(2, 3)] * 2), 7: torch.cat([dyadic(0, 2), dyadic(0, 1)])})
    # Row 0: layer 7 (see above). Row 1: layer 7 equals the expert, JSD 0, so layer 5.
    torch.testing.assert_close(measure_named("jsd")(reading), torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)


@SETTINGS
@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), power=st.floats(0.1, 30))
def test_jensen_shannon_is_the_textbook_sum_bounded_and_symmetric(seed, n, power):
    a, b = (torch.rand(3, n, generator=randoms(seed + i)).pow(power) for i in (0, 1))
    a, b = (x / x.sum(-1, keepdim=True) for x in (a, b))
    a[0] = torch.nn.functional.one_hot(torch.tensor(0), n)  # exact zeros
    got = jensen_shannon(a, b)
    expected = [divergence(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    torch.testing.assert_close(got, torch.tensor(expected), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(got, jensen_shannon(b, a))
    assert (got <= math.log(2) + 1e-6).all()
    torch.testing.assert_close(jensen_shannon(a, a), torch.zeros(3), atol=1e-6, rtol=0)


def test_jensen_shannon_of_disjoint_distributions_is_ln_2():
    a, b = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 0.5, 0.5]])
    assert jensen_shannon(a, b).item() == pytest.approx(math.log(2), abs=1e-7)


def planned(min_layer, num_layers=24, exit_layers=None, name="jsd", **options):
    policy = ExitPolicy(confidence=name, min_layer=min_layer, exit_layers=exit_layers, contrast=Contrast(**options))
    return resolve(policy, num_layers, 100).candidates


@pytest.mark.parametrize(("min_layer", "expected"), [(1, ()), (2, (1,)), (3, (2,)), (4, (2, 3)), (6, (2, 3, 4, 5))])
def test_candidates_lie_below_the_minimum_exit_layer(min_layer, expected):
    assert planned(min_layer) == expected
    assert Contrast().below(min_layer) == expected


@pytest.mark.parametrize("min_layer", range(3, 40))
def test_by_default_at_most_four_evenly_spaced_candidates(min_layer):
    chosen = planned(min_layer, num_layers=48)
    assert 1 <= len(chosen) <= 4
    assert set(chosen) <= set(range(2, min_layer))
    assert len({b - a for a, b in itertools.pairwise(chosen)}) <= 1


@pytest.mark.parametrize("stride", [1, 2, 3, 7])
def test_a_stride_spaces_the_candidates(stride):
    chosen = planned(15, stride=stride)
    assert set(chosen) <= set(range(2, 15))
    assert {b - a for a, b in itertools.pairwise(chosen)} <= {stride}
    assert len(chosen) == -(-13 // stride)  # as many as fit into 2..14


def test_all_candidates_are_the_layers_from_two_to_the_one_before_the_exit():
    everything = planned(5, num_layers=12, candidates="all")
    for layer in range(5, 12):
        assert [c for c in everything if c < layer] == list(range(2, layer))


def test_the_contrastive_measure_looks_at_half_of_each_exit_layer():
    assert planned(4, num_layers=12, name="contrastive") == (2, 3, 4, 5)
    assert planned(4, num_layers=12, name="contrastive", exit_layers=(4, 9)) == (2, 4)
    assert planned(4, num_layers=12, name="contrastive", amateur=3) == (3,)
    assert planned(1, num_layers=3, name="contrastive") == (1,)  # layer 1 has no half: the gap


# ------------------------------------------------------------ alpha


def members(measure, reading):
    """Which tokens are in M: those that head scores give something."""
    return measure.scores(reading) > 0


@SETTINGS
@given(seed=st.integers(0, 10**6), layer=st.integers(2, LAYERS - 1), decay=st.sampled_from([None, 0.0, 0.5, 3.0]))
def test_hyperbolic_alpha_widens_the_head_set_with_depth_and_confidence(seed, layer, decay):
    logits = torch.randn(1, VOCABULARY, generator=randoms(seed)) * 4
    reading = Scripted(logits, {layer // 2: torch.zeros(1, VOCABULARY)}, layer=layer)
    measure = Contrastive(Contrast(score="head", alpha_schedule="hyperbolic", alpha_decay=decay), discounted=False)
    p = softmax_of(logits[0].tolist())
    rho = 1 / LAYERS if decay is None else decay
    alpha = max(1e-3, 0.1 / (1 + rho * layer) * (1 - gap(p)))
    got = members(measure, reading)[0].tolist()
    for x, inside in zip(p, got, strict=True):
        if abs(x / max(p) / alpha - 1) > 1e-4:
            assert inside == (x >= alpha * max(p))


def test_hyperbolic_alpha_has_a_floor_of_a_thousandth():
    # p_(1) is about 1, so alpha would be about 0 and let all of V in.
    logits = torch.tensor([[0.0, math.log(2e-3), math.log(5e-4), math.log(1e-6)] + [-30.0] * 20])
    reading = Scripted(logits, {4: torch.zeros(1, 24)})
    measure = Contrastive(Contrast(score="head", alpha_schedule="hyperbolic"), discounted=False)
    assert members(measure, reading)[0].tolist() == [True, True] + [False] * 22


def test_alpha_of_one_keeps_the_best_token_alone():
    measure = Contrastive(Contrast(score="head", alpha=1.0), discounted=False)
    reading = scripted(16)
    assert (members(measure, reading) == (reading._logits == reading._logits.amax(-1, keepdim=True))).all()


# ------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": "sum"}, ["'sum'", "'mass'", "'text'", "'head'"]),
        ({"alpha_schedule": "linear"}, ["'linear'", "'hyperbolic'", "None"]),
        ({"plausibility": "beta"}, ["'beta'", "'alpha'", "'pruned'"]),
        ({"candidates": "none"}, ["'none'", "'below'", "'all'"]),
        ({"support": "tail"}, ["'tail'", "'all'", "'head'", "'head_renorm'"]),
        ({"alpha": 0.0}, ["0.0", "(0, 1]"]),
        ({"alpha": -0.5}, ["-0.5", "(0, 1]"]),
        ({"alpha": 1.5}, ["1.5", "(0, 1]"]),
        ({"alpha": math.nan}, ["nan", "(0, 1]"]),
        ({"stride": 0}, ["0", "1"]),
        ({"stride": -2}, ["-2", "1"]),
    ],
)
def test_wrong_options_are_refused_with_what_came_and_what_is_allowed(options, words):
    with pytest.raises(ValueError, match=next(iter(options))) as error:
        Contrast(**options)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", ["contrastive", "jsd"])
@pytest.mark.parametrize("amateur", [-1, 0, 12, 13])
def test_an_amateur_outside_the_model_is_refused(name, amateur):
    policy = ExitPolicy(confidence=name, min_layer=6, contrast=Contrast(amateur=amateur))
    with pytest.raises(ValueError, match=rf"amateur.* {amateur}\b.*1\.\.11"):
        resolve(policy, 12, 100)
