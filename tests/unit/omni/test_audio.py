"""Audio as codes of a codec: learnt, generated, written; and pooled features of input audio."""

from __future__ import annotations

import wave
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from transformers import AutoModel

from hf_veomni import OmniConfig, OmniModel, build_omni_model
from tests.unit.omni.parts import AUDIO_TOKEN, DAC, MIMI, SOUND_TOKEN, WHISPER, build, settings, speaking, text_row

CODES = MIMI["codebook_size"]


def _row(model: OmniModel) -> dict[str, Tensor]:
    codes = model.decoders["audio"].lm_encode(torch.randn(2, 80, generator=torch.Generator().manual_seed(4)))
    marks = torch.full_like(codes, SOUND_TOKEN)
    ids = torch.cat([torch.arange(3, 9).view(2, 3), marks, torch.tensor([[7], [8]])], 1)
    return {"input_ids": ids, "labels": ids.clone(), "audio_codes": codes}


@pytest.mark.parametrize("codec", [MIMI, DAC], ids=["mimi", "dac"])
def test_codes_and_back(codec: dict) -> None:
    decoder = build(speaking(codec)).eval().decoders["audio"]
    sounds = torch.randn(3, 160)
    codes = decoder.lm_encode(sounds)
    frames = 160 // decoder.frame_size
    assert codes.shape == (3, 2 * frames)
    assert bool((codes[:, 1::2] >= CODES).all()) and bool((codes[:, ::2] < CODES).all())
    plain = torch.stack([codes[:, ::2], codes[:, 1::2] - CODES], 1)
    assert torch.equal(plain, decoder.vq.encode(sounds[:, None]).audio_codes)
    back = decoder.decode(codes)
    assert torch.equal(back, decoder.vq.decode(audio_codes=plain).audio_values.view(3, 160))
    assert torch.equal(decoder.lm_encode(sounds[:, None]), codes)


def test_loss_is_that_of_both_heads() -> None:
    model = build(speaking(loss_weight=0.5))
    batch = _row(model)
    out = model(**batch)
    count = batch["labels"][:, 1:].numel()
    at = batch["input_ids"][:, 1:] == SOUND_TOKEN
    text = F.cross_entropy(out.logits[:, :-1][~at], batch["labels"][:, 1:][~at], reduction="sum")
    codes = F.cross_entropy(out.audio_logits[:, :-1][at], batch["audio_codes"].flatten(), reduction="sum")
    torch.testing.assert_close(out.loss, (text + 0.5 * codes) / count)
    out.loss.backward()
    assert model.decoders["audio"].head.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in model.decoders["audio"].vq.parameters())


def test_generated_sound_equals_step_by_step_and_is_written(tmp_path: Path) -> None:
    model = build(speaking()).eval()
    prompts = text_row(rows=2, length=4)["input_ids"]
    codes, sounds = model.generate_audio(prompts, path=tmp_path / "said.wav")
    decoder = model.decoders["audio"]
    assert codes.shape == (2, 10) and sounds.shape == (2, 5 * decoder.frame_size)
    ids, given = prompts, prompts.new_zeros(2, 0)
    with torch.no_grad():
        for place in range(10):
            logits = model(input_ids=ids, audio_codes=given).audio_logits[:, -1]
            first = CODES * (place % 2)
            given = torch.cat([given, logits[:, first : first + CODES].argmax(-1, keepdim=True) + first], 1)
            ids = torch.cat([ids, torch.full((2, 1), SOUND_TOKEN)], 1)
    assert torch.equal(codes, given)
    for number in range(2):
        with wave.open(str(tmp_path / f"said-{number}.wav")) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (8000, 1, 2)
            samples = torch.frombuffer(bytearray(file.readframes(10**6)), dtype=torch.int16)
        assert (samples / 32767 - sounds[number].clamp(-1, 1)).abs().max() < 1e-4
    hidden = torch.randn(2, 10, 32)
    assert decoder.lm_generate(hidden).shape == sounds.shape
    assert model.generate_audio(prompts, frames=2)[0].shape == (2, 4)


def test_saved_and_opened(tmp_path: Path) -> None:
    model = build(speaking(DAC)).eval()
    model.decoders["audio"].vq.save_pretrained(tmp_path / "codec")
    model.save_pretrained(tmp_path / "whole")
    opened, info = AutoModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert type(opened) is OmniModel and not any(info.values())
    batch = _row(model)
    assert torch.equal(opened.eval()(**batch).loss, model(**batch).loss)
    part = {"checkpoint": str(tmp_path / "codec"), "token_id": SOUND_TOKEN}
    built = build_omni_model(speaking() | {"decoders": {"audio": part}})
    for name, value in model.decoders["audio"].vq.state_dict().items():
        assert torch.equal(value, built.decoders["audio"].vq.state_dict()[name]), name


def test_pooled_features_are_means_of_neighbours() -> None:
    longer = {"config": {**WHISPER, "max_source_positions": 6}, "projector": "linear"}
    model, plain = build(audio={**longer, "pool": 2}), build(audio=longer)
    sounds = torch.randn(2, 8, 12)
    features = plain.encoders["audio"].lm_encode(sounds)
    pooled = model.encoders["audio"].lm_encode(sounds)
    torch.testing.assert_close(pooled, (features[:, ::2] + features[:, 1::2]) / 2)
    assert model.encoders["audio"].count_tokens(sounds) == 6
    ids = torch.tensor([[3, *[AUDIO_TOKEN] * 3, 4]] * 2)
    assert model(input_ids=ids, input_features=sounds).logits.shape == (2, 5, 97)


def test_config_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "speaks.yaml").write_text(yaml.safe_dump(speaking(DAC)))
    torch.manual_seed(0)
    read = build_omni_model(tmp_path / "speaks.yaml")
    torch.manual_seed(0)
    given = build_omni_model(speaking(DAC))
    assert read.config.to_dict() == given.config.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), given.parameters(), strict=True))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (speaking(frames=0), r"`decoders.audio.frames` \(0\) must be an integer from 1"),
        (speaking(pool=2), "Unknown key 'pool' in `decoders.audio`"),
        (speaking({"model_type": "llama"}), "must be of type 'mimi' or 'dac', not 'llama'"),
        (settings(audio={"pool": 2}), r"`pool` \(2\) must divide the 5 features"),
        (settings(vision={"pool": 2}), "Unknown key 'pool' in `encoders.vision`"),
        (
            settings() | {"decoders": {"audio": {"config": MIMI, "token_id": 91}}},
            r"`token_id` \(91\) stands for audio",
        ),
    ],
)
def test_refuses(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_omni_model(OmniConfig(**config))


def test_refuses_wrong_shapes_and_codes() -> None:
    decoder = build(speaking()).decoders["audio"]
    with pytest.raises(ValueError, match=r"\[N, samples\] or \[N, 1, samples\]"):
        decoder.lm_encode(torch.zeros(1, 2, 16))
    with pytest.raises(ValueError, match=r"must be \[N, frames \* 2\]"):
        decoder.decode(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="place i holds a code of codebook i % 2"):
        decoder.decode(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="has no audio decoder"):
        build().generate_audio(torch.tensor([[3]]))
