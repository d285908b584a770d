"""The number format of a run: what is fast, what it began with; frozen weights rounded once are those of autocast."""

import pytest
import torch

from offramp.families.backbone import autocast, rounded
from offramp.training import precision
from offramp.training.precision import fast_precision
from tiny import tiny
from training_runs import run, windows

CPU = torch.device("cpu")


@pytest.mark.parametrize(("seconds", "expected"), [((2.0, 1.0), "bf16"), ((1.2, 1.0), None), ((1.0, 3.0), None)])
def test_bfloat16_is_taken_where_its_products_are_faster(monkeypatch, seconds, expected):
    times = dict(zip((torch.float32, torch.bfloat16), seconds, strict=True))
    monkeypatch.setattr(precision, "product_seconds", times.__getitem__)
    choice = fast_precision(CPU, torch.float32)
    assert choice.value == expected
    assert f"{seconds[1] / seconds[0]:.2f} of the time" in choice.why


@pytest.mark.parametrize("able", [True, False])
def test_a_gpu_is_asked(monkeypatch, able):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    assert fast_precision(torch.device("cuda"), torch.float32).value == ("bf16" if able else None)
    assert fast_precision(torch.device("mps"), torch.float32).value is None


def test_small_steps_of_weights_that_all_learn_are_not_rounded_off(monkeypatch):
    monkeypatch.setattr(precision, "product_seconds", lambda dtype: 9.0 if dtype == torch.float32 else 1.0)
    assert fast_precision(CPU, torch.float32, trainable="lora").value == "bf16"
    assert fast_precision(CPU, torch.float32, trainable="all").value is None


@pytest.mark.parametrize(("times", "said"), [(0.5, ""), (1.2, ""), (25.0, "25.0 times as long as float32's here")])
def test_other_weights_are_computed_with_as_they_are_and_slow_formats_named(monkeypatch, times, said):
    monkeypatch.setattr(precision, "product_seconds", lambda dtype: times if dtype == torch.bfloat16 else 1.0)
    choice = fast_precision(CPU, torch.bfloat16)
    assert choice.value is None
    assert choice.why.startswith("the weights are in bfloat16")
    assert (said in choice.why) if said else choice.why == "the weights are in bfloat16"
    assert fast_precision(torch.device("cuda"), torch.bfloat16).why == "the weights are in bfloat16"


def test_slow_products_are_not_timed_for_long(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(precision.time, "perf_counter", lambda: float(next(clock)))  # each product takes a second
    assert precision.product_seconds(torch.float32) == 1.0
    assert next(clock) == 2


@pytest.mark.parametrize("value", [None, "bf16"])
def test_a_run_goes_on_as_it_began(tmp_path, monkeypatch, value):
    run(tmp_path, steps=1, precision=value)
    slow = torch.float32 if value is None else torch.bfloat16
    monkeypatch.setattr(precision, "product_seconds", lambda dtype: 9.0 if dtype == slow else 1.0)
    assert fast_precision(CPU, torch.float32).value != value
    assert fast_precision(CPU, torch.float32, tmp_path).value == value


@pytest.mark.parametrize("name", ["llama", "llama-tied", "t5", "gpt2"])
def test_frozen_weights_rounded_once_give_what_autocast_gives(name):
    model = tiny(name)
    part = windows(3, sources=name == "t5")
    inputs = {"input_ids": part.ids} if name != "t5" else {"input_ids": part.sources, "decoder_input_ids": part.ids}
    wanted = {n: (p, p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)}
    model.requires_grad_(requires_grad=False)
    try:
        with torch.no_grad(), autocast(CPU, "bf16"):
            expected = model(**inputs).logits
            with rounded(model, "bf16"):
                assert model.get_output_embeddings().weight.dtype == torch.bfloat16
                assert model.get_input_embeddings().weight.dtype == torch.float32
                assert torch.equal(model(**inputs).logits, expected)
            with rounded(model, None):
                assert model.get_output_embeddings().weight.dtype == torch.float32
        assert all(p is wanted[n][0] for n, p in model.named_parameters(remove_duplicate=False))
    finally:
        for parameter, learns in wanted.values():
            parameter.requires_grad_(learns)


def test_weights_that_learn_are_not_rounded():
    model = tiny("llama")
    with rounded(model, "bf16"):
        assert all(p.dtype == torch.float32 for p in model.parameters())
