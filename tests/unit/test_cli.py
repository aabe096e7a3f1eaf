"""The verbs of the command: results, and requests that they refuse."""

import itertools
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from command import CONFIG, TEXT, WORDS, ids
from safetensors.torch import load_file, save_file
from torch import nn

from slimlstm import LowRank, Prune, Quantize, compress_, load, save
from slimlstm.demo import corpora as data
from slimlstm.demo import model as embedded
from slimlstm.demo.awd_lstm import AWDLSTM, load_awd_lstm
from slimlstm.evaluate import perplexity
from slimlstm.weight_files import compress_file


def test_inspect(folder, run_json):
    file = folder / "model.safetensors"
    found, tensors = run_json("inspect", file), load_file(file)
    assert found["file"] == str(file)
    assert found["total"] == sum(tensor.numel() for tensor in tensors.values())
    matrices = {name: tensor for name, tensor in tensors.items() if "weight_" in name}
    assert found["parameters"] == sum(matrix.numel() for matrix in matrices.values())
    assert {site["site"] for site in found["sites"]} == set(matrices)
    for site in found["sites"]:
        matrix = matrices[site["site"]]
        m, n = matrix.shape
        values = torch.linalg.svdvals(matrix.double())
        energy = (values**2).cumsum(0) / (values**2).sum()
        assert (site["shape"], site["rank"], site["parameters"]) == ([m, n], None, m * n)
        assert site["break_even_rank"] == pytest.approx(m * n / (m + n))
        assert site["singular_values"] == pytest.approx(values.tolist(), abs=2e-6)
        assert site["energy_ranks"] == {str(e): int((energy < e).sum()) + 1 for e in (0.5, 0.9, 0.99)}


def test_inspect_of_a_compressed_folder(folder, tmp_path, run_json):
    compress_file(folder / "model.safetensors", LowRank(rank=2, target="hh", storage="int8"), tmp_path / "small")
    found = run_json("inspect", tmp_path / "small")
    assert {site["storage"] for site in found["sites"] if "_hh_" in site["site"]} == {"int8"}
    assert {site["site"]: site["rank"] for site in found["sites"]} == {
        f"lstms.{layer}.weight_{kind}_l0": {"hh": 2, "ih": None}[kind] for layer in (0, 1) for kind in ("ih", "hh")
    }


def with_spectrum(values):
    """The state of an LSTM whose hh matrix has these singular values."""
    state = nn.LSTM(3, len(values)).state_dict()
    u, v = (torch.linalg.qr(torch.randn(size, len(values)))[0] for size in (4 * len(values), len(values)))
    return state | {"weight_hh_l0": (u * torch.tensor(values)) @ v.T}


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ([1.0, *((k + 0.5) / 8 for k in range(6, -1, -1))], "█▇▆▅▄▃▂▁"),
        ([1.0] * 24 + [0.01] * 24, "█" * 6 + "▁" * 6),
        ([0.0] * 4, "▁" * 4),
    ],
    ids=["every height", "more values than bars", "all zero"],
)
def test_the_sketch_of_singular_values(values, bars, tmp_path, run):
    save_file(with_spectrum(values), tmp_path / "w.safetensors")
    status, out, _ = run("inspect", tmp_path / "w.safetensors")
    assert status == 0
    assert re.search(f"[^█▇▆▅▄▃▂▁]{bars}[^█▇▆▅▄▃▂▁]", out)


@pytest.mark.parametrize(
    "command", [("inspect", "{}"), ("compress", "{}", "-o", "{}.d", "--rank", "50")], ids=lambda c: c[0]
)
def test_no_table_is_cut_off_where_it_is_no_terminal(command, tmp_path, run, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    model = nn.ModuleDict({"encoder_of_speech": nn.LSTM(257, 128, bidirectional=True)})
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    status, out, _ = run(*(argument.format(tmp_path / "w.safetensors") for argument in command))
    assert status == 0
    assert "…" not in out
    assert "encoder_of_speech.weight_hh_l0_reverse" in out


@pytest.mark.parametrize(
    ("options", "config"),
    [
        (["--rank", "2"], LowRank(rank=2)),
        (["--method", "semi-nmf", "--keep", "0.3", "--target", "hh"], LowRank("semi-nmf", keep=0.3, target="hh")),
        (["--method", "prune", "--rank", "2", "--target", "ih"], Prune(rank=2, target="ih")),
    ],
    ids=["svd", "semi-nmf", "prune"],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_compress_then_eval(options, config, dtype, folder, tmp_path, run_json):
    file, small = folder / "model.safetensors", tmp_path / "small"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    report = run_json("compress", file, "-o", small, *options)
    assert report == json.loads(json.dumps(compress_file(file, config, tmp_path / "again").to_dict()))

    found = run_json("eval", small, "--text", tmp_path / "text.txt", "--vocab", folder / "vocab.txt")
    model = load_awd_lstm(folder).to(dtype)
    compress_(model, config)
    expected = perplexity(model.float(), ids())
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-9)
    assert found["predictions"] == expected.predictions


@pytest.mark.parametrize(
    ("options", "configs"),
    [
        (["--storage", "int8"], [Quantize("int8")]),
        (["--storage", "bfloat16", "--target", "ih"], [Quantize("bfloat16", "ih")]),
        (
            ["--storage", "int8", "--keep", "0.3", "--target", "hh"],
            [LowRank(keep=0.3, target="hh"), Quantize("int8", "hh")],
        ),
    ],
    ids=["alone", "ih", "with a rank"],
)
def test_compress_with_a_storage_then_eval(options, configs, folder, tmp_path, run_json):
    report = run_json("compress", folder / "model.safetensors", "-o", tmp_path / "small", *options)
    model = load_awd_lstm(folder)
    for config in configs:
        compress_(model, config)
    assert {site["storage"] for site in report["sites"]} == {configs[-1].storage}
    found = run_json("eval", tmp_path / "small", "--text", tmp_path / "text.txt", "--vocab", folder / "vocab.txt")
    assert found["perplexity"] == pytest.approx(perplexity(model, ids()).perplexity, rel=1e-9)
    # The softmax has the embedding's weights, which are stored once.
    assert found["bytes"] == report["model"]["bytes_after"]
    assert found["bytes"] < run_json("eval", folder, "--text", tmp_path / "text.txt")["bytes"]


def test_compress_says_how_the_folder_is_used(folder, tmp_path, run):
    status, out, _ = run("compress", folder / "model.safetensors", "-o", tmp_path / "small", "--rank", 2)
    assert status == 0
    assert "lstms.1.weight_hh_l0" in out
    assert f"slimlstm.load('{tmp_path / 'small'}', model)" in out.replace("\n", "")
    assert isinstance(load(tmp_path / "small", AWDLSTM(CONFIG)), AWDLSTM)


@pytest.mark.parametrize("streams", [1, 10])
def test_eval_gives_the_numbers_of_perplexity(streams, folder, tmp_path, run_json):
    found = run_json("eval", folder, "--text", tmp_path / "text.txt", "--streams", streams)
    model = load_awd_lstm(folder)
    expected = perplexity(model, ids(), streams=streams)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert found == {
        "model": str(folder),
        "text": str(tmp_path / "text.txt"),
        "split": None,
        "perplexity": pytest.approx(expected.perplexity, rel=1e-9),
        "predictions": expected.predictions,
        "perplexity_per_word": pytest.approx(expected.perplexity, rel=1e-9),
        "parameters": size,
        "bytes": 4 * size,
    }


def test_eval_prints_the_same_in_words(folder, tmp_path, run):
    status, out, _ = run("eval", folder, "--text", tmp_path / "text.txt")
    assert status == 0
    assert f"{perplexity(load_awd_lstm(folder), ids()).perplexity:,.2f}" in out


def test_eval_of_a_corpus(folder, monkeypatch, run_json):
    texts = {("ptb", "valid"): TEXT}
    monkeypatch.setattr(data, "read_text", lambda name, split: texts[name, split])
    found = run_json("eval", folder, "--text", "ptb", "--split", "valid")
    assert (found["text"], found["split"]) == ("ptb", "valid")
    assert found["perplexity"] == pytest.approx(perplexity(load_awd_lstm(folder), ids()).perplexity, rel=1e-9)


def test_eval_of_the_embedded_model_counts_words_too(monkeypatch, run_json):
    model, tokens = AWDLSTM(CONFIG), ids()
    monkeypatch.setattr(embedded, "embedded_model", lambda: model)
    monkeypatch.setattr(embedded, "held_out_tokens", lambda: tokens)
    monkeypatch.setattr(embedded, "held_out_text", lambda: "ab cd\n" * 100)
    found, expected = run_json("eval", "embedded"), perplexity(model, tokens)
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-9)
    per_word = math.exp(expected.loss * len(tokens) / 300)
    assert found["perplexity_per_word"] == pytest.approx(per_word, rel=1e-9)


def test_eval_of_a_hopeless_model_is_json_nevertheless(folder, tmp_path, run_json):
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"decoder.bias": torch.tensor([1e4] + [0.0] * (len(WORDS) - 1))}, file)
    assert run_json("eval", folder, "--text", tmp_path / "text.txt")["perplexity"] > 1e300


def altered(**tensors):
    """Writes other tensors into a stored model."""

    def alter(folder):
        file = folder / "model.safetensors"
        save_file(load_file(file) | {name.replace("__", "."): value for name, value in tensors.items()}, file)

    return alter


def of_another_model(folder):
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 6)})
    save_file(model.state_dict(), folder / "other.safetensors")
    compress_file(folder / "other.safetensors", LowRank(rank=1), folder / "other")


def with_brackets(folder):
    (folder / "[old]").mkdir()


def without_tensor(folder):
    file = folder / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != "lstms.1.weight_hh_l0"}, file)


def without_vocabulary(folder):
    (folder / "vocab.txt").unlink()


def nothing(_):
    pass


def writing(name, content):
    return lambda folder: (folder / name).write_bytes(content)


FILE, OUT = "{}/model.safetensors", ("-o", "{}/out")
NAN = torch.full((64, 16), float("nan"))
REFUSED = {
    "inspect: missing": (nothing, ("inspect", "{}/none.pt"), "none.pt"),
    "inspect: brackets": (with_brackets, ("inspect", "{}/[old]/none.pt"), r"/\[old\]/none.pt"),
    "inspect: a folder": (nothing, ("inspect", "{}"), "a folder without config.json"),
    "inspect: damaged": (writing("w.safetensors", b"\xff" * 99), ("inspect", "{}/w.safetensors"), "no intact"),
    "inspect: NaN": (altered(lstms__0__weight_hh_l0=NAN), ("inspect", FILE), "NaN"),
    "compress: no amount": (nothing, ("compress", FILE, *OUT), "give exactly one of rank, keep"),
    "compress: storage": (nothing, ("compress", FILE, *OUT, "--storage", "int9"), "no storage is called 'int9'"),
    "compress: a method without": (
        nothing,
        ("compress", FILE, *OUT, "--storage", "int8", "--method", "prune"),
        "give either rank or keep",
    ),
    "compress: an allocation without a budget": (
        nothing,
        ("compress", FILE, *OUT, "--storage", "int8", "--allocation", "global"),
        "--allocation divides a budget",
    ),
    "compress: a report that cannot be written": (
        writing("plain", b""),
        ("compress", FILE, *OUT, "--rank", "1", "--report", "{}/plain/report.html"),
        "plain",
    ),
    "bench: a method without an amount": (nothing, ("bench", FILE, "--method", "prune"), "say how much, too: --rank"),
    "bench: a method that sees data": (
        nothing,
        ("bench", FILE, "--method", "fisher", "--keep", "0.5"),
        "'fisher' has to see data; give a method that needs none",
    ),
    "bench: a target without an amount": (nothing, ("bench", FILE, "--target", "hh"), "say how much, too: --rank"),
    "bench: too many steps": (nothing, ("bench", FILE, "--steps", "1000000000"), "numbers; give fewer"),
    "compress: two amounts": (
        nothing,
        ("compress", FILE, *OUT, "--rank", "1", "--keep", "0.5"),
        "exactly one of rank, keep",
    ),
    "compress: method": (nothing, ("compress", FILE, *OUT, "--rank", "1", "--method", "magic"), "called 'magic'"),
    "compress: a method that sees data": (
        nothing,
        ("compress", FILE, *OUT, "--rank", "1", "--method", "fisher"),
        "'fisher' has to see data; in Python, compress_ takes batches",
    ),
    "inspect: text": (
        writing("text.pt", b"hello"),
        ("inspect", "{}/text.pt"),
        "no intact PyTorch checkpoint: its pickle is damaged or missing",
    ),
    "shrink: weights": (
        nothing,
        ("shrink", FILE, "-o", "{}/small.onnx", "--inputs", "{}/x.npz"),
        "is no ONNX file by its name; use slimlstm compress",
    ),
    "compress: target": (nothing, ("compress", FILE, *OUT, "--rank", "1", "--target", "all"), "'ih', 'hh' or 'both'"),
    "compress: rank": (nothing, ("compress", FILE, *OUT, "--rank", "99"), "rank 99 is above 16"),
    "compress: NaN": (altered(lstms__0__weight_hh_l0=NAN), ("compress", FILE, *OUT, "--rank", "1"), "NaN"),
    "compress: onto a file": (nothing, ("compress", FILE, "-o", FILE, "--rank", "1"), "is the input, which would be lost"),
    "compress: into a file": (nothing, ("compress", FILE, "-o", FILE + "/out", "--rank", "1"), "model.safetensors/out"),
    "compress: foreign": (
        writing("config.json", b"{}"),
        ("compress", FILE, "-o", "{}", "--rank", "1", "--force"),
        "config.json of something else",
    ),
    "eval: no model": (nothing, ("eval", "{}/none"), "none is no folder"),
    "eval: a tensor too few": (without_tensor, ("eval", "{}"), "does not hold an AWD-LSTM: .*lstms.1.weight_hh_l0"),
    "eval: another model": (of_another_model, ("eval", "{}/other"), "not the tensors of an AWD-LSTM"),
    "eval: no text": (nothing, ("eval", "{}", "--text", "{}/none.txt"), "none.txt' is neither 'held-out', 'ptb'"),
    "eval: no split": (nothing, ("eval", "{}", "--text", "ptb", "--split", "dev"), "no split 'dev'"),
    "eval: a split of a text without splits": (nothing, ("eval", "{}", "--split", "dev"), "--text held-out is read whole"),
    "eval: short": (writing("t", b"a b\n"), ("eval", "{}", "--text", "{}/t"), "3 tokens cannot be read as 10 streams"),
    "eval: empty": (writing("t", b""), ("eval", "{}", "--text", "{}/t"), "0 tokens cannot be read"),
    "eval: no UTF-8": (writing("t", b"caf\xe9\n"), ("eval", "{}", "--text", "{}/t"), "UTF-8|utf-8"),
    "eval: streams": (nothing, ("eval", "{}", "--text", "{}/../text.txt", "--streams", "0"), "0 streams"),
    "eval: unknown word": (writing("t", b"a zebra\n" * 40), ("eval", "{}", "--text", "{}/t"), "40 words outside the vocab"),
    "eval: no vocabulary": (nothing, ("eval", "{}", "--text", FILE, "--vocab", "{}/none.txt"), "none.txt|UTF-8|utf-8"),
    "eval: no tokenizer": (
        nothing,
        ("eval", "{}", "--text", "{}/../text.txt", "--vocab", "{}/none.model"),
        "none.model",
    ),
    "eval: no vocabulary of its own": (without_vocabulary, ("eval", "{}", "--text", "held-out"), "the model 11; give the"),
    "eval: a smaller vocabulary": (
        writing("short.txt", "\n".join(WORDS[:-1]).encode()),
        ("eval", "{}", "--text", "{}/t", "--vocab", "{}/short.txt"),
        "has 10 entries, the model 11|neither",
    ),
    "eval: another vocabulary": (
        writing("long.txt", "\n".join(map(chr, range(40, 150))).encode()),
        ("eval", "{}", "--text", "{}/../text.txt", "--vocab", "{}/long.txt"),
        "the model 11 words; check --vocab|outside the vocabulary",
    ),
}


@pytest.mark.parametrize("flag", [(), ("--json",)], ids=["", "json"])
@pytest.mark.parametrize(("prepare", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_said_in_one_line(prepare, arguments, message, flag, folder, run):
    prepare(folder)
    status, out, err = run(*(argument.format(folder) for argument in arguments), *flag)
    assert (status, out) == (1, "")
    assert err.startswith("slimlstm: ")
    assert err.count("\n") == 1
    assert re.search(message, err)


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [("onnx", ("inspect", "{}/model.onnx"), "onnx"), ("sentencepiece", ("eval", "{}", "--text", "{}/t"), "data")],
)
def test_a_missing_package_is_named_with_its_remedy(package, arguments, extra, folder, monkeypatch, run):
    (folder / "model.onnx").touch()
    (folder / "t").write_text(TEXT)
    (folder / "vocab.txt").unlink()
    monkeypatch.setitem(sys.modules, package, None)
    status, out, err = run(*(argument.format(folder) for argument in arguments))
    assert (status, out) == (1, "")
    assert err.startswith("slimlstm: ")
    assert err.endswith(f"pip install 'slimlstm[{extra}]'\n")


@pytest.fixture
def onnx_file(tmp_path):
    """An ONNX file with an LSTM and a matrix outside it."""
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    hidden, features = 8, 6
    generator = np.random.default_rng(0)

    def constant(name, *shape):
        return numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32), name)

    weights = [constant("w", 1, 4 * hidden, features), constant("r", 1, 4 * hidden, hidden), constant("head", hidden, 5)]
    nodes = [
        helper.make_node("LSTM", ["x", "w", "r"], ["y", "h"], hidden_size=hidden, name="lstm"),
        helper.make_node("MatMul", ["h", "head"], ["z"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "B", features])
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [z], weights), opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_compress_of_an_onnx_file_says_how_much_its_outputs_differ(onnx_file, tmp_path, run, run_json):
    import onnxruntime

    small, runs = tmp_path / "small.onnx", np.random.default_rng(1).standard_normal((2, 3, 4, 6)).astype(np.float32)
    np.savez(tmp_path / "runs.npz", x=runs)
    found = run_json("compress", onnx_file, "-o", small, "--rank", 2, "--inputs", tmp_path / "runs.npz")
    before, after = (
        [onnxruntime.InferenceSession(str(path)).run(None, {"x": one})[0] for one in runs] for path in (onnx_file, small)
    )
    expected = max(np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(before, after, strict=True))
    assert found["output_difference"] == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01
    status, out, _ = run("compress", onnx_file, "-o", small, "--rank", 2, "--force")
    assert status == 0
    assert re.search(
        r"On one run of random inputs, its outputs differ from the outputs of .* by \d+\.\d\d% of", " ".join(out.split())
    )


UNFIT = {
    "inputs of another name": (("--rank", 2, "--inputs", "{}/runs.npz"), "cannot run the files on these inputs"),
    "batches that nothing needs": (("--rank", 2, "--batches", "{}/runs.npz"), "--batches calibrate, which neither"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_runs_that_do_not_fit_are_refused_before_anything_is_written(name, onnx_file, tmp_path, run):
    options, message = UNFIT[name]
    np.savez(tmp_path / "runs.npz", y=np.zeros((1, 3, 4, 6), np.float32))
    small = tmp_path / "small.onnx"
    status, _, err = run("compress", onnx_file, "-o", small, *(str(option).format(tmp_path) for option in options))
    assert status == 1
    assert message in " ".join(err.split())
    assert not small.exists()


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_folder_does_not_lose_weights_of_an_onnx_file(is_shared, tmp_path, run):
    """Two LSTMs may read the same weights; a layer beside them is lost in a folder, and refused."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto
    names = [("w", "r", "b")] * 2 if is_shared else [("w", "r", "b"), ("w2", "r2", "b2")]
    rng = np.random.default_rng(0)
    shapes = {"w": (1, 32, 8), "r": (1, 32, 8), "b": (1, 64)}
    weights = [
        numpy_helper.from_array((name[0] != "b") * rng.standard_normal(shapes[name[0]]).astype(np.float32), name)
        for name in dict.fromkeys(itertools.chain(*names))
    ]
    weights += [numpy_helper.from_array(np.array([1]), "axis")]
    nodes, value = [], "x"
    for index, own in enumerate(names):
        nodes.append(helper.make_node("LSTM", [value, *own], [f"y{index}"], hidden_size=8, name=f"lstm{index}"))
        nodes.append(helper.make_node("Squeeze", [f"y{index}", "axis"], [value := f"s{index}"]))
    for has_other in (False, True):
        if has_other:
            weights.append(numpy_helper.from_array(rng.standard_normal((8, 4)).astype(np.float32), "head"))
            nodes.append(helper.make_node("MatMul", [value, "head"], ["z"]))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "B", 8])
        z = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
        model = helper.make_model(
            helper.make_graph(nodes, "g", [x], [z], weights), opset_imports=[helper.make_opsetid("", 17)]
        )
        (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
        status, _, err = run("compress", tmp_path / "model.onnx", "-o", tmp_path / f"out{has_other}", "--storage", "int8")
        assert status == has_other
        assert ("32 weights outside its LSTMs" in err) == has_other


@pytest.mark.parametrize("columns", ["0", "", "x"])
def test_an_impossible_width_is_ignored(columns, folder, monkeypatch, run):
    monkeypatch.setenv("COLUMNS", columns)
    status, out, _ = run("inspect", folder / "model.safetensors")
    assert status == 0
    assert "lstms.0.weight_hh_l0" in out


def test_inspect_counts_all_numbers_of_an_onnx_file(onnx_file, run_json):
    found = run_json("inspect", onnx_file)
    assert (found["parameters"], found["total"]) == (32 * 6 + 32 * 8, 32 * 6 + 32 * 8 + 8 * 5)
    assert found["bytes"] == onnx_file.stat().st_size


def test_inspect_counts_shared_matrices_once(tmp_path, run_json):
    lstm = nn.LSTM(3, 4)
    torch.save(nn.ModuleDict({"left": lstm, "right": lstm}).state_dict(), tmp_path / "shared.pt")
    found = run_json("inspect", tmp_path / "shared.pt")
    assert len(found["sites"]) == 4
    assert (found["parameters"], found["total"]) == (16 * 3 + 16 * 4, 16 * 3 + 16 * 4 + 2 * 16)


OTHERS = {
    "module:function": lambda folder: "package.module:function",
    "a misspelt name": lambda folder: "embeded",
    "a weight file": lambda folder: folder / "model.safetensors",
    "a folder without weights": lambda folder: folder.parent,
    "a folder of another model": lambda folder: saved(nn.LSTM(4, 8), folder.parent / "other"),
    "a compressed folder of another model": lambda folder: compressed_stranger(folder.parent / "small"),
}
"""Names of models that ``eval`` and ``export`` do not take."""


def saved(model, folder):
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def compressed_stranger(folder):
    model = nn.Sequential(nn.LSTM(4, 8))
    compress_(model, Quantize("int8"))
    save(model, folder)
    return folder


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    ("verb", "advice"), [("eval", "slimlstm.load"), ("export", "slimlstm.export_onnx(model, inputs, 'small.onnx')")]
)
def test_other_models_are_refused_with_advice(verb, advice, name, folder, tmp_path, run):
    more = ["-o", tmp_path / "written.onnx"] * (verb == "export")
    status, out, err = run(verb, OTHERS[name](folder), *more)
    assert (status, out) == (1, "")
    assert "AWD-LSTM" in err
    assert advice in err
    assert err.count("\n") == 1
    assert not (tmp_path / "written.onnx").exists()
