"""The same work on a Dask cluster: same bytes, through workers that die and schedulers that go."""

import concurrent.futures
import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys

import distributed
import pytest

from helpers import (
    REPO,
    TINY,
    assert_same_people,
    errors,
    stopping_environment,
    stopped_processes,
    here,
    kill_tree,
    load,
    read_report,
    run,
    stderr_lines,
    snapshot,
    start,
    wait_until,
    write_detector_class,
    write_root,
)
from job import A_CLIP, VIDEOS, assert_undisturbed


def dask(*arguments, **options) -> subprocess.Popen:
    command = [sys.executable, '-m', 'dask', *map(str, arguments), '--no-dashboard']
    return start(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)


@contextlib.contextmanager
def cluster(folder, workers: int = 2, env: dict | None = None):
    """The option that names a cluster, and its scheduler's process; workers have this `env`."""
    address = folder / 'scheduler.json'
    place = dict(cwd=folder)
    options = ['--port=0', '--host=127.0.0.1', f'--scheduler-file={address}']
    started = [dask('scheduler', *options, **place)]
    try:
        wait_until(lambda: is_whole_json(address), started[0])
        options = [f'--scheduler-file={address}', f'--local-directory={folder}', '--nthreads=1']
        started += [dask('worker', *options, env=env, **place) for _ in range(workers)]
        with distributed.Client(scheduler_file=str(address), timeout=300) as client:
            client.wait_for_workers(workers, timeout=300)
            option = f'--dask_scheduler={client.scheduler.address}'
        yield option, started[0]
    finally:
        for process in started:
            kill_tree(process)


def is_whole_json(path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return bool(json.loads(path.read_text()))
    return False


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp('cluster')) as (option, _):
        yield option


def test_clips_and_frames_on_a_cluster(job, shared, tmp_path):
    """The same bytes, from relative paths."""
    for step in 'cut', 'extract':
        run(*job.command(step, 'root', shared)[1:], cwd=tmp_path)
        assert_undisturbed(job, step, tmp_path / 'root')


def test_archives_give_the_same_bytes_on_a_cluster(job, shared, tmp_path):
    run(*job.command('cut archives', tmp_path / 'root', shared)[1:])
    assert_undisturbed(job, 'cut archives', tmp_path / 'root')


FETCH_SMALL_CHUNKS = """
import sys
sys.path.insert(0, {repo!r})
import fetch_proposal
fetch_proposal.CHUNK = 4
fetch_proposal.main()
"""


def test_proposals_on_a_cluster(tmp_path):
    """They are the same, and each worker builds one detector.

    The detector notes the process that builds it.
    """
    root = write_root(tmp_path / 'root', range(4))
    config = write_detector_class(
        tmp_path,
        'NotingDetector',
        f"""
    def __init__(self, *arguments, **options):
        import os
        super().__init__(*arguments, **options)
        open(f'{tmp_path}/built {{os.getpid()}}', 'x').close()
""",
    )
    here('fetch_proposal.py', f'--avakinetics_root={root}', *TINY)
    expected = load(root / 'kinetics_proposal.pkl')
    env = os.environ | dict(PYTHONPATH=str(tmp_path))
    with cluster(tmp_path, env=env) as (option, _):
        subprocess.run(
            [
                *(sys.executable, '-c', FETCH_SMALL_CHUNKS.format(repo=str(REPO))),
                *(f'--avakinetics_root={root}', f'--config={config}', TINY[1], option),
            ],
            env=env,
            check=True,
        )
    found = load(root / 'kinetics_proposal.pkl')
    assert found.keys() == expected.keys() and len(found) == 12
    for key, boxes in found.items():
        assert_same_people(boxes, expected[key])
    assert 1 <= len(list(tmp_path.glob('built *'))) <= 2  # one worker may get all three chunks


def test_a_detector_that_fails_on_a_worker(tmp_path, shared):
    """The run ends with one line."""
    write_root(tmp_path / 'root', range(1))
    (tmp_path / 'soft.py').write_text(f"""_base_ = '{REPO}/tests/tiny_detector.py'
model = dict(test_cfg=dict(rcnn=dict(nms=dict(type='soft_nms'))))
""")
    options = [f'--avakinetics_root={tmp_path}/root', f'--config={tmp_path}/soft.py', TINY[1]]
    message = errors(run('fetch_proposal.py', *options, shared, code=1))
    assert 'the detector failed on scene-00000,0011: NotImplementedError: it needs' in message
    assert "mmcv's compiled operator softnms" in message


def test_a_worker_that_is_killed_costs_nothing(job, tmp_path):
    root, notes = tmp_path / 'root', tmp_path / 'notes'
    with cluster(tmp_path, env=stopping_environment(notes, A_CLIP)) as (option, _):
        process = start(job.command('cut', root, option))
        try:
            wait_until(lambda: stopped_processes(notes), process)
            os.kill(stopped_processes(notes)[0], signal.SIGKILL)
            (notes / 'go').touch()
            _, err = process.communicate(timeout=300)
        finally:
            kill_tree(process)
    assert process.returncode == 0 and 'Traceback' not in err, err
    assert_undisturbed(job, 'cut', root)


def test_an_item_that_kills_every_worker_costs_itself_only(job, tmp_path):
    deadly = stopping_environment(tmp_path / 'notes', r'os.rename .*/videos/00000000007_', 'kill')
    with cluster(tmp_path, env=deadly) as (option, _):
        done = run(*job.command('cut', tmp_path / 'root', option)[1:])
    assert f'{VIDEOS} of {VIDEOS + 2} annotated keyframes' in done.stdout
    rows = read_report(tmp_path / 'root', 'cut_kinetics_train')
    assert [row[0] for row in rows] == ['00000000007', '00000000008']
    assert rows[0][2] == 'given up: the workers of the cluster that had it were killed'
    run(*job.command('cut', tmp_path / 'root')[1:])
    assert snapshot(tmp_path / 'root/videos') == snapshot(job.after('cut') / 'videos')


class LosesResults(concurrent.futures.ThreadPoolExecutor):
    """Fails as distributed's executor does if a worker is killed while its result is on the way."""

    def submit(self, function, job, options):
        if not job.clip.name.startswith('00000000003_'):
            return super().submit(function, job, options)
        future = concurrent.futures.Future()
        future.set_exception(ValueError('not enough values to unpack (expected 3, got 2)'))
        return future


def test_a_result_that_is_lost_costs_itself_only(job, tmp_path, monkeypatch):
    executor = LosesResults(2)
    monkeypatch.setattr(logging, 'disable', lambda: None)  # it would hold for the next tests
    with cluster(tmp_path, 1) as (option, _):
        monkeypatch.setattr(distributed.Client, 'get_executor', lambda *_, **__: executor)
        done = here(*job.command('cut', tmp_path / 'root', option)[1:])
        distributed.default_client().close()  # or it would look for its scheduler later
    assert f'{VIDEOS} of {VIDEOS + 2} annotated keyframes' in done.stdout
    rows = read_report(tmp_path / 'root', 'cut_kinetics_train')
    assert [row[0] for row in rows] == ['00000000003', '00000000008']
    assert rows[0][2].startswith('given up: ')


def test_a_scheduler_that_goes_away_ends_the_run_with_a_line(job, tmp_path):
    root, notes = tmp_path / 'root', tmp_path / 'notes'
    with cluster(tmp_path, 1, stopping_environment(notes, A_CLIP)) as (option, scheduler):
        process = start(job.command('cut', root, option))
        try:
            wait_until(lambda: stopped_processes(notes), process)
            scheduler.kill()
            _, err = process.communicate(timeout=300)
        finally:
            kill_tree(process)
    waiting, error = stderr_lines(err)
    assert process.returncode == 1 and waiting.startswith('waiting for the workers of tcp://')
    assert error.startswith('error: the Dask scheduler')
    run(*job.command('cut', root)[1:])
    assert_undisturbed(job, 'cut', root)


@pytest.mark.parametrize('step,address', [('cut', 'tcp://127.0.0.1:1'), ('extract', 'nonsense')])
def test_an_address_without_a_cluster_is_told(job, tmp_path, step, address):
    root = shutil.copytree(job.before(step), tmp_path / 'root')
    done = run(*job.command(step, root, f'--dask_scheduler={address}')[1:], code=1)
    assert 'no Dask scheduler with workers' in errors(done)


def test_a_missing_package_is_told(job, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'distributed', None)
    done = here(*job.command('cut', tmp_path, '--dask_scheduler=tcp://x:1')[1:], code=1)
    assert 'pip install distributed' in errors(done)


def test_more_items_than_the_cluster_is_given_at_once(job, shared, tmp_path):
    source = (REPO / 'cut_kinetics.py').read_text()
    assert source.count('MAX_QUEUED = 500') == 1
    (tmp_path / 'cut.py').write_text(source.replace('MAX_QUEUED = 500', 'MAX_QUEUED = 3'))
    run(tmp_path / 'cut.py', *job.command('cut', tmp_path / 'root', shared)[2:])
    assert_undisturbed(job, 'cut', tmp_path / 'root')
