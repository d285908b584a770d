"""The model's own answers to prompts, generated once and kept in a file that an interrupted generation continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from offramp.runs.digests import fingerprint
from offramp.runs.resume import append_lines, open_lines
from offramp.training.data import Document, Progress
from offramp.values import ArgumentError

if TYPE_CHECKING:
    from offramp.core.generation_inputs import Prompt
    from offramp.core.language_model import LanguageModel


@dataclass(frozen=True)
class AnswerConfig:
    """How the model answers prompts.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: Sample at this temperature; None: greedily.
        per_prompt: Answers to each prompt; more than one needs a temperature.
        prompts_too: Train on the prompts' own tokens as well.
        chat: Put prompts into the model's chat template; None: if it has one.
        seed: Of the samples.
        batch_size: Prompts answered together.

    Raises:
        ValueError: A value out of range.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    per_prompt: int = 1
    prompts_too: bool = False
    chat: bool | None = False
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if min(self.max_new_tokens, self.per_prompt, self.batch_size) < 1:
            raise ValueError("max_new_tokens, per_prompt and batch_size of the answers must be at least 1")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"the answers' temperature is {self.temperature}; give one above 0, or None for greedy")
        if self.per_prompt > 1 and self.temperature is None:
            raise ValueError(f"{self.per_prompt} greedy answers to a prompt would be the same; give a temperature")

    def of(self, lm: LanguageModel) -> AnswerConfig:
        """The same with `chat` settled for a model; an `ArgumentError` if it has no template."""
        if self.chat and not lm.has_chat_template:
            raise ArgumentError("`chat`: the tokenizer has no chat template; leave it out, and give plain texts")
        return replace(self, chat=lm.has_chat_template) if self.chat is None else self


def answer_documents(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    config: AnswerConfig,
    cache: Path,
    progress: Progress | None = None,
    *,
    groups: Sequence[str] | None = None,
    by: str | None = None,
) -> list[Document]:
    """Let the full model answer prompts; only the answers are to be predicted, unless `config.prompts_too`.

    Every finished batch is appended to `cache` (JSON Lines), from which a repeated call goes on; batches are always the
    same and have seeds of their own, so the answers do not depend on interruptions. Of several processes one answers,
    and the others wait for it.

    Args:
        lm: The model.
        prompts: Texts or chats.
        config: How to answer.
        cache: Where answers are kept.
        progress: Called with the answers done and asked for.
        groups: Of the prompts: answers to those of one group are never divided; None: by prompt.
        by: Whose answers these are, for a model that goes on changing; None: the fingerprint of its weights.

    Returns:
        One document per answer: prompt and answer.

    Raises:
        ValueError: No prompts, or `cache` holds other answers.
    """
    if not prompts:
        raise ValueError("there are no prompts; give at least two")
    config = config.of(lm)
    jobs = [prompt for prompt in prompts for _ in range(config.per_prompt)]
    digest = hashlib.sha256(json.dumps(jobs).encode()).hexdigest()
    header = {"model": fingerprint(lm.model) if by is None else by, "prompts": digest, **asdict(config)}
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cache.with_name(f".{cache.name}.lock")):
        records = open_lines(
            cache, header, "answers", lambda found: _whole_batches(len(found), len(jobs), config.batch_size)
        )
        for at in range(len(records), len(jobs), config.batch_size):
            if progress is not None:
                progress(at, len(jobs), "answers")
            new = _answer(lm, jobs[at : at + config.batch_size], config, seed=config.seed + at)
            append_lines(cache, new)
            records += new
    if progress is not None:
        progress(len(jobs), len(jobs), "answers")
    kinds = [_name(prompt) for prompt in prompts] if groups is None else list(groups)
    names = [name for name in kinds for _ in range(config.per_prompt)]
    starts = [0 if config.prompts_too else record["start"] for record in records]
    return [
        Document(tuple(record["ids"]), start, name, tuple(record.get("source", ())))
        for record, start, name in zip(records, starts, names, strict=True)
    ]


def _whole_batches(done: int, total: int, size: int) -> int:
    return done if done == total else done - done % size


def _name(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _answer(lm: LanguageModel, prompts: list[Prompt], config: AnswerConfig, seed: int) -> list[dict[str, Any]]:
    inputs = lm.encode(prompts, chat=bool(config.chat))
    options: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "do_sample": config.temperature is not None}
    if config.temperature is not None:
        options |= {"temperature": config.temperature, "seed": seed}
    answers = lm.generate(inputs, **options)
    records = []
    for row, (prompt, tokens) in enumerate(zip(prompts, answers.tokens, strict=True)):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        record = {"prompt": _name(prompt), "answer": answers.texts[row]}
        if lm.split.is_encoder_decoder:
            first = int(answers.sequences[row, 0])
            records.append({**record, "source": ids, "start": 1, "ids": [first, *tokens]})
        else:
            records.append({**record, "start": len(ids), "ids": ids + tokens})
    return records
