"""The sites of an ONNX graph, as a source for the pipeline."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from slimlstm.calibration.moments import Calibration, Moments
from slimlstm.errors import SlimLSTMError
from slimlstm.methods import Replacement, matrix_bytes, sha256_of, storage_called
from slimlstm.modules.sites import Site
from slimlstm.onnx.builder import INT4_OPSET
from slimlstm.onnx.calibrate import calibrate_graph
from slimlstm.onnx.forms import Form
from slimlstm.onnx.graph import OnnxLSTM, WeightLocation
from slimlstm.onnx.opsets import opset_of
from slimlstm.onnx.others import quantize_others
from slimlstm.onnx.rewrite import Rewriter
from slimlstm.onnx.runtime import RunInputs
from slimlstm.onnx.sizes import count_numbers
from slimlstm.ops.weights import Matrix, parts_of, shape_of
from slimlstm.pipeline.site_plan import SitePlan
from slimlstm.pipeline.source import Size, Sizes, replaced_site

_BFLOAT16_OPSET = 13
"""The first opset whose Cast reads bfloat16."""


class GraphSource:
    """The sites of an ONNX graph; see :class:`slimlstm.pipeline.source.Source`.

    Args:
        model: the ONNX model, which :meth:`put` changes.
        lstms: its LSTMs with constant weights. LSTMs with the same weights form one group; its sites are named after the
            first of them.
        form: the form of LSTM operators afterwards; see :func:`slimlstm.onnx.forms.choose_form`.
        others: words that select weights outside LSTMs to store in int8; see
            :func:`slimlstm.onnx.others.quantize_others`.
        runs: inputs by name on which to compare the outputs when other weights became int8; None for random ones.

    Attributes:
        groups: the groups of LSTMs that share their weights.
        forms: the form of every operator that :meth:`put` changed, by name.
        scans: the prefix of the names of an operator's Scans, by the operator's name; set by :meth:`put`.
    """

    mask_itemsize = 0  # The zeros stay in the weights.

    def __init__(
        self,
        model: Any,
        lstms: Iterable[OnnxLSTM],
        form: str = "auto",
        others: Collection[str] = (),
        runs: Sequence[RunInputs] | None = None,
    ) -> None:
        self._model, self.groups, self._form, self._others, self._runs = model, _grouped(lstms), form, others, runs
        self.forms: dict[str, Form] = {}
        self.scans: dict[str, str] = {}
        self._locations = {
            f"{group[0].name}.{location.name}": location for group in self.groups for location in group[0].locations
        }
        self._sites = {key: _site(key, location) for key, location in self._locations.items()}

    def calibrate(self, batches: Iterable[RunInputs], with_gradients: bool) -> Calibration:
        """Return the moments of this source's sites; see :func:`slimlstm.onnx.calibrate.calibrate_graph`."""
        moments = calibrate_graph(self._model, self._lstms, batches, with_gradients)
        found: dict[str, Moments] = {}
        for group in self.groups:
            for location in group[0].locations:
                own = [one for lstm in group for one in moments.get(f"{lstm.name}.{location.name}", [])]
                if own:
                    found[f"{group[0].name}.{location.name}"] = Moments.together(own)
        return Calibration(found, None, 0, False)

    @property
    def _lstms(self) -> list[OnnxLSTM]:
        return [lstm for group in self.groups for lstm in group]

    def sites(self) -> list[Site]:
        """Return the site of every recurrent matrix, in the order of the graph; shared matrices count once."""
        return list(self._sites.values())

    def weight(self, site: Site) -> Matrix:
        """Return the matrix [m, n] or its factors."""
        return self._locations[site.key].matrix

    def identity(self, site: Site) -> Hashable:
        """Return the site's key, since LSTMs that share their weights have common sites."""
        return site.key

    def itemsize(self, site: Site) -> int:
        """Return the bytes of one number."""
        return parts_of(self.weight(site))[0].element_size()

    def check(self, site: Site, plan: SitePlan) -> None:
        """Raise :class:`SlimLSTMError` if the file's opset cannot widen the storage, or if ONNX cannot hold it in as few
        bits as the report would say."""
        row, opset = storage_called(plan.storage or "float32"), opset_of(self._model)
        if plan.storage == "bfloat16" and opset < _BFLOAT16_OPSET:
            raise SlimLSTMError(
                f"the file's opset {opset} has no bfloat16, which opset {_BFLOAT16_OPSET} added; give 'int8', or convert "
                f"the file first: onnx.version_converter.convert_version(model, {_BFLOAT16_OPSET})"
            )
        if not row.is_packed or (row.bits == 4 and opset >= INT4_OPSET):
            return
        if row.bits == 4:
            raise SlimLSTMError(
                f"the file's opset {opset} has no integers of 4 bits, and {plan.storage} codes in whole bytes would save "
                f"nothing; give 'int8', or a file of opset {INT4_OPSET} or later, as export_onnx(opset={INT4_OPSET}) writes"
            )
        raise SlimLSTMError(
            f"ONNX has no integers of {row.bits} bits, so {plan.storage} would save nothing; give 'int4' or 'int8'"
        )

    def put(self, replacements: Mapping[str, Replacement]) -> list[str]:
        """Rewrite the graph; ``forms`` and ``scans`` then describe its new operators. Return notes for the report."""
        defaults = {tensor.name for tensor in self._model.graph.initializer}
        inputs = [entry.name for entry in self._model.graph.input if entry.name in defaults]
        rewriter = Rewriter(self._model, self._form)
        rewriter.replace(self.groups, replacements)
        self.forms, self.scans = rewriter.forms, rewriter.scans
        for key, found in replacements.items():
            self._sites[key] = replaced_site(self._sites[key], found)
        notes: list[str] = []
        if any(found.mask is not None for found in replacements.values()):
            notes.append(
                "the file holds the zeros of pruned matrices like other numbers; it becomes smaller only when compressed"
            )
        if self._others:
            notes += quantize_others(self._model, self._lstms, self._others, self._runs)
        left = {entry.name for entry in self._model.graph.input}
        fixed = [name for name in inputs if name in rewriter.roots or name not in left]
        if fixed:
            others = f" and {len(fixed) - 4} more" if len(fixed) > 4 else ""
            notes.append(
                f"the inputs {', '.join(fixed[:4])}{others} of the file had weights as their defaults; these weights are "
                "fixed now, and values that are given for the inputs no longer replace them"
            )
        return notes

    def size(self) -> Sizes:
        """Return the sizes of the LSTMs with their biases and of the whole file; shared weights count once."""
        biases = [bias for group in self.groups for bias in group[0].biases.values()]
        parameters, bytes_ = sum(bias.numel() for bias in biases), sum(bias.nbytes for bias in biases)
        for site in self._sites.values():
            parameters += site.parameters
            bytes_ += matrix_bytes(site.shape, site.rank, site.storage, site.stored_itemsize or self.itemsize(site))
        return Sizes(Size(parameters, bytes_), Size(count_numbers(self._model), self._model.ByteSize()))


def _grouped(lstms: Iterable[OnnxLSTM]) -> list[list[OnnxLSTM]]:
    """Return LSTMs with the same weights together, in the order of the first of each group."""
    groups: dict[Hashable, list[OnnxLSTM]] = {}
    for lstm in lstms:
        weights = (part for location in lstm.locations for part in parts_of(location.matrix))
        key = (*(location.name for location in lstm.locations), *(sha256_of(part) for part in weights))
        groups.setdefault(key, []).append(lstm)
    return list(groups.values())


def _site(key: str, location: WeightLocation) -> Site:
    module, _, name = key.rpartition(".")
    shape = shape_of(location.matrix) or (0, 0)
    rank = None if isinstance(location.matrix, Tensor) else location.matrix[0].shape[1]
    return Site(module, name, shape, rank, storage=location.storage, stored_itemsize=location.stored_itemsize)
