"""Second moments of what goes into the LSTMs of an ONNX model, which ONNX Runtime runs on given inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimlstm.calibration.moments import Moments
from slimlstm.calibration.recorder import states_before
from slimlstm.errors import SlimLSTMError
from slimlstm.onnx.graph import OnnxLSTM, attribute_of, graphs_of, inner_graphs

RunInputs = Mapping[str, NDArray[Any]]
"""The inputs of one run by name."""


@dataclass
class _Probe:
    """The names under which the whole model gives what goes into one layer, "" for what is not there."""

    layer: OnnxLSTM
    x: str = ""
    h: str = ""
    first: str = ""
    lengths: str = ""


def read_batches(path: Path) -> list[RunInputs]:
    """The runs in a ``.npz`` file: arrays by input, whose first axis is that of the runs.

    Raises:
        SlimLSTMError: the file is missing or damaged, or its arrays are not of the same number of runs.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, EOFError, BadZipFile) as error:
        raise SlimLSTMError(f"{path} is no intact .npz file: {error}") from error
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) != 1 or not min(counts.values()):
        raise SlimLSTMError(f"the arrays in {path} need one first axis, that of the runs; their lengths are {counts}")
    return [{name: array[run] for name, array in arrays.items()} for run in range(min(counts.values()))]


def calibrate_graph(model: Any, layers: list[OnnxLSTM], batches: Iterable[RunInputs]) -> dict[str, list[Moments]]:
    """The moments of every site that any batch reaches, by key ``"<layer>.weight_hh_l0"``.

    Raises:
        SlimLSTMError: ONNX Runtime is not installed or cannot run the model on a batch, or there is no batch.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise SlimLSTMError("calibrating an ONNX file takes ONNX Runtime: pip install onnxruntime") from error
    probed = type(model)()
    probed.CopyFrom(model)
    probes = _with_probes(probed, model, [layer for layer in layers if layer.locations])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    sums: dict[str, tuple[Tensor, int]] = {}
    names = [name for probe in probes for name in (probe.x, probe.h, probe.first, probe.lengths) if name]
    runs = 0
    try:
        session = onnxruntime.InferenceSession(probed.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for batch in batches:
            values = dict(zip(names, session.run(names, dict(batch)), strict=True))
            runs += 1
            for probe in probes:
                for key, rows in _rows(probe, values):
                    moment, count = sums.get(key, (torch.zeros(()), 0))
                    sums[key] = moment + rows.T @ rows, count + len(rows)
    except SlimLSTMError:
        raise
    except Exception as error:  # ONNX Runtime's own classes, which derive from nothing in common
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SlimLSTMError(f"ONNX Runtime cannot run the model on batch {runs}: {reason}") from error
    if not runs:
        raise SlimLSTMError("there is no batch to calibrate on; an iterator may have been used up before")
    return {key: [Moments(moment / count, None, count)] for key, (moment, count) in sums.items() if count}


def _with_probes(probed: Any, model: Any, layers: list[OnnxLSTM]) -> list[_Probe]:
    """Makes what goes into layers outputs of the whole model, a copy of that which the layers are from."""
    copies = {id(node): copy for node, copy in zip(_nodes(model.graph), _nodes(probed.graph), strict=True)}
    parents = _parents(probed.graph)
    exposed = _Exposer(probed.graph, parents)
    probes: list[_Probe] = []
    for layer in layers:
        if layer.node.op_type != "LSTM":
            for location in layer.locations:
                source = copies[id(location.source or location.node)]
                probes.append(_Probe(_only(layer, location), x=exposed.expose(source.input[0], source)))
            continue
        node = copies[id(layer.node)]
        node.output.extend([""] * (1 - len(node.output)))
        node.output[0] = node.output[0] or exposed.new_name()
        optional = [node.input[index] if len(node.input) > index else "" for index in (4, 5)]
        lengths, first = (
            exposed.expose(name, node, is_integer=index == 0) if name else "" for index, name in enumerate(optional)
        )
        probes.append(
            _Probe(layer, exposed.expose(node.input[0], node), exposed.expose(node.output[0], node), first, lengths)
        )
    return probes


def _only(layer: OnnxLSTM, location: Any) -> OnnxLSTM:
    return OnnxLSTM(layer.name, layer.node, layer.scope, [location])


def _nodes(graph: Any) -> list[Any]:
    return [node for one in graphs_of(graph) for node in one.node]


def _parents(graph: Any) -> dict[int, tuple[Any, Any, Any]]:
    """For every node: the graph that it is in, the node that holds this graph, and whose graph that is, by ``id``."""
    found: dict[int, tuple[Any, Any, Any]] = {}
    pending: list[tuple[Any, Any]] = [(graph, None)]
    while pending:
        one, holder = pending.pop()
        for node in one.node:
            found[id(node)] = (one, holder, graph)
            pending += [(inner, node) for inner in inner_graphs(node)]
    return found


class _Exposer:
    """Hands values inside of nested graphs on, from holder to holder, until they are outputs of the whole."""

    def __init__(self, graph: Any, parents: Mapping[int, tuple[Any, Any, Any]]) -> None:
        self._graph, self._parents, self._count = graph, parents, 0
        # The ids above are those of living objects only as long as these are kept.
        self._kept = _nodes(graph)
        self._known: dict[tuple[int, str], str] = {}

    def new_name(self) -> str:
        self._count += 1
        return f"slimlstm_probe_{self._count}"

    def expose(self, name: str, node: Any, is_integer: bool = False) -> str:
        """The name of an output of the whole model that has the value ``name`` next to ``node``."""
        from onnx import TensorProto, helper

        kind = TensorProto.INT32 if is_integer else TensorProto.FLOAT
        graph, holder, _ = self._parents[id(node)]
        if (id(graph), name) in self._known:
            return self._known[id(graph), name]
        inner = self.new_name()
        graph.node.append(helper.make_node("Identity", [name], [inner]))
        graph.output.append(helper.make_tensor_value_info(inner, kind, None))
        key, value = (id(graph), name), inner
        while holder is not None:
            if holder.op_type != "If":
                raise SlimLSTMError(f"what goes into LSTMs inside a {holder.op_type} cannot be observed; use 'svd'")
            outer = self.new_name()
            for branch in inner_graphs(holder):
                if branch is not graph:
                    self._add_nothing(branch, kind)
            holder.output.append(outer)
            graph, next_holder, _ = self._parents[id(holder)]
            value, holder = outer, next_holder
            graph.output.append(helper.make_tensor_value_info(outer, kind, None))
        self._known[key] = value
        return value

    def _add_nothing(self, branch: Any, kind: int) -> None:
        """An output without any numbers, of the branch that is not taken."""
        from onnx import helper

        empty = self.new_name()
        branch.node.append(helper.make_node("Constant", [], [empty], value=helper.make_tensor(empty, kind, [0], [])))
        branch.output.append(helper.make_tensor_value_info(empty, kind, None))


def _rows(probe: _Probe, values: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """What went into every site of a layer, as rows [N, n] in float64; nothing where the layer did not run."""
    x = torch.from_numpy(np.asarray(values[probe.x])).double()
    layer = probe.layer
    if x.numel() == 0:
        return []
    if layer.node.op_type != "LSTM":
        return [(f"{layer.name}.{location.name}", x.reshape(-1, x.shape[-1])) for location in layer.locations]
    y = torch.from_numpy(np.asarray(values[probe.h])).double()
    first = torch.from_numpy(np.asarray(values[probe.first])).double() if probe.first else None
    if attribute_of(layer.node, "layout", 0):
        x, y = x.transpose(0, 1), y.permute(1, 2, 0, 3)
        first = None if first is None else first.transpose(0, 1)
    steps, _, batch, hidden = y.shape
    lengths = torch.from_numpy(np.asarray(values[probe.lengths])) if probe.lengths else torch.full((batch,), steps)
    is_counted = torch.arange(steps)[:, None] < lengths[None]
    found: list[tuple[str, Tensor]] = []
    for location in layer.locations:
        is_reverse = location.name.endswith("_reverse")
        rows = x
        if "weight_hh" in location.name:
            start = y.new_zeros(batch, hidden) if first is None else first[location.direction]
            rows = states_before(y[:, location.direction], start, lengths, is_reverse)
        found.append((f"{layer.name}.{location.name}", rows[is_counted]))
    return found
