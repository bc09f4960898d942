"""Attention modules of transformers that compare the name of their attention, which is another one under a plan."""

from __future__ import annotations

import ast
from pathlib import Path

import transformers

# Sparse attention: under sequence parallelism only as replicated modules, which keep their config.
_REPLICATED = {
    "AXK2Attention", "DeepseekV32Attention", "Dots3NoteTextAttention", "Glm5NextTextAttention", "GlmMoeDsaAttention",
    "HYV4Attention", "HYV4VLAttention", "MiniMaxM3VLAttention", "MistralLarge4TextAttention",
}  # fmt: skip
# For `reorder_and_upcast_attn` alone, which is refused (`sequence/attention`).
_UPCASTING = {"GPT2Attention", "DecisionTransformerGPT2Attention"}


def _compares(owner: ast.ClassDef) -> bool:
    sides = [
        side for node in ast.walk(owner) if isinstance(node, ast.Compare) for side in (node.left, *node.comparators)
    ]
    return any(isinstance(side, ast.Attribute) and side.attr == "_attn_implementation" for side in sides)


def test_attentions_that_compare_their_name_are_known() -> None:
    found = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        text = path.read_text()
        if "_attn_implementation ==" in text or "_attn_implementation in" in text or "_attn_implementation !=" in text:
            for owner in ast.parse(text).body:
                if isinstance(owner, ast.ClassDef) and "get_interface" in ast.dump(owner) and _compares(owner):
                    found.add(owner.name)
    assert found <= _REPLICATED | _UPCASTING, found - _REPLICATED - _UPCASTING
    assert _UPCASTING <= found
