"""Train any Hugging Face model under sequence parallelism, FSDP2 and packing, without forking it."""

from hf_veomni.compile import compile_layers
from hf_veomni.data import BalancedBatchSampler, OmniDataCollatorWithPacking, mix_datasets, pack_dataset
from hf_veomni.errors import UnsupportedError
from hf_veomni.fsdp import clip_grad_norm_, sharded_arithmetic
from hf_veomni.launcher import report_errors
from hf_veomni.mesh import ParallelState, get_parallel_state, init_parallel_state
from hf_veomni.omni import (
    DecoderMixin,
    EncoderMixin,
    FoundationMixin,
    OmniConfig,
    OmniModel,
    build_omni_model,
)
from hf_veomni.pairs import run_pair
from hf_veomni.pipeline import run_window
from hf_veomni.plan import ParallelPlan
from hf_veomni.prepare import build_parallelize_model, detach_omni, gather_sequence, prepare_omni
from hf_veomni.trainer import (
    NotFiniteError,
    OmniParallelismConfig,
    OmniTrainer,
    OmniTrainerMixin,
    OmniTrainingArguments,
    Preempted,
    RankError,
)

__all__ = [
    "BalancedBatchSampler",
    "DecoderMixin",
    "EncoderMixin",
    "FoundationMixin",
    "NotFiniteError",
    "OmniConfig",
    "OmniDataCollatorWithPacking",
    "OmniModel",
    "OmniParallelismConfig",
    "OmniTrainer",
    "OmniTrainerMixin",
    "OmniTrainingArguments",
    "ParallelPlan",
    "ParallelState",
    "Preempted",
    "RankError",
    "UnsupportedError",
    "build_omni_model",
    "build_parallelize_model",
    "clip_grad_norm_",
    "compile_layers",
    "detach_omni",
    "gather_sequence",
    "get_parallel_state",
    "init_parallel_state",
    "mix_datasets",
    "pack_dataset",
    "prepare_omni",
    "run_pair",
    "run_window",
    "sharded_arithmetic",
]

report_errors()
