"""`OmniTrainer`: the stock Trainer on a model that `prepare_omni` prepared. The training loop is Trainer's own."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_veomni import hf
from hf_veomni.compile import compile_layers, warn_of_checkpointing
from hf_veomni.data import OmniDataCollatorWithPacking
from hf_veomni.errors import UnsupportedError
from hf_veomni.fsdp import clip_grad_norm_
from hf_veomni.hf.require import override, require_overrides
from hf_veomni.mesh import get_parallel_state, is_prepared
from hf_veomni.plan import asks_auto
from hf_veomni.prepare import prepare_omni
from hf_veomni.trainer.arguments import OmniTrainingArguments
from hf_veomni.trainer.auto import choose_plan
from hf_veomni.trainer.callbacks import ExpertLoadCallback
from hf_veomni.trainer.card import ModelCardMixin
from hf_veomni.trainer.checkpointing import CheckpointingMixin
from hf_veomni.trainer.counting import count_processes
from hf_veomni.trainer.evaluation import EvaluationMixin
from hf_veomni.trainer.folders import make_output_dir
from hf_veomni.trainer.guarding import GuardMixin
from hf_veomni.trainer.liger import liger_kernels
from hf_veomni.trainer.loaders import check_budget
from hf_veomni.trainer.loop import BatchingMixin
from hf_veomni.trainer.step_report import StepReportMixin
from hf_veomni.trainer.throughput import ThroughputCallback
from hf_veomni.trainer.trl import adapt_trl, check_trl, is_trl, trl_name

_LAYERDROP = ("layerdrop", "decoder_layerdrop", "encoder_layerdrop")


def _with_adapters(model: nn.Module, peft_config: PeftConfig | None) -> nn.Module:
    if peft_config is None:
        return model
    if isinstance(model, PeftModel):
        raise ValueError("`peft_config` was given, but `model` is a PeftModel already: leave one of them out.")
    if is_prepared(model):
        raise UnsupportedError(
            "`peft_config` was given, but `model` is prepared already: adapters are added before the parameters are "
            "sharded. Hand over the plain model, or call get_peft_model before prepare_omni."
        )
    wrapped: Any = get_peft_model(model, peft_config)  # type: ignore[arg-type]
    return wrapped


def _precision(args: Any) -> MixedPrecisionPolicy | None:
    """What the Trainer's autocast says, told to FSDP2: gathers move bf16, shards and reductions stay in fp32."""
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32) if args.bf16 else None


def _stays_stock(model: nn.Module, args: Any) -> bool:
    """Whether one rank trains `model` as it is, since `prepare_omni` takes no such model: a plain module, or one with
    virtual tokens. Rules of a plan need a prepared one."""
    if args.plan.world_size > 1 or args.plan.modules:
        return False
    try:
        hf.base_model(model)
    except UnsupportedError:
        return True
    return False


def _prepare(model: nn.Module, args: Any) -> None:
    """`prepare_omni` in place, and the marks that Trainer looks for."""
    if _stays_stock(model, args):
        if args.use_liger_kernel:
            raise UnsupportedError(
                f"`use_liger_kernel` (True) needs a transformers model without virtual tokens, unlike this "
                f"{type(model).__name__}: leave it out."
            )
        if args.sharded_weights:
            raise UnsupportedError(
                f"`sharded_weights` (True) needs a transformers model without virtual tokens, unlike this "
                f"{type(model).__name__}: leave it and `async_save` out."
            )
        return
    with liger_kernels(model, args):
        if not is_prepared(model):
            prepare_omni(model, args.plan, mp_policy=_precision(args))
    if args.torch_compile:
        if args.gradient_checkpointing:  # which Trainer turns on later
            warn_of_checkpointing()
        compile_layers(model, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    state = get_parallel_state(model)
    if state.plan != args.plan:
        raise ValueError(f"`model` was prepared for the plan ({state.plan}), the arguments say ({args.plan}).")
    base = hf.base_model(model)
    if state.world_size > 1:
        for name in _LAYERDROP:
            if getattr(base.config, name, 0):
                raise UnsupportedError(
                    f"`{name}` ({getattr(base.config, name)}) in the model's config lets ranks skip different layers, "
                    "and then they deadlock: set it to 0."
                )
        # Trainer's mark of a model that owns its placement and gradient reduction: no DDP, no second sharding.
        base._is_distributed_loading_by_transformers = True


def _constructor(trainer: object) -> list[str]:
    """Names, in order, of the arguments of the first constructor behind the mixin that names them."""
    classes = type(trainer).__mro__
    for owner in classes[classes.index(OmniTrainerMixin) + 1 :]:
        names = list(inspect.signature(vars(owner).get("__init__", object)).parameters)[1:]
        if "model" in names:
            return names
    raise TypeError(f"{type(trainer).__name__} has no Trainer behind OmniTrainerMixin.")


class OmniTrainerMixin(
    GuardMixin, ModelCardMixin, StepReportMixin, CheckpointingMixin, EvaluationMixin, BatchingMixin
):
    """Put before a Trainer class: `class MySFT(OmniTrainerMixin, SFTTrainer)`.

    Args:
        model: a transformers model, a `PeftModel`, or a model that `prepare_omni` has prepared. A path or Hub id is
            loaded by the trainer behind, as it does it; for a Trainer of transformers, which loads none, by
            AutoModelForCausalLM. `model_init` works too; its model is prepared each time. In one process any module
            that the trainer behind takes.
        args: `OmniTrainingArguments` (for another base: `class MyConfig(OmniTrainingArguments, SFTConfig)`).
        peft_config: adapters to add before the model is sharded.

    All else as in the Trainer behind it. The model is sharded where that trainer has loaded and adapted it, before it
    reads a parameter.

    Raises:
        ValueError: what cannot be combined with a plan, by name and with the way out.
    """

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        classes = cls.__mro__
        before = [owner for owner in classes[: classes.index(OmniTrainerMixin)] if owner is Trainer]
        if before:
            bases = ", ".join(base.__name__ for base in cls.__bases__)
            raise TypeError(
                f"class {cls.__name__}({bases}): OmniTrainerMixin must come before the trainer class, whose methods "
                "it overrides: put it first."
            )

    def __init__(self, model: Any = None, *given: object, **kwargs: Any) -> None:
        names = _constructor(self)
        kwargs |= dict(zip(names, (model, *given), strict=False))
        args = kwargs["args"] = self._checked_arguments(kwargs.get("args"))
        if isinstance(model, str) and not is_trl(self):
            model = AutoModelForCausalLM.from_pretrained(model)
        module: Any = model
        if asks_auto(args.plan):
            optimizer = (kwargs.get("optimizers") or (None,))[0] or kwargs.get("optimizer_cls_and_kwargs")
            best = choose_plan(
                args,
                model,
                kwargs.get("train_dataset"),
                kwargs.get("peft_config"),
                optimizer,
                quantization=kwargs.get("quantization_config"),
                trainer=self,
            )
            args.settle_plan(best.layout.plan)
            args.activation_checkpointing = args.gradient_checkpointing = best.layout.checkpointing
        check_trl(self, args, model, kwargs)
        check_budget(args, kwargs.get("train_dataset"))
        make_output_dir(args)
        own = is_trl(self) or "peft_config" in names  # then the trainer behind loads, or adds adapters, itself
        self._omni_peft_config = None if own else kwargs.pop("peft_config", None)
        if not is_trl(self):
            kwargs["model"] = None if model is None else _with_adapters(module, self._omni_peft_config)
        # Trainer refuses resumable checkpoints of a model with that mark; here they are our own job.
        resumable, args.save_only_model = args.save_only_model, True
        # Signals are heard by all ranks together, which its callback does not do.
        heard, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
        try:
            super().__init__(**kwargs)
        finally:
            args.save_only_model, args.enable_jit_checkpoint = resumable, heard
        self._check_optimizer()
        self._check_packing()
        self._check_stages()
        if self._smooth_labels(self.model):
            self.label_smoother = None
        self._expert_load: ExpertLoadCallback | None = None
        if args.log_expert_load or args.router_bias_update_speed:
            self._watch_experts(self.model)
        if args.log_throughput:
            self._watch_throughput(self.model)
        if args.step_report:
            self._watch_steps(self.model)

    def _checked_arguments(self, args: object) -> Any:
        wanted = "OmniTrainingArguments"
        if is_trl(self):
            wanted = f"a dataclass of OmniTrainingArguments and the arguments of {trl_name(self)}"
        elif args is None:
            args = OmniTrainingArguments(output_dir="tmp_trainer")
        if not isinstance(args, OmniTrainingArguments):
            given = type(args).__name__ if isinstance(args, TrainingArguments) else "SFTConfig"
            raise ValueError(
                f"`args` ({None if args is None else type(args).__name__}) of {type(self).__name__} must be {wanted}: "
                f"write `@dataclass class Arguments(OmniTrainingArguments, {given}): pass` and use it in place of "
                f"{given}; it has the fields of both, `plan` among them."
            )
        return args

    @override
    def call_model_init(self, trial: Any = None) -> Any:
        model = _with_adapters(super().call_model_init(trial), self._omni_peft_config)
        _prepare(model, self.args)
        self._smooth_labels(model)
        if getattr(self, "_expert_load", None) is not None:
            self._watch_experts(model)
        if self._throughput is not None:
            self._watch_throughput(model)
        if self._step_report is not None:
            self._watch_steps(model)
        return model

    @override
    def _build_accelerator_args(self, **kwargs: object) -> dict[str, Any]:
        """Without accelerate's wrapper around the compiled model: the layers are compiled in place."""
        return {**super()._build_accelerator_args(**kwargs), "dynamo_plugin": None}

    @override
    def create_accelerator_and_postprocess(self) -> None:
        """The first thing that Trainer's constructor does with its model, which whoever comes before has finished."""
        super().create_accelerator_and_postprocess()
        count_processes(self.accelerator)
        if self.model is not None:
            _prepare(self.model, self.args)
        adapt_trl(self, self.accelerator)

    @override
    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """The norm of all gradients before clipping, over all meshes at once."""
        self.accelerator.unscale_gradients()
        return clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

    @override
    def _get_grad_norm(self, model: nn.Module, grad_norm: object = None) -> Any:
        """`grad_norm`: of `_clip_grad_norm`; None where nothing was clipped."""
        norm = clip_grad_norm_(model.parameters(), torch.inf) if grad_norm is None else grad_norm
        return super()._get_grad_norm(model, norm)

    def _check_optimizer(self) -> None:
        """`fully_shard` replaces parameters: an optimizer made before trains tensors that nobody reads."""
        if self.optimizer is None:
            return
        owned = {id(p) for p in self.model.parameters()}
        if any(id(p) not in owned for group in self.optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "`optimizers` holds parameters that are not the prepared model's: call prepare_omni(model, plan) "
                "first and make the optimizer from the result, or pass `optimizer_cls_and_kwargs`."
            )

    def _check_packing(self) -> None:
        if not is_prepared(self.model) and isinstance(self.data_collator, OmniDataCollatorWithPacking):
            raise UnsupportedError(
                f"`data_collator` packs rows, whose documents {type(self.model).__name__} would not keep apart: it is "
                "trained as it is, since `prepare_omni` takes transformers models without virtual tokens. Use a "
                "collator that pads, or LoRA on a transformers model."
            )

    def _watch_experts(self, model: nn.Module) -> None:
        if self._expert_load is not None:  # of the model before, from `model_init`
            self.remove_callback(self._expert_load)
        self._expert_load = ExpertLoadCallback(model, self.args.router_bias_update_speed, self.args.log_expert_load)
        self.add_callback(self._expert_load)

    def _watch_throughput(self, model: nn.Module) -> None:
        if self._throughput is not None:
            self.remove_callback(self._throughput)
        self._throughput = ThroughputCallback(model, self.parallel_state)
        self.add_callback(self._throughput)

    def _smooth_labels(self, model: nn.Module) -> bool:
        """Whether the model's loss smooths labels: in chunks of logits, of which Trainer's smoother wants all."""
        if is_trl(self) or not is_prepared(model):
            return False  # TRL's losses are its own
        loss: Any = hf.loss_set_on(hf.base_model(model))
        if hasattr(loss, "label_smoothing"):
            loss.label_smoothing = float(self.args.label_smoothing_factor)
        return hasattr(loss, "label_smoothing")

    @override
    def log(self, logs: dict[str, float], *args: object, **kwargs: object) -> None:
        """Collective if the experts' load or the throughput is logged: every rank calls it, as Trainer does."""
        if self.args.log_expert_load and self._expert_load is not None and "loss" in logs:
            logs = {**logs, **self._expert_load.take(self.state.global_step)}
        if self._throughput is not None and "loss" in logs:
            logs = {**logs, **self._throughput.take()}
        super().log(logs, *args, **kwargs)

    @override
    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        if self.parallel_state.world_size > 1:
            raise UnsupportedError(
                f"`hyperparameter_search` cannot be combined with the plan ({self.parallel_state.plan}): a trial "
                "would leave its process groups behind. Start one run per trial."
            )
        return super().hyperparameter_search(*args, **kwargs)


require_overrides(OmniTrainerMixin, Trainer)


class OmniTrainer(OmniTrainerMixin, Trainer):
    """The stock Trainer under a plan: same loss, gradients and gradient norm as one rank. See `OmniTrainerMixin`."""
