r"""Direct preference optimisation with TRL, LoRA on a chat model, under whatever plan the launcher passes on.

    accelerate launch --config_file accelerate_configs/cpu_sp2.yaml examples/dpo.py
    accelerate launch --config_file accelerate_configs/gpu8_sp2_dp4.yaml examples/dpo.py \
        --model HuggingFaceTB/SmolLM2-1.7B-Instruct --data pairs.jsonl --bf16 --max_length 8192

The pairs are made from Python's documentation, or read from a jsonl (`--data`). Every option of `DPOConfig` can be
given too. Into `--output_dir` go the adapter, which opens in plain PEFT, and a model card.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from trl import DPOConfig, DPOTrainer

from hf_veomni import OmniTrainerMixin, OmniTrainingArguments
from make_checkpoint import DEFAULT_OUTPUT
from preference_pairs import read_pairs


@dataclass
class ScriptArguments:
    model: str = field(default=DEFAULT_OUTPUT, metadata={"help": "Checkpoint folder or Hub id."})
    data: str | None = field(default=None, metadata={"help": "A jsonl of pairs; by default Python's documentation."})
    dtype: str = field(default="bfloat16", metadata={"help": "Type that the weights are loaded in."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})


@dataclass
class DPOArguments(OmniTrainingArguments, DPOConfig):
    """DPOConfig with `plan`."""


class OmniDPO(OmniTrainerMixin, DPOTrainer):
    """DPOTrainer under a plan."""


# What differs from TRL's defaults: sized for some minutes on two CPU cores.
DEFAULTS = {
    "output_dir": "outputs/dpo",
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "max_steps": 12,
    "max_length": 256,
    "learning_rate": 1e-3,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, DPOArguments), description=__doc__.split("\n")[0])
    parser.set_defaults(**DEFAULTS)
    script, args = parser.parse_args_into_dataclasses()
    warnings.filterwarnings("ignore", category=FutureWarning)
    train, test = read_pairs(script.data)
    set_seed(args.seed)
    trainer = OmniDPO(
        model=AutoModelForCausalLM.from_pretrained(script.model, dtype=script.dtype),
        args=args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=AutoTokenizer.from_pretrained(script.model),
        peft_config=LoraConfig(r=script.lora_r, lora_alpha=2 * script.lora_r, task_type="CAUSAL_LM"),
    )
    trainer.train()
    found = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(
            f"held-out pairs: loss {found['eval_loss']:.3f}, {found['eval_rewards/accuracies']:.0%} ranked as chosen"
        )
        print(f"adapter and model card are in {args.output_dir}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
