"""What of the time on a link is left bare: each schedule of exchanges, over bandwidths, on a link with its own clock.

    python -m benchmarks overlap                       all of it, small, on the CPU; draws docs/images/overlap*.svg
    python -m benchmarks overlap --shapes experts      one of the two models

One process is one of 8 equal ranks (`_link.py`) and trains two sequences a step with the real code: a mixture at
Qwen3-30B-A3B's layer shapes in ratio (a quarter of each width; ep=8), and a dense model at Llama-3-8B's (an eighth;
sp=8). Link over compute is set by the bandwidth: bytes of the plain schedule / (ratio * its compute). Which device has
such a ratio at the real shapes, `DEVICES` and `ratio_of` say, from the flops and bytes of a token.

    exposed    seconds waited for the link / seconds that the link was busy
    bound      max(0, 1 - compute / link): what no schedule can hide

Routing: "balanced" sends pair p to expert p mod E; "skewed" draws experts by a log-normal popularity, and the process
is the rank whose experts get most. Checked: gradients of each schedule equal the plain one's; none computes longer
than plain by more than `--slower`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from benchmarks._exchange import even_routing
from benchmarks._link import Link, linked
from benchmarks._record import quantiles, record
from hf_veomni import prepare_omni
from hf_veomni.flops import PEAKS

RANKS = 8
PICTURE = Path(__file__).parents[1] / "docs/images/overlap.svg"
TIMELINE = PICTURE.with_name("overlap_timeline.svg")
RATIOS = (0.3, 0.6, 0.9)

_COMMON = {"num_hidden_layers": 2, "vocab_size": 512, "tie_word_embeddings": False, "max_position_embeddings": 65536}
_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}


@dataclass(frozen=True)
class Shapes:
    """A model in ratio, and the one whose ratio it is.

    Attributes:
        tokens: of a rank, at both sizes; a sequence has `RANKS` times as many under SP.
        axis: "ep" or "sp".
    """

    model: str
    config: Callable[[], Any]
    real: Callable[[], Any]
    axis: str
    tokens: int
    real_tokens: int


SHAPES = {
    "experts": Shapes(
        "Qwen3-30B-A3B",
        lambda: AutoConfig.for_model(
            "qwen3_moe", head_dim=128, hidden_size=512, moe_intermediate_size=192, num_attention_heads=8,
            num_key_value_heads=1, intermediate_size=1536, **_EXPERTS, **_COMMON,
        ),
        lambda: AutoConfig.for_model(
            "qwen3_moe", head_dim=128, hidden_size=2048, moe_intermediate_size=768, num_attention_heads=32,
            num_key_value_heads=4, intermediate_size=6144, **_EXPERTS, **_COMMON,
        ),
        "ep",
        512,
        8192,
    ),
    "dense": Shapes(
        "Llama-3-8B",
        lambda: LlamaConfig(
            hidden_size=512, intermediate_size=1792, num_attention_heads=32, num_key_value_heads=8, **_COMMON
        ),
        lambda: LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, **_COMMON
        ),
        "sp",
        512,
        4096,
    ),
}  # fmt: skip

# (device, link, bytes a second and direction of one device, by the data sheet; a network card for each device)
DEVICES = [
    ("H100", "NVLink 4", 450e9),
    ("H100", "InfiniBand NDR 400", 50e9),
    ("H100", "Ethernet 200", 25e9),
    ("H100", "Ethernet 100", 12.5e9),
    ("H200", "NVLink 4", 450e9),
    ("B200", "NVLink 5", 900e9),
    ("B200", "InfiniBand XDR 800", 100e9),
    ("A100", "NVLink 3", 300e9),
    ("A100", "InfiniBand HDR 200", 25e9),
    ("L40S", "PCIe 4 x16", 32e9),
    ("RTX 4090", "PCIe 4 x16", 32e9),
]
REACHED = 0.5, 0.8  # of the peak flops by a layer without its exchanges, and of the link's rate by an all-to-all


def ratio_of(shapes: Shapes, device: str, bandwidth: float) -> float:
    """Seconds of the link over seconds of compute of one token in one layer, forward and backward, in bf16."""
    config = shapes.real()
    hidden, width = config.hidden_size, config.num_attention_heads * (config.head_dim or 0)
    both = width + config.num_key_value_heads * config.head_dim
    length = shapes.real_tokens * (RANKS if shapes.axis == "sp" else 1)
    if shapes.axis == "ep":
        mlp = config.num_experts_per_tok * 3 * hidden * config.moe_intermediate_size + hidden * config.num_experts
        moved = 2 * config.num_experts_per_tok * hidden
    else:
        mlp, moved = 3 * hidden * config.intermediate_size, 2 * both
    flops = 6 * (2 * hidden * both + mlp) + 3 * 4 * width * length / 2
    sent = 2 * 2 * moved * (RANKS - 1) / RANKS  # there and, for the gradient, back; two bytes each
    return (sent / (REACHED[1] * bandwidth)) / (flops / (REACHED[0] * PEAKS[device]))


class Bench:
    """One model behind one link, prepared for one schedule."""

    def __init__(self, shapes: Shapes, schedule: str, checkpointing: bool, link: Link, tokens: int) -> None:
        self.schedule, self.link = schedule, link
        torch.manual_seed(0)
        stock = AutoModelForCausalLM.from_config(shapes.config()).train()
        plan: Any = {f"{shapes.axis}_size": RANKS, "overlap": "none" if schedule == "plain" else schedule}
        self.model: Any = prepare_omni(stock, plan)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        length = tokens * (RANKS if shapes.axis == "sp" else 1)
        ids = torch.randint(0, 512, (2, 1, length), generator=torch.Generator().manual_seed(1))
        self.batches = [{"input_ids": row, "labels": row, "use_cache": False} for row in ids]

    def step(self) -> None:
        """Forward and backward of two sequences."""
        self.model.zero_grad()
        self.link.reset()
        if self.schedule == "pairs":
            from hf_veomni import run_pair

            losses = run_pair(lambda batch: self.model(**batch).loss, *self.batches)
            (losses[0] + losses[1]).backward()
            return
        for batch in self.batches:
            self.model(**batch).loss.backward()

    def gradients(self) -> list[Tensor]:
        return [p.grad.to_local().clone() for p in self.model.parameters()]


def _popularity(config: Any) -> Tensor:
    """How often each expert is chosen: log-normal, so that the busiest of 8 ranks has about 1.5 times the mean."""
    return torch.randn(config.num_experts, generator=torch.Generator().manual_seed(3)).mul(1.0).exp()


def busiest_rank(config: Any) -> int:
    return int(_popularity(config).view(RANKS, -1).sum(1).argmax())


@contextmanager
def skewed_routing(model: nn.Module) -> Iterator[None]:
    """The router's weights, but experts drawn by popularity, without repeats, the same at each call of a length."""
    handles = []

    def route(router: Any, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        index = output[-1]
        generator = torch.Generator().manual_seed(len(index))
        popular = _popularity(router).log()
        noise = -torch.rand(len(index), len(popular), generator=generator).log().neg().log()
        return (*output[:-1], (popular + noise).topk(index.shape[-1]).indices)

    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            handles.append(module.register_forward_hook(route))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure(shapes: Shapes, routing: str, checkpointing: bool, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each schedule and ratio."""
    link = Link()
    rank = busiest_rank(shapes.config()) if routing == "skewed" else 0
    with linked(link, RANKS, rank):
        benches = {
            name: Bench(shapes, name, checkpointing, link, options.tokens or shapes.tokens)
            for name in options.schedules
        }
        routed = {"balanced": even_routing, "skewed": skewed_routing}.get(routing)
        contexts = [routed(bench.model) for bench in benches.values()] if routed else []
        for context in contexts:
            context.__enter__()
        return _measure(
            benches,
            link,
            options,
            {"model": shapes.model, "axis": f"{shapes.axis}=8", "routing": routing, "checkpointing": checkpointing},
        )


def _measure(
    benches: dict[str, Bench], link: Link, options: argparse.Namespace, about: dict[str, Any]
) -> list[dict[str, Any]]:
    plain = benches["plain"]
    link.bandwidth = float("inf")
    expected, computed = None, {name: [] for name in benches}
    errors: dict[str, float] = {}
    for name, bench in benches.items():
        bench.step()  # warm
        found = bench.gradients()
        expected = found if expected is None else expected
        errors[name] = max(
            float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in zip(found, expected, strict=True)
        )
    for _ in range(options.repeats):
        for name, bench in benches.items():  # in turns
            bench.step()
            computed[name].append(link.compute)
    plain.step()
    sent, compute = sum(count for _, _, count in link.transfers), quantiles(computed["plain"])["p50"]
    rows = []
    for ratio in options.ratios:
        link.bandwidth = sent / (ratio * compute)
        results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in benches}
        for _ in range(options.repeats):
            for name, bench in benches.items():
                bench.step()
                results[name].append((link.waited / link.busy, link.now(), link.compute))
        for name, found in results.items():
            exposed, seconds, work = (quantiles(column) for column in zip(*found, strict=True))
            rows.append(
                about
                | {"schedule": name, "link_over_compute": ratio, "bound": max(0.0, 1 - 1 / ratio), "exposed": exposed}
                | {"seconds": seconds, "compute": work, "sent": sent, "transfers": len(link.transfers)}
                | {
                    "compute_over_plain": quantiles(
                        [a / b for a, b in zip(computed[name], computed["plain"], strict=True)]
                    )
                }
                | {"gradient_error": errors[name]}
            )
            print(
                f"{about['model']:14s} {about['routing']:9s} {'ckpt' if about['checkpointing'] else '':5s}{name:13s}"
                f"link/compute {ratio:.1f}  exposed {exposed['p50']:6.1%}  bound {rows[-1]['bound']:.1%}  "
                f"step {seconds['p50']:.2f} s  error {errors[name]:.1e}",
                flush=True,
            )
    return rows


def check(rows: list[dict[str, Any]], tolerance: float, slower: float) -> list[str]:
    """What is wrong with the rows."""
    wrong = []
    for row in rows:
        name = f"{row['schedule']} of {row['model']} ({row['routing']}, checkpointing {row['checkpointing']})"
        if row["gradient_error"] > tolerance:
            wrong.append(f"gradients of {name} are off by {row['gradient_error']:.1e}")
        if row["compute_over_plain"]["p50"] > 1 + slower:
            wrong.append(f"{name} computes {row['compute_over_plain']['p50']:.3f} times as long as plain")
    return list(dict.fromkeys(wrong))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Exposed share over link / compute, a panel for each model and way."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((r["model"], r["axis"], r["routing"], r["checkpointing"]) for r in rows))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes, panels, strict=False):
        here = [r for r in rows if (r["model"], r["axis"], r["routing"], r["checkpointing"]) == panel]
        for name in dict.fromkeys(r["schedule"] for r in here):
            line = [r for r in here if r["schedule"] == name]
            axis.plot(
                [r["link_over_compute"] for r in line], [100 * r["exposed"]["p50"] for r in line], "o-", label=name
            )
        ratios = [r["link_over_compute"] for r in here]
        steps = [min(ratios) + (max(ratios) - min(ratios)) * i / 50 for i in range(51)]
        axis.plot(steps, [100 * max(0.0, 1 - 1 / x) for x in steps], "k:", label="bound")
        axis.set_ylim(-3, 105)
        axis.set_title(f"{panel[0]} {panel[1]}, {panel[2]}{', checkpointing' * panel[3]}", fontsize=8)
        axis.set_xlabel("link / compute", fontsize=8)
        axis.set_ylabel("exposed, % of the link's time", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0].legend(fontsize=7)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def draw_timeline(options: argparse.Namespace, path: Path) -> None:
    """One step of the mixture with each schedule at link / compute = 0.6: what computes, waits and travels when."""
    from matplotlib.figure import Figure

    link, shapes = Link(), SHAPES["experts"]
    found = []
    with linked(link, RANKS):
        for name in options.schedules:
            bench = Bench(shapes, name, False, link, options.tokens or shapes.tokens)
            with even_routing(bench.model):
                bench.step()
                bench.step()
                if not found:
                    bandwidth = sum(count for _, _, count in link.transfers) / (0.6 * link.compute)
                link.bandwidth = bandwidth
                bench.step()
                found.append((name, link.now(), list(link.waits), list(link.transfers)))
                link.bandwidth = float("inf")
    figure = Figure(figsize=(9, 1.1 * len(found) + 0.5), layout="constrained")
    axes = figure.subplots(len(found), 1, sharex=True, squeeze=False).flatten()
    for axis, (name, end, waits, transfers) in zip(axes, found, strict=True):
        axis.broken_barh([(0, end)], (1.1, 0.8), color="#4c78a8")
        axis.broken_barh([(a, b - a) for a, b in waits], (1.1, 0.8), color="#e45756")
        axis.broken_barh([(a, b - a) for a, b, _ in transfers], (0.1, 0.8), color="#72b7b2")
        axis.set_yticks([0.5, 1.5], ["link", "compute"], fontsize=7)
        axis.set_title(f"{name}: {end:.2f} s, {sum(b - a for a, b in waits):.2f} s of them waiting (red)", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[-1].set_xlabel("seconds of the virtual clock", fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument("--schedules", nargs="+", choices=["plain", "chunks", "pairs"], default=["plain", "chunks"])
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS, help="link / compute")
    parser.add_argument("--routing", nargs="+", choices=["balanced", "skewed"], default=["balanced", "skewed"])
    parser.add_argument("--checkpointing", nargs="+", type=int, choices=[0, 1], default=[0, 1])
    parser.add_argument("--tokens", type=int, help="of a rank and sequence")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--slower", type=float, default=0.1, help="compute over plain's, above 1; a busy CPU is noisy")
    parser.add_argument("--no-draw", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure, write the json, draw, and say what is wrong."""
    options = parse()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in options.shapes:
        shapes = SHAPES[name]
        for routing in options.routing if shapes.axis == "ep" else ["none"]:
            for checkpointing in options.checkpointing:
                rows += measure(shapes, routing, bool(checkpointing), options)
    devices = [
        {
            "device": device,
            "link": link,
            "model": s.model,
            "axis": f"{s.axis}=8",
            "ratio": round(ratio_of(s, device, rate), 2),
        }
        for device, link, rate in DEVICES
        for s in SHAPES.values()
    ]
    for row in devices:
        print(
            f"{row['device']:9s} {row['link']:19s} {row['model']:14s} {row['axis']}: link / compute {row['ratio']:.2f}"
        )
    record("overlap", [*rows, *devices], f"ep=8 and sp=8; schedules {', '.join(options.schedules)}")
    if not options.no_draw:
        draw(rows, PICTURE)
        draw_timeline(options, TIMELINE)
    wrong = check(rows, options.tolerance, options.slower)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
