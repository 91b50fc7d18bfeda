"""The operations of `schemas` by the functions of the library: arguments sorted out here, arithmetic there.

A function declines with NotImplemented, before it changes anything, what the library does not do: float64, and matrices whose rows
are not of unit stride where a copy would be large. `ok` is read on the host: these tensors are there.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.kernels.arguments import LION, NESTEROV, RMSPROP, SGD, TYPES, adam_numbers, storable
from lowrank_optim.kernels.compute import row_chunks
from lowrank_optim.kernels.counter_rng import unsigned_key
from lowrank_optim.kernels.cpu import structures
from lowrank_optim.kernels.cpu.arguments import (
    F32,
    NO_ERROR,
    NO_NOISE,
    NO_NORMS,
    NO_NUMBERS,
    NO_PHI,
    NO_ROWS,
    NO_WRITE,
    coding_of,
    columns_of,
    error_of,
    flat,
    has_unit_rows,
    matrices_of,
    no_direction,
    noise_of,
    off,
    pairs_of,
    phi_of,
    room_for_norms,
    rounding_of,
    rows_of,
)
from lowrank_optim.kernels.cpu.code_operations import CodeOperations
from lowrank_optim.kernels.cpu.library import Declined
from lowrank_optim.kernels.cpu.pair_operations import PairOperations
from lowrank_optim.kernels.cpu.sparse_operations import SparseOperations
from lowrank_optim.kernels.cpu.structures import packer
from lowrank_optim.kernels.dispatch import call, for_one
from lowrank_optim.kernels.rounding import WeightError, in_float32
from lowrank_optim.kernels.schemas import CHECKS

pack_adam = packer(structures.AdamArgs)
pack_folded_adam = packer(structures.FoldedAdamArgs)
pack_rule = packer(structures.RuleArgs)
pack_coded_adam = packer(structures.CodedAdamArgs)
pack_update = packer(structures.UpdateArgs)
pack_store = packer(structures.StoreArgs)
pack_norm = packer(structures.NormArgs)
pack_lines = packer(structures.LinesArgs)
pack_gaussian = packer(structures.GaussianArgs)


def operations(ops: "Operations") -> dict[str, Callable[..., Any]]:
    """The kernels by the names of their operations."""
    alone = {name: partial(for_one, function) for name, function in many(ops).items() if name in CHECKS}
    return alone | {name: getattr(ops, name) for name in CHECKS if hasattr(ops, name)}


def many(ops: "Operations") -> dict[str, Callable[..., Any]]:
    """Those that take several tensors in one go (`dispatch.run_many`, `dispatch.norms`), and `dispatch.line_sums`."""
    return {
        "adam_direct_": partial(ops.directions, with_norms=False),
        "adam_direct_with_norms_": partial(ops.directions, with_norms=True),
        "adam_dense_": ops.many_adam_dense_,
        "folded_adam_dense_": ops.many_folded_adam_dense_,
        "coded_adam_direct_": partial(ops.coded_directions, with_norms=False),
        "coded_adam_direct_with_norms_": partial(ops.coded_directions, with_norms=True),
        "coded_adam_dense_": ops.many_coded_adam_dense_,
        "apply_": ops.many_apply_,
        "norm": ops.norms,
        "line_squares": ops.line_squares,
    }


class Operations(PairOperations, SparseOperations, CodeOperations):
    """The operations, with their arguments, on one library; of some only a form for lists of arguments (`many`)."""

    def gaussian_(self, out: Tensor, key: Tensor) -> Declined | None:
        if out.dtype != F32:
            return NotImplemented
        (word,) = key.tolist()
        self.library.call("gaussian", pack_gaussian(out.data_ptr(), out.numel(), unsigned_key(word)))
        return None

    def project_with_norms(self, grad: Tensor, basis: Tensor, right: bool) -> tuple[Tensor, Tensor] | Declined:
        grads, bases = matrices_of(grad), matrices_of(basis.contiguous())
        if not storable(grad) or basis.dtype != F32 or grad.dim() > 3 or not all(map(has_unit_rows, grads)):
            return NotImplemented
        squares = basis.new_empty((*grad.shape[:-2], grad.shape[-2 if right else -1], 1))
        alone = basis.shape[-1] == 1  # one column: product and squares in one pass
        reduced = torch.empty_like(squares) if alone else call("project", grad, basis, right)
        places = zip(grads, bases, matrices_of(reduced), matrices_of(squares), strict=True)
        for g, vector, dots, found in places:
            product = (vector.data_ptr(), dots.data_ptr()) if alone else (0, 0)
            self.library.call("lines", pack_lines(*g.shape, *rows_of(g), right, *product, found.data_ptr()))
        return reduced, squares

    # -------------------------------------------------------------------------------------------------- moments and directions

    def directions(self, calls: Sequence[Sequence[Any]], with_norms: bool) -> list[Any]:
        """`adam_direct_` or `adam_direct_with_norms_` of several gradients in one go."""
        results: list[Any] = []
        rows, copies = [], []
        numbers, last = NO_NUMBERS, None
        norms: tuple[Tensor, ...] = ()
        cols = norms_at = grad_norms_at = 0
        for grad, exp_avg, exp_avg_sq, scalars, ok in calls:
            if grad.dtype != F32 or not (exp_avg.is_contiguous() and exp_avg_sq.is_contiguous()):
                results.append(NotImplemented)
                continue
            if (ok is not None and off(ok)) or (with_norms and not grad.numel()):
                found = no_direction(grad)
                results.append(found if with_norms else found[0])
                continue
            if not grad.is_contiguous():
                grad = grad.contiguous()
                copies.append(grad)  # which must live until the call
            if scalars is not last:  # matrices of one step share them
                numbers, last = adam_numbers(*scalars.tolist()), scalars
            out = torch.empty_like(exp_avg)
            if with_norms:
                norms, cols = room_for_norms(grad), grad.shape[-1]
                norms_at, grad_norms_at = norms[0].data_ptr(), norms[1].data_ptr()
            results.append((out, *norms) if with_norms else out)
            moments = exp_avg.data_ptr(), exp_avg_sq.data_ptr()
            rows.append(
                pack_adam(
                    *(grad.numel(), cols),
                    *(grad.data_ptr(), 0, 0),
                    *moments,
                    out.data_ptr(),
                    *NO_ROWS,
                    *numbers,
                    *NO_WRITE,
                    *(norms_at, grad_norms_at),
                )
            )
        self.library.call_many("adam", rows)
        return results

    def many_adam_dense_(self, calls: Sequence[Sequence[Any]]) -> list[Declined | None]:
        """`adam_dense_` of several parameters in one go."""
        results: list[Any] = []
        rows = []
        numbers, last = NO_NUMBERS, None
        alpha = keep = 0.0
        for weight, grad, exp_avg, exp_avg_sq, scalars, ok, rounding, *errors in calls:
            kinds = TYPES.get(grad.dtype), TYPES.get(weight.dtype)
            error = error_of(weight, errors)
            if None in kinds or error is None or exp_avg.dtype != F32 or exp_avg_sq.dtype != F32:
                results.append(NotImplemented)
                continue
            results.append(None)
            if ok is not None and off(ok):
                continue
            if scalars is not last:  # parameters of one step share them
                *adam, alpha, keep = scalars.tolist()
                numbers, last = adam_numbers(*adam), scalars
            rows.append(
                pack_adam(
                    *(weight.numel(), 0),
                    *(grad.data_ptr(), kinds[0], 0),
                    *(exp_avg.data_ptr(), exp_avg_sq.data_ptr()),
                    0,
                    *(weight.data_ptr(), kinds[1], 0),
                    *numbers,
                    *(keep, alpha),
                    *(NO_NOISE if rounding is None else rounding_of(rounding)),
                    *error,
                    *NO_NORMS,
                )
            )
        self.library.call_many("adam", rows)
        return results

    def many_folded_adam_dense_(self, calls: Sequence[Sequence[Any]]) -> list[Declined | None]:
        """`folded_adam_dense_` of several parameters, one after the other, with nothing of Python's between them."""
        results: list[Any] = []
        packed: list[bytes] = []
        numbers, last = NO_NUMBERS, None
        residual = alpha = keep = 0.0
        for weight, grad, exp_avg, exp_avg_sq, scalars, ok, rounding, fold in calls:
            if not storable(weight, grad) or exp_avg.dtype != F32 or exp_avg_sq.dtype != F32:
                results.append(NotImplemented)
                continue
            results.append(None)
            cols = weight.shape[-1]
            if off(ok) or not weight.numel():
                continue
            if scalars is not last:
                *adam, residual, alpha, keep = scalars.tolist()
                numbers, last = adam_numbers(*adam), scalars
            # Rows of whole blocks are one long row.
            rows, cols = (weight.numel() // cols, cols) if cols % fold else (1, weight.numel())
            packed.append(
                pack_folded_adam(
                    *(rows, cols, fold),
                    *flat(grad),
                    *(exp_avg.data_ptr(), exp_avg_sq.data_ptr()),
                    *flat(weight),
                    *numbers,
                    residual,
                    *(keep, alpha),
                    *rounding_of(rounding),
                    *NO_ERROR,
                )
            )
        for structure in packed:
            self.library.call("folded_adam", structure)
        return results

    def lion_direct_(self, grad: Tensor, exp_avg: Tensor, scalars: Tensor, ok: Tensor | None) -> Tensor | Declined:
        beta1, beta2 = scalars.tolist()
        return self._rule(LION, grad, exp_avg, ok, 1.0 - beta1, 1.0 - beta2)

    def sgd_direct_(
        self, grad: Tensor, exp_avg: Tensor, scalars: Tensor, ok: Tensor | None, nesterov: bool
    ) -> Tensor | Declined:
        return self._rule(NESTEROV if nesterov else SGD, grad, exp_avg, ok, *scalars.tolist())

    def rmsprop_direct_(
        self, grad: Tensor, exp_avg_sq: Tensor, scalars: Tensor, ok: Tensor | None
    ) -> Tensor | Declined:
        alpha, eps = scalars.tolist()
        return self._rule(RMSPROP, grad, exp_avg_sq, ok, alpha, 1.0 - alpha, eps)

    def _rule(self, rule: int, grad: Tensor, moment: Tensor, ok: Tensor | None, *numbers: float) -> Tensor | Declined:
        if grad.dtype != F32 or not moment.is_contiguous():
            return NotImplemented
        if off(ok):
            return torch.zeros_like(grad, memory_format=torch.contiguous_format)
        g, out = grad.contiguous(), torch.empty_like(grad, memory_format=torch.contiguous_format)
        three = (*numbers, 0.0, 0.0)[:3]
        self.library.call("rule", pack_rule(rule, g.numel(), g.data_ptr(), moment.data_ptr(), out.data_ptr(), *three))
        return out

    def coded_directions(self, calls: Sequence[Sequence[Any]], with_norms: bool) -> list[Any]:
        """`coded_adam_direct_` or `coded_adam_direct_with_norms_` of several gradients in one go."""
        results: list[Any] = []
        rows, copies = [], []
        numbers, last = NO_NUMBERS, None
        norms: tuple[Tensor, ...] = ()
        places = NO_NORMS
        for grad, ratio, ratio_scale, root, root_scale, col_scale, scalars, noise, ok, bits, block in calls:
            columns = columns_of(col_scale, grad.shape)
            if grad.dtype != F32 or columns is None:
                results.append(NotImplemented)
                continue
            if grad.numel() == 0 or (ok is not None and off(ok)):
                found = no_direction(grad)
                results.append(found if with_norms else found[0])
                continue
            if scalars is not last:  # matrices of one step share them
                numbers, last = adam_numbers(*scalars.tolist()), scalars
            g, out = grad.contiguous(), torch.empty_like(grad, memory_format=torch.contiguous_format)
            copies.append((g, columns))  # which must live until the call
            if with_norms:
                norms = room_for_norms(grad)
                places = norms[0].data_ptr(), norms[1].data_ptr()
            results.append((out, *norms) if with_norms else out)
            rows.append(
                pack_coded_adam(
                    *coding_of(grad.shape, block, bits, columns),
                    *(g.data_ptr(), 0, 0),
                    *(ratio.data_ptr(), ratio_scale.data_ptr(), root.data_ptr(), root_scale.data_ptr()),
                    out.data_ptr(),
                    *NO_ROWS,
                    *numbers,
                    *NO_WRITE,
                    *noise_of(noise),
                    *places,
                )
            )
        self.library.call_many("coded_adam", rows)
        return results

    def many_coded_adam_dense_(self, calls: Sequence[Sequence[Any]]) -> list[Declined | None]:
        """`coded_adam_dense_` of several parameters in one go."""
        results: list[Any] = []
        rows, copies = [], []
        numbers, last = NO_NUMBERS, None
        alpha = keep = 0.0
        for weight, grad, ratio, ratio_scale, root, root_scale, *more in calls:
            col_scale, scalars, noise, ok, rounding, bits, block, *errors = more
            error = error_of(weight, errors)
            columns = columns_of(col_scale, grad.shape)
            if not storable(weight, grad) or columns is None or error is None:
                results.append(NotImplemented)
                continue
            results.append(None)
            if ok is not None and off(ok):
                continue
            if scalars is not last:  # parameters of one step share them
                *adam, alpha, keep = scalars.tolist()
                numbers, last = adam_numbers(*adam), scalars
            copies.append(columns)  # which must live until the call
            rows.append(
                pack_coded_adam(
                    *coding_of(grad.shape, block, bits, columns),
                    *flat(grad),
                    *(ratio.data_ptr(), ratio_scale.data_ptr(), root.data_ptr(), root_scale.data_ptr()),
                    0,
                    *flat(weight),
                    *numbers,
                    *(keep, alpha),
                    *rounding_of(rounding),
                    *error,
                    *noise_of(noise),
                    *NO_NORMS,
                )
            )
        self.library.call_many("coded_adam", rows)
        return results

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """‖x‖ of contiguous tensors, (count,) float32, summed in float32."""
        found = tensors[0].new_empty(len(tensors), dtype=F32)
        to = found.data_ptr()
        self.library.call_many("norms", [pack_norm(x.numel(), *flat(x), to + 4 * i) for i, x in enumerate(tensors)])
        return found

    def line_squares(self, tensor: Tensor, by_row: bool) -> Tensor | Declined:
        """Σ x² of every row, (…, rows, 1), or column, (…, 1, columns), in float32."""
        matrices = matrices_of(tensor) if 2 <= tensor.dim() <= 3 else []
        if not matrices or not storable(tensor) or not all(map(has_unit_rows, matrices)):
            return NotImplemented
        *batch, rows, cols = tensor.shape
        found = tensor.new_empty((*batch, rows, 1) if by_row else (*batch, 1, cols), dtype=F32)
        for matrix, sums in zip(matrices, matrices_of(found), strict=True):
            self.library.call("lines", pack_lines(rows, cols, *rows_of(matrix), by_row, 0, 0, sums.data_ptr()))
        return found

    # ----------------------------------------------------------------------------------------------------------------- weights

    def many_apply_(self, calls: Sequence[Sequence[Any]]) -> list[Declined | None]:
        """`apply_` of several weights; those without products one after the other, with nothing of Python's between them."""
        waiting: list[tuple[bytes, Any]] = []
        wait, results = partial(self.apply_, later=waiting), []
        for args in calls:
            products = args[1].shape[-1] > 0 or args[9] is not None  # factors, or what is subtracted
            results.append(self.apply_(*args) if products else wait(*args))
        for structure, _ in waiting:
            self.library.call("update", structure)
        return results

    def apply_(
        self,
        weight: Tensor,
        left: Tensor,
        right: Tensor,
        scalars: Tensor,
        keep: Tensor | None,
        ok: Tensor | None,
        rounding: Tensor | None,
        grad: Tensor | None,
        phi: Tensor | None,
        subtract_left: Tensor | None,
        subtract_right: Tensor | None,
        sign: bool,
        error: Tensor | None = None,
        error_low: Tensor | None = None,
        later: list[tuple[bytes, Any]] | None = None,
    ) -> Declined | None:
        """`later` takes structures, beside tensors that they point to, in place of calls of the library."""
        stored = weight.dtype in TYPES and (grad is None or grad.dtype in TYPES)
        if not stored or left.dtype != F32 or right.dtype != F32 or weight.dim() > 3:
            return NotImplemented
        if error is not None:
            return self._apply_in_float32(
                weight,
                WeightError(error, error_low),
                (left, right),
                (scalars, keep, ok, None),
                (grad, phi, subtract_left, subtract_right, sign),
            )
        alpha, number = scalars.tolist()
        factor = number if keep is None else float(keep)
        if weight.dtype == F32 and grad is None:  # the matrix product does it all
            if ok is None or not off(ok):
                multiply_add = weight.addmm_ if weight.dim() == 2 else weight.baddbmm_
                multiply_add(left, right, beta=factor, alpha=-alpha)
            return None
        *_, rows, cols = weight.shape
        weights, grads = matrices_of(weight), matrices_of(grad)
        if not all(has_unit_rows(matrix) for matrix in (*weights, *grads)):
            return NotImplemented
        if off(ok) or weight.numel() == 0:
            return None
        on, key, start, _ = rounding_of(rounding)
        lefts, rights, phis = matrices_of(left), matrices_of(right), matrices_of(phi)
        minuends, subtrahends = matrices_of(subtract_left), matrices_of(subtract_right)
        ranked = left.shape[-1] > 0
        in_place = ranked and weight.dtype == F32  # decay and product in one go, then the residual
        apart = ranked and not in_place
        buffers: list[Tensor] = []  # of the products, made once: fresh memory costs as much as the pass over it
        for i, w in enumerate(weights):
            g, scale = (grads[i], phis[i].contiguous()) if grad is not None else (None, None)
            for chunk in row_chunks(rows, cols) if ranked or minuends else (slice(0, rows),):
                at, part = chunk.start, w[chunk]
                if not buffers:
                    buffers = [left.new_empty(len(part), cols) for _ in range(apart + bool(minuends))]
                product = subtract = None
                if in_place:
                    part.addmm_(lefts[i][chunk], rights[i], beta=factor, alpha=-alpha)
                if apart:
                    product = torch.mm(lefts[i][chunk], rights[i], out=buffers[0][: len(part)])
                if minuends:
                    subtract = torch.mm(minuends[i][chunk], subtrahends[i], out=buffers[-1][: len(part)])
                structure = pack_update(
                    *(len(part), cols),
                    *rows_of(part),
                    *(1.0 if in_place else factor, alpha),
                    *(on, key, start + (i * rows + at) * cols, 0),
                    *NO_ERROR,
                    *rows_of(product),
                    *rows_of(None if g is None else g[chunk]),
                    *rows_of(subtract),
                    sign,
                    *phi_of(scale, at),
                )
                if later is None:
                    self.library.call("update", structure)
                else:
                    later.append((structure, scale))
        return None

    def _apply_in_float32(self, weight: Tensor, error: WeightError, *more: Any) -> Declined | None:
        """`apply_` where weights have errors."""
        if error_of(weight, error) is None or not all(map(has_unit_rows, matrices_of(weight))):
            return NotImplemented

        def copy_(target: Tensor, value: Tensor, *errors: int) -> None:
            matrices = (*target.shape, *rows_of(target), *rows_of(value))
            self.library.call("store", pack_store(*matrices, *NO_NOISE, *errors))

        def load(part: Tensor, own: WeightError) -> Tensor:
            value = torch.empty(part.shape, dtype=F32)
            copy_(value, part, *NO_ERROR, *(error_of(part, own) or NO_ERROR))
            return value

        def store(part: Tensor, own: WeightError, value: Tensor) -> None:
            copy_(part, value, *(error_of(part, own) or NO_ERROR), *NO_ERROR)

        in_float32(self.apply_, load, store, weight, error, *more)
        return None

    def apply_dense_(
        self,
        weight: Tensor,
        direction: Tensor,
        scalars: Tensor,
        keep: Tensor | None,
        ok: Tensor | None,
        rounding: Tensor | None,
        error: Tensor | None = None,
        error_low: Tensor | None = None,
    ) -> Declined | None:
        if not storable(weight) or direction.dtype != F32:
            return NotImplemented
        pairs, errors = pairs_of(weight, direction), error_of(weight, (error, error_low))
        if pairs is None or errors is None:
            return NotImplemented
        if off(ok):
            return None
        alpha, number = scalars.tolist()
        factor = number if keep is None else float(keep)
        on, key, start, _ = rounding_of(rounding)
        for rows, cols, w, w_stride, d, d_stride, first in pairs:
            high, low = (at and at + w.storage_offset() - weight.storage_offset() for at in errors)
            self.library.call(
                "update",
                pack_update(
                    *(rows, cols),
                    *(w.data_ptr(), TYPES[w.dtype], w_stride),
                    *(factor, alpha),
                    *(on, key, start + first, 0),
                    *(high, low),
                    *(d.data_ptr(), 0, d_stride),
                    *NO_ROWS,
                    *NO_ROWS,
                    False,
                    *NO_PHI,
                ),
            )
        return None

    def stochastic_round_(
        self,
        target: Tensor,
        value: Tensor,
        rounding: Tensor | None,
        error: Tensor | None = None,
        error_low: Tensor | None = None,
    ) -> Declined | None:
        # Float32 that is rounded to the grid of bfloat16 is left to the definition.
        if not storable(target) or value.dtype != F32 or (rounding is not None and target.dtype == F32):
            return NotImplemented
        pairs, errors = pairs_of(target, value), error_of(target, (error, error_low))
        if pairs is None or errors is None:
            return NotImplemented
        on, key, start, _ = rounding_of(rounding)
        for rows, cols, t, t_stride, v, v_stride, first in pairs:
            target_rows, value_rows = (t.data_ptr(), TYPES[t.dtype], t_stride), (v.data_ptr(), 0, v_stride)
            noise = (on, key, start + first, 0)
            high, low = (at and at + t.storage_offset() - target.storage_offset() for at in errors)
            self.library.call("store", pack_store(rows, cols, *target_rows, *value_rows, *noise, high, low, *NO_ERROR))
        return None
