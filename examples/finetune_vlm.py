r"""Fine-tune a stock vision-language model on a folder of images and a jsonl of chats, on packed sequences.

    accelerate launch --config_file accelerate_configs/gpu8_sp2_dp4.yaml examples/finetune_vlm.py \
        --model Qwen/Qwen2.5-VL-3B-Instruct --data my_folder --max_tokens 8192 --max_pixels 1003520 \
        --bf16 --gradient_checkpointing
    make vlm        # on two CPU processes, without the Hub: SmolLM2 behind an untrained encoder learns to read digits

The folder holds `train.jsonl`, `test.jsonl` if something is to be evaluated, and the images that they name in
`images`; `examples/digit_chats.py` writes one. LoRA goes to the language model alone; encoder and projector stay as
they are, or are trained in full beside it (`--train_encoder`). Only what the assistant says is learnt. Every option of
`TrainingArguments` can be given too. Into `--output_dir` go the adapter, which opens in plain PEFT, the processor,
`metrics.json`, and `answers.png` with held-out images.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, set_seed

from digit_chats import DEFAULT_OUTPUT as DIGITS
from hf_veomni import OmniDataCollatorWithPacking, OmniTrainer, OmniTrainingArguments, pack_dataset
from hf_veomni.modality import CostModel
from make_vlm_checkpoint import DEFAULT_OUTPUT as MODEL

SHOWN = 16
# Projections of attention outside of the encoders, by the names that transformers' families give them.
LANGUAGE_ATTENTION = r"(?!.*(vision|visual|audio)).*\.(q|k|v|o)_proj"
# What the families call their encoder and what maps it to the width of the language model.
ENCODER_NAMES = ("vision_tower", "vision_model", "visual", "multi_modal_projector", "connector")


@dataclass
class ScriptArguments:
    model: str = field(default=MODEL, metadata={"help": "Checkpoint folder or Hub id."})
    data: str = field(default=DIGITS, metadata={"help": "Folder with train.jsonl, test.jsonl and the images."})
    max_tokens: int = field(default=2048, metadata={"help": "Length of a packed sequence, in tokens."})
    max_pixels: int | None = field(
        default=None,
        metadata={"help": "Shrink larger images. In Qwen2.5-VL 784 pixels are a token: 1003520 are 1,280 tokens."},
    )
    dtype: str = field(default="bfloat16", metadata={"help": "Type that the weights are loaded in."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    train_encoder: bool = field(default=False, metadata={"help": "Train encoder and projector in full."})
    train_projector: bool = field(default=False, metadata={"help": "Train the projector in full, a new one say."})


DEFAULTS = {
    "output_dir": "outputs/vlm",
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "max_steps": 40,
    "learning_rate": 2.5e-3,
    "warmup_steps": 5,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}


def parse_arguments() -> tuple[ScriptArguments, OmniTrainingArguments]:
    parser = HfArgumentParser((ScriptArguments, OmniTrainingArguments), description=__doc__.split("\n")[0])
    parser.set_defaults(**DEFAULTS)
    script, args = parser.parse_args_into_dataclasses()
    if not (Path(script.data) / "train.jsonl").is_file():
        raise ValueError(
            f"`data` ({script.data}) holds no train.jsonl: `python examples/digit_chats.py` writes such a folder."
        )
    return script, args


def read_chats(folder: str, name: str) -> Dataset | None:
    """The samples of a jsonl, the paths of their images made absolute; None where there is no such file."""
    path = Path(folder) / f"{name}.jsonl"
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["images"] = [str(Path(folder) / image) for image in row.get("images") or []]
    return Dataset.from_list(rows, on_mixed_types="use_json")


def load_processor(script: ScriptArguments) -> Any:
    """The model's own.

    Raises:
        ValueError: it makes all images of one size, so that `max_pixels` would have no effect.
    """
    if script.max_pixels is None:
        return AutoProcessor.from_pretrained(script.model)
    processor = AutoProcessor.from_pretrained(script.model, max_pixels=script.max_pixels)
    if "max_pixels" not in processor.image_processor.valid_kwargs.__annotations__:
        raise ValueError(
            f"`max_pixels` ({script.max_pixels}) has no effect on {type(processor.image_processor).__name__}: leave "
            "it out; what that makes of an image does not depend on its size."
        )
    return processor


def encoder_parts(model: torch.nn.Module) -> list[str]:
    """Names of the encoder and the projector, as deep as they stand once each.

    Raises:
        ValueError: none has a name that is known.
    """
    found = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in ENCODER_NAMES]
    if not found:
        raise ValueError(
            f"`train_encoder` finds no encoder in {type(model).__name__}: add its name to ENCODER_NAMES, which has "
            f"{', '.join(ENCODER_NAMES)}."
        )
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


@torch.no_grad()
def answers(model: Any, processor: Any, samples: list[dict[str, Any]]) -> list[str]:
    """What a plain model says of each sample's images, greedily."""
    said = []
    for sample in samples:
        pictures = [Image.open(path) for path in sample["images"]]
        text = processor.apply_chat_template(sample["messages"][:-1], add_generation_prompt=True)
        inputs = processor(images=pictures or None, text=text, return_tensors="pt").to(model.device, model.dtype)
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        said.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return said


def wanted(sample: dict[str, Any]) -> str:
    content = sample["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def draw(samples: list[dict[str, Any]], said: list[str], path: Path) -> None:
    """The first image of each sample with what is said of it, green where it is what was wanted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots(2, SHOWN // 2)
    for axis, sample, text in zip(axes.flatten(), samples, said, strict=False):
        axis.imshow(Image.open(sample["images"][0]))
        axis.set_title(text[:24], color="tab:green" if text == wanted(sample) else "tab:red", fontsize=8)
    for axis in axes.flatten():
        axis.axis("off")
    figure.savefig(path, dpi=120)


def show(script: ScriptArguments, args: OmniTrainingArguments, processor: Any, test: Dataset) -> tuple[int, int]:
    """Open the adapter in plain PEFT, ask it for held-out images, draw them. Returns how many of them are right."""
    base = AutoModelForImageTextToText.from_pretrained(script.model, dtype=script.dtype)
    model: Any = PeftModel.from_pretrained(base, args.output_dir).eval()
    samples = [sample for sample in list(test)[:SHOWN] if sample["images"]]
    said = answers(model, processor, samples)
    draw(samples, said, Path(args.output_dir) / "answers.png")
    return sum(text == wanted(sample) for text, sample in zip(said, samples, strict=True)), len(samples)


def trained_parts(model: torch.nn.Module, script: ScriptArguments) -> list[str]:
    """Names of the modules that are trained in full beside the adapter.

    Raises:
        ValueError: the projector alone is asked for, and is a part of the encoder.
    """
    if script.train_encoder:
        return encoder_parts(model)
    if not script.train_projector:
        return []
    parts = encoder_parts(model)
    projectors = [name for name in parts if name.endswith(("projector", "connector"))]
    if not projectors:
        raise ValueError(
            f"`train_projector` finds no projector beside {', '.join(parts)} in {type(model).__name__}: use "
            "`train_encoder`, or neither."
        )
    return projectors


def main() -> None:
    script, args = parse_arguments()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.process_index > 0:  # one progress bar instead of one a rank
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    set_seed(args.seed)
    processor = load_processor(script)
    model = AutoModelForImageTextToText.from_pretrained(script.model, dtype=script.dtype)
    in_full = trained_parts(model, script)
    for name in encoder_parts(model) if in_full else []:  # the encoder, too: what goes into a projector has its type
        model.get_submodule(name).float()  # bf16 is too coarse for what AdamW adds to weights that are trained
    cost = CostModel.from_config(model.config).costs
    train, test = (read_chats(script.data, name) for name in ("train", "test"))
    packed = [
        None if samples is None else pack_dataset(samples, script.max_tokens, processor=processor, cost=cost)
        for samples in (train, test)
    ]
    trainer = OmniTrainer(
        model=model,
        args=args,
        train_dataset=packed[0].shuffle(seed=args.seed),
        eval_dataset=packed[1],
        data_collator=OmniDataCollatorWithPacking(
            script.max_tokens, processor, model_config=model.config, train_on="assistant"
        ),
        peft_config=LoraConfig(
            r=script.lora_r,
            lora_alpha=2 * script.lora_r,
            target_modules=LANGUAGE_ATTENTION,
            modules_to_save=in_full or None,
            task_type="CAUSAL_LM",
        ),
    )
    metrics: dict[str, Any] = {} if test is None else {"before": trainer.evaluate()["eval_loss"]}
    metrics["train"] = trainer.train().metrics
    trainer.save_model()
    if test is not None:
        metrics["after"] = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        if test is not None:
            right, asked = show(script, args, processor, test)
            metrics["right"], metrics["asked"] = right, asked
            print(f"\nheld-out loss: {metrics['before']:.3f} before, {metrics['after']:.3f} after")
            print(f"held-out images answered right by the saved adapter: {right} of {asked}, see answers.png")
        (Path(args.output_dir) / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(f"adapter, processor and figures: {args.output_dir}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
