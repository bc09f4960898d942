"""Processors of real families, made from parts without any download: a tokenizer of bytes, and small images."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Processor,
    Idefics3Processor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2AudioProcessor,
    SiglipImageProcessorPil,
    WhisperFeatureExtractor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
AUDIO = ("<|audio_bos|>", "<|audio_eos|>", "<|AUDIO|>")
CHAT = "<|im_start|>", "<|im_end|>"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
SOUND = "<|audio_bos|><|AUDIO|><|audio_eos|>"

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PICTURE{% elif part['type'] == 'audio' %}SOUND"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PICTURE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>"
    "{% endif %}\n{% endfor %}"
)


def chat_template(picture: str = PICTURE, marked: bool = False) -> str:
    """A template in the manner of Qwen's; `marked`: with {% generation %} around what the assistant says."""
    return (_MARKED if marked else _TEMPLATE).replace("PICTURE", picture).replace("SOUND", SOUND)


def byte_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """One token a byte, then the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [*CHAT, *special]})
    return tokenizer


class _PicturesOnly(Qwen2_5_VLProcessor):
    """Video processors need torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        token, video = "<|image_pad|>", "<|video_pad|>"
        self.image_token, self.image_token_id = token, tokenizer.convert_tokens_to_ids(token)
        self.video_token, self.video_token_id = video, tokenizer.convert_tokens_to_ids(video)
        super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)


def qwen_vl(patch_size: int = 4, marked: bool = False) -> Qwen2_5_VLProcessor:
    """Images of 4 to 64 tokens of 2 x 2 patches."""
    token = (2 * patch_size) ** 2
    images = Qwen2VLImageProcessorPil(patch_size=patch_size, min_pixels=4 * token, max_pixels=64 * token)
    return _PicturesOnly(images, byte_tokenizer(*QWEN), chat_template=chat_template(marked=marked))


def qwen_audio(seconds: int = 2) -> Qwen2AudioProcessor:
    """Audio of up to so many seconds at 16 kHz, 80 mel bins."""
    sounds = WhisperFeatureExtractor(feature_size=80, chunk_length=seconds)
    return Qwen2AudioProcessor(sounds, byte_tokenizer(*AUDIO), chat_template=chat_template())


def idefics() -> Idefics3Processor:
    """Images in tiles of 32 pixels, 4 tokens each."""
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    tokens = "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"
    tiles = [f"<row_{row}_col_{col}>" for row in range(1, 4) for col in range(1, 4)]
    return Idefics3Processor(images, byte_tokenizer(*tokens, *tiles), image_seq_len=4)


def gemma3() -> Gemma3Processor:
    """Images of 32 pixels, 4 tokens each."""
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = byte_tokenizer(*named.values())
    for name, token in named.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return Gemma3Processor(images, tokenizer, image_seq_length=4)


def llava_siglip() -> LlavaProcessor:
    """Images of 16 pixels, 4 tokens each. LLaVA's formula asks for the crop that CLIP's images get and SigLIP's do
    not (llava-interleave-qwen)."""
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return LlavaProcessor(images, byte_tokenizer("<image>"), 8, "full", image_token="<image>")


class _OneVisionPictures(LlavaOnevisionProcessor):
    """Video processors need torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.num_image_tokens, self.vision_feature_select_strategy = 16, "full"
        self.vision_aspect_ratio = "anyres_max_9"
        self.image_token, self.video_token = "<image>", "<video>"
        self.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        self.video_token_id = tokenizer.convert_tokens_to_ids("<video>")
        super(LlavaOnevisionProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)


def onevision() -> LlavaOnevisionProcessor:
    """An image alone in tiles of 32 pixels and 16 tokens, several of them whole."""
    pinpoints = [[32, 32], [32, 64], [64, 32], [64, 64], [32, 96]]
    images = LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints)
    return _OneVisionPictures(images, byte_tokenizer("<image>", "<video>"))
