"""The small convolutional network: shapes, leaving early, files, what it refuses."""

import pytest
import torch

from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.convolutional import SmallCNN, SmallCNNConfig
from offramp.classifiers.loading import load


def built(**options):
    torch.manual_seed(0)
    return EarlyExitClassifier(SmallCNN(SmallCNNConfig(**options)), [1, 2], 3).eval()


def test_features_are_averages_over_fields():
    classifier, images = built(width=4, image_size=8), torch.randn(5, 3, 8, 8)
    outputs = classifier(images)
    assert [list(output.features.shape) for output in outputs] == [[5, 16], [5, 32], [5, 64]]
    x = images
    for block, output in zip(classifier.backbone.blocks, outputs, strict=True):
        x = block(x)
        half = x.shape[2] // 2
        fields = [x[:, :, i : i + half, j : j + half].mean((2, 3)) for i in (0, half) for j in (0, half)]
        torch.testing.assert_close(output.features, torch.stack(fields, 2).flatten(1))


def test_it_leaves_early_and_is_saved(tmp_path):
    classifier, images = built(width=4, image_size=14), torch.randn(6, 3, 14, 14)
    assert classifier.classify(images, thresholds=0.0).exits.tolist() == [0] * 6
    costs = classifier.costs()
    assert (costs.diff() > 0).all()
    assert costs[0] == 2 * (4 * 27 * 14 * 14 + 16 * 3)  # one convolution and one linear layer
    classifier.save(tmp_path / "model")
    again = load(tmp_path / "model")
    for one, other in zip(classifier(images), again(images), strict=True):
        assert torch.equal(one.logits, other.logits)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="width is 0; it counts from 1"):
        SmallCNNConfig(width=0)
    with pytest.raises(ValueError, match="fewer than 2 places are left"):
        SmallCNNConfig(image_size=4, blocks=3)
    with pytest.raises(ValueError, match="rows x 3 x 14 x 14 are needed"):
        built()(torch.zeros(2, 1, 14, 14))
