"""The chunked cross-entropy against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from dscoder.train import loss as loss_module
from dscoder.train.loss import IGNORED, cross_entropy_sum, token_losses


def case(
    num_tokens: int, *, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_TD = torch.randn(num_tokens, 16, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(37, 16, generator=generator).to(dtype).requires_grad_()
    labels_T = torch.randint(0, 37, (num_tokens,), generator=generator)
    labels_T[::3] = IGNORED
    return hidden_TD, weight_VD, labels_T


def reference(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden_TD @ weight_VD.T).float(), labels_T, ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 13])
def test_loss_and_gradients_are_those_of_whole_logits(
    num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 4)
    hidden_TD, weight_VD, labels_T = case(num_tokens)
    ours = cross_entropy_sum(hidden_TD, weight_VD, labels_T)
    theirs = reference(hidden_TD, weight_VD, labels_T)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for mine, wanted in zip(
        torch.autograd.grad(ours / 7, (hidden_TD, weight_VD)),
        torch.autograd.grad(theirs / 7, (hidden_TD, weight_VD)),
        strict=True,
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)


def test_the_softmax_is_float32_under_bfloat16() -> None:
    hidden_TD, weight_VD, labels_T = case(50, dtype=torch.bfloat16)
    ours = cross_entropy_sum(hidden_TD, weight_VD, labels_T)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, reference(hidden_TD, weight_VD, labels_T), rtol=1e-5, atol=0)
    gradient_TD, gradient_VD = torch.autograd.grad(ours, (hidden_TD, weight_VD))
    assert gradient_TD.dtype == gradient_VD.dtype == torch.bfloat16


def test_ignored_positions_give_neither_loss_nor_gradient() -> None:
    hidden_TD, weight_VD, _ = case(5)
    labels_T = torch.full((5,), IGNORED)
    total = cross_entropy_sum(hidden_TD, weight_VD, labels_T)
    assert total.item() == 0.0
    assert not any(gradient.any() for gradient in torch.autograd.grad(total, (hidden_TD, weight_VD)))


def test_no_tokens_give_zero() -> None:
    total = cross_entropy_sum(torch.zeros(0, 4), torch.zeros(3, 4), torch.zeros(0, dtype=torch.long))
    assert total.item() == 0.0
    assert len(token_losses(torch.zeros(0, 4), torch.zeros(3, 4), torch.zeros(0, dtype=torch.long))) == 0


def test_large_logits_do_not_overflow() -> None:
    hidden_TD = torch.full((1, 1), 1e4)
    weight_VD = torch.tensor([[1.0], [-1.0]])
    assert cross_entropy_sum(hidden_TD, weight_VD, torch.tensor([0])).item() == 0.0
    assert cross_entropy_sum(hidden_TD, weight_VD, torch.tensor([1])).item() == 2e4


def test_token_losses_add_up_to_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 4)
    hidden_TD, weight_VD, labels_T = case(13)
    losses_T = token_losses(hidden_TD, weight_VD, labels_T)
    assert not losses_T[labels_T == IGNORED].any()
    torch.testing.assert_close(losses_T.sum(), cross_entropy_sum(hidden_TD, weight_VD, labels_T))


def test_a_wrong_number_of_labels_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"labels_T must have one label a row of hidden_TD \[3, 4\], got \[2\]"
    ):
        cross_entropy_sum(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.long))
