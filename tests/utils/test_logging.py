"""Silencing other libraries: nested and interleaved uses restore what was set before."""

import logging

from transformers.utils import logging as transformers_logging

from sigmix.utils.logging import quiet


def test_levels_come_back_however_the_uses_overlap(caplog):
    caplog.set_level(logging.WARNING, "torchao")
    log, bars = logging.getLogger("torchao"), transformers_logging.is_progress_bar_enabled()
    first, second = quiet(), quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # as another thread would
    log.warning("inside")
    logging.getLogger("sigmix.serve").warning("of sigmix")
    assert not transformers_logging.is_progress_bar_enabled()
    second.__exit__(None, None, None)
    log.warning("outside")
    assert [record.message for record in caplog.records] == ["of sigmix", "outside"]
    assert transformers_logging.is_progress_bar_enabled() == bars
