"""What the models are asked: built-in texts, chats in the model's template, added and random tokens, user's prompts.

Prompts exist for coverage (scripts, code, special tokens, rare rows of the embedding), not for statistics: one wrong
tensor shows in any of them. Without a tokenizer, only random token ids are used. The same seed gives the same ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from runner.judge.sidecars.words import Words
from runner.protocol.syntax import parse_json

TEXTS = (
    "The keeper of the lighthouse wrote down the weather every morning, even on the day the war ended.",
    "Der Zug nach Heidelberg hatte vierzig Minuten Verspätung, aber niemand im Abteil schien es zu bemerken.",
    "昨天下午下了一场大雨，街上的人都跑进了旁边的书店。",
    "La bibliothèque ferme à dix-huit heures; après, il faut rendre les livres dans la boîte devant la porte.",
    "def mean(values: list[float]) -> float:\n    if not values:\n        return 0.0\n    return sum(values)",
    "SELECT city, COUNT(*) AS orders FROM sales WHERE day >= '2024-01-01' GROUP BY city ORDER BY orders DESC;",
    '{"name": "sensor-7", "readings": [12.5, 13.1, null], "unit": "°C", "ok": true}',
    "If 3x + 7 = 22, then x = 5, because 22 − 7 = 15 and 15 / 3 = 5. Hence x² = 25.",
)
CHATS = (
    ({"role": "user", "content": "What is the capital of France?"},),
    (
        {"role": "user", "content": "Name three primary colours."},
        {"role": "assistant", "content": "Red, yellow and blue."},
        {"role": "user", "content": "Which of them is the warmest, and why?"},
    ),
)
RANDOM_SEQUENCES = 4
RANDOM_LENGTH = 48
MAX_TOKENS = 128
MAX_ADDED = 512  # of the tokens that are beside the vocabulary proper; the newest come first
CONTINUED = 3
EVAL_WINDOW = 512  # tokens of the user's text that are read at once
EVAL_TOKENS = 16384  # of it that are read at all: 30 windows


class Purpose(Enum):
    """What a sequence is run for."""

    COMPARISON = "comparison"
    EVALUATION = "evaluation"  # a window of the user's text, whose perplexity is wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """Token ids to run the models on.

    Attributes:
        label: how to show it: the text's start.
        ids: one row of token ids, int64, shape (tokens,).
        is_text: whether it is language, and not random ids.
        purpose: what it is run for.
    """

    label: str
    ids: torch.Tensor
    is_text: bool
    purpose: Purpose = Purpose.COMPARISON


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """Everything to ask.

    Attributes:
        sequences: at least one.
        continued: those to be continued for the human reader.
        words: to read the answers with.
        skipped: user prompts that could not be used, with the reason.
        is_cut: whether the user's text was longer than what is run.
    """

    sequences: tuple[TokenSequence, ...]
    continued: tuple[TokenSequence, ...]
    words: Words
    skipped: tuple[str, ...]
    is_cut: bool = False

    @property
    def compared(self) -> tuple[TokenSequence, ...]:
        """The sequences on which the models are compared; they come first."""
        return tuple(sequence for sequence in self.sequences if sequence.purpose is Purpose.COMPARISON)

    def texts(self, rows: Sequence[torch.Tensor]) -> list[str]:
        """Return rows of generated ids as texts; the ids themselves where there is no tokenizer for them."""
        texts = self.words.decode([row.tolist() for row in rows]) if self.words.is_there else None
        return texts or [" ".join(str(int(i)) for i in row) for row in rows]


def make_questions(
    folder: Path, *, rows: int, max_tokens: int, prompts: Sequence[str], seed: int, eval_text: str = ""
) -> Questions:
    """Return the questions for a model.

    Args:
        folder: where the tokenizer is.
        rows: of the input embedding; no id reaches it.
        max_tokens: that the model can take.
        prompts: the user's: texts, or chats as the JSON object {"messages": [...]}.
        seed: of the random ids.
        eval_text: the user's, whose perplexity is wanted; "" for none.
    """
    words = Words(folder)
    length = max(2, min(MAX_TOKENS, max_tokens))
    own: list[TokenSequence] = []
    skipped: list[str] = []
    for prompt in prompts:
        made = _sequence(words, prompt, rows, length)
        if made is None:
            skipped.append(prompt[:60])
        else:
            own.append(made)
    built_in = [*CHATS, *TEXTS] if words.has_template else list(TEXTS)
    ours = [made for text in built_in if (made := _sequence(words, text, rows, length)) is not None]
    noise = [*_added(words, rows, length, seed), *_random(rows, min(length, RANDOM_LENGTH), seed)]
    texts = own + ours
    windows, is_cut = _windows(words, eval_text, rows, max(2, min(EVAL_WINDOW, max_tokens)))
    return Questions(
        sequences=(*texts, *noise, *windows),
        continued=tuple((texts or noise)[:CONTINUED]),
        words=words,
        skipped=tuple(skipped),
        is_cut=is_cut,
    )


def _sequence(words: Words, prompt: Any, rows: int, length: int) -> TokenSequence | None:
    """Return the prompt's ids, or None where the tokenizer or the embedding has no room for it."""
    if not words.is_there:
        return None
    chat = _messages(prompt)
    if chat is not None and words.has_template:
        found = words.chat(chat, length)
    else:
        text = "\n".join(str(turn["content"]) for turn in chat) if chat is not None else prompt
        found = words.encode(text, length)
    if found is None:
        return None
    ids, count, highest = found
    if count < 2 or highest >= rows:
        return None
    label = str(chat[-1]["content"]) if chat is not None else str(prompt)
    return TokenSequence(label=label, ids=torch.tensor(ids), is_text=True)


def _windows(words: Words, text: str, rows: int, length: int) -> tuple[list[TokenSequence], bool]:
    """Return a text in windows of at most `length` tokens, and whether it was longer than what is run."""
    found = words.encode(text, EVAL_TOKENS) if words.is_there and text else None
    if found is None:
        return [], False
    ids, count, highest = found
    if not 0 <= highest < rows:
        return [], False
    parts = [ids[start : start + length] for start in range(0, len(ids), length)]
    windows = [
        TokenSequence(label="your text", ids=torch.tensor(part), is_text=True, purpose=Purpose.EVALUATION)
        for part in parts
        if len(part) > 1
    ]
    return windows, count > EVAL_TOKENS


def _messages(prompt: Any) -> list[dict[str, Any]] | None:
    if not isinstance(prompt, str):
        return [dict(turn) for turn in prompt]
    if not prompt.lstrip().startswith('{"messages"'):
        return None
    try:
        turns = parse_json(prompt)["messages"]
        return [{**turn, "content": turn["content"]} for turn in turns] or None
    except (ValueError, KeyError, TypeError):
        return None


def _random(rows: int, length: int, seed: int) -> Iterator[TokenSequence]:
    generator = torch.Generator().manual_seed(seed)
    for number in range(RANDOM_SEQUENCES):
        ids = torch.randint(rows, (length,), generator=generator)
        yield TokenSequence(label=f"random ids {number + 1}", ids=ids, is_text=False)


def _added(words: Words, rows: int, length: int, seed: int) -> Iterator[TokenSequence]:
    """Yield every token that was added to the vocabulary, those with the highest ids where they are too many.

    They come after random ids: at the start of a text, float32 rounding grows ten times as large in a row of special
    tokens (2.4e-5 on SmolLM2) as anywhere else.
    """
    ids = sorted({number for number in words.added if 0 <= number < rows})[-MAX_ADDED:]
    before = min(RANDOM_LENGTH, length // 2)
    generator = torch.Generator().manual_seed(seed + 1)
    for number, start in enumerate(range(0, len(ids), length - before)):
        part = torch.tensor(ids[start : start + length - before])
        start_ids = torch.randint(rows, (before,), generator=generator)
        yield TokenSequence(label=f"added tokens {number + 1}", ids=torch.cat([start_ids, part]), is_text=False)
