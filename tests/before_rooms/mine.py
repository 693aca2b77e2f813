"""A recipe made as docs/quick_start.md says."""

from detectron2.config import LazyConfig
from detectron2.data.datasets import register_coco_instances
from dino.recipes import find_recipe

register_coco_instances("before_cells", {}, "data/annotations.json", "data")

recipe = LazyConfig.load(str(find_recipe("dino_r18_small_data")))
dataloader, lr_multiplier, model, optimizer, train = (
    recipe[part] for part in ("dataloader", "lr_multiplier", "model", "optimizer", "train")
)
del recipe  # the names in this file are the keys of the recipe
dataloader.train.dataset.name = "before_cells"
dataloader.test.dataset.name = dataloader.evaluator.dataset_name = "before_cells"
model.network.query_selection.num_queries = 200
