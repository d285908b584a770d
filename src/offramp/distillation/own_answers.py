"""On-policy text: a student's own answers to prompts, given anew every so many steps by the student as it then is.

Agarwal et al. (2023), "On-Policy Distillation of Language Models" (GKD), arXiv 2306.13649: the student learns the
teacher's distribution at every token of what it would itself have said. Differs in giving all answers anew at once,
every `every` steps, rather than those of a batch at every step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offramp.families.backbone import evaluating
from offramp.training.answers import AnswerConfig, answer_documents
from offramp.training.data import Document, Progress, Windows, cut, divide

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel, Prompt


@dataclass(frozen=True)
class OwnAnswers:
    """Prompts, and how the student answers them.

    Attributes:
        prompts: Texts or chats, two at least.
        attributes: The group of each prompt, in 0..G-1, or -1; None: all unknown.
        config: Configuration of the answers.
        every: Steps between answers.
        window: Longest prompt with its answer, in tokens; longer ones are shortened, see `offramp.training.data.cut`.
        share: Share of the prompts to hold out. Their answers are those of the student before training, so that what it
            is judged on stays the same.
        seed: Seed of the choice of those held out.

    Raises:
        ValueError: A value out of range.
    """

    prompts: Sequence[Prompt]
    attributes: Sequence[int] | None = None
    config: AnswerConfig = field(default_factory=AnswerConfig)
    every: int = 100
    window: int = 512
    share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.prompts) < 2:
            raise ValueError(f"{len(self.prompts)} prompts are given; one to learn from and one to hold out are needed")
        if self.attributes is not None and len(self.attributes) != len(self.prompts):
            raise ValueError(
                f"there are groups of {len(self.attributes)} prompts for {len(self.prompts)} prompts; give one for each"
            )
        if self.every < 1 or self.window < 2:
            raise ValueError(f"every is {self.every} and window {self.window}; they count from 1 and 2")

    @property
    def settings(self) -> dict[str, Any]:
        """For the record of a run, as JSON values."""
        numbers = None if self.attributes is None else [int(number) for number in self.attributes]
        content = hashlib.sha256(json.dumps([list(self.prompts), numbers]).encode()).hexdigest()
        return {"prompts": len(self.prompts), "content": content, "every": self.every, "window": self.window,
                "held_out_share": self.share, "split_seed": self.seed, "answers": asdict(self.config)}  # fmt: skip

    def parts(self) -> tuple[list[int], list[int]]:
        """Places of the prompts to train on and of those held out; a prompt that is there twice falls on one side."""
        rows = [Document((place,), 0, repr(prompt)) for place, prompt in enumerate(self.prompts)]
        inside, outside = divide(rows, self.share, self.seed)
        return [row.ids[0] for row in inside], [row.ids[0] for row in outside]

    def round(self, step: int) -> int:
        """Number of the answers that are learnt from after so many steps."""
        return step // self.every

    def answered(
        self, lm: LanguageModel, places: Sequence[int], file: Path, by: str, progress: Progress | None = None
    ) -> Windows:
        """Answers to the prompts at these places by the student as it is, from the file as far as they are there.

        `by` says which student that is: the run and the steps it has done.

        Returns:
            Windows in which only answers count.
        """
        with evaluating(lm.model), torch.no_grad():
            documents = answer_documents(lm, [self.prompts[p] for p in places], self.config, file, progress, by=by)
        if self.attributes is not None:
            kinds = [self.attributes[place] for place in places for _ in range(self.config.per_prompt)]
            documents = [replace(d, attribute=kind) for d, kind in zip(documents, kinds, strict=True)]
        bos = None if lm.tokenizer is None else lm.tokenizer.bos_token_id
        return cut(documents, self.window, bos)
