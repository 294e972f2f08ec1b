"""The matrix that PEFT reads as `weight` of a half in delta form: joined when it is used, not when it is looked at.

PEFT's layers ask for `lora_A.weight.dtype` in every forward, to cast their input, and for nothing else of the matrix.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def joined_weight(like: Tensor, join: Callable[[], Tensor]) -> Tensor:
    """What `join` returns, of the dtype of `like`, when more than its dtype is asked for."""
    # the compiler drops what is not used, and would not take the class into its graph
    return join() if torch.compiler.is_compiling() else JoinedWeight(like.dtype, join)


class JoinedWeight(Tensor):
    """A tensor that knows its `dtype` and gets all else by calling `join`: values, shape, device, derivatives.

    Like the `weight` of an `nn.Linear` it is the live matrix, so keep a `clone()` if the parameters go on changing. What is
    written to it is lost.
    """

    join: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, dtype: torch.dtype, join: Callable[[], Tensor]) -> "JoinedWeight":
        weight = Tensor._make_wrapper_subclass(cls, (), dtype=dtype)
        weight.join = join
        return weight

    def __init__(self, dtype: torch.dtype, join: Callable[[], Tensor]):
        pass

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]  # an attribute in torch's stubs
        with torch._C.DisableTorchFunctionSubclass():
            return super().dtype

    @classmethod
    def __torch_function__(cls, func, types, args: tuple = (), kwargs: dict[str, Any] | None = None):
        args, kwargs = tree_map_only(JoinedWeight, lambda weight: weight.join(), (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]  # torch's stub is the disabled one
        return cls.__torch_function__(func, types, args, kwargs)  # for who calls torch's operators past the above
