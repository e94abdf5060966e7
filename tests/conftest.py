"""Where the tests find the scripts and each other, and the worlds that they share."""

import json
import os
import platform
import shutil
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch  # noqa: F401, before decord: the other way round torch's convolutions crash
from filelock import FileLock
from hypothesis import settings

REPO = Path(__file__).parent.parent
sys.path[:0] = [str(REPO / 'tests'), str(REPO / 'benchmarks'), str(REPO)]
import demo  # noqa: E402
import helpers  # noqa: E402
import sample_world  # noqa: E402
from helpers import TINY, here, run, snapshot  # noqa: E402
from job import Job, make_job  # noqa: E402

# a background job ignores Ctrl-C, one under nohup a lost terminal, and so would the steps
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

settings.register_profile('the same examples every time', derandomize=True, deadline=None)
settings.load_profile('the same examples every time')


def pytest_terminal_summary(terminalreporter):
    versions = ', '.join(f'{name} {version(name)}' for name in ('torch', 'numpy', 'av'))
    terminalreporter.write_line(f'on Python {platform.python_version()}, {versions}')


@pytest.fixture(autouse=True)
def ended_by_sigterm():
    """A main that a test calls takes SIGTERM for Ctrl-C, with which forked pools may hang."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope='session')
def common(tmp_path_factory):
    """A function that gives the folder of a name, which `make` fills once a session.

    All test processes share it, so no test may change what is in there.
    """
    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        base = base.parent

    def folder(name: str, make) -> Path:
        path, done = base / name, base / f'{name}.done'
        with FileLock(base / f'{name}.lock'):
            if not done.exists():
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
                make(path)
                done.touch()
        return path

    return folder


@pytest.fixture(scope='session', autouse=True)
def drawn_videos(common):
    """Numbered videos are encoded once a session, and copied from then on."""
    helpers.CACHE = common('drawn', lambda folder: None)


@pytest.fixture
def world(tmp_path):
    """Folders of a small job: annotations and sources to be filled in by the test."""
    for name in 'ava_kinetics_v1_0', 'kinetics700', 'root':
        (tmp_path / name).mkdir()
    return tmp_path


def make_world(mmaction2: Path) -> None:
    """Draw $MMACTION2 and follow the README in it, noting what was said and what changed.

    data/ava_kinetics gets both splits with raw frames, data/without the training split without.
    """
    data, place = mmaction2 / 'data', mmaction2 / 'tools/data/ava_kinetics'
    root, notes = data / 'ava_kinetics', {}
    sample_world.draw_world(mmaction2)
    for name in 'first', 'again':
        notes[name] = demo.run_readme(mmaction2, show=False)
        notes[f'after {name}'] = snapshot(root)
    shutil.copy(root / 'report.html', mmaction2)

    without, annotations = f'--avakinetics_root={data}/without', place / 'ava_kinetics_v1_0'
    cut = [f'--avakinetics_anotation={annotations}', without]
    run(
        'cut_kinetics.py',
        f'--kinetics_list={data}/kinetics700/kinetics700_train_list_videos.txt',
        *cut,
    )
    run('prepare_annotation.py', *cut)
    here('fetch_proposal.py', without, *TINY)
    shutil.copytree(data / 'ava/annotations', data / 'without/annotations')
    run('merge_annotations.py', without)
    notes['without'] = run('softlink_ava.py', without, f'--ava_root={data}/ava').stdout

    sample_world.copy_as_validation_split(mmaction2)
    environment = {**os.environ, 'MMACTION2': str(mmaction2)}
    for line in demo.readme_commands('## The validation split')[0].strip().splitlines():
        config, checkpoint = (option.split('=', 1)[1] for option in TINY)
        line = line.replace('$CONFIG', config).replace('$CHECKPOINT', checkpoint)
        script, *options = line.split()[1:]
        run(script, *options, cwd=place, env=environment)
    notes['after validation'] = snapshot(root)
    (mmaction2 / 'notes.json').write_text(json.dumps(notes))


@pytest.fixture(scope='session')
def job(common):
    """A small data set before and after each step: see job.py."""
    return Job(common('job', make_job))


@pytest.fixture(scope='session')
def mmaction2(common):
    """The world of `make_world`: its path, the roots in it, and its notes."""
    path = common('mmaction2', make_world)
    return SimpleNamespace(
        path=path,
        root=path / 'data/ava_kinetics',
        without=path / 'data/without',
        notes=json.loads((path / 'notes.json').read_text()),
    )
