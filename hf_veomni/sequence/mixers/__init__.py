"""Linear attention, state spaces and short convolutions on cut and packed sequences, exact."""

from hf_veomni.sequence.mixers.attach import LinearAttachment
from hf_veomni.sequence.mixers.table import (
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
