"""What is trained: lenses or classifiers of exits, LoRA adapters on the blocks, or every weight of the model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from offramp.core.exits import Exits, default_layers
from offramp.families.sizes import LINEAR
from offramp.hub.exit_files import save_exits
from offramp.hub.messages import quiet
from offramp.runs.digests import fingerprint
from offramp.runs.files import replace_folder
from offramp.training.config import TrainConfig
from offramp.training.passes import check_prompt_layer

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel


@dataclass(frozen=True)
class Trainable:
    """The exits and, by name, the parameters that are trained: lenses under "exits.", the model's under "model."."""

    exits: Exits
    parameters: dict[str, nn.Parameter]


def check_trainable(lm: LanguageModel, config: TrainConfig) -> None:
    """Refuse what a model, or the exits it has, cannot be trained for; it takes no time.

    Args:
        lm: The model.
        config: What is asked for.

    Raises:
        ValueError: It cannot be trained so.
    """
    split, exits = lm.split, lm.exits
    if split.family.listens:
        raise ValueError(f"{lm.name} listens and does not read; exits are trained on texts, by a model that reads them")
    if config.drafter and split.is_encoder_decoder:
        raise ValueError("there are no drafters for encoder-decoders; give trainable='exits' and blocks")
    if config.blocks and lm.model.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"blocks of the exits' own are trained on float32 or bfloat16, not {lm.model.dtype}; load it so"
        )
    if config.classifiers and exits is not None and config.layers not in (None, exits.layers):
        raise ValueError(
            f"layers are {config.layers}, but the attached exits are after {exits.layers}; a classifier is trained for "
            "each of these, leave layers out"
        )
    layers = () if config.drafter else config.layers or default_layers(split.num_layers)
    of_exits, of_drafter = (0, config.blocks) if config.drafter else (config.blocks, 0)
    Exits(
        split.num_layers, split.shape.width, layers, config.rank, blocks=of_exits, drafter=of_drafter,
        device=torch.device("meta"),
    )  # fmt: skip
    if config.hidden_loss and len(layers) != 1:
        raise ValueError(
            f"hidden_loss is for one exit (FREE's shallow-deep model), not for those after {layers}; give one layer"
        )
    check_prompt_layer(split, config.prompt_layer)
    if config.trainable == "lora":
        _peft()


@contextlib.contextmanager
def trainable(lm: LanguageModel, config: TrainConfig) -> Iterator[Trainable]:
    """Gradients for what is trained only, and dropout only where the backbone is; afterwards as before.

    LoRA adapters are inside the model meanwhile; in the end they are merged into its weights, or taken out again if
    training failed. First values depend on the seed only.

    Yields:
        What is trained.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        make = _with_drafter if config.drafter else _with_classifiers if config.classifiers else _fresh
        exits = make(lm, config)
        modes = [(module, module.training) for module in lm.model.modules()]
        wanted = [(parameter, parameter.requires_grad) for parameter in lm.model.parameters()]
        adapters = _lora(lm, config) if config.trainable == "lora" else None
    learned, attached = False, lm.split.exits
    try:
        if not config.classifiers:  # which look through what is attached; others are all that states are read through
            lm.split.attach(exits)
        lm.model.train(config.backbone)
        if adapters is None:  # else they alone learn, as they were made
            lm.model.requires_grad_(config.trainable == "all")
        named = {f"exits.{name}": p for name, p in exits.named_parameters() if p.requires_grad}
        named |= {f"model.{name}": p for name, p in lm.model.named_parameters() if p.requires_grad}
        yield Trainable(exits, named)
        learned = True
    finally:
        if not config.classifiers:
            lm.split.attach(attached)
        if adapters is not None:
            (adapters.merge_and_unload if learned else adapters.unload)()
        for module, mode in modes:
            module.training = mode
        for parameter, flag in wanted:
            parameter.grad = None
            parameter.requires_grad_(flag)


def _fresh(lm: LanguageModel, config: TrainConfig) -> Exits:
    exits = Exits.fresh(lm.split, config.layers, rank=0 if config.classifiers else config.rank, blocks=config.blocks)
    exits.model = lm.name
    return exits


def _with_drafter(lm: LanguageModel, config: TrainConfig) -> Exits:
    """The attached exits, or none, with a drafter, which is all there is to train."""
    exits = lm.exits
    if exits is None:
        exits = Exits(lm.num_layers, lm.split.shape.width, (), 0, drafter=config.blocks, device=lm.split.device)
        exits.model, exits.fingerprint = lm.name, fingerprint(lm.model)
    exits = exits.with_drafter(lm.split, config.blocks)
    for name, parameter in exits.named_parameters():
        parameter.requires_grad_(name.startswith("drafter."))
    return exits


def _with_classifiers(lm: LanguageModel, config: TrainConfig) -> Exits:
    """The attached exits, or such without lenses, with classifiers that are all there is to train."""
    exits = (lm.exits or _fresh(lm, config)).with_classifiers(lm.split.device)
    for name, parameter in exits.named_parameters():
        parameter.requires_grad_(name.startswith("classifiers."))
    return exits


def _peft() -> Any:
    """The library of LoRA, which an extra brings."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "trainable 'lora' needs peft, which is not installed; install it with: pip install 'offramp[lora]'"
        ) from error
    return peft


def _lora(lm: LanguageModel, config: TrainConfig) -> Any:
    """Adapters on every linear layer of the decoder's and the encoder's blocks; head, routers and experts stay."""
    peft, split = _peft(), lm.split
    parts = [*split.blocks[: split.num_layers], *([lm.model.get_encoder()] if split.is_encoder_decoder else [])]
    inside = {id(module): module for part in parts for module in part.modules() if isinstance(module, LINEAR)}
    names = [name for name, module in lm.model.named_modules() if id(module) in inside]
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        target_modules=names,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in inside.values()),  # its weight is transposed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks by a name that transformers 5.23 deprecates
        return peft.get_peft_model(lm.model, settings)


def save(lm: LanguageModel, exits: Exits, folder: Path, record: dict[str, Any], *, model: Path | None) -> None:
    """Write the exits and, if its weights changed, the model beside them; each folder appears complete.

    Args:
        lm: The model, adapters merged.
        exits: Its exits.
        folder: Where the exits go.
        record: How they were trained. For classifiers, what the exits already say of their lenses is kept beside it,
            under "lenses"; for a drafter, what they say at all, under "exits".
        model: Where the model goes; None: it did not change.
    """
    if model is not None:
        save_model(lm, model)
        exits.model, exits.fingerprint = str(model), fingerprint(lm.model)
    before = exits.settings.get("lenses", {} if "lenses" in exits.settings.get("model", ()) else exits.settings)
    kept = {"lenses": before} if exits.classifiers is not None and before else {}
    if record["config"]["trainable"] == "drafter":
        kept = {"exits": exits.settings} if exits.settings else {}
    save_exits(exits, folder, settings={**record, **kept})


def save_model(lm: LanguageModel, folder: Path) -> None:
    """Write model and tokenizer for `offramp.load`; the folder appears complete."""

    def write(temporary: Path) -> None:
        with quiet():
            lm.model.save_pretrained(temporary)
        if lm.tokenizer is not None:
            lm.tokenizer.save_pretrained(temporary)

    replace_folder(folder, write)
