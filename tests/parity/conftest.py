"""The judge's texts are short here, too."""

from tests.verify.conftest import _short_texts

__all__ = ["_short_texts"]
