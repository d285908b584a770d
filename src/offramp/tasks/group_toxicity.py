"""CivilComments from the file that WILDS publishes; its groups overlap. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch

from offramp.metrics.group_members import Groups
from offramp.tasks.group_sets import SPLITS, Grouped, GroupedSet
from offramp.tasks.labelled import Labelled
from offramp.tasks.rows import one_of, share, table_rows

FILE = "all_data_with_identities.csv"
CLASSES = ("non-toxic", "toxic")
IDENTITIES = ("male", "female", "LGBTQ", "christian", "muslim", "other_religions", "black", "white")
ANY = "identity_any"
GROUPINGS = ("identities", "any")


def load_civilcomments(folder: str | Path, *, grouping: str = "identities") -> GroupedSet:
    """CivilComments (Borkan et al., 2019) in the form of WILDS (Koh et al., 2021); scores of at least .5 count as yes.

    Never compare worst groups across groupings: with ERM they are quoted from 57 to 76 %.

    Args:
        folder: Holds all_data_with_identities.csv: comment_text, split, toxicity, eight identities, identity_any.
        grouping: "identities": 16 groups, identity x label, that overlap, as WILDS reports; "any": four groups, label x
            whether any identity is mentioned, as DEDIER uses.

    Returns:
        Texts, with nine attributes; the published split.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: A column is missing, a row is wrong, or there is no such grouping.
    """
    if grouping not in GROUPINGS:
        raise ValueError(f"grouping is {grouping!r}; allowed are {' and '.join(map(repr, GROUPINGS))}")
    names = (*IDENTITIES, ANY)
    parts: dict[str, tuple[list[str], list[str], list[int], list[list[int]]]] = {s: ([], [], [], []) for s in SPLITS}
    path = Path(folder) / FILE
    for row in table_rows(path, ("comment_text", "split", "toxicity", *names), what="CivilComments"):
        ids, texts, labels, values = parts[one_of(row, "split", {name: name for name in SPLITS})]
        ids.append(f"row {row.position}")
        texts.append(row.value["comment_text"])
        labels.append(int(share(row, "toxicity") >= 0.5))
        values.append([int(share(row, name) >= 0.5) for name in names])
    found = {}
    for name, (ids, texts, labels, values) in parts.items():
        if not ids:
            continue
        y, mentioned = torch.tensor(labels), torch.tensor(values)
        attributes = {column: mentioned[:, i] for i, column in enumerate(names)}
        rows = Labelled(tuple(ids), tuple(texts), y, CLASSES, source=f"CivilComments, {name}")
        if grouping == "any":
            groups = Groups.crossed(y, CLASSES, attributes[ANY], ("no identity", "an identity"))
        else:
            groups = Groups.mentioned(y, CLASSES, {identity: attributes[identity] for identity in IDENTITIES})
        found[name] = Grouped.of(rows, attributes, groups)
    which = "16 overlapping groups" if grouping == "identities" else "4 groups by identity_any"
    return GroupedSet("civilcomments", found, f"published split, {which}")
