"""How the parts of a layer in memory make up its matrices in the files, and come out of them again bit for bit.

                        in memory         adapter_model.safetensors                            lora_ga.safetensors
    with the offset     dA, A0, dB, B0    lora_A = [A0 + dA; dA] (2R×I), lora_B = [dB, B0]     A0
    without             dA, A0, dB        lora_A = A0 + dA (R×I),        lora_B = dB           A0, dA

`lora_ga.safetensors` keeps what cannot be told from the matrices: a sum does not say what was added, but for one rounding.
Names in memory are those of `state_dict()`: `trainable` and `frozen` for the difference and the initial factor.

Shapes: O out features, I in features, R the rank that trains.
"""

from typing import Any, Protocol

from torch import Tensor

from ..adapter.delta import DeltaA, DeltaB, SumA

Tensors = dict[str, Tensor]


class Layout(Protocol):
    """Both directions between memory and files. In `portable` every matrix is the one `weight` that PEFT reads; `kept` is what
    `lora_ga.safetensors` holds. Tensors of other modules pass through."""

    times: int
    """The rank in the file is `times`·R, before any restart."""

    def join(self, native: Tensors) -> Tensors:
        """The `portable` of an adapter."""

    def keep(self, native: Tensors) -> Tensors:
        """The `kept` of an adapter; the names in `native` do not contain the adapter's."""

    def split(self, portable: Tensors, kept: Tensors) -> dict[str, Any]:
        """The `native` that `join` and `keep` were given; a `history` is None where there was no restart."""


class WithOffset:
    """[A0 + dA; dA], [dB, B0], and after restarts the history behind them; kept: A0 under the layer's name."""

    times = 2

    def join(self, native: Tensors) -> Tensors:
        portable = {}
        for key, value in native.items():
            module, _, part = key.rpartition(".")
            if part == "trainable" and (".lora_A" in module or ".lora_B" in module):
                join = DeltaA.join if ".lora_A" in module else DeltaB.join
                portable[f"{module}.weight"] = join(value, native[f"{module}.frozen"], native.get(f"{module}.history"))
            elif not (part in ("frozen", "history") and (".lora_A" in module or ".lora_B" in module)):
                portable[key] = value
        return portable

    def keep(self, native: Tensors) -> Tensors:
        suffix = ".lora_A.frozen"
        return {key.removesuffix(suffix): value for key, value in native.items() if key.endswith(suffix)}

    def split(self, portable: Tensors, kept: Tensors) -> dict[str, Any]:
        native: dict[str, Any] = {}
        for key, value in portable.items():
            module = key.removesuffix(".weight")
            if key.endswith(".lora_A.weight"):
                native[f"{module}.frozen"] = a0_RI = kept[module.removesuffix(".lora_A")]
                native[f"{module}.trainable"], native[f"{module}.history"] = DeltaA.split(value, len(a0_RI))
            elif key.endswith(".lora_B.weight"):
                rank = len(kept[module.removesuffix(".lora_B")])
                parts = DeltaB.split(value, rank)
                native |= zip((f"{module}.trainable", f"{module}.frozen", f"{module}.history"), parts, strict=True)
            else:
                native[key] = value
        return native


class WithoutOffset:
    """A0 + dA, dB; kept: A0 and dA under their names in memory. dB is in memory what it is in the file, `lora_B.weight`."""

    times = 1

    def join(self, native: Tensors) -> Tensors:
        portable = {}
        for key, value in native.items():
            module, _, part = key.rpartition(".")
            if part == "trainable" and ".lora_A" in module:
                portable[f"{module}.weight"] = SumA.join(value, native[f"{module}.frozen"])
            elif not (part == "frozen" and ".lora_A" in module):
                portable[key] = value
        return portable

    def keep(self, native: Tensors) -> Tensors:
        return {key: value for key, value in native.items() if key.endswith((".lora_A.frozen", ".lora_A.trainable"))}

    def split(self, portable: Tensors, kept: Tensors) -> dict[str, Any]:
        return kept | {key: value for key, value in portable.items() if not key.endswith(".lora_A.weight")}


LAYOUTS: dict[bool, Layout] = {True: WithOffset(), False: WithoutOffset()}
"""By the option `ga_offset`."""
