"""Train any Hugging Face model under sequence parallelism, FSDP2 and packing, without forking it."""

from hf_veomni.mesh import ParallelState, get_parallel_state, init_parallel_state
from hf_veomni.plan import ParallelPlan
from hf_veomni.prepare import build_parallelize_model, detach_omni, gather_sequence, prepare_omni

__all__ = [
    "ParallelPlan",
    "ParallelState",
    "build_parallelize_model",
    "detach_omni",
    "gather_sequence",
    "get_parallel_state",
    "init_parallel_state",
    "prepare_omni",
]
