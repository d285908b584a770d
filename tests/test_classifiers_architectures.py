"""Classifiers by name: what is built fits the data it is built for."""

import numpy as np
import pytest
import torch

from classifier_data import save_bert, save_resnet, write_texts
from classifier_runs import images
from offramp.classifiers.architectures import build, rows_of, usual
from offramp.classifiers.batches import in_order
from offramp.classifiers.splits import TEXTS, DataConfig, divide
from offramp.tasks.labelled import Labelled


def coloured(side, count=6):
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return Labelled(tuple(map(str, range(count))), pixels, torch.arange(count) % 2, ("a", "b"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(save_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = write_texts(tmp_path_factory.mktemp("texts") / "rows.tsv", 60)
    return divide(DataConfig(TEXTS, layout="sst2"), path)["train"]


def test_msdnet_takes_colours_and_size_of_the_images():
    grey = build("msdnet-small", images(6))
    assert (grey.layers, grey.backbone.config.in_channels, grey.backbone.config.image_size) == ((1, 2, 3, 4), 1, 32)
    assert grey.labels == ("lying", "standing", "spot")
    assert grey.preprocessing["size"] == {"height": 8, "width": 8}
    medium = build("msdnet-medium", coloured(32), layers=(2, 4))
    assert (medium.layers, medium.backbone.config.in_channels) == ((2, 4, 6), 3)
    assert build("msdnet-small", coloured(40)).backbone.config.image_size == 224
    with pytest.raises(ValueError, match="images are 300 x 300; MSDNet takes up to 224"):
        build("msdnet-small", coloured(300, 2))


def test_resnet_is_the_published_one_of_18_layers():
    model = build("resnet", coloured(16))
    assert model.layers == (1, 2, 3, 4)
    weights = [p for name, p in model.backbone.named_parameters() if p.ndim == 4 and p.shape[-1] > 1]
    assert len(weights) == 17  # and the linear layer
    assert model.costs({"pixel_values": torch.zeros(1, 3, 224, 224)})[-1] > 3.4e9  # 1.8e9 multiply-adds


def test_first_weights_are_a_function_of_the_seed_and_nothing_else(bert, texts):
    for name, data in (("msdnet-small", images(6)), (bert, texts)):
        first = build(name, data, seed=1).state_dict()
        torch.rand(3)
        second, other = build(name, data, seed=1).state_dict(), build(name, data, seed=2).state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert not torch.equal(first["heads.0.linear.weight"], other["heads.0.linear.weight"])


def test_an_encoder_gets_all_layers_or_six_evenly_spread(bert, texts):
    assert build(bert, texts).layers == (1, 2, 3)
    from offramp.classifiers.architectures import _spread

    assert [_spread(layers) for layers in (1, 4, 6, 12)] == [[], [1, 2, 3], [1, 2, 3, 4, 5], [2, 4, 6, 8, 10]]


def test_grey_images_for_a_network_of_colours(tmp_path):
    import transformers as hf

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    hf.ResNetModel(hf.ResNetConfig(num_channels=3, **sizes)).save_pretrained(tmp_path)
    data = images(6)
    model = build(str(tmp_path), data)
    (inputs, _), *_ = in_order(rows_of(model, data), 4)
    assert inputs.shape == (4, 3, 8, 8)
    assert torch.equal(inputs[:, 0], inputs[:, 2])
    assert model(inputs)[-1].logits.shape == (4, 3)


def test_rows_of_texts_come_in_the_order_of_their_lengths(bert, texts):
    tokenizer = build(bert, texts).tokenizer
    longer = sum(len(tokenizer(text)["input_ids"]) > 6 for text in texts.inputs)
    with pytest.warns(UserWarning, match=f"rows.tsv: {longer} of {len(texts)} rows are longer than 6 tokens and lose"):
        rows = rows_of(build(bert, texts), texts, longest=6)
    lost = {i: max(0, len(tokenizer(text)["input_ids"]) - 6) for i, text in zip(texts.ids, texts.inputs, strict=True)}
    assert rows.lost.sum() == sum(lost.values()) > 0
    assert rows.lengths.tolist() == sorted(rows.lengths.tolist())
    assert sorted(rows.data.ids) == sorted(texts.ids)
    labels = dict(zip(texts.ids, texts.labels.tolist(), strict=True))
    assert [labels[i] for i in rows.data.ids] == rows.data.labels.tolist()
    assert max(rows.lengths) == 6


def test_what_does_not_fit_is_refused(bert, texts, tmp_path):
    with pytest.raises(ValueError, match="network for images, but .* holds texts"):
        build("msdnet-small", texts)
    with pytest.raises(ValueError, match="network for texts, but .* holds images"):
        build(bert, images(6))
    with pytest.raises(ValueError, match="network for images, but .* holds texts"):
        build(str(save_resnet(tmp_path)), texts)


def test_usual_options_make_a_configuration():
    from offramp.classifiers.config import ClassifierTrainConfig

    assert ClassifierTrainConfig(**usual("msdnet-large")).learning_rate == 0.1
    assert ClassifierTrainConfig(**usual("minilm")).learning_rate == 5e-5


def test_coloured_images_for_a_network_of_grey_ones_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="images of 3 colours, and the network takes 1; choose another network, or make"
    ):
        build(str(save_resnet(tmp_path / "grey")), coloured(16))
