"""What the steps say, and that they say it, in environments that are not as usual."""

import http.server
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
from multiprocessing.dummy import DummyProcess

import pytest
import tqdm

import fetch_proposal
from demo import SCRIPTS, readme_commands
from helpers import TINY, REPO, annotation_rows, errors, here, read_report, run, stderr_lines
from job import STEPS, assert_undisturbed

NAME = 'aaaaaaaaaaa_000000_000010.mp4'


@pytest.fixture
def archived(world):
    """A world without a list: annotations of one video."""
    rows = annotation_rows('aaaaaaaaaaa', 5)
    (world / 'ava_kinetics_v1_0/kinetics_train_v1.0.csv').write_text(rows)
    return world


def cut_archive(world, archive: str, **options) -> subprocess.CompletedProcess:
    return here(
        'cut_kinetics.py',
        f'--avakinetics_anotation={world}/ava_kinetics_v1_0',
        f'--avakinetics_root={world}/root',
        f'--kinetics_archives={archive}',
        **options,
    )


class NoRanges(http.server.BaseHTTPRequestHandler):
    """Answers each request with the whole file, as Python's own server does."""

    content = b''

    def do_HEAD(self):
        self.send_response(200)
        self.send_header('Content-Length', str(len(self.content)))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *_):
        pass


def test_a_web_server_without_ranges(archived):
    """The archive is larger than one request of fsspec's, 5 MB."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode='w') as tar:
        filler = tarfile.TarInfo('filler')
        filler.size = 12 << 20
        tar.addfile(filler, io.BytesIO(bytes(filler.size)))
    handler = type('Handler', (NoRanges,), dict(content=content.getvalue()))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = cut_archive(archived, f'http://127.0.0.1:{server.server_port}/a.tar', code=1)
    finally:
        server.shutdown()
    reason = 'its server answers no range requests; pipe it into --kinetics_archives - with curl'
    assert errors(done).endswith(f'/a.tar: {reason}')


def test_an_empty_standard_input(archived):
    command = [sys.executable, REPO / 'cut_kinetics.py', '--kinetics_archives=-']
    options = (
        f'--avakinetics_anotation={archived}/ava_kinetics_v1_0',
        f'--avakinetics_root={archived}/root',
    )
    done = subprocess.run(
        [*command, *options], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 1 and errors(done).endswith('1 of 1, first -: it is empty')


@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_an_archive(archived, kind):
    link = tarfile.TarInfo(f'a/{NAME}')
    link.type, link.linkname = kind, f'../b/{NAME}'
    with tarfile.open(archived / 'a.tar', 'w') as tar:
        tar.addfile(link)
    for _ in range(2):
        assert 'no clip could' in errors(cut_archive(archived, archived / 'a.tar', code=1))
        reason = 'unreadable video: in its archive it is empty, or a link'
        assert read_report(archived / 'root', 'cut_kinetics_train') == [
            ['aaaaaaaaaaa', '5', reason]
        ]


def test_avas_annotations_of_another_version(tmp_path):
    notes = tmp_path / 'annotations'
    notes.mkdir()
    (notes / 'ava_train_v2.1.csv').touch()
    (tmp_path / 'kinetics_train.csv').touch()
    (tmp_path / 'kinetics_proposal.pkl').touch()
    message = errors(here('merge_annotations.py', f'--avakinetics_root={tmp_path}', code=1))
    assert "holds version 2.1 of AVA's annotations; get 2.2: " in message
    assert 'VERSION=2.2 bash download_annotations.sh' in message


def test_one_of_a_thing_is_not_one_things(job, tmp_path):
    """And thousands have their comma in every step."""
    text = ''
    for step in STEPS:
        root = shutil.copytree(job.before(step), tmp_path / step, symlinks=True)
        text += (run if step == 'merge' else here)(*job.command(step, root)[1:]).stdout
    assert not re.search(r'\b1 (clips|archives|keyframes|rows|frames|people|movies)\b', text)
    assert 'None' not in text and not re.search(r'\b0 of them', text)
    assert not re.search(r'(?<![\d/_.])\d{4,}(?![\d/_.])', text.replace(str(tmp_path), ''))


@pytest.mark.parametrize('step', STEPS)
def test_a_working_directory_that_is_gone(job, step, tmp_path):
    root = shutil.copytree(job.before(step), tmp_path / 'root', symlinks=True)
    (tmp_path / 'gone').mkdir()
    script = ' '.join(f"'{argument}'" for argument in job.command(step, root))
    done = subprocess.run(
        ['/bin/sh', '-c', f'cd "{tmp_path}/gone" && rmdir "{tmp_path}/gone" && {script}'],
        capture_output=True,
        text=True,
    )
    assert 'Traceback' not in done.stderr
    assert done.returncode == 0 or (done.returncode == 1 and errors(done))


@pytest.mark.parametrize('step', ['cut', 'extract', 'fetch', 'prepare', 'merge', 'link'])
def test_python_that_does_not_look_beside_the_script(job, step, tmp_path):
    root = shutil.copytree(job.before(step), tmp_path / 'root', symlinks=True)
    environment = os.environ | dict(PYTHONSAFEPATH='1')
    run(*job.command(step, root)[1:], env=environment)
    assert_undisturbed(job, step, root)


@pytest.mark.parametrize('step', ['cut', 'extract', 'fetch', 'prepare', 'merge', 'link'])
def test_a_closed_stderr_stops_nothing(job, step, tmp_path):
    root = shutil.copytree(job.before(step), tmp_path / 'root', symlinks=True)
    command = shlex.join(job.command(step, root))
    subprocess.run(f'{command} 2>&-', shell=True, check=True, stdout=subprocess.PIPE)
    assert_undisturbed(job, step, root)


@pytest.mark.parametrize('step', ['cut', 'extract', 'prepare', 'merge', 'link'])
def test_a_reader_that_has_read_enough_is_no_error(job, step, tmp_path):
    """As `| head -1`; here the other end of the pipe is closed from the start."""
    root = shutil.copytree(job.before(step), tmp_path / 'root', symlinks=True)
    reader, writer = os.pipe()
    os.close(reader)
    # more workers need what was said before to be out when they start
    command = job.command(step, root, *['--num_workers=1'] * (step in ('cut', 'extract')))
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, stderr_lines(done.stderr)) == (141, [])
    if step != 'link':  # whose bar needs its first line to be out
        assert_undisturbed(job, step, root)


@pytest.mark.parametrize('step', ['prepare', 'link'])
def test_too_few_threads_are_told(job, step, tmp_path, monkeypatch):
    root = shutil.copytree(job.before(step), tmp_path / 'root', symlinks=True)
    start, started = DummyProcess.start, []

    def start_two(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(DummyProcess, 'start', start_two)
    message = errors(here(*job.command(step, root)[1:], code=1))
    assert message.startswith('error: no more threads can be started here; raise the limit')


def test_the_clock_of_step_6_starts_with_its_detector(tmp_path, monkeypatch, capsys):
    """What loading takes is no part of the time that is said to be left."""
    now = [0]

    def detect_all(frames, *_):
        for first, seconds in (0, 3600), (2, 1), (4, 1):
            now[0] += seconds
            yield [
                fetch_proposal.Detections(frame.keyframe.key, [], 'given up')
                for frame in frames[first : first + 2]
            ]

    monkeypatch.setattr(tqdm.std, 'time', lambda: now[0])
    monkeypatch.setattr(fetch_proposal, 'detect_all', detect_all)
    clip = fetch_proposal.parse_clip('aaaaaaaaaaa_000010_000018')
    planned = fetch_proposal.plan_frames([fetch_proposal.Keyframe(clip, 13)], 4, tmp_path)
    (tmp_path / 'kinetics_train.csv').touch()
    args = fetch_proposal.parse_args([f'--avakinetics_root={tmp_path}', TINY[0]])
    fetch_proposal.detect_missing(
        {frame.keyframe.key: frame for frame in planned}, args.config, args
    )
    assert len(planned) == 8 and '| 4/8 [00:01<00:02,' in capsys.readouterr().err


def test_the_settings_stop_at_the_first_failure(tmp_path):
    """Pasted into the wrong folder, they copy nothing and set nothing."""
    (tmp_path / 'tools/data/ava_kinetics').mkdir(parents=True)
    (tmp_path / 'mine.py').touch()
    (block,) = readme_commands('## Settings')
    block = block.replace('/path/to/mmaction2', str(tmp_path))
    done = subprocess.run(
        ['/bin/sh', '-c', f'{block}\necho "[$AVAKINETICS_ROOT]"'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == '[]\n' and 'cut_kinetics.py' in done.stderr
    assert not list((tmp_path / 'tools/data/ava_kinetics').iterdir())


def test_the_table_of_messages_has_those_of_the_scripts():
    """Where a message has parts that vary, the table has dots."""
    said = ' '.join((REPO / script).read_text() for script in SCRIPTS)
    said = re.sub(r"'\n\s+f?'", '', said)  # a string goes on in the next line
    rows = (REPO / 'README.md').read_text().split('| message | what to do |')[1].split('\n\n')[0]
    messages = [re.findall('`(.*?)`', row.split('|')[1]) for row in rows.splitlines()[2:]]
    assert len(messages) > 20
    for message in filter(None, sum(messages, [])):
        assert all(part in said for part in message.split(' ... ')), message


def make_setup(folder, python: str) -> subprocess.CompletedProcess:
    """`make setup` in a copy of the Makefile, with a Python that can do what this script says."""
    shutil.copy(REPO / 'Makefile', folder)
    (folder / 'requirements.txt').touch()
    (folder / 'python').write_text(f'#!/bin/sh\n{python}\n')
    (folder / 'python').chmod(0o755)
    command = ['make', '--no-print-directory', 'setup', f'PYTHON={folder}/python']
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_make_says_which_python_it_needs(tmp_path):
    done = make_setup(tmp_path, 'exit 1')  # as an older one does when it is asked for its version
    assert done.returncode and not (tmp_path / '.venv').exists()
    assert done.stdout.startswith('error: Python 3.11 or newer is needed; run make with PYTHON=')


def test_make_recovers_from_an_environment_of_an_older_python(tmp_path):
    (tmp_path / '.venv/bin').mkdir(parents=True)
    (tmp_path / '.venv/bin/python').write_text('#!/bin/sh\nexit 1\n')
    (tmp_path / '.venv/bin/python').chmod(0o755)
    done = make_setup(tmp_path, f'exec {sys.executable} "$@"')
    assert done.returncode == 0 and (tmp_path / '.venv/pyvenv.cfg').exists(), done.stderr
