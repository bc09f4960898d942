"""Which families of transformers work under sequence parallelism, as the sweep over all of them found it."""

from hf_veomni.support.matrix import OUTCOMES, Family, Matrix, load_matrix
from hf_veomni.support.render import render_markdown

__all__ = ["OUTCOMES", "Family", "Matrix", "load_matrix", "render_markdown"]
