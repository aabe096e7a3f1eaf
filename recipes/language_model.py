"""Train an AWD-LSTM as Merity, Keskar and Socher (2018) did, or fine-tune one, compressed or not.

    python recipes/language_model.py --corpus ptb --output runs/ptb --device cuda --dtype bfloat16
    python recipes/language_model.py --corpus ptb --start runs/ptb --compress svd --target hh --rank 10 --optimizer asgd \\
        --output runs/ptb-svd-hh-010

Optimizers: SGD that turns into averaged SGD once validation stops improving (``ntasgd``), averaged SGD from the start
(``asgd``, the published fine-tuning), or AdamW with one cycle and an exponential average of its weights, for short budgets
(``adamw``). After a kill or ``--max-minutes``, the same command continues the run and ends with the same files: the best
weights in ``model.safetensors`` or in the folder ``compressed``, ``vocab.txt``, ``log.jsonl`` with a line for every epoch,
and ``result.json``. If the folder of a run is lost, ``--start`` with ``--first-epoch`` and ``--warm-up`` continues the
cycle of AdamW from stored weights.

Weight drop acts on matrices that are not factorised; pruned ones keep their masks. A Semi-NMF is trained as the factors of
its product's SVD, without V >= 0, which training would not preserve.

``--compress fisher-auto`` chooses rank and bits of every matrix together, in the bytes of float32 factors of the rank;
training keeps every weight on the grid of its bits.

Two configs are controls for compressed models of Penn Treebank. ``ptb-13m`` is dense and has as many parameters as the
model with factors of rank 10 at hh. ``ptb-tensor-train`` has recurrent matrices as tensor trains, and 12 million parameters
in all; with AdamW use ``--lr 1e-3``, since its gradients explode after some epochs at 3e-3.

``torchrun --nproc-per-node N`` divides the streams among N processes.
"""

import argparse
import math
import sys
from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import slimlstm as sl
from paper.awd_training import OPTIMIZERS, Training, TrainingOptions
from paper.cells import CALIBRATION_TOKENS, compress_cell_
from paper.checkpoints import write_tensors
from paper.methods import TOGETHER, add_plugin_option, factors_by_svd_, is_calibrated
from paper.processes import Processes
from paper.runs import Pace, lock_folder, recorded_options, seed, settings_of
from paper.stored_models import load_language_model, model_folder
from paper.tensor_train import tensor_train_
from paper.texts import add_text_options, words_in
from slimlstm.calibration.moments import Calibration
from slimlstm.demo.awd_lstm import AWDLSTM, AWDLSTMConfig, load_awd_lstm, save_awd_lstm
from slimlstm.demo.corpora import EOS, Vocabulary
from slimlstm.files import write_json, write_text
from slimlstm.methods import METHODS
from slimlstm.provenance import provenance

CONFIGS = {
    "ptb": {"streams": 20, "sizes": {}},
    "wikitext-2": {"streams": 80, "sizes": {"dropout_input": 0.65, "dropout_hidden": 0.2}},
    "small": {"streams": 20, "sizes": {"embedding_size": 200, "hidden_size": 400}},
    "ptb-13m": {"streams": 20, "sizes": {"hidden_size": 717}},
    "ptb-tensor-train": {"streams": 20, "sizes": {}, "tensor_train": 0.394},
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
plugins = add_plugin_option(parser)
add_text_options(parser)
parser.add_argument("--output", type=Path, required=True, help="folder")
parser.add_argument("--config", choices=CONFIGS, help="sizes and dropout rates; default: chosen by the corpus")
parser.add_argument("--embedding", type=int, help="embedding size; default: the config's")
parser.add_argument("--hidden", type=int, help="hidden size; default: the config's")
parser.add_argument("--streams", type=int, help="text streams side by side (the batch size); default: the config's")
parser.add_argument("--dropout", type=float, default=1.0, help="factor of every dropout rate")
parser.add_argument(
    "--tensor-train",
    type=float,
    metavar="SHARE",
    help="store recurrent matrices as tensor trains of this share of their size",
)
parser.add_argument("--start", type=model_folder, help="folder of a trained AWD-LSTM, or name of a stored one")
parser.add_argument("--compress", choices=[*METHODS, TOGETHER], help="method that compresses it first")
parser.add_argument("--calibration", type=Path, help="for methods that need it: a file that recipes/sweep.py wrote")
parser.add_argument("--calibrate", type=int, metavar="TOKENS", help=f"of that text; default: {CALIBRATION_TOKENS}")
parser.add_argument("--target", choices=["hh", "ih", "both"], default="hh", help="the matrices to compress")
parser.add_argument("--rank", type=int, help="of the factors; pruning leaves as many weights as they would have")
parser.add_argument("--optimizer", choices=OPTIMIZERS, default="ntasgd")
rates = ", ".join(f"{lr:g} for {name}" for name, lr in OPTIMIZERS.items())
parser.add_argument("--lr", type=float, help=f"learning rate; default: {rates}")
parser.add_argument("--epochs", type=int, default=500, help="at most; with adamw, the length of the cycle")
parser.add_argument("--bptt", type=int, default=70, help="mean number of tokens that gradients flow back through")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--device", default="cpu")
parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="precision of the computation")
parser.add_argument("--half", action="store_true", help="write a dense model in half precision, in files below 16 MB")
parser.add_argument("--first-epoch", type=int, help="epochs of adamw's cycle that --start has behind it; default: none")
parser.add_argument("--warm-up", type=float, help="fraction of adamw's cycle in which the rate rises; default: 0.1")
parser.add_argument("--max-minutes", type=float, default=math.inf, help="then stop; the same command continues the run")
parser.add_argument("--checkpoint-seconds", type=float, default=180.0, help="time between two checkpoints")
arguments = parser.parse_args()

config = CONFIGS[arguments.config or arguments.corpus or "small"]
arguments.streams = arguments.streams or config["streams"]
arguments.lr = arguments.lr or OPTIMIZERS[arguments.optimizer]
arguments.tensor_train = arguments.tensor_train or config.get("tensor_train")
if arguments.tensor_train and (arguments.start or arguments.half):
    parser.error("tensor trains are trained from random weights and stored in float32; leave out --start and --half")
if arguments.compress and not (arguments.start and arguments.rank):
    parser.error("--compress needs --start, the model to compress, and --rank")
if arguments.compress and is_calibrated(arguments.compress) and not arguments.calibration:
    parser.error(f"--compress {arguments.compress} needs --calibration, which recipes/sweep.py --methods writes")
if (arguments.first_epoch or arguments.warm_up) and arguments.optimizer != "adamw":
    parser.error("--first-epoch and --warm-up shape the cycle of --optimizer adamw")
if arguments.first_epoch and not (arguments.start and arguments.first_epoch < arguments.epochs):
    parser.error("--first-epoch needs --start, the weights after that epoch, and has to be below --epochs")
processes = Processes.from_environment()
try:
    processes.check_streams(arguments.streams)
except sl.SlimLSTMError as error:
    parser.error(str(error))
device = processes.join(arguments.device)
console, output = Console(quiet=not processes.is_first), arguments.output
if (output / "result.json").exists():
    console.print(f"{output / 'result.json'} already exists")
    sys.exit()
lock = lock_folder(output) if processes.is_first else None


def started_model():
    """Return the model that ``--start`` names, with this config's dropout rates, and its vocabulary."""
    model = load_language_model(arguments.start)
    rates = {name: rate for name, rate in config["sizes"].items() if "dropout" in name}
    model.config = AWDLSTMConfig(**{**vars(model.config), **rates}).scaled(arguments.dropout)
    return model, Vocabulary.read(arguments.start / "vocab.txt")


def new_model():
    """Return a model with random weights, and the vocabulary of the training text."""
    vocabulary = Vocabulary([EOS, *words_in(arguments, "train")])
    asked = {"embedding_size": arguments.embedding, "hidden_size": arguments.hidden}
    sizes = config["sizes"] | {name: size for name, size in asked.items() if size}
    return AWDLSTM(AWDLSTMConfig(len(vocabulary), **sizes).scaled(arguments.dropout)), vocabulary


def write_weights():
    if not processes.is_first:
        return
    write_text(output / "vocab.txt", "".join(word + "\n" for word in vocabulary.words))
    if arguments.compress:
        sl.save(model, output / "compressed")
    elif arguments.half:
        save_awd_lstm(model, output)
    else:
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "decoder.weight"}
        write_tensors(output / "model.safetensors", tensors)


def read_weights():
    """Bring the model to its best weights."""
    if arguments.compress:
        return sl.load(output / "compressed", AWDLSTM(model.config)).to(device)
    if arguments.half:
        return load_awd_lstm(output).to(device)
    best = load_file(output / "model.safetensors")
    model.load_state_dict(best | {"decoder.weight": best["embedding.weight"]})
    return model


def result():
    losses = {split: training.loss(split) for split in ("valid", "test")}
    return {
        "perplexity": {split: math.exp(loss) for split, loss in losses.items()},
        "loss": losses,
        "epochs": len(training.place.log),
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "sizes": {name: getattr(model.config, name) for name in ("embedding_size", "hidden_size", "num_layers")},
        "config": recorded_options(arguments, without=(*unset, "output", "max_minutes")) | {"processes": processes.count},
        "seconds": round(training.place.seconds, 1),
        "provenance": provenance(),
    }


pace = Pace(arguments.max_minutes, arguments.checkpoint_seconds)
seed(arguments.seed, "weights")
model, vocabulary = started_model() if arguments.start else new_model()
if device.type == "cpu":
    # These train faster there than nn.LSTM, and have its weights and names.
    model.lstms = nn.ModuleList(sl.LowRankLSTM.from_dense(lstm) for lstm in model.lstms)
if arguments.compress:
    calibration = Calibration.load(arguments.calibration) if arguments.calibration else None
    limit = arguments.calibrate or CALIBRATION_TOKENS
    text = vocabulary.encode(words_in(arguments, "train"))[:limit] if calibration else None
    compress_cell_(model, arguments.compress, arguments.target, arguments.rank, calibration=calibration, tokens=text)
if arguments.compress == "semi-nmf":
    factors_by_svd_(model.lstms)
if arguments.tensor_train:
    tensor_train_(model.lstms, arguments.tensor_train, model.config.weight_drop)
model = model.to(device)
console.print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
options = TrainingOptions(
    optimizer=arguments.optimizer,
    lr=arguments.lr,
    epochs=arguments.epochs,
    bptt=arguments.bptt,
    seed=arguments.seed,
    bfloat16=arguments.dtype == "bfloat16",
    first_epoch=arguments.first_epoch or 0,
    warm_up=arguments.warm_up or 0.1,
)
tokens = {split: vocabulary.encode(words_in(arguments, split)).to(device) for split in ("train", "valid", "test")}
training = Training(model, tokens, arguments.streams, options, processes)
# Left out where they are not used, as in the checkpoints of runs before they existed.
unset = [name for name in ("first_epoch", "warm_up", "plugin", "calibration", "calibrate") if not getattr(arguments, name)]
free = (
    "output",
    "max_minutes",
    "checkpoint_seconds",
    "device",
    "calibration",
    "calibrate",
    *(() if arguments.optimizer == "adamw" else ("epochs",)),
    *unset,
)
settings = settings_of(arguments, without=free) | {"processes": str(processes.count)}
if (output / "checkpoint.safetensors").exists():
    training.read_checkpoint(output, settings)
    place = training.place
    console.print(f"continuing in epoch {place.epoch} at token {place.position} of {training.length}")
training.run(lambda: training.write_checkpoint(output, settings), write_weights, pace, console)
training.model = read_weights()
found = result()
if processes.is_first:
    write_json(output / "result.json", found)
    console.print(found["perplexity"])
training.close()
