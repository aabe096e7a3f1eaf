"""Search for the smallest model that a metric allows, or for the best model within bytes or a latency.

Examples:
    >>> import slimlstm as sl
    >>> sl.search.limit_of(0.9, "1%", "higher")
    0.891
"""

from slimlstm.search.module import find_best, find_smallest
from slimlstm.search.onnx_file import shrink_onnx
from slimlstm.search.result import Search, SmallerModel, Trial, limit_of

__all__ = ["Search", "SmallerModel", "Trial", "find_best", "find_smallest", "limit_of", "shrink_onnx"]
