"""The judge's texts are short here, too."""

from tests.judge.conftest import _short_texts

__all__ = ["_short_texts"]
