"""Parts about speed: one layer in every engine, files in ONNX Runtime, and calls as users write them."""

from __future__ import annotations

from pathlib import Path

from paper import plots
from paper.page.results import Result, ResultFolder
from paper.page.tables import markdown

PRECISIONS = ("float32", "bfloat16", "int8")
PICTURE = "![How many times as fast as the best dense engine, at every rank, batch 1, one thread](docs/engines.png)"


def layers(results: ResultFolder) -> str:
    """Return how many times faster the kernel runs one layer than the fastest rival."""
    engines = _engines(results)
    rows = [
        [
            f"H = {row['hidden']}, T = {row['steps']}",
            *(_faster(row, precision, "dense") for precision in ("float32", "int8")),
            *(_faster(row, precision, f"rank {row['hidden'] // 8}") for precision in PRECISIONS),
        ]
        for row in engines["rows"]
        if (row["batch"], row["threads"]) == (1, 1)
    ]
    ratios = [
        one["faster"]["dense"]["ratio"]
        for row in engines["rows"]
        for one in row["candidates"].values()
        if "dense" in one.get("faster", {})
    ]
    batches, threads = ({row[key] for row in engines["rows"]} for key in ("batch", "threads"))
    return "\n\n".join(
        [
            markdown(["one layer", "dense float32", "dense int8", *(f"H/8 {name}" for name in PRECISIONS)], rows),
            "The layers have I = H inputs, and both matrices are dense or of rank H/8; batch 1, T time steps, one thread. "
            "The first number says how many times faster the kernel is than the fastest dense rival in the same precision, "
            "among PyTorch (oneDNN on and off, `quantize_dynamic`), ONNX Runtime and OpenVINO. The number after the stroke "
            "compares with the same low-rank model as an ONNX Scan, in the fastest engine. The rivals of bfloat16 compute "
            "in float32. Outputs are checked first; times are medians of interleaved calls on "
            f"{engines['provenance']['processor']}. Below 1.00x the rival is faster; so it is in "
            f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)} ratios to dense rivals, at batch "
            f"{', '.join(map(str, sorted(batches)))}, threads {', '.join(map(str, sorted(threads)))} and every rank "
            "measured. From [`results/engines`](results/engines/engines.json).",
            _two_threads(results),
            PICTURE,
        ]
    )


def _faster(row: Result, precision: str, model: str) -> str:
    faster = row["candidates"].get(f"slimlstm {precision} {model}", {}).get("faster", {})
    return " / ".join(f"{entry['ratio']:.2f}x" for entry in faster.values()) or "-"


def _two_threads(results: ResultFolder) -> str:
    rows = results.read(results.folder / "threads.json")["rows"]
    largest = max(row["hidden"] for row in rows)
    speedups = [row["speedup"] for row in rows if (row["hidden"], row["steps"]) == (largest, 35)]
    return (
        f"With a second thread and nothing else running, calls of 35 steps at H = {largest} "
        f"become {min(speedups):.1f} to {max(speedups):.1f} times faster, and in none of {len(rows)} settings is the ratio "
        f"below {min(row['speedup'] for row in rows):.2f} ([`results/threads.json`](results/threads.json)). Where threads "
        "of other engines spin at the same time, the kernel takes one thread; large dense layers are then slower than in "
        "those engines with two threads."
    )


def files(results: ResultFolder) -> str:
    """Return the times of ONNX files relative to the dense export's."""
    latency = results.read(results.folder / "onnx_latency.json")
    kinds = [f"{door}, {name}" for door in ("exported", "compressed") for name in ("int8", "int4", "half, int8")]
    rows = [
        [row["model"], str(row["steps"]), f"{1e6 * row['dense_seconds']:,.0f} µs"]
        + [f"{row['times'][kind]:.2f}" if kind in row["times"] else "-" for kind in kinds]
        for row in latency["rows"]
    ]
    return "\n\n".join(
        [
            markdown(["model", "T", "dense export", *kinds], rows),
            "The ratios compare files that `export_onnx` and `compress_onnx` wrote with the dense export: below 1.00 the "
            "file takes less time. In files called *half*, factors keep half of the numbers. ONNX Runtime "
            f"{latency['provenance']['onnxruntime']} ran one sequence on one thread. The first five models have random "
            "weights; the others are trained. DTLN is published as ONNX files, so nothing is exported. From "
            "[`results/onnx_latency.json`](results/onnx_latency.json), made by `recipes/onnx_latency.py`: medians of "
            f"interleaved calls on {latency['provenance']['processor']}.",
        ]
    )


def calls(results: ResultFolder, mode: str, words: str) -> str:
    """Return how many times faster than ``nn.LSTM`` a layer is, as users call it.

    Args:
        results: the folder of results.
        mode: the mode of ``benchmarks/calls.py``.
        words: the mode in words.
    """
    result = results.read(results.folder / "calls" / f"{mode}.json")
    rows = result["rows"]
    dense = min(row["faster"]["dense"] for row in rows)
    small = min(ratio for row in rows for name, ratio in row["faster"].items() if name != "dense")
    by_default = min(
        row["microseconds"]["nn.LSTM, oneDNN"] / row["microseconds"][name]
        for row in rows
        for name in row["faster"]
        if name != "dense"
    )
    # PyTorch's default is slower than the faster of the two, or equal.
    differs = f"{by_default:.2f}" != f"{small:.2f}"
    beside_default = f", and at least {by_default:.2f} times as fast as PyTorch's default, oneDNN" if differs else ""
    return "\n\n".join(
        [
            _calls_table(rows),
            f"The numbers say how many times faster than `nn.LSTM` a layer is in {words}, at batch 1 / 8 / 32, on one "
            "thread in float32. *Dense* layers keep their matrices whole; *factors* keep "
            f"{result['config']['keep']:.0%} of the numbers; I = H. `nn.LSTM` runs with oneDNN or without, whichever is "
            f"faster. Every compressed layer is at least {small:.2f} times as fast{beside_default}; the smallest ratio of "
            f"a dense layer is {dense:.2f}. The settings with the most arithmetic are left out. Times are lower quartiles "
            f"of interleaved calls. From [`results/calls/{mode}.json`](results/calls/{mode}.json), made by "
            f"`benchmarks/calls.py {mode}` on {result['provenance']['processor']}.",
        ]
    )


def _calls_table(rows: list[Result]) -> str:
    """Return a row for every setting, with its batches in one cell."""
    names = list(rows[0]["faster"])
    cells: dict[tuple[int, int], list[Result]] = {}
    for row in rows:
        cells.setdefault((row["hidden"], row["steps"]), []).append(row["faster"])
    found = [
        [f"H = {hidden}, T = {steps}", *(" / ".join(f"{one[name]:.2f}" for one in batches) for name in names)]
        for (hidden, steps), batches in sorted(cells.items())
    ]
    return markdown(["one layer", *names], found)


def draw(results: ResultFolder, folder: Path) -> None:
    """Draw the ratios to the best dense engine into a folder."""
    plots.speed_ratios(_engines(results)["rows"], folder / "engines.png")


def _engines(results: ResultFolder) -> Result:
    return results.read(results.folder / "engines" / "engines.json")
