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
from llvmlite import binding, ir

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
    with _lock:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        machine = binding.Target.from_default_triple().create_target_machine(
            cpu=binding.get_host_cpu_name(),
            features=binding.get_host_cpu_features().flatten(),
            opt=3,
            jit=True,
        )
        module = binding.parse_assembly(str(builder.module))
        module.verify()
        options = binding.create_pipeline_tuning_options(speed_level=2)
        _improve(module, binding.create_pass_builder(machine, options))
        engine = binding.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        address = engine.get_function_address("main")
    return Native(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address), size, constants, engine)


def _improve(module: Any, builder: Any) -> None:
    """What is left to do for LLVM: vectors and tiles are written out, so a few passes are as good
    as all of -O2, in half the time."""
    passes = binding.create_new_module_pass_manager()
    passes.add_sroa_pass()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    passes.add_loop_rotate_pass()
    passes.add_instruction_combine_pass()
    passes.add_new_gvn_pass()
    passes.run(module, builder)
