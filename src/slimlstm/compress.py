"""``compress_``: compress the LSTMs of a live module in place."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from slimlstm.calibration.collect import calibrate, mean_loss
from slimlstm.calibration.held_out import split_batches
from slimlstm.calibration.judge import ModuleJudge
from slimlstm.calibration.losses import Loss
from slimlstm.calibration.module_observer import ModuleObserver
from slimlstm.calibration.moments import Calibration
from slimlstm.errors import SlimLSTMError
from slimlstm.methods import METHODS, Needs
from slimlstm.module_source import ModuleSource
from slimlstm.modules.arguments import check_batches, check_data, check_loss, check_model, check_repeatable
from slimlstm.modules.hosts import Host, check_materialised
from slimlstm.modules.modes import plain_defaults, plain_mode
from slimlstm.pipeline.config import AUTO, Filter, LowRank, Target
from slimlstm.pipeline.plan import Config, calibration_needs, check_config, method_names, selected_sites
from slimlstm.pipeline.probing import measure_sizes
from slimlstm.pipeline.report import Report
from slimlstm.pipeline.run import apply, solve
from slimlstm.pipeline.sensitivity import Sensitivity
from slimlstm.pipeline.statistics import SiteStatistics
from slimlstm.progress import Progress, count_of, shown


def compress_(
    model: nn.Module,
    config: Config,
    *,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    calibration: Calibration | None = None,
    refit: int | None = None,
    progress: Progress | None = None,
    sensitivity: Sensitivity | None = None,
) -> Report:
    """Compress the LSTMs of ``model`` in place, without training.

    Every ``nn.LSTM`` and ``nn.LSTMCell`` in the module tree is found. A shared module or matrix is compressed once and
    stays shared. Factored and quantised modules become :class:`slimlstm.LowRankLSTM` or ``LowRankLSTMCell``; pruned modules
    keep their class. Weight drop and other parametrizations of a compressed module end, and the report says so. A matrix
    whose factors would be no smaller stays dense. An optimizer made before does not know the new parameters: make a new
    one.

    Args:
        model: any module. A bare ``nn.LSTM`` becomes a :class:`slimlstm.LowRankLSTM` itself.
        config: a rule (``LowRank``, ``Prune``, ``Quantize``), or a ``Plan`` that names every site, such as a report's.
        batches, loss: data for calibration; see :func:`slimlstm.calibrate`. ``"activation"`` needs batches, ``"fisher"``
            needs both. With a loss, and batches that can be iterated again, the mean loss is measured before and after.
        calibration: a result of :func:`slimlstm.calibrate` for this model, used instead of calibrating anew.
        refit: how often to fit the factors of calibrated methods again to the inputs that the compressed model sees; see
            :mod:`slimlstm.calibration.refit`. Each pass runs both models on all batches. The last fifth of the batches is
            held out, and decides which factors stay. None means twice if the batches can be iterated again and both models
            call their LSTMs equally often, else never. 0 means never.
        progress: called with a site's key and the fraction done; None draws a bar on a terminal.
        sensitivity: a result of :func:`slimlstm.measure_sensitivity` for this model, for ``storage="auto"``; None measures
            it.

    Returns:
        A report of every site and of the whole, with parameters and bytes before and after, relative errors, and, for
        a loss, its predicted and measured rise. Print it.

    Raises:
        SlimLSTMError: no site is selected, a site cannot be compressed, a matrix is not finite, a matrix to be quantised is
            not float32, calibration is missing or does not reach a site, or ``refit`` was asked for and is impossible.
            Nothing has changed then.

    Examples:
        >>> import torch, slimlstm
        >>> model = torch.nn.Sequential(torch.nn.LSTM(8, 16))
        >>> report = compress_(model, slimlstm.Quantize("int8"))
        >>> report.lstm.bytes_after < 0.4 * report.lstm.bytes_before
        True
    """
    source = ModuleSource(model)
    try:
        with shown("compressing", progress) as report_progress:
            return _compress(source, model, config, batches, loss, calibration, refit, report_progress, sensitivity)
    except BaseException:
        source.undo()
        raise


@plain_mode()
@plain_defaults()
def _compress(
    source: ModuleSource,
    model: nn.Module,
    config: Config,
    batches: Iterable[Any] | None,
    loss: Loss | None,
    calibration: Calibration | None,
    refit: int | None,
    progress: Progress,
    sensitivity: Sensitivity | None,
) -> Report:
    check_config(config, source.sites())
    _check_arguments(config, batches, loss, calibration, sensitivity)
    check_materialised(model)
    if batches is not None and loss is None and calibration is None:
        _check_needs_no_loss(config)
    repeatable = batches if batches is not None and not isinstance(batches, Iterator) else None
    calibrated = None if batches is None or calibration is not None else _calibrated(model, config, batches, loss)
    loss_before = _loss_before(model, config, repeatable, loss, calibrated)
    hosts = source.compressible_hosts()
    observer = None if repeatable is None else ModuleObserver(model, hosts, repeatable, loss)
    solution = solve(
        source,
        config,
        calibration=calibration or calibrated,
        observer=observer,
        refit_obstacle="it takes batches that can be iterated more than once",
        refit=refit,
        progress=progress,
        judge=_judge(model, hosts, repeatable, loss),
        sensitivity=sensitivity,
    )
    report = apply(source, solution)
    if repeatable is None or loss is None or loss_before is None:
        return report
    loss_after = mean_loss(model, repeatable, loss)
    return dataclasses.replace(report, loss_before=None if loss_after is None else loss_before, loss_after=loss_after)


def _check_arguments(config: Config, batches: object, loss: object, calibration: object, sensitivity: object) -> None:
    """Raise :class:`SlimLSTMError` if an argument is of another type, or would be ignored."""
    check_data(batches, loss)
    for name, value, kind in (("calibration", calibration, Calibration), ("sensitivity", sensitivity, Sensitivity)):
        if value is not None and not isinstance(value, kind):
            raise SlimLSTMError(f"{name} is a {kind.__name__}, not {value!r}; {kind.__name__}.load reads one from a file")
    if sensitivity is not None and not (isinstance(config, LowRank) and config.is_auto):
        raise SlimLSTMError("a sensitivity chooses rank and storage; give LowRank(..., bytes=..., storage='auto') with it")


def _check_needs_no_loss(config: Config) -> None:
    """Raise :class:`SlimLSTMError` if a method would need gradients, which take a loss."""
    name = next((name for name in method_names(config) if METHODS[name].needs >= Needs.GRADIENTS), None)
    if name is not None:
        raise SlimLSTMError(f"{name!r} needs a loss, and compress_ got none; give it loss= beside batches=")


def _calibrated(model: nn.Module, config: Config, batches: Iterable[Any], loss: Loss | None) -> Calibration | None:
    """Calibrate where the configuration or the report uses it, else return None."""
    if isinstance(config, LowRank) and config.is_auto:
        return _calibrated_on_fitting_batches(model, batches, loss)
    if loss is None and calibration_needs(config) == Needs.NOTHING:
        return None
    return calibrate(model, batches, loss)


def _loss_before(
    model: nn.Module, config: Config, batches: Iterable[Any] | None, loss: Loss | None, calibrated: Calibration | None
) -> float | None:
    """Return the mean loss of the uncompressed model; None without a loss, or batches that can be iterated again."""
    if batches is None or loss is None:
        return None
    if calibrated is None or (isinstance(config, LowRank) and config.is_auto):
        # A given calibration may have seen other batches, and one for storage='auto' has not seen all of them.
        return mean_loss(model, batches, loss)
    return calibrated.loss


def _calibrated_on_fitting_batches(model: nn.Module, batches: Iterable[Any], loss: Loss | None) -> Calibration:
    """Calibrate on the batches that will not judge the result."""
    if isinstance(batches, Iterator) or loss is None:
        raise SlimLSTMError("storage='auto' measures losses; give loss=, and batches that can be iterated more than once")
    fitting, _ = split_batches(count_of(batches), has_costs=True)
    return calibrate(model, _FirstBatches(batches, len(fitting)), loss)


class _FirstBatches:
    """The first ``count`` batches, which can be iterated again and again."""

    def __init__(self, batches: Iterable[Any], count: int) -> None:
        self._batches, self._count = batches, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._batches, self._count)


def _judge(model: nn.Module, hosts: list[Host], batches: Iterable[Any] | None, loss: Loss | None) -> ModuleJudge | None:
    """Return a judge that measures losses on the last fifth of the batches, or None without batches or a loss."""
    if batches is None or loss is None:
        return None
    return ModuleJudge(model, hosts, batches, loss, split_batches(count_of(batches), has_costs=True)[1])


@plain_mode()
@plain_defaults()
def measure_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    method: str = "fisher",
    calibration: Calibration | None = None,
    target: Target = "both",
    filter: Filter | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure how much a model loses at every size of every matrix, where a size is a rank and a storage.

    The model does not change. From the result, plans for any number of bytes follow at once:
    ``compress_(model, sensitivity.plan(bytes), ...)``. It prints as a table of measurements, and :meth:`Sensitivity.save`
    writes it to a file.

    Args:
        model: an uncompressed module.
        batches: batches that can be iterated more than once; losses are measured on the last fifth. Give them in a fixed
            order: where a loader shuffles them, the calibration sees batches of that fifth too.
        loss: see :func:`slimlstm.calibrate`.
        method: the method that finds the factors; it has to use gradients, as ``"fisher"`` does.
        calibration: a result of :func:`slimlstm.calibrate` for this model, used instead of calibrating anew.
        target, filter: see :class:`LowRank`.
        progress: called with a site's key and the fraction done; None draws a bar on a terminal.

    Raises:
        SlimLSTMError: the batches are an iterator, a matrix is compressed already, or see :func:`slimlstm.calibrate`.

    Examples:
        >>> import slimlstm, torch
        >>> model, batches = nn.Sequential(nn.LSTM(8, 16)), [torch.randn(5, 2, 8) for _ in range(2)]
        >>> found = measure_sensitivity(model, batches, lambda model, batch: model(batch)[0].square())
        >>> plan = found.plan(1000)
        >>> sum(plan.sites[site.key].bytes_at(site) for site in slimlstm.find_sites(model)) <= 1000
        True
    """
    check_model(model)
    check_batches(batches)
    check_loss(loss)
    check_repeatable(batches)
    config, source = LowRank(method, bytes=1, storage=AUTO, target=target, filter=filter), ModuleSource(model)
    check_config(config, source.sites())
    with shown("measuring sensitivity", progress) as report_progress:
        calibration = calibration or _calibrated_on_fitting_batches(model, batches, loss)
        statistics = SiteStatistics(source, calibration, method)
        judge = _judge(model, source.compressible_hosts(), batches, loss)
        return measure_sizes(source, selected_sites(config, source.sites()), statistics, method, judge, report_progress)
