"""Where the tests find the scripts and each other, and the fixtures that they share."""
import signal
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401, before any test imports decord: the other way round torch's convolutions crash

REPO = Path(__file__).parent.parent
sys.path[:0] = [str(REPO / 'tests'), str(REPO / 'benchmarks'), str(REPO)]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C, and so would the steps


@pytest.fixture
def world(tmp_path):
    """Folders of a small job: annotations and sources to be filled in by the test."""
    for name in 'ava_kinetics_v1_0', 'kinetics700', 'root':
        (tmp_path / name).mkdir()
    return tmp_path
