"""Flower's simulation on Ray: two actors with one core each, the module resident in each actor.

    python benchmarks/simulation/flower_peer.py WORKLOAD [--seconds 6] [--rounds 3] [--check N]

Each message says which device its node plays, so that the cohorts are the workload's.
"""

from __future__ import annotations

import os

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
}  # fmt: skip

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import models
import torch
import workloads
from contender import Clock, arguments, descend, finish
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from workloads import Workload, cohort

CORES = 2


class Enough(Exception):
    """The clock says so; with the weights that there are."""

    def __init__(self, arrays: ArrayRecord) -> None:
        self.arrays = arrays


class Timed(FedAvg):
    """FedAvg over the workload's cohorts, until the clock stops it."""

    def __init__(self, w: Workload, clock: Clock) -> None:
        super().__init__(
            fraction_train=w.cohort / w.devices,
            fraction_evaluate=0.0,
            min_train_nodes=w.cohort,
            min_available_nodes=w.cohort,
        )
        self.workload, self.clock = w, clock

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        if server_round == 1:
            self.clock.start()
        elif not self.clock.lap():
            raise Enough(arrays)
        asked = super().configure_train(server_round, arrays, config, grid)
        devices = cohort(self.workload, server_round - 1)
        for message, device in zip(asked, devices, strict=True):
            told = ConfigRecord({"workload": self.workload.name, "device": int(device)})
            yield Message(
                content=RecordDict({"arrays": arrays, "config": told}),
                message_type=message.metadata.message_type,
                dst_node_id=message.metadata.dst_node_id,
            )

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """Flower averages what there is; here a device that failed ends the run."""
        found = list(replies)
        for message in found:
            if message.has_error():
                raise RuntimeError(message.error.reason)
        return super().aggregate_train(server_round, found)


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """In an actor. What it uses is named by module: values of this file would be sent each time."""
    torch.set_num_threads(1)
    told = message.content["config"]
    w = workloads.WORKLOADS[str(told["workload"])]
    module = models.resident(w.name)
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())
    x, y = workloads.rows(w, int(told["device"]))
    descend(module, models.loss(w.name), x, y, w)
    content = {
        "arrays": ArrayRecord(module.state_dict()),
        "metrics": MetricRecord({"num-examples": len(x)}),
    }
    return Message(content=RecordDict(content), reply_to=message)


def main() -> None:
    w, clock = arguments(__doc__)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    server, ends = ServerApp(), []

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        start = ArrayRecord(models.make(w.name).state_dict())
        try:
            Timed(w, clock).start(grid=grid, initial_arrays=start, num_rounds=10**9)
        except Enough as enough:
            ends.append(enough.arrays)

    ray: dict[str, Any] = {
        "num_cpus": CORES, "log_to_driver": False, "include_dashboard": False,
        "object_store_memory": 2 * 2**30,
    }  # fmt: skip
    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=w.devices,
        backend_config={"init_args": ray, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    if not ends:
        raise SystemExit("Flower's server ended before the clock did")
    finish(w, clock, lambda: ends[0].to_torch_state_dict(), ["flwr", "ray"])


if __name__ == "__main__":
    main()
