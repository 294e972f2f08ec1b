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
        found = min(rank, len(sigma))
        return sum(math.sqrt(sigma[i] / scaling) for i in range(found)) / found
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


def pairs(grad_OI):
    """How many singular pairs a float32 gradient really has."""
    return int(torch.linalg.matrix_rank(grad_OI.double(), rtol=1e-5))


def is_the_papers_as_far_as_it_goes(grad_OI, rank, direction, c, a_RI, b_OR, tolerance):
    """Whether A0 and B0 take the singular pairs that there are, each up to its sign, and where there are no more A0 has
    c times orthonormal rows, as many as fit beside the others, and B0 zeros. For the deterministic directions."""
    u, _, v = singular_vectors(grad_OI)
    found, a, b = pairs(grad_OI), a_RI.double() / c, b_OR.double() / c
    a_columns, b_columns = {
        "ArB2r": (range(rank), range(rank, 2 * rank)),
        "A2rBr": (range(rank, 2 * rank), range(rank)),
        "ArBr": (range(1, 2 * rank, 2), range(0, 2 * rank, 2)),
    }[direction]
    problems = []
    for row, i in enumerate(a_columns):
        if i < found and abs(abs(a[row] @ v[:, i]) - 1) > tolerance:
            problems.append(f"row {row} of A0 is not singular vector {i}")
    for column, i in enumerate(b_columns):
        if i < found and abs(abs(b[:, column] @ u[:, i]) - 1) > tolerance:
            problems.append(f"column {column} of B0 is not singular vector {i}")
        if i >= found and b[:, column].any():
            problems.append(f"column {column} of B0 is not zero")
    there = a[a.any(dim=1)]
    if len(there) != min(rank, a.shape[1]):
        problems.append(f"A0 has {len(there)} rows that are not zero")
    if (there @ there.T - torch.eye(len(there), dtype=torch.float64)).abs().max() > tolerance:
        problems.append("the rows of A0 are not orthonormal")
    return not problems, problems


def two_sided_estimate(grad_OI, q_OK, p_IK, guessing):
    """G but for what the spans of Q and P both miss; `guessing` at that from the rest: C A⁺ B where G = [[A, B], [C, D]] in
    these spans and their complements, A⁺ damped by the singular value of A in the middle."""
    onto_q, onto_p = (basis.double() @ torch.linalg.pinv(basis.double()) for basis in (q_OK, p_IK))
    grad = grad_OI.double()
    off_q, off_p = torch.eye(len(onto_q)).double() - onto_q, torch.eye(len(onto_p)).double() - onto_p
    known = grad - off_q @ grad @ off_p
    if not guessing:
        return known
    u, s, v = singular_vectors(onto_q @ grad @ onto_p)
    K = q_OK.shape[1]
    damped = v[:, :K] * (s[:K] / (s[:K] ** 2 + s[K // 2] ** 2)) @ u[:, :K].T
    return known + (off_q @ grad @ onto_p) @ damped @ (onto_q @ grad @ off_p)


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
        name: grad.mT if transposed else grad
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
    modules = dict(base.named_modules())
    for name in names:
        path = name.removeprefix("base_model.model.")
        if path in modules:
            weights[name] = (modules[path].weight, type(modules[path]).__name__ == "Conv1D")  # which stores I×O
        else:  # a parameter: most classes of experts say whether they store E×I×O; to PEFT those of Llama 4 are E×O×I
            parameter = base.get_parameter(path)
            owner = modules[path.rpartition(".")[0]]
            weights[name] = (parameter, parameter.dim() == 3 and getattr(owner, "is_transposed", False))
    ahead = 0 if base.config.is_encoder_decoder else 1  # an encoder-decoder shifts the labels into its decoder's inputs
    num_tokens = sum(int(batch["labels"][:, ahead:].ne(-100).sum()) for batch in batches)
    losses = [token_mean_loss(base(**batch).logits, batch["labels"], num_tokens, ahead) for batch in batches]
    return weight_gradient(weights, losses)
