r"""Supervised fine-tuning on chats with TRL, LoRA or all parameters, under whatever plan the launcher passes on.

    accelerate launch --config_file accelerate_configs/cpu_sp2.yaml examples/sft.py
    accelerate launch --config_file accelerate_configs/gpu8_sp2_dp4.yaml examples/sft.py \
        --model HuggingFaceTB/SmolLM2-1.7B-Instruct --data chats.jsonl --bf16 --max_length 8192

The chats are made from Python's documentation, or read from a jsonl with `messages` in each line (`--data`), of which
an eighth is held out. They are packed into rows of `--max_length` tokens, and only what the assistant says is learnt.
Every option of `SFTConfig` can be given too. Into `--output_dir` go the adapter, which opens in plain PEFT, or the
model (`--lora_r 0`), and a model card.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template

from hf_veomni import OmniTrainerMixin, OmniTrainingArguments
from make_checkpoint import DEFAULT_OUTPUT
from pydoc_topics import EVAL_EVERY, question


@dataclass
class ScriptArguments:
    model: str = field(default=DEFAULT_OUTPUT, metadata={"help": "Checkpoint folder or Hub id."})
    data: str | None = field(default=None, metadata={"help": "A jsonl of chats; by default Python's documentation."})
    dtype: str = field(default="bfloat16", metadata={"help": "Type that the weights are loaded in."})
    lora_r: int = field(
        default=8,
        metadata={
            "help": "Rank of the adapter; 0 trains all parameters, for which `--learning_rate 1e-5` is a start."
        },
    )


@dataclass
class SFTArguments(OmniTrainingArguments, SFTConfig):
    """SFTConfig with `plan`."""


class OmniSFT(OmniTrainerMixin, SFTTrainer):
    """SFTTrainer under a plan."""


# What differs from TRL's defaults: sized for some minutes on two CPU cores.
DEFAULTS = {
    "output_dir": "outputs/sft",
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "max_steps": 12,
    "max_length": 256,
    "packing": True,
    "assistant_only_loss": True,
    "learning_rate": 1e-3,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}


def read_chats(path: str | None) -> tuple[Dataset, Dataset]:
    """Chats to train and to evaluate on: every eighth is one of those.

    Raises:
        ValueError: no such file, a line without `messages`, or too few lines.
    """
    if path is None:
        answers = {question(name): topics[name].strip() for name in sorted(topics)}
        chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in answers.items()]
    elif Path(path).is_file():
        rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
        if missing := [number for number, row in enumerate(rows, 1) if not row.get("messages")]:
            raise ValueError(f"`data` ({path}) has no `messages` in line {missing[0]}: give a chat in each line.")
        chats = [row["messages"] for row in rows]
    else:
        raise ValueError(f"`data` ({path}) is no file: give a jsonl with `messages` in each line.")
    if len(chats) < 2:
        raise ValueError(f"`data` ({path}) has {len(chats)} chats, of which an eighth is held out: give 2 or more.")
    train = [chat for place, chat in enumerate(chats) if place % EVAL_EVERY]
    return Dataset.from_dict({"messages": train}), Dataset.from_dict({"messages": chats[::EVAL_EVERY]})


_CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ PREFIX }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def mark_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    """Mark what the assistant says in a ChatML template, where TRL has no marked one. The text stays what it was.

    Raises:
        ValueError: no chat template, or one that writes another text.
    """
    own = tokenizer.chat_template
    way_out = "give a template with {% generation %} (`--chat_template_path`), or `--assistant_only_loss False`."
    if not own:
        raise ValueError(f"The tokenizer of '{tokenizer.name_or_path}' has no chat template: {way_out}")
    try:
        get_training_chat_template(processing_class=tokenizer)
        return  # marked, or TRL puts a marked one in its place
    except ValueError:
        pass
    turns = [{"role": role, "content": f" {role} "} for role in ("system", "user", "assistant", "user", "assistant")]
    chats = [turns[:2], turns, turns[1:], turns[1:4]]

    def render(template: str) -> list[str]:
        return [
            str(tokenizer.apply_chat_template(c, chat_template=template, tokenize=False, add_generation_prompt=p))
            for c in chats
            for p in (False, True)
        ]

    prefix = render(own)[-1].partition("<|im_start|>user\n")[0]  # the system's turn that some templates start with
    marked = _CHATML.replace("PREFIX", json.dumps(prefix, ensure_ascii=False))
    if render(marked) != render(own):
        raise ValueError(
            f"The chat template of '{tokenizer.name_or_path}' marks no answers, and neither TRL nor this script has a "
            f"marked one that writes the same text: {way_out}"
        )
    tokenizer.chat_template = marked


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, SFTArguments), description=__doc__.split("\n")[0])
    parser.set_defaults(**DEFAULTS)
    script, args = parser.parse_args_into_dataclasses()
    warnings.filterwarnings("ignore", category=FutureWarning)
    train, test = read_chats(script.data)
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    if args.assistant_only_loss and args.chat_template_path is None:
        mark_answers(tokenizer)
    set_seed(args.seed)
    trainer = OmniSFT(
        model=AutoModelForCausalLM.from_pretrained(script.model, dtype=script.dtype),
        args=args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=script.lora_r, lora_alpha=2 * script.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        if script.lora_r
        else None,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        for name, column in (("loss", "eval_loss"), ("token accuracy", "eval_mean_token_accuracy")):
            print(f"held-out chats: {name} {before[column]:.3f} -> {after[column]:.3f}")
        print(f"{'adapter' if script.lora_r else 'model'} and model card are in {args.output_dir}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
