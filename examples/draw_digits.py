r"""Teach a model to draw: "draw a three" in, codes of an image out.

    accelerate launch --config_file accelerate_configs/cpu_sp2.yaml examples/draw_digits.py
    python examples/draw_digits.py                                         # one process, the same numbers

First Janus's VQ model, small, learns on rank 0 to write a scanned digit (scikit-learn's `load_digits`, 8 x 8) as 16
codes of a codebook of 64; then a small Llama with new weights learns text and codes together under the plan. Text is
bytes (ByT5's tokenizer, which needs no file). Into `--output_dir` go `draw.png`, ten drawings of each digit, and
`metrics.json`: how many of the drawings a classifier of real digits takes for what was asked, how many different ones
there are, and how many repeat a scan of the training, code by code.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm import tqdm
from transformers import ByT5Tokenizer

from hf_veomni import build_omni_model
from omni_common import DIGITS, IGNORED, make_trainer, parse_arguments, save_metrics

SIDE, CODES = 8, 64
HELD_OUT = 360
PLACEHOLDER = "<extra_id_0>"


@dataclass
class ScriptArguments:
    vq_steps: int = field(default=250, metadata={"help": "Training steps of the VQ model."})
    limit: int | None = field(default=None, metadata={"help": "Use only so many scans to train and to hold out."})
    drawings: int = field(default=10, metadata={"help": "Drawings of each digit."})


DEFAULTS = {
    "output_dir": "outputs/draw",
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "max_steps": 160,
    "learning_rate": 3e-3,
    "logging_steps": 25,
}

VQ = {
    "model_type": "janus_vqgan",
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "latent_channels": 32,
    "embed_dim": 8,
    "num_embeddings": CODES,
    "num_patches": SIDE // 2,
    "in_channels": 1,
    "out_channels": 1,
    "double_latent": False,
}
TEXT = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}


def train_vq(vq: Any, scans: Tensor, steps: int, *, show: bool) -> float:
    """Teach Janus's VQ model the scans [N, 1, 8, 8]; returns the mean square error of its copies of them.

    Janus ships it trained and has no loss for it. It decodes codes by their direction alone, so directions are what
    is learnt: codebook and latents have length 1. A code that nobody uses is moved to a latent of the batch.
    """
    vq.requires_grad_(True)
    codebook = vq.quantize.embedding.weight
    optimizer = torch.optim.Adam(vq.parameters(), lr=2e-3)
    for step in tqdm(range(steps), desc="VQ model", disable=not show):
        batch = scans[torch.randint(len(scans), (64,))]
        latents = F.normalize(vq.quant_conv(vq.encoder(batch)), dim=1)
        flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
        with torch.no_grad():
            codebook.copy_(F.normalize(codebook, dim=-1))
            codes = (flat @ codebook.T).argmax(-1)
            if step < steps // 2 and step % 20 == 0:
                unused = codes.bincount(minlength=CODES) == 0
                codebook[unused] = flat[torch.randint(len(flat), (int(unused.sum()),))]
        chosen = codebook[codes].unflatten(0, (len(batch), *latents.shape[2:])).permute(0, 3, 1, 2)
        copies = vq.decoder(vq.post_quant_conv(latents + (chosen - latents).detach()))
        loss = F.mse_loss(copies, batch) + F.mse_loss(chosen, latents.detach())
        loss = loss + 0.25 * F.mse_loss(latents, chosen.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        codebook.copy_(F.normalize(codebook, dim=-1))
        vq.requires_grad_(False)
        copies = vq.decode(vq.encode(scans).image_tokens.view(len(scans), -1))
        return F.mse_loss(copies, scans).item()


def on_all_ranks(module: torch.nn.Module) -> None:
    """Rank 0's values for all ranks: codes are made with them before the trainer compares the models."""
    if dist.is_initialized():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def encode(digit: int, codes: Tensor, tokenizer: Any) -> dict[str, Any]:
    """The words "draw a three" and the placeholders of its codes; only codes are learnt."""
    prompt = tokenizer(f"draw a {DIGITS[digit]}", add_special_tokens=False)["input_ids"]
    marks = [tokenizer.convert_tokens_to_ids(PLACEHOLDER)] * codes.numel()
    return {"input_ids": prompt + marks, "labels": [IGNORED] * len(prompt) + marks, "image_codes": codes[None]}


def draw_all(model: Any, tokenizer: Any, count: int) -> tuple[Tensor, Tensor]:
    """`count` drawings of each digit, as codes [10, count, 16] and images [10, count, 8, 8]; alike on all ranks."""
    generator = torch.Generator(device=model.device).manual_seed(0)
    model.eval()
    found: list[tuple[Tensor, Tensor]] = []
    for word in tqdm(DIGITS, desc="drawings", disable=dist.is_initialized() and dist.get_rank() > 0):
        prompt = tokenizer(f"draw a {word}", add_special_tokens=False)["input_ids"]
        prompts = torch.tensor([prompt] * count, device=model.device)
        codes, pictures = model.generate_image(prompts, do_sample=True, temperature=0.8, generator=generator)
        found.append((codes.cpu(), pictures[:, 0].cpu()))
    codes, pictures = (torch.stack(part) for part in zip(*found, strict=True))
    return codes, pictures


def save_picture(drawn: Tensor, path: Path) -> None:
    """A column for each digit."""
    from matplotlib.figure import Figure

    framed = F.pad(drawn.clamp(-1, 1), (1, 1, 1, 1), value=-0.5)
    sheet = framed.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)  # [count * 10, 10 * 10]
    figure = Figure(figsize=(6, 6.2), layout="constrained")
    axis = figure.subplots()
    axis.imshow(sheet.numpy(), cmap="gray")
    axis.set_xticks([(SIDE + 2) * (i + 0.5) for i in range(10)], DIGITS, rotation=45)
    axis.set_yticks([])
    figure.savefig(path, dpi=120)


def main() -> None:
    script, args = parse_arguments(ScriptArguments, __doc__.split("\n")[0], **DEFAULTS)
    tokenizer = ByT5Tokenizer()
    found = load_digits()
    scans = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    config = {
        "foundation": {"config": {**TEXT, "vocab_size": len(tokenizer)}},
        "decoders": {"image": {"config": VQ, "token_id": tokenizer.convert_tokens_to_ids(PLACEHOLDER)}},
    }
    model = build_omni_model(config)
    vq = model.decoders["image"].vq
    first = args.process_index == 0
    error = train_vq(vq, scans[HELD_OUT:], script.vq_steps, show=True) if first else 0.0
    on_all_ranks(vq)
    codes = model.decoders["image"].lm_encode(scans)
    samples = [encode(int(digit), code, tokenizer) for digit, code in zip(found.target, codes, strict=True)]
    learnt, held_out = samples[HELD_OUT:][: script.limit], samples[:HELD_OUT][: script.limit]
    trainer = make_trainer(model, args, learnt, held_out)
    before = trainer.evaluate()["eval_loss"]
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    after = trainer.evaluate()["eval_loss"]
    chosen, drawn = draw_all(trainer.model, tokenizer, script.drawings)
    if trainer.is_world_process_zero():
        real = scans[HELD_OUT:].flatten(1).numpy(), found.target[HELD_OUT:]
        judge = LogisticRegression(max_iter=2000).fit(*real)
        asked = torch.arange(10).repeat_interleave(script.drawings)
        recognised = float(judge.score(drawn.flatten(0, 1).flatten(1).numpy(), asked.numpy()))
        on_real = float(judge.score(scans[:HELD_OUT].flatten(1).numpy(), found.target[:HELD_OUT]))
        known = {tuple(sample["image_codes"][0].tolist()) for sample in learnt}
        repeated = sum(tuple(code) in known for code in chosen.flatten(0, 1).tolist())
        different = len(drawn.flatten(0, 1).flatten(1).unique(dim=0))
        metrics = {"vq_error": error, "loss_before": before, "loss_after": after, "train_seconds": seconds}
        metrics |= {"recognised": recognised, "recognised_real": on_real, "different": different, "repeated": repeated}
        save_metrics(args, metrics)
        path = Path(args.output_dir) / "draw.png"
        save_picture(drawn, path)
        print(f"\nmean square error of the VQ model's copies: {error:.3f} (images are between -1 and 1)")
        print(f"loss of held-out codes: {before:.3f} -> {after:.3f}, {seconds:.0f} s of training")
        print(f"drawings recognised: {recognised:.0%} of {len(asked)}; chance is 10 %")
        print(f"  {different} of them are different, {repeated} repeat a scan of the training")
        print(f"  the classifier recognises {on_real:.0%} of held-out scans")
        print(f"drawings: {path}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
