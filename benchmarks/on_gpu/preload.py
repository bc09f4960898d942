"""Imported once by the fork server, on the CPU: every part starts with these in memory."""

import accelerate  # noqa: F401
import torch
import transformers.modeling_utils  # noqa: F401

import hf_veomni  # noqa: F401

torch.set_num_threads(1)
