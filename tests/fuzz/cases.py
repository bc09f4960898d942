"""What a user may get wrong, made up at random: it works, or is refused by an error of ours.

Of ours: a ValueError (UnsupportedError among them) raised in a file of this package, whose message is a sentence that
quotes what is wrong or gives the way out. What torch, yaml or transformers raise below us is none, nor is a hang.
"""

from __future__ import annotations

import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st

import hf_veomni
from hf_veomni import OmniDataCollatorWithPacking, OmniTrainer, OmniTrainingArguments, ParallelPlan
from hf_veomni.recipe import Recipe
from tests.ranks.training import VOCABULARY, tiny_model

LIMIT = 20  # seconds of a case
_PACKAGE = str(Path(hf_veomni.__file__).parent)

_WORDS = ["sp", "sp_size", "dp", "dp_shard", "dp_shard_size", "dp_replicate", "ep", "pp", "overlap", "modules", "cp"]
_WORDS += ["pairs", "chunks", "none", "fsdp", "keep", "free", "gather", "lm_head", "*", "tp", "world"]
_scalars = (
    st.none() | st.booleans() | st.integers(-3, 17) | st.floats() | st.sampled_from([*_WORDS, "", "2"])
    | st.text(max_size=4)
)  # fmt: skip
values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_WORDS) | _scalars, inner, max_size=3),
    max_leaves=6,
)


class Fault(AssertionError):
    """A case that neither worked nor was refused as it should."""


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Fault(f"not done after {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(tally: Counter[str], function: Callable[[], Any]) -> None:
    """Count a case that worked or was refused.

    Raises:
        Fault: any other.
    """
    try:
        with _limited():
            function()
    except Fault:
        raise
    except Exception as error:  # every kind: that is the question
        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = isinstance(error, ValueError) and place.filename.startswith(_PACKAGE)
        told = len(str(error).split()) > 5 and any(mark in str(error) for mark in "`':(")
        if not (ours and told):
            raise Fault(f"{type(error).__name__} from {place.filename}:{place.lineno}: {error}") from error
        tally["refused"] += 1
    else:
        tally["worked"] += 1


# Plans

_entries = st.tuples(st.sampled_from(_WORDS), st.sampled_from(["=", "==", ":", ""]), st.integers(-1, 9) | _scalars)
plan_texts = (
    st.lists(_entries.map(lambda entry: "".join(map(str, entry))), max_size=4).map(",".join) | st.text(max_size=12)
)  # fmt: skip
_sizes = st.sampled_from([1, 2, 3, 4, 8])
_sound = st.dictionaries(st.sampled_from(["sp", "dp_shard", "dp_replicate", "ep"]), _sizes, max_size=4)
plan_values = _sound | st.dictionaries(st.sampled_from(_WORDS), values, max_size=4) | values


def _use(plan: ParallelPlan, world: int) -> None:
    resolved = plan.resolve(world)
    if not plan.modules and resolved.world_size > 1:
        assert ParallelPlan.from_string(str(resolved)).resolve(world) == resolved
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        resolved.to_yaml(file.name)
        assert ParallelPlan.from_yaml(file.name) == resolved


def plan_from_text(text: str, world: int) -> None:
    _use(ParallelPlan.parse(text), world)


def plan_from_values(given: Any, world: int) -> None:
    _use(ParallelPlan.parse(given), world)


# Files

yaml_bytes = (
    values.map(lambda value: yaml.safe_dump(value).encode())
    | _sound.map(lambda value: yaml.safe_dump(value).encode())
    | st.text(alphabet="spe_:=[]{}&*!%#|>-?'\"\n\t 01a", max_size=40).map(str.encode)
    | st.binary(max_size=20)
)


def plan_from_file(content: bytes, world: int) -> None:
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        Path(file.name).write_bytes(content)
        _use(ParallelPlan.parse(file.name), world)


@lru_cache(maxsize=1)
def _sources() -> tuple[str, str]:
    """A model's folder and a file of rows."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    tiny_model().config.save_pretrained(folder)  # type: ignore[attr-defined]
    (folder / "rows.jsonl").write_text('{"text": "one"}\n')
    return str(folder), str(folder / "rows.jsonl")


_known = st.sampled_from(["learning_rate", "max_steps", "output_dir", "lr", "plan", "bf16"])
_sound_data = st.fixed_dictionaries(
    {"path": st.just("ROWS"), "max_tokens": st.integers(1, 64)},
    optional={
        "train_on": st.sampled_from(["assistant", "all"]),
        "eval_fraction": st.floats(0, 0.5),
        "overlong": st.sampled_from(["error", "split", "drop"]),
    },
)
_sound_recipe = st.fixed_dictionaries(
    {"model": st.just("MODEL"), "data": _sound_data, "arguments": st.just({"output_dir": "out", "max_steps": 4})},
    optional={"lora": st.fixed_dictionaries({"r": st.integers(1, 4)}), "dtype": st.just("float32")},
)
_keys = st.sampled_from(["path", "max_tokens", "split", "name", "train_on", "eval_fraction", "overlong", "rows"])
_others = st.fixed_dictionaries(
    {},
    optional={
        "model": values,
        "data": st.builds(lambda data, more: {**data, **more}, _sound_data, st.dictionaries(_keys, values, max_size=2))
        | values,
        "arguments": st.dictionaries(_known, values, max_size=3).map(lambda given: {"output_dir": "out", **given})
        | values,
        "plan": plan_texts | plan_values,
        "lora": st.dictionaries(st.sampled_from(["r", "rank", "lora_alpha"]) | _scalars, values, max_size=2) | values,
        "dtype": st.sampled_from(["bfloat16", "int8"]) | values,
        "processes": st.integers(-1, 4) | values,
        "sourc": values,
    },
)
recipes = st.builds(lambda sound, other: {**sound, **other}, _sound_recipe, _others) | _others  # fmt: skip


def recipe_from_file(given: Any) -> None:
    """As far as the script that it stands for, which must be Python."""
    model, rows = _sources()
    if isinstance(given, dict):
        given = {**given, "model": model} if given.get("model") == "MODEL" else given
        if isinstance(given.get("data"), dict) and given["data"].get("path") == "ROWS":
            given = {**given, "data": {**given["data"], "path": rows}}
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        Path(file.name).write_text(yaml.safe_dump(given))
        recipe = Recipe.from_yaml(file.name)
        recipe.command("train.py")
        compile(recipe.script(), "train.py", "exec")


# Batches

_tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=6)
_bad = st.lists(st.integers(-101, 99) | st.sampled_from([2**40, -(2**40)]), max_size=6) | values
samples = st.lists(
    st.fixed_dictionaries(
        {"input_ids": _tokens | _bad},
        optional={name: _bad for name in ("labels", "position_ids", "attention_mask", "segment", "text")},
    ) | values,
    max_size=3,
)  # fmt: skip
_dtypes = st.sampled_from([torch.long, torch.long, torch.long, torch.int32, torch.float32, torch.bool])
_shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple) | st.just((1, 5)) | st.just((2, 3))
_tensors = st.builds(
    lambda shape, dtype, low, high: torch.randint(low, max(high, low + 1), shape).to(dtype),
    _shapes, _dtypes, st.sampled_from([0, 0, 0, -1, -100, -101]), st.sampled_from([1, 8, VOCABULARY, VOCABULARY + 1]),
)  # fmt: skip


@st.composite
def batches(draw: Any) -> Any:
    """A sound batch of one shape, of which some parts are replaced."""
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 6)))
    ids = torch.randint(0, VOCABULARY, shape)
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone()}
    if draw(st.booleans()):
        batch["attention_mask"] = torch.ones_like(ids)
    replaced = draw(st.lists(st.sampled_from(["input_ids", "labels", "attention_mask", "position_ids"]), max_size=2))
    return batch | {name: draw(_tensors) for name in replaced}


def collated(features: list[Any]) -> None:
    batch = OmniDataCollatorWithPacking(max_tokens=16)(features)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape


@lru_cache(maxsize=1)
def _model() -> Any:
    return tiny_model(num_hidden_layers=1)


def trained(batch: Any) -> None:
    args = OmniTrainingArguments(
        output_dir=tempfile.gettempdir(),
        max_steps=1,
        per_device_train_batch_size=1,
        learning_rate=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    rows: Any = [{"input_ids": [3]}]
    with redirect_stdout(StringIO()):
        OmniTrainer(model=_model(), args=args, train_dataset=rows, data_collator=lambda _: dict(batch)).train()


# Strategies and functions by name, and how many of a hundred cases are theirs.
CASES: dict[str, tuple[tuple[Any, ...], Callable[..., None], int]] = {
    "plan texts": ((plan_texts, st.integers(1, 16)), plan_from_text, 25),
    "plan values": ((plan_values, st.integers(1, 16)), plan_from_values, 20),
    "plan files": ((yaml_bytes, st.integers(1, 16)), plan_from_file, 15),
    "recipes": ((recipes,), recipe_from_file, 15),
    "samples": ((samples,), collated, 15),
    "batches": ((batches(),), trained, 10),
}
