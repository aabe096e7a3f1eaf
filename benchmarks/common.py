"""The layer that several benchmarks time."""

from slimlstm.modules.lstm import LowRankLSTM


def stored_layer(hidden: int, rank: int | None, storage: str) -> LowRankLSTM:
    """Return a random layer with as many inputs as hidden units, both matrices of the same rank and storage."""
    ranks = {"weight_ih_l0": rank, "weight_hh_l0": rank} if rank else None
    layer = LowRankLSTM(hidden, hidden, ranks=ranks, backend="fused").eval()
    for name in layer.matrix_shapes:
        layer.store(name, storage)
    return layer
