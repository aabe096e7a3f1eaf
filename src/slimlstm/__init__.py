"""Make trained LSTMs small and fast, without training them again: low-rank factors, low-bit weights, a fused CPU kernel.

Example:
    >>> import torch, slimlstm as sl
    >>> model = torch.nn.Sequential(torch.nn.LSTM(8, 16))
    >>> report = sl.compress_(model, sl.Quantize("int8"))
    >>> round(report.lstm.bytes_after / report.lstm.bytes_before, 2)
    0.33
"""

from slimlstm import bench, evaluate, methods, search, tuning
from slimlstm.calibration.collect import calibrate
from slimlstm.calibration.moments import Calibration
from slimlstm.compress import compress_
from slimlstm.errors import SlimLSTMError
from slimlstm.folders import load, save
from slimlstm.methods import Method, Storage, register_method, register_storage
from slimlstm.modules.cell import LowRankLSTMCell
from slimlstm.modules.hosts import find_sites
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.onnx.compress import compress_onnx
from slimlstm.onnx.export import export_onnx
from slimlstm.pipeline.config import LowRank, Prune, Quantize
from slimlstm.pipeline.plan import Plan
from slimlstm.pipeline.report import Report
from slimlstm.pipeline.site_plan import SitePlan
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
    "finetune",
    "load",
    "methods",
    "register_method",
    "register_storage",
    "save",
    "search",
    "tuning",
]
