#!/usr/bin/env python3
"""Step 4: turn the clips into JPEG frames.

Reads ROOT/videos/<clip>.mp4 and writes ROOT/rawframes/<clip>/img_%05d.jpg from img_00001.jpg on, as
many as the clip's name says: 30 a second. A folder that is complete and newer than its clip is
skipped, any other is made again; it appears under its name only when it is whole. Clips that could
not be used are in ROOT/reports/extract_rgb_frames.csv with the reason.

    python3 extract_rgb_frames.py --avakinetics_root=$MMACTION2/data/ava_kinetics
"""

import argparse
import contextlib
import csv
import ctypes
import fcntl
import logging
import os
import re
import shutil
import signal
import sys
import uuid
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Callable, Iterator

from tqdm import tqdm

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30
CLIP_NAME = re.compile(r'[A-Za-z0-9_-]{11}_[0-9]{6}_[0-9]{6}')
MAX_PIXELS = 7680 * 4320  # a header that claims larger pictures would cost gigabytes of memory
WORK = 'rawframes/.extract_rgb_frames'  # folder of unfinished frames in ROOT
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
AHEAD = 2000  # items that a cluster is given at once
CHUNK = 256  # clips that a worker looks through at once
# of libjpeg; the PSNR is 0.4 to 0.5 dB above that of ffmpeg's -q:v 2: benchmarks/README.md
QUALITY = 92
BT709, FULL_RANGE = 1, 2  # matrix_coefficients of ITU-T H.273, FFmpeg's AVCOL_RANGE_JPEG


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Step 4: turn the clips into JPEG frames.')
    parser.add_argument(
        '--avakinetics_root',
        type=Path,
        default=MMACTION2 / 'data/ava_kinetics',
        metavar='DIR',
        help='folder of the data set that is made (default: %(default)s)',
    )
    parser.add_argument(
        '--num_workers',
        type=int,
        default=-1,
        metavar='N',
        help='parallel processes (default: all CPUs)',
    )
    parser.add_argument(
        '--dask_scheduler',
        metavar='ADDRESS',
        help='work on the Dask cluster of this scheduler, such as tcp://host:8786, not on '
        'this machine',
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='extract clips again that are complete already'
    )
    args = parser.parse_args(argv)
    if args.num_workers < 1 and args.num_workers != -1:
        sys.exit('error: --num_workers must be 1 or more, or -1 for all CPUs')
    return args


def count_frames(clip: str) -> int:
    """How many frames a clip of this name has."""
    return (int(clip[-6:]) - int(clip[-13:-7])) * FPS


def is_complete(clip: str, root: Path) -> bool:
    """Whether a clip has all its frames, none of them empty or older than the clip."""
    try:
        clip_time = os.stat(root / f'videos/{clip}.mp4').st_mtime
        folder = os.open(root / 'rawframes' / clip, os.O_RDONLY)
    except OSError:
        return False
    try:
        frames = (
            os.stat(f'img_{index:05d}.jpg', dir_fd=folder)
            for index in range(1, count_frames(clip) + 1)
        )
        return all(frame.st_size and frame.st_mtime >= clip_time for frame in frames)
    except OSError:
        return False
    finally:
        os.close(folder)


def find_complete(clips: list[str], root: Path) -> list[str]:
    """Those of the clips that are extracted already."""
    return [clip for clip in clips if is_complete(clip, root)]


def full_range() -> tuple:
    """Tables for luma, 16 to 235 in video, and chroma, 16 to 240, to the 0 to 255 of JPEG."""
    import numpy as np

    return tuple(
        np.clip((np.arange(256) - offset) * 255 / span + base, 0, 255).round().astype(np.uint8)
        for offset, span, base in ((16, 219, 0), (128, 224, 128))
    )


def encode_jpeg(frame, luma, chroma) -> bytes:
    """A frame of PyAV as JPEG.

    Only the range of its planes is changed, without going through RGB, which costs more.
    """
    import cv2
    import numpy as np
    import simplejpeg

    if (
        frame.format.name not in ('yuv420p', 'yuvj420p') or frame.colorspace == BT709
    ):  # only in clips of other programs
        frame = frame.reformat(format='yuvj420p', dst_colorspace='ITU601', dst_color_range='JPEG')
    planes = [
        np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
        for plane in frame.planes
    ]
    if frame.format.name == 'yuvj420p' or frame.color_range == FULL_RANGE:
        planes = [np.ascontiguousarray(plane) for plane in planes]
    else:
        planes = [cv2.LUT(plane, table) for plane, table in zip(planes, (luma, chroma, chroma))]
    return simplejpeg.encode_jpeg_yuv_planes(*planes, QUALITY)


def extract_clip(clip: str, root: Path) -> str | None:
    """Extract one clip's frames into their folder; return None, or why that cannot be done."""
    import av

    frames, expected, count, tables = root / 'rawframes' / clip, count_frames(clip), 0, full_range()
    work = (
        root / WORK / uuid.uuid4().hex
    )  # its own: on a cluster, two workers may happen to do the same clip
    work.mkdir()
    try:
        with av.open(str(root / f'videos/{clip}.mp4'), format='mov') as video:
            stream = video.streams.video[0]
            stream.thread_count, stream.thread_type = 1, 'NONE'  # one thread a process beats many
            stream.codec_context.options = {'max_pixels': str(MAX_PIXELS)}
            for count, frame in enumerate(video.decode(stream), 1):
                if count <= expected:
                    (work / f'img_{count:05d}.jpg').write_bytes(encode_jpeg(frame, *tables))
        if count != expected:
            return f'wrong number of frames: {count} instead of {expected}; cut it again, Step 3'
        if os.path.lexists(frames):
            os.replace(frames, f'{work}.old')
        os.replace(work, frames)
        return None
    except (
        av.FFmpegError,
        IndexError,
        ValueError,
    ) as error:  # no video, no stream of pictures, impossible pictures
        return f'unreadable clip: {getattr(error, "strerror", None) or error}'
    finally:
        for folder in work, f'{work}.old':
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def workspace(path: Path):
    """A hidden folder for unfinished files, of one run at a time; what a killed run left there is
    removed.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = open(path / 'lock', 'w')
    try:
        fcntl.flock(
            lock, fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # the kernel lets go when this process ends, however it ends
    except BlockingIOError:
        sys.exit(f'error: another run of this step is at work in {path.parent}; wait for it to end')
    except OSError:  # of some file servers, such as Lustre mounted without flock
        print(
            f'{path.parent} has no file locks: let no other run of this step work there',
            file=sys.stderr,
        )
    for leftover in path.glob('*/'):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)
        lock.close()


def shielded(function: Callable, item: tuple) -> tuple:
    """An item and its answer, in a process that leaves Ctrl-C to its parent and ends with it,
    however that ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return item, function(*item)


def run_all(function: Callable, items: list[tuple], args: argparse.Namespace) -> Iterator[tuple]:
    """Yield (item, answer, None) in any order, or (item, None, reason) for an item whose workers
    died.
    """
    if not args.dask_scheduler:
        from joblib import Parallel, cpu_count, delayed

        workers = min(args.num_workers if args.num_workers > 0 else cpu_count(), len(items)) or 1
        if workers == 1:  # in this process, which must not be shielded
            yield from ((item, function(*item), None) for item in items)
            return
        try:
            for item, answer in Parallel(workers, return_as='generator_unordered')(
                delayed(shielded)(function, item) for item in items
            ):
                yield item, answer, None
        except BrokenProcessPool:
            sys.exit(
                'error: a worker process was killed, as it happens when memory runs out; use '
                'fewer with --num_workers, '
                'then run the same command again'
            )
        return
    try:
        from distributed import CancelledError, Client, KilledWorker, as_completed
        from distributed.comm import CommClosedError
    except ImportError:
        sys.exit('error: --dask_scheduler needs Dask; pip install distributed')
    logging.disable()  # Dask logs tracebacks of what is told below
    try:
        client = Client(args.dask_scheduler, timeout=10)
        client.wait_for_workers(1, timeout=30)
    except (OSError, ValueError) as error:
        reason = str(error).split('\n')[0]
        sys.exit(
            f'error: no Dask scheduler with workers at {args.dask_scheduler} ({reason}); '
            'start them first'
        )
    with client:
        suspects = []
        for batch, ahead in (
            (items, AHEAD),
            (suspects, 1),
        ):  # one by one, as most were only beside the one that killed
            waiting = iter(batch)
            todo = {
                client.submit(function, *item, pure=False): item for item in islice(waiting, ahead)
            }
            futures = as_completed(list(todo))
            for future in futures:
                item = todo.pop(future)
                try:
                    yield item, future.result(), None
                except KilledWorker:
                    if batch is items:
                        suspects.append(item)
                    else:
                        yield (
                            item,
                            None,
                            'given up: the workers of the cluster that had it were killed',
                        )
                except (CancelledError, CommClosedError):
                    sys.exit(
                        f'error: the Dask scheduler at {args.dask_scheduler} went away; run '
                        'the same command again'
                    )
                if following := next(waiting, None):
                    future = client.submit(function, *following, pure=False)
                    todo[future] = following
                    futures.add(future)


def extract(args: argparse.Namespace, root: Path) -> None:
    """Extract the clips that are not complete yet, write the report, say what came of it."""
    files = sorted(name for name in os.listdir(root / 'videos') if not name.startswith('.'))
    clips = [
        name[:-4] for name in files if name.endswith('.mp4') and CLIP_NAME.fullmatch(name[:-4])
    ]
    if not clips:
        sys.exit(f'error: {root / "videos"} holds no clip; do Step 3 (cut_kinetics.py) first')
    known = {f'{clip}.mp4' for clip in clips}
    rows = [
        (name, 'not a clip: no name like ID_000001_000005.mp4')
        for name in files
        if name not in known
    ]
    there = set()
    with workspace(root / WORK):
        begun = (
            sorted(set(clips).intersection(os.listdir(root / 'rawframes')))
            if not args.overwrite
            else []
        )
        chunks = [(begun[index : index + CHUNK], root) for index in range(0, len(begun), CHUNK)]
        with contextlib.closing(run_all(find_complete, chunks, args)) as answers:
            for _, complete, _ in tqdm(
                answers, total=len(chunks), desc='check', unit='chunk', delay=1
            ):
                there.update(complete or ())
        left = [(clip, root) for clip in clips if clip not in there]
        with contextlib.closing(run_all(extract_clip, left, args)) as answers:
            for (clip, _), problem, failure in tqdm(
                answers, total=len(left), desc='extract', unit='clip', delay=1
            ):
                if problem or failure:
                    rows.append((clip, problem or failure))
    report = root / 'reports/extract_rgb_frames.csv'
    report.parent.mkdir(exist_ok=True)
    part = report.with_name(f'.{report.name}.part')
    with open(
        part, 'w', newline='', encoding='utf-8', errors='backslashreplace'
    ) as file:  # pandas' import costs 0.3 s
        csv.writer(file, lineterminator='\n').writerows([('clip', 'reason'), *sorted(rows)])
    os.replace(part, report)

    failed = len(rows) - (len(files) - len(clips))
    print(
        f'{len(clips) - failed} of {len(clips)} clips in {root / "rawframes"} '
        f'({len(left) - failed} extracted now, '
        f'{len(there)} there already)'
    )
    for reason, count in Counter(row[1].split(':')[0] for row in rows).most_common():
        print(f'  {count} left out: {reason}')
    print(f'  report: {report}')
    if failed == len(clips):
        sys.exit('error: not one clip could be extracted; the report says why')


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    sys.stdout.reconfigure(errors='backslashreplace')  # names of files may be no UTF-8
    args = parse_args(argv)
    try:
        root = args.avakinetics_root.absolute()
        if not (root / 'videos').is_dir():
            sys.exit(
                f'error: {root / "videos"} not found; do Step 3 (cut_kinetics.py) or set '
                '--avakinetics_root'
            )
        extract(args, root)
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; fix it, then run the same command again')
    except KeyboardInterrupt:
        print('interrupted; run the same command again', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # while the workers end, nothing is left to interrupt
        signal.signal(number, signal.SIG_IGN)
