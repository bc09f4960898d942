"""A real mixture of experts with a known answer: the upcycled SmolLM2-135M has the logits of the dense one.

Experts start as copies of the dense MLP, so the router's choices do not show at first; training moves them apart, and
then every layout has to send every token to the same experts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_veomni import clip_grad_norm_, gather_sequence, get_parallel_state, prepare_omni

Batch = dict[str, torch.Tensor]

# Absolute, in fp32, of logits of up to 30: on one rank dense and upcycled differ by 6e-5.
LOGITS = 1e-4
# Relative: losses, and the norm of each weight's difference, after STEPS steps.
TRAINED = 1e-5
# While all experts are equal the router's gradient is zero but for rounding, about 1e-9, and Adam with its usual 1e-8
# makes steps of that noise. Other gradients are about 5e-5 after clipping.
ADAM_EPSILON = 1e-6
STEPS, ROWS = 4, 2
DOCUMENTS, LENGTH = 3, 63
FEW = 4  # the first layers only; all of them, and training, are slow
PLANS = [(2, "dp_shard=2,ep=2"), (2, "sp=2,ep=2"), (2, "sp=2"), (4, "sp=4,ep=2"), (4, "sp=4,ep=4")]
TRAINED_PLANS = [*PLANS, (4, "sp=2,dp_shard=2,ep=2"), (4, "sp=2,dp_shard=2,ep=4")]

pytestmark = pytest.mark.real_model


def _cases(plans: list[tuple[int, str]], deep: Callable[[int], int | None]) -> pytest.MarkDecorator:
    """Plans at the depth that `deep` gives for a number of ranks."""
    slow = [pytest.param(deep(plan[0]), *plan, marks=pytest.mark.slow) for plan in plans]
    few = pytest.param(FEW, 2, "sp=2,ep=2", marks=pytest.mark.slow if deep is _whole_on_two else ())
    return pytest.mark.parametrize(("layers", "size", "plan"), [few, *slow], scope="module")


def _full(size: int) -> int | None:
    return None


def _whole_on_two(size: int) -> int | None:
    """Four ranks that train the whole model take 14 GB together, more than a busy machine of 24 GB has."""
    return None if size <= 2 else FEW


def _rows(checkpoint: Path) -> list[Batch]:
    """Packed sequences of an odd length, of the beginnings of different topics."""
    from pydoc_data.topics import topics

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts = (tokenizer(topics[name], verbose=False)["input_ids"][:LENGTH] for name in sorted(topics))
    documents = [ids for ids in texts if len(ids) == LENGTH]
    rows = [documents[begin : begin + DOCUMENTS] for begin in range(0, STEPS * ROWS * DOCUMENTS, DOCUMENTS)]
    return [
        {
            "input_ids": torch.tensor([[token for document in row for token in document]]),
            "labels": torch.tensor([[label for document in row for label in (-100, *document[1:])]]),
            "position_ids": torch.arange(LENGTH).repeat(DOCUMENTS)[None],
        }
        for row in rows
    ]


def _load(checkpoint: Path, layers: int | None) -> Any:
    depth = {} if layers is None else {"num_hidden_layers": layers}
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **depth)


def _compare_logits(checkpoint: Path, layers: int | None, plan: str, reference: str) -> float:
    """Largest absolute difference from the dense model's, on this rank. Every data rank reads the same row."""
    model = prepare_omni(_load(checkpoint, layers), plan).eval()
    with torch.no_grad():
        logits = gather_sequence(model(**_rows(checkpoint)[0], use_cache=False).logits, model)
    return float((logits - torch.load(reference)).abs().max())


def _train(checkpoint: Path, layers: int | None, plan: str, path: str) -> tuple[list[float], float]:
    """Losses of some steps over ROWS rows each, and how far the weights are from those at `path`, see `_furthest`.

    Where `path` is not there yet, this rank writes it: the weights that others are compared with.
    """
    model = prepare_omni(_load(checkpoint, layers), plan).train()
    state = get_parallel_state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=ADAM_EPSILON)
    rows, losses = _rows(checkpoint), []
    targets = torch.tensor(ROWS * DOCUMENTS * (LENGTH - 1))
    for step in range(STEPS):
        mine = rows[step * ROWS : (step + 1) * ROWS][state.dp_rank :: state.dp_size]
        total = torch.zeros(())
        for row in mine:
            loss = model(**row, num_items_in_batch=targets, use_cache=False).loss
            (loss * state.dp_size).backward()  # FSDP averages over the data ranks
            total += loss.detach()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    if not Path(path).exists():
        torch.save(dict(model.named_parameters()), path)
        return losses, 0.0
    del optimizer
    return losses, _furthest(model, torch.load(path, mmap=True))


def _run(ranks: Any, size: int, case: Callable[..., Any], *arguments: Any) -> list:
    """Run a case and end its ranks: they would keep gigabytes of this model, and the next pool needs them."""
    pool = ranks(size)
    try:
        return pool.run(case, *arguments, timeout=600)
    finally:
        pool.close()


def _furthest(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> float:
    """The tensor that is furthest off: norm of the difference over norm.

    Not the element: where a gradient is rounding noise, Adam makes a whole step of it. One parameter at a time, since
    all of them whole would take 1.5 GB on every rank.
    """
    furthest = 0.0
    for name, parameter in model.named_parameters():
        wanted = expected[name].detach()
        difference = parameter.detach().full_tensor() - wanted
        furthest = max(furthest, float(difference.norm() / wanted.norm()))
    return furthest


@pytest.fixture(scope="module")
def checkpoint(smollm2_checkpoint: Path) -> Path:
    """The upcycled SmolLM2 in bf16, kept under outputs/."""
    from make_moe_checkpoint import DEFAULT_OUTPUT, make_moe_checkpoint

    root = Path(__file__).resolve().parents[3]
    return make_moe_checkpoint(root / DEFAULT_OUTPUT, smollm2_checkpoint)


@pytest.fixture(scope="module")
def dense_logits(smollm2_checkpoint: Path, layers: int | None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The dense model's, untouched, one document at a time."""
    model = _load(smollm2_checkpoint, layers).eval()
    documents = _rows(smollm2_checkpoint)[0]["input_ids"].view(DOCUMENTS, 1, LENGTH)
    with torch.no_grad():
        logits = torch.cat([model(document, use_cache=False).logits for document in documents], dim=1)
    path = tmp_path_factory.mktemp("dense") / "logits.pt"
    torch.save(logits, path)
    return str(path)


@pytest.fixture(scope="module")
def trained(ranks, checkpoint: Path, layers: int | None, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Losses and weights of the same training on one rank."""
    path = tmp_path_factory.mktemp("trained") / "weights.pt"
    ((losses, _),) = _run(ranks, 1, _train, checkpoint, layers, "dp_shard=1", str(path))
    return losses, str(path)


@_cases(PLANS, _full)
def test_logits_equal_the_dense_model(ranks, checkpoint, dense_logits, layers, size, plan):
    found = _run(ranks, size, _compare_logits, checkpoint, layers, plan, dense_logits)
    print(f"{plan}, {layers or 'all'} layers: {max(found):.1e}")
    assert max(found) < LOGITS


@_cases(TRAINED_PLANS, _whole_on_two)
def test_training_equals_one_rank(ranks, checkpoint, trained, layers, size, plan):
    losses, path = trained
    found = _run(ranks, size, _train, checkpoint, layers, plan, path)
    sp_size = 4 if "sp=4" in plan else 2 if "sp=2" in plan else 1
    together = [sum(step) for step in zip(*(mine for mine, _ in found[::sp_size]), strict=True)]
    loss = max(abs(a - b) / b for a, b in zip(together, losses, strict=True))
    weight = max(furthest for _, furthest in found)
    print(f"{plan}, {layers or 'all'} layers: losses {losses} within {loss:.1e}, weights within {weight:.1e}")
    assert losses[-1] < losses[0]
    assert max(loss, weight) < TRAINED
