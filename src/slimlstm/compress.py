"""``compress_``: a model and a configuration in, the same model with smaller matrices and a report out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from slimlstm.calibration.moments import Calibration, Moments, calibrate, mean_loss
from slimlstm.calibration.observe import Loss
from slimlstm.calibration.refit import ControlFlowError, Solve, refit
from slimlstm.errors import SlimLSTMError
from slimlstm.methods.factorize import SOLVERS, WeightedSVD, check_matrix, relative_error, singular_values
from slimlstm.methods.magnitude import magnitude_mask
from slimlstm.methods.rank import break_even_rank
from slimlstm.modules.factored import FactoredModule
from slimlstm.modules.hosts import Host, find_hosts
from slimlstm.modules.sites import Site
from slimlstm.modules.swap import provenance_of, replace
from slimlstm.ops.dense import rebuilt
from slimlstm.ops.weights import Matrix, matrix_bytes, rounded, stored_bytes
from slimlstm.pipeline.plan import DENSE, PRUNE, WEIGHTED, LowRank, Plan, Prune, Quantize, SitePlan, make_plan
from slimlstm.pipeline.report import Report, SiteReport, Total

Progress = Callable[[str, float], None]
"""Called with a site's key and the fraction of the whole work that is done."""

PASSES = 2
"""How often factors are fitted again where it is not said; a third pass gains nothing more."""


@dataclass(frozen=True)
class Compressed:
    """What stands for one matrix [m, n]: factors (U, V), or a mask and a dense weight, None where there is none or where
    it stays as it is; how it was found."""

    factors: tuple[nn.Parameter, nn.Parameter] | None = None
    mask: Tensor | None = None
    weight: nn.Parameter | None = None
    relative_error: float = 0.0
    iterations: int = 0
    converged: bool = True
    source_sha256: str = ""

    def stands_for(self, matrix: Tensor) -> Matrix:
        """What is computed with in the place of ``matrix``."""
        if self.factors is not None:
            return self.factors
        if self.weight is not None:
            return self.weight
        return matrix if self.mask is None else matrix * self.mask


def compress_(
    model: nn.Module,
    config: LowRank | Prune | Quantize | Plan,
    *,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    calibration: Calibration | None = None,
    refit: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compresses the LSTMs of ``model`` in place, without training.

    Works on ``nn.LSTM`` and ``nn.LSTMCell`` anywhere in the module tree; a shared module or matrix is compressed once and
    stays shared. Factored and quantised modules become :class:`slimlstm.LowRankLSTM` or ``LowRankLSTMCell``; pruned ones
    stay what they are. Weight drop and other parametrizations of a compressed module end, which the report notes. A
    matrix whose factors would be no smaller stays dense. Optimisers made before do not know the new parameters: make them
    anew.

    Args:
        model: any module; a bare ``nn.LSTM`` goes through :meth:`LowRankLSTM.from_dense` first.
        config: what to do, as a rule (``LowRank``, ``Prune``, ``Quantize``) or site by site (``Plan``, such as a report's).
        batches, loss: what to calibrate on; see :func:`slimlstm.calibrate`. ``"activation"`` needs batches, ``"fisher"``
            both. Where both are given and can be gone through again, the loss on them is measured before and after.
        calibration: what :func:`slimlstm.calibrate` found for this model before, in the place of calibrating anew.
        refit: how often the factors of calibrated methods are fitted again to what goes into them once all matrices are
            compressed; see :mod:`slimlstm.calibration.refit`. Each time the dense and the compressed model see all
            batches; the last fifth of them is not fitted to, and those factors stay that lose least on it. By
            default twice, if the batches can be gone through again and both models call their LSTMs alike.
        progress: called with a site's key and the fraction done, now and then.

    Returns:
        Per site and in total: parameters and bytes before and after, relative errors, and where there was a loss, how much
        it was predicted to rise and did.

    Raises:
        SlimLSTMError: no site is meant, a site cannot be compressed, a matrix holds NaN, it is not float32 that would be
            quantised, calibration is needed and not there or did not reach a site, or ``refit`` is asked for and cannot be
            done. Nothing has changed then.
    """
    hosts = find_hosts(model)
    sites = [site for host in hosts for site in host.sites()]
    make_plan(_without_spectra(config), sites)  # what can be said against it is said before the work of calibration
    repeatable = batches is not None and not isinstance(batches, Iterator)
    methods = (
        {site.method for site in config.sites.values()} if isinstance(config, Plan) else {getattr(config, "method", "")}
    )
    if "fisher" in methods and calibration is None and batches is not None and loss is None:
        raise SlimLSTMError("'fisher' needs a loss, which compress_ had not; give it loss= beside batches=")
    loss_before = None
    if calibration is not None and batches is not None and loss is not None and repeatable:
        loss_before = mean_loss(model, batches, loss)  # those of the calibration may have been others
    elif calibration is None and batches is not None and (loss is not None or methods & set(WEIGHTED)):
        calibration = calibrate(model, batches, loss)
        loss_before = calibration.loss if repeatable else None
    spectra = _Spectra(hosts, calibration, getattr(config, "method", ""))
    plan = make_plan(config, sites, spectra)
    chosen = [(host, site) for host in hosts for site in host.sites() if site.key in plan.sites]
    results = _solve(plan, chosen, spectra, progress)
    predicted = {site.key: spectra.predicted(site, results[site.key]) for _, site in chosen}
    notes: list[str] = []
    if refit or (refit is None and methods & set(WEIGHTED)):
        notes.append(_fit_again(model, hosts, plan, results, spectra, batches if repeatable else None, loss, refit))
    reports = [
        site_report(
            site,
            plan.sites[site.key],
            results[site.key],
            host.parameter(site.name).element_size(),
            predicted[site.key],
        )
        for host, site in chosen
    ]
    model_before, lstm_before = size([model], hosts), size([host.module for host in hosts], hosts)
    for host in hosts:
        compressed = {site.name: results[site.key] for owner, site in chosen if owner is host}
        changed = {name: result for name, result in compressed.items() if result.source_sha256}
        if not changed:
            continue
        notes += host.notes
        plans = {site.name: plan.sites[site.key] for owner, site in chosen if owner is host}
        module = replace(
            model,
            host,
            {name: result.factors for name, result in changed.items() if result.factors is not None},
            {name: result.mask for name, result in changed.items() if result.mask is not None},
            {name: result.weight for name, result in changed.items() if result.weight is not None},
            {
                name: {"method": plans[name].method, "source_sha256": result.source_sha256}
                for name, result in changed.items()
                if plans[name].method != DENSE or not provenance_of(host.lstm, name)
            },
        )
        for name, site_plan in plans.items():
            if site_plan.storage is not None and isinstance(module, FactoredModule):
                module.store(name, site_plan.storage)
    hosts = find_hosts(model)
    loss_after = None
    if batches is not None and loss is not None and loss_before is not None:
        loss_after = mean_loss(model, batches, loss)
    return Report(
        reports,
        plan,
        Total.between(lstm_before, size([host.module for host in hosts], hosts)),
        Total.between(model_before, size([model], hosts)),
        notes,
        None if loss_after is None else loss_before,
        loss_after,
    )


def compress_matrix(
    kept_as: Matrix,
    plan: SitePlan,
    on_fraction: Callable[[float], None] | None = None,
    weighted: Callable[[], WeightedSVD] | None = None,
) -> Compressed:
    """Carries out one site's plan on its matrix [m, n], or on the factors that it is kept as; they are not changed.

    ``weighted`` gives what the calibrated methods take the factors from.

    Raises:
        SlimLSTMError: the matrix is empty or holds NaN or infinite numbers, the rank does not fit, or what is to be
            quantised is not float32.
    """
    if plan.method == DENSE and plan.storage is None:
        return Compressed()
    matrix = rebuilt(kept_as)
    check_matrix(matrix)
    source = sha256_of(matrix)
    if plan.method == DENSE:
        exact = kept_as if isinstance(kept_as, Tensor) else kept_as[0].double() @ kept_as[1].double()
        return _stored(Compressed(source_sha256=source), kept_as, exact, plan.storage)
    if plan.method == PRUNE:
        mask = magnitude_mask(matrix, plan.nonzeros or 0)
        found = Compressed(mask=mask, relative_error=relative_error(matrix, matrix * mask), source_sha256=source)
        return _stored(found, matrix * mask, matrix, plan.storage)

    def on_iteration(done: int, most: int) -> None:
        if on_fraction is not None:
            on_fraction(done / most)

    if plan.method not in WEIGHTED:
        found = SOLVERS[plan.method](matrix, plan.rank or 0, on_iteration)
    elif weighted is None:
        raise SlimLSTMError(f"{plan.method!r} takes the model itself and batches to calibrate on; use compress_")
    else:
        found = weighted().factors(plan.rank or 0)
    result = Compressed(None, None, None, found.residual, found.iterations, found.converged, source)
    return _stored(result, (found.u, found.v), matrix, plan.storage)


def _stored(result: Compressed, kept_as: Matrix, matrix: Tensor, storage: str | None) -> Compressed:
    """``result`` with the weights that stand for ``matrix``, rounded where a storage is given, and the error of both."""
    if isinstance(kept_as, Tensor):
        if storage is None:
            return result
        after = rounded(kept_as, storage)
        result = dataclasses.replace(result, weight=nn.Parameter(after.clone()))
    else:
        u, v = (factor if storage is None else rounded(factor, storage) for factor in kept_as)
        result = dataclasses.replace(result, factors=(nn.Parameter(u), nn.Parameter(v)))
        after = u.double() @ v.double()
    return result if storage is None else dataclasses.replace(result, relative_error=relative_error(matrix, after))


def sha256_of(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's numbers, row by row, in its own dtype (little-endian)."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def size(modules: Iterable[nn.Module], hosts: list[Host]) -> tuple[int, int]:
    """Parameters and their bytes in ``modules``, shared ones once; weights that a mask zeroes are no parameters."""
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
    return count, sum(stored)


class _Spectra:
    """The spectra of a model's sites as a method sees them, each worked out once."""

    def __init__(self, hosts: list[Host], calibration: Calibration | None, method: str) -> None:
        self._hosts = {site.key: host for host in hosts for site in host.sites()}
        self._calibration = calibration
        self._method = method
        self._tied: dict[int, list[str]] = {}
        for site in (site for host in hosts if host.problem is None for site in host.sites()):
            self._tied.setdefault(self.identity(site), []).append(site.key)
            moments = calibration.sites.get(site.key) if calibration is not None else None
            if moments is not None and not moments.fit(site.shape):
                raise SlimLSTMError(f"{site.key} had another shape when the model was calibrated; calibrate this model")
        self.weighted = cache(self._weighted)

    def identity(self, site: Site) -> int:
        return self._hosts[site.key].identity(site.name)

    def itemsize(self, site: Site) -> int:
        return self._hosts[site.key].parameter(site.name).element_size()

    def losses(self, site: Site) -> Tensor:
        try:
            if self._method not in WEIGHTED:
                return singular_values(self._hosts[site.key].matrix(site.name)).square()
            # Moments are means over rows, of which a site may see more than another.
            return self._moments(site, self._method).rows * self.weighted(site, self._method).losses
        except SlimLSTMError as error:
            raise SlimLSTMError(f"{site.key}: {error}") from error

    def predicted(self, site: Site, result: Compressed) -> float | None:
        """By how much the mean loss is predicted to rise; None where that cannot be told."""
        found = self._calibration
        if found is None or not found.is_scaled or not found.predictions or site.key not in found.sites:
            return None
        if result.factors is None and result.weight is None and result.mask is None:
            return 0.0
        matrix, moments = self._hosts[site.key].matrix(site.name), found.sites[site.key]
        after = rebuilt(result.stands_for(matrix)).detach()
        return moments.loss_of(matrix.double() - after.double()) * moments.rows / found.predictions

    def solver(self, site: Site, plan: SitePlan) -> Solve:
        """What a method makes of another matrix in the site's place, whose inputs have another moment."""
        gradients = self._moments(site, plan.method).gradients if plan.method == "fisher" else None
        dtype = self._hosts[site.key].parameter(site.name).dtype

        def solve(fitted: Tensor, moment: Tensor) -> Matrix:
            found = WeightedSVD(fitted, moment, gradients).factors(plan.rank or 0)
            storage = plan.storage or "float32"
            return rounded(found.u.to(dtype), storage), rounded(found.v.to(dtype), storage)

        return solve

    def is_alone(self, site: Site) -> bool:
        """Whether no other site has the same parameter."""
        return len(self._tied[self.identity(site)]) == 1

    def _weighted(self, site: Site, method: str) -> WeightedSVD:
        moments = self._moments(site, method)
        gradients = moments.gradients if method == "fisher" else None
        return WeightedSVD(self._hosts[site.key].matrix(site.name), moments.inputs, gradients)

    def _moments(self, site: Site, method: str) -> Moments:
        if self._calibration is None:
            needed = "batches=" if method == "activation" else "batches= and loss="
            raise SlimLSTMError(f"{method!r} has to see data; give compress_ {needed}, or calibration=")
        known = self._calibration.sites
        # Of a shared parameter, what all its sites see counts.
        found = [known[key] for key in self._tied[self.identity(site)] if key in known]
        if not found:
            raise SlimLSTMError(f"no batch reached {site.key}, or no loss depends on it; leave it out with filter=")
        if method == "fisher" and any(moments.gradients is None for moments in found):
            raise SlimLSTMError("'fisher' needs a loss, which the calibration had not; calibrate with loss=")
        return Moments.together(found)


def _without_spectra(config: LowRank | Prune | Quantize | Plan) -> LowRank | Prune | Quantize | Plan:
    if isinstance(config, LowRank) and config.needs_spectra:
        return dataclasses.replace(config, rank=1, keep=None, bytes=None, energy=None, allocation=None)
    return config


def _solve(
    plan: Plan, chosen: list[tuple[Host, Site]], spectra: _Spectra, progress: Progress | None
) -> dict[str, Compressed]:
    results: dict[str, Compressed] = {}
    shared: dict[tuple[int, SitePlan], Compressed] = {}
    for index, (host, site) in enumerate(chosen):

        def on_fraction(fraction: float, index: int = index, key: str = site.key) -> None:
            if progress is not None:
                progress(key, (index + fraction) / len(chosen))

        on_fraction(0.0)
        action = plan.sites[site.key]
        known = (host.identity(site.name), action)
        if known not in shared:
            try:
                weighted = partial(spectra.weighted, site, action.method)
                shared[known] = compress_matrix(host.weight(site.name), action, on_fraction, weighted)
                if action.storage is not None:
                    _check_storable(host, site.name)
            except SlimLSTMError as error:
                raise SlimLSTMError(f"{site.key}: {error}") from error
        results[site.key] = shared[known]
        for parameter in (*(results[site.key].factors or ()), results[site.key].weight):
            if parameter is not None:
                parameter.requires_grad_(host.is_trained(site.name))
        on_fraction(1.0)
    return results


def _fit_again(
    model: nn.Module,
    hosts: list[Host],
    plan: Plan,
    results: dict[str, Compressed],
    spectra: _Spectra,
    batches: Iterable[Any] | None,
    loss: Loss | None,
    passes: int | None,
) -> str:
    """Replaces results of calibrated methods by such as are fitted again, and says what was done."""
    sites = {site.key: (host, site) for host in hosts if host.problem is None for site in host.sites()}
    solvers = {
        key: spectra.solver(site, plan.sites[key])
        for key, (_, site) in sites.items()
        if key in results and plan.sites[key].method in WEIGHTED and results[key].factors and spectra.is_alone(site)
    }
    best, fitted, problem = 0, dict[str, Matrix](), ""
    if batches is None:
        problem = "that takes batches that can be gone through more than once"
    elif not solvers:
        problem = "no matrix of its own was factored by a method that is calibrated"
    else:
        weights = {
            key: results[key].stands_for(host.matrix(site.name)) for key, (host, site) in sites.items() if key in results
        }
        seen = [host for host in hosts if host.problem is None]
        try:
            best, fitted = refit(model, seen, weights, solvers, batches, loss, passes or PASSES)
        except ControlFlowError as error:
            problem = str(error)
    if problem and passes:
        raise SlimLSTMError(f"factors cannot be fitted again: {problem}; leave refit out, or 0")
    if problem:
        return f"factors were not fitted again to what goes into them now: {problem}"
    if not best:
        return "factors were fitted again to what goes into them now, but lost more then, and stay as they were"
    for key in solvers:
        host, site = sites[key]
        results[key] = _refitted(results[key], fitted[key], host.matrix(site.name), host.is_trained(site.name))
    return f"{len(solvers)} matrices were fitted {best} times again to what goes into them now"


def _refitted(result: Compressed, factors: Matrix, matrix: Tensor, is_trained: bool) -> Compressed:
    u, v = (nn.Parameter(factor, requires_grad=is_trained) for factor in factors)
    error = relative_error(matrix, u.double() @ v.double())
    return dataclasses.replace(result, factors=(u, v), relative_error=error)


def _check_storable(host: Host, name: str) -> None:
    """Raises :class:`SlimLSTMError` where a projection cannot be rounded, or what is rounded would not be what is used."""
    projection = host.projection(name)
    if projection is not None:
        check_matrix(projection)
    if isinstance(host.lstm, FactoredModule):
        computed = [part for part in host.lstm.stored_parts(name) if host.is_computed(part)]
        if computed:
            raise SlimLSTMError(f"{', '.join(computed)} is parametrized; remove the parametrization first")


def site_report(
    site: Site, plan: SitePlan, result: Compressed, itemsize: int, predicted: float | None = None
) -> SiteReport:
    """What ``result`` means for a site whose numbers take ``itemsize`` bytes each."""
    m, n = site.shape
    rank = result.factors[0].shape[1] if result.factors is not None else site.rank
    after = site.parameters if rank is None else rank * (m + n)
    if result.mask is not None:
        after = int(result.mask.sum())
    storage = plan.storage_of(site)
    return SiteReport(
        key=site.key,
        shape=site.shape,
        method=plan.method,
        rank=rank,
        break_even_rank=break_even_rank(site.shape),
        parameters_before=site.parameters,
        parameters_after=after,
        bytes_before=matrix_bytes(site.shape, site.rank, site.storage, itemsize),
        bytes_after=matrix_bytes(site.shape, rank, storage, itemsize),
        relative_error=result.relative_error,
        iterations=result.iterations,
        converged=result.converged,
        note=plan.note,
        storage=storage,
        predicted_rise=predicted,
    )
