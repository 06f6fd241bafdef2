"""Random cases for the ops, from a seed that the test's own name gives."""

import zlib

import torch
from torch import Tensor

ROUTINGS = ("uniform", "skewed", "one_hot", "half_empty")
CONCENTRATION = 2.0  # of the Dirichlet distribution that skewed routing draws the experts' shares from
_FAR = 40.0  # added to a logit: farther than noise ever carries


def generator(name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by a test id, so that a test draws the same numbers alone and in company.

    What is drawn from it lies on `device`.
    """
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()))


def randn(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, drawn in float32 (float64 for float64) and rounded."""
    drawn = torch.promote_types(dtype, torch.float32)
    return torch.randn(shape, generator=rng, dtype=drawn, device=rng.device).to(dtype)


def _expert_logits(rng: torch.Generator, num_experts: int, num_topk: int, kind: str) -> Tensor:
    """What every token's logits have in common, [E]."""
    logits_E = torch.zeros(num_experts, device=rng.device)
    if kind == "skewed":
        # torch has no Dirichlet draw with a generator: gamma(2) is the sum of two exponentials.
        gamma_E = torch.zeros(num_experts, device=rng.device)
        for _ in range(int(CONCENTRATION)):
            gamma_E += torch.empty_like(gamma_E).exponential_(generator=rng)
        return (gamma_E / gamma_E.sum()).log()
    if kind == "one_hot":
        logits_E[:num_topk] = _FAR
    elif kind == "half_empty":
        logits_E[: max(num_experts // 2, num_topk)] = _FAR
    elif kind != "uniform":
        raise ValueError(f"kind must be one of {', '.join(ROUTINGS)}, got {kind!r}")
    return logits_E


def routing_logits(
    rng: torch.Generator, *, num_tokens: int, num_experts: int, num_topk: int, kind: str = "uniform"
) -> Tensor:
    """float32 logits_TE whose K largest are a routing of this kind; no two in a row are equal.

    uniform: every expert as likely as the others. skewed: the experts' shares are drawn from a Dirichlet
    distribution of concentration 2 (the busiest of 64 gets about three times the mean), and a token
    draws K distinct experts by those shares. one_hot: every token chooses experts 0 to K - 1, in an order of
    its own. half_empty: only the first half of the experts (K of them if that is more) is ever chosen.
    """
    # Gumbel noise on log shares: the K largest are K draws by those shares without replacement.
    noise_TE = torch.empty(num_tokens, num_experts, device=rng.device).exponential_(generator=rng)
    logits_TE = _expert_logits(rng, num_experts, num_topk, kind) - noise_TE.clamp(min=1e-9).log()
    # No ties: a coarse grid, and for every expert a step of its own within it.
    step = 2.0**-8 / 2 ** max(num_experts - 1, 1).bit_length()
    grid_TE: Tensor = (logits_TE * 2**8).round() / 2**8
    grid_TE += torch.arange(num_experts, device=rng.device) * step
    return grid_TE


def routing(
    rng: torch.Generator, *, num_tokens: int, num_experts: int, num_topk: int, kind: str = "uniform"
) -> Tensor:
    """idx_TK: distinct experts for every token, in random order; `kind` as in `routing_logits`."""
    logits_TE = routing_logits(
        rng, num_tokens=num_tokens, num_experts=num_experts, num_topk=num_topk, kind=kind
    )
    return logits_TE.topk(num_topk, dim=1).indices.to(torch.int32)


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


def latent_case(
    rng: torch.Generator,
    num_tokens: int = 7,
    *,
    num_heads: int = 3,
    nope_width: int = 8,
    rope_width: int = 4,
    latent_width: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Arguments of `latent_rope`: query, latent and weight, tables of twelve positions, and positions."""
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    angle = randn(rng, 12, rope_width // 2, dtype=torch.float64)
    return (
        randn(rng, num_tokens, num_heads, nope_width + rope_width, dtype=dtype),
        randn(rng, num_tokens, latent_width + rope_width, dtype=dtype),
        randn(rng, latent_width, dtype=dtype),
        angle.cos().to(table_dtype),
        angle.sin().to(table_dtype),
        torch.randint(12, (num_tokens,), generator=rng, device=rng.device),
    )
