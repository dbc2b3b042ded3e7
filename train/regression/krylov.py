"""The leading eigenvectors of a large symmetric matrix, by block Lanczos with thick restarts.

The basis Q of a Krylov space grows by a block of vectors at a time, each orthogonalised twice against all before, until
the space holds the k leading eigenvectors (Golub and Underwood 1977; restarts: Wu and Simon 2000). With the Ritz values
theta, descending, and vectors u = Q y from the eigenvectors of T = Q' K Q,

    K Q = Q T + q R E',

where q is the next block and E picks the last block of Q, so that the residual of a Ritz vector is q R E' y.

**When it ends.** Gaps between neighbouring eigenvalues are tiny at the cut, but what counts for a regression is the
span of all k vectors, and whether vector k is mixed with vector k + 1 is decided within the space. Write K in the basis
of the leading Ritz vectors, the others, and the rest of the space, with the residuals R1 of the leading and r_j of the
others (j > k), and let mu be the largest eigenvalue of K on the rest. From the three rows of the eigenvalue equation
follows, for the angle between the span of the k Ritz vectors and that of the k leading eigenvectors,

    sin <= |R1| / (theta_k - mu - s) * sqrt(1 + g),   s = | sum_j r_j r_j' / (theta_k - theta_j) |,
                                                      g = | sum_j r_j r_j' / (theta_k - theta_j)^2 |,

where the gaps come with a product of two residuals (as in Nakatsukasa 2020, Math. Comp. 89). |R1| is a Frobenius norm,
and so is the bound, over all k angles together; the other norms are spectral. It must fall below `TOLERANCE`. mu is
estimated by block Lanczos from random vectors in the rest, which also finds eigenvectors that the space has missed, and
at the end |R1| is measured on random combinations of the vectors, with products of K that the basis has no part in.

Fitted values differ from those with the exact vectors by less than the bound times the norm of the responses, in the
worst case; where the responses do not conspire with the error, predictions differ by a hundredth of the bound or less.

If eigenvalues k and k + 1 are equal to rounding, no criterion holds (their vectors are arbitrary); nor does one within
reasonable work if the spectrum is flat at the cut. Then there is no result, and the caller computes all eigenvectors.

Work: 2.4 k to 4 k products with the matrix, say 6 k n^2 operations, and 36 k^2 n to orthogonalise. Memory of a rank
that holds 1 / ranks of the rows, with m vectors in the basis: 8 m n / ranks bytes, m being at least 1.75 k and at most
3.75 k, and within `memory_bytes` where the former allows it. The main rank also holds T and its eigenvectors, 32 m^2
bytes.
"""

from dataclasses import dataclass

import numpy as np
import torch

from train.regression.decomposition import Decomposition, eigh_on_cpu
from train.regression.precision import aligned
from train.regression.symmetric_rows import SymmetricRows

EPSILON = float(np.finfo(np.float64).eps)
TOLERANCE = 1e-4  # on the sine of the angle to the exact span, Frobenius norm
LEAST_STIMULI = 4096  # below, all eigenvectors take seconds
LARGEST_SHARE = 1 / 5  # of n that the components may be, above which all eigenvectors are cheaper
BLOCKS_PER_COMPONENTS = 16  # blocks of the basis that make k vectors
LEAST_BLOCK = 32  # vectors that the matrix is multiplied with at a time
FIRST_CHECK = 2.4  # times k vectors, when steep spectra have converged
MOST_WORK = 7  # times k vectors, when it is given up
KEPT = 1.25  # times k Ritz vectors that a restart keeps
BASIS = 3.75  # times k vectors, from which a restart
LEAST_BASIS = 1.75
PROBE_BLOCK, PROBE_STEPS = 8, 8  # vectors and steps of the estimate of mu
PROBED = 2 * PROBE_BLOCK  # random combinations whose residual is measured
DECADES_PER_BLOCK = 0.5  # by which the error falls, roughly
ROWS_AT_A_TIME = 4096  # of the basis that are rotated
SEED = 0


def worth_it(size: int, components: int) -> bool:
    """Whether a search for `components` eigenvectors of a matrix of `size` is cheaper than to compute all."""
    return size >= LEAST_STIMULI and components <= size * LARGEST_SHARE


@dataclass(frozen=True)
class LeadingEigen:
    """The leading eigenvalues and eigenvectors.

    Attributes:
        values: float64 (components,), descending, all above the rounding error of the matrix.
        vectors: float64 (rows of this rank, components).
        error: bound on the sine of the angle to the exact span, see above.
        multiplied: vectors that the matrix was multiplied with.
    """

    values: np.ndarray
    vectors: torch.Tensor
    error: float
    multiplied: int


def leading_eigen(
    matrix: SymmetricRows,
    components: int,
    memory_bytes: float,
    rounding: float = 0.0,
    decompose: Decomposition = eigh_on_cpu,
) -> LeadingEigen | None:
    """At most `components` leading eigenvalues and eigenvectors, by all ranks of the matrix together.

    Args:
        matrix: positive semidefinite.
        components: k.
        memory_bytes: for the basis.
        rounding: of the matrix, relative to its largest eigenvalue; components below it are not searched for.
        decompose: computes the eigenvectors of T.

    Returns:
        None where they were not found with less work than all eigenvectors take; the same on every rank.
    """
    return _Search(matrix, components, memory_bytes, rounding, decompose).run()


@dataclass(frozen=True)
class _Ritz:
    """The eigenvectors of T, computed on the main rank.

    Attributes:
        values: theta, float64 (m,), descending.
        vectors: y, float64 (m, m).
        residuals: R E' y, float64 (block, m).
    """

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray

    def error(self, count: int, mu: float, measured: float = 0.0) -> float:
        """The bound on the sine of the angle to the exact span of the `count` leading ones; infinite where there is
        none.

        Args:
            count: k.
            mu: the largest eigenvalue outside of the basis.
            measured: |R1| as it was measured, which is used if it is larger than what T says.
        """
        cut, others = self.values[count - 1], self.residuals[:, count:]
        gaps = cut - self.values[count:]
        if (gaps <= 0).any():
            return np.inf
        coupling = np.linalg.norm((others / gaps) @ others.T, 2) if others.size else 0.0
        mixing = np.linalg.norm((others / gaps**2) @ others.T, 2) if others.size else 0.0
        room = cut - mu - coupling
        residual = max(float(np.linalg.norm(self.residuals[:, :count])), measured)
        return float(residual / room * np.sqrt(1 + mixing)) if room > 0 else np.inf


class _Search:
    """One search; arguments as of `leading_eigen`.

    What decides about the course of the search is computed on the main rank, or comes from there, so that all ranks
    take the same way even where their processors round differently.
    """

    def __init__(
        self,
        matrix: SymmetricRows,
        components: int,
        memory_bytes: float,
        rounding: float,
        decompose: Decomposition,
    ):
        self._matrix, self._components, self._decompose = matrix, components, decompose
        self._floor = max(matrix.size * EPSILON, rounding)
        self._ranks, self._own_rows = matrix.ranks, matrix.own.stop - matrix.own.start
        self._block = max(aligned(-(-components // BLOCKS_PER_COMPONENTS)), LEAST_BLOCK)
        self._generator = np.random.default_rng(SEED)
        self._capacity = self._vectors_in(memory_bytes)
        # Here and in blocks a vector is a row: those so far are one stretch of memory, and products are faster.
        rows = self._capacity + PROBE_BLOCK * PROBE_STEPS
        self._basis = torch.empty(rows, self._own_rows, dtype=torch.float64, device=self._ranks.device)
        self._projected = np.zeros((rows, rows) if self._is_main else (0, 0))  # T
        self._coupling = np.zeros((self._block, self._block))  # R
        self._count = self._multiplied = 0
        self._largest = 0.0  # of the eigenvalues, about

    @property
    def _is_main(self) -> bool:
        return self._ranks.rank == 0

    def _vectors_in(self, memory_bytes: float) -> int:
        """Vectors that the basis may have: as many as the memory holds, within limits."""
        rows_of_rank = -(-self._matrix.size // self._ranks.ranks)
        least, most = (int(times * self._components) + 3 * self._block for times in (LEAST_BASIS, BASIS))
        fitting = int(memory_bytes / (8 * rows_of_rank)) - PROBE_BLOCK * PROBE_STEPS
        return min(max(fitting, least), most)

    def run(self) -> LeadingEigen | None:
        """See `leading_eigen`."""
        limit = min(MOST_WORK * self._components + 8 * self._block, self._matrix.size * 3 // 4)
        next_check, next_if_exhausted = FIRST_CHECK * self._components, 0.0
        block, _ = self._orthonormal(self._random(self._block))
        while self._multiplied < limit:
            if self._count + self._block > self._capacity:
                self._restart(self._ritz())
            block = self._extend(block)
            exhausted = self._is_exhausted() and self._multiplied >= next_if_exhausted
            if self._multiplied < next_check and not exhausted:
                continue
            found = self._result()
            if isinstance(found, LeadingEigen):
                return found
            next_check = self._multiplied + self._block * _blocks_to_go(found)
            next_if_exhausted = 1.5 * self._multiplied
        return None

    # ------------------------------------------------------------------------------------------------------ the basis

    def _extend(self, block: torch.Tensor) -> torch.Tensor:
        """Add a block (block, own rows) to the basis; returns the next."""
        first, self._count = self._count, self._count + self._block
        next_block, coefficients, self._coupling = self._step(block, first)
        if self._is_main:
            self._projected[: self._count, first : self._count] = coefficients
            self._projected[first : self._count, :first] = coefficients[:first].T
        return next_block

    def _step(self, block: torch.Tensor, first: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """Put a block into the basis behind `first` vectors: the next block, the block's column of T, and R."""
        stop = first + len(block)
        self._basis[first:stop] = block
        product = self._multiply(block)
        lengths = self._sum(product.square().sum(1)).sqrt()
        self._largest = max(self._largest, float(lengths.max()))
        coefficients = self._project_out(product, stop)
        next_block, coupling = self._orthonormal(product, self._largest * self._matrix.size * EPSILON)
        coefficients += self._project_out(next_block, stop) @ coupling
        next_block, again = self._orthonormal(next_block)
        return next_block, coefficients, again @ coupling

    def _multiply(self, block: torch.Tensor) -> torch.Tensor:
        """The matrix times the vectors of a block."""
        self._multiplied += len(block)
        return self._matrix.multiply(block.T).T

    def _project_out(self, block: torch.Tensor, count: int) -> np.ndarray:
        """Subtract from a block what lies in the first `count` vectors: float64 (count, block), how much it was."""
        basis = self._basis[:count]
        coefficients = self._ranks.sum(block @ basis.T)
        block.addmm_(coefficients, basis, alpha=-1)
        return coefficients.T.cpu().numpy()

    def _orthonormal(self, block: torch.Tensor, floor: float = 0.0) -> tuple[torch.Tensor, np.ndarray]:
        """Orthonormal vectors Z, and R, with block = Z R if vectors are columns (Stathopoulos and Wu 2002).

        Vectors no longer than `floor` are rounding errors: the space can grow no further that way. Random ones take
        their place, and R is 0 there.
        """
        coupling = np.eye(len(block))
        gram = self._sum(block @ block.T).cpu().numpy()
        gone = gram.diagonal() <= floor**2
        if gone.any():
            block[torch.from_numpy(gone).to(block.device)] = self._random(int(gone.sum()))
            coupling[:, gone] = 0
            gram = self._sum(block @ block.T).cpu().numpy()
        for _ in range(4):
            scale = np.sqrt(gram.diagonal())
            values, vectors = np.linalg.eigh(gram / np.outer(scale, scale))
            roots = np.sqrt(np.maximum(values, len(values) * EPSILON * values[-1]))
            transform = self._agreed(vectors / scale[:, None] / roots)
            block = torch.from_numpy(transform).to(block.device).T @ block
            coupling = (roots[:, None] * vectors.T * scale) @ coupling
            gram = self._sum(block @ block.T).cpu().numpy()
            if np.abs(gram - np.eye(len(gram))).max() < 100 * EPSILON:
                break
        return block, coupling

    def _random(self, count: int) -> torch.Tensor:
        """This rank's rows of random vectors, (count, own rows)."""
        whole = self._generator.standard_normal((count, self._matrix.size))
        return torch.from_numpy(whole[:, self._matrix.own].copy()).to(self._ranks.device)

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._ranks.broadcast(self._ranks.sum(tensor))

    def _agreed(self, array: np.ndarray) -> np.ndarray:
        """The array of the main rank; those of the others have its shape."""
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self._ranks.device)
        return self._ranks.broadcast(tensor).cpu().numpy()

    # ------------------------------------------------------------------------------------------- what the basis holds

    def _is_exhausted(self) -> bool:
        """Whether what lies outside of the basis is no more than rounding errors of the matrix."""
        length = self._agreed(np.array([np.linalg.norm(self._coupling)]))[0]
        return bool(length <= self._floor * self._largest)

    def _ritz(self) -> _Ritz | None:
        """Of the basis, on the main rank."""
        if not self._is_main:
            return None
        projected = self._projected[: self._count, : self._count]
        eigen = self._decompose((projected + projected.T) / 2)
        vectors = eigen.vectors[:, ::-1]
        return _Ritz(eigen.values[::-1].copy(), vectors, self._coupling @ vectors[-self._block :])

    def _restart(self, ritz: _Ritz | None) -> None:
        """Keep only the leading Ritz vectors, in the memory of the basis."""
        kept = min(int(KEPT * self._components) + self._block, self._count)
        vectors = ritz.vectors[:, :kept] if ritz else np.empty((self._count, kept))
        rotation = torch.from_numpy(self._agreed(vectors)).to(self._ranks.device)
        for start in range(0, self._own_rows, ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            self._basis[:kept, rows] = rotation.T @ self._basis[: self._count, rows]
        if ritz:
            self._projected[:] = 0
            np.fill_diagonal(self._projected[:kept, :kept], ritz.values[:kept])
        self._count = kept

    def _result(self) -> LeadingEigen | float:
        """The result if the basis holds it, otherwise its error so far."""
        ritz = self._ritz()
        values = self._agreed(ritz.values if ritz else np.empty(self._count))
        floor = max(values[0], 0) * self._floor
        count = min(self._components, int((values > floor).sum()))
        if not count:
            return np.inf
        # The probe costs products with the matrix, so first with what it would find in a typical spectrum.
        error = self._agreed_error(ritz, count, 0.7 * values[count - 1])
        if error > TOLERANCE:
            return error
        mu = self._largest_outside()
        error = self._agreed_error(ritz, count, mu)
        if error > TOLERANCE:
            return error
        self._restart(ritz)
        error = self._agreed_error(ritz, count, mu, self._measured_residual(values[:count]))
        if error > TOLERANCE:
            return error
        return LeadingEigen(values[:count], self._basis[:count].T, error, self._multiplied)

    def _agreed_error(self, ritz: _Ritz | None, count: int, mu: float, measured: float = 0.0) -> float:
        error = ritz.error(count, mu, measured) if ritz else 0.0
        return float(self._agreed(np.array([error]))[0])

    def _largest_outside(self) -> float:
        """mu: the largest eigenvalue on the rest of the space, with the residual of its Ritz vector added."""
        steps = PROBE_STEPS * PROBE_BLOCK
        block = self._random(PROBE_BLOCK)
        for _ in range(2):
            self._project_out(block, self._count)
            block, _ = self._orthonormal(block)
        projected, coupling = np.zeros((steps, steps)), np.zeros((PROBE_BLOCK, PROBE_BLOCK))
        for first in range(0, steps, PROBE_BLOCK):
            stop = first + PROBE_BLOCK
            block, coefficients, coupling = self._step(block, self._count + first)
            projected[:stop, first:stop] = coefficients[self._count :]
            projected[first:stop, :first] = coefficients[self._count : self._count + first].T
        values, vectors = np.linalg.eigh((projected + projected.T) / 2)
        return float(values[-1] + np.linalg.norm(coupling @ vectors[-PROBE_BLOCK:, -1]))

    def _measured_residual(self, values: np.ndarray) -> float:
        """|R1| of the leading vectors in the basis, from random combinations of them."""
        vectors, device = self._basis[: len(values)], self._ranks.device
        weights = torch.from_numpy(self._generator.standard_normal((PROBED, len(values)))).to(device)
        residual = self._multiply(weights @ vectors) - (weights * torch.from_numpy(values).to(device)) @ vectors
        return float((self._sum(residual.square().sum()) / PROBED).sqrt())


def _blocks_to_go(error: float) -> int:
    """After how many blocks to look again."""
    if not np.isfinite(error):
        return BLOCKS_PER_COMPONENTS // 2
    return max(int(np.ceil(np.log10(error / TOLERANCE) / DECADES_PER_BLOCK)), 1)
