"""Batches, token counts and random streams of the Trainer, counted by data ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_veomni.mesh import ParallelState, get_parallel_state
from hf_veomni.trainer.adapt import deferred_reduction
from hf_veomni.trainer.loaders import DataRankView, EpochSeeded, Filler, WholeBatches, keep_batches_whole, set_epoch
from hf_veomni.trainer.randomness import own_stream

_Trainer: Any = object  # the Trainer class behind the mixins; typed as Any, since it may be one from another library


def _checksum(batch: Any) -> Tensor | int:
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor):
        return 0
    flat = ids.detach().flatten().long()
    return (flat * (torch.arange(flat.numel(), device=flat.device) % 8191 + 1)).sum()


class BatchingMixin(_Trainer):
    """Overrides of Trainer for a world where several ranks read the same rows.

    Trainer asks `get_tp_size()` for the number of ranks that share a batch; here those are the ranks of an SP group.
    It scales a loss that was divided by all tokens of the window with `num_processes / tp_size`, the number of data
    ranks: FSDP averages over all ranks, so the sum over the data ranks remains, which is what one rank computes.
    """

    _evaluating = False
    _micro_step = 0
    _train_batches: WholeBatches | None = None
    _last_batch: Any = None

    @property
    def parallel_state(self) -> ParallelState:
        return get_parallel_state(self.model)

    def get_tp_size(self) -> int:
        # An evaluated batch is normalised by its own tokens, as one process does it: nothing to scale.
        return self.parallel_state.world_size if self._evaluating else self.parallel_state.sp_size

    def get_cp_size(self) -> int:
        return 1

    @contextmanager
    def _counting_data_ranks(self) -> Iterator[None]:
        arguments = self.args
        view: Any = DataRankView(arguments, self.parallel_state)
        self.args = view
        try:
            yield
        finally:
            self.args = arguments

    def _get_dataloader(
        self, dataset: Any, description: str, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> Any:
        if self.parallel_state.world_size == 1:
            return super()._get_dataloader(dataset, description, *args, is_training=is_training, **kwargs)
        with self._counting_data_ranks():
            loader = super()._get_dataloader(dataset, description, *args, is_training=is_training, **kwargs)
        batches = keep_batches_whole(loader)
        if is_training:
            self._train_batches = batches
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler) and sampler.generator is None:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return EpochSeeded(sampler, seed)
        return sampler

    def _run_epoch(self, *args: Any, epoch: int, train_dataloader: Any, **kwargs: Any) -> None:
        set_epoch(train_dataloader, epoch)
        self._last_batch = None
        super()._run_epoch(*args, epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimizer step, and the tokens in them over all data ranks.

        Returns:
            batches: `num_batches` on every rank, or none. Where rows ran out, fillers take their place.
            num_items: label tokens of the window over all data ranks, or None where the model computes its own mean.

        Collective: one all-gather of three integers over all ranks.

        Raises:
            ValueError: ranks of an SP group read different rows, or a data rank got none at all; on every rank.
        """
        self._micro_step = 0
        if self.parallel_state.world_size == 1:
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
            return self._fill_window(batches, num_batches if batches else 0), num_items
        batches = []
        for batch in _take(epoch_iterator, num_batches):
            ends = self._train_batches is not None and self._train_batches.ends_with_filler
            batches.append(Filler.of(batch) if ends and self.accelerator.gradient_state.end_of_dataloader else batch)
        facts = self._window_facts(batches, device)
        self._check_rows(facts)
        batches = self._fill_window(batches, num_batches if facts[:, 0].any() else 0)
        total = int(facts[:: self.parallel_state.sp_size, 1].sum())
        counted = bool(batches) and self._counts_items(batches[0])
        return batches, torch.tensor(total, device=device) if counted else None

    def _fill_window(self, batches: list[Any], length: int) -> list[Any]:
        """The window at its full length. A stream can end within it, on this rank or on all: Trainer, which expects
        the full number from a stream, would leave the gradients of a short window over for the next one."""
        if batches:
            self._last_batch = batches[-1]
        return batches + [Filler.of(self._last_batch) for _ in range(length - len(batches))]

    def _window_facts(self, batches: list[Any], device: torch.device) -> Tensor:
        """[ranks, 4] on the CPU: batches, label tokens, checksum of the rows, whether an earlier batch is at hand."""
        count = sum((self._count_items(batch) for batch in batches), start=torch.zeros((), dtype=torch.long))
        checksum = sum(_checksum(batch) for batch in batches)
        held = batches or self._last_batch is not None
        mine = [torch.as_tensor(fact, dtype=torch.long) for fact in (len(batches), count, checksum, int(bool(held)))]
        sent = torch.stack([fact.to(device) for fact in mine])
        facts = sent.new_empty(dist.get_world_size() * len(mine))
        dist.all_gather_single(facts, sent)
        return facts.view(-1, len(mine)).cpu()

    def _check_rows(self, facts: Tensor) -> None:
        sp_size = self.parallel_state.sp_size
        for group, rows in enumerate(facts.split(sp_size)):
            if (rows != rows[0]).any():
                raise ValueError(
                    f"Ranks {group * sp_size} to {group * sp_size + sp_size - 1} form an SP group and must read the "
                    f"same rows, but read batches, tokens and checksums {rows[:, :3].tolist()}: seed the dataset's "
                    "shuffling and the collator alike on all ranks, or leave sharding by rank to the trainer."
                )
            if not rows[0, 3] and facts[:, 0].max() > 0:
                raise ValueError(
                    f"Data rank {group} got no batch in this epoch while others did: give the dataset at least "
                    f"{self.parallel_state.dp_size} batches, or shards."
                )

    def _counts_items(self, batch: Any) -> bool:
        return "labels" in batch and bool(self.model_accepts_loss_kwargs or self.compute_loss_func is not None)

    def _count_items(self, batch: Any) -> Tensor:
        """Label tokens of a batch that some position predicts: the rule of the loss."""
        labels = batch.get("shift_labels")
        if labels is None:
            labels = batch.get("labels")
            if not isinstance(labels, Tensor):
                return torch.zeros((), dtype=torch.long)
            labels = labels[..., 1:] if self._loss_shifts_labels else labels
        return labels.ne(-100).sum()

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Called outside of training only: tokens of these batches alone, as one process counts them."""
        if self.parallel_state.world_size == 1:
            return super()._get_num_items_in_batch(batch_samples, device)
        if not batch_samples or not self._counts_items(batch_samples[0]):
            return None
        return torch.stack([self._count_items(batch) for batch in batch_samples]).sum().to(device)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        state = self.parallel_state
        if state.world_size == 1:
            return super().training_step(model, inputs, num_items_in_batch)
        self._micro_step += 1
        # Not dist.get_rank(): replicas of the same plan on another launcher's numbering draw the same masks.
        place = state.dp_rank * state.sp_size + state.sp_rank
        with own_stream(self.args.device, self.args.seed, self.state.global_step, self._micro_step, place):
            return super().training_step(model, inputs, num_items_in_batch)

    def _defer_fsdp_gradient_reduction(self) -> Any:
        return deferred_reduction(self.model)

    def floating_point_ops(self, inputs: Any) -> float:
        """Of this rank: the ranks of an SP group share a row."""
        if isinstance(inputs, Filler):
            return 0
        return super().floating_point_ops(inputs) / self.parallel_state.sp_size

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if isinstance(inputs, Filler):
            inputs = {k: v[:0] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        super()._track_num_input_tokens(inputs)


def _take(iterator: Iterator[Any], count: int) -> Iterator[Any]:
    for _ in range(count):
        try:
            yield next(iterator)
        except StopIteration:
            return
