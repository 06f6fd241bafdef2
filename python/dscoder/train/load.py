"""How evenly the chosen experts, and the ranks that hold them, were loaded."""

from torch import Tensor


def _unevenness(loads_LN: Tensor) -> Tensor:
    """Largest load over mean load of each layer, 1 where there is none: [L]."""
    mean_L = loads_LN.mean(dim=1)
    return (loads_LN.amax(dim=1) / mean_L).where(mean_L > 0, 1.0)


def load_figures(counts_LE: Tensor, *, num_ranks: int, num_choices: int) -> dict[str, float]:
    """What a step reports of its experts' loads.

    Args:
        counts_LE: choices that each expert of each layer with experts computed, summed over the whole step:
            micro-batches and ranks.
        num_ranks: of the expert-parallel group; rank r holds the r-th E / num_ranks experts.
        num_choices: made by the gates of all these layers, the dropped ones among them.

    Returns:
        expert_load_max and expert_load_mean, the busiest expert's load over the mean load, of the worst layer
        and the mean over layers; with more than one rank the same of ranks, rank_load_max and rank_load_mean;
        and dropped_share, of the choices. Nothing of a model without experts.
    """
    num_layers, num_experts = counts_LE.shape
    if num_ranks < 1 or num_experts % num_ranks:
        raise ValueError(
            f"load_figures: num_ranks must divide the {num_experts} experts of counts_LE, got {num_ranks}"
        )
    if not counts_LE.numel():
        return {}
    loads_LE = counts_LE.double().cpu()
    num_computed = float(loads_LE.sum())
    if num_choices < num_computed:
        raise ValueError(
            f"load_figures: num_choices must be >= {num_computed:.0f}, the sum of counts, got {num_choices}"
        )
    found = {"expert_load": _unevenness(loads_LE)}
    if num_ranks > 1:
        found["rank_load"] = _unevenness(loads_LE.view(num_layers, num_ranks, -1).sum(dim=2))
    figures = {}
    for name, unevenness_L in found.items():
        figures[f"{name}_max"] = float(unevenness_L.max())
        figures[f"{name}_mean"] = float(unevenness_L.mean())
    return figures | {"dropped_share": 1 - num_computed / num_choices if num_choices else 0.0}
