"""Put a small, untrained SigLIP encoder in front of a language model: a stock LLaVA checkpoint, without the Hub.

The language model keeps its weights; encoder and projector are random and have to be trained (`--train_encoder` of
`finetune_vlm.py`). With `--pretrain` the encoder first learns to tell the images of a folder apart by their answers,
so that only the projector is random, as when an encoder of the Hub meets a language model. The folder is like any on
the Hub: config, safetensors, processor with its chat template.

    python examples/make_vlm_checkpoint.py                   # images of 16 x 16 are 4 tokens; 272 MB
    python examples/make_vlm_checkpoint.py --image_size 64   # 64 tokens an image
    python examples/make_vlm_checkpoint.py --pretrain outputs/data/digits --output outputs/checkpoints/llava-digits
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from make_checkpoint import DEFAULT_OUTPUT as LANGUAGE_MODEL
from make_checkpoint import is_checkpoint, make_checkpoint, new_checkpoint, three_steps

DEFAULT_OUTPUT = "outputs/checkpoints/smollm2-135m-llava"
IMAGE_SIZE, PATCH = 16, 8
IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_processor(tokenizer: PreTrainedTokenizerBase, image_size: int) -> LlavaProcessor:
    """Images of one size, a token for each patch. Adds the placeholder of an image to `tokenizer`."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return LlavaProcessor(
        SiglipImageProcessorPil(size={"height": image_size, "width": image_size}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",  # SigLIP has no token of its own for the class
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def add_encoder(
    model: str | Path, processor: LlavaProcessor, image_size: int, seed: int = 0
) -> LlavaForConditionalGeneration:
    """A LLaVA with the weights of the language model `model`, in its type; the encoder's are random."""
    language_model = AutoModelForCausalLM.from_pretrained(model)
    language_model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    vision = SiglipVisionConfig(
        image_size=image_size,
        patch_size=PATCH,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language_model.config,
        image_token_index=processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(image_size // PATCH) ** 2,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        seeing = LlavaForConditionalGeneration(config).to(language_model.dtype)
    seeing.model.language_model.load_state_dict(language_model.model.state_dict())
    seeing.lm_head.load_state_dict(language_model.lm_head.state_dict())
    seeing.tie_weights()
    seeing.generation_config = language_model.generation_config
    return seeing


def pretrain_encoder(encoder: nn.Module, processor: LlavaProcessor, data: Path, epochs: int = 12) -> None:
    """Train the encoder, in place, to tell the images of `data`/train.jsonl apart by the answers of their chats.

    The linear layer that names the answers is thrown away. Chats with one image are used.

    Raises:
        ValueError: no such file.
    """
    if not (data / "train.jsonl").is_file():
        raise ValueError(f"`pretrain` ({data}) holds no train.jsonl: examples/digit_chats.py writes such a folder.")
    chats = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    chats = [chat for chat in chats if len(chat["images"]) == 1]
    pictures = [Image.open(data / chat["images"][0]) for chat in chats]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    answers = [json.dumps(chat["messages"][-1]["content"]) for chat in chats]
    names = {name: place for place, name in enumerate(sorted(set(answers)))}
    targets = torch.tensor([names[answer] for answer in answers])

    head, dtype = nn.Linear(encoder.config.hidden_size, len(names)), next(encoder.parameters()).dtype
    encoder.float()
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels)).split(64):
            logits = head(encoder(pixels[rows]).last_hidden_state.mean(1))
            nn.functional.cross_entropy(logits, targets[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    encoder.to(dtype)


def make_vlm_checkpoint(
    output: str | Path = DEFAULT_OUTPUT,
    model: str | Path = LANGUAGE_MODEL,
    image_size: int = IMAGE_SIZE,
    pretrain: str | Path | None = None,
) -> Path:
    """Write the model to `output`, all or nothing. One that is there already is kept.

    Args:
        model: checkpoint folder or Hub id of the language model; the demo's own is made if need be.
        image_size: height and width that every image is resized to.
        pretrain: a folder as `digit_chats.py` writes it, on which the encoder is trained first.

    Raises:
        ValueError: the disk is full, `output` holds something else, or the size is no multiple of a patch.
    """
    output = Path(output)
    if image_size % PATCH or image_size < PATCH:
        raise ValueError(f"`image_size` ({image_size}) must be a multiple of {PATCH}, the size of a patch.")
    if is_checkpoint(output):
        print(f"{output} is there already")
        return output
    if str(model) == LANGUAGE_MODEL:
        make_checkpoint(model)
    with new_checkpoint(output) as scratch, three_steps("read the language model") as bar:
        processor = make_processor(AutoTokenizer.from_pretrained(model), image_size)
        bar.update()
        seeing = add_encoder(model, processor, image_size)
        if pretrain is not None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                pretrain_encoder(seeing.model.vision_tower, processor, Path(pretrain))
        bar.update()
        bar.set_description("write safetensors")
        seeing.save_pretrained(scratch, max_shard_size="100GB")
        processor.save_pretrained(scratch)
        bar.update()
    print(f"{output}: images of {image_size} x {image_size} are {seeing.config.image_seq_length} tokens")
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=LANGUAGE_MODEL, help="language model (default: %(default)s)")
    parser.add_argument("--output", default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)")
    parser.add_argument("--image_size", type=int, default=IMAGE_SIZE, help="of all images (default: %(default)s)")
    parser.add_argument("--pretrain", help="train the encoder on this folder of images and chats first")
    arguments = parser.parse_args()
    try:
        make_vlm_checkpoint(arguments.output, arguments.model, arguments.image_size, arguments.pretrain)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
