"""The scan in Numba: compiled loops, parallel over images and blocks of lines, with gradients.

Lines are lanes: a block of `_LANES` neighbouring lines is carried at once, so that the innermost
loops run over contiguous pixels and are vectorised. Rows are scanned on transposed copies, where
their lines are columns too. Backward reads the four hidden maps that forward kept.
"""

import functools

import numba
import numpy as np
import torch
from numba import njit, prange

from . import Runner

_LANES = 32  # of 16, 32, 64 and 128 the fastest, and twice as quick to compile as 64
_TILE = 32
_HELPER = {"fastmath": True, "error_model": "numpy", "inline": "always"}
# cache: compiled once for this processor, into a file next to this one.
_KERNEL = {"fastmath": True, "error_model": "numpy", "parallel": True, "cache": True}


@njit(**_HELPER)
def _mix(w, h, c, block, start, u):
    """u[l] = start + the sum over k of w[c, k] * h[k0 + k, l]: row c of w h, block by block."""
    k0 = c // block * block
    # Four rows at a time: each pass over u does four multiply-adds for one load and store.
    for q in range(0, block - 3, 4):
        w0, w1, w2, w3 = w[c, q], w[c, q + 1], w[c, q + 2], w[c, q + 3]
        h0, h1, h2, h3 = h[k0 + q], h[k0 + q + 1], h[k0 + q + 2], h[k0 + q + 3]
        if q == 0:
            for lane in range(_LANES):
                u[lane] = start + w0 * h0[lane] + w1 * h1[lane] + w2 * h2[lane] + w3 * h3[lane]
        else:
            for lane in range(_LANES):
                u[lane] += w0 * h0[lane] + w1 * h1[lane] + w2 * h2[lane] + w3 * h3[lane]
    if block < 4:
        for lane in range(_LANES):
            u[lane] = start
    for k in range(block // 4 * 4, block):
        wk, hk = w[c, k], h[k0 + k]
        for lane in range(_LANES):
            u[lane] += wk * hk[lane]


@njit(**_KERNEL)
def _transpose(v, out):
    """out[n, c, j, i] = v[n, c, i, j]."""
    n_, c_, height, width = v.shape
    for plane in prange(n_ * c_):
        a, o = v[plane // c_, plane % c_], out[plane // c_, plane % c_]
        for i0 in range(0, height, _TILE):
            for j0 in range(0, width, _TILE):
                for j in range(j0, min(j0 + _TILE, width)):
                    for i in range(i0, min(i0 + _TILE, height)):
                        o[j, i] = a[i, j]


@njit(**_KERNEL)
def _merge(columns, rows, y):
    """y = the maximum of columns (N, C, H, W) and rows (N, C, W, H)."""
    n_, c_, height, width = y.shape
    for plane in prange(n_ * c_):
        n, c = plane // c_, plane % c_
        a, r, o = columns[n, c], rows[n, c], y[n, c]
        for i0 in range(0, height, _TILE):
            for j0 in range(0, width, _TILE):
                for i in range(i0, min(i0 + _TILE, height)):
                    for j in range(j0, min(j0 + _TILE, width)):
                        o[i, j] = max(a[i, j], r[j, i])


@njit(**_KERNEL)
def _merge_four(columns, rows, y, share):
    """y = the maximum of columns (2, N, C, H, W) and rows (2, N, C, W, H).

    share takes the part of the gradient for each of the directions that attain it.
    """
    n_, c_, height, width = y.shape
    for plane in prange(n_ * c_):
        n, c = plane // c_, plane % c_
        for i0 in range(0, height, _TILE):
            for j0 in range(0, width, _TILE):
                for i in range(i0, min(i0 + _TILE, height)):
                    for j in range(j0, min(j0 + _TILE, width)):
                        h0, h1 = columns[0, n, c, i, j], columns[1, n, c, i, j]
                        h2, h3 = rows[0, n, c, j, i], rows[1, n, c, j, i]
                        best = max(max(h0, h1), max(h2, h3))
                        attained = (h0 == best) + (h1 == best) + (h2 == best) + (h3 == best)
                        y[n, c, i, j] = best
                        share[n, c, i, j] = 1 / attained


@njit(**_KERNEL)
def _add_transposed(dxt, dgt, dx, dg):
    """Add what the rows gave, (N, C, W, H), to dx and dg (N, C, H, W)."""
    n_, c_, height, width = dx.shape
    for plane in prange(n_ * c_):
        n, c = plane // c_, plane % c_
        for i0 in range(0, height, _TILE):
            for j0 in range(0, width, _TILE):
                for i in range(i0, min(i0 + _TILE, height)):
                    for j in range(j0, min(j0 + _TILE, width)):
                        dx[n, c, i, j] += dxt[n, c, j, i]
                        dg[n, c, i, j] += dgt[n, c, j, i]


@functools.lru_cache
def _kernels(channels, block):
    """forward and backward for C = channels and K = block: as constants, half as fast again."""

    @njit(**_KERNEL)
    def forward(x, g, w, b, out, combine):
        """Eq. (3) down and up the columns of x (N, C, T, M); w (2, C, K), b (2, C).

        out (2, N, C, T, M) takes both maps; with `combine`, out (1, N, C, T, M) takes the larger.
        """
        n_, _, t_, m_ = x.shape
        blocks = (m_ + _LANES - 1) // _LANES
        for job in prange(n_ * blocks):
            n, start = job // blocks, job % blocks * _LANES
            size = min(_LANES, m_ - start)
            h, u = np.empty((channels, _LANES), x.dtype), np.empty((channels, _LANES), x.dtype)
            for way in range(2):
                h[:] = 0
                u[:] = 0
                merge = combine and way == 1
                o = out[0 if combine else way, n]
                w_way, b_way = w[way], b[way]
                for s in range(t_):
                    t = t_ - 1 - s if way else s
                    for c in range(channels):
                        row = u[c]
                        _mix(w_way, h, c, block, b_way[c], row)
                        x_t, g_t = (
                            x[n, c, t, start : start + size],
                            g[n, c, t, start : start + size],
                        )
                        o_t = o[c, t, start : start + size]
                        for lane in range(size):
                            row[lane] = x_t[lane] + g_t[lane] * row[lane]
                        if merge:
                            for lane in range(size):
                                o_t[lane] = max(o_t[lane], row[lane])
                        else:
                            for lane in range(size):
                                o_t[lane] = row[lane]
                    h, u = u, h

    @njit(**_KERNEL)
    def backward(x, g, w, wt, b, h, y, xi, dx, dg, dw, db):
        """The adjoint of Eq. (3) for both ways of the columns; xi is the gradient of y, shared out.

        x, g, y, xi, dx, dg (N, C, T, M); h (2, N, C, T, M); wt is w with its blocks transposed;
        dw (jobs, 2, C, K) and db (jobs, 2, C) take one part for each block of lines.
        """
        n_, _, t_, m_ = x.shape
        blocks = (m_ + _LANES - 1) // _LANES
        for job in prange(n_ * blocks):
            n, start = job // blocks, job % blocks * _LANES
            size = min(_LANES, m_ - start)
            e, e_next = np.zeros((channels, _LANES), x.dtype), np.zeros((channels, _LANES), x.dtype)
            before = np.zeros((channels, _LANES), x.dtype)
            u, delta = np.zeros(_LANES, x.dtype), np.zeros(_LANES, x.dtype)
            zero = u[0]
            for way in range(2):
                e_next[:] = 0
                e[:] = 0
                w_way, wt_way, b_way, h_way = w[way], wt[way], b[way], h[way, n]
                dw_way, db_way = dw[job, way], db[job, way]
                dw_way[:] = 0
                db_way[:] = 0
                for s in range(t_):
                    t = s if way else t_ - 1 - s
                    last = s == t_ - 1
                    for c in range(channels):
                        for lane in range(size):
                            before[c, lane] = 0
                        if not last:
                            h_t = h_way[c, t + 1 if way else t - 1, start : start + size]
                            for lane in range(size):
                                before[c, lane] = h_t[lane]
                    for c in range(channels):
                        _mix(wt_way, e_next, c, block, zero, delta)
                        _mix(w_way, before, c, block, b_way[c], u)
                        g_t, dx_t = (
                            g[n, c, t, start : start + size],
                            dx[n, c, t, start : start + size],
                        )
                        h_t, y_t = (
                            h_way[c, t, start : start + size],
                            y[n, c, t, start : start + size],
                        )
                        xi_t, dg_t = (
                            xi[n, c, t, start : start + size],
                            dg[n, c, t, start : start + size],
                        )
                        for lane in range(size):
                            delta[lane] += xi_t[lane] if h_t[lane] == y_t[lane] else zero
                        row = e[c]
                        if way == 0:
                            for lane in range(size):
                                row[lane] = g_t[lane] * delta[lane]
                                dx_t[lane] = delta[lane]
                                dg_t[lane] = delta[lane] * u[lane]
                        else:
                            for lane in range(size):
                                row[lane] = g_t[lane] * delta[lane]
                                dx_t[lane] += delta[lane]
                                dg_t[lane] += delta[lane] * u[lane]
                        total = zero
                        for lane in range(_LANES):
                            total += row[lane]
                        db_way[c] += total
                        for k in range(block):
                            past = before[c // block * block + k]
                            total = zero
                            for lane in range(_LANES):
                                total += row[lane] * past[lane]
                            dw_way[c, k] += total
                    e, e_next = e_next, e

    return forward, backward


def _swap(v):
    """An uninitialised map for the transpose of v (N, C, H, W)."""
    n, c, height, width = v.shape
    return np.empty((n, c, width, height), v.dtype)


def load(shape, inputs):
    if inputs.x.dtype not in (torch.float32, torch.float64):
        return "float32 and float64 only"
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    x, g, w, b = (t.contiguous().numpy() for t in inputs.tensors())
    grad = inputs.grad.contiguous().numpy()
    n, c = x.shape[:2]
    k = w.shape[2]
    wt = np.ascontiguousarray(w.reshape(4, c // k, k, k).swapaxes(2, 3)).reshape(w.shape)
    # Scratch is made once and used by every call: a favour to this peer.
    xt, gt, top = _swap(x), _swap(x), np.empty_like(x)[None]
    side = _swap(x)[None]
    held = {}
    scan, adjoint = _kernels(c, k)

    def forward():
        y = np.empty_like(x)
        _transpose(x, xt)
        _transpose(g, gt)
        scan(xt, gt, w[:2], b[:2], side, True)
        scan(x, g, w[2:], b[2:], top, True)
        _merge(top[0], side[0], y)
        return y

    def forward_and_keep():
        if not held:
            held["rows"] = np.empty((2, *xt.shape), x.dtype)
            held["columns"] = np.empty((2, *x.shape), x.dtype)
            held["share"] = np.empty_like(x)
            for name in ("yt", "xit", "dxt", "dgt"):
                held[name] = _swap(x)
        held["y"] = np.empty_like(x)
        _transpose(x, xt)
        _transpose(g, gt)
        scan(xt, gt, w[:2], b[:2], held["rows"], False)
        scan(x, g, w[2:], b[2:], held["columns"], False)
        _merge_four(held["columns"], held["rows"], held["y"], held["share"])
        return held["y"]

    def backward():
        if not held:
            forward_and_keep()
        y, yt, xit, dxt, dgt = (held[name] for name in ("y", "yt", "xit", "dxt", "dgt"))
        xi = grad * held["share"]
        _transpose(y, yt)
        _transpose(xi, xit)
        dx, dg, dw, db = (np.empty_like(t) for t in (x, g, w, b))
        for axis, maps in enumerate(
            (
                (xt, gt, held["rows"], yt, xit, dxt, dgt),
                (x, g, held["columns"], y, xi, dx, dg),
            )
        ):
            ways = slice(2 * axis, 2 * axis + 2)
            jobs = n * -(-maps[0].shape[3] // _LANES)
            dw_part = np.empty((jobs, 2, c, k), w.dtype)
            db_part = np.empty((jobs, 2, c), b.dtype)
            x_a, g_a, h_a, *rest = maps
            adjoint(x_a, g_a, w[ways], wt[ways], b[ways], h_a, *rest, dw_part, db_part)
            dw[ways], db[ways] = dw_part.sum(0), db_part.sum(0)
        _add_transposed(dxt, dgt, dx, dg)
        return dx, dg, dw, db

    def train():
        return forward_and_keep(), backward()

    return Runner(forward, backward, train)
