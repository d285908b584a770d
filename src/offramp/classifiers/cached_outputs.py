"""What all exits of a trained classifier say about its splits: each computed in one pass, and kept for later steps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from offramp.classifiers.architectures import rows_of
from offramp.classifiers.batches import Rows, in_order
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.loading import load
from offramp.classifiers.outputs import collect, load_description, load_outputs
from offramp.classifiers.splits import read_again
from offramp.families.backbone import Inputs
from offramp.runs.digests import fingerprint
from offramp.tasks.labelled import Labelled
from offramp.uncertainty.outputs import ExitOutputs


@dataclass(frozen=True)
class CachedOutputs:
    """A classifier and the splits of its data.

    Attributes:
        classifier: The classifier.
        splits: By name.
        folder: Where outputs are kept.
        longest: Most tokens of a text.
        batch_size: Rows at once.
        progress: Called with rows done, rows to do and the split's name.
    """

    classifier: EarlyExitClassifier
    splits: Mapping[str, Labelled]
    folder: Path
    longest: int | None = None
    batch_size: int = 64
    progress: Callable[..., None] | None = None

    @classmethod
    def of(
        cls,
        model: str | os.PathLike[str],
        data: str | os.PathLike[str],
        test: str | os.PathLike[str] | None = None,
        task: str | None = None,
        *,
        folder: str | os.PathLike[str] | None = None,
        device: str | None = None,
        batch_size: int = 64,
        progress: Callable[..., None] | None = None,
    ) -> CachedOutputs:
        """Of a model that `offramp train` wrote, and the files it was trained with.

        Args:
            model: Its folder.
            data: What it was trained on, divided again as it was then.
            test: The published test split it was given, if any.
            task: What the user thinks it is made for; None: nobody said.
            folder: Where to keep outputs; None: beside the model, with "-outputs" behind its name.
            device: Where to run; None: the first CUDA GPU if there is one, else the CPU.
            batch_size: Rows at once.
            progress: Called with rows done, rows to do and the split's name.

        Returns:
            The passes; nothing has run yet.

        Raises:
            ModelError: There is no such model, or it is damaged.
            FileNotFoundError: A file is missing.
            ValueError: The data is not what the model was trained with, or damaged.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        classifier = load(model, device=device)
        config, splits = read_again(classifier.trained_on, task, Path(data), None if test is None else Path(test))
        beside = Path(model).parent / f"{Path(model).name}-outputs"
        place = beside if folder is None else Path(folder)
        if place.is_file():
            raise ValueError(f"{place} is a file; name a folder for what exits say")
        return cls(classifier, splits, place, config.longest, batch_size, progress)

    @cached_property
    def network(self) -> str:
        """Fingerprint of the weights."""
        return fingerprint(self.classifier)

    def outputs(self, split: str) -> ExitOutputs:
        """Of a split, computed now or before."""
        return self.on(split, self.splits[split])

    def on(self, name: str, data: Labelled) -> ExitOutputs:
        """Of any rows, kept in a file of this name: memory-mapped, those of texts in the order of their lengths."""
        rows = rows_of(self.classifier, data, longest=self.longest)
        path = self.folder / f"{name}.safetensors"
        made_of = {"network": self.network, "rows": data.digest(), "settings": json.dumps(rows.settings)}
        if path.is_file():
            found = load_outputs(path)
            if load_description(path) == made_of:
                return found if found.cut is not None else self._with_cut(found, rows)
        batches = self._followed(in_order(rows, self.batch_size), len(data), name)
        return collect(
            self.classifier, batches, ids=rows.data.ids, groups=rows.data.groups, path=path, description=made_of
        )

    def _with_cut(self, found: ExitOutputs, rows: Rows) -> ExitOutputs:
        """What an earlier version kept, with the costs it lacks: heads cost the same for rows of any length."""
        inputs = rows.inputs(torch.tensor([0]))
        heads = self.classifier.costs(inputs) - self.classifier.costs(inputs, cut=True)
        return replace(found, cut=found.costs - heads)

    def _followed(
        self, batches: Iterator[tuple[Inputs, Tensor]], total: int, name: str
    ) -> Iterator[tuple[Inputs, Tensor]]:
        done = 0
        for inputs, labels in batches:
            if self.progress is not None:
                self.progress(done, total, name)
            yield inputs, labels
            done += len(labels)
        if self.progress is not None:
            self.progress(total, total, name)
