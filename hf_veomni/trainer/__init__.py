"""Trainer and Accelerate under a plan."""

from hf_veomni.trainer.accelerate import OmniParallelismConfig
from hf_veomni.trainer.arguments import OmniTrainingArguments
from hf_veomni.trainer.trainer import OmniTrainer, OmniTrainerMixin

__all__ = ["OmniParallelismConfig", "OmniTrainer", "OmniTrainerMixin", "OmniTrainingArguments"]
