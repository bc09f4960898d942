"""Batches, token counts and random streams of the Trainer, counted by data ranks.

Before a step the ranks tell each other about the batches they have read, so that all go on, or stop, together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_veomni import hf
from hf_veomni.data import OmniDataCollatorWithPacking
from hf_veomni.data.batches import BatchRule, find_fault
from hf_veomni.fsdp import deferred_reduction
from hf_veomni.hf.require import override
from hf_veomni.mesh import ParallelState, get_parallel_state, init_parallel_state, is_prepared
from hf_veomni.sequence.randomness import own_stream
from hf_veomni.trainer.facts import BATCHES, REAL, SIGNAL, SPLITS, TOKENS, Notes, exchange_facts, take
from hf_veomni.trainer.loaders import (
    DataRankView,
    DummyBatch,
    EpochSeeded,
    InOrder,
    TokenBudgetSampler,
    UnsplitBatches,
    budget_sampler,
    keep_batches_unsplit,
    set_epoch,
)
from hf_veomni.trainer.losses import MicroBatch, overrides
from hf_veomni.trainer.pace import Pace
from hf_veomni.trainer.signals import Signals
from hf_veomni.trainer.stages import StagesMixin
from hf_veomni.trainer.throughput import ThroughputCallback
from hf_veomni.trainer.trl import noting_nothing


class BatchingMixin(StagesMixin):
    """Overrides of Trainer for a world where several ranks read the same rows."""

    _epoch_is_over = False
    _train_batches: UnsplitBatches | None = None
    _last_batch: Any = None
    _batch_rule: BatchRule | None = None  # of the model that trains
    _budget: TokenBudgetSampler | None = None
    _throughput: ThroughputCallback | None = None
    _pace: Pace  # of the ranks, in this `train`
    _waited = 0.0  # seconds, for the others, in the exchange before
    _signals: Signals | None = None  # that this process has got
    _asked: Mapping[int, int] = MappingProxyType({})  # signals by rank, of which all ranks have heard
    _beside: Callable[[], Exception | None] | None = None  # tells what went wrong beside training on this rank

    _known_state: tuple[Any, ParallelState] | None = None  # of which model

    @property
    def parallel_state(self) -> ParallelState:
        """That of the model being trained."""
        if self._known_state is not None and self._known_state[0] is self.model:
            return self._known_state[1]
        if not is_prepared(self.model):  # a model that one rank trains as it is
            return init_parallel_state(self.args.plan)
        self._known_state = self.model, get_parallel_state(self.model)
        return self._known_state[1]

    @override
    def get_cp_size(self) -> int:
        return 1

    @contextmanager
    def _counting_data_ranks(self, process_index: int) -> Iterator[None]:
        arguments = self.args
        view: Any = DataRankView(arguments, self.parallel_state, process_index)
        self.args = view
        try:
            yield
        finally:
            self.args = arguments

    @override
    def _get_dataloader(
        self, dataset: Any, description: str, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> Any:
        if self.parallel_state.world_size == 1:
            return super()._get_dataloader(dataset, description, *args, is_training=is_training, **kwargs)
        if isinstance(dataset, IterableDataset) and not is_training:
            dataset = InOrder(dataset)
        with self._counting_data_ranks(self.parallel_state.dp_rank):
            loader = super()._get_dataloader(dataset, description, *args, is_training=is_training, **kwargs)
        batches = keep_batches_unsplit(loader)
        if is_training:
            self._train_batches = batches
        return loader

    @override
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.token_budget is not None:
            # Not `train_dataset`: Trainer has taken its columns of lengths away.
            hidden_size = hf.text_config(hf.base_model(self.model)).hidden_size
            self._budget = budget_sampler(self.args, self.train_dataset, self.parallel_state, hidden_size)
            return self._budget
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler) and sampler.generator is None:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return EpochSeeded(sampler, seed)
        return sampler

    @override
    def _set_signature_columns_if_needed(self) -> None:
        """What our collator reads beside the model's arguments stays: raw messages, or the samples of a packed
        sequence."""
        made = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if made and isinstance(self.data_collator, OmniDataCollatorWithPacking):
            known = self._signature_columns
            self._signature_columns = [*known, *(name for name in self.data_collator.reads if name not in known)]

    @override
    def get_total_train_batch_size(self, args: Any) -> int:
        if self._budget is None:
            return super().get_total_train_batch_size(args)
        rows = len(self._budget.lengths) / len(self._budget)  # of a step on all data ranks, on average
        return max(1, round(rows * args.gradient_accumulation_steps))

    @override
    def _run_epoch(self, *args: object, epoch: int, train_dataloader: Any, **kwargs: object) -> None:
        set_epoch(train_dataloader, epoch)
        self._batch_rule = None
        if is_prepared(self.model):
            own = self.compute_loss_func is not None or overrides(self, "compute_loss", "training_step")
            base, needs_labels = hf.base_model(self.model), self.args.plan.pp_size > 1
            self._batch_rule = BatchRule.of(base, needs_labels, own_labels=own)
        self._epoch_is_over = False
        self._last_batch = None
        if kwargs["resume_from_checkpoint"] is not None and epoch == kwargs["epochs_trained"] and self._is_stream():
            # The rest of this rank's stream may be shorter than that of another, or empty: something to fill with.
            self._last_batch = next(iter(train_dataloader.base_dataloader), None)
        super()._run_epoch(*args, epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    @override
    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimizer step, and the tokens in them over all data ranks.

        Returns:
            batches: `num_batches` on every rank, or none. Where rows ran out, dummy batches take their place.
            num_items: label tokens of the window over all data ranks, or None where the model computes its own mean.

        Collective: one all-gather of a few integers over all ranks.

        Raises:
            ValueError: ranks of an SP group read different rows, or a data rank got none at all; on every rank.
            Exception: what reading a batch raised on some rank; on every rank.
        """
        self._micro_step, self._window, self._splits, self._partner = 0, num_batches, False, None
        state = self.parallel_state
        if self._epoch_is_over:
            return [], None  # of a stream Trainer goes on asking, `max_steps` times
        failed = None if self._beside is None else self._beside()
        if state.world_size == 1:
            if failed is not None:
                raise failed
            batches, num_items = super().get_batch_samples(self._checked(epoch_iterator), num_batches, device)
            self._num_real = self._most_real = len(batches)
            self._epoch_is_over = not batches
            return self._fill_window(batches, num_batches if batches else 0), num_items
        begin = time.perf_counter()
        batches, error = take(epoch_iterator, num_batches)
        reading = time.perf_counter() - begin
        error = error or failed or self._find_fault(batches)
        ends = self._train_batches is not None and self._train_batches.ends_with_dummy
        if batches and ends and self.accelerator.gradient_state.end_of_dataloader:
            batches[-1] = DummyBatch.of(batches[-1])
        tokens = sum((self._count_items(batch) for batch in batches), start=torch.zeros((), dtype=torch.long))
        held = self._last_batch is not None
        alone = self._overlaps and num_batches % 2 == 1 and len(batches) == num_batches
        splits = alone and self._counts_items(batches[-1]) and self._can_split(batches[-1])
        told = {"held": held, "splits": splits, "error": error, "notes": self._notes(reading)}
        begin = time.perf_counter()
        facts = exchange_facts(batches, tokens, **told, state=state, device=device)
        self._waited = time.perf_counter() - begin
        self._pace.add(facts)
        self._hear(facts)
        self._splits = bool(facts[:, SPLITS].all())
        batches = self._fill_window(batches, num_batches if facts[:, BATCHES].any() else 0)
        self._epoch_is_over = not batches
        groups = facts[: state.dp_size * state.sp_size : state.sp_size]  # of one pipeline stage, like all others
        self._num_real = int(groups[:, REAL].sum()) / state.dp_size
        self._most_real = int(groups[:, REAL].max())
        if (loader := self.accelerator.gradient_state.active_dataloader) is not None:
            loader.remainder = -1  # no row comes twice, so `gather_for_metrics` has nothing to cut off
        counted = bool(batches) and self._counts_items(batches[0])
        return batches, torch.tensor(int(groups[:, TOKENS].sum()), device=device) if counted else None

    def _find_fault(self, batches: Sequence[Any]) -> Exception | None:
        """Before a model finds it, on one rank alone, while the others wait in a collective."""
        return None if self._batch_rule is None else find_fault(batches, self._batch_rule)

    def _checked(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Each batch before anybody counts its labels."""
        for batch in iterator:
            if (fault := self._find_fault([batch])) is not None:
                raise fault
            yield batch

    def _notes(self, reading: float = 0.0) -> Notes:
        return Notes(0 if self._signals is None else self._signals.received, reading, self._waited)

    def _hear(self, facts: Tensor) -> None:
        self._asked = {rank: number for rank, number in enumerate(facts[:, SIGNAL].tolist()) if number}

    def _hear_while_evaluating(self, facts: Tensor) -> None:
        """Called with what the ranks tell each other before a batch."""

    def _is_stream(self) -> bool:
        return isinstance(self.train_dataset, IterableDataset)

    def _fill_window(self, batches: list[Any], length: int) -> list[Any]:
        """The window at its full length. A stream can end within it, on this rank or on all: Trainer, which expects
        the full number from a stream, would leave the gradients of a short window over for the next one."""
        if batches:
            self._last_batch = batches[-1]
        return batches + [DummyBatch.of(self._last_batch) for _ in range(length - len(batches))]

    def _counts_items(self, batch: Any) -> bool:
        return "labels" in batch and bool(self.model_accepts_loss_kwargs or self.compute_loss_func is not None)

    def _count_items(self, batch: Any) -> Tensor:
        """Label tokens of a batch that some position predicts: the rule of the loss. None in a dummy batch."""
        if isinstance(batch, DummyBatch):
            return torch.zeros((), dtype=torch.long)
        labels = batch.get("shift_labels")
        if labels is None:
            labels = batch.get("labels")
            if not isinstance(labels, Tensor):
                return torch.zeros((), dtype=torch.long)
            labels = labels[..., 1:] if self._loss_shifts_labels else labels
        return labels.ne(-100).sum()

    @override
    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Called outside of training only: tokens of these batches alone, as one process counts them."""
        if self.parallel_state.world_size == 1:
            return super()._get_num_items_in_batch(batch_samples, device)
        if not batch_samples or not self._counts_items(batch_samples[0]):
            return None
        return torch.stack([self._count_items(batch) for batch in batch_samples]).sum().to(device)

    @override
    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        state = self.parallel_state
        self._micro_step += 1
        if self._throughput is not None and not isinstance(inputs, DummyBatch):
            self._throughput.add(inputs)
        if state.plan.pp_size > 1:
            return self._step_of_stages(model, inputs, num_items_in_batch)
        logged = nullcontext() if self._micro_step <= self._most_real else noting_nothing(self)
        # Not dist.get_rank(): replicas of the same plan on another launcher's numbering draw the same masks.
        place = state.dp_rank * state.sp_size + state.sp_rank
        key = self.args.device, self.args.seed, self.state.global_step, self._micro_step, place
        stream = partial(own_stream, *key) if state.world_size > 1 else nullcontext
        batch = MicroBatch(0.0 if isinstance(inputs, DummyBatch) else 1.0, stream=stream)
        if self._waits():
            self._partner = replace(batch, inputs=self._prepare_inputs(inputs))
            return torch.zeros((), device=self.args.device)
        beside, self._partner = self._partner, None
        parts = self._parts(inputs) if self._splits and self._micro_step == self._window else None
        if parts is not None:
            beside = replace(batch, inputs=self._prepare_inputs(parts[0]), stream=partial(own_stream, *key, "first"))
            inputs = parts[1]
        with self._averaging(batch, beside, parts is not None), logged, stream():
            return super().training_step(model, inputs, num_items_in_batch)

    @override
    def _defer_fsdp_gradient_reduction(self) -> Any:
        return deferred_reduction(self.model) if is_prepared(self.model) else super()._defer_fsdp_gradient_reduction()

    @override
    def _finalize_training(self, *args: object, **kwargs: object) -> Any:
        """Trainer's, with the loss of all ranks since the last log, where Trainer adds this rank's.

        Collective: one all-reduce of a scalar over all ranks.
        """
        if self.parallel_state.world_size > 1:
            dist.all_reduce(self._tr_loss)
            self._tr_loss /= self.parallel_state.world_size
        return super()._finalize_training(*args, **kwargs)

    @override
    def floating_point_ops(self, inputs: Any) -> float:
        """Of this rank: the ranks of an SP group share a row."""
        if isinstance(inputs, DummyBatch):
            return 0
        return super().floating_point_ops(inputs) / self.parallel_state.sp_size

    @override
    def _track_num_input_tokens(self, inputs: Any) -> None:
        if isinstance(inputs, DummyBatch):
            inputs = {k: v[:0] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        super()._track_num_input_tokens(inputs)
