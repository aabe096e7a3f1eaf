"""Measure how much the outputs of two ONNX files differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from slimlstm.errors import SlimLSTMError, reason_of
from slimlstm.onnx.runtime import RunInputs, arrays_of, inference_session
from slimlstm.onnx.samples import random_inputs


def output_difference(one: Path, other: Path, runs: Sequence[RunInputs] | None = None) -> float:
    """Return the largest relative difference of any output in any run.

    It is the norm of the difference of the two files' outputs, divided by the norm of the first file's output. Outputs
    that are no arrays of numbers (strings, sequences, maps) do not count.

    Args:
        one, other: ONNX files with the same inputs.
        runs: inputs by name, one mapping a run; by default one run of random numbers, or zeros for integers, with the size
            :data:`slimlstm.onnx.samples.OPEN_SIZE` along every open axis; lengths of sequences are the number of steps.

    Raises:
        SlimLSTMError: ONNX Runtime is not installed or cannot run a file on the inputs.
    """
    try:
        sessions = [inference_session(str(path)) for path in (one, other)]
        given = [random_inputs(one, sessions[0].get_inputs())] if runs is None else runs
        outputs = [[session.run(None, arrays_of(inputs)) for inputs in given] for session in sessions]
    except ImportError as error:
        raise SlimLSTMError(
            "outputs are compared in onnxruntime, which is not installed: pip install onnxruntime"
        ) from error
    except Exception as error:  # ONNX Runtime raises classes of its own
        raise SlimLSTMError(
            f"ONNX Runtime cannot run the files on {'random' if runs is None else 'these'} inputs: {reason_of(error)}; "
            "give inputs that fit, by --inputs, or by batches= in Python"
        ) from error
    pairs = [pair for run in zip(*outputs, strict=True) for pair in zip(*run, strict=True)]
    return max((_relative(*pair) for pair in pairs if is_numeric(pair[0])), default=0.0)


def is_numeric(output: Any) -> bool:
    """Return whether an output of ONNX Runtime is an array of numbers, not of strings, nor a sequence, map or None."""
    return isinstance(output, np.ndarray) and cast("NDArray[Any]", output).dtype.kind in "fiub"


def _relative(before: Any, after: Any) -> float:
    """Return the relative difference of two outputs; infinity where a number is finite in only one of them."""
    exact, found = np.asarray(before, np.float64), np.asarray(after, np.float64)
    with np.errstate(invalid="ignore"):
        change = np.where((exact == found) | (np.isnan(exact) & np.isnan(found)), 0.0, exact - found)
    change = np.nan_to_num(change, nan=np.inf)
    return float(np.linalg.norm(change) / max(float(np.linalg.norm(np.nan_to_num(exact, posinf=0.0, neginf=0.0))), 1e-30))
