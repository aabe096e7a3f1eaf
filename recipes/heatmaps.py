"""Pictures of a trained AWD-LSTM's matrices: as they are, as low-rank products, and pruned to as many weights.

    python recipes/heatmaps.py --model checkpoints/awd_lstm_ptb

Writes ``heatmap-hh`` and ``heatmap-ih``, each as PNG and PDF, into docs/paper.
"""

import argparse
from pathlib import Path

from slimlstm.factorize import svd
from slimlstm.models.awd_lstm import load_awd_lstm
from slimlstm.plots import heatmaps
from slimlstm.prune import kept_by_rank, magnitude_mask

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, required=True, help="folder with model.safetensors")
parser.add_argument("--layer", type=int, default=1, help="counted from 0")
parser.add_argument("--rank", type=int, default=10)
parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "paper", help="folder")
arguments = parser.parse_args()
arguments.output.mkdir(parents=True, exist_ok=True)
lstm = load_awd_lstm(arguments.model).lstms[arguments.layer]
for target in ("hh", "ih"):
    matrix = getattr(lstm, f"weight_{target}_l0").detach()
    kept = kept_by_rank(tuple(matrix.shape), arguments.rank)
    factors = svd(matrix, arguments.rank)
    pictures = {
        f"{target} of layer {arguments.layer}": matrix,
        f"U V, rank {arguments.rank}": factors.u @ factors.v,
        f"pruned to {kept / matrix.numel():.1%}": matrix * magnitude_mask(matrix, kept),
    }
    for ending in ("png", "pdf"):
        heatmaps(pictures, arguments.output / f"heatmap-{target}.{ending}")
