"""Two 4-bit codes in one byte, along the last dimension."""

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
