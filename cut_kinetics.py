#!/usr/bin/env python3
r"""Step 3: cut the annotated clips out of the Kinetics-700 videos.

Reads the annotations of AVA-Kinetics (kinetics_train_v1.0.csv) and the videos of Kinetics-700, from
a list of files or straight from archives, and writes ROOT/videos/<video id>_<start>_<end>.mp4: the
annotated keyframes plus two seconds before and after, within the source, at constant 30 fps. Frame
k of a clip is the frame of the source that is nearest to source time start - source_start + k / 30.

Keyframes without a clip are listed in ROOT/reports/cut_kinetics_train.csv, with the reason. The
same command continues after an interruption. A clip that is older than its listed source is cut
again. With --split val, the annotations, the list and the report have val in their names.

    python3 cut_kinetics.py --avakinetics_anotation=./ava_kinetics_v1_0 \
        --kinetics_list=$MMACTION2/data/kinetics700/kinetics700_train_list_videos.txt \
        --avakinetics_root=$MMACTION2/data/ava_kinetics
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import csv
import ctypes
import fcntl
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
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Callable, Iterable, Iterator, NamedTuple

import av
import numpy as np
from joblib import cpu_count
from tqdm import tqdm

if TYPE_CHECKING:
    from distributed import Client

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30
CONTEXT_S = 2  # kept before and after the keyframes; MMAction2's windows reach 40 frames each way
MAX_OFF_S = 0.75  # how far a frame may be from its due time, where the source has gaps
# Codec delays put the first picture up to 0.1 s behind the sound; beyond 0.2 s, some are missing
MAX_LEAD_S = 0.2
# Trimmed videos last up to 10.1 s under a name of 10 s. Longer ones begin too early, at the key
# frame before, or were never trimmed
MAX_EXTRA_S = 1
# Chosen for more SSIM than x264's defaults (medium, crf 23) at a third of the time, below 1.8 times
# the size. Without CABAC (9 % of the size), Step 4 and training decode a quarter faster; large
# pictures need it to stay below 1.8 times the size
ENCODER = dict(preset='superfast', bf='1', b_strategy='0', weightp='0')
SMALL, LARGE = dict(crf='21.4', coder='vlc'), dict(crf='21.6')
LARGE_SIDE = 480  # pixels of the short side, above which LARGE is used
# Only real containers: FFmpeg would also read a playlist, and with it any file that it names
CONTAINERS = 'mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,asf,mpegts,mpeg,ogg'
MAX_PIXELS = 7680 * 4320  # a header that claims larger pictures would cost gigabytes of memory
MAX_BYTES = 2**28  # of a video in an archive; ten seconds have a few MB
DELAY = 5  # pictures by which decoders may report an error late
# FFmpeg's message on intact videos that were cut out of open groups of pictures
HARMLESS = 'mmco: unref short failure'
BT601 = 6  # matrix_coefficients of ITU-T H.273
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
COMPLETE = 'there already'
AHEAD = 500  # items that a cluster is given at once
GIVEN_UP = 'given up: the workers of the cluster that had it were killed'
# How to open a compressed archive, by its first bytes; tarfile's own way stops after the first of
# several compressed pieces
OPENERS = {b'\x1f\x8b': gzip.open, b'BZh': bz2.open, b'\xfd7zX': lzma.open}
FRACTION = r'(0?\.\d+|[01](?:\.0*)?|\d(?:\.\d+)?e-\d+)'  # 0 to 1
# video, timestamp and, if somebody is annotated there, box and action
ROW = re.compile(
    r'([A-Za-z0-9_-]{11}),(\d{1,6})(?:\.\d*)?'
    rf'(?:,,,,,|{f",{FRACTION}" * 4},([1-9]|[1-7]\d|80))?',
    re.ASCII,
)
LABEL = re.compile(r'\s+[+-]?[0-9]+$')  # of a list's line
# Other files that downloaders leave beside a video (.json, .wav, .jpg) have its name, too
SUFFIXES = 'mp4|m4v|mov|3gp|3g2|mkv|webm|avi|flv|wmv|asf|ts|mpg|mpeg|ogv|ogg'
NAME = re.compile(rf'([A-Za-z0-9_-]{{11}})_([0-9]{{6}})_([0-9]{{6}})\.(?i:{SUFFIXES})')

Keyframes = dict[str, list[int]]  # video id -> annotated seconds


class Source(NamedTuple):
    """A video of Kinetics-700: seconds start to end of a YouTube video."""

    video: str
    start: int
    end: int
    path: str


class Unusable(Exception):
    """A video out of which a clip cannot be cut; its text is the reason."""


def to_path(text: str) -> Path:
    """The path that an argument names."""
    if not text:
        raise argparse.ArgumentTypeError('it is empty; set its variable as README says')
    return Path(text).expanduser()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Step 3: cut the annotated clips out of the Kinetics-700 videos.',
        fromfile_prefix_chars='@',
    )
    parser.add_argument(
        '--avakinetics_anotation',
        '--avakinetics_annotation',
        type=to_path,
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
        type=to_path,
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
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    parser.convert_arg_line_to_args = lambda line: list(filter(None, [line.strip()]))  # of @FILE
    args = parser.parse_args(argv)
    if args.kinetics_list and args.kinetics_archives:
        sys.exit('error: give --kinetics_list or --kinetics_archives, not both')
    if args.num_workers < 1 and args.num_workers != -1:
        sys.exit('error: --num_workers must be 1 or more, or -1 for all CPUs')
    if args.short_side is not None and (args.short_side < 2 or args.short_side % 2):
        sys.exit('error: --short_side must be an even number of pixels, such as 256')
    if '' in args.kinetics_archives:
        sys.exit('error: --kinetics_archives is empty; give archives or --kinetics_list')
    listed = MMACTION2 / f'data/kinetics700/kinetics700_{args.split}_list_videos.txt'
    args.kinetics_list = (args.kinetics_list or listed).absolute()
    folder = args.kinetics_list.parent
    args.folders = Path.cwd(), folder, folder / f'videos_{args.split}'
    root = args.avakinetics_root.absolute()
    args.videos, args.reports = root / 'videos', root / 'reports'
    args.work = args.videos / f'.cut_kinetics_{args.split}'
    args.ledger = args.reports / f'cut_kinetics_{args.split}_archives.jsonl'
    return args


def read_keyframes(path: Path) -> tuple[Keyframes, list[tuple]]:
    """The seconds on which people are annotated, and report rows on malformed lines."""
    if not path.exists():
        sys.exit(f'error: {path} not found; run Step 2 or set --avakinetics_anotation')
    keyframes, problems = defaultdict(set), []
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        for number, line in enumerate(map(str.strip, file), 1):
            row = ROW.fullmatch(line)
            if row and row[3]:
                keyframes[row[1]].add(int(row[2]))  # as MMAction2 names keyframes
            elif line and not row:
                problems.append(('', '', f'malformed annotation: line {number}: {line[:80]!r}'))
    if not keyframes:
        first = problems[0][2] if problems else 'nobody is annotated'
        sys.exit(f'error: {path} holds no annotated keyframe: {first}; run Step 2 again')
    return {video: sorted(seconds) for video, seconds in sorted(keyframes.items())}, problems


def parse_name(path: str) -> Source | None:
    """The video of Kinetics-700 that a path names."""
    name = NAME.fullmatch(path.rsplit('/', 1)[-1])
    source = Source(name[1], int(name[2]), int(name[3]), path) if name else None
    return source if source and source.start < source.end else None


def read_list(path: Path, keyframes: Keyframes) -> tuple[dict[Source, list[int]], list[tuple]]:
    """The listed sources with the annotated seconds that they hold, and report rows on malformed
    lines.
    """
    if not path.exists():
        sys.exit(f'error: {path} not found; run Step 1 or set --kinetics_list')
    sources, problems = {}, []
    with open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
        for number, line in enumerate(map(str.strip, file), 1):
            if source := parse_name(LABEL.sub('', line)):
                sources[source] = find_held(source, keyframes)
            elif line:
                reason = f'line {number}: no video name like ID_000001_000011.mp4: {line[:80]!r}'
                problems.append(('', '', f'malformed list line: {reason}'))
    held = {source: seconds for source, seconds in sources.items() if seconds}
    if not held:
        reasons = [row[2] for row in problems] or ['it is empty; run Step 1 again']
        first = 'is it of this split?' if sources else reasons[0]
        sys.exit(f'error: {path} names {len(sources)} videos, none of them annotated: {first}')
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


def measure(video: av.container.InputContainer, stream: av.VideoStream, enough: float) -> float:
    """Return how long the pictures of a video last, in seconds.

    As the container declares; where it does not, the sound may be longer, and the packets tell.
    They are read only if the container lasts more than `enough`.
    """
    declared = video.duration and video.duration / av.time_base
    if stream.duration:
        declared = float(stream.duration * stream.time_base)
    elif not declared or declared > enough:
        packets = (packet for packet in video.demux(stream) if packet.pts is not None)
        times = [packet.pts * packet.time_base for packet in packets]
        declared = float(max(times, default=0) - min(times, default=0))
        video.seek(video.start_time or 0)
    return declared


def decode(
    file: BinaryIO, start: float, length: int
) -> Iterator[tuple[float, av.VideoFrame, str | None]]:
    """Yield (time, picture, fault) for each picture of a video; times are in seconds.

    Raises Unusable for a video that lasts longer than `length`, the seconds that its name says.
    The fault is an error with which this picture or an earlier one was decoded. It is forgotten at
    each key frame up to `start`, on which later pictures alone depend. Time 0 is the first picture
    or, if that comes more than MAX_LEAD_S after the container's start, the container's start.
    """
    options = {'format_whitelist': CONTAINERS, 'max_pixels': str(MAX_PIXELS)}
    with av.logging.Capture() as log, av.open(file, options=options) as video:
        log.clear()
        stream = video.streams.best('video')  # not cover art
        if not stream or not stream.codec_context:
            raise Unusable('unreadable video: it holds no pictures that can be decoded')
        stream.thread_type = 'NONE'
        stream.codec_context.options = {'max_pixels': str(MAX_PIXELS)}
        if (measured := measure(video, stream, length + MAX_EXTRA_S)) > length + MAX_EXTRA_S:
            raise Unusable(
                f'source too long: its name says {length} s, its video lasts {measured:.1f} s'
            )
        zero, now, fault, pending = None, 0, None, deque()
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
                if picture.time - zero < now:  # H.264 with B-frames in AVI has no times of its own
                    fault = fault or f'the times of its frames run backwards, at {now:.1f} s'
                now = picture.time - zero
                pending.append((now, picture))
                if len(pending) > DELAY:
                    yield *pending.popleft(), fault
        yield from ((*picture, fault) for picture in pending)
        if zero is None:
            raise Unusable(f'unreadable video: {fault or "it holds no pictures"}')
        if fault:
            raise Unusable(f'damaged video: {fault}')


def nearest(
    pictures: Iterator[tuple[float, av.VideoFrame, str | None]], start: int, end: int
) -> Iterator[av.VideoFrame]:
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


def turn_upright(picture: av.VideoFrame) -> av.VideoFrame:
    """Return a picture as players show it, turned and mirrored by its display matrix.

    To the nearest right angle: phones write matrices that are a hair off. A degenerate matrix says
    nothing.
    """
    matrix = picture.side_data.get('DISPLAYMATRIX')
    if not matrix:
        return picture
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # x' = ax + cy, y' = bx + dy
    if not (a or c) or not (b or d):
        return picture
    image = picture.to_ndarray(format='rgb24')
    if abs(c) > abs(a):
        image, a, d = image.swapaxes(0, 1), c, b
    image = image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(image), 'rgb24')


def scale(picture: av.VideoFrame, short_side: int | None) -> av.VideoFrame:
    """The picture as it is encoded: upright, no larger than wanted, even sides, yuv420p, BT.601."""
    picture = turn_upright(picture)
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


def encode(pictures: Iterator[av.VideoFrame], short_side: int | None) -> bytes:
    """An H.264 clip (mp4) of these pictures."""
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


def is_current(clip: Path, path: str | None) -> bool:
    """Whether a clip is there and not older than its source; times in the future are ignored."""
    try:
        made, changed = clip.stat().st_mtime, os.stat(path or clip).st_mtime
    except OSError:
        return False
    return made >= changed or changed > time.time()


def cut_clip(
    source: Source, seconds: list[int], content: bytes | None, args: argparse.Namespace
) -> str | None:
    """Cut the clip of these keyframes out of this content, or else out of the listed file.

    Returns None, COMPLETE if it was there already, or why it cannot be had from this source.
    """
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    start, end = (second - source.start for second in clip_range(source, seconds))
    length = source.end - source.start
    clip = args.videos / clip_name(source, seconds)
    if content is None:
        places = (os.path.join(folder, source.path) for folder in args.folders)
        path = next(filter(os.path.isfile, places), None)
        if is_current(clip, path):
            return COMPLETE
        if not path:
            return f'file missing: {source.path}'
    try:
        if content == b'':
            raise Unusable('unreadable video: in its archive it is empty, or a link')
        with open(path, 'rb') if content is None else io.BytesIO(content) as file:
            encoded = encode(nearest(decode(file, start, length), start, end), args.short_side)
    except Unusable as error:
        return str(error)
    except IndexError:  # PyAV's, of a stream that damage makes up
        return 'damaged video: another stream begins in the middle'
    except (av.FFmpegError, OSError, ValueError) as error:  # ValueError: undecodable names
        words = (getattr(error, 'log', None) or [error])[-1]
        return f'unreadable video: {words}'.strip()
    part = args.work / f'{uuid.uuid4().hex}.mp4'
    part.write_bytes(encoded)
    os.replace(part, clip)
    return None


class RetryingFile(io.RawIOBase):
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
    """Makes a damaged header an error, where tarfile would skip it or end there."""

    @classmethod
    def frombuf(cls, *args):
        try:
            return super().frombuf(*args)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(f'no tar archive, or a damaged one: {error}') from None


def open_archive(name: str) -> tuple[BinaryIO, str]:
    """An archive as a binary file, and what tells its versions apart: size, and time or ETag."""
    if name == '-':
        return sys.stdin.buffer, ''
    import fsspec

    web = {'client_kwargs': {'trust_env': True}} if name.startswith('http') else {}  # proxies
    system, path = fsspec.url_to_fs(name, **web)
    info = system.info(path)
    times = (info.get(name) for name in ('ETag', 'mtime', 'LastModified', 'Last-Modified'))
    changed = next(filter(None, times), None)
    return system.open(path), f'{info.get("size")} {changed}'


def read_members(file: BinaryIO, keyframes: Keyframes) -> Iterator[tuple]:
    """Yield (source, seconds, content) of the annotated videos in a tar archive, or in several
    that follow one another.
    """
    stream = io.BufferedReader(RetryingFile(file), 1 << 20)
    for magic, decompress in OPENERS.items():
        if stream.peek(4).startswith(magic):
            stream = decompress(stream)
            break
    count = 0
    with tarfile.open(
        fileobj=stream, mode='r|', bufsize=1 << 20, tarinfo=StrictTarInfo, ignore_zeros=True
    ) as tar:
        while member := tar.next():
            tar.members.clear()  # else memory grows with the archive
            source = parse_name(member.name)
            count += source is not None
            if seconds := find_held(source, keyframes) if source else []:
                content = tar.extractfile(member).read(MAX_BYTES) if member.isfile() else b''
                yield source, seconds, content
    if not count:
        raise tarfile.ReadError('it holds no video of Kinetics-700')


def read_ledger(path: Path) -> dict[str, list[str] | str]:
    """The clips of each archive that was read to its end, and why clips could not be cut."""
    noted = {}
    for line in path.read_text(errors='replace').splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # the last line of a killed run may be torn
            name, outcome = json.loads(line)
            noted[name] = outcome
    return noted


def note(ledger: Path, name: str, outcome: list[str] | str | None) -> None:
    with open(ledger, 'a') as lines:
        lines.write(f'\n{json.dumps([name, outcome])}\n')  # on a line of its own after a torn one


def explain(error: Exception) -> str:
    """Say why an archive cannot be read, in our words where a library's do not help."""
    if str(error) == 'empty file':  # tarfile's
        return 'it is empty'
    if 'range requests' in str(error):  # fsspec's
        return 'its server answers no range requests; pipe it into --kinetics_archives - with curl'
    return f'{type(error).__name__}: {error}'


def plan_archives(
    keyframes: Keyframes, noted: dict, unreadable: list[str], bar: tqdm, args: argparse.Namespace
) -> Iterator[tuple]:
    """Yield an item of `cut_clip` for each video in the archives whose clip is missing.

    An archive that was read to its end is noted, and not read again while its clips are there; one
    that cannot be is added to `unreadable`.
    """
    digest = hashlib.sha256(json.dumps(keyframes).encode()).hexdigest()
    for number, archive in enumerate(args.kinetics_archives, 1):
        bar.set_postfix_str(f'archive {number} of {len(args.kinetics_archives)}')
        clips = set()
        try:
            file, version = open_archive(archive)
            name = f'{Path(archive).name} {version} {digest}'
            if name in noted and all(
                noted.get(clip) or (args.videos / clip).exists() for clip in noted[name]
            ):
                continue
            for source, seconds, content in read_members(file, keyframes):
                clip = clip_name(source, seconds)
                clips.add(clip)
                if not (args.videos / clip).exists():
                    yield source, seconds, content, args
        except Exception as error:  # remote file systems raise what their libraries do
            unreadable.append(f'{archive}: {explain(error)}')
        else:
            if version:
                note(args.ledger, name, sorted(clips))


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


def check_options(args: argparse.Namespace) -> None:
    """Record what shapes the clips; exit if there are clips that were made with other options.

    An option that an older record lacks is one of today's, which had its default then.
    """
    path, recorded = args.reports / 'cut_kinetics_options.json', {}
    options = dict(
        short_side=args.short_side,
        av=av.__version__,
        fps=FPS,
        context_s=CONTEXT_S,
        encoder=[ENCODER, SMALL, LARGE, LARGE_SIDE],
    )
    with contextlib.suppress(FileNotFoundError, ValueError):
        recorded = json.loads(path.read_text())
    if any(args.videos.glob('*.mp4')):
        if not recorded:
            reason = f'were not made by this script (there is no {path}); move them away'
            sys.exit(f'error: the clips in {args.videos} {reason}')
        other = [name for name in options if recorded.get(name, options[name]) != options[name]]
        if other:
            made = ', '.join(f'{name} {recorded[name] or "of the source"}' for name in other)
            sys.exit(
                f'error: the clips in {args.videos} were made with {made}; give the same options '
                'and install the same av, or move these clips away'
            )
    write(path, json.dumps(options).encode())


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


def find_keyframes(clips: Iterable[str], keyframes: Keyframes) -> list[tuple[tuple, str]]:
    """Each keyframe (video, second) that one of these clips holds, with the clip."""
    return [
        ((source.video, second), source.path)
        for source in filter(None, map(parse_name, clips))
        for second in find_held(source, keyframes)
    ]


def cut(args: argparse.Namespace) -> None:
    """Cut the clips, write the report, say what came of it."""
    annotations = args.avakinetics_anotation / f'kinetics_{args.split}_v1.0.csv'
    keyframes, problems = read_keyframes(annotations)
    unreadable, outcomes, sources = [], {}, {}
    if args.kinetics_archives:
        noted = read_ledger(args.ledger)
        outcomes = {clip: reason for clip, reason in noted.items() if isinstance(reason, str)}
    else:
        sources, malformed = read_list(args.kinetics_list, keyframes)
        problems += malformed
    with workspace(args.work), tqdm(desc='cut', unit='clip', leave=False) as bar:
        check_options(args)
        items = [(source, seconds, None, args) for source, seconds in sources.items()]
        bar.reset(len(items) or None)
        if args.kinetics_archives:
            items = plan_archives(keyframes, noted, unreadable, bar, args)
        with contextlib.closing(run_all(cut_clip, items, args)) as answers:
            for item, answer in answers:
                bar.update()
                clip = clip_name(*item[:2])
                if answer != COMPLETE:
                    outcomes[clip] = answer
                if args.kinetics_archives and (answer or noted.get(clip)):
                    note(args.ledger, clip, answer)
    problems += [('', '', f'unreadable archive: {reason}') for reason in unreadable]
    there = find_keyframes(os.listdir(args.videos), keyframes)
    report(there, outcomes, keyframes, problems, args)
    if unreadable:
        count = f'{len(unreadable)} of {len(args.kinetics_archives)}'
        sys.exit(f'error: archives that cannot be read to the end: {count}, first {unreadable[0]}')
    if not there:
        sys.exit('error: not one clip could be cut; the report says why')


def report(
    there: list, outcomes: dict, keyframes: Keyframes, problems: list, args: argparse.Namespace
) -> None:
    """Write the report and print the summary; `there` has the keyframes that have clips."""
    held, failed, rows = dict(there), dict(find_keyframes(outcomes, keyframes)), []
    wanted = [(video, second) for video, seconds in keyframes.items() for second in seconds]
    for keyframe in wanted:
        reason = outcomes.get(held.get(keyframe, failed.get(keyframe)))
        if keyframe not in held:
            rows.append((*keyframe, reason or 'no video that could be read holds this second'))
        elif reason and not args.kinetics_archives:  # its source is newer, and broken
            rows.append((*keyframe, f'older clip kept: {reason}'))
    rows += problems
    path = args.reports / f'cut_kinetics_{args.split}.csv'
    write_csv(path, [('video_id', 'timestamp', 'reason'), *rows])
    clips = {clip for _, clip in there}
    made = sum(outcomes.get(clip, COMPLETE) is None for clip in clips)
    print(
        f'clips in {args.videos}: {made:,} new, {len(clips) - made:,} existing; they cover '
        f'{len(held):,} of {len(wanted):,} annotated keyframes'
    )
    for reason, count in Counter(row[2].split(':')[0] for row in rows).items():
        print(f'  {reason}: {count:,}')
    if rows:
        print(f'  report: {path}')


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    sys.stderr = sys.stderr or open(os.devnull, 'w')  # None where it is closed
    try:
        cut(parse_args(argv))
        print(end='', flush=True)
    except BrokenPipeError:  # `| head` has read enough
        os._exit(141)
    except (OSError, UnicodeDecodeError) as error:  # a full disk, permissions; an @FILE of bytes
        sys.exit(f'error: {error}; fix it, then run the same command again')
    except KeyboardInterrupt:
        print('interrupted; run the same command again', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':  # under the name by which workers import it
    sys.path.insert(0, os.path.dirname(__file__))  # python -P leaves it out
    importlib.import_module(Path(__file__).stem).main()
