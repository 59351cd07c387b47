"""Random sounds and pictures for models that read no text, of the shape that a model's config asks for.

Covered: log-mel features (Whisper, audio spectrogram transformers), waveforms (Wav2Vec 2.0 and its kin), pictures
(vision transformers and convolutional networks). The same sequence gives the same values.
"""

from __future__ import annotations

import math
from typing import Any

import torch

FRAMES = 48  # that a waveform is to become
PICTURE_SIZE = 224  # of a model that takes any
CHANNELS = 3


def read_media(model: Any, seed: int) -> dict[str, torch.Tensor]:
    """Return the model's main input, float32 on the CPU, batch of one; nothing where that is text.

    Raises:
        ValueError: the main input is of a kind that is not covered.
        AttributeError: the config does not say its shape.
    """
    kind = model.main_input_name
    if kind == "input_ids":
        return {}
    shapes = {"input_features": _features, "input_values": _values, "pixel_values": _picture}
    if kind not in shapes:
        raise ValueError(f"nothing is known of the input {kind!r}")
    generator = torch.Generator().manual_seed(seed)
    return {kind: torch.randn((1, *shapes[kind](model.config)), generator=generator)}


def _features(config: Any) -> tuple[int, ...]:
    return int(config.num_mel_bins), 2 * int(config.max_source_positions)


def _values(config: Any) -> tuple[int, ...]:
    """Return the shape of a spectrogram, (frames, bins), or of a waveform, (samples,)."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return int(config.max_length), int(config.num_mel_bins)
    kernels, strides = list(config.conv_kernel), list(config.conv_stride)
    return (FRAMES * math.prod(strides) + sum(kernels) * max(strides),)


def _picture(config: Any) -> tuple[int, ...]:
    size = getattr(config, "image_size", None) or PICTURE_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    return int(getattr(config, "num_channels", CHANNELS)), int(height), int(width)
