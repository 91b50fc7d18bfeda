"""The moments of an update rule in 16, 8 or 4 bits: what is stored, and how it is opened for a step and closed again.

    bits    rules with both moments (Adam)       exp_avg alone (Lion, SGD)     exp_avg_sq alone (RMSprop)
    16      bfloat16, exp_avg to nearest, exp_avg_sq rounded stochastically: to nearest it could not decay
    8, 4    codes of m/√v and √v, see `moments`  signed codes of row blocks    unsigned codes of √v

Codes are stored under the moment's own name, scales under `…_scale`. Other moments (Adafactor's rows and columns), and tensors of
fewer than `MIN_CODED` elements, stay as they are. Arithmetic is done on decoded moments, whatever the storage.

Matrices have a `col_scale` besides, (…, 1, cols): the columns of a projected gradient fall off like singular values, and those of an
embedding differ, too, so that blocks along a row would lose the small ones. It is measured anew 1, 2, 4, 8, … steps after moments
begin or change their basis (`CodedMoments.rescale_`).
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim import kernels
from lowrank_optim.kernels import stochastic_round
from lowrank_optim.kernels.counter_rng import derive_key
from lowrank_optim.quantization.adam_codes import MomentCodes, column_scale, decode_moments, encode_moments
from lowrank_optim.quantization.row_codes import BLOCK, dequantize_rows, quantize_rows, zero_rows

SIGNED = {"exp_avg": True, "exp_avg_sq": False}
"""The moments that can be coded, and whether they have a sign."""

MIN_CODED = 4096
"""Elements from which a tensor's moments are coded; vectors and tiny matrices are not worth the rounding."""


def is_coded(bits: int, numel: int) -> bool:
    """Whether the moments of a parameter are stored in fewer than 32 bits; `numel` is the global size of its (reduced) gradient."""
    return bits < 32 and numel >= MIN_CODED


def row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which a moment is coded: rows long enough to share scales.

    Columns of one element (single entries, rank 1) are coded as rows, and convolutions as matrices of their first dimension.
    """
    if len(shape) > 3:
        return shape[0], torch.Size(shape[1:]).numel()
    return (*shape[:-2], shape[-2]) if len(shape) > 1 and shape[-1] == 1 else shape


def zeros(moments: Mapping[str, Tensor], bits: int, device: torch.device) -> dict[str, Tensor]:
    """Stored form of zero moments of these shapes and types (which may be on the meta device)."""
    stored = {}
    for name, like in moments.items():
        if name not in SIGNED:
            stored[name] = torch.zeros(like.shape, dtype=like.dtype, device=device)
        elif bits == 16:
            stored[name] = torch.zeros(like.shape, dtype=torch.bfloat16, device=device)
        else:
            codes = zero_rows(row_shape(tuple(like.shape)), bits, SIGNED[name], device=device)
            stored[name], stored[f"{name}_scale"] = codes
            if like.dim() in (2, 3) and like.shape[-1] != 1:
                shape = (*like.shape[:-2], 1, like.shape[-1])
                stored["col_scale"] = torch.ones(shape, dtype=torch.float32, device=device)
    return stored


def decode(state: Mapping[str, Tensor], shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The moments in `dtype` and of `shape`; tensors of the state that are not coded are handed on as they are."""
    opened, names = dict(state), SIGNED.keys() & state.keys()
    if bits == 16:
        return opened | {name: state[name].to(dtype) for name in names}
    cols, col_scale = row_shape(shape)[-1], state.get("col_scale")
    if len(names) == 2:
        codes = stored_codes(state)
        for name, value in zip(SIGNED, decode_moments(codes, bits, cols=cols, col_scale=col_scale), strict=True):
            opened[name] = value.to(dtype).view(shape)
        return opened
    for name in names:
        value = dequantize_rows(
            state[name], state[f"{name}_scale"], bits, SIGNED[name], cols=cols, col_scale=col_scale, dtype=dtype
        )
        opened[name] = (value if SIGNED[name] else value.square_()).view(shape)
    return opened


def stored_codes(state: Mapping[str, Tensor]) -> MomentCodes:
    """The codes and scales of both moments, as they stand in the state."""
    return MomentCodes(*(state[f"{name}{part}"] for name in SIGNED for part in ("", "_scale")))


class CodedMoments(Mapping[str, Tensor]):
    """The moments of one parameter during one step: names to tensors, as rules see them.

    A moment is decoded when it is first asked for, and all are coded again by `close`. Adam's fused steps work on the codes
    themselves and decode nothing.

    Args:
        state: of the parameter, as it is stored; modified in place by `close` and by the fused steps.
        shape: of the moments.
        bits: 16, 8 or 4.
        dtype: in which arithmetic is done.
        key: the stream of random numbers of this parameter, the same in every step.
        start: row-major index of the first element in the whole moment, so that the noise does not depend on shards.
    """

    def __init__(
        self, state: dict[str, Tensor], shape: tuple[int, ...], bits: int, dtype: torch.dtype, key: int, start: int = 0
    ) -> None:
        self.state, self.shape, self.bits, self.dtype, self.key, self.start = state, shape, bits, dtype, key, start
        self._open: dict[str, Tensor] | None = None

    def open(self) -> dict[str, Tensor]:
        """Decode now: before `col_scale` changes, for one."""
        if self._open is None:
            self._open = decode(self.state, self.shape, self.bits, self.dtype)
        return self._open

    def __getitem__(self, name: str) -> Tensor:
        return self.open()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)

    def close(self, step: int) -> None:
        """Store what has been opened; `step` is the number of the step."""
        if self._open is not None:
            opened, self._open = self._open, None
            encode_(self.state, opened, self.bits, self.key, step, self.start)

    def row_sums(self, grad: Tensor, share: float) -> Tensor:
        """Sums over the local columns of the squares that the moments will have after a step.

        Args:
            grad: of the step, of the moments' shape.
            share: `Rule.gradient_share`, how much of a squared gradient goes into a square.

        Returns:
            (…, rows, 1), float64, to be summed over processes that hold other columns.
        """
        sums = grad.new_zeros((*self.shape[:-1], 1), dtype=torch.float64)
        for part, squares in self._squares(grad, share):
            _stack(sums)[part] = squares.sum(-1, True)
        return sums

    def column_sums(self, grad: Tensor, share: float, row_sums: Tensor) -> Tensor:
        """Sums over the local rows of fourth powers of these squares, those of each row divided by the row's sum.

        Returns:
            (…, 1, cols), float64, to be summed over processes that hold other rows, for `rescale_`.
        """
        sums = grad.new_zeros((*self.shape[:-2], 1, self.shape[-1]), dtype=torch.float64)
        for part, squares in self._squares(grad, share):
            whole = _stack(row_sums)[part]
            _stack(sums)[part[0]] += torch.where(whole > 0.0, squares / whole, whole).pow_(4).sum(-2, True)
        return sums

    def _squares(self, grad: Tensor, share: float) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """The squares that the moments will have after a step, in float64, part by part."""
        name, grads = self._scaled, _stack(grad)
        for part in self._parts():
            kept = self._decoded(part) if self._open is None else _stack(self._open[name])[part]
            is_square = self._open is not None and name == "exp_avg_sq"
            squares = kept.double() if is_square else kept.double().square_()
            yield part, squares.add_(grads[part].double().square_(), alpha=share)

    def rescale_(self, column_sums: Tensor, turn: int, ok: Tensor | None) -> None:
        """Take the columns' scale from `column_sums` of all rows, and code what is stored anew, before step number `turn`.

        Args:
            ok: 0-d bool; where it is false, nothing changes. None means true.
        """
        old = self.state["col_scale"]
        new = column_scale(column_sums)
        new = new if ok is None else torch.where(ok, new, old)
        if self._open is None:
            signed, (rows, cols) = SIGNED[self._scaled], self.shape[-2:]
            key = None if signed else derive_key(self.key, 1)
            for part in self._parts():
                start = self.start + (part[0].start * rows + part[1].start) * cols
                column, value = _stack(new)[part[0]], self._decoded(part)
                codes = quantize_rows(value, self.bits, signed, col_scale=column, key=key, turn=turn, start=start)
                for suffix, fresh in zip(("", "_scale"), codes, strict=True):
                    stored = _stack(self.state[f"{self._scaled}{suffix}"])[part]
                    stored.copy_(fresh if ok is None else torch.where(ok, fresh, stored))
        old.copy_(new)

    @property
    def _scaled(self) -> str:
        """The moment whose columns are scaled."""
        return "exp_avg_sq" if "exp_avg_sq" in self.state else "exp_avg"

    def _parts(self) -> Iterator[tuple[slice, slice]]:
        """Matrices of the stack and rows of them that together cover it, few enough elements at a time."""
        rows, cols = self.shape[-2:]
        for matrices in kernels.row_chunks(math.prod(self.shape[:-2]), rows * cols):
            for chunk in kernels.row_chunks(rows, cols):
                yield matrices, chunk

    def _decoded(self, part: tuple[slice, slice]) -> Tensor:
        """√v or m as it is stored."""
        codes, scale = (_stack(self.state[f"{self._scaled}{suffix}"])[part] for suffix in ("", "_scale"))
        column, signed = _stack(self.state["col_scale"])[part[0]], SIGNED[self._scaled]
        return dequantize_rows(codes, scale, self.bits, signed, cols=self.shape[-1], col_scale=column)

    def forget(self, shape: tuple[int, ...]) -> None:
        """The state has been replaced, by moments of this shape: what was opened is void."""
        self.shape, self._open = shape, None

    def codes(self) -> MomentCodes | None:
        """Both moments as they are stored, for fused steps; None where there are no such codes, or they are open."""
        fused = self.bits != 16 and self.dtype == torch.float32 and SIGNED.keys() <= self.state.keys()
        if not fused or self._open is not None:
            return None
        return stored_codes(self.state)

    def adam_direct_call(
        self, grad: Tensor, codes: MomentCodes, turn: int, ok: Tensor | None, **adam: Unpack[kernels.AdamNumbers]
    ) -> tuple[Any, ...]:
        """The arguments of `coded_adam_direct_`, `kernels.adam_direct_` on the codes, for the gradient in `row_shape`.

        The operation returns N, that of the moments before they are coded again. Where `ok`, a 0-d bool, is false, the codes stay as
        they are and N is 0; None means true.
        """
        rows, scale = grad.reshape(row_shape(self.shape)), self.state.get("col_scale")
        noise = kernels.pack_key(self.key, turn, self.start)
        scalars = kernels.pack_scalars(adam["beta1"], adam["beta2"], adam["eps"], adam["step"])
        return rows, *codes, scale, scalars, noise, ok, self.bits, BLOCK

    def adam_dense_call(
        self,
        weight: Tensor,
        grad: Tensor,
        codes: MomentCodes,
        turn: int,
        write: Mapping[str, Any],
        **adam: Unpack[kernels.AdamNumbers],
    ) -> tuple[Any, ...]:
        """The arguments of `coded_adam_dense_`, `adam_dense_` on the codes; `weight` and `grad` are contiguous."""
        shape = row_shape(self.shape)
        if tuple(weight.shape) != shape:  # a view of a quantised weight would be a copy
            weight, grad = weight.view(shape), grad.view(shape)
        noise, scale = kernels.pack_key(self.key, turn, self.start), self.state.get("col_scale")
        scalars = kernels.pack_scalars(
            adam["beta1"], adam["beta2"], adam["eps"], adam["step"], write["alpha"], write["keep"]
        )
        rounding = kernels.pack_key(write["rounding_key"], self.start)
        error = write["error"] and write["error"].map(lambda part: part.view(shape))
        return weight, grad, *codes, scale, scalars, noise, write["ok"], rounding, self.bits, BLOCK, *(error or ())


def _stack(tensor: Tensor) -> Tensor:
    """The matrices of a stack, or the only one, along the first dimension: a view."""
    return tensor if tensor.dim() == 3 else tensor.unsqueeze(0)


def encode_(
    state: dict[str, Tensor], moments: Mapping[str, Tensor], bits: int, key: int, step: int, start: int = 0
) -> None:
    """Store moments in the state, in place.

    Args:
        key: the stream of random numbers of this parameter, the same in every step.
        step: number of the step.
        start: row-major index of the first element in the whole moment.
    """
    names = SIGNED.keys() & state.keys()
    if bits == 16:
        for name in names:
            value = moments[name]
            if SIGNED[name]:
                state[name].copy_(value)
                continue
            flat, stored = value.reshape(-1), state[name].view(-1)
            for chunk in kernels.row_chunks(flat.numel(), 1):  # positions are 8 bytes an element
                positions = torch.arange(start + chunk.start, start + chunk.stop, device=value.device)
                stored[chunk] = stochastic_round(flat[chunk].to(torch.float32), derive_key(key, step), positions)
        return
    rows = {name: moments[name].reshape(row_shape(tuple(moments[name].shape))) for name in names}
    col_scale = state.get("col_scale")
    if len(names) == 2:
        codes = encode_moments(
            rows["exp_avg"], rows["exp_avg_sq"], bits, col_scale=col_scale, key=key, turn=step, start=start
        )
        for stored, value in zip(stored_codes(state), codes, strict=True):
            stored.copy_(value)
        return
    for name in names:
        signed = SIGNED[name]
        value = rows[name] if signed else rows[name].sqrt()
        # A signed moment is replaced by a fraction 1 − β of itself in a step, many levels: to nearest is right.
        state[name], state[f"{name}_scale"] = quantize_rows(
            value, bits, signed, col_scale=col_scale, key=None if signed else key, turn=step, start=start
        )
