"""Model cards: what Trainer writes, with the plan, the data and the versions of the run beside it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from transformers.utils import logging

from hf_veomni.comm.agree import together
from hf_veomni.hf.require import override

if TYPE_CHECKING:
    from hf_veomni.trainer.loop import BatchingMixin as _Trainer
else:
    _Trainer = object

TAG = "hf-veomni"
HEADING = "## Trained with hf_veomni"
_PLAN_TAG = "plan:"
_GENERATED = {TAG, "generated_from_trainer"}
_VERSIONS = ("hf-veomni", "torch", "transformers", "accelerate", "peft", "trl", "datasets")
_FIGURES = ("train_loss", "loss", "eval_loss", "tokens_per_second", "mfu")

logger = logging.get_logger(__name__)


def _is_generated(path: Path) -> bool:
    """Whether a card may be written over: there is none, or it is one that a trainer or PEFT has written."""
    if not path.is_file():
        return True
    try:
        data: Any = ModelCard.load(path, ignore_metadata_errors=True).data
    except ValueError:
        return False
    return bool(_GENERATED.intersection(data.tags or [])) or data.library_name == "peft"


def _versions() -> Iterator[str]:
    for name in _VERSIONS:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue


def _describe_data(dataset: Any) -> str:
    """Samples of a training set: how many, and in how many packed sequences."""
    if not hasattr(dataset, "__len__"):
        return "a stream"
    if "document_lengths" not in (getattr(dataset, "column_names", None) or []):
        return f"{len(dataset):,} samples"
    lengths = dataset.with_format(None)["document_lengths"][:]
    tokens = sum(map(sum, lengths))
    return f"{sum(map(len, lengths)):,} samples in {len(dataset):,} packed sequences, {tokens:,} tokens"


class ModelCardMixin(_Trainer):
    """Overrides of Trainer for the card and the Hub."""

    def _describe_run(self) -> Iterator[tuple[str, str]]:
        """What the card says of the run, by name."""
        plan, base = self.args.plan, getattr(getattr(self.model, "config", None), "_name_or_path", "")
        if base:
            yield "Base model", f"`{Path(base).name if Path(base).is_dir() else base}`"
        yield "Plan", f"`{plan}`, {plan.world_size} {'ranks' if plan.world_size > 1 else 'rank'}"
        if self.train_dataset is not None:
            yield "Data", _describe_data(self.train_dataset)
        figures: dict[str, float] = {}
        for entry in self.state.log_history:
            figures |= {name: entry[name] for name in _FIGURES if name in entry}
        if figures:
            said = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            yield "Figures", f"{said} (the last ones logged, after {self.state.global_step} steps)"
        yield "Versions", ", ".join(_versions())

    @override
    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of the trainer behind, with the tags `hf-veomni` and `plan:...` and a section on the run.

        Rank 0 writes; not collective.
        """
        if not self.is_world_process_zero():
            return
        create = super().create_model_card
        given = inspect.signature(create).bind(*args, **kwargs).arguments
        tags, plan_tag = given.get("tags") or [], f"{_PLAN_TAG}{self.args.plan}"
        tags = given["tags"] = [*([tags] if isinstance(tags, str) else tags), TAG, plan_tag]
        create(**given)
        directory = Path(self.args.output_dir)
        card: Any = ModelCard.load(directory / "README.md", ignore_metadata_errors=True)
        # PEFT drops all tags but its own; of the plans of earlier runs Trainer drops none.
        found: list[str] = list(dict.fromkeys([*(card.data.tags or []), *tags]))
        card.data.tags = [tag for tag in found if tag == plan_tag or not tag.startswith(_PLAN_TAG)]
        section = "\n".join(f"- {name}: {value}" for name, value in self._describe_run())
        card.text = f"{card.text.partition(HEADING)[0].rstrip()}\n\n{HEADING}\n\n{section}\n"
        card.save(directory / "README.md")

    @override
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's `save_model`; into the run's own directory with a card, unless a person has written one there."""
        super().save_model(output_dir, _internal_call)
        own = output_dir is None or Path(output_dir) == Path(self.args.output_dir)
        if _internal_call or not own or self.args.push_to_hub:  # which has written one
            return
        if not hasattr(self.model, "config"):  # a plain module, of which Trainer's card knows nothing to say
            return
        with together(f"Writing the model card of '{self.args.output_dir}'"):
            if self.is_world_process_zero():
                if _is_generated(path := Path(self.args.output_dir) / "README.md"):
                    self.create_model_card()
                else:
                    logger.info(f"{path} is kept: no trainer has written it.")

    @override
    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's `push_to_hub`. Collective: every rank saves, rank 0 uploads, and an error of its is all ranks'."""
        given = inspect.signature(super().push_to_hub).bind(*args, **kwargs).arguments
        with together("Making the repository on the Hub"):
            if self.is_world_process_zero() and self.hub_model_id is None:
                self.init_hf_repo(token=given.get("token"), private=given.get("private"))
        with together("Uploading to the Hub"):
            return super().push_to_hub(*args, **kwargs)
