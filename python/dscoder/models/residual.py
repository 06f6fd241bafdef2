"""The last product of a block, and the residual stream that it is added to."""

from torch import Tensor, nn


def multiply(linear: nn.Linear, x_TF: Tensor, onto_TD: Tensor | None) -> Tensor:
    """linear(x) -> [T, D]; or added to `onto_TD` in place, which is then what is returned.

    One kernel and one rounding less; no gradient, so it is for forwards with a cache.
    """
    if onto_TD is None:
        out_TD: Tensor = linear(x_TF)
        return out_TD
    if not onto_TD.dtype == x_TF.dtype == linear.weight.dtype:  # under autocast
        return onto_TD.add_(linear(x_TF))
    return onto_TD.addmm_(x_TF, linear.weight.t())
