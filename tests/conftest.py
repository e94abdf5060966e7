"""Where the tests find the scripts and each other, and the worlds that they share."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch  # noqa: F401, before decord: the other way round torch's convolutions crash
from filelock import FileLock
from hypothesis import settings

REPO = Path(__file__).parent.parent
sys.path[:0] = [str(REPO / folder) for folder in ('tests', 'tests/tools', 'benchmarks', '')]
pytest.register_assert_rewrite('helpers', 'job')
import demo  # noqa: E402
import helpers  # noqa: E402
import sample_world  # noqa: E402
from helpers import TINY, here, run, snapshot  # noqa: E402
from job import Job, make_job  # noqa: E402

os.environ['no_proxy'] = '127.0.0.1'  # where the tests serve files
settings.register_profile('the same examples every time', derandomize=True, deadline=None)
settings.load_profile('the same examples every time')


def pytest_terminal_summary(terminalreporter):
    versions = ', '.join(f'{name} {version(name)}' for name in ('torch', 'numpy', 'av'))
    terminalreporter.write_line(f'on Python {platform.python_version()}, {versions}')


@pytest.fixture(autouse=True)
def ended_by_sigterm():
    """Undo what a script's main did to SIGTERM: pools that are forked later would inherit it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope='session')
def common(tmp_path_factory):
    """Return folder(name, make): a folder that make(folder) fills once a session.

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
    """Encode numbered videos once a session, and copy them from then on."""
    helpers.CACHE = common('drawn', lambda folder: None)


@pytest.fixture
def world(tmp_path):
    """Make empty folders for annotations, sources and the data set."""
    for name in 'ava_kinetics_v1_0', 'kinetics700', 'root':
        (tmp_path / name).mkdir()
    return tmp_path


def make_world(mmaction2: Path) -> None:
    """Draw $MMACTION2 and follow the README in it; record what was said and what changed."""
    sample_world.draw_world(mmaction2)
    root, notes = mmaction2 / 'data/ava_kinetics', {}
    for name in 'first', 'again':
        notes[name] = demo.run_readme(mmaction2, show=False)
        notes[f'after {name}'] = snapshot(root)
    notes['without'] = prepare_without_frames(mmaction2)
    prepare_validation(mmaction2)
    notes['after validation'] = snapshot(root)
    (mmaction2 / 'notes.json').write_text(json.dumps(notes))


def prepare_without_frames(mmaction2: Path) -> str:
    """Prepare the training split again, without Step 4; return what Step 7 says."""
    data, root = mmaction2 / 'data', mmaction2 / 'data/without'
    place = [
        f'--avakinetics_anotation={mmaction2}/tools/data/ava_kinetics/ava_kinetics_v1_0',
        f'--avakinetics_root={root}',
    ]
    sources = f'--kinetics_list={data}/kinetics700/kinetics700_train_list_videos.txt'
    run('cut_kinetics.py', *place, sources)
    run('prepare_annotation.py', *place)
    here('fetch_proposal.py', place[1], *TINY)
    shutil.copytree(data / 'ava/annotations', root / 'annotations')
    run('merge_annotations.py', place[1])
    return run('softlink_ava.py', place[1], f'--ava_root={data}/ava').stdout


def prepare_validation(mmaction2: Path) -> None:
    """Prepare the validation split by the page's commands, beside the training split."""
    sample_world.copy_as_validation_split(mmaction2)
    place, environment = mmaction2 / 'tools/data/ava_kinetics', dict(MMACTION2=str(mmaction2))
    config, checkpoint = (option.split('=', 1)[1] for option in TINY)
    lines = demo.readme_commands('# The validation part', 'docs/validation.md')[0].splitlines()
    os.remove(mmaction2 / 'data/kinetics700/kinetics700_val_list_videos.txt')
    subprocess.run(lines[0], shell=True, check=True, env=os.environ | environment)
    for line in lines[1:]:
        line = line.replace('$CONFIG', config).replace('$CHECKPOINT', checkpoint)
        line = line.replace('$AVAKINETICS_ROOT', f'{mmaction2}/data/ava_kinetics')
        line = line.replace('$AVA_ROOT', f'{mmaction2}/data/ava')
        script, *options = line.split()[1:]
        if script in ('cut_kinetics.py', 'merge_annotations.py'):
            run(script, *options, cwd=place, env=os.environ | environment)
        else:  # which read nothing from the environment here
            here(script, *options, cwd=place)


@pytest.fixture(scope='session')
def job(common):
    """Return a small data set before and after each step: see job.py."""
    return Job(common('job', make_job))


@pytest.fixture(scope='session')
def mmaction2(common):
    """Return the world of `make_world`: its path, its two roots and its notes.

    `root` has both splits with raw frames, `without` the training split without them.
    """
    path = common('mmaction2', make_world)
    return SimpleNamespace(
        path=path,
        root=path / 'data/ava_kinetics',
        without=path / 'data/without',
        notes=json.loads((path / 'notes.json').read_text()),
    )


@pytest.fixture
def device(monkeypatch):
    """Make Step 6 use `cpu:0`, which is not the CPU as far as PyTorch's names go."""
    import fetch_proposal

    monkeypatch.setattr(fetch_proposal, 'choose_device', lambda num_gpus: 'cpu:0')
    fetch_proposal.start_detector.cache_clear()
    yield
    fetch_proposal.start_detector.cache_clear()
