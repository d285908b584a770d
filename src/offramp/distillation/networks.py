"""Students and teachers by a short description, rows prepared for them once, and what they make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.classifiers.batches import IMAGENET, Augmentation, ImagePreprocessing, ImageRows, Rows, TextRows, by_length
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.convolutional import SmallCNN, SmallCNNConfig
from offramp.classifiers.saving import CONFIG, load_encoder
from offramp.families.backbone import ENCODERS, Activations, Inputs, evaluating
from offramp.runs.bounded import read_object
from offramp.tasks.labelled import Labelled

MEMORY = 2**30
"""Bytes that prepared inputs of a split may take; larger splits are prepared batch by batch."""


@dataclass(frozen=True)
class Network:
    """What is built.

    Attributes:
        source: "small-cnn:8" (images of a few pixels; its width), "text:2x128" (layers x width, trained from nothing,
            with the words of the training split), an encoder by packaged name, folder or hub id, maybe with ":3" for
            its first three layers; or a folder with a classifier that was saved.
        exits: After which layers there are exits besides the last; None: after all.
        longest: Most tokens of a text; None: what the tokenizer says.
    """

    source: str
    exits: tuple[int, ...] | None = None
    longest: int | None = None


def build(
    network: Network, train: Labelled, seed: int, device: str | torch.device = "cpu"
) -> EarlyExitClassifier:  # fmt: skip
    """A classifier; new parts of it are drawn from the seed, as if nothing else had been drawn before.

    Args:
        network: What.
        train: The training split: classes, size of images, words.
        seed: Seed of first values, which are the same on all devices.
        device: Where to put it.

    Returns:
        The classifier in training mode.

    Raises:
        ValueError: The description cannot be read, or does not go with the data.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _built(network, train).to(device)


def _built(network: Network, train: Labelled) -> EarlyExitClassifier:
    kind, _, size = network.source.rpartition(":")
    if kind == "small-cnn":
        return _small_cnn(network, train, _numbers(network, size, 1)[0])
    if kind == "text":
        return _text(network, train, *_numbers(network, size, 2))
    if (folder := begun_from(network)) is not None:
        return _saved(folder, train)
    name, layers = (kind, int(size)) if kind and size.isdecimal() else (network.source, None)
    return _encoder(network, train, name, layers)


def _numbers(network: Network, text: str, count: int) -> list[int]:
    parts = text.split("x")
    if len(parts) != count or not all(part.isdecimal() for part in parts):
        raise ValueError(f"{network.source!r} cannot be read; write small-cnn:WIDTH or text:LAYERSxWIDTH")
    return [int(part) for part in parts]


def _exits(network: Network, layers: int) -> Sequence[int]:
    return range(1, layers) if network.exits is None else network.exits


def _small_cnn(network: Network, train: Labelled, width: int) -> EarlyExitClassifier:
    if isinstance(train.inputs, tuple):
        raise ValueError(f"{network.source} is for images, but {train.source or 'the data'} holds texts")
    side, _, channels = train.inputs[torch.arange(1).numpy()].shape[1:]
    backbone = SmallCNN(SmallCNNConfig(width, image_size=side, in_channels=channels))
    preprocessing = ImagePreprocessing.of(train).settings
    return EarlyExitClassifier(
        backbone, _exits(network, backbone.num_layers), labels=train.classes, preprocessing=preprocessing
    )


def _text(network: Network, train: Labelled, layers: int, width: int) -> EarlyExitClassifier:
    from transformers import BertConfig, BertModel

    tokenizer = word_tokenizer(train)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(width // 32, 1),
        intermediate_size=2 * width, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    return EarlyExitClassifier.from_encoder(model, _exits(network, layers), labels=train.classes, tokenizer=tokenizer)


def word_tokenizer(train: Labelled) -> Any:
    """A tokenizer of lower-cased words and marks, those of the training split."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    if not isinstance(train.inputs, tuple):
        raise ValueError(f"a text network needs texts, but {train.source or 'the data'} holds images")
    cut = pre_tokenizers.BertPreTokenizer()
    texts = [text for row in train.inputs for text in (row if isinstance(row, tuple) else (row,))]
    words = sorted({word for text in texts for word, _ in cut.pre_tokenize_str(text.lower())})
    vocabulary = {word: number for number, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = cut
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=128, model_input_names=names, **special
    )  # fmt: skip


def _encoder(network: Network, train: Labelled, name: str, layers: int | None) -> EarlyExitClassifier:
    model, tokenizer, preprocessing = load_encoder(name)
    blocks = model.get_submodule(ENCODERS[model.config.model_type].blocks)
    if layers is not None:
        if not 1 <= layers <= len(blocks) or model.config.model_type == "resnet":
            raise ValueError(f"{network.source} asks for {layers} layers of {len(blocks)}; a ResNet keeps all")
        del blocks[layers:]
        model.config.num_hidden_layers = layers
    made = EarlyExitClassifier.from_encoder(
        model, _exits(network, len(blocks)), labels=train.classes, tokenizer=tokenizer
    )  # fmt: skip
    made.preprocessing = preprocessing
    return made


def begun_from(network: Network) -> str | None:
    """The folder of the saved classifier that a network begins as; None: it begins as none."""
    folder = Path(network.source).expanduser()
    found = (folder / "model.safetensors").is_file() and is_classifier(network.source)
    return str(folder) if found else None


def is_classifier(folder: str) -> bool:
    """Whether a folder holds a classifier that was saved."""
    path = Path(folder).expanduser() / CONFIG
    values = read_object(path, "name another folder") if path.is_file() else {}
    return str(values.get("schema", "")).startswith("offramp/classifier/")


def _saved(folder: str, train: Labelled) -> EarlyExitClassifier:
    from offramp.classifiers.loading import load

    made = load(folder)
    require_same_classes(train.classes, made.labels)
    return made.train()


# ---------------------------------------------------------------- rows


def rows_for(
    classifier: EarlyExitClassifier, data: Labelled, *, longest: int | None = None, augment: Augmentation | None = None
) -> Rows:
    """Rows as this classifier takes them; prepared once where memory allows and nothing is augmented."""
    if isinstance(data.inputs, tuple):
        rows: Rows = TextRows(data, classifier.tokenizer, longest)
        return Prepared(rows) if len(data) * int(rows.lengths.max()) * 24 <= MEMORY else rows
    settings = classifier.preprocessing
    means = ImagePreprocessing.from_settings(settings) if "image_mean" in settings else IMAGENET
    images = ImageRows(data, means, augment)
    size = data.inputs[torch.arange(1).numpy()].size * 4
    return Prepared(images) if augment is None and len(data) * size <= MEMORY else images


class Prepared:
    """Rows whose inputs are all made beforehand.

    Args:
        rows: Without augmentation; texts padded to the right.
    """

    def __init__(self, rows: Rows) -> None:
        self.data, self.lengths, self.lost, self.settings = rows.data, rows.lengths, rows.lost, rows.settings
        self.table = rows.inputs(torch.arange(len(rows.data)))

    def inputs(self, rows: Tensor, generator: torch.Generator | None = None) -> Tensor | dict[str, Tensor]:
        """Inputs of the rows at these places; a batch of texts is as long as its longest."""
        if isinstance(self.table, Tensor):
            return self.table[rows]
        longest = int(self.lengths[rows].max())
        return {name: values[rows, :longest] for name, values in self.table.items()}


def require_same_classes(student: tuple[str, ...], teacher: tuple[str, ...]) -> None:
    """Raise a ValueError that names the first class in which teacher and student differ."""
    for number in range(max(len(student), len(teacher))):
        own, other = (names[number] if number < len(names) else None for names in (student, teacher))
        if own != other:
            raise ValueError(
                f"class {number} is {own!r} for the student and {other!r} for the teacher; both need the same classes "
                "in the same order"
            )


# ---------------------------------------------------------------- what a frozen network makes of rows

# Maps after a ResNet's first stage take 0.8 MB a row at 224 pixels: no machine keeps those of CelebA's training split.
CHUNK = 256
"""Rows at once where nothing is learnt."""


class States:
    """Rows of states, by place; the network must not change as long as they are used.

    They are kept if all of them take at most `MEMORY` bytes. Kept or not, they are the same up to rounding.

    Args:
        network: Whose blocks they pass, in evaluation mode and without gradients.
        rows: N, looked at without augmentation.
        depth: After how many blocks.
        pool: From activations that are no maps to vectors [B, D]; maps stay what they are.
        precision: "bf16": compute in bfloat16; None: as the network is.

    Attributes:
        shape: [N, ...].
        kept: All of them; None: there are too many.
    """

    def __init__(
        self,
        network: EarlyExitClassifier,
        rows: Rows,
        depth: int,
        pool: Callable[[Activations], Tensor],
        precision: str | None = None,
    ) -> None:
        self.network, self.rows, self.depth, self.pool, self.precision = network, rows, depth, pool, precision
        parts = by_length(rows, CHUNK)
        first = self._made(parts[0])
        self.shape = torch.Size((len(rows.data), *first.shape[1:]))
        self.kept: Tensor | None = None
        if self.shape.numel() * first.element_size() <= MEMORY:
            last = first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if last else torch.contiguous_format
            self.kept = torch.empty(self.shape, dtype=first.dtype, device=first.device, memory_format=layout)
            for places in parts:
                self.kept[places] = first if places is parts[0] else self._made(places)

    def __len__(self) -> int:
        """N."""
        return self.shape[0]

    def __getitem__(self, places: Tensor) -> Tensor:
        """States of the rows at these places, [B, ...], where the network is."""
        return self._made(places) if self.kept is None else self.kept[places]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.network.device

    @torch.no_grad()
    def _made(self, places: Tensor) -> Tensor:
        given: Inputs = self.rows.inputs(places)
        backbone = self.network.backbone
        named = {backbone.main_input: given} if isinstance(given, Tensor) else given
        with evaluating(self.network, self.precision):
            state = backbone.run(backbone.start(named), 0, self.depth)
            return (state.hidden if state.hidden.ndim == 4 else self.pool(state)).float()
