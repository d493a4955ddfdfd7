"""Training steps as native code, made for each module and its shapes with LLVM (`llvmlite`).

    trace.py   module + loss        -> torch.fx graph of the step, forward and backward
    lower.py   graph                -> kernels over strided views: products, loops, reductions
    kernels.py, convolve.py         -> how each kernel is written as LLVM IR (emit.py)
    build.py   kernels              -> one function that trains or evaluates devices in a row
    run.py     numpy arrays in and out

A device's weights and a batch stay in the processor's cache for the whole of its training, and
nothing is spent on dispatching operations, which is where small models lose their time.
"""
