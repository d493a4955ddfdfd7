"""Highlights in videos, from TVSum's human ratings: each video is a stream on a device.

50 videos, each rated by 20 people, who gave every two-second shot a mark from 1 to 5 (Song,
Vallmitjana, Stent and Jaimes 2015, CVPR). The ratings come with no licence file (the videos are CC
BY 3.0), so they are downloaded from the authors' repository and nothing of them is bundled.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cache, partial

import numpy as np

from kitestring.errors import DataError
from kitestring.tasks.fetch import Source, read
from kitestring.tasks.metrics import auc
from kitestring.tasks.recorded import THIRDS
from kitestring.tasks.task import Array, Recorded
from kitestring.tasks.users import Columns, Split, Users, split_rows

SHOT = 2.0  # seconds
TOP = 0.15  # of a video's shots are highlights, as in the paper's summaries
RATERS = 20
RATINGS = Source(
    "TVSum",
    "https://raw.githubusercontent.com/yalesong/tvsum/master/matlab/ydata-tvsum50.mat",
    "6a9d2a0cee7f577736cd38ba3cdb746f86635012791eaaec933480ec00eb9d36",
    "tvsum50/ydata-tvsum50.mat",
)


def task(users: int | None = None, raters: int = 3, seed: int = 0) -> Recorded:
    """50 videos (or the first `users`): which shots are highlights?

    For each video one of its raters, drawn at random, is what the device sees, and the mean of
    `raters` others what the cloud sees. The rest are the truth: y is 1 where their mean mark is
    among the video's top 15 %, else 0. Marks are 1..5."""
    if not 1 <= raters <= RATERS - 2:
        raise DataError(f"{raters} raters", "tvsum", f"Give 1 to {RATERS - 2}")
    videos = marks()
    if users is not None and not 1 <= users <= len(videos):
        raise DataError(f"{users} users", "tvsum", f"Give 1 to {len(videos)}")
    names = list(videos)[:users]
    parts = [_part(videos[name], raters, [seed, i]) for i, name in enumerate(names)]
    starts = np.cumsum([0] + [len(truth) for _, _, truth in parts])
    columns = [
        {"x": start + np.arange(len(y)), "y": y, "device": device, "confidence": _sure(device)}
        for start, (device, _, y) in zip(starts, parts, strict=False)
    ]
    return Recorded(
        name="tvsum",
        users=Users(names, partial(_load, columns), [], range(len(names))),
        cloud=np.concatenate([cloud for _, cloud, _ in parts]),
        metric=auc,
        about="TVSum: 50 videos, each a live stream on its own device. Which two-second shots are "
        f"highlights? One person's marks stand in for the device's model, the mean of {raters} "
        "others for the cloud's.",
        request="one two-second shot",
        notes=(
            "Both answers are marks of people and not of models: what is measured is the value of "
            "asking again, not a model.",
            "A shot is a highlight if the mean mark of the remaining raters is in the video's top "
            "15 %. AUC within each video; a video without a highlight in a split has none there.",
        ),
    )


@cache
def marks() -> Mapping[str, Array]:
    """Video -> marks float32 [20, shots], one per rater and two-second shot."""
    import h5py

    with h5py.File(io.BytesIO(read(RATINGS)), "r") as file:
        table = file["tvsum50"]

        def cell(column: str, row: int) -> Array:
            value: Array = file[table[column][row, 0]][()]
            return value

        found = {}
        for row in range(len(table["video"])):
            frames, seconds = float(cell("nframes", row)[0, 0]), float(cell("length", row)[0, 0])
            # The marks are repeated for every frame of a shot; its middle frame is inside it.
            middle = (np.arange(int(seconds / SHOT)) + 0.5) * SHOT * frames / seconds
            name = "".join(map(chr, cell("video", row).ravel()))
            found[name] = cell("user_anno", row)[:, middle.astype(int)].astype(np.float32)
        return found


def _part(video: Array, raters: int, seed: Sequence[int]) -> tuple[Array, Array, Array]:
    """What the device, the cloud and the truth say of each shot of a video."""
    order = np.random.default_rng(seed).permutation(len(video))
    rest = video[order[raters + 1 :]].mean(0)
    highlight = (rest >= np.quantile(rest, 1 - TOP)).astype(np.int64)
    return video[order[0]], video[order[1 : raters + 1]].mean(0), highlight


def _sure(device: Array) -> Array:
    """How far a shot is from the device rater's own cut between highlights and the rest, in [0, 1].

    Marks run from 1 to 5, so no two are more than 4 apart."""
    distance: Array = np.abs(device - np.quantile(device, 1 - TOP)).astype(np.float32) / 4
    return distance


def _load(columns: Sequence[Columns], user: int) -> Mapping[Split, Columns]:
    return split_rows(columns[user], seed=user, shares=THIRDS)
