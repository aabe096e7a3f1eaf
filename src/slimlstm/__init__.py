"""Make trained LSTMs small and fast, without training them again: low-rank factors, low-bit weights, a fused CPU kernel.

Examples:
    >>> import torch, slimlstm as sl
    >>> model = torch.nn.Sequential(torch.nn.LSTM(256, 256))
    >>> report = sl.compress_(model, sl.Quantize("int8"))
    >>> round(report.lstm.bytes_after / report.lstm.bytes_before, 2)
    0.26
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimlstm import bench, evaluate, methods, tuning
    from slimlstm.calibration.collect import calibrate
    from slimlstm.calibration.moments import Calibration
    from slimlstm.compress import compress_, measure_sensitivity
    from slimlstm.errors import SlimLSTMError
    from slimlstm.folders import save
    from slimlstm.loading import load
    from slimlstm.methods import Method, Storage, register_method, register_storage
    from slimlstm.modules.cell import LowRankLSTMCell
    from slimlstm.modules.hosts import find_sites
    from slimlstm.modules.lstm import LowRankLSTM
    from slimlstm.onnx.compress import compress_onnx
    from slimlstm.onnx.export import export_onnx
    from slimlstm.pipeline.config import LowRank, Prune, Quantize
    from slimlstm.pipeline.plan import Plan
    from slimlstm.pipeline.report import Report
    from slimlstm.pipeline.sensitivity import Sensitivity
    from slimlstm.pipeline.site_plan import SitePlan
    from slimlstm.search import find_smallest
    from slimlstm.tuning import finetune
    from slimlstm.weight_files import compress_file

__all__ = [
    "Calibration",
    "LowRank",
    "LowRankLSTM",
    "LowRankLSTMCell",
    "Method",
    "Plan",
    "Prune",
    "Quantize",
    "Report",
    "Sensitivity",
    "SitePlan",
    "SlimLSTMError",
    "Storage",
    "bench",
    "calibrate",
    "compress_",
    "compress_file",
    "compress_onnx",
    "evaluate",
    "export_onnx",
    "find_sites",
    "find_smallest",
    "finetune",
    "load",
    "measure_sensitivity",
    "methods",
    "register_method",
    "register_storage",
    "save",
    "tuning",
]

# Importing PyTorch takes seconds, so names are imported at their first use: ``slimlstm --help`` needs none of them.
_SUBMODULES = {
    *("bench", "calibration", "demo", "evaluate", "files", "methods", "modules", "onnx", "ops", "pipeline", "search"),
    *("tuning", "weight_files"),
}
_HOME = {
    "calibrate": "calibration.collect",
    "Calibration": "calibration.moments",
    "compress_": "compress",
    "measure_sensitivity": "compress",
    "SlimLSTMError": "errors",
    "load": "loading",
    "save": "folders",
    "Method": "methods",
    "Storage": "methods",
    "register_method": "methods",
    "register_storage": "methods",
    "LowRankLSTMCell": "modules.cell",
    "find_sites": "modules.hosts",
    "LowRankLSTM": "modules.lstm",
    "compress_onnx": "onnx.compress",
    "export_onnx": "onnx.export",
    "LowRank": "pipeline.config",
    "Prune": "pipeline.config",
    "Quantize": "pipeline.config",
    "Plan": "pipeline.plan",
    "Report": "pipeline.report",
    "Sensitivity": "pipeline.sensitivity",
    "SitePlan": "pipeline.site_plan",
    "find_smallest": "search",
    "finetune": "tuning",
    "compress_file": "weight_files",
}
"""The module that defines each name."""


def __getattr__(name: str) -> Any:
    """Import a public name or submodule at its first use (PEP 562)."""
    if name in _SUBMODULES:
        return import_module(f"slimlstm.{name}")
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("slimlstm")
    elif name in _HOME:
        value = getattr(import_module(f"slimlstm.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'slimlstm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES, "__version__"})
