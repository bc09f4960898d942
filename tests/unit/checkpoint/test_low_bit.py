"""Moments in codes and scales on disk: as fp32, and back in the same codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_veomni.checkpoint.low_bit import fill, is_low_bit
from hf_veomni.checkpoint.shards import ShardReader, read_state, write_state
from tests.models import build_model

BLOCK = 256


class Coded(Tensor):
    """As torchao's OptimState8bit and OptimState4bit: 256 or 16 codes, blocks of 256."""

    codes: Tensor
    scale: Tensor
    qmap: Tensor
    signed: bool
    block_size: int

    @staticmethod
    def __new__(cls, values: Tensor, bits: int, signed: bool) -> Coded:
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)  # type: ignore[attr-defined]
        ends = (-0.9, 1.0) if signed else (0.0, 1.0)
        made.qmap, made.signed, made.block_size = torch.linspace(*ends, 2**bits), signed, BLOCK
        blocks = values.float().reshape(-1, BLOCK)
        made.scale = blocks.abs().amax(1).clip(1e-12)  # as torchao's own rounding
        codes = (blocks / made.scale[:, None] - made.qmap[:, None, None]).abs().argmin(0).to(torch.uint8).reshape(-1)
        made.codes = codes.view(values.shape) if bits == 8 else (codes[::2] << 4) | codes[1::2]
        return made

    def dequantize(self) -> Tensor:
        codes = self.codes.reshape(-1)
        if codes.numel() < self.numel():
            codes = torch.stack([codes >> 4, codes & 15], dim=-1).reshape(-1)
        return (self.qmap[codes.int()].view(-1, BLOCK) * self.scale[:, None]).view(self.shape)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def _values(signed: bool, seed: int = 0) -> Tensor:
    """Blocks whose largest element is negative, positive, and none at all."""
    values = torch.randn(8, 128, generator=torch.Generator().manual_seed(seed)).mul(1e-3)
    values[0, 5], values[2, 7], values[6:] = -1.0, 2.0, 0.0
    return values if signed else values.abs()


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_and_scales_come_back_from_a_file(tmp_path: Path, bits: int, signed: bool) -> None:
    written, found = Coded(_values(signed), bits, signed), Coded(_values(signed, 1), bits, signed)
    assert is_low_bit(written) and not torch.equal(found.codes, written.codes)
    write_state({"moment": written}, tmp_path)
    with ShardReader(tmp_path) as reader:  # plain numbers, for anybody
        assert torch.equal(reader.read("moment", (slice(0, 8), slice(0, 128))), written.dequantize())
    read_state({"moment": found}, tmp_path, "the state")
    torch.testing.assert_close(found.scale, written.scale, rtol=2e-7, atol=0)
    torch.testing.assert_close(found.dequantize(), written.dequantize(), rtol=2e-7, atol=1e-12)


def test_other_blocks_round_to_half_a_step() -> None:
    """As under a plan whose shards begin elsewhere."""
    values = _values(True, 2)
    coded = Coded(torch.zeros(8, 128), 8, True)
    fill(coded, values)
    steps = coded.scale[:, None] * (coded.qmap[1] - coded.qmap[0])
    off = (coded.dequantize() - values).reshape(-1, BLOCK).abs()
    assert (off <= steps / 2 * (1 + 1e-4)).all() and off.max() > 0


def test_parts_in_codes_and_plain_ones_make_one_tensor(tmp_path: Path) -> None:
    """Of a bf16 parameter torchao keeps small shards in bf16."""
    import json

    from safetensors.torch import save_file

    from hf_veomni.checkpoint.shards import INDEX, shard_name

    plain, coded = torch.full((2,), 0.5, dtype=torch.bfloat16), torch.tensor([1 / 3, 2 / 3])
    for rank, part in enumerate((plain, coded)):
        info = json.dumps({"w": {"saved_offsets": [2 * rank]}})
        save_file({"w": part}, tmp_path / shard_name(rank), {"DCP_SHARDING_INFO": info})
    (tmp_path / INDEX).write_text(json.dumps({"version": 1, "files": 2, "shapes": {"w": [4]}, "values": {}}))
    with ShardReader(tmp_path) as reader:
        assert torch.equal(reader.read("w", (slice(0, 4),)), torch.cat([plain.float(), coded]))


def test_codes_of_the_stock_trainer_are_refused(tmp_path: Path) -> None:
    low_bit = pytest.importorskip("torchao.optim.subclass_8bit")
    from hf_veomni.checkpoint import load_stock_optimizer
    from hf_veomni.errors import UnsupportedError

    model: Any = build_model("llama")
    optimizer = torch.optim.AdamW([model.lm_head.weight])
    moments = {"step": torch.tensor(1.0), "exp_avg": low_bit.OptimState8bit.zeros((BLOCK, BLOCK))}
    groups = optimizer.state_dict()["param_groups"]
    torch.save({"state": {0: moments}, "param_groups": groups}, tmp_path / "optimizer.pt")
    with pytest.raises(UnsupportedError, match="moments in few bits.*begin a new run from the weights"):
        load_stock_optimizer(model, optimizer, tmp_path / "optimizer.pt")
