#!/usr/bin/env python3
"""Step 4: turn the clips into JPEG frames.

Reads ROOT/videos/<clip>.mp4 and writes ROOT/rawframes/<clip>/img_00001.jpg and so on, 30 for each
second in the clip's name. A folder appears under its name when it is complete. One that is complete
and newer than its clip is skipped, any other is made again. Clips that could not be extracted are
in ROOT/reports/extract_rgb_frames.csv, with the reason.

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
from concurrent.futures import FIRST_COMPLETED, CancelledError, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterable, Iterator

import av
import cv2
import numpy as np
import simplejpeg
from joblib import cpu_count
from tqdm import tqdm

if TYPE_CHECKING:
    from distributed import Client

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30
CLIP_NAME = re.compile(r'([A-Za-z0-9_-]{11})_([0-9]{6})_([0-9]{6})')
QUALITY = 92  # of libjpeg; the PSNR is 0.4 to 0.5 dB above that of ffmpeg's -q:v 2
BT709 = 1  # matrix_coefficients of ITU-T H.273
FULL_RANGE = 2  # FFmpeg's AVCOL_RANGE_JPEG
COMPLETE = 'there already'
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
AHEAD = 500  # items that a cluster is given at once
GIVEN_UP = 'given up: the workers of the cluster that had it were killed'


def to_path(text: str) -> Path:
    """The path that an argument names."""
    if not text:
        raise argparse.ArgumentTypeError('it is empty; set its variable as README says')
    return Path(text).expanduser()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Step 4: turn the clips into JPEG frames.')
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
    os.getcwd()  # raises OSError where it was deleted, where workers would crash
    args = parser.parse_args(argv)
    if args.num_workers < 1 and args.num_workers != -1:
        sys.exit('error: --num_workers must be 1 or more, or -1 for all CPUs')
    root = args.avakinetics_root.absolute()
    args.videos, args.frames, args.reports = root / 'videos', root / 'rawframes', root / 'reports'
    args.work = args.frames / '.extract_rgb_frames'
    return args


def count_frames(clip: str) -> int:
    """How many frames a clip of this name has."""
    return (int(clip[-6:]) - int(clip[-13:-7])) * FPS


def is_complete(clip: str, args: argparse.Namespace) -> bool:
    """Whether a clip has exactly its frames, none of them empty or older than the clip."""
    try:
        changed = os.stat(args.videos / f'{clip}.mp4').st_mtime
        entries = os.scandir(args.frames / clip)
        frames = {entry.name: entry.stat() for entry in entries if entry.name.startswith('img_')}
    except OSError:
        return False
    names = {f'img_{index:05d}.jpg' for index in range(1, count_frames(clip) + 1)}
    usable = (frame.st_size and frame.st_mtime >= changed for frame in frames.values())
    return frames.keys() == names and all(usable)


@functools.cache
def full_range() -> list[np.ndarray]:
    """Tables from the range of video, luma 16 to 235 and chroma 16 to 240, to JPEG's 0 to 255."""
    levels = np.arange(256)
    luma, chroma = (levels - 16) * 255 / 219, (levels - 128) * 255 / 224 + 128
    return [np.clip(table, 0, 255).round().astype(np.uint8) for table in (luma, chroma, chroma)]


def encode_jpeg(frame: av.VideoFrame) -> bytes:
    """A frame as JPEG; of our own clips only the range of the planes changes, which costs least."""
    if frame.format.name != 'yuv420p' or frame.colorspace == BT709:  # not of Step 3
        frame = frame.reformat(format='yuvj420p', dst_colorspace='ITU601', dst_color_range='JPEG')
    planes = []
    for plane, table in zip(frame.planes, full_range()):
        values = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        values = np.ascontiguousarray(values[:, : plane.width])
        planes.append(values if frame.color_range == FULL_RANGE else cv2.LUT(values, table))
    return simplejpeg.encode_jpeg_yuv_planes(*planes, QUALITY)


def extract_clip(clip: str, args: argparse.Namespace) -> str | None:
    """Extract a clip's frames into their folder.

    Returns None, COMPLETE if they were there already, or why they cannot be extracted.
    """
    if is_complete(clip, args):
        return COMPLETE
    expected, count = count_frames(clip), 0
    # a folder of its own: on a cluster, two workers may happen to do the same clip
    work = args.work / uuid.uuid4().hex
    work.mkdir()
    try:
        with av.open(str(args.videos / f'{clip}.mp4'), format='mov') as video:
            stream = video.streams.video[0]
            stream.thread_type = 'NONE'  # one thread for each process is faster
            for count, frame in enumerate(video.decode(stream), 1):
                if count <= expected:
                    (work / f'img_{count:05d}.jpg').write_bytes(encode_jpeg(frame))
        if count != expected:
            return f'wrong number of frames: {count}, not {expected}; remove it, run Step 3 again'
        if os.path.lexists(args.frames / clip):
            os.replace(args.frames / clip, f'{work}.old')
        os.replace(work, args.frames / clip)
        return None
    # IndexError: no pictures; AttributeError: no decoder for them
    except (av.FFmpegError, IndexError, AttributeError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or error
        return f'unreadable clip: {reason}; remove it, run Step 3 again'
    finally:
        for folder in work, f'{work}.old':
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def workspace(path: Path):
    """A hidden folder for unfinished files, of one run at a time."""
    path.mkdir(parents=True, exist_ok=True)
    lock = open(path / 'lock', 'w')
    try:
        # the kernel lets go when this process ends, however it ends
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f'error: another run of this step is at work in {path.parent}; wait for it to end')
    except OSError:  # of file servers without locks, such as Lustre mounted without flock
        pass
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)
        lock.close()


def shield() -> None:
    """Make a worker ignore Ctrl-C, which is for its parent, and die with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def connect(address: str) -> tuple[Client, type]:
    """A client of a Dask scheduler, and the error of items whose workers died."""
    try:
        import dask
        from distributed import Client, KilledWorker
    except ImportError:
        sys.exit('error: --dask_scheduler needs Dask; pip install distributed')
    dask.config.set({'distributed.admin.large-graph-warning-threshold': '1 GB'})  # not at a video
    logging.disable()  # Dask would log tracebacks of errors that are reported in one line
    try:
        client = Client(address, timeout=10)
        tqdm.write(f'waiting for the workers of {address}', sys.stderr)
        client.wait_for_workers(1, timeout=30)
        client.upload_file(__file__)
    except (OSError, ValueError) as error:
        sys.exit(f'error: no Dask scheduler with workers at {address}: {error}'.split('\n')[0])
    return client, KilledWorker


def run_all(
    function: Callable, items: Iterable[tuple], args: argparse.Namespace
) -> Iterator[tuple]:
    """Yield (item, answer) in any order; the answer is GIVEN_UP where an item's workers died.

    Items are taken as workers get free.
    """
    workers = args.num_workers if args.num_workers > 0 else cpu_count()
    if workers == 1 and not args.dask_scheduler:  # in this process, where a debugger reaches it
        yield from ((item, function(*item)) for item in items)
        return
    if args.dask_scheduler:
        client, killed = connect(args.dask_scheduler)
        executor, ahead = client.get_executor(pure=False), AHEAD
    else:
        executor, ahead = ProcessPoolExecutor(workers, get_context('spawn'), shield), 2 * workers
        killed = ()  # catches nothing
    waiting, todo = iter(items), {}
    try:
        while True:
            for item in islice(waiting, ahead - len(todo)):
                todo[executor.submit(function, *item)] = item
            if not todo:
                break
            for future in wait(todo, return_when=FIRST_COMPLETED).done:
                item = todo.pop(future)
                try:
                    yield item, future.result()
                except killed:
                    yield item, GIVEN_UP
    except BrokenProcessPool:
        sys.exit(
            'error: a worker process was killed, as it happens when memory runs out; run the same '
            'command again, with fewer processes'
        )
    except CancelledError:
        sys.exit('error: the Dask scheduler went away; run the same command again')
    finally:
        for child in active_children() if todo else ():  # interrupted
            child.kill()
        executor.shutdown(wait=not (killed and todo))  # a cluster's items are cancelled


def extract(args: argparse.Namespace) -> None:
    """Extract the clips that are not complete yet, write the report, say what came of it."""
    if not args.videos.is_dir():
        sys.exit(f'error: {args.videos} not found; run Step 3 or set --avakinetics_root')
    names = sorted(name[:-4] for name in os.listdir(args.videos) if name.endswith('.mp4'))
    items = [(clip, args) for clip in names if CLIP_NAME.fullmatch(clip)]
    if not items:
        sys.exit(f'error: {args.videos} holds no clip; run Step 3 (cut_kinetics.py) first')
    with (
        workspace(args.work),
        contextlib.closing(run_all(extract_clip, items, args)) as answers,
        tqdm(answers, 'extract', len(items), unit='clip', leave=False) as bar,
    ):
        outcomes = {item[0]: answer for item, answer in bar}
    rows = sorted(row for row in outcomes.items() if row[1] not in (None, COMPLETE))
    report = args.reports / 'extract_rgb_frames.csv'
    write_csv(report, [('clip', 'reason'), *rows])

    existing = list(outcomes.values()).count(COMPLETE)
    print(
        f'clips with frames in {args.frames}: {len(items) - len(rows) - existing:,} new, '
        f'{existing:,} existing, {len(rows):,} failed'
    )
    for reason, count in Counter(reason.split(':')[0] for _, reason in rows).items():
        print(f'  {count:,} failed: {reason}')
    if rows:
        print(f'  report: {report}')
    if len(rows) == len(items):
        sys.exit('error: not one clip could be extracted; the report says why')


def write(path: Path, content: bytes) -> None:
    """Write a file, which appears when it is complete; nothing changes if the content is equal."""
    part = path.with_suffix('.part')
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        part.write_bytes(content)
        os.replace(part, path)


def write_csv(path: Path, rows: list[tuple]) -> None:
    table = io.StringIO()
    csv.writer(table, lineterminator='\n').writerows(rows)
    write(path, table.getvalue().encode('utf-8', 'backslashreplace'))


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    sys.stderr = sys.stderr or open(os.devnull, 'w')  # None where it is closed
    try:
        extract(parse_args(argv))
        print(end='', flush=True)
    except BrokenPipeError:  # `| head` has read enough
        os._exit(141)
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; fix it, then run the same command again')
    except KeyboardInterrupt:
        print('interrupted; run the same command again', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':  # under the name by which workers import it
    sys.path.insert(0, os.path.dirname(__file__))  # python -P leaves it out
    importlib.import_module(Path(__file__).stem).main()
