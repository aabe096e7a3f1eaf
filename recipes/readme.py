"""Writes the measured parts of README.md anew, between their markers, from stored results.

    python recipes/readme.py [--check]

``docs/demo.json`` comes from ``slimlstm demo --json``, ``results/ptb_untuned`` from ``recipes/sweep.py``,
``results/engines`` from ``benchmarks/engines.py``. With ``--check`` nothing is written; the exit status is 1 where the
README does not say what the results say.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RANK = 50

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--check", action="store_true")
arguments = parser.parse_args()


def markdown(header, rows):
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


tour = json.loads((ROOT / "docs" / "demo.json").read_text(encoding="utf-8"))
made_with = tour["provenance"]
demo_rows = [
    [
        "dense" if row["rank"] is None else f"{row['method']}, {row['target']}",
        f"{row['parameters'] / 1e6:.2f} M",
        f"{row['bytes'] / 1e6:.1f} MB",
        f"{row['perplexity']:.1f}",
        f"{row['change']:+.1%}",
        f"{row['latency_ratio']:.1f}x",
    ]
    for row in tour["rows"]
    if row["rank"] in (None, RANK)
]
demo_part = "\n\n".join(
    [
        markdown(["rank 50", "LSTM parameters", "stored", "perplexity", "change", "speed"], demo_rows),
        tour["summary"],
        f"From [`docs/demo.json`](docs/demo.json): perplexity per byte-pair token on held-out WikiText-2 text; speed is "
        f"the ratio to the dense `nn.LSTM`s at batch 1 and 35 tokens on one thread, measured side by side on "
        f"{made_with['processor']}, PyTorch {made_with['torch']}.",
    ]
)

results = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "results" / "ptb_untuned").glob("*.json")]
perplexities = {(result["method"], result["target"], result["rank"]): result["perplexity"] for result in results}
methods, ranks = ("svd", "semi-nmf", "prune"), sorted({rank for _, _, rank in perplexities if rank})
columns = [(method, target) for target in ("hh", "ih") for method in methods]
ptb_part = "\n\n".join(
    [
        markdown(
            ["rank", *(f"{method}, {target}" for method, target in columns)],
            [[str(rank), *(f"{perplexities[method, target, rank]:.1f}" for method, target in columns)] for rank in ranks],
        ),
        "From [`results/ptb_untuned`](results/ptb_untuned): test perplexity, not tuned after compression; the dense model "
        f"has {perplexities['dense', 'none', 0]:.2f}. It is the paper's architecture, trained for eight epochs only: "
        "compare columns, not the level with published figures.",
    ]
)

engines = json.loads((ROOT / "results" / "engines" / "engines.json").read_text(encoding="utf-8"))


def cell(row, precision, model):
    faster = row["candidates"].get(f"slimlstm {precision} {model}", {}).get("faster", {})
    against = [f"{entry['ratio']:.2f}x" for entry in faster.values()]
    return " / ".join(against) or "-"


speed_rows = [
    [
        f"H = {row['hidden']}, T = {row['steps']}",
        *(cell(row, precision, "dense") for precision in ("float32", "int8")),
        *(cell(row, precision, f"rank {row['hidden'] // 8}") for precision in ("float32", "bfloat16", "int8")),
    ]
    for row in engines["rows"]
    if (row["batch"], row["threads"]) == (1, 1)
]
all_ratios = [
    one["faster"]["dense"]["ratio"]
    for row in engines["rows"]
    for one in row["candidates"].values()
    if "dense" in one.get("faster", {})
]
batches, threads = ({row[key] for row in engines["rows"]} for key in ("batch", "threads"))
precisions = ("float32", "bfloat16", "int8")
picture = "![The same for all ranks, batches and threads](docs/engines.png)"
speed_part = "\n\n".join(
    [
        markdown(["one layer", "dense float32", "dense int8", *(f"H/8 {name}" for name in precisions)], speed_rows),
        "From [`results/engines`](results/engines/engines.json): batch 1, one thread, I = H, T time steps, both matrices "
        "dense or of rank H/8. How many times faster the kernel is than the fastest dense rival of the precision, of "
        "PyTorch (oneDNN on and off, `quantize_dynamic`), ONNX Runtime and OpenVINO; after the stroke, than the same "
        "low-rank model as an ONNX Scan in the fastest of them. bfloat16 is compared with float32. Outputs are checked "
        f"first; medians of interleaved calls on {engines['provenance']['processor']}. Below 1.00x the rival is faster: "
        f"in {sum(ratio < 1 for ratio in all_ratios)} of {len(all_ratios)} ratios to dense rivals at batch "
        f"{', '.join(map(str, sorted(batches)))}, threads {', '.join(map(str, sorted(threads)))} and every rank measured.",
        *([picture] if (ROOT / "docs" / "engines.png").exists() else []),
    ]
)

readme = ROOT / "README.md"
text = before = readme.read_text(encoding="utf-8")
for name, part in (("demo", demo_part), ("speed", speed_part), ("ptb", ptb_part)):
    begin, end = f"<!-- {name}: made by recipes/readme.py -->", f"<!-- {name}: end -->"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    text = f"{head}{begin}\n{part}\n{end}{tail}"
if arguments.check:
    sys.exit(0 if text == before else "README.md is out of date; run `make figures`")
readme.write_text(text, encoding="utf-8")
