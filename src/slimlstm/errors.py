"""The one exception class of slimlstm, and short reasons taken from exceptions of other libraries."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

_LONGEST = 300
"""Characters of a reason that is taken from another exception."""
_LONGEST_MESSAGE = 4000
"""Characters of a message."""


class SlimLSTMError(ValueError):
    """A request that cannot be carried out. The message says what was seen, why it is wrong, and the remedy.

    Names from files may be in the message, so it is made printable, and a message of more than 4000 characters is cut in
    its middle.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, _LONGEST_MESSAGE))


def printable(text: str, longest: int) -> str:
    """Return ``text`` with ``?`` for unprintable characters other than line breaks; cut its middle beyond ``longest``.

    Examples:
        >>> printable("a red \\x1b[31mname", 100)
        'a red ?[31mname'
        >>> printable("0123456789" * 9, 11)
        '0123...6789'
    """
    if len(text) > longest:
        half = (longest - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)


def reason_of(error: BaseException) -> str:
    """Return the first line of an exception's message, printable and at most 300 characters long, or its class name.

    Examples:
        >>> reason_of(OSError("disk full\\nat block 7"))
        'disk full'
    """
    lines = (line.strip() for line in str(error).splitlines())
    first = next((line for line in lines if line), type(error).__name__)
    shown = "".join(character if character.isprintable() else "?" for character in first[:_LONGEST])
    return shown if len(first) <= _LONGEST else f"{shown[:-3]}..."


def described(value: object) -> str:
    """Return a few words for an argument of a wrong kind, without its content.

    Examples:
        >>> described("model.pt"), described({"a": 1}), described(None), described(int)
        ("the text 'model.pt'", 'a mapping (dict)', 'None', 'the class int')
    """
    kind = type(value).__name__
    if value is None or isinstance(value, bool | int | float | complex):
        return repr(value)
    if isinstance(value, str | bytes):
        return f"the text {value!r}"
    if isinstance(value, os.PathLike):
        return f"the path {os.fspath(cast(os.PathLike[str], value))!r}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Mapping):
        return f"a mapping ({kind})"
    shape: Any = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"a {kind} of shape {list(cast(tuple[int, ...], shape))}"
    name: Any = getattr(value, "__name__", None)
    return f"the function {name}" if callable(value) and isinstance(name, str) else f"an object of the class {kind}"


@contextmanager
def refusing(problem: str) -> Generator[None]:
    """Turn every exception of the block, or of the decorated function, into one :class:`SlimLSTMError`.

    Damaged files make readers fail in more ways than can be listed. Errors of slimlstm itself pass unchanged.

    Args:
        problem: the beginning of the message, such as ``"model.pt is no intact checkpoint"``.

    Examples:
        >>> with refusing("numbers.txt is damaged"):
        ...     int("seven")
        Traceback (most recent call last):
        slimlstm.errors.SlimLSTMError: numbers.txt is damaged: invalid literal for int() with base 10: 'seven'
    """
    try:
        yield
    except SlimLSTMError:
        raise
    except MemoryError as error:
        raise SlimLSTMError(f"{problem}: it needs more memory than this machine gives") from error
    except Exception as error:
        raise SlimLSTMError(f"{problem}: {reason_of(error)}") from error
