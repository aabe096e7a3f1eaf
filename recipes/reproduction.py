"""Turn results into the paper's tables, pictures and claims, beside the printed numbers.

    python recipes/reproduction.py

For each corpus C of ``ptb`` and ``wikitext2``, it reads these files from the folder of results, where they exist:

    C_untuned/      recipes/sweep.py
    C_fine_tuned/   recipes/sweep.py --tune
    C_controls/     recipes/language_model.py: the ``result.json`` of each config of a control, as CONFIG.json
    C_trained.json  recipes/language_model.py: the ``result.json`` of the dense model
    C_curve/        recipes/language_model.py: ``result.json`` and ``log.jsonl`` of a training from random weights
    C_norms.json    recipes/norms.py
    C_speed.json    recipes/speed.py

For each task T of ``sst5``, ``snli`` and ``squad``:

    task_T/         recipes/tasks.py
    elmo_norms.json, elmo_trained.json  recipes/norms.py and recipes/elmo.py (its ``result.json``), of the ELMo inside

It writes tables and pictures into docs/paper, where recipes/heatmaps.py puts its own, and docs/reproduction.md. Cells that
have not been run stay empty, and the page names what is missing. A result that no clean commit made is an error, unless
``dirty.json`` in the folder of results lists it as an old one, or ``--allow-dirty`` is given; the page marks its numbers.
"""

import argparse
import json
import sys
from pathlib import Path

from paper.page.document import Document
from paper.page.results import ResultFolder
from paper.page.sources import Sources
from slimlstm import SlimLSTMError
from slimlstm.files import write_text

ROOT = Path(__file__).parents[1]
DRAWN = ROOT / "docs" / "paper"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder")
parser.add_argument("--printed", type=Path, default=ROOT / "results" / "printed.json", help="the paper's numbers")
parser.add_argument("--pictures", type=Path, default=DRAWN, help="folder for tables and pictures")
parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reproduction.md")
parser.add_argument("--allow-dirty", action="store_true", help="mark results that no clean commit made, and go on")
arguments = parser.parse_args()
arguments.pictures.mkdir(parents=True, exist_ok=True)
is_beside_page = arguments.pictures.is_relative_to(arguments.page.parent)
link = arguments.pictures.relative_to(arguments.page.parent) if is_beside_page else arguments.pictures
results = ResultFolder(arguments.results, allow_dirty=arguments.allow_dirty)
printed = json.loads(arguments.printed.read_text(encoding="utf-8"))
try:
    document = Document(Sources(results, printed, arguments.pictures, link.as_posix()), heatmaps=DRAWN)
except SlimLSTMError as error:
    sys.exit(str(error))
document.write_parts()
write_text(arguments.page, document.text())
