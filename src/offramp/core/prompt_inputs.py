"""Prompts as token ids: texts, chats, or numbers that are ids already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Prompts = Any
"""What `LanguageModel.generate` continues: see there."""

Prompt = str | Sequence[dict[str, str]]
"""A text, or the messages of a chat ({"role": …, "content": …}), to which the tokenizer's chat template is applied."""


def token_ids(prompts: Any) -> list[list[int]] | None:
    """Token ids of each row, if prompts are numbers: one row or several, as a tensor, an array or lists; else None."""
    if isinstance(prompts, Tensor) or type(prompts).__module__ == "numpy":
        if prompts.ndim not in (1, 2) or "int" not in str(prompts.dtype):
            raise ValueError(
                f"the prompt is an array of {prompts.dtype} with shape {tuple(prompts.shape)}; give token ids, whole "
                "numbers [T] or [B, T], or a mapping with input_ids or input_features"
            )
        prompts = prompts.tolist()
    if not isinstance(prompts, list | tuple) or not prompts:
        return None
    rows = prompts if all(isinstance(row, list | tuple) for row in prompts) else [prompts]
    if not all(type(i) is int for row in rows for i in row):
        return None
    return [list(row) for row in rows]


def padded(ids: list[list[int]], vocabulary: int, *, right: bool) -> dict[str, Tensor]:
    """Rows of token ids as one batch, filled up on one side where they differ in length.

    Args:
        ids: B rows.
        vocabulary: V, which all ids are below.
        right: Whether rows are filled up on the right.

    Returns:
        `input_ids` and `attention_mask`, [B, T].

    Raises:
        ValueError: A row is empty, or an id is none of the model's.
    """
    if not all(ids):
        raise ValueError("the prompt is empty; give at least one token in every row")
    if strange := [i for row in ids for i in row if not 0 <= i < vocabulary]:
        raise ValueError(f"a prompt holds the token id {strange[0]}; the model's are 0..{vocabulary - 1}")
    rows, masks = [], []
    for row in ids:
        gap, ones = [0] * (max(map(len, ids)) - len(row)), [1] * len(row)
        rows.append(row + gap if right else gap + row)
        masks.append(ones + gap if right else gap + ones)
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer knows how chats are written."""
    return getattr(tokenizer, "chat_template", None) is not None


def tokenised(prompts: Sequence[Any], tokenizer: Any, *, chat: bool, right: bool) -> dict[str, Tensor]:
    """Texts or chats as one batch.

    Args:
        prompts: Texts, or chats, or the messages of one chat.
        tokenizer: The model's; None: it has none.
        chat: Whether a text is a user's message.
        right: Whether rows are filled up on the right.

    Returns:
        `input_ids` and `attention_mask`, [B, T].

    Raises:
        ValueError: No prompt, an empty one, texts and chats in one batch, or no tokenizer.
    """
    texts = _texts(prompts, tokenizer, chat)
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    try:  # the tokenizer is the user's: leave it as it was
        tokenizer.padding_side = "right" if right else "left"
        if pad is None and len(texts) > 1:
            tokenizer.pad_token = tokenizer.eos_token
        templated = chat or not isinstance(prompts[0], str)  # a template brings its own special tokens
        batch = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1, add_special_tokens=not templated)
    finally:
        tokenizer.padding_side, tokenizer.pad_token = side, pad
    if not batch["input_ids"].shape[1]:
        raise ValueError("the prompt has no tokens; give at least one")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _texts(prompts: Sequence[Any], tokenizer: Any, chat: bool) -> list[str]:
    """The texts of a batch of one kind, chat template applied."""
    if not prompts:
        raise ValueError("the batch is empty; give at least one prompt")
    if strange := [p for p in prompts if not isinstance(p, str | dict | list | tuple)]:
        raise ValueError(
            f"a prompt is {strange[0]!r}; give texts, chats, or token ids: whole numbers, a list of them for each row"
        )
    if isinstance(prompts[0], dict):
        prompts = [prompts]
    if not chat and len({isinstance(prompt, str) for prompt in prompts}) > 1:
        raise ValueError("the batch mixes texts and chats; give one kind, or chat=True to make texts chats")
    return [_text(prompt, index, tokenizer, chat) for index, prompt in enumerate(prompts)]


def _text(prompt: Prompt, index: int, tokenizer: Any, chat: bool) -> str:
    """The text of one prompt, chat template applied."""
    if tokenizer is None:
        raise ValueError("the model was loaded without a tokenizer; give token ids [B, T] instead of text")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"prompt {index + 1} is empty; give at least one word")
        if not chat:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if not has_template(tokenizer):
        raise ValueError("the tokenizer has no chat template; give plain texts")
    text: str = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    return text
