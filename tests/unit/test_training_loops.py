"""The callback of docs/training.md in a loop with hooks in Lightning's order, and Lightning's checkpoints."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import slimlstm as sl

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


class Net(nn.Module):
    """A LightningModule without Lightning: a network as an attribute, and hooks."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.LSTM(6, 32))

    def training_step(self, batch):
        return self.model(batch)[0].square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


@pytest.fixture
def callback_class(monkeypatch):
    """The class in the documentation; Lightning itself where it is installed."""
    try:
        import lightning  # noqa: F401
    except ImportError:
        stand_in = ModuleType("lightning")
        stand_in.Callback = object
        monkeypatch.setitem(sys.modules, "lightning", stand_in)
    names = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1], names)  # noqa: S102
    return names["Compress"]


def fit(module, callback):
    """Train as ``Trainer.fit`` does: setup, then the optimiser, then steps."""
    trainer = SimpleNamespace()
    callback.setup(trainer, module, "fit")
    optimiser = module.configure_optimizers()
    for _ in range(3):
        optimiser.zero_grad()
        module.training_step(torch.ones(5, 2, 6)).backward()
        optimiser.step()
    callback.on_fit_end(trainer, module)


def test_the_callback_trains_factors_and_saves(callback_class, tmp_path, capsys):
    torch.manual_seed(0)
    module = Net()
    fit(module, callback_class(sl.LowRank(rank=4), tmp_path / "small"))
    assert "svd int8" in capsys.readouterr().out
    loaded = sl.load(tmp_path / "small", Net())
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert [site.rank for site in sl.find_sites(loaded)] == [4, 4]
    # The factors have been trained: the outputs are smaller than of the same compression without training.
    x = torch.ones(5, 2, 6)
    torch.manual_seed(0)
    untrained = Net()
    sl.compress_(untrained, sl.LowRank(rank=4))
    assert loaded.training_step(x) < untrained.training_step(x)


def test_other_stages_leave_the_module(callback_class, tmp_path):
    module = Net()
    before = set(module.state_dict())
    callback_class(sl.LowRank(rank=4), tmp_path).setup(SimpleNamespace(), module, "test")
    assert set(module.state_dict()) == before


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("part", ["the module", "the network"])
def test_a_checkpoint_of_lightning_becomes_a_folder(tmp_path, prefix, part, run):
    module = Net()
    state = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    content = {"epoch": 3, "pytorch-lightning_version": "2.5.0", "state_dict": state, "callbacks": {}, "loops": {}}
    torch.save(content | {"hyper_parameters": {"path": Path("x")}, "optimizer_states": [{}]}, tmp_path / "last.ckpt")
    options = ("--rank", "4", "--storage", "int8")
    status, _, err = run("compress", str(tmp_path / "last.ckpt"), "-o", str(tmp_path / "small"), *options)
    assert (status, err) == (0, "")
    target = Net() if part == "the module" else Net().model
    loaded = sl.load(tmp_path / "small", target)
    sl.compress_(module, sl.LowRank(rank=4, storage="int8"))
    expected = module if part == "the module" else module.model
    x = torch.ones(5, 2, 6)
    found = [net.model if part == "the module" else net for net in (loaded, expected)]
    assert torch.equal(found[0](x)[0], found[1](x)[0])
