import pytest
import torch
from torch import nn

from dino.modeling import TorchvisionBackbone
from dino.training.run_checkpoints import RunCheckpoints, refuse_other_engine
from dino.utils.files import DataError, UserError
from dino.weights import resnet_to_detectron2

from ..tiny import TinyBackbone
from .test_ema import tiny_detector


def with_backbone(backbone):
    return nn.ModuleDict({"network": nn.ModuleDict({"neck": nn.ModuleDict({"backbone": backbone})})})


def test_a_run_of_the_other_engine_is_refused_where_its_tensors_have_other_names():
    model = with_backbone(TorchvisionBackbone("resnet18"))
    state = model.state_dict()
    refuse_other_engine(state, model, "a.pth")
    with pytest.raises(DataError, match=r"can't continue from a\.pth: the other engine wrote it .*--weights a\.pth"):
        refuse_other_engine(resnet_to_detectron2(state), model, "a.pth")
    refuse_other_engine(state, with_backbone(TinyBackbone()), "a.pth")  # another model, which loading tells


def written(folder, **parts):
    detector = tiny_detector()
    detector.names, detector.category_ids = ["a", "b", "c"], [7, 8, 9]
    checkpoints = RunCheckpoints(folder, detector, {"seed": 1})
    checkpoints.save("model_final", iteration=3, **parts)
    return checkpoints


def test_save_and_load(tmp_path):
    before = written(tmp_path)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    content = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert (content["names"], content["category_ids"]) == (["a", "b", "c"], [7, 8, 9])
    assert (content["about"], content["iteration"]) == ({"seed": 1}, 3)
    after = RunCheckpoints(tmp_path, tiny_detector(), {})
    after.detector.names = ["a", "b", "c"]
    assert after.summary == "random: train.init_checkpoint is empty"
    assert after.resume()["iteration"] == 3
    assert str(tmp_path / "model_final.pth") in after.summary
    pairs = zip(before.detector.parameters(), after.detector.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_nothing_to_continue_with(tmp_path):
    checkpoints = RunCheckpoints(tmp_path, tiny_detector(), {})
    assert checkpoints.resume() == {}
    (tmp_path / "model_final.pth").write_bytes(b"")
    with pytest.raises(DataError, match=r"nothing to continue with: .*Start in another train\.output_dir"):
        checkpoints.resume()


def test_a_file_that_lacks_weights_is_refused_for_an_evaluation(tmp_path):
    written(tmp_path)
    content = torch.load(tmp_path / "model_final.pth", weights_only=True)
    del content["model"]["network.decoder.layers.0.self_norm.weight"]
    torch.save(content, tmp_path / "part.pth")
    checkpoints = RunCheckpoints(tmp_path, tiny_detector(), {})
    with pytest.raises(DataError, match="does not fit the recipe: 1 tensors are missing or of another shape"):
        checkpoints.load_whole(str(tmp_path / "part.pth"))
    with pytest.raises(UserError, match="not found"):
        checkpoints.load_whole(str(tmp_path / "absent.pth"))


def test_other_classes_are_warned_of(tmp_path, caplog):
    written(tmp_path)
    checkpoints = RunCheckpoints(tmp_path, tiny_detector(), {})
    checkpoints.detector.names = ["a", "b", "d"]
    checkpoints.load_whole(str(tmp_path / "model_final.pth"))
    assert "was trained for the classes ['a', 'b', 'c'], the data has ['a', 'b', 'd']" in caplog.text
