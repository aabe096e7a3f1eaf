"""Makes trained LSTMs small and fast by low-rank factorisation.

import slimlstm as sl

report = sl.compress_(model, sl.LowRank(rank=64, target="hh"))
print(report)
sl.save(model, "small/")
model = sl.load("small/", fresh_dense_model)
sl.export_onnx(model, example_inputs, "small.onnx")
"""

from slimlstm.calibration.collect import calibrate
from slimlstm.compress import compress_
from slimlstm.errors import SlimLSTMError
from slimlstm.folders import load, save
from slimlstm.modules.cell import LowRankLSTMCell
from slimlstm.modules.hosts import find_sites
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.onnx.export import export_onnx
from slimlstm.pipeline.config import LowRank, Prune, Quantize
from slimlstm.pipeline.plan import Plan
from slimlstm.pipeline.report import Report
from slimlstm.tuning import finetune

__all__ = [
    "LowRank",
    "LowRankLSTM",
    "LowRankLSTMCell",
    "Plan",
    "Prune",
    "Quantize",
    "Report",
    "SlimLSTMError",
    "calibrate",
    "compress_",
    "export_onnx",
    "find_sites",
    "finetune",
    "load",
    "save",
]
