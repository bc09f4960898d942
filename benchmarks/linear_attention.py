"""What a rank sends and computes in linear attention at sp = 1, 2, 4: by the adapters, and by the rule `sp: gather`.

    python -m benchmarks linear_attention     # gloo ranks on the CPU; counts do not depend on the device

Stacks of linear layers alone, one for each scheme, on two rows: packed documents, and one document of the full row.
Counted in one training step, for each rank, and divided by the layers:

    projected   tokens through the mixer's input projection
    scanned     tokens x heads (channels) that the family's scan or convolution is called with
    sent        bytes that leave the rank over the SP group, forward and backward

With s = S/sp tokens on a rank, a head's widths q, k, v and so on, and 4 bytes an element, `sent` follows the formulas
of `expected_bytes` to the byte. An adapter projects s tokens and scans 1/sp of the heads; `gather` projects and scans
full documents, as far as a rank needs them: up to sp times as much.

Exit status 1 if `sent` differs from its formula, an adapter projects or scans more than its share (scans: but for what
fills chunks up), or the loss differs from that of sp = 1 by more than 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks._record import record
from benchmarks._rows import packed_row, ragged_lengths
from hf_veomni import prepare_omni
from hf_veomni.comm.gather import ALL_GATHER, REDUCE_SCATTER

VOCABULARY, HIDDEN, LAYERS, HEADS, GROUPS, STATE, KERNEL, CHUNK = 512, 128, 2, 8, 4, 16, 4, 64
WIDTH = 2 * HIDDEN // HEADS  # of a head, where a family doubles the hidden size
INNER = 2 * HIDDEN
TOLERANCE = 1e-5

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HIDDEN // HEADS,
    "pad_token_id": 0,
}
_LINEAR = {"layer_types": ["linear_attention"] * LAYERS}
_MAMBA2 = {"num_heads": HEADS, "head_dim": WIDTH, "n_groups": GROUPS, "state_size": STATE, "chunk_size": CHUNK}
_DELTA = {
    "linear_num_key_heads": GROUPS,
    "linear_num_value_heads": HEADS,
    "linear_key_head_dim": STATE,
    "linear_value_head_dim": WIDTH,
}


@dataclass(frozen=True)
class Family:
    """One scheme. Widths in elements a token: `assigned` goes to one rank, `shared` to every one, `back` returns."""

    model_type: str
    config: dict[str, Any]
    mixer: str
    projection: str
    function: str  # of the modelling file, which scans
    size: Callable[[Any], int]  # tokens x heads of one call, by its arguments
    assigned: int = 0
    shared: int = 0
    back: int = 0
    convolved: int = 0
    tables: int = 0  # what the layer hands the mixer besides, without gradient


FAMILIES = {
    "gated delta rule": Family(
        "qwen3_5_text", {**_DELTA, **_LINEAR}, "linear_attn", "in_proj_qkv", "torch_chunk_gated_delta_rule",
        lambda a: a[2].shape[:3].numel(),
        assigned=2 * GROUPS * STATE + HEADS * (WIDTH + 2), back=HEADS * WIDTH, convolved=2 * GROUPS * STATE + INNER,
    ),
    "Mamba-2": Family(
        "mamba2", {**_MAMBA2, "expand": 2}, "mixer", "in_proj", "mamba2_chunk_scan",
        lambda a: a[0].shape[:3].numel(),
        assigned=HEADS * (WIDTH + 1) + 2 * GROUPS * STATE, back=INNER, convolved=INNER + 2 * GROUPS * STATE,
    ),
    "Mamba-1": Family(
        "mamba", {"state_size": STATE, "expand": 2}, "mixer", "in_proj", "mamba_selective_scan",
        lambda a: a[0].numel(),
        assigned=3 * INNER, shared=2 * STATE, back=INNER, convolved=INNER,
    ),
    "lightning": Family(
        "minimax", {**_LINEAR, "num_local_experts": 2}, "self_attn", "qkv_proj", "apply_mask_to_padding_states",
        lambda a: a[0].numel() // (3 * HIDDEN // HEADS),
        assigned=3 * HIDDEN, back=HIDDEN, tables=2 * HIDDEN // HEADS,
    ),
    "short convolution": Family(
        "lfm2", {"layer_types": ["conv"] * LAYERS, "conv_L_cache": KERNEL}, "conv", "in_proj", "causal_conv1d_fn",
        lambda a: a[0].numel(), convolved=HIDDEN,
    ),
}  # fmt: skip


def expected_bytes(family: Family, scheme: str, tokens: int, sp_size: int) -> float:
    """Bytes that leave a rank, a layer and step: the forward's, and as many in the backward."""
    part, others = tokens // sp_size, sp_size - 1
    if scheme == "gather":
        return 4 * others * part * (2 * HIDDEN + family.tables)
    exchanged = part * ((family.assigned + family.back) * others / sp_size + family.shared * others)
    return 2 * 4 * (exchanged + others * (KERNEL - 1) * family.convolved)


class _Counting:
    """torch.distributed as `hf_veomni.comm` sees it, which FSDP does not use: counts what leaves this rank."""

    def __init__(self) -> None:
        self.sent = 0

    def __getattr__(self, name: str) -> Any:
        function = getattr(dist, name)
        if name not in ("all_to_all_single", ALL_GATHER, REDUCE_SCATTER):
            return function

        def counting(output: Tensor, given: Tensor, *splits: Any, group: dist.ProcessGroup, **options: Any) -> Any:
            size, mine = dist.get_world_size(group), dist.get_rank(group)
            if name == ALL_GATHER:
                self.sent += given.nbytes * (size - 1)
            else:
                own = splits[1][mine] * given[:1].nbytes if splits else output.nbytes
                self.sent += given.nbytes - own
            return function(output, given, *splits, group=group, **options)

        return counting


@contextmanager
def counted_bytes() -> Iterator[_Counting]:
    """Bytes that leave this rank over the SP group."""
    counting = _Counting()
    spaces = [sys.modules[f"hf_veomni.comm.{name}"] for name in ("all_to_all", "gather")]
    for space in spaces:
        setattr(space, "dist", counting)  # noqa: B010
    try:
        yield counting
    finally:
        for space in spaces:
            setattr(space, "dist", dist)  # noqa: B010


@contextmanager
def counted_tokens(family: Family, space: Any, model: nn.Module) -> Iterator[dict[str, int]]:
    """Tokens through the projections and the scans of all layers. Enter it before `prepare_omni`."""
    found = {"projected": 0, "scanned": 0}
    original = getattr(space, family.function)

    def counting(*args: Any, **options: Any) -> Any:
        found["scanned"] += family.size(args)
        return original(*args, **options)

    def project(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found["projected"] += args[0].shape[:-1].numel()

    handles = [m.register_forward_pre_hook(project) for n, m in model.named_modules() if n.endswith(family.projection)]
    setattr(space, family.function, counting)
    try:
        yield found
    finally:
        if getattr(space, family.function) is counting:
            setattr(space, family.function, original)
        for handle in handles:
            handle.remove()


def step(name: str, scheme: str, lengths: list[int], sp_size: int) -> dict[str, Any]:
    """One forward and backward of a fresh model on this rank."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.model_type, **{**_COMMON, **family.config})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    rules = {f"*.{family.mixer}": {"sp": "gather"}} if scheme == "gather" else {}
    row = packed_row(lengths, VOCABULARY)
    with counted_tokens(family, sys.modules[type(model).__module__], model) as tokens:
        prepare_omni(model, {"sp_size": sp_size, "modules": rules})
        with counted_bytes() as bytes_sent:
            loss = model(**row).loss
            loss.backward()
    return {"loss": loss.item(), "sent": bytes_sent.sent / LAYERS, **{key: n / LAYERS for key, n in tokens.items()}}


def work(rank: int, folder: str, rows: dict[str, list[int]], sp_size: int) -> None:
    torch.set_num_threads(1)
    if sp_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{sp_size}", rank=rank, world_size=sp_size)
    schemes = ["adapter", "gather"] if sp_size > 1 else ["adapter"]
    found = {
        f"{name}/{row}/{scheme}": step(name, scheme, lengths, sp_size)
        for name in FAMILIES
        for row, lengths in rows.items()
        for scheme in schemes
    }
    Path(folder, f"{sp_size}-{rank}.json").write_text(json.dumps(found))
    if sp_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def summarize(key: str, sp_size: int, ranks: list[dict[str, Any]], one: dict[str, Any], tokens: int) -> dict[str, Any]:
    """One row of the result; ratios are of the most expensive rank to sp = 1."""
    name, row, scheme = key.split("/")
    return {
        "family": name,
        "row": row,
        "scheme": scheme,
        "sp_size": sp_size,
        "tokens": tokens,
        "projected": [rank["projected"] for rank in ranks],
        "scanned": [rank["scanned"] for rank in ranks],
        "sent": [rank["sent"] for rank in ranks],
        "sent_by_formula": expected_bytes(FAMILIES[name], scheme, tokens, sp_size),
        "projected_over_sp1": max(rank["projected"] for rank in ranks) / one["projected"],
        "scanned_over_sp1": max(rank["scanned"] for rank in ranks) / one["scanned"],
        "loss_error": max(abs(rank["loss"] - one["loss"]) / abs(one["loss"]) for rank in ranks),
    }


def check(row: dict[str, Any]) -> list[str]:
    """What is off in a row of the result."""
    where = f"{row['family']}, {row['row']}, {row['scheme']}, sp={row['sp_size']}"
    off = [f"{where}: loss differs by {row['loss_error']:.1e}"] if not row["loss_error"] <= TOLERANCE else []
    if any(sent != row["sent_by_formula"] for sent in row["sent"]):
        off.append(f"{where}: sent {row['sent']}, not {row['sent_by_formula']}")
    if row["scheme"] == "adapter":
        share = 1 / row["sp_size"]
        # A convolution's columns also hold what lies between documents, on every rank its own.
        slack = 1.2 if row["family"] == "short convolution" else 1.0001
        if row["projected_over_sp1"] != share or row["scanned_over_sp1"] > share * slack:
            off.append(f"{where}: {row['projected_over_sp1']} projected, {row['scanned_over_sp1']} scanned")
    return off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--median", type=int, default=64, help="tokens of a packed document")
    parser.add_argument("--sp", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    rows = {"packed": ragged_lengths(options.tokens, options.median), "one document": [options.tokens]}
    results, off = [], []
    with tempfile.TemporaryDirectory() as folder:
        for sp_size in (1, *options.sp):
            mp.spawn(work, (folder, rows, sp_size), nprocs=sp_size)
        read = {
            sp: [json.loads(Path(folder, f"{sp}-{rank}.json").read_text()) for rank in range(sp)]
            for sp in (1, *options.sp)
        }
    for sp_size in options.sp:
        for key in read[sp_size][0]:
            one = read[1][0][f"{key.rpartition('/')[0]}/adapter"]
            results.append(summarize(key, sp_size, [rank[key] for rank in read[sp_size]], one, options.tokens))
            off += check(results[-1])
            row = results[-1]
            print(
                f"{row['family']:17} {row['row']:12} {row['scheme']:7} sp={sp_size}  projected x "
                f"{row['projected_over_sp1']:.3f}  scanned x {row['scanned_over_sp1']:.3f}  "
                f"sent {row['sent'][0] / 2**10:8.1f} KiB  loss within {row['loss_error']:.0e}"
            )
    record("linear_attention", results)
    print("\n".join(off))
    sys.exit(bool(off))


if __name__ == "__main__":
    main()
