"""Generation by a prepared model: every rank of an SP group runs full rows and finds what the stock model finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import build_model, packed_batch


def _generate(lora: bool, options: dict[str, Any]) -> list[bool]:
    from hf_veomni import gather_sequence, prepare_omni
    from tests.ranks.parity import Setting, make_model

    ids = packed_batch((7,))["input_ids"]
    mask = torch.ones_like(ids)
    if options.pop("padded", False):
        ids, mask = ids.repeat(2, 1), mask.repeat(2, 1)
        ids[1, :3], mask[1, :3] = 0, 0
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, **options}
    model = make_model(Setting("llama", lora=lora)).eval()
    wanted = model.generate(input_ids=ids, attention_mask=mask, **options)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    prepare_omni(model, "sp=2")
    got = model.generate(input_ids=ids, attention_mask=mask, **options)
    with torch.no_grad():  # afterwards rows are cut again
        found = gather_sequence(model(ids, attention_mask=mask).logits, model)
    scores = zip(got.scores or (), wanted.scores or (), strict=True)
    close = all(torch.allclose(*pair, atol=1e-5) for pair in scores)
    return [torch.equal(got.sequences, wanted.sequences), close, torch.allclose(found[:1], logits[:1], atol=1e-5)]


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize(
    "options",
    [
        {"output_scores": True},
        {"use_cache": False, "output_scores": True},
        {"use_cache": False, "padded": True},
        {"padded": True},
        {"num_beams": 3, "padded": True},
        {"num_beams": 3, "use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda options: ",".join(options),
)
def test_generate_equals_the_stock_model(ranks, options, lora):
    assert ranks(2).run(_generate, lora, options, timeout=60) == [[True] * 3] * 2


_SMALL = {"vocab_size": 97, "d_model": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}


def _encoder_decoder(family: str) -> Any:
    import transformers

    torch.manual_seed(0)
    options = {**_SMALL, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    if family == "T5":
        options |= {"num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64}
    else:
        options |= {**_HEADS, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    if family == "Whisper":
        options |= {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 40}
    config = getattr(transformers, f"{family}Config")(**options)
    return getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()


def _generate_from_encoder(family: str, plan: str, options: dict[str, Any]) -> list[bool]:
    from hf_veomni import prepare_omni

    model = _encoder_decoder(family)
    ids = packed_batch((7,))["input_ids"].repeat(2, 1)
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family == "Whisper":
        inputs = {"input_features": torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))}
    wanted = model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)
    prepare_omni(model, plan)
    got = model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)  # before any other forward
    with torch.no_grad():
        model(**inputs, decoder_input_ids=wanted[:, :3])
    again = model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)
    return [torch.equal(got, wanted), torch.equal(again, wanted)]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["", "beams"])
@pytest.mark.parametrize("plan", ["sp=2", "dp_shard=2"])
@pytest.mark.parametrize("family", ["Bart", "T5", "MBart", "Mvp", "Whisper"])
def test_encoder_decoders_generate_as_the_stock_model(ranks, family, plan, options):
    assert ranks(2).run(_generate_from_encoder, family, plan, options, timeout=60) == [[True] * 2] * 2


def _call_inside() -> list[tuple[int, ...]]:
    """A bare backbone and a model are called in a cached call of another, before its backbone and in a layer."""
    from hf_veomni import prepare_omni

    ids = packed_batch((15,))["input_ids"]
    outer, inner = (prepare_omni(build_model(name).eval(), "sp=2") for name in ("qwen3", "llama"))
    stack = prepare_omni(build_model("llama").model.eval(), "sp=2")
    shapes = []

    def call(*_: Any) -> None:
        shapes.append(tuple(stack(input_ids=ids).last_hidden_state.shape))
        shapes.append(tuple(inner(input_ids=ids).logits.shape))

    outer.register_forward_pre_hook(call)
    outer.model.layers[1].register_forward_pre_hook(call)
    with torch.no_grad():
        shapes.append(tuple(outer(input_ids=ids, use_cache=True).logits.shape))
        shapes.append(tuple(outer.generate(ids, max_new_tokens=1, use_cache=False).shape))
        shapes.append(tuple(outer(input_ids=ids).logits.shape))
    return shapes


def test_calls_of_two_models_inside_each_other_do_not_mix(ranks):
    inside = [(1, 8, 64), (1, 8, 97)] * 2
    for shapes in ranks(2).run(_call_inside):
        assert shapes == [*inside, (1, 15, 97), *inside, (1, 16), *inside, (1, 8, 97)]
