"""Train or evaluate a LazyConfig recipe."""

import sys
import warnings

for message in (".*torch.jit.*is deprecated.*", ".*pkg_resources is deprecated.*", ".*broadcast_buffers.*"):
    warnings.filterwarnings("ignore", message=message)  # of Detectron2 itself; must come before its import

from detectron2.engine import default_setup  # noqa: E402
from torch.multiprocessing import ProcessRaisedException  # noqa: E402

from dino.d2 import engine, recipe  # noqa: E402
from dino.d2.memory import OutOfMemory  # noqa: E402
from dino.d2.parallel import launch  # noqa: E402
from dino.files import DataError, message_of  # noqa: E402

EXAMPLES = """
examples:
  train on COCO (DETECTRON2_DATASETS holds it), 8 GPUs:
    python tools/lazyconfig_train_net.py --config-file configs/dino_r50_4scale_12ep.py --num-gpus 8
  train on your own data, no file edited:
    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_r18_small_data.py \\
        --train-json train.json --train-images images --val-json val.json --val-images images
  evaluate:
    python tools/lazyconfig_train_net.py --config-file configs/dino_r50_4scale_12ep.py --eval-only \\
        train.init_checkpoint=output/model_final.pth
  several machines, elastic: torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        tools/lazyconfig_train_net.py --config-file configs/dino_r50_4scale_12ep.py   (docs/scaling.md)
  continue: add --resume. Change anything: append key=value, for example optimizer.lr=5e-5 train.amp.enabled=True
A recipe is a Python program: run only recipes that you trust.
"""


def main(args) -> None:
    """One process: train, or with --eval-only evaluate."""
    cfg = recipe.load_recipe(args)
    recipe.choose_output(cfg, args)
    default_setup(cfg, args)
    if args.eval_only:
        engine.evaluate_checkpoint(cfg)
    else:
        recipe.scale_to_batch(cfg, args.opts)
        engine.train(cfg, args.resume)


if __name__ == "__main__":
    arguments = recipe.argument_parser(EXAMPLES).parse_args()
    try:
        launch(main, arguments)
    except (DataError, FloatingPointError, OutOfMemory, OSError) as error:  # OSError: a full disk, a folder not ours
        sys.exit(f"error: {message_of(error)}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted, no checkpoint was written since the last one")
    except ProcessRaisedException as error:  # from one of several processes; its last line is the message
        sys.exit(f"error: {str(error).rstrip().splitlines()[-1]}")
