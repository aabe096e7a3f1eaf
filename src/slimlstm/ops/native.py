"""The compiled kernel: whether it exists, and which instruction set it uses.

SLIMLSTM_ISA in the environment names an instruction set; otherwise the fastest that the machine can run is used.
"""

from __future__ import annotations

import functools
import logging
import os

from slimlstm.errors import SlimLSTMError


def _import_failure() -> str | None:
    try:
        import slimlstm.ops._kernel  # pyright: ignore[reportMissingModuleSource, reportUnusedImport]  # noqa: F401
    except ImportError as error:
        return (
            f"the compiled kernel could not be imported ({error}); install a C++17 compiler and then, in a clone, slimlstm "
            "again: pip install --force-reinstall --no-deps ."
        )
    return None


missing = _import_failure()
"""The reason why the compiled kernel cannot be used; None if it can."""


def instruction_sets() -> list[str]:
    """Return the instruction sets that this machine can run, fastest first; an empty list without the kernel."""
    if missing:
        return []
    from slimlstm.ops import _kernel  # pyright: ignore[reportMissingModuleSource]

    return _kernel.names()


def instruction_set() -> str:
    """Return the instruction set that weights are packed for: SLIMLSTM_ISA, or the fastest of the machine.

    Raises:
        SlimLSTMError: SLIMLSTM_ISA names an instruction set that the machine cannot run, or the kernel is missing.
    """
    if missing:
        raise SlimLSTMError(missing)
    names = instruction_sets()
    wanted = os.environ.get("SLIMLSTM_ISA", names[0])
    if wanted not in names:
        raise SlimLSTMError(
            f"SLIMLSTM_ISA is {wanted!r}, but this machine runs only {', '.join(names)}; set it to one of them"
        )
    return wanted


@functools.cache
def warn_missing() -> None:
    """Log once why the kernel is missing."""
    logging.getLogger("slimlstm").warning("running PyTorch's operators, which are slower: %s", missing)
