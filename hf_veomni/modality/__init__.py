"""Modalities under sequence parallelism: what an item costs, and which rank encodes it."""

from hf_veomni.modality.cost import Coefficients, CostModel

__all__ = ["Coefficients", "CostModel"]
