"""The end of an adaptive Runge–Kutta step: solution, error, norm, decision, commit and dense output of every row."""

from __future__ import annotations

import torch

from .. import _registration
from .runge_kutta_stage import state_time_dtype

# Rows of `control` (float64) and of `counters` (int32): one number a sample, or one for all.
T, T_NEXT, END, ERROR, OLDER_ERROR, T_PREVIOUS, RATIO = range(7)
CONTROL = 7
STATUS, ACCEPTED, REJECTED, CURSOR, AFTER_REJECTION, RUNNING = range(6)
COUNTERS = 6  # RUNNING's first element counts the samples still running
RUNNING_STATUS, DONE, MAX_STEPS, UNDERFLOW, NON_FINITE = -1, 0, 1, 2, 3

# Entries of `settings` (float64).
(
    SAFETY,
    MIN_FACTOR,
    MAX_FACTOR,
    BETA1,
    BETA2,
    BETA3,
    ACCEPTED_FLOOR,
    AFTER_REJECTION_CAP,
    MIN_STEP,
    MAX_STEP,
    CLIP,
    STEP_LIMIT,
    ACCEPT_AT_MIN_STEP,
    SNAP,
) = range(14)
SETTINGS = 14

SMALLEST_RATIO = 2.0**-33  # an error of zero counts as this one in powers; float32 holds it
SNAP_ULPS = 16 * 2.0**-52
UNDERFLOW_SPAN = 2.0**-100

SCHEMA = (
    "_runge_kutta_step_(Tensor(a!) y, Tensor(b!) k_first, Tensor[] k, Tensor(c!) control, Tensor(d!) counters, "
    "Tensor weights, Tensor settings, Tensor rtol, Tensor atol, Tensor segments, int components, Tensor? ratio, "
    "Tensor? t_eval, Tensor(e!)? solution) -> ()"
)


def step_reference(
    y, k_first, k, control, counters, weights, settings, rtol, atol, segments, components, ratio, t_eval, solution
):  # fmt: skip
    r"""Ends a step of every running sample, in place.

    With h = t_next − t and k_1 = ``k_first``, (k_2, …) = ``k``: y₁ = y + h Σ b_j k_j, e = h Σ e_j k_j, and the error
    ratio r = max over segments of RMS(e / (atol + rtol·max(|y|, |y₁|))). A non-finite r, y₁ or last k counts as r = ∞
    and clears the history. A step with r ≤ 1 is accepted: y ← y₁, k_1 ← the last k, t ← t_next, and ``solution``
    receives y + h Σ_j k_j Σ_p P_pj θᵖ, θ = (t_eval − t)/h, at each t_eval in (t, t_next]. The next step size is
    h·clip(safety · r^(−β1) · r₋₁^(−β2) · r₋₂^(−β3)), with r₋₁, r₋₂ those of the last accepted steps.

    Args:
        y, k_first: the state ``[B, …]`` (any shape where ``control`` is 1-D: one step size for all of it) and f there.
        k: the other values of f that ``weights`` uses; the last is f at the end of the step.
        control, counters: float64 ``[CONTROL]`` or ``[CONTROL, B]``, int32 alike: the state of step control.
        weights: float64 ``[2 + degree, 1 + len(k)]``: b, e, and P_p for p = 1 … degree.
        settings: float64 ``[SETTINGS]``.
        rtol, atol: float64 ``[1 or B, 1 or D]``, D elements of a row (complex numbers count once).
        segments: int64 ``[S, 2]``: first and last-but-one column of each part of a row that has a norm of its own.
        components: 2 where pairs of columns are complex numbers, else 1.
        ratio: error ratios ``[]`` or ``[B]`` to decide by, instead of those computed.
        t_eval, solution: float64 ``[M]`` or ``[B, M]``, NaN where a row has fewer; ``[B, M, …]`` (``[M, …]`` where
            control is 1-D) in the dtype of y, written at CURSOR and after.
    """
    compute = state_time_dtype(y)
    single = control.dim() == 1
    B = 1 if single else control.shape[1]
    columns = y.numel() // max(B, 1)
    state = y.reshape(B, columns).to(compute)
    ks = [k_j.reshape(B, columns).to(compute) for k_j in (k_first, *k)]
    ctl, cnt = control.reshape(CONTROL, B), counters.reshape(COUNTERS, B)
    t, t_next, end, error, older = ctl[T], ctl[T_NEXT], ctl[END], ctl[ERROR], ctl[OLDER_ERROR]
    running = cnt[STATUS] == RUNNING_STATUS
    h = t_next - t
    direction = torch.sign(end - t)

    def combination(row_weights):  # [terms] or [B, terms]
        return sum((h.unsqueeze(-1) * row_weights)[:, j : j + 1].to(compute) * k_j for j, k_j in enumerate(ks))

    y1 = state + combination(weights[0])
    if ratio is None:
        ratio = _error_ratio(combination(weights[1]), state, y1, rtol, atol, segments, components)
    ratio = ratio.to(torch.float64).reshape(-1).expand(B)
    finite = ratio.isfinite() & y1.isfinite().all(-1) & ks[-1].isfinite().all(-1)
    ratio = torch.where(finite, ratio, torch.inf)
    rounding = SNAP_ULPS * t.abs().maximum(t_next.abs())  # of t_next
    at_min = (h.abs() - rounding <= settings[MIN_STEP]) & (settings[MIN_STEP] > 0)
    accepted = running & finite & ((ratio <= 1) | (at_min & (settings[ACCEPT_AT_MIN_STEP] > 0)))
    rejected = running & ~accepted

    small = ratio.clamp_min(SMALLEST_RATIO)
    factor = settings[SAFETY] * small ** -settings[BETA1] * error ** -settings[BETA2] * older ** -settings[BETA3]
    factor = torch.where(finite, factor, settings[MIN_FACTOR])
    low = torch.where(accepted & (ratio < 1), settings[ACCEPTED_FLOOR], settings[MIN_FACTOR])
    capped = torch.where(cnt[AFTER_REJECTION] > 0, settings[AFTER_REJECTION_CAP], settings[MAX_FACTOR])
    high = torch.where(accepted, capped, settings[SAFETY].maximum(settings[MIN_FACTOR]))
    size = (h.abs() * factor.maximum(low).minimum(high)).maximum(settings[MIN_STEP]).minimum(settings[MAX_STEP])

    now = torch.where(accepted, t_next, t)
    done = accepted & ((end - now) * direction <= 0)
    following = now + direction * size
    left = (end - following) * direction
    snap = SNAP_ULPS * now.abs().maximum(end.abs()) + settings[SNAP] * size
    following = torch.where((settings[CLIP] > 0) & (left <= snap), end, following)
    attempts = cnt[ACCEPTED] + cnt[REJECTED] + 1
    stuck = (following == now) | (size <= UNDERFLOW_SPAN * (end - now).abs())
    stuck = stuck | (rejected & (at_min | (following == t_next)))  # the step that was rejected, again
    status = torch.where(attempts >= settings[STEP_LIMIT], MAX_STEPS, RUNNING_STATUS)
    status = torch.where(stuck, torch.where(finite, UNDERFLOW, NON_FINITE), status)
    status = torch.where(done, DONE, status)

    if t_eval is not None:
        _dense_output(combination, state, y1, weights, cnt[CURSOR], t, t_next, h, direction, accepted, t_eval, solution)

    moved = accepted.unsqueeze(-1)
    y.copy_(torch.where(moved, y1.to(y.dtype), y.reshape(B, columns)).reshape(y.shape))
    k_first.copy_(torch.where(moved, k[-1].reshape(B, columns), k_first.reshape(B, columns)).reshape(y.shape))
    old_error = torch.where(accepted, small, torch.where(running & ~finite, 1.0, error))
    older_error = torch.where(accepted, error, torch.where(running & ~finite, 1.0, older))
    ctl.copy_(
        torch.stack([
            now,
            torch.where(running, torch.where(status == RUNNING_STATUS, following, now), t_next),
            end,
            old_error,
            older_error,
            torch.where(accepted, t, ctl[T_PREVIOUS]),
            torch.where(running, ratio, ctl[RATIO]),
        ])
    )  # fmt: skip
    cnt[STATUS].copy_(torch.where(running, status, cnt[STATUS]))
    cnt[ACCEPTED].add_(accepted)
    cnt[REJECTED].add_(rejected)
    cnt[AFTER_REJECTION].copy_(torch.where(running, rejected, cnt[AFTER_REJECTION]))
    cnt[RUNNING, :1].copy_((cnt[STATUS] == RUNNING_STATUS).sum().reshape(1))


def _error_ratio(e, state, y1, rtol, atol, segments, components):
    """The largest RMS of the scaled error over the segments of each row."""
    pairs = (lambda x: torch.linalg.vector_norm(x.unflatten(-1, (-1, 2)), dim=-1)) if components == 2 else torch.abs
    largest = torch.maximum(pairs(state), pairs(y1))
    squares = (pairs(e) / (atol + rtol * largest).to(e.dtype)).square()
    column = torch.arange(squares.shape[-1], device=e.device)
    inside = (column >= segments[:, :1]) & (column < segments[:, 1:])  # [S, D]
    means = torch.where(inside, squares.unsqueeze(1), 0).sum(-1) / (segments[:, 1] - segments[:, 0])
    return means.sqrt().to(torch.float64).amax(-1)


def _dense_output(combination, state, y1, weights, cursor, t, t_next, h, direction, accepted, t_eval, solution):
    B, M = state.shape[0], t_eval.shape[-1]
    t_eval, out = t_eval.expand(B, M), solution.reshape(B, M, state.shape[1])
    index = torch.arange(M, device=t_eval.device)
    due = accepted.unsqueeze(-1) & (index >= cursor.unsqueeze(-1))
    due = due & ((t_eval - t_next.unsqueeze(-1)) * direction.unsqueeze(-1) <= 0)  # NaN is never due
    theta = (t_eval - t.unsqueeze(-1)) / h.unsqueeze(-1)
    powers = torch.stack([theta**p for p in range(1, weights.shape[0] - 1)], -1)  # [B, M, degree]
    polynomials = powers @ weights[2:]
    values = torch.stack([state + combination(polynomials[:, m]) for m in range(M)], 1) if M else out
    values = torch.where((theta == 1).unsqueeze(-1), y1.unsqueeze(1), values).to(out.dtype)
    solution.copy_(torch.where(due.unsqueeze(-1), values, out).reshape(solution.shape))
    cursor.add_(due.sum(-1))


_registration.define(SCHEMA, step_reference, lambda *arguments: None)

_op = _registration.overload("_runge_kutta_step_")
