"""Pipeline parallelism: the model's own forward runs on every stage, and what a stage does not own passes through.

chain        can the model be cut? the loop over its layers, read from the source
flow         what depends on what in the source of a forward
encoders     of images and audio: what stages after the first can do without
split        which layers each stage gets
stage        what stands in place of layers, embeddings, norm and head of other stages
border       hooks at the top of the model
microbatch   what enters and leaves a stage in one micro-batch, and the gradients of both
link         messages between neighbouring stages
schedule     in which order a stage runs forwards and backwards
tied         embeddings that first and last stage share
window       `run_window`: one optimizer step's worth of micro-batches
"""

from hf_veomni.pipeline.border import attach_border
from hf_veomni.pipeline.stage import Stages, cut_model, plan_stages
from hf_veomni.pipeline.tied import check_tied_groups
from hf_veomni.pipeline.window import join_stages, run_window

__all__ = ["Stages", "attach_border", "check_tied_groups", "cut_model", "join_stages", "plan_stages", "run_window"]
