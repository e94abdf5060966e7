"""Where the tests find the scripts and each other, and the fixtures that they share."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401, before decord: the other way round torch's convolutions crash

REPO = Path(__file__).parent.parent
sys.path[:0] = [str(REPO / 'tests'), str(REPO / 'benchmarks'), str(REPO)]
import demo  # noqa: E402
import sample_world  # noqa: E402
from helpers import TINY, run, snapshot  # noqa: E402

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background job ignores Ctrl-C, and so would the steps


@pytest.fixture(autouse=True)
def ended_by_sigterm():
    """A main that a test calls takes SIGTERM for Ctrl-C, with which pools that MMAction2 forks may
    hang at their end.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def world(tmp_path):
    """Folders of a small job: annotations and sources to be filled in by the test."""
    for name in 'ava_kinetics_v1_0', 'kinetics700', 'root':
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture(scope='session')
def prepared(tmp_path_factory):
    """$MMACTION2 of a drawn world after the README's Steps 3 to 7, and all that they printed."""
    mmaction2 = tmp_path_factory.mktemp('prepared')
    sample_world.draw_world(mmaction2)
    return mmaction2, demo.run_readme(mmaction2, show=False)


@pytest.fixture(scope='session')
def worlds(tmp_path_factory):
    """$MMACTION2 prepared twice: data/with with raw frames by the README's commands,
    data/ava_kinetics without Step 4.
    """
    mmaction2 = tmp_path_factory.mktemp('mmaction2')
    sample_world.draw_world(mmaction2)
    demo.run_readme(mmaction2, show=False)
    (mmaction2 / 'data/ava_kinetics').rename(mmaction2 / 'data/with')
    place = dict(
        cwd=mmaction2 / 'tools/data/ava_kinetics', env={**os.environ, 'MMACTION2': str(mmaction2)}
    )
    run('cut_kinetics.py', **place)
    run('prepare_annotation.py', **place)
    run('fetch_proposal.py', *TINY, **place)
    shutil.copytree(mmaction2 / 'data/ava/annotations', mmaction2 / 'data/ava_kinetics/annotations')
    run('merge_annotations.py', **place)
    done = run('softlink_ava.py', **place)
    assert (
        'all 12 have their frames: ready for training, the Kinetics part from its videos'
        in done.stdout
    )
    return mmaction2


@pytest.fixture(scope='session')
def validated(worlds):
    """The drawn world again as the validation split, by the README's commands, into the root with
    raw frames.
    """
    mmaction2 = worlds.parent / 'val'
    shutil.copytree(worlds, mmaction2, symlinks=True)
    shutil.rmtree(mmaction2 / 'data/ava_kinetics')
    (mmaction2 / 'data/with').rename(mmaction2 / 'data/ava_kinetics')
    kinetics, place = mmaction2 / 'data/kinetics700', mmaction2 / 'tools/data/ava_kinetics'
    (kinetics / 'videos_train').rename(kinetics / 'videos_val')
    swap = str.maketrans('A-', 'B_')  # other videos than those of the training split
    for path in list((kinetics / 'videos_val').rglob('*.mp4')):
        path.rename(path.with_name(path.name[:11].translate(swap) + path.name[11:]))
    lines = (kinetics / 'kinetics700_train_list_videos.txt').read_text().splitlines()
    (kinetics / 'kinetics700_val_list_videos.txt').write_text(
        ''.join(
            f'{Path(line).parent}/{Path(line).name[:11].translate(swap)}{Path(line).name[11:]}\n'
            for line in lines
        )
    )
    rows = (place / 'ava_kinetics_v1_0/kinetics_train_v1.0.csv').read_text().splitlines()
    (place / 'ava_kinetics_v1_0/kinetics_val_v1.0.csv').write_text(
        ''.join(row[:11].translate(swap) + row[11:] + '\n' for row in rows)
    )
    before = snapshot(mmaction2 / 'data/ava_kinetics')
    for line in demo.readme_commands('## The validation split')[0].strip().splitlines():
        script, *options = (
            line.replace('$CONFIG', TINY[0][9:]).replace('$CHECKPOINT', TINY[1][13:]).split()[1:]
        )
        run(script, *options, cwd=place, env={**os.environ, 'MMACTION2': str(mmaction2)})
    return mmaction2, before
