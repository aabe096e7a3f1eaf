"""Draw matrices of a trained AWD-LSTM or ELMo: dense, as low-rank products, and pruned to as many weights.

    python recipes/heatmaps.py --model ptb
    python recipes/heatmaps.py --model runs/elmo --name elmo-heatmap

It writes ``heatmap-hh`` and ``heatmap-ih``, each as PNG and PDF, into docs/paper.
"""

import argparse
from pathlib import Path

from paper.elmo_files import load_bilm
from paper.plots import heatmaps
from paper.stored_models import load_language_model, model_folder
from slimlstm.methods import magnitude_mask, nonzeros_at_rank, svd

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--model", type=model_folder, required=True, help="folder of an AWD-LSTM or ELMo, or name of a stored one"
)
parser.add_argument("--layer", type=int, default=1, help="counted from 0; for an ELMo, of the forward direction")
parser.add_argument("--rank", type=int, default=10)
parser.add_argument("--name", default="heatmap", help="beginning of the files' names")
parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "paper", help="folder")
arguments = parser.parse_args()
arguments.output.mkdir(parents=True, exist_ok=True)
is_elmo = list(arguments.model.glob("*options.json"))
lstms = load_bilm(arguments.model).forward_lstms if is_elmo else load_language_model(arguments.model).lstms
for target in ("hh", "ih"):
    matrix = getattr(lstms[arguments.layer], f"weight_{target}_l0").detach()
    nonzeros = nonzeros_at_rank(tuple(matrix.shape), arguments.rank)
    factors = svd(matrix, arguments.rank)
    pictures = {
        f"{target} of layer {arguments.layer}": matrix,
        f"U V, rank {arguments.rank}": factors.u @ factors.v,
        f"pruned to {nonzeros / matrix.numel():.1%}": matrix * magnitude_mask(matrix, nonzeros),
    }
    for ending in ("png", "pdf"):
        heatmaps(pictures, arguments.output / f"{arguments.name}-{target}.{ending}")
