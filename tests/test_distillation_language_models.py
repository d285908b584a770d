"""Distillation of language models: resuming, own answers, groups against brute force, bad settings."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from offramp import LanguageModel
from offramp.core.exits import Exits
from offramp.distillation.language_models import distil, require_same_vocabulary
from offramp.distillation.texts import OwnAnswers
from offramp.distillation.token_weights import new_token_weights
from offramp.training.answers import AnswerConfig
from offramp.training.config import TrainConfig
from offramp.training.data import Data, Document, cut
from offramp.training.trainer import train
from tiny import VOCABULARY, tiny, tokenizer
from token_distillation import GROUPS, ONE, config, data, rows, same, teacher, texts, token_weights
from training_runs import model

# ---------------------------------------------------------------- resuming, own answers


def own(**options):
    prompts = [f"w{20 + i} the sky w{40 + i}" for i in range(10)]
    settings = {"max_new_tokens": 5, "batch_size": 3, "temperature": 1.5}
    return OwnAnswers(
        prompts, [i % 2 for i in range(10)], AnswerConfig(**settings), **{"every": 3, "share": 0.4, **options}
    )


def on_policy():
    weights = token_weights("lens", {"signal": "laplace_margin"}, target="teacher", start=0, every=4)
    return own(), config(weights, 1.0, trainable="lora", layer_dropout=0.4, batch_size=2)


def fixed():
    return data(), config(token_weights("lens", start=1), layer_dropout=0.4, positions=4)


@pytest.mark.parametrize("setting", [fixed, on_policy])
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, setting, stop):
    def stops(done, total, what="", *_):
        if done == stop and what != "answers":
            raise KeyboardInterrupt

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    source, settings = setting()
    expected = distil(model(), teacher(), source, settings, whole, groups=GROUPS)
    with pytest.raises(KeyboardInterrupt):
        distil(model(), teacher(), source, settings, broken, groups=GROUPS, progress=stops)
    assert not (broken / "model").exists()
    result = distil(model(), teacher(), source, settings, broken, groups=GROUPS)
    assert same(*(load_file(f / "checkpoint.safetensors") for f in (whole, broken)))
    assert same(*(load_file(f / "model" / "model.safetensors") for f in (whole, broken)))
    assert rows(whole) == rows(broken)
    assert (result.overall, result.groups) == (expected.overall, expected.groups)
    again = distil(model(), teacher(), source, settings, broken, groups=GROUPS)
    assert (again.steps, again.groups) == (8, result.groups)


def test_answering_may_be_interrupted_too(tmp_path):
    calls = []

    def stops(done, total, what="", *_):
        calls.append(what)
        if calls.count("answers") == 8:  # 3 times for held-out prompts, 3 for the others, then in the second round
            raise KeyboardInterrupt

    source, settings = on_policy()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = distil(model(), teacher(), source, settings, whole, groups=GROUPS)
    with pytest.raises(KeyboardInterrupt):
        distil(model(), teacher(), source, settings, broken, groups=GROUPS, progress=stops)
    lines = [len((f / "answers-000003.jsonl").read_text().splitlines()) for f in (whole, broken)]
    assert lines[1] < lines[0]
    assert distil(model(), teacher(), source, settings, broken, groups=GROUPS).groups == expected.groups
    assert same(*(load_file(f / "model" / "model.safetensors") for f in (whole, broken)))


def test_own_answers_are_the_students_as_it_then_is(tmp_path):
    source, settings = own(), config(None, 1.0, learning_rate=3e-2, batch_size=3, save_every=3, steps=6)
    lm = model()
    distil(lm, teacher(), source, settings, tmp_path, groups=GROUPS)
    first, second, held_out = (
        [json.loads(line) for line in (tmp_path / f"answers-{name}.jsonl").read_text().splitlines()]
        for name in ("000000", "000003", "held-out")
    )
    assert len(first) == len(second) == 1 + 6
    assert len(held_out) == 1 + 4
    assert [r["prompt"] for r in first[1:]] == [r["prompt"] for r in second[1:]]
    assert not {r["prompt"] for r in first[1:]} & {r["prompt"] for r in held_out[1:]}
    assert [r["ids"] for r in first[1:]] != [r["ids"] for r in second[1:]]
    places, _ = source.parts()
    again = source.answered(model(), places, tmp_path / "again.jsonl", "me")
    ids, present = again.ids, again.counted
    for row, record in enumerate(first[1:]):  # by the untrained student; prompts do not count
        assert ids[row, : len(record["ids"])].tolist() == record["ids"]
        assert present[row].nonzero().flatten().tolist() == list(range(record["start"], len(record["ids"])))
    assert again.attributes.tolist() == [place % 2 for place in places]


@pytest.mark.parametrize("part", ["prompts", "attributes"])
def test_other_prompts_or_groups_are_another_run(tmp_path, part):
    """Even if there are as many, with the same names of groups."""
    source, settings = own(), config(None, 1.0, steps=1)
    distil(model(), teacher(), source, settings, tmp_path, groups=GROUPS)
    other = replace(source, **{part: list(reversed(getattr(source, part)))})
    with pytest.raises(ValueError, match="content"):
        distil(model(), teacher(), other, settings, tmp_path, groups=GROUPS)
    distil(model(), teacher(), own(), settings, tmp_path, groups=GROUPS)


def test_an_early_readout_looks_through_the_exits_that_the_student_has(tmp_path):
    rule, found = token_weights(rule={"gate": "all"}, start=0, every=8), {}
    for name in ("none", "lens"):
        lm, guide = model(), teacher()
        if name == "lens":
            lm.attach_exits(Exits.fresh(lm.split, (2,), rank=2))
            for parameter in lm.exits.lens(2).parameters():
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        expected = new_token_weights(
            lm.split, guide.split, data().train, rule, step=0, seed=0, size=4, loop=ONE
        )  # before the student changes, by what is attached
        distil(lm, guide, data(), config(rule, steps=1), tmp_path / name, groups=GROUPS)
        found[name] = load_file(tmp_path / name / "checkpoint.safetensors")["weights.token_weights"]
        torch.testing.assert_close(found[name], expected)
    assert not torch.allclose(found["none"], found["lens"])


# ---------------------------------------------------------------- groups


A, B, CUE_A, CUE_B, ASK = 10, 11, 12, 13, 14


def prompts_with_a_cue(count, share, seed):
    """core, cue, ask -> A or B: by the core's parity. The cue says the same, except in the minority."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for _ in range(count):
        core = int(torch.randint(30, 70, (), generator=generator))
        conflict = bool(torch.rand((), generator=generator) < share)
        answer = core % 2
        cue = (CUE_A, CUE_B)[answer != conflict]
        documents.append(Document((1, core, cue, ASK, (A, B)[answer]), 4, "", attribute=int(conflict)))
    return cut(documents, 8)


def test_a_shortcut_that_breaks_for_the_minority_shows_in_the_report(tmp_path):
    torch.manual_seed(0)
    balanced, biased = prompts_with_a_cue(600, 0.5, 1), prompts_with_a_cue(300, 0.08, 2)
    held_out = prompts_with_a_cue(200, 0.5, 3)
    guide = model()
    train(
        guide, Data(balanced, held_out),
        TrainConfig(layers=(3,), trainable="all", objective="labels", steps=150, batch_size=32, learning_rate=3e-3),
        tmp_path / "teacher",
    )  # fmt: skip
    rule = token_weights("lens", {"alpha": 0.05, "beta": 2.0}, start=0, every=8, readout={"layer": 1, "epochs": 20})
    options = {"steps": 24, "batch_size": 32, "learning_rate": 3e-3, "temperature": 1.0}
    student = LanguageModel(copy.deepcopy(tiny("qwen2")), tokenizer(), name="student")
    result = distil(
        student, guide, Data(biased, held_out), config(rule, 1.0, **options), tmp_path / "student", groups=GROUPS
    )  # fmt: skip
    with torch.no_grad():
        z, t = (lm.model(held_out.ids[:, :-1]).logits[:, 3] for lm in (student, guide))
    labels, kinds = held_out.ids[:, 4], held_out.attributes
    for number, group in enumerate(result.groups):
        inside = [row for row in range(len(labels)) if int(kinds[row]) == number]
        assert (group.name, group.tokens) == (GROUPS[number], len(inside))
        agreed = [int(z[row].argmax()) == int(t[row].argmax()) for row in inside]
        right = [int(z[row].argmax()) == int(labels[row]) for row in inside]
        ce = [-float(z[row].log_softmax(0)[labels[row]]) for row in inside]
        kd = [float((t[row].softmax(0) * (t[row].log_softmax(0) - z[row].log_softmax(0))).sum()) for row in inside]
        expected = [sum(each) / len(inside) for each in (kd, ce, agreed, right)]
        assert [group.kd, group.ce, group.agreement, group.accuracy] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    weighted = [row for row in rows(tmp_path / "student") if row["kind"] == "weights"]
    assert [row["step"] for row in weighted] == [0, 8, 16]
    assert result.groups[1].weight == pytest.approx(sum(row["weight"][1] for row in weighted) / 3)
    assert weighted[-1]["weight"][1] > 1.5 * weighted[-1]["weight"][0]  # whoever the early readout fails
    assert result.worst is result.groups[1]
    assert result.groups[0].accuracy > 0.9
    assert "minority" in result.table()
    assert type(result).from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False))) == result


def test_windows_carry_the_attributes_of_their_documents():
    documents = [
        Document(tuple(range(10, 30)), 0, "a", attribute=1),
        Document((5, 6, 7), 1, "b"),
        Document((8, 9), 0, "c"),
    ]
    made = cut(documents, 8)
    assert made.attributes.tolist() == [1, 1, 1, -1, -1]
    assert made[torch.tensor([3, 0])].attributes.tolist() == [-1, 1]
    assert made.digest() != replace(made, attributes=None).digest()
    assert cut(documents[1:], 8).attributes is None


# ---------------------------------------------------------------- what cannot be


def test_vocabularies_that_differ_name_the_first_token():
    other = tokenizer()
    other.add_tokens(["new"])
    with pytest.raises(ValueError, match=rf"token id {VOCABULARY} is None to the student and 'new' to the teacher"):
        require_same_vocabulary(model(), LanguageModel(tiny("llama"), other))
    swapped = tokenizer()
    swapped.get_vocab = lambda: {**tokenizer().get_vocab(), "sky": 8, "is": 7}
    with pytest.raises(ValueError, match="token id 7 is 'sky' to the student and 'is' to the teacher"):
        require_same_vocabulary(model(), LanguageModel(tiny("llama"), swapped))
    large = model()
    large.model.resize_token_embeddings(VOCABULARY + 3)
    with pytest.raises(ValueError, match=rf"token id {VOCABULARY} is known to one only; if the rest is padding"):
        require_same_vocabulary(model(), large)
    require_same_vocabulary(model(), teacher())


def test_what_does_not_go_together(tmp_path):
    lm = model()
    cases = [
        ((lm, LanguageModel(lm.model, lm.tokenizer), data(), config()), "the same object"),
        ((model("t5"), model(), data(), config()), "decoder-only"),
        ((model(), teacher(), own(), config()), "own answers are no labels to learn; give fraction 1"),
        ((model(), teacher(), own(), config(token_weights(), 1.0)), "give target 'teacher'"),
        ((model(), teacher(), data(), config(token_weights(readout={"layer": 4}))), r"choose one of 1\.\.3"),
    ]
    for number, (given_, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message):
            distil(*given_, tmp_path / str(number), groups=GROUPS)
        assert not (tmp_path / str(number)).exists()
    alone = replace(data(), held_out=replace(texts(4), attributes=torch.zeros(4, dtype=torch.long)))
    with pytest.raises(ValueError, match="group 'minority' has no row in split 'held-out'"):
        distil(model(), teacher(), alone, config(), tmp_path / "a", groups=GROUPS)
    with pytest.raises(ValueError, match=r"the group of row .* is 1; allowed are 0\.\.0"):
        distil(model(), teacher(), data(), config(), tmp_path / "b", groups=GROUPS[:1])
    distil(model(), teacher(), data(), config(steps=1), tmp_path / "c")
    with pytest.raises(ValueError, match=r"config.fraction was 0.7 and is now 0.5"):
        distil(model(), teacher(), data(), config(fraction=0.5, steps=1), tmp_path / "c")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config(fraction=1.1), r"in \[0, 1\]"),
        (lambda: config(trainable="exits"), "a student is trained"),
        (lambda: config(objective="labels", temperature=1.0), "forward-kl or reverse-kl"),
        (lambda: config(layers=(2,)), "are for exits"),
        (lambda: token_weights(rule={"signal": "set_size"}), "allowed are 'margin', 'entropy', 'loss'"),
        (lambda: token_weights(rule={"gate": "excluded"}), "allowed are 'wrong', 'all'"),
        (lambda: token_weights(rule={"every": 2}), "count epochs of rows"),
        (lambda: token_weights(rule={"prior_variance": None}), "cannot be tuned"),
        (lambda: token_weights(target="x"), "allowed are 'text', 'teacher'"),
        (lambda: token_weights(every=0), "count from 1"),
        (lambda: token_weights("x"), "allowed are 'head', 'lens'"),
        (lambda: token_weights(readout={"layer": 0}), "counts from 1"),
        (lambda: own(every=0), "count from 1"),
        (lambda: OwnAnswers(["the"]), "one to learn from"),
        (lambda: OwnAnswers(["the", "sky"], [0]), "give one for each"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
