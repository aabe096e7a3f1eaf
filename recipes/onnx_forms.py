"""Time a layer in ONNX Runtime as an LSTM operator and as a Scan, and fit the costs by which exports choose.

    python recipes/onnx_forms.py --output results/onnx_forms.json

Layers are random, with as many inputs as hidden units, one sequence, one thread. Times are processor time, which other
programs disturb little: the least of many calls, taken in turns. Scans are given as multiples of the operator's time. The
fit minimises squares of relative errors. ``slimlstm.onnx.forms.COSTS`` holds the costs.
"""

import argparse
import itertools
import math
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls

from slimlstm import LowRankLSTM
from slimlstm.files import write_json
from slimlstm.onnx import forms
from slimlstm.onnx.forms import LSTM, SCAN, STEPS, counts
from slimlstm.onnx.layers import layer_model
from slimlstm.onnx.runtime import inference_session
from slimlstm.ops.weights import Direction
from slimlstm.provenance import provenance

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--hidden", type=int, nargs="+", default=[32, 128, 256, 512, 1024])
parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.5, 0.25], help="fractions of the weights")
parser.add_argument("--seconds", type=float, default=0.05, help="about how long each form is timed")
parser.add_argument("--output", type=Path, required=True)
arguments = parser.parse_args()
torch.manual_seed(0)
SCANS = {"float": "float32", "integer": "int8"}
CACHES = [2**power * 1.0 for power in range(17, 27)]


def shapes(hidden, keep, storage):
    """Return the weights of a layer without their numbers."""
    rank = max(1, int(keep * 4 * hidden / 5))
    parts = [(4 * hidden, rank), (rank, hidden)] if keep < 1 else [(4 * hidden, hidden)]
    tensors = tuple(torch.empty(shape, device="meta") for shape in parts)
    matrix = tensors if keep < 1 else tensors[0]
    return [Direction(matrix, matrix, None, None, None, storage, storage)]


def layer(hidden, keep, storage):
    rank = max(1, int(keep * 4 * hidden / 5))
    ranks = {"weight_ih_l0": rank, "weight_hh_l0": rank} if keep < 1 else None
    module = LowRankLSTM(hidden, hidden, ranks=ranks).eval()
    for name in module.matrix_shapes:
        module.store(name, storage)
    return module.layers()[0]


def session(directions, form):
    return inference_session(layer_model(directions, form).SerializeToString(), threads=1)


def measured(hidden, keep):
    """Yield one row for every form and number of steps: its features' arguments and its microseconds."""
    layers = {"operator": layer(hidden, keep, "int8")} | {
        kind: layer(hidden, keep, storage) for kind, storage in SCANS.items()
    }
    sessions = {kind: session(one, LSTM if kind == "operator" else SCAN) for kind, one in layers.items()}
    for steps in STEPS:
        x = {"x": torch.randn(steps, 1, hidden).numpy()}
        times = {kind: [processor_time(one, x)] for kind, one in sessions.items()}
        while len(times["operator"]) < 3 or sum(map(sum, times.values())) < arguments.seconds * len(times):
            for kind, one in sessions.items():
                one.run(None, x)  # which leaves the caches as repeated calls find them
                times[kind].append(processor_time(one, x))
        for kind, found in times.items():
            yield {"hidden": hidden, "keep": keep, "steps": steps, "form": kind, "microseconds": 1e6 * min(found)}


def processor_time(one, x):
    began = time.thread_time()
    one.run(None, x)
    return time.thread_time() - began


def features(row, cache):
    """Return how often each cost arises in a row."""
    name = LSTM if row["form"] == "operator" else SCAN
    storage = SCANS.get(row["form"], "int8")
    (weights,) = shapes(row["hidden"], row["keep"], storage)
    return counts(weights, name, row["form"] == "integer", row["steps"], cache)


def fitted(rows):
    """Return the costs whose relative errors have the least squares, and these errors."""
    kinds, times = [kind for kind in forms.COSTS if kind != "cache_bytes"], np.array([row["microseconds"] for row in rows])
    best = None
    for cache in CACHES:
        found = [features(row, cache) for row in rows]
        matrix = np.array([[one.get(kind, 0.0) for kind in kinds] for one in found]) / times[:, None]
        scale = matrix.max(0).clip(1e-30)
        costs, error = nnls(matrix / scale, np.ones(len(rows)))
        if best is None or error < best[0]:
            costs = costs / scale
            best = error, dict(zip(kinds, costs.tolist(), strict=True)) | {"cache_bytes": cache}, matrix @ costs
    return best[1], best[2]


made_by, rows = provenance() | {"onnxruntime": onnxruntime.__version__}, []
for hidden, keep in itertools.product(arguments.hidden, arguments.keep):
    rows += measured(hidden, keep)
    print(f"H {hidden}, keep {keep:g} measured", flush=True)
costs, ratios = fitted(rows)
costs = {kind: float(f"{cost:.3g}") for kind, cost in costs.items()}
forms.COSTS = costs
at = {(row["hidden"], row["keep"], row["steps"], row["form"]): row["microseconds"] for row in rows}
table = Table("H", "keep", "T", "operator, µs", "float Scan", "float32", "integer Scan", "int8")
choices = []
for hidden, keep in itertools.product(arguments.hidden, arguments.keep):
    chosen = {storage: forms.choose_form(shapes(hidden, keep, storage)) for storage in SCANS.values()}
    for steps in STEPS:
        operator = at[hidden, keep, steps, "operator"]
        times = {kind: at[hidden, keep, steps, kind] / operator for kind in SCANS}
        found = {
            storage: 1.0 if form.name == LSTM else times["integer" if form.is_integer else "float"]
            for storage, form in chosen.items()
        }
        choices.append({"hidden": hidden, "keep": keep, "steps": steps, "time": found})
        shown = times["float"], found["float32"], times["integer"], found["int8"]
        table.add_row(str(hidden), f"{keep:g}", str(steps), f"{operator:.0f}", *(f"{one:.2f}" for one in shown))
error = math.exp(float(np.abs(np.log(ratios)).mean()))
console = Console()
console.print(table)
console.print(costs)
console.print(f"mean factor between predicted and measured times: {error:.2f}")
result = {"costs": costs, "mean_factor": error, "rows": rows, "choices": choices, "provenance": made_by}
write_json(arguments.output, result)
