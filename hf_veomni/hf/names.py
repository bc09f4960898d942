"""What touches private names of transformers and peft, but for masks (`attention/mask_reader`) and files (`weights`).

Verified against transformers 5.23 and 5.24, peft 0.20 and 0.21.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import logging
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.expert_parallel import (
    EPImplementation,
    EPImplementationInterface,
    apply_expert_parallelism,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from hf_veomni.errors import UnsupportedError

# transformers 5.24 gives all caches one name; 5.23 has one for mambas and one for the rest.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"

AttentionFunction = Callable[..., tuple[Tensor, Any]]


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model inside `model`: itself, or what a `PeftModel` wraps.

    Raises:
        UnsupportedError: not a transformers model, or a PEFT method that lengthens the row.
    """
    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        if getattr(model.active_peft_config, "is_prompt_learning", False):
            kind = model.active_peft_config.peft_type
            raise UnsupportedError(
                f"PEFT method {kind} puts virtual tokens before every row, which cannot be cut into sequence shards "
                "here: use LoRA or another method that leaves the row as it is."
            )
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"`model` ({type(model).__name__}) must be a transformers PreTrainedModel or a PeftModel on one."
        )
    return model


def text_config(model: Any) -> Any:
    """Configuration of the text backbone."""
    return model.config.get_text_config(decoder=True)


def uses_cache(inputs: Mapping[str, Any]) -> bool:
    """Whether the inputs of a forward, by name, hold a cache or ask for one."""
    return any(inputs.get(name) is not None for name in CACHE_NAMES) or bool(inputs.get("use_cache"))


def keys_read_by_model(config_class: type) -> set[str]:
    """Names that the modelling code beside a config class looks up in its config, by the source."""
    try:
        spec = importlib.util.find_spec(config_class.__module__.replace("configuration_", "modeling_"))
        source = "" if spec is None or spec.origin is None else Path(spec.origin).read_text()
    except (ImportError, ValueError, OSError):  # a class of a script or a notebook
        return set()
    found = re.findall(r"""\bconfig\.([a-z]\w*)\b(?!\()|getattr\((?:self\.)?config, ["'](\w+)["']""", source)
    return {name for pair in found for name in pair if name}


def is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def code_names(module: nn.Module) -> tuple[str, ...]:
    """Names that the forward of a module's class uses, decorators taken off."""
    return inspect.unwrap(type(module).forward).__code__.co_names


def uses_attention_interface(module: nn.Module) -> bool:
    """Whether the module looks its attention function up in `AttentionInterface`: the seam that Ulysses needs."""
    return {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= set(code_names(module))


def towers(model: Any) -> list[nn.Module]:
    """The encoders of images, videos and audio that a model has beside its text backbone."""
    found = [model.get_encoder(modality=modality) for modality in ("image", "video", "audio")]
    return [tower for tower in dict.fromkeys(found) if isinstance(tower, nn.Module) and tower is not model]


def input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The embeddings of tokens, or None where transformers does not know them (FLAVA)."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def find_backbone(model: PreTrainedModel) -> nn.Module:
    """The module with the decoder's `layers`, as far as transformers tells; Llama 4's `get_decoder` is one off."""
    decoder = model.get_decoder()
    if not any(decoder.children()):  # the last layer of ModernBERT's head
        return model.base_model
    return decoder if hasattr(decoder, "layers") else getattr(decoder, "model", decoder)


def heads(model: Any) -> list[nn.Module]:
    """Embeddings of tokens and output head, those that the model has."""
    return [m for m in (input_embeddings(model), model.get_output_embeddings()) if isinstance(m, nn.Module)]


def reads_attention_mask(module: nn.Module) -> bool:
    """Whether an attention module looks into its mask instead of only handing it to the attention function."""
    tree = forward_tree(type(module))
    if tree is None:
        return False
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "attention_mask":
            user = parents[node]
            user = parents[user] if isinstance(user, ast.keyword) else user
            handed = isinstance(user, ast.Call) and isinstance(user.func, ast.Name) and user.func.id != "isinstance"
            handed = handed or isinstance(node.ctx, ast.Store) or _calls_attention(user, parents)
            # ESM and BERT's kin choose between the row's own mask and that of another sequence.
            handed = handed or (isinstance(user, ast.IfExp) and node is not user.test and _names_mask(parents[user]))
            if not handed and not (isinstance(user, ast.Compare) and isinstance(user.ops[0], (ast.Is, ast.IsNot))):
                return True
    return False


def _names_mask(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and all(isinstance(t, ast.Name) and "mask" in t.id for t in node.targets)


def _calls_attention(call: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a node calls a method of the module whose result is no mask."""
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
        return False
    owner, user = call.func.value, parents[call]
    targets = user.targets if isinstance(user, ast.Assign) else []
    return isinstance(owner, ast.Name) and owner.id == "self" and bool(targets) and "mask" not in ast.dump(targets[0])


def first_scaled_position(module: nn.Module) -> int | None:
    """Tokens of a row that an attention with Llama 4's temperature tuning leaves unscaled; None: it scales nothing.

    The scale grows in steps of `floor_scale` tokens, counted from the first token that the layer sees.
    """
    tuned = getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True)
    return int(module.floor_scale) - 1 if tuned else None  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def forward_tree(owner: type) -> ast.AST | None:
    """Syntax tree of transformers' own forward of a class, of which FSDP2 and PEFT may have made another class."""
    for base in owner.__mro__:
        if "forward" in vars(base) and base.__module__.startswith("transformers."):
            try:
                return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(vars(base)["forward"]))))
            except (OSError, SyntaxError):
                return None
    return None


def masks_follow_positions(decoder: nn.Module) -> bool:
    """Whether the backbone hands `position_ids` to the mask creation, so that stock masks separate packed
    documents."""
    tree = forward_tree(type(decoder))
    return tree is not None and any(_hands_positions_to_mask(node) for node in ast.walk(tree))


def _hands_positions_to_mask(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.startswith("create_"):
        return any(keyword.arg == "position_ids" for keyword in node.keywords)
    if isinstance(node, ast.Dict):
        keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
        return {"attention_mask", "position_ids"} <= keys
    return False


def eager_attention(module: nn.Module) -> AttentionFunction:
    """The `eager_attention_forward` beside the class of an attention module."""
    for owner in type(module).__mro__:
        function = getattr(sys.modules.get(owner.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedError(
        f"{type(module).__name__} has no `eager_attention_forward` beside it: load the model with "
        "attn_implementation='sdpa'."
    )


class AttentionConfig:
    """A config as attention modules of one model read it: the model's own, but for the attention that it selects.

    Attributes:
        shared: the model's config, of which all else is read and set.
        state: of the model (a `ParallelState`).
        followed: what `shared` has selected when this selected its own.
    """

    shared: Any
    state: Any
    followed: str

    def __init__(self, config: object, state: object) -> None:
        vars(self).update(shared=config, state=state)
        self.select(attention_name(config))

    @property
    def selected(self) -> str:
        return vars(self)["_attn_implementation"]

    def select(self, name: str) -> str:
        """Select a registered attention for the modules that have this config; returns its name."""
        vars(self).update(followed=attention_name(self.shared), _attn_implementation=name)
        return name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "shared":  # not there yet, while a copy is made
            raise AttributeError(name)
        return getattr(self.shared, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.shared, name, value)


def register_attention(name: str, function: AttentionFunction, masks_of: str) -> None:
    """Register an attention, with the masks of another one."""
    masks = ALL_MASK_ATTENTION_FUNCTIONS.get(masks_of)
    if masks is not None:
        AttentionMaskInterface.register(name, masks)
    AttentionInterface.register(name, function)


def attention_name(config: Any) -> str:
    return config._attn_implementation


def set_attention_name(config: Any, name: str) -> None:
    """Select an attention implementation that is registered, on this config alone."""
    config._attn_implementation_internal = name


def supports_sdpa(model: nn.Module) -> bool:
    return bool(getattr(model, "_supports_sdpa", False))


def fsdp_styles(model: PreTrainedModel) -> dict[str, str] | None:
    """transformers' own FSDP plan for this model: module name -> "free_full_weight" or "keep_full_weight".

    Tied embeddings are folded into one entry. None if the family has no plan.
    """
    if not model.fsdp_plan:
        return None
    # It warns of rules for parts that a model with towers calls by other names; `plan_units` finds these itself.
    log = logging.getLogger("transformers.distributed.mixin")
    log.addFilter(_is_no_unused_rule)
    try:
        _, _, plan = model._resolve_parallel_plans(DistributedConfig(fsdp_size=2))
    finally:
        log.removeFilter(_is_no_unused_rule)
    return plan


def _is_no_unused_rule(record: logging.LogRecord) -> bool:
    return "`fsdp_plan` rules" not in record.getMessage()


def is_layer(module: nn.Module) -> bool:
    """Whether a module is what activation checkpointing runs again as one: a layer of some backbone."""
    return isinstance(module, GradientCheckpointingLayer)


def mark_fsdp_managed(model: PreTrainedModel) -> None:
    """What `generate` looks at to keep the ranks in step while they decode."""
    setattr(model, "_is_fsdp_managed_module", True)  # noqa: B010 (nn.Module's setter takes no bool)


def keep_recorders(model: PreTrainedModel) -> None:
    """Record hidden states and attentions of the same layers where FSDP2 has given a model's class another name."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            _CAN_RECORD_REGISTRY[module] = module._can_record_outputs


def replace_loss(model: PreTrainedModel, loss: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
    """Set `model.loss_function`; returns what `restore_loss` needs.

    transformers keeps a loss that was set in `_loss_function`; without it the loss follows from the loss type.
    """
    own = loss_set_on(model)
    model.loss_function = loss
    return own


def loss_set_on(model: nn.Module) -> Callable[..., Tensor] | None:
    """The loss that was set on a model. `model.loss_function` warns of an unknown loss type where there is no head."""
    return vars(model).get("_loss_function")


def restore_loss(model: PreTrainedModel, loss: Callable[..., Tensor], own: Callable[..., Tensor] | None) -> None:
    """Undo `replace_loss`, unless somebody has set another loss since."""
    if model.loss_function is not loss:
        return
    if own is None:
        del model._loss_function
    else:
        model.loss_function = own


def iterate_configs(decoder: nn.Module, modules: Iterator[nn.Module]) -> list[Any]:
    """The distinct config objects that the backbone and its attention modules read."""
    configs = {id(c): c for c in (getattr(m, "config", None) for m in (decoder, *modules)) if c is not None}
    return list(configs.values())


def is_experts_module(module: nn.Module) -> bool:
    """Whether transformers' `use_experts_implementation` made the class: stacked experts, called with routes."""
    return "_is_expert_parallel" in vars(module) and hasattr(module, "num_experts")


def experts_implementation(experts: nn.Module) -> str | None:
    """The kernels that the config selects for an experts module."""
    return getattr(getattr(experts, "config", None), "_experts_implementation", None)


def find_routers(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """The modules whose output transformers records as router logits, and their place in that output."""
    found: list[tuple[nn.Module, int]] = []
    for owner in model.modules():
        recorders = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits", ())
        for recorder in recorders if isinstance(recorders, (list, tuple)) else (recorders,):
            kind, name = getattr(recorder, "target_class", None), getattr(recorder, "layer_name", None)
            found += [
                (module, recorder.index)
                for path, module in owner.named_modules()
                if kind is not None and isinstance(module, kind) and (name is None or name in path)
            ]
    return list(dict.fromkeys(found))


def apply_expert_plan(
    model: nn.Module, ep_mesh: DeviceMesh, plan: dict[str, str], implementation: type[EPImplementation]
) -> None:
    """transformers' own step: parameters to DTensors on `ep_mesh`, forwards to `implementation`."""
    name = f"{implementation.__module__}.{implementation.__qualname__}"
    EPImplementationInterface.register(name, implementation)
    apply_expert_parallelism(model, ep_mesh, ep_mesh, plan, ep_implementation=name)


def wrap_checkpointing(modules: Iterable[nn.Module], wrapper: type) -> None:
    """Put `wrapper` around the functions that checkpoint these, where they have one and not yet.

    A wrapper keeps what it is around in `inner`.
    """
    for module in modules:
        function = vars(module).get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, wrapper):
            setattr(module, "_gradient_checkpointing_func", wrapper(function))  # noqa: B010 (nn.Module's setter)


def restore_checkpointing(modules: Iterable[nn.Module], wrapper: type) -> None:
    """Undo `wrap_checkpointing`, unless somebody has put another function in its place."""
    for module in modules:
        function: Any = vars(module).get("_gradient_checkpointing_func")
        if isinstance(function, wrapper):
            setattr(module, "_gradient_checkpointing_func", function.inner)  # noqa: B010


__all__ = ["EPImplementation", "ParamWrapper"]
