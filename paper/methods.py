"""Compression methods: the paper's, those beyond it, and those that a plugin adds to the library's table."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from slimlstm.errors import SlimLSTMError, reason_of
from slimlstm.methods import DENSE, METHODS, STORAGES, calibrated_methods, svd
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.pipeline.config import AUTO, LowRank, Prune, Quantize, configuration

PAPER = ("svd", "semi-nmf", "prune")
"""The methods that the paper compares, in its order."""
TOGETHER = "fisher-auto"
"""The variant that chooses rank and bits of every matrix together."""
FACTORING = tuple(name for name in PAPER if not METHODS[name].makes_mask)
MASKING = tuple(name for name in PAPER if METHODS[name].makes_mask)


def beyond_paper() -> list[str]:
    """Return the registered methods that the paper does not have.

    Examples:
        >>> beyond_paper()[:2]
        ['activation', 'fisher']
    """
    return [name for name in METHODS if name not in PAPER]


def all_methods() -> list[str]:
    """Return the paper's methods, then the others."""
    return [*PAPER, *beyond_paper()]


def configuration_called(name: str, keep: float, dense_bytes: int) -> LowRank | Prune | Quantize:
    """Return the configuration of a method, or of a variant of one, at a fraction of the dense matrices' bytes.

    Args:
        name: a method; ``METHOD-global`` chooses the ranks of all matrices together; ``METHOD-STORAGE``, such as
            ``fisher-int8``, stores factors in fewer bits, so that they have more weights in the same bytes;
            ``METHOD-auto`` chooses rank and bits together; ``dense-STORAGE`` keeps the matrices whole, whatever the
            fraction.
        keep: the fraction.
        dense_bytes: of all matrices.

    Examples:
        >>> configuration_called("svd-int8", 0.25, 4000).bytes
        1000
    """
    method, _, variant = name.rpartition("-")
    if method == DENSE:
        return Quantize(variant)
    if variant == AUTO or (method in METHODS and variant in STORAGES):
        return configuration(method, bytes=int(keep * dense_bytes), storage=variant)
    if variant == "global":
        return configuration(method, keep=keep, allocation="global")
    return configuration(name, keep=keep)


def is_calibrated(name: str) -> bool:
    """Return whether a method, or the method of a variant, needs calibration."""
    method, _, variant = name.rpartition("-")
    is_variant = variant in (AUTO, "global") or variant in STORAGES
    if is_variant and method == DENSE:
        return True
    return (method if is_variant else name) in calibrated_methods()


def factors_by_svd_(lstms: Iterable[nn.Module]) -> None:
    """Replace factors by the SVD of their product, in place; the products stay the same.

    Non-negative rows that represent signed rows are long and nearly parallel, so a small step changes the product much.
    Factors from the SVD tolerate the learning rates of other models.
    """
    for lstm in lstms:
        if isinstance(lstm, LowRankLSTM):
            for name, rank in lstm.ranks.items():
                factors = svd(lstm.product(name), rank)
                lstm.set_factors(name, factors.u, factors.v)


def import_plugins(sources: Sequence[str]) -> None:
    """Import modules, or files ending in ``.py``, that register methods; each once a process.

    Raises:
        SlimLSTMError: one of them cannot be imported.

    Examples:
        >>> import_plugins(["json"])
    """
    for source in sources:
        if source.endswith(".py"):
            _import_file(Path(source))
            continue
        try:
            importlib.import_module(source)
        except ImportError as error:
            raise SlimLSTMError(f"the plugin {source} cannot be imported: {reason_of(error)}") from error


def add_plugin_option(parser: argparse.ArgumentParser) -> list[str]:
    """Add the option ``--plugin``, import the plugins that the command line names, and return them.

    Call this before adding options whose choices are method names.
    """
    early = argparse.ArgumentParser(add_help=False)
    for one in (early, parser):
        one.add_argument(
            "--plugin",
            action="append",
            default=[],
            metavar="MODULE_OR_FILE",
            help="module, or file ending in .py, that registers methods; repeatable",
        )
    named: list[str] = early.parse_known_args()[0].plugin
    # Other processes may work in other folders.
    plugins = [str(Path(name).absolute()) if name.endswith(".py") else name for name in named]
    try:
        import_plugins(plugins)
    except SlimLSTMError as error:
        parser.error(str(error))
    return plugins


def _import_file(path: Path) -> None:
    name = f"plugin_{path.stem}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise SlimLSTMError(f"the plugin {path} does not exist; name a Python file or an importable module")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
