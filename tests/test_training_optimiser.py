"""AdamW in one pass takes the steps of torch's plain one."""

import pytest
import torch

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
