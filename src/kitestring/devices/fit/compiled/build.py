"""From kernels to machine code: one function that takes many devices through all their batches."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import __version__, binding, ir

from kitestring.devices.fit.compiled import shelf
from kitestring.devices.fit.compiled.emit import BYTES, I64, Emitter, i64
from kitestring.devices.fit.compiled.kernels import Kernel
from kitestring.devices.fit.compiled.views import Buffer

_lock = threading.Lock()


class Builder:
    """A module under construction: kernels as functions, called on one device's memory."""

    def __init__(self) -> None:
        self.module = ir.Module("kitestring")
        self._made: dict[Any, Any] = {}

    def call(self, e: Emitter, memory: Any, kernel: Kernel) -> None:
        if kernel.key not in self._made:
            self._made[kernel.key] = self._function(kernel)
        where = [e.b.gep(memory, [i64(buffer.at)]) for buffer in kernel.buffers]
        e.b.call(self._made[kernel.key], where)

    def _function(self, kernel: Kernel) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [BYTES] * len(kernel.buffers))
        name = self.module.get_unique_name(str(kernel.key[0]))
        f = ir.Function(self.module, kind, name)
        f.linkage = "internal"
        f.attributes.add("noinline")
        for argument in f.args:
            argument.add_attribute("noalias")
        e = Emitter(f)
        kernel.emit(e, dict(zip(kernel.buffers, f.args, strict=True)))
        e.done()
        return f

    def main(self) -> tuple[Emitter, Any]:
        """The function to be called from outside; its argument points to numbers and addresses."""
        kind = ir.FunctionType(ir.VoidType(), [I64.as_pointer()])
        f = ir.Function(self.module, kind, "main")
        return Emitter(f), f.args[0]


@dataclass
class Native:
    """Machine code, the memory that one device needs, and memory of each thread."""

    call: Callable[[Any], None]
    bytes: int
    constants: Mapping[Buffer, Any]
    keep: Any  # the engine that owns the code

    def __post_init__(self) -> None:
        self._local = threading.local()

    def memory(self) -> Any:
        """Zeros at first, then what the last device of this thread left: bytes, aligned."""
        if not hasattr(self._local, "memory"):
            raw = np.zeros(self.bytes + 64, np.uint8)
            shift = -raw.ctypes.data % 64
            whole = raw[shift : shift + self.bytes]
            for buffer, array in self.constants.items():
                if buffer.at >= 0:  # some kernel reads it
                    whole[buffer.at : buffer.at + array.nbytes] = array.reshape(-1).view(np.uint8)
            self._local.memory = whole
        return self._local.memory

    def __call__(self, numbers: Sequence[int]) -> None:
        self.call((ctypes.c_int64 * len(numbers))(*numbers))


def step_function(builder: Builder, kernels: Sequence[Kernel]) -> Any:
    """All kernels in order, on the memory it is given."""
    f = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [BYTES]), "step")
    f.linkage = "internal"
    e = Emitter(f)
    for kernel in kernels:
        builder.call(e, f.args[0], kernel)
    e.done()
    return f


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's collector of cycles, which would walk all of torch several times."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def compiled(builder: Builder, size: int, constants: Mapping[Buffer, Any]) -> Native:
    """Machine code for this processor: of an earlier run, if it had the same to compile."""
    with _lock:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        cpu, features = binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
        machine = binding.Target.from_default_triple().create_target_machine(
            cpu=cpu, features=features, opt=3, jit=True
        )
        text = str(builder.module)
        name = shelf.key(text, cpu, features, __version__, *_PASSES)
        code = shelf.load(name)
        if code is None:
            module = binding.parse_assembly(text)
            module.verify()
            _improve(module, machine)
            code = machine.emit_object(module)
            shelf.keep(name, code)
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
        engine.add_object_file(binding.ObjectFileRef.from_data(code))
        engine.finalize_object()
        address = engine.get_function_address("main")
    return Native(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address), size, constants, engine)


# What is left to do for LLVM: vectors and tiles are written out, so a few passes are as good as
# all of -O2, in half the time.
_PASSES = ("sroa", "instruction_combine", "simplify_cfg", "loop_rotate", "instruction_combine",
           "new_gvn")  # fmt: skip


def _improve(module: Any, machine: Any) -> None:
    options = binding.create_pipeline_tuning_options(speed_level=2)
    passes = binding.create_new_module_pass_manager()
    for name in _PASSES:
        getattr(passes, f"add_{name}_pass")()
    passes.run(module, binding.create_pass_builder(machine, options))
