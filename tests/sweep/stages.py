"""Sweep causal and multimodal families in pipeline stages: `python -m tests.sweep.stages [--only NAME] [--commit]`.

The stock model in one process runs every document of a window alone; two ranks, and four, run the window in as many
stages. Compared are the window's loss, the gradient norm, and every gradient on the stage that has it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # tests that import this keep their environment
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from hf_veomni.errors import UnsupportedError  # noqa: E402
from hf_veomni.pipeline.chain import find_chain  # noqa: E402
from tests.ranks.pool import RankPool, RanksFailed  # noqa: E402
from tests.sweep.family import EXACT, ROOT, TOLERANCE, StaysFp64, relative  # noqa: E402
from tests.sweep.tiny import Unbuildable  # noqa: E402

OUTPUT = ROOT / "hf_veomni/support/stages.json"
TIMEOUT = 120.0
SIZES = (2, 4)
LENGTHS = ((9, 4, 10), (13,), (1, 21, 3), (8, 8))  # documents of each micro-batch
Window = list[dict[str, Tensor]]


def _model(model_type: str, dtype: torch.dtype, layers: int) -> Any:
    from tests.sweep import tiny

    config: Any = tiny.tiny_config(model_type)
    text = config.get_text_config()
    before = getattr(text, "num_hidden_layers", None)
    if layers > 2 and before != layers:
        lists = {n: v * (layers // 2) for n, v in vars(text).items() if isinstance(v, list) and len(v) == before == 2}
        text.num_hidden_layers = layers
        for name, value in lists.items():
            setattr(text, name, value)
    if dtype == torch.float64:
        tiny.use_plain_experts(config)
    return tiny.build(config, tiny.choose_class(model_type)[1], dtype)


def depth(model_type: str, stages: int) -> int:
    """Layers enough for a stage each, where the first stage has those that take features of encoders."""
    try:
        deep = find_chain(_model(model_type, torch.float32, 2)).deep
    except (UnsupportedError, Unbuildable):  # which the sweep will say
        deep = 0
    return max(stages, 2, deep + stages - 1)


def _window(model: Any, packed: bool) -> tuple[Window, list[list[tuple[int, int]]]]:
    """Micro-batches, and where the documents of each lie."""
    vocabulary = min(79, getattr(model.config.get_text_config(), "vocab_size", 79))
    batches, places = [], []
    for seed, lengths in enumerate(LENGTHS):
        lengths = lengths if packed else (sum(lengths),)
        ids = torch.randint(3, vocabulary, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
        batch = {"input_ids": ids, "labels": ids.clone()}
        edges = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        batch["labels"][0, edges[:-1]] = -100
        if packed:
            batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
        batches.append(batch)
        places.append(list(zip(edges[:-1], edges[1:], strict=True)))
    return batches, places


def reference(model_type: str, dtype: torch.dtype, layers: int, packed: bool) -> dict[str, Any]:
    """Loss, norm and gradients of the stock model; a parameter that is tied under each of its names."""
    model = _model(model_type, dtype, layers)
    batches, places = _window(model, packed)
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    total = torch.zeros((), dtype=torch.float64)
    for batch, edges in zip(batches, places, strict=True):
        for begin, end in edges:
            ids, labels = (batch[name][:, begin:end] for name in ("input_ids", "labels"))
            with StaysFp64() if dtype == torch.float64 else nullcontext():
                logits = model(input_ids=ids, use_cache=False).logits
                if end - begin > 1:
                    loss = F.cross_entropy(logits[0, :-1].to(dtype), labels[0, 1:], reduction="sum") / items
                    loss.backward()
                    total += loss.detach()
    named = dict(model.named_parameters(remove_duplicate=False))
    gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
    norm = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm()
    return {"loss": total, "norm": norm, "gradients": gradients}


def staged(model_type: str, dtype: torch.dtype, layers: int, packed: bool, path: str) -> dict[str, Any]:
    """On a rank: relative errors against the reference, or why not."""
    from hf_veomni import clip_grad_norm_, prepare_omni, run_window

    warnings.filterwarnings("ignore")
    wanted = torch.load(path)
    try:
        model: nn.Module = _model(model_type, dtype, layers)
        batches, _ = _window(model, packed)
        prepare_omni(model, f"pp={torch.distributed.get_world_size()}", chunked_loss=dtype != torch.float64)
        with StaysFp64() if dtype == torch.float64 else nullcontext():
            loss = run_window(model, batches)
    except UnsupportedError as error:
        return {"refused": " ".join(str(error).split())[:300]}
    errors = {"loss": relative(loss.double(), wanted["loss"])}
    floor = 1e-3 * max(float(g.abs().max()) for g in wanted["gradients"].values())
    found = []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient: Any = parameter.grad
            expected = wanted["gradients"].get(name, torch.zeros_like(gradient.full_tensor()))
            errors[name] = relative(gradient.full_tensor(), expected, floor)
            found.append(name)
    errors["norm"] = relative(clip_grad_norm_(model.parameters(), 1e9).double(), wanted["norm"])
    where = max(errors, key=lambda name: errors[name])
    return {"error": errors[where], "where": where, "found": found}


def _measure(pool: RankPool, name: str, dtype: torch.dtype, layers: int, path: Path) -> dict[str, Any]:
    """The worst of all ranks. Packed rows, or where the family takes none, documents alone."""
    for packed in (True, False):
        try:
            wanted = reference(name, dtype, layers, packed)
        except Exception as error:
            return {"outcome": f"the stock model does not run: {type(error).__name__}: {str(error)[:120]}"}
        torch.save(wanted, path)
        try:
            found = pool.run(staged, name, dtype, layers, packed, str(path), timeout=TIMEOUT)
        except RanksFailed as error:
            return {"outcome": f"crashes: {str(error).strip().splitlines()[-1][:150]}"}
        refused = next((one["refused"] for one in found if "refused" in one), None)
        if refused is None:
            break
        if "packed" not in refused or not packed:
            return {"outcome": refused}
    worst = max(found, key=lambda one: one["error"])
    held = {name for one in found for name in one["found"]}
    model = _model(name, dtype, layers)
    lost = [n for n, p in model.named_parameters() if n in wanted["gradients"] and n not in held]
    if lost:
        return {"outcome": f"wrong: no stage has a gradient of {lost[0]}"}
    return {"outcome": "works", "error": worst["error"], "where": worst["where"], "packed": packed}


def sweep_stages(pool: RankPool, name: str, size: int, path: Path) -> dict[str, Any]:
    """In fp32, and in fp64 where a family's own rounding in fp32 exceeds the tolerance."""
    layers = depth(name, size)
    record = _measure(pool, name, torch.float32, layers, path)
    record["dtype"] = "float32"
    if record["outcome"] == "works" and not record["error"] <= TOLERANCE:
        exact = _measure(pool, name, torch.float64, layers, path)
        if exact["outcome"] == "works" and exact["error"] <= EXACT:
            return {**exact, "dtype": "float64", "fp32_error": record["error"]}
        record["outcome"] = f"wrong: {record['where']} is off by {record['error']:.1e} relative"
    return record


def commit(found: dict[str, Any]) -> None:
    """Write the package's json and docs/support.md, of which this is one column."""
    import transformers

    from hf_veomni.support import load_matrix, render_markdown

    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    content = {"versions": versions, "date": date.today().isoformat(), "families": dict(sorted(found.items()))}
    OUTPUT.write_text(json.dumps(content, indent=1) + "\n")
    (ROOT / "docs/support.md").write_text(render_markdown(load_matrix()))


def main() -> None:
    from hf_veomni.support import load_matrix

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="model types; the others as in the package's json")
    parser.add_argument("--stages", type=int, nargs="*", default=SIZES)
    parser.add_argument("--commit", action="store_true", help="write the package's json and docs/support.md")
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(OUTPUT.read_text())["families"] if OUTPUT.exists() else {}
    rows = load_matrix().families.values()
    kinds = ("causal", "multimodal")
    names = args.only or [row.model_type for row in rows if row.outcome == "works" and row.kind in kinds]
    path = Path(f"/tmp/stages-{os.getpid()}.pt")
    for size in args.stages:
        pool = RankPool(size)
        for name in names:
            begin = time.monotonic()
            record = sweep_stages(pool, name, size, path)
            found.setdefault(name, {})[str(size)] = record
            shown = f"{record.get('error', 0):.1e} {record['dtype']}" if record["outcome"] == "works" else ""
            print(
                f"pp={size} {name:28} {time.monotonic() - begin:5.1f} s {shown} {record['outcome'][:150]}", flush=True
            )
        pool.close()
    path.unlink(missing_ok=True)
    if args.commit:
        commit(found)
    outcomes = [(size, each["outcome"].partition(":")[0][:40]) for one in found.values() for size, each in one.items()]
    print(Counter(outcomes).most_common(8))
    if wrong := [name for name, one in found.items() if any(e["outcome"].startswith("wrong") for e in one.values())]:
        sys.exit(f"WRONG: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
