"""Trains an AWD-LSTM as Merity, Keskar and Socher (2018) did, or fine-tunes one, compressed or not.

    python recipes/language_model.py --corpus ptb --output runs/ptb --device cuda --dtype bfloat16
    python recipes/language_model.py --corpus ptb --start runs/ptb --compress svd --target hh --rank 10 --optimizer asgd \\
        --output runs/ptb-svd-hh-010

The optimizer is SGD that turns into averaged SGD once validation stops improving (``ntasgd``), averaged SGD from the start
(``asgd``, the published fine-tuning) or AdamW with one cycle, for short budgets. A run that was killed, or that
``--max-minutes`` ended, goes on with the same command and ends with the same files: the best weights in
``model.safetensors``, or in the folder ``compressed``, ``vocab.txt``, ``log.jsonl`` with a line for every epoch, and
``result.json``. Weight drop acts on matrices that have not been factored; pruned ones keep their masks. The product that
Semi-NMF finds is trained as the factors of its SVD, without V >= 0, which training would not keep either.
Two configs are controls for compressed models of Penn Treebank: ``ptb-13m`` has as many parameters as factors of rank 10 at
hh leave, all of them dense, ``ptb-tensor-train`` its recurrent matrices as tensor trains, and 12 million parameters in all;
with AdamW the latter takes ``--lr 1e-3``, as at 3e-3 its gradients explode after some epochs.
``torchrun --nproc-per-node N`` shares the streams out among N processes.
"""

import argparse
import itertools
import json
import math
import os
import sys
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy, dropout
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import slimlstm as sl
from slimlstm.demo.awd_lstm import AWDLSTM, AWDLSTMConfig, load_awd_lstm, save_awd_lstm
from slimlstm.demo.corpora import CORPORA, EOS, Vocabulary, read_words, words_of
from slimlstm.evaluate import perplexity
from slimlstm.methods.factorize import svd
from slimlstm.provenance import provenance

CONFIGS = {
    "ptb": {"streams": 20, "sizes": {}},
    "wikitext-2": {"streams": 80, "sizes": {"dropout_input": 0.65, "dropout_hidden": 0.2}},
    "small": {"streams": 20, "sizes": {"embedding_size": 200, "hidden_size": 400}},
    "ptb-13m": {"streams": 20, "sizes": {"hidden_size": 717}},
    "ptb-tensor-train": {"streams": 20, "sizes": {}, "tensor_train": 0.394},
}
LR = {"ntasgd": 30.0, "asgd": 30.0, "adamw": 3e-3}
CLIP, ALPHA, BETA, WEIGHT_DECAY, PATIENCE = 0.25, 2.0, 1.0, 1.2e-6, 5
EVALUATION_STREAMS = 10

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
source = parser.add_mutually_exclusive_group(required=True)
source.add_argument("--corpus", choices=CORPORA)
source.add_argument("--text", type=Path, help="folder with train.txt, valid.txt and test.txt, in the place of a corpus")
parser.add_argument("--output", type=Path, required=True, help="folder")
parser.add_argument("--config", choices=CONFIGS, help="sizes and dropout rates; by default those of the corpus")
parser.add_argument("--embedding", type=int, help="embedding size, in the place of the config's")
parser.add_argument("--hidden", type=int, help="hidden size, likewise")
parser.add_argument("--streams", type=int, help="text streams side by side (the batch size), likewise")
parser.add_argument("--dropout", type=float, default=1.0, help="multiplies every dropout rate")
parser.add_argument(
    "--tensor-train",
    type=float,
    metavar="SHARE",
    help="recurrent matrices as tensor trains of this share of their parameters",
)
parser.add_argument("--start", type=Path, help="folder of a trained AWD-LSTM to go out from")
parser.add_argument("--compress", choices=["svd", "semi-nmf", "prune"], help="what to do to it first")
parser.add_argument("--target", choices=["hh", "ih", "both"], default="hh")
parser.add_argument("--rank", type=int, help="of the factors; pruning leaves as many weights as they would have")
parser.add_argument("--optimizer", choices=LR, default="ntasgd")
parser.add_argument("--lr", type=float, help="by default " + ", ".join(f"{lr:g} for {name}" for name, lr in LR.items()))
parser.add_argument("--epochs", type=int, default=500)
parser.add_argument("--bptt", type=int, default=70, help="mean number of tokens that gradients go back through")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--device", default="cpu")
parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="what is computed in")
parser.add_argument("--half", action="store_true", help="write a dense model in half precision, in files below 16 MB")
parser.add_argument("--max-minutes", type=float, default=math.inf, help="stop then; the same command goes on later")
parser.add_argument("--checkpoint-seconds", type=float, default=180.0)
arguments = parser.parse_args()

config = CONFIGS[arguments.config or arguments.corpus or "small"]
arguments.streams = arguments.streams or config["streams"]
arguments.lr = arguments.lr or LR[arguments.optimizer]
arguments.tensor_train = arguments.tensor_train or config.get("tensor_train")
if arguments.tensor_train and (arguments.start or arguments.half):
    parser.error("tensor trains are trained from the start, and kept in float32; leave out --start and --half")
if arguments.compress and not (arguments.start and arguments.rank):
    parser.error("--compress takes --start, the model that is compressed, and --rank")
processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
if arguments.streams % processes:
    parser.error(f"{arguments.streams} streams cannot be shared out evenly among {processes} processes")
if processes > 1:
    dist.init_process_group("nccl" if arguments.device.startswith("cuda") else "gloo")
if arguments.device == "cuda":
    arguments.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
device = torch.device(arguments.device)
console = Console(quiet=rank > 0)
output = arguments.output
if (output / "result.json").exists():
    console.print(f"{output / 'result.json'} is there")
    sys.exit()
output.mkdir(parents=True, exist_ok=True)
lock = FileLock(output / ".lock")
try:
    if rank == 0:
        lock.acquire(timeout=0)  # released when the process ends, however it does
except Timeout:
    sys.exit(f"another process works in {output}; wait for it, or end it")
began = time.monotonic()


def seed(*what):
    """Random numbers depend on the place in the run alone, so that a resumed one draws the same."""
    torch.manual_seed(zlib.crc32(repr((arguments.seed, *what)).encode()))


def words(split):
    if arguments.text:
        return words_of((arguments.text / f"{split}.txt").read_text(encoding="utf-8"))
    return read_words(arguments.corpus, split)


def modes(size):
    """Three factors of a size, as near to each other as can be, largest first."""
    triples = itertools.combinations_with_replacement([n for n in range(1, size + 1) if size % n == 0], 3)
    return sorted(min((triple for triple in triples if math.prod(triple) == size), key=sum), reverse=True)


class TensorTrain(nn.Module):
    """A matrix [m, n] as the product of three cores [r, m_k, n_k, r'], with weight drop like that of dense ones."""

    def __init__(self, shape, drop):
        super().__init__()
        (a, b, c), (d, e, f) = map(modes, shape)
        # Small modes in the middle, where ranks count twice, make for high ranks.
        self.shape, self.drop = (a, c, b, e, f, d), drop

    def forward(self, *cores):
        return dropout(tt_matrix_to_matrix(cores), self.drop, self.training)

    def right_inverse(self, matrix):
        cores = tensor_train_matrix(matrix.reshape(self.shape), arguments.tensor_train).factors
        # Cores that start from random numbers hold little of their norm, which training is to start from.
        lost = matrix.norm() / tt_matrix_to_matrix(cores).norm()
        return [core * lost ** (1 / len(cores)) for core in cores]


seed("weights")
if arguments.start:
    vocabulary = Vocabulary.read(arguments.start / "vocab.txt")
    model = load_awd_lstm(arguments.start)
    rates = AWDLSTMConfig(**{**vars(model.config), **{k: v for k, v in config["sizes"].items() if "dropout" in k}})
    model.config = rates.scaled(arguments.dropout)
else:
    vocabulary = Vocabulary([EOS, *words("train")])
    asked = {"embedding_size": arguments.embedding, "hidden_size": arguments.hidden}
    sizes = config["sizes"] | {name: size for name, size in asked.items() if size}
    model = AWDLSTM(AWDLSTMConfig(len(vocabulary), **sizes).scaled(arguments.dropout))
if device.type == "cpu":
    # These train faster there than nn.LSTM, whose weights and names they have.
    model.lstms = nn.ModuleList(sl.LowRankLSTM.from_dense(lstm) for lstm in model.lstms)
if arguments.compress:
    rule = {"rank": arguments.rank, "target": arguments.target}
    sl.compress_(model, sl.Prune(**rule) if arguments.compress == "prune" else sl.LowRank(arguments.compress, **rule))
if arguments.compress == "semi-nmf":
    # Non-negative rows that stand for signed ones are long and nearly parallel, so that a small step changes the product
    # much. Factors of the same product from its SVD bear the learning rates that all others bear.
    for lstm in model.lstms:
        for name, size in lstm.ranks.items():
            factors = svd(lstm.product(name), size)
            lstm.set_factors(name, factors.u, factors.v)
if arguments.tensor_train:
    import tensorly
    from tensorly.decomposition import tensor_train_matrix
    from tensorly.tt_matrix import tt_matrix_to_matrix

    tensorly.set_backend("pytorch")
    for lstm in model.lstms:
        for name, drop in (("weight_ih_l0", 0.0), ("weight_hh_l0", model.config.weight_drop)):
            parametrize.register_parametrization(lstm, name, TensorTrain(getattr(lstm, name).shape, drop))
model = model.to(device)
console.print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
tokens = {split: vocabulary.encode(words(split)).to(device) for split in ("train", "valid", "test")}
length = len(tokens["train"]) // arguments.streams
train = tokens["train"][: length * arguments.streams].view(arguments.streams, length).t().contiguous()
mine = train.chunk(processes, 1)[rank]


class Objective(nn.Module):
    """Tokens, targets [T, B] and a state to what is minimised, the cross-entropy in it, and the next state."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        model.lstms[-1].register_forward_hook(self.keep)

    def keep(self, _module, _inputs, outputs):
        self.raw = outputs[0]

    def forward(self, inputs, targets, state):
        hidden, state = self.model.features(inputs, state)
        loss = cross_entropy(self.model.decoder(hidden).flatten(0, 1).float(), targets.flatten())
        activation = ALPHA * hidden.float().pow(2).mean()
        # A piece of one token has no changes over time.
        slowness = BETA * self.raw.float().diff(dim=0).pow(2).mean() if len(self.raw) > 1 else 0.0
        return loss + activation + slowness, loss.detach(), state


objective = Objective(model)
trainer = DistributedDataParallel(objective, broadcast_buffers=False) if processes > 1 else objective
parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
adamw = arguments.optimizer == "adamw"
if adamw:
    optimizer = torch.optim.AdamW(parameters.values(), lr=arguments.lr, betas=(0.9, 0.99), weight_decay=0.02)
else:
    optimizer = torch.optim.SGD(parameters.values(), lr=arguments.lr, weight_decay=WEIGHT_DECAY)
place = {
    **{"epoch": 0, "piece": 0, "position": 0, "total": 0.0, "seconds": 0.0, "averaged": 0, "best": math.inf},
    "averaging": arguments.optimizer == "asgd",
    "log": [],
}
averages = {}
state = None
free = ("output", "max_minutes", "checkpoint_seconds", "device", *(() if adamw else ("epochs",)))
settings = {name: str(value) for name, value in vars(arguments).items() if name not in free} | {"processes": str(processes)}
checkpoint = output / "checkpoint.safetensors"


def write(path, tensors, metadata=None):
    part = path.with_suffix(".part")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, part, metadata)
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    part.replace(path)


def write_text(path, text):
    path.with_suffix(".part").write_text(text, encoding="utf-8")
    path.with_suffix(".part").replace(path)


def write_checkpoint():
    states = [state]
    if processes > 1:
        states = [None] * processes
        dist.all_gather_object(states, state and [tuple(tensor.cpu() for tensor in pair) for pair in state])
    if rank:
        return
    tensors = {f"model.{name}": parameter for name, parameter in parameters.items()}
    tensors |= {f"average.{name}": tensor for name, tensor in averages.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"moment.{index}.{key}": value for key, value in moments.items() if value is not None}
    for layer in range(len(model.lstms) if state else 0):
        for index, name in enumerate("hc"):
            tensors[f"state.{layer}.{name}"] = torch.cat([entry[layer][index].cpu() for entry in states], 1)
    write(checkpoint, tensors, {"place": json.dumps(place), "settings": json.dumps(settings)})
    write_text(output / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in place["log"]))


def read_checkpoint():
    """Brings everything to where the checkpoint is; returns the state."""
    with safe_open(checkpoint, "pt", device=str(device)) as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        theirs = json.loads(file.metadata()["settings"])
        place.update(json.loads(file.metadata()["place"]))
    for name in settings.keys() | theirs.keys():
        if settings.get(name, "None") != theirs.get(name, "None"):  # checkpoints lack options that are newer
            raise sl.SlimLSTMError(
                f"{checkpoint} is of a run with {name}={theirs.get(name)}, not {settings.get(name)}; "
                "go on with that, or name another output"
            )
    moments = {}
    with torch.no_grad():
        for name, tensor in saved.items():
            kind, _, rest = name.partition(".")
            if kind == "model":
                parameters[rest].copy_(tensor)
            elif kind == "average":
                averages[rest] = tensor
            elif kind == "moment":
                index, key = rest.split(".")
                # AdamW counts its steps on the CPU.
                moments.setdefault(int(index), {})[key] = tensor.cpu() if key == "step" else tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    if "state.0.h" not in saved:
        return None
    parts = [
        [saved[f"state.{layer}.{name}"].chunk(processes, 1)[rank] for name in "hc"] for layer in range(len(model.lstms))
    ]
    return [(h.contiguous(), c.contiguous()) for h, c in parts]


def swap_averages():
    """Exchanges the weights for their averages; a second call takes it back."""
    with torch.no_grad():
        for name, average in averages.items():
            kept = parameters[name].clone()
            parameters[name].copy_(average)
            average.copy_(kept)


def write_weights():
    if rank:
        return
    write_text(output / "vocab.txt", "".join(word + "\n" for word in vocabulary.words))
    if arguments.compress:
        sl.save(model, output / "compressed")
        return
    if arguments.half:
        save_awd_lstm(model, output)
        return
    write(output / "model.safetensors", {name: t for name, t in model.state_dict().items() if name != "decoder.weight"})


def measured(split):
    """The mean loss, as process 0 finds it."""
    loss = perplexity(model, tokens[split], streams=EVALUATION_STREAMS).loss
    box = torch.tensor(loss, dtype=torch.float64, device=device)
    if processes > 1:
        dist.broadcast(box, 0)
    return float(box)


def learning_rate(taken):
    """For a piece of ``taken`` tokens: pieces that are shorter than usual count less."""
    lr = arguments.lr * taken / arguments.bptt
    if not adamw:
        return lr
    done = (place["epoch"] + place["position"] / length) / arguments.epochs
    return lr * (min(1.0, 0.1 + 9.0 * done) if done < 0.1 else (1.0 + math.cos(math.pi * (done - 0.1) / 0.9)) / 2.0)


def step(state):
    """Learns from the next piece of the text; returns the state after it and the minutes that process 0 counts."""
    seed("length", place["epoch"], place["piece"])
    mean = arguments.bptt if torch.rand(()) < 0.95 else arguments.bptt / 2
    start = place["position"]
    taken = min(max(5, int(torch.normal(mean, 5.0, ()))), length - 1 - start)
    seed("dropout", place["epoch"], place["piece"], rank)
    # A matrix that is computed from others, by a mask or a tensor train, is so once a step.
    with torch.autocast(device.type, torch.bfloat16, enabled=arguments.dtype == "bfloat16"), parametrize.cached():
        loss, entropy, state = trainer(mine[start : start + taken], mine[start + 1 : start + 1 + taken], state)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters.values(), CLIP)
    if not torch.isfinite(norm):
        raise sl.SlimLSTMError(f"the gradient is {float(norm)} in epoch {place['epoch']}; try an lr below {arguments.lr}")
    optimizer.param_groups[0]["lr"] = learning_rate(taken)
    optimizer.step()
    if place["averaging"]:
        place["averaged"] += 1
        with torch.no_grad():
            for name, parameter in parameters.items():
                averages.setdefault(name, parameter.detach().clone()).lerp_(parameter, 1.0 / place["averaged"])
    shared = torch.stack([entropy.double(), entropy.new_tensor(time.monotonic() - began, dtype=torch.float64)])
    if processes > 1:
        dist.all_reduce(shared)
    entropy, seconds = (shared / processes).tolist()
    place["total"] += entropy * taken
    place["position"], place["piece"] = start + taken, place["piece"] + 1
    return [(h.detach(), c.detach()) for h, c in state], seconds


def end_epoch():
    """Validates, keeps the best weights, and says whether training is over."""
    swap_averages()
    loss, previous = measured("valid"), [entry["valid_loss"] for entry in place["log"]]
    if loss < place["best"]:
        place["best"] = loss
        write_weights()
    swap_averages()
    stalled = len(previous) > PATIENCE and loss > min(previous[:-PATIENCE])
    entry = {
        "epoch": place["epoch"],
        "train_loss": place["total"] / place["position"],
        "valid_loss": loss,
        "valid_perplexity": math.exp(loss),
        "averaged": place["averaging"],
        "seconds": round(place["seconds"], 1),
    }
    place["log"].append(entry)
    console.print(entry)
    over = stalled and arguments.optimizer == "asgd"
    place["averaging"] = place["averaging"] or (stalled and arguments.optimizer == "ntasgd")
    place.update(epoch=place["epoch"] + 1, piece=0, position=0, total=0.0)
    if over:
        place["epoch"] = sys.maxsize
    write_checkpoint()


if checkpoint.exists():
    state = read_checkpoint()
    console.print(f"going on in epoch {place['epoch']} at token {place['position']} of {length}")
before, written = place["seconds"], 0.0
while place["epoch"] < arguments.epochs:
    model.train()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"epoch {place['epoch']}", total=length - 1, completed=place["position"])
        while place["position"] < length - 1:
            state, seconds = step(state)
            place["seconds"] = before + seconds
            bar.update(task, completed=place["position"])
            stop = seconds >= 60.0 * arguments.max_minutes
            if stop or seconds - written >= arguments.checkpoint_seconds:
                write_checkpoint()
                written = seconds
            if stop:
                console.print(f"{arguments.max_minutes:g} minutes are over; the same command goes on")
                sys.exit()
    state = None
    end_epoch()

if arguments.compress:
    model = sl.load(output / "compressed", AWDLSTM(model.config)).to(device)
elif arguments.half:
    model = load_awd_lstm(output).to(device)
else:
    best = load_file(output / "model.safetensors")
    model.load_state_dict(best | {"decoder.weight": best["embedding.weight"]})
losses = {split: measured(split) for split in ("valid", "test")}
if rank == 0:
    chosen = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    result = {
        "perplexity": {split: math.exp(loss) for split, loss in losses.items()},
        "loss": losses,
        "epochs": len(place["log"]),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sizes": {name: getattr(model.config, name) for name in ("embedding_size", "hidden_size", "num_layers")},
        "config": {name: value for name, value in chosen.items() if name not in ("output", "max_minutes")}
        | {"processes": processes, "start": arguments.start and arguments.start.name},
        "seconds": round(place["seconds"], 1),
        "provenance": provenance(),
    }
    write_text(output / "result.json", json.dumps(result, indent=1) + "\n")
    console.print(result["perplexity"])
if processes > 1:
    # A trainer that outlives the group keeps its threads, which end the process with an error.
    dist.barrier()
    del trainer
    dist.destroy_process_group()
