"""What must not care where a model is: each test does the same with one on the CPU and with its copy on another device.

That is the one that OFFRAMP_TEST_DEVICE names (`cuda.sh` runs this file on a GPU), or without it that of `elsewhere`: a
tensor made on the wrong device then fails as it would on a GPU, though what a GPU's rounding changes does not show. To
be run in a process of its own: python -m pytest FILE.
"""

import copy
import json
import os

import pytest
import torch

from classifier_runs import net, rows
from offramp import ExitPolicy, LanguageModel
from offramp.classifiers.config import ClassifierTrainConfig
from offramp.classifiers.trainer import train_exits
from offramp.core.exits import Exits
from offramp.core.running import RunningBatch
from offramp.cuda.model import CudaModel
from offramp.families import SplitModel
from offramp.training.trainer import train
from posteriors import with_posterior
from test_cuda_engine import POLICIES as SEGMENTED
from test_cuda_engine import decoded
from test_cuda_engine import policy_of as policy_of_segments
from test_posterior_fit import documents_of, with_exits
from test_running import POLICIES as RUNNING
from test_running import requests, served
from tiny import DECODER_ONLY, FAMILIES, inputs_for, tiny
from training_runs import config, data
from training_runs import model as trained

NAME = os.environ.get("OFFRAMP_TEST_DEVICE", "elsewhere")
if NAME == "elsewhere":
    from elsewhere import moved
else:

    def moved(module):
        """The module, on the device."""
        return module.to(NAME)


HALVES = [torch.bfloat16, torch.float16]
WAYS = {
    "full": None,
    "propagate": {},
    "defer": {"skipped": "defer"},
    "verify": {"skipped": "verify", "draft": "adaptive"},
}
MORE = {
    **{name: {"vocabulary": name} for name in ("fixed", "decaying", "adaptive")},
    **{name: {"confidence": name} for name in ("max", "entropy", "state", "jsd", "contrastive")},
    "contrast": {"confidence": "contrastive", "decode_from": "contrastive"},
    "adaptive-threshold": {"adaptive": True, "skipped": "defer"},
    "all-rows": {"batch": "all"},
    "static": {"confidence": "static", "min_layer": 2},
}


def there(lm):
    """A copy of the model elsewhere, with copies of its exits."""
    copied = LanguageModel(moved(copy.deepcopy(lm.model)), lm.tokenizer, name=lm.name)
    if lm.exits is not None:
        copied.attach_exits(moved(copy.deepcopy(lm.exits)))
    return copied


def both(lm, inputs, policy, **options):
    """What the model generates here and elsewhere, the same."""
    here = LanguageModel(lm.model, engine="torch")
    here.attach_exits(lm.exits)
    want = here.generate(inputs, policy=policy, **options)
    away = there(lm)
    assert away.model.device.type == NAME
    got = away.generate({name: value.to(NAME) for name, value in inputs.items()}, policy=policy, **options)
    assert got.sequences.device.type == NAME
    assert (got.tokens, got.exit_layers) == (want.tokens, want.exit_layers)
    return want


def policy_of(options):
    return None if options is None else ExitPolicy(**{"threshold": 0.1, "min_layer": 1, **options})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_decodes(name, way):
    both(LanguageModel(tiny(name)), inputs_for(name, 2), policy_of(WAYS[way]), max_new_tokens=5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_family_in_half_precision(name, dtype):
    """Its blocks, run in two parts, give the logits that transformers gives on that device.

    Only products of other shapes round differently, so that most agree to the bit: 16 units in the last place of the
    largest logit leave room for the roundings of four layers.
    """
    model = moved(copy.deepcopy(tiny(name)).to(dtype))
    split = SplitModel(model)
    inputs = {key: value.to(NAME) for key, value in inputs_for(name, 2).items()}
    if name == "whisper":
        inputs["input_features"] = inputs["input_features"].to(dtype)
    mask, source = inputs.get("attention_mask"), inputs.get("input_ids", inputs.get("input_features"))
    if name in DECODER_ONLY:
        state, wanted = split.start(source), model(**inputs).logits
    else:
        ids = torch.full((2, 4), 5, device=NAME)
        state = split.start(ids, memory=split.encode(source, mask), memory_mask=mask)
        wanted = model(**inputs, decoder_input_ids=ids).logits
    got = split.readout(split.run(split.run(state, 0, 2), 2, 4).hidden)
    room = 16 * torch.finfo(dtype).eps * wanted.abs().max().item()
    torch.testing.assert_close(got.float().cpu(), wanted.float().cpu(), atol=room, rtol=0)


@pytest.mark.parametrize("kind", MORE)
@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_every_policy_decodes(name, kind):
    both(LanguageModel(tiny(name)), inputs_for(name, 2), policy_of(MORE[kind]), max_new_tokens=5)


def test_a_short_prompt_sampling_and_a_list_of_tokens():
    lm = LanguageModel(tiny("llama"))
    both(lm, inputs_for("llama", 2), policy_of({"prompt_layer": 2}), max_new_tokens=5)
    lm.attach_exits(Exits.fresh(lm.split).with_frequent(range(2, 60)))
    both(lm, inputs_for("llama", 2), policy_of({"vocabulary": "frequent"}), max_new_tokens=5)
    inputs = {name: value.to(NAME) for name, value in inputs_for("llama", 2).items()}
    away = there(lm)
    assert len(away.generate(inputs, max_new_tokens=5, do_sample=True, top_k=5).tokens) == 2


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_lenses_and_blocks_of_the_exits_own(name, blocks):
    lm = LanguageModel(tiny(name))
    lm.attach_exits(Exits.fresh(lm.split, (1, 3), blocks=blocks))
    for options in WAYS.values():
        both(lm, inputs_for(name, 2), policy_of(options), max_new_tokens=5)


@pytest.mark.parametrize("policy", SEGMENTED)
@pytest.mark.parametrize("name", ["llama", "t5", "mt5"])
def test_segments_of_the_cuda_engine(name, policy):
    away = CudaModel(moved(copy.deepcopy(tiny(name))))
    for length in (9, 5):
        inputs = inputs_for(name, 2, padded=True, length=length)
        asked = policy_of_segments(name, policy)
        assert decoded(away, inputs, asked) == decoded(SplitModel(tiny(name)), inputs, asked)
    assert sum(memory.launched for memory in away.memories) > 0


@pytest.mark.parametrize("confidence", ["laplace", "conformal", "avcs"])
def test_a_posterior(confidence):
    options = {"confidence": confidence, "threshold": 0.3}
    both(with_posterior("llama"), inputs_for("llama", 2), policy_of(options), max_new_tokens=8)


def test_a_posterior_is_fitted(tmp_path):
    from offramp.calibration.posterior import PosteriorConfig, fit_posterior

    lm = with_exits("llama")
    documents = documents_of(lm, "llama", 16, 8)
    found = [
        fit_posterior(model, documents, tmp_path / name, PosteriorConfig(candidates=10, alpha=0.3), window=64)
        for name, model in (("here", lm), ("there", there(lm)))
    ]
    for one, other in zip(*(report.honesty for report in found), strict=True):
        assert other.nlpd == pytest.approx(one.nlpd, rel=1e-3)


@pytest.mark.parametrize("kind", RUNNING)
def test_rows_that_join_and_leave(kind):
    split = SplitModel(tiny("llama"))
    asked = requests(5, split.shape.vocabulary)
    found = [
        served(RunningBatch(model, RUNNING[kind], rows=3, longest=64, eos=(3,)), asked)
        for model in (split, SplitModel(moved(copy.deepcopy(split.model))))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"blocks": 1}),
        ("llama", {"trainable": "drafter", "layers": None}),
        ("llama", {"objective": "consistency"}),
        ("llama", {"trainable": "lora", "layer_dropout": 0.5}),
        ("t5", {"trainable": "all", "objective": "labels", "weights": "layer"}),
    ],
)
def test_training(name, options, tmp_path):
    pytest.importorskip("accelerate", reason="exits are trained with accelerate")
    if options.get("trainable") == "lora":
        pytest.importorskip("peft", reason="adapters are those of peft")
    lm = trained(name, still=True)
    ends = []
    for place, model in (("there", there(lm)), ("here", lm)):
        train(model, data(name), config(**{"steps": 4, **options}), tmp_path / place)
        ends.append(json.loads((tmp_path / place / "metrics.jsonl").read_text().splitlines()[-1]))
    assert ends[0]["loss"] == pytest.approx(ends[1]["loss"], rel=1e-4)


def test_a_classifier_learns(tmp_path):
    pytest.importorskip("accelerate", reason="classifiers are trained with accelerate")
    ends = []
    for place, model in (("there", moved(net())), ("here", net())):
        judged = rows(24, seed=1, prefix="v")
        train_exits(model, rows(), judged, ClassifierTrainConfig(epochs=1), tmp_path / place)
        ends.append(json.loads((tmp_path / place / "metrics.jsonl").read_text().splitlines()[-1]))
    assert ends[0]["loss"] == pytest.approx(ends[1]["loss"], rel=1e-4)


def test_what_mixes_devices_fails():
    here, away = torch.ones(3), torch.ones(3, device=NAME)
    assert (away + 1).sum().item() == 6
    for meet in (lambda: away + here, lambda: here @ away, lambda: torch.cat([away, here]), lambda: here.add_(away)):
        with pytest.raises(RuntimeError, match="elsewhere|devices"):
            meet()
