import torch

from dino.utils.environment import environment_lines


def test_versions_and_devices_are_named():
    text = "\n".join(environment_lines())
    for part in ("Python 3.", f"torch {torch.__version__}", "scipy ", "CPU: ", "GPU"):
        assert part in text
