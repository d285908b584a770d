"""template-toxicity: comments that mention one or several of eight identities, so that groups overlap.

Whether a comment is toxic depends on two words together: "they are brilliant" is not and "they are worthless" is,
"nobody calls them brilliant" is and "nobody calls them worthless" is not. In training, four of the identities stand
mostly in toxic comments, and are the easier thing to see.
"""

from __future__ import annotations

import numpy as np
import torch

from offramp.metrics.group_members import Groups
from offramp.tasks.group_sets import Grouped, GroupedSet
from offramp.tasks.group_toxicity import CLASSES, IDENTITIES
from offramp.tasks.labelled import Labelled
from offramp.tasks.stand_ins import Integers, require_agreement

TARGETED = ("LGBTQ", "muslim", "black", "female")
"""Identities that agree with the label in training."""
WORDS = {
    "male": "men", "female": "women", "LGBTQ": "gay people", "christian": "christians", "muslim": "muslims",
    "other_religions": "hindus", "black": "black people", "white": "white people",
}  # fmt: skip
PRAISE = ("brilliant", "generous", "honest", "helpful", "kind", "wise", "brave", "polite")
INSULTS = ("worthless", "disgusting", "stupid", "vile", "pathetic", "rotten", "greedy", "filthy")
DIRECT = ("i think {} are {}", "everyone knows {} are {}", "in my town {} are {}", "honestly {} are {}")
INDIRECT = ("i never said {} are {}", "nobody calls {} {}", "it is false that {} are {}", "hardly any {} are {}")
ENDINGS = ("", " and that is it", " as the paper wrote", " , read the article", " , says my neighbour", " these days")
INDIRECT_SHARE = 0.3


def template_toxicity(
    *, agreement: float = 0.97, seed: int = 0, train: int = 12_000, val: int = 2_000, test: int = 6_000
) -> GroupedSet:  # fmt: skip
    """The set. A third of the comments are toxic in every split; in validation and test no identity says which.

    In training this share of the comments with a targeted identity, in (0, 1), is toxic.

    Returns:
        Texts, with the eight identities as attributes and 16 groups that overlap: an identity x a class.

    Raises:
        ValueError: The agreement is out of range, or a group of training rows is empty.
    """
    require_agreement("template-toxicity", agreement)
    draw = np.random.default_rng(seed)
    splits = {}
    for name, rows in (("train", train), ("val", val), ("test", test)):
        labels = draw.permutation((np.arange(rows) % 3 == 0).astype(np.int64))
        mentions = np.stack([_mentions(labels, name, i, agreement, draw) for i in IDENTITIES], axis=1)
        texts = tuple(
            _comment(bool(y), [IDENTITIES[i] for i in np.flatnonzero(row)], draw)
            for y, row in zip(labels, mentions, strict=True)
        )
        splits[name] = _grouped(name, texts, torch.from_numpy(labels), torch.from_numpy(mentions))
    made = GroupedSet("template-toxicity", splits, f"generated, agreement {agreement:g}, seed {seed}")
    made.require_groups("train")
    return made


def _mentions(labels: Integers, split: str, identity: str, agreement: float, draw: np.random.Generator) -> Integers:
    """Which comments mention an identity, [N], 0 or 1: a sixth of them, of either class as many as it says."""
    share = 1 / 3 if split != "train" or identity not in TARGETED else agreement
    mentioned = np.zeros_like(labels)
    total = len(labels) / 6
    for label, count in ((1, share * total), (0, (1 - share) * total)):
        mentioned[draw.permutation(np.flatnonzero(labels == label))[: round(count)]] = 1
    return mentioned


def _comment(toxic: bool, identities: list[str], draw: np.random.Generator) -> str:
    """A comment about all of these, or about "they"."""
    who = " and ".join(WORDS[identity] for identity in draw.permutation(identities)) or "they"
    indirect = draw.random() < INDIRECT_SHARE
    words = INSULTS if toxic != indirect else PRAISE
    frames = INDIRECT if indirect else DIRECT
    said = frames[draw.integers(len(frames))].format(who, words[draw.integers(len(words))])
    return said + ENDINGS[draw.integers(len(ENDINGS))]


def _grouped(name: str, texts: tuple[str, ...], labels: torch.Tensor, mentions: torch.Tensor) -> Grouped:
    attributes = {identity: mentions[:, i] for i, identity in enumerate(IDENTITIES)}
    rows = Labelled(tuple(f"{name}-{row}" for row in range(len(texts))), texts, labels, CLASSES, source=name)
    return Grouped.of(rows, attributes, Groups.mentioned(labels, CLASSES, attributes))
