"""Adaptive policies in evaluations: they learn over all examples, and an interruption changes nothing of it."""

import json
from dataclasses import replace

import pytest
import torch

from evaluation_runs import TASK, decode_records, examples, perplexity_records
from offramp import ExitPolicy, LanguageModel
from offramp.core.adaptive_threshold import AdaptiveThreshold
from offramp.evaluation import Passage, read_records
from offramp.runs.resume import read_lines, write_lines
from test_brute_force import lively
from tiny import VOCABULARY, tokenizer

FREE = ExitPolicy(threshold=0.15, min_layer=3, skipped="defer", adaptive=True)
COUNT = 8
TOKENS = 20


def model():
    return LanguageModel(lively("llama"), tokenizer(), name="tiny")


def passages():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCABULARY, (COUNT, TOKENS + 1), generator=generator).tolist()
    return [Passage(f"p{i}", f"g{i}", tuple(row)) for i, row in enumerate(rows)]


def answers(lm, folder, policy=FREE, name="free", **options):
    options = {"max_new_tokens": TOKENS, "settings": {"min_new_tokens": TOKENS}, **options}
    full = decode_records(lm, TASK, examples(COUNT), "full", None, folder / "full.jsonl", **options)
    full = {record.id: record for record in full}
    return decode_records(lm, TASK, examples(COUNT), "free", policy, folder / f"{name}.jsonl", full=full, **options)


def scores(lm, folder, policy=FREE, name="free", *, given=None, **options):
    given = given or passages()
    full = {r.id: r for r in perplexity_records(lm, given, "full", None, folder / "full.jsonl", **options)}
    return perplexity_records(lm, given, "free", policy, folder / f"{name}.jsonl", full=full, **options)


def timeless(records):
    return [replace(record, seconds=0.0, prompt_seconds=0.0, round=0.0) for record in records]


def taus(records):
    return [record.learnt["value"] for record in records if record.learnt]


def test_perplexity_learns_over_all_passages_as_generation_does(tmp_path):
    """Along a policy's own answers, forcing them is generating them: the same exits, the same lessons."""
    lm, prompts = model(), [[1], [20], [33], [47], [51], [64], [70], [81]]
    out = [lm.generate(torch.tensor([p]), policy=FREE, max_new_tokens=TOKENS, min_new_tokens=TOKENS) for p in prompts]
    given = [Passage(f"{p}", "g", (*p, *o.tokens[0])) for p, o in zip(prompts, out, strict=True)]
    other = model()
    found = scores(other, tmp_path, given=given)
    assert [record.exit_layers for record in found] == [o.exit_layers[0] for o in out]
    expected, learnt = lm.adaptive_threshold(FREE), other.adaptive_threshold(FREE)
    assert (learnt.value, learnt.fits) == (expected.value, expected.fits)
    assert (learnt.agree.count, learnt.disagree.count) == (expected.agree.count, expected.disagree.count)
    assert learnt.fits > 0
    assert learnt.value != FREE.threshold


def test_each_arm_of_perplexity_begins_with_nothing_learnt(tmp_path):
    lm = model()
    first = scores(lm, tmp_path)
    assert timeless(scores(lm, tmp_path, name="again")) == timeless(first)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("made", [answers, scores])
def test_cut_anywhere_it_goes_on_as_if_nothing_had_happened(tmp_path, made, batch_size):
    path = tmp_path / "free.jsonl"
    whole = made(model(), tmp_path, batch_size=batch_size)
    assert len(set(taus(whole))) > 1  # it depends on where it stands
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for kept in (1, 4, 7, len(lines)):
        path.write_bytes(b"".join(lines[:kept]) + b"".join(lines[kept : kept + 1])[:20])
        lm = model()
        assert timeless(made(lm, tmp_path, batch_size=batch_size)) == timeless(whole)
        assert lm.adaptive_threshold(FREE).learnt() == whole[-1].learnt
        assert timeless(read_records(path)[1]) == timeless(whole)


def test_what_was_learnt_stands_at_the_end_of_each_batch_and_nowhere_else(tmp_path):
    found = answers(model(), tmp_path, batch_size=3)
    assert [bool(record.learnt) for record in found] == [False, False, True, False, False, True, False, True]
    assert '"learnt"' not in (tmp_path / "full.jsonl").read_text()
    fixed = answers(model(), tmp_path, replace(FREE, adaptive=False, exit_layers=(3,)), "fixed", batch_size=3)
    assert not any(record.learnt for record in fixed)


@pytest.mark.parametrize("done", [4, COUNT])
def test_of_an_earlier_version_what_is_finished_is_read_and_what_is_not_begins_anew(tmp_path, done):
    path, whole = tmp_path / "free.jsonl", answers(model(), tmp_path)
    header, *rows = read_lines(path, "records")
    old = [{**row, "seconds": -1.0} for row in rows[:done]]
    for row in old:
        del row["learnt"]
    write_lines(path, [header, *old])
    again = answers(model(), tmp_path)
    assert timeless(replace(record, learnt={}) for record in again) == timeless(replace(r, learnt={}) for r in whole)
    assert {record.seconds == -1 for record in again} == {done == COUNT}


def test_perplexities_of_an_earlier_version_which_learnt_nothing_are_refused(tmp_path):
    scores(model(), tmp_path)
    path = tmp_path / "free.jsonl"
    header, *rows = read_lines(path, "records")
    write_lines(path, [{**header, "settings": {}}, *rows])
    with pytest.raises(ValueError, match=r"learning was None and is now 'over all passages'\); remove it"):
        scores(model(), tmp_path)


def test_a_threshold_recalls_what_it_learnt():
    learnt = AdaptiveThreshold(0.5)
    learnt.add([0.1 * (i % 7) + 0.2 for i in range(40)], [i % 3 > 0 for i in range(40)])
    learnt.refit()
    other = AdaptiveThreshold(0.5)
    other.recall(json.loads(json.dumps(learnt.learnt())))
    assert other == learnt
