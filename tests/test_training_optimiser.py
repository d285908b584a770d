"""AdamW in one pass takes the steps of torch's plain one."""

import pytest
import torch
from safetensors.torch import load_file

import training_runs
from offramp.runs.folder import RunFolder, TrainState
from offramp.training.loop import adamw


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("grouped", [True, False])
def test_steps_of_the_plain_optimiser(dtype, close, grouped):
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(shape, generator=generator).to(dtype) for shape in ((40, 8), (8,))]
    made = []
    for kind in (dtype, torch.float64):
        weights = [torch.nn.Parameter(tensor.to(kind, copy=True)) for tensor in first]
        given = [{"params": [weights[0]]}, {"params": [weights[1]], "weight_decay": 0.3}] if grouped else iter(weights)
        if kind == dtype:
            optimiser = adamw(given, 0.01, 0.1)
            assert all(group["fused"] for group in optimiser.param_groups)
        else:
            optimiser = torch.optim.AdamW(given, 0.01, weight_decay=0.1, foreach=False, fused=False)
        for step in range(5):
            for place, weight in enumerate(weights):
                weight.grad = torch.sin(torch.arange(weight.numel()) + step + place).view_as(weight).to(kind)
            optimiser.step()
        made.append(weights)
    for found, expected in zip(*made, strict=True):
        torch.testing.assert_close(found.double(), expected, atol=close, rtol=close)
        assert (found - first[found.ndim == 1]).abs().max() > close  # it did move


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_below_the_spacing_of_weights_add_up(dtype):
    """Those of float32, rounded once in the end; on the 16-bit weights themselves they are lost."""
    start = torch.linspace(1, 2, 64).to(dtype)
    weight, plain, exact = (torch.nn.Parameter(start.to(kind, copy=True)) for kind in (dtype, dtype, torch.float32))
    made = adamw([weight], 1e-5, 0.1), torch.optim.AdamW([plain], 1e-5), adamw([exact], 1e-5, 0.1)
    for step in range(1000):
        for part, optimiser in zip((weight, plain, exact), made, strict=True):
            optimiser.zero_grad()
            assert part.grad is None
            part.grad = torch.sin(torch.arange(64) + step / 400).to(dtype).to(part.dtype)
            optimiser.step()
    assert torch.equal(weight, exact.to(dtype))
    assert not torch.equal(weight, start)
    assert not torch.equal(plain, weight)


def test_weights_in_sixteen_bits_learn_as_in_float32(tmp_path):
    options = {"trainable": "all", "objective": "labels", "steps": 60, "learning_rate": 1e-3}
    runs = [training_runs.run(tmp_path / str(kind), dtype=kind, **options) for kind in (torch.float32, torch.bfloat16)]
    gained = [before - after for before, after in zip(runs[0].loss_before, runs[0].loss_after, strict=True)]
    assert min(gained) > 0.04
    assert runs[1].loss_after == pytest.approx(runs[0].loss_after, abs=0.02)
    saved = load_file(tmp_path / "torch.bfloat16" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_restored_optimiser_goes_on_with_the_same_bits(tmp_path, layout):
    """Moments are read as they lie in memory: checkpoints hold them in another order than kernels of images have."""

    def new(seed):
        torch.manual_seed(seed)
        weight = torch.nn.Parameter(torch.randn(4, 3, 2, 5).contiguous(memory_format=layout))
        return weight, adamw([weight], 0.01)

    def steps(weight, optimiser, which):
        for step in which:
            weight.grad = (
                torch.sin(torch.arange(weight.numel()) + step).view(weight.shape).contiguous(memory_format=layout)
            )
            optimiser.step()

    weight, optimiser = new(0)
    steps(weight, optimiser, range(3))
    RunFolder(tmp_path).save({"weight": weight}, optimiser, TrainState(step=3))
    steps(weight, optimiser, range(3, 6))
    again, fresh = new(1)
    assert RunFolder(tmp_path).restore({"weight": again}, fresh) == TrainState(step=3)
    steps(again, fresh, range(3, 6))
    assert torch.equal(weight, again)
