"""Store a trained AWD-LSTM in the repository: int8 matrices, bfloat16 embedding, vocabulary, provenance, small files.

    python recipes/store_model.py --model runs/ptb_full --corpus ptb --name ptb

It writes the folder ``models/NAME``. Recipes then load the model by ``--model NAME`` or ``--start NAME``. It also works on
the folder of a run that has not ended, whose best weights so far it stores. ``training.json`` describes the training, with
the earlier ones of a run that went on from the stored model of the same name, and states the perplexities before and after
rounding.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from safetensors import safe_open

from paper.runs import read_json
from paper.stored_models import MODELS, load_language_model, model_folder, save_language_model
from paper.texts import EVALUATION_STREAMS, add_text_options, words_in
from slimlstm.demo.corpora import Vocabulary
from slimlstm.evaluate import perplexity
from slimlstm.files import write_json
from slimlstm.provenance import provenance

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=model_folder, required=True, help="folder of an AWD-LSTM, with vocab.txt")
add_text_options(parser, files="valid.txt and test.txt")
parser.add_argument("--name", required=True, help="of the stored model")
parser.add_argument("--models", type=Path, default=MODELS, help="folder of stored models")
arguments = parser.parse_args()


def perplexities(model):
    return {split: perplexity(model, ids, streams=EVALUATION_STREAMS).perplexity for split, ids in tokens.items()}


def training():
    """Return what the run's files say about the training; before its end they have settings instead of a result."""
    result, log, checkpoint = (arguments.model / name for name in ("result.json", "log.jsonl", "checkpoint.safetensors"))
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    settings = None
    if checkpoint.exists():
        with safe_open(checkpoint, "pt") as file:
            settings = json.loads(file.metadata()["settings"])
        settings["start"] = Path(settings["start"]).name
    found = {"result": read_json(result) if result.exists() else None, "settings": settings, "log": entries}
    return found | ({"earlier": earlier(settings)} if settings and settings["start"] == arguments.name else {})


def earlier(settings):
    """Return the trainings of the stored model that the run with these settings went on from, the oldest first."""
    stored = folder / "training.json"
    if not stored.exists():
        return []
    last = read_json(stored)["training"]
    before = last.pop("earlier", [])
    # Weights of this run may have been stored before its end.
    return before if last.get("settings") == settings else [*before, last]


vocabulary = Vocabulary.read(arguments.model / "vocab.txt")
tokens = {split: vocabulary.encode(words_in(arguments, split)) for split in ("valid", "test")}
dense, folder = load_language_model(arguments.model), arguments.models / arguments.name
how = training()
# Ask git now: saving replaces files that it may track, and the tree would no longer be clean.
origin = provenance()
save_language_model(dense, vocabulary, folder)
found = {"before": perplexities(dense), "after": perplexities(load_language_model(folder))}
write_json(
    folder / "training.json",
    {
        "corpus": arguments.corpus or arguments.text.name,
        "perplexity": found,
        "parameters": sum(parameter.numel() for parameter in dense.parameters()),
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "training": how,
        "provenance": origin,
    },
)
Console().print(found)
