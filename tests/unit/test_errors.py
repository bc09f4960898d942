"""What is not supported is an UnsupportedError; what is wrong by itself is a plain ValueError."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hf_veomni
from hf_veomni import ParallelPlan, UnsupportedError, prepare_omni
from hf_veomni.attention.mask import MaskSpec
from hf_veomni.errors import public_kind
from hf_veomni.fsdp.storage import check_no_scalars
from tests.models import build_model


def test_the_class_is_public_and_a_value_error():
    assert issubclass(UnsupportedError, ValueError)
    assert "UnsupportedError" in hf_veomni.__all__


@pytest.mark.parametrize(
    ("ask", "match"),
    [
        (lambda: ParallelPlan(pp_size=2, overlap="pairs"), r"`pp_size` \(2\)"),
        (lambda: prepare_omni(nn.Linear(2, 2), "sp=1"), r"`model` \(Linear\) must be a transformers PreTrainedModel"),
        (lambda: hf_veomni.compile_layers(build_model("openai-gpt")), "has no layers"),
    ],
)
def test_a_sound_wish_is_unsupported(ask, match):
    with pytest.raises(UnsupportedError, match=match):
        ask()


@pytest.mark.parametrize(
    "ask",
    [
        lambda: ParallelPlan(sp_size=0),
        lambda: ParallelPlan.from_string("sp=two"),
        lambda: prepare_omni(build_model("llama"), "sp=1", attention="fast"),
        lambda: prepare_omni(build_model("llama"), "sp=1", checkpoint="somewhere"),
    ],
)
def test_wrong_input_is_a_plain_value_error(ask):
    with pytest.raises(ValueError) as found:
        ask()
    assert type(found.value) is ValueError


def test_a_family_that_cannot_be_cut_trains_on_one_rank():
    """The lists of what is not there swallow refusals only: the model is prepared without them."""
    model = prepare_omni(build_model("openai-gpt"), "sp=1")
    assert model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.isfinite()


def test_a_mask_that_is_no_tensor_still_answers_hasattr():
    spec = MaskSpec(1, 4, lambda *_: True)
    assert not hasattr(spec, "dtype")
    with pytest.raises(UnsupportedError, match="uses its attention mask as a tensor"):
        _ = spec.dtype


def test_scalar_parameters_are_named():
    model = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.tensor(1.0))
    check_no_scalars(model, {model.scale})
    with pytest.raises(UnsupportedError, match="Parameter 'scale' is a scalar"):
        check_no_scalars(model, set())


class _Own(UnsupportedError):
    pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (_Own("x"), UnsupportedError),
        (UnicodeDecodeError("utf8", b"x", 0, 1, "x"), ValueError),
        (FileNotFoundError("x"), OSError),
        (KeyError("x"), RuntimeError),
    ],
)
def test_another_rank_raises_the_documented_class(error, kind):
    assert public_kind(error) is kind
