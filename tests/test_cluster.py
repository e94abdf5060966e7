"""The same work on a Dask cluster: same bytes, through workers that die and schedulers that go
away.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import draw
from helpers import (
    REPO,
    TINY,
    annotation_rows,
    assert_same_people,
    errors,
    load,
    numbered_source,
    read_csv,
    run,
    snapshot,
    write_root,
)

VIDEOS = 12


def dask(*arguments, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, '-m', 'dask', *map(str, arguments), '--no-dashboard'],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **options,
    )


@contextlib.contextmanager
def cluster(folder, workers: int = 2):
    """The address of a scheduler, and the scheduler's process; its workers run in a folder of their
    own.
    """
    started = [
        dask(
            'scheduler',
            '--port=0',
            '--host=127.0.0.1',
            f'--scheduler-file={folder}/scheduler.json',
            cwd=folder,
        )
    ]
    try:
        deadline = time.monotonic() + 60
        while True:
            assert started[0].poll() is None and time.monotonic() < deadline
            with contextlib.suppress(OSError, ValueError):
                address = json.loads((folder / 'scheduler.json').read_text())['address']
                break
            time.sleep(0.05)
        started += [dask('worker', address, '--nthreads=1', cwd=folder) for _ in range(workers)]
        yield address, started[0]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cluster')
    with cluster(folder) as (address, _):
        yield f'--dask_scheduler={address}'


@pytest.fixture(scope='module')
def job(tmp_path_factory):
    """Twelve videos, their list, their annotations, and in root/ what Steps 3 to 5 make of them on
    this machine.
    """
    folder = tmp_path_factory.mktemp('job')
    lines, rows = '', ''
    for index in range(VIDEOS):
        path = f'a b/{index:011d}_000000_000010.mp4'
        numbered_source(folder / path, dict(seconds=4 if index == 5 else 10))
        lines, rows = lines + f'{path} 1\n', rows + annotation_rows(f'{index:011d}', 5)
    (folder / 'list.txt').write_text(lines)
    (folder / 'kinetics_train_v1.0.csv').write_text(rows)
    for command in steps(folder, 'root'):
        run(*command, cwd=folder)
    return folder


def steps(folder, root, *options):
    return [
        (
            'cut_kinetics.py',
            '--avakinetics_anotation=.',
            '--kinetics_list=list.txt',
            f'--avakinetics_root={root}',
            *options,
        ),
        ('extract_rgb_frames.py', f'--avakinetics_root={root}', *options),
        (
            'prepare_annotation.py',
            '--avakinetics_anotation=.',
            f'--avakinetics_root={root}',
        ),  # needs no cluster
    ]


def test_the_steps_give_the_same_bytes_from_relative_paths(job, shared):
    for command in steps(job, 'on_cluster', shared):
        run(*command, cwd=job)
    assert len(read_csv(job / 'on_cluster/kinetics_train.csv')) == VIDEOS - 1
    assert snapshot(job / 'on_cluster') == snapshot(job / 'root')


def test_archives_on_a_cluster(job, shared, tmp_path):
    subprocess.run(['tar', 'cf', tmp_path / '1.tar', 'a b'], cwd=job, check=True)
    for root, options in ('here', ()), ('there', (shared,)):
        run(
            'cut_kinetics.py',
            f'--avakinetics_anotation={job}',
            f'--avakinetics_root={root}',
            '--kinetics_archives',
            '1.tar',
            *options,
            cwd=tmp_path,
        )
    assert snapshot(tmp_path / 'here') == snapshot(tmp_path / 'there')
    assert snapshot(tmp_path / 'here/videos') == snapshot(job / 'root/videos')


def fetch_in_small_chunks(root, *options) -> None:
    """Step 6 with chunks of four frames, in a process of its own."""
    program = (
        f'import sys; sys.path.insert(0, {str(REPO)!r}); import fetch_proposal; '
        'fetch_proposal.CHUNK = 4; fetch_proposal.main()'
    )
    done = subprocess.run(
        [sys.executable, '-c', program, f'--avakinetics_root={root}', *options],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(root.parent)},
        cwd=root.parent,
    )
    assert done.returncode == 0, done.stderr


def test_proposals_and_one_model_for_each_worker(tmp_path):
    """The detector notes the process that builds it: one line for each worker and for the check at
    the start.
    """
    write_root(tmp_path / 'root', range(12))
    (tmp_path / 'noting.py').write_text(f"""_base_ = '{REPO}/tests/tiny_detector.py'
custom_imports = dict(imports=['noting_detector'])
model = dict(type='NotingDetector')
""")
    (tmp_path / 'noting_detector.py').write_text(f"""
import os
from mmdet.models import CascadeRCNN
from mmdet.registry import MODELS
@MODELS.register_module()
class NotingDetector(CascadeRCNN):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        with open('{tmp_path}/built', 'a') as file:
            file.write(f'{{os.getpid()}}\\n')
""")
    options = [f'--config={tmp_path}/noting.py', TINY[1]]
    fetch_in_small_chunks(tmp_path / 'root', *options)
    (tmp_path / 'root/kinetics_proposal.pkl').rename(tmp_path / 'whole.pkl')
    (tmp_path / 'built').unlink()
    (tmp_path / 'root/kinetics_proposal.pkl.frames.jsonl').unlink()
    os.environ['PYTHONPATH'] = str(tmp_path)
    try:
        with cluster(tmp_path) as (address, _):
            fetch_in_small_chunks(tmp_path / 'root', *options, f'--dask_scheduler={address}')
    finally:
        del os.environ['PYTHONPATH']
    found, expected = load(tmp_path / 'root/kinetics_proposal.pkl'), load(tmp_path / 'whole.pkl')
    assert found.keys() == expected.keys() and len(found) == 36
    for key, boxes in found.items():
        assert_same_people(boxes, expected[key])
    built = (tmp_path / 'built').read_text().split()
    assert len(built) == len(set(built)) == 3  # nine chunks


def test_a_detector_that_cannot_start_on_a_worker_ends_the_run_with_a_line(tmp_path):
    write_root(tmp_path / 'root', range(1))
    (tmp_path / 'soft.py').write_text(f"""_base_ = '{REPO}/tests/tiny_detector.py'
model = dict(test_cfg=dict(rcnn=dict(nms=dict(type='soft_nms'))))
""")
    with cluster(tmp_path, workers=1) as (address, _):
        options = [f'--avakinetics_root={tmp_path}/root', f'--config={tmp_path}/soft.py', TINY[1]]
        message = errors(run('fetch_proposal.py', *options, f'--dask_scheduler={address}', code=1))
    assert (
        "the detector cannot run: NotImplementedError: it needs mmcv's compiled operator softnms"
        in message
    )


def started(command: list, job, root) -> subprocess.Popen:
    """A run of a step that has made its first clip and is still at work."""
    process = subprocess.Popen(
        [sys.executable, str(REPO / command[0]), *command[1:]],
        cwd=job,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(root.glob('videos/*.mp4')):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_a_worker_that_dies_costs_nothing(job, tmp_path):
    with cluster(tmp_path) as (address, _):
        command = steps(job, tmp_path / 'root', f'--dask_scheduler={address}', '--overwrite')[0]
        process = started(command, job, tmp_path / 'root')
        workers = subprocess.run(
            ['pgrep', '-f', 'spawn_main'], capture_output=True, text=True
        ).stdout.split()
        ours = [
            pid
            for pid in workers
            if open(f'/proc/{pid}/cmdline').read()
            and os.readlink(f'/proc/{pid}/cwd') == str(tmp_path)
        ]
        os.kill(int(ours[-1]), signal.SIGKILL)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and f'{VIDEOS - 1} of {VIDEOS} annotated keyframes' in out, err
    assert 'Traceback' not in err
    assert snapshot(tmp_path / 'root') == {
        name: value
        for name, value in snapshot(job / 'root').items()
        if name.startswith('videos') or 'cut' in name
    }


def test_an_item_that_kills_every_worker_costs_itself_only(job, tmp_path):
    (tmp_path / 'ffmpeg').write_text(f"""#!/bin/sh
case "$*" in *00000000007_*) kill -9 $PPID; sleep 60;; esac
exec {draw.FFMPEG} "$@"
""")
    (tmp_path / 'ffmpeg').chmod(0o755)
    with cluster(tmp_path) as (address, _):
        command = steps(
            job, tmp_path / 'root', f'--dask_scheduler={address}', f'--ffmpeg={tmp_path}/ffmpeg'
        )[0]
        done = run(*command, cwd=job)
    assert f'{VIDEOS - 2} of {VIDEOS} annotated keyframes' in done.stdout
    rows = read_csv(tmp_path / 'root/reports/cut_kinetics_train.csv')[1:]
    assert [row[0] for row in rows] == ['00000000005', '00000000007']
    assert rows[1][2] == 'given up: the workers of the cluster that had it were killed'
    run(*steps(job, tmp_path / 'root')[0], cwd=job)
    assert snapshot(tmp_path / 'root/videos') == snapshot(job / 'root/videos')


def test_a_scheduler_that_goes_away_ends_the_run_with_a_line(job, tmp_path):
    with cluster(tmp_path) as (address, scheduler):
        command = steps(job, tmp_path / 'root', f'--dask_scheduler={address}')[0]
        process = started(command, job, tmp_path / 'root')
        os.killpg(scheduler.pid, signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if 'clip/s' not in line and line]
    assert (
        process.returncode == 1
        and len(lines) == 1
        and lines[0].startswith('error: the Dask scheduler')
    ), err
    run(*steps(job, tmp_path / 'root')[0], cwd=job)
    assert snapshot(tmp_path / 'root/videos') == snapshot(job / 'root/videos')


def test_cluster_errors_say_what_to_do(job, tmp_path):
    for command in steps(job, 'root', '--dask_scheduler=nonsense')[:2]:
        assert 'no Dask scheduler with workers' in errors(run(*command, cwd=job, code=1))
    command = steps(job, 'root', '--dask_scheduler=tcp://127.0.0.1:1')[0]
    assert 'no Dask scheduler with workers' in errors(run(*command, cwd=job, code=1))
    program = (
        'import sys; sys.modules["distributed"] = None; sys.path.insert(0, sys.argv.pop(1)); '
        'import cut_kinetics; '
        'cut_kinetics.main()'
    )
    done = subprocess.run(
        [
            sys.executable,
            '-c',
            program,
            str(REPO),
            *steps(job, 'root', '--dask_scheduler=tcp://x:1')[0][1:],
            '--overwrite',
        ],
        cwd=job,
        capture_output=True,
        text=True,
    )
    assert 'pip install distributed' in errors(done) and done.returncode == 1


def test_more_items_than_the_cluster_is_given_at_once(job, shared, tmp_path):
    for script, *options in steps(job, tmp_path / 'root', shared)[:2]:
        source = (REPO / script).read_text()
        assert source.count('AHEAD = 2000') == 1
        (tmp_path / script).write_text(source.replace('AHEAD = 2000', 'AHEAD = 3'))
        run(tmp_path / script, *options, cwd=job)
    for name in 'videos', 'rawframes':
        assert snapshot(tmp_path / 'root' / name) == snapshot(job / 'root' / name)
