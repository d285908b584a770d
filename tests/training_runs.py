"""Small training runs, in a module of its own so that other processes can start them: training_runs.py FOLDER JOBS."""

import contextlib
import copy
import sys
from pathlib import Path

import torch

from offramp import LanguageModel
from offramp.training.answers import AnswerConfig, answer_documents
from offramp.training.config import TrainConfig
from offramp.training.data import Data, Windows
from offramp.training.trainer import train
from tiny import VOCABULARY, tiny, tokenizer

BACKBONES = {
    "all": ("t5", {"trainable": "all", "objective": "labels", "weights": "layer", "weight_decay": 0.01}),
    "lora": ("llama", {"trainable": "lora", "layer_dropout": 0.5, "micro_batch": 3, "positions": 5}),
    "masters": ("llama", {"dtype": torch.bfloat16, "trainable": "all", "objective": "labels"}),
}
"""Model and options of runs that change the model."""
JOBS = {
    "exits": {"micro_batch": 1, "batch_size": 3, "steps": 8, "validate_every": 4},
    "all": {"trainable": "all", "weights": "layerskip", "steps": 6, "save_every": 2, "positions": 6},
    "classifiers": {"objective": "consistency", "micro_batch": 2, "batch_size": 5, "steps": 4},
    "mixed": {"dtype": torch.bfloat16, "trainable": "all", "rank": 2, "steps": 4, "learning_rate": 1e-4},
}  # fmt: skip
"""What several processes do."""
JOBS["again"] = JOBS["all"]


def model(name="llama", *, still=False):
    """The tiny model, a copy that may be trained; `still`: without dropout."""
    made, source = copy.deepcopy(tiny(name)), tiny(name)
    if still and name != "llama":
        config = copy.deepcopy(source.config)
        for part in (config, config.get_text_config(decoder=True)):
            part.dropout = part.dropout_rate = 0.0
        made = type(source)(config).eval()
        made.load_state_dict(source.state_dict())
    return LanguageModel(made, tokenizer(), name="tiny")


def windows(count, length=12, *, seed=0, sources=False, prompts=0):
    """Random tokens; with `sources` for an encoder-decoder; with up to so many that are not to be predicted."""
    generator = torch.Generator().manual_seed(seed)
    counted = torch.ones(count, length, dtype=torch.bool)
    counted[:, 0] = False
    ids = torch.randint(3, VOCABULARY, (count, length), generator=generator)
    if prompts:
        counted &= torch.arange(length) > torch.randint(prompts + 1, (count, 1), generator=generator)
    if not sources:
        return Windows(ids, counted)
    present = torch.arange(9) < torch.randint(3, 10, (count, 1), generator=generator)
    return Windows(ids, counted, torch.randint(3, VOCABULARY, (count, 9), generator=generator) * present, present)


def data(name="llama"):
    options = {"sources": name != "llama", "prompts": 0 if name == "llama" else 4}
    return Data(windows(24, **options), windows(8, seed=1, **options))


def config(**options):
    return TrainConfig(**{"layers": (1, 3), "steps": 80, "save_every": 3, "learning_rate": 1e-2, **options})


def run(folder, name="llama", progress=None, *, dtype=None, **options):
    """`dtype`: of the model; lenses are in float32 always."""
    torch.set_num_threads(1)
    lm = model(name)
    lm.model.to(dtype or lm.model.dtype)
    return train(lm, data(name), config(**options), Path(folder), progress)


def answers(folder):
    prompts, settings = ["the sky", "why", "is the sky blue ?"], AnswerConfig(5, batch_size=1)
    return answer_documents(model(), prompts, settings, Path(folder) / "answers.jsonl")


def interrupted(done, total, *_):
    if done == 5:
        raise KeyboardInterrupt


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, *jobs = sys.argv[1:]
    for job in jobs:
        if job == "answers":
            answers(Path(place) / job)
        else:
            name, stops, _ = job.partition(":")
            with contextlib.suppress(KeyboardInterrupt):
                run(Path(place) / name, progress=interrupted if stops else None, **JOBS[name])
