"""Modalities under sequence parallelism: what an item costs, and which rank encodes it."""

from hf_veomni.modality.balance import Assignment, BalanceReport, assign_items, assign_samples, balance_report
from hf_veomni.modality.cost import Coefficients, CostModel

__all__ = [
    "Assignment",
    "BalanceReport",
    "Coefficients",
    "CostModel",
    "assign_items",
    "assign_samples",
    "balance_report",
]
