"""Two 4-bit codes in one byte, along the last dimension; and codes for kernels that take a block of columns at a time.

A kernel can work on packed codes where every block starts with a byte. Where a block starts in the middle of a byte (odd blocks,
which no format of the package has), it works on codes of a byte each (`KernelCodes`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0…15 (…, cols) as bytes (…, ⌈cols/2⌉): even columns in the low half of a byte, odd ones in the high half.

        byte j    | column 2j+1 | column 2j |
                   7           4 3         0

    An odd last column leaves the high half of its byte 0.
    """
    codes = codes.to(torch.uint8).contiguous()  # the bytes take the memory order of what they are made of
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, cols: int) -> Tensor:
    """The inverse of `pack_nibbles`: uint8 codes (…, cols).

    Raises:
        ValueError: `packed` has not ⌈cols/2⌉ bytes in a row.
    """
    if packed.shape[-1] != (cols + 1) // 2:
        raise ValueError(f"rows of {packed.shape[-1]} bytes do not hold {cols} columns of 4 bits, which take ⌈cols/2⌉")
    both = torch.stack([packed & 0xF, packed >> 4], -1)
    return both.flatten(-2)[..., :cols]


def starts_with_bytes(cols: int, bits: int, block: int) -> bool:
    """Whether codes are packed and every block of a row starts with a byte of its own."""
    return bits == 4 and (block % 2 == 0 or block >= cols)


@dataclass(frozen=True)
class KernelCodes:
    """Codes as a kernel takes them: `whole` is `codes`, or one byte for each column."""

    codes: Tensor
    whole: Tensor

    @classmethod
    def of(cls, codes: Tensor, cols: int, bits: int, packed: bool) -> "KernelCodes":
        """What the kernel reads, and may write."""
        whole = codes if bits == 8 or packed else unpack_nibbles(codes, cols).contiguous()
        return cls(codes, whole)

    def store(self) -> None:
        """Put the kernel's codes where they belong."""
        if self.whole is not self.codes:
            self.codes.copy_(pack_nibbles(self.whole))
