"""Losses over the vocabulary that hold one chunk of logits, and give their gradient in the same sweep.

A plain cross-entropy keeps T x V logits, their softmax and their gradient: 3 x 100 MB for 512 tokens of a
49,152-word vocabulary. Here each chunk of positions makes its logits, turns them into the gradient of the
hidden states at once, and drops them; the head is frozen, so nothing else is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["anchor_loss", "distill", "next_token_loss", "token_nll"]

CHUNK_TOKENS = 256
_ROUND = 64
"""Chunks are rounded up to this: a product of a shape not seen before costs half as much again (NOTES.md)."""
VALUE_STRIDE = 8
_TINY = 1e-30


class _Chunk:
    """Room for one chunk's logits: pages fresh from the system cost as much as the product itself."""

    def __init__(self, head: Tensor) -> None:
        self.head = head
        self.raw = torch.empty(CHUNK_TOKENS, head.shape[0], dtype=head.dtype)
        self._hidden = torch.zeros(CHUNK_TOKENS, head.shape[1], dtype=head.dtype)

    def logits(self, hidden: Tensor) -> tuple[Tensor, int]:
        """Logits of at most CHUNK_TOKENS positions, rounded up, and how many of them are real.

        Valid until the next call.
        """
        n = len(hidden)
        rounded = min(len(self.raw), -(-n // _ROUND) * _ROUND)
        self._hidden[:n] = hidden
        return torch.mm(self._hidden[:rounded], self.head.t(), out=self.raw[:rounded]), n


class _HeadLoss(torch.autograd.Function):
    """Sum over positions of a loss of softmax(h W^T); `kind` turns p into dL/dlogits in place."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, kind: Any) -> Tensor:
        grad = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float64)
        chunk = _Chunk(head)
        probabilities = torch.empty_like(chunk.raw)
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits, n = chunk.logits(hidden[part])
            p = torch.softmax(logits, dim=-1, out=probabilities[: len(logits)])  # (C, V)
            total += kind(p[:n], part)
            grad[part] = (p @ head)[:n]
        ctx.save_for_backward(grad)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None


def next_token_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy, nats, differentiable in `hidden` only.

    Args:
        hidden: Normed hidden states of the positions that predict, (T, D).
        head: Frozen output embedding, (V, D).
        targets: Ids that they should predict, (T,) int64.
    """

    def grade(p: Tensor, part: slice) -> Tensor:
        row, at = torch.arange(len(p)), targets[part]
        chosen = p[row, at]
        # d(-log p_t)/dlogits = p - onehot(t); not scatter_add, whose deterministic form copies all of p.
        p[row, at] = chosen - 1
        return -chosen.float().clamp_min(_TINY).log().sum(dtype=torch.float64)

    return _apply(hidden, head, grade)


def anchor_loss(hidden: Tensor, head: Tensor, base_hidden: Tensor) -> Tensor:
    """Summed KL(base || model) over the whole vocabulary, nats, differentiable in `hidden` only.

    The gradient is exact. The value, which only people look at, is summed over every eighth position and
    scaled up: the logarithms of all would cost as much as the gradient.

    Args:
        hidden: Normed hidden states under the adapter, (T, D).
        head: Frozen output embedding, (V, D).
        base_hidden: Those of the base at the same positions, (T, D): its logits in 1.2 KB a position.
    Source: dKL(q || p)/dlogits = p - q.
    """
    chunk = _Chunk(head)

    def grade(p: Tensor, part: slice) -> Tensor:
        logits, n = chunk.logits(base_hidden[part])
        q = torch.softmax(logits, dim=-1)[:n]  # (C, V)
        some_q, some_p = (x[::VALUE_STRIDE].float() for x in (q, p))
        value = (some_q * ((some_q + _TINY).log() - (some_p + _TINY).log())).sum(dtype=torch.float64)
        p.sub_(q)
        return value * n / len(some_q)

    return _apply(hidden, head, grade)


def _apply(hidden: Tensor, head: Tensor, kind: Any) -> Tensor:
    loss: Tensor = _HeadLoss.apply(hidden, head, kind)  # type: ignore[no-untyped-call]  # torch's is untyped
    return loss


@torch.no_grad()
def token_nll(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each token, and whether greedy decoding would have chosen it.

    Args:
        hidden: (T, D).
        head: (V, D).
        targets: (T,) int64.
    Returns: Negative log-likelihood, (T,) float32, nats; and a (T,) bool tensor.
    """
    losses, hits = torch.empty(len(targets)), torch.empty(len(targets), dtype=torch.bool)
    chunk = _Chunk(head)
    wide = torch.empty(chunk.raw.shape)
    for start in range(0, hidden.shape[0], CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        raw, n = chunk.logits(hidden[part])
        logits = wide[:n].copy_(raw[:n])
        chosen = logits.gather(1, targets[part, None])
        top = logits.amax(dim=1, keepdim=True)
        hits[part] = (chosen >= top).squeeze(1)
        total = logits.sub_(top).exp_().sum(dim=1, keepdim=True)  # in place: no second T x V
        losses[part] = (total.log_() + top - chosen).squeeze(1)
    return losses, hits


@torch.no_grad()
def distill(hidden: Tensor, base_hidden: Tensor, head: Tensor) -> float:
    """Summed KL(base, version), nats, over whole distributions at the same positions.

    Args:
        hidden, base_hidden: Normed hidden states under the version and under the base, (T, D).
        head: (V, D).
    """
    total, chunk = 0.0, _Chunk(head)
    few = min(CHUNK_TOKENS, _ROUND)  # it takes several T x V tensors at once
    for start in range(0, hidden.shape[0], few):
        part = slice(start, start + few)
        n = len(hidden[part])
        own = torch.log_softmax(chunk.logits(hidden[part])[0][:n].float(), dim=-1)
        base = torch.log_softmax(chunk.logits(base_hidden[part])[0][:n].float(), dim=-1)
        total += float((base.exp() * (base - own)).sum(dtype=torch.float64))
    return total
