"""Kills, interruptions, full disks, two runs at once, read-only folders: every step ends well, and
the next run mends all.
"""

import contextlib
import errno
import fcntl
import importlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sample_world
from helpers import REPO, TINY, annotation_rows, numbered_source, snapshot

VIDEOS = 8
STEPS = {
    'cut': ['cut_kinetics.py', '--avakinetics_anotation={job}', '--kinetics_list={job}/list.txt'],
    'cut archives': [
        'cut_kinetics.py',
        '--avakinetics_anotation={job}',
        '--kinetics_archives',
        '{job}/1.tar',
        '{job}/2.tar',
    ],
    'extract': ['extract_rgb_frames.py'],
    'prepare': ['prepare_annotation.py', '--avakinetics_anotation={job}'],
    'prepare from videos': ['prepare_annotation.py', '--avakinetics_anotation={job}'],
    'fetch': ['fetch_proposal.py', *TINY],
    'merge': ['merge_annotations.py'],
    'link': ['softlink_ava.py', '--ava_root={job}/ava'],
}


class Job:
    """What every step finds, `before(step)`, and what an undisturbed run of it leaves,
    `after(step)`: folders to copy.
    """

    def __init__(self, folder):
        self.folder, self.seconds = folder, {}
        self.make()
        root = folder / 'root'
        for step in STEPS:
            if step == 'cut archives':
                continue
            if step == 'prepare from videos':
                shutil.copytree(
                    root,
                    self.before(step),
                    ignore=lambda path, names: {'rawframes', 'kinetics_train.csv'} & set(names),
                )
            elif root.is_dir():
                shutil.copytree(root, self.before(step), symlinks=True)
            else:
                self.before(step).mkdir()
            if step == 'prepare from videos':
                shutil.copytree(self.before(step), self.after(step))
                self.time(step, self.after(step))
                continue
            if step == 'merge':
                shutil.copytree(folder / 'ava/annotations', root / 'annotations')
                shutil.copytree(folder / 'ava/annotations', self.before(step) / 'annotations')
            self.time(step, root)
            shutil.copytree(root, self.after(step), symlinks=True)
        self.before('cut archives').mkdir()
        self.time('cut archives', self.after('cut archives'))

    def before(self, step):
        return self.folder / f'before {step}'

    def after(self, step):
        return self.folder / f'after {step}'

    def command(self, step, root):
        script, *arguments = (argument.format(job=self.folder) for argument in STEPS[step])
        return [sys.executable, str(REPO / script), f'--avakinetics_root={root}', *arguments]

    def time(self, step, root):
        start = time.perf_counter()
        subprocess.run(self.command(step, root), check=True, capture_output=True)
        self.seconds[step] = time.perf_counter() - start

    def make(self):
        folder, lines, rows = self.folder, '', ''
        for index in range(VIDEOS):
            path = f'a b (c)/{index:011d}_000000_000010.mp4'
            numbered_source(folder / path, {})
            lines, rows = lines + f'{path} 1\n', rows + annotation_rows(f'{index:011d}', 5, 2)
        rows += annotation_rows('00000000000', 8)  # so that ranges of it wait for a better source
        (folder / 'list.txt').write_text(lines + f'{VIDEOS:011d}_000000_000010.mp4\n')
        (folder / 'kinetics_train_v1.0.csv').write_text(rows + annotation_rows(f'{VIDEOS:011d}', 5))
        for number in 1, 2:
            paths = sorted((folder / 'a b (c)').iterdir())[number - 1 :: 2]
            subprocess.run(
                [
                    'tar',
                    'cf',
                    folder / f'{number}.tar',
                    *[path.relative_to(folder) for path in paths],
                ],
                cwd=folder,
                check=True,
            )
        (folder / 'ava/annotations').mkdir(parents=True)
        for video in '-5KQ66BBWC4', 'AVA_mov-1_x':
            (folder / 'ava/rawframes' / video).mkdir(parents=True)
            (folder / 'ava/rawframes' / video / 'img_00061.jpg').write_bytes(b'frame')
        notes = folder / 'ava/annotations'
        sample_world.draw_other_annotations(notes)
        (notes / 'ava_train_v2.2.csv').write_text(
            100_000
            * ''.join(
                f'{video},0902,0.1,0.2,0.3,0.4,12,0\n' for video in ('-5KQ66BBWC4', 'AVA_mov-1_x')
            )
        )
        (notes / 'ava_dense_proposals_train.FAIR.recall_93.9.pkl').write_bytes(
            sample_world.fair_pickle(
                {f'{video},0902': np.ones((1, 5)) for video in ('-5KQ66BBWC4', 'AVA_mov-1_x')}
            )
        )


@pytest.fixture(scope='module')
def job(tmp_path_factory):
    return Job(tmp_path_factory.mktemp('job'))


def products(root) -> dict[str, str]:
    """All files but the log of detections, which tells of every run."""
    return {
        name: digest
        for name, digest in snapshot(root).items()
        if not name.endswith('.frames.jsonl')
    }


def assert_undisturbed(job, step, root):
    """The tree is byte for byte that of an undisturbed run, and nothing unfinished is left
    anywhere.
    """
    assert products(root) == products(job.after(step))
    assert sorted(path.relative_to(root) for path in root.rglob('*')) == sorted(
        path.relative_to(job.after(step)) for path in job.after(step).rglob('*')
    )
    unfinished = [
        path for path in root.rglob('*') if path.name.startswith('.') or path.suffix == '.part'
    ]
    assert unfinished == []


def assert_whole(job, step, root):
    """What has a final name is what was there before, or what is right."""
    whole, before = products(job.after(step)), products(job.before(step))
    for name, digest in products(root).items():
        if not any(part.startswith('.') for part in name.split('/')) and not name.endswith('.part'):
            assert digest in (whole.get(name), before.get(name)) or 'archives.jsonl' in name, name


def said(text: str) -> list[str]:
    """The lines of stderr but for progress bars, at whose end one may stand."""
    lines = (re.sub(r'.*%\|[^]]*]?', '', line) for line in text.replace('\r', '\n').splitlines())
    return [line for line in lines if line.strip()]


def tree(root) -> dict[str, int]:
    """Names and sizes below a folder, as far as they can be seen while they change."""
    sizes = {}
    for path in root.rglob('*'):
        with contextlib.suppress(FileNotFoundError):
            sizes[str(path)] = path.lstat().st_size
    return sizes


def wait_for_work(process, root, before: dict[str, int]) -> None:
    """Until a run has written something, or ended."""
    deadline = time.monotonic() + 60
    while process.poll() is None and tree(root) == before:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize('step', STEPS)
def test_killed_at_random_moments(job, step, tmp_path):
    """Three kills of the whole process group while it writes, each on what the one before left,
    then one complete run; ROUNDS times, twice if it is not set, but once Step 6.
    """
    chance = random.Random(step)
    for round in range(int(os.environ.get('ROUNDS', 1 if step == 'fetch' else 2))):
        root, codes = tmp_path / f'root{round}', []
        while (
            codes.count(-signal.SIGKILL) < 3 and len(codes) < 40
        ):  # a short step may end before it is met
            if not codes or codes[-1] == 0:
                shutil.rmtree(root, ignore_errors=True)
                shutil.copytree(job.before(step), root, symlinks=True)
            before = tree(root)
            process = subprocess.Popen(
                job.command(step, root),
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            wait_for_work(process, root, before)
            time.sleep(chance.choice([0, chance.uniform(0, 0.4) * job.seconds[step]]))
            if process.poll() is None:
                for _ in range(2):  # the whole session: ffmpeg is in process groups of its own
                    subprocess.run(['pkill', '-KILL', '-s', str(process.pid)])
            codes.append(process.wait(timeout=60))
            assert_whole(job, step, root)
        done = subprocess.run(job.command(step, root), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert_undisturbed(job, step, root)
        assert -signal.SIGKILL in codes and set(codes) <= {0, -signal.SIGKILL}, codes


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('step', STEPS)
def test_interrupted(job, step, number, tmp_path):
    """Ctrl-C goes to the whole process group, what kill and batch systems send to the script alone:
    one line, exit code 130.
    """
    chance, codes, root, done = random.Random(f'{step}{number}'), [], tmp_path / 'root', True
    early, late = (
        0.15 * job.seconds[step],
        0.9 * job.seconds[step],
    )  # which close in on the work, a few ms in a short step
    while len(codes) < 3 or 130 not in codes and len(codes) < 40:
        if done:  # a step that is has too short a second run to be interrupted
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(job.before(step), root, symlinks=True)
        process = subprocess.Popen(
            job.command(step, root),
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        delay = chance.uniform(early, late)
        time.sleep(delay)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        out, err = process.communicate(timeout=60)
        codes.append(process.returncode)
        done = (
            codes[-1] == 0 or codes[-1] == -number and out != ''
        )  # the latter while Python was ending
        early, late = (
            (early * 0.9, (late + delay) / 2) if done else ((early + delay) / 2, late * 1.1)
        )
        if (
            'Traceback' in err
            # Python's own message, of this process or a worker that was still importing, or its
            # beginning
        ):
            assert process.returncode in (0, 1, 130, -number, -signal.SIGINT), err
            after = err.split('Traceback (most recent call last):\n', 1)[1]
            starting = re.match(
                r' *File .*(<frozen (runpy|importlib)|in <module>)', after
            ) or after.startswith('interrupted')
            working = re.search(r', in (cut|extract|prepare|fetch|merge|link_all|check)\n', after)
            # or of loky's thread, as its pool ends; or Python swallowed it, as in a callback of its
            # garbage collector
            assert (
                starting
                and not working
                or 'joblib/externals/loky' in after
                or 'Exception ignored in' in err
            ), err
        elif process.returncode == 130:
            assert said(err) == ['interrupted; run the same command again']
            assert (
                'Traceback' not in out or 'popen_loky' in out
            )  # what loky prints of a worker that was still starting
            hidden = [path for path in root.rglob('.*') if path.suffix != '.part']
            assert not hidden
        elif process.returncode == 0:  # it was done
            assert not said(err)
        else:  # the signal came before Python had read the script
            assert process.returncode == -number, (process.returncode, err)
    assert 130 in codes
    subprocess.run(job.command(step, root), check=True, capture_output=True)
    assert_undisturbed(job, step, root)


@pytest.mark.parametrize('step', STEPS)
def test_two_runs_at_once(job, step, tmp_path):
    """The second of a long step says in a line that another is at work.

    Of a short one both end well, or one says in a line that the other has taken its file.
    """
    locked = step in ('cut', 'cut archives', 'extract', 'fetch')
    for attempt in range(20):  # a short step may end before it is met
        root = tmp_path / f'root{attempt}'
        shutil.copytree(job.before(step), root, symlinks=True)
        before = tree(root)
        runs = [
            subprocess.Popen(
                job.command(step, root), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        ]
        wait_for_work(runs[0], root, before)
        if locked:
            time.sleep(0.1)  # it may have made its folder, but not yet taken it
        runs[0].send_signal(signal.SIGSTOP)
        if runs[0].poll() is None:
            break
        runs[0].communicate()
    try:
        runs.append(
            subprocess.Popen(
                job.command(step, root), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
        if step == 'merge':
            with pytest.raises(subprocess.TimeoutExpired):
                runs[1].wait(timeout=5)
        elif step in ('prepare', 'prepare from videos', 'link'):
            runs[1].wait(timeout=60)
        else:
            second = said(runs[1].communicate(timeout=60)[1])
            assert (
                runs[1].returncode == 1
                and len(second) == 1
                and second[0].startswith('error: another run')
            ), second
        runs[0].send_signal(signal.SIGCONT)
        for process in runs[:1] if locked else runs:
            err = process.communicate(timeout=60)[1]
            short = step in ('prepare', 'prepare from videos', 'link')
            assert process.returncode == 0 or said(err)[-1].startswith('error: ') and short, err
    finally:
        for process in runs:
            process.kill()
    assert 0 in [process.returncode for process in runs]
    assert_undisturbed(job, step, root)


def in_mounted(script: str, **variables) -> subprocess.CompletedProcess:
    """Run a shell script that may mount file systems, which nobody else sees."""
    probe = subprocess.run(
        ['unshare', '--mount', '--map-root-user', 'mount', '-t', 'tmpfs', 'none', '/mnt'],
        capture_output=True,
    )
    if probe.returncode:
        pytest.skip('this machine lets nobody mount a file system')
    return subprocess.run(
        ['unshare', '--mount', '--map-root-user', 'bash', '-c', script],
        capture_output=True,
        text=True,
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        timeout=300,
    )


# less than the step writes; for the others nothing
FREE_KB = {'cut': 60, 'cut archives': 60, 'extract': 1500, 'fetch': 4, 'prepare': 4}


@pytest.mark.parametrize('step', STEPS)
def test_disk_full(job, step, tmp_path):
    """A small tmpfs: one line that says so, nothing half-written, and the same command continues
    once there is space.
    """
    command = ' '.join(f"'{part}'" for part in job.command(step, '/mnt/root'))
    done = in_mounted(
        """
mount -t tmpfs -o size=60m none /mnt && cp -a "$BEFORE" /mnt/root
dd if=/dev/zero of=/mnt/filler bs=1k status=none 2>/dev/null
truncate -s -"$FREE"k /mnt/filler
"""
        + command
        + """ >"$OUT/first.out" 2>"$OUT/first.err"; echo $? >"$OUT/first.code"
cp -a /mnt/root "$OUT/full"
rm /mnt/filler
"""
        + command
        + """ >"$OUT/second.out" 2>"$OUT/second.err"; echo $? >"$OUT/second.code"
cp -a /mnt/root "$OUT/root"
""",
        BEFORE=job.before(step),
        OUT=tmp_path,
        FREE=FREE_KB.get(step, 0),
    )
    assert done.returncode == 0, done.stderr
    first, code = (
        said((tmp_path / 'first.err').read_text()),
        (tmp_path / 'first.code').read_text().strip(),
    )
    assert code == '1' and len(first) == 1 and 'No space left on device' in first[0], (code, first)
    assert_whole(job, step, tmp_path / 'full')
    assert (tmp_path / 'second.code').read_text().strip() == '0', (
        tmp_path / 'second.err'
    ).read_text()
    assert_undisturbed(job, step, tmp_path / 'root')


@pytest.mark.parametrize('step', STEPS)
def test_read_only_disk(job, step, tmp_path):
    command = ' '.join(f"'{part}'" for part in job.command(step, '/mnt/root'))
    done = in_mounted(
        """
mount -t tmpfs -o size=60m none /mnt && cp -a "$BEFORE" /mnt/root && mount -o remount,ro /mnt
exec """
        + command,
        BEFORE=job.before(step),
    )
    assert (
        done.returncode == 1
        and len(said(done.stderr)) == 1
        and 'Read-only file system' in done.stderr
    ), done.stderr


@pytest.mark.parametrize('step', STEPS)
def test_no_permission(job, step, tmp_path):
    """A folder that may not be written; for root too, once it has lost the right to pass over
    permissions.
    """
    root = tmp_path / 'root'
    shutil.copytree(job.before(step), root, symlinks=True)
    for folder in [
        root,
        *(path for path in root.rglob('*') if path.is_dir() and not path.is_symlink()),
    ]:
        folder.chmod(0o555)
    drop = ['setpriv', '--bounding-set=-dac_override,-dac_read_search'] if os.getuid() == 0 else []
    done = subprocess.run(drop + job.command(step, root), capture_output=True, text=True)
    for folder in [
        root,
        *(path for path in root.rglob('*') if path.is_dir() and not path.is_symlink()),
    ]:
        folder.chmod(0o755)
    assert (
        done.returncode == 1 and len(said(done.stderr)) == 1 and 'Permission denied' in done.stderr
    ), done.stderr
    assert snapshot(root) == snapshot(job.before(step))


@pytest.mark.parametrize('step', STEPS)
def test_a_folder_that_may_not_be_entered(job, step, tmp_path):
    """By anybody but its owner; root has lost the right to pass over permissions."""
    (tmp_path / 'private').mkdir()
    shutil.copytree(job.before(step), tmp_path / 'private/root', symlinks=True)
    (tmp_path / 'private').chmod(0o600)
    drop = ['setpriv', '--bounding-set=-dac_override,-dac_read_search'] if os.getuid() == 0 else []
    done = subprocess.run(
        drop + job.command(step, tmp_path / 'private/root'), capture_output=True, text=True
    )
    (tmp_path / 'private').chmod(0o700)
    assert (
        done.returncode == 1 and len(said(done.stderr)) == 1 and 'Permission denied' in done.stderr
    ), done.stderr


@pytest.mark.parametrize('step', ['cut', 'extract', 'fetch', 'merge'])
def test_a_file_server_without_locks(job, step, tmp_path, monkeypatch, capsys):
    """Lustre, mounted without flock; simulated, since it wants a server."""

    def flock(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, 'flock', flock)
    shutil.copytree(job.before(step), tmp_path / 'root', symlinks=True)
    script, *options = job.command(step, tmp_path / 'root')[1:]
    importlib.import_module(Path(script).stem).main(options)
    assert_undisturbed(job, step, tmp_path / 'root')
    assert ('has no file locks: let no other run' in capsys.readouterr().err) == (step != 'merge')


def test_a_disk_without_symbolic_links(job, tmp_path):
    root = tmp_path / 'root'
    shutil.copytree(job.before('link'), root, symlinks=True)
    script, *arguments = job.command('link', root)[1:]
    program = (
        'import os, runpy, sys\n'
        'def symlink(*_, **__): raise PermissionError(1, "Operation not permitted")\n'
        'os.symlink = symlink\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], '
        'run_name="__main__")'
    )
    done = subprocess.run(
        [sys.executable, '-c', program, script, *arguments], capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and len(said(done.stderr)) == 1
        and 'no link can be made' in done.stderr
    ), done.stderr
    assert snapshot(root) == snapshot(job.before('link'))


def test_a_worker_process_that_is_killed_ends_the_run_with_a_line(job, tmp_path):
    root = tmp_path / 'root'
    command = job.command('cut', root) + ['--num_workers=2']
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(root.glob('videos/*.mp4')):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = subprocess.run(
        ['pgrep', '-s', str(process.pid), '-f', 'LokyProcess'], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(workers[0]), signal.SIGKILL)
    err = process.communicate()[1]
    assert (
        process.returncode == 1
        and said(err)[-1].startswith('error: a worker process was killed')
        and len(said(err)) == 1
    ), err
    subprocess.run(command, check=True, capture_output=True)
    assert_undisturbed(job, 'cut', root)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_one_worker_can_be_interrupted_too(job, number, tmp_path):
    """It works in the script's own process, and what ffmpeg was at is no fault of the video."""
    (tmp_path / 'ffmpeg').write_text(
        f'#!/bin/sh\n[ $1 = -version ] && exit\ntouch {tmp_path}/begun\nexec sleep 20\n'
    )
    (tmp_path / 'ffmpeg').chmod(0o755)
    command = [
        *job.command('cut', tmp_path / 'root'),
        '--num_workers=1',
        f'--ffmpeg={tmp_path}/ffmpeg',
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / 'begun').exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert (
        said(process.communicate(timeout=10)[1]) == ['interrupted; run the same command again']
        and process.returncode == 130
    )
    assert not list((tmp_path / 'root').rglob('*.mp4'))


@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGKILL])
def test_workers_end_with_their_parent(job, number, tmp_path):
    """Also when a terminal is lost, or memory runs out: nothing is told to the workers then."""
    (tmp_path / 'ffmpeg').write_text(
        f'#!/bin/sh\n[ $1 = -version ] && exit\necho $PPID >>{tmp_path}/workers\nexec sleep 100\n'
    )
    (tmp_path / 'ffmpeg').chmod(0o755)
    command = [
        *job.command('cut', tmp_path / 'root'),
        '--num_workers=2',
        f'--ffmpeg={tmp_path}/ffmpeg',
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while (
        not (tmp_path / 'workers').is_file() or len((tmp_path / 'workers').read_text().split()) < 2
    ):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = {int(pid) for pid in (tmp_path / 'workers').read_text().split()}
    assert len(workers) == 2 and process.pid not in workers
    os.kill(process.pid, number)
    assert process.wait() == -number
    deadline = time.monotonic() + 10
    while any(os.path.exists(f'/proc/{pid}') for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what stands for ffmpeg
    subprocess.run(job.command('cut', tmp_path / 'root'), check=True, capture_output=True)
    assert_undisturbed(job, 'cut', tmp_path / 'root')
