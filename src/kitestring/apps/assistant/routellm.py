"""Routing questions between two language models, on recorded answers: RouteLLM's GSM8K run.

1,319 school mathematics questions of GSM8K's test set (Cobbe et al. 2021, MIT), each answered by a
weak model (Mixtral-8x7B) and a strong one (GPT-4), with whether the answer was right. Recorded by
the RouteLLM project (Ong et al. 2024; Apache-2.0).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from kitestring.errors import DataError
from kitestring.tasks.fetch import Source, read
from kitestring.tasks.metrics import accuracy
from kitestring.tasks.recorded import THIRDS
from kitestring.tasks.task import Array, Recorded
from kitestring.tasks.users import Columns, Split, Users, deal, split_rows

USERS = 44
POOL = 0.3
WEAK, STRONG = "mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview"
CHARACTERS_PER_TOKEN = 4  # a rule of thumb for English
DOLLARS_PER_MILLION_TOKENS = (10.0, 30.0)  # GPT-4-1106's in 2024, not checked: question, answer
RESPONSES = Source(
    "RouteLLM's GSM8K answers",
    "https://raw.githubusercontent.com/lm-sys/RouteLLM/main/routellm/evals/gsm8k/gsm8k_responses.csv",
    "1f38ed03db354a020f71e92022383dc3cf37bbf2694dea4daaeea7b6c43fe57b",
    "routellm-gsm8k/gsm8k_responses.csv.gz",
)


@dataclass(frozen=True)
class Responses:
    """The file by column, one entry per question."""

    questions: list[str]
    weak: Array  # float32 [1319]: 1 where the weak model was right, else 0
    strong: Array
    cost: Array  # float32 [1319]: estimated dollars of the strong model's answer


def task(users: int | None = None) -> Recorded:
    """44 made-up users (or `users`); y is 1 throughout, an answer 1 where the model was right.

    So accuracy is the share of questions answered rightly."""
    recorded = responses()
    total = len(recorded.questions)
    count = USERS if users is None else users
    if not 2 <= count <= total // 3:
        raise DataError(f"{count} users", "routellm", f"Give 2 to {total // 3}")
    hands = np.array_split(np.random.default_rng(0).permutation(total), count)
    pool, devices = deal(count, POOL)
    columns = {
        "x": np.arange(total),
        "y": np.ones(total, np.int64),
        "device": recorded.weak,
        "confidence": _confidence(recorded, np.concatenate([hands[i] for i in pool])),
    }
    names = [f"user {i + 1}" for i in range(count)]
    return Recorded(
        name="routellm",
        users=Users(names, partial(_load, columns, hands), pool, devices),
        cloud=recorded.strong,
        metric=accuracy,
        cost=recorded.cost,
        about="GSM8K's 1,319 test questions with the recorded answers of a weak model "
        "(Mixtral-8x7B, as the device's) and a strong one (GPT-4, as the cloud's), from RouteLLM. "
        "Which questions are worth asking the strong model?",
        request="one mathematics question",
        notes=(
            f"The data has no users: its questions were dealt at random to {count} made-up ones, "
            "so nothing here is about differences between people.",
            "Confidence is the chance that the weak model is right, predicted from the question's "
            "words by a logistic regression that saw only the pool users' questions. It "
            "tells little: its AUC on the others is .55.",
            "Costs are estimates: four characters a token, at what GPT-4-1106 cost in 2024 by our "
            "recollection ($10 per million tokens asked, $30 answered).",
        ),
    )


@cache
def responses() -> Responses:
    """RouteLLM's recorded answers to GSM8K's test questions."""
    rows = list(csv.DictReader(io.StringIO(read(RESPONSES).decode("utf-8"), newline="")))

    def right(model: str) -> Array:
        return np.array([row[model] == "True" for row in rows], np.float32)

    asked, answered = (
        np.array([len(row[column]) for row in rows]) / CHARACTERS_PER_TOKEN / 1e6
        for column in ("prompt", f"{STRONG}_response")
    )
    dollars = asked * DOLLARS_PER_MILLION_TOKENS[0] + answered * DOLLARS_PER_MILLION_TOKENS[1]
    questions = [row["prompt"] for row in rows]
    return Responses(questions, right(WEAK), right(STRONG), dollars.astype(np.float32))


def _confidence(recorded: Responses, pooled: Array) -> Array:
    """float32 [1319]: the chance that the weak model is right, predicted from `pooled` rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model: Any = make_pipeline(words, LogisticRegression(max_iter=1000))
    model.fit([recorded.questions[i] for i in pooled], recorded.weak[pooled])
    chance: Array = model.predict_proba(recorded.questions)[:, 1].astype(np.float32)
    return chance


def _load(columns: Columns, hands: Sequence[Array], user: int) -> Mapping[Split, Columns]:
    own = np.sort(hands[user])
    return split_rows({name: a[own] for name, a in columns.items()}, seed=user, shares=THIRDS)
