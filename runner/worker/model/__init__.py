"""The base's class on the mapped checkpoint with the adapter attached by PEFT: what can be known before a merge."""
