r"""Teach a language model to see: scanned digits and crops of photographs in, words out.

    accelerate launch --config_file accelerate_configs/cpu_sp2.yaml examples/read_digits.py
    python examples/read_digits.py                                         # one process, the same numbers

SmolLM2-135M, with LoRA, is the foundation; a small SigLIP encoder that has never seen anything is trained beside it.
An image is 4 tokens. Digits are scikit-learn's `load_digits` (1,797 scans, 360 held out), photographs its two
sample images, cut into crops: left parts for training, right parts held out. Into `--output_dir` go `metrics.json` and
`read.png`, held-out images with what the model says of them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_veomni import build_omni_model
from make_checkpoint import DEFAULT_OUTPUT
from omni_common import DIGITS, IGNORED, make_trainer, parse_arguments, save_metrics

SIZE, PATCH = 16, 8
TOKENS = (SIZE // PATCH) ** 2
CROP = 96
HELD_OUT = 360
DIGIT_PROMPT, PHOTO_PROMPT = "The digit is", "The photo shows a"


@dataclass
class ScriptArguments:
    model: str = field(default=DEFAULT_OUTPUT, metadata={"help": "Checkpoint folder or Hub id."})
    placeholder: str = field(default="<file_sep>", metadata={"help": "A token of the vocabulary that no text holds."})
    num_crops: int = field(default=80, metadata={"help": "Crops of each photograph, for training and held out."})
    limit: int | None = field(default=None, metadata={"help": "Use only so many training and held-out images."})


DEFAULTS = {
    "output_dir": "outputs/read",
    "per_device_train_batch_size": 96,
    "per_device_eval_batch_size": 96,
    "max_steps": 60,
    "learning_rate": 2.5e-3,
    "warmup_steps": 0.15,
}


def digits(generator: torch.Generator) -> list[tuple[Tensor, str]]:
    """Scans [3, 16, 16] between -1 and 1 with their words, shuffled."""
    found = load_digits()
    scans = torch.tensor(found.images, dtype=torch.float32) / 8 - 1
    scans = torch.nn.functional.interpolate(scans[:, None], scale_factor=2).repeat(1, 3, 1, 1)
    order = torch.randperm(len(scans), generator=generator).tolist()
    return [(scans[i], DIGITS[found.target[i]]) for i in order]


def crops(count: int, generator: torch.Generator, *, left: bool) -> list[tuple[Tensor, str]]:
    """Square crops [3, 16, 16] of the two photographs, from their left or their right part."""
    found: list[tuple[Tensor, str]] = []
    for photograph, word in zip(load_sample_images().images, ("temple", "flower"), strict=True):
        whole = torch.tensor(np.asarray(photograph)).permute(2, 0, 1) / 127.5 - 1
        border = int(0.6 * whole.shape[2])
        part = whole[:, :, :border] if left else whole[:, :, border:]
        for _ in range(count):
            top = int(torch.randint(part.shape[1] - CROP, (1,), generator=generator))
            begin = int(torch.randint(part.shape[2] - CROP, (1,), generator=generator))
            cut = part[None, :, top : top + CROP, begin : begin + CROP]
            found.append((torch.nn.functional.interpolate(cut, SIZE, mode="area")[0], word))
    return found


def pictures(script: ScriptArguments) -> tuple[list[tuple[Tensor, str]], list[tuple[Tensor, str]]]:
    """Training and held-out images with their words, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    scans = digits(generator)
    train = scans[HELD_OUT:] + crops(script.num_crops, generator, left=True)
    held_out = scans[:HELD_OUT] + crops(script.num_crops // 4, generator, left=False)
    if script.limit is not None:
        train, held_out = train[: script.limit], held_out[: script.limit]
    return train, held_out


def encode(picture: Tensor, word: str, tokenizer: PreTrainedTokenizerBase, mark: int) -> dict[str, Any]:
    """An image, the prompt and the word, of which only the word is learnt. `mark`: the placeholder's id."""
    asked = DIGIT_PROMPT if word in DIGITS else PHOTO_PROMPT
    prompt = [mark] * TOKENS + tokenizer(asked, add_special_tokens=False)["input_ids"]
    answer = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
    labels = [IGNORED] * len(prompt) + answer
    return {"input_ids": prompt + answer, "labels": labels, "pixel_values": picture[None]}


def build(script: ScriptArguments, token: int) -> Any:
    """The foundation in bf16, the encoder in fp32, in which it is trained."""
    vision = {"model_type": "siglip_vision_model", "image_size": SIZE, "patch_size": PATCH, "hidden_size": 128}
    vision |= {"intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "foundation": {"checkpoint": script.model},
        "encoders": {"vision": {"config": vision, "token_id": token, "projector": "mlp"}},
    }
    model = build_omni_model(config, dtype=torch.bfloat16)
    model.encoders.float()
    return model


LORA = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=r"foundation\..*\.(q|k|v|o)_proj",
    modules_to_save=["encoders.vision"],
)


def speak(model: Any, samples: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the model says of images of one kind, generated from the prompt alone. All ranks call it."""
    model.eval()
    length = samples[0]["labels"].count(IGNORED)
    prompts = torch.tensor([sample["input_ids"][:length] for sample in samples], device=model.device)
    seen = torch.cat([sample["pixel_values"] for sample in samples]).to(model.device)
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 1, "do_sample": False}
    said = model.generate(input_ids=prompts, pixel_values=seen, **options)
    return [text.strip() for text in tokenizer.batch_decode(said[:, length:])]


def draw(shown: list[tuple[Tensor, str, str]], path: Path) -> None:
    """Held-out images with what the model says of them, green where it is right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots(4, 8)
    for axis, (picture, word, said) in zip(axes.flatten(), shown, strict=False):
        axis.imshow(((picture + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy())
        axis.set_title(said, color="tab:green" if said == word else "tab:red", fontsize=9)
    for axis in axes.flatten():
        axis.axis("off")
    figure.savefig(path, dpi=120)


def main() -> None:
    script, args = parse_arguments(ScriptArguments, __doc__.split("\n")[0], **DEFAULTS)
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    mark = tokenizer.convert_tokens_to_ids(script.placeholder)
    train, held_out = pictures(script)
    samples = [[encode(picture, word, tokenizer, mark) for picture, word in part] for part in (train, held_out)]
    trainer = make_trainer(build(script, mark), args, *samples, peft_config=LORA)
    before = trainer.evaluate()
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    after = trainer.evaluate()
    by_kind = {
        "digits": trainer.evaluate(samples[1][:HELD_OUT])["eval_accuracy"],
        "photographs": trainer.evaluate(samples[1][HELD_OUT:])["eval_accuracy"] if samples[1][HELD_OUT:] else None,
    }
    shown = [slice(0, 24), slice(HELD_OUT, None, 5)]
    said = [speak(trainer.model, samples[1][part], tokenizer) for part in shown if samples[1][part]]
    if trainer.is_world_process_zero():
        save_metrics(args, {"before": before, "after": after, "by_kind": by_kind, "train_seconds": seconds})
        path = Path(args.output_dir) / "read.png"
        pairs = [pair for part in shown for pair in held_out[part]]
        draw([(*pair, text) for pair, text in zip(pairs, sum(said, []), strict=True)], path)
        print(
            f"\nheld-out images read right: {before['eval_accuracy']:.1%} before, {after['eval_accuracy']:.1%} after"
        )
        print(f"  of which {by_kind}, {seconds:.0f} s of training; chance is 10 % for digits")
        print(f"images and figures: {path}, metrics.json")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
