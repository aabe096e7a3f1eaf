"""Write the measured parts of README.md and of pages in docs, between their markers, from stored results.

    python recipes/readme.py [--check]

``docs/demo.json`` comes from ``slimlstm demo --json``, ``results/ptb_untuned`` and ``results/ptb_fine_tuned`` from
``recipes/sweep.py``, ``results/quality_*`` and ``results/frontier_*`` from ``recipes/quality.py``,
``results/registry_models`` from ``recipes/registry_models.py``, ``results/ptb_tuned`` from ``recipes/tune.py``,
``results/engines``, ``results/threads.json``, ``results/calibration.json`` and ``results/calls`` from ``benchmarks``,
``results/onnx_latency.json`` from ``recipes/onnx_latency.py``, and ``results/real_models`` from the programs in
``examples/real``. It also draws pictures in ``docs``. A result that no clean commit made is an error, unless
``results/dirty.json`` lists it as an old one; a mark follows its numbers. With ``--check`` it writes nothing, and the exit
status is 1 if a page is out of date.
"""

import argparse
import math
import re
import statistics
import sys
from pathlib import Path

from paper import plots
from paper.methods import PAPER
from paper.page.results import MARK, ResultFolder, marked
from slimlstm.errors import SlimLSTMError
from slimlstm.files import write_text
from slimlstm.pipeline.sensitivity import Sensitivity

ROOT = Path(__file__).parents[1]
RANK = 50
SHOWN = 0.08
"""The fraction of the bytes that README.md shows of the frontier."""
INT8, TOGETHER = "fisher-int8", "fisher-auto"
FOREIGN = ("svd-int8", INT8, "dense-int4", TOGETHER)
DIRTY = f"{MARK.strip()} Made with uncommitted changes, so the commit that the result names may not reproduce the number."

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--check", action="store_true", help="compare only")
parser.add_argument("--allow-dirty", action="store_true", help="mark results that no clean commit made, and go on")
arguments = parser.parse_args()
RESULTS = ResultFolder(ROOT / "results", allow_dirty=arguments.allow_dirty)


def markdown(header, rows):
    # Numbers align right, and words left.
    is_number = [all(not cell or cell[0] in "+-0123456789" for cell in column) for column in zip(*rows, strict=True)]
    lines = [header, ["---"] + ["---:" if number else "---" for number in is_number[1:]], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def stored(path):
    """Return a result; end the program if no clean commit made it."""
    try:
        return (
            RESULTS if path.is_relative_to(RESULTS.folder) else ResultFolder(path.parent, allow_dirty=arguments.allow_dirty)
        ).read(path)
    except SlimLSTMError as error:
        sys.exit(str(error))


tour = stored(ROOT / "docs" / "demo.json")
made_with = tour["provenance"]


def variant_name(row):
    """Return the method, the storage unless it is float32, and the target."""
    words = [row["method"]] if row["method"] != "dense" or row.get("storage", "float32") == "float32" else []
    words += [row.get("storage", "float32")] if row.get("storage", "float32") != "float32" else []
    return " ".join(words) + (f", {row['target']}" if row["target"] else "")


demo_rows = [
    [
        variant_name(row),
        f"{row['parameters'] / 1e6:.2f} M",
        f"{row['bytes'] / 1e6:.1f} MB",
        marked(f"{row['perplexity']:.1f}", tour),
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
        "*Perplexity* is per byte-pair token of held-out WikiText-2 text. *Speed* is how many times faster the LSTMs read "
        "35 tokens than the dense model's LSTMs in PyTorch, at batch 1 on one thread, side by side on "
        f"{made_with['processor']}. From [`docs/demo.json`](docs/demo.json), with PyTorch {made_with['torch']}. "
        "[Speed of one layer](#speed-of-one-layer) compares with the fastest engine for each size.",
    ]
)

results = [stored(path) for path in (ROOT / "results" / "ptb_untuned").glob("*.json")]
untuned = {(result["method"], result["target"], result["rank"]): result for result in results}
fine_tuned = {path.stem: stored(path) for path in (ROOT / "results" / "ptb_fine_tuned").glob("*.json")}
columns = [(method, target) for target in ("hh", "ih") for method in PAPER]
ptb_rows = []
for rank in sorted({rank for _, _, rank in untuned if rank}):
    if all((*column, rank) in untuned for column in columns):
        found = [untuned[method, target, rank] for method, target in columns]
        ptb_rows.append([str(rank), *(marked(f"{one['perplexity']:.1f}", one) for one in found)])
    names = [f"{method}-{target}-{rank:03d}" for method, target in columns]
    if fine_tuned.keys() >= {"dense", *names}:
        found = [fine_tuned[name] for name in names]
        ptb_rows.append([f"{rank}, tuned", *(marked(f"{one['perplexity']['test']:.1f}", one) for one in found)])
of_tuned = (
    "*Tuned* rows, from [`results/ptb_fine_tuned`](results/ptb_fine_tuned), have averaged SGD (epochs: "
    f"{fine_tuned['dense']['epochs']}), which brings the dense model to {fine_tuned['dense']['perplexity']['test']:.2f}. "
    if any("tuned" in row[0] for row in ptb_rows)
    else ""
)
ptb_part = "\n\n".join(
    [
        markdown(["rank", *(f"{method}, {target}" for method, target in columns)], ptb_rows),
        f"The numbers are test perplexities; the dense model has {untuned['dense', 'none', 0]['perplexity']:.2f}. Rows "
        "without *tuned*, from [`results/ptb_untuned`](results/ptb_untuned), have no training after compression. "
        f"{of_tuned}The model has the paper's architecture, but was trained for eight epochs only: compare columns with "
        "each other, not with published figures.",
    ]
)

quality = {
    folder: [stored(path) for path in (ROOT / "results" / folder).glob("*-*.json")]
    for folder in ("quality_ptb", "quality_embedded")
}
quality_methods = ("prune", "svd", "svd-global", "activation", "fisher", "svd-int8", "fisher-int8")


def rise(folder, keep, method):
    """Return a method's rise of the loss, and in brackets its ratio to SVD's; a dash if it was not run."""
    found = {run["method"]: run for run in quality[folder] if run["keep"] == keep}
    if method not in found:
        return "-"
    one, svd = found[method], found["svd"]
    return marked(f"{one['rise']:+.4f} ({one['rise'] / svd['rise']:.2f})", one, svd)


quality_rows = [
    [f"{name}, {keep:.0%}", *(rise(folder, keep, method) for method in quality_methods)]
    for name, folder in (("Penn Treebank", "quality_ptb"), ("embedded", "quality_embedded"))
    for keep in sorted({run["keep"] for run in quality[folder]}, reverse=True)
]

FRONTIER = {"Penn Treebank": "ptb", "embedded": "embedded"}
frontier = {
    name: [stored(path) for path in sorted((ROOT / "results" / f"frontier_{folder}").glob("*-*-*.json"))]
    for name, folder in FRONTIER.items()
}


def frontier_row(name, keep):
    """Return the sizes and rises of int8 and of rank and bits together at one size."""
    old, new = (next(r for r in frontier[name] if (r["keep"], r["method"]) == (keep, m)) for m in (INT8, TOGETHER))
    return [
        f"{name}, {keep:.0%}",
        f"{new['matrix_bytes'][0] / new['matrix_bytes'][1]:.1f}x",
        marked(f"{old['rise']:+.4f}", old),
        marked(f"{new['rise']:+.4f}", new),
        f"{new['rise'] / old['rise']:.2f}",
        f"{math.exp(new['rise']) - 1:+.1%}",
    ]


frontier_header = ["model, matrices' bytes left", "smaller", "int8", "rank and bits together", "ratio", "perplexity"]
frontier_rows = {
    (name, keep): frontier_row(name, keep)
    for name, runs in frontier.items()
    for keep in sorted({run["keep"] for run in runs if run["method"] == TOGETHER}, reverse=True)
}
frontier_picture = "![Rise of the loss against bytes, for int8 and for rank and bits together](docs/frontier.png)"
frontier_part = "\n\n".join(
    [
        markdown(frontier_header, [row for (_, keep), row in frontier_rows.items() if keep == SHOWN]),
        "*int8* (the Fisher method) and *rank and bits together* show the rise of the test text's log-perplexity; *ratio* "
        "compares them. *Perplexity*: its change with rank and bits together. The picture shows other sizes.",
        frontier_picture,
    ]
)


def order(values):
    return [sorted(values).index(value) for value in values]


def correlation(runs):
    """Return Spearman's rank correlation of predicted and measured rises."""
    return statistics.correlation(*(order([run[key] for run in runs]) for key in ("predicted_rise", "rise")))


foreign = {path.stem: stored(path)["rows"] for path in sorted((ROOT / "results" / "registry_models").glob("*.json"))}
foreign_rows = [
    [f"{name}, {keep:.0%}"]
    + [
        f"{next(row['difference'] for row in rows if (row['keep'], row['method']) == (keep, method)):.4f}"
        for method in FOREIGN
    ]
    for name, rows in foreign.items()
    for keep in sorted({row["keep"] for row in rows if row["method"] == TOGETHER}, reverse=True)
]
tuned = {path.stem: stored(path) for path in (ROOT / "results" / "ptb_tuned").glob("*.json")}
tuned_rows = [
    [name, f"{run['config']['lr']:g}", *(f"{run['perplexity'][when]:.1f}" for when in ("before", "after"))]
    for name, run in sorted(tuned.items())
]
first = quality["quality_ptb"][0]
timed = stored(ROOT / "results" / "calibration.json")
whole = timed["compression"]
calibration_text = (
    f"Calibration takes {timed['ratio']:.2f} times as long as a plain forward and backward pass over the same text. "
    f"Everything from calibration on {whole['tokens']:,} tokens of Penn Treebank to rounding takes "
    f"{whole['processor_seconds']:.0f} s of processor time ([`results/calibration.json`](results/calibration.json)). "
)
quality_part = "\n\n".join(
    [
        markdown(["model, matrices' bytes left", *quality_methods], quality_rows),
        "The numbers are the rise of the test text's log-perplexity when all hh and ih matrices are compressed to that "
        "fraction of their bytes, without training. In brackets, the rise is divided by the rise with SVD at that size. "
        "Pruning keeps as many weights as the factors in float32 hold, and saves no bytes. Calibration saw "
        f"{first['config']['calibration_tokens']:,} tokens of training text. The predicted and the measured rise put the "
        f"{len(quality['quality_ptb'])} plans of the first model in nearly the same order (Spearman's "
        f"ρ = {correlation(quality['quality_ptb']):.3f}, [picture](docs/prediction.png)), but the prediction is several "
        "times too small ([why](docs/decisions/0007-calibration.md)). From [`results/quality_ptb`](results/quality_ptb) "
        "and [`results/quality_embedded`](results/quality_embedded).",
        "### Rank and bits together",
        frontier_picture,
        markdown(frontier_header, list(frontier_rows.values())),
        "The numbers are the rise of the whole test text's log-perplexity at the same bytes: by the Fisher method in int8, "
        'and by `LowRank("fisher", bytes=..., storage="auto")`, which chooses rank and bits of every matrix together. '
        "*Ratio* divides the second rise by the first. *Perplexity* is its change with rank and bits together. From "
        "[`results/frontier_ptb`](results/frontier_ptb) and [`results/frontier_embedded`](results/frontier_embedded).",
        f"{calibration_text}A byte is worth more in some matrices than in others:",
        "![Predicted rise of the loss against bytes of each matrix](docs/sensitivity.png)",
        "### Models from the package index",
        markdown(["model, matrices' bytes left", *FOREIGN], foreign_rows),
        "The numbers say how far predictions are from the dense model's, on data that calibration did not see: for "
        "resemblyzer, the mean cosine distance of embeddings; for g2p-id, the fraction of words that are pronounced "
        "differently; for the other models, the mean difference of probabilities. *dense-int4* keeps all matrices whole, "
        "in 4 bits, rounded with feedback. From [`results/registry_models`](results/registry_models).",
        *(
            [
                markdown(["ten minutes of `finetune`", "learning rate", "perplexity before", "after"], tuned_rows),
                "The Penn Treebank model with a quarter of its recurrent weights learns from the dense model "
                f"({next(iter(tuned.values()))['perplexity']['dense']:.1f}) in bfloat16, threads: "
                f"{next(iter(tuned.values()))['provenance']['threads']}. From [`results/ptb_tuned`](results/ptb_tuned).",
            ]
            if tuned
            else []
        ),
    ]
)

engines = stored(ROOT / "results" / "engines" / "engines.json")


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
two = stored(ROOT / "results" / "threads.json")["rows"]
largest = [row["speedup"] for row in two if (row["hidden"], row["steps"]) == (max(r["hidden"] for r in two), 35)]
picture = "![How many times as fast as the best dense engine, at every rank, batch 1, one thread](docs/engines.png)"
speed_part = "\n\n".join(
    [
        markdown(["one layer", "dense float32", "dense int8", *(f"H/8 {name}" for name in precisions)], speed_rows),
        "The layers have I = H inputs, and both matrices are dense or of rank H/8; batch 1, T time steps, one thread. The "
        "first number says how many times faster the kernel is than the fastest dense rival in the same precision, among "
        "PyTorch (oneDNN on and off, `quantize_dynamic`), ONNX Runtime and OpenVINO. The number after the stroke compares "
        "with the same low-rank model as an ONNX Scan, in the fastest engine. The rivals of bfloat16 compute in float32. "
        "Outputs are checked first; times are medians of interleaved calls on "
        f"{engines['provenance']['processor']}. Below 1.00x the rival is faster; so it is in "
        f"{sum(ratio < 1 for ratio in all_ratios)} of {len(all_ratios)} ratios to dense rivals, at batch "
        f"{', '.join(map(str, sorted(batches)))}, threads {', '.join(map(str, sorted(threads)))} and every rank measured. "
        "From [`results/engines`](results/engines/engines.json).",
        f"With a second thread and nothing else running, calls of 35 steps at H = {max(row['hidden'] for row in two)} "
        f"become {min(largest):.1f} to {max(largest):.1f} times faster, and in none of {len(two)} settings is the ratio "
        f"below {min(r['speedup'] for r in two):.2f} ([`results/threads.json`](results/threads.json)). Where threads of "
        "other engines spin at the same time, the kernel takes one thread; large dense layers are then slower than in "
        "those engines with two threads.",
        picture,
    ]
)

real = [stored(path) for path in sorted((ROOT / "results" / "real_models").glob("*.json"))]


def variant_of(model, name):
    """Return a variant's row, or None where it was not measured."""
    return next((row for row in model["rows"] if row["variant"] == name), None)


def quality_and_speed(row):
    return ["-", "-"] if row is None else [f"{row['quality']:.1%}", f"{row['faster']:.1f}x"]


int8 = [variant_of(model, "int8") for model in real]
speeds, qualities = [row["faster"] for row in int8], [row["quality"] for row in int8]
SMALLEST, LIMIT = "smallest within 1%", 0.99
model_rows = [
    [
        f"{model['model']} ({model['measure']})",
        f"{row['bytes'][0] / 1e6:.2f} MB",
        *(text for one in (row, variant_of(model, SMALLEST)) for text in [f"{one['kept']:.0%}", *quality_and_speed(one)]),
    ]
    for model, row in zip(real, int8, strict=True)
]
model_header = ["model (measure)", "dense LSTM", "int8", "quality", "speed", "within 1%", "quality", "speed"]
model_part = "\n\n".join(
    [
        markdown(model_header, model_rows),
        "*int8* and *within 1%* show the share of the LSTMs' bytes left; `sl.find_smallest` chose the latter. *Speed* "
        "compares whole models, side by side. DTLN runs in ONNX Runtime. A model that does much beside its LSTMs, such as "
        "Silero VAD, becomes smaller but hardly faster.",
    ]
)
variant_rows = [
    [model["model"], row["variant"], f"{row['kept']:.1%}", *quality_and_speed(row)]
    for model in real
    for row in model["rows"]
]
real_part = "\n\n".join(
    [
        markdown(["model", "variant", "bytes left", "quality", "speed"], variant_rows),
        "*Quality* is each model's own measure, on data that calibration did not see. *Speed* is how many times faster "
        "the whole model is than the dense one, timed side by side. From [`results/real_models`](results/real_models), "
        "made by the programs in `examples/real`.",
    ]
)


def smallest_row(model):
    """Return a search's result beside the smallest configuration by hand that meets the same limit."""
    found, search = variant_of(model, SMALLEST), model["search"]
    by_hand = [
        row
        for row in model["rows"]
        if row["quality"] >= LIMIT and row["variant"] != SMALLEST and "PyTorch" not in row["variant"]
    ]
    best = min(by_hand, key=lambda row: row["bytes"][1], default=None)
    evaluations = [str(one["evaluations"]) for one in search.get("networks", [search])]
    return [
        f"{model['model']} ({model['measure']})",
        f"{found['bytes'][1] / 1e3:,.0f} kB",
        f"{found['kept']:.1%}",
        f"{found['quality']:.4f}",
        " + ".join(evaluations),
        f"{search['processor_seconds']:.0f} s",
        "-" if best is None else f"{best['bytes'][1] / 1e3:,.0f} kB ({best['variant']})",
    ]


smallest_header = ["model (measure)", "found", "left", "quality", "evaluations", "processor time", "smallest by hand"]
smallest_part = "\n\n".join(
    [
        markdown(smallest_header, [smallest_row(model) for model in real]),
        "*Found* and *left* count the bytes of the recurrent matrices. The search measured on one part of the data. The "
        "quality was measured on another part, which neither the search nor the calibration saw. The processor time "
        "includes the calibration. *Smallest by hand* is the smallest configuration that the same program names itself "
        "and that keeps 99% of the quality on the same data. From [`results/real_models`](results/real_models).",
    ]
)
headline_part = (
    f"Make a trained LSTM four times smaller and the whole model up to {max(speeds):.1f} times faster on CPUs, without "
    f"training it again. On five real models, int8 keeps {min(qualities):.1%} to {max(qualities):.1%} of the quality by "
    "each model's own measure. One call finds the smallest model that loses at most 1%."
)

latency = stored(ROOT / "results" / "onnx_latency.json")
latency_kinds = [f"{door}, {name}" for door in ("exported", "compressed") for name in ("int8", "int4", "half, int8")]
latency_rows = [
    [row["model"], str(row["steps"]), f"{1e6 * row['dense_seconds']:,.0f} µs"]
    + [f"{row['times'][kind]:.2f}" if kind in row["times"] else "-" for kind in latency_kinds]
    for row in latency["rows"]
]
latency_part = "\n\n".join(
    [
        markdown(["model", "T", "dense export", *latency_kinds], latency_rows),
        "The ratios compare files that `export_onnx` and `compress_onnx` wrote with the dense export: below 1.00 the file "
        "takes less time. In files called *half*, factors keep half of the numbers. ONNX Runtime "
        f"{latency['provenance']['onnxruntime']} ran one sequence on one thread. The first five models have random "
        "weights; the others are trained. DTLN is published as ONNX files, so nothing is exported. From "
        "[`results/onnx_latency.json`](results/onnx_latency.json), made by `recipes/onnx_latency.py`: medians of "
        f"interleaved calls on {latency['provenance']['processor']}.",
    ]
)


def calls_table(mode):
    """Return a table of benchmarks/calls.py, with the batches of one setting in one cell, and its provenance."""
    result = stored(ROOT / "results" / "calls" / f"{mode}.json")
    settings = sorted({(row["hidden"], row["steps"]) for row in result["rows"]})
    names = list(result["rows"][0]["faster"])
    found = [
        [f"H = {hidden}, T = {steps}"]
        + [
            " / ".join(
                f"{row['faster'][name]:.2f}" for row in result["rows"] if (row["hidden"], row["steps"]) == (hidden, steps)
            )
            for name in names
        ]
        for hidden, steps in settings
    ]
    return markdown(["one layer", *names], found), result


def calls_part(mode, words):
    table, result = calls_table(mode)
    rows = result["rows"]
    dense = min(row["faster"]["dense"] for row in rows)
    small = min(ratio for row in rows for name, ratio in row["faster"].items() if name != "dense")
    by_default = min(
        row["microseconds"]["nn.LSTM, oneDNN"] / row["microseconds"][name]
        for row in rows
        for name in row["faster"]
        if name != "dense"
    )
    return "\n\n".join(
        [
            table,
            f"The numbers say how many times faster than `nn.LSTM` a layer is in {words}, at batch 1 / 8 / 32, on one "
            "thread in float32. *Dense* layers keep their matrices whole; *factors* keep "
            f"{result['config']['keep']:.0%} of the numbers; I = H. `nn.LSTM` runs with oneDNN or without, whichever is "
            f"faster. The smallest ratio of a compressed layer is {small:.2f}, or {by_default:.2f} to PyTorch's default, "
            f"with oneDNN; the smallest ratio of a dense layer is {dense:.2f}. The settings with the most arithmetic are "
            f"left out. From [`results/calls/{mode}.json`](results/calls/{mode}.json), made by `benchmarks/calls.py "
            f"{mode}` on {result['provenance']['processor']}.",
        ]
    )


PARTS = {
    "README.md": {"headline": headline_part, "models": model_part, "frontier": frontier_part},
    "docs/kernel.md": {
        "evaluation": calls_part("evaluation", "evaluation mode with gradients on, forward only"),
        "training": calls_part("training", "training mode, forward and backward"),
    },
    "docs/onnx.md": {"latency": latency_part},
    "docs/real.md": {"smallest": smallest_part},
    "docs/results.md": {
        "real": real_part,
        "demo": demo_part,
        "quality": quality_part,
        "speed": speed_part,
        "ptb": ptb_part,
    },
}
outdated = []
for page, parts in PARTS.items():
    path = ROOT / page
    text = before = path.read_text(encoding="utf-8")
    for name, part in parts.items():
        # The site does not hold the results, so its pages name them without a link.
        linked = part if path.parent == ROOT else re.sub(r"\[(`[^`]*`)\]\(results/[^)]*\)", r"\1", part)
        linked = linked if path.parent == ROOT else linked.replace("](docs/", "](")
        linked += f"\n\n{DIRTY}" * (MARK in linked)
        begin, end = f"<!-- {name}: made by recipes/readme.py -->", f"<!-- {name}: end -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{linked}\n{end}{tail}"
    outdated += [page] if text != before else []
    if not arguments.check:
        write_text(path, text)
if arguments.check:
    sys.exit(f"{', '.join(outdated)} out of date; run `make figures`" if outdated else 0)
points = {}
for run in sorted(quality["quality_ptb"], key=lambda run: quality_methods.index(run["method"])):
    points.setdefault(run["method"], []).append((run["predicted_rise"], run["rise"]))
plots.predictions(points, ROOT / "docs" / "prediction.png")
LINES = {INT8: "fisher, int8", TOGETHER: "rank and bits together"}
panels = {
    name: {
        line: [(100 * r["matrix_bytes"][1] / r["matrix_bytes"][0], r["rise"]) for r in runs if r["method"] == method]
        for method, line in LINES.items()
    }
    for name, runs in frontier.items()
}
RISE = "rise of the loss (nats per token)"
plots.rises(panels, ROOT / "docs" / "frontier.png", x_label="bytes left of the matrices (%)", y_label=RISE)
panels = {
    name: {
        site.keys[0].removesuffix("_l0").replace("lstms.", "layer ").replace(".weight_", ", "): [
            (option.bytes / 1e3, option.loss) for option in site.options
        ]
        for site in Sensitivity.load(ROOT / "results" / f"frontier_{folder}" / "sensitivity.json").sites
    }
    for name, folder in FRONTIER.items()
}
plots.rises(
    panels,
    ROOT / "docs" / "sensitivity.png",
    x_label="bytes of the matrix (kB)",
    y_label=f"predicted {RISE}",
)
plots.speed_ratios(engines["rows"], ROOT / "docs" / "engines.png")
