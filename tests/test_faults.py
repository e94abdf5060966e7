"""Kills, interruptions, full disks, two runs at once: every step ends well, the next mends all.

A step stops at a known point of its work (tools/hold/sitecustomize.py), is seen there, then killed.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers import (
    here,
    kill_tree,
    run,
    snapshot,
    stderr_lines,
    stopped_at,
    stopped_processes,
    stopping_environment,
)
from job import A_CLIP, STEPS, assert_undisturbed, assert_whole

INTERRUPTED = ['interrupted; run the same command again']
HALF_A_CLIP = r'write .*/img_00030\.jpg$'
LEDGER = r'write .*archives\.jsonl$'
CLIPS = [r'/videos/[^/]*\.mp4$', r'/videos/00000000004_']
# step -> where it stops while it works, and how many processes get there: two workers, or one
WORKING = {
    'cut': (A_CLIP, 2),
    'cut archives': (A_CLIP, 2),
    'extract': (HALF_A_CLIP, 2),
    'prepare': (r'os.rename .*/kinetics_train\.csv$', 1),
    'prepare from videos': (r'os.rename .*/kinetics_train\.csv$', 1),
    'fetch': (r'open .*/00000000004_.*\.jpg$', 1),
    'merge': (r'os.rename .*/annotations/ava_train_v2\.2\.csv$', 1),
    'link': (r'os.rename .*/rawframes/AVA_mov-1_x$', 1),
}
EARLY = r'write .*\.frames\.jsonl$'  # before Step 6 starts its detector, which takes seconds
# step -> the stages at which it is killed, each on what the kill before has left
STAGES = {
    'cut': [r'cut_kinetics_options\.json$', *CLIPS, r'cut_kinetics_train\.csv$'],
    'cut archives': [*CLIPS, LEDGER, r'cut_kinetics_train\.csv$'],
    'extract': [HALF_A_CLIP, r'/rawframes/[^/]*$', r'/rawframes/00000000004_', r'extract_rgb'],
    'prepare': [r'prepare_annotation_train\.csv$', r'kinetics_train\.csv$'],
    'prepare from videos': [r'kinetics_train\.csv$'],
    'fetch': [r'fetch_proposal_train\.csv$', r'/kinetics_proposal\.pkl$'],
    'merge': [r'ava_only\.csv$', r'/ava_train_v2\.2\.csv$', r'93\.9\.pkl$'],
    'link': [r'/rawframes/AVA_mov-1_x$', r'softlink_ava\.csv$', r'report\.html$'],
}


def finish(job, step: str, root: Path) -> None:
    """Run a step to its end: then all is as if nothing had stopped it before."""
    by = run if step == 'merge' else here  # in this process the lock of Step 7a would stay
    by(*job.command(step, root)[1:])
    assert_undisturbed(job, step, root)


def copy_before(job, step: str, folder: Path) -> Path:
    return shutil.copytree(job.before(step), folder / 'root', symlinks=True)


@pytest.mark.parametrize('step', STEPS)
def test_killed_at_every_stage(job, step, tmp_path):
    """The next run completes everything.

    All processes at once; what has a final name is whole after each kill.
    """
    root = copy_before(job, step, tmp_path)
    for number, stage in enumerate(STAGES[step]):
        notes = tmp_path / f'notes{number}'
        at = stage if stage in (HALF_A_CLIP, LEDGER) else f'os.rename .*{stage}'
        with stopped_at(job.command(step, root), notes, at) as process:
            kill_tree(process)
        assert process.returncode == -signal.SIGKILL
        assert_whole(job, step, root)
    finish(job, step, root)


# hidden folders, *.part, and the two logs that runs add lines to
BESIDE = re.compile(r'/\.|\.part$|archives\.jsonl$|\.frames\.jsonl$')


@pytest.mark.parametrize('step', STEPS)
def test_no_file_is_written_under_its_final_name(job, step, tmp_path):
    """By Python's `open`, at least."""
    root, notes = copy_before(job, step, tmp_path), tmp_path / 'notes'
    environment = stopping_environment(notes, f'write {re.escape(str(root))}/', how='note')
    subprocess.run(job.command(step, root), env=environment, check=True, capture_output=True)
    written = ''.join(path.read_text() for path in notes.iterdir()).splitlines()
    assert written and not [path for path in written if not BESIDE.search(path[len(str(root)) :])]


def ignores_interrupts(pid: int) -> bool:
    """Whether a process ignores Ctrl-C; yes where /proc does not tell."""
    mask = re.search(r'SigIgn:\s*(\w+)', Path(f'/proc/{pid}/status').read_text())
    return not mask or bool(int(mask[1], 16) >> (signal.SIGINT - 1) & 1)


@pytest.mark.parametrize('step', STEPS)
def test_interrupted(job, step, tmp_path):
    """It says so in one line, and the next run goes on.

    Ctrl-C goes to all processes, what kill and batch systems send to the script alone.
    """
    root, (at, processes) = copy_before(job, step, tmp_path), WORKING[step]
    for number, send in (signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill):
        notes = tmp_path / f'notes{number}'
        if step == 'fetch' and number == signal.SIGTERM:
            at = EARLY
        with stopped_at(job.command(step, root), notes, at, processes) as process:
            workers = set(stopped_processes(notes)) - {process.pid}
            assert all(map(ignores_interrupts, workers))  # Ctrl-C is for their parent
            send(process.pid, number)
            if step == 'fetch':
                (notes / 'go').touch()  # threads that load frames end their frame first
            out, err = process.communicate(timeout=300)
        assert (process.returncode, stderr_lines(err)) == (
            130,
            INTERRUPTED,
        ) and 'Traceback' not in out
        assert not [path for path in root.rglob('.*') if path.suffix != '.part']
        assert_whole(job, step, root)
    finish(job, step, root)


def test_one_worker_is_interrupted_in_the_scripts_own_process(job, tmp_path):
    at = r'os.rename .*/videos/00000000004_'
    command = job.command('cut', tmp_path / 'root', '--num_workers=1')
    with stopped_at(command, tmp_path / 'notes', at) as process:
        assert stopped_processes(tmp_path / 'notes') == [process.pid]
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert (process.returncode, stderr_lines(err)) == (130, INTERRUPTED)
    assert not list((tmp_path / 'root/videos').glob('00000000004_*'))


@pytest.mark.parametrize('step', ['cut', 'cut archives', 'extract', 'merge'])
def test_a_second_run_is_refused_while_the_first_works(job, step, tmp_path):
    root = copy_before(job, step, tmp_path)
    with stopped_at(job.command(step, root), tmp_path / 'notes', WORKING[step][0]) as first:
        second = here(*job.command(step, root)[1:], code=1)
        assert len(stderr_lines(second.stderr)) == 1 and second.stderr.startswith(
            'error: another run'
        )
        (tmp_path / 'notes/go').touch()
        _, err = first.communicate(timeout=300)
        assert first.returncode == 0, err
    assert_undisturbed(job, step, root)


@pytest.mark.parametrize('step', ['prepare', 'prepare from videos', 'link'])
def test_two_runs_of_a_short_step(job, step, tmp_path):
    """One is done, the other is done or stops with one line."""
    root = copy_before(job, step, tmp_path)
    with stopped_at(job.command(step, root), tmp_path / 'notes', WORKING[step][0]) as first:
        run(*job.command(step, root)[1:])
        (tmp_path / 'notes/go').touch()
        _, err = first.communicate(timeout=300)
    lines = stderr_lines(err)
    assert first.returncode == 0 or len(lines) == 1 and lines[0].startswith('error: '), err
    assert_undisturbed(job, step, root)


def skip_or_fail(reason: str) -> None:
    """Skip a test that this machine does not allow; fail where it is known to allow all."""
    (pytest.fail if os.environ.get('NO_SKIPS') else pytest.skip)(reason)


def run_mounted(job, step: str, folder: Path, free: int | str) -> list[tuple[int, str]]:
    """Exit codes and stderr of the runs that mounted.py makes of a step."""
    (folder / 'mount').mkdir()
    command = job.command(step, folder / 'mount/root')
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name('tools') / 'mounted.py',
            folder / 'mount',
            job.before(step),
            folder,
            str(free),
            *command,
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode == 77:
        skip_or_fail(done.stderr)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# KB: less than the step writes, but room for a report of Step 3; for the others nothing
FREE_KB = {'cut': 150, 'cut archives': 154, 'extract': 1500, 'fetch': 4, 'prepare': 4}


@pytest.mark.parametrize('step', STEPS)
def test_full_disk(job, step, tmp_path):
    """It is reported, and the same command continues once there is space."""
    first, second = run_mounted(job, step, tmp_path, FREE_KB.get(step, 0))
    assert [first[0], len(stderr_lines(first[1]))] == [1, 1] and 'No space left on device' in first[
        1
    ]
    assert_whole(job, step, tmp_path / 'full')
    assert second[0] == 0, second[1]
    assert_undisturbed(job, step, tmp_path / 'root')


@pytest.mark.parametrize('step', STEPS)
def test_a_read_only_disk_is_told(job, step, tmp_path):
    ((code, err),) = run_mounted(job, step, tmp_path, 'readonly')
    assert [code, len(stderr_lines(err))] == [1, 1] and 'Read-only file system' in err


# root loses the rights to pass over permissions: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
OBEY = """
import ctypes, os, sys
PR_CAPBSET_DROP = 24
if any(ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, number, 0, 0, 0) for number in (1, 2)):
    sys.exit(77)
os.execv(sys.argv[1], sys.argv[1:])
"""


def run_obeying(command: list[str]) -> subprocess.CompletedProcess:
    """Run a step as somebody whom permissions bind."""
    obey = [sys.executable, '-c', OBEY] if os.getuid() == 0 else []
    done = subprocess.run(obey + command, capture_output=True, text=True, timeout=600)
    if done.returncode == 77:
        skip_or_fail('root cannot give up its rights here')
    return done


@pytest.mark.parametrize('step', STEPS)
def test_folders_that_may_not_be_written_are_told(job, step, tmp_path):
    root = copy_before(job, step, tmp_path)
    folders = [root, *(path for path in root.rglob('*') if path.is_dir() and not path.is_symlink())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        done = run_obeying(job.command(step, root))
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert [done.returncode, len(stderr_lines(done.stderr))] == [1, 1], done.stderr
    assert 'Permission denied' in done.stderr
    assert snapshot(root) == snapshot(job.before(step))


@pytest.mark.parametrize('step', STEPS)
def test_a_folder_that_may_not_be_entered_is_told(job, step, tmp_path):
    private = tmp_path / 'private'
    private.mkdir()
    root = copy_before(job, step, private)
    private.chmod(0o600)
    try:
        done = run_obeying(job.command(step, root))
    finally:
        private.chmod(0o700)
    assert [done.returncode, len(stderr_lines(done.stderr))] == [1, 1], done.stderr
    assert 'Permission denied' in done.stderr


@pytest.mark.parametrize('step', ['cut', 'extract', 'merge'])
def test_a_file_server_without_locks_is_worked_on_all_the_same(job, step, tmp_path, monkeypatch):
    """As on Lustre mounted without flock; simulated, since that needs a server."""

    def flock(*_):
        raise OSError(38, os.strerror(38))  # ENOSYS

    monkeypatch.setattr(fcntl, 'flock', flock)
    root = copy_before(job, step, tmp_path)
    here(*job.command(step, root)[1:])
    assert_undisturbed(job, step, root)


def test_a_disk_without_symbolic_links_is_told(job, tmp_path, monkeypatch):
    def symlink(*_, **__):
        raise PermissionError(1, 'Operation not permitted')

    monkeypatch.setattr(os, 'symlink', symlink)
    root = copy_before(job, 'link', tmp_path)
    done = here(*job.command('link', root)[1:], code=1)
    assert re.search('^error: no link can be made', done.stderr)
    assert snapshot(root) == snapshot(job.before('link'))


def test_a_killed_worker_process_ends_the_run_with_a_line(job, tmp_path):
    at, processes = WORKING['cut']
    root, notes = tmp_path / 'root', tmp_path / 'notes'
    with stopped_at(job.command('cut', root), notes, at, processes) as process:
        os.kill(stopped_processes(notes)[0], signal.SIGKILL)
        _, err = process.communicate(timeout=300)
    assert [process.returncode, len(stderr_lines(err))] == [1, 1], err
    assert stderr_lines(err)[0].startswith('error: a worker process was killed')
    finish(job, 'cut', root)


@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGKILL])
def test_workers_end_with_their_parent(job, number, tmp_path):
    """When a terminal is lost, or memory runs out: nothing is told to the workers then."""
    at, processes = WORKING['cut']
    notes = tmp_path / 'notes'
    with stopped_at(job.command('cut', tmp_path / 'root'), notes, at, processes) as process:
        workers = [psutil.Process(pid) for pid in stopped_processes(notes)]
        assert process.pid not in [worker.pid for worker in workers] and len(workers) == 2
        process.send_signal(number)
        process.communicate(timeout=300)
        assert process.returncode == -number
        deadline = time.monotonic() + 300
        while not all(map(has_ended, workers)):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def has_ended(process: psutil.Process) -> bool:
    """Whether it has ended, even if its new parent has not asked for its exit code yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True
