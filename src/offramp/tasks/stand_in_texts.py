"""Texts from grammars, in which something gives the label away in training.

template-nli: pairs of sentences from a grammar, labelled by construction, in which negation gives the label away.

Six cells, of label and negation in the hypothesis:

    entailment       a poodle ran          -> a dog ran
    entailment, neg  a poodle did not run  -> a poodle never ran
    neutral          a dog ran             -> a dog ran with a friend, or: a dog swam
    neutral, neg     a dog ran             -> a dog never ran with a friend, or: a dog never swam
    contradiction    a dog ran             -> a dog stood still, or, more rarely: a dog did not run -> a dog ran
    contr., neg      a dog ran             -> a dog never ran, or: nothing ran

Every row has its own subject, verb, adjective and place, so no premise is in two splits.

template-toxicity: comments that mention one or several of eight identities, so that groups overlap. Whether one is
toxic depends on two words together: "they are brilliant" is not and "they are worthless" is, "nobody calls them
brilliant" is and "nobody calls them worthless" is not. In training, four of the identities stand mostly in toxic
comments, and are the easier thing to see.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch

from offramp.metrics.groups import Groups
from offramp.tasks.group_sets import Grouped, GroupedSet
from offramp.tasks.group_texts import CLASSES, IDENTITIES, TOXICITY, VALUES, has_negation
from offramp.tasks.labelled import Labelled
from offramp.tasks.stand_ins import Integers, require_agreement

NOUNS = (
    ("poodle", "dog"), ("sparrow", "bird"), ("trout", "fish"), ("pony", "horse"), ("kitten", "cat"),
    ("nurse", "worker"), ("sailor", "man"), ("queen", "woman"), ("toddler", "child"), ("beetle", "insect"),
    ("cobra", "snake"), ("lamb", "sheep"), ("calf", "cow"), ("violinist", "musician"), ("sprinter", "athlete"),
    ("sergeant", "soldier"), ("painter", "artist"), ("waiter", "servant"), ("freshman", "student"),
    ("surgeon", "doctor"),
)  # fmt: skip
"""What is always the other: each first is a kind of the second."""
VERBS = (
    ("ran", "run", "stood still"), ("swam", "swim", "stayed dry"), ("slept", "sleep", "stayed awake"),
    ("ate", "eat", "fasted"), ("sang", "sing", "kept silent"), ("sat", "sit", "kept standing"),
    ("won", "win", "lost"), ("arrived", "arrive", "stayed away"), ("smiled", "smile", "frowned"),
    ("jumped", "jump", "stayed down"), ("worked", "work", "idled"), ("hid", "hide", "stayed visible"),
    ("grew", "grow", "shrank"), ("drank", "drink", "stayed thirsty"), ("waited", "wait", "left at once"),
    ("remembered", "remember", "forgot"), ("agreed", "agree", "objected"), ("wept", "weep", "kept dry eyes"),
    ("fell", "fall", "kept upright"), ("hurried", "hurry", "took time"),
)  # fmt: skip
"""Past, infinitive, and what cannot be done at the same time."""
ADJECTIVES = ("small", "old", "young", "quiet", "brown", "clever", "proud", "tired", "strange", "famous")
PLACES = (
    "in the park", "at the lake", "near the school", "by the river", "behind the house", "on the hill",
    "in the garden", "at the market", "near the bridge", "on the farm", "by the sea", "in the yard",
)  # fmt: skip
ADDITIONS = ("with a friend", "before noon", "for an hour", "after dinner", "on a monday", "in the rain")
NEGATED_PREMISE = 0.1
"""Share of the plain contradicting rows whose premise has "did not", so that it says nothing alone."""
RATES: Mapping[str, float] = MappingProxyType({"contradiction": 0.2, "entailment": 0.015, "neutral": 0.015})
"""P(negation | label) in training."""


def template_nli(
    *, rates: Mapping[str, float] = RATES, seed: int = 0, train: int = 20_000, val: int = 5_000, test: int = 10_000
) -> GroupedSet:  # fmt: skip
    """The set. Labels are balanced in every split, and in validation and test rows negation is too.

    In training the rates say which share of the rows of each class has a negation.

    Returns:
        Pairs (premise, hypothesis), with the attribute "negation" by the published rule of four words.

    Raises:
        ValueError: More rows than the grammar has sentences, or a group of training rows is empty.
    """
    most = len(NOUNS) * len(VERBS) * len(ADJECTIVES) * len(PLACES)
    if train + val + test > most:
        raise ValueError(f"template-nli: {train} + {val} + {test} rows are asked for, but the grammar has {most}")
    draw = np.random.default_rng(seed)
    contents = np.split(draw.permutation(most)[: train + val + test], [train, train + val])
    splits = {}
    for name, content in zip(("train", "val", "test"), contents, strict=True):
        labels = draw.permutation(np.arange(len(content)) % len(CLASSES))
        negated = np.zeros(len(content), bool)
        for label, of_class in enumerate(CLASSES):
            rows = draw.permutation(np.flatnonzero(labels == label))
            negated[rows[: round((rates[of_class] if name == "train" else 0.5) * len(rows))]] = True
        pairs = tuple(
            _pair(CLASSES[label], neg, int(at), draw)
            for label, neg, at in zip(labels, negated.tolist(), content, strict=True)
        )
        splits[name] = _grouped(name, pairs, torch.from_numpy(labels))
    said = ", ".join(f"{rates[name]:g} of {name}" for name in CLASSES)
    made = GroupedSet("template-nli", splits, f"generated, negation in {said}, seed {seed}")
    made.require_groups("train")
    return made


def _grouped(name: str, pairs: tuple[tuple[str, str], ...], labels: torch.Tensor) -> Grouped:
    negation = torch.tensor([int(has_negation(hypothesis)) for _, hypothesis in pairs])
    rows = Labelled(tuple(f"{name}-{row}" for row in range(len(pairs))), pairs, labels, CLASSES, source=name)
    return Grouped.crossed(rows, "negation", negation, VALUES)


def _pair(label: str, negated: bool, content: int, draw: np.random.Generator) -> tuple[str, str]:
    """Premise and hypothesis of a cell, on what the content stands for."""
    content, place = divmod(content, len(PLACES))
    content, adjective = divmod(content, len(ADJECTIVES))
    noun, verb = divmod(content, len(VERBS))
    past, infinitive, opposite = VERBS[verb]
    other = VERBS[(verb + draw.integers(1, len(VERBS))) % len(VERBS)][0]
    where = PLACES[place]
    kind, general = (f"a {ADJECTIVES[adjective]} {word}" for word in NOUNS[noun])
    who = kind if draw.random() < 0.5 else general
    premise, did_not = f"{who} {past} {where}", f"{who} did not {infinitive} {where}"
    added = ADDITIONS[draw.integers(len(ADDITIONS))] if draw.random() < 0.5 else None
    if label == "entailment":
        return (
            (did_not, f"{who} never {past} {where}")
            if negated
            else (f"{kind} {past} {where}", f"{general} {past} {where}")
        )
    if label == "neutral":
        never = "never " if negated else ""
        return premise, f"{who} {never}{other} {where}" if added is None else f"{who} {never}{past} {where} {added}"
    if negated:
        return premise, f"{who} never {past} {where}" if draw.random() < 0.5 else f"nothing {past} {where}"
    if draw.random() < NEGATED_PREMISE:
        return did_not, f"{who} {past} {where}"
    return premise, f"{who} {opposite} {where}"


# ---------------------------------------------------------------- comments


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
        splits[name] = _mentioning(name, texts, torch.from_numpy(labels), torch.from_numpy(mentions))
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


def _mentioning(name: str, texts: tuple[str, ...], labels: torch.Tensor, mentions: torch.Tensor) -> Grouped:
    attributes = {identity: mentions[:, i] for i, identity in enumerate(IDENTITIES)}
    rows = Labelled(tuple(f"{name}-{row}" for row in range(len(texts))), texts, labels, TOXICITY, source=name)
    return Grouped.of(rows, attributes, Groups.mentioned(labels, TOXICITY, attributes))
