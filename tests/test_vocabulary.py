"""Sizes of the kept vocabulary against the numbers of the specification, and kept tokens against plain lists."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.core.confidence import gap_of
from offramp.core.plan import resolve
from offramp.core.policy import ExitPolicy
from offramp.core.vocabulary import KINDS, Kept, Pruning
from offramp.families.readouts import HeadRows

SETTINGS = settings(derandomize=True, deadline=None, max_examples=80, database=None)
NONE = torch.tensor([], dtype=torch.long)
VOCABULARY, WIDTH = 40, 6
ZEROS = (0.0,) * 100


def paper(kind="decaying", first_layer=7, **more):
    """The constants of the source documents: (35000, 250, 24), T5's vocabulary."""
    return Pruning(kind, 32128, 24, first_layer, floor=250, start=35000, **more)


# ------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (1, 5153), (2, 2781), (3, 1904), (4, 1448), (5, 1168), (6, 979), (7, 842), (8, 739), (10, 594), (12, 496),
        (15, 398), (17, 351), (18, 332), (19, 315), (20, 299), (23, 260), (24, 250),
    ],
)  # fmt: skip
def test_decay_function_has_the_values_of_the_specification(layer, size):
    assert paper().decayed(layer) == size
    assert paper(first_layer=layer).first_size() == size


def test_defaults_are_the_whole_vocabulary_and_a_128th_of_it():
    pruning = Pruning("decaying", 32128, 24, 7)
    assert pruning.smallest == 251
    assert pruning.first_size() == pruning.decayed(7) == 844
    assert Pruning("decaying", 32129, 24, 7).smallest == 252  # rounded up


def sizes_of(pruning, layers, confidences=ZEROS):
    """Kept tokens after the first test and at each of the later ones."""
    sizes = [pruning.first_size()]
    for layer, c in zip(layers, confidences, strict=False):
        sizes.append(pruning.next_size(layer, sizes[-1], c))
    return sizes


def test_decaying_follows_the_function_and_its_recursive_reading_the_printed_numbers():
    assert sizes_of(paper(), range(8, 11)) == [842, 739, paper().decayed(9), 594]
    assert sizes_of(paper(recursive=True), range(8, 13)) == [842, 470, 353, 301, 275, 261]


@SETTINGS
@given(
    start=st.integers(2, 60_000), floor=st.integers(1, 2000), num_layers=st.integers(2, 80), part=st.floats(0, 1),
    vocabulary=st.integers(2, 60_000),
)  # fmt: skip
def test_decay_function_is_the_formula_in_exact_arithmetic(start, floor, num_layers, part, vocabulary):
    layer = 1 + round(part * (num_layers - 1))
    pruning = Pruning("decaying", vocabulary, num_layers, 1, floor=floor, start=start)
    least = min(floor, vocabulary)
    exact = start / (1 + Fraction(start - least, least) * Fraction(layer, num_layers))
    assert pruning.decayed(layer) == min(vocabulary, max(least, math.floor(exact)))


@pytest.mark.parametrize("num_layers", [6, 7, 12, 30])
def test_decay_function_is_not_off_by_one_where_the_formula_gives_whole_numbers(num_layers):
    wrong = []
    for start, floor, layer in itertools.product(range(4, 400, 3), (2, 3, 5, 7), range(1, num_layers + 1)):
        exact = start / (1 + Fraction(start - floor, floor) * Fraction(layer, num_layers))
        expected = min(500, max(floor, math.floor(exact)))
        if (got := Pruning("decaying", 500, num_layers, 1, floor=floor, start=start).decayed(layer)) != expected:
            wrong.append((start, floor, layer, expected, got))
    assert not wrong, f"{len(wrong)} (k_1, k*, layer, expected, got), such as {wrong[:3]}"


@pytest.mark.parametrize("size", [2, 100, 251, 252, 844, 1000, 5000, 32128])
def test_a_given_size_scales_the_decay(size):
    pruning = Pruning("decaying", 32128, 24, 7, size=size)
    later = {8: pruning.decayed(8), 15: pruning.decayed(15), 23: pruning.decayed(23)}
    assert pruning.first_size() == size
    for layer, f in later.items():
        expected = max(min(251, size), math.floor(Fraction(size * f, pruning.decayed(7))))
        assert pruning.next_size(layer, size, 0.5) == min(size, expected)


@pytest.mark.parametrize(
    ("previous", "confidence", "expected"),
    [
        (1000, 0.5, 750),
        (1000, 1.0, 500),
        (1000, 0.0, 1000),
        (999, 0.25, 875),
        (101, 0.5, 76),
        (20, 1.0, 16),
        (16, 1, 16),
    ],
)
def test_adaptive_shrinks_the_current_size(previous, confidence, expected):
    # ⌈k · (1 - c/2)⌉, at least 16
    assert Pruning("adaptive", 2048, 12, 4, size=1000, shrink=0.5).next_size(9, previous, confidence) == expected


@pytest.mark.parametrize("confidence", [-1.0, -0.3, 0.0, math.nan, -math.inf])
def test_adaptive_keeps_its_size_without_any_confidence(confidence):
    assert Pruning("adaptive", 2048, 12, 4, size=1000).next_size(9, 700, confidence) == 700


def test_adaptive_clamps_confidence_above_one():
    pruning = Pruning("adaptive", 2048, 12, 4, size=1000)
    assert pruning.next_size(9, 1000, 1.5) == pruning.next_size(9, 1000, 1.0) == 100
    assert pruning.next_size(9, 1000, math.inf) == 100


def test_adaptive_binds_below_the_threshold_that_the_reference_never_reaches():
    # Reference: V · (1 - 0.9 · 0.9) = 6104 > 842, so nothing is ever dropped.
    sizes = sizes_of(paper("adaptive"), range(8, 24), itertools.repeat(0.3))
    assert sizes[:3] == [842, 615, 449]  # 842 · 0.73 = 614.66, 615 · 0.73 = 448.95
    assert all(a > b or b == 250 for a, b in itertools.pairwise(sizes))
    assert sizes[-1] == 250


def test_fixed_keeps_the_first_size():
    assert set(sizes_of(paper("fixed"), range(8, 24), itertools.repeat(0.8))) == {842}
    assert set(sizes_of(paper("fixed", size=30), range(8, 24))) == {30}


@st.composite
def prunings(draw):
    vocabulary, num_layers = draw(st.integers(2, 50_000)), draw(st.integers(3, 60))
    return Pruning(
        draw(st.sampled_from(KINDS)),
        vocabulary,
        num_layers,
        draw(st.integers(1, num_layers - 2)),
        size=draw(st.none() | st.integers(2, vocabulary)),
        floor=draw(st.none() | st.integers(2, 60_000)),
        start=draw(st.none() | st.integers(2, 60_000)),
        shrink=draw(st.floats(0.01, 1)),
        recursive=draw(st.booleans()),
    )


@SETTINGS
@given(pruning=prunings(), confidences=st.lists(st.floats(-1, 1) | st.just(math.nan), min_size=60, max_size=60))
def test_sizes_never_grow_and_stay_between_the_floor_and_the_vocabulary(pruning, confidences):
    sizes = sizes_of(pruning, range(pruning.first_layer + 1, pruning.num_layers), confidences)
    assert all(a >= b for a, b in itertools.pairwise(sizes))
    assert sizes[0] <= pruning.vocabulary
    assert sizes[-1] >= min(pruning.smallest, sizes[0])
    assert pruning.smallest <= pruning.vocabulary
    if pruning.size is not None:
        assert sizes[0] == pruning.size


@pytest.mark.parametrize("kind", KINDS)
def test_a_floor_above_the_given_size_keeps_that_size(kind):
    assert set(sizes_of(Pruning(kind, 1000, 12, 3, size=20, floor=100), range(4, 12), itertools.repeat(0.9))) == {20}


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_refuses_more_kept_tokens_than_the_vocabulary_has(kind):
    policy = ExitPolicy(vocabulary=kind, vocabulary_size=101)
    assert resolve(policy, 12, 101).pruning.first_size() == 101
    with pytest.raises(ValueError, match=r"101.*100"):
        resolve(policy, 12, 100)


# ------------------------------------------------------------ which tokens are kept


def random_logits(seed, rows=3, n=VOCABULARY):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))


def scored_ids(kept):
    """The ids that count, by row, in the order of their columns."""
    return [ids[scored].tolist() for ids, scored in zip(kept.ids, kept.scored, strict=True)]


def best_ids(row, size):
    return sorted(range(len(row)), key=lambda v: -row[v])[:size]


def read(kept, logits):
    """What the head gives on the kept ids, of logits over all tokens."""
    return kept.mask(logits.gather(1, kept.ids))


@SETTINGS
@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(1, VOCABULARY), min_size=3, max_size=3))
def test_the_best_ids_are_kept_in_rank_order(seed, sizes):
    logits = random_logits(seed)
    kept = Kept.best(logits, sizes, NONE)
    assert scored_ids(kept) == [best_ids(row, size) for row, size in zip(logits.tolist(), sizes, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recursive", [False, True])
def test_the_winner_with_the_highest_id_survives_every_decay(kind, recursive):
    vocabulary, num_layers = 1000, 12
    pruning = Pruning(kind, vocabulary, num_layers, 2, floor=2, size=500, recursive=recursive)
    logits = torch.zeros(1, vocabulary)
    logits[0, :600] = torch.linspace(1, 2, 600)  # low ids, good but never best
    logits[0, -1] = 3.0
    kept, sizes = None, [500]
    for layer in range(3, num_layers):
        sizes.append(pruning.next_size(layer, sizes[-1], 0.8))
        now = logits if kept is None else read(kept, logits)
        kept = Kept.best(now, sizes[-1:], NONE) if kept is None else kept.shrunk(now, sizes[-1:])
        assert kept.ids[0, 0] == vocabulary - 1
        assert kept.scatter(read(kept, logits), vocabulary).argmax() == vocabulary - 1
        assert sum(map(len, scored_ids(kept))) == sizes[-1]
    assert (sizes[-1] == 500) if kind == "fixed" else (sizes[-1] < 100)


@SETTINGS
@given(
    seed=st.integers(0, 10**6),
    first=st.lists(st.integers(2, VOCABULARY), min_size=3, max_size=3),
    parts=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), max_size=4),
    protected=st.lists(st.integers(0, VOCABULARY - 1), max_size=4, unique=True),
)
def test_repeated_shrinking_equals_ranking_plain_lists(seed, first, parts, protected):
    """Every row: the best ids by the logits just given, among those still there; each protected id once; no others."""
    logits, sizes = random_logits(seed), first
    kept = Kept.best(logits, sizes, torch.tensor(protected, dtype=torch.long))
    free = logits.clone()
    free[:, protected] = -math.inf  # protected ids are not ranked
    sizes = [min(size, VOCABULARY - len(protected)) for size in sizes]
    ranked = [best_ids(row, size) for row, size in zip(free.tolist(), sizes, strict=True)]
    for step, part in enumerate([None, *parts]):
        if part is not None:
            sizes = [max(1, math.ceil(size * x)) for size, x in zip(sizes, part, strict=True)]
            kept = kept.shrunk(read(kept, logits), sizes)
            ranked = [
                sorted(ids, key=lambda v, row=row: -row[v])[:size]
                for ids, row, size in zip(ranked, logits.tolist(), sizes, strict=True)
            ]
        logits = random_logits(seed + step + 1)
        expected = [ids + sorted(protected) for ids in ranked]
        got = scored_ids(kept)
        assert [ids[: len(r)] for ids, r in zip(got, ranked, strict=True)] == ranked
        assert [sorted(ids) for ids in got] == [sorted(ids) for ids in expected]
        scores = kept.scatter(read(kept, logits), VOCABULARY)
        for a, ids in enumerate(expected):
            wanted = [logits[a, v].item() if v in ids else -math.inf for v in range(VOCABULARY)]
            assert scores[a].tolist() == wanted


@SETTINGS
@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(4, 20), min_size=3, max_size=3), part=st.floats(0.1, 1))
def test_rows_of_a_batch_keep_what_they_keep_alone(seed, sizes, part):
    protected, later = torch.tensor([1, 30]), [max(2, math.ceil(size * part)) for size in sizes]
    logits, newer = random_logits(seed), random_logits(seed + 1)
    batch = Kept.best(logits, sizes, protected)
    batch = batch.shrunk(read(batch, newer), later)
    scores = batch.scatter(read(batch, newer), VOCABULARY)
    for a in range(3):
        alone = Kept.best(logits[[a]], sizes[a : a + 1], protected)
        alone = alone.shrunk(read(alone, newer[[a]]), later[a : a + 1])
        assert scored_ids(alone)[0] == scored_ids(batch)[a]
        assert torch.equal(alone.scatter(read(alone, newer[[a]]), VOCABULARY)[0], scores[a])
        torch.testing.assert_close(gap_of(read(alone, newer[[a]]))[0], gap_of(read(batch, newer))[a])


def test_a_protected_id_is_scored_whatever_its_rank():
    protected = torch.tensor([7])
    kept = Kept.best(torch.arange(10.0)[None], [5], protected)  # 9 8 6 5 4 are ranked, 7 is not
    assert scored_ids(kept)[0] == [9, 8, 6, 5, 4, 7]
    logits = torch.zeros(1, 10)
    logits[0, [5, 6]] = torch.tensor([2.0, 1.0])
    logits[0, 7] = -4.0
    kept = kept.shrunk(read(kept, logits), [2])
    assert scored_ids(kept)[0] == [5, 6, 7]
    assert kept.scatter(read(kept, logits), 10)[0, 7] == -4.0


def test_a_protected_id_is_counted_once_in_every_probability():
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0]])
    kept = Kept.best(logits, [1], torch.tensor([0, 1]))
    z = read(kept, logits)
    assert sorted(scored_ids(kept)[0]) == [0, 1, 2]
    powers = [math.exp(x) for x in (2, 1, 0.5)]
    assert gap_of(z).item() == pytest.approx((powers[0] - powers[1]) / sum(powers), abs=1e-6)


def test_several_protected_ids_are_not_counted_in_the_size():
    kept = Kept.best(torch.arange(10.0)[None], [3], torch.tensor([0, 1]))
    assert scored_ids(kept)[0] == [9, 8, 7, 0, 1]


@pytest.mark.parametrize("protected", [[], [0], [3, 39]])
def test_keeping_all_tokens_equals_no_pruning(protected):
    logits = random_logits(1)
    kept = Kept.best(logits, [VOCABULARY] * 3, torch.tensor(protected, dtype=torch.long))
    newer = random_logits(2)
    assert torch.equal(kept.scatter(read(kept, newer), VOCABULARY), newer)
    torch.testing.assert_close(gap_of(read(kept, newer)), gap_of(newer))
    again = kept.shrunk(read(kept, newer), [VOCABULARY] * 3)
    assert torch.equal(again.scatter(read(again, newer), VOCABULARY), newer)


def test_logits_of_low_precision_are_masked_in_float32():
    logits = random_logits(3).bfloat16()
    kept = Kept.best(logits, [4, 2, 3], torch.tensor([5]))
    z = read(kept, logits)
    assert z.dtype == torch.float32
    assert torch.equal(z[kept.scored], logits.gather(1, kept.ids)[kept.scored].float())
    assert (z[~kept.scored] == -math.inf).all()


# ------------------------------------------------------------ gathered head rows


class Head:
    """A head with its own way of naming rows, and a count of what was copied from it."""

    def __init__(self, bias):
        g = torch.Generator().manual_seed(9)
        self.weight = torch.randn(VOCABULARY, WIDTH, generator=g)
        self.bias = torch.randn(VOCABULARY, generator=g) if bias else None
        self.gathers = 0

    def gather(self, ids):
        self.gathers += 1
        return HeadRows(self.weight[ids], None if self.bias is None else self.bias[ids])

    def full(self, x):
        z = torch.tensor([[sum(w * y for w, y in zip(row, state, strict=True)) for row in self.weight.tolist()]
                          for state in x.tolist()])  # fmt: skip
        return z if self.bias is None else z + self.bias


def product(rows, x):
    z = (rows.weight * x[:, None, :]).sum(-1)
    return z if rows.bias is None else z + rows.bias


def check_rows(kept, head):
    """Every gathered row is that of its id."""
    rows = kept.gather(head)
    assert torch.equal(rows.weight, head.weight[kept.ids])
    assert (rows.bias is None) == (head.bias is None)
    if rows.bias is not None:
        assert torch.equal(rows.bias, head.bias[kept.ids])
    return rows


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_gathered_rows_stay_with_their_ids(bias, rows):
    head = Head(bias)
    for seed in range(5):
        head.gathers = 0
        sizes, logits = [12, 20, 7][:rows], random_logits(seed, rows)
        kept = Kept.best(logits, sizes, torch.tensor([3, 39]))
        check_rows(kept, head)
        for step, size in enumerate((9, 5, 2)):
            x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(100 * seed + step))
            z = kept.mask(product(kept.gather(head), x))
            full = head.full(x)
            torch.testing.assert_close(
                kept.scatter(z, VOCABULARY),
                torch.where(torch.isfinite(kept.scatter(z, VOCABULARY)), full, -math.inf),
                atol=1e-5, rtol=1e-5,
            )  # fmt: skip
            kept = kept.shrunk(z, [min(size, s) for s in kept.sizes])
            check_rows(kept, head)
            assert kept.ids.shape[1] == max(kept.sizes) + 2
        assert head.gathers == 1, "later tests reuse the rows of the first"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("index", [[0], [2], [0, 2], [1, 2], [0, 1, 2]])
def test_selected_rows_keep_their_ids_sizes_and_head_rows(bias, gathered, index):
    head, logits = Head(bias), random_logits(4)
    kept = Kept.best(logits, [12, 5, 7], torch.tensor([3, 39]))
    if gathered:
        kept.gather(head)
    before = scored_ids(kept)
    some = kept.select(index)
    assert list(some.sizes) == [kept.sizes[i] for i in index]
    assert scored_ids(some) == [before[i] for i in index]
    check_rows(some, head)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(5))[index]
    later = [max(2, size // 2) for size in some.sizes]
    shrunk = some.shrunk(some.mask(product(some.gather(head), x)), later)
    check_rows(shrunk, head)
    full = head.full(x)
    for a, (ids, size) in enumerate(zip(scored_ids(shrunk), later, strict=True)):
        ranked = sorted(before[index[a]][: some.sizes[a]], key=lambda v, a=a: -full[a, v].item())[:size]
        assert ids[:size] == ranked
        assert {3, 39} <= set(ids)
