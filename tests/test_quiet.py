"""Nothing tries to leave the machine, whatever a dependency would like to report.

The kernel itself watches: a seccomp filter (Linux, x86-64 and ARM64) ends a process, and any that
it starts, at its first socket of the Internet's families, and at the one other way to make them
(io_uring). Sockets between processes of this machine stay allowed.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kitestring.exchange.frames import frame

FILTER = """
import ctypes, os, platform, struct, sys

AUDIT, SOCKET = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}[platform.machine()]
LOAD, EQUAL, RETURN, IO_URING = 0x20, 0x15, 0x06, 425
TRAP, ALLOW = 0x00030000, 0x7FFF0000
# (code, jump if true, jump if false, value): struct sock_filter
program = [
    (LOAD, 0, 0, 4), (EQUAL, 0, 7, AUDIT),         # another architecture: end
    (LOAD, 0, 0, 0), (EQUAL, 5, 0, IO_URING),      # the system call's number
    (EQUAL, 0, 3, SOCKET),
    (LOAD, 0, 0, 16), (EQUAL, 2, 0, 2), (EQUAL, 1, 0, 10),  # its family: AF_INET, AF_INET6
    (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, TRAP),
]
code = b"".join(struct.pack("HBBI", *line) for line in program)
held = ctypes.create_string_buffer(code)
libc = ctypes.CDLL(None, use_errno=True)
fprog = struct.pack("HxxxxxxP", len(program), ctypes.addressof(held))
assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
assert libc.prctl(22, 2, fprog, 0, 0) == 0, "PR_SET_SECCOMP"
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
EVERYTHING = """
import importlib, importlib.metadata, os, sys
import numpy as np

assert "ORT_DISABLE_TELEMETRY" not in os.environ
import kitestring.devices.runtime.compute
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"

# All that Kitestring installs, and the extras where they are there.
tried = []
for name, there in importlib.metadata.packages_distributions().items():
    kept = {d.lower() for d in there}
    if kept & {line.split("==")[0].lower() for line in open(sys.argv[1]) if "==" in line}:
        if name.isidentifier() and name not in ("antigravity", "nvidia"):
            try:
                importlib.import_module(name)
                tried.append(name)
            except (ImportError, OSError, RuntimeError):
                pass  # made for another machine
for wanted in ("torch", "numpy", "onnxruntime", "onnx", "matplotlib", "sklearn", "scipy", "h5py",
               "cryptography", "safetensors", "llvmlite", "rich"):
    assert wanted in tried, wanted

# And what a library may report when it is used.
import matplotlib.pyplot, onnxruntime, torch
from sklearn.linear_model import LogisticRegression
LogisticRegression().fit(np.eye(4), [0, 1, 0, 1]).predict(np.eye(4))
model = torch.nn.Linear(3, 2)
torch.optim.SGD(model.parameters(), 0.1).step()
matplotlib.pyplot.figure().savefig(os.devnull, format="svg")
print("done", len(tried))
"""
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="the filter is Linux's, for two processors",
)
ROOT = Path(__file__).parents[1]


def watched(*words: str | Path, cwd: Path, told: str = "") -> subprocess.CompletedProcess[str]:
    """Python, under the filter; nothing in its environment asks anybody to be quiet."""
    hidden = ("ORT_", "DO_NOT_TRACK", "HF_", "DISABLE")
    env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    paths = [str(ROOT / "src"), env.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", FILTER, *map(str, words)], cwd=cwd, capture_output=True, text=True,
        input=told, env=env | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}, timeout=280,
    )  # fmt: skip


def must(*words: str | Path, cwd: Path, told: str = "") -> str:
    done = watched(*words, cwd=cwd, told=told)
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])
def test_the_filter_would_see_it(tmp_path: Path, family: str) -> None:
    """Also in a process that the first one starts."""
    code = f"import socket; socket.socket(socket.{family}); print('out')"
    done = watched("-c", code, cwd=tmp_path)
    assert done.returncode == -signal.SIGSYS
    child = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {code!r}]))"
    assert watched("-c", child, cwd=tmp_path).returncode == 256 - signal.SIGSYS
    assert must("-c", "import socket; socket.socketpair(); print('in')", cwd=tmp_path) == "in\n"


def test_importing_and_using_everything(tmp_path: Path) -> None:
    assert "done" in must("-c", EVERYTHING, ROOT / "constraints.txt", cwd=tmp_path)


@pytest.mark.slow
def test_the_commands(tmp_path: Path) -> None:
    """From a comparison to a package that a device process answers from."""
    cli = ("-m", "kitestring.cli")
    only = ("--users", "8", "--only", "fedavg", "--seeds", "1", "--trials", "1")
    must(*cli, "compare", "digits", *only, cwd=tmp_path)
    must(*cli, "keys", "k", cwd=tmp_path)
    must(*cli, "pack", "runs/digits", "fedavg", "--key", "k", "--out", "a.kite", cwd=tmp_path)
    assert "runs here" in must(*cli, "show", "a.kite", "--trust", "k.pub", cwd=tmp_path)
    device = ("-m", "kitestring.devices.runtime.process", "a.kite", "--trust", "k.pub")
    opened = frame({"op": "open", "seed": 0}, []).decode()
    assert must(*device, cwd=tmp_path, told=opened).endswith('{"parts": []}')
