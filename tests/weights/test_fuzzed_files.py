"""Small weight files with random changes: each is read, or refused by one message, and nothing in it runs."""

import argparse
import io
import random
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from dino.modeling import share_heads
from dino.weights.description import build_network

from . import hostile
from .states import official_state

ROUNDS = 200  # changed files of each kind


def official(path, state):
    torch.save(
        {"model": state, "args": argparse.Namespace(lr=1e-4, names=["a"]), "optimizer": {"state": {0: {}}}}, path
    )


def legacy(path, state):
    torch.save({"model": dict(list(state.items())[:5])}, path, _use_new_zipfile_serialization=False)


def arrays(path, state):
    import pickle

    small = {key: value.numpy() for key, value in list(state.items())[:5]}
    path.write_bytes(pickle.dumps({"model": small, "names": ["a", "b"]}, protocol=2))


def official_names(path, state):
    """A file under the names of the official program, which say what the model is."""
    network = build_network({"network": hostile.NETWORK | {"backbone": hostile.RESNET, "embed_dim": 64}})
    share_heads(network.decoder)
    args = argparse.Namespace(pe_temperatureH=20, pe_temperatureW=20, nheads=4, num_select=300)
    named = official_state(network).items()
    torch.save({"model": {k: v.half() if v.is_floating_point() else v for k, v in named}, "args": args}, path)


KINDS = {
    "official_names.pth": official_names,
    "own.pth": hostile.described(),
    "official.pth": official,
    "legacy.pth": legacy,
    "arrays.pkl": arrays,
    "own.safetensors": hostile.safetensors({"names": '["a", "b", "c"]', "about": "{}"}),
}
CALLS = [
    hostile.call(name, hostile.pack(("touch hostile_trace",))) + b"0"
    for name in ("os.system", "posix.system", "builtins.eval", "numpy.load", "builtins.getattr")
]
OPCODES = [
    *(bytes([code]) for code in b"().0123456789abcdefghjlopqrstu\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x93"),
    *CALLS,
]


def change(data, chance):
    """Some bytes flipped, cut out, doubled, or replaced by instructions of pickles."""
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8])):
        place = chance.randrange(len(data))
        kind = chance.randrange(4)
        if kind == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[place : place + chance.randrange(1, 30)]
        elif kind == 2:
            data[place:place] = data[place : place + chance.randrange(1, 300)]
        else:
            data[place:place] = chance.choice(OPCODES)
    return bytes(data)


def changed_file(path, chance):
    """The file with changes in its pickle, or anywhere."""
    if path.suffix == ".pth" and zipfile.is_zipfile(path) and chance.random() < 0.8:
        buffer = io.BytesIO()
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
            for part in old.infolist():
                data = old.read(part)
                new.writestr(part.filename, change(data, chance) if part.filename.endswith("data.pkl") else data)
        return buffer.getvalue()
    data = path.read_bytes()
    start = data[:6000] if chance.random() < 0.8 else data
    return change(start, chance) + data[len(start) :]


def main(folder):
    warnings.simplefilter("ignore")
    chance, outcomes = random.Random(0), {}
    for kind in KINDS:
        for _ in range(ROUNDS):
            path = Path(folder) / f"changed{Path(kind).suffix}"
            path.write_bytes(changed_file(Path(folder) / kind, chance))
            message = hostile.read(path)  # any other error than a DataError ends the program
            assert "\n" not in message, message
            outcomes.setdefault(kind, set()).add(message.replace(folder, "")[:60])
    print({kind: len(messages) for kind, messages in outcomes.items()})


@pytest.mark.slow
def test_changed_files_are_read_or_refused(tmp_path):
    state = build_network({"network": hostile.NETWORK}).state_dict()
    for name, write in KINDS.items():
        write(tmp_path / name, state)
    hostile.run_apart("tests.weights.test_fuzzed_files", tmp_path)


if __name__ == "__main__":
    main(sys.argv[1])
