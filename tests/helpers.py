"""What the tests share: the scripts as a user runs them, and numbered sources of every kind that
Kinetics-700 holds.
"""

import contextlib
import csv
import hashlib
import importlib
import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import psutil

import draw

REPO = Path(__file__).parent.parent
HOLD = str(REPO / 'tests/tools/hold')
TINY = [f'--config={REPO}/tests/tiny_detector.py', f'--checkpoint={REPO}/tests/tiny_detector.pth']


def run(script, *arguments, code=0, **options) -> subprocess.CompletedProcess:
    """Run one of the scripts as a user does; fail if the exit code is another, or a traceback is
    shown.
    """
    done = subprocess.run(
        [sys.executable, str(REPO / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        **options,
    )
    assert 'Traceback' not in done.stdout + done.stderr, done.stderr
    assert done.returncode == code, f'{done.returncode}\n{done.stdout}\n{done.stderr}'
    return done


def errors(done: subprocess.CompletedProcess) -> str:
    """Return what a failed run says: exactly one line that starts with `error: `."""
    lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1, done.stderr
    assert done.stderr.strip().splitlines()[-1] == lines[0], done.stderr
    return lines[0]


def here(script, *arguments, code=0, cwd='.') -> subprocess.CompletedProcess:
    """Do what `run` does in this process, which saves 1 to 6 s of imports.

    Steps 3 and 4 have one worker, which is this process, too, unless `--num_workers` is given.
    """
    if script in ('cut_kinetics.py', 'extract_rgb_frames.py'):
        arguments = ('--num_workers=1', *arguments)
    out, err = (io.TextIOWrapper(io.BytesIO(), 'utf-8') for _ in range(2))
    returned = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(cwd):
        try:
            importlib.import_module(Path(script).stem).main([str(value) for value in arguments])
        except SystemExit as end:
            returned = 1 if isinstance(end.code, str) else end.code
            print(end.code if isinstance(end.code, str) else '', file=err)
    texts = []
    for stream in out, err:
        stream.seek(0)
        texts.append(stream.read())
    done = subprocess.CompletedProcess([script, *arguments], returned, *texts)
    assert done.returncode == code, f'{done.returncode}\n{done.stdout}\n{done.stderr}'
    return done


def cut(world: Path, *options, by=here, **kwargs) -> subprocess.CompletedProcess:
    """Run Step 3 in the folders of the fixture `world`."""
    return by(
        'cut_kinetics.py',
        f'--avakinetics_anotation={world}/ava_kinetics_v1_0',
        f'--kinetics_list={world}/kinetics700/list.txt',
        f'--avakinetics_root={world}/root',
        *options,
        cwd=world,
        **kwargs,
    )


def prepare(world: Path, *options, **kwargs) -> subprocess.CompletedProcess:
    """Run Step 5 in the folders of the fixture `world`."""
    return here(
        'prepare_annotation.py',
        f'--avakinetics_anotation={world}/ava_kinetics_v1_0',
        f'--avakinetics_root={world}/root',
        *options,
        **kwargs,
    )


def refused(script, *arguments) -> str:
    """Return the line with which a script ends with an error; runs it in this process."""
    return errors(here(script, *arguments, code=1))


BAR = re.compile(r'(cut|extract|check|detect): .*\]|\s*')


def stderr_lines(text: str) -> list[str]:
    """Return the lines of stderr without progress bars; text after a bar stays on its line."""
    return [line for line in re.split(r'[\r\n]', text) if not BAR.fullmatch(line)]


def start(command: list, **options) -> subprocess.Popen:
    """Start a step in a session of its own, by which `kill_tree` knows what belongs to it."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, start_new_session=True, **pipes | options)


def wait_until(condition, process: subprocess.Popen) -> None:
    """Wait until a process brings something about; fail if it ends before."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, 'it did not come about within 300 s'
        if process.poll() is not None and not condition():
            out, err = kill_tree(process)
            raise AssertionError(f'ended with {process.returncode} before that: {out}{err}')
        time.sleep(0.01)


def stopping_environment(notes: Path, at: str, how: str = 'hold') -> dict[str, str]:
    """Return the environment in which Python and its workers stop at an event, see tools/hold."""
    notes.mkdir(parents=True, exist_ok=True)
    return os.environ | dict(
        PYTHONPATH=os.pathsep.join(filter(None, [HOLD, os.environ.get('PYTHONPATH')])),
        HOLD_AT=at,
        HOLD_NOTES=str(notes),
        HOLD_HOW=how,
    )


def stopped_processes(notes: Path) -> list[int]:
    """Return the ids of the processes that have come to the event."""
    return [int(path.name) for path in notes.iterdir() if path.name != 'go']


@contextlib.contextmanager
def stopped_at(command: list, notes: Path, at: str, processes: int = 1, how: str = 'hold'):
    """Start a step; yield it once so many processes have come to `at`; kill what is left of it."""
    process = start(command, env=stopping_environment(notes, at, how))
    try:
        wait_until(lambda: len(stopped_processes(notes)) >= processes, process)
        yield process
    finally:
        kill_tree(process)


def kill_tree(process: subprocess.Popen) -> tuple[str | None, str | None]:
    """Kill all that runs in the session of a process; return its stdout and stderr."""
    while members := session_members(process.pid):
        for number in signal.SIGSTOP, signal.SIGKILL:  # so that none sees another go
            for member in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
    with contextlib.suppress(ValueError):  # its pipes were read to their ends before
        return process.communicate(timeout=300)
    return None, None


def session_members(session: int) -> list[int]:
    """Return the processes of a session that have not ended, in any process group."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
    return members


def snapshot(folder: Path) -> dict[str, str]:
    """Return every file and link under a folder with the digest of its content."""
    tree = {}
    for path in sorted(Path(folder).rglob('*')):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            tree[name] = '-> ' + os.readlink(path)
        elif path.is_file():
            tree[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return tree


def age(folder: Path) -> None:
    """Set all times in a folder to 2001, so that what is written later is newer on any clock."""
    for path in folder.rglob('*'):
        os.utime(path, (1e9, 1e9), follow_symlinks=False)


def read_csv(path: Path) -> list[list[str]]:
    with open(path, newline='') as file:
        return list(csv.reader(file))


def read_report(root: Path, name: str) -> list[list[str]]:
    """Read the rows of a report without their header."""
    return read_csv(root / f'reports/{name}.csv')[1:]


def annotation_rows(video: str, second: float, count: int = 1) -> str:
    """Return lines of an AVA-Kinetics csv; with a count of 0 the row of two columns."""
    if not count:
        return f'{video},{second:.6f}\n'
    return ''.join(
        f'{video},{second:.6f},0.1{index}00,0.2,0.5,0.9,{12 + index}\n' for index in range(count)
    )


SIZE = (160, 120)
KEYFRAME = f'img_{2 * draw.FPS + 1:05d}.jpg'  # the raw frame two seconds after a clip's start
CACHE = None  # a folder, where encoded videos are kept for the next test
# what a source is like where it differs from 10 s of draw.FPS, H.264, mp4, without sound
VARIANTS = {
    '15 fps': dict(fps=15),
    '20 fps': dict(fps=20),
    '23.976 fps': dict(fps='24000/1001'),
    '24 fps': dict(fps=24),
    '25 fps': dict(fps=25),
    '28 fps': dict(fps=28),
    '29.97 fps': dict(fps='30000/1001'),
    '30 fps': dict(fps=30),
    '50 fps': dict(fps=50),
    '59.94 fps': dict(fps='60000/1001'),
    '60 fps': dict(fps=60),
    'variable rate mp4': dict(fps=50, drop=True),
    'variable rate mkv': dict(fps=50, drop=True, suffix='mkv'),
    'sound 0.1 s early': dict(lead=0.1),
    'sound 1 s early': dict(lead=1.0, seconds=9),
    'mkv with sound': dict(fps=25, suffix='mkv', sound=True),
    'webm': dict(
        fps=25,
        suffix='webm',
        options=('-c:v', 'libvpx', '-deadline', 'realtime', '-cpu-used', '8', '-b:v', '1M'),
    ),
    'first timestamp 1.5 s': dict(options=('-output_ts_offset', '1.5'), suffix='mkv'),
    'transport stream': dict(fps=25, suffix='ts', sound=True),
    'rotated': dict(rotate=True),
    'odd sides': dict(size=(161, 121), options=('-pix_fmt', 'yuv444p')),
    'B-frames, one key frame': dict(options=('-preset', 'medium', '-bf', '5', '-g', '900')),
    'key frames only': dict(options=('-g', '1')),
    'ends 0.7 s early': dict(seconds=9.3),
    '10 bits': dict(options=('-pix_fmt', 'yuv420p10le')),
    'full range': dict(options=('-pix_fmt', 'yuvj420p')),
}


def number_times(variant: dict) -> dict[int, float]:
    """Return the source time in seconds of each numbered frame that a variant holds."""
    fps = Fraction(variant.get('fps', draw.FPS))
    numbers = range(round(variant.get('seconds', 10) * fps))
    if variant.get('drop'):  # by turns every third picture, every one, every other one
        numbers = [n for n in numbers if n % (3 - 2 * (n // 40) % 3) == 0]
    lead = variant.get('lead', 0)
    return {n: float(n / fps) + (lead if lead > 0.2 else 0) for n in numbers}


def numbered_source(path: Path, variant: dict) -> None:
    """Encode variant['seconds'] (10) of numbered pictures, or copy them out of CACHE.

    Frame n is due at n / fps.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if CACHE is None:
        return encode_numbers(path, variant)
    name = hashlib.sha256(repr(sorted(variant.items())).encode()).hexdigest()[:16]
    drawn = CACHE / f'{name}{path.suffix}'
    if not drawn.exists():
        part = CACHE / f'{uuid.uuid4().hex}{path.suffix}'
        encode_numbers(part, variant)
        os.replace(part, drawn)
    shutil.copyfile(drawn, path)


def encode_numbers(path: Path, variant: dict) -> None:
    """Encode what `numbered_source` describes."""
    size, fps = variant.get('size', SIZE), variant.get('fps', draw.FPS)
    times = number_times(variant)

    def frames():
        for number in range(max(times) + 1):
            image = np.full((size[1], size[0], 3), 90, np.uint8)
            image[:, number % size[0]] = (0, 200, 200)
            draw.stamp(image, number + variant.get('first', 0))
            yield np.rot90(image) if variant.get('rotate') else image

    before, inputs, options = [], [], list(variant.get('options', ()))
    if 'lead' in variant:
        before += ['-itsoffset', str(variant['lead'])]
    if 'lead' in variant or variant.get('sound'):
        inputs += ['-f', 'lavfi', '-t', '10', '-i', 'sine=frequency=440']
        options += ['-map', '0:v', '-map', '1:a', '-c:a', 'aac']
    if variant.get('drop'):
        options += ['-vf', "select='not(mod(n,3-mod(2*trunc(n/40),3)))'", '-fps_mode', 'vfr']
    if variant.get('rotate'):
        before += ['-noautorotate', '-display_rotation', '-90']
    stored = size[::-1] if variant.get('rotate') else size
    draw.encode(path, frames(), fps, stored, before, inputs, options)


def clip_frames(path: Path) -> list[int]:
    """Return the numbers that a clip's frames show."""
    import decord  # after torch, where a test has that: see conftest.py

    return [draw.read_stamp(frame.asnumpy()[..., ::-1]) for frame in decord.VideoReader(str(path))]


def numbers_between(start: int, end: int) -> list[int]:
    """Return what a clip of these seconds of a source shows, if both have the same frame rate."""
    return list(range(start * draw.FPS, end * draw.FPS))


def fake_frames(folder: Path, clip: str, count: int | None = None) -> None:
    """Make a folder of raw frames that are no images: as many as the name says, or `count`."""
    (folder / clip).mkdir(parents=True)
    if count is None:
        count = (int(clip[-6:]) - int(clip[-13:-7])) * draw.FPS
    for index in range(1, count + 1):
        (folder / clip / f'img_{index:05d}.jpg').write_bytes(b'frame')


class Evil:
    """Runs a program when it is unpickled, which leaves a file in the working directory."""

    def __reduce__(self):
        return os.system, ('touch pwned',)


def load(path: Path) -> object:
    with open(path, 'rb') as file:
        return pickle.load(file)


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU of every box of a (n, 4) with every box of b (m, 4)."""
    corner, end = (
        np.maximum(a[:, None, :2], b[None, :, :2]),
        np.minimum(a[:, None, 2:], b[None, :, 2:]),
    )
    both = np.clip(end - corner, 0, None).prod(-1)
    return both / (
        (a[:, 2:] - a[:, :2]).prod(-1)[:, None] + (b[:, 2:] - b[:, :2]).prod(-1)[None] - both
    )


def assert_same_people(a: np.ndarray, b: np.ndarray) -> None:
    """Compare boxes and scores within 2e-3: batches of another make-up may round otherwise."""
    assert a.shape == b.shape
    np.testing.assert_allclose(a[a[:, 0].argsort()], b[b[:, 0].argsort()], atol=2e-3)


def write_detector_class(folder: Path, name: str, body: str, model: str = '') -> Path:
    """Write a config of the tests' detector as a class with this body; return its path.

    Python has to find the class's module, which is beside the config.
    """
    (folder / f'{name}_config.py').write_text(
        f"_base_ = '{REPO}/tests/tiny_detector.py'\n"
        f"custom_imports = dict(imports=['{name}_module'])\n"
        f"model = dict(type='{name}'{model})\n"
    )
    (folder / f'{name}_module.py').write_text(
        'from mmdet.models import CascadeRCNN\nfrom mmdet.registry import MODELS\n'
        f'@MODELS.register_module()\nclass {name}(CascadeRCNN):\n{body}'
    )
    return folder / f'{name}_config.py'


FRAME_SIZES = [(340, 256), (426, 240), (320, 240), (456, 256)]


def write_root(root: Path, scenes) -> Path:
    """Write clips of four seconds with the frames that Step 6 reads, one keyframe each."""
    rows = ''
    for scene in scenes:
        clip = f'scene-{scene:05d}_000010_000014'
        (root / 'rawframes' / clip).mkdir(parents=True)
        for second in range(4):
            image, boxes = draw.draw_frame(scene, second, FRAME_SIZES[scene % 4])
            cv2.imwrite(str(root / f'rawframes/{clip}/img_{second * draw.FPS + 1:05d}.jpg'), image)
            if second == 2:
                rows += ''.join(
                    '{},12,{:.3f},{:.3f},{:.3f},{:.3f},12,-1\n'.format(clip, *box) for box in boxes
                )
    (root / 'kinetics_train.csv').write_text(rows)
    return root


def documented_config(file: str, number: int, folder: Path):
    """Return a python block of docs/ as a config of MMAction2, based on the installed package's."""
    import mmaction
    from mmengine import Config

    block = re.findall(r'^```python\n(.*?)^```', (REPO / file).read_text(), re.M | re.S)[number]
    assert "_base_ = 'configs/" in block
    path = folder / f'config_{number}.py'
    path.write_text(
        block.replace("_base_ = 'configs/", f"_base_ = '{mmaction.__path__[0]}/.mim/configs/")
    )
    return Config.fromfile(path)
