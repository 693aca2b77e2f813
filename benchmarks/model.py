"""Time and memory of the whole network, and of the criterion: `python benchmarks/model.py --against FOLDER`.

    python benchmarks/model.py --cases 'inference 480x640' --rounds 5
    python benchmarks/model.py --against ../DINO        a checkout of the official program, IDEA-Research/DINO
    python benchmarks/model.py --against ../detrex      or of IDEA-Research/detrex
    python benchmarks/model.py --against ../before      or an earlier checkout of this project, with its operator built
    python benchmarks/model.py --device cuda --dtypes float32,bfloat16

R50, 4 scales, random weights, the same for all programs. Each contender has a process of its own; every round runs
each of them once, so that a disturbance of the machine meets all; medians are over rounds, after one run that is not
measured. `cpu_seconds` is what the process used, `peak_bytes` what it held at most, PyTorch included (on a GPU: the
tensors). Shares of stages come from one further run.

contenders: `dino` is this project as users get it, beside the `official` program or `detrex`; without a checkout of
these, beside `reference`, the same network with the attention in plain PyTorch. An `earlier` checkout runs its own
`benchmarks/model.py`. In bfloat16 and float16 the networks
run under autocast, but for inference by this project, whose predictor casts the network.
"""

import argparse
import contextlib
import json
import re
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import MIB, Worker, clock, git, origin, peak_memory  # noqa: E402
from others import NUM_CLASSES, PROGRAMS, Contender, recognise  # noqa: E402

from dino.inference.cpu import fold_norms, keep_freed_memory, prepare_for_cpu  # noqa: E402
from dino.layers import (  # noqa: E402
    DenoisingOutputs,
    HungarianMatcher,
    LayerOutputs,
    Outputs,
    SetCriterion,
    Target,
    deform_attn_implementation,
)
from dino.layers.cpu_feed_forward import use_cpu_feed_forward  # noqa: E402
from dino.modeling import TorchvisionBackbone, build_dino, share_heads  # noqa: E402
from dino.weights import load_weights  # noqa: E402
from dino.weights import recognise as recognise_weights  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Case(NamedTuple):
    work: str  # inference, training or criterion
    height: int
    width: int
    batch: int
    boxes: int  # per image
    dtype: str

    def __str__(self):
        return f"{self.work} {self.height}x{self.width} batch {self.batch} boxes {self.boxes} {self.dtype}"


CPU_CASES = [
    Case("inference", 480, 640, 1, 0, "float32"),
    Case("inference", 480, 640, 1, 0, "bfloat16"),
    Case("inference", 800, 1066, 1, 0, "float32"),
    Case("inference", 800, 1066, 1, 0, "bfloat16"),
    Case("training", 480, 640, 1, 10, "float32"),
    Case("training", 480, 640, 2, 10, "float32"),
    Case("training", 480, 640, 2, 100, "float32"),
    Case("criterion", 480, 640, 16, 20, "float32"),
]
CUDA_CASES = [
    *(Case("inference", 800, 1333, 1, 0, dtype) for dtype in ("float32", "bfloat16")),
    *(Case("training", 800, 1333, batch, 10, dtype) for batch in (2, 8) for dtype in ("float32", "bfloat16")),
    Case("criterion", 480, 640, 16, 20, "float32"),
]


def make_targets(case, device):
    """Objects of random classes, locations and sizes, the same at every call."""
    draw = torch.Generator().manual_seed(1)
    targets = []
    for _ in range(case.batch):
        sizes = torch.rand(case.boxes, 2, generator=draw) * 0.3 + 0.02
        centers = torch.rand(case.boxes, 2, generator=draw) * (1 - sizes) + sizes / 2
        labels = torch.randint(NUM_CLASSES, (case.boxes,), generator=draw)
        targets.append(Target(labels.to(device), torch.cat([centers, sizes], 1).to(device)))
    return targets


def make_outputs(case, targets, device):
    """Random predictions of 6 layers and 900 queries, with denoising."""
    draw = torch.Generator().manual_seed(3)

    def predictions(layers, queries):
        logits = torch.randn(layers, case.batch, queries, NUM_CLASSES, generator=draw)
        boxes = torch.rand(layers, case.batch, queries, 4, generator=draw) * 0.5 + 0.2
        return LayerOutputs(logits.to(device).requires_grad_(), boxes.to(device).requires_grad_())

    groups = max(1, 100 // case.boxes)
    denoised = DenoisingOutputs(predictions(6, 2 * groups * case.boxes), targets, groups)
    return Outputs(predictions(6, 900), predictions(1, 900), denoised)


def make_images(case, device):
    return torch.randn(case.batch, 3, case.height, case.width, generator=torch.Generator().manual_seed(0)).to(device)


@torch.no_grad()
def stir(model):
    """Give the weights that start at zero small values, so that all parts of the model change its output."""
    draw = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)


def ours(device, state_dict=None):
    """This project's network, with the weights of another program's if they are given."""
    backbone = TorchvisionBackbone("resnet50", freeze=("conv1", "bn1", "layer1"))
    model = build_dino(backbone=backbone, num_classes=NUM_CLASSES)
    if state_dict is None or recognise_weights(state_dict) == "official":
        share_heads(model.decoder)
    if state_dict is None:
        stir(model)
    else:
        load_weights(model, state_dict)
    criterion = SetCriterion(matcher=HungarianMatcher())
    model.to(device)

    def padding(images):
        return torch.zeros(images[:, 0].shape, dtype=torch.bool, device=images.device)

    def detect(images):
        found = model(images, padding(images)).decoder
        return found.logits[-1], found.boxes[-1]

    def losses(images, targets):
        return sum(criterion(model(images, padding(images), targets), targets).values())

    def criterion_loss(outputs, targets):
        return sum(criterion(outputs, targets).values())

    parts = {"backbone": model.neck, "encoder": model.encoder, "decoder": model.decoder, "criterion": criterion}
    return Contender(model, detect, losses, criterion_loss, parts)


def build(name, options, device):
    """A contender; all have the same weights. Ours reads them from a file, to carry nothing of the other program."""
    torch.manual_seed(0)
    if name not in PROGRAMS:
        return ours(device, torch.load(options.weights, mmap=True) if options.weights else None)
    adapter, _ = PROGRAMS[name]
    other = adapter(Path(options.against).resolve(), device)
    stir(other.model)
    return other


def work_of(case, contender, device):
    """A function without arguments that does the work of the case once."""
    targets = make_targets(case, device)
    if case.work == "criterion":
        outputs = make_outputs(case, targets, device)
        return lambda: criterion_loss(contender, outputs, targets)
    weight = next(contender.model.parameters())  # not float32 where `prepare` made it so
    images = make_images(case, device).to(weight.dtype)
    half = case.dtype != "float32" and weight.dtype == torch.float32
    autocast = torch.autocast(device.type, DTYPES[case.dtype], enabled=half)

    def inference():
        with torch.inference_mode(), autocast:
            return contender.detect(images)

    def training():
        torch.manual_seed(0)  # of the denoising draws
        contender.model.zero_grad(set_to_none=True)
        with autocast:
            loss = contender.losses(images, targets)
        loss.backward()
        return loss

    contender.model.train(case.work == "training")
    return {"inference": inference, "training": training}[case.work]


def criterion_loss(contender, outputs, targets):
    """Loss and gradients of given predictions."""
    loss = contender.criterion_loss(outputs, targets)
    loss.backward()
    return loss


def shares(contender, work, device):
    """Seconds of one run by stage; forward passes only, but for `rest`."""
    seconds, started, hooks = {}, {}, []
    for stage, module in contender.stages.items():

        def before(*_, stage=stage):
            started[stage] = clock(device)[0]

        def after(*_, stage=stage):
            seconds[stage] = clock(device)[0] - started[stage]

        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    begin = clock(device)[0]
    work()
    total = clock(device)[0] - begin
    for hook in hooks:
        hook.remove()
    return {**seconds, "rest": total - sum(seconds.values())}


def waits(work):
    """How often the host waits for the GPU in one run, as PyTorch sees it."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        work()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in found)


class Selections(TorchFunctionMode):
    """Notes the indices of the tokens that a network selects as queries."""

    def __init__(self):
        super().__init__()
        self.indices = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.topk, Tensor.topk) and self.indices is None:
            self.indices = result[1]
        return result


def prepare(model, case):
    """What our programs do: `dino.Predictor`, and the training."""
    if case.work == "inference":
        fold_norms(model.eval())
        prepare_for_cpu(model.to(DTYPES[case.dtype]))
    elif next(model.parameters()).device.type == "cpu":
        use_cpu_feed_forward(model)


def serve(case, name, options, device):
    """Do what is asked for on standard input, a line each; answers are lines of JSON."""
    contender = build(name, options, device)
    if name not in PROGRAMS:  # as our programs do
        keep_freed_memory()
        prepare(contender.model, case)
    work = work_of(case, contender, device)
    with deform_attn_implementation("reference") if name == "reference" else contextlib.nullcontext():
        for line in sys.stdin:
            request, _, path = line.strip().partition(" ")
            print(json.dumps(answer(request, path, contender, work, device)), flush=True)


def answer(request, path, contender, work, device):
    """What is asked for; None where a file is the answer, or there is none."""
    if request == "weights":
        torch.save(contender.model.state_dict(), path)
    elif request == "output":
        with Selections() as selections:
            torch.save([work(), selections.indices], path)
    elif request == "output_for_tokens_of":
        theirs, tokens = torch.load(path)
        return gaps(output_for_tokens(contender.model, work, tokens), theirs)
    elif request == "time":
        start = clock(device)
        work()
        return [end - begin for begin, end in zip(start, clock(device), strict=True)]
    elif request == "stages":
        return shares(contender, work, device)
    elif request == "peak":
        return peak_memory(work, device)[1]
    elif request == "waits" and device.type == "cuda":
        return waits(work)
    return None


def output_for_tokens(model, work, tokens):
    """What this project's network makes of the tokens (B, Q) that another program selected."""
    model.query_selection.select = lambda *scores: tokens
    try:
        return work()
    finally:
        del model.query_selection.select


def gaps(ours, theirs):
    """Largest differences of logits and boxes."""
    return {name: (x - y).abs().max().item() for name, x, y in zip(("logits", "boxes"), ours, theirs, strict=True)}


# An earlier checkout serves by its own program, as its modules have other names. It may not know the case.
EARLIER = "earlier"
SERVE_EARLIER = """
import sys
sys.path.insert(0, sys.argv[1] + "/benchmarks")
import model
work, *sizes, dtype = sys.argv[2:8]
model.CPU_CASES = model.CUDA_CASES = [model.Case(work, *map(int, sizes), dtype)]
sys.argv[1:8] = []
model.main()
"""


def start_worker(case, name, options, weights=None):
    """A process with one contender."""
    start = [__file__, "--serve", name]
    if name == EARLIER:
        start = ["-c", SERVE_EARLIER, Path(options.against).resolve(), *case, "--serve", "dino"]
    command = [sys.executable, *map(str, start), "--cases", f"^{re.escape(str(case))}$"]
    command += ["--device", options.device, "--threads", str(options.threads), "--dtypes", options.dtypes]
    command += ["--weights", weights] if weights else []
    command += ["--against", options.against] if name in PROGRAMS else []
    return Worker(command)


def measure(case, names, options):
    """One row for each contender."""
    with tempfile.TemporaryDirectory() as folder:
        other = start_worker(case, names[-1], options)
        weights = f"{folder}/weights" if names[-1] in PROGRAMS else None  # all others draw the same ones
        if weights:
            other.ask(f"weights {weights}")
        workers = {"dino": start_worker(case, "dino", options, weights), names[-1]: other}
        for name, worker in workers.items():  # also warms up
            worker.ask(f"output {folder}/{name}")
        outputs = {name: torch.load(f"{folder}/{name}") for name in names}
        given = case.work == "inference" and workers["dino"].ask(f"output_for_tokens_of {folder}/{names[-1]}")
    times = times_of(workers, options.rounds)
    rows = []
    for name, worker in workers.items():
        row = {**case._asdict(), "contender": name, **measured(worker, times[name])}
        row["difference"] = difference(case, outputs[name], outputs[names[-1]])
        worker.close()
        rows.append(row)
    if given:
        rows[0]["difference"] |= {f"{name} for their tokens": gap for name, gap in given.items()}
    return rows


def times_of(workers, rounds):
    """Name -> (wall, processor) seconds of each round; every round runs each contender once."""
    times = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name].append(worker.ask("time"))
    return times


def measured(worker, times):
    """Times, stages, peak memory and waits of a contender."""
    wall, cpu = zip(*times, strict=True)
    seconds = {"seconds": statistics.median(wall), "best_seconds": min(wall), "cpu_seconds": statistics.median(cpu)}
    return {**seconds, "stages": worker.ask("stages"), "peak_bytes": worker.ask("peak"), "waits": worker.ask("waits")}


def difference(case, ours, theirs):
    """Of the loss, relative; or the largest of logits and boxes where both selected the same token, and their share.

    Rounding changes the order of tokens of equal score; self-attention carries that to all other queries. The loss of a
    training step differs by the programs' own draws of denoising noise.
    """
    (mine, my_tokens), (other, other_tokens) = ours, theirs
    if case.work != "inference":
        return {"loss": abs(mine.item() - other.item()) / abs(other.item())}
    same = my_tokens == other_tokens
    found = gaps([x[same] for x in mine], [y[same] for y in other])
    return {**found, "same_tokens": same.float().mean().item()}


def matrix_product(dtype, device):
    """Multiply-adds per second of a plain matrix product of the encoder's shape."""
    rows, weights = torch.randn(22223, 256, device=device).to(dtype), torch.randn(256, 2048, device=device).to(dtype)
    product, times = rows @ weights, []
    for _ in range(6):
        begin = clock(device)[0]
        torch.mm(rows, weights, out=product)
        times.append(clock(device)[0] - begin)
    return rows.numel() * weights.shape[1] / statistics.median(times[1:])


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=ROOT / "benchmarks/results", type=Path, help="folder of the JSON file")
    parser.add_argument("--suffix", default="", help="of the file's name, for another machine: _amx")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", default=torch.get_num_threads(), type=int)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--cases", default="", help="regular expression, such as 'inference 480x640'")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated")
    parser.add_argument("--against", help="checkout of the official program or of detrex")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    cases = CPU_CASES if device.type == "cpu" else CUDA_CASES
    cases = [c for c in cases if re.search(options.cases, str(c)) and c.dtype in options.dtypes.split(",")]
    if options.serve:
        serve(cases[0], options.serve, options, device)
    else:
        compare(cases, options, device)


def contender_in(folder):
    """What to measure in a checkout."""
    return EARLIER if (folder / "benchmarks/model.py").exists() else recognise(folder)


def compare(cases, options, device):
    """Measure all cases and write them down."""
    against = options.against and git("rev-parse", "HEAD", folder=options.against)
    report = {**origin(device), "rounds": options.rounds, "against": against, "rows": []}
    report["matrix_product"] = {name: matrix_product(DTYPES[name], device) for name in options.dtypes.split(",")}
    other = contender_in(Path(options.against)) if options.against else "reference"
    names = ["dino", other]
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"model_{device.type}_{options.threads}threads_{other}{options.suffix}.json"
    for case in cases:
        report["rows"] += measure(case, names, options)
        path.write_text(json.dumps(report, indent=1) + "\n")
        for row in report["rows"][-len(names) :]:
            stages = {stage: round(seconds, 3) for stage, seconds in row["stages"].items()}
            print(f"{case} {row['contender']}: {row['seconds']:.3f} s, {row['peak_bytes'] / MIB:.0f} MiB", flush=True)
            print(f"  {stages}, {row['difference']}", flush=True)


if __name__ == "__main__":
    main()
