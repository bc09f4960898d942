"""Towers of stock models under sequence parallelism: items over the SP ranks, features to those that need them.

    get_image_features (also video, audio) of the model; lm_encode of an OmniModel's encoders
        the ranks of an SP group hold the same items; each encodes its share (`assign_items`)
        one all-to-all of features to the slices with their tokens (`exchange`); backward: the reverse one
        else, one all-gather [rows, width]; backward: a reduce-scatter (sum) to the rank that encoded them
    backbone, pre-hook
        every parameter outside of the backbone gets a gradient, of zeros where a row lacks the modality

Why gradients are those of one rank: a rank's loss counts sp times in its backward, and FSDP takes the mean over the SP
ranks. Of a tower that all ranks run in full, each has the gradient that comes from its slice; the mean of sp times
those is their sum. Of an item that one rank runs, the reduce-scatter sums first and the mean divides after.

What is moved: each rank gets the features of the tokens of its slice, rows * width / sp elements, once for all layers
and for each deep layer. Where a family is not known to use features for these tokens alone, each rank gets all:
(sp - 1) / sp * rows * width elements. Under the rule `sp: ulysses` patches are cut instead of items (`ulysses_vit`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_veomni import hf
from hf_veomni.comm.gather import gather_shards
from hf_veomni.context import Encoding, current, is_generating, within
from hf_veomni.errors import UnsupportedError
from hf_veomni.families import TOWERS
from hf_veomni.fsdp.unused import GiveZeros
from hf_veomni.mesh import ParallelState
from hf_veomni.modality.balance import Assignment, assign_items
from hf_veomni.modality.exchange import exchange_rows, find_ranks, watch_ids
from hf_veomni.modality.items import Items, find_items
from hf_veomni.modality.ready import ReadyTower
from hf_veomni.modality.schedule import FEATURES, TowerPasses, units_of, used_features, why_not
from hf_veomni.modality.ulysses_vit import TowerCut, check_cut

_METHODS = {f"get_{modality}_features": modality for modality in ("image", "video", "audio")}
# PEFT's `modules_to_save` puts a wrapper with two copies in a module's place, whose name users know.
_COPIES = re.compile(r"\.(original_module|modules_to_save\.[^.]+)$")


def find_methods(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The innermost modules that turn items into features, and the names of their methods."""
    if _runs_all(model):
        return [(m, "lm_encode") for m in model.get_submodule("encoders").modules() if hasattr(type(m), "lm_encode")]
    owners = [(m, name) for m in model.modules() for name in _METHODS if callable(getattr(type(m), name, None))]
    return [
        (owner, name)
        for owner, name in owners
        if not any(other is not owner and kind == name and other in set(owner.modules()) for other, kind in owners)
    ]


def attach_towers(
    model: PreTrainedModel, state: ParallelState, undo: list[Callable[[], Any]], attention: str = "auto"
) -> None:
    """Share the items of each row among its SP ranks, and let rows lack any modality beside rows that have it.

    Args:
        model: a stock model; one without towers stays as it is.
        undo: gets how to take it off again.
        attention: "auto" has towers that run complete items, and whose attention is sdpa, use the varlen attention.

    Raises:
        UnsupportedError: a rule of the plan that shards what ranks cannot be made to run together, or asks for balance
            where items cannot be told apart.
    """
    rules = state.plan.match_modules(name for name, _ in model.named_modules() if name)
    methods = find_methods(model)
    _check_rules(model, rules, methods, state.sp_size)
    decoder = hf.find_backbone(model)
    passes: dict[nn.Module, TowerPasses] = {}
    if state.world_size > 1 and decoder is not model and not _runs_all(model):
        outside = _names_outside(model, decoder)
        passes = _attach_passes(model, state, rules, methods, undo)
        if outside or passes:
            hook = partial(_touch, model, _outside_units(outside, rules), passes)
            undo.append(decoder.register_forward_pre_hook(hook, with_kwargs=True).remove)
    if state.sp_size > 1 and methods:
        undo.append(watch_ids(model, list(inspect.signature(model.forward).parameters)))
    cut: dict[nn.Module, None] = {}
    ready: dict[nn.Module, None] = {}
    for owner, name in methods:
        tower = _tower(owner, name)
        kind = "replicate" if state.sp_size == 1 else rules.get(_name_of(model, tower), {}).get("sp", "balance")
        if kind == "replicate" and owner not in passes:
            continue
        if kind == "ulysses":
            cut[tower] = None
        elif kind == "balance" and attention == "auto" and _takes_tables(tower):
            ready[tower] = None
        owner.__dict__[name] = _SharedMethod(owner, name, model, state, kind, passes.get(owner))
        undo.append(partial(owner.__dict__.pop, name, None))
    undo += [TowerCut(tower, state).remove for tower in cut]
    undo += [ReadyTower(tower).remove for tower in ready if tower not in cut]


def _takes_tables(tower: nn.Module) -> bool:
    config: Any = getattr(tower, "config", None)
    return getattr(config, "model_type", None) in TOWERS and hf.attention_name(config) == "sdpa"


def _attach_passes(
    model: PreTrainedModel, state: ParallelState, rules: Any, methods: Sequence[tuple[nn.Module, str]], undo: list
) -> dict[nn.Module, TowerPasses]:
    """What keeps the ranks in step, for the owners of towers that have FSDP units of their own."""
    found: dict[nn.Module, TowerPasses] = {}
    for owner in dict.fromkeys(owner for owner, _ in methods):
        if any(units_of(owner, _name_of(model, owner), rules)):
            found[owner] = TowerPasses(owner, state)
            undo.append(owner.register_forward_pre_hook(found[owner].begin, with_kwargs=True).remove)
    return found


def _runs_all(model: nn.Module) -> bool:
    """Whether a model runs the same parts whatever a row holds, as an `OmniModel` does."""
    return getattr(model, "merges_full_features", False)


def _tower(owner: Any, method: str) -> nn.Module:
    return owner.get_encoder(modality=_METHODS[method]) if method in _METHODS else owner


def _name_of(model: nn.Module, module: nn.Module) -> str:
    name = next((name for name, other in model.named_modules() if other is module), "")
    return _COPIES.sub("", name)


def _check_rules(model: PreTrainedModel, rules: Any, methods: Sequence[tuple[nn.Module, str]], sp_size: int) -> None:
    towers = {_name_of(model, _tower(*method)) for method in methods} - {""}
    for name, rule in rules.items():
        kind = rule.get("sp")
        if kind in ("balance", "replicate", "ulysses") and name not in towers:
            raise UnsupportedError(
                f"The rule 'sp: {kind}' names `{name}`, which is no tower whose items can be told apart: name one of "
                f"{sorted(towers) or 'none (the model has none)'}."
            )
        if kind == "ulysses":
            check_cut(model.get_submodule(name), name, sp_size)
        if "fsdp" in rule and _may_be_skipped(model, model.get_submodule(name)):
            known = [owner for owner, _ in methods if name in units_of(owner, _name_of(model, owner), rules)]
            reason = why_not(known[0]) if known else "no `get_*_features` of the model runs it"
            if reason is not None:
                raise UnsupportedError(
                    f"The rule 'fsdp: {rule['fsdp']}' names `{name}`, which only rows with its modality run, and the "
                    f"other ranks cannot be made to wait for them, since {reason}. Leave the rule out: it is sharded "
                    "with the root."
                )


def _may_be_skipped(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether rows without images or audio do not run a module: a tower, a projector, or a part of them."""
    if _runs_all(model) or not hf.towers(model):
        return False
    inside = {p for other in (hf.find_backbone(model), *hf.heads(model)) for p in other.parameters()}
    return inside.isdisjoint(module.parameters())


def _names_outside(model: nn.Module, decoder: nn.Module) -> list[str]:
    """Trained parameters that a row without images or audio may leave without gradient."""
    inside = {p for module in (decoder, *hf.heads(model)) for p in module.parameters()}
    return [name for name, p in model.named_parameters() if p.requires_grad and p not in inside]


def _outside_units(names: Sequence[str], rules: Any) -> list[str]:
    """Those of the parameters that belong to no FSDP unit of a tower's own, which runs where any rank runs it."""
    units = tuple(f"{name}." for name, rule in rules.items() if "fsdp" in rule)
    return [name for name in names if not name.startswith(units)]


def _touch(
    model: nn.Module,
    names: Sequence[str],
    passes: dict[nn.Module, TowerPasses],
    decoder: nn.Module,
    args: tuple,
    kwargs: dict,
) -> Any:
    loose = [tensor for owner, kept in passes.items() for tensor in kept.finish(owner)]
    hidden = kwargs.get("inputs_embeds")
    if hidden is None or not torch.is_grad_enabled():
        return None
    # What is a shard still belongs to a unit that runs by itself (the encoder of an encoder-decoder).
    parameters = [p for p in map(model.get_parameter, names) if not isinstance(p, DTensor)]
    return args, {**kwargs, "inputs_embeds": GiveZeros.apply(hidden, *parameters, *loose)}


class _SharedMethod:
    """In place of a `get_*_features` method: the stock one, on this rank's share of the items or of their patches.

    `kind` is the rule: "balance", "ulysses" or "replicate". No closure: a deep copy of the model gets one of its own.
    """

    def __init__(
        self,
        owner: nn.Module,
        name: str,
        model: nn.Module,
        state: ParallelState,
        kind: str,
        passes: TowerPasses | None,
    ) -> None:
        self.owner, self.name, self.model, self.state = owner, name, model, state
        self.kind, self.passes = kind, passes
        config = getattr(_tower(owner, name), "config", None)
        self.cuts_videos = getattr(config, "model_type", None) in TOWERS
        self.width = int(getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or 1)
        self.parameters = list(inspect.signature(self._stock).parameters)

    @property
    def _stock(self) -> Callable[..., Any]:
        return getattr(type(self.owner), self.name).__get__(self.owner)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        if current().encoding is not None:  # a video method may call that of images, which has its share already
            return self._stock(*args, **kwargs)
        arguments = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        balanced = self.kind == "balance"
        runs = self.state.sp_size if balanced and self.cuts_videos else 0
        generates = is_generating(self.model)
        items = None if generates else find_items(arguments, self.width, runs)
        cut = self.kind == "ulysses" and not generates
        with within(encoding=Encoding(getattr(self.owner, "config", None), _METHODS.get(self.name), cut)):
            if balanced and items is not None and len(items.costs) > 1:
                return self._encode(items, assign_items(items.costs, self.state.sp_size))
            return self._run([arguments], items)[0]

    def _run(self, calls: list[dict[str, Any]], items: Items | None) -> list[Any]:
        """Outputs of the stock method."""
        if self.passes is None:
            return [self._stock(**call) for call in calls]
        smallest = calls[0] if items is None else items.select([_least_expensive(items)])
        return self.passes.run(self.owner, self.name, calls, smallest)

    def _encode(self, items: Items, assignment: Assignment) -> Any:
        """Features of all items, as the stock method gives them, from this rank's share."""
        mine = assignment.items(self.state.sp_rank).tolist()
        # A rank without an item encodes the least expensive one and hands out nothing of it.
        chosen = mine or [_least_expensive(items)]
        calls = [[i] for i in chosen] if items.one_by_one else [chosen]
        outputs = self._run([items.select(call) for call in calls], items)
        blocks = [_blocks(output, len(call)) for output, call in zip(outputs, calls, strict=True)]
        kinds = [[block for found in blocks for block in found[kind]] for kind in range(len(blocks[0]))]
        lengths, sizes = [len(block) for block in kinds[0]][: len(mine)], self._known_sizes(items)
        if sizes is None:
            sizes = _sizes(lengths, assignment, self.state)
        assert lengths == [sizes[item] for item in mine], (lengths, sizes)
        ranks = None
        if self.name in _METHODS:
            ranks = find_ranks(getattr(self.owner, "config", None), _METHODS[self.name], sum(sizes), self.state)
        full = [_exchange(torch.cat(kind), len(mine), sizes, assignment, ranks, self.state) for kind in kinds]
        return _like(outputs[0], full, items.join(sizes))

    def _known_sizes(self, items: Items) -> list[int] | None:
        """Rows that each item becomes, where its grid tells."""
        if not self.cuts_videos or items.patches is None:
            return None
        unit = int(getattr(_tower(self.owner, self.name), "config", None).spatial_merge_size) ** 2  # pyright: ignore
        return [patches // unit for patches in items.patches]


def _least_expensive(items: Items) -> int:
    return min(range(len(items.costs)), key=items.costs.__getitem__)


def _blocks(output: object, count: int) -> list[list[Tensor]]:
    """Features of each item, [rows, width]: the features proper, then those of each deep layer."""
    return [_split(kind, count) for kind in used_features(output)]


def _split(features: Any, count: int) -> list[Tensor]:
    if isinstance(features, Tensor):
        features = features if features.dim() == 3 and len(features) == count else features.flatten(0, -2).chunk(count)
    blocks = [block.flatten(0, -2) for block in features]
    if len(blocks) != count:
        raise UnsupportedError(
            f"A tower gave {len(blocks)} blocks of features for {count} items, so they cannot be shared among the SP "
            "ranks: run it on all of them, with the rule {'<name of the tower>': {'sp': 'replicate'}} of the plan."
        )
    return blocks


def _sizes(mine: list[int], assignment: Assignment, state: ParallelState) -> list[int]:
    """Rows of every item, in the order of the items. Collective: one all-gather of a few integers."""
    longest = int(assignment.counts.max())
    local = torch.tensor(mine + [0] * (longest - len(mine))).to(state.device, non_blocking=True)
    found = [torch.empty_like(local) for _ in range(state.sp_size)]
    dist.all_gather(found, local, group=state.sp_group)
    everyone = torch.stack(found).tolist()
    rows = [size for row, count in zip(everyone, assignment.counts, strict=True) for size in row[:count]]
    return [rows[place] for place in assignment.inverse]


def _exchange(
    local: Tensor, count: int, sizes: list[int], assignment: Assignment, ranks: Any, state: ParallelState
) -> Tensor:
    """[rows of all items, width] in their order; zeros for rows of other slices where `ranks` tells whose they are."""
    assert state.sp_group is not None
    local = local if count else local[:0]
    if ranks is not None:
        return exchange_rows(local, sizes, assignment, ranks, state)
    counts = assignment.num_rows(sizes).tolist()
    padded = F.pad(local, (0, 0, 0, max(counts) - len(local)))
    full = gather_shards(padded, state.sp_group, dim=0).unflatten(0, (state.sp_size, -1))
    order = torch.from_numpy(assignment.restore(sizes)).to(local.device, non_blocking=True)
    return torch.cat([rows[:length] for rows, length in zip(full, counts, strict=True)])[order]


def _like(output: Any, full: list[Tensor], sizes: list[int]) -> Any:
    """An output of the stock method's kind with the features of all items in it, and nothing else."""
    if isinstance(output, Tensor):
        return full[0].unflatten(0, (len(sizes), -1))
    name = next(name for name in FEATURES if output.get(name) is not None)
    shape = output[name]
    features: Any = full[0]
    if not isinstance(shape, Tensor):
        features = full[0].split(sizes)
    elif shape.dim() == 3:
        features = full[0].unflatten(0, (len(sizes), -1))
    # The Omni thinkers' audio clips are the same tensor under both names, and are read under the second.
    found: dict[str, Any] = {key: features for key in FEATURES if output.get(key) is shape}
    if output.get("deepstack_features") is not None:
        split = not isinstance(output["deepstack_features"][0], Tensor)
        found["deepstack_features"] = [kind.split(sizes) if split else kind for kind in full[1:]]
    return type(output)(**found)
