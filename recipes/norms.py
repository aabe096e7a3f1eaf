"""Norms and spectra of the matrices of a trained AWD-LSTM or ELMo, as they are and after every method and rank.

    python recipes/norms.py --model checkpoints/awd_lstm_ptb --output results/ptb_norms.json
    python recipes/norms.py --model runs/elmo --ranks 10 20 30 50 100 --output results/elmo_norms.json

A matrix whose factors would be no smaller stays dense, as it does in ``compress_``. A file that is there is left alone.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.progress import track

from paper.analysis import energy, norms
from paper.elmo_files import load_bilm
from slimlstm.demo.awd_lstm import load_awd_lstm
from slimlstm.methods import magnitude_mask, nonzeros_at_rank, semi_nmf, singular_values, svd
from slimlstm.modules.hosts import find_hosts
from slimlstm.provenance import provenance

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, required=True, help="folder of an AWD-LSTM, or of an ELMo in official files")
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--ranks", nargs="+", type=int, default=[10, 50, 100, 200, 250, 300, 350, 400])
arguments = parser.parse_args()
if arguments.output.exists():
    sys.exit(f"{arguments.output} is there")


def approximations(matrix, rank):
    """Every method's approximation at a rank."""
    kept = nonzeros_at_rank(tuple(matrix.shape), rank)
    if kept >= matrix.numel():
        return dict.fromkeys(("svd", "semi-nmf", "prune"), matrix)
    factors = {"svd": svd(matrix, rank), "semi-nmf": semi_nmf(matrix, rank)}
    products = {method: found.u.double() @ found.v.double() for method, found in factors.items()}
    return products | {"prune": matrix * magnitude_mask(matrix, kept)}


rows, spectra = [], []
model = load_bilm(arguments.model) if list(arguments.model.glob("*options.json")) else load_awd_lstm(arguments.model)
# Of an ELMo, the layers of the forward direction come before those of the backward one.
matrices = [
    (site.target, layer, host.matrix(site.name)) for layer, host in enumerate(find_hosts(model)) for site in host.sites()
]
for target, layer, matrix in track(matrices, "norms"):
    values = singular_values(matrix)
    held = energy(values)
    spectra.append(
        {
            "target": target,
            "layer": layer,
            "shape": list(matrix.shape),
            "singular_values": [float(f"{value:.5g}") for value in values.tolist()],
            "energy": {rank: float(held[min(rank, len(held)) - 1]) for rank in arguments.ranks},
        }
    )
    rows.append({"method": "dense", "target": target, "layer": layer, "rank": 0, **asdict(norms(matrix))})
    for rank in arguments.ranks:
        for method, found in approximations(matrix, rank).items():
            rows.append({"method": method, "target": target, "layer": layer, "rank": rank, **asdict(norms(found))})
result = {"rows": rows, "spectra": spectra, "config": {"model": arguments.model.name}, "provenance": provenance()}
arguments.output.parent.mkdir(parents=True, exist_ok=True)
arguments.output.with_suffix(".part").write_text(json.dumps(result) + "\n", encoding="utf-8")
arguments.output.with_suffix(".part").replace(arguments.output)
