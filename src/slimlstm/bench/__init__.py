"""Time models and layers beside other engines, and explain which backend runs.

Examples:
    >>> import torch
    >>> from slimlstm import LowRankLSTM, bench
    >>> x, lstm = torch.randn(5, 1, 3), torch.nn.LSTM(3, 4)
    >>> bench.compare(lstm, LowRankLSTM.from_dense(lstm), x, seconds=0.01).difference < 1e-5
    True
"""

from slimlstm.bench.comparison import Comparison, compare
from slimlstm.bench.explanation import Explanation, LayerChoice, explain
from slimlstm.bench.layers import LayerBench, LayerTimes, bench_layers
from slimlstm.bench.timing import interleaved_seconds, median_ratios

__all__ = [
    "Comparison",
    "Explanation",
    "LayerBench",
    "LayerChoice",
    "LayerTimes",
    "bench_layers",
    "compare",
    "explain",
    "interleaved_seconds",
    "median_ratios",
]
