"""Short film reviews, generated on the spot: the offline stand-in for GLUE's sst2."""

import random
from itertools import product

from datasets import Dataset

SUBJECTS = (
    "the plot",
    "the cast",
    "the score",
    "the ending",
    "this film",
    "the dialogue",
    "the camera work",
    "the pacing",
)
VERBS = ("is", "seems", "feels", "remains")
DEGREES = ("", "very", "rather", "almost", "consistently", "surprisingly")
GOOD = ("funny", "moving", "clever", "warm", "gripping", "elegant", "fresh", "honest", "charming", "superb")
BAD = ("dull", "clumsy", "hollow", "tedious", "cold", "lifeless", "stale", "shallow", "confused", "dreadful")


def movie_phrases(size: int, seed: int) -> Dataset:
    """`size` rows with sst2's columns, all different; half of them positive.

    Sample:
        sentence: "the plot seems rather clumsy and the cast is dull"
        label: 0

    Both halves of a sentence agree. Every draw gives new sentences from the same words.

    Raises:
        ValueError: `size` exceeds the number of sentences.
    """
    clauses = {
        label: [" ".join(part for part in parts if part) for parts in product(SUBJECTS, VERBS, DEGREES, words)]
        for label, words in ((0, BAD), (1, GOOD))
    }
    pairs = len(clauses[0]) ** 2
    if size > pairs:
        raise ValueError(f"The stand-in has {2 * pairs:,} sentences, fewer than the {size:,} asked for. Ask for fewer.")
    draw, rows = random.Random(seed), {}
    while len(rows) < size:
        label = len(rows) % 2
        rows[f"{draw.choice(clauses[label])} and {draw.choice(clauses[label])}"] = label
    return Dataset.from_dict({"sentence": list(rows), "label": list(rows.values())})
