"""The declarative parallel plan: sizes of the mesh axes and rules by module name. Imports no torch."""

from __future__ import annotations

import difflib
import fnmatch
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from math import prod
from pathlib import Path
from typing import Any

ENV_VARIABLE = "HF_VEOMNI_PLAN"
# What `accelerate launch` passes on verbatim from `parallelism_config_sp_backend` in its yaml (accelerate 1.15).
ACCELERATE_ENV_VARIABLE = "PARALLELISM_CONFIG_SP_BACKEND"
ACCELERATE_PREFIX = "veomni:"

SIZES = ("dp_replicate_size", "dp_shard_size", "sp_size", "ep_size", "pp_size")
SHORT_NAMES = {"dp_replicate": "dp_replicate_size", "dp_shard": "dp_shard_size", "dp": "dp_shard_size"}
SHORT_NAMES |= {"sp": "sp_size", "ep": "ep_size", "pp": "pp_size"}

OVERLAPS = ("none", "pairs", "chunks")
AUTO = "auto"  # for OmniTrainer, which knows model, data and device

# What a rule in `modules` may say. A key or value that nothing reads would be an option without effect.
MODULE_RULES: dict[str, tuple[str, ...]] = {
    "fsdp": ("free", "keep"),
    "sp": ("gather", "balance", "replicate", "ulysses"),
    "overlap": ("none", "chunks"),
    "checkpointing": ("keep",),
    "tokens": ("tiled",),
}


# What other tools call their axes, and what to write here.
_ELSEWHERE = {
    "fsdp": "parameters are sharded over `dp_shard` times `sp`: write dp_shard=N",
    "hsdp": "replicas of a sharded model: write dp_replicate=M,dp_shard=N",
    "zero": "parameters are sharded over `dp_shard` times `sp`: write dp_shard=N",
    "ddp": "full replicas: write dp_replicate=N,dp_shard=1",
    "cp": "there is no context parallelism; Ulysses sequence parallelism shares long sequences: write sp=N",
    "ulysses": "Ulysses sequence parallelism: write sp=N",
    "tp": "there is no tensor parallelism; dp_shard shards large models, sp shares long sequences",
    "etp": "there is no tensor parallelism in experts; ep shards them by expert",
}


def _unknown_key(key: str, valid: Iterable[str]) -> str:
    """What to write in place of an unknown plan key."""
    plain = key.lower().removesuffix("_size").removesuffix("_degree")
    if plain in SHORT_NAMES:
        return f"did you mean '{plain}'?"
    if plain in _ELSEWHERE:
        return f"{_ELSEWHERE[plain]}."
    return f"{nearest(key, valid)}."


def nearest(name: str, valid: Iterable[str]) -> str:
    """The nearest of the valid names, if one is near, and all of them."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}Valid: {', '.join(valid)}"


def asks_auto(plan: object) -> bool:
    """Whether a plan is left to the planner: "auto", or "auto:DEVICE"."""
    return isinstance(plan, str) and plan.partition(":")[0].strip() == AUTO


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, min(number, 1024) + 1) if number % d == 0)


@dataclass(frozen=True)
class ParallelPlan:
    """How a model is laid out over the ranks: sizes of the mesh axes, and rules for modules by name pattern.

    The world is `pp x dp_replicate x dp_shard x sp`, the innermost axis last: the ranks of an SP group are neighbours.
    Parameters are sharded over `fsdp = dp_shard x sp` and replicated over `dp_replicate` (HSDP). `sp` is Ulysses
    sequence parallelism: the ranks of an SP group share each row.

    Args:
        dp_replicate_size: number of replicas of the sharded model.
        dp_shard_size: data ranks that shard one replica; None takes what is left of the world in `resolve`.
        sp_size: ranks that share the sequence axis of a row.
        ep_size: ranks that share the experts; divides `dp_shard_size * sp_size`.
        pp_size: pipeline stages; each has some of the layers, and all other axes lie within one (docs/pipeline.md).
        pp_layers: how many layers each stage has, in a string "10+6"; None shares them out by what they cost.
        pp_stages: stages of each rank: with several, rank 0 has the first and the one after the last rank's first,
            and so on, and ranks stand still for so many times less; they send so many times more.
        modules: rules by module-name pattern (`fnmatch`), for example `{"lm_head": {"fsdp": "keep"}}`. Rules:
            `fsdp`: "free" gives the module an FSDP unit of its own that frees its weight after forward; "keep" one
            that keeps it gathered until its backward.
            `sp`: "gather" runs a module that mixes tokens (a state space, an attention of its own kind) on full
            documents and slices its output: right for any, at up to sp times the compute. A tower of images, videos
            or audio clips: "balance" (the default) assigns complete items and runs of frames to the SP ranks,
            "ulysses" cuts the patches of each call over them, for an image too large for one, and "replicate" runs the
            tower on all.
            `overlap`: "chunks" or "none" for an attention or experts module, where it differs from the plan's.
            `checkpointing`: "keep" has activation checkpointing keep what an attention module's kernel computes and
            its exchanges bring, in place of doing both again (docs/trainer.md).
            `tokens`: "tiled" computes a dense MLP for 4,096 tokens at a time, in the backward too.
        overlap: "pairs" runs two sequences at once, so that one computes while the other one exchanges, and FSDP2
            gathers a layer's parameters once for both. "chunks" exchanges by chunks of heads and of tokens, which run
            under each other's attention and experts. "none" exchanges all at once (docs/overlap.md).

    Raises:
        ValueError: a size that is no positive integer, sizes that do not fit each other, or an unknown rule.
        UnsupportedError: `pp_size` above 1 with an `overlap`.
    """

    dp_replicate_size: int = 1
    dp_shard_size: int | None = None
    sp_size: int = 1
    ep_size: int = 1
    pp_size: int = 1
    modules: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    overlap: str = "none"
    pp_layers: tuple[int, ...] | None = None
    pp_stages: int = 1

    def __post_init__(self) -> None:
        for name in SIZES:
            size = getattr(self, name)
            if size is None and name == "dp_shard_size":
                continue
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"`{name}` ({size!r}) must be a positive integer.")
        if self.dp_shard_size is not None:
            self._check_experts()
        self._check_modules()
        self._settle_layers()
        if self.overlap not in OVERLAPS:
            raise ValueError(f"`overlap` ({self.overlap!r}) is unknown: {nearest(str(self.overlap), OVERLAPS)}.")
        if self.pp_size > 1 and self.overlap != "none":
            from hf_veomni.errors import UnsupportedError  # here: the package imports torch

            raise UnsupportedError(
                f"`overlap` ({self.overlap!r}) cannot be combined with `pp_size` ({self.pp_size}): micro-batches in "
                "flight belong to the pipeline's schedule. Leave `overlap` out, or use pp_size=1."
            )

    def __hash__(self) -> int:
        rules = {pattern: frozenset(rule.items()) for pattern, rule in self.modules.items()}
        sizes = (getattr(self, name) for name in (*SIZES, "pp_stages"))
        return hash((*sizes, frozenset(rules.items()), self.overlap, self.pp_layers))

    def _check_experts(self) -> None:
        shard = self.fsdp_size
        if shard % self.ep_size:
            raise ValueError(
                f"`ep_size` ({self.ep_size}) must divide `dp_shard_size * sp_size` ({shard}): use {_divisors(shard)}."
            )

    def _settle_layers(self) -> None:
        stages = self.pp_stages
        if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1 or (stages > 1 and self.pp_size == 1):
            raise ValueError(
                f"`pp_stages` ({stages!r}) must be a positive integer, and 1 without a pipeline (`pp_size` is "
                f"{self.pp_size})."
            )
        if self.pp_layers is None:
            return
        if self.pp_size == 1:
            raise ValueError(
                f"`pp_layers` ({self.pp_layers!r}) says which layers each stage of a pipeline has, and there is none "
                "(`pp_size` is 1): leave it out, or set `pp_size`."
            )
        given: Any = self.pp_layers
        parts = given.split("+") if isinstance(given, str) else given
        numbers = isinstance(parts, list | tuple) and all(str(part).strip().isdecimal() for part in parts)
        layers = tuple(int(part) for part in parts) if numbers else ()
        if len(layers) != self.pp_size * stages or 0 in layers:
            raise ValueError(
                f"`pp_layers` ({given!r}) must have a positive number for each of the `pp_size * pp_stages` "
                f"({self.pp_size} * {stages}) stages, as in '{'+'.join(['8'] * self.pp_size * stages)}'; without it "
                "layers are shared out by their cost."
            )
        object.__setattr__(self, "pp_layers", layers)

    def _check_modules(self) -> None:
        if not isinstance(self.modules, Mapping):
            raise ValueError(f"`modules` ({self.modules!r}) must map module-name patterns to rules.")
        for pattern, rules in self.modules.items():
            if not isinstance(pattern, str):
                raise ValueError(f"`modules` has the pattern {pattern!r}: it must be a string such as 'lm_head'.")
            if not isinstance(rules, Mapping) or not rules:
                raise ValueError(f"`modules[{pattern!r}]` ({rules!r}) must map rule names to values.")
            for key, value in rules.items():
                if key not in MODULE_RULES:
                    raise ValueError(
                        f"Unknown rule '{key}' in `modules[{pattern!r}]`: {nearest(str(key), MODULE_RULES)}."
                    )
                if value not in MODULE_RULES[key]:
                    hint = nearest(str(value), MODULE_RULES[key])
                    raise ValueError(f"`modules[{pattern!r}]`: '{key}' ({value!r}) is unknown: {hint}.")

    @property
    def fsdp_size(self) -> int:
        """Ranks that shard the dense parameters of one replica: `dp_shard_size * sp_size` (of a resolved plan)."""
        return self._resolved_shard() * self.sp_size

    @property
    def efsdp_size(self) -> int:
        """Ranks that shard the same experts: `dp_shard_size * sp_size / ep_size` (of a resolved plan)."""
        return self.fsdp_size // self.ep_size

    @property
    def dp_size(self) -> int:
        """Data ranks, each with rows of its own: `dp_replicate_size * dp_shard_size` (of a resolved plan)."""
        return self.dp_replicate_size * self._resolved_shard()

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage, all of them without a pipeline (of a resolved plan)."""
        return self.dp_size * self.sp_size

    @property
    def world_size(self) -> int:
        """Number of ranks that the plan is for (of a resolved plan)."""
        return self.pp_size * self.stage_size

    def _resolved_shard(self) -> int:
        if self.dp_shard_size is None:
            raise ValueError("`dp_shard_size` (None) is open: call `plan.resolve(world_size)` first.")
        return self.dp_shard_size

    def resolve(self, world_size: int) -> ParallelPlan:
        """The same plan with `dp_shard_size` filled in from what is left of the world.

        Raises:
            ValueError: the sizes do not multiply to `world_size`.
        """
        rest = prod((self.pp_size, self.dp_replicate_size, self.sp_size))
        shard = self.dp_shard_size
        if shard is None:
            if world_size % rest:
                raise ValueError(
                    f"`pp_size * dp_replicate_size * sp_size` ({self.pp_size} * {self.dp_replicate_size} * "
                    f"{self.sp_size} = {rest}) must divide the number of ranks ({world_size}): start a multiple of "
                    f"{rest} ranks or make the sizes smaller."
                )
            shard = world_size // rest
        elif shard * rest != world_size:
            raise ValueError(
                f"`pp_size * dp_replicate_size * dp_shard_size * sp_size` ({self.pp_size} * {self.dp_replicate_size} "
                f"* {shard} * {self.sp_size} = {shard * rest}) must equal the number of ranks ({world_size}): start "
                f"{shard * rest} ranks, or leave `dp_shard_size` out to take what is left."
            )
        return replace(self, dp_shard_size=shard)

    def says(self, rule: str) -> bool:
        """Whether `modules` has such a rule for any module."""
        return any(rule in rules for rules in self.modules.values())

    def match_modules(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Rules for each module name that a pattern of `modules` matches; later patterns win.

        Raises:
            ValueError: a pattern matches nothing; the message lists near names.
        """
        names = list(names)
        matched: dict[str, dict[str, str]] = {}
        for pattern, rules in self.modules.items():
            hits = fnmatch.filter(names, pattern)
            if not hits:
                near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
                raise ValueError(f"`modules` pattern {pattern!r} matches no module of the model. Near: {near}.")
            for name in hits:
                matched[name] = {**matched.get(name, {}), **rules}
        return matched

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ParallelPlan:
        """A plan from full (`sp_size`) or short (`sp`) names; unknown names raise with the nearest valid one."""
        valid = {f.name for f in fields(cls)}
        arguments: dict[str, Any] = {}
        for key, value in values.items():
            name = SHORT_NAMES.get(key, key)
            if name not in valid:
                raise ValueError(f"Unknown plan key '{key}': {_unknown_key(str(key), valid | SHORT_NAMES.keys())}")
            if name in arguments:
                raise ValueError(f"Plan key '{key}' sets `{name}` a second time: give it once.")
            arguments[name] = value
        return cls(**arguments)

    @classmethod
    def from_string(cls, text: str) -> ParallelPlan:
        """A plan as one types it: `"sp=2,ep=2,overlap=pairs"`; the empty string is the default plan. Rules need yaml.

        Raises:
            ValueError: an entry that is no `name=integer` (`overlap` and `pp_layers`: a word), or an unknown name.
        """
        values: dict[str, Any] = {}
        if asks_auto(text):
            raise ValueError(
                f"`plan` ('{text}') is chosen by OmniTrainer, which knows model, data and device: name it in its "
                "arguments, and elsewhere take what `hf-veomni plan` finds."
            )
        for entry in filter(None, (part.strip() for part in text.split(","))):
            key, sign, value = (part.strip() for part in entry.partition("="))
            if not sign or not (value.isdecimal() or key in ("overlap", "pp_layers")):
                raise ValueError(f"Plan entry '{entry}' in '{text}' must be name=integer, as in 'sp=2,dp_shard=2'.")
            if key in values:
                raise ValueError(f"Plan key '{key}' appears twice in '{text}': give it once.")
            values[key] = int(value) if value.isdecimal() and key != "pp_layers" else value
        return cls.from_dict(values)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> ParallelPlan:
        """A plan from a yaml file of the constructor's arguments.

        Raises:
            ValueError: no file that holds one mapping, or what the constructor and `from_dict` refuse.
        """
        from hf_veomni.yaml_files import read_mapping  # here: the package imports torch

        return cls.from_dict(read_mapping(path, "Plan file", "sp_size: 2"))

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        values: dict[str, Any] = {name: getattr(self, name) for name in SIZES}
        if self.modules:
            values["modules"] = {pattern: dict(rules) for pattern, rules in self.modules.items()}
        if self.overlap != "none":
            values["overlap"] = self.overlap
        if self.pp_layers is not None:
            values["pp_layers"] = list(self.pp_layers)
        if self.pp_stages != 1:
            values["pp_stages"] = self.pp_stages
        return values

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write the plan so that `from_yaml` reads the same plan back."""
        import yaml

        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_env(cls) -> ParallelPlan:
        """The plan that the launcher passed on: `HF_VEOMNI_PLAN` (string or yaml path), else the accelerate yaml.

        `accelerate launch` hands `parallelism_config_sp_backend: "veomni:sp=2"` of its yaml over verbatim. Without
        either, the default plan.

        Raises:
            ValueError: both are set and differ, or a string does not parse.
        """
        found = {}
        if text := os.environ.get(ENV_VARIABLE):
            found[ENV_VARIABLE] = cls.parse(text)
        backend = os.environ.get(ACCELERATE_ENV_VARIABLE, "")
        if backend.startswith(ACCELERATE_PREFIX):
            found[ACCELERATE_ENV_VARIABLE] = cls.from_string(backend.removeprefix(ACCELERATE_PREFIX))
        elif backend not in ("", "deepspeed", "None"):
            raise ValueError(
                f"`parallelism_config_sp_backend` ({backend!r}) in the launcher's yaml names no plan: write it as "
                f"'{ACCELERATE_PREFIX}sp=2,dp_shard=2', with the colon."
            )
        elif not found and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true":
            # accelerate drops unknown keys of the section, so a mistyped key would silently mean the default plan.
            raise ValueError(
                f"The launcher's yaml has a `parallelism_config` but no plan (sp_backend is {backend!r}): give it as "
                f'`parallelism_config_sp_backend: "{ACCELERATE_PREFIX}sp=2"` and check the spelling of the key.'
            )
        plans = list(found.values())
        if len(plans) == 2 and plans[0] != plans[1]:
            raise ValueError(f"{ENV_VARIABLE} ({plans[0]}) and the accelerate yaml ({plans[1]}) differ: set one.")
        return plans[0] if plans else cls()

    @classmethod
    def parse(cls, plan: ParallelPlan | Mapping[str, Any] | str | os.PathLike[str] | None) -> ParallelPlan:
        """A plan from whatever a user hands over: a plan, a mapping, a string, a yaml path; None reads `from_env`."""
        if plan is None:
            return cls.from_env()
        if isinstance(plan, ParallelPlan):
            return plan
        if isinstance(plan, Mapping):
            return cls.from_dict(plan)
        if isinstance(plan, str) and (asks_auto(plan) or not plan.endswith((".yaml", ".yml"))):
            return cls.from_string(plan)
        if isinstance(plan, (str, os.PathLike)):
            return cls.from_yaml(plan)
        raise ValueError(
            f"`plan` ({plan!r}) must be a ParallelPlan, a mapping, a string such as 'sp=2' or a yaml path."
        )

    def __str__(self) -> str:
        short = {full: name for name, full in SHORT_NAMES.items() if name != "dp"}
        sizes = ((short[name], getattr(self, name)) for name in SIZES)
        entries = [f"{name}={size}" for name, size in sizes if size is not None and size != 1]
        if self.pp_layers is not None:
            entries.append(f"pp_layers={'+'.join(map(str, self.pp_layers))}")
        if self.pp_stages != 1:
            entries.append(f"pp_stages={self.pp_stages}")
        return ",".join(entries + [f"overlap={self.overlap}"] * (self.overlap != "none")) or "single"
