"""lm-evaluation-harness with exits, against its own Hugging Face model and against generation."""

import json

import pytest
import torch
from typer.testing import CliRunner

from offramp import ExitPolicy, LanguageModel, cli
from tiny import LAYERS, character_tokenizer, tiny, truncated

lm_eval = pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of lm-eval and datasets
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ANSWER = """
task: local_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place}/answer.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["e"], do_sample: false, max_gen_toks: 12}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
TEXT = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place}/answer.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
TASKS = ("local_choice", "local_answer", "local_text")
SOFTMAX = ExitPolicy(threshold=0.1, min_layer=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("harness")
    for name, text in (("choice", CHOICE), ("answer", ANSWER), ("text", TEXT)):
        (place / f"{name}.yaml").write_text(text.format(place=place))
    choices = [
        {"question": f"Why is {i} blue?", "choices": [" sky", " deep sea", f" it {i}"], "label": i % 3}
        for i in range(8)
    ]
    answers = [{"question": f"Say {'x' * i}{i}:", "answer": "y"} for i in range(6)]
    for name, rows in (("choice", choices), ("answer", answers)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def manager(place):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(place), include_defaults=False)


def model():
    return LanguageModel(tiny("llama"), character_tokenizer(), name="tiny")


def answers(found):
    """Per task, what was answered to each request of each document."""
    return {
        task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in found["samples"].items()
    }


def evaluated(model, manager, tasks=TASKS):
    return lm_eval.simple_evaluate(model, tasks=list(tasks), task_manager=manager, bootstrap_iters=10)


def hf(network, **options):
    from lm_eval.models.huggingface import HFLM

    return HFLM(network, tokenizer=character_tokenizer(), **options)


def require_equal(mine, theirs):
    for task in TASKS[:1]:
        for one, other in zip(mine[task], theirs[task], strict=True):
            assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
            torch.testing.assert_close(
                torch.tensor([value for value, _ in one]), torch.tensor([value for value, _ in other]),
                rtol=1e-4, atol=1e-4,
            )  # fmt: skip
    assert mine[TASKS[1]] == theirs[TASKS[1]]
    assert [len(texts) for texts in mine[TASKS[2]]] == [len(texts) for texts in theirs[TASKS[2]]]
    for one, other in zip(mine[TASKS[2]], theirs[TASKS[2]], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("policy", "depth"),
    [(None, LAYERS), (ExitPolicy(threshold=1.0, min_layer=1), LAYERS), (ExitPolicy("static", min_layer=2), 2)],
    ids=["full", "never", "static"],
)
def test_answers_are_those_of_lm_evals_own_model_of_as_many_layers(manager, policy, depth, batch_size):
    from offramp.lm.harness import HarnessModel

    mine = HarnessModel(model(), policy, batch_size=batch_size)
    theirs = hf(tiny("llama") if depth == LAYERS else truncated(tiny("llama"), depth), batch_size=batch_size)
    found = evaluated(mine, manager)
    require_equal(answers(found), answers(evaluated(theirs, manager)))
    costs = found["config"]["exit_costs"]
    assert costs["mean_layer"] == depth
    assert costs["tokens"] > 0
    assert costs["seconds"] > 0
    if policy is None and batch_size == 1:
        assert costs["flops_over_full"] == 1.0
    if depth < LAYERS:
        assert costs["flops_over_full"] < 1


def test_texts_beyond_the_context_are_cut_as_lm_eval_does(manager):
    from offramp.lm.harness import HarnessModel

    mine, theirs = HarnessModel(model(), max_length=12), hf(tiny("llama"), max_length=12)
    tasks = ("local_choice", "local_text")
    a, b = (answers(evaluated(one, manager, tasks)) for one in (mine, theirs))
    for one, other in zip(a["local_choice"], b["local_choice"], strict=True):
        assert [value for value, _ in one] == pytest.approx([value for value, _ in other], rel=1e-4)
    for one, other in zip(a["local_text"], b["local_text"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_log_likelihood_with_exits_is_that_of_the_answer_it_generates():
    from lm_eval.api.instance import Instance

    from offramp.lm.harness import HarnessModel

    lm = model()
    context = "Why is the sky"
    made = lm.generate(context, policy=SOFTMAX, chat=False, max_new_tokens=6, eos_token_id=None)
    assert min(made.exit_layers[0]) < LAYERS
    mine = HarnessModel(lm, SOFTMAX)
    [(value, greedy)] = mine._loglikelihood_tokens(
        [(None, lm.encode(context)["input_ids"][0].tolist(), made.tokens[0])]
    )
    assert greedy
    assert value < 0
    assert mine.spent.layers == sum(made.exit_layers[0])
    assert mine.spent.flops == made.costs.flops
    request = Instance("generate_until", {}, (context, {"until": [], "max_gen_toks": 6, "do_sample": False}), 0)
    with_end = lm.generate(context, policy=SOFTMAX, chat=False, max_new_tokens=6)
    assert mine.generate_until([request], disable_tqdm=True) == with_end.texts


@pytest.mark.parametrize(
    ("policy", "task", "message"),
    [
        (ExitPolicy(threshold=0.2, min_layer=1, skipped="verify"), "local_choice", "under skipped='verify'"),
        (ExitPolicy(threshold=0.2, min_layer=9), "local_choice", "layer"),
        (None, "no_such_task", "lm-eval knows no task 'no_such_task'"),
    ],
    ids=["verify", "layer", "task"],
)
def test_what_cannot_be_judged_is_refused(manager, policy, task, message):
    from offramp.lm.harness_run import evaluate_harness

    with pytest.raises(ValueError, match=message):
        evaluate_harness(model(), [task], {} if policy is None else {"arm": policy}, manager=manager)


def test_the_full_model_stands_beside_with_paired_differences(manager, tmp_path):
    from offramp.lm.harness_run import HarnessResult, evaluate_harness

    verify = ExitPolicy(threshold=0.1, min_layer=1, skipped="verify")
    result = evaluate_harness(model(), ["local_choice", "local_text"], {"static": ExitPolicy("static", min_layer=1)},
                              manager=manager, resamples=50)  # fmt: skip
    choice = {one.arm: one for one in result.scores if one.task == "local_choice"}
    assert choice["full"].difference is None
    difference = choice["static"].difference
    assert difference.value == pytest.approx(choice["static"].value - choice["full"].value)
    assert difference.low <= difference.value <= difference.high
    assert choice["static"].documents == 8
    assert all(one.difference is None for one in result.scores if one.task == "local_text")
    cost = {one.arm: one for one in result.costs if one.task == "local_choice"}
    assert cost["full"].flops_over_full == 1
    assert (cost["full"].mean_layer, cost["static"].mean_layer) == (LAYERS, 1)
    lossless = evaluate_harness(model(), ["local_answer"], {"verify": verify}, manager=manager, resamples=50)
    assert [one.difference.value for one in lossless.scores if one.arm == "verify"] == [0]
    result.save(tmp_path)
    assert HarnessResult.from_dict(json.loads((tmp_path / "results.json").read_text())) == result


def test_the_command(place, manager, tmp_path, monkeypatch):
    import lm_eval.tasks

    tiny("llama").save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    ExitPolicy("static", min_layer=2).save(tmp_path / "static.json")
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: manager)  # reading all of lm-eval's takes seconds
    done = CliRunner().invoke(
        cli.app,
        ["evaluate", str(tmp_path / "model"), "--harness", "local_answer,local_choice", "--policy",
         str(tmp_path / "static.json"), "--include", str(place), "--limit", "3", "--out", str(tmp_path / "out"),
         "--json", str(tmp_path / "found.json")],
    )  # fmt: skip
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["schema"] == "offramp/harness/1"
    assert {one["arm"] for one in found["scores"]} == {"full", "static"}
    assert "minus full's (95 %)" in (tmp_path / "out" / "table.md").read_text()
