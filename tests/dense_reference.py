"""LoRA-GA as the paper writes it, slow and dense, sharing no code with the package: what the tests compare with.

Everything in float64. O out features, I in features, R rank.
"""

import math

import torch


def singular_vectors(grad_OI):
    u, s, vt = torch.linalg.svd(grad_OI.double(), full_matrices=False)
    return u, s, vt.T


def scale(name, *, out_features, rank, scaling, gamma, weight_OI):
    if name == "stable":
        return out_features ** (1 / 4) / math.sqrt(gamma)
    if name == "unit":
        return 1.0
    if name == "gd":
        return 1 / scaling
    if name == "weight_svd":
        sigma = torch.linalg.svdvals(weight_OI.double())
        return sum(math.sqrt(sigma[i] / scaling) for i in range(rank)) / rank
    raise KeyError(name)


def matched_scale(out_features, in_features, rank, scaling, full_rate, rate_A, rate_B, offset=True):
    """The length c of every row of A0 and column of B0 at which one step of ±rate in every entry is as long as ±full_rate is in
    W: dB has out_features·rank entries behind A0, dA has rank·in_features behind B0."""
    wanted = math.sqrt(out_features * in_features * full_rate**2)
    through_A0 = scaling * math.sqrt(out_features * rank * rate_B**2)
    through_B0 = scaling * math.sqrt(rank * in_features * rate_A**2) if offset else 0.0
    return wanted / math.hypot(through_A0, through_B0)


def factors(grad_OI, rank, direction, c):
    """(A0, B0) of the paper for the deterministic directions, each singular pair up to its sign."""
    u, _, v = singular_vectors(grad_OI)
    first, second = range(rank), range(rank, 2 * rank)
    a_columns, b_columns = {
        "ArB2r": (first, second),
        "A2rBr": (second, first),
        "ArBr": ([2 * i + 1 for i in range(rank)], [2 * i for i in range(rank)]),
    }[direction]
    a = torch.stack([c * v[:, i] for i in a_columns])
    b = torch.stack([c * u[:, i] for i in b_columns], dim=1)
    return a, b


def alignment(grad_OI, a_RI, b_OR):
    """cos(G, B0 B0ᵀ G + G A0ᵀ A0), entry by entry."""
    grad, a, b = grad_OI.double(), a_RI.double(), b_OR.double()
    step = b @ (b.T @ grad) + (grad @ a.T) @ a  # in this order: B0 B0ᵀ alone is O×O
    return ((grad * step).sum() / (grad.norm() * step.norm())).item()


def forward(weight_OI, x_TI, scaling, a_RI, b_OR, a0_RI, b0_OR):
    """y = W0 x + s (B A − B0 A0) x, the paper's function with its offset."""
    return x_TI @ (weight_OI + scaling * (b_OR @ a_RI - b0_OR @ a0_RI)).T


def weight_gradient(named_weights, losses):
    """∂(Σ losses)/∂W by autograd on the weights themselves; `named_weights` maps a name to (weight, transposed?)."""
    grads = torch.autograd.grad(sum(losses), [weight for weight, _ in named_weights.values()])
    return {
        name: grad.T if transposed else grad
        for (name, (_, transposed)), grad in zip(named_weights.items(), grads, strict=True)
    }


def token_mean_loss(logits_BTV, labels_BT, num_tokens, ahead=1):
    """Negative log-likelihood of the label tokens, token by token, over `num_tokens`; the logits predict what is `ahead`."""
    log_probs = torch.log_softmax(logits_BTV.float(), dim=-1)
    total = 0.0
    for row in range(labels_BT.shape[0]):
        for position in range(ahead, labels_BT.shape[1]):
            target = labels_BT[row, position].item()
            if target != -100:
                total = total - log_probs[row, position - ahead, target]
    return total / num_tokens


def autograd_gradients(base, names, batches):
    """By autograd on the weights of the untouched base model, in eval mode: no dropout, no probe, no PEFT."""
    weights = {}
    for name in names:
        module = base.get_submodule(name.removeprefix("base_model.model."))
        weights[name] = (module.weight, not isinstance(module, torch.nn.Linear))  # Conv1D stores I×O
    ahead = 0 if base.config.is_encoder_decoder else 1  # an encoder-decoder shifts the labels into its decoder's inputs
    num_tokens = sum(int(batch["labels"][:, ahead:].ne(-100).sum()) for batch in batches)
    losses = [token_mean_loss(base(**batch).logits, batch["labels"], num_tokens, ahead) for batch in batches]
    return weight_gradient(weights, losses)
