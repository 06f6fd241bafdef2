"""What decoding keeps of the past: paged latents (MLA), or keys and values (GQA), under one protocol.

A cache has B rows. A forward with it appends row b's first num_new_B[b] tokens at that row's own position;
what is to the right of them is padding, whose entries lie where the row's next tokens will overwrite them.
The steps are `begin` (positions and entries, once for all layers), one write a layer, `commit` (lengths
grow), so a forward that fails leaves the lengths as they were. Nothing waits for the device and no shape
depends on what it holds, so a CUDA graph can hold a forward of one token a row.

Used whole, a cache keeps an upper bound of its longest row on the host, and reads the true lengths only
before it would refuse. Who batches continuously knows the lengths himself and uses it by views instead:

    cache = allocate_cache(config, num_sequences=64, max_positions=4096, num_pages=1000)
    cache.assign(5, pages)                 # row 5 may hold len(pages) * PAGE_SIZE tokens
    model(chunk_1S, cache=cache.rows(5, 6, max_len=0))    # its prompt, in chunks; max_len: what it holds
    model(tokens_N1, cache=cache.rows(0, N, max_len=longest), num_new_B=is_live_N)    # a step of rows 0 to N
    cache.move(9, 5, num_tokens=n)         # row 9 goes on as row 5, so that live rows stay in front
    cache.clear(9)                         # row 9 holds nothing; its pages are free

A view shares the memory of its cache. Lengths and page table of a cache are the same tensors for its whole
life, changed in place: a graph captured over rows 0 to N stays valid while rows come and go. A row that is
not live has num_new_B 0, and its output means nothing; its column is written like padding, so a row takes
part with fewer than max_positions tokens, or cleared.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dscoder import ops
from dscoder.config import GqaConfig, MlaConfig, ModelConfig
from dscoder.models.cached_rows import PackedRows, mask_rows, pack_rows, pays_to_pack
from dscoder.models.expansion import Expansion, plan_expansion
from dscoder.models.yarn import rotations

PAGE_SIZE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Append:
    """Where the S columns of one forward go, and what they see."""

    positions_BS: Tensor  # int64; of the padding too
    slots_T: Tensor  # int64 [B * S], entry of the storage
    num_new_B: Tensor | None  # int32; None: all S columns count
    is_first: bool  # no row holds a token yet
    max_len: int  # no row is longer than this afterwards, padding included


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAppend(Append):
    """What attention over latents reads, in all layers."""

    end_lens_B: Tensor  # int32, lengths with all S columns counted in, padding too
    page_table_BN: Tensor  # int32, wide enough for them
    plan: Tensor | None  # of mla_decode, where kernels run
    expansion: Expansion | None  # of the latents; None: they are attended as they are, or there are none


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyValueAppend(Append):
    """What attention over keys and values reads, in all layers."""

    seen: PackedRows | Tensor | None  # the mask of `mask_rows`, unless packed; None: is_first


class Cache(ABC):
    """The lengths of the rows, the angles of all positions, and the checks that both caches share."""

    num_pages = 0  # pages that rows may be assigned; 0: every row has its own memory from the start
    seq_lens_B: Tensor  # int32

    def __init__(
        self, config: ModelConfig, *, num_sequences: int, max_positions: int, device: torch.device | str
    ) -> None:
        self.max_positions = max_positions
        self.seq_lens_B = torch.zeros(num_sequences, dtype=torch.int32, device=device)
        positions_L = torch.arange(max_positions, device=device)
        self.cos_Lf, self.sin_Lf = rotations(config.rope, config.rotated_dim, positions_L)
        self._max_len = 0

    @property
    def num_sequences(self) -> int:
        """B, the number of rows."""
        return self.seq_lens_B.shape[0]

    def rows(self, first: int, last: int, *, max_len: int) -> Self:
        """Rows `first` to `last` (exclusive) as a cache for one forward, sharing memory and lengths.

        `max_len` is the caller's word that no live one holds more tokens: 0 makes the forward that of new
        prompts, and with keys and values it is the width that is attended. For a CUDA graph it is the most
        that may come, max_positions - 1 for steps of one token.
        """
        view = copy.copy(self)
        view._narrow(first, last)
        view._max_len = max_len
        return view

    def begin(self, tokens_BS: Tensor, num_new_B: Tensor | None) -> Append:
        """Plan the append of `tokens_BS`; ValueError if the rows differ or a row would not fit."""
        num_rows, length = tokens_BS.shape
        if num_rows != self.num_sequences:
            raise ValueError(f"cache: tokens must have {self.num_sequences} rows, got {num_rows}")
        device = self.seq_lens_B.device
        if num_new_B is not None:
            if num_new_B.shape != (num_rows,):
                raise ValueError(
                    f"cache: num_new_B must have shape ({num_rows},), got {tuple(num_new_B.shape)}"
                )
            num_new_B = num_new_B.to(device=device, dtype=torch.int32)
        if self._max_len + length > self.max_positions:
            self._check_room(length if num_new_B is None else num_new_B)
        positions_BS = self.seq_lens_B.long()[:, None]
        if length != 1:
            positions_BS = positions_BS + torch.arange(length, device=device)
        return self._place(positions_BS, num_new_B)

    def commit(self, append: Append) -> None:
        """Count the tokens of `append` in."""
        num_columns = append.positions_BS.shape[1]
        self.seq_lens_B.add_(num_columns if append.num_new_B is None else append.num_new_B)
        self._max_len = append.max_len

    def clear(self, row: int) -> None:
        """Row `row` holds nothing from here on."""
        self.seq_lens_B[row].fill_(0)  # assigned, a number would be a tensor on the host to copy and wait for

    @abstractmethod
    def num_pages_of(self, num_tokens: int) -> int:
        """How many assigned pages a row of `num_tokens` needs; 0 where rows have their own memory."""

    @abstractmethod
    def assign(self, row: int, pages: Sequence[int]) -> None:
        """Row `row` lies in `pages`, in that order; what it holds stays if its first pages do."""

    @abstractmethod
    def move(self, source: int, target: int, *, num_tokens: int) -> None:
        """Row `target` becomes what row `source` is, `num_tokens` long; `source` is still to be cleared."""

    @abstractmethod
    def _narrow(self, first: int, last: int) -> None:
        """Turn a fresh copy of a cache into the view of some of its rows."""
        self.seq_lens_B = self.seq_lens_B[first:last]

    @abstractmethod
    def _place(self, positions_BS: Tensor, num_new_B: Tensor | None) -> Append:
        """The append whose columns have `positions_BS`."""

    def _check_room(self, num_new: Tensor | int) -> None:
        if self.num_sequences == 0:
            return
        self._max_len = int(self.seq_lens_B.max())
        longest = int((self.seq_lens_B + num_new).max())
        if longest > self.max_positions:
            raise ValueError(f"cache: a row must hold <= {self.max_positions} tokens, got {longest}")


class LatentCache(Cache):
    """One page pool a layer, [P + 1, PAGE_SIZE, C + r]: the normed latent, then the rotated key.

    Page p of row b is page_table_BN[b, p]. The pool's last page belongs to no row: padding beyond a row's
    own pages goes there, and so do rows without pages.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: MlaConfig,
        *,
        num_sequences: int,
        max_positions: int,
        num_pages: int | None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(config, num_sequences=num_sequences, max_positions=max_positions, device=device)
        self._attention = attention
        num_row_pages = self.num_pages_of(max_positions)
        shape = (num_sequences, num_row_pages)
        self.num_pages = num_sequences * num_row_pages if num_pages is None else num_pages
        if num_pages is None:
            self.page_table_BN = torch.arange(self.num_pages, dtype=torch.int32, device=device).view(shape)
        else:
            self.page_table_BN = torch.full(shape, self.num_pages, dtype=torch.int32, device=device)
        pool = (self.num_pages + 1, PAGE_SIZE, attention.cache_dim)
        self.pages = [torch.zeros(pool, dtype=dtype, device=device) for _ in range(config.num_layers)]

    def num_pages_of(self, num_tokens: int) -> int:
        """How many assigned pages a row of `num_tokens` needs."""
        return -(-num_tokens // PAGE_SIZE)

    def assign(self, row: int, pages: Sequence[int]) -> None:
        """Row `row` lies in `pages`, in that order; what it holds stays if its first pages do."""
        width = self.page_table_BN.shape[1]
        if len(pages) > width:
            raise ValueError(f"cache: a row must have <= {width} pages, got {len(pages)}")
        table = [*pages, *[self.num_pages] * (width - len(pages))]
        # Pinned, so that the host does not wait for what the device is at.
        pages_N = torch.tensor(table, dtype=torch.int32, pin_memory=self.page_table_BN.is_cuda)
        self.page_table_BN[row].copy_(pages_N, non_blocking=True)

    def clear(self, row: int) -> None:
        """Row `row` holds nothing and has no pages from here on."""
        super().clear(row)
        self.page_table_BN[row].fill_(self.num_pages)

    def move(self, source: int, target: int, *, num_tokens: int) -> None:
        """Row `target` takes the pages and the length of row `source`; no page is copied."""
        self.page_table_BN[target] = self.page_table_BN[source]
        self.seq_lens_B[target].fill_(num_tokens)

    def write(self, layer_idx: int, entry_Td: Tensor, append: Append) -> None:
        """Store the entries [B * S, C + r] of one layer."""
        pool = self.pages[layer_idx]
        pool.view(-1, pool.shape[-1])[append.slots_T] = entry_Td.detach().to(pool.dtype)

    def read(self, layer_idx: int, slots_M: Tensor) -> Tensor:
        """A copy [M, C + r] of one layer's entries at `slots_M`."""
        return self.pages[layer_idx].flatten(0, 1).index_select(0, slots_M)

    def _narrow(self, first: int, last: int) -> None:
        super()._narrow(first, last)
        self.page_table_BN = self.page_table_BN[first:last]

    def _place(self, positions_BS: Tensor, num_new_B: Tensor | None) -> LatentAppend:
        num_cached, num_new = self._max_len, positions_BS.shape[1]
        is_first, max_len = num_cached == 0, num_cached + num_new
        table_BN = self.page_table_BN
        num_missing = self.num_pages_of(max_len) - table_BN.shape[1]
        if num_missing > 0:
            table_BN = F.pad(table_BN, (0, num_missing), value=self.num_pages)
        end_lens_B = self.seq_lens_B + num_new
        expansion = plan_expansion(
            self._attention,
            end_lens_B,
            table_BN,
            page_size=PAGE_SIZE,
            num_new=num_new,
            num_cached=num_cached,
        )
        pages_BS = table_BN.gather(1, positions_BS // PAGE_SIZE)
        return LatentAppend(
            positions_BS=positions_BS,
            slots_T=torch.add(positions_BS % PAGE_SIZE, pages_BS, alpha=PAGE_SIZE).flatten(),
            num_new_B=num_new_B,
            end_lens_B=end_lens_B,
            is_first=is_first,
            max_len=max_len,
            page_table_BN=table_BN,
            plan=None if is_first or expansion else self._plan(end_lens_B, table_BN, num_new),
            expansion=expansion,
        )

    def _plan(self, end_lens_B: Tensor, table_BN: Tensor, num_new: int) -> Tensor | None:
        if end_lens_B.is_cpu or num_new * len(end_lens_B) == 0:  # only kernels follow a plan
            return None
        max_rows, num_heads = table_BN.shape[1] * PAGE_SIZE, self._attention.num_heads
        return ops.mla_decode_plan(end_lens_B, num_new=num_new, num_heads=num_heads, max_rows=max_rows)


class KeyValueCache(Cache):
    """Rotated keys, and values, of each layer: [B * max_positions + 1, heads, head_dim].

    Every row has the memory of max_positions tokens and needs no pages: attention reads it where it lies.
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
        super().__init__(config, num_sequences=num_sequences, max_positions=max_positions, device=device)
        shape = (num_sequences * max_positions + 1, attention.num_kv_heads, attention.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self._num_sharing = attention.num_heads // attention.num_kv_heads
        self._first_row = 0
        self._starts_B1 = torch.arange(num_sequences, device=device)[:, None] * max_positions

    def num_pages_of(self, num_tokens: int) -> int:
        """0: rows have their own memory."""
        return 0

    def assign(self, row: int, pages: Sequence[int]) -> None:
        """Rows have their own memory: ValueError for any page."""
        if pages:
            raise ValueError(f"cache: rows of keys and values must have 0 pages, got {len(pages)}")

    def move(self, source: int, target: int, *, num_tokens: int) -> None:
        """Copy row `source`, `num_tokens` long, to row `target`."""
        for entries in (*self.keys, *self.values):
            by_row = self._by_row(entries)
            by_row[target, :num_tokens] = by_row[source, :num_tokens]
        self.seq_lens_B[target].fill_(num_tokens)

    def write(self, layer_idx: int, key_TGd: Tensor, value_TGd: Tensor, append: Append) -> None:
        """Store the keys and values [B * S, heads, head_dim] of one layer."""
        for entries, new in ((self.keys[layer_idx], key_TGd), (self.values[layer_idx], value_TGd)):
            entries[append.slots_T] = new.detach().to(entries.dtype)

    def read(self, layer_idx: int, append: KeyValueAppend) -> tuple[Tensor, Tensor]:
        """Keys and values [B, L, heads, head_dim], views; entries beyond a row's length mean nothing."""
        is_packed = isinstance(append.seen, PackedRows)
        length = self.max_positions if is_packed else min(append.max_len, self.max_positions)
        keys, values = self._by_row(self.keys[layer_idx]), self._by_row(self.values[layer_idx])
        return keys[:, :length], values[:, :length]

    def _by_row(self, entries: Tensor) -> Tensor:
        by_row = entries[:-1].view(-1, self.max_positions, *entries.shape[1:])
        return by_row[self._first_row : self._first_row + self.num_sequences]

    def _narrow(self, first: int, last: int) -> None:
        super()._narrow(first, last)
        self._starts_B1 = self._starts_B1[first:last]
        self._first_row += first

    def _place(self, positions_BS: Tensor, num_new_B: Tensor | None) -> KeyValueAppend:
        max_len, is_first = self._max_len + positions_BS.shape[1], self._max_len == 0
        # What does not fit, padding alone, must not reach the next row.
        spare = self.keys[0].shape[0] - 1
        is_inside_BS = positions_BS < self.max_positions
        slots_BS = torch.where(is_inside_BS, positions_BS + self._starts_B1, spare)
        return KeyValueAppend(
            positions_BS=positions_BS,
            slots_T=slots_BS.flatten(),
            num_new_B=num_new_B,
            is_first=is_first,
            max_len=max_len,
            seen=None if is_first else self._seen(positions_BS, max_len),
        )

    def _seen(self, positions_BS: Tensor, max_len: int) -> PackedRows | Tensor:
        keys, num_new = self.keys[0], positions_BS.shape[1]
        if pays_to_pack(keys, self.values[0], num_new=num_new):
            return pack_rows(self.seq_lens_B, num_new=num_new, max_positions=self.max_positions)
        num_entries = min(max_len, self.max_positions)
        return mask_rows(positions_BS, num_entries, num_sharing=self._num_sharing, dtype=keys.dtype)


def cache_token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Memory of one token of one row, over all layers."""
    attention = config.attention
    if isinstance(attention, MlaConfig):
        return config.num_layers * attention.cache_dim * dtype.itemsize
    return config.num_layers * 2 * attention.num_kv_heads * attention.head_dim * dtype.itemsize


def allocate_cache(
    config: ModelConfig,
    *,
    num_sequences: int,
    max_positions: int,
    num_pages: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LatentCache | KeyValueCache:
    """An empty cache for `num_sequences` rows of up to `max_positions` tokens.

    `num_pages`: rows of latents share so many pages, and have none before `assign` gives them some. None:
    every row has its own for max_positions tokens; keys and values know no other way.
    """
    if num_sequences < 0 or max_positions < 1:
        raise ValueError(
            f"allocate_cache: num_sequences must be >= 0 and max_positions >= 1, "
            f"got {num_sequences} and {max_positions}"
        )
    if num_pages is not None and num_pages < 0:
        raise ValueError(f"allocate_cache: num_pages must be >= 0, got {num_pages}")
    attention = config.attention
    if isinstance(attention, MlaConfig):
        return LatentCache(
            config,
            attention,
            num_sequences=num_sequences,
            max_positions=max_positions,
            num_pages=num_pages,
            dtype=dtype,
            device=device,
        )
    if num_pages is not None:
        raise ValueError(f"allocate_cache: num_pages must be None for keys and values, got {num_pages}")
    return KeyValueCache(
        config,
        attention,
        num_sequences=num_sequences,
        max_positions=max_positions,
        dtype=dtype,
        device=device,
    )
