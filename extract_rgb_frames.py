#!/usr/bin/env python3
"""Step 4: extract the frames of the clips as JPEGs.

Reads ROOT/videos/<clip>.mp4 and writes ROOT/rawframes/<clip>/img_00001.jpg and so on, FPS frames
for each second of the clip. A folder appears under its name when it is complete. A folder that is
complete and newer than its clip is skipped; any other is extracted again. The clips that failed are
listed in ROOT/reports/extract_rgb_frames.csv, each with the reason.

    python3 extract_rgb_frames.py --avakinetics_root=$MMACTION2/data/ava_kinetics
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import fcntl
import functools
import importlib
import io
import logging
import os
import re
import shutil
import signal
import sys
import uuid
from collections import Counter
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, Callable, Generator, Iterable, Iterator, Literal, NamedTuple

import av
import cv2
import numpy as np
import simplejpeg
from joblib import cpu_count
from tqdm import tqdm

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30  # frames per second of the clips
CLIP_NAME = re.compile(r'([A-Za-z0-9_-]{1,64})_([0-9]{6})_([0-9]{6})')
QUALITY = 92  # of libjpeg; the PSNR is 0.4 to 0.5 dB above that of ffmpeg's -q:v 2
BT709 = 1  # matrix_coefficients of ITU-T H.273
FULL_RANGE = 2  # FFmpeg's AVCOL_RANGE_JPEG
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
MAX_QUEUED = 500  # items that a cluster is given at once
GIVEN_UP = 'given up: the workers of the cluster that had it were killed'


class Clip(NamedTuple):
    """Seconds `start` to `end` of a video, as Step 3 cuts them."""

    name: str
    video_id: str
    start: int
    end: int

    @property
    def num_frames(self) -> int:
        return (self.end - self.start) * FPS


def parse_clip(name: str) -> Clip | None:
    """Parse `<video id>_<start>_<end>`; return None for any other name."""
    match = CLIP_NAME.fullmatch(name)
    return Clip(name, match[1], int(match[2]), int(match[3])) if match else None


class Outcome(NamedTuple):
    """What became of a clip; `reason` says why it failed."""

    status: Literal['new', 'existing', 'failed']
    reason: str = ''


class Options(NamedTuple):
    """What a worker needs to know; the folders are absolute."""

    videos: Path
    rawframes: Path
    scratch: Path  # for unfinished folders


def to_path(text: str) -> Path:
    """Return the path that an argument names."""
    if not text:
        raise argparse.ArgumentTypeError('it is empty; set its variable as README says')
    return Path(text).expanduser()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Step 4: extract the frames of the clips.')
    parser.add_argument(
        '--avakinetics_root',
        type=to_path,
        default=MMACTION2 / 'data/ava_kinetics',
        metavar='DIR',
        help='folder of the data set (default: %(default)s)',
    )
    parser.add_argument(
        '--num_workers',
        type=int,
        default=-1,
        metavar='N',
        help='parallel processes (default: -1, all CPUs)',
    )
    parser.add_argument(
        '--dask_scheduler',
        metavar='ADDRESS',
        help='work on the Dask cluster of this scheduler, such as tcp://host:8786',
    )
    os.getcwd()  # raises OSError if the working directory was deleted; workers would crash
    args = parser.parse_args(argv)
    if args.num_workers < 1 and args.num_workers != -1:
        sys.exit('error: --num_workers must be 1 or more, or -1 for all CPUs')
    args.avakinetics_root = args.avakinetics_root.absolute()
    return args


def is_complete(clip: Clip, options: Options) -> bool:
    """Return whether exactly the clip's raw frames exist, none empty or older than the clip."""
    try:
        clip_time = os.stat(options.videos / f'{clip.name}.mp4').st_mtime
        entries = os.scandir(options.rawframes / clip.name)
        frames = {entry.name: entry.stat() for entry in entries if entry.name.startswith('img_')}
    except OSError:
        return False
    expected = {f'img_{number:05d}.jpg' for number in range(1, clip.num_frames + 1)}
    usable = (frame.st_size > 0 and frame.st_mtime >= clip_time for frame in frames.values())
    return frames.keys() == expected and all(usable)


@functools.cache
def full_range_tables() -> list[np.ndarray]:
    """Return tables for Y, Cb, Cr from the levels of video to those of JPEG.

    Video has luma 16 to 235 and chroma 16 to 240, JPEG has 0 to 255.
    """
    levels = np.arange(256)
    luma = (levels - 16) * 255 / 219
    chroma = (levels - 128) * 255 / 224 + 128
    return [np.clip(table, 0, 255).round().astype(np.uint8) for table in (luma, chroma, chroma)]


def encode_jpeg(frame: av.VideoFrame) -> bytes:
    """Encode a frame as JPEG.

    Step 3 encodes BT.601 in the range of video: a table stretches its levels, which is faster than
    reformat. Frames of other clips are reformatted, which marks them as full range.
    """
    if frame.format.name != 'yuv420p' or frame.colorspace == BT709:
        frame = frame.reformat(format='yuvj420p', dst_colorspace='ITU601', dst_color_range='JPEG')
    planes = []
    for plane, table in zip(frame.planes, full_range_tables()):
        # PyAV's stubs do not say that a plane is a buffer
        values: np.ndarray = np.frombuffer(plane, np.uint8)  # type: ignore[call-overload]
        values = values.reshape(plane.height, plane.line_size)
        values = np.ascontiguousarray(values[:, : plane.width])
        planes.append(values if frame.color_range == FULL_RANGE else cv2.LUT(values, table))
    return simplejpeg.encode_jpeg_yuv_planes(*planes, QUALITY)


def write_frames(clip: Clip, options: Options, folder: Path) -> int:
    """Write the frames of a clip into a folder; return how many its video has."""
    number = 0
    with av.open(str(options.videos / f'{clip.name}.mp4'), format='mov') as video:
        stream = video.streams.video[0]
        stream.thread_type = 'NONE'  # one thread per process is faster
        for number, frame in enumerate(video.decode(stream), 1):
            if number <= clip.num_frames:
                (folder / f'img_{number:05d}.jpg').write_bytes(encode_jpeg(frame))
    return number


def extract_clip(clip: Clip, options: Options) -> Outcome:
    """Extract the raw frames of a clip; their folder appears when it is complete."""
    if is_complete(clip, options):
        return Outcome('existing')
    # a random name: on a cluster, two workers may get the same clip
    unfinished = options.scratch / uuid.uuid4().hex
    replaced = options.scratch / f'{unfinished.name}.old'
    unfinished.mkdir()
    try:
        found = write_frames(clip, options, unfinished)
        if found != clip.num_frames:
            reason = f'wrong number of frames: {found}, not {clip.num_frames}'
            return Outcome('failed', f'{reason}; remove the clip, then run Step 3 again')
        if os.path.lexists(options.rawframes / clip.name):
            os.replace(options.rawframes / clip.name, replaced)
        os.replace(unfinished, options.rawframes / clip.name)
        return Outcome('new')
    # IndexError: no video stream; AttributeError: no decoder for it
    except (av.FFmpegError, IndexError, AttributeError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or str(error)
        return Outcome('failed', f'unreadable clip: {reason}; remove it, then run Step 3 again')
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def workspace(path: Path) -> Iterator[None]:
    """Provide a hidden folder for unfinished files, to one run at a time."""
    path.mkdir(parents=True, exist_ok=True)
    with open(path / 'lock', 'w') as lock:
        try:
            # the kernel releases the lock when this process ends, however it ends
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f'error: another run of this step is at work in {path.parent}; wait for it')
        except OSError:  # a file server without locks, such as Lustre mounted without flock
            pass
        try:
            yield
        finally:
            shutil.rmtree(path, ignore_errors=True)


def init_worker() -> None:
    """Make a worker ignore Ctrl-C, which is for its parent, and die with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def connect(address: str) -> tuple[Executor, tuple[type[Exception], ...]]:
    """Connect to a Dask cluster; return its executor and its errors for killed workers.

    Uploads this script, so that workers can import it.
    """
    try:
        import dask
        from distributed import Client, KilledWorker
    except ImportError:
        sys.exit('error: --dask_scheduler needs Dask; pip install distributed')
    # an item of Step 3 may hold a video, which exceeds the default
    dask.config.set({'distributed.admin.large-graph-warning-threshold': '1 GB'})
    logging.disable()  # Dask would log tracebacks of errors that are reported in one line
    try:
        client = Client(address, timeout=10)
        tqdm.write(f'waiting for the workers of {address}', sys.stderr)
        client.wait_for_workers(1, timeout=30)
        client.upload_file(__file__)
    except (OSError, ValueError) as error:
        sys.exit(f'error: no Dask scheduler with workers at {address}: {error}'.split('\n')[0])
    # ValueError: distributed's own, if a worker is killed while its result is on the way
    return client.get_executor(pure=False), (KilledWorker, ValueError)


def run_all(
    function: Callable, items: Iterable, options: tuple, num_workers: int, scheduler: str | None
) -> Generator[tuple[Any, Any], None, None]:
    """Yield (item, function(item, options)) as items are done; take them as workers become free.

    Runs in this process, in local processes or on a Dask cluster. There, the result is None if an
    item's workers were killed.
    """
    if num_workers == 1 and not scheduler:  # in this process, where a debugger can stop it
        yield from ((item, function(item, options)) for item in items)
        return
    worker_died: tuple[type[Exception], ...] = ()  # catches nothing
    limit = MAX_QUEUED
    if scheduler:
        executor, worker_died = connect(scheduler)
    else:
        num_workers = cpu_count() if num_workers == -1 else num_workers
        executor = ProcessPoolExecutor(num_workers, get_context('spawn'), init_worker)
        limit = 2 * num_workers
    waiting = iter(items)
    running: dict[Future, Any] = {}
    try:
        while True:
            for item in islice(waiting, limit - len(running)):
                running[executor.submit(function, item, options)] = item
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                item = running.pop(future)
                try:
                    yield item, future.result()
                except worker_died:
                    yield item, None
    except BrokenProcessPool:
        sys.exit('error: a worker process was killed: out of memory? run again with fewer of them')
    except CancelledError:
        sys.exit('error: the Dask scheduler went away; run the same command again')
    finally:
        if running:  # left early: kill local workers, or shutdown would wait for them
            for child in active_children():
                child.kill()
        executor.shutdown(wait=not (scheduler and running))  # Dask cancels what is running


def write_if_changed(path: Path, content: bytes) -> None:
    """Write a file atomically; leave an equal one as it is."""
    part = path.with_suffix('.part')
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        part.write_bytes(content)
        os.replace(part, path)


def write_csv(path: Path, rows: list[tuple]) -> None:
    table = io.StringIO()
    csv.writer(table, lineterminator='\n').writerows(rows)
    write_if_changed(path, table.getvalue().encode('utf-8', 'backslashreplace'))


def extract_all(args: argparse.Namespace) -> None:
    """Extract all clips, write the report and print the summary."""
    root = args.avakinetics_root
    options = Options(root / 'videos', root / 'rawframes', root / 'rawframes/.extract_rgb_frames')

    # find the clips
    if not options.videos.is_dir():
        sys.exit(f'error: {options.videos} not found; run Step 3 or set --avakinetics_root')
    names = sorted(name[:-4] for name in os.listdir(options.videos) if name.endswith('.mp4'))
    clips = [clip for clip in map(parse_clip, names) if clip]
    if not clips:
        sys.exit(f'error: {options.videos} holds no clip; run Step 3 (cut_kinetics.py) first')

    # extract those that are not complete; run_all starts with the loop, in the workspace
    results = run_all(extract_clip, clips, options, args.num_workers, args.dask_scheduler)
    with (
        workspace(options.scratch),
        contextlib.closing(results),
        tqdm(results, 'extract', len(clips), unit='clip', leave=False) as bar,
    ):
        outcomes = []
        for clip, outcome in bar:
            if not outcome:  # its workers were killed, perhaps after one had extracted it
                is_lost = not is_complete(clip, options)
                outcome = Outcome('failed', GIVEN_UP) if is_lost else Outcome('new')
            outcomes.append((clip.name, outcome))

    # report what failed
    failed = sorted((clip, outcome.reason) for clip, outcome in outcomes if outcome.reason)
    report = root / 'reports/extract_rgb_frames.csv'
    write_csv(report, [('clip', 'reason'), *failed])
    count = Counter(outcome.status for _, outcome in outcomes)
    print(
        f'clips with frames in {options.rawframes}: {count["new"]:,} new, '
        f'{count["existing"]:,} existing, {len(failed):,} failed'
    )
    for kind, number in Counter(reason.split(':')[0] for _, reason in failed).items():
        print(f'  {number:,} failed: {kind}')
    if failed:
        print(f'  report: {report}')
    if len(failed) == len(clips):
        sys.exit('error: no clip could be extracted; the report says why')


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    sys.stderr = sys.stderr or open(os.devnull, 'w')  # None if it is closed
    try:
        extract_all(parse_args(argv))
        print(end='', flush=True)  # so that a closed pipe is noticed here
    except BrokenPipeError:  # `| head` has read enough
        os._exit(141)
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; fix it, then run the same command again')
    except KeyboardInterrupt:
        print('interrupted; run the same command again', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':  # run as a module: workers of a cluster cannot import __main__
    sys.path.insert(0, os.path.dirname(__file__))  # python -P leaves it out
    importlib.import_module(Path(__file__).stem).main()
