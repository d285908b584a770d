"""Calibrations whose answers are drawn, not decoded: the true mean loss and the cost of every setting are known."""

import zlib

import numpy as np

from offramp import ExitPolicy, LanguageModel
from offramp.calibration import Grid
from offramp.evaluation import Record
from offramp.tasks import TASKS, Example
from tiny import LAYERS, tiny, tokenizer

TASK = TASKS["question-answering"]
BASE = ExitPolicy()
GRID = Grid(thresholds=(0.9, 0.5, 0.1))
JOINT = Grid(thresholds=(0.9, 0.5), min_layers=(1, 2, 3))


def model():
    return LanguageModel(tiny("llama"), tokenizer(), name="tiny")


def examples(count, per_group=1):
    return [Example(f"q{i}", "the sky", ("blue",), f"g{i // per_group}", "why ?") for i in range(count)]


def coins(rng, mean, count):
    return (rng.random(count) < mean).astype(float)


def betas(rng, mean, count):
    return rng.beta(0.5, 0.5 / mean - 0.5, count)


def ups_and_downs(rng, mean, count):
    return rng.choice([-0.5, 0.0, 0.5], count, p=[0.1, 0.8 - 2 * mean, 0.1 + 2 * mean])


class Script:
    """`together` stands for `decode_arms`; every setting's losses are drawn once per example.

    Args:
        truth: Of a policy, its mean loss.
        seed: Of the draws.
        draw: From what.
        cost: Of a policy, FLOPs over the full model's; None: cheaper for lower thresholds and earlier layers.
    """

    def __init__(self, truth, seed=0, draw=coins, cost=None):
        self.truth, self.seed, self.draw, self.cost = truth, seed, draw, cost or cheaper_when_bold
        self.calls = []  # (part, arm), as asked for

    def __call__(self, lm, task, examples, arm, policy, path, *, full=None, **options):
        self.calls.append((path.parent.name, arm))
        if policy is None:
            return [self._record(example, arm, 0.0, 1000) for example in examples]
        rng = np.random.default_rng([self.seed, zlib.crc32(arm.encode())])
        losses = self.draw(rng, self.truth(policy), 2000)
        flops = round(1000 * self.cost(policy))
        return [self._record(example, arm, losses[int(example.id[1:])], flops) for example in examples]

    def together(self, lm, task, examples, arms, paths, *, full=None, **options):
        return {arm: self(lm, task, examples, arm, policy, paths[arm], full=full) for arm, policy in arms.items()}

    def _record(self, example, arm, loss, flops):
        score = float((0.5 if self.draw is ups_and_downs else 1.0) - loss)
        return Record(
            example.id, example.group, arm, "blue" if loss <= 0 else "red", [1], [LAYERS],
            {"f1": score, "exact_match": score}, 1.0, loss == 0, flops, flops, 0.0, {"encoder": 0, "prefill": 0},
        )  # fmt: skip


def cheaper_when_bold(policy):
    return 0.3 + 0.5 * (policy.threshold or 1) + 0.05 * (policy.min_layer or 0)


def at_most(truth):
    """Mean losses by threshold."""
    return lambda policy: truth[policy.threshold]
