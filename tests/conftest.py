"""What several test folders use: ranks, and checkpoints that are made once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import make_llama
from tests.ranks.pool import RankPools

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """`ranks(n).run(function, *args)` runs a function on n gloo ranks; see tests/ranks/README.md."""
    pools = RankPools()
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def smollm2_checkpoint() -> Path:
    """Folder of the real SmolLM2-135M-Instruct in bf16. Made at the first use (25 s), kept under outputs/."""
    from make_checkpoint import DEFAULT_OUTPUT, make_checkpoint

    return make_checkpoint(ROOT / DEFAULT_OUTPUT)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with SmolLM2's head counts (9 and 3, tied head), a tokenizer and a chat template."""
    return make_llama(tmp_path_factory.mktemp("tiny-llama"))
