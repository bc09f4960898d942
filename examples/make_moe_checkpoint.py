"""Upcycle a dense Llama checkpoint into a mixture of experts whose answers are known: those of the dense model.

Every expert starts as a copy of the dense MLP; attention, norms and embeddings are kept, the router is random. Mixtral
scales the weights of a token's experts to sum to one, so their equal outputs add up to the dense one, whatever the
router says. Sparse upcycling, arXiv 2212.05055. The folder is like any on the Hub: safetensors in the dense model's
type, tokenizer, chat template.

    python examples/make_moe_checkpoint.py                                     # SmolLM2-135M -> 4 experts, 746 MB
    python examples/make_moe_checkpoint.py --model HuggingFaceTB/SmolLM2-360M-Instruct --output outputs/moe --experts 8
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from make_checkpoint import DEFAULT_OUTPUT as DENSE
from make_checkpoint import is_checkpoint, make_checkpoint, new_checkpoint, three_steps

DEFAULT_OUTPUT = "outputs/checkpoints/smollm2-135m-moe"
EXPERTS, TOP_K = 4, 2
# Largest difference of a logit in fp32 between dense and upcycled model: the experts' outputs are weighed and summed.
TOLERANCE = 1e-3
TEXT = "A lambda expression is an anonymous function. Python evaluates it to"


def moe_config(dense: PreTrainedModel, experts: int, top_k: int) -> MixtralConfig:
    """The dense model's sizes in a Mixtral config.

    Raises:
        ValueError: not a Llama, one with biases, or numbers of experts that make no mixture.
    """
    config = dense.config
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise ValueError(
            f"`model` ({config.name_or_path}) is of type '{config.model_type}': only Llama checkpoints without biases "
            "can be upcycled, such as HuggingFaceTB/SmolLM2-135M-Instruct."
        )
    if not 1 <= top_k <= experts:
        raise ValueError(f"`top_k` ({top_k}) must be between 1 and `experts` ({experts}): give another --top_k.")
    values = config.to_dict()
    for name in ("architectures", "model_type", "attention_bias", "mlp_bias", "pretraining_tp"):
        values.pop(name, None)
    return MixtralConfig(**values, num_local_experts=experts, num_experts_per_tok=top_k)


def upcycle(dense: PreTrainedModel, experts: int = EXPERTS, top_k: int = TOP_K, seed: int = 0) -> MixtralForCausalLM:
    """A Mixtral with the logits of `dense`, in its type.

    Raises:
        ValueError: a model that cannot be upcycled.
    """
    config = moe_config(dense, experts, top_k)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)  # its random routers stay
    weights = dense.state_dict()
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}.mlp."
        gate, up, down = (weights.pop(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down"))
        weights[f"{prefix}experts.gate_up_proj"] = torch.cat([gate, up]).expand(experts, -1, -1)
        weights[f"{prefix}experts.down_proj"] = down.expand(experts, -1, -1)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("mlp.gate.weight") for name in missing), (missing, unexpected)
    model.tie_weights()
    model.generation_config = dense.generation_config
    return model


@torch.no_grad()
def check_logits(folder: Path, dense: str) -> float:
    """Open both as a user would and compare their logits on one sentence, in fp32. Returns the largest difference.

    Raises:
        ValueError: they differ by more than rounding.
    """
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    logits = [
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits for model in (dense, folder)
    ]
    difference = float((logits[0] - logits[1]).abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(
            f"The logits of '{folder}' differ from those of '{dense}' by {difference:.1e}: it is damaged."
        )
    return difference


def make_moe_checkpoint(
    output: str | Path, dense: str | Path = DENSE, experts: int = EXPERTS, top_k: int = TOP_K
) -> Path:
    """Write the upcycled model to `output`, all or nothing. One that is there already is kept.

    Args:
        dense: checkpoint folder or Hub id; the demo's own is made if need be.

    Raises:
        ValueError: the disk is full, `output` holds something else, or the dense model cannot be upcycled.
    """
    output, dense = Path(output), str(dense)
    if is_checkpoint(output):
        print(f"{output} is there already")
        return output
    if dense == DENSE:
        make_checkpoint(dense)
    model = upcycle(AutoModelForCausalLM.from_pretrained(dense), experts, top_k)
    size = sum(parameter.nbytes for parameter in model.parameters())
    with new_checkpoint(output, needed=size + 50 * 10**6) as scratch, three_steps("write safetensors") as bar:
        model.save_pretrained(scratch, max_shard_size="100GB")
        AutoTokenizer.from_pretrained(dense).save_pretrained(scratch)
        bar.update(2)
        bar.set_description("compare logits")
        difference = check_logits(scratch, dense)
        bar.update()
    print(f"{output}: {experts} experts, top-{top_k}, {size / 1e6:.0f} MB; logits within {difference:.1e} of {dense}")
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DENSE, help="dense checkpoint folder or Hub id (default: %(default)s)")
    parser.add_argument("--output", default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=EXPERTS, help="experts of a layer (default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=TOP_K, help="experts of a token (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        make_moe_checkpoint(arguments.output, arguments.model, arguments.experts, arguments.top_k)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
