r"""A run that goes on from its newest complete checkpoint whenever it is started, whatever has ended it before.

    torchrun --nproc-per-node=2 --max-restarts=3 examples/restart.py --output_dir outputs/run   # starts itself again
    accelerate launch --config_file accelerate_configs/cpu_sp2.yaml examples/restart.py         # or start it by hand
    sbatch examples/slurm/train.sbatch examples/restart.py --output_dir outputs/run             # or let Slurm do it

Exit codes: 0 the run has come to its end; 75 a scheduler's signal came, and a checkpoint is complete; 76 another rank
was lost or stood still. Every option of `OmniTrainingArguments` can be given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainerCallback, set_seed

from hf_veomni import OmniDataCollatorWithPacking, OmniTrainer, OmniTrainingArguments, pack_dataset
from make_checkpoint import DEFAULT_OUTPUT
from pydoc_topics import pydoc_datasets


@dataclass
class ScriptArguments:
    model: str = field(default=DEFAULT_OUTPUT, metadata={"help": "Checkpoint folder or Hub id."})
    max_tokens: int = field(default=2048, metadata={"help": "Length of a packed sequence, in tokens."})


DEFAULTS = {
    "output_dir": "outputs/restart",
    "per_device_train_batch_size": 1,
    "max_steps": 100,
    "save_strategy": "steps",
    "save_steps": 10,
    "save_total_limit": 2,
    "async_save": True,  # training stops only for a copy of the state
    "enable_jit_checkpoint": True,
    "logging_steps": 1,
    "report_to": "none",
}


def main(callbacks: Sequence[TrainerCallback] = ()) -> None:
    parser = HfArgumentParser((ScriptArguments, OmniTrainingArguments), description=__doc__.split("\n")[0])
    parser.set_defaults(**DEFAULTS)
    script, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    with args.main_process_first():  # the others read what it has written
        rows = pack_dataset(pydoc_datasets(tokenizer)[0], max_tokens=script.max_tokens, overlong="split")
    trainer = OmniTrainer(
        model=AutoModelForCausalLM.from_pretrained(script.model, dtype="float32"),
        args=args,
        train_dataset=rows,
        data_collator=OmniDataCollatorWithPacking(),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    begun = any(Path(args.output_dir).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=begun or None)
    trainer.save_model()


if __name__ == "__main__":
    main()
