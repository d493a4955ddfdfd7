"""Which of four activities is it? 60 people, each with a motion sensor worn in their own way."""

import numpy as np
from torch import nn

from kitestring.tasks.sources import users_from_dict
from kitestring.tasks.task import Metric, Task


def person(rng):  # your data: x [rows, 32 samples, 3 axes] and the activities y [rows]
    y = rng.integers(0, 4, rng.integers(30, 61))  # resting, strolling, walking, running
    gain, pose, turn = rng.uniform(0.4, 1.6), rng.normal(size=3), rng.dirichlet([1, 1, 1])
    wave = np.sin(6.28 * (y[:, None] * np.linspace(0, 2, 32) + rng.random((len(y), 1))))
    return gain * (y * wave.T).T[..., None] * turn + pose + rng.normal(0, 0.3, (len(y), 32, 3)), y


class Small(nn.Module):  # on the device; called front and back, its halves can be run apart
    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Flatten(), nn.Linear(96, 16), nn.ReLU())
        self.back = nn.Linear(16, 4)

    def forward(self, x):
        return self.back(self.front(x))


def large():  # in the cloud
    return nn.Sequential(nn.Flatten(), nn.Linear(96, 256), nn.ReLU(), nn.Linear(256, 4))


def loss(outputs, y):  # one value per row
    return nn.functional.cross_entropy(outputs, y, reduction="none", label_smoothing=0.1)


def recall(outputs, y):  # of one user's rows: the mean over the activities in them
    return np.mean([(outputs.argmax(1)[y == c] == c).mean() for c in np.unique(y)])


people = users_from_dict({f"person {i}": person(np.random.default_rng(i)) for i in range(60)})
task = Task("activity", people, Small, large, Metric("mean recall", recall), loss)
