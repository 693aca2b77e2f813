"""Hostile weight files: name -> a function that writes one. As a program: reads files, and prints what that took.

`python -m tests.weights.hostile FOLDER` reads every file of a folder and prints JSON: name -> [message, seconds of the
processor, bytes that the memory grew].
"""

import argparse
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from dino.modeling import share_heads
from dino.modeling.detector import Preprocessing
from dino.weights.description import build_network

from .states import official_state

BILLION = 10**9
BACKBONE = {"_target_": "dino.modeling.TimmBackbone", "name": "test_resnet", "norm": "BN"}  # of 0.5 million numbers
RESNET = {"_target_": "dino.modeling.TorchvisionBackbone", "name": "resnet18"}
TORCHVISION = {"_target_": "dino.modeling.TorchvisionBackbone", "name": "convnext_large"}
SMALL = {"embed_dim": 32, "num_heads": 4, "hidden_dim": 16, "encoder_layers": 1, "decoder_layers": 2}
NETWORK = {
    "_target_": "dino.modeling.build_dino",
    "backbone": BACKBONE,
    **SMALL,
    "num_classes": 3,
    "num_queries": 12,
    "num_denoising": 6,
}


def timm(name, **options):
    return NETWORK | {"backbone": {"_target_": "dino.modeling.TimmBackbone", "name": name, "options": options}}


def described(network=None, text=None, names=("a", "b", "c"), **more):
    """A description with the weights of a small network, in a file."""

    def write(path, state):
        about = {
            "config": json.dumps({"network": network or NETWORK}) if text is None else text,
            "preprocessing": Preprocessing()._asdict() | more.pop("preprocessing", {}),
        }
        torch.save({"model": state, "names": list(names), "about": about, **more}, path)

    return write


def run_apart(module, folder):
    """What `python -m module folder` prints. It must end well, and leave no trace of code that a file held."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, str(folder)]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert not (root / "hostile_trace").exists()
    return run.stdout


def pickled(body, *, protocol=2):
    """A `.pkl` file, and a `.pth` file, of one pickle that stores what `body` makes under the key "x"."""
    return of_pickle(b"\x80" + bytes([protocol]) + b"}X\x01\x00\x00\x00x" + body + b"s.")


def of_pickle(data):
    """A `.pkl` file of this pickle, and a `.pth` file with it in place of its own."""

    def write(path, state):
        if path.suffix == ".pkl":
            path.write_bytes(data)
        else:
            rewrite(path, {"w": torch.ones(3)}, lambda old: data)

    return write


def rewrite(path, content, change, compression=zipfile.ZIP_STORED, more=()):
    """Write a file of PyTorch, then change its pickle."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", compression) as new:
        for part in old.infolist():
            data = old.read(part)
            new.writestr(part.filename, change(data) if part.filename.endswith("data.pkl") else data)
        for name, data in more:
            new.writestr(name, data)


def call(name, arguments):
    """The opcodes of a call of a class or function."""
    module, _, name = name.rpartition(".")
    return f"c{module}\n{name}\n".encode() + arguments + b"R"


def pack(value):
    """Opcodes of a plain value."""
    return pickle.dumps(value, protocol=2)[2:-1]


def saved(make):
    """A file of one tensor that `make` makes."""

    def write(path, state):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some kinds of tensors are deprecated
            torch.save({"model": {"weight": make()}}, path)

    return write


def program(path, state):
    """A program of TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)


def legacy(path, state):
    """A file of an old PyTorch that claims 10**11 numbers."""
    torch.save({"w": torch.ones(300)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"M,\x01N") == 1
    path.write_bytes(data.replace(b"M,\x01N", b"\x8a\x05" + (10**11).to_bytes(5, "little") + b"N"))


def bomb(path, state):
    """A zip file of 100 kB that inflates to 100 MB."""
    rewrite(path, {"w": torch.ones(3)}, lambda old: old, zipfile.ZIP_DEFLATED, [("archive/data/1", bytes(10**8))])


def overlapping(path, state):
    """One part that the list of contents names a thousand times."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/data/0", bytes(10**5))
        archive.filelist += [archive.filelist[-1]] * 1000


def many_parts(path, state):
    """A list of contents that claims 2 GB, at the end of a file."""
    rewrite(path, {"w": torch.ones(3)}, lambda old: old)
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    struct.pack_into("<I", data, end + 12, 2**31 - 1)
    path.write_bytes(data)


def many_claims(path, state):
    """50,000 tensors that share 40 kB."""
    shared = torch.ones(10_000)
    torch.save({"model": {f"w{i}": shared for i in range(20_000)}}, path)


def wide_claim(path, state):
    """A tensor of 200 numbers in a storage of 3."""
    rewrite(path, {"w": torch.ones(3)}, lambda old: old.replace(b"K\x03", b"K\xc8"))


def hidden_methods(attribute):
    """A file whose content is an ordered dict with an attribute in place of a method."""
    made = call("collections.OrderedDict", b")") + pack({attribute: 5}) + b"b"
    return of_pickle(b"\x80\x02" + made + b".")


def safetensors(metadata=None, header=None):
    def write(path, state):
        if header is None:
            save_file({key: value.contiguous() for key, value in state.items()}, path, metadata)
        else:
            path.write_bytes(header)

    return write


def of_official(change):
    """A file under the official program's names, with a changed tensor: the description is inferred from it."""

    def write(path, state):
        backbone = {"_target_": "dino.modeling.TorchvisionBackbone", "name": "resnet18"}
        network = build_network({"network": NETWORK | {"backbone": backbone, "embed_dim": 64}})
        share_heads(network.decoder)
        state = {k: v.half() if v.is_floating_point() else v for k, v in official_state(network).items()}
        change(state)
        torch.save({"model": state, "args": argparse.Namespace(nheads=4)}, path)

    return write


def tar(path, state):
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))


def tuples(count):
    """Nested tuples as the key of a dict: Python hashes them by recursion."""
    return b")" + b"\x85" * count


def laughs(count):
    """A tuple of two equal tuples of two equal tuples …"""
    return b")" + b"".join(b"q%c" % i + b"h%c\x86" % i for i in range(count))


def shared_array(count):
    """A dict with one array of 80 kB under many keys."""
    array = pickle.dumps(np.zeros(10_000), 2)[2:-1]
    return b"}(" + pack("a") + array + b"q\xff" + b"".join(pack(str(i)) + b"h\xff" for i in range(count)) + b"u"


def long_chain(count):
    """Dicts of which each is put into the one before after that is made, under a key of 100 kB."""
    number = [struct.pack("<I", i) for i in range(count + 1)]
    made = b"".join(b"}r" + number[i] for i in range(count))
    linked = b"".join(b"j%bj%bj%bs" % (number[i], number[count], number[i + 1]) for i in range(count - 1))
    return b"](" + b"X" + struct.pack("<I", 10**5) + b"k" * 10**5 + b"r" + number[count] + made + linked + b"e"


DESCRIPTIONS = {
    "encoder_layers": described(NETWORK | {"encoder_layers": BILLION}),
    "decoder_layers": described(NETWORK | {"decoder_layers": BILLION}),
    "many_layers": described(NETWORK | {"decoder_layers": 1000}),
    "num_levels": described(NETWORK | {"num_levels": BILLION}),
    "many_levels": described(NETWORK | {"num_levels": 1000}),
    "num_queries": described(NETWORK | {"num_queries": 5 * 10**7}),
    "many_queries": described(NETWORK | {"num_queries": 900_000}),
    "embed_dim": described(NETWORK | {"embed_dim": BILLION}),
    "wide": described(NETWORK | {"embed_dim": 10**6}),
    "hidden_dim": described(NETWORK | {"hidden_dim": BILLION}),
    "num_points": described(NETWORK | {"num_points": BILLION}),
    "many_points": described(NETWORK | {"num_points": 10**6}),
    "num_heads": described(NETWORK | {"num_heads": BILLION}),
    "num_classes": described(NETWORK | {"num_classes": 10**8}),
    "nan": described(NETWORK | {"embed_dim": float("nan")}),
    "infinite": described(NETWORK | {"num_queries": float("inf")}),
    "large_float": described(text='{"network": {"_target_": "dino.modeling.build_dino", "num_queries": 1e999}}'),
    "long_integer": described(text='{"network": {"num_queries": ' + "9" * 100_000 + "}}"),
    "long_list": described(NETWORK | {"in_features": ["res3"] * 30_000}),
    "long_text": described(text=json.dumps({"network": NETWORK, "more": [0] * 10**6})),
    "long_word": described(NETWORK | {"in_features": ["r" * 100_000]}),
    "deep_text": described(text='{"network": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "deep_parts": described(text='{"network": ' + "[" * 100 + "]" * 100 + "}"),
    "max_detections": described(preprocessing={"max_detections": 10**12}),
    "short_side": described(preprocessing={"short_side": 10**12}),
    "max_size": described(preprocessing={"max_size": 10**12}),
    "mean_nan": described(preprocessing={"pixel_mean": [float("nan"), 1, 1]}),
    "mean_large": described(preprocessing={"pixel_mean": [1e5, 1, 1]}),
    "std_tiny": described(preprocessing={"pixel_std": [1e-30, 1, 1]}),
    "std_negative": described(preprocessing={"pixel_std": [-1, 1, 1]}),
    "std_infinite": described(preprocessing={"pixel_std": [float("inf"), 1, 1]}),
    "range_infinite": described(preprocessing={"input_range": [0, float("inf")]}),
    "range_long": described(preprocessing={"input_range": list(range(100_000))}),
    "many_names": described(names=["a"] * 150_000),
    "long_name": described(names=["a" * 10**7, "b", "c"]),
    "control_name": described(names=["a\x1b[2J", "b", "c"]),
    "surrogate_name": described(names=["\ud800", "b", "c"]),
    "many_ids": described(category_ids=list(range(100_000))),
    "huge_id": described(category_ids=[2**70, 1, 2]),
    "timm_giant": described(timm("vit_giant_patch14_dinov2")),
    "timm_deep": described(timm("vit_tiny_patch16_224", depth=1000)),
    "timm_image": described(timm("vit_tiny_patch16_224", img_size=10**6)),
    "timm_wide": described(timm("vit_tiny_patch16_224", embed_dim=999_936)),
    "timm_window": described(timm("swin_tiny_patch4_window7_224", window_size=100_000)),
    "torchvision_giant": described(NETWORK | {"backbone": TORCHVISION}),
}
FILES = {
    "bomb.pth": bomb,
    "overlapping.pth": overlapping,
    "many_parts.pth": many_parts,
    "expanded.pth": saved(lambda: torch.ones(1).expand(10**6, 10**6)),
    "many_claims.pth": many_claims,
    "wide_claim.pth": wide_claim,
    "legacy.pth": legacy,
    "tar.pth": tar,
    "picture.pth": lambda path, state: path.write_bytes(b"GIF89a" + bytes(1000)),
    "program.pth": program,
    "sparse.pth": saved(lambda: torch.eye(3).to_sparse()),
    "quantised.pth": saved(lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)),
    "meta.pth": saved(lambda: torch.empty(10**6, 10**6, device="meta")),
    "complex.pth": saved(lambda: torch.ones(2, dtype=torch.complex64)),
    "nested.pth": saved(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
    "header.safetensors": safetensors(header=(2**40).to_bytes(8, "little") + b"{}"),
    "long_header.safetensors": safetensors(header=(2 * 10**7).to_bytes(8, "little") + b" " * (2 * 10**7)),
    "deep.safetensors": safetensors({"names": "[" * 100_000 + "]" * 100_000}),
    "no_json.safetensors": safetensors({"about": "{"}),
    "offsets.safetensors": safetensors(
        header=(72).to_bytes(8, "little")
        + json.dumps({"w": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode().ljust(72)
    ),
}
_ARRAY = call("numpy.core.multiarray._reconstruct", b"cnumpy\nndarray\n" + pack((10**10,)) + b"X\x01\x00\x00\x00d\x87")
_TYPE = call("numpy.dtype", pack(("f8", False, True)))
PICKLES = {  # of both kinds of files
    "nested_key": pickled(b"}" + tuples(100_000) + b"Ns"),
    "laughing_key": pickled(b"}" + laughs(60) + b"Ns"),
    "deep_list": pickled(b"]" * 100_000 + b"a" * 99_999),
    "many_values": pickled(b"](" + b"\x8f" * 600_000 + b"e"),
    "far_memo": pickled(b"]r\xff\xff\xff\x7f"),
    "long_bytes": pickled(b"\x8e" + (10**12).to_bytes(8, "little")),
    "long_unicode": pickled(b"X\xff\xff\xff\xff"),
    "long_frame": pickled(b"\x95" + (2**60).to_bytes(8, "little")),
    "long_number": pickled(b"\x8b" + (10**6).to_bytes(4, "little") + b"\x7f" * 10**6),
    "bytearray": pickled(call("builtins.bytearray", pack((10**10,)))),
    "encoding": pickled(call("_codecs.encode", b"X\x01\x00\x00\x00aX\x09\x00\x00\x00hex_codec\x86")),
    "third_encoding": pickled(call("_codecs.encode", pack(("a", "hex_codec", "latin1")))),
    "extension": pickled(b"\x82\x01"),
    "array_shape": pickled(_ARRAY + b"(K\x01" + pack((10**10,)) + _TYPE + b"\x89C\x08abcdefghtb", protocol=3),
    "array_record": pickled(call("numpy.dtype", pack(("V2000000000", False, True)))),
    "array_objects": pickled(call("numpy.dtype", pack(("O8", False, True)))),
    "scalar": pickled(call("numpy.core.multiarray.scalar", call("numpy.dtype", pack(("U99999", 0, 1))) + b"\x85")),
    "shared_array": pickled(shared_array(10_000)),
    "long_chain": pickled(long_chain(20_000)),
    "hidden_methods": hidden_methods("items"),
    "class_state": pickled(b"ccollections\nOrderedDict\n" + pack((None, {"__init__": 1})) + b"b"),
    "getattr": pickled(call("builtins.getattr", b"ccollections\nOrderedDict\nX\x08\x00\x00\x00__init__\x86")),
    **{
        name.replace(".", "_"): pickled(call(name, pack(("touch hostile_trace",))))
        for name in (
            "os.system",
            "posix.system",
            "builtins.eval",
            "builtins.exec",
            "builtins.__import__",
            "subprocess.Popen",
            "runpy.run_path",
            "shutil.rmtree",
            "webbrowser.open",
            "importlib.import_module",
            "torch.load",
            "torch.hub.load",
            "torch.jit.load",
            "torch.storage._load_from_bytes",
            "torch._utils._rebuild_wrapper_subclass",
            "torch.FloatTensor",
            "numpy.load",
            "numpy.memmap",
            "functools.partial",
            "operator.attrgetter",
            "types.FunctionType",
            "copyreg._reconstructor",
            "pickle.loads",
            "omegaconf.OmegaConf.load",
            "omegaconf.dictconfig.DictConfig.__init__",
            "ultralytics.nn.tasks.DetectionModel",
            "__main__.Model",
        )
    },
}
_SAMPLES = "transformer.encoder.layers.0.self_attn.attention_weights.bias"
FOREIGN = {
    "foreign_without_samples": of_official(lambda state: state.pop(_SAMPLES)),
    "foreign_number": of_official(lambda state: state.update({_SAMPLES: torch.tensor(1.0)})),
    "foreign_no_levels": of_official(lambda state: state.update({"transformer.level_embed": torch.zeros(0, 1)})),
    "foreign_kernel": of_official(lambda state: state.update({"input_proj.0.0.weight": torch.tensor(1.0)})),
}
FILES |= {f"{name}.pth": write for name, write in (DESCRIPTIONS | FOREIGN).items()}
FILES |= {f"pickle_{name}{suffix}": write for name, write in PICKLES.items() for suffix in (".pth", ".pkl")}


def read(path):
    """What a person sees: the message."""
    from dino.utils.files import DataError
    from dino.weights.description import detector_from_checkpoint

    try:
        detector_from_checkpoint(path)
    except DataError as error:
        return str(error)
    return "read"


def memory(key):
    """Bytes of this process, from Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def main(folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    paths, results = sorted(Path(folder).iterdir()), {}
    read(Path(folder) / "ordinary.pth")  # imports
    for path in paths:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        start, before = time.process_time(), memory("VmRSS")
        message = read(path)
        results[path.name] = [message, time.process_time() - start, memory("VmHWM") - before]
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
