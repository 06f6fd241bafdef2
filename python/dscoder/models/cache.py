"""What decoding keeps of the past: paged latents (MLA), or keys and values (GQA), under one protocol.

A forward with a cache appends row b's first num_new_B[b] tokens at that row's own position; what is to the
right of them is padding, whose entries lie where the row's next tokens will overwrite them. The steps are
`begin` (host checks, positions), one write a layer, `commit` (lengths grow), so a forward that fails leaves
the lengths as they were. Nothing waits for the device: the host keeps an upper bound of the longest row and
reads the true lengths only before it would refuse.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dscoder.config import GqaConfig, MlaConfig, ModelConfig

PAGE_SIZE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Append:
    """Where the S columns of one forward go."""

    positions_BS: Tensor  # int64, of the padding too
    slots_T: Tensor  # int64 [B * S], entry of the storage
    num_new_B: Tensor  # int32
    end_lens_B: Tensor  # int32, lengths with all S columns counted in, padding too
    is_first: bool  # no row holds a token yet
    max_len: int  # no row is longer than this afterwards, padding included


class Cache(ABC):
    """The lengths of the rows, and the checks that both caches share."""

    seq_lens_B: Tensor  # int32

    def __init__(self, *, num_sequences: int, max_positions: int, device: torch.device | str) -> None:
        self.max_positions = max_positions
        self.seq_lens_B = torch.zeros(num_sequences, dtype=torch.int32, device=device)
        self._max_len = 0

    @property
    def num_sequences(self) -> int:
        """B, the number of rows."""
        return self.seq_lens_B.shape[0]

    def begin(self, tokens_BS: Tensor, num_new_B: Tensor | None) -> Append:
        """Plan the append of `tokens_BS`; ValueError if the rows differ or a row would not fit."""
        num_rows, length = tokens_BS.shape
        if num_rows != self.num_sequences:
            raise ValueError(f"cache: tokens must have {self.num_sequences} rows, got {num_rows}")
        device = self.seq_lens_B.device
        if num_new_B is None:
            num_new_B = torch.full((num_rows,), length, dtype=torch.int32, device=device)
        elif num_new_B.shape != (num_rows,):
            raise ValueError(f"cache: num_new_B must have shape ({num_rows},), got {tuple(num_new_B.shape)}")
        num_new_B = num_new_B.to(device=device, dtype=torch.int32)
        if self._max_len + length > self.max_positions:
            self._check_room(num_new_B)
        positions_BS = self.seq_lens_B.long()[:, None] + torch.arange(length, device=device)
        max_len = self._max_len + length
        return Append(
            positions_BS=positions_BS,
            slots_T=self._slots(positions_BS, max_len).flatten(),
            num_new_B=num_new_B,
            end_lens_B=self.seq_lens_B + length,
            is_first=self._max_len == 0,
            max_len=max_len,
        )

    def commit(self, append: Append) -> None:
        """Count the tokens of `append` in."""
        self.seq_lens_B.add_(append.num_new_B)
        self._max_len = append.max_len

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Keep `rows` (indices, each at most once, or a mask), in that order."""

    @abstractmethod
    def _slots(self, positions_BS: Tensor, max_len: int) -> Tensor:
        """Storage entry of each position."""

    def _check_room(self, num_new_B: Tensor) -> None:
        if self.num_sequences == 0:
            return
        self._max_len = int(self.seq_lens_B.max())
        longest = int((self.seq_lens_B + num_new_B).max())
        if longest > self.max_positions:
            raise ValueError(f"cache: a row must hold <= {self.max_positions} tokens, got {longest}")


class LatentCache(Cache):
    """One page pool a layer, [P, PAGE_SIZE, C + r]: the normed latent, then the rotated key.

    Page p of row b is page_table_BN[b, p]. The pool's last page belongs to no row: padding beyond a row's
    own pages goes there.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: MlaConfig,
        *,
        num_sequences: int,
        max_positions: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(num_sequences=num_sequences, max_positions=max_positions, device=device)
        num_row_pages = -(-max_positions // PAGE_SIZE)
        num_pages = num_sequences * num_row_pages
        shape = (num_pages + 1, PAGE_SIZE, attention.cache_dim)
        self.pages = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        pages = torch.arange(num_pages, dtype=torch.int32, device=device)
        self.page_table_BN = pages.view(num_sequences, num_row_pages)

    def select(self, rows: Tensor) -> None:
        """Keep `rows` (indices, each at most once, or a mask), in that order; no page is copied."""
        self.seq_lens_B = self.seq_lens_B[rows]
        self.page_table_BN = self.page_table_BN[rows]

    def table(self, max_len: int) -> Tensor:
        """The page table, int32 [B, N], wide enough for `max_len` positions."""
        num_columns = -(-max_len // PAGE_SIZE)
        num_missing = num_columns - self.page_table_BN.shape[1]
        if num_missing <= 0:
            return self.page_table_BN[:, :num_columns]
        return F.pad(self.page_table_BN, (0, num_missing), value=self.pages[0].shape[0] - 1)

    def write(self, layer_idx: int, entry_Td: Tensor, append: Append) -> None:
        """Store the entries [B * S, C + r] of one layer."""
        pool = self.pages[layer_idx]
        pool.view(-1, pool.shape[-1])[append.slots_T] = entry_Td.detach().to(pool.dtype)

    def _slots(self, positions_BS: Tensor, max_len: int) -> Tensor:
        pages_BS = self.table(max_len).gather(1, positions_BS // PAGE_SIZE)
        return pages_BS.long() * PAGE_SIZE + positions_BS % PAGE_SIZE


class KeyValueCache(Cache):
    """Rotated keys, and values, of each layer: [B * max_positions + 1, heads, head_dim].

    The last entry belongs to no row: padding beyond a row's end goes there.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: GqaConfig,
        *,
        num_sequences: int,
        max_positions: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(num_sequences=num_sequences, max_positions=max_positions, device=device)
        shape = (num_sequences * max_positions + 1, attention.num_kv_heads, attention.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]

    def select(self, rows: Tensor) -> None:
        """Keep `rows` (indices, each at most once, or a mask), in that order; kept rows are copied."""
        old_num_rows = self.num_sequences
        self.seq_lens_B = self.seq_lens_B[rows]

        def keep(entries: Tensor) -> Tensor:
            kept = entries[:-1].view(old_num_rows, self.max_positions, *entries.shape[1:])[rows]
            return torch.cat([kept.flatten(0, 1), entries[-1:]])

        self.keys = [keep(entries) for entries in self.keys]
        self.values = [keep(entries) for entries in self.values]

    def write(self, layer_idx: int, key_TGd: Tensor, value_TGd: Tensor, append: Append) -> None:
        """Store the keys and values [B * S, heads, head_dim] of one layer."""
        for entries, new in ((self.keys[layer_idx], key_TGd), (self.values[layer_idx], value_TGd)):
            entries[append.slots_T] = new.detach().to(entries.dtype)

    def read(self, layer_idx: int, append: Append) -> tuple[Tensor, Tensor]:
        """Keys and values [B, L, heads, head_dim], views; entries beyond a row's length mean nothing."""
        length = min(append.max_len, self.max_positions)

        def rows(entries: Tensor) -> Tensor:
            by_row = entries[:-1].view(self.num_sequences, self.max_positions, *entries.shape[1:])
            return by_row[:, :length]

        return rows(self.keys[layer_idx]), rows(self.values[layer_idx])

    def _slots(self, positions_BS: Tensor, max_len: int) -> Tensor:
        rows_B = torch.arange(self.num_sequences, device=positions_BS.device)
        slots_BS = rows_B[:, None] * self.max_positions + positions_BS
        spare = self.num_sequences * self.max_positions
        return torch.where(positions_BS < self.max_positions, slots_BS, spare)


def allocate_cache(
    config: ModelConfig,
    *,
    num_sequences: int,
    max_positions: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LatentCache | KeyValueCache:
    """An empty cache for `num_sequences` rows of up to `max_positions` tokens."""
    if num_sequences < 0 or max_positions < 1:
        raise ValueError(
            f"allocate_cache: num_sequences must be >= 0 and max_positions >= 1, "
            f"got {num_sequences} and {max_positions}"
        )
    if isinstance(config.attention, MlaConfig):
        return LatentCache(
            config,
            config.attention,
            num_sequences=num_sequences,
            max_positions=max_positions,
            dtype=dtype,
            device=device,
        )
    return KeyValueCache(
        config,
        config.attention,
        num_sequences=num_sequences,
        max_positions=max_positions,
        dtype=dtype,
        device=device,
    )
