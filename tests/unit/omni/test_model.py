"""`OmniModel` against its bare parts and against computations by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from hf_veomni import FoundationMixin, OmniModel, build_omni_model, detach_omni, prepare_omni
from tests.unit.omni.parts import AUDIO_TOKEN, IMAGE_TOKEN, TEXT, VISION_TOKEN, build, mixed_row, settings, text_row


def test_rows_of_text_equal_the_bare_foundation() -> None:
    model, batch = build(), text_row()
    omni, bare = model(**batch), model.foundation(**batch)
    assert torch.equal(omni.logits, bare.logits)
    assert torch.equal(omni.loss, bare.loss)


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "mixtral"])
def test_foundations_keep_what_they_do_to_logits_and_losses(kind: str) -> None:
    torch.manual_seed(0)
    extra = {
        "gemma2": {"head_dim": 8, "final_logit_softcapping": 0.05},
        "cohere": {"logit_scale": 0.3},
        "mixtral": {"num_local_experts": 2, "output_router_logits": True, "head_dim": 8},
    }[kind]
    model = build_omni_model({"foundation": {"config": {**TEXT, "model_type": kind, **extra}}})
    omni, bare = model(**text_row()), model.foundation(**text_row())
    assert torch.equal(omni.logits, bare.logits)
    assert torch.equal(omni.loss, bare.loss)


def test_placeholders_are_replaced_in_order() -> None:
    model, batch = build().eval(), mixed_row()
    ids = batch["input_ids"]
    wanted = model.get_input_embeddings()(ids).clone()
    vision, audio, image = model.encoders["vision"], model.encoders["audio"], model.decoders["image"]
    seen = vision.projector(vision.tower(batch["pixel_values"]).last_hidden_state)
    wanted[0, 3:7] = seen[0]
    wanted[0, 9:14] = audio.projector(audio.tower(batch["input_features"]).last_hidden_state)[0]
    wanted[0, 18:34] = image.embed(batch["image_codes"])[0]
    features = {key: batch[key] for key in ("pixel_values", "input_features", "image_codes")}
    assert torch.equal(model.embed_inputs(ids, features), wanted)
    assert not torch.equal(model(**batch).logits, model.foundation(input_ids=ids).logits)


def test_losses_of_text_and_codes_by_hand() -> None:
    model, batch = build(image={"loss_weight": 0.3}), mixed_row()
    out = model(**batch)
    ids, labels = batch["input_ids"], batch["labels"]
    losses = []
    for i in range(1, ids.shape[1]):
        if labels[0, i] == IMAGE_TOKEN:
            losses.append(0.3 * F.cross_entropy(out.image_logits[0, i - 1], batch["image_codes"][0, i - 18]))
        elif labels[0, i] != -100:
            losses.append(F.cross_entropy(out.logits[0, i - 1], ids[0, i]))
    assert len(losses) == 2 + 2 + 4 + 16 + 3
    torch.testing.assert_close(out.loss, torch.stack(losses).mean())
    torch.testing.assert_close(model(**batch, num_items_in_batch=5).loss, torch.stack(losses).sum() / 5)
    batch["labels"] = labels.masked_fill(ids == IMAGE_TOKEN, -100)  # an image that is not learnt
    rest = torch.stack(losses[:8] + losses[24:])
    torch.testing.assert_close(model(**batch).loss, rest.mean())


def _gradients(model: OmniModel, batch: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_gradients_reach_every_part() -> None:
    gradients = _gradients(build(), mixed_row())
    for name, gradient in gradients.items():
        if name.startswith("decoders.image.vq") or name.endswith("audio.tower.embed_positions.weight"):
            assert gradient is None, name  # not trained: the VQ model, and Whisper's fixed positions
        elif not name.endswith("k_proj.bias"):  # which shifts all scores alike
            assert gradient is not None and gradient.abs().max() > 0, name


def test_frozen_parts_get_no_gradient() -> None:
    model = build(foundation={"freeze": True}, vision={"freeze": True}, image={"freeze": True})
    gradients = _gradients(model, mixed_row())
    frozen = ("foundation", "encoders.vision.tower", "decoders.image")
    for name, gradient in gradients.items():
        assert not name.startswith(frozen) or gradient is None, name
    assert gradients["encoders.vision.projector.0.weight"].abs().max() > 0
    assert not model.encoders["vision"].tower.training
    assert model.encoders["audio"].tower.training


def test_a_missing_modality_gives_zeros() -> None:
    model = build(vision={"freeze": True})
    for name, gradient in _gradients(model, text_row()).items():
        if name.startswith(("encoders", "decoders")):
            trained = model.get_parameter(name).requires_grad
            assert gradient is None if not trained else torch.equal(gradient, torch.zeros_like(gradient)), name
        else:
            assert gradient.abs().max() > 0, name


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("pixel_values", rf"vision: `input_ids` hold 4 placeholders \(token {VISION_TOKEN}\), and .* gives 8 tokens"),
        ("input_features", rf"audio: `input_ids` hold 5 placeholders \(token {AUDIO_TOKEN}\), and .* gives 10 tokens"),
        ("image_codes", rf"image: `input_ids` hold 16 placeholders \(token {IMAGE_TOKEN}\), and .* gives 32 tokens"),
    ],
)
def test_counts_that_differ_are_named_before_a_part_runs(key: str, message: str) -> None:
    model, batch = build(), mixed_row()
    batch[key] = batch[key].repeat(2, *(1 for _ in batch[key].shape[1:]))
    ran: list[Any] = []
    for part in model.modules():
        part.register_forward_pre_hook(lambda module, args: ran.append(module))
    with pytest.raises(ValueError, match=message):
        model(**batch)
    assert ran == [model]
    del batch[key]
    with pytest.raises(ValueError, match="gives 0 tokens"):
        model(**batch)


def test_features_without_a_part_are_refused() -> None:
    model = build_omni_model({"foundation": {"config": TEXT}})
    with pytest.raises(ValueError, match="`pixel_values` has no part in this model"):
        model(**text_row(), pixel_values=torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="no image decoder"):
        model.generate_image(text_row()["input_ids"])


def test_pictures_to_codes_and_back() -> None:
    decoder = build().decoders["image"]
    pictures = torch.rand(2, 3, 8, 8)
    codes = decoder.lm_encode(pictures)
    assert codes.shape == (2, 16) and codes.unique().numel() > 1
    assert torch.equal(codes[1:], decoder.lm_encode(pictures[1:]))
    assert decoder.decode(codes).shape == pictures.shape
    hidden = torch.randn(2, 16, 32)
    logits, loss = decoder.lm_head(hidden, codes)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), codes.flatten()))
    assert torch.equal(decoder.lm_embed(hidden), decoder.embed(logits.argmax(-1)))
    assert torch.equal(decoder.lm_generate(hidden), decoder.decode(logits.argmax(-1)))
    with pytest.raises(ValueError, match=r"must be \[N, channels, 8, 8\]"):
        decoder.lm_encode(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"must be \[N, 16\]"):
        decoder.decode(codes[:, :4])


def test_generation_with_a_cache_equals_that_without() -> None:
    model, batch = build().eval(), mixed_row()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**inputs, **options)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
    assert cached.shape[1] == inputs["input_ids"].shape[1] + 6
    head = model.get_output_embeddings().weight.data
    head[VISION_TOKEN] = 2 * head[cached[0, -6]]  # now the likeliest
    with pytest.raises(ValueError, match="hold 1 placeholders"):
        model.generate(**inputs, **options, suppress_tokens=[AUDIO_TOKEN])
    assert VISION_TOKEN not in model.generate(**inputs, **options)[0, -6:]


def test_beams_need_one_item_in_each_prompt() -> None:
    model, ids = build().eval(), text_row()["input_ids"]
    ids[:, 2:6] = VISION_TOKEN
    pictures = torch.randn(2, 3, 8, 8)
    options = {"max_new_tokens": 3, "num_beams": 2, "num_return_sequences": 2, "do_sample": False}
    both = model.generate(input_ids=ids, pixel_values=pictures, **options)
    alone = [model.generate(input_ids=ids[i : i + 1], pixel_values=pictures[i : i + 1], **options) for i in range(2)]
    assert torch.equal(both, torch.cat(alone))
    ids[:, 6:10] = VISION_TOKEN
    with pytest.raises(ValueError, match="`pixel_values` has 4 items for 2 prompts: beams"):
        model.generate(input_ids=ids, pixel_values=torch.randn(4, 3, 8, 8), **options)
    ids[1, 2:10] = 5
    with pytest.raises(ValueError, match="one item in each prompt"):
        model.generate(input_ids=ids, pixel_values=pictures, **options)


def test_shifted_labels_are_refused_beside_codes() -> None:
    batch = mixed_row()
    with pytest.raises(ValueError, match="`shift_labels` cannot be split"):
        build()(**batch, shift_labels=batch["labels"])


def test_drawn_codes_are_those_that_a_full_row_predicts() -> None:
    model = build().eval()
    prompts = text_row()["input_ids"]
    codes, pictures = model.generate_image(prompts)
    assert codes.shape == (2, 16) and pictures.shape == (2, 3, 8, 8)
    ids = torch.cat([prompts, torch.full_like(codes, IMAGE_TOKEN)], 1)
    predicted = model(input_ids=ids, image_codes=codes).image_logits[:, prompts.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(codes, predicted)
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    one, same, other = (model.generate_image(prompts, do_sample=True, generator=seed)[0] for seed in seeds)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_prepared_in_one_process_it_trains_the_same() -> None:
    for batch in (mixed_row(), text_row()):
        model, prepared = build(), prepare_omni(build(), "")
        assert type(prepared.loss_function).__name__ == "CausalLMLoss"  # the chunked one
        wanted, found = _gradients(model, batch), _gradients(prepared, batch)
        torch.testing.assert_close(prepared(**batch).loss, model(**batch).loss)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, msg=name)
        detach_omni(prepared)


def test_the_sharding_plan_is_the_foundations() -> None:
    model = build()
    assert model.fsdp_plan == {f"foundation.{name}": style for name, style in model.foundation.fsdp_plan.items()}


def test_lora_on_the_foundation() -> None:
    model = get_peft_model(build(), LoraConfig(r=2, target_modules=r"foundation\..*\.(q|v)_proj"))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("foundation" in name and "lora_" in name for name in trained)
    model(**mixed_row()).loss.backward()
    assert all(model.get_parameter(name).grad is not None for name in trained)


def test_a_foundation_of_ones_own_numbers_positions() -> None:
    from transformers import LlamaForCausalLM

    class Doubled(FoundationMixin, LlamaForCausalLM):
        def get_pos_id(self, input_ids, attention_mask=None, **features):
            return 2 * super().get_pos_id(input_ids)

    class Mine(OmniModel):
        foundation_class: type[PreTrainedModel] | None = Doubled

    model, stock = Mine(build().config), build()
    model.load_state_dict(stock.state_dict())
    ids = text_row()["input_ids"]
    wanted = stock.eval()(input_ids=ids, position_ids=2 * torch.arange(ids.shape[1])[None]).logits
    assert torch.equal(model.eval()(input_ids=ids).logits, wanted)


def test_other_vision_towers_count_their_class_token() -> None:
    clip = {**settings()["encoders"]["vision"]["config"], "model_type": "clip_vision_model"}
    model = build_omni_model(settings(vision={"config": clip, "projector": "linear"}))
    encoder, pictures = model.encoders["vision"], torch.rand(2, 3, 8, 8)
    assert encoder.lm_encode(pictures).shape == (2, 5, 32)
    assert encoder.count_tokens(pictures) == 10
