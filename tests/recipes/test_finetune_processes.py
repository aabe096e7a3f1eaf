"""Fine-tuning in processes of its own: a run that is killed, and two processes that train together."""

import atexit
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetuning import (
    RUN,
    Carried,
    assert_state,
    drawn_batches,
    other_weights,
    some_batches,
    squares,
    state_of,
    tagger,
)

import slimlstm as sl
from slimlstm import SlimLSTMError, files

HERE = Path(__file__).parent
IMPORTS = f"import sys; sys.path[:0] = {[str(HERE), str(HERE.parent)]!r}; import test_finetune_processes"


class LossError(Exception):
    """Comes from a loss of the user's."""


def run_that_is_killed(path):
    """Runs in a process of its own, which is killed when the third checkpoint is complete but not yet in its place."""
    drafts, flush = [], files.flush

    def flush_and_die(path):
        flush(path)
        drafts.extend([path] if path.is_file() else [])
        if len(drafts) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    files.flush = flush_and_die
    sl.finetune(tagger(), drawn_batches, Carried(), **RUN, checkpoint=path)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    command = f"{IMPORTS}; test_finetune_processes.run_that_is_killed({str(tmp_path / 'run')!r})"
    killed = subprocess.run([sys.executable, "-c", command], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    draft, checkpoint = sorted(tmp_path.iterdir())
    assert (draft.suffix, checkpoint.name) == (".draft", "run")
    os.utime(draft, (0, 0))  # long enough ago for the next run to remove it
    whole, parts = tagger(), tagger()
    expected = sl.finetune(whole, drawn_batches, Carried(), **RUN)
    found = sl.finetune(parts, drawn_batches, Carried(), **RUN, checkpoint=tmp_path / "run")
    assert_state(parts, state_of(whole))
    assert found.losses == expected.losses
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def without_dropout():
    """In float64, so that sums in another order agree."""
    model = tagger().double()
    model.dropout.p = 0.0
    return model


def squares_in_float64(model, batch):
    return squares(model, batch.double())


class Stopping(Carried):
    """Stops the run at its seventh batch."""

    calls = 0

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls == 7:
            raise LossError
        return super().__call__(model, batch)


def run_of_two_processes(folder):
    """Runs in both processes; the first writes what they did together."""
    folder, rank, called = Path(folder), int(os.environ["RANK"]), []

    def validate(model):
        called.append(model)
        return float(squares_in_float64(model, some_batches(1)[0]))

    # Functions that were registered first run last: after the group's own.
    atexit.register(lambda: (folder / f"left-{rank}").write_text(str(not torch.distributed.is_initialized())))
    model = without_dropout()
    history = sl.finetune(model, some_batches(5), squares_in_float64, steps=9, lr=3e-2, validate=validate)
    assert bool(called) == (rank == 0)
    torch.save({"history": history.to_dict(), "model": model.state_dict()}, folder / f"{rank}")

    whole, parts = tagger(), tagger()
    # Two steps an epoch, so that the third batch is left over.
    batches = some_batches(5)
    expected = sl.finetune(whole, batches, Carried(), **RUN)
    with pytest.raises(LossError):
        sl.finetune(parts, batches, Stopping(), **RUN, checkpoint=folder / "run")
    parts = tagger()
    found = sl.finetune(parts, batches, Carried(), **RUN, checkpoint=folder / "run")
    assert found.losses == expected.losses
    assert_state(parts, state_of(whole))

    with pytest.raises(SlimLSTMError, match="the processes have different models"):
        sl.finetune(other_weights() if rank else tagger(), batches, squares, **RUN)
    with pytest.raises(SlimLSTMError, match="epoch 0 has 1 batches, but 2 are needed"):
        sl.finetune(tagger(), batches[:1], squares, **RUN)


def test_two_processes_are_one_with_batches_twice_as_large(tmp_path):
    command = f"{IMPORTS}; test_finetune_processes.run_of_two_processes({str(tmp_path)!r})"
    (tmp_path / "run.py").write_text(f"{command}\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, str(tmp_path / "run.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"left-{rank}").read_text() for rank in (0, 1)] == ["True", "True"]
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in "01")
    assert first["history"]["losses"] == second["history"]["losses"]
    model, batches = without_dropout(), some_batches(5)
    pairs = [torch.cat(batches[start : start + 2], 1) for start in (0, 2)]
    history = sl.finetune(
        model, pairs, squares_in_float64, steps=9, lr=3e-2, validate=lambda m: float(squares_in_float64(m, batches[0]))
    )
    assert first["history"]["losses"] == pytest.approx(history.losses, rel=1e-9)
    assert first["history"]["validations"] == [
        [step, pytest.approx(value, rel=1e-9)] for step, value in history.validations
    ]
    for other in (first, second):
        assert other["model"].keys() == model.state_dict().keys()
        for name, tensor in model.named_parameters():
            torch.testing.assert_close(other["model"][name], tensor.detach(), rtol=1e-8, atol=1e-10)
