"""pfl-research: two processes, each with one module that it reuses, and one sum over both.

    torchrun --standalone --nproc_per_node=2 benchmarks/simulation/pfl_peer.py WORKLOAD \
        [--seconds 6] [--rounds 3] [--check N]
"""

from __future__ import annotations

import os

os.environ |= {"PFL_PYTORCH_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}

from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any

import models
import torch
from contender import Clock, arguments, finish
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, distributed, nn
from workloads import Workload, cohort, rows, sizes

NEVER = 10**9


class Timed(TrainingProcessCallback):
    """The first process's clock stops both."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        more = torch.tensor([self.clock.lap()])
        distributed.broadcast(more, 0)
        return not more.item(), Metrics()


def made(w: Workload) -> nn.Module:
    """pfl asks a module for its loss and its metrics; nothing is evaluated here."""
    module, loss = models.make(w.name), models.loss(w.name)

    def mean_loss(x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
        return loss(module(x), y)

    def metrics(x: Tensor, y: Tensor, eval: bool = False) -> dict[str, Any]:
        return {"loss": Weighted(0, len(x))}

    module.loss, module.metrics = mean_loss, metrics
    return module


def dataset(w: Workload, device: int) -> Dataset:
    return Dataset([torch.from_numpy(column) for column in rows(w, device)], user_id=str(device))


def asked(w: Workload) -> Iterator[int]:
    """The devices of all rounds, one after the other."""
    for turn in count():
        yield from cohort(w, turn).tolist()


def main() -> None:
    w, clock = arguments(__doc__)
    module = made(w)
    model = PyTorchModel(
        model=module,
        local_optimizer_create=partial(torch.optim.SGD, foreach=True),
        central_optimizer=torch.optim.SGD(module.parameters(), 1.0),
    )
    users = FederatedDataset(
        partial(dataset, w), partial(next, asked(w)), dict(enumerate(sizes(w).tolist()))
    )
    clock.start()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=NEVER,
            evaluation_frequency=NEVER,
            train_cohort_size=w.cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(users, None, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=w.lr, local_batch_size=w.batch
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=NEVER),
        callbacks=[Timed(clock)],
    )
    if distributed.get_rank() == 0:
        finish(w, clock, module.state_dict, ["pfl"])


if __name__ == "__main__":
    main()
