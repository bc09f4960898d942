"""What packing is for: a row of documents trains like the documents alone. Stock transformers, one process, fp64."""

from pydoc_data.topics import topics

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from hf_veomni.data import OmniDataCollatorWithPacking, pack_dataset


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    return LlamaForCausalLM._from_config(config, dtype=torch.float64, attn_implementation="sdpa").eval()


def loss_and_gradients(model, batches):
    """Summed over tokens, so that batches of different sizes compare; the stock loss computes in fp32."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
        loss.backward()
        total += loss.item()
    return total, [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_packed_loss_equals_the_documents_alone(model, with_labels, streaming):
    texts = sorted(topics.values(), key=len)[:24]
    samples = [{"input_ids": list(text.encode())[: 20 + 9 * number]} for number, text in enumerate(texts)]
    if with_labels:
        for sample in samples:
            ids = sample["input_ids"]
            sample["labels"] = [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]
    alone = []
    for sample in samples:
        labels = torch.tensor([sample.get("labels", sample["input_ids"])])
        alone.append({"input_ids": torch.tensor([sample["input_ids"]]), "labels": labels})
    source = Dataset.from_list(samples)
    packed = list(pack_dataset(source.to_iterable_dataset() if streaming else source, 512))
    assert len(packed) < len(samples) / 2
    collator = OmniDataCollatorWithPacking(1024)
    rows = [collator(packed[start : start + 2]) for start in range(0, len(packed), 2)]
    loss, gradients = loss_and_gradients(model, rows)
    expected, expected_gradients = loss_and_gradients(model, alone)
    assert loss == pytest.approx(expected, rel=1e-12)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-9)
