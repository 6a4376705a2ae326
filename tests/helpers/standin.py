"""GPUs that are not there: Triton's own driver and launcher, and the CUDA library, over a CUDA driver that runs nothing
and notes launches.

In a process of its own (`process`), torch is told of two GPUs. Their tensors are CUDA tensors in the CPU's memory, and
torch's CPU operators compute with them. Nothing of the package is replaced.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import emulated
import fresh
import torch
from torch import Tensor
from torch import library as torch_library
from torch.utils._pytree import tree_map_only

STREAMS = (0x5A0, 0x5B0)  # handles of the devices' current streams
MAJOR, MINOR, PROCESSORS, SHARED = 75, 76, 16, 97  # attributes, by their numbers in cuda.h
_ATTRIBUTES = {10: 32, 12: 65536, 13: 1980000, 36: 2619000, 37: 5120}  # warp, registers, clocks, memory's bus
_SHARED_OF_A_PROCESSOR, _CLUSTERS = 81, 120
DEVICES = (
    {MAJOR: 9, MINOR: 0, PROCESSORS: 132, SHARED: 232448, _SHARED_OF_A_PROCESSOR: 233472, _CLUSTERS: 1} | _ATTRIBUTES,
    {MAJOR: 8, MINOR: 0, PROCESSORS: 108, SHARED: 166912, _SHARED_OF_A_PROCESSOR: 167936, _CLUSTERS: 0} | _ATTRIBUTES,
)
_CPU, _CUDA = 1, 2  # kinds of devices in DLPack


class Note(NamedTuple):
    """A launch as the driver had it."""

    kernel: str
    device: int
    stream: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    cluster: int
    shared: int
    early: int  # whether it may begin before what was launched before it has ended
    parameters: tuple[bytes, ...]


def library() -> Path:
    return _built("libcuda.so.1", ("standin_cuda.cpp", "standin_torch.cpp"), "libcuda.so.1")


def runtime() -> Path:
    """It goes by the path of a library that torch without CUDA lacks, and so is taken for it once it is loaded."""
    name = "libtorch_cuda.so"
    return _built(name, ["standin_runtime.cpp"], str(emulated.torch_directory() / "lib" / name))


def _built(name: str, sources: Sequence[str], soname: str) -> Path:
    triton, torch_folder = importlib.util.find_spec("triton"), emulated.torch_directory()
    assert triton is not None and triton.origin is not None
    headers = (Path(triton.origin).parent / "backends" / "nvidia" / "include", torch_folder / "include")
    seen = [part for path in headers for part in ("-isystem", str(path))]
    files = [Path(__file__).parent / "csrc" / source for source in sources]
    link = [f"-Wl,-soname,{soname}", *emulated.link_torch(torch_folder)]
    return emulated.build(name, files, ["-O1", "-fPIC", *seen], link)


@contextmanager
def process(*, cuda_library: bool = False) -> Iterator[ProcessPoolExecutor]:
    """A new process that has the GPUs, and the CUDA library. `submit` runs a module's function in it."""
    of_the_library = (runtime(), emulated.build_cuda()) if cuda_library else ()
    with ProcessPoolExecutor(1, fresh.server(), _install, (library(), *of_the_library)) as pool:
        yield pool


# --- in the new process ---

driver: Any = None
_capturing = False
_kept: list[Any] = []  # a registration lasts as long as its object, and a tensor's memory as long as the process


def notes() -> list[Note]:
    return [_note(driver.standin_note(index).decode()) for index in range(driver.standin_noted())]


def _note(line: str) -> Note:
    kernel, *numbers = line.split()
    device, stream, *sizes = map(int, numbers[:11])
    parameters = tuple(map(bytes.fromhex, numbers[11:]))
    return Note(kernel, device, stream, tuple(sizes[:3]), tuple(sizes[3:6]), *sizes[6:], parameters)


def fail(function: str, calls: int) -> None:
    """The driver's function, or an operator of torch's, fails, once, after so many calls."""
    driver.standin_fail(function.encode(), calls)


def current_device(use: int | None = None) -> int:
    if use is not None:
        driver.standin_use(use)
    return driver.standin_device()


def capture(on: bool, by_another_thread: bool = False) -> None:
    global _capturing
    _capturing = on and not by_another_thread
    driver.standin_capture(on + by_another_thread)


def _install(path: Path, runtime: Path | None = None, cuda_library: Path | None = None) -> None:
    global driver
    os.environ |= {"TRITON_INTERPRET": "0", "TRITON_LIBCUDA_PATH": str(path.parent)}
    os.environ.pop("FUSEDNORM_EMULATE", None)
    driver = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)  # whoever opens libcuda.so.1 from now on gets it
    driver.standin_note.restype = ctypes.c_char_p
    for device, attributes in enumerate(DEVICES):
        for attribute, value in attributes.items():
            driver.standin_set(device, attribute, value)
    _tell_torch()
    if runtime is not None:
        for device, stream in enumerate(STREAMS):
            ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL).standin_stream(device, ctypes.c_void_p(stream))
        from fusednorm.providers.cuda import library

        library.LIBRARY = cuda_library


def _tell_torch() -> None:
    """What a torch without CUDA cannot say."""

    def index(device: Any = None) -> int:
        if isinstance(device, int):
            return device
        named = None if device is None else torch.device(device).index
        return driver.standin_device() if named is None else named

    def exchange(device: int) -> int:
        before = driver.standin_device()
        if device >= 0:
            driver.standin_use(device)
        return before

    def properties(device: Any = None) -> Any:
        own = DEVICES[index(device)]
        names = {
            "major": MAJOR,
            "minor": MINOR,
            "shared_memory_per_block_optin": SHARED,
            "multi_processor_count": PROCESSORS,
        }
        return SimpleNamespace(**{name: own[attribute] for name, attribute in names.items()})

    answers = {
        "is_available": lambda: True,
        "device_count": lambda: len(DEVICES),
        "_lazy_init": lambda: None,
        "current_device": lambda: driver.standin_device(),  # Dynamo hashes it
        "set_device": lambda device: driver.standin_use(index(device)),
        "_exchange_device": exchange,
        "_maybe_exchange_device": lambda device: exchange(device),  # a function of its own for Dynamo
        "get_device_capability": lambda device=None: tuple(map(DEVICES[index(device)].get, (MAJOR, MINOR))),
        "get_device_properties": properties,
        "is_current_stream_capturing": lambda: _capturing,
        "get_rng_state": lambda device="cuda": torch.empty(0, dtype=torch.uint8),  # Dynamo keeps it
        "set_rng_state": lambda state, device="cuda": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch._C._cuda_getCurrentRawStream = STREAMS.__getitem__
    torch._C._dynamo.guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    fallback = torch_library.Library("_", "IMPL")
    fallback.fallback(_on_the_cpu, "CUDA")
    aten = torch_library.Library("aten", "IMPL")
    copy = torch.ops.aten.copy_.default  # a composite, which looks for a kernel of the device without the dispatcher
    aten.impl("copy_", partial(_on_the_cpu, copy), "CUDA")
    _kept.extend((fallback, aten))


class _Described(ctypes.Structure):
    """The start of DLPack's DLManagedTensor."""

    _fields_ = (
        *(("data", ctypes.c_void_p), ("kind", ctypes.c_int32), ("device", ctypes.c_int32), ("ndim", ctypes.c_int32)),
        *(("dtype", ctypes.c_uint32), ("shape", ctypes.c_void_p), ("strides", ctypes.POINTER(ctypes.c_int64))),
    )


_described = ctypes.pythonapi.PyCapsule_GetPointer
_described.restype, _described.argtypes = ctypes.POINTER(_Described), [ctypes.py_object, ctypes.c_char_p]


def _moved(tensor: Tensor, kind: int, device: int) -> Tensor:
    """The same memory as a tensor of another device."""
    capsule = torch._C._to_dlpack(tensor)
    described = _described(capsule, b"dltensor").contents
    described.kind, described.device = kind, device
    for dimension, stride in enumerate(tensor.stride()):  # DLPack has 1 where the size is 1
        described.strides[dimension] = stride
    return torch._C._from_dlpack(capsule)


def _on_the_cpu(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator of torch that is called with tensors of these GPUs, or for a new one."""
    if driver.standin_fails(op.name().encode()):
        raise torch.OutOfMemoryError("CUDA out of memory")
    given: list[tuple[Tensor, Tensor]] = []
    devices: list[int] = []

    def tensor_to_cpu(tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor
        devices.append(tensor.get_device())
        own = _moved(tensor, _CPU, 0) if tensor.numel() else torch.empty(tensor.shape, dtype=tensor.dtype)
        given.append((own, tensor))
        return own

    def device_to_cpu(device: torch.device) -> torch.device:
        if device.type == "cuda":
            devices.append(driver.standin_device() if device.index is None else device.index)
        return torch.device("cpu")

    def to_gpu(result: Tensor) -> Tensor:
        for own, original in given:
            if own is result:
                if own.shape != original.shape:  # an empty one was to be made larger
                    _kept.append(own)
                    original.data = _moved(own, _CUDA, devices[0])
                return original
        _kept.append(result)
        return _moved(result, _CUDA, devices[0])

    args, kwargs = tree_map_only(Tensor, tensor_to_cpu, (args, kwargs))
    args, kwargs = tree_map_only(torch.device, device_to_cpu, (args, kwargs))
    return tree_map_only(Tensor, to_gpu, op(*args, **kwargs))
