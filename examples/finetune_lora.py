r"""LoRA fine-tuning of a stock checkpoint on packed sequences, under whatever plan the launcher passes on.

    accelerate launch --config_file accelerate_configs/cpu_sp2.yaml examples/finetune_lora.py
    python examples/finetune_lora.py                                       # one process, the same numbers
    accelerate launch --config_file accelerate_configs/cpu_4_sp2_ep2.yaml examples/finetune_lora.py \
        --model outputs/checkpoints/smollm2-135m-moe --lora_experts        # a mixture of experts, sharded over ranks

The model is a checkpoint folder or a Hub id (`--model HuggingFaceTB/SmolLM2-135M-Instruct`). The data are the
documentation topics of Python's standard library, or chats of your own: `--data chats.jsonl`, with `messages` in each
line, of which only what the assistant says is learnt and an eighth is held out. Every option of `TrainingArguments`
can be given too. Into `--output_dir` go the adapter, which opens in plain PEFT, and `metrics.json`.
"""

from __future__ import annotations

import json
import resource
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import transformers
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase, set_seed

from hf_veomni import OmniDataCollatorWithPacking, OmniTrainer, OmniTrainingArguments, pack_dataset
from make_checkpoint import DEFAULT_OUTPUT, answer
from pydoc_topics import pydoc_datasets

GB = 10**9


@dataclass
class ScriptArguments:
    model: str = field(default=DEFAULT_OUTPUT, metadata={"help": "Checkpoint folder or Hub id."})
    data: str | None = field(default=None, metadata={"help": "A jsonl of chats, with `messages` in each line."})
    max_tokens: int = field(default=2048, metadata={"help": "Length of a packed sequence, in tokens."})
    dtype: str = field(default="bfloat16", metadata={"help": "Type that the weights are loaded in."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_experts: bool = field(default=False, metadata={"help": "Adapt the experts of a mixture besides attention."})
    question: str = field(default="Explain Python's lambda", metadata={"help": "Asked before and after the training."})


# What differs from the defaults of TrainingArguments: sized for some minutes on two CPU cores.
DEFAULTS = {
    "output_dir": "outputs/demo",
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "max_steps": 16,
    "learning_rate": 4e-3,
    "warmup_steps": 2,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "logging_first_step": True,
    # The rows are shuffled below, so that accelerate_loop.py can read them in the same order.
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "report_to": "none",
}


def parse_arguments() -> tuple[ScriptArguments, OmniTrainingArguments]:
    """Script and training arguments from the command line.

    Raises:
        ValueError: the model, or the data, is a path that does not exist.
    """
    parser = HfArgumentParser((ScriptArguments, OmniTrainingArguments), description=__doc__.split("\n")[0])
    parser.set_defaults(**DEFAULTS)
    script, args = parser.parse_args_into_dataclasses()
    is_path = script.model.startswith((".", "/", "~")) or script.model.count("/") > 1
    if is_path and not Path(script.model).is_dir():
        raise ValueError(
            f"`model` ({script.model}) is no folder: make the demo's checkpoint with `make checkpoint`, or give the "
            "path of another one or a Hub id such as HuggingFaceTB/SmolLM2-135M-Instruct."
        )
    if script.data is not None and not Path(script.data).is_file():
        raise ValueError(f"`data` ({script.data}) is no file: give a jsonl with `messages` in each line.")
    return script, args


def read_rows(
    script: ScriptArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset, OmniDataCollatorWithPacking]:
    """Packed sequences to train on and held-out ones, and what makes a batch of them."""
    if script.data is None:
        parts = (pack_dataset(part, script.max_tokens, overlong="split") for part in pydoc_datasets(tokenizer))
        return *parts, OmniDataCollatorWithPacking(script.max_tokens)
    chats = load_dataset("json", data_files=script.data, split="train").train_test_split(1 / 8, seed=0)
    parts = (pack_dataset(chats[name], script.max_tokens, processor=tokenizer) for name in ("train", "test"))
    return *parts, OmniDataCollatorWithPacking(script.max_tokens, tokenizer, train_on="assistant")


def answer_with_adapter(script: ScriptArguments, adapter: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The answer of the saved adapter on a freshly loaded model, in plain PEFT."""
    base = AutoModelForCausalLM.from_pretrained(script.model, dtype=script.dtype)
    return answer(PeftModel.from_pretrained(base, adapter).eval(), tokenizer, script.question, max_new_tokens=48)


def peak_memory() -> list[dict[str, float]]:
    """Peak of every rank in GB: resident host memory, and device memory where there is a device."""
    mine = {"host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB}
    if torch.cuda.is_available():
        mine["device_gb"] = torch.cuda.max_memory_allocated() / GB
    if not dist.is_initialized():
        return [mine]
    ranks: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return ranks


def quiet(rank: int) -> None:
    """One progress bar instead of one a rank, and no notes on what the next versions of the libraries will drop."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    if rank > 0:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def main() -> None:
    script, args = parse_arguments()
    quiet(args.process_index)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    model = AutoModelForCausalLM.from_pretrained(script.model, dtype=script.dtype)
    with args.main_process_first():  # the others read what it has written
        train, held_out, collator = read_rows(script, tokenizer)
    # Asked while the model is still the plain one, on one rank.
    reply_before = answer(model, tokenizer, script.question, max_new_tokens=48) if args.process_index == 0 else ""

    trainer = OmniTrainer(
        model=model,
        args=args,
        train_dataset=train.shuffle(seed=0),
        eval_dataset=held_out,
        data_collator=collator,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=script.lora_r,
            lora_alpha=2 * script.lora_r,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"] if script.lora_experts else None,
            task_type="CAUSAL_LM",
        ),
    )
    before = trainer.evaluate()["eval_loss"]
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()

    memory = peak_memory()
    if trainer.is_world_process_zero():
        reply_after = answer_with_adapter(script, args.output_dir, tokenizer)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        metrics = {
            "world_size": len(memory),
            "eval_loss_before": before,
            "eval_loss_after": after,
            "train_losses": losses,
            "train_seconds": seconds,
            "peak_memory": memory,
            "reply_before": reply_before,
            "reply_after": reply_after,
        }
        (Path(args.output_dir) / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(f"\n{script.question}\n  before: {reply_before!r}\n  after:  {reply_after!r}")
        few = -(-len(losses) // 4)
        first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
        print(f"train loss       {first:.3f} -> {last:.3f} (means of {few} of {len(losses)} steps), {seconds:.0f} s")
        print(f"evaluation loss  {before:.3f} -> {after:.3f}")
        for rank, peak in enumerate(memory):
            print(f"peak of rank {rank}   " + ", ".join(f"{name} {value:.2f}" for name, value in peak.items()))
        print(f"adapter and metrics.json are in {args.output_dir}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
