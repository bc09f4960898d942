"""Versions, and what the device does at best: a matmul in bf16, and a copy in its memory."""

from __future__ import annotations

import inspect
import subprocess
from importlib.util import find_spec

import torch
from torch.nn.attention.varlen import varlen_attn

from benchmarks._flops import peak_flops
from benchmarks._record import PACKAGES, _version, quantiles
from benchmarks._timing import timed
from benchmarks.on_gpu.part import NOTE, Part

ALSO = ("huggingface_hub", "tokenizers", "safetensors", "pytest", "pandas", "multiprocess", "dill", "torchvision")
OPTIONAL = ("flash_attn", "flash_attn_interface", "fla", "causal_conv1d", "liger_kernel", "kernels")


def run(part: Part) -> None:
    part.case("versions", versions, part)
    part.case("device", device, part)
    part.case("matmul", matmul, part)
    part.case("copy", copy, part)


def versions(part: Part) -> None:
    found = {package: _version(package) for package in (*PACKAGES, *ALSO)}
    extra = [package for package in OPTIONAL if find_spec(package) is not None]
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    summary = ", ".join(f"{package} {version}" for package, version in list(found.items())[:6])
    part.row(NOTE, summary, versions=found, optional=extra, varlen_takes_groups=grouped)


def device(part: Part) -> None:
    if not part.cuda:
        part.row(NOTE, f"CPU, {torch.get_num_threads()} threads")
        return
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    values = {"name": properties.name, "multiprocessors": properties.multi_processor_count, "free": free}
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        driver = str(error)
    summary = f"{properties.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, driver {driver}"
    part.row(NOTE, summary, total=total, capability=torch.cuda.get_device_capability(), driver=driver, **values)


def matmul(part: Part) -> None:
    """Of two square matrices of random numbers, which cost more power than zeros."""
    at, size = torch.device(part.device), 512 if part.small else 8192
    dtype = torch.float32 if not part.cuda else torch.bfloat16
    a, b = (torch.randn(size, size, device=at).to(dtype) for _ in range(2))
    for _ in range(5):
        a @ b
    rates = quantiles([2 * size**3 / timed(lambda: a @ b, at) / 1e12 for _ in range(20)])
    peak = peak_flops(part.device)
    share = f", {100 * rates['p50'] * 1e12 / peak:.0f} % of the data sheet's {peak / 1e12:.0f}" if peak else ""
    part.row(NOTE, f"{rates['p50']:.4g} TFLOP/s{share} ({size}, {dtype})", tflops=rates, size=size, peak=peak)


def copy(part: Part) -> None:
    at, size = torch.device(part.device), 2**22 if part.small else 2**32
    source = torch.empty(size, dtype=torch.uint8, device=at).fill_(1)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    rates = quantiles([2 * size / timed(lambda: target.copy_(source), at) / 1e9 for _ in range(10)])
    part.row(NOTE, f"{rates['p50']:.4g} GB/s, read and written ({size / 2**20:.0f} MiB)", gb_per_second=rates)
