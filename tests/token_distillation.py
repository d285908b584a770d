"""Small runs that distil language models."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import torch

from offramp import LanguageModel
from offramp.distillation.instance_weights import InstanceWeights
from offramp.distillation.language_models import TokenDistillation
from offramp.distillation.readout import TokenReadoutConfig
from offramp.distillation.token_weights import TokenWeights
from offramp.runs.folder import RunFolder
from offramp.training.config import TrainConfig
from offramp.training.data import Data
from tiny import tiny, tokenizer
from training_runs import windows

GROUPS = ("majority", "minority")
ONE = SimpleNamespace(workers=SimpleNamespace(process_index=0, num_processes=1), summed=lambda values: values)
"""A loop of one process."""


def texts(count=12, *, seed=0):
    """Random windows with prompts of different lengths, in two groups."""
    made = windows(count, prompts=5, seed=seed)
    return replace(made, attributes=torch.arange(count) % 2)


def data():
    return Data(texts(), texts(6, seed=1), {"kind": "random"})


def teacher():
    """Another tiny model with the same tokenizer."""
    return LanguageModel(copy.deepcopy(tiny("qwen2")), tokenizer(), name="teacher")


def config(weights=None, fraction=0.7, **options):
    training = {"trainable": "all", "steps": 8, "learning_rate": 1e-3, "save_every": 3, "temperature": 2.0, **options}
    return TokenDistillation(TrainConfig(**training), fraction, weights)


def token_weights(kind="head", rule=None, readout=None, **options):
    rule = InstanceWeights(**{"alpha": 1.0, "beta": 2.0, "n_mc": 7, "weight_on": "both", **(rule or {})})
    settings = {"layer": 2, "kind": kind, "batch_size": 16, "rank": 4, **(readout or {})}
    return TokenWeights(rule, TokenReadoutConfig(**settings), **{"every": 2, **options})


def rows(folder):
    return [{**row, "tokens_per_second": 0} for row in RunFolder(folder).rows()]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
