#!/usr/bin/env python3
"""Step 4: turn the clips into JPEG frames.

Reads ROOT/videos/<clip>.mp4 and writes ROOT/rawframes/<clip>/img_%05d.jpg from img_00001.jpg on, as many as the clip's
name says: 30 a second. A folder that is complete is skipped, an incomplete one is made again; it appears under its
name only when it is whole. Clips that could not be used are in ROOT/reports/extract_rgb_frames.csv with the reason.

    python3 extract_rgb_frames.py --avakinetics_root=$MMACTION2/data/ava_kinetics
"""
import signal

if __name__ == '__main__':  # a Ctrl-C during the imports waits for their end: a line in place of a traceback
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})

import argparse
import contextlib
import csv
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Iterable

import av
import cv2
import filelock
import numpy as np
import simplejpeg
from joblib import Parallel, delayed, parallel_config
from joblib.parallel import get_active_backend
from tqdm import tqdm

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30
CLIP_NAME = re.compile(r'(?P<id>[A-Za-z0-9_-]{11})_(?P<start>[0-9]{6})_(?P<end>[0-9]{6})')
MAX_PIXELS = 7680 * 4320  # a header that claims larger pictures would cost gigabytes of memory
WORK = 'rawframes/.extract_rgb_frames'  # folder of unfinished frames in ROOT
MAX_DASK_WORKERS = 1000  # twice as many tasks wait in the cluster
QUALITY = 92  # of libjpeg; the PSNR is 0.4 to 0.5 dB above that of ffmpeg's -q:v 2: benchmarks/README.md
BT709 = 1  # ITU-T H.273 matrix_coefficients
# Video has 16 to 235 for black to white and 16 to 240 for colours, JPEG 0 to 255 for both
FULL_LUMA, FULL_CHROMA = (np.clip((np.arange(256) - offset) * 255 / span + base, 0, 255).round().astype(np.uint8)
                          for offset, span, base in ((16, 219, 0), (128, 224, 128)))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Step 4: turn the clips into JPEG frames.',
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--avakinetics_root', type=Path, default=MMACTION2 / 'data/ava_kinetics', metavar='DIR',
                        help='folder of the data set that is made')
    parser.add_argument('--num_workers', type=int, default=-1, metavar='N', help='parallel processes; -1: all CPUs')
    parser.add_argument('--dask_scheduler', metavar='ADDRESS', default=argparse.SUPPRESS,
                        help='work on the Dask cluster of this scheduler, such as tcp://host:8786, not on this machine')
    parser.add_argument('--overwrite', action='store_true', help='extract clips again that are complete already')
    args = argparse.Namespace(**{'dask_scheduler': None, **vars(parser.parse_args(argv))})
    args.num_workers = args.num_workers if args.num_workers > 0 else -1
    return args


def frame_names(clip: str) -> set[str]:
    """The names of all frames that a clip of this name has."""
    name = CLIP_NAME.fullmatch(clip)
    return {f'img_{index:05d}.jpg' for index in range(1, (int(name['end']) - int(name['start'])) * FPS + 1)}


def encode_jpeg(frame: av.VideoFrame) -> bytes:
    """A frame as JPEG. Its planes go to the encoder as they are but for their range: no way by RGB, which costs more."""
    if frame.format.name not in ('yuv420p', 'yuvj420p') or frame.colorspace == BT709:  # never so in a clip of Step 3
        frame = frame.reformat(format='yuvj420p', dst_colorspace='ITU601', dst_color_range='JPEG')
    planes = [np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, :plane.width]
              for plane in frame.planes]
    if frame.format.name == 'yuvj420p' or frame.color_range == av.video.reformatter.ColorRange.JPEG:
        planes = [np.ascontiguousarray(plane) for plane in planes]
    else:
        planes = [cv2.LUT(plane, table) for plane, table in zip(planes, (FULL_LUMA, FULL_CHROMA, FULL_CHROMA))]
    return simplejpeg.encode_jpeg_yuv_planes(*planes, QUALITY)


def extract_clip(clip: str, root: Path, overwrite: bool) -> tuple[str, str, str]:
    """Extract one clip's frames into their folder: the clip, 'extracted', 'kept' or 'failed', and why it failed."""
    frames, expected, count = root / 'rawframes' / clip, frame_names(clip), 0
    if frames.is_dir() and not overwrite and expected <= set(os.listdir(frames)):
        return clip, 'kept', ''
    # a folder of its own: on a cluster, two workers may happen to do the same clip
    with tempfile.TemporaryDirectory(dir=root / WORK, ignore_cleanup_errors=True) as folder:
        work = Path(folder) / clip
        work.mkdir()
        try:
            with av.open(str(root / f'videos/{clip}.mp4'), format='mov') as video:
                stream = video.streams.video[0]
                stream.thread_count, stream.thread_type = 1, 'NONE'  # one thread a process beats many
                stream.codec_context.options = {'max_pixels': str(MAX_PIXELS)}
                for count, frame in enumerate(video.decode(stream), 1):
                    if count > len(expected):
                        break
                    (work / f'img_{count:05d}.jpg').write_bytes(encode_jpeg(frame))
        except (av.FFmpegError, IndexError, ValueError) as error:  # no video, no stream of pictures, impossible pictures
            return clip, 'failed', f'unreadable clip: {getattr(error, "strerror", None) or error}'
        if count != len(expected):
            return clip, 'failed', f'wrong number of frames: {count} instead of {len(expected)}; cut it again, Step 3'
        if os.path.lexists(frames):
            os.replace(frames, f'{work}.old')
        os.replace(work, frames)
    return clip, 'extracted', ''


@contextlib.contextmanager
def workspace(path: Path):
    """A folder for unfinished files that belongs to this run alone, emptied before and removed after."""
    path.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path / 'lock')  # the kernel lets go when this process ends, however it ends
    try:
        lock.acquire(blocking=False)
    except (filelock.Timeout, FileNotFoundError):  # the latter where the other run has just ended
        sys.exit(f'error: another run of this step is at work in {path.parent}; wait for it to end')
    try:
        for leftover in set(path.iterdir()) - {path / 'lock'}:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        lock.release()


@contextlib.contextmanager
def in_parallel(tasks: Iterable, args: argparse.Namespace, **options):
    """The answers of joblib tasks as they come, from local processes or the cluster of --dask_scheduler."""
    with dask_cluster(args.dask_scheduler) if args.dask_scheduler else contextlib.nullcontext():
        os.environ['PYTHONWARNINGS'] = 'ignore'  # joblib would warn of what an interruption leaves, here and in processes
        warnings.filterwarnings('ignore', module='joblib')
        # workers inherit that these are ignored: interruptions are for this process alone
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        answers = Parallel(n_jobs=args.num_workers, return_as='generator_unordered', **options)(tasks)
        with contextlib.closing(answers):  # which ends the tasks that are under way, when this run is interrupted
            for number, handler in handlers.items():
                signal.signal(number, handler)
            try:
                yield answers
            except BrokenProcessPool:
                sys.exit('error: a worker process was killed, as it happens when memory runs out; use fewer with '
                         '--num_workers, then the same command continues')


@contextlib.contextmanager
def dask_cluster(address: str):
    """Send joblib's work to the Dask cluster of the scheduler at this address."""
    try:
        import distributed
    except ImportError:
        sys.exit('error: --dask_scheduler needs Dask; pip install distributed')
    logging.disable()  # Dask logs what is told below, with tracebacks
    try:
        client = distributed.Client(address, timeout=10)
        client.wait_for_workers(1, timeout=30)
    except Exception as error:  # whatever answers at such an address
        reason = (str(error) or type(error).__name__).splitlines()[0]
        sys.exit(f'error: no Dask scheduler with workers at {address} ({reason}); start them first')

    def submit(task, callback=None):
        job = submit_quietly(task, callback)
        job.add_done_callback(lambda job: job.exception() and callback(job.exception()))
        return job

    with client, parallel_config('dask', client=client):
        # joblib 1.6 tells nobody of a task whose workers died time and again, and waits for it for ever; it would work
        # here where one worker has joined so far, and send no more than that many need where others join later
        backend = get_active_backend()[0]
        submit_quietly, backend.submit, backend.effective_n_jobs = backend.submit, submit, lambda n_jobs: MAX_DASK_WORKERS
        try:
            yield client
        except (CancelledError, distributed.KilledWorker) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            sys.exit(f'error: the Dask cluster at {address} failed ({reason}); mend it, then the same command continues')


def write_report(path: Path, header: list[str], rows: list[tuple]) -> None:
    """Write a csv beside its final name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix('.part'), 'w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        csv.writer(file, lineterminator='\n').writerows([header, *rows])
    os.replace(path.with_suffix('.part'), path)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    root = args.avakinetics_root.absolute()
    if not (root / 'videos').is_dir():
        sys.exit(f'error: {root / "videos"} not found; do Step 3 (cut_kinetics.py) or set --avakinetics_root')
    files = sorted(entry.name for entry in os.scandir(root / 'videos') if not entry.name.startswith('.'))
    clips = [name[:-4] for name in files if name.endswith('.mp4') and CLIP_NAME.fullmatch(name[:-4])]
    if not clips:
        sys.exit(f'error: {root / "videos"} holds no clip; do Step 3 (cut_kinetics.py) first')
    known = {f'{clip}.mp4' for clip in clips}
    rows = [(name, 'not a clip: no name like ID_000001_000005.mp4') for name in files if name not in known]

    counts, report = Counter(), root / 'reports/extract_rgb_frames.csv'
    with workspace(root / WORK):
        tasks = (delayed(extract_clip)(clip, root, args.overwrite) for clip in clips)
        with in_parallel(tasks, args) as answers:
            for clip, outcome, reason in tqdm(answers, total=len(clips), desc='extract', unit='clip', delay=1):
                counts[outcome] += 1
                if reason:
                    rows.append((clip, reason))
        write_report(report, ['clip', 'reason'], sorted(rows))

    done = counts['extracted'] + counts['kept']
    print(f'{done} of {len(clips)} clips in {root / "rawframes"} ({counts["extracted"]} extracted now, '
          f'{counts["kept"]} there already)')
    for reason, count in Counter(row[1].split(':')[0] for row in rows).most_common():
        print(f'  {count} left out: {reason}')
    print(f'  report: {report}')
    if not done:
        sys.exit('error: not one clip could be extracted; the report says why')


if __name__ == '__main__':
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        main()
    except KeyboardInterrupt:
        print('interrupted; the same command continues', file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; mend it, then the same command continues')
    finally:  # nothing is left to interrupt
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
