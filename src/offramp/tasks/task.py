"""Tasks: how an example becomes a prompt for a family of models, and what its answer is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel, Prompt


@dataclass(frozen=True)
class Example:
    """One sample of a task.

    Attributes:
        id: Unique and stable in its file: SQuAD's id, DialogSum's fname, else the line or entry, counted from 1.
        source: The dialogue, passage, or text to translate.
        references: Right answers; a training target is the first. None for prompts without answers.
        group: Examples of one group are never divided between splits: the title of a SQuAD article, or the SHA-256 of
            the source.
        question: For question answering.
    """

    id: str
    source: str
    references: tuple[str, ...]
    group: str
    question: str | None = None


@dataclass(frozen=True)
class Task:
    """What is asked; change it with `dataclasses.replace`.

    The templates are for `str.format` and know `{source}`, `{question}` and `{languages[0]}`, `{languages[1]}`.

    Attributes:
        name: "question-answering", "summarisation", "translation" or "prompts"; decides which layouts are read.
        metrics: Names in `offramp.metrics.text.METRICS`; the first is the main one.
        max_new_tokens: Longest answer.
        instruction: Template of the instruction for a decoder-only model.
        cue: What stands at the end of the prompt of a decoder-only model without a chat template.
        prefix: Template of the input of T5 (Raffel et al., 2020, appendix D).
        languages: Names of the language of the source and of the target, in English.
    """

    name: str
    metrics: tuple[str, ...]
    max_new_tokens: int
    instruction: str
    cue: str
    prefix: str
    languages: tuple[str, str] = ("English", "German")

    def prompt(self, example: Example, *, instruct: bool) -> str:
        """The text a model is given, with an instruction or with T5's prefix, but without cue and chat template."""
        template = self.instruction if instruct else self.prefix
        if example.question is None and "{question}" in template:
            raise ValueError(f"example {example.id} has no question, which {self.name} needs")
        return template.format(source=example.source, question=example.question, languages=self.languages)

    def prompts(self, lm: LanguageModel, examples: Sequence[Example]) -> list[Prompt]:
        """What `lm.generate` and `lm.encode` take, with nothing else to set: one chat or one text for each example.

        A decoder-only model with a chat template gets the instruction as a user's message, one without gets it as plain
        text with a cue at the end; T5 and mT5 get the prefix; other encoder-decoders the bare source (and the question
        as T5 does, if there is one).

        Returns:
            The prompts; a ValueError if the model does not take texts, or an example lacks a question.
        """
        return [self._prompt(lm, example) for example in examples]

    def _prompt(self, lm: LanguageModel, example: Example) -> Prompt:
        if not lm.split.is_encoder_decoder:
            text = self.prompt(example, instruct=True)
            if lm.has_chat_template:
                return [{"role": "user", "content": text}]
            return f"{text}\n\n{self.cue.format(languages=self.languages)}" if self.cue else text
        if lm.split.family.listens:
            raise ValueError(f"{lm.name} listens and does not read; {self.name} needs a model for text")
        bare = lm.split.name not in ("t5", "mt5") and example.question is None
        return example.source if bare else self.prompt(example, instruct=False)

    def target(self, example: Example) -> str:
        """The answer to train on: the first reference; a ValueError if there is none."""
        if not example.references:
            raise ValueError(f"example {example.id} has no reference to train on")
        return example.references[0]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="question-answering",
            metrics=("f1", "exact_match"),
            max_new_tokens=32,
            instruction="Answer the question with a short phrase copied from the text, and nothing else.\n\n"
            "Text: {source}\n\nQuestion: {question}",
            cue="Answer:",
            prefix="question: {question} context: {source}",
        ),
        Task(
            name="summarisation",
            metrics=("rougeL", "rouge1", "rouge2"),
            max_new_tokens=64,
            instruction="Summarize the following dialogue in one or two sentences.\n\n{source}",
            cue="Summary:",
            prefix="summarize: {source}",
        ),
        Task(
            name="translation",
            metrics=("bleu", "chrf"),
            max_new_tokens=64,
            instruction="Translate the following text from {languages[0]} to {languages[1]}. "
            "Reply with the translation only.\n\n{source}",
            cue="{languages[1]}:",
            prefix="translate {languages[0]} to {languages[1]}: {source}",
        ),
        Task(
            name="prompts",  # of one's own, without references: answers are compared with the full model's
            metrics=("rougeL",),
            max_new_tokens=64,
            instruction="{source}",
            cue="",
            prefix="{source}",
        ),
    )
}
"""Tasks by name."""
