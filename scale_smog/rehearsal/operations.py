"""What a rank asks of its pretended GPU and of the other ranks, noted operation by operation.

The kernels of the runtime do nothing, and cuBLAS and cuDNN cannot run on it: matrix products and
convolutions are answered by a tensor of the right shape. Collectives are answered at once.
"""

import ctypes
import math
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HERE, PACKAGE = Path(__file__).parent, Path(__file__).parents[1]
PLAIN = (Tensor, torch.nn.Parameter)
Handler = Callable[[Any, Any, Any], Any]
COUNTERS = ("kernels", "copies", "stream_waits", "device_waits", "event_waits")
LARGE = 2**14  # values on the host that nobody computes, so that wide nets are built at once
FILLING = {"normal_", "uniform_", "zero_", "fill_", "erfinv_", "mul_", "add_", "clamp_", "copy_",
           "clone"}  # fmt: skip
COLLECTIVES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "barrier": "barrier",
}
SENT_SHARES = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "broadcast": 1.0}


class Collective(NamedTuple):
    """One that a rank has issued."""

    kind: str
    device: str
    dtype: str
    ranks: int
    bytes: int  # of the whole tensor

    @property
    def sent_bytes(self) -> float:
        """That a rank sends by the ring algorithms."""
        return SENT_SHARES.get(self.kind, 0.0) * self.bytes * (self.ranks - 1) / self.ranks


class Operations(TorchDispatchMode):
    """Notes collectives, products and waits of what runs inside it.

    Use as a context manager around building and stepping; `clear` before the step that counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self.num_products = 0
        self.waits: Counter[str] = Counter()
        self._handlers: dict[Any, Handler] = {}
        self._counters = ctypes.CDLL(None).pretended_gpu_counts
        self._before: dict[str, int] = {}
        self.clear()

    def clear(self) -> None:
        """Forgets what has been noted."""
        self.collectives, self.num_products, self.waits = [], 0, Counter()
        self._before = self._read()

    @property
    def counts(self) -> dict[str, int]:
        """Of the runtime, since `clear`: COUNTERS."""
        return {name: num - self._before[name] for name, num in self._read().items()}

    def _read(self) -> dict[str, int]:
        numbers = (ctypes.c_long * len(COUNTERS))()
        self._counters(numbers)
        return dict(zip(COUNTERS, numbers, strict=True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A step at 1,024 ranks has a million operations: what is not noted must pass at once.
        handler = self._handlers.get(func)
        if handler is None:
            handler = self._handlers[func] = self._handler_of(func)
        return handler(func, args, kwargs or {})

    def _handler_of(self, func: Any) -> Handler:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            return self._collective if name in COLLECTIVES else _run
        if name in PRODUCTS:
            return self._product
        if name in SIZED_BY_VALUES:
            return self._sized_by_values
        if name == "_local_scalar_dense":
            return _value
        if name == "_to_copy":
            return _copy_to_host
        return _fill if name in FILLING else _run

    def _product(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        if not any(x.is_cuda for x in tensors) or not all(type(x) in PLAIN for x in tensors):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        _require_alike(name, tensors)
        self.num_products += 1
        return PRODUCTS[name](args, kwargs)

    def _sized_by_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not args[0].is_cuda:
            return func(*args, **kwargs)
        self.waits[own_frames()] += 1
        return SIZED_BY_VALUES[func.overloadpacket.__name__](args, kwargs)

    def _collective(self, func: Any, args: Any, _kwargs: Any) -> Any:
        """Answers as if all ranks had sent what this one has."""
        tensors = [[x for x in tree_leaves(arg) if isinstance(x, Tensor)] for arg in args[:2]]
        num_bytes = max(sum(x.numel() * x.element_size() for x in xs) for xs in tensors)
        group = dist.ProcessGroup.unbox(next(x for x in args if isinstance(x, torch.ScriptObject)))
        first = next(x for xs in tensors for x in xs)
        kind = COLLECTIVES[func.overloadpacket.__name__]
        dtype = str(first.dtype).removeprefix("torch.")
        found = Collective(kind, first.device.type, dtype, group.size(), num_bytes)
        self.collectives.append(found)
        work = Work.boxed(FakeWork())
        return (args[0], work) if len(func._schema.returns) == 2 else work

    @contextmanager
    def watching_for_waits(self) -> Iterator[None]:
        """Notes where the host waits for the device, by file and line of this package."""

        def note(message: Any, *_: Any, **__: Any) -> None:
            if "synchroniz" in str(message) and "prototype" not in str(message):
                self.waits[own_frames()] += 1

        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = note
                yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def own_frames(num: int = 3) -> str:
    """Where this package is at the moment: innermost first, as `base.py:210 < loop.py:80`."""
    frames = [
        f"{Path(frame.filename).name}:{frame.lineno}"
        for frame in traceback.extract_stack()
        if PACKAGE in Path(frame.filename).parents and Path(frame.filename).parent != HERE
    ]
    return " < ".join(frames[: -num - 1 : -1]) or "outside of the package"


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _fill(func: Any, args: Any, kwargs: Any) -> Any:
    """Writes values, but for those of large tensors on the host, which nobody needs."""
    x = args[0]
    if x.numel() < LARGE or not x.is_cpu:
        return func(*args, **kwargs)
    return torch.empty_like(x) if func.overloadpacket.__name__ == "clone" else x


def _copy_to_host(func: Any, args: Any, kwargs: Any) -> Any:
    """As `_value`, of a whole tensor; copies to elsewhere are the runtime's."""
    result = func(*args, **kwargs)
    return result.zero_() if args[0].is_cuda and result.is_cpu else result


def _value(func: Any, args: Any, kwargs: Any) -> Any:
    """Reads a number: it waits, and finds zero, as no kernel has written one."""
    value = func(*args, **kwargs)
    return type(value)(0) if args[0].is_cuda else value


def _require_alike(name: str, tensors: Sequence[Tensor]) -> None:
    """As cuBLAS and cuDNN do.

    Raises:
        RuntimeError: on tensors of two devices or two dtypes.
    """
    for kind in ("device", "dtype"):
        found = {str(getattr(x, kind)) for x in tensors}
        if len(found) > 1:
            raise RuntimeError(f"{name}: tensors of {kind}s {', '.join(sorted(found))}")


def _matrix_product(args: Any, kwargs: Any) -> Tensor:
    x, y = [a for a in args if isinstance(a, Tensor)][-2:]  # the first of three is added
    if x.shape[-1] != y.shape[-2]:
        raise RuntimeError(f"matrix product of {list(x.shape)} and {list(y.shape)}")
    if "out" in kwargs:
        return kwargs["out"]
    return x.new_empty(*x.shape[:-1], y.shape[-1])


def _convolution(args: Any, _kwargs: Any) -> Tensor:
    x, weight, _, stride, padding, dilation = args[:6]
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(
            x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True
        )
    ]
    return _empty_like_operands((x.shape[0], weight.shape[0], *size), x, weight)


def _convolution_backward(args: Any, _kwargs: Any) -> tuple[Tensor | None, ...]:
    grad, x, weight, bias_sizes, *_, wanted = args
    return (
        _empty_like_operands(x.shape, x, weight) if wanted[0] else None,
        _empty_like_operands(weight.shape, x, weight) if wanted[1] else None,
        grad.new_empty(bias_sizes) if wanted[2] else None,
    )


def _empty_like_operands(shape: Sequence[int], x: Tensor, weight: Tensor) -> Tensor:
    """channels_last where one of the operands is, as cuDNN's results are."""
    last = torch.channels_last
    is_last = any(
        t.dim() == 4 and t.is_contiguous(memory_format=last) and not t.is_contiguous()
        for t in (x, weight)
    )
    memory_format = last if is_last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


PRODUCTS: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), _matrix_product),
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
}


def _bincount(args: Any, kwargs: Any) -> Tensor:
    least = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
    return args[0].new_zeros(max(1, least), dtype=torch.int64)


SIZED_BY_VALUES: dict[str, Callable[[Any, Any], Any]] = {
    "nonzero": lambda args, _: args[0].new_zeros(2, args[0].dim(), dtype=torch.int64),
    "bincount": _bincount,
    "equal": lambda args, _: math.prod(args[0].shape) == 0,
}
