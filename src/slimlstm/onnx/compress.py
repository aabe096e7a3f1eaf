"""``compress_onnx``: an ONNX file in, the same with smaller LSTMs out, in operators that every runtime has.

An LSTM operator stays one, with its states, lengths and attributes; its weights become products of factors, which runtimes
multiply when they load the file. A product with a constant, in an LSTM that is written out, becomes two thin ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimlstm.calibration.moments import Moments
from slimlstm.compress import Compressed, Progress, compress_matrix, sha256_of, site_report
from slimlstm.errors import SlimLSTMError
from slimlstm.methods.factorize import WeightedSVD, singular_values
from slimlstm.modules.sites import Site
from slimlstm.onnx.calibrate import RunInputs, calibrate_graph
from slimlstm.onnx.graph import (
    OnnxLSTM,
    WeightLocation,
    attribute_of,
    find_lstms,
    graphs_of,
    inner_graphs,
    read_model,
    reordered,
)
from slimlstm.ops.dense import rebuilt
from slimlstm.ops.weights import Matrix, matrix_bytes, shape_of, to_int8
from slimlstm.pipeline.plan import PRUNE, WEIGHTED, LowRank, Plan, Prune, Quantize, make_plan
from slimlstm.pipeline.report import Report, SiteReport, Total

_LARGEST_FILE = 2**31 - 1


def compress_onnx(
    path: str | os.PathLike[str],
    config: LowRank | Prune | Quantize | Plan,
    output: str | os.PathLike[str],
    *,
    batches: Iterable[RunInputs] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compresses the LSTMs of an ONNX file, those in nested graphs included, and writes the result to another.

    Whatever else is in the file stays as it is, its opset too. LSTMs that share their weights are listed once and go on
    sharing them. An LSTM whose weights the file computes from its inputs stays as it is, which the report notes.

    Args:
        path: the file.
        config: as of :func:`slimlstm.compress_`; sites are called after the nodes, ``"<node>.weight_hh_l0"``. Pruning is
            refused, as zeros take as much room.
        output: the file to write; one that is there is replaced, once everything else has gone well.
        batches: inputs by name, NumPy arrays, for one run each; the method ``"activation"`` needs them, and ONNX Runtime.
        progress: called with a site's key and the fraction done, now and then.

    Returns:
        What happened; the bytes of the model are those of the file, outside weights included.

    Raises:
        SlimLSTMError: the file is missing, damaged or holds no LSTM, a site cannot be compressed, nothing would get
            smaller, or onnx is not installed. Nothing is written then.
    """
    path, output = Path(path), Path(output)
    if output.is_dir() or not output.suffix:
        raise SlimLSTMError(f"{output} is no name of a file; name one that ends in .onnx")
    model = read_model(path)
    _check(model, path)
    layers = find_lstms(model, path)
    notes = [layer.problem for layer in layers if layer.problem]
    groups = _shared([layer for layer in layers if layer.locations])
    if not groups:
        raise SlimLSTMError("; ".join([f"{path} holds no LSTM with constant weights", *notes]))
    matrices = _Matrices(groups)
    if isinstance(config, Prune) or _wants_pruning(config):
        raise SlimLSTMError("zeros take as much room as other numbers in an ONNX file; give a low rank or a storage")
    make_plan(_without_spectra(config), matrices.sites)
    matrices.method = getattr(config, "method", "")
    if batches is not None:
        matrices.moments = calibrate_graph(model, layers, batches)
    plan = make_plan(config, matrices.sites, matrices)
    before = _counted(model), model.ByteSize()
    results = matrices.solve(plan, progress)
    reports = [matrices.report(key, plan, result) for key, result in results.items()]
    changed = {key: result for key, result in results.items() if result.source_sha256}
    if not changed:
        raise SlimLSTMError("nothing would get smaller: " + "; ".join(f"{report.key}: {report.note}" for report in reports))
    _Rewriter(model).replace(groups, changed, plan)
    after = _counted(model), model.ByteSize()
    if after[1] >= before[1]:
        raise SlimLSTMError(
            f"the file would take {after[1]:,} bytes, {before[1]:,} before: its weights are used elsewhere too, or hardly "
            "smaller; give a lower rank"
        )
    _check_result(model, groups, results, output)
    _write(model, output)
    return Report(reports, plan, matrices.total(reports), Total(before[0], after[0], before[1], after[1]), notes)


def _check(model: Any, path: Path) -> None:
    from onnx import checker

    if not model.graph.node:
        raise SlimLSTMError(f"{path} holds no graph; is it an ONNX file?")
    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if version < 7:
        raise SlimLSTMError(f"{path} is of ONNX opset {version}, whose operators differ; convert it to 7 or later first")
    if model.ByteSize() > _LARGEST_FILE:
        raise SlimLSTMError(f"{path} with its outside weights takes over 2 GiB, more than one ONNX file can hold")
    try:
        checker.check_model(_with_shapes(model))
    except Exception as error:  # classes of several libraries
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SlimLSTMError(f"{path} is no intact ONNX file: {reason}") from error


def _with_shapes(model: Any) -> Any:
    """A copy without inputs and outputs of unknown rank, which runtimes take but the checker does not."""
    copy = type(model)()
    copy.CopyFrom(model)
    for graph in graphs_of(copy.graph):
        for value in (*graph.input, *graph.output):
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.shape.SetInParent()
    return copy


def _wants_pruning(config: object) -> bool:
    return isinstance(config, Plan) and any(site.method == PRUNE for site in config.sites.values())


def _without_spectra(config: LowRank | Quantize | Plan) -> LowRank | Quantize | Plan:
    """The same as far as it can be checked before anything is computed."""
    if isinstance(config, LowRank) and config.needs_spectra:
        return LowRank(config.method, rank=1, target=config.target, filter=config.filter)
    return config


def _shared(layers: list[OnnxLSTM]) -> list[list[OnnxLSTM]]:
    """Layers with the same weights together, in the order of the first of each."""
    groups: dict[Hashable, list[OnnxLSTM]] = {}
    for layer in layers:
        weights = (part for location in layer.locations for part in _parts(location.matrix))
        key = (*(location.name for location in layer.locations), *(sha256_of(part) for part in weights))
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def _parts(matrix: Matrix) -> tuple[Tensor, ...]:
    return (matrix,) if isinstance(matrix, Tensor) else matrix


class _Matrices:
    """The sites of a file and their matrices; what plans ask of them."""

    def __init__(self, groups: list[list[OnnxLSTM]]) -> None:
        self._groups, self.moments, self.method = groups, dict[str, list[Moments]](), ""
        self._places = {f"{group[0].name}.{location.name}": location for group in groups for location in group[0].locations}
        self._members = {
            f"{group[0].name}.{location.name}": [f"{layer.name}.{location.name}" for layer in group]
            for group in groups
            for location in group[0].locations
        }
        self.sites = [_site(key, location) for key, location in self._places.items()]
        self._weighted: dict[str, WeightedSVD] = {}

    def solve(self, plan: Plan, progress: Progress | None) -> dict[str, Compressed]:
        results: dict[str, Compressed] = {}
        for index, (key, action) in enumerate(plan.sites.items()):
            if progress is not None:
                progress(key, index / len(plan.sites))
            try:
                results[key] = compress_matrix(self._places[key].matrix, action, None, partial(self.weighted, key))
            except SlimLSTMError as error:
                raise SlimLSTMError(f"{key}: {error}") from error
        return results

    def report(self, key: str, plan: Plan, result: Compressed) -> SiteReport:
        site = next(site for site in self.sites if site.key == key)
        return site_report(site, plan.sites[key], result, self.itemsize(site))

    def total(self, reports: list[SiteReport]) -> Total:
        """Of all LSTMs with their biases, those with shared weights once."""
        by_key = {report.key: report for report in reports}
        biases = [bias for group in self._groups for bias in group[0].biases.values()]
        sizes = [sum(bias.numel() for bias in biases), sum(bias.nbytes for bias in biases)]
        before, after = list(sizes), list(sizes)
        for site in self.sites:
            report, bytes_now = by_key.get(site.key), matrix_bytes(site.shape, site.rank, site.storage, self.itemsize(site))
            before[0], before[1] = before[0] + site.parameters, before[1] + bytes_now
            after[0] += site.parameters if report is None else report.parameters_after
            after[1] += bytes_now if report is None else report.bytes_after
        return Total(before[0], after[0], before[1], after[1])

    def losses(self, site: Site) -> Tensor:
        if self.method not in WEIGHTED:
            return singular_values(rebuilt(self._places[site.key].matrix)).square()
        weighted = self.weighted(site.key)
        return self._moments(site.key).rows * weighted.losses

    def identity(self, site: Site) -> Hashable:
        return site.key

    def itemsize(self, site: Site) -> int:
        return _parts(self._places[site.key].matrix)[0].element_size()

    def weighted(self, key: str) -> WeightedSVD:
        if key not in self._weighted:
            self._weighted[key] = WeightedSVD(rebuilt(self._places[key].matrix), self._moments(key).inputs)
        return self._weighted[key]

    def _moments(self, key: str) -> Moments:
        if self.method == "fisher":
            raise SlimLSTMError("'fisher' needs gradients, which ONNX files do not give; take 'activation'")
        found = [moments for name in self._members[key] for moments in self.moments.get(name, [])]
        if not found:
            raise SlimLSTMError(
                f"'activation' has to see data, and none reached {key}; give batches= that go through all LSTMs, or leave "
                "it out with filter="
            )
        return Moments.together(found)


def _site(key: str, location: WeightLocation) -> Site:
    module, _, name = key.rpartition(".")
    shape = shape_of(location.matrix) or (0, 0)
    rank = None if isinstance(location.matrix, Tensor) else location.matrix[0].shape[1]
    return Site(module, name, shape, rank, storage=location.storage)


class _Rewriter:
    """Puts new weights into a model, and takes out what nothing uses any longer."""

    def __init__(self, model: Any) -> None:
        self._model, self._graph = model, model.graph
        self._taken = {name for graph in graphs_of(model.graph) for name in _names(graph)}
        self._nodes: list[Any] = []

    def replace(self, groups: list[list[OnnxLSTM]], changed: Mapping[str, Compressed], plan: Plan) -> None:
        """What ``changed`` has by key goes to all layers of a group."""
        released: list[str] = []
        for group in groups:
            key = group[0].name
            storages = {
                p.name: plan.sites[f"{key}.{p.name}"].storage for p in group[0].locations if f"{key}.{p.name}" in changed
            }
            new = {name: (changed[f"{key}.{name}"], storage or "") for name, storage in storages.items()}
            shared: dict[Hashable, Any] = {}
            for layer in group:
                if layer.node.op_type == "LSTM":
                    released += self._replace_operands(layer, new, key, shared)
                else:
                    released += [
                        name for p in layer.locations if p.name in new for name in self._thin(p, key, *new[p.name], shared)
                    ]
        nodes = [*self._nodes, *self._graph.node]
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        _remove_unused(self._graph, released)
        # Before version 4 of the format, weights had to be listed among the inputs.
        self._model.ir_version = max(self._model.ir_version, 4)

    def _replace_operands(
        self, layer: OnnxLSTM, new: Mapping[str, tuple[Compressed, str]], key: str, shared: dict[Hashable, Any]
    ) -> list[str]:
        """New weights W and R of an LSTM operator, both directions each; the names of what it had before."""
        released: list[str] = []
        for position in (1, 2):
            locations = [location for location in layer.locations if location.index == position]
            if not any(location.name in new for location in locations):
                continue
            if position not in shared:
                parts = [
                    self._operand(location, f"{key}.{location.name}", new.get(location.name)) for location in locations
                ]
                name = parts[0]
                if len(parts) > 1:
                    name = self._add("Concat", parts, f"{key}.{locations[0].name}.both", axis=0)
                shared[position] = name
            released.append(layer.node.input[position])
            layer.node.input[position] = shared[position]
        return released

    def _operand(self, location: WeightLocation, key: str, new: tuple[Compressed, str] | None) -> str:
        """The value [1, 4H, n] of one direction."""
        result, storage = new or (Compressed(), location.storage or "")
        matrix = (
            result.stands_for(location.matrix) if isinstance(location.matrix, Tensor) else _as_kept(result, location.matrix)
        )
        if isinstance(matrix, Tensor):
            return self._weight(key, reordered(matrix, location.gates), storage, lambda weight: weight[None])
        u = self._weight(f"{key}_u", reordered(matrix[0], location.gates), storage, lambda weight: weight[None])
        v = self._weight(f"{key}_v", matrix[1], storage, lambda weight: weight[None])
        return self._add("MatMul", [u, v], f"{key}.product")

    def _thin(
        self, location: WeightLocation, key: str, result: Compressed, storage: str, shared: dict[Hashable, Any]
    ) -> Iterable[str]:
        """A product with one matrix, or with V and then U; the names that it had before."""
        matrix = _as_kept(result, location.matrix)
        is_transposed = bool(attribute_of(location.node, "transB", 0))

        def turned(weight: Tensor) -> Tensor:
            return weight if is_transposed else weight.mT

        key = f"{key}.{location.name}"
        names: list[str] | None = shared.get((location.name, is_transposed))
        if names is None:
            if isinstance(matrix, Tensor):
                names = [self._weight(key, reordered(matrix, location.gates), storage, turned)]
            else:
                names = [
                    self._weight(f"{key}_u", reordered(matrix[0], location.gates), storage, turned),
                    self._weight(f"{key}_v", matrix[1], storage, lambda weight: weight.mT),
                ]
            shared[location.name, is_transposed] = names
        yield location.node.input[1]
        location.node.input[1] = names[0]
        if len(names) == 2:
            if location.source is not None:
                yield location.source.input[1]
                location.source.input[1] = names[1]
                return
            thin = self._node("MatMul", [location.node.input[0], names[1]], f"{location.node.output[0]}_thin")
            _insert(location.scope.graph, thin, before=location.node)
            location.node.input[0] = thin.output[0]

    def _weight(self, key: str, weight: Tensor, storage: str, laid_out: Callable[[Tensor], Tensor]) -> str:
        """A constant [m, n] as it is laid out in the file, in ``storage``; the name of its value in its own dtype."""
        if storage not in ("int8", "bfloat16"):
            return self._constant(key, laid_out(weight))
        if storage == "bfloat16":
            return self._cast(self._constant(key, laid_out(weight.bfloat16())), weight.dtype)
        integers, scale = to_int8(weight)
        stored = self._constant(key, laid_out(integers))
        scales = self._constant(f"{key}.scale", laid_out(scale[:, None]))
        return self._add("Mul", [self._cast(stored, weight.dtype), scales], f"{key}.value")

    def _constant(self, name: str, value: Tensor) -> str:
        from onnx import helper

        name, value = self._free(name), value.detach()
        content = value.flatten().contiguous().view(torch.uint8).numpy().tobytes()
        self._graph.initializer.append(helper.make_tensor(name, _kind(value.dtype), value.shape, content, raw=True))
        return name

    def _cast(self, name: str, dtype: torch.dtype) -> str:
        return self._add("Cast", [name], f"{name}.cast", to=_kind(dtype))

    def _add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        node = self._node(operator, inputs, output, **attributes)
        self._nodes.append(node)
        return node.output[0]

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> Any:
        from onnx import helper

        output = self._free(output)
        return helper.make_node(operator, inputs, [output], name=output, **attributes)

    def _free(self, name: str) -> str:
        free, count = name, 1
        while free in self._taken:
            count += 1
            free = f"{name}.{count}"
        self._taken.add(free)
        return free


def _as_kept(result: Compressed, kept_as: Matrix) -> Matrix:
    """What stands for a matrix afterwards: new factors or a new dense one, or what it was."""
    if result.factors is not None:
        return result.factors[0].detach(), result.factors[1].detach()
    return kept_as if result.weight is None else result.weight.detach()


def _kind(dtype: torch.dtype) -> int:
    from onnx import TensorProto

    return {
        torch.float32: TensorProto.FLOAT,
        torch.float64: TensorProto.DOUBLE,
        torch.float16: TensorProto.FLOAT16,
        torch.bfloat16: TensorProto.BFLOAT16,
        torch.int8: TensorProto.INT8,
    }[dtype]


def _insert(graph: Any, node: Any, before: Any) -> None:
    position = next(index for index, other in enumerate(graph.node) if other is before or other.output == before.output)
    graph.node.insert(position, node)


def _names(graph: Any) -> Iterable[str]:
    """Every name that a graph gives to a value or a node."""
    yield from (tensor.name for tensor in graph.initializer)
    yield from (value.name for value in graph.input)
    for node in graph.node:
        yield from (node.name, *node.output)


def _remove_unused(graph: Any, released: list[str]) -> None:
    """Takes out what makes ``released`` values, as far as nothing else uses it."""
    uses: dict[str, int] = {}
    graphs = list(graphs_of(graph))
    for one in graphs:
        for name in [*(name for node in one.node for name in node.input), *(output.name for output in one.output)]:
            uses[name] = uses.get(name, 0) + 1
    pending, dead = list(dict.fromkeys(released)), set[str]()
    while pending:
        name = pending.pop()
        if uses.get(name) or name in dead or not name:
            continue
        dead.add(name)
        for one in graphs:
            for node in [node for node in one.node if name in node.output]:
                if any(uses.get(output) for output in node.output) or any(True for _ in inner_graphs(node)):
                    continue
                one.node.remove(node)
                for used in node.input:
                    uses[used] -= 1
                pending += node.input
    for one in graphs:
        for kept in (one.initializer, one.input, one.value_info):
            for value in [value for value in kept if value.name in dead]:
                kept.remove(value)


def _counted(model: Any) -> int:
    """How many numbers the weights of a model are."""
    from onnx import TensorProto

    kinds = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8}
    tensors: list[Any] = []
    for graph in graphs_of(model.graph):
        tensors += graph.initializer
        tensors += [
            found.t for node in graph.node if node.op_type == "Constant" for found in node.attribute if found.HasField("t")
        ]
    counted = (tensor for tensor in tensors if tensor.data_type in kinds and not tensor.name.endswith(".scale"))
    return sum(torch.Size(tensor.dims).numel() for tensor in counted)


def _check_result(model: Any, groups: list[list[OnnxLSTM]], results: Mapping[str, Compressed], output: Path) -> None:
    """Raises :class:`SlimLSTMError` unless the new model is a valid one with just the matrices that were meant."""
    _check(model, output)
    found = {layer.name: {location.name: location for location in layer.locations} for layer in find_lstms(model, output)}
    for group in groups:
        for layer in group:
            for location in layer.locations:
                result = results.get(f"{group[0].name}.{location.name}", Compressed())
                expected, now = rebuilt(_as_kept(result, location.matrix)), found.get(layer.name, {}).get(location.name)
                if now is None or not torch.allclose(rebuilt(now.matrix), expected, rtol=1e-4, atol=1e-6):
                    raise SlimLSTMError(
                        f"{layer.name}.{location.name} would not be in {output} as it was meant; this is a bug"
                    )


def _write(model: Any, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.with_name(f"{output.name}.part")
    try:
        with draft.open("wb") as stream:
            stream.write(model.SerializeToString())
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)
