"""The fused matching loss: target, residual, loss and its gradient in one pass over the prediction."""

from __future__ import annotations

import math

import torch

from .. import _checks, _registration
from ..objectives import REDUCTIONS, RHOS, TERM_X0, TERM_X1, TERM_Z, PseudoHuber
from .noise import STREAMS

__all__ = ["matching_loss"]

NONE, SUM, MEAN = REDUCTIONS["none"], REDUCTIONS["sum"], REDUCTIONS["mean"]


def matching_loss(
    prediction: torch.Tensor,
    x1: torch.Tensor,
    table: torch.Tensor,
    x0: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
    *,
    terms: int = TERM_X1 | TERM_X0,
    weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
    rho: str | PseudoHuber = "square",
    first_row: int = 0,
) -> torch.Tensor:
    r"""w·ρ(r) with r = p·prediction + a·x1 + b·x0 + c·z, its coefficients (p, a, b, c, w) read from ``table``.

    With m the mask and w multiplied by ``weight``: "none" gives w·Σmρ/Σm of each row in t's shape, "sum" Σwmρ, "mean"
    Σwmρ/Σm; an empty row or an empty selection gives 0. Sums are taken in a fixed order: the same inputs give the
    same bits.

    Args:
        prediction: the network's output, of x1's shape; its dtype may differ from x1's (autocast).
        x1: the data; not read where ``terms`` lacks it, but drawn noise has its dtype.
        table: ``[*t.shape, 6]`` of :func:`fmkernels.ops.sample_path`, float32 or float64.
        x0, z: the noises; None draws them again from ``key`` where ``terms`` has them.
        key: int64 ``[1]``, that of the path; needed where a noise is drawn again.
        terms: bits of the tensors that enter the residual: 1 x1, 2 x0, 4 z.
        weight: per-row weights, broadcastable to t's shape; multiplied outside ρ.
        mask: bool, broadcastable to the prediction's shape; elements where it is False are left out.
        reduction: "mean", "sum" or "none".
        rho: "square" r², "absolute" |r|, "pseudo_huber" or :class:`fmkernels.PseudoHuber` √(r² + k²) − k.
        first_row: global index of row 0, in rows of t.

    Returns: float32, or float64 where prediction, x1 or table is; a scalar, or t's shape for "none".

    Gradients: to the prediction by the fused kernel, ∂/∂prediction = w·p·ρ'(r)·m over the reduction's count; to x1, x0,
    z, table and weight, in forward mode and twice, by the reference formula over the same noise.

    Raises: TypeError, ValueError naming the argument.

    Source: Lipman et al. (2023), equation 9; coefficients as in :mod:`fmkernels.objectives`.
    """
    check(prediction, x1, table, x0, z, key, terms, reduction)
    if isinstance(rho, PseudoHuber):
        kind, k = RHOS["pseudo_huber"], float(rho.k)
    else:
        _checks.choice("rho", rho, RHOS)
        kind, k = RHOS[rho], 1.0
    _checks.count("first_row", first_row)
    return call(prediction, x1, table, x0, z, key, terms, weight, mask, REDUCTIONS[reduction], kind, k, first_row)


def check(prediction, x1, table, x0, z, key, terms, reduction) -> None:
    """Every error a user can make but those of weight and mask, found before any launch."""
    _checks.tensor("x1", x1)
    _checks.floating("x1", x1)
    check_prediction(prediction, x1)
    _checks.tensor("table", table)
    if table.shape[-1:] != (6,) or table.shape[:-1] != x1.shape[: table.dim() - 1]:
        raise ValueError(
            f"table: expected shape [*t.shape, 6] with t.shape a prefix of x1's {list(x1.shape)}, "
            f"got {list(table.shape)}"
        )
    _checks.full_precision("table", table)
    _checks.same_device("table", table, "x1", x1)
    if isinstance(terms, bool) or not isinstance(terms, int) or not 0 <= terms <= 7:
        raise ValueError(f"terms: expected a sum of 1 (x1), 2 (x0) and 4 (z), got {terms!r}")
    for name, value, bit in (("x0", x0, TERM_X0), ("z", z, TERM_Z)):
        if value is not None:
            _checks.tensor(name, value)
            _checks.same_shape(name, value, "x1", x1)
            _checks.same_dtype(name, value, "x1", x1)
            _checks.same_device(name, value, "x1", x1)
        elif terms & bit and key is None:
            raise ValueError(f"key: expected the key of the path, from which {name} is drawn again, got None")
    if key is not None:
        _checks.key("key", key)
        _checks.same_device("key", key, "x1", x1)
    _checks.choice("reduction", reduction, REDUCTIONS)


def check_prediction(prediction, x1) -> None:
    if (
        isinstance(prediction, torch.Tensor)
        and prediction.dtype in _checks.FLOATING
        and prediction.shape == x1.shape
        and prediction.device == x1.device
    ):
        return  # in one step where all is well: this stands before every launch
    _checks.tensor("prediction", prediction)
    _checks.floating("prediction", prediction)
    _checks.same_shape("prediction", prediction, "x1", x1)
    _checks.same_device("prediction", prediction, "x1", x1)


def row_weight(weight, table: torch.Tensor) -> torch.Tensor | None:
    """User weights in t's shape and the table's dtype."""
    if weight is None:
        return None
    _checks.tensor("weight", weight)
    _checks.floating("weight", weight)
    _checks.same_device("weight", weight, "table", table)
    shape = table.shape[:-1]
    if _broadcast(weight.shape, shape) != shape:
        raise ValueError(f"weight: expected a shape that broadcasts to t's {list(shape)}, got {list(weight.shape)}")
    return weight.to(table.dtype).expand(shape).contiguous()


def element_mask(mask, x1: torch.Tensor) -> torch.Tensor | None:
    """The mask with trailing dimensions of size 1 dropped: kernels let each value cover a run of elements."""
    if mask is None:
        return None
    _checks.tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask: expected dtype bool (True keeps an element), got {str(mask.dtype).removeprefix('torch.')}"
        )
    _checks.same_device("mask", mask, "x1", x1)
    if _broadcast(mask.shape, x1.shape) != x1.shape:
        raise ValueError(
            f"mask: expected a shape that broadcasts to the prediction's {list(x1.shape)}, got {list(mask.shape)}; "
            "a mask [B, L] over [B, L, C] is mask[..., None]"
        )
    covered = mask.dim()
    while covered > 0 and mask.dim() == x1.dim() and mask.shape[covered - 1] == 1:
        covered -= 1
    prefix = x1.shape[:covered] if mask.dim() == x1.dim() else x1.shape
    mask = mask.reshape(mask.shape[:covered]) if mask.dim() == x1.dim() else mask
    return mask.expand(prefix).contiguous()


def _broadcast(shape, to):
    try:
        return torch.broadcast_shapes(shape, to)
    except RuntimeError:
        return None


def call(prediction, x1, table, x0, z, key, terms, weight, mask, reduction, kind, k, first_row) -> torch.Tensor:
    """The op call behind the checks; shared by :func:`matching_loss` and ``FlowMatching.loss``."""
    if key is None:
        key = table.new_zeros(1, dtype=torch.int64)
    if weight is not None:
        weight = row_weight(weight, table)
    if mask is not None:
        mask = element_mask(mask, x1)
    arguments = (prediction, x1, x0, z, table, weight, mask, key, first_row, terms, kind, k, reduction)
    if _registration.eager():
        # The Autograd-key kernel costs more than small launches do: where its decision is plain, take it here.
        if _registration.requires_grad(x1, x0, z, table, weight):
            return matching_loss_reference(*arguments)
        if torch.is_grad_enabled() and prediction.requires_grad:
            return MatchingLoss.apply(prediction, arguments)
        return _forward(*arguments, False)[0]
    return _registration.ops.matching_loss(*arguments)


INPUTS = (
    "Tensor prediction, Tensor x1, Tensor? x0, Tensor? z, Tensor table, Tensor? weight, Tensor? mask, Tensor key, "
    "SymInt first_row, int terms, int rho, float rho_k, int reduction"
)
SCHEMA = f"matching_loss({INPUTS}) -> Tensor"
FORWARD_SCHEMA = (
    f"_matching_loss_forward({INPUTS}, bool gradient) -> (Tensor loss, Tensor gradient, Tensor denominator)"
)
SCALE_SCHEMA = "_scale_gradient(Tensor gradient, Tensor scale, Tensor denominator, float factor) -> Tensor"
SCALE_INPLACE_SCHEMA = "_scale_gradient_(Tensor(a!) gradient, Tensor scale, Tensor denominator, float factor) -> ()"


def compute_dtype(*tensors) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _rowwise(coefficient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return coefficient.reshape(coefficient.shape + (1,) * (like.dim() - coefficient.dim()))


def _draw(x1, t_dims, key, first_row, stream):
    rows, columns = math.prod(x1.shape[:t_dims]), math.prod(x1.shape[t_dims:])
    return _registration.ops.noise(key, rows, columns, first_row, stream, 0, 0, x1.dtype).reshape(x1.shape)


def residual(prediction, x1, x0, z, table, mask, key, first_row, terms):
    """r = p·prediction + a·x1 + b·x0 + c·z in the compute dtype, 0 where the mask leaves an element out."""
    compute = compute_dtype(prediction, x1, table)
    p, a, b, c = (_rowwise(column.to(compute), x1) for column in table.unbind(-1)[:4])

    def kept(values):
        # Selected, never multiplied: NaN in an element that is left out stays out, of the gradients to the table too.
        values = values.to(compute)
        return values if mask is None else torch.where(_rowwise(mask, values), values, 0.0)

    r = p * kept(prediction)
    if terms & TERM_X1:
        r = r + a * kept(x1)
    if terms & TERM_X0:
        r = r + b * kept(_draw(x1, table.dim() - 1, key, first_row, STREAMS["x0"]) if x0 is None else x0)
    if terms & TERM_Z:
        r = r + c * kept(_draw(x1, table.dim() - 1, key, first_row, STREAMS["bridge"]) if z is None else z)
    return r, p


def rho_of(kind, k, r):
    if kind == RHOS["absolute"]:
        return r.abs()
    if kind == RHOS["pseudo_huber"]:
        return r.square() / ((r.square() + k * k).sqrt() + k)
    return r.square()


def d_rho_of(kind, k, r):
    if kind == RHOS["absolute"]:
        return r.sign()
    if kind == RHOS["pseudo_huber"]:
        return r / (r.square() + k * k).sqrt()
    return 2 * r


def _row_sums(x, rows_dims):
    return x.sum(dim=tuple(range(rows_dims, x.dim()))) if x.dim() > rows_dims else x


def _reduce(row_loss, row_count, reduction):
    """Row sums of w·m·ρ and of m to the loss; an empty selection gives 0."""
    if reduction == SUM:
        return row_loss.sum()
    if reduction == MEAN:
        row_loss, row_count = row_loss.sum(), row_count.sum()
    return row_loss / row_count.clamp_min(1)


def _row_count(x1, table, mask, compute):
    rows = table.dim() - 1
    if mask is None:
        return torch.full(table.shape[:-1], math.prod(x1.shape[rows:]), dtype=compute, device=x1.device)
    return _row_sums(_rowwise(mask, x1).expand(x1.shape).to(compute), rows)


def matching_loss_reference(prediction, x1, x0, z, table, weight, mask, key, first_row, terms, rho, rho_k, reduction):
    r, _ = residual(prediction, x1, x0, z, table, mask, key, first_row, terms)
    row_loss = _row_sums(rho_of(rho, rho_k, r), table.dim() - 1)  # ρ(0) = 0 where an element is left out
    w = table[..., 4] if weight is None else table[..., 4] * weight
    return _reduce(w.to(r.dtype) * row_loss, _row_count(x1, table, mask, r.dtype), reduction)


def forward_reference(
    prediction, x1, x0, z, table, weight, mask, key, first_row, terms, rho, rho_k, reduction, gradient
):  # fmt: skip
    """The loss, the gradient to the prediction up to a factor, and the count that is still to be divided by.

    The gradient is stored as w·p·ρ'(r)·m, divided by the element count for an unmasked "mean" unless it is float16,
    where the quotient would underflow. ``denominator`` holds Σm: a scalar for a masked "mean", a row each for a masked
    "none"; it is empty where no division is left but by ``factor``.
    """
    arguments = (prediction, x1, x0, z, table, weight, mask, key, first_row, terms, rho, rho_k, reduction)
    loss = matching_loss_reference(*arguments)
    empty = prediction.new_empty(0)
    if not gradient:
        return loss, empty, empty.to(loss.dtype, copy=True)
    r, p = residual(prediction, x1, x0, z, table, mask, key, first_row, terms)
    w = table[..., 4] if weight is None else table[..., 4] * weight
    scaled = _rowwise(w.to(r.dtype), r) * p * d_rho_of(rho, rho_k, r)
    if mask is None and reduction == MEAN and prediction.dtype != torch.float16:
        scaled = scaled * (1 / max(prediction.numel(), 1))
    denominator = torch.empty(0, dtype=loss.dtype, device=loss.device)
    if mask is not None and reduction != SUM:
        count = _row_count(x1, table, mask, loss.dtype)
        denominator = (count if reduction == NONE else count.sum()).clamp_min(1)
    return loss, scaled.to(prediction.dtype).contiguous(), denominator


def gradient_factor(prediction, table, mask, reduction) -> float:
    """What is left to multiply the stored gradient with in the backward, besides scale / denominator."""
    if mask is not None or reduction == SUM:
        return 1.0
    if reduction == NONE:
        return 1 / max(math.prod(prediction.shape[table.dim() - 1 :]), 1)
    return 1 / max(prediction.numel(), 1) if prediction.dtype == torch.float16 else 1.0


def scale_reference(gradient, scale, denominator, factor):
    compute = compute_dtype(gradient, scale)
    scale = scale.to(compute) * factor
    if denominator.numel():
        scale = scale / denominator.to(compute)
    return (gradient.to(compute) * _rowwise(scale, gradient)).to(gradient.dtype).contiguous()


def scale_inplace_reference(gradient, scale, denominator, factor):
    gradient.copy_(scale_reference(gradient, scale, denominator, factor))


def _loss_shape(table, reduction):
    return table.shape[:-1] if reduction == NONE else ()


def matching_loss_fake(prediction, x1, x0, z, table, weight, mask, key, first_row, terms, rho, rho_k, reduction):
    return x1.new_empty(_loss_shape(table, reduction), dtype=compute_dtype(prediction, x1, table))


def forward_fake(
    prediction, x1, x0, z, table, weight, mask, key, first_row, terms, rho, rho_k, reduction, gradient
):  # fmt: skip
    dtype = compute_dtype(prediction, x1, table)
    divides = gradient and mask is not None and reduction != SUM
    return (
        x1.new_empty(_loss_shape(table, reduction), dtype=dtype),
        prediction.new_empty(prediction.shape if gradient else 0),
        x1.new_empty(_loss_shape(table, reduction) if divides else 0, dtype=dtype),
    )


def scale_fake(gradient, scale, denominator, factor):
    return gradient.new_empty(gradient.shape)


class MatchingLoss(torch.autograd.Function):
    """The loss with its gradient computed in the forward and scaled in the backward.

    ``arguments`` are those of the op. Only the prediction is differentiated, so the others come in one tuple, past
    autograd's bookkeeping; x1 and x0 are saved by it, so that overwriting them before a second derivative is noticed.
    """

    @staticmethod
    def forward(ctx, prediction, arguments):
        loss, gradient, denominator = _forward(*arguments, True)
        ctx.save_for_backward(prediction, arguments[1], arguments[2], gradient)
        ctx.denominator, ctx.arguments = denominator, arguments[3:]
        return loss

    @staticmethod
    def backward(ctx, scale):
        prediction, x1, x0, gradient = ctx.saved_tensors
        arguments = ctx.arguments
        if torch.is_grad_enabled():  # create_graph: the formula itself, differentiable again
            return gradient_formula(scale, prediction, x1, x0, *arguments), None
        factor = gradient_factor(prediction, arguments[1], arguments[3], arguments[-1])
        if not _registration.may_write_in_place(gradient, scale):
            return _scale(gradient, scale, ctx.denominator, factor), None
        _scale_inplace(gradient, scale, ctx.denominator, factor)
        return gradient.detach(), None  # detached, so that a leaf keeps it instead of cloning it


def gradient_formula(scale, prediction, x1, x0, z, table, weight, mask, key, first_row, terms, rho, rho_k, reduction):
    """∂loss/∂prediction · scale as a differentiable composition."""
    r, p = residual(prediction, x1, x0, z, table, mask, key, first_row, terms)
    w = table[..., 4] if weight is None else table[..., 4] * weight
    if reduction != SUM:
        count = _row_count(x1, table, mask, r.dtype)
        scale = scale / (count if reduction == NONE else count.sum()).clamp_min(1)
    return (_rowwise(w.to(r.dtype) * scale, r) * p * d_rho_of(rho, rho_k, r)).to(prediction.dtype)


def matching_loss_autograd(prediction, x1, x0, z, table, weight, mask, key, *rest):
    arguments = (prediction, x1, x0, z, table, weight, mask, key, *rest)
    if _registration.transforming() or _registration.requires_grad(x1, x0, z, table, weight):
        return matching_loss_reference(*arguments)
    if _registration.requires_grad(prediction):
        return MatchingLoss.apply(prediction, arguments)
    with _registration.below_autograd():
        return _forward(*arguments, False)[0]


def loss_only(*arguments):
    """The backend kernel of ``matching_loss``: the forward without its gradient."""
    return _forward(*arguments, False)[0]


_registration.define(SCHEMA, matching_loss_reference, matching_loss_fake)
_registration.define(FORWARD_SCHEMA, forward_reference, forward_fake)
_registration.define(SCALE_SCHEMA, scale_reference, scale_fake)
_registration.define(SCALE_INPLACE_SCHEMA, scale_inplace_reference, lambda *arguments: None)
_registration.autograd("matching_loss", matching_loss_autograd)

_forward = _registration.overload("_matching_loss_forward")
_scale = _registration.overload("_scale_gradient")
_scale_inplace = _registration.overload("_scale_gradient_")
