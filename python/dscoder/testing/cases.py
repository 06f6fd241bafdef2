"""Random cases for the ops, from a seed that the test's own name gives."""

import zlib

import torch
from torch import Tensor


def generator(name: str) -> torch.Generator:
    """A generator seeded by a test id, so that a test draws the same numbers alone and in company."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def randn(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, drawn in float32 (float64 for float64) and rounded."""
    drawn = torch.promote_types(dtype, torch.float32)
    return torch.randn(shape, generator=rng, dtype=drawn).to(dtype)


def routing(rng: torch.Generator, *, num_tokens: int, num_experts: int, num_topk: int) -> Tensor:
    """idx_TK: distinct experts for every token, in random order."""
    return torch.rand(num_tokens, num_experts, generator=rng).argsort(dim=1)[:, :num_topk].to(torch.int32)


def cu_seqlens(lengths: list[int]) -> Tensor:
    """int32 [B + 1]: where sequences of these lengths begin and end when packed."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def paged(
    sequences: list[Tensor], *, page_size: int, num_spare_pages: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The rows of `sequences` ([length, d] each) laid out in shuffled pages.

    Returns:
        cache_PLd, in which every unused row is NaN, and page_table_BN, in which every unused slot is wild.
    """
    num_pages = [-(-len(rows) // page_size) for rows in sequences]
    order = torch.randperm(sum(num_pages) + num_spare_pages, generator=rng).tolist()
    cache = torch.full((len(order), page_size, sequences[0].shape[1]), torch.nan, dtype=sequences[0].dtype)
    table = torch.full((len(sequences), max(num_pages) + 1), 2**31 - 1, dtype=torch.int32)
    table[::2] = -(2**31)
    for b, rows in enumerate(sequences):
        for slot in range(num_pages[b]):
            table[b, slot] = page = order.pop()
            piece = rows[slot * page_size : (slot + 1) * page_size]
            cache[page, : len(piece)] = piece
    return cache, table
