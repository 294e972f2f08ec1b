"""How the parts of a layer in memory form its matrices in the files, and are recovered from them bit for bit.

                        in memory         adapter_model.safetensors                            lora_ga.tensors
    with the offset     dA, A0, dB, B0    lora_A = [A0 + dA; dA] (2R×I), lora_B = [dB, B0]     A0
    without             dA, A0, dB        lora_A = A0 + dA (R×I),        lora_B = dB           A0, dA

`lora_ga.tensors` keeps what cannot be recovered exactly from the matrices: a sum does not determine its terms.
Names in memory are those of `state_dict()`: `trainable` is the difference, `frozen` the initial factor.

Shapes: O out features, I in features, R the rank that trains. With E experts A0 is E×R×I, and what PEFT reads is E·2R×I and
O×2R·E; see `adapter.product`.
"""

from typing import Any, Protocol

from torch import Tensor

from ..adapter.delta import DeltaA, DeltaB, SumA

Tensors = dict[str, Tensor]


class Layout(Protocol):
    """Both directions between memory and files. Tensors of other modules pass through.

    `in_memory` names the halves as `state_dict()` does; in `on_disk` every matrix is the one `weight` that PEFT reads;
    `resume_only` is what `lora_ga.tensors` holds.
    """

    times: int
    """The rank in the file is `times`·R, before any restart."""

    def join(self, in_memory: Tensors) -> Tensors:
        """The `on_disk` of an adapter."""

    def keep(self, in_memory: Tensors) -> Tensors:
        """The `resume_only` of an adapter; the names in `in_memory` do not contain the adapter's."""

    def split(self, on_disk: Tensors, resume_only: Tensors) -> dict[str, Any]:
        """The `in_memory` that `join` and `keep` were given; `history` is None without restarts."""


class WithOffset:
    """[A0 + dA; dA], [dB, B0], followed by the history after restarts; resume only: A0 under the layer's name."""

    times = 2

    def join(self, in_memory: Tensors) -> Tensors:
        on_disk = {}
        for key, value in in_memory.items():
            module, _, part = key.rpartition(".")
            if part == "trainable" and (".lora_A" in module or ".lora_B" in module):
                join = DeltaA.join if ".lora_A" in module else DeltaB.join
                on_disk[f"{module}.weight"] = join(
                    value, in_memory[f"{module}.frozen"], in_memory.get(f"{module}.history")
                )
            elif not (part in ("frozen", "history") and (".lora_A" in module or ".lora_B" in module)):
                on_disk[key] = value
        return on_disk

    def keep(self, in_memory: Tensors) -> Tensors:
        suffix = ".lora_A.frozen"
        return {key.removesuffix(suffix): value for key, value in in_memory.items() if key.endswith(suffix)}

    def split(self, on_disk: Tensors, resume_only: Tensors) -> dict[str, Any]:
        in_memory: dict[str, Any] = {}
        for key, value in on_disk.items():
            module = key.removesuffix(".weight")
            if key.endswith(".lora_A.weight"):
                in_memory[f"{module}.frozen"] = a0 = resume_only[module.removesuffix(".lora_A")]
                in_memory[f"{module}.trainable"], in_memory[f"{module}.history"] = DeltaA.split(value, a0)
            elif key.endswith(".lora_B.weight"):
                a0 = resume_only[module.removesuffix(".lora_B")]
                parts = DeltaB.split(value, a0.shape[:-1].numel())
                in_memory |= zip((f"{module}.trainable", f"{module}.frozen", f"{module}.history"), parts, strict=True)
            else:
                in_memory[key] = value
        return in_memory


class WithoutOffset:
    """A0 + dA, dB; resume only: A0 and dA under their names in memory. dB is `lora_B.weight`, in memory and on disk."""

    times = 1

    def join(self, in_memory: Tensors) -> Tensors:
        on_disk = {}
        for key, value in in_memory.items():
            module, _, part = key.rpartition(".")
            if part == "trainable" and ".lora_A" in module:
                on_disk[f"{module}.weight"] = SumA.join(value, in_memory[f"{module}.frozen"])
            elif not (part == "frozen" and ".lora_A" in module):
                on_disk[key] = value
        return on_disk

    def keep(self, in_memory: Tensors) -> Tensors:
        return {key: value for key, value in in_memory.items() if key.endswith((".lora_A.frozen", ".lora_A.trainable"))}

    def split(self, on_disk: Tensors, resume_only: Tensors) -> dict[str, Any]:
        return resume_only | {key: value for key, value in on_disk.items() if not key.endswith(".lora_A.weight")}


LAYOUTS: dict[bool, Layout] = {True: WithOffset(), False: WithoutOffset()}
"""By the option `ga_offset`."""
