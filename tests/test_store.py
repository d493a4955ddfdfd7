"""What must survive a crash: all of a transaction or none of it, and nothing that executes."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import kitestring
from kitestring.core import Rows, Tree
from kitestring.errors import RunError
from kitestring.exchange.ledger import Ledger
from kitestring.exchange.store import Store, Table, load_state, save_state


def tree(value: float) -> Tree:
    return Tree(w=np.full((1, 2), value, np.float32))


def test_commit_keeps_and_rollback_drops(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    store = Store(path)
    store.put("private", [4], tree(1), [0])
    store.save("serial", b"1")
    store.commit()
    store.put("private", [4, 5], Tree(w=np.zeros((2, 2), np.float32)), [0, 1])
    store.save("serial", b"2")
    assert store.ids("private") == [4, 5], "what is not committed yet is seen by this run"
    store.rollback()
    store.close()
    again = Store(path)
    assert again.ids("private") == [4]
    assert again.get("private", 4) is not None
    assert again.get("private", 4)["w"].tolist() == [[1, 1]]  # type: ignore[index]
    assert again.get("private", 5) is None
    assert again.load("serial") == b"1"
    assert again.load("nothing") is None
    again.close()


def test_in_memory_as_in_a_file(tmp_path: Path) -> None:
    """Whatever is put, kept and dropped, both give the same."""
    dice = np.random.default_rng(0)
    both = [Store(), Store(tmp_path / "run.sqlite")]
    for step in range(200):
        do, shelf = dice.integers(0, 5), ["private", "cloud"][dice.integers(0, 2)]
        ids = np.sort(dice.choice(12, dice.integers(1, 5), replace=False))
        trees = Tree(w=np.full((len(ids), 2), step, np.float32))
        for store in both:
            if do == 0:
                store.commit()
            elif do == 1:
                store.rollback()
            elif do == 2:
                store.save("serial", str(step).encode())
            else:
                store.put(shelf, ids, trees, range(len(ids)))
        one, other = (
            [s.load("serial"), *(s.ids(w) for w in ("private", "cloud"))]
            + [[t and t["w"].tolist() for t in s.find(w, range(14))] for w in ("private", "cloud")]
            for s in both
        )
        assert one == other
    both[1].close()


def test_many_devices_at_once(tmp_path: Path) -> None:
    """More than SQLite takes values in one query."""
    store, ids = Store(tmp_path / "run.sqlite"), np.arange(3, 40_000, 3)
    assert store.find("private", ids) == []
    store.put("private", ids, Tree(w=ids[:, None].astype(np.float64)), range(len(ids)))
    found = store.find("private", [6, 7, *range(39_999, 0, -3)])
    assert found[0] is not None
    assert found[1] is None
    assert [float(t["w"][0, 0]) for t in found[2:] if t] == list(range(39_999, 0, -3))
    store.close()


def test_closing_drops_what_was_not_committed(tmp_path: Path) -> None:
    store = Store(tmp_path / "run.sqlite")
    store.save("serial", b"1")
    store.close()
    assert Store(tmp_path / "run.sqlite").load("serial") is None


VICTIM = """
import os, signal, sys
from pathlib import Path
import numpy as np
from kitestring.core import Tree
from kitestring.exchange.store import Store
store = Store(Path(sys.argv[1]))
for i in range(3):
    store.put("private", [0, 1], Tree(w=np.full((2, 50_000), i, np.float32)), [0, 1])
    store.save("serial", str(i).encode())
    if i < 2:
        store.commit()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_in_a_transaction(tmp_path: Path) -> None:
    """Three rounds of two 200 kB trees, killed before the third is committed."""
    path = tmp_path / "run.sqlite"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", VICTIM, str(path)], env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    store = Store(path)
    assert store.load("serial") == b"1"
    for device in (0, 1):
        kept = store.get("private", device)
        assert kept is not None
        assert (kept["w"] == 1).all()
    store.save("serial", b"3")  # and it goes on
    store.commit()
    store.close()


def test_the_table_keeps_slices_of_stacked_trees() -> None:
    table = Table(Store())
    ragged = Rows(np.arange(6.0).reshape(2, 3), np.array([3, 1]))
    table.put([7, 3], Tree(h=ragged, c=np.array([1, 2])))
    assert table.ids() == [3, 7]
    back = table.get([3, 7, 3])
    assert back["c"].tolist() == [2, 1, 2]
    assert back["h"].n.tolist() == [1, 3, 1]
    assert back["h"].values.tolist() == [[3, 0, 0], [0, 1, 2], [3, 0, 0]]
    with pytest.raises(KeyError):
        table.get([3, 4])


@dataclass(frozen=True)
class State:
    round: int
    weights: Tree = field(default_factory=Tree)
    large: Tree = field(default_factory=Tree)
    threshold: float = 0.0


def test_a_state_comes_back_as_it_was() -> None:
    store = Store()
    assert load_state(store, State) is None
    weights = Tree(
        {
            "a.w": np.arange(6, dtype=np.float32).reshape(2, 3),
            "count": np.array(3, np.int64),
            "b": np.array([np.nan, np.inf, -0.0], np.float64),
        }
    )
    save_state(store, State(-1, weights, threshold=0.1 + 0.2))
    back = load_state(store, State)
    assert back is not None
    assert (back.round, back.threshold, back.large) == (-1, 0.1 + 0.2, {})
    assert list(back.weights) == list(weights)
    for name, a in weights.items():
        b = back.weights[name]
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        b += 1  # it can be written to, as a fresh one


def test_a_ledger_comes_back_as_it_was() -> None:
    ledger = Ledger()
    ledger.bytes["learn", "up", "features", "h"] = 2**60
    ledger.add("learn", clock=0.1 + 0.2)
    back = Ledger.load(ledger.dump())
    assert (back.bytes, back.amounts) == (ledger.bytes, ledger.amounts)


def test_a_file_that_is_no_run_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    path.write_bytes(b"not a database, but long enough to be taken for one" * 100)
    with pytest.raises(RunError, match=re.escape(str(path))):
        Store(path)


def test_a_damaged_file_is_told_in_one_line(tmp_path: Path) -> None:
    """The pages after the first are overwritten, so that it opens and then cannot be read."""
    path = tmp_path / "run.sqlite"
    store = Store(path)
    store.put("private", range(50), Tree(w=np.zeros((50, 500))), range(50))
    store.commit()
    store.close()  # the last connection moves what is in the journal into the file
    blob = bytearray(path.read_bytes())
    blob[8192:] = os.urandom(len(blob) - 8192)
    path.write_bytes(blob)
    with pytest.raises(RunError, match=re.escape(str(path))):  # noqa: PT012 - whichever comes first
        damaged = Store(path)
        for i in range(50):
            damaged.get("private", i)
        damaged.ids("private")
        damaged.load("state")


def test_nothing_that_is_loaded_can_execute(tmp_path: Path) -> None:
    """No pickle anywhere in the package, and none in the file."""
    source = Path(kitestring.__file__).parent
    loads = re.compile(
        r"\b(import|from) (pickle|dill|shelve|marshal|joblib|cloudpickle)\b"
        r"|\btorch\.(load|save)\(|allow_pickle *= *True"
    )
    for path in source.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not loads.search(line), f"{path}:{number}: {line.strip()}"
    store = Store(tmp_path / "run.sqlite")
    save_state(store, State(1, tree(1)))
    store.put("private", [0], tree(1), [0])
    store.commit()
    store.close()
    # A pickle of protocol 2 or later begins with 0x80 and its number, and ends with a stop, ".".
    with sqlite3.connect(tmp_path / "run.sqlite") as db:
        blobs = [*db.execute("SELECT value FROM snapshot"), *db.execute("SELECT tree FROM trees")]
    db.close()
    assert len(blobs) >= 3
    assert not [b for (b,) in blobs if b[:1] == b"\x80" and b[-1:] == b"."]
