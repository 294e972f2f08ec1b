"""Every layer's gradient factored on one process, its A0 and B0 written on all.

Shapes: O out features, I in features, R LoRA rank.
"""

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from .arguments import LoRAGAArguments
from .backends import broadcast, compute_device, full_tensor, raise_on_all, rank, spread
from .delta import freeze_trained, write_factors
from .estimation import Accumulator, derived_seed
from .factors import Factors, lora_ga_factors, scale_factors
from .quantized import dequantized_weight
from .report import LayerReport


def write_all_factors(
    layers: dict[str, LoraLayer],
    accumulators: dict[str, Accumulator],
    adapter_name: str,
    config: LoRAGAArguments,
    restart: bool = False,
) -> dict[str, LayerReport]:
    """Factor every gradient once, on one process each, and write the factors on all. Empties `accumulators`.

    Nothing is written before all factors have been found; at a `restart` what each layer has learned is frozen before.

    Returns:
        what there is to tell of each layer.
    """
    owners = spread({name: sum(total.numel() for total in acc.sums()) for name, acc in accumulators.items()})
    found: dict[str, Factors] = {}
    problem = None
    for name, layer in layers.items():
        mine = owners[name] == rank()
        weight_s = weight_singular_values(layer, mine) if config.ga_scale == "weight_svd" else None
        accumulator = accumulators.pop(name)  # so that each gradient is freed in turn
        if mine:
            try:
                found[name] = factor_gradient(name, layer, accumulator, adapter_name, config, weight_s)
            except torch.linalg.LinAlgError as error:
                problem = f"The gradient of {name} cannot be factored ({error}). Estimate on other or more samples."
    raise_on_all(problem)

    to_tell = []
    for name, layer in layers.items():
        R, O, I = layer.r[adapter_name], layer.out_features, layer.in_features
        device = compute_device(layer.lora_A[adapter_name].trainable)
        flat = torch.empty(R * I + O * R + 2 * R + 2, dtype=torch.float32, device=device)
        if name in found:
            factors = found.pop(name)
            numbers = torch.tensor([factors.alignment, factors.gradient_norm], dtype=torch.float32, device=device)
            parts = [factors.a_RI.flatten(), factors.b_OR.flatten(), factors.singular_values_K, numbers]
            torch.cat(parts, out=flat)
        broadcast(flat, source=owners[name])
        a, b, numbers = flat.split([R * I, O * R, 2 * R + 2])
        if restart:
            freeze_trained(layer, adapter_name)
        write_factors(layer, adapter_name, a.view(R, I), b.view(O, R))
        to_tell.append(numbers.clone())  # a part of `flat` would keep all of it
    # after the loop, which so waits for no layer's broadcast and write
    reports = {}
    for name, numbers in zip(layers, to_tell, strict=True):
        *singular_values, layer_alignment, gradient_norm = numbers.tolist()
        reports[name] = LayerReport(layer_alignment, singular_values, gradient_norm)
    return reports


def weight_singular_values(layer: LoraLayer, mine: bool) -> Tensor | None:
    """The singular values of W, dequantized and gathered, on the process whose layer it is; all take part in gathering.

    The whole weight lives no longer than this call, so that no two ever stand on a process.
    """
    weight = full_tensor(dequantized_weight(layer))
    return torch.linalg.svdvals(weight.detach().float()) if mine else None


def factor_gradient(
    name: str,
    layer: LoraLayer,
    accumulator: Accumulator,
    adapter_name: str,
    config: LoRAGAArguments,
    weight_s: Tensor | None = None,
) -> Factors:
    """A0 (R×I) and B0 (O×R) of one layer, float32; see `factors` for the formulas.

    `weight_s`, the singular values of W, are for `weight_svd` only.
    """
    R = layer.r[adapter_name]
    scales = scale_factors(
        config.ga_scale,  # type: ignore[arg-type]  # LoRAGAArguments has checked that it is one of them
        out_features=layer.out_features,
        in_features=layer.in_features,
        rank=R,
        scaling=layer.scaling[adapter_name],
        gamma=config.ga_gamma,
        weight_singular_values=lambda: weight_s,  # type: ignore[arg-type, return-value]  # not None where it is called
    )
    if not config.ga_offset:
        scales = scales._replace(c_B=0.0)  # B starts at zero, and the alignment is that of A0 alone
    generator = torch.Generator("cpu").manual_seed(derived_seed(f"{name}/direction", config.ga_seed))
    direction = config.ga_direction
    return lora_ga_factors(accumulator.triplets(2 * R), R, direction, scales, generator)  # type: ignore[arg-type]  # as above
