"""A device that is none, so that a machine without a GPU finds a tensor that was left on the CPU.

`pretend` is known to torch like any other device: `x.to("pretend")`,
`torch.zeros(2, device="pretend")`. A tensor on it holds an ordinary one, and every operation is
computed on that: values and gradients are real. What a GPU refuses is refused: an operation on
tensors of two devices, `.numpy()`, a CPU's random generator. What a GPU allows is allowed: copies
from one device to another, numbers (0-dim CPU tensors) in element-wise operations, and CPU tensors
as indices.

Nothing here says that a GPU's kernels exist, are fast or round alike, or that memory is enough; nor
anything of several devices, of autocast, or of libraries with kernels of their own (bitsandbytes).

torch calls a device from outside "PrivateUse1" and lets it be written in Python. It needs two
things. A tensor of a class of its own, which torch hands every operation that it is part of
(`OnDevice.__torch_dispatch__`); and a function that makes the first such tensor out of nothing
(`made`), since an operation without tensors knows its device by name alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch

DEVICE = "pretend"
aten = torch.ops.aten

# Which operations may see a CPU tensor beside one on a GPU. Copies, of any shape:
COPIES = {aten.copy_.default, aten._foreach_copy_.default}
# x[i] and x[i] = y: x must be on the GPU, i may be on either device, y too if it is one number.
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
# A fill takes its number from wherever that is.
FILLS = {aten.fill.Tensor, aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}


class OnDevice(torch.Tensor):
    """A tensor that says it is on the pretend device, and holds the CPU tensor it stands for."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        # never an inference tensor: torch refuses one as a view of what was made outside that mode
        with torch.inference_mode(False):
            found = torch.Tensor._make_wrapper_subclass(
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=torch.device(DEVICE, 0),
            )
        found.held = held
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Where torch brings every operation that has such a tensor among its arguments."""
        if torch.is_inference_mode_enabled():  # there alone, compound operations come whole
            found = func.decompose(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        return computed(func, args, kwargs or {})

    # What torch answers without an operation.

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy.")

    __array__ = numpy

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)  # torch.save; paw and Lightning load to the CPU

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"OnDevice({self.held!r})"

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, OnDevice):
            raise RuntimeError(f"incompatible tensor type: {value.device} for {self.device}")
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation, computed on the tensors that are held.

    What comes out is on the device, unless the operation was asked for something on the CPU, or
    gives back an argument that it changed in place.
    """
    refuse_what_a_gpu_refuses(func, args, kwargs)
    device = kwargs.get("device")
    to_cpu = device is not None and torch.device(device).type != DEVICE
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    before = {id(held(t)): t for t in tensors_in([*args, *kwargs.values()])}

    def out(found: torch.Tensor) -> torch.Tensor:
        same = before.get(id(found))
        if same is None:
            return found if to_cpu else OnDevice(found)
        reshaped = same.shape != found.shape or same.stride() != found.stride()
        if reshaped and isinstance(same, OnDevice):
            same.data = OnDevice(found)  # arange, for one, grows an empty tensor
        return same

    done = func(*changed(args, held), **{name: changed(x, held) for name, x in kwargs.items()})
    return changed(done, out)


def held(t: torch.Tensor) -> torch.Tensor:
    return t.held if isinstance(t, OnDevice) else t


def changed(x: Any, how: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Each tensor among an operation's arguments or results changed; some come in lists."""
    if isinstance(x, torch.Tensor):
        return how(x)
    return type(x)(changed(y, how) for y in x) if isinstance(x, (list, tuple)) else x


def tensors_in(x: Any) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for y in x for t in tensors_in(y)] if isinstance(x, (list, tuple)) else []


def refuse_what_a_gpu_refuses(func: Any, args: Any, kwargs: Any) -> None:
    generator = kwargs.get("generator")
    if generator is not None:
        found = generator.device.type
        raise RuntimeError(f"Expected a '{DEVICE}' device type for generator but found '{found}'")
    tensors = tensors_in([*args, *kwargs.values()])
    on_cpu = [t for t in tensors if not isinstance(t, OnDevice)]
    if len(on_cpu) in (0, len(tensors)) or func in COPIES:
        return
    indexed = func in INDEXING
    if indexed:
        indices = {id(t) for t in tensors_in(args[1])}
        on_cpu = [t for t in on_cpu if id(t) not in indices]
    if indexed or func in FILLS or torch.Tag.pointwise in func.tags:
        # a number may be anywhere, but not if it is what is indexed or what the result is put into
        there = args[0] if indexed or func._schema.is_mutable else None
        on_cpu = [t for t in on_cpu if t.dim() or t is there]
    if on_cpu:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{DEVICE}:0 and cpu! ({func} got a cpu tensor of shape {tuple(on_cpu[0].shape)})"
        )


# ---- what torch is told of the device ----------------------------------------------------------


class Backend:
    """The module torch.pretend, of which torch asks what it asks of torch.cuda."""

    there = False  # outside the tests that use it, torch finds no accelerator

    def is_available(self) -> bool:
        return self.there

    def is_initialized(self) -> bool:
        return self.there

    def device_count(self) -> int:
        return int(self.there)

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Random numbers come from the CPU's generator."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


BACKEND = Backend()
_told: list[Any] = []  # what torch was told lasts as long as these


def made(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What makes a tensor on the device out of nothing (torch.zeros and its like)."""
    return computed(func, args, kwargs)


def filled(into: OnDevice, values: torch.Tensor, non_blocking: bool = False) -> OnDevice:
    """torch.tensor fills what it made without asking a tensor's class: a copy of its own."""
    into.held.copy_(held(values))
    return into


def register() -> None:
    """Tells torch of the device, once in a process."""
    if _told:
        return
    registration: Any = pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch takes no device that is written in Python")

    class Hook(torch._C._acc.PrivateUse1Hooks):  # type: ignore[name-defined,misc]
        def is_available(self) -> bool:
            return BACKEND.there

        def is_built(self) -> bool:
            return True

        def has_primary_context(self, device: int) -> bool:
            return True

    hook = Hook()
    registration._setup_privateuseone_for_python_backend(DEVICE, BACKEND, hook)
    makers, copies = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    makers.fallback(made, "PrivateUse1")
    copies.impl("copy_", filled, "PrivateUse1")
    _told.extend((hook, makers, copies))


# ---- what stands around paw's computations: files and Lightning --------------------------------


@contextmanager
def pretending() -> Iterator[None]:
    """Inside, the device is there, for torch, for files and for Lightning."""
    register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backend, "there", True)
        # A model that moves keeps its parameters, and tied ones stay one, as on a GPU.
        swapped = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        _files(patch)
        _lightning(patch)
        try:
            yield
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swapped)


def _files(patch: pytest.MonkeyPatch) -> None:
    """safetensors knows devices by name: its files are read to the CPU and moved."""
    import safetensors

    opened = safetensors.safe_open

    class Moved:
        """An open file whose tensors are on the device."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Moved:
            self.file.__enter__()
            return self

        def __exit__(self, *wrong: Any) -> None:
            self.file.__exit__(*wrong)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            return self.file.get_tensor(name).to(DEVICE)

    def safe_open(file: Any, framework: str, device: str = "cpu", **more: Any) -> Any:
        if device != DEVICE:
            return opened(file, framework, device, **more)
        return Moved(opened(file, framework, "cpu", **more))

    patch.setattr(safetensors, "safe_open", safe_open)


def _lightning(patch: pytest.MonkeyPatch) -> None:
    """paw asks Lightning for a GPU or else the CPU, which gives way where the runtime says so."""
    from lightning_fabric.accelerators import CPUAccelerator
    from lightning_fabric.strategies import SingleDeviceStrategy

    from paw.training import devices

    strategy = devices._strategy

    def there(runtime: Any, *more: Any) -> Any:
        if runtime.device != DEVICE:
            return strategy(runtime, *more)
        return SingleDeviceStrategy(torch.device(DEVICE, 0))

    patch.setattr(devices, "_strategy", there)
    patch.setattr(CPUAccelerator, "setup_device", lambda self, device: None)


def _count() -> None:
    """Has torch's autograd count this device, too: it counts devices at a process's first backward
    pass, which another file's test may be."""
    with suppress(pytest.skip.Exception):  # where torch cannot do it, the tests skip themselves
        register()
        Backend.there = True
        torch.zeros(1, device=DEVICE, requires_grad=True).sum().backward()
        Backend.there = False


_count()
