"""The job of finetune_lora.py in a plain Accelerate loop, with the same numbers.

accelerate launch --config_file accelerate_configs/cpu_sp2.yaml examples/accelerate_loop.py
python examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from hf_veomni import OmniDataCollatorWithPacking, OmniParallelismConfig, ParallelPlan, pack_dataset, prepare_omni
from make_checkpoint import DEFAULT_OUTPUT
from pydoc_topics import IGNORED, pydoc_datasets

Batch = dict[str, torch.Tensor]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=DEFAULT_OUTPUT, help="checkpoint folder or Hub id (%(default)s)")
    parser.add_argument("--output_dir", default="outputs/accelerate_loop", help="where the adapter goes (%(default)s)")
    parser.add_argument("--max_tokens", type=int, default=2048, help="length of a packed sequence (%(default)s)")
    parser.add_argument("--max_steps", type=int, default=16, help="optimizer steps (%(default)s)")
    parser.add_argument("--accumulation", type=int, default=1, help="rows of a data rank in a step (%(default)s)")
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--dtype", default="bfloat16", help="type that the weights are loaded in (%(default)s)")
    return parser.parse_args()


def windows(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Batches in groups of `size`, epoch after epoch; the last group of an epoch may be smaller."""
    while True:
        batches = iter(loader)
        while window := list(islice(batches, size)):
            yield window


def count_targets(window: list[Batch], accelerator: Accelerator) -> torch.Tensor:
    """Targets of one step over all data ranks (`gather` counts the rows of an SP group once)."""
    mine = sum(((batch["labels"] != IGNORED).sum() for batch in window), torch.tensor(0, device=accelerator.device))
    return accelerator.gather(mine.reshape(1)).sum()


def main() -> None:
    arguments = parse_arguments()
    config = OmniParallelismConfig(ParallelPlan.from_env())
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), parallelism_config=config)
    plan = config.plan  # resolved for this world
    set_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))

    # The optimizer comes after `prepare_omni`, which replaces the parameters by their shards.
    model = prepare_omni(model, plan)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, arguments.learning_rate, weight_decay=0.0)
    # accelerate steps a prepared scheduler once for each data rank, so it gets that many steps.
    scheduler = get_scheduler("cosine", optimizer, 2 * plan.dp_size, arguments.max_steps * plan.dp_size)
    rows = pack_dataset(pydoc_datasets(tokenizer)[0], max_tokens=arguments.max_tokens, overlong="split")
    collator = OmniDataCollatorWithPacking(max_tokens=arguments.max_tokens)
    loader = DataLoader(rows.shuffle(seed=0), batch_size=1, collate_fn=collator)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    model.train()
    losses = []
    bar = tqdm(total=arguments.max_steps, disable=not accelerator.is_main_process)
    for window in islice(windows(loader, arguments.accumulation), arguments.max_steps):
        num_targets = count_targets(window, accelerator)
        total = torch.zeros(1, device=accelerator.device)
        for index, batch in enumerate(window):
            last = index == len(window) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                loss = model(**batch, num_items_in_batch=num_targets, use_cache=False).loss
                # FSDP averages gradients over the data ranks; a sum over all targets / their number needs their sum.
                accelerator.backward(loss * plan.dp_size)
            total += loss.detach()
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(total).sum().item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}", grad_norm=f"{float(norm):.3f}")
        bar.update()
    bar.close()

    # Full tensors on the main process; every rank takes part.
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(arguments.output_dir, state_dict=state)
        metrics = {"world_size": plan.world_size, "train_losses": losses}
        (Path(arguments.output_dir) / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(f"train loss {losses[0]:.3f} -> {losses[-1]:.3f}, adapter in {arguments.output_dir}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
