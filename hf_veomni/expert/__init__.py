"""Expert parallelism: experts over the ranks of a group, tokens sent to them and back."""

from hf_veomni.expert.attach import attach_experts
from hf_veomni.expert.layout import ExpertsModule, check_experts, find_experts

__all__ = ["ExpertsModule", "attach_experts", "check_experts", "find_experts"]
