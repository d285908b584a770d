"""Tiny random encoders of every supported family, and classifiers made of them."""

from functools import cache

import torch
import transformers as hf

from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.convolutional import MSDNet, MSDNetConfig
from offramp.families.backbone import HeadConfig

VOCABULARY = 97
LAYERS = 4
CLASSES = 5
_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 40, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 24], "depths": [1, 2, 1, 2]}


def _distilbert():
    sizes = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": LAYERS, "n_heads": 4}
    return hf.DistilBertModel(hf.DistilBertConfig(**sizes, max_position_embeddings=40, initializer_range=0.3))


def _modernbert():
    special = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    windows = {"local_attention": 4, "global_attn_every_n_layers": 2}  # every second layer sees two tokens to each side
    return hf.ModernBertModel(hf.ModernBertConfig(**_TEXT, **special, **windows))


def _vit():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    return hf.ViTModel(hf.ViTConfig(**sizes, image_size=16, patch_size=4, initializer_range=0.3))


MAKERS = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**_TEXT)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**_TEXT, type_vocab_size=1)),
    "distilbert": _distilbert,
    "modernbert": _modernbert,
    "vit": _vit,
    "resnet basic": lambda: hf.ResNetModel(hf.ResNetConfig(**_RESNET, layer_type="basic")),
    "resnet bottleneck": lambda: hf.ResNetModel(hf.ResNetConfig(**_RESNET, layer_type="bottleneck")),
}
TEXTS = ("bert", "roberta", "distilbert", "modernbert")
EVERYTHING = (*MAKERS, "msdnet")
SMALL_MSDNET = MSDNetConfig(blocks=3, channels=4, growth=2, head_channels=6, in_channels=1)


def encoder(name, attention="sdpa"):
    """A new model, the same each time, in evaluation mode; batch norms with statistics that do something."""
    torch.manual_seed(sum(map(ord, name)))
    model = MAKERS[name]().eval()
    if not name.startswith("resnet"):
        model.set_attn_implementation(attention)
    _unsettle(model)
    return model


def build(name, exits=None, attention="sdpa", **head):
    """A new classifier, the same each time, in evaluation mode."""
    model = None if name == "msdnet" else encoder(name, attention)
    torch.manual_seed(1)
    if model is None:
        classifier = EarlyExitClassifier(MSDNet(SMALL_MSDNET), exits or (1, 2), CLASSES)
        _unsettle(classifier)
    else:
        classifier = EarlyExitClassifier.from_encoder(model, exits or (1, 3), CLASSES, head=HeadConfig(**head))
    for exit_head in classifier.heads:
        torch.nn.init.normal_(exit_head.linear.weight, std=0.5)
    return classifier.eval()


@cache
def tiny(name):
    """A classifier that tests share; do not change it."""
    return build(name)


def _unsettle(model):
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(part.running_var, 0.5, 1.5)


def inputs_for(name, batch=4, *, padded=True, length=9, seed=0):
    """A batch; `padded` pads all rows but the first, at the end."""
    generator = torch.Generator().manual_seed(seed)
    if name == "msdnet":
        return {"pixel_values": torch.randn(batch, 1, 28, 28, generator=generator)}
    if name not in TEXTS:
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, batch):
            mask[row, length - (row - 1) % (length - 2) - 1 :] = 0
    # RoBERTa counts positions by the padding token
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}
