#!/usr/bin/env python3
"""Step 3: cut the annotated clips out of the Kinetics-700 videos.

Reads the annotations of AVA-Kinetics (kinetics_train_v1.0.csv) and the videos of Kinetics-700, from
a list of files or straight from archives, and writes ROOT/videos/<video id>_<start>_<end>.mp4: the
annotated keyframes plus two seconds before and after, within the source, at constant 30 fps. Frame
k of a clip is the frame of the source that is nearest to source time start - source_start + k / 30.

Keyframes without a clip are listed in ROOT/reports/cut_kinetics_train.csv, with the reason. The
same command continues after an interruption. A clip that is older than its listed source is cut
again. With --split val, the annotations, the list and the report have val in their names.

    python3 cut_kinetics.py --avakinetics_anotation=./ava_kinetics_v1_0 \\
        --kinetics_list=$MMACTION2/data/kinetics700/kinetics700_train_list_videos.txt \\
        --avakinetics_root=$MMACTION2/data/ava_kinetics
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import csv
import ctypes
import fcntl
import functools
import gzip
import hashlib
import importlib
import io
import json
import logging
import lzma
import math
import os
import re
import shutil
import signal
import sys
import tarfile
import time
import uuid
from collections import Counter, defaultdict, deque
from concurrent.futures import FIRST_COMPLETED, CancelledError, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from itertools import islice
from multiprocessing import active_children, get_context
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterable, Iterator, NamedTuple

from joblib import cpu_count
from tqdm import tqdm

if TYPE_CHECKING:
    from av import VideoFrame
    from distributed import Client

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30
CONTEXT_S = 2  # kept before and after the keyframes; MMAction2's windows reach 40 frames each way
MAX_OFF_S = 0.75  # how far a frame may be from its due time, where the source has gaps
# Codec delays put the first picture up to 0.1 s behind the sound; beyond 0.2 s, some are missing
MAX_LEAD_S = 0.2
# More SSIM than x264's defaults (medium, crf 23) at a third of the time, below 1.8 times the size.
# Without CABAC (9 % of the size), Step 4 and training decode a quarter faster; large pictures need
# it to stay below 1.8 times the size
ENCODER = dict(preset='superfast', bf='1', b_strategy='0', weightp='0')
SMALL, LARGE = dict(crf='21.4', coder='vlc'), dict(crf='21.6')
LARGE_SIDE = 480  # pixels of the short side, above which LARGE is used
CLIP_FORMAT = 3  # increase it when a change of this script alters the clips
# Only real containers: FFmpeg would also read a playlist, and with it any file that it names
CONTAINERS = 'mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,asf,mpegts,mpeg,ogg'
MAX_PIXELS = 7680 * 4320  # a header that claims larger pictures would cost gigabytes of memory
MAX_BYTES = 2**28  # of a video in an archive; ten seconds have a few MB
DELAY = 5  # pictures by which decoders may report an error late
# FFmpeg's message on intact videos that were cut out of open groups of pictures
HARMLESS = 'mmco: unref short failure'
BT601 = 6  # matrix_coefficients of ITU-T H.273
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
AHEAD = 500  # items that a cluster is given at once
# by their first bytes; tarfile itself stops after the first of several compressed pieces
OPENERS = {b'\x1f\x8b': gzip.open, b'BZh': bz2.open, b'\xfd7zX': lzma.open}
VIDEO_ID = re.compile(r'[A-Za-z0-9_-]{11}')
NOBODY = 0, 0, 1, 1, 1  # passes the checks for rows of two columns, which have no box
LABEL = re.compile(r'\s+[+-]?[0-9]+$')  # of a list's line
NAME = re.compile(r'([A-Za-z0-9_-]{11})_([0-9]{6})_([0-9]{6})\.[A-Za-z0-9]+')

Keyframes = dict[str, list[int]]  # video id -> annotated seconds


class Source(NamedTuple):
    """A video of Kinetics-700: seconds start to end of a YouTube video."""

    video: str
    start: int
    end: int
    path: str


class Unusable(Exception):
    """A video out of which a clip cannot be cut; its text is the reason."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Step 3: cut the annotated clips out of the Kinetics-700 videos.'
    )
    parser.add_argument(
        '--avakinetics_anotation',
        '--avakinetics_annotation',
        type=Path,
        default=Path('ava_kinetics_v1_0'),
        metavar='DIR',
        help='folder of the AVA-Kinetics annotations (default: %(default)s)',
    )
    parser.add_argument(
        '--split',
        choices=['train', 'val'],
        default='train',
        help='part of AVA-Kinetics (default: train)',
    )
    parser.add_argument(
        '--kinetics_list',
        type=Path,
        metavar='FILE',
        help='list of the Kinetics-700 videos, a line each: PATH [LABEL] (default: '
        f'{MMACTION2}/data/kinetics700/kinetics700_train_list_videos.txt, _val_ with --split val)',
    )
    parser.add_argument(
        '--kinetics_archives',
        nargs='+',
        default=[],
        metavar='ARCHIVE',
        help='instead of --kinetics_list: tar files, compressed or not, which are never unpacked: '
        'paths, URLs, @FILE with one of these a line, - for standard input',
    )
    parser.add_argument(
        '--short_side',
        type=int,
        metavar='N',
        help='scale clips down to N pixels on their short side (default: size of the source)',
    )
    parser.add_argument(
        '--avakinetics_root',
        type=Path,
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
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    if args.kinetics_list and args.kinetics_archives:
        sys.exit('error: give --kinetics_list or --kinetics_archives, not both')
    if args.num_workers < 1 and args.num_workers != -1:
        sys.exit('error: --num_workers must be 1 or more, or -1 for all CPUs')
    if args.short_side is not None and (args.short_side < 2 or args.short_side % 2):
        sys.exit('error: --short_side must be an even number of pixels, such as 256')
    for index, name in reversed(list(enumerate(args.kinetics_archives))):
        if name.startswith('@'):
            lines = map(str.strip, Path(name[1:]).read_text().splitlines())
            args.kinetics_archives[index : index + 1] = filter(None, lines)
    listed = MMACTION2 / f'data/kinetics700/kinetics700_{args.split}_list_videos.txt'
    args.kinetics_list = args.kinetics_list or listed
    root = args.avakinetics_root.expanduser().absolute()
    args.videos, args.reports = root / 'videos', root / 'reports'
    args.work = args.videos / f'.cut_kinetics_{args.split}'
    return args


def read_annotations(path: Path) -> tuple[list[tuple], list[tuple]]:
    """The rows (video, second, numbers) of an annotation file, and report rows on malformed lines.

    The numbers are x1, y1, x2, y2, relative to the frame, and the action; none where the row has
    two columns, which name a keyframe on which nobody was annotated.
    """
    rows, problems = [], []
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        for index, line in enumerate(file, 1):
            fields = [field.strip().strip('"') for field in line.rstrip(' ,\r\n').split(',')]
            try:
                second, *numbers = map(float, fields[1:])
                x1, y1, x2, y2, action = numbers or NOBODY
                inside = 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
                valid = inside and 0 <= second < 1e6 and action in range(1, 81)
            except ValueError:
                valid = False
            if valid and VIDEO_ID.fullmatch(fields[0]):
                rows.append((fields[0], int(second), numbers))  # as MMAction2 names keyframes
            elif line.strip():
                problems.append(('', '', f'malformed annotation: line {index}: {line[:80]!r}'))
    return rows, problems


def read_keyframes(path: Path) -> tuple[Keyframes, list[tuple]]:
    """The seconds on which people are annotated, and report rows on malformed lines."""
    if not path.exists():
        sys.exit(f'error: {path} not found; do Step 2 or set --avakinetics_anotation')
    rows, problems = read_annotations(path)
    keyframes = defaultdict(list)
    for video, second in sorted({(video, second) for video, second, numbers in rows if numbers}):
        keyframes[video].append(second)
    if not keyframes:
        first = problems[0][2] if problems else 'it has no rows'
        sys.exit(f'error: {path} holds no annotated keyframe: {first}; do Step 2 again')
    return dict(keyframes), problems


def parse_name(path: str) -> Source | None:
    """The video of Kinetics-700 that a path names."""
    name = NAME.fullmatch(path.rsplit('/', 1)[-1])
    source = Source(name[1], int(name[2]), int(name[3]), path) if name else None
    return source if source and source.start < source.end else None


def read_list(path: Path, keyframes: Keyframes) -> tuple[list[Source], list[tuple]]:
    """The listed sources of annotated videos, and report rows on malformed lines."""
    if not path.exists():
        sys.exit(f'error: {path} not found; do Step 1 or set --kinetics_list')
    sources, problems = {}, []
    with open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
        for number, line in enumerate(file, 1):
            if source := parse_name(LABEL.sub('', line.strip())):
                sources[source] = bool(find_held(source, keyframes))
            elif line.strip():
                reason = f'line {number}: no name like ID_000001_000011.mp4: {line[:80]!r}'
                problems.append(('', '', f'malformed list line: {reason}'))
    held = [source for source, wanted in sources.items() if wanted]
    if not held:
        first = '; is it of this split?' if sources or not problems else f': {problems[0][2]}'
        sys.exit(f'error: {path} holds no annotated video{first}')
    return held, problems


def find_held(source: Source, keyframes: Keyframes) -> list[int]:
    """The annotated seconds that a source holds."""
    seconds = keyframes.get(source.video, ())
    return [second for second in seconds if source.start <= second < source.end]


def clip_range(source: Source, seconds: list[int]) -> tuple[int, int]:
    """The seconds of the YouTube video that the clip of these keyframes holds."""
    start = max(source.start, min(seconds) - CONTEXT_S)
    return start, min(source.end, max(seconds) + CONTEXT_S)


def clip_name(source: Source, seconds: list[int]) -> str:
    return '{}_{:06d}_{:06d}.mp4'.format(source.video, *clip_range(source, seconds))


def decode(path: str, start: float) -> Iterator[tuple[float, VideoFrame, str | None]]:
    """Yield (time, picture, fault) for each picture of a video; times are in seconds.

    The fault is an error with which this picture or an earlier one was decoded. It is forgotten at
    each key frame up to `start`, on which later pictures alone depend. Time 0 is the first picture
    or, if that comes more than MAX_LEAD_S after the container's start, the container's start.
    """
    import av

    options = {'format_whitelist': CONTAINERS, 'max_pixels': str(MAX_PIXELS)}
    with (
        av.logging.Capture() as log,
        open(path, 'rb') as file,
        av.open(file, options=options) as video,
    ):
        log.clear()
        stream = video.streams.best('video')  # not cover art
        if not stream or not stream.codec_context:
            raise Unusable('unreadable video: it holds no pictures that can be decoded')
        stream.thread_type = 'NONE'
        stream.codec_context.options = {'max_pixels': str(MAX_PIXELS)}
        zero, now, fault, held = None, 0, None, deque()
        for packet in video.demux(stream):
            if zero is not None and packet.is_keyframe and packet.pts is not None:
                if float(packet.pts * packet.time_base) - zero <= start:
                    fault = None
            try:
                pictures = packet.decode()
            except av.FFmpegError as error:
                pictures = []
                log.append((av.logging.ERROR, '', error.strerror))
            if packet.is_corrupt:
                log.append((av.logging.ERROR, '', 'corrupt packet'))
            words = [text.strip() for _, _, text in log if HARMLESS not in text]
            if words and not fault:
                fault = f'{words[0]}, at {now:.1f} s'
            log.clear()  # what demuxing the next packet brings belongs to that
            for picture in pictures:
                if picture.time is None:  # of a damaged packet
                    continue
                if zero is None:
                    begin = (video.start_time or 0) / av.time_base
                    zero = begin if picture.time - begin > MAX_LEAD_S else picture.time
                now = picture.time - zero
                held.append((now, picture))
                if len(held) > DELAY:
                    yield *held.popleft(), fault
        yield from ((*picture, fault) for picture in held)
        if zero is None:
            raise Unusable(f'unreadable video: {fault or "it holds no pictures"}')
        if fault:
            raise Unusable(f'damaged video: {fault}')


def nearest(
    pictures: Iterator[tuple[float, VideoFrame, str | None]], start: int, end: int
) -> Iterator[VideoFrame]:
    """Yield the picture that is nearest to each time that is due, FPS a second from start to end.

    Raises Unusable where it is more than MAX_OFF_S away, or was decoded with an error.
    """
    before, after = (-math.inf, None, None), next(pictures)
    for due in (start + index / FPS for index in range((end - start) * FPS)):
        while after[0] <= due:
            before, after = after, next(pictures, (math.inf, None, None))
        if min(due - before[0], after[0] - due) > MAX_OFF_S:
            if after[0] == math.inf:
                short = end - before[0] - 1 / FPS
                raise Unusable(f'source too short: it ends {short:.1f} s before the clip does')
            gap = f'between {max(0, before[0]):.1f} and {after[0]:.1f} s'
            raise Unusable(f'damaged video: no picture {gap}')
        # Matroska rounds times to milliseconds
        _, picture, fault = before if due - before[0] <= after[0] - due + 0.001 else after
        if fault:
            raise Unusable(f'damaged video: {fault}')
        yield picture


def scale(picture: VideoFrame, short_side: int | None) -> VideoFrame:
    """The picture as it is encoded: upright, no larger than wanted, even sides, yuv420p, BT.601."""
    import av
    import numpy as np

    if picture.rotation % 360:  # players turn it
        turned = np.rot90(picture.to_ndarray(format='rgb24'), picture.rotation // 90)
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(turned), 'rgb24')
    factor = min(1, (short_side or math.inf) / min(picture.width, picture.height))
    return picture.reformat(
        2 * round(picture.width // 2 * factor),
        2 * round(picture.height // 2 * factor),
        'yuv420p',
        dst_colorspace='ITU601',
        dst_color_range='MPEG',
        interpolation='BICUBIC',
        threads=1,  # more wait for each other where all CPUs are at work
    )


def encode(pictures: Iterator[VideoFrame], short_side: int | None) -> bytes:
    """An H.264 clip (mp4) of these pictures."""
    import av

    content, size = io.BytesIO(), None
    with av.open(content, 'w', format='mp4') as clip:
        for index, picture in enumerate(pictures):
            frame = scale(picture, short_side)
            if not size:
                size = frame.width, frame.height
                options = ENCODER | (SMALL if min(size) <= LARGE_SIDE else LARGE)
                stream = clip.add_stream('libx264', FPS, options=options)
                stream.width, stream.height = size
                stream.codec_context.colorspace, stream.thread_count = BT601, 1
            if (frame.width, frame.height) != size:
                raise Unusable('damaged video: the size of its pictures changes')
            frame.pts, frame.time_base, frame.pict_type = index, Fraction(1, FPS), 0
            clip.mux(stream.encode(frame))
        clip.mux(stream.encode())  # the last ones
    return content.getvalue()


def cut_clip(source: Source, seconds: list[int], args: argparse.Namespace) -> str | None:
    """Cut the clip of these keyframes; returns None, or why it cannot be had from this source."""
    import av

    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    start, end = (second - source.start for second in clip_range(source, seconds))
    try:
        content = encode(nearest(decode(source.path, start), start, end), args.short_side)
    except Unusable as error:
        return str(error)
    except (av.FFmpegError, OSError, ValueError) as error:  # ValueError: undecodable names
        words = (getattr(error, 'log', None) or [error])[-1]
        return f'unreadable video: {words}'.strip()
    part = args.work / f'{uuid.uuid4().hex}.mp4'
    part.write_bytes(content)
    os.replace(part, args.videos / clip_name(source, seconds))
    return None


class Patient(io.RawIOBase):
    """A file that is read on after a dropped connection."""

    def __init__(self, file):
        import aiohttp
        import tenacity

        self.read_some = tenacity.retry(
            stop=tenacity.stop_after_attempt(5),
            wait=tenacity.wait_random_exponential(max=20),
            retry=tenacity.retry_if_exception_type((OSError, aiohttp.ClientError)),
            reraise=True,
        )(file.read)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.read_some(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class StrictTarInfo(tarfile.TarInfo):
    """Makes a damaged header an error, where tarfile would take it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError):
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f'damaged archive: {error}') from None


def open_archive(name: str) -> tuple:
    """An archive as a binary file, and its [size, time or ETag]."""
    if name == '-':
        return sys.stdin.buffer, []
    import fsspec

    web = {'client_kwargs': {'trust_env': True}} if name.startswith('http') else {}  # proxies
    system, path = fsspec.url_to_fs(name, **web)
    info = system.info(path)
    changed = info.get('ETag') or info.get('mtime') or info.get('LastModified')
    return system.open(path), [info['size'], str(changed)]


def read_members(file, keyframes: Keyframes, problems: list) -> Iterator[tuple]:
    """Yield (source, content) of the annotated videos in a tar archive.

    An archive that cannot be read to its end adds its reason to the problems.
    """
    try:
        stream = io.BufferedReader(Patient(file), 1 << 20)
        for magic, decompress in OPENERS.items():
            if stream.peek(4).startswith(magic):
                stream = decompress(stream)
                break
        with tarfile.open(
            fileobj=stream, mode='r|', bufsize=1 << 20, tarinfo=StrictTarInfo, ignore_zeros=True
        ) as tar:
            while member := tar.next():
                tar.members.clear()  # else memory grows with the archive
                source = parse_name(member.name)
                if source and member.isfile() and find_held(source, keyframes):
                    yield source, tar.extractfile(member).read(MAX_BYTES)
    except Exception as error:  # remote file systems raise what their libraries do
        problems.append(repr(error))


def cut_copy(source: Source, seconds: list[int], args: argparse.Namespace) -> str | None:
    """`cut_clip` out of a temporary copy, which is removed."""
    try:
        return cut_clip(source, seconds, args)
    finally:
        Path(source.path).unlink(missing_ok=True)  # a cluster may have run this item twice


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
    except OSError:  # of some file servers, such as Lustre mounted without flock
        where = f'{path.parent} has no file locks'
        print(f'{where}: let no other run of this step work there', file=sys.stderr)
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


@functools.cache
def connect(address: str) -> tuple[Client, type]:
    """A client of a Dask scheduler, and the error of items whose workers died."""
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        sys.exit('error: --dask_scheduler needs Dask; pip install distributed')
    logging.disable()  # Dask logs tracebacks of what is reported in a line below
    try:
        client = Client(address, timeout=10)
        client.wait_for_workers(1, timeout=30)
        client.upload_file(__file__)
    except (OSError, ValueError) as error:
        sys.exit(f'error: no Dask scheduler with workers at {address}: {error}'.split('\n')[0])
    return client, KilledWorker


def run_all(
    function: Callable, items: Iterable[tuple], args: argparse.Namespace
) -> Iterator[tuple]:
    """Yield (item, answer, None) in any order, or (item, None, reason) if its workers died.

    Items are taken as workers get free.
    """
    killed, ahead, workers = (), AHEAD, args.num_workers if args.num_workers > 0 else cpu_count()
    if workers == 1 and not args.dask_scheduler:  # in this process, where a debugger reaches it
        yield from ((item, function(*item), None) for item in items)
        return
    if args.dask_scheduler:
        client, killed = connect(args.dask_scheduler)
        executor = client.get_executor(pure=False)
    else:
        executor, ahead = ProcessPoolExecutor(workers, get_context('spawn'), shield), 2 * workers
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
                    yield item, future.result(), None
                except killed:
                    yield item, None, 'given up: the workers of the cluster that had it were killed'
    except BrokenProcessPool:
        sys.exit(
            'error: a worker process was killed, as it happens when memory runs out; run the same '
            'command again, with fewer workers'
        )
    except CancelledError:
        sys.exit('error: the Dask scheduler went away; run the same command again')
    finally:
        for child in active_children() if todo else ():  # interrupted
            child.kill()
        executor.shutdown(wait=not (killed and todo))  # a cluster's items are cancelled


def cut_all(
    function: Callable, items: Iterable[tuple], args: argparse.Namespace, **bar
) -> dict[str, str | None]:
    """Cut all items; returns for each clip None, or why it could not be cut."""
    outcomes = {}
    with contextlib.closing(run_all(function, items, args)) as answers:
        for item, answer, failure in tqdm(answers, unit='clip', delay=1, leave=False, **bar):
            outcomes[clip_name(*item[:2])] = answer or failure
    return outcomes


def look_up(source: Source, folders: list[Path], clip: Path) -> tuple[str | None, bool]:
    """Where a listed video lies, and whether its clip is there and not older than the video."""
    places = (os.path.join(folder, source.path) for folder in folders)
    path = next(filter(os.path.isfile, places), None)
    try:
        made, changed = clip.stat().st_mtime, os.stat(path or clip).st_mtime
    except OSError:
        return path, False
    return path, made >= changed or changed > time.time()  # ignoring times in the future


def cut_list(
    sources: list[Source], keyframes: Keyframes, args: argparse.Namespace
) -> dict[str, str | None]:
    """Cut all clips out of listed files; returns what `cut_all` does."""
    folder, missing, items = args.kinetics_list.absolute().parent, {}, []
    folders = [Path.cwd(), folder, folder / f'videos_{args.split}']
    held = [find_held(source, keyframes) for source in sources]
    clips = [clip_name(*pair) for pair in zip(sources, held)]
    with ThreadPool(16) as threads:  # a slow file server answers them together
        places = [(source, folders, args.videos / clip) for source, clip in zip(sources, clips)]
        found = threads.starmap(look_up, places, 64)
    for source, seconds, clip, (path, done) in zip(sources, held, clips, found):
        if not path and not done:
            missing[clip] = f'file missing: {source.path}'
        elif not done:
            items.append((source._replace(path=path), seconds, args))
    return missing | cut_all(cut_clip, items, args, desc='cut', total=len(items))


def copy_members(
    members: Iterator[tuple], keyframes: Keyframes, clips: set, args: argparse.Namespace
) -> Iterator[tuple]:
    """Yield an item of `cut_copy` for each video whose clip is missing; `clips` gets all clips."""
    for source, content in members:
        seconds = find_held(source, keyframes)
        clip = args.videos / clip_name(source, seconds)
        clips.add(clip)
        if not clip.exists():
            copy = args.work / f'{uuid.uuid4().hex}.{Path(source.path).name}'
            copy.write_bytes(content)
            yield source._replace(path=str(copy)), seconds, args


def cut_archives(
    keyframes: Keyframes, args: argparse.Namespace
) -> tuple[dict[str, str | None], list[str]]:
    """Cut all clips out of archives; returns what `cut_all` does, and which cannot be read.

    Those that were read to their end are noted, and not read again while their clips are there.
    """
    ledger = args.reports / f'cut_kinetics_{args.split}_archives.jsonl'
    noted, outcomes, unreadable = [], {}, []
    for line in ledger.read_text(errors='replace').splitlines() if ledger.exists() else ():
        with contextlib.suppress(ValueError):  # the last line of a killed run may be torn
            noted.append(json.loads(line))
            outcomes |= noted[-1]['failed']
    digest = hashlib.sha256(json.dumps(keyframes).encode()).hexdigest()
    for archive in args.kinetics_archives:
        name, file, version, problems, clips = Path(archive).name, None, [], [], set()
        try:
            file, version = open_archive(archive)
        except Exception as error:  # remote file systems raise what their libraries do
            problems.append(repr(error))
        key = [name, digest, *version]  # an archive that cannot be opened has its name only
        if any(
            entry['archive'][: len(key)] == key
            and all((args.videos / clip).exists() for clip in entry['clips'])
            for entry in noted
        ):
            if not file:
                print(f'{archive} cannot be opened; its clips are there already')
            continue
        if file:
            members = read_members(file, keyframes, problems)
            items = copy_members(members, keyframes, clips, args)
            now = cut_all(cut_copy, items, args, desc=name)
            outcomes |= now
        if problems:
            unreadable.append(f'{archive}: {problems[0]}')
        elif version:
            there = sorted(clip.name for clip in clips if clip.exists())
            failed = {clip: reason for clip, reason in now.items() if reason}
            with open(ledger, 'a') as lines:
                lines.write(f'\n{json.dumps(dict(archive=key, clips=there, failed=failed))}\n')
    return outcomes, unreadable


def note_options(args: argparse.Namespace) -> None:
    """Note what shapes the clips; exits if there are clips that were made with other options."""
    import av

    note = args.reports / 'cut_kinetics_options.json'
    options = dict(
        short_side=args.short_side,
        av=av.__version__,
        encoder=str([ENCODER, SMALL, LARGE, LARGE_SIDE, CLIP_FORMAT]),
    )
    try:
        noted = json.loads(note.read_text())
    except (FileNotFoundError, ValueError):
        noted = {}
    others = [
        f'{name}={noted.get(name, "unknown")}, not {value}'
        for name, value in options.items()
        if noted.get(name, 'unknown') != value
    ]
    if others and any(args.videos.glob('*.mp4')):
        sys.exit(
            f'error: the clips in {args.videos} were made with {"; ".join(others)}; give the same '
            'options and install the same av, or move these clips away'
        )
    write(note, json.dumps(options).encode())


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


def find_clips(names: Iterable[str], keyframes: Keyframes) -> dict[tuple, str]:
    """One of these clips for each keyframe (video, second) that they hold."""
    return {
        (source.video, second): source.path
        for source in filter(None, map(parse_name, names))
        for second in find_held(source, keyframes)
    }


def cut(args: argparse.Namespace) -> None:
    """Cut the clips, write the report, say what came of it."""
    annotations = args.avakinetics_anotation / f'kinetics_{args.split}_v1.0.csv'
    keyframes, problems = read_keyframes(annotations)
    if not args.kinetics_archives:
        sources, malformed = read_list(args.kinetics_list, keyframes)
        problems += malformed
    unreadable = []
    with workspace(args.work):
        note_options(args)
        if args.kinetics_archives:
            outcomes, unreadable = cut_archives(keyframes, args)
        else:
            outcomes = cut_list(sources, keyframes, args)
    held, failed = (find_clips(names, keyframes) for names in (os.listdir(args.videos), outcomes))
    wanted = [(video, second) for video, seconds in keyframes.items() for second in seconds]
    rows = []
    for keyframe in wanted:
        reason = outcomes.get(held.get(keyframe, failed.get(keyframe)))
        if keyframe not in held:
            rows.append((*keyframe, reason or 'no video that could be read holds this second'))
        elif reason and not args.kinetics_archives:  # its source is newer, and broken
            rows.append((*keyframe, f'older clip kept: {reason}'))
    rows += problems + [('', '', f'unreadable archive: {reason}') for reason in unreadable]
    report = args.reports / f'cut_kinetics_{args.split}.csv'
    write_csv(report, [('video_id', 'timestamp', 'reason'), *rows])

    clips = set(held.values())
    made = sum(outcomes.get(clip, 'there') is None for clip in clips)
    print(
        f'{len(clips)} clips in {args.videos} ({made} cut now, {len(clips) - made} there already) '
        f'for {len(held)} of {len(wanted)} annotated keyframes'
    )
    for reason, count in Counter(row[2].split(':')[0] for row in rows).items():
        print(f'  {reason}: {count:,}')
    if rows:
        print(f'  report: {report}')
    if unreadable:
        sys.exit(f'error: {len(unreadable)} archives cannot be read to the end: {unreadable[0]}')
    if not held:
        sys.exit('error: not one clip could be cut; the report says why')


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    sys.stdout.reconfigure(errors='backslashreplace')  # names of files may be no UTF-8
    try:
        cut(parse_args(argv))
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; fix it, then run the same command again')
    except KeyboardInterrupt:
        print('interrupted; run the same command again', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    importlib.import_module(Path(__file__).stem).main()  # under the name by which workers import it
