"""The chunked losses against the plain formulas."""

from __future__ import annotations

import pytest
import torch

from adapters import losses
from adapters.losses import anchor_loss, distill, next_token_loss, token_nll


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last one partly filled; values over every position."""
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 4)
    monkeypatch.setattr(losses, "VALUE_STRIDE", 1)


def tensors(
    seed: int = 0, tokens: int = 10, width: int = 8, vocabulary: int = 13
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=random)
    head = torch.randn(vocabulary, width, generator=random)
    return hidden, head, torch.randint(0, vocabulary, (tokens,), generator=random)


def test_cross_entropy_and_its_gradient_are_the_plain_ones():
    """Chunking changes neither."""
    hidden, head, targets = tensors()
    plain, ours = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(plain @ head.t(), targets, reduction="sum")
    loss = next_token_loss(ours, head, targets)
    (expected / 3).backward()
    (loss / 3).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, plain.grad)


def test_anchor_loss_and_its_gradient_are_those_of_the_whole_kl():
    """KL(base || model) over every word, not over the likeliest few."""
    hidden, head, _ = tensors()
    base, _, _ = tensors(seed=1)
    plain, ours = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(plain @ head.t(), -1),
        torch.log_softmax(base @ head.t(), -1),
        reduction="sum",
        log_target=True,
    )
    loss = anchor_loss(ours, head, base)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, plain.grad)
    assert distill(hidden, base, head) == pytest.approx(expected.item(), rel=1e-5)


def test_anchors_pull_nowhere_while_the_model_is_the_base():
    """Value and gradient are 0 there."""
    hidden, head, _ = tensors()
    own = hidden.clone().requires_grad_()
    loss = anchor_loss(own, head, hidden)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert own.grad is not None
    assert own.grad.abs().max().item() < 1e-6


def test_token_losses_are_the_plain_ones_and_tell_what_greedy_decoding_would_say():
    """One sweep gives both."""
    hidden, head, targets = tensors()
    targets[::3] = (hidden @ head.t()).argmax(-1)[::3]
    nll, greedy = token_nll(hidden, head, targets)
    expected = torch.nn.functional.cross_entropy(hidden @ head.t(), targets, reduction="none")
    torch.testing.assert_close(nll, expected)
    assert greedy.tolist() == ((hidden @ head.t()).argmax(-1) == targets).tolist()
    assert greedy.any() and not greedy.all()
