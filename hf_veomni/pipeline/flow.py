"""What in a forward depends on some of its variables, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from torch import nn

from hf_veomni import hf

# Of a tensor: what is the same whatever its values are.
_FORM = {"shape", "size", "dim", "ndim", "dtype", "device"}
_LIKE = {"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty"}


class Flow(ast.NodeVisitor):
    """Which variables of a forward depend on others, be it by a branch.

    Args:
        sources: names of these others.
    """

    def __init__(self, sources: Iterable[str]) -> None:
        self.found = set(sources)
        self._inside = False

    def follow(self, tree: ast.AST) -> None:
        for _ in range(2):  # a loop may read what its end has written
            self.visit(tree)

    def depends(self, node: ast.AST) -> bool:
        return any(isinstance(x, ast.Name) and x.id in self.found for x in ast.walk(node))

    def visit_If(self, node: ast.If) -> None:
        before, self._inside = self._inside, self._inside or self.depends(node.test)
        self.generic_visit(node)
        self._inside = before

    def visit_For(self, node: ast.For) -> None:
        self._assign([node.target], node.iter)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._assign(node.targets, node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._assign([node.target], node.value)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._assign([node.target], node.value)
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._assign([node.target], node.value)
        self.generic_visit(node)

    def _assign(self, targets: Iterable[ast.expr], value: ast.expr | None) -> None:
        if self._inside or (value is not None and self.depends(value)):
            stored = [x for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)]
            self.found |= {x.id for x in stored if x.id not in ("inputs_embeds", "self")}


class ValueFlow(Flow):
    """Which variables depend on the values of some tensors; on their shape, dtype and device they may.

    Masks and rotary tables are handed the embeddings for their form: so the forward of a module without parameters is
    read too, and of functions that make masks the name says it.

    Args:
        owner: the module whose forward it is.
    """

    def __init__(self, owner: nn.Module, sources: Iterable[str]) -> None:
        super().__init__(sources)
        self._owner = owner

    def depends(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self.found
        if isinstance(node, ast.Attribute) and node.attr in _FORM:
            return False
        if isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            return False
        if isinstance(node, ast.Call) and self._reads_form(node):
            return False
        return any(self.depends(child) for child in ast.iter_child_nodes(node))

    def _reads_form(self, call: ast.Call) -> bool:
        """Whether a call makes the same of any values."""
        name = ast.unparse(call.func)
        if "mask" in name or name.rpartition(".")[2] in _LIKE:
            return True
        called = getattr(self._owner, name.removeprefix("self."), None) if name.startswith("self.") else None
        tree = hf.forward_tree(type(called))
        if not isinstance(called, nn.Module) or any(True for _ in called.parameters()) or tree is None:
            return False
        (function,) = (x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x.name == "forward")
        names = [argument.arg for argument in function.args.args][1:]
        given = [*zip(names, call.args, strict=False), *((k.arg or "", k.value) for k in call.keywords)]
        inner = ValueFlow(called, {name for name, value in given if self.depends(value)})
        inner.follow(function)
        returned = [x.value for x in ast.walk(function) if isinstance(x, ast.Return) and x.value is not None]
        return "" not in inner.found and not any(inner.depends(value) for value in returned)
