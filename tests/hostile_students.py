"""Loads damaged copies of a student's folder: ``python hostile_students.py FOLDER COUNT SEED``.

Every copy must be refused with ValueError or answer; no more memory may be taken than a small folder warrants.
"""

import hashlib
import json
import random
import resource
import sys
from pathlib import Path

from fastkd.runtime import load

MEMORY = 256 << 20
FILES = ("student.json", "student.safetensors", "tokenizer.json")
INTEGERS = (-1, 0, 1, 2, 3, 7, 2**24, 2**31, 2**63, 10**30, -(2**63))
VALUES = (*INTEGERS, 0.5, 1e308, True, None, "", "a", "\ud800", [], {}, [[]])
TEXTS = (["the good film", "", "x" * 999], [("good", "the bad film"), ("", "")])


def flip(data, pick):
    data = bytearray(data)
    end = min(len(data), pick.choice([16, 200, 4000, len(data)]))  # the headers come first
    for _ in range(pick.choice([1, 1, 2, 8])):
        data[pick.randrange(end)] = pick.randrange(256)
    return bytes(data)


def cut(data, pick):
    return data[: pick.randrange(len(data))] if pick.random() < 0.7 else data + data[: pick.randrange(1, len(data))]


def replace_value(data, pick):
    """Another value at a random place of a JSON document: the file itself, or the header of a safetensors file."""
    head = int.from_bytes(data[:8], "little") if data[:1] != b"{" else None
    document = json.loads(data if head is None else data[8 : 8 + head])
    holder, key = document, pick.choice(list(document))
    while isinstance(holder[key], (dict, list)) and holder[key] and pick.random() < 0.9:
        holder = holder[key]
        key = pick.choice(list(holder)) if isinstance(holder, dict) else pick.randrange(len(holder))
    if isinstance(holder, dict) and pick.random() < 0.2:
        del holder[key]
    else:
        holder[key] = pick.choice(VALUES)
    text = json.dumps(document).encode()
    return text if head is None else len(text).to_bytes(8, "little") + text + data[8 + head :]


def damage(folder, whole, pick):
    name = pick.choice(FILES)
    files = whole | {name: pick.choice([flip, cut, replace_value, replace_value])(whole[name], pick)}
    if name != "student.json" and pick.random() < 0.95:  # as a hostile author would
        description = json.loads(files["student.json"])
        description["sha256"][name] = hashlib.sha256(files[name]).hexdigest()
        files["student.json"] = json.dumps(description).encode()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def answers(folder):
    try:
        student = load(folder)
        for texts in TEXTS:
            student.predict(texts, task=next(iter(student.tasks), None))
    except ValueError:
        return False
    return True


def main(folder, count, seed):
    folder, pick = Path(folder), random.Random(seed)
    whole = {name: (folder / name).read_bytes() for name in FILES}
    assert answers(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    answered, copy = 0, folder.with_name("damaged")
    copy.mkdir()
    for number in range(count):
        damage(copy, whole, pick)
        try:
            answered += answers(copy)
        except BaseException as error:
            sys.exit(f"damage {number} of seed {seed}: {type(error).__name__}: {error}")
    print(json.dumps({"answered": answered, "refused": count - answered}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
