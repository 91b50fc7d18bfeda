"""4-bit codes for kernels that take a block of columns at a time, in torch ops.

Two columns share a byte (`quantization.packing`). A kernel can work on packed codes where every block starts with a byte; where one
starts in the middle of a byte (odd blocks, which no format of the package has), it works on codes of a byte each, made here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def starts_with_bytes(cols: int, bits: int, block: int) -> bool:
    """Whether codes are packed and every block of a row starts with a byte of its own."""
    return bits == 4 and (block % 2 == 0 or block >= cols)


@dataclass(frozen=True)
class KernelCodes:
    """Codes as a kernel takes them: `whole` is `codes`, or one byte for each column."""

    codes: Tensor
    whole: Tensor
    cols: int

    @classmethod
    def of(cls, codes: Tensor, cols: int, bits: int, packed: bool) -> "KernelCodes":
        """What the kernel reads, and may write."""
        if bits == 8 or packed:
            return cls(codes, codes, cols)
        pairs = torch.stack([codes & 0xF, codes >> 4], -1)
        return cls(codes, pairs.flatten(-2)[..., :cols].contiguous(), cols)

    def store(self) -> None:
        """Put the kernel's codes where they belong."""
        if self.whole is not self.codes:
            even = torch.nn.functional.pad(self.whole, (0, self.cols % 2))
            self.codes.copy_(even[..., 0::2] | (even[..., 1::2] << 4))
