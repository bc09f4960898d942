"""Trainer and Accelerate under a plan."""

from hf_veomni.trainer.accelerate import OmniParallelismConfig
from hf_veomni.trainer.arguments import OmniTrainingArguments
from hf_veomni.trainer.nonfinite import NotFiniteError
from hf_veomni.trainer.signals import Preempted
from hf_veomni.trainer.trainer import OmniTrainer, OmniTrainerMixin
from hf_veomni.trainer.watchdog import RankError

__all__ = [
    "NotFiniteError",
    "OmniParallelismConfig",
    "OmniTrainer",
    "OmniTrainerMixin",
    "OmniTrainingArguments",
    "Preempted",
    "RankError",
]
