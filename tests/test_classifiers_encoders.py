"""The contract of encoders that run in parts, against `transformers` on tiny random models."""

import copy

import pytest
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

from offramp import UnsupportedModelError
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.families.backbone import ENCODERS, HeadConfig, SplitEncoder
from tiny_encoders import CLASSES, EVERYTHING, LAYERS, MAKERS, TEXTS, build, encoder, inputs_for, tiny


@pytest.fixture(params=MAKERS)
def name(request):
    return request.param


def test_every_family_is_tested():
    assert {encoder(name).config.model_type for name in MAKERS} == set(ENCODERS)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_states_after_every_block_equal_hidden_states(name, padded):
    model, inputs = encoder(name), inputs_for(name, padded=padded)
    wanted = model(**inputs, output_hidden_states=True).hidden_states
    split = SplitEncoder(model)
    real = inputs["attention_mask"].bool() if name in TEXTS else slice(None)
    state = split.start(inputs)
    torch.testing.assert_close(state.hidden[real], wanted[0][real])
    for layer in range(1, LAYERS + 1):
        state = split.run(state, layer - 1, layer)
        hidden = state.hidden
        if layer == LAYERS and name == "modernbert":  # transformers reports the last state behind the final norm
            hidden = model.final_norm(hidden)
        torch.testing.assert_close(hidden[real], wanted[layer][real], atol=2e-5, rtol=1e-5)


def truncated(model, layers):
    """A copy that has only its first blocks."""
    model = copy.deepcopy(model)
    if model.config.model_type == "resnet":
        model.encoder.stages = model.encoder.stages[:layers]
    elif model.config.model_type == "distilbert":
        model.transformer.layer = model.transformer.layer[:layers]
    elif hasattr(model, "encoder"):
        model.encoder.layer = model.encoder.layer[:layers]
    else:
        model.layers = model.layers[:layers]
    return model


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
@pytest.mark.parametrize("pooling", ["mean", "first"])
@torch.no_grad()
def test_an_exit_sees_what_a_model_with_fewer_blocks_puts_out(name, pooling, layer):
    inputs = inputs_for(name)
    last = truncated(encoder(name), layer)(**inputs).last_hidden_state
    if last.ndim == 4:
        wanted = last.mean((2, 3))
    elif pooling == "first":
        wanted = last[:, 0]
    elif name in TEXTS:  # one row after another
        wanted = torch.stack(
            [row[keep].mean(0) for row, keep in zip(last, inputs["attention_mask"].bool(), strict=True)]
        )
    else:
        wanted = last.mean(1)
    exits = () if layer == LAYERS else (layer,)
    features, logits = EarlyExitClassifier.from_encoder(
        encoder(name), exits, CLASSES, head=HeadConfig(pooling=pooling)
    ).eval()(inputs)[0]
    torch.testing.assert_close(features, wanted, atol=2e-5, rtol=1e-5)
    assert logits.shape == (4, CLASSES)


@pytest.mark.parametrize("name", EVERYTHING)
@torch.no_grad()
def test_logits_are_the_last_linear_layer_of_the_features(name):
    classifier = build(name, hidden=7)
    for head, (features, logits) in zip(classifier.heads, classifier(inputs_for(name)), strict=True):
        assert features.shape == (4, head.width)
        torch.testing.assert_close(features @ head.linear.weight.T + head.linear.bias, logits)


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_joint_loss_reaches_every_weight(name):
    classifier = build(name).train()
    outputs = classifier(inputs_for(name))
    sum(torch.nn.functional.cross_entropy(z, torch.arange(4)) for _, z in outputs).backward()
    without = {n for n, p in classifier.named_parameters() if p.grad is None}
    assert without == set()


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("hidden", [None, 7])
@torch.no_grad()
def test_costs_are_those_that_torch_counts(name, hidden):
    classifier = build(name, attention="eager", hidden=hidden)
    inputs = inputs_for(name, batch=1, padded=False, length=11)
    backbone, counted = classifier.backbone, []
    with FlopCounterMode(display=False) as counter:
        state = backbone.start(inputs)
        for layer, head in zip(classifier.layers, classifier.heads, strict=True):
            state = backbone.run(state, state.depth, layer)
            head(state)
            counted.append(counter.get_total_flops())
    batch = {k: v.expand(3, *v.shape[1:]) for k, v in inputs.items()}
    assert classifier.costs(batch).tolist() == counted
    assert classifier.costs(batch).dtype == torch.float64


def test_costs_of_texts_depend_on_their_length_and_those_of_images_do_not_need_one():
    with pytest.raises(ValueError, match="depends on its size; give inputs"):
        tiny("bert").costs()
    assert tiny("vit").costs().equal(tiny("vit").costs(inputs_for("vit")))
    assert tiny("msdnet").costs().equal(tiny("msdnet").costs(inputs_for("msdnet")))


def test_counting_leaves_the_classifier_as_it_was():
    classifier = build("bert")
    classifier.heads.train()
    before = [(m.training, len(m._forward_hooks)) for m in classifier.modules()]
    classifier.costs(inputs_for("bert"))
    assert [(m.training, len(m._forward_hooks)) for m in classifier.modules()] == before


@torch.no_grad()
def test_an_encoder_inside_a_model_with_a_head_is_found():
    config = encoder("bert").config
    config.num_labels = 3
    model = hf.BertForSequenceClassification(config)
    inputs = inputs_for("bert")
    states = model.eval()(**inputs, output_hidden_states=True).hidden_states
    features = (
        EarlyExitClassifier.from_encoder(model, (2,), 3, head=HeadConfig(pooling="first")).eval()(inputs)[0].features
    )
    torch.testing.assert_close(features, states[2][:, 0])


@torch.no_grad()
def test_token_types_count_and_unknown_inputs_do_not():
    inputs = inputs_for("bert") | {"token_type_ids": torch.ones(4, 9, dtype=torch.long)}
    model = encoder("bert")
    wanted = model(**inputs).last_hidden_state[:, 0]
    got = EarlyExitClassifier.from_encoder(model, (), 2, head=HeadConfig(pooling="first")).eval()(inputs)[0].features
    torch.testing.assert_close(got, wanted)
    inputs = inputs_for("distilbert")
    with_more = inputs | {"token_type_ids": torch.ones(4, 9, dtype=torch.long), "special": None}
    assert tiny("distilbert")(inputs)[0].logits.equal(tiny("distilbert")(with_more)[0].logits)


@torch.no_grad()
def test_bfloat16_stays_bfloat16_inside_and_answers_in_float32():
    classifier = EarlyExitClassifier.from_encoder(encoder("bert").to(torch.bfloat16), (1,), 3).eval()
    features, logits = classifier(inputs_for("bert"))[0]
    assert features.dtype == logits.dtype == torch.bfloat16
    assert classifier.classify(inputs_for("bert"), thresholds=0.4).probabilities.dtype == torch.float32


def test_other_architectures_and_attention_that_cannot_be_split_are_refused():
    gpt2 = hf.GPT2Model(hf.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    with pytest.raises(UnsupportedModelError, match=r"gpt2.* supported are bert, roberta, distilbert"):
        EarlyExitClassifier.from_encoder(gpt2, (), 2)
    config = encoder("bert").config
    config.is_decoder = True
    with pytest.raises(UnsupportedModelError, match="is_decoder=False"):
        EarlyExitClassifier.from_encoder(hf.BertModel(config), (), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits": (0, 2)}, r"exits are \(0, 2\); .* 4 layers can have exits after layers 1\.\.3"),
        ({"exits": (2, 4)}, r"layer 4 is always an exit, leave it out"),
        ({"exits": (3, 1)}, "ascending"),
        ({"exits": (1, 1)}, "each once"),
        ({"exits": (1.5,)}, "ascending"),
        ({"num_classes": 1}, "there are 1 classes; a classifier needs at least 2"),
        ({"num_classes": 0}, "at least 2"),
        ({"num_classes": None}, "neither num_classes nor labels"),
        ({"labels": ["a", "b"]}, "2 labels for 3 classes"),
        ({"labels": ["a", "b", "a"]}, "labels repeat: a"),
    ],
)
def test_impossible_classifiers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EarlyExitClassifier.from_encoder(encoder("bert"), **{"exits": (1,), "num_classes": 3, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pooling": "max"}, "'mean', 'first'"), ({"hidden": 0}, "from 1"), ({"dropout": 1.0}, r"in \[0, 1\)")],
)
def test_impossible_heads_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HeadConfig(**options)


def test_inputs_without_the_main_one_are_refused():
    with pytest.raises(ValueError, match="inputs have pixel_values; this classifier needs input_ids"):
        tiny("bert")({"pixel_values": torch.zeros(1)})


@pytest.mark.parametrize("name", ["bert", "vit", "msdnet"])
@torch.no_grad()
def test_a_cut_network_does_not_pay_for_the_heads_before(name):
    classifier = build(name, hidden=7) if name != "msdnet" else tiny("msdnet")
    inputs = inputs_for(name, batch=1)
    alone = []
    for layer, head in zip(classifier.layers, classifier.heads, strict=True):
        with FlopCounterMode(display=False) as counter:
            head(classifier.backbone.run(classifier.backbone.start(inputs), 0, layer))
        alone.append(counter.get_total_flops())
    if name == "msdnet":  # fused attention of the others is counted otherwise
        assert classifier.costs(inputs, cut=True).tolist() == alone
    whole, cut = classifier.costs(inputs), classifier.costs(inputs, cut=True)
    assert cut[0] == whole[0]
    assert bool((cut[1:] < whole[1:]).all())
