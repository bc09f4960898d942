"""Omni-modal models composed of stock parts: encoders -> foundation -> decoders."""

from hf_veomni.omni.build import build_omni_model
from hf_veomni.omni.config import OmniConfig
from hf_veomni.omni.decoders import DecoderMixin
from hf_veomni.omni.model import OmniModel, OmniOutput
from hf_veomni.omni.parts import EncoderMixin, FoundationMixin

__all__ = [
    "DecoderMixin",
    "EncoderMixin",
    "FoundationMixin",
    "OmniConfig",
    "OmniModel",
    "OmniOutput",
    "build_omni_model",
]
