"""Train the language model that ships inside the package, and write it there.

    python recipes/demo_model.py --run runs/demo_model

The model is an AWD-LSTM over 4,096 byte-pair pieces of WikiText-2, which fits into 10 MB in half precision. Every epoch
writes a checkpoint into the run folder. A run that was interrupted, or gets more epochs, continues from the last one, with
the settings of the new command; ``training.json`` lists the settings of every start. The last step writes the
half-precision weights, a held-out slice of the test text and its token ids into ``src/slimlstm/demo/embedded``.
"""

import argparse
import json
import time
from pathlib import Path

import sentencepiece
import torch
from rich.console import Console
from rich.progress import track
from torch.nn.functional import cross_entropy

from paper.checkpoints import moments_of, read_tensors, restore_moments, with_prefix, without_prefix, write_tensors
from paper.optimization import take_gradients
from paper.texts import EVALUATION_STREAMS, side_by_side
from slimlstm.demo.awd_lstm import AWDLSTM, AWDLSTMConfig
from slimlstm.demo.corpora import CORPORA, read_text, words_of
from slimlstm.evaluate import perplexity
from slimlstm.files import replacing, write_json, write_text
from slimlstm.provenance import provenance

PACKAGE_FOLDER = Path(__file__).parents[1] / "src" / "slimlstm" / "demo" / "embedded"
HELD_OUT_LINES = 300
VOCAB_SIZE = 4096
BPTT = 70

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--run", type=Path, required=True, help="folder for checkpoints and the log")
parser.add_argument("--epochs", type=int, default=16)
parser.add_argument("--streams", type=int, default=80, help="text streams side by side (the batch size)")
parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of AdamW")
parser.add_argument("--dropout", type=float, default=1.0, help="factor of every dropout rate")
parser.add_argument("--seed", type=int, default=1)
arguments = parser.parse_args()
console = Console()
arguments.run.mkdir(parents=True, exist_ok=True)

tokenizer_file = arguments.run / "tokenizer.model"
if not tokenizer_file.exists():
    # Byte fallback keeps the segmentation lossless, so that perplexity per word is well defined.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line.strip() for line in read_text("wikitext-2", "train").split("\n") if line.strip()),
        model_prefix=str(tokenizer_file.with_suffix("")),
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        unk_id=0,
        unk_piece="<none>",
        eos_id=1,
        eos_piece="<eos>",
        bos_id=-1,
        user_defined_symbols=["<unk>"],
        max_sentence_length=100_000,
        minloglevel=2,
    )
tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))


def encode(text):
    """Return token ids of a text: the pieces of every line, then <eos>."""
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    return torch.tensor([token for pieces in tokenizer.encode(lines) for token in (*pieces, tokenizer.eos_id())])


def loss_on(split):
    """Return the mean negative log-likelihood a token."""
    return perplexity(model, tokens[split], streams=EVALUATION_STREAMS, steps=BPTT).loss


text = {split: read_text("wikitext-2", split) for split in ("train", "valid", "test")}
tokens = {split: encode(content) for split, content in text.items()}
console.print({split: f"{len(ids):,} tokens, {len(words_of(text[split])):,} words" for split, ids in tokens.items()})

torch.manual_seed(arguments.seed)
config = AWDLSTMConfig(
    VOCAB_SIZE,
    embedding_size=256,
    hidden_size=448,
    num_layers=3,
    dropout_embedding=0.05,
    dropout_input=0.2,
    dropout_hidden=0.15,
    dropout_output=0.2,
    weight_drop=0.2,
).scaled(arguments.dropout)
model = AWDLSTM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.99), weight_decay=0.02)
train = side_by_side(tokens["train"], arguments.streams)
steps_per_epoch = (len(train) - 1 - BPTT) // BPTT
schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, arguments.lr, total_steps=arguments.epochs * steps_per_epoch, pct_start=0.1, div_factor=10
)

log_file, checkpoint = arguments.run / "log.jsonl", arguments.run / "checkpoint.safetensors"
first_epoch = 0
if checkpoint.exists():
    saved, _ = read_tensors(checkpoint)
    first_epoch = int(saved.pop("epoch")) + 1
    torch.set_rng_state(saved.pop("rng"))
    weights = without_prefix("model", saved)
    model.load_state_dict(weights | {"decoder.weight": weights["embedding.weight"]})
    schedule.last_epoch = first_epoch * steps_per_epoch - 1
    schedule.step()
    restore_moments(optimizer, saved)
    console.print(f"continuing with epoch {first_epoch}")

settings = {name: value for name, value in vars(arguments).items() if name != "run"}
with log_file.open("a") as log:
    log.write(json.dumps({"start": first_epoch, **settings}) + "\n")
for epoch in range(first_epoch, arguments.epochs):
    began, total, state = time.monotonic(), 0.0, None
    model.train()
    offset = int(torch.randint(BPTT, ()))
    for step in track(range(steps_per_epoch), f"epoch {epoch}", console=console, transient=True):
        start = offset + step * BPTT
        inputs, targets = train[start : start + BPTT], train[start + 1 : start + 1 + BPTT]
        with torch.autocast("cpu", torch.bfloat16):
            logits, state = model(inputs, state)
        loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        take_gradients(loss, optimizer, model.parameters(), clip=1.0, lr=arguments.lr, epoch=epoch)
        optimizer.step()
        schedule.step() if schedule.last_epoch + 1 < schedule.total_steps else None
        state = [(h.detach(), c.detach()) for h, c in state]
        total += loss.item()
    entry = {
        "epoch": epoch,
        "train_loss": total / steps_per_epoch,
        "valid_loss": loss_on("valid"),
        "seconds": round(time.monotonic() - began, 1),
    }
    console.print(entry)
    with log_file.open("a") as log:
        log.write(json.dumps(entry) + "\n")
    weights = {name: value for name, value in model.state_dict().items() if name != "decoder.weight"}
    place = {"rng": torch.get_rng_state(), "epoch": torch.tensor(epoch)}
    write_tensors(checkpoint, with_prefix("model", weights) | moments_of(optimizer) | place)

half = {name: value.half() for name, value in model.state_dict().items() if name != "decoder.weight"}
model.load_state_dict(
    {name: value.float() for name, value in half.items()} | {"decoder.weight": half["embedding.weight"].float()}
)
losses = {split: loss_on(split) for split in ("valid", "test")}
words = {split: len(words_of(text[split])) for split in losses}
history = [json.loads(line) for line in log_file.read_text().splitlines()]
origin = provenance()
training = {
    "corpus": "wikitext-2",
    "sha256": {split: CORPORA["wikitext-2"].splits[split].sha256 for split in text},
    "sizes": {"vocab": VOCAB_SIZE, "embedding": 256, "hidden": 448, "layers": 3},
    "starts": [entry for entry in history if "start" in entry],
    "perplexity_per_token": {split: float(torch.tensor(loss).exp()) for split, loss in losses.items()},
    "perplexity_per_word": {
        split: float(torch.tensor(loss * len(tokens[split]) / words[split]).exp()) for split, loss in losses.items()
    },
    "minutes": round(sum(entry.get("seconds", 0.0) for entry in history) / 60),
    "commit": origin["commit"],
    "versions": {"torch": origin["torch"], "sentencepiece": sentencepiece.__version__, "python": origin["python"]},
}
held_out = "\n".join(text["test"].split("\n")[:HELD_OUT_LINES]) + "\n"
write_tensors(PACKAGE_FOLDER / "model.safetensors", half)
write_tensors(PACKAGE_FOLDER / "held_out.safetensors", {"tokens": encode(held_out).to(torch.int16)})
write_text(PACKAGE_FOLDER / "held_out.txt", held_out)
with replacing(PACKAGE_FOLDER / "tokenizer.model") as draft:
    draft.write_bytes(tokenizer_file.read_bytes())
write_json(PACKAGE_FOLDER / "training.json", training)
console.print(training)
