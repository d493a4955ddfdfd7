"""How worker processes come about: forked from a server that has imported what they need.

Importing torch and what it loads on first use takes each new process several seconds. Where there
is no such server (Windows), workers are started afresh.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

_IMPORTED = (
    "kitestring.comparison.workers",
    "kitestring.devices.fit.compiled.run",
    "torch._decomp",
    "torch._dynamo",
    "torch.fx.experimental.proxy_tensor",
    "scipy.ndimage",
)


def context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(_IMPORTED))
    return found


def begin() -> None:
    """Let the server import while this process does something else."""
    if isinstance(context(), multiprocessing.context.ForkServerContext):
        forkserver.ensure_running()
