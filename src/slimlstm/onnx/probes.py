"""Copies of ONNX models that show the values at their LSTMs as additional outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from slimlstm.errors import SlimLSTMError
from slimlstm.onnx.builder import onnx_type
from slimlstm.onnx.find import find_lstms
from slimlstm.onnx.graph import OnnxLSTM, WeightLocation, attribute_of, graphs_of, inner_graphs
from slimlstm.onnx.integers import make_plain
from slimlstm.onnx.runtime import Names, RunInputs, Session, make_runnable
from slimlstm.onnx.separate import separate
from slimlstm.ops.gates import reordered
from slimlstm.ops.weights import Matrix, rebuilt


@dataclass
class Probe:
    """The outputs of a probed model that show the values at one LSTM.

    Attributes:
        lstm: the LSTM in the original model.
        names: the names of outputs, by role. An operator has ``x``, ``y``, and where it reads them ``lengths``, ``h0`` and
            ``c0``. An LSTM of single operators has ``x``, ``h``, ``gates`` (their sum) and ``cell`` (the previous state).
        used: the outputs of an operator that the model reads, 0 for Y, 1 for Y_h and 2 for Y_c.
    """

    lstm: OnnxLSTM
    names: dict[str, str]
    used: tuple[int, ...] = ()


class ProbedModel:
    """A model that runs in ONNX Runtime and shows the values at its LSTMs.

    Args:
        model: an ``onnx.ModelProto``, which does not change.
        lstms: the names of the LSTMs to observe.
        weights: matrices to compute with instead of the model's own, by ``"<lstm>.<weight>"``.

    Raises:
        SlimLSTMError: ONNX Runtime is not installed or cannot load the model.
    """

    def __init__(self, model: Any, lstms: Collection[str], weights: Mapping[str, Matrix] | None = None) -> None:
        self.outputs = [entry.name for entry in model.graph.output]
        copy = type(model)()
        copy.CopyFrom(model)
        observed = [lstm for lstm in find_lstms(copy, Path("the model")) if lstm.name in lstms and lstm.locations]
        used = {lstm.name: _used_outputs(lstm) for lstm in observed}
        names = Names(copy, "slimlstm_probe")
        make_runnable(observed, names)
        if weights:
            _replace_weights(copy, observed, weights, names)
        exposer = _Exposer(copy.graph, names)
        self.probes = [_probe(lstm, exposer, used[lstm.name]) for lstm in observed]
        self._session = Session(copy)

    def run(self, inputs: RunInputs, number: int = 0) -> tuple[list[NDArray[Any]], list[dict[str, NDArray[Any]]]]:
        """Return the model's outputs, and the values of each of the ``probes`` by role.

        Args:
            inputs: arrays by name.
            number: the number of the batch, for errors.

        Raises:
            SlimLSTMError: the model cannot run on these inputs.
        """
        probed = list(dict.fromkeys(name for probe in self.probes for name in probe.names.values()))
        values = self._session.run([*self.outputs, *probed], inputs, number)
        outputs, shown = values[: len(self.outputs)], dict(zip(probed, values[len(self.outputs) :], strict=True))
        return outputs, [{role: shown[name] for role, name in probe.names.items()} for probe in self.probes]


def _used_outputs(lstm: OnnxLSTM) -> tuple[int, ...]:
    """Return the outputs of an LSTM operator that its graph, or a graph nested in it, reads or returns."""
    read = {name for graph in graphs_of(lstm.scope.graph) for node in graph.node for name in node.input}
    read |= {entry.name for graph in graphs_of(lstm.scope.graph) for entry in graph.output}
    return tuple(index for index, name in enumerate(lstm.node.output) if name in read and name)


def _replace_weights(model: Any, lstms: list[OnnxLSTM], weights: Mapping[str, Matrix], names: Names) -> None:
    """Make LSTMs read dense matrices from new constants."""
    for lstm in lstms:
        matrices = {
            location.name: rebuilt(weights.get(f"{lstm.name}.{location.name}", location.matrix)).detach()
            for location in lstm.locations
        }
        if not any(f"{lstm.name}.{location.name}" in weights for location in lstm.locations):
            continue
        separate(lstm, model, lambda _: names.new(), {})
        for index in dict.fromkeys(location.index for location in lstm.locations) if lstm.is_operator else ():
            parts = [
                reordered(matrices[location.name], location.gates) for location in lstm.locations if location.index == index
            ]
            lstm.node.input[index] = _add_constant(model, torch.stack(parts).float(), names)
        for location in lstm.locations if not lstm.is_operator else ():
            _replace_product(model, location, matrices[location.name], names)


def _replace_product(model: Any, location: WeightLocation, matrix: Tensor, names: Names) -> None:
    in_file = reordered(matrix, location.gates)
    turned = in_file if attribute_of(location.node, "transB", 0) else in_file.T
    source = location.input
    for _ in make_plain(location):
        pass
    location.node.input[1] = _add_constant(model, turned, names)
    location.node.input[0] = source


def _add_constant(model: Any, value: Tensor, names: Names) -> str:
    from onnx import numpy_helper

    name = names.new()
    model.graph.initializer.append(numpy_helper.from_array(value.contiguous().numpy(), name))
    return name


def _probe(lstm: OnnxLSTM, exposer: _Exposer, used: tuple[int, ...]) -> Probe:
    """Expose the values at one LSTM of the copy."""
    from onnx import TensorProto

    node, names = lstm.node, dict[str, str]()
    if not lstm.is_operator:
        ih, hh = lstm.locations
        kind = onnx_type(rebuilt(ih.matrix).dtype)
        names["x"] = exposer.expose(ih.input, ih.source or ih.node, kind)
        names["h"] = exposer.expose(hh.input, hh.source or hh.node, kind)
        names["gates"] = exposer.expose(node.input[0], node, kind)
        names["cell"] = exposer.expose(lstm.cell, node, kind)
        return Probe(lstm, names)
    node.output.extend([""] * (1 - len(node.output)))
    node.output[0] = node.output[0] or exposer.names.new()
    names["x"] = exposer.expose(node.input[0], node)
    names["y"] = exposer.expose(node.output[0], node)
    for role, position in (("lengths", 4), ("h0", 5), ("c0", 6)):
        if position < len(node.input) and node.input[position]:
            kind = TensorProto.INT32 if role == "lengths" else TensorProto.FLOAT
            names[role] = exposer.expose(node.input[position], node, kind)
    return Probe(lstm, names, used)


class _Exposer:
    """Makes values inside nested graphs outputs of the whole model, through every node around them.

    The values of all iterations of a Loop or Scan are stacked along a new first axis. The branch of an If that does not run
    gives an empty tensor.
    """

    def __init__(self, graph: Any, names: Names) -> None:
        self.names = names
        self._parents = _parents(graph)
        # Ids identify objects only while these live.
        self._alive = [node for one in graphs_of(graph) for node in one.node]
        self._known: dict[tuple[int, str], str] = {}

    def expose(self, name: str, node: Any, kind: int = 1) -> str:
        """Return the name of an output of the whole model that shows a value.

        Args:
            name: the value.
            node: a node of the graph where the value has that name.
            kind: ONNX's number for the value's dtype; 1 is float32.
        """
        from onnx import helper

        graph, holder = self._parents[id(node)]
        if (id(graph), name) in self._known:
            return self._known[id(graph), name]
        key, shown = (id(graph), name), self.names.new()
        graph.node.append(helper.make_node("Identity", [name], [shown]))
        graph.output.append(helper.make_tensor_value_info(shown, kind, None))
        while holder is not None:
            shown = self._through(holder, graph, kind)
            graph, holder = self._parents[id(holder)]
            graph.output.append(helper.make_tensor_value_info(shown, kind, None))
        self._known[key] = shown
        return shown

    def _through(self, holder: Any, graph: Any, kind: int) -> str:
        """Return the name of a new output of ``holder`` that shows the last output of its ``graph``."""
        if holder.op_type not in ("If", "Loop", "Scan"):
            raise SlimLSTMError(
                f"values inside a {holder.op_type} cannot be observed; use 'svd', or leave its LSTMs out with filter="
            )
        if holder.op_type != "If":
            # ONNX Runtime crashes where states that nothing reads have no names.
            missing = len(graph.output) - 1 - len(holder.output) - (holder.op_type == "Loop")
            named = [name or self.names.new() for name in [*holder.output, *[""] * max(0, missing)]]
            holder.output[:] = named
        if holder.op_type == "Scan":
            _extend_scan(holder, len(graph.input), len(graph.output) - 1)
        for branch in inner_graphs(holder):
            if branch is not graph:
                self._add_empty(branch, kind)
        shown = self.names.new()
        holder.output.append(shown)
        return shown

    def _add_empty(self, branch: Any, kind: int) -> None:
        """Add an output without any numbers to the branch that does not run."""
        from onnx import helper

        empty = self.names.new()
        branch.node.append(helper.make_node("Constant", [], [empty], value=helper.make_tensor(empty, kind, [0], [])))
        branch.output.append(helper.make_tensor_value_info(empty, kind, None))


def _extend_scan(scan: Any, inputs: int, outputs: int) -> None:
    """Describe one more scan output: along the first axis, in the order of the scanned inputs.

    Its rows then correspond to the rows of values that the surrounding graph computes for all steps.
    """
    from onnx import helper

    scanned = attribute_of(scan, "num_scan_inputs", 1)
    count = outputs - (inputs - scanned)
    ways = set(attribute_of(scan, "scan_input_directions", [0]))
    axes = attribute_of(scan, "scan_output_axes", [0] * count)
    directions = attribute_of(scan, "scan_output_directions", [0] * count)
    added = {
        "scan_output_axes": [*axes, 0],
        "scan_output_directions": [*directions, ways.pop() if len(ways) == 1 else 0],
    }
    kept = [attribute for attribute in scan.attribute if attribute.name not in added]
    kept += [helper.make_attribute(name, values) for name, values in added.items()]
    new = [type(attribute).FromString(attribute.SerializeToString()) for attribute in kept if not attribute.HasField("g")]
    for index in reversed(range(len(scan.attribute))):
        if not scan.attribute[index].HasField("g"):
            del scan.attribute[index]
    scan.attribute.extend(new)


def _parents(graph: Any) -> dict[int, tuple[Any, Any]]:
    """Return, by the ``id`` of every node, the graph that it is in and the node that holds this graph, if any."""
    found: dict[int, tuple[Any, Any]] = {}
    pending: list[tuple[Any, Any]] = [(graph, None)]
    while pending:
        one, holder = pending.pop()
        for node in one.node:
            found[id(node)] = (one, holder)
            pending += [(inner, node) for inner in inner_graphs(node)]
    return found
