"""The public names, which are imported at their first use."""

import copy
import pickle
import subprocess
import sys
from importlib.metadata import version

import pytest
from torch import nn

import slimlstm as sl


def in_a_new_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("name", sl.__all__)
def test_every_public_name_exists_and_is_listed(name):
    value = getattr(sl, name)
    assert value is getattr(sl, name)
    assert name in dir(sl)
    assert value.__doc__


def test_star_imports_give_every_name():
    names = {}
    exec("from slimlstm import *", names)  # noqa: S102 (a statement that functions cannot hold)
    assert set(sl.__all__) <= set(names)


@pytest.mark.parametrize(
    "path",
    ["tuning.distillation", "evaluate.perplexity", "bench.compare", "search.find_best", "methods.METHODS"],
)
def test_the_submodules_that_users_need_come_along(path):
    value = sl
    for name in path.split("."):
        value = getattr(value, name)
    assert value


def test_names_that_do_not_exist_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'slimlstm' has no attribute 'compress'"):
        sl.__getattr__("compress")
    assert not hasattr(sl, "nonsense")


def test_objects_are_pickled_and_copied():
    config = sl.LowRank(rank=3)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config  # noqa: S301 (our own bytes)
    assert pickle.loads(pickle.dumps(sl.LowRankLSTM)) is sl.LowRankLSTM  # noqa: S301 (our own bytes)
    assert isinstance(pickle.loads(pickle.dumps(sl.LowRankLSTM.from_dense(nn.LSTM(2, 3)))), sl.LowRankLSTM)  # noqa: S301


def test_importing_the_package_and_the_command_imports_no_pytorch():
    code = "import sys, slimlstm.cli, slimlstm.files; print({'torch', 'numpy', 'rich'} & {*sys.modules})"
    assert in_a_new_process(code) == ["set()"]


def test_the_version_is_the_installed_one():
    assert in_a_new_process("import slimlstm; print(slimlstm.__version__)") == [version("slimlstm")]
