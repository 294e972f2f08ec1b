"""The two products of the delta form, and the gradients of what trains in them, and of nothing else.

    A:  h = x [A0 + dA; dA; H_A]ᵀ       ∂dA = (g1 + g2)ᵀ x       ∂x = g [A0 + dA; dA; H_A]
    B:  y = h [dB, B0, H_B]ᵀ            ∂dB = gᵀ h1              ∂h = g [dB, B0, H_B]

g is the gradient at h or at y; g1, g2 are its first and second R columns, h1 the first R columns of h.

Autograd on the joined matrices would multiply out the gradients of all their rows and columns, drop those of A0, B0 and the
history H, and keep all of h for the backward. Here nothing is kept but what is used: x, the joined matrices in the dtype that
they are multiplied in, and of h the R columns that ∂dB needs. The joined A has 2R rows where x has T, so it is little beside
what is kept anyway; joining anew in the backward would launch five more small kernels per layer.

Floating-point operations per token, without history: 10·R·(O + I), of which 4 forward, 4 for ∂x and ∂h, 2 for ∂dA and ∂dB.
The joined matrices would take 12, LoRA takes 6. Fewer than 10 is not to be had with W0 untouched: BA − B0A0 has rank 2R.

Shapes: T tokens, O out features, I in features, R the rank that trains, K = 2R and the rank of the history. x, h, y and g may
have more dimensions of tokens than one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def join_a(trainable_RI: Tensor, frozen_RI: Tensor, history: Tensor | None) -> Tensor:
    """[A0 + dA; dA; H_A] (K×I) in the dtype of dA.

    A0 of E experts is E×R×I. Then dA is E·R×I and the result E·K×I, as PEFT has them: expert after expert.
    """
    stacked, I = frozen_RI.shape[:-2], frozen_RI.shape[-1]
    trainable_RI = trainable_RI.view(frozen_RI.shape)
    earlier = [] if history is None else [history.to(trainable_RI.dtype).view(*stacked, -1, I)]
    return torch.cat([frozen_RI + trainable_RI, trainable_RI, *earlier], dim=-2).flatten(0, -2)


def join_b(trainable_OR: Tensor, frozen_OR: Tensor, history: Tensor | None) -> Tensor:
    """[dB, B0, H_B] (O×K) in the dtype of dB.

    With E experts all are as PEFT has them, O×R·E: the first columns of all experts, then their second, and so on.
    """
    earlier = [] if history is None else [history.to(trainable_OR.dtype)]
    return torch.cat([trainable_OR, frozen_OR, *earlier], dim=1)


def multiply_a(x: Tensor, trainable_RI: Tensor, frozen_RI: Tensor, history: Tensor | None) -> Tensor:
    """h = x [A0 + dA; dA; H_A]ᵀ, like `F.linear` in the dtype that they share, or in autocast's."""
    return _ProductA.apply(_autocast(x), trainable_RI, frozen_RI, history)


def multiply_b(h: Tensor, trainable_OR: Tensor, frozen_OR: Tensor, history: Tensor | None) -> Tensor:
    """y = h [dB, B0, H_B]ᵀ, like `F.linear` in the dtype that they share, or in autocast's."""
    h = _autocast(h)
    # A copy, since a view would keep all of h; an argument, so that second derivatives find their way through it to h.
    wanted = torch.is_grad_enabled() and trainable_OR.requires_grad
    h1 = h[..., : trainable_OR.shape[1]].contiguous() if wanted else None
    return _ProductB.apply(h, h1, trainable_OR, frozen_OR, history)


def _autocast(x: Tensor) -> Tensor:
    """x as `F.linear` under autocast would cast it, so that this and not x itself is kept for the backward."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


# The parameters are saved for second derivatives, which need to get through the joined matrix to them, and join them once more.
# Autocast is off in the backward, so gradients are given the dtype of their parameters there.


class _ProductA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, trainable_RI: Tensor, frozen_RI: Tensor, history: Tensor | None) -> Tensor:
        joined_KI = _autocast(join_a(trainable_RI, frozen_RI, history))
        needs_x, needs_trainable, *_ = ctx.needs_input_grad
        kept = x if needs_trainable else None, joined_KI if needs_x else None
        ctx.save_for_backward(*kept, trainable_RI, frozen_RI, history)
        return F.linear(x, joined_KI)

    @staticmethod
    def backward(ctx, g: Tensor):
        x, joined_KI, *halves = ctx.saved_tensors
        rank, dtype = len(halves[0]), halves[0].dtype
        grad_x = grad_RI = None
        if ctx.needs_input_grad[0]:
            grad_x = g @ (join_a(*halves).to(g.dtype) if torch.is_grad_enabled() else joined_KI)
        if ctx.needs_input_grad[1]:
            g_TR = (g[..., :rank] + g[..., rank : 2 * rank]).reshape(-1, rank)
            grad_RI = (g_TR.T @ x.reshape(-1, x.shape[-1])).to(dtype)
        return grad_x, grad_RI, None, None


class _ProductB(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, h: Tensor, h1: Tensor | None, trainable_OR: Tensor, frozen_OR: Tensor, history: Tensor | None
    ) -> Tensor:
        joined_OK = _autocast(join_b(trainable_OR, frozen_OR, history))
        kept = h1, joined_OK if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(*kept, trainable_OR, frozen_OR, history)
        return F.linear(h, joined_OK)

    @staticmethod
    def backward(ctx, g: Tensor):
        h1, joined_OK, *halves = ctx.saved_tensors
        grad_h = grad_OR = None
        if ctx.needs_input_grad[0]:
            grad_h = g @ (join_b(*halves).to(g.dtype) if torch.is_grad_enabled() else joined_OK)
        if ctx.needs_input_grad[2]:
            # h1ᵀ g and not gᵀ h1: on the CPU a product with few columns takes up to twice as long as one with few rows.
            # Contiguous like the parameter, in one copy with the cast, or autograd would copy it once more.
            grad_RO = h1.reshape(-1, h1.shape[-1]).T @ g.reshape(-1, g.shape[-1])
            grad_OR = grad_RO.T.to(halves[0].dtype, memory_format=torch.contiguous_format).contiguous()
        return grad_h, None, grad_OR, None, None
