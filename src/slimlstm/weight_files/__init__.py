"""Compress, read and rebuild the LSTMs in weight files, without the code of their models.

Names, and the order of gates, are PyTorch's.
"""

from slimlstm.weight_files.compress import compress_file
from slimlstm.weight_files.layers import layers_of
from slimlstm.weight_files.matrices import find_matrices, matrix_of
from slimlstm.weight_files.read import read_tensors, read_weights

__all__ = ["compress_file", "find_matrices", "layers_of", "matrix_of", "read_tensors", "read_weights"]
