"""The two products of the delta form, and the gradients of what trains in them, and of nothing else.

    A:  h = x [A0 + dA; dA; H_A]ᵀ       ∂dA = (g1 + g2)ᵀ x       ∂x = g [A0 + dA; dA; H_A]
    B:  y = h [dB, B0, H_B]ᵀ            ∂dB = gᵀ h1              ∂h = g [dB, B0, H_B]

g is the gradient at h or at y; g1, g2 are its first and second R columns, h1 the first R columns of h.

Autograd on the joined matrices would multiply out the gradients of all their rows and columns, drop those of A0, B0 and the
history H, and keep the joined matrices and all of h for the backward. Here nothing is kept but what is used: the parameters,
to be joined again, x, and of h the R columns that ∂dB needs.

Floating-point operations per token, without history: 10·R·(O + I), of which 4 forward, 4 for ∂x and ∂h, 2 for ∂dA and ∂dB.
The joined matrices would take 12, LoRA takes 6. Fewer than 10 is not to be had with W0 untouched: BA − B0A0 has rank 2R.

Shapes: T tokens, O out features, I in features, R the rank that trains, K = 2R and the rank of the history. x, h, y and g may
have more dimensions of tokens than one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def join_a(trainable_RI: Tensor, frozen_RI: Tensor, history: Tensor | None) -> Tensor:
    """[A0 + dA; dA; H_A] (K×I) in the dtype of dA."""
    earlier = [] if history is None else [history.to(trainable_RI.dtype)]
    return torch.cat([frozen_RI + trainable_RI, trainable_RI, *earlier], dim=0)


def join_b(trainable_OR: Tensor, frozen_OR: Tensor, history: Tensor | None) -> Tensor:
    """[dB, B0, H_B] (O×K) in the dtype of dB."""
    earlier = [] if history is None else [history.to(trainable_OR.dtype)]
    return torch.cat([trainable_OR, frozen_OR, *earlier], dim=1)


def multiply_a(x: Tensor, trainable_RI: Tensor, frozen_RI: Tensor, history: Tensor | None) -> Tensor:
    """h = x [A0 + dA; dA; H_A]ᵀ, like `F.linear` in the dtype that they share, or in autocast's."""
    return _ProductA.apply(_autocast(x), trainable_RI, frozen_RI, history)


def multiply_b(h: Tensor, trainable_OR: Tensor, frozen_OR: Tensor, history: Tensor | None) -> Tensor:
    """y = h [dB, B0, H_B]ᵀ, like `F.linear` in the dtype that they share, or in autocast's."""
    h = _autocast(h)
    # A copy, since a view would keep all of h; an argument, so that second derivatives find their way through it to h.
    h1 = h[..., : trainable_OR.shape[1]].contiguous() if trainable_OR.requires_grad else None
    return _ProductB.apply(h, h1, trainable_OR, frozen_OR, history)


def _autocast(x: Tensor) -> Tensor:
    """x as `F.linear` under autocast would cast it, so that this and not x itself is kept for the backward."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


# Both save the parameters themselves, no copies: ZeRO-3 and FSDP2 free them after the forward and gather them again for the
# backward. Autocast is off there, so what it did to the parameters is written out, and their gradients get their dtype.


class _ProductA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, trainable_RI: Tensor, frozen_RI: Tensor, history: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, trainable_RI, frozen_RI, history)
        return F.linear(x, join_a(trainable_RI, frozen_RI, history))

    @staticmethod
    def backward(ctx, g: Tensor):
        x, trainable_RI, frozen_RI, history = ctx.saved_tensors
        grad_x = grad_RI = None
        if ctx.needs_input_grad[0]:
            grad_x = g @ join_a(trainable_RI, frozen_RI, history).to(g.dtype)
        if ctx.needs_input_grad[1]:
            rank, in_features = trainable_RI.shape
            g_TR = (g[..., :rank] + g[..., rank : 2 * rank]).reshape(-1, rank)
            grad_RI = (g_TR.T @ x.reshape(-1, in_features)).to(trainable_RI.dtype)
        return grad_x, grad_RI, None, None


class _ProductB(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, h: Tensor, h1: Tensor | None, trainable_OR: Tensor, frozen_OR: Tensor, history: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(h1, trainable_OR, frozen_OR, history)
        return F.linear(h, join_b(trainable_OR, frozen_OR, history))

    @staticmethod
    def backward(ctx, g: Tensor):
        h1, trainable_OR, frozen_OR, history = ctx.saved_tensors
        grad_h = grad_OR = None
        if ctx.needs_input_grad[0]:
            grad_h = g @ join_b(trainable_OR, frozen_OR, history).to(g.dtype)
        if ctx.needs_input_grad[2]:
            out_features, rank = trainable_OR.shape
            # h1ᵀ g and not gᵀ h1: on the CPU a product with few columns takes up to twice as long as one with few rows
            grad_OR = (h1.reshape(-1, rank).T @ g.reshape(-1, out_features)).T.to(trainable_OR.dtype)
        return grad_h, None, grad_OR, None, None
