"""Interleaved timings of calls whose outputs were checked first, and the engines that are compared."""

import itertools
import json
import statistics
import sys
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from strangers import STRANGERS
from torch import Tensor, nn

from slimlstm import LowRank, LowRankLSTM, Prune, Quantize, SlimLSTMError, bench, cli, compress_, save
from slimlstm.bench import engines, interleaved_seconds, median_ratios, timing
from slimlstm.bench import layers as bench_of_layers
from slimlstm.bench.candidates import Candidate, check_and_time
from slimlstm.bench.engines import dense_rivals, exact_output, low_rank_rivals
from slimlstm.demo import model as embedded
from slimlstm.folders import read_config, read_folder
from slimlstm.methods import STORAGES
from slimlstm.weight_files import compress_file, layers_of

BRIEF = 0.002


@pytest.fixture
def brief(monkeypatch):
    """Timings that end soon."""
    monkeypatch.setattr(bench.bench_layers, "__kwdefaults__", bench.bench_layers.__kwdefaults__ | {"seconds": BRIEF})


@pytest.fixture
def clock(monkeypatch):
    """Calls that take a given time on a clock that advances only for them."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(name: str, seconds: float, log: list[str]):
        def run():
            now[0] += seconds
            log.append(name)

        return run

    return call


# ---- turns ----


def test_all_calls_are_timed_for_as_long_and_spread_over_the_run(clock):
    log: list[str] = []
    calls = {"slow": clock("slow", 0.5, log), "middle": clock("middle", 0.03, log), "fast": clock("fast", 1e-4, log)}
    times = interleaved_seconds(calls, seconds=0.3)
    assert {name: len(values) for name, values in times.items()} == {"slow": 5, "middle": 10, "fast": 200}
    assert {name: statistics.median(values) for name, values in times.items()} == pytest.approx(
        {"slow": 0.5, "middle": 0.03, "fast": 1e-4}
    )
    # Every timed call directly follows an untimed call of the same function.
    turns = list(zip(log[::2], log[1::2], strict=True))
    assert all(first == second for first, second in turns)
    places = [index for index, (name, _) in enumerate(turns[3:]) if name == "slow"]
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert len(places) == 5
    assert max(gaps) - min(gaps) <= 2


def test_ratios_are_those_of_medians():
    seconds = {"dense": [4.0, 4.0, 6.0], "small": [1.0, 2.0, 30.0]}
    assert median_ratios(seconds, "dense") == {"dense": 1.0, "small": 2.0}
    assert median_ratios(seconds, "small") == {"dense": 0.5, "small": 1.0}


def test_time_that_passes_is_measured():
    numbers = list(range(20_000))
    calls = {"once": lambda: sorted(numbers), "fifty times": lambda: [sorted(numbers) for _ in range(50)]}
    assert median_ratios(interleaved_seconds(calls, seconds=0.05), "fifty times")["once"] > 10


def test_calls_run_without_gradients_and_with_masks_applied_once():
    class Count(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            seen.append(torch.is_grad_enabled())
            return weight

    seen: list[bool] = []
    linear = nn.Linear(2, 2)
    nn.utils.parametrize.register_parametrization(linear, "weight", Count())
    seen.clear()
    interleaved_seconds({"linear": lambda: linear(torch.zeros(1, 2))}, seconds=BRIEF)
    assert seen == [False]


@pytest.mark.parametrize(("calls", "seconds"), [({}, 1.0), ({"dense": lambda: None}, 0.0), ({"dense": lambda: None}, -1.0)])
def test_timings_of_nothing_are_refused(calls, seconds):
    with pytest.raises(SlimLSTMError, match=f"{len(calls)} calls cannot be timed for {seconds} seconds"):
        interleaved_seconds(calls, seconds=seconds)


def candidate(ours: bool, precision: str, model: str, call, output: Tensor) -> Candidate:
    def run():
        call()
        return output

    return Candidate(ours, precision, model, run)


def test_ratios_are_to_the_best_rival_of_the_precision(clock):
    truth = {"dense": torch.ones(2, 1, 3), "rank 2": torch.full((2, 1, 3), 2.0)}
    log: list[str] = []

    def of(name, ours, precision, model, seconds, error=0.0):
        return candidate(ours, precision, model, clock(name, seconds, log), truth[model] * (1 + error))

    def broken():
        raise RuntimeError("out of memory\nat some address")

    found = {
        "one": of("one", False, "float32", "dense", 0.3),
        "two": of("two", False, "float32", "dense", 0.2),
        "wrong": of("wrong", False, "float32", "dense", 0.01, error=1e-3),
        "small": of("small", False, "int8", "dense", 0.05, error=0.04),
        "scan": of("scan", False, "float32", "rank 2", 0.12),
        "broken": Candidate(False, "float32", "dense", broken),
        "ours": of("ours", True, "float32", "rank 2", 0.1),
        "ours dense": of("ours dense", True, "bfloat16", "dense", 0.4, error=1e-3),
        "ours small": of("ours small", True, "int8", "rank 2", 0.025, error=0.04),
        "ours wrong": of("ours wrong", True, "float32", "dense", 0.1, error=float("nan")),
    }
    result = check_and_time(found, truth, {"absent": "not installed"}, seconds=0.3)
    assert set(result["refused"]) == {"absent", "wrong", "ours wrong", "broken"}
    assert result["refused"]["broken"] == "out of memory"
    assert result["refused"]["wrong"] == "wrong by 0.001 of the output's norm"
    faster = {name: one["faster"] for name, one in result["candidates"].items() if one["ours"]}
    ratios = {
        name: {what: (e["than"], pytest.approx(e["ratio"])) for what, e in one.items()} for name, one in faster.items()
    }
    assert ratios == {
        "ours": {"dense": ("two", 2.0), "same model": ("scan", 1.2)},
        "ours dense": {"dense": ("two", 0.5)},
        "ours small": {"dense": ("small", 2.0)},
    }
    assert result["candidates"]["two"]["microseconds"] == pytest.approx(2e5)
    assert result["candidates"]["two"]["quartiles"] == pytest.approx([2e5, 2e5])


# ---- two modules ----


def test_a_model_before_and_after(clock, monkeypatch):
    dense = STRANGERS["tagger"].make().float().train()
    compressed = deepcopy(dense)
    compress_(compressed, LowRank(rank=2))
    inputs, log = STRANGERS["tagger"].inputs(), []
    for model, seconds in ((dense, 0.02), (compressed, 0.01)):
        call = clock("", seconds, log)
        model.register_forward_pre_hook(lambda *_, call=call: call())
    found = bench.compare(dense, compressed, *inputs, threads=1)
    assert found.faster == pytest.approx(2.0)
    assert found.dense == pytest.approx((0.02, 0.02, 0.02))
    with torch.no_grad():
        outputs = [model.eval()(*inputs).double() for model in (dense, compressed)]
    assert found.difference == pytest.approx(float((outputs[0] - outputs[1]).norm() / outputs[0].norm()), rel=1e-6)
    assert "2.00x with 1 thread;" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["provenance"]["torch"] == torch.__version__


def test_the_modes_of_modules_and_threads_come_back():
    dense = STRANGERS["tagger"].make()
    dense.labels.eval()
    modes, threads = [module.training for module in dense.modules()], torch.get_num_threads()
    bench.compare(dense, dense, *STRANGERS["tagger"].inputs(), threads=1, seconds=BRIEF)
    assert [module.training for module in dense.modules()] == modes
    assert torch.get_num_threads() == threads


def test_outputs_that_cannot_be_compared():
    one, x = nn.LSTM(3, 4), torch.randn(2, 1, 3)
    with pytest.raises(SlimLSTMError, match=r"cannot be compared: \[\[2, 1, 4\], .*\[2, 1, 5\]"):
        bench.compare(one, nn.LSTM(3, 5), x)
    bad = LowRankLSTM.from_dense(deepcopy(one))
    nn.init.constant_(bad.weight_hh_l0, torch.nan)
    with pytest.raises(SlimLSTMError, match="not finite; its speed is not measured"):
        bench.compare(one, bad, x)


# ---- layers ----


class Stack(nn.Module):
    """LSTMs one after the other, of which the last has a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.LSTM(5, 8, 2, bidirectional=True)
        self.high = nn.LSTM(16, 6, bias=False, proj_size=4)
        self.cell = nn.LSTMCell(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.high(self.low(x)[0])[0]
        state = None
        for step in x:
            state = self.cell(step, state)
        return state[0]


@pytest.mark.parametrize("config", [None, LowRank(rank=2), Prune(keep=0.5), Quantize("int8"), Quantize("bfloat16", "hh")])
def test_layers_compute_what_the_model_does(config, tmp_path):
    model, x = Stack(), torch.randn(7, 2, 5)
    if config is None:
        layers = layers_of(model.state_dict())
    else:
        compress_(model, config)
        save(model, tmp_path)
        layers = layers_of(read_folder(tmp_path)[1], read_config(tmp_path)["sites"])
    assert list(layers) == ["cell", "high layer 0", "low layer 0", "low layer 1"]
    with torch.no_grad():
        expected, found = model(x), x
        for name in ("low layer 0", "low layer 1", "high layer 0", "cell"):
            found = layers[name](found)[0]
    torch.testing.assert_close(found[-1], expected, rtol=0.03 if isinstance(config, Quantize) else 1e-5, atol=1e-2)
    kept = {storage for layer in layers.values() for storage in layer.storages.values()}
    assert kept == ({config.storage} if isinstance(config, Quantize) else set())


@pytest.mark.usefixtures("brief")
def test_every_layer_in_every_engine(monkeypatch):
    monkeypatch.setattr(timing, "PATIENCE", 1e9)
    dense = layers_of(Stack().state_dict())
    compressed = deepcopy(dense)
    compress_(nn.ModuleList(compressed.values()), Quantize("int8"))
    seen: list[float] = []
    found = bench.bench_layers(dense, compressed, steps=3, batch=2, progress=lambda name, done: seen.append(done))
    assert seen == [0.0, 0.25, 0.5, 0.75]
    for layer in found.layers:
        assert {"PyTorch native", "slimlstm dense", "slimlstm compressed"} <= layer.candidates.keys()
        ours = layer.candidates["slimlstm compressed"]
        assert (ours["precision"], ours["model"], ours["ours"]) == ("int8", "compressed", True)
        assert ours["turns"] >= timing.MIN_TURNS
        assert 0 < layer.difference < 0.05
    for name, total in found.totals().items():
        assert total == pytest.approx(sum(layer.candidates[name]["microseconds"] for layer in found.layers))
    best = min(value for name, value in found.totals().items() if name.startswith("PyTorch") and "dynamic" not in name)
    assert found.faster()["slimlstm dense"]["float32"]["ratio"] <= best / found.totals()["slimlstm dense"] + 1e-9


@torch.no_grad()
def test_int8_rivals_compute_in_int8():
    torch.manual_seed(0)
    lstm, x, refused = nn.LSTM(32, 48), torch.randn(9, 2, 32), {}
    small = nn.Sequential(nn.LSTM(32, 48))
    compress_(small, LowRank("svd", rank=8, storage="int8"))
    for rivals, exact in (
        (dense_rivals(lstm, x, 1, refused), lstm(x)[0]),
        (low_rank_rivals(small[0], "compressed", x, 1, refused), exact_output(small[0], x)),
    ):
        errors = {
            name: float((rival.call() - exact).norm() / exact.norm()) for name, rival in rivals if rival.precision == "int8"
        }
        # A rival that rounds nothing, though it says int8, computes what one in float32 does.
        assert any(name.startswith("ONNX Runtime int8") for name in errors)
        assert all(1e-3 < error < 0.3 for error in errors.values()), errors
    assert not [name for name in refused if "int8" in name]


@pytest.mark.usefixtures("brief")
def test_layers_that_do_not_correspond():
    dense = layers_of(Stack().state_dict())
    with pytest.raises(SlimLSTMError, match="no layer low layer 1 of the same sizes"):
        bench.bench_layers(dense, dense | {"low layer 1": dense["high layer 0"]})
    with pytest.raises(SlimLSTMError, match="0 layers of 35 steps"):
        bench.bench_layers({}, {})
    with pytest.raises(SlimLSTMError, match="4 layers of 0 steps"):
        bench.bench_layers(dense, dense, steps=0)


@pytest.fixture
def run_json(monkeypatch, capsys):
    def run_json(*arguments):
        monkeypatch.setattr(sys, "argv", ["slimlstm", "bench", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return json.loads(out) if stop.value.code == 0 else err

    return run_json


@pytest.mark.usefixtures("brief")
@pytest.mark.slow
def test_the_command(tmp_path, run_json):
    file, small = tmp_path / "w.safetensors", tmp_path / "small"
    save_file(Stack().state_dict(), file)
    compress_file(file, LowRank(rank=1), small, storage="int8")
    how = "--rank", 1, "--storage", "int8"
    results = [
        run_json(*arguments, "--steps", 2, "--batch", 3)
        for arguments in ((file, *how), (file, "--compressed", small), (small,), (file,))
    ]
    differences = [[layer["difference"] for layer in found["layers"]] for found in results]
    assert differences[0] == pytest.approx(differences[1], rel=1e-3)
    assert max(differences[2]) < 1e-6
    for found in results[:3]:
        assert {storage for layer in found["layers"] for storage in layer["storages"].values()} == {"int8"}
        assert (found["steps"], found["batch"], found["threads"]) == (2, 3, 1)
        assert found["provenance"]["torch"] == torch.__version__
        assert set(found["faster"]) == {"slimlstm dense", "slimlstm compressed"}
    assert all(layer["difference"] == 0.0 for layer in results[3]["layers"])
    assert "--compressed excludes" in run_json(file, "--compressed", small, *how)
    assert "does not exist" in run_json(tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", ["embedded", "a folder"])
def test_language_models_are_layers_too(name, monkeypatch, run_json):
    def note(dense, compressed, **settings):
        given.update(dense)
        return bench.LayerBench([], settings["steps"], settings["batch"], settings["threads"])

    given: dict[str, LowRankLSTM] = {}
    monkeypatch.setattr(bench, "bench_layers", note)
    monkeypatch.setattr(bench.LayerBench, "to_dict", lambda _: {})
    run_json("embedded" if name == "embedded" else embedded.FOLDER)
    assert list(given) == ["lstms.0 layer 0", "lstms.1 layer 0", "lstms.2 layer 0"]
    assert torch.equal(given["lstms.1 layer 0"].weight_hh_l0, embedded.embedded_model().lstms[1].weight_hh_l0)


@pytest.mark.usefixtures("brief")
def test_what_the_command_prints(tmp_path, monkeypatch, capsys):
    save_file(Stack().state_dict(), tmp_path / "w.safetensors")
    monkeypatch.setattr(sys, "argv", ["slimlstm", "bench", str(tmp_path / "w.safetensors"), "--keep", "0.5"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, _ = capsys.readouterr()
    assert stop.value.code == 0
    for text in ("low layer 1", "PyTorch oneDNN", "slimlstm compressed", "all layers", "best float32 rival"):
        assert text.split()[0] in out
    assert "\N{HORIZONTAL ELLIPSIS}" not in out


# ---- engines ----


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "openvino"])
def test_missing_packages_are_reported(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    refused: dict[str, str] = {}
    with torch.no_grad():
        found = dict(engines.dense_rivals(nn.LSTM(3, 4).eval(), torch.randn(2, 1, 3), 1, refused))
    assert {"PyTorch oneDNN", "PyTorch native"} <= found.keys()
    names = {
        "onnx": ["ONNX Runtime LSTM", "OpenVINO LSTM"],
        "onnxruntime": ["ONNX Runtime LSTM"],
        "openvino": ["OpenVINO LSTM"],
    }
    for name in names[package]:
        assert refused[name].startswith("not installed: ")
        assert package in refused[name]
        assert name not in found


# ---- the benchmark ----


def test_a_stopped_benchmark_is_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.delitem(sys.modules, "engines", raising=False)
    import engines as program

    monkeypatch.setattr(program, "measured", lambda setting, divisors: setting | {"candidates": {}, "refused": {}})
    result = tmp_path / "engines.json"

    def run(*batches):
        arguments = [
            "--hidden",
            "8",
            "--steps",
            "1",
            "--threads",
            "1",
            "--json",
            str(result),
            "--batch",
            *map(str, batches),
        ]
        monkeypatch.setattr(sys, "argv", ["engines.py", *arguments])
        program.main()
        return capsys.readouterr().out

    assert run(1, 4).startswith("2 of 2 settings to measure")
    assert run(1, 4, 16).startswith("1 of 3 settings to measure")
    assert [row["batch"] for row in json.loads(result.read_text())["rows"]] == [1, 4, 16]
    changed = json.loads(result.read_text())
    changed["provenance"]["torch"] = "1.0"
    result.write_text(json.dumps(changed))
    with pytest.raises(SystemExit, match="was written with a different torch; name another file"):
        run(64)


@pytest.mark.parametrize("storage", list(STORAGES)[1:])
def test_layers_in_every_storage_are_timed(storage):
    dense = {"lstm": LowRankLSTM(5, 8)}
    small = deepcopy(dense)
    compress_(small["lstm"], Quantize(storage))
    found = bench.bench_layers(dense, small, steps=2, seconds=0.001)
    assert found.layers[0].candidates["slimlstm compressed"]["precision"] == STORAGES[storage].kernel_format


def test_a_layer_with_a_reverse_direction_only_is_timed():
    lstm, x = nn.LSTM(5, 8, bidirectional=True).eval(), torch.randn(7, 2, 5)
    state = {f"rnn.{name}": value for name, value in lstm.state_dict().items() if name.endswith("_reverse")}
    (layer,) = layers_of(state).values()
    with torch.no_grad():
        torch.testing.assert_close(layer(x.flip(0))[0].flip(0), lstm(x)[0][..., 8:])


def test_layers_of_zeros_are_timed():
    layers = {"lstm": LowRankLSTM(5, 8, bias=False)}
    for parameter in layers["lstm"].parameters():
        nn.init.zeros_(parameter)
    found = bench.bench_layers(layers, layers, steps=2, seconds=0.001)
    assert "slimlstm dense" in found.totals()
    assert "All layers" in str(found.__rich__().caption)


def test_no_speed_is_told_without_the_large_difference_before_it():
    one = {"ours": True, "precision": "float32", "microseconds": 1.0, "turns": 5, "model": "compressed"}
    candidates = {"slimlstm compressed": one, "rival": one | {"ours": False, "model": "dense", "microseconds": 2.0}}

    def verdicts(difference):
        layer = bench_of_layers.LayerTimes("lstm", {}, {}, {}, difference, candidates, {})
        return list(bench_of_layers.LayerBench([layer], 1, 1, 1)._verdicts())

    warned, speed = verdicts(0.98)
    assert "differ from the dense ones by up to 98%" in warned
    assert "2.00x as fast" in speed
    assert verdicts(0.01) == [speed]


def test_timing_ends_in_a_bounded_time(monkeypatch):
    monkeypatch.setattr(timing, "PATIENCE", 2)
    slow = iter([0.0, 0.0] + [0.05] * 1000)
    times = timing.interleaved_seconds({"slow": lambda: time.sleep(next(slow))}, seconds=0.02)
    assert 2 <= len(times["slow"]) < timing.MIN_TURNS


@pytest.mark.parametrize(("seconds", "ends_early"), [(1e-4, True), (0.05, False)])
def test_an_early_end_is_said(seconds, ends_early, monkeypatch):
    monkeypatch.setattr(timing, "PATIENCE", -1.0 if ends_early else 1e9)
    layers = {"lstm": LowRankLSTM(3, 4).eval()}
    caption = str(bench.bench_layers(layers, layers, steps=2, seconds=seconds).__rich__().caption)
    assert ("Timing of an engine ended early (lstm after 2 turns)" in caption) == ends_early
