"""A class of runs that must train identically: however documents are packed, padded or spread over ranks.

One reference: the stock Trainer in one process, one document a row. Every other member takes the same documents for
each optimizer step. Losses, gradient norms and weights are compared by their largest difference and by their mean
drift, which shows a bias that the largest difference hides. The reference's own figures are compared with
`losses.json`, so that a change of the code that does not mean to touch the computation cannot. To write the file anew:
`python -m tests.invariant.test_training`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests.models import VOCABULARY, build_model
from tests.ranks.parity import add_adapter, whole

STEPS, ROWS, DOCUMENTS = 6, 4, 3  # optimizer steps, packed sequences of a step, documents of a row
MAX_DIFFERENCE, MEAN_DRIFT = 2e-5, 2e-6  # of losses and norms, relative
COMMITTED = Path(__file__).with_name("losses.json")


@dataclass(frozen=True)
class Member:
    """One way to run it. `layout`: "single" (a document a row), "padded" (a batch of them) or "packed"."""

    plan: str = ""
    layout: str = "packed"
    checkpointing: bool = False
    chunked_loss: bool = True
    attention: str = "auto"
    model: dict[str, Any] = field(default_factory=dict)
    lora: bool = False

    @property
    def world_size(self) -> int:
        from hf_veomni import ParallelPlan

        plan = ParallelPlan.from_string(self.plan)
        return plan.sp_size * plan.dp_replicate_size * (plan.dp_shard_size or 1)

    @property
    def data_ranks(self) -> int:
        from hf_veomni import ParallelPlan

        return self.world_size // ParallelPlan.from_string(self.plan).sp_size


@dataclass
class Course:
    """What a run went through."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def documents() -> list[list[int]]:
    """Uneven documents in the order in which they are learnt; a repeated pattern, so that the loss falls."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(STEPS * ROWS * DOCUMENTS):
        length = int(torch.randint(2, 19, (1,), generator=generator))
        first = int(torch.randint(3, VOCABULARY, (1,), generator=generator))
        found.append([3 + (first + 5 * place) % (VOCABULARY - 3) for place in range(length)])
    return found


def rows(layout: str) -> list[dict[str, list[int]]]:
    single = [
        {"input_ids": tokens, "labels": [-100, *tokens[1:]], "position_ids": list(range(len(tokens)))}
        for tokens in documents()
    ]
    if layout != "packed":
        return [{key: row[key] for key in ("input_ids", "labels")} for row in single]
    groups = [single[i : i + DOCUMENTS] for i in range(0, len(single), DOCUMENTS)]
    return [{key: [value for row in group for value in row[key]] for key in group[0]} for group in groups]


def collate(samples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    size = max(len(sample["input_ids"]) for sample in samples)
    fill = {"input_ids": 0, "labels": -100, "position_ids": 0}
    batch = {key: torch.tensor([s[key] + [fill[key]] * (size - len(s[key])) for s in samples]) for key in samples[0]}
    if len(samples) > 1:
        lengths = torch.tensor([[len(sample["input_ids"])] for sample in samples])
        batch["attention_mask"] = (torch.arange(size)[None] < lengths).long()
    return batch


def make_model(member: Member) -> nn.Module:
    model = build_model("llama_uneven", **member.model)
    return add_adapter(model) if member.lora else model


def arguments(member: Member) -> dict[str, Any]:
    size = DOCUMENTS if member.layout == "padded" else 1
    batches = ROWS * (DOCUMENTS if member.layout == "single" else 1)
    return dict(
        output_dir=tempfile.mkdtemp(prefix="invariant-"),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=batches // member.data_ranks,
        activation_checkpointing=member.checkpointing,
        num_train_epochs=1,
        learning_rate=3e-3,
        adam_epsilon=1e-4,  # else Adam makes a full step of the rounding noise of a gradient of zero
        max_grad_norm=0.7,
        weight_decay=0.01,
        warmup_steps=2,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )


def course(trainer: Trainer) -> Course:
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    weights = {name: whole(p).detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return Course([entry["loss"] for entry in steps], [entry["grad_norm"] for entry in steps], weights)


def run_stock(member: Member) -> Course:
    """The stock Trainer in this process."""
    data = {"train_dataset": rows(member.layout), "data_collator": collate}
    return course(Trainer(make_model(member), TrainingArguments(**arguments(member)), **data))


def run_omni(member: Member) -> Course:
    """OmniTrainer on this rank."""
    from hf_veomni import OmniTrainer, OmniTrainingArguments, prepare_omni

    model, args = make_model(member), OmniTrainingArguments(**arguments(member), plan=member.plan)
    prepare_omni(model, args.plan, attention=member.attention, chunked_loss=member.chunked_loss)
    return course(OmniTrainer(model, args, train_dataset=rows(member.layout), data_collator=collate))


def assert_identical(found: Course, expected: Course) -> None:
    for kind in ("losses", "norms"):
        ours, theirs = torch.tensor(getattr(found, kind)).double(), torch.tensor(getattr(expected, kind)).double()
        assert ours.shape == theirs.shape == (STEPS,)
        difference = (ours - theirs) / theirs
        largest, drift = difference.abs().max().item(), difference.mean().abs().item()
        assert largest < MAX_DIFFERENCE and drift < MEAN_DRIFT, (kind, largest, drift, ours.tolist(), theirs.tolist())
    assert found.weights.keys() == expected.weights.keys()
    far = {name: (found.weights[name] - weight).abs().max().item() for name, weight in expected.weights.items()}
    assert max(far.values()) < MAX_DIFFERENCE, max(far.items(), key=lambda item: item[1])


@pytest.fixture(scope="module")
def reference() -> Callable[[bool], Course]:
    known: dict[bool, Course] = {}

    def find(lora: bool) -> Course:
        if lora not in known:
            known[lora] = run_stock(Member(layout="single", lora=lora))
        return known[lora]

    return find


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_reference_equals_the_committed_course(reference, lora):
    """Within what another machine's matmul may round differently."""
    found, committed = reference(lora), json.loads(COMMITTED.read_text())["lora" if lora else "full"]
    assert lora or found.losses[-1] < 0.95 * found.losses[0], "it must learn"
    assert max(found.norms) > 0.7, "clipping must be active"
    for kind in ("losses", "norms"):
        ours, theirs = torch.tensor(getattr(found, kind)), torch.tensor(committed[kind])
        assert ((ours - theirs) / theirs).abs().max() < 1e-4, (kind, ours.tolist())


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_stock_trainer_equals_it_in_other_layouts(reference, layout):
    assert_identical(run_stock(Member(layout=layout)), reference(False))


@pytest.mark.parametrize(
    "member",
    [
        Member("sp=2"),
        Member("sp=2", layout="single"),
        Member("sp=2", layout="padded"),
        Member("sp=3"),
        Member("sp=4"),
        Member("dp_shard=2"),
        Member("dp_replicate=2"),
        Member("sp=2,dp_shard=2"),
        Member("sp=2,dp_replicate=2"),
        Member("dp_shard=2,dp_replicate=2"),
        Member("sp=2,dp_shard=2", layout="padded"),
        Member("sp=2", checkpointing=True),
        Member("sp=2", chunked_loss=False),
        Member("sp=2", attention="keep"),
        Member("sp=2", attention="keep", model={"attention": "eager"}),
        Member("sp=2", lora=True),
        Member("sp=2,dp_shard=2", lora=True, checkpointing=True),
    ],
    ids=lambda member: "-".join(
        filter(
            None,
            [
                member.plan,
                member.layout,
                "checkpointing" * member.checkpointing,
                "full-logits" * (not member.chunked_loss),
                "keep" * (member.attention == "keep"),
                member.model.get("attention", ""),
                "lora" * member.lora,
            ],
        )
    ),
)
def test_member_trains_as_the_stock_trainer(ranks, reference, member):
    for found in ranks(member.world_size).run(run_omni, member, timeout=120):
        assert_identical(found, reference(member.lora))


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = {name: run_stock(Member(layout="single", lora=name == "lora")) for name in ("full", "lora")}
    figures = {name: {"losses": run.losses, "norms": run.norms} for name, run in runs.items()}
    COMMITTED.write_text(json.dumps(figures, indent=1) + "\n")
