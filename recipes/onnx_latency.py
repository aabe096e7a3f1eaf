"""Time exported and compressed ONNX files beside the dense export, in ONNX Runtime, on one thread with one sequence.

    python recipes/onnx_latency.py --output results/onnx_latency.json

LSTMs are random, of the sizes of taggers and of large models. Each is exported dense, in int8, and with factors that keep
half of the parameters in int8; and the dense file is compressed in the same ways. Times are processor time, the least of
several calls taken in turns, relative to the dense export.
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import slimlstm as sl
from slimlstm.files import write_json
from slimlstm.provenance import provenance

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seconds", type=float, default=0.05, help="about how long each file is timed")
parser.add_argument("--output", type=Path, required=True)
arguments = parser.parse_args()
torch.manual_seed(0)
MODELS = {
    "bidirectional, H = 52": {"input_size": 64, "hidden_size": 52, "bidirectional": True},
    "bidirectional, H = 32": {"input_size": 32, "hidden_size": 32, "bidirectional": True},
    "4 layers, bidirectional, H = 128": {"input_size": 128, "hidden_size": 128, "num_layers": 4, "bidirectional": True},
    "H = 256": {"input_size": 256, "hidden_size": 256},
    "H = 1024": {"input_size": 1024, "hidden_size": 1024},
}
CONFIGS = {"int8": sl.Quantize("int8"), "half, int8": sl.LowRank("svd", keep=0.5, storage="int8")}


class Outputs(nn.Module):
    """Returns an LSTM's outputs only."""

    def __init__(self, **sizes):
        super().__init__()
        self.lstm = nn.LSTM(**sizes)

    def forward(self, x):
        return self.lstm(x)[0]


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def processor_time(one, x):
    began = time.thread_time()
    one.run(None, x)
    return time.thread_time() - began


def files(model, x, folder):
    """Write the files of a model; return their forms by name, None for the dense export."""
    sl.export_onnx(model, x, folder / "dense.onnx", input_names=["x"])
    forms = {"dense": None}
    for name, config in CONFIGS.items():
        small = copy.deepcopy(model)
        sl.compress_(small, config)
        forms[f"exported, {name}"] = sl.export_onnx(small, x, folder / f"exported, {name}.onnx", input_names=["x"]).forms
        report = sl.compress_onnx(folder / "dense.onnx", config, folder / f"compressed, {name}.onnx")
        forms[f"compressed, {name}"] = list(report.forms.values())
    return forms


made_by, rows = provenance() | {"onnxruntime": onnxruntime.__version__}, []
for name, sizes in MODELS.items():
    model = Outputs(**sizes).eval()
    with tempfile.TemporaryDirectory() as folder:
        forms = files(model, torch.randn(3, 2, sizes["input_size"]), Path(folder))
        sessions = {kind: session(Path(folder) / f"{kind}.onnx") for kind in forms}
        bytes_ = {kind: (Path(folder) / f"{kind}.onnx").stat().st_size for kind in forms}
    for steps in (1, 100):
        x = {"x": torch.randn(steps, 1, sizes["input_size"]).numpy()}
        times = {kind: [processor_time(one, x)] for kind, one in sessions.items()}
        while len(times["dense"]) < 3 or sum(map(sum, times.values())) < arguments.seconds * len(times):
            for kind, one in sessions.items():
                one.run(None, x)  # which leaves the caches as repeated calls find them
                times[kind].append(processor_time(one, x))
        dense = min(times["dense"])
        relative = {kind: min(found) / dense for kind, found in times.items()}
        rows.append(
            {"model": name, "steps": steps, "dense_seconds": dense, "times": relative, "bytes": bytes_, "forms": forms}
        )
        print(name, steps, {kind: round(found, 2) for kind, found in relative.items()}, flush=True)
console, kinds = Console(), [kind for kind in rows[0]["times"] if kind != "dense"]
table = Table("model", "T", "dense, µs", *kinds)
for row in rows:
    shown = (f"{row['times'][kind]:.2f}" for kind in kinds)
    table.add_row(row["model"], str(row["steps"]), f"{1e6 * row['dense_seconds']:.0f}", *shown)
console.print(table)
write_json(arguments.output, {"rows": rows, "provenance": made_by})
