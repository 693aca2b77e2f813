import logging
import warnings

import pytest

from dino.training import run_log
from dino.utils.files import UserError


def test_warnings_come_before_an_error_too(tmp_path, capsys):
    def fail():
        with run_log.run_log(tmp_path):
            logging.getLogger("detectron2.dino").warning("boxes\x1b[31m dropped")
            logging.getLogger("detectron2.dino").info("a detail")
            logging.getLogger("fvcore").warning("of another library")
            assert not capsys.readouterr().out
            raise ValueError("the end")

    with pytest.raises(ValueError, match="the end"):
        fail()
    assert capsys.readouterr().out == "warning: boxes\\x1b[31m dropped\n"


def test_own_warnings_are_shown_at_once_after_the_summary(tmp_path, capsys):
    with run_log.run_log(tmp_path):
        assert run_log.take_warnings() == []
        logging.getLogger("detectron2.dino").warning("the loss rises")
        warnings.warn_explicit("graphs are off", RuntimeWarning, run_log.__file__, 3)
    assert capsys.readouterr().out == "warning: the loss rises\nwarning: graphs are off\n"


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't make the folder"), run_log.run_log(tmp_path / "file"):
        raise AssertionError
