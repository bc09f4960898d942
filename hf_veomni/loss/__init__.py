"""The loss of a causal language model: one token-count rule, and no full logits in training.

Read in this order: `targets` (which targets this rank scores, and what the sum is divided by), `lazy_logits` (what the
head returns in place of logits), `chunked` (the sum over tokens, chunk by chunk), `attach` (installs both on a model).
"""

from hf_veomni.loss.attach import CausalLMLoss, attach_chunked_loss, chunked_evaluation, has_chunked_loss
from hf_veomni.loss.lazy_logits import LazyLogits

__all__ = ["CausalLMLoss", "LazyLogits", "attach_chunked_loss", "has_chunked_loss", "chunked_evaluation"]
