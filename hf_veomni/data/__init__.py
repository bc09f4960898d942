"""Packing and batching: many documents of any modality in a row, rows of equal cost for every data rank."""

from hf_veomni.data.collator import OmniDataCollatorWithPacking
from hf_veomni.data.mixing import mix_datasets
from hf_veomni.data.pack import pack_dataset, unpack
from hf_veomni.data.sampler import BalancedBatchSampler, attention_cost

__all__ = [
    "BalancedBatchSampler",
    "OmniDataCollatorWithPacking",
    "attention_cost",
    "mix_datasets",
    "pack_dataset",
    "unpack",
]
