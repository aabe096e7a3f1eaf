"""``compress_``: compress the LSTMs of a live module in place."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimlstm.calibration.collect import calibrate, mean_loss
from slimlstm.calibration.judge import ModuleJudge
from slimlstm.calibration.losses import Loss
from slimlstm.calibration.module_observer import ModuleObserver
from slimlstm.calibration.moments import Calibration
from slimlstm.calibration.refit import split_batches
from slimlstm.errors import SlimLSTMError
from slimlstm.methods import METHODS, Needs, Replacement, check_matrix, stored_bytes
from slimlstm.modules.factored import FactoredModule
from slimlstm.modules.hosts import Host, check_materialised, find_hosts
from slimlstm.modules.masks import Mask
from slimlstm.modules.modes import plain_defaults, plain_mode
from slimlstm.modules.sites import Site
from slimlstm.modules.swap import Swap
from slimlstm.ops.weights import Matrix
from slimlstm.pipeline.config import AUTO, Filter, LowRank, Target
from slimlstm.pipeline.plan import Config, calibration_needs, check_config, method_names, selected_sites
from slimlstm.pipeline.probing import measure_sizes
from slimlstm.pipeline.report import Report
from slimlstm.pipeline.run import apply, solve
from slimlstm.pipeline.sensitivity import Sensitivity
from slimlstm.pipeline.site_plan import SitePlan
from slimlstm.pipeline.source import Size, Sizes
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
    whose factors would be no smaller stays dense. An optimiser made before does not know the new parameters: make a new
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
    _check_data(config, batches, loss, calibration, sensitivity)
    check_materialised(model)
    repeatable = batches if batches is not None and not isinstance(batches, Iterator) else None
    calibration, loss_before = _calibrated(model, config, batches, loss, calibration)
    hosts = source.compressible_hosts()
    observer = None if repeatable is None else ModuleObserver(model, hosts, repeatable, loss)
    solution = solve(
        source,
        config,
        calibration=calibration,
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


def _check_data(config: Config, batches: object, loss: object, calibration: object, sensitivity: object) -> None:
    """Raise :class:`SlimLSTMError` if an argument is of another type, or would be ignored."""
    if loss is not None and batches is None:
        raise SlimLSTMError("a loss takes batches to be computed on; give batches= too")
    for name, value, kind in (("calibration", calibration, Calibration), ("sensitivity", sensitivity, Sensitivity)):
        if value is not None and not isinstance(value, kind):
            raise SlimLSTMError(f"{name} is a {kind.__name__}, not {value!r}; {kind.__name__}.load reads one from a file")
    if sensitivity is not None and not (isinstance(config, LowRank) and config.is_auto):
        raise SlimLSTMError("a sensitivity chooses rank and storage; give LowRank(..., bytes=..., storage='auto') with it")


def _calibrated(
    model: nn.Module, config: Config, batches: Iterable[Any] | None, loss: Loss | None, calibration: Calibration | None
) -> tuple[Calibration | None, float | None]:
    """Return the calibration, and the mean loss of the uncompressed model; calibrate first if needed or helpful."""
    needs = calibration_needs(config)
    if batches is None:
        return calibration, None
    if needs >= Needs.GRADIENTS and calibration is None and loss is None:
        name = next(name for name in method_names(config) if METHODS[name].needs >= Needs.GRADIENTS)
        raise SlimLSTMError(f"{name!r} needs a loss, and compress_ got none; give it loss= beside batches=")
    is_repeatable = not isinstance(batches, Iterator)
    if calibration is not None:
        # The calibration may have seen other batches.
        return calibration, mean_loss(model, batches, loss) if loss is not None and is_repeatable else None
    if loss is None and needs == Needs.NOTHING:
        return None, None
    if isinstance(config, LowRank) and config.is_auto:
        calibration = _calibrated_without_judges(model, batches, loss)
        return calibration, None if loss is None else mean_loss(model, batches, loss)
    calibration = calibrate(model, batches, loss)
    return calibration, calibration.loss if is_repeatable else None


def _calibrated_without_judges(model: nn.Module, batches: Iterable[Any], loss: Loss | None) -> Calibration:
    """Calibrate on the batches that will not judge the result."""
    if isinstance(batches, Iterator) or loss is None:
        raise SlimLSTMError("storage='auto' measures losses; give loss=, and batches that can be iterated more than once")
    fitting, _ = split_batches(count_of(batches), has_costs=True)
    return calibrate(model, _First(batches, len(fitting)), loss)


class _First:
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
    if isinstance(batches, Iterator):
        raise SlimLSTMError("the batches are an iterator, but are needed more than once; give a list")
    config, source = LowRank(method, bytes=1, storage=AUTO, target=target, filter=filter), ModuleSource(model)
    check_config(config, source.sites())
    with shown("measuring sensitivity", progress) as report_progress:
        calibration = calibration or _calibrated_without_judges(model, batches, loss)
        statistics = SiteStatistics(source, calibration, method)
        judge = _judge(model, source.compressible_hosts(), batches, loss)
        return measure_sizes(source, selected_sites(config, source.sites()), statistics, method, judge, report_progress)


class ModuleSource:
    """The sites of a live module; see :class:`slimlstm.pipeline.source.Source`."""

    mask_itemsize = 1

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.undo: Callable[[], None] = lambda: None
        """Restores the modules as they were before :meth:`put`."""
        self._find()

    def _find(self) -> None:
        self._hosts = find_hosts(self._model)
        self._by_key = {site.key: host for host in self._hosts for site in host.sites()}

    def compressible_hosts(self) -> list[Host]:
        """Return the hosts without a problem."""
        return [host for host in self._hosts if host.problem is None]

    def sites(self) -> list[Site]:
        """Return the site of every recurrent matrix, in the order of the modules."""
        return [site for host in self._hosts for site in host.sites()]

    def weight(self, site: Site) -> Matrix:
        """Return the matrix [m, n] or its factors."""
        return self._by_key[site.key].weight(site.name)

    def identity(self, site: Site) -> Hashable:
        """Return a value that is equal for sites that share one parameter."""
        return self._by_key[site.key].identity(site.name)

    def itemsize(self, site: Site) -> int:
        """Return the bytes of one number."""
        return self._by_key[site.key].parameter(site.name).element_size()

    def check(self, site: Site, plan: SitePlan) -> None:
        """Raise :class:`SlimLSTMError` if a projection is not finite, or a parametrization would change rounded weights."""
        if plan.storage is None:
            return
        host = self._by_key[site.key]
        projection = host.projection(site.name)
        if projection is not None:
            check_matrix(projection)
        if isinstance(host.lstm, FactoredModule):
            computed = [part for part in host.lstm.stored_parts(site.name) if host.is_computed(part)]
            if computed:
                raise SlimLSTMError(f"{', '.join(computed)} is parametrized; remove the parametrization first")

    def put(self, replacements: Mapping[str, Replacement]) -> list[str]:
        """Replace modules and weights, and return notes for the report; sites with one replacement share its parameters."""
        notes: list[str] = []
        parameters: dict[int, Matrix] = {}
        changes: list[tuple[Host, Mapping[str, Replacement]]] = []
        for host in self._hosts:
            own = {site.name: replacements[site.key] for site in host.sites() if site.key in replacements}
            if own:
                notes += host.notes
                trained = {n: _with_parameters(found, host.is_trained(n), parameters) for n, found in own.items()}
                changes.append((host, trained))
        replaced = [host.parameter(name) for host, own in changes for name in own]
        swap = Swap(changes)
        # Set before the swap, so that an interrupt at any point can be undone.
        self.undo = swap.undo
        swap.commit()
        self._find()
        kept = set(map(id, self._model.parameters()))
        return notes + _notes_on_optimizers({id(weight) for weight in replaced} - kept)

    def size(self) -> Sizes:
        """Return the sizes of the LSTMs with their biases and of the model; masked weights do not count as parameters."""
        return Sizes(size([host.module for host in self._hosts], self._hosts), size([self._model], self._hosts))


def _notes_on_optimizers(replaced: set[int]) -> list[str]:
    """Return a note for every optimizer that holds parameters with these ids, because it would train unused weights."""
    # PyTorch marks a class of optimizers at its first instance. A search of all objects takes a tenth of a second.
    used = {found for found in _subclasses(torch.optim.Optimizer) if getattr(found.step, "hooked", False)}
    optimizers: list[Any] = [found for found in gc.get_objects() if type(found) in used] if used else []
    return [
        f"an optimizer ({type(optimizer).__name__}) holds weights that were replaced, and would not train the new "
        "ones; make it again from model.parameters()"
        for optimizer in optimizers
        if not replaced.isdisjoint(id(weight) for group in optimizer.param_groups for weight in group["params"])
    ]


def _subclasses(of: Any) -> Iterator[Any]:
    for found in of.__subclasses__():
        yield found
        yield from _subclasses(found)


def _with_parameters(found: Replacement, is_trained: bool, parameters: dict[int, Matrix]) -> Replacement:
    """Return a replacement whose weights are parameters; ``parameters`` holds the ones made before, by tensor."""
    if found.weight is None:
        return found
    key = id(found.weight)
    if key not in parameters:
        weight = found.weight
        if isinstance(weight, Tensor):
            parameters[key] = nn.Parameter(weight, is_trained)
        else:
            parameters[key] = nn.Parameter(weight[0], is_trained), nn.Parameter(weight[1], is_trained)
    return dataclasses.replace(found, weight=parameters[key])


def size(modules: Sequence[nn.Module], hosts: list[Host]) -> Size:
    """Return the number of parameters in ``modules`` and their bytes; shared ones count once.

    A masked weight is no parameter, but takes bytes, and its mask takes one more.

    Args:
        modules: modules of one model.
        hosts: the model's hosts, which say what is masked and stored.
    """
    parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    masked = {
        host.identity(site.name): site.shape[0] * site.shape[1] - site.nonzeros
        for host in hosts
        for site in host.sites()
        if site.nonzeros is not None
    }
    count = sum(parameter.numel() - masked.get(key, 0) for key, parameter in parameters.items())
    storages = {
        id(host.lstm.original(part)): storage
        for host in hosts
        if isinstance(host.lstm, FactoredModule)
        for name, storage in host.lstm.storages.items()
        for part in host.lstm.stored_parts(name)
    }
    stored = (stored_bytes(tuple(p.shape), storages.get(key), p.element_size()) for key, p in parameters.items())
    masks = {part.mask.data_ptr(): part.mask for module in modules for part in module.modules() if isinstance(part, Mask)}
    return Size(count, sum(stored) + sum(mask.nbytes for mask in masks.values()))
