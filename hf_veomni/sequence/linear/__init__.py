"""Linear attention, state spaces and short convolutions on cut and packed rows, exact."""

from hf_veomni.sequence.linear.attach import LinearAttachment
from hf_veomni.sequence.linear.mixers import (
    Gathered,
    Mixer,
    check_mixer_heads,
    find_mixers,
    find_unknown,
)

__all__ = [
    "Gathered",
    "LinearAttachment",
    "Mixer",
    "check_mixer_heads",
    "find_mixers",
    "find_unknown",
]
