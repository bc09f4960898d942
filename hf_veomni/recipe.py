"""A training run as one yaml file, for people who write no script: `hf-veomni train recipe.yaml`.

    model: HuggingFaceTB/SmolLM2-135M-Instruct   # folder or Hub id
    data:
      path: chats.jsonl                          # jsonl, json, csv or parquet files, a saved folder, or a Hub id
      max_tokens: 4096                           # length of a packed sequence
    plan: sp=2
    lora: {r: 16}                                # without it all parameters are trained
    processes: 2
    arguments: {output_dir: outputs/run, max_steps: 100, learning_rate: 2.0e-4}

A recipe is only another way to write a script of thirty lines: `Recipe.script` is that script, and it is what runs.
"""

from __future__ import annotations

import difflib
import os
import pprint
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from math import isfinite
from pathlib import Path
from string import Template
from typing import Any

from hf_veomni.plan import ParallelPlan, asks_auto, nearest
from hf_veomni.yaml_files import read_mapping

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_ENCODERS = r".*(vision|visual|audio|image).*"  # modules that LoRA leaves out unless the recipe names its own

# As LoRA's options are called elsewhere, and by PEFT.
_LORA_NAMES = {
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
}

_DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")

_OVERLONG = ("error", "split", "truncate", "drop")  # of `pack_dataset`

_ARGUMENTS = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}  # a packed sequence is a batch

_SCRIPT = Template('''\
"""Written by `hf-veomni train $source`. Run it with

    $command
"""

$imports

MODEL = $model
MAX_TOKENS = $max_tokens


def main() -> None:
    args = OmniTrainingArguments(
        plan=$plan,
$arguments
    )
    set_seed(args.seed)
    processor = $processor.from_pretrained(MODEL)
    model = $model_class.from_pretrained(MODEL, dtype=$dtype)
    rows = $load
    reader = processor if "input_ids" not in rows.column_names else None  # tokenises while it packs
    train_on = $train_on
$split    with args.main_process_first():  # the others read what it has written
$pack
    trainer = OmniTrainer(
        model,
        args,
        train_dataset=train_rows,
        eval_dataset=$eval_rows,
        data_collator=OmniDataCollatorWithPacking(MAX_TOKENS, reader, model_config=model.config, train_on=train_on),
        processing_class=processor,
        peft_config=$lora,
    )
    trainer.train()
    trainer.save_model()
    if args.process_index == 0:
        print(f"The model is in {args.output_dir}.")


if __name__ == "__main__":
    main()
''')


def _read(cls: type, values: object, where: str) -> Any:
    """An instance of a dataclass from a mapping.

    Raises:
        ValueError: no mapping, an unknown key, or one that is missing.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"`{where}` ({values!r}) must be a mapping.")
    known = {f.name: f for f in fields(cls)}
    for key in values:
        if key not in known:
            raise ValueError(f"Unknown key '{key}' in {where}: {nearest(str(key), known)}.")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"`{name}` is missing in {where}: see `hf-veomni train --help` for an example.")
    return cls(**values)


def _check_texts(where: str, **values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, str) and not (name == "name" and value is None):
            raise ValueError(f"`{where}{name}` ({value!r}) must be a string.")
        if value is not None and (not value or "\0" in value):
            raise ValueError(f"`{where}{name}` ({value!r}) must not be empty, nor hold a byte of zero.")


def _check_plain(where: str, value: Any) -> None:
    """Only what a script can say: yaml knows dates, sets and numbers that are none, too."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise ValueError(f"`{where}` has the key {name!r}: names are strings.")
            _check_plain(f"{where}.{name}", inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_plain(where, inner)
    elif not isinstance(value, (str, int, float, type(None))) or (isinstance(value, float) and not isfinite(value)):
        raise ValueError(f"`{where}` ({value!r}) must be a text, a finite number, true, false, or a list of these.")


@dataclass(frozen=True)
class Data:
    """What a recipe trains on.

    Attributes:
        path: a file, a folder of `datasets.Dataset.save_to_disk`, or a Hub id.
        max_tokens: length of a packed sequence.
        split, name: of a dataset on the Hub.
        train_on: "assistant", "last" or "all" turns of chats; None: those of the assistant in chats, all elsewhere.
        eval_fraction: share of the samples that is held out and evaluated.
        overlong: what becomes of samples of more than `max_tokens`, as in `pack_dataset`.
    """

    path: str
    max_tokens: int
    split: str = "train"
    name: str | None = None
    train_on: str | None = None
    eval_fraction: float = 0.0
    overlong: str = "error"

    def __post_init__(self) -> None:
        _check_texts("data.", path=self.path, split=self.split, name=self.name)
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise ValueError(f"`data.max_tokens` ({self.max_tokens!r}) must be a positive integer.")
        if self.train_on not in (None, "assistant", "last", "all"):
            raise ValueError(f"`data.train_on` ({self.train_on!r}) must be 'assistant', 'last' or 'all'.")
        if self.overlong not in _OVERLONG:
            raise ValueError(f"`data.overlong` ({self.overlong!r}) must be one of {', '.join(_OVERLONG)}.")
        if isinstance(self.eval_fraction, bool) or not isinstance(self.eval_fraction, (int, float)):
            raise ValueError(f"`data.eval_fraction` ({self.eval_fraction!r}) must be a number from 0 to 1.")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"`data.eval_fraction` ({self.eval_fraction!r}) must be at least 0 and less than 1.")
        looks_local = Path(self.path).suffix in _FORMATS or self.path.startswith((".", "/", "~"))
        if looks_local and not Path(self.path).expanduser().exists():
            raise ValueError(f"`data.path` ({self.path}) does not exist.")

    def load(self) -> str:
        """The expression that reads the rows."""
        path = Path(self.path).expanduser()
        if path.suffix in _FORMATS:
            return f"load_dataset({_FORMATS[path.suffix]!r}, data_files={str(path)!r}, split={self.split!r})"
        if (path / "dataset_info.json").is_file():
            return f"load_from_disk({str(path)!r})"
        name = "" if self.name is None else f"{self.name!r}, "
        return f"load_dataset({self.path!r}, {name}split={self.split!r})"


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        model: folder or Hub id.
        data: what is trained on.
        arguments: of `OmniTrainingArguments`, `output_dir` among them.
        plan: as `ParallelPlan` takes it: a string or a mapping.
        lora: arguments of PEFT's `LoraConfig`; None trains all parameters.
        dtype: that the weights are loaded in.
        processes: on this machine; None: one for each GPU.
        source: the file that it was read from.
    """

    model: str
    data: Data
    arguments: Mapping[str, Any]
    plan: str | Mapping[str, Any] = ""
    lora: Mapping[str, Any] | None = None
    dtype: str = "bfloat16"
    processes: int | None = None
    source: str = field(default="recipe.yaml", compare=False)

    def __post_init__(self) -> None:
        _check_texts("", model=self.model, dtype=self.dtype)
        if self.dtype not in _DTYPES:
            raise ValueError(f"`dtype` ({self.dtype!r}) must be one of {', '.join(_DTYPES)}.")
        if not isinstance(self.arguments, Mapping) or "output_dir" not in self.arguments:
            raise ValueError("`arguments` must be a mapping with `output_dir`, where the run writes to.")
        if "plan" in self.arguments:
            raise ValueError("`plan` stands beside `arguments` in a recipe, not in them.")
        if self.lora is not None and not isinstance(self.lora, Mapping):
            raise ValueError(f"`lora` ({self.lora!r}) must be a mapping such as {{r: 16}}; leave it out for none.")
        for name, values in (("arguments", self.arguments), ("lora", self.lora or {})):
            _check_plain(name, values)
        whole = isinstance(self.processes, int) and not isinstance(self.processes, bool)
        if self.processes is not None and not (whole and self.processes > 0):
            raise ValueError(f"`processes` ({self.processes!r}) must be a positive integer.")
        if not asks_auto(self.plan):
            ParallelPlan.parse(self.plan)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Recipe:
        """A recipe from a yaml file.

        Raises:
            ValueError: no such file, not yaml, an unknown or missing key, or a value out of its range.
        """
        values = dict(read_mapping(path, "Recipe", "model: HuggingFaceTB/SmolLM2-135M-Instruct"))
        if "source" in values:
            raise ValueError("Unknown key 'source' in the recipe.")
        values["data"] = _read(Data, values.get("data", {}), "the recipe's `data`")
        return _read(cls, {**values, "source": str(path)}, "the recipe")

    def world_size(self) -> int:
        """How many processes the run has on this machine.

        Raises:
            ValueError: the plan does not fit them.
        """
        import torch

        size = self.processes or max(torch.accelerator.device_count() if torch.accelerator.is_available() else 1, 1)
        if not asks_auto(self.plan):
            ParallelPlan.parse(self.plan).resolve(size)
        return size

    def command(self, script: str) -> list[str]:
        """The command that runs the script, without the interpreter."""
        size = self.world_size()
        if size == 1:
            return [script]
        return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", script]

    def script(self, script: str = "train.py") -> str:
        """The Python script that the recipe stands for.

        Args:
            script: the name that it will have.

        Raises:
            ValueError: an argument that `OmniTrainingArguments` does not know, or a model without a decoder.
        """
        self._check_arguments()
        self._check_lora()
        model_class, processor = self._classes()
        packed = [self._pack("train_rows", "rows.shuffle(seed=args.seed)")]
        split = ""
        if self.data.eval_fraction:
            split = f"    parts = rows.train_test_split({self.data.eval_fraction}, seed=args.seed)\n"
            packed = [self._pack("train_rows", 'parts["train"]'), self._pack("eval_rows", 'parts["test"]')]
        chats = 'reader is not None and "text" not in rows.column_names'
        return _SCRIPT.substitute(
            source=self.source,
            command=" ".join(["python", *self.command(script)]),
            imports=self._imports(model_class, processor),
            model=repr(self.model),
            max_tokens=self.data.max_tokens,
            plan=pprint.pformat(self.plan),
            arguments="\n".join(
                f"        {name}={value!r}," for name, value in {**_ARGUMENTS, **self.arguments}.items()
            ),
            processor=processor,
            model_class=model_class,
            dtype=repr(self.dtype),
            load=self.data.load(),
            split=split,
            pack="\n".join(packed),
            eval_rows="eval_rows" if self.data.eval_fraction else "None",
            train_on=repr(self.data.train_on) if self.data.train_on else f'"assistant" if {chats} else "all"',
            lora=self._lora(model_class),
        )

    def _pack(self, name: str, rows: str) -> str:
        return (
            f"        {name} = pack_dataset(\n            {rows}, MAX_TOKENS, processor=reader, "
            f"overlong={self.data.overlong!r}, model_config=model.config\n        )"
        )

    def _imports(self, model_class: str, processor: str) -> str:
        loader = "load_from_disk" if self.data.load().startswith("load_from_disk") else "load_dataset"
        lora = "from peft import LoraConfig\n" if self.lora is not None else ""
        return (
            f"from datasets import {loader}\n{lora}from transformers import {model_class}, {processor}, set_seed\n\n"
            "from hf_veomni import OmniDataCollatorWithPacking, OmniTrainer, OmniTrainingArguments, pack_dataset"
        )

    def _lora(self, model_class: str) -> str:
        if self.lora is None:
            return "None"
        values = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **self.lora}
        if model_class != "AutoModelForCausalLM":
            values.setdefault("exclude_modules", _ENCODERS)
        return f"LoraConfig({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    def _classes(self) -> tuple[str, str]:
        """Names of the classes that load the model and what reads its samples."""
        from transformers import AutoConfig
        from transformers.models.auto import modeling_auto as auto

        try:
            config = AutoConfig.from_pretrained(self.model)
        except (OSError, ValueError) as error:  # no such folder or model, or nothing that tells its type
            raise ValueError(
                f"`model` ({self.model}) is no folder with a config.json of transformers, and no model of the Hub "
                f"that can be reached: {str(error).splitlines()[0]}"
            ) from error
        if config.model_type in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            return "AutoModelForImageTextToText", "AutoProcessor"
        if config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return "AutoModelForCausalLM", "AutoTokenizer"
        if config.model_type in auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
            return "AutoModelForMultimodalLM", "AutoProcessor"
        raise ValueError(
            f"`model` ({self.model}) is of the type '{config.model_type}', which is no decoder of text: write a "
            "script for it, with its own Auto class and `OmniTrainer`."
        )

    def _check_arguments(self) -> None:
        from hf_veomni.trainer.arguments import OmniTrainingArguments

        known = [f.name for f in fields(OmniTrainingArguments) if f.init]
        for name in self.arguments:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
                raise ValueError(
                    f"Unknown key '{name}' in the recipe's `arguments`: they are those of OmniTrainingArguments. "
                    f"Near: {', '.join(near) or 'none'}."
                )

    def _check_lora(self) -> None:
        from peft import LoraConfig

        known = [f.name for f in fields(LoraConfig) if f.init]
        for name in self.lora or {}:
            if name in _LORA_NAMES:
                raise ValueError(f"Unknown key '{name}' in the recipe's `lora`: PEFT calls it `{_LORA_NAMES[name]}`.")
            if name not in known:
                raise ValueError(f"Unknown key '{name}' in the recipe's `lora`: {nearest(name, known)}.")
