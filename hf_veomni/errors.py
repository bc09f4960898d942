"""The error for a wish that is not supported, and what other ranks raise for an error of one. Imports nothing."""

from __future__ import annotations


class UnsupportedError(ValueError):
    """A valid request that this package, a model family, an installed version or a device does not support.

    The message names the value, the rule and the way out. In `prepare_omni` every rank raises it where one does, in a
    forward every rank of the SP group, which has the same rows. What
    is wrong by itself (a size that is no positive integer, a malformed yaml, shapes that do not match) is a plain
    ValueError or TypeError, so `except UnsupportedError` tells "not here" from "not like this".
    """


# A user's exception class may not unpickle on another rank, so these travel in its place.
_PUBLIC: tuple[type[Exception], ...] = (UnsupportedError, ValueError, OSError)


def public_kind(error: BaseException) -> type[Exception]:
    """The class that stands for an error where its own may be unknown: the documented one, else RuntimeError."""
    return next((kind for kind in _PUBLIC if isinstance(error, kind)), RuntimeError)
