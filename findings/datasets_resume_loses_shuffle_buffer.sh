#!/usr/bin/env bash
# datasets 5.2.0
# Expected: load_state_dict continues a shuffled stream where state_dict was taken, so that every example is seen once.
# Seen: the examples that were in the shuffle buffer are lost; a logged line says that the buffer is refilled.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check datasets==5.2.0

venv/bin/python - <<'PYTHON'
import os

os.environ["HF_HOME"] = os.getcwd()
import datasets


def stream():
    numbers = datasets.Dataset.from_dict({"number": list(range(36))})
    return numbers.to_iterable_dataset(num_shards=4).shuffle(seed=0, buffer_size=8)


first = stream()
iterator = iter(first)
before = [next(iterator)["number"] for _ in range(10)]
state = first.state_dict()

second = stream()
second.load_state_dict(state)
after = [example["number"] for example in second]
lost = sorted(set(range(36)) - set(before) - set(after))
print(f"{len(before)} examples before the stop, {len(after)} after it, lost: {lost}")
assert len(lost) > 0, "the behaviour changed: nothing was lost"
PYTHON
