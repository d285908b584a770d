"""A small evaluation, in a module of its own so that other processes can start it: evaluation_runs.py FOLDER."""

import sys
from pathlib import Path

import torch

from offramp import ExitPolicy, LanguageModel
from offramp.evaluation import evaluate
from offramp.evaluation.perplexity import PassageArm
from offramp.evaluation.records import decode_arms, take_turns
from offramp.tasks import TASKS, Example
from tiny import tiny, tokenizer

TASK = TASKS["question-answering"]
POLICIES = {"softmax": ExitPolicy(threshold=0.2, min_layer=1)}
SHORT = 6


def model(name="llama"):
    return LanguageModel(tiny(name), tokenizer(), name="tiny")


def examples(count=5):
    """Two to a group; the references are made of words that the tiny models tend to say."""
    return [
        Example(f"q{i}", f"w{20 + i} the sky is w{30 + i}", (f"w{i + 40} w{i + 41}", "the sky"), f"g{i // 2}", "why ?")
        for i in range(count)
    ]


def run(folder, count=5, **options):
    torch.set_num_threads(1)
    options = {"static_layers": (2,), "max_new_tokens": SHORT, "resamples": 100, **options}
    return evaluate(model(), TASK, examples(count), POLICIES, Path(folder), **options)


def decode_records(lm, task, asked, arm, policy, path, **options):
    """The records of a single arm."""
    return decode_arms(lm, task, asked, {arm: policy}, {arm: path}, **options)[arm]


def perplexity_records(lm, passages, arm, policy, path, *, batch_size=1, **options):
    """Likewise, of passages."""
    return take_turns([PassageArm(lm, arm, policy)], {arm: path}, passages, batch_size, **options)[arm]


if __name__ == "__main__":
    run(sys.argv[1])
