"""A model that computes NaN or infinity is refused by all that judges, with the place; a sound one never is."""

import copy
import math

import pytest
import torch
from transformers import LogitsProcessorList

import evaluation_runs
import token_distillation
import training_runs
from evaluation_runs import perplexity_records
from offramp import ExitPolicy, LanguageModel
from offramp.calibration import Grid, Promise, calibrate
from offramp.calibration.token_rows import cache_tokens
from offramp.distillation.language_models import distil
from offramp.evaluation import evaluate
from offramp.evaluation.perplexity import Passage
from offramp.families.finite import NotFiniteError, not_finite, require_finite
from offramp.lm.bench import run_bench
from offramp.lm.probe import probe, read_layers
from offramp.runs.folder import TrainingError
from offramp.training.answers import AnswerConfig, answer_documents
from offramp.training.config import TrainConfig
from offramp.training.data import Document
from offramp.training.trainer import train
from tiny import LAYERS, tiny, tokenizer

EXIT = ExitPolicy(threshold=0.2, min_layer=1)
ALWAYS = ExitPolicy("static", min_layer=3)


def broken(layer=3, value=math.nan, name="llama"):
    """One weight of a block is not finite; layers count from 1."""
    model = copy.deepcopy(tiny(name))
    next(iter(model.model.layers[layer - 1].mlp.parameters())).data[0, 0] = value
    return LanguageModel(model, tokenizer(), name="broken")


def headless(value):
    model = copy.deepcopy(tiny("llama"))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.lm_head.weight.data[5] = value
    return LanguageModel(model, tokenizer(), name="broken")


PROMPT = ["w1 the sky is w2"]
SEVEN = torch.tensor([7])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "policy",
    [
        None, EXIT, ALWAYS, ExitPolicy(threshold=0.2, min_layer=1, skipped="defer"),
        ExitPolicy("static", min_layer=1, skipped="verify"), ExitPolicy(threshold=0.2, min_layer=1, vocabulary="fixed"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 0}, {"repetition_penalty": 1.2}])
def test_a_broken_block_is_named(value, policy, options):
    with pytest.raises(NotFiniteError, match=rf"NaN or infinity after layer 3 of {LAYERS}, first at token \d of seq"):
        broken(value=value).generate(PROMPT, policy=policy, max_new_tokens=4, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 0}])
def test_a_broken_head_is_named(value, options):
    with pytest.raises(NotFiniteError, match="in its readout"):
        headless(value).generate(PROMPT, max_new_tokens=4, **options)


def test_the_first_token_and_the_sequence_are_named():
    model = copy.deepcopy(tiny("llama"))
    lm = LanguageModel(model, tokenizer(), name="broken")
    inputs = lm.encode(["w21 w22 w23", "w21 w22 w23 w24 w29 w25"])
    ids = inputs["input_ids"]
    rare = int(ids[1, -2])
    assert int((ids == rare).sum()) == 1
    model.model.embed_tokens.weight.data[rare] = math.nan
    with pytest.raises(NotFiniteError, match=f"in its embeddings, first at token {ids.shape[1] - 1} of sequence 2"):
        lm.generate(inputs, max_new_tokens=2)


def test_what_processors_forbid_is_no_fault_of_the_model():
    lm = LanguageModel(tiny("llama"), tokenizer(), name="sound")
    only_7 = LogitsProcessorList(
        [lambda ids, scores: torch.full_like(scores, -math.inf).index_fill(1, SEVEN, math.inf)]
    )
    assert lm.generate(PROMPT, max_new_tokens=2, logits_processor=only_7).tokens == [[7, 7]]
    all_of_them = LogitsProcessorList([lambda ids, scores: torch.full_like(scores, -math.inf)])
    with pytest.raises(ValueError, match="the logits processors forbid all of them"):
        lm.generate(PROMPT, max_new_tokens=2, logits_processor=all_of_them, do_sample=True)


def test_a_model_may_forbid_tokens_itself():
    out = headless(0.0).generate(PROMPT, max_new_tokens=3)
    lm = headless(0.0)
    lm.model.lm_head.bias = torch.nn.Parameter(torch.zeros(lm.vocabulary))
    lm.model.lm_head.bias.data[out.tokens[0][0] + 1] = -math.inf
    assert lm.generate(PROMPT, max_new_tokens=3).tokens[0][0] == out.tokens[0][0]


# ---------------------------------------------------------------- wherever something is judged

JUDGES = {
    "probe": lambda lm, folder: probe(lm, PROMPT, max_new_tokens=3),
    "probe on texts": lambda lm, folder: probe(lm, texts=PROMPT),
    "evaluate": lambda lm, folder: evaluate(lm, evaluation_runs.TASK, evaluation_runs.examples(3), {}, folder),
    "calibrate": lambda lm, folder: calibrate(
        lm, evaluation_runs.TASK, evaluation_runs.examples(30), ExitPolicy(min_layer=1), Promise("f1", 0.3, 0.3),
        folder, grid=Grid(thresholds=(0.4,)), max_new_tokens=3,
    ),
    "perplexity": lambda lm, folder: perplexity_records(
        lm, [Passage("0", "0", (1, 5, 6, 7))], "full model", None, folder / "a.jsonl"
    ),
    "bench": lambda lm, folder: run_bench(lm, PROMPT, {}, max_new_tokens=2, repeats=1, warmup=0),
    "answers": lambda lm, folder: answer_documents(lm, PROMPT * 2, AnswerConfig(max_new_tokens=2), folder / "a.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_is_judged_by_a_broken_model(tmp_path, judge, value):
    with pytest.raises(NotFiniteError, match=f"after layer 3 of {LAYERS}"):
        JUDGES[judge](broken(value=value), tmp_path)


def test_perplexity_sees_what_other_tokens_score(tmp_path):
    """The score of the text's own token is a number; that of another is not."""
    lm = headless(math.nan)
    with pytest.raises(NotFiniteError, match="in its readout"):
        perplexity_records(lm, [Passage("0", "0", (1, 6, 7, 8))], "full model", None, tmp_path / "a.jsonl")


@torch.no_grad()
def test_layers_are_named_where_all_are_read():
    lm = LanguageModel(tiny("llama"), tokenizer())
    states = torch.zeros(LAYERS, 3, lm.split.shape.width)
    states[1, 2] = math.nan
    with pytest.raises(NotFiniteError, match="after layer 2"):
        read_layers(lm.split, states)


# ---------------------------------------------------------------- words


def test_float16_has_a_remedy():
    assert "load it in float32 or bfloat16" in str(not_finite("m", "after layer 1 of 2", torch.float16))
    assert "damaged" in str(not_finite("m", "after layer 1 of 2", torch.float32))


def test_values_are_required_to_be_finite():
    require_finite(torch.zeros(3), "m", "in its logits")
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(NotFiniteError, match="m computes NaN or infinity in its logits"):
            require_finite(torch.tensor([0.0, value]), "m", "in its logits")


def test_training_on_a_broken_model_says_where_it_is_broken(tmp_path):
    with pytest.raises(TrainingError, match=f"every exit .*NaN or infinity after layer 3 of {LAYERS}, first at token"):
        train(broken(), training_runs.data(), TrainConfig(steps=2, batch_size=3), tmp_path)


def test_readout_inputs_are_not_kept_of_a_broken_model(tmp_path):
    documents = [Document((1, 5, 6, 7, 8, 9), 0, f"g{i}") for i in range(8)]
    with pytest.raises(NotFiniteError, match="after layer 4"):
        cache_tokens(broken(4), documents, tmp_path, layers=(2,), window=16)
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_a_broken_teacher_is_named(tmp_path):
    with pytest.raises(NotFiniteError, match="the teacher LlamaForCausalLM computes NaN or infinity"):
        distil(training_runs.model(), broken(), token_distillation.data(), token_distillation.config(), tmp_path)
