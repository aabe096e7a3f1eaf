"""The one exception class of slimlstm, and short reasons taken from exceptions of other libraries."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

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
