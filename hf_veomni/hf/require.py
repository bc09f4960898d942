"""What must be there of other libraries, who promise none of it: looked for when this package is imported.

A private name that is gone would otherwise show in the middle of a run, and an override of a method that has another
name now would never be called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pkgutil import resolve_name
from types import CodeType
from typing import TYPE_CHECKING, Any, TypeVar

from hf_veomni.errors import UnsupportedError

# What the three sets of constraints hold, and the versions between.
TESTED = {
    "torch": "2.11 to 2.15",
    "transformers": "5.23 and 5.24",
    "accelerate": "1.15",
    "peft": "0.20 and 0.21",
    "trl": "1.16",
}

_MARK = "__override__"


class VersionError(UnsupportedError, ImportError):
    """An installed library lacks something that this package is built on."""


if TYPE_CHECKING:
    from typing_extensions import override
else:
    _Method = TypeVar("_Method", bound=Callable[..., Any])

    def override(method: _Method) -> _Method:
        """Mark a method that replaces one of a stock class, for `require_overrides` and the type checker."""
        setattr(method, _MARK, True)
        return method


def require(owner: object, names: Iterable[str]) -> None:
    """Raise VersionError unless a module, class or function of a library has all `names`, or its code knows them.

    Args:
        owner: the object, or where it is to be found: "package.module" or "package.module:Class".
    """
    place, found = _resolve(owner)
    missing = [name for name in names if not _has(found, name)]
    if missing:
        raise _error(place, ", ".join(f"`{name}`" for name in missing))


def require_parameters(function: object, names: Iterable[str]) -> None:
    """Raise VersionError unless a function of a library takes arguments of all `names`; found as by `require`."""
    place, found = _resolve(function)
    takes = inspect.signature(found).parameters
    if missing := [f"`{name}`" for name in names if name not in takes]:
        raise _error(place, f"argument {', '.join(missing)}")


def require_overrides(owner: type, stock: type | None = None) -> None:
    """Raise VersionError unless each method marked with `override` replaces one that takes the arguments it names.

    Args:
        owner: a class of this package; what it inherits from classes of this package counts too.
        stock: the class whose methods are replaced, for a mixin; else the library's classes behind `owner`.
    """
    ours = [base for base in owner.__mro__ if base.__module__.startswith("hf_veomni.")]
    behind = [stock] if stock is not None else [base for base in owner.__mro__ if base not in ours]
    for name, method in ((name, method) for base in ours for name, method in vars(base).items()):
        function: Any = method.fget if isinstance(method, property) else method
        if not getattr(function, _MARK, False):
            continue
        base = next((base for base in behind if hasattr(base, name)), None)
        if base is None:
            raise _error(_resolve(behind[0])[0], f"`{name}`")
        if callable(replaced := getattr(base, name)):
            kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            named = [p.name for p in inspect.signature(function).parameters.values() if p.kind not in kinds]
            require_parameters(replaced, named)


def _resolve(owner: Any) -> tuple[str, Any]:
    """Where an object is to be found, and the object."""
    if not isinstance(owner, str):
        return f"{owner.__module__}:{owner.__qualname__}", owner
    try:
        return owner, resolve_name(owner)
    except (ImportError, AttributeError) as error:
        module, _, name = owner.rpartition(":" if ":" in owner else ".")
        raise _error(module, f"`{name}`") from error


def _has(owner: object, name: str) -> bool:
    return hasattr(owner, name) or name in _names_inside(owner)


@lru_cache(maxsize=64)
def _names_inside(owner: object) -> frozenset[str]:
    """Names and strings in the code of a function, or of the methods of a class and of what it inherits from."""
    found: set[str] = set()
    bases = [base for base in getattr(owner, "__mro__", ()) if base is not object]
    members = [member for base in bases for member in vars(base).values()] or [owner]
    parts = [part for m in members for part in ((m.fget, m.fset) if isinstance(m, property) else (m,))]
    codes = [getattr(inspect.unwrap(part), "__code__", None) for part in parts if callable(part)]
    while codes:
        if (code := codes.pop()) is not None:
            found.update(code.co_names, (value for value in code.co_consts if isinstance(value, str)))
            codes += [value for value in code.co_consts if isinstance(value, CodeType)]
    return frozenset(found)


def _error(place: str, missing: str) -> VersionError:
    library = place.partition(":")[0].partition(".")[0]
    try:
        installed = version(library)
    except PackageNotFoundError:
        installed = "of an unknown version"
    return VersionError(
        f"{library} {installed} has no {missing} in `{place}`, on which this release of hf-veomni relies: install "
        f"{library} {TESTED[library]}, with which it was tested, or a newer hf-veomni."
    )
