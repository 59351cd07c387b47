"""How a released model is loaded, and what task it is for, from its config.json. Pure but for reading it. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_CLASS = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")
# The end of a class's name → the auto class that finds it. Others (`ForConditionalGeneration` …) mean several things,
# so the class itself is named.
_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "Model": "AutoModel",
}
_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModel": "feature-extraction",
}
_TOKENIZERS = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """What a reader of the card has to import.

    Attributes:
        model: name of a class of transformers.
        tokenizer: AutoTokenizer, AutoProcessor, or None where the release brings neither.
        task: the pipeline tag of a release that is of another class than its base, or None: then the base's is right.
    """

    model: str = "AutoModelForCausalLM"
    tokenizer: str | None = "AutoTokenizer"
    task: str | None = None


def read_loading(base: Path, merged: Path, paths: Iterable[str]) -> Loading:
    """Return how the release in `merged` is loaded.

    Args:
        base: folder of the base.
        merged: folder of the merged model.
        paths: files of the release.
    """
    present = frozenset(paths)
    own = _architecture(merged)
    model = _auto_class(own)
    tokenizer = "AutoTokenizer" if present & _TOKENIZERS else None
    if {"processor_config.json", "preprocessor_config.json"} & present:
        tokenizer = "AutoProcessor"
    changed = own is not None and own != _architecture(base)
    return Loading(model=model, tokenizer=tokenizer, task=_TASKS.get(model) if changed else None)


def _auto_class(architecture: str | None) -> str:
    if architecture is None:
        return "AutoModel"
    return next((auto for end, auto in _AUTO.items() if architecture.endswith(end)), architecture)


def _architecture(root: Path) -> str | None:
    """Return the first class that config.json names; None for none, or one that is no name."""
    try:
        config = json.loads((root / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    named = config.get("architectures") if isinstance(config, dict) else None
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) and _CLASS.fullmatch(first) else None
