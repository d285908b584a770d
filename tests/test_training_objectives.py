"""Losses against their formulas, and chunks against everything at once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offramp.core.exits import Exits
from offramp.families import SplitModel
from offramp.training.loss_sums import CHUNK, chunk_rows, loss_sums
from offramp.training.objectives import OBJECTIVES, Teacher
from offramp.training.schedule import WEIGHTS
from tiny import VOCABULARY, tiny


def naive(name, logits, teacher, labels, temperature):
    """One position at a time, with probabilities instead of their logarithms."""
    losses = []
    for own, other, label in zip(logits.double(), teacher.double(), labels.tolist(), strict=True):
        p, q = torch.softmax(other / temperature, 0), torch.softmax(own / temperature, 0)
        losses.append({
            "forward-kl": temperature**2 * (p * (p / q).log()).sum(),
            "reverse-kl": temperature**2 * (q * (q / p).log()).sum(),
            "labels": -torch.softmax(own, 0)[label].log(),
            "teacher-argmax": -torch.softmax(own, 0)[int(other.argmax())].log(),
        }[name])  # fmt: skip
    return torch.stack(losses)


def draw(count, *, exits=2):
    generator = torch.Generator().manual_seed(3)
    states = [torch.randn(count, 32, generator=generator) for _ in range(exits + 1)]
    return states, torch.randint(VOCABULARY, (count,), generator=generator)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_losses_are_their_formulas(name, temperature):
    generator = torch.Generator().manual_seed(1)
    logits, teacher = 3 * torch.randn(2, 11, VOCABULARY, generator=generator)
    labels = torch.randint(VOCABULARY, (11,), generator=generator)
    found = OBJECTIVES[name](logits, Teacher(teacher, temperature), labels)
    torch.testing.assert_close(found.double(), naive(name, logits, teacher, labels, temperature), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["forward-kl", "reverse-kl"])
def test_a_divergence_from_itself_is_nothing(name):
    logits = torch.randn(4, VOCABULARY)
    assert OBJECTIVES[name](logits, Teacher(logits), torch.zeros(4)).abs().max() < 1e-6


@pytest.mark.parametrize("layers", [(1,), (1, 2, 3), (4, 20)])
def test_weights_sum_to_one(layers):
    for scheme in WEIGHTS.values():
        assert sum(scheme(layers)) == pytest.approx(1)
        assert min(scheme(layers)) >= 0
    assert WEIGHTS["last"](layers)[-1] == 1
    assert WEIGHTS["layer"](layers)[-1] / WEIGHTS["layer"](layers)[0] == pytest.approx(layers[-1] / layers[0])


@pytest.mark.parametrize("depth", [2, 4, 12, 30])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_layerskip_weights_by_hand(depth, every):
    """LayerSkip, section 4.1.2, layers l counted from 0: e(l) = s Σ_{i<=l} i, e(L-1) = L - 1 + s Σ_{i<=L-2} i.

    Only the readouts that are trained are in the sum, as with its rotation; s is 0.2.
    """
    layers = [*range(1, depth, every), depth]
    scores = [0.2 * sum(range(layer - 1 + 1)) for layer in layers[:-1]]
    scores.append(depth - 1 + 0.2 * sum(range(depth - 2 + 1)))
    assert WEIGHTS["layerskip"](layers) == pytest.approx([score / sum(scores) for score in scores])
    assert WEIGHTS["layerskip"](layers)[-1] == max(WEIGHTS["layerskip"](layers))


def test_weights_proportional_to_the_layer():
    """CALM, section 3.2: i / Σ_j j over the layers that are trained."""
    assert WEIGHTS["layer"](range(1, 5)) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert WEIGHTS["layer"]((3, 5, 12)) == pytest.approx([0.15, 0.25, 0.6])
    assert WEIGHTS["uniform"]((3, 5, 12)) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_chunks_give_the_gradient_of_the_whole(name, rows):
    split = SplitModel(tiny("llama"))
    states, labels = draw(13)
    weights = [0.25, 0.75]
    exits, reference = (Exits.fresh(split, (1, 3)) for _ in range(2))
    result = loss_sums(
        exits, split.readout, states, labels, OBJECTIVES[name], rows=rows, weights=weights,
    )  # fmt: skip
    teacher = split.readout(states[-1]).detach()
    whole = [split.readout(reference.adapt(layer, states[i])) for i, layer in enumerate(reference.layers)]
    means = [naive(name, logits, teacher, labels, 1.0).mean() for logits in whole]
    gradients = torch.autograd.grad(sum(w * m for w, m in zip(weights, means, strict=True)), reference.parameters())
    for parameter, expected in zip(exits.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    assert result.loss == pytest.approx([float(m.detach()) for m in means], rel=1e-4)
    agreed = [float((logits.argmax(-1) == teacher.argmax(-1)).float().mean()) for logits in whole]
    assert result.agreement == pytest.approx(agreed)
    assert result.last_loss == pytest.approx(float(naive("labels", teacher, teacher, labels, 1.0).mean()), rel=1e-4)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returns, gradients included."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and func is not torch.ops.aten.t.default:
                self.elements = max(self.elements, leaf.numel())
        return out


def test_no_tensor_is_larger_than_a_chunk():
    split = SplitModel(tiny("llama"))
    vocabulary = 40_000
    head = torch.randn(vocabulary, 32)
    states, labels = draw(600)
    exits = Exits.fresh(split, (1, 3))
    rows = chunk_rows(vocabulary)
    assert rows * vocabulary <= CHUNK < 2 * 600 * vocabulary  # the whole would not fit
    with Largest() as largest:
        loss_sums(
            exits, lambda x: x @ head.T, states, labels, OBJECTIVES["forward-kl"], rows=rows, weights=[0.5, 0.5],
        )  # fmt: skip
    assert rows * vocabulary <= largest.elements <= CHUNK
    assert chunk_rows(10 * CHUNK) == 1
