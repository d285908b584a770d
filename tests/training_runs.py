"""A small training run, in a module of its own so that other processes can start it."""

from pathlib import Path

import torch

from offramp import LanguageModel
from offramp.training import Data, TrainConfig, train
from offramp.training.data import Windows
from tiny import VOCABULARY, tiny, tokenizer


def model():
    return LanguageModel(tiny("llama"), tokenizer(), name="tiny")


def windows(count, length=12, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    counted = torch.ones(count, length, dtype=torch.bool)
    counted[:, 0] = False
    return Windows(torch.randint(3, VOCABULARY, (count, length), generator=generator), counted)


def data():
    return Data(windows(24), windows(8, seed=1))


def config(**options):
    return TrainConfig(**{"layers": (1, 3), "steps": 80, "save_every": 3, "learning_rate": 1e-2, **options})


def run(folder, **options):
    torch.set_num_threads(1)
    return train(model(), data(), config(**options), Path(folder))
