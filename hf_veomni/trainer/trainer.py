"""`OmniTrainer`: the stock Trainer on a model that `prepare_omni` prepared. The training loop is Trainer's own."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoModelForCausalLM, Trainer

from hf_veomni import hf
from hf_veomni.mesh import get_parallel_state
from hf_veomni.prepare import prepare_omni
from hf_veomni.sequence.compiling import compile_layers
from hf_veomni.trainer.adapt import is_prepared
from hf_veomni.trainer.arguments import OmniTrainingArguments
from hf_veomni.trainer.batching import BatchingMixin
from hf_veomni.trainer.budget import check_budget
from hf_veomni.trainer.checkpointing import CheckpointingMixin
from hf_veomni.trainer.counting import count_processes
from hf_veomni.trainer.evaluation import EvaluationMixin
from hf_veomni.trainer.expert_load import ExpertLoadCallback
from hf_veomni.trainer.trl import adapted_construction, add_reference_adapter, check_trl, shard_references

_LAYERDROP = ("layerdrop", "decoder_layerdrop", "encoder_layerdrop")


def _with_adapters(model: nn.Module, peft_config: PeftConfig | None) -> nn.Module:
    if peft_config is None:
        return model
    if isinstance(model, PeftModel):
        raise ValueError("`peft_config` was given, but `model` is a PeftModel already: leave one of them out.")
    if is_prepared(model):
        raise ValueError(
            "`peft_config` was given, but `model` is prepared already: adapters are added before the parameters are "
            "sharded. Hand over the plain model, or call get_peft_model before prepare_omni."
        )
    wrapped: Any = get_peft_model(model, peft_config)  # type: ignore[arg-type]
    return wrapped


def _precision(args: Any) -> MixedPrecisionPolicy | None:
    """What the Trainer's autocast says, told to FSDP2: gathers move bf16, shards and reductions stay in fp32."""
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32) if args.bf16 else None


def _prepared(model: nn.Module, args: Any) -> nn.Module:
    if not is_prepared(model):
        model = prepare_omni(model, args.plan, mp_policy=_precision(args))
    if args.torch_compile:
        compile_layers(model, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    state = get_parallel_state(model)
    if state.plan != args.plan:
        raise ValueError(f"`model` was prepared for the plan ({state.plan}), the arguments say ({args.plan}).")
    base = hf.base_model(model)
    if state.world_size > 1:
        for name in _LAYERDROP:
            if getattr(base.config, name, 0):
                raise ValueError(
                    f"`{name}` ({getattr(base.config, name)}) in the model's config lets ranks skip different layers, "
                    "and then they wait for each other for ever: set it to 0."
                )
        # Trainer's mark of a model that owns its placement and gradient reduction: no DDP, no second sharding.
        base._is_distributed_loading_by_transformers = True
    return model


class OmniTrainerMixin(CheckpointingMixin, EvaluationMixin, BatchingMixin):
    """Put before a Trainer class: `class MySFT(OmniTrainerMixin, SFTTrainer)`.

    Args:
        model: a transformers model, a `PeftModel`, a path or Hub id for AutoModelForCausalLM, or a model that
            `prepare_omni` has prepared. `model_init` works too; its model is prepared each time.
        args: `OmniTrainingArguments` (for another base: `class MyConfig(OmniTrainingArguments, SFTConfig)`).
        peft_config: adapters to add before the model is sharded.

    All else as in the Trainer behind it.

    Raises:
        ValueError: what does not go with a plan, by name and with the way out.
    """

    def __init__(
        self, model: Any = None, args: Any = None, *rest: Any, peft_config: Any = None, **kwargs: Any
    ) -> None:
        args = OmniTrainingArguments(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, OmniTrainingArguments):
            raise ValueError(
                f"`args` ({type(args).__name__}) must be OmniTrainingArguments, or a class that inherits from it and "
                "from the arguments of your trainer."
            )
        check_trl(self, args)
        # By name where the caller did: the second argument of TRL's DPOTrainer is its reference model.
        kwargs, rest = (kwargs, (args, *rest)) if rest else ({**kwargs, "args": args}, ())
        check_budget(args, rest[2] if len(rest) > 2 else kwargs.get("train_dataset"))
        self._omni_peft_config = peft_config
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model)
        if model is not None:
            model = self._ready(model, args)
        # Trainer refuses resumable checkpoints of a model with that mark; here they are our own job.
        resumable, args.save_only_model = args.save_only_model, True
        try:
            with adapted_construction(self, model):
                super().__init__(model, *rest, **kwargs)
        finally:
            args.save_only_model = resumable
        check_trl(self, args)  # once more: it has read the model's config
        self._check_optimizer()
        self._take_over_label_smoothing()
        self._expert_load: ExpertLoadCallback | None = None
        if args.log_expert_load or args.router_bias_update_speed:
            self._expert_load = ExpertLoadCallback(self.model, args.router_bias_update_speed, args.log_expert_load)
            self.add_callback(self._expert_load)

    def _ready(self, model: Any, args: Any) -> Any:
        """Adapters, then `prepare_omni`, and the marks that Trainer looks for."""
        model = _with_adapters(model, self._omni_peft_config)
        if args.plan.world_size > 1:
            add_reference_adapter(self, model)
        return _prepared(model, args)

    def call_model_init(self, trial: Any = None) -> Any:
        return self._ready(super().call_model_init(trial), self.args)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Without accelerate's wrapper around the compiled model: the layers are compiled in place."""
        return {**super()._build_accelerator_args(**kwargs), "dynamo_plugin": None}

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        count_processes(self.accelerator)
        shard_references(self, self.accelerator, self.args.plan)

    def _check_optimizer(self) -> None:
        """`fully_shard` replaces parameters: an optimizer made before trains tensors that nobody reads."""
        if self.optimizer is None:
            return
        owned = {id(p) for p in self.model.parameters()}
        if any(id(p) not in owned for group in self.optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "`optimizers` holds parameters that are not the prepared model's: call prepare_omni(model, plan) "
                "first and make the optimizer from the result, or hand over `optimizer_cls_and_kwargs`."
            )

    def _take_over_label_smoothing(self) -> None:
        """Trainer's smoother wants the full logits; our loss smooths while it goes over them in chunks."""
        loss: Any = hf.base_model(self.model).loss_function
        if hasattr(loss, "label_smoothing"):
            loss.label_smoothing = float(self.args.label_smoothing_factor)
            self.label_smoother = None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Collective if the experts' load is logged: every rank calls it, as Trainer does."""
        if self.args.log_expert_load and self._expert_load is not None and "loss" in logs:
            logs = {**logs, **self._expert_load.take(self.state.global_step)}
        super().log(logs, *args, **kwargs)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        if self.parallel_state.world_size > 1:
            raise ValueError(
                f"`hyperparameter_search` does not go with the plan ({self.parallel_state.plan}): a trial would leave "
                "its process groups behind. Start one run per trial."
            )
        return super().hyperparameter_search(*args, **kwargs)


class OmniTrainer(OmniTrainerMixin, Trainer):
    """The stock Trainer under a plan: same loss, gradients and gradient norm as one rank. See `OmniTrainerMixin`."""
