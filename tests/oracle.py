"""The oracle: SpQR on one weight in float64 NumPy, written from the arithmetic alone.

It knows nothing of the solver it judges, and is slow on purpose: one column after the other, one
stats block after the other, no blocking, no kernels. What is rounded to fp16 in a checkpoint is
rounded to fp16 here; everything else keeps 53 bits.

`quantize` answers "which codes should come out", `decode` answers "which weight do these buffers
stand for", bit by bit from the diagram in spqr_numba/format/layout.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spqr_numba.config import SpqrConfig
from spqr_numba.format.matrix import SpqrMatrix

FP16_MAX = 65504.0
MOST_ZERO = 2048  # the last of the consecutive integers that fp16 holds


@dataclass
class OracleWeight:
    """A quantized weight. Columns are permuted, except in `weight`."""

    permutation: np.ndarray  # [n]
    codes: np.ndarray  # [m, n]
    scales: np.ndarray  # [m, groups], as decoded from fp16
    zeros: np.ndarray  # [m, groups], as decoded from fp16
    outliers: np.ndarray  # [m, n], 0 where there is none
    is_outlier: np.ndarray  # [m, n]
    weight: np.ndarray  # [m, n], dense + outliers, columns as the layer has them
    threshold: float  # T, inf where no outliers are kept
    inverse_hessian_cholesky: np.ndarray  # U [n, n]


def fp16(x: np.ndarray) -> np.ndarray:
    """x rounded once, to the nearest half-precision number, ties to even; then finite again."""
    return np.clip(x, -FP16_MAX, FP16_MAX).astype(np.float16).astype(np.float64)


# --- The order of the columns, and U


def column_order(weight: np.ndarray, hessian: np.ndarray | None, how: str) -> np.ndarray:
    """The permutation [n]: position -> input column."""
    columns = weight.shape[1]
    if how == "identity":
        return np.arange(columns)
    if how == "act-order":
        return np.argsort(-np.diag(hessian), kind="stable")
    start = 0 if hessian is None else int(np.argmax(np.diag(hessian)))
    return spearman_chain(weight, start)


def spearman_chain(weight: np.ndarray, start: int) -> np.ndarray:
    """From `start`, always on to the unvisited column whose ranks correlate best."""
    ranks = weight.argsort(axis=0, kind="stable").argsort(axis=0)
    centred = 2 * ranks - (len(weight) - 1)  # twice the centred rank: integers, so ties are exact
    similarity = centred.T @ centred  # all columns have one norm: this orders as correlation does
    chain = [start]
    while len(chain) < weight.shape[1]:
        unvisited = [j for j in range(weight.shape[1]) if j not in chain]
        chain.append(max(unvisited, key=lambda j: (similarity[chain[-1], j], -j)))
    return np.array(chain)


def upper_factor(hessian: np.ndarray, damping: float, shrinkage: float = 0.0) -> np.ndarray:
    """U, upper, with U^T U = (H' + damping * mean(diag H))^-1; a dead input's H_jj becomes 1.

    H' is H, but for (1 - shrinkage) times it off the diagonal.
    """
    damped = (1 - shrinkage) * hessian + shrinkage * np.diag(np.diag(hessian))
    dead = np.diag(hessian) == 0
    damped[np.diag_indices_from(damped)] += damping * np.diag(hessian).mean()
    damped[dead, dead] = 1
    return np.linalg.cholesky(np.linalg.inv(damped)).T


# --- The grid of one group


def min_max(
    group: np.ndarray, left_out: np.ndarray, bits: int, round_zero: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zeros [m] of a group [m, width] without what is left out (bool [m, width])."""
    empty = left_out.all(axis=1)
    low = np.where(empty, 0, np.where(left_out, np.inf, group).min(axis=1))
    high = np.where(empty, 0, np.where(left_out, -np.inf, group).max(axis=1))
    maxq = 2**bits - 1
    no_spread = (high == low) | (np.abs(low) * maxq > MOST_ZERO * (high - low))
    largest = np.where(np.abs(high) > np.abs(low), high, low)
    low = np.where(no_spread, np.minimum(largest, 0), low)
    high = np.where(no_spread, np.maximum(largest, 0), high)
    scale = (high - low) / maxq
    zero = np.where(scale == 0, 0, -low / np.where(scale == 0, 1, scale))
    return scale, np.rint(zero) if round_zero else zero


def encode(w: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """The nearest codes of w, 0 where the scale is 0."""
    safe = np.where(scale == 0, 1, scale)
    codes = np.clip(np.rint(w / safe + zero), 0, 2**bits - 1)
    return np.where(scale == 0, 0, codes)


def group_error(
    group: np.ndarray, left_out: np.ndarray, diagonal: np.ndarray, bits: int
) -> np.ndarray:
    """sum ((w - q(w)) / U_jj)^2 [m] of what is not left out, on the grid fitted to just that."""
    scale, zero = (x[:, None] for x in min_max(group, left_out, bits))
    error = (group - scale * (encode(group, scale, zero, bits) - zero)) / diagonal
    return np.where(left_out, 0, error**2).sum(axis=1)


def leave_one_out(group: np.ndarray, diagonal: np.ndarray, bits: int) -> np.ndarray:
    """How much of a group's error each weight costs the others with itself: base - loo_j.

    group [m, width], diagonal [width] = U_jj; result [m, width].
    """
    none = np.zeros(group.shape, bool)
    base = group_error(group, none, diagonal, bits)
    gains = np.empty_like(group)
    for j in range(group.shape[1]):
        only_j = none.copy()
        only_j[:, j] = True
        gains[:, j] = base - group_error(group, only_j, diagonal, bits)
    return gains


def storable(step: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Step and base of one stats block in fp16; the smaller is 0 where it could not matter."""
    step, base = fp16(step), fp16(base)
    if step < abs(base) * 2**-12:  # too unequal for an exact sum in fp32: layout.py
        step *= 0
    elif abs(base) < step * 2**-8:
        base *= 0
    return step, base


def second_level(statistics: np.ndarray, bits: int, block: int) -> np.ndarray:
    """What scales (or zeros) [m] decode to once quantized in blocks of rows."""
    if bits == 16:
        return fp16(statistics)
    decoded = np.empty_like(statistics)
    for start in range(0, len(statistics), block):
        part = statistics[start : start + block]
        step, base = storable((part.max() - part.min()) / (2**bits - 1), part.min())
        codes = np.clip(np.rint((part - base) / step), 0, 2**bits - 1) if step else 0 * part
        decoded[start : start + block] = fp16(codes * step + base)
    return decoded


def fit_group(
    group: np.ndarray,
    candidates: np.ndarray,
    upper: np.ndarray,
    threshold: float,
    config: SpqrConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """The scales and zeros [m] of one group, as the checkpoint will hold them.

    group, candidates [m, width], upper [width, width] = U of its columns.
    """
    scales, zeros = min_max(group, candidates, config.bits, config.round_zero)
    block = config.stats_group_size
    if config.fit == "joint":
        for start in range(0, len(group), block):
            rows = slice(start, start + block)
            scales[rows], zeros[rows] = JointFit(
                group[rows], upper, threshold, scales[rows], zeros[rows], config
            ).run()
        return scales, zeros
    return (
        second_level(scales, config.scale_bits, block),
        second_level(zeros, config.zero_bits, block),
    )


class JointFit:
    """The joint fit (kernels/joint.py) of one group of one stats block: weights [rows, width]."""

    def __init__(
        self,
        weights: np.ndarray,
        upper: np.ndarray,
        threshold: float,
        scales: np.ndarray,
        zeros: np.ndarray,
        config: SpqrConfig,
    ) -> None:
        self.weights, self.threshold, self.bits = weights, threshold, config.bits
        self.upper, self.importance = upper, 1 / np.diag(upper) ** 2
        self.plain = (
            second_level(scales, config.scale_bits, len(scales)),
            second_level(zeros, config.zero_bits, len(zeros)),
        )
        self.codes = np.arange(2**config.scale_bits), np.arange(2**config.zero_bits)
        self.start = tuple(
            storable((part.max() - part.min()) / codes[-1], part.min())
            for part, codes in zip((scales, zeros), self.codes, strict=True)
        )

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zeros [rows] as decoded."""
        levels, (cost, pairs) = self.start, self.choose(self.start)
        for _ in range(3):
            others = self.refit(levels, *pairs)
            other_cost, other_pairs = self.choose(others, around=pairs)
            if not other_cost < cost:
                break
            levels, cost, pairs = others, other_cost, other_pairs
        found = self.decode(levels[0], pairs[0]), self.decode(levels[1], pairs[1])
        return self.plain if self.walk(*self.plain) < self.walk(*found) else found

    def walk(self, scale: np.ndarray, zero: np.ndarray) -> float:
        """The cost with errors propagated among the first 64 columns, those of outliers not."""
        w, cost = self.weights.copy(), 0.0
        for k in range(w.shape[1]):
            error = w[:, k] - scale * (encode(w[:, k], scale, zero, self.bits) - zero)
            term = error**2 * self.importance[k]
            cost += np.minimum(term, self.threshold).sum()
            error = np.where(term > self.threshold, 0, error / self.upper[k, k])
            if k < 64:
                w[:, k + 1 : 64] -= np.outer(error, self.upper[k, k + 1 : 64])
        return cost

    @staticmethod
    def decode(level: tuple[np.ndarray, np.ndarray], codes: np.ndarray) -> np.ndarray:
        return fp16(codes * level[0] + level[1])

    def steps(self, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        """code - zero of every weight [rows, width]."""
        return encode(self.weights, scale[:, None], zero[:, None], self.bits) - zero[:, None]

    def terms(self, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        """((w - w') / U)^2 of every weight [rows, width]."""
        error = self.weights - scale[:, None] * self.steps(scale, zero)
        return error**2 * self.importance

    def choose(
        self, levels: tuple, around: tuple[np.ndarray, np.ndarray] | None = None
    ) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
        """What the cheapest pairs cost together, and their scale codes and zero codes.

        With `around`, among four scale codes by four zero codes: from one below that pair on.
        """
        rows = len(self.weights)
        best = np.full(rows, np.inf)
        chosen = np.zeros((2, rows), int)
        for scale_code in self.codes[0]:
            scale = np.full(rows, self.decode(levels[0], scale_code))
            for zero_code in self.codes[1]:
                zero = np.full(rows, self.decode(levels[1], zero_code))
                cost = np.minimum(self.terms(scale, zero), self.threshold).sum(axis=1)
                better = (cost < best) & (scale >= 0) & self.near((scale_code, zero_code), around)
                best[better] = cost[better]
                chosen[:, better] = [[scale_code], [zero_code]]
        return float(best.sum()), (chosen[0], chosen[1])

    def near(self, pair: tuple[int, int], around: tuple[np.ndarray, np.ndarray] | None) -> Any:
        """Which rows may choose a pair of codes."""
        if around is None:
            return True
        inside: Any = True
        for code, codes, last in zip(pair, self.codes, around, strict=True):
            first = np.clip(last - 1, 0, len(codes) - 4)
            inside &= (first <= code) & (code < first + 4)
        return inside

    def refit(self, levels: tuple, scale_codes: np.ndarray, zero_codes: np.ndarray) -> tuple:
        """Levels by weighted least squares on what is no outlier, with all codes as they are."""
        scale, zero = self.decode(levels[0], scale_codes), self.decode(levels[1], zero_codes)
        v = np.where(self.terms(scale, zero) > self.threshold, 0, self.importance)
        x = self.steps(scale, zero)
        error = self.weights - scale[:, None] * x
        scales = self.move(levels[0], scale_codes, (v * x**2).sum(1), (v * x * error).sum(1))
        scale = self.decode(scales, scale_codes)
        error = self.weights - scale[:, None] * x
        zeros = self.move(levels[1], zero_codes, scale**2 * v.sum(1), -scale * (v * error).sum(1))
        return scales, zeros

    @staticmethod
    def move(level: tuple, codes: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple:
        """The level that minimises sum_i a_i d_i^2 - 2 b_i d_i, d_i the change at codes_i."""
        if not a.sum() > 0:
            return level
        mean = (a * codes).sum() / a.sum()
        spread = (a * (codes - mean) ** 2).sum()
        step = (b * (codes - mean)).sum() / spread if spread > 1e-3 * (a * codes**2).sum() else 0
        base = b.sum() / a.sum() - mean * step
        return storable(level[0] + step, level[1] + base)


# --- The whole weight


def prepare(
    weight: np.ndarray, hessian: np.ndarray | None, config: SpqrConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The permutation [n], the permuted weight [m, n] without its dead inputs, and U [n, n]."""
    order = column_order(weight, hessian, config.permutation)
    w = weight[:, order].copy()
    if hessian is None:
        return order, w, np.eye(len(order))
    ordered = hessian[np.ix_(order, order)]
    w[:, np.diag(ordered) == 0] = 0
    return order, w, upper_factor(ordered, config.damping, config.shrinkage)


def sensitivity_threshold(w: np.ndarray, diagonal: np.ndarray, config: SpqrConfig) -> float:
    """T; infinite where no outliers are kept, as where nothing varies from row to row."""
    if config.outlier_threshold is None or len(w) == 1:
        return float("inf")
    variance = float((w.var(axis=0, ddof=1) / diagonal**2).mean())
    return config.outlier_threshold * variance if variance > 0 else float("inf")


def quantize(weight: np.ndarray, hessian: np.ndarray | None, config: SpqrConfig) -> OracleWeight:
    """Quantize weight [m, n] with hessian [n, n] (not used where config.use_hessian is False)."""
    weight = np.asarray(weight, np.float64)
    hessian = np.asarray(hessian, np.float64) if config.use_hessian else None
    order, w, u = prepare(weight, hessian, config)
    diagonal = np.diag(u)
    threshold = sensitivity_threshold(w, diagonal, config)

    (m, n), width = w.shape, config.group_size or w.shape[1]
    scales, zeros = np.zeros((2, m, -(-n // width)))
    codes, outliers, decoded = np.zeros((3, m, n))
    is_outlier = np.zeros((m, n), bool)
    for j in range(n):
        g = j // width
        if j % width == 0:
            group, candidates = w[:, j : j + width], np.zeros((m, min(width, n - j)), bool)
            if config.outlier_search == "leave-one-out" and threshold < float("inf"):
                gains = leave_one_out(group, diagonal[j : j + width], config.bits)
                candidates = gains > threshold
            here = slice(j, j + width)
            scales[:, g], zeros[:, g] = fit_group(
                group, candidates, u[here, here], threshold, config
            )
        codes[:, j] = encode(w[:, j], scales[:, g], zeros[:, g], config.bits)
        dense = scales[:, g] * (codes[:, j] - zeros[:, g])
        is_outlier[:, j] = ((w[:, j] - dense) / diagonal[j]) ** 2 > threshold
        outliers[:, j] = np.where(is_outlier[:, j], fp16(w[:, j] - dense), 0)
        decoded[:, j] = dense + outliers[:, j]
        error = (w[:, j] - decoded[:, j]) / diagonal[j]
        w[:, j + 1 :] -= np.outer(error, u[j, j + 1 :])

    restored = np.empty_like(decoded)
    restored[:, order] = decoded
    return OracleWeight(
        order, codes.astype(int), scales, zeros, outliers, is_outlier, restored, threshold, u
    )


def layer_loss(weight: np.ndarray, quantized: np.ndarray, hessian: np.ndarray) -> float:
    """tr((W - W_hat) H (W - W_hat)^T)."""
    error = np.asarray(weight, np.float64) - np.asarray(quantized, np.float64)
    return float(np.einsum("ij,jk,ik->", error, np.asarray(hessian, np.float64), error))


# --- The format


@dataclass
class Decoded:
    """What the buffers of one SpqrMatrix say. Columns are permuted, except in `weight`."""

    permutation: np.ndarray  # [n]
    codes: np.ndarray  # [m, n]
    scales: np.ndarray  # [m, groups]
    zeros: np.ndarray  # [m, groups]
    outliers: np.ndarray  # [m, n], 0 where there is none
    is_outlier: np.ndarray  # [m, n]
    weight: np.ndarray  # fp32 [m, n], columns as the layer has them


def write_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Words int32 [ceil(count/32), bits, lanes] of codes [count, lanes]: undoes `read_codes`."""
    count, lanes = codes.shape
    words = np.zeros((-(-count // 32), bits, lanes), np.uint32)
    for chunk in range(len(words)):
        for lane in range(lanes):
            part = codes[chunk * 32 : chunk * 32 + 32, lane]
            number = sum(int(q) << (k * bits) for k, q in enumerate(part))
            words[chunk, :, lane] = [number >> (32 * i) & 0xFFFFFFFF for i in range(bits)]
    return words.view(np.int32)


def read_codes(words: np.ndarray, count: int) -> np.ndarray:
    """Codes [count, lanes] from words [ceil(count/32), bits, lanes], one Python integer a chunk."""
    chunks, bits, lanes = words.shape
    codes = np.zeros((chunks * 32, lanes), int)
    for chunk in range(chunks):
        for lane in range(lanes):
            number = sum((int(words[chunk, i, lane]) & 0xFFFFFFFF) << (32 * i) for i in range(bits))
            for k in range(32):
                codes[chunk * 32 + k, lane] = number >> (k * bits) & (2**bits - 1)
    assert not codes[count:].any(), "the padding of a last chunk must be zeros"
    return codes[:count]


def write_statistics(codes: np.ndarray, bits: int) -> np.ndarray:
    """Words int32 [groups, ceil(m/32), bits] of scale or zero codes [m, groups]."""
    return np.ascontiguousarray(write_codes(codes, bits).transpose(2, 0, 1))


def read_statistics(matrix: SpqrMatrix, name: str) -> np.ndarray:
    """Scales or zeros [m, groups]."""
    tensors = {k: v.cpu().numpy() for k, v in matrix.tensors.items()}
    if f"{name}s" in tensors:
        return tensors[f"{name}s"].T.astype(np.float64)
    words = tensors[f"{name}_codes"].transpose(1, 2, 0)  # [ceil(m/32), bits, groups]
    codes = read_codes(words, matrix.spec.out_features)  # [m, groups]
    block = np.arange(matrix.spec.out_features) // matrix.spec.stats_group_size
    step = tensors[f"{name}_scale"].T.astype(np.float64)[block]
    base = tensors[f"{name}_zero"].T.astype(np.float64)[block]
    return (codes * step + base).astype(np.float32).astype(np.float16).astype(np.float64)


def read_outliers(matrix: SpqrMatrix) -> tuple[np.ndarray, np.ndarray]:
    """The sparse part as (values [m, n], which are stored [m, n])."""
    shape = matrix.spec.out_features, matrix.spec.in_features
    values, stored = np.zeros(shape), np.zeros(shape, bool)
    if matrix.outliers is None:
        return values, stored
    offsets = matrix["outlier_row_offsets"].tolist()
    columns = matrix["outlier_columns"].tolist()
    for row in range(shape[0]):
        for k in range(offsets[row], offsets[row + 1]):
            assert not stored[row, columns[k]], "one weight cannot be an outlier twice"
            stored[row, columns[k]] = True
            values[row, columns[k]] = float(matrix["outlier_values"][k])
    return values, stored


def decode(matrix: SpqrMatrix) -> Decoded:
    """Every number that the buffers of `matrix` stand for; the weight to the last fp32 rounding."""
    spec = matrix.spec
    codes = read_codes(matrix["codes"].cpu().numpy(), spec.in_features).T
    scales, zeros = read_statistics(matrix, "scale"), read_statistics(matrix, "zero")
    outliers, is_outlier = read_outliers(matrix)
    order = np.arange(spec.in_features)
    if "permutation" in matrix.tensors:
        order = np.array(matrix["permutation"].tolist())
    group = np.arange(spec.in_features) // spec.group_size
    steps = codes.astype(np.float32) - zeros.astype(np.float32)[:, group]
    dense = scales.astype(np.float32)[:, group] * steps
    weight = np.empty(dense.shape, np.float32)
    weight[:, order] = dense + outliers.astype(np.float32)
    return Decoded(order, codes, scales, zeros, outliers, is_outlier, weight)


# --- The product


def matmul(x: torch.Tensor, weight: np.ndarray, bias: torch.Tensor | None = None) -> np.ndarray:
    """x [..., n] @ weight[m, n]^T + bias in float64."""
    product = x.double().cpu().numpy() @ np.asarray(weight, np.float64).T
    return product if bias is None else product + bias.double().cpu().numpy()


def matmul_bound(
    x: torch.Tensor,
    matrix: SpqrMatrix,
    bias: torch.Tensor | None = None,
    weights: torch.dtype = torch.float32,
) -> np.ndarray:
    """Elementwise: how far from `matmul` a correct kernel with fp32 sums may end.

    The n roundings of a sum of n products in fp32 are each at most eps32 / 2 times the sum of the
    magnitudes, and as good as independent: four standard deviations are 2 sqrt(n) eps32 times it
    (Higham and Mary, 2019). A kernel may apply scale and zero to the sums of a group instead of
    to each weight, so the magnitudes are those of |x| scale code, |x| scale zero and |x| outlier.
    The result is rounded once more, to the dtype of x. Where the weights are of another dtype than
    fp32, each of these parts of one is rounded to it, which adds up as independent errors do.
    """
    parts = decode(matrix)
    group = np.arange(matrix.spec.in_features) // matrix.spec.group_size
    steps = parts.codes + np.abs(parts.zeros)[:, group]
    magnitude = np.empty(steps.shape)
    magnitude[:, parts.permutation] = parts.scales[:, group] * steps + np.abs(parts.outliers)
    size = matmul(x.abs(), magnitude, None if bias is None else bias.abs())
    accumulation = 2 * (matrix.spec.in_features + 16) ** 0.5 * np.finfo(np.float32).eps * size
    if weights != torch.float32:
        accumulation += 2 * torch.finfo(weights).eps * matmul(x.double() ** 2, magnitude**2) ** 0.5
    result = np.abs(matmul(x, parts.weight, bias)) + accumulation
    rounding = torch.finfo(x.dtype).eps * result + torch.finfo(x.dtype).smallest_normal
    return accumulation + rounding
