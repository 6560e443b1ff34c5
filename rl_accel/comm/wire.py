"""What one hop puts on the wire: 4- or 8-bit blocks of the codec, or plain bfloat16 where 16 bits are asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rl_accel.kernels.codec import api as codec
from rl_accel.kernels.codec.layout import packed_bytes
from rl_accel.kernels.codec.rows import Rows


@dataclass(frozen=True)
class Format:
    """Bits and group size of one hop."""

    bits: int
    group_size: int
    backend: str = "auto"

    @property
    def quantized(self) -> bool:
        return self.bits < 16

    def num_bytes(self, numel: int) -> int:
        """Bytes of a block, a multiple of 4."""
        if self.quantized:
            return packed_bytes(numel, self.bits, self.group_size)
        return 4 * ((numel + 1) // 2)

    @property
    def group_bytes(self) -> tuple[int, int]:
        """Bytes of the codes and of the scale of a group."""
        return self.group_size * self.bits // 8, 4 if self.quantized else 0

    def encode_rows(
        self,
        x: torch.Tensor,
        rows: Rows,
        rounding: str,
        key: int,
        offset: int,
        *,
        rotate: bool,
        subtract: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the pieces of `x`, or of `x - subtract`, in blocks, uint8 [rows.num_rows, num_bytes(rows.numel)]."""
        if self.quantized:
            if x.dtype == torch.float16:
                x, subtract = x.float(), None if subtract is None else subtract.float()
            out = torch.empty(rows.num_rows, self.num_bytes(rows.numel), dtype=torch.uint8, device=x.device)
            codec.quantize_rows(
                x,
                rows,
                self.bits,
                self.group_size,
                rounding,
                key,
                offset,
                subtract=subtract,
                hadamard=rotate,
                out=out,
                backend=self.backend,
            )
            return out
        values = torch.zeros(rows.num_rows * rows.numel, dtype=torch.bfloat16, device=x.device)
        for start, count, target, _ in rows.pieces_K4.tolist():
            values[target : target + count].copy_(x[start : start + count])
        return values.view(torch.uint8).view(rows.num_rows, self.num_bytes(rows.numel))

    def encode(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        rounding: str,
        key: int,
        offset: int,
        *,
        rotate: bool,
        subtract: torch.Tensor | None = None,
    ) -> None:
        """Write `x`, or `x - subtract`, [N] floats, into `out`, uint8 [num_bytes(N)]."""
        if x.dtype == torch.float16:
            x, subtract = x.float(), None if subtract is None else subtract.float()
        if not self.quantized:
            out.view(torch.bfloat16)[: x.numel()].copy_(x.view(-1))
            return
        codec.quantize(
            x,
            self.bits,
            self.group_size,
            rounding,
            key,
            offset,
            subtract=subtract,
            hadamard=rotate,
            out=out,
            backend=self.backend,
        )

    def decode_rows(self, blocks: torch.Tensor, rows: Rows, out: torch.Tensor, *, add: bool) -> None:
        """Write the pieces of `blocks`, uint8 [rows.num_rows, num_bytes(rows.numel)], to `out`, or add them."""
        if out.dtype == torch.float16:
            wide = out.float()
            self.decode_rows(blocks, rows, wide, add=add)
            out.copy_(wide)
        elif self.quantized:
            flat = blocks.view(1, -1)
            codec.dequantize_rows(flat, rows, out, self.bits, self.group_size, add=add, backend=self.backend)
        else:
            values = blocks.view(-1).view(torch.bfloat16)
            for start, count, target, _ in rows.pieces_K4.tolist():
                into, part = out[start : start + count], values[target : target + count]
                into.copy_(into.float() + part.float() if add else part)

    def decode_sum(self, blocks: torch.Tensor, out: torch.Tensor, *, rotated: bool, add: bool = False) -> torch.Tensor:
        """Write the sum of `blocks`, uint8 [R, num_bytes(N)], into `out` [N], or add it.

        Args:
            rotated: the blocks were encoded with `rotate`; plain bfloat16 never is.
        """
        if not out.numel():
            return out
        if out.dtype == torch.float16:
            wide = out.float() if add else torch.empty(out.shape, device=out.device)
            return out.copy_(self.decode_sum(blocks, wide, rotated=rotated, add=add))
        if self.quantized:
            return codec.dequantize(
                blocks,
                out.numel(),
                self.bits,
                self.group_size,
                hadamard=rotated,
                out=out,
                add=add,
                backend=self.backend,
            )
        total = self._sum(blocks, out.numel())
        return out.copy_(out.float() + total if add else total)

    def requantize(
        self,
        blocks: torch.Tensor,
        numel: int,
        source: Format,
        out: torch.Tensor,
        rounding: str,
        key: int,
        offset: int,
        *,
        rotate: bool,
    ) -> None:
        """Write the sum of `blocks`, which came in the format `source`, into `out`. It stays rotated from codes to
        codes."""
        if source.quantized and self.quantized:
            codec.requantize(
                blocks,
                numel,
                source.bits,
                source.group_size,
                self.bits,
                self.group_size,
                rounding,
                key,
                offset,
                out=out,
                backend=self.backend,
            )
            return
        total = torch.empty(numel, dtype=torch.float32, device=blocks.device)
        source.decode_sum(blocks, total, rotated=rotate)
        self.encode(total, out, rounding, key, offset, rotate=rotate)

    @staticmethod
    def _sum(blocks: torch.Tensor, numel: int) -> torch.Tensor:
        values = blocks.view(torch.bfloat16)[:, :numel]
        total = values[0].float()
        for row in values[1:]:
            total = total + row.float()
        return total
