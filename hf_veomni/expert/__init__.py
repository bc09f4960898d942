"""Expert parallelism: experts over the ranks of a group, tokens sent to them and back, adapters on them."""

from hf_veomni.expert.attach import attach_experts, check_model
from hf_veomni.expert.counts import ExpertCounter, ExpertLoad, find_biases, update_biases
from hf_veomni.expert.forward import counting_no_tokens, counts_tokens, cut_into_chunks
from hf_veomni.expert.layout import find_experts
from hf_veomni.expert.lora import AdapterLayout, find_layouts
from hf_veomni.expert.router_loss import attach_router_loss

__all__ = [
    "AdapterLayout",
    "ExpertCounter",
    "ExpertLoad",
    "attach_experts",
    "attach_router_loss",
    "check_model",
    "counting_no_tokens",
    "counts_tokens",
    "cut_into_chunks",
    "find_biases",
    "find_experts",
    "find_layouts",
    "update_biases",
]
