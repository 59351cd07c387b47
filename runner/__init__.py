"""lora-merge-action: a LoRA adapter becomes a verified, tagged release."""

__version__ = "0.1.0"
