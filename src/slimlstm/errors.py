"""The one exception class of slimlstm, and short reasons taken from the exceptions of others."""

_LONGEST = 300


class SlimLSTMError(ValueError):
    """A request that cannot be carried out. The message says what was seen, why it is wrong, and the remedy."""


def reason_of(error: BaseException) -> str:
    """Return the first line of an exception's message, printable and at most 300 characters long, or its class name.

    Examples:
        >>> reason_of(OSError("disk full\\nat block 7"))
        'disk full'
    """
    lines = (line.strip() for line in str(error).splitlines())
    first = next((line for line in lines if line), type(error).__name__)
    printable = "".join(character if character.isprintable() else "?" for character in first)
    return printable if len(printable) <= _LONGEST else f"{printable[: _LONGEST - 3]}..."
