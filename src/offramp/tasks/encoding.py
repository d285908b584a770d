"""Examples as token ids: prompts exactly as generation encodes them, targets as it would produce them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offramp.tasks.examples import Example
from offramp.tasks.task import Task

if TYPE_CHECKING:
    from offramp.language_model import LanguageModel


@dataclass(frozen=True)
class Pair:
    """An example to train on.

    Attributes:
        source_ids: The prompt as generation encodes it; for an encoder-decoder the encoder's input, its end included.
        target_ids: The answer with the token that ends it; for an encoder-decoder the decoder's labels, start token not
            included.
        group: That of the example.
    """

    source_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    group: str


def task_documents(
    lm: LanguageModel, task: Task, examples: Sequence[Example], *, longest: int | None = None
) -> tuple[list[Pair], int]:
    """Examples as prompts and answers to train on.

    Args:
        lm: The model they are for.
        task: How to ask.
        examples: Any number.
        longest: Most tokens of prompt and answer together; for an encoder-decoder, of each. None: what the model's
            context holds. Sources that are too long lose their end.

    Returns:
        A pair for each example, and how many sources were shortened.

    Raises:
        ValueError: An answer leaves no room for the prompt, or the model has no tokenizer or no end token.
    """
    raise NotImplementedError


def fit(
    lm: LanguageModel, task: Task, examples: Sequence[Example], *, longest: int | None = None, room: int | None = None
) -> tuple[list[Example], int]:
    """Examples whose prompts fit, for evaluation: shortened exactly as for training.

    Args:
        lm: The model they are for.
        task: How to ask.
        examples: Any number.
        longest: Most tokens of prompt and answer together; for an encoder-decoder, of the prompt. None: what the
            model's context holds.
        room: Tokens left to the answer of a decoder-only model; None: `task.max_new_tokens`.

    Returns:
        The examples, and how many of their sources were shortened.

    Raises:
        ValueError: An example whose prompt does not fit even with next to no source.
    """
    raise NotImplementedError


def shorten(lm: LanguageModel, task: Task, example: Example, limit: int | None) -> Example:
    """Cut the end of an example's source, between two tokens, so that its prompt has at most `limit` tokens.

    The rest of the prompt, question included, stays as it is.

    Args:
        lm: The model it is for.
        task: How to ask.
        example: The same object is returned if it fits.
        limit: Most tokens of the prompt; None: any number.

    Returns:
        The example.

    Raises:
        ValueError: It does not fit even with next to no source.
    """
    raise NotImplementedError
