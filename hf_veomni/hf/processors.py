"""Private and structural names of transformers' processors and chat templates, each behind one function."""

from __future__ import annotations

import inspect


def template_variables(template: str) -> frozenset[str]:
    """Names that a chat template reads and does not set."""
    from jinja2 import meta
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(template).environment
    return frozenset(meta.find_undeclared_variables(environment.parse(template)))


def count_multimodal_tokens(processor: object, modality: str, size: object) -> tuple[int, int | None] | None:
    """Tokens and patches (or tiles) of an "image" (height, width) or "audio" (samples) by the processor's own formula;
    None if it has none."""
    name = {"image": "image_sizes", "audio": "audio_lengths"}[modality]
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is None or name not in inspect.signature(count).parameters:
        return None
    found = count(**{name: [size]})
    patches = found.num_image_patches if modality == "image" else None
    return int(getattr(found, f"num_{modality}_tokens")[0]), None if patches is None else int(patches[0])
