"""The statistics of a source's sites: moments, spectra and predicted losses, each computed once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import cache

from torch import Tensor

from slimlstm.calibration.moments import Calibration, Moments
from slimlstm.errors import SlimLSTMError
from slimlstm.methods import METHODS, MatrixProblem, Needs, Replacement, Rounder
from slimlstm.methods.feedback import inverse_factor
from slimlstm.modules.sites import Site
from slimlstm.ops.weights import rebuilt
from slimlstm.pipeline.source import Source


class SiteStatistics:
    """The problems that a source's sites pose to a method, and their spectra.

    Args:
        source: holds the matrices.
        calibration: the moments by site key, or None.
        method: the method whose losses :meth:`losses` returns; ``"dense"`` where no rank depends on them.

    Raises:
        SlimLSTMError: the calibration belongs to matrices of other shapes.
    """

    def __init__(self, source: Source, calibration: Calibration | None, method: str) -> None:
        self._source = source
        self._calibration = calibration
        self._method = method
        self._sharing: dict[Hashable, list[str]] = {}
        for site in source.sites():
            if site.problem is None:
                self._sharing.setdefault(self.identity(site), []).append(site.key)
                moments = calibration.sites.get(site.key) if calibration is not None else None
                if moments is not None and not moments.fit(site.shape):
                    raise SlimLSTMError(f"{site.key} had another shape when the model was calibrated; calibrate this model")
        self.problem = cache(self._problem)
        self.rounder = cache(self._rounder)
        # Tensors hash by identity; ih and hh of a direction have the same gradients.
        self._factor_of = cache(inverse_factor)

    def identity(self, site: Site) -> Hashable:
        """Return a value that is equal for sites that share one parameter."""
        return self._source.identity(site)

    def itemsize(self, site: Site) -> int:
        """Return the bytes of one number of the site as it is."""
        return self._source.itemsize(site)

    def losses(self, site: Site) -> Tensor:
        """Return [k], the loss of leaving out each direction, largest first, in one unit for all sites.

        Raises:
            SlimLSTMError: the method has no spectrum, or see :meth:`moments`.
        """
        spectrum = METHODS[self._method].spectrum
        if spectrum is None:
            raise SlimLSTMError(f"{self._method} has no spectrum to choose ranks from; give rank or keep")
        try:
            losses = spectrum(self.problem(site, self._method))
            # Moments are means over rows, but one site may see more rows than another.
            is_calibrated = METHODS[self._method].needs > Needs.NOTHING
            return self.moments(site, self._method).rows * losses if is_calibrated else losses
        except SlimLSTMError as error:
            raise SlimLSTMError(f"{site.key}: {error}") from error

    @property
    def predictions(self) -> int:
        """The number of losses that the calibration saw, at least 1."""
        return max(1, self._calibration.predictions) if self._calibration is not None else 1

    def for_method(self, method: str) -> SiteStatistics:
        """Return the statistics of the same source for another method."""
        return self if method == self._method else SiteStatistics(self._source, self._calibration, method)

    def gradients(self, site: Site, method: str) -> Tensor | None:
        """Return the gradients' moment [m, m] where the method needs it, else None."""
        return self.moments(site, method).gradients if METHODS[method].needs >= Needs.GRADIENTS else None

    def moments(self, site: Site, method: str) -> Moments:
        """Return the moments of all sites that share the site's parameter.

        Raises:
            SlimLSTMError: no batch reached the site, or what the method needs was not calibrated.
        """
        needs_gradients = METHODS[method].needs >= Needs.GRADIENTS
        if self._calibration is None:
            needed = "batches= and loss=" if needs_gradients else "batches="
            raise SlimLSTMError(f"{method!r} has to see data; give {needed}, or calibration=")
        found = self.known_moments(site)
        if found is None:
            raise SlimLSTMError(f"no batch reached {site.key}, or no loss depends on it; leave it out with filter=")
        if needs_gradients and found.gradients is None:
            raise SlimLSTMError(f"{method!r} needs gradients, which the calibration does not have; calibrate with loss=")
        return found

    def known_moments(self, site: Site) -> Moments | None:
        """Return the moments of all sites that share the site's parameter, or None where no batch reached them."""
        known = {} if self._calibration is None else self._calibration.sites
        found = [known[key] for key in self._sharing.get(self.identity(site), ()) if key in known]
        return Moments.together(found) if found else None

    def _rounder(self, site: Site) -> Rounder:
        """Return the rounder of the site's matrix or factors, in the metric of its moments where they are known."""
        moments = self.known_moments(site)
        return Rounder() if moments is None else Rounder(moments.inputs, moments.gradients, self._factor_of)

    def scarcity(self, sites: Iterable[Site]) -> str | None:
        """Return a warning where some of these sites' moments come from too few rows, or None.

        Moments from fewer rows than a matrix has directions say nothing about some of the directions.
        """
        few: list[tuple[float, str, int]] = []
        for site in sites:
            moments = self.known_moments(site)
            rows = None if moments is None else moments.rows if moments.effective_rows is None else moments.effective_rows
            if rows is not None and rows < min(site.shape):
                few.append((rows / min(site.shape), f"{site.key} saw {rows:.0f} effective rows", min(site.shape)))
        if not few:
            return None
        _, worst, least = min(few)
        return f"too few batches for {len(few)} matrices: {worst} for {least} directions; calibrate on more or other data"

    def is_shared(self, site: Site) -> bool:
        """Return whether another site has the same parameter."""
        return len(self._sharing[self.identity(site)]) > 1

    def predicted_rise(self, site: Site, replacement: Replacement | None) -> float | None:
        """Return the predicted rise of the mean loss; None where the calibration cannot predict it."""
        found = self._calibration
        if found is None or not found.is_scaled or not found.predictions or site.key not in found.sites:
            return None
        if replacement is None:
            return 0.0
        matrix, moments = rebuilt(self._source.weight(site)), found.sites[site.key]
        after = rebuilt(replacement.effective(matrix)).detach()
        return moments.loss_of(matrix.double() - after.double()) * moments.rows / found.predictions

    def _problem(self, site: Site, method: str) -> MatrixProblem:
        matrix, needs = rebuilt(self._source.weight(site)), METHODS[method].needs
        if needs == Needs.NOTHING:
            return MatrixProblem(matrix)
        moments = self.moments(site, method)
        return MatrixProblem(matrix, moments.inputs, moments.gradients if needs >= Needs.GRADIENTS else None)
