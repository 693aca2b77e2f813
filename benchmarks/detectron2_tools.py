"""Run Detectron2's own programs with a DINO: they must end well, and leave the process as fast as before.

    python benchmarks/detectron2_tools.py --detectron2 CHECKOUT --bccd FOLDER --output results.json

CHECKOUT is a copy of Detectron2's repository, whose `tools` the installed package lacks; FOLDER holds `train.json`,
`val.json` and `images`. The programs run unchanged: training with a kill and a resume, evaluation, drawing, cost,
speed.
Those that know neither the data nor DINO's keys run through a few lines that register both first, as a user would write
them. Then the operator's first use comes before and after a count of FLOPs and a trace, in processes of their own.
"""

import argparse
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import origin

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
from detectron2.config import LazyConfig

from dino.utils.recipes import find_recipe

_recipe = LazyConfig.load(str(find_recipe("dino_r18_small_data")))
dataloader, lr_multiplier, model, optimizer, train = (
    _recipe[key] for key in ("dataloader", "lr_multiplier", "model", "optimizer", "train")
)
for split, node in (("train", dataloader.train), ("val", dataloader.test)):
    files = dict(annotations=f"{bccd}/{{split}}.json", images="{bccd}/images")
    node.dataset = dict(node.dataset, name=f"bccd_{{split}}", **files)
dataloader.evaluator.dataset_name = "bccd_val"
model.num_classes = 3
train.device, train.max_iter, train.eval_period = "cpu", 12, 6
train.checkpointer.period, train.log_period = 4, 2
"""
REGISTER = """
from detectron2.data.datasets import register_coco_instances

for split in ("train", "val"):
    register_coco_instances(f"bccd_{{split}}", {{}}, f"{bccd}/{{split}}.json", "{bccd}/images")
"""
YACS = """
import detectron2.config

from dino.d2 import add_dino_config

plain = detectron2.config.get_cfg


def get_cfg():
    cfg = plain()
    add_dino_config(cfg)
    return cfg


detectron2.config.get_cfg = get_cfg
"""
YAML = """
MODEL:
  DEVICE: cpu
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, NORM: BN}
  DINO: {NUM_CLASSES: 3, EMBED_DIM: 64, HIDDEN_DIM: 64, ENCODER_LAYERS: 1, DECODER_LAYERS: 2, NUM_QUERIES: 50}
DATASETS: {TRAIN: [bccd_train], TEST: [bccd_val]}
DATALOADER: {NUM_WORKERS: 0}
INPUT: {MIN_SIZE_TRAIN: [96], MIN_SIZE_TEST: 96}
SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 8, CHECKPOINT_PERIOD: 4}
TEST: {EVAL_PERIOD: 4}
"""
SLOWER = 1.3  # by which the median of predictions may grow: the machine's own noise
TRACE_ERROR = 1e-2  # pixels between boxes of a traced model and its own


class Tools:
    """Detectron2's programs in processes of their own; the result of each run is noted.

    Args:
        checkout: Detectron2's repository.
        work: folder for files and logs.
        bccd: folder of the data.
    """

    def __init__(self, checkout: Path, work: Path, bccd: Path):
        self.checkout, self.work, self.bccd, self.results = checkout, work, bccd, {}
        self.recipe, self.yaml, self.run = work / "recipe.py", work / "yacs.yaml", work / "run"
        self.recipe.write_text(RECIPE.format(bccd=bccd))
        self.yaml.write_text(YAML)
        (work / "register.py").write_text(REGISTER.format(bccd=bccd))
        (work / "keys.py").write_text(YACS)
        path = os.pathsep.join(filter(None, (str(ROOT), str(work), os.environ.get("PYTHONPATH"))))
        self.environment = {**os.environ, "PYTHONPATH": path}

    def command(self, tool: str, *words: str, first: tuple[str, ...] = ()) -> list[str]:
        """The command of a tool; `first` names modules that are imported before it runs."""
        file = str(self.checkout / "tools" / tool)
        if not first:
            return [sys.executable, file, *words]
        lines = [f"import {', '.join(('runpy', 'sys', *first))}", "sys.argv = sys.argv[1:]"]
        return [
            sys.executable,
            "-c",
            "; ".join([*lines, "runpy.run_path(sys.argv[0], run_name='__main__')"]),
            file,
            *words,
        ]

    def start(self, name: str, command: list[str]) -> subprocess.Popen:
        """Start it; what it prints goes to a file of this name."""
        with open(self.work / f"{name}.log", "w") as log:
            return subprocess.Popen(command, cwd=self.work, env=self.environment, stdout=log, stderr=log)

    def text(self, name: str) -> str:
        """What a run has printed."""
        return (self.work / f"{name}.log").read_text(errors="replace")

    def expect(self, name: str, command: list[str], *texts: str) -> None:
        """Run it; it must end without an error and print these texts."""
        begin = time.perf_counter()
        status = self.start(name, command).wait()
        missing = [text for text in texts if text not in self.text(name)]
        self.note(
            name, status == 0 and not missing, status=status, missing=missing, seconds=time.perf_counter() - begin
        )
        if status:
            print("\n".join(self.text(name).splitlines()[-15:]))

    def note(self, name: str, well: bool, **facts) -> None:
        """Note a result and show it."""
        facts = {key: round(value, 4) if isinstance(value, float) else value for key, value in facts.items()}
        self.results[name] = {"well": well, **facts}
        print(f"{name:<24} {'well' if well else 'FAILED'}  {facts}", flush=True)


def train(tools: Tools) -> None:
    """Train with a kill after the first checkpoint, resume, evaluate, and predict."""
    words = ["--config-file", str(tools.recipe), f"train.output_dir={tools.run}"]
    tool = "lazyconfig_train_net.py"
    process = tools.start("train", tools.command(tool, *words))
    checkpoint = tools.run / "last_checkpoint"
    while process.poll() is None and not (checkpoint.is_file() and checkpoint.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    tools.note("train, killed", checkpoint.is_file(), said="only `dino train`" in tools.text("train"))
    tools.expect(
        "resume", tools.command(tool, words[0], words[1], "--resume", *words[2:]), "Starting training from", "AP50"
    )
    final = str(tools.run / "model_final.pth")
    evaluation = (*words[:2], "--eval-only", words[2], f"train.init_checkpoint={final}")
    tools.expect("evaluation", tools.command(tool, *evaluation), "AP50")
    picture = min((tools.bccd / "images").glob("*.jpg"))
    predict = [sys.executable, "-m", "dino", "predict", final, str(picture), "--output", str(tools.work / "drawn")]
    tools.expect("dino predict", predict, "1 picture")


def inspect(tools: Tools) -> None:
    """Cost, speed, and a drawing of the detections."""
    words = ("--config-file", str(tools.recipe))
    every = ("flop", "activation", "parameter", "structure")
    tools.expect(
        "analyze_model", tools.command("analyze_model.py", *words, "-n", "2", "--tasks", *every), "Total GFlops"
    )
    tools.expect("benchmark", tools.command("benchmark.py", *words, "--task", "eval"), "300 iters in")
    drawn = tools.work / "visualized"
    found = str(tools.run / "inference/coco_instances_results.json")
    words = ("--input", found, "--output", str(drawn), "--dataset", "bccd_val", "--conf-threshold", "0.2")
    tools.expect("visualize_json_results", tools.command("visualize_json_results.py", *words, first=("register",)))
    count = len(list(drawn.glob("*.jpg")))
    tools.note("drawn pictures", count > 0, count=count)


def train_by_yacs(tools: Tools) -> None:
    """Train by the older configuration system, resume and evaluate."""
    first, output = ("register", "keys"), ("OUTPUT_DIR", str(tools.work / "yacs"))
    words = ("--config-file", str(tools.yaml))
    tool = "plain_train_net.py"
    tools.expect("plain_train_net", tools.command(tool, *words, *output, first=first), "AP50")
    longer = (*words, "--resume", *output, "SOLVER.MAX_ITER", "10")
    tools.expect(
        "plain_train_net, resume", tools.command(tool, *longer, first=first), "Starting training from iteration 8"
    )
    tools.expect(
        "plain_train_net, eval", tools.command(tool, *words, "--eval-only", "--resume", *output, first=first), "AP50"
    )


def probe(recipe: str, checkout: str, warm: bool) -> dict:
    """Times of predictions before and after a count of FLOPs and a trace, all in this process.

    Args:
        warm: predict first; else the operator's first use is within the count.

    Returns:
        seconds of a prediction before (None unless `warm`) and after; boxes of the traced model against its own.
    """
    from detectron2.config import LazyConfig, instantiate
    from detectron2.export import TracingAdapter

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = instantiate(LazyConfig.load(recipe).model).eval()
    inputs = [{"image": torch.randint(256, (3, 480, 640), dtype=torch.uint8)}]
    before = fastest(model, inputs) if warm else None
    sys.argv = ["analyze_model.py", "--config-file", recipe, "--tasks", "flop", "-n", "1"]
    runpy.run_path(str(Path(checkout, "tools/analyze_model.py")), run_name="__main__")
    adapter = TracingAdapter(model, inputs)
    with torch.no_grad():
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        expected = model(inputs)[0]["instances"].pred_boxes.tensor
        found = adapter.outputs_schema(traced(*adapter.flattened_inputs))[0]["instances"].pred_boxes.tensor
    return {"before": before, "after": fastest(model, inputs), "trace": (found - expected).abs().max().item()}


def fastest(model, inputs: list[dict], count: int = 12) -> float:
    """Seconds of the fastest of some predictions: others may use the machine."""
    times = []
    with torch.no_grad():
        for _ in range(count):
            begin = time.perf_counter()
            model(inputs)
            times.append(time.perf_counter() - begin)
    return min(times)


def trace(tools: Tools) -> None:
    """Probe processes in which the operator is first used before and within a count of FLOPs."""
    found = {}
    for name in ("warm", "cold"):
        command = [
            sys.executable,
            __file__,
            "--detectron2",
            str(tools.checkout),
            "--probe",
            name,
            "--bccd",
            str(tools.recipe),
        ]
        status = tools.start(name, command).wait()
        found[name] = json.loads(tools.text(name).splitlines()[-1]) if not status else {}
        if not found[name]:
            tools.note(f"trace, {name}", False, status=status)
            print("\n".join(tools.text(name).splitlines()[-15:]))
    before = found["warm"].get("before")
    for name, facts in found.items():
        if facts and before:
            well = facts["after"] <= SLOWER * before and facts["trace"] <= TRACE_ERROR
            tools.note(f"trace, {name}", well, before=before, after=facts["after"], pixels=facts["trace"])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectron2", type=Path, required=True, help="a copy of Detectron2's repository")
    parser.add_argument("--bccd", type=Path, default=os.environ.get("DINO_BCCD"), help="the folder of the data")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--work", type=Path, help="folder for files and logs (default: a temporary one)")
    parser.add_argument("--probe", choices=("warm", "cold"), help=argparse.SUPPRESS)
    return parser


def main() -> int:
    args = build_parser().parse_args()
    if args.probe:
        print(json.dumps(probe(str(args.bccd), str(args.detectron2), args.probe == "warm")))
        return 0
    source = origin(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.work or temporary).resolve()
        work.mkdir(parents=True, exist_ok=True)
        tools = Tools(args.detectron2.resolve(), work, args.bccd.resolve())
        for step in (train, inspect, train_by_yacs, trace):
            step(tools)
    if args.output:
        args.output.write_text(json.dumps({"origin": source, "runs": tools.results}, indent=1) + "\n")
    return 0 if all(result["well"] for result in tools.results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
