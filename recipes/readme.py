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
import re
import sys
from pathlib import Path

from paper.measured import language_models, real_models, speeds
from paper.page.results import MARK, ResultFolder
from slimlstm.errors import SlimLSTMError
from slimlstm.files import write_text

ROOT = Path(__file__).parents[1]
DIRTY = f"{MARK.strip()} Made with uncommitted changes, so the commit that the result names may not reproduce the number."

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--check", action="store_true", help="compare only")
parser.add_argument("--allow-dirty", action="store_true", help="mark results that no clean commit made, and go on")
arguments = parser.parse_args()


def parts_of_pages(results, tour):
    """Return the text of every part, by page and name."""
    return {
        "README.md": {
            "headline": real_models.headline(results),
            "models": real_models.models(results),
            "frontier": language_models.frontier(results),
        },
        "docs/kernel.md": {
            "evaluation": speeds.calls(results, "evaluation", "evaluation mode with gradients on, forward only"),
            "training": speeds.calls(results, "training", "training mode, forward and backward"),
        },
        "docs/onnx.md": {"latency": speeds.files(results)},
        "docs/real.md": {"smallest": real_models.smallest(results)},
        "docs/results.md": {
            "real": real_models.variants(results),
            "demo": language_models.demo(tour),
            "quality": "\n\n".join(
                [
                    language_models.quality(results),
                    "### Models from the package index",
                    real_models.registry(results),
                    *language_models.finetuned(results),
                ]
            ),
            "speed": speeds.layers(results),
            "ptb": language_models.perplexities(results),
        },
    }


def with_parts(path, parts):
    """Return the text of a page with its parts between their markers."""
    text = path.read_text(encoding="utf-8")
    for name, part in parts.items():
        # The site does not hold the results, so its pages name them without a link.
        linked = part if path.parent == ROOT else re.sub(r"\[(`[^`]*`)\]\(results/[^)]*\)", r"\1", part)
        linked = linked if path.parent == ROOT else linked.replace("](docs/", "](")
        linked += f"\n\n{DIRTY}" * (MARK in linked)
        begin, end = f"<!-- {name}: made by recipes/readme.py -->", f"<!-- {name}: end -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{linked}\n{end}{tail}"
    return text


docs = ROOT / "docs"
results, of_docs = (ResultFolder(folder, allow_dirty=arguments.allow_dirty) for folder in (ROOT / "results", docs))
try:
    pages = {ROOT / page: parts for page, parts in parts_of_pages(results, of_docs.read(docs / "demo.json")).items()}
except SlimLSTMError as error:
    sys.exit(str(error))
texts = {path: with_parts(path, parts) for path, parts in pages.items()}
if arguments.check:
    outdated = [path.name for path, text in texts.items() if text != path.read_text(encoding="utf-8")]
    sys.exit(f"{', '.join(outdated)} out of date; run `make figures`" if outdated else 0)
for path, text in texts.items():
    write_text(path, text)
language_models.draw(results, docs)
speeds.draw(results, docs)
