"""MSDNet: the published sizes, and what its paper says of its structure."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.convolutional import Layer, MSDNet, MSDNetConfig
from tiny_encoders import SMALL_MSDNET

# Operations in millions of every exit as the published code counts them, which are also those of the literature for
# ImageNet: multiply-adds of convolutions and linear layers, their bias, and one each per ReLU and pooled value.
PUBLISHED = {
    ("small", 32, 100): [6.86, 14.35, 26.13, 38.04],
    ("medium", 32, 100): [6.86, 14.35, 27.29, 46.56, 67.43, 89.09],
    ("large", 32, 100): [6.86, 14.35, 27.29, 48.45, 81.57, 112.64, 152.92, 192.69],
    ("small", 224, 1000): [339.90, 685.46, 1008.16, 1254.47, 1360.53],
    ("medium", 224, 1000): [514.66, 1171.18, 1844.52, 2501.40, 2742.06],
    ("large", 224, 1000): [615.69, 1436.39, 2283.21, 2967.42, 3253.79],
}


def elementwise(classifier, size):
    """Biases, ReLUs and poolings up to each exit."""
    counted, exits = 0, []

    def count(module, inputs, output):
        nonlocal counted
        if isinstance(module, nn.Linear):
            counted += module.out_features
            exits.append(counted)
        else:
            counted += output.numel() * getattr(module, "kernel_size", 1) ** 2

    for module in classifier.modules():
        if isinstance(module, nn.ReLU | nn.AvgPool2d | nn.MaxPool2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        classifier(torch.zeros(1, 3, size, size, device="meta"))
    return torch.tensor(exits)


@pytest.mark.parametrize(("size", "image_size", "classes"), PUBLISHED)
def test_every_exit_costs_what_is_published(size, image_size, classes):
    with torch.device("meta"):
        classifier = EarlyExitClassifier.msdnet(size, classes, image_size=image_size).eval()
    operations = classifier.costs() / 2 + elementwise(classifier, image_size)
    wanted = torch.tensor(PUBLISHED[size, image_size, classes], dtype=torch.float64)
    torch.testing.assert_close(operations / 1e6, wanted, atol=0.006, rtol=0)


def test_features_are_those_of_the_paper():
    with torch.device("meta"):
        assert [h.width for h in EarlyExitClassifier.msdnet("small", 10).heads] == [128] * 4
        large = EarlyExitClassifier.msdnet("small", 10, image_size=224)
    assert large.heads[0].width == (32 + 4 * 16) * 4  # the first channels and four times growth, at the coarsest scale


@torch.no_grad()
def test_layers_are_dense_and_scales_are_dropped_one_by_one():
    backbone = MSDNet(replace(SMALL_MSDNET, blocks=4)).eval()  # 1 + 2 + 3 + 4 layers, one scale dropped every 4
    state = backbone.start({"pixel_values": torch.randn(2, 1, 32, 32)})
    sides = []
    for block in range(4):
        state = backbone.run(state, block, block + 1)
        sides.append([m.shape[-1] for m in state.maps])
    assert sides == [[32, 16, 8], [32, 16, 8], [16, 8], [8]]
    layer = Layer(SMALL_MSDNET, 4, 0, drops=False).eval()
    maps = [torch.randn(2, 4 * g, s, s) for g, s in ((1, 32), (2, 16), (4, 8))]
    for before, after, new in zip(maps, layer(maps), (2, 4, 8), strict=True):
        assert after[:, : before.shape[1]].equal(before)  # what came stays
        assert after.shape[1] == before.shape[1] + new
    finer = layer([maps[0] + 1, *maps[1:]])
    assert finer[2].equal(layer(maps)[2])  # a layer looks one scale up
    assert not finer[1].equal(layer(maps)[1])


@torch.no_grad()
def test_small_images_are_padded_with_their_edge():
    backbone = MSDNet(SMALL_MSDNET)
    image = torch.rand(1, 1, 28, 28)
    (padded,) = backbone.start({"pixel_values": image}).maps
    assert padded.shape == (1, 1, 32, 32)
    assert padded[..., 2:30, 2:30].equal(image)
    assert padded[0, 0, 0, 0] == image[0, 0, 0, 0]
    assert padded[0, 0, 31, 10] == image[0, 0, 27, 8]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_few_steps_of_training_fit_a_few_images(channels):
    torch.manual_seed(0)
    config = replace(SMALL_MSDNET, in_channels=channels)
    classifier = EarlyExitClassifier(MSDNet(config), (1, 2), 2)
    x, y = torch.randn(8, channels, 28, 28), torch.arange(8) % 2
    optimiser = torch.optim.Adam(classifier.parameters(), 0.02)
    for _ in range(12):
        optimiser.zero_grad()
        losses = [nn.functional.cross_entropy(z, y) for _, z in classifier(x)]
        sum(losses).backward()
        optimiser.step()
    assert max(loss.item() for loss in losses) < 0.2


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 32, 32), r"rows x 1 x H x W are needed, H and W up to 32"),
        ((2, 1, 33, 32), "up to 32"),
        ((2, 28, 28), r"\[2, 28, 28\]"),
    ],
)
def test_other_images_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        MSDNet(SMALL_MSDNET).start({"pixel_values": torch.zeros(shape)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0}, "counts from 1"),
        ({"growth": 3}, r"growth 3 times scale factor 1 is odd"),
        ({"bottlenecks": (1, 2)}, "one number each per scale"),
        ({"reduction": 0.0}, r"in \(0, 1\]"),
        ({"in_channels": 2}, "1 .grey. and 3"),
        ({"image_size": 12}, "too small"),
    ],
)
def test_impossible_networks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MSDNetConfig(**{"scales": (1, 1, 4) if "growth" in options else (1, 2, 4), **options})


def test_other_published_sizes_are_refused():
    with pytest.raises(ValueError, match="small, medium, large, for images of 32 or 224"):
        EarlyExitClassifier.msdnet("tiny", 10)
    with pytest.raises(ValueError, match="images of 64"):
        EarlyExitClassifier.msdnet("small", 10, image_size=64)
