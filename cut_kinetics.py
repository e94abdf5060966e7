#!/usr/bin/env python3
r"""Step 3: cut the annotated clips out of the Kinetics-700 videos.

Reads the annotations of AVA-Kinetics (kinetics_train_v1.0.csv) and the videos of Kinetics-700, from
a list of files or directly from archives. Writes ROOT/videos/<video id>_<start>_<end>.mp4: the
annotated keyframes plus two seconds before and after, within the source, at FPS frames per second.
Frame k of a clip is the frame of the source nearest to source time start - source_start + k / FPS.

Keyframes without a clip are listed in ROOT/reports/cut_kinetics_train.csv, each with the reason.
The same command continues after an interruption. A clip that is older than its listed source is cut
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
import functools
import gc
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
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, BinaryIO, Callable, Generator, Iterable, Iterator, Literal, NamedTuple

import av
import numpy as np
from joblib import cpu_count
from tqdm import tqdm

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30  # frames per second of the clips
CONTEXT_S = 2  # kept before and after the keyframes; MMAction2's windows reach 40 frames each way
MAX_GAP_S = 60  # keyframes further apart go into separate clips, which saves disk
MAX_OFFSET_S = 0.75  # between a frame and its target time, in a source with gaps
# Codec delays put the first frame up to 0.1 s behind the sound; beyond 0.2 s, frames are missing
MAX_LEAD_S = 0.2
# How much longer than its name says a source may last. Trimmed videos of 10 s last up to 10.1 s;
# longer ones start too early, at the key frame before, or were never trimmed
MAX_EXTRA_S = 1
# x264's options, against its defaults (medium, crf 23); clips may be 1.8 times as large:
#             CPU time   SSIM     size      decoding in Step 4 and in training
#   SMALL     a third    higher   1.8 x     a quarter faster: coder=vlc, for 9 % more size
#   LARGE     a third    higher   1.8 x     as fast: with coder=vlc the size would exceed 1.8 x
ENCODER = {'preset': 'superfast', 'bf': '1', 'b_strategy': '0', 'weightp': '0'}
SMALL = {'crf': '21.4', 'coder': 'vlc'}
LARGE = {'crf': '21.6'}
LARGE_SIDE = 480  # pixels of the short side above which LARGE is used
# Only real containers: FFmpeg would also read a playlist, and with it any file that it names
CONTAINERS = 'mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,asf,mpegts,mpeg,ogg'
MAX_PIXELS = 7680 * 4320  # a header that claims larger frames would cost gigabytes of memory
MAX_BYTES = 2**28  # of a video in an archive; ten seconds have a few MB
MAX_DELAY = 5  # frames by which decoders may report an error late
# FFmpeg's message on intact videos that were cut out of open groups of pictures
HARMLESS = 'mmco: unref short failure'
BT601 = 6  # matrix_coefficients of ITU-T H.273
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
MAX_QUEUED = 500  # items that a cluster is given at once
GIVEN_UP = 'given up: the workers of the cluster that had it were killed'
# How to open a compressed archive, by its first bytes; tarfile's own way stops after the first of
# several compressed pieces
OPENERS: dict[bytes, Callable] = {b'\x1f\x8b': gzip.open, b'BZh': bz2.open, b'\xfd7zX': lzma.open}
VIDEO_ID = re.compile(r'[A-Za-z0-9_-]{1,64}')
CLIP_NAME = re.compile(r'([A-Za-z0-9_-]{1,64})_([0-9]{6})_([0-9]{6})')
# Other files that downloaders leave beside a video (.json, .wav, .jpg) have its name, too
SUFFIXES = 'mp4|m4v|mov|3gp|3g2|mkv|webm|avi|flv|wmv|asf|ts|mpg|mpeg|ogv|ogg'
SOURCE_NAME = re.compile(rf'{CLIP_NAME.pattern}\.(?i:{SUFFIXES})')
LABEL = re.compile(r'\s+[+-]?[0-9]+$')  # at the end of a list's line

Keyframes = dict[str, list[int]]  # video id -> annotated timestamps


class Annotation(NamedTuple):
    """An annotated box; the box is empty if the row says that nobody was annotated."""

    video_id: str
    timestamp: int  # whole seconds, as MMAction2 names keyframes
    box: tuple[float, ...]  # x1, y1, x2, y2, relative to the frame
    action: int

    @property
    def keyframe(self) -> tuple[str, int]:
        return self.video_id, self.timestamp


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


class Source(NamedTuple):
    """A video of Kinetics-700: seconds `start` to `end` of a YouTube video."""

    path: str  # as listed, or in its archive
    video_id: str
    start: int
    end: int


Plan = Callable[[Source], list[Clip]]  # the clips to cut out of a source


class Job(NamedTuple):
    """A clip to cut out of a source."""

    source: Source
    clip: Clip
    content: bytes | None  # of the source, if it comes from an archive


class Outcome(NamedTuple):
    """What became of a clip; `reason` says why it failed."""

    status: Literal['new', 'existing', 'failed']
    reason: str = ''


class Options(NamedTuple):
    """What a worker needs to know; the folders are absolute."""

    videos: Path
    scratch: Path  # for unfinished files
    source_folders: tuple[Path, ...]  # where the paths of a list may start
    short_side: int | None  # pixels


class SourceError(Exception):
    """Why no clip can be cut out of a source."""


class TimedFrame(NamedTuple):
    """A decoded frame; without a frame, a sentinel before the first or after the last."""

    time: float  # seconds from the start of the source
    frame: av.VideoFrame | None = None
    error: str = ''  # with which it, or an earlier frame that it depends on, was decoded


class ArchiveLog(NamedTuple):
    """What earlier runs found in archives."""

    clips: dict[str, list[str]]  # archive that was read to its end -> clips of its videos
    failed: dict[str, str]  # clip -> why it could not be cut


def to_path(text: str) -> Path:
    """Return the path that an argument names."""
    if not text:
        raise argparse.ArgumentTypeError('it is empty; set its variable as README says')
    return Path(text).expanduser()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Step 3: cut the annotated clips out of the Kinetics-700 videos.',
        fromfile_prefix_chars='@',
    )
    source = parser.add_argument_group('source')
    source.add_argument(
        '--avakinetics_anotation',
        '--avakinetics_annotation',
        type=to_path,
        default=Path('ava_kinetics_v1_0'),
        metavar='DIR',
        help='folder of the AVA-Kinetics annotations (default: %(default)s)',
    )
    source.add_argument(
        '--split',
        choices=['train', 'val'],
        default='train',
        help='part of AVA-Kinetics (default: train)',
    )
    source.add_argument(
        '--kinetics_list',
        type=to_path,
        metavar='FILE',
        help='list of the Kinetics-700 videos, one per line: PATH [LABEL] (default: '
        f'{MMACTION2}/data/kinetics700/kinetics700_train_list_videos.txt, _val_ with --split val)',
    )
    source.add_argument(
        '--kinetics_archives',
        nargs='+',
        default=[],
        metavar='ARCHIVE',
        help='instead of --kinetics_list: tar files, compressed or not, which are never unpacked: '
        'paths, URLs, @FILE with one of these per line, - for standard input',
    )
    add_output(parser)
    return parser


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where the clips go, and where the step runs."""
    output = parser.add_argument_group('output')
    output.add_argument(
        '--short_side',
        type=int,
        metavar='N',
        help='scale clips down to N pixels on their short side (default: size of the source)',
    )
    output.add_argument(
        '--avakinetics_root',
        type=to_path,
        default=MMACTION2 / 'data/ava_kinetics',
        metavar='DIR',
        help='folder of the data set (default: %(default)s)',
    )
    running = parser.add_argument_group('running')
    running.add_argument(
        '--num_workers',
        type=int,
        default=-1,
        metavar='N',
        help='parallel processes (default: -1, all CPUs)',
    )
    running.add_argument(
        '--dask_scheduler',
        metavar='ADDRESS',
        help='work on the Dask cluster of this scheduler, such as tcp://host:8786',
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    archives = [archive.strip() for archive in args.kinetics_archives if archive.strip()]
    if args.kinetics_archives and not archives:
        sys.exit('error: --kinetics_archives is empty; give archives or --kinetics_list')
    args.kinetics_archives = archives  # without the blank lines of an @FILE
    if args.kinetics_list and args.kinetics_archives:
        sys.exit('error: give --kinetics_list or --kinetics_archives, not both')
    if args.num_workers < 1 and args.num_workers != -1:
        sys.exit('error: --num_workers must be 1 or more, or -1 for all CPUs')
    if args.short_side is not None and (args.short_side < 2 or args.short_side % 2):
        sys.exit('error: --short_side must be an even number of pixels, such as 256')
    listed = MMACTION2 / f'data/kinetics700/kinetics700_{args.split}_list_videos.txt'
    args.kinetics_list = (args.kinetics_list or listed).absolute()
    args.avakinetics_root = args.avakinetics_root.absolute()
    return args


def build_options(args: argparse.Namespace) -> Options:
    videos = args.avakinetics_root / 'videos'
    scratch = videos / f'.cut_kinetics_{args.split}'
    folder = args.kinetics_list.parent
    source_folders = (Path.cwd(), folder, folder / f'videos_{args.split}')
    return Options(videos, scratch, source_folders, args.short_side)


def parse_annotation(line: str) -> Annotation | None:
    """Parse `video_id,timestamp,x1,y1,x2,y2,action_id`; return None if the line is malformed.

    If the line has two columns, or the others are empty, nobody was annotated.
    """
    video_id, *columns = line.split(',')
    if not VIDEO_ID.fullmatch(video_id) or len(columns) not in (1, 6):
        return None
    try:
        timestamp = int(float(columns[0]))
        if not 0 <= timestamp < 10**6:
            return None
        if not any(columns[1:]):
            return Annotation(video_id, timestamp, (), 0)
        x1, y1, x2, y2 = box = tuple(map(float, columns[1:5]))
        action = int(columns[5])
    except (ValueError, OverflowError):  # OverflowError: an infinite timestamp
        return None
    if 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 and action > 0:
        return Annotation(video_id, timestamp, box, action)
    return None


def read_keyframes(path: Path) -> tuple[Keyframes, list[tuple]]:
    """Return the timestamps at which people are annotated, and report rows for malformed lines."""
    if not path.exists():
        sys.exit(f'error: {path} not found; run Step 2 or set --avakinetics_anotation')
    keyframes = defaultdict(set)
    malformed = []
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        for number, line in enumerate(map(str.strip, file), 1):
            annotation = parse_annotation(line)
            if annotation and annotation.box:
                keyframes[annotation.video_id].add(annotation.timestamp)
            elif line and not annotation:
                malformed.append(('', '', f'malformed annotation: line {number}: {line[:80]!r}'))
    if not keyframes:
        reason = malformed[0][2] if malformed else 'nobody is annotated'
        sys.exit(f'error: {path} holds no annotated keyframe: {reason}; run Step 2 again')
    return {video_id: sorted(found) for video_id, found in sorted(keyframes.items())}, malformed


def parse_source(path: str) -> Source | None:
    """Parse a path that ends in `<video id>_<start>_<end>.<suffix>`; return None for any other."""
    match = SOURCE_NAME.fullmatch(path.rsplit('/', 1)[-1])
    source = Source(path, match[1], int(match[2]), int(match[3])) if match else None
    return source if source and source.start < source.end else None


def read_list(path: Path, plan: Plan) -> tuple[list[Job], list[tuple]]:
    """Read the list of videos; return the clips to cut, and report rows for malformed lines."""
    if not path.exists():
        sys.exit(f'error: {path} not found; run Step 1 or set --kinetics_list')
    sources = {}
    malformed = []
    with open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
        for number, line in enumerate(map(str.strip, file), 1):
            if source := parse_source(LABEL.sub('', line)):
                sources[source] = plan(source)
            elif line:
                reason = f'line {number}: no video name like ID_000001_000011.mp4: {line[:80]!r}'
                malformed.append(('', '', f'malformed list line: {reason}'))
    jobs = [Job(source, clip, None) for source, clips in sources.items() for clip in clips]
    if not jobs:
        reasons = [row[2] for row in malformed] or ['it is empty; run Step 1 again']
        reason = 'is it of this split?' if sources else reasons[0]
        sys.exit(f'error: {path} names {len(sources):,} videos, none of them annotated: {reason}')
    return jobs, malformed


def keyframes_in(part: Source | Clip, keyframes: Keyframes) -> list[int]:
    """Return the annotated timestamps that a source or a clip covers."""
    timestamps = keyframes.get(part.video_id, ())
    return [timestamp for timestamp in timestamps if part.start <= timestamp < part.end]


def plan_clips(source: Source, keyframes: Keyframes) -> list[Clip]:
    """Return the clips to cut out of a source, so that each of its keyframes is in one.

    Keyframes that are more than MAX_GAP_S apart go into separate clips.
    """
    groups: list[list[int]] = []
    for timestamp in keyframes_in(source, keyframes):
        if groups and timestamp - groups[-1][-1] <= MAX_GAP_S:
            groups[-1].append(timestamp)
        else:
            groups.append([timestamp])
    clips = []
    for group in groups:
        start = max(source.start, group[0] - CONTEXT_S)
        end = min(source.end, group[-1] + CONTEXT_S)
        name = f'{source.video_id}_{start:06d}_{end:06d}'
        clips.append(Clip(name, source.video_id, start, end))
    return clips


def measure_duration(
    video: av.container.InputContainer, stream: av.VideoStream, enough: float
) -> float:
    """Return how long the frames of a video last, in seconds.

    Prefers the declared duration of the stream. That of the container may include longer sound: if
    it exceeds `enough`, takes the times of the packets instead.
    """
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    declared = (video.duration or math.inf) / av.time_base
    if declared <= enough:
        return declared
    times = [
        packet.pts * packet.time_base for packet in video.demux(stream) if packet.pts is not None
    ]
    video.seek(video.start_time or 0)
    return float(max(times, default=0) - min(times, default=0))


def find_stream(video: av.container.InputContainer, expected: int) -> av.VideoStream:
    """Return the video stream of a source, ready to be decoded.

    Raises SourceError if there is none, or if it lasts more than MAX_EXTRA_S longer than the
    `expected` seconds of the source's name.
    """
    stream = video.streams.best('video')  # not cover art
    if not isinstance(stream, av.VideoStream) or not stream.codec_context:
        raise SourceError('unreadable video: it holds no frames that can be decoded')
    stream.thread_type = 'NONE'  # one thread per process is faster
    stream.codec_context.options = {'max_pixels': str(MAX_PIXELS)}  # av.open's are for probing
    duration = measure_duration(video, stream, expected + MAX_EXTRA_S)
    if duration > expected + MAX_EXTRA_S:
        reason = f'its name says {expected} s, its video lasts {duration:.1f} s'
        raise SourceError(f'source too long: {reason}')
    return stream


def decode_packets(
    video: av.container.InputContainer, stream: av.VideoStream, log: list[tuple[int, str, str]]
) -> Iterator[tuple[av.Packet, list[av.VideoFrame], str]]:
    """Yield (packet, its frames, what the decoder complained about first, if it did)."""
    for packet in video.demux(stream):
        frames: list[av.VideoFrame] = []
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            log.append((av.logging.ERROR, '', error.strerror or str(error)))
        if packet.is_corrupt:
            log.append((av.logging.ERROR, '', 'corrupt packet'))
        messages = [text.strip() for _, _, text in log if HARMLESS not in text]
        log.clear()  # later messages belong to the next packet
        yield packet, frames, messages[0] if messages else ''


def decode(file: BinaryIO, start: float, expected: int) -> Iterator[TimedFrame]:
    """Yield each frame of a source with its time, and the error that may have spoilt it.

    Time 0 is the first frame or, if that comes more than MAX_LEAD_S after the container's start,
    the container's start. An error marks the MAX_DELAY frames before it, since decoders report
    late, and all frames after it. A key frame at or before `start` clears it, since later frames do
    not depend on earlier ones. `expected` is the duration in the source's name. Raises SourceError
    if the source is longer, cannot be decoded or ends with an error.
    """
    origin = None
    now = 0.0
    error = ''
    pending: deque[tuple[float, av.VideoFrame]] = deque()
    options = {'format_whitelist': CONTAINERS, 'max_pixels': str(MAX_PIXELS)}
    with av.logging.Capture() as log, av.open(file, 'r', options=options) as video:
        log.clear()  # messages about the header spoil no frame
        stream = find_stream(video, expected)
        for packet, frames, message in decode_packets(video, stream, log):
            if origin is not None and packet.is_keyframe and packet.pts is not None:
                if packet.pts * packet.time_base <= origin + start:
                    error = ''
            if message and not error:
                error = f'{message}, at {now:.1f} s'
            for frame in frames:
                if frame.time is None:  # from a damaged packet
                    continue
                if origin is None:
                    begin = (video.start_time or 0) / av.time_base
                    origin = begin if frame.time - begin > MAX_LEAD_S else frame.time
                # H.264 with B-frames in AVI has no times of its own
                if frame.time - origin < now:
                    error = error or f'the times of its frames run backwards, at {now:.1f} s'
                now = frame.time - origin
                pending.append((now, frame))  # where an error that is reported late still marks it
                if len(pending) > MAX_DELAY:
                    yield TimedFrame(*pending.popleft(), error)
        yield from (TimedFrame(*timed, error) for timed in pending)
    # reached only if the clip needs the end of the source
    if origin is None:
        raise SourceError(f'unreadable video: {error or "it holds no frames"}')
    if error:
        raise SourceError(f'damaged video: {error}')


def resample(frames: Iterator[TimedFrame], start: int, end: int) -> Iterator[av.VideoFrame]:
    """Yield the frame nearest to each target time, FPS of them per second from `start` to `end`.

    Raises SourceError if it is more than MAX_OFFSET_S away, or spoilt.
    """
    before, after = TimedFrame(-math.inf), next(frames)
    for index in range((end - start) * FPS):
        target = start + index / FPS
        while after.time <= target:
            before, after = after, next(frames, TimedFrame(math.inf))
        # 0.001 s, since Matroska rounds times to milliseconds
        chosen = before if target - before.time <= after.time - target + 0.001 else after
        if chosen.frame is None or abs(chosen.time - target) > MAX_OFFSET_S:
            if after.frame is None:
                missing = end - before.time - 1 / FPS
                raise SourceError(f'source too short: it ends {missing:.1f} s before the clip does')
            gap = f'between {max(0, before.time):.1f} and {after.time:.1f} s'
            raise SourceError(f'damaged video: no frame {gap}')
        if chosen.error:
            raise SourceError(f'damaged video: {chosen.error}')
        yield chosen.frame


def turn_upright(frame: av.VideoFrame, matrix: Any) -> av.VideoFrame:
    """Turn and mirror a frame by a display matrix, if there is one, as players do.

    To the nearest right angle, since phones write matrices that are a hair off. A degenerate matrix
    says nothing.
    """
    if not matrix:
        return frame
    # x' = ax + cy, y' = bx + dy
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if not (a or c) or not (b or d):  # x' or y' would be constant
        return frame
    image: np.ndarray = frame.to_ndarray(format='rgb24')
    if abs(c) > abs(a):  # a quarter turn: x' follows y, with the sign of c, and y' follows x
        image, a, d = image.swapaxes(0, 1), c, b
    image = image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(image), 'rgb24')


def prepare_frame(frame: av.VideoFrame, short_side: int | None) -> av.VideoFrame:
    """Convert a frame to what is encoded: not too large, even sides, yuv420p, BT.601."""
    factor = min(1, (short_side or math.inf) / min(frame.width, frame.height))
    return frame.reformat(
        2 * round(frame.width // 2 * factor),
        2 * round(frame.height // 2 * factor),
        'yuv420p',
        dst_colorspace='ITU601',
        dst_color_range='MPEG',
        interpolation='BICUBIC',
        threads=1,  # more would wait for each other while all CPUs are at work
    )


def encode(frames: Iterator[av.VideoFrame], short_side: int | None) -> bytes:
    """Encode frames as an H.264 clip (mp4) of FPS frames per second."""
    content = io.BytesIO()
    with av.open(content, 'w', format='mp4') as clip:
        for index, frame in enumerate(frames):
            if index == 0:  # only once: reading side_data makes a frame refer to itself
                matrix = frame.side_data.get('DISPLAYMATRIX')
            frame = prepare_frame(turn_upright(frame, matrix), short_side)
            if index == 0:
                size = (frame.width, frame.height)
                options = ENCODER | (SMALL if min(size) <= LARGE_SIDE else LARGE)
                stream = clip.add_stream('libx264', FPS, options=options)
                stream.width, stream.height = size
                stream.codec_context.colorspace = BT601
                stream.thread_count = 1
            if (frame.width, frame.height) != size:
                raise SourceError('damaged video: the size of its frames changes')
            frame.pts = index
            frame.time_base = Fraction(1, FPS)
            frame.pict_type = 0  # x264 chooses; else it keeps the source's key frames
            clip.mux(stream.encode(frame))
        clip.mux(stream.encode())  # flush the encoder
    return content.getvalue()


def is_current(clip: Path, source: Path | None) -> bool:
    """Return whether a clip exists and is not older than its source, if that exists.

    Times in the future make nothing stale.
    """
    try:
        clip_time = clip.stat().st_mtime
        source_time = (source or clip).stat().st_mtime
    except OSError:
        return False
    return clip_time >= source_time or source_time > time.time()


def find_file(source: Source, options: Options) -> Path | None:
    """Return the file of a listed source, if it exists."""
    places = (folder / source.path for folder in options.source_folders)
    return next(filter(os.path.isfile, places), None)


def is_cut(job: Job, options: Options) -> bool:
    """Return whether the clip of a job exists and is current."""
    clip = options.videos / f'{job.clip.name}.mp4'
    path = find_file(job.source, options) if job.content is None else None
    return is_current(clip, path)


def cut_clip(job: Job, options: Options) -> Outcome:
    """Cut a clip out of its source, a file or the content of an archive's member."""
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # a repeated message, too, may tell of damage
    source, clip, content = job
    target = options.videos / f'{clip.name}.mp4'
    if is_cut(job, options):
        return Outcome('existing')
    path = find_file(source, options) if content is None else None
    if content is None and not path:
        return Outcome('failed', f'file missing: {source.path}')
    if content == b'':
        return Outcome('failed', 'unreadable video: in its archive it is empty, or a link')
    start, end = clip.start - source.start, clip.end - source.start
    try:
        with open(path, 'rb') if path else io.BytesIO(content or b'') as file:
            frames = decode(file, start, source.end - source.start)
            encoded = encode(resample(frames, start, end), options.short_side)
    except SourceError as error:
        return Outcome('failed', str(error))
    except IndexError:  # PyAV's, if damage looks like another stream
        return Outcome('failed', 'damaged video: another stream begins in the middle')
    except (av.FFmpegError, OSError, ValueError) as error:  # ValueError: an undecodable name
        reason = (getattr(error, 'log', None) or [error])[-1]  # FFmpeg's last message
        return Outcome('failed', f'unreadable video: {reason}'.strip())
    finally:
        gc.collect(1)  # frees the first frame, and the decoder's buffers with it
    part = options.scratch / f'{uuid.uuid4().hex}.mp4'
    part.write_bytes(encoded)
    os.replace(part, target)
    return Outcome('new')


class RetryingFile(io.RawIOBase):
    """A binary file that goes on reading after a dropped connection."""

    def __init__(self, file: BinaryIO):
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
    """Raises an error for a damaged header, where tarfile would skip it or stop."""

    @classmethod
    def frombuf(cls, *args):
        try:
            return super().frombuf(*args)
        # typeshed does not know these two
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore
            raise tarfile.ReadError(f'not a tar archive, or a damaged one: {error}') from None


def open_archive(name: str) -> tuple[BinaryIO, str]:
    """Open an archive; return it with its version: size and time or ETag, '' for standard input."""
    if name == '-':
        return sys.stdin.buffer, ''
    import fsspec

    # trust_env: with the proxies that the environment names
    options = {'client_kwargs': {'trust_env': True}} if name.startswith('http') else {}
    system, path = fsspec.url_to_fs(name, **options)
    info = system.info(path)
    times = (info.get(key) for key in ('ETag', 'mtime', 'LastModified', 'Last-Modified'))
    changed = next(filter(None, times), None)
    return system.open(path), f'{info.get("size")} {changed}'


def read_members(file: BinaryIO, plan: Plan) -> Iterator[Job]:
    """Yield the clips to cut out of a tar archive, or of several that follow one another."""
    stream = io.BufferedReader(RetryingFile(file), 1 << 20)
    for magic, decompress in OPENERS.items():
        if stream.peek(4).startswith(magic):
            stream = decompress(stream)
            break
    num_sources = 0
    with tarfile.open(
        fileobj=stream, mode='r|', bufsize=1 << 20, tarinfo=StrictTarInfo, ignore_zeros=True
    ) as tar:
        while member := tar.next():
            tar.members.clear()  # type: ignore  # else memory grows with the archive
            source = parse_source(member.name)
            if not source:
                continue
            num_sources += 1
            if clips := plan(source):
                data = tar.extractfile(member) if member.isfile() else None  # not a link
                content = data.read(MAX_BYTES) if data else b''
                yield from (Job(source, clip, content) for clip in clips)
    if not num_sources:
        raise tarfile.ReadError('it holds no video of Kinetics-700')


def read_log(path: Path) -> ArchiveLog:
    """Read the log of archives; skip lines that a killed run or an older version left."""
    log = ArchiveLog({}, {})
    for line in path.read_text(errors='replace').splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            if 'archive' in record:
                log.clips[record['archive']] = record['clips']
            elif record['reason']:
                log.failed[record['clip']] = record['reason']
            else:  # it could be cut in a later run
                log.failed.pop(record['clip'], None)
    return log


def explain_error(error: Exception) -> str:
    """Say why an archive cannot be read, where a library's words do not help."""
    if str(error) == 'empty file':  # tarfile's
        return 'it is empty'
    if 'range requests' in str(error):  # fsspec's
        return 'its server answers no range requests; pipe it into --kinetics_archives - with curl'
    return f'{type(error).__name__}: {error}'


class ArchiveReader:
    """Reads the clips to cut out of archives, and keeps the log; `errors` says what failed.

    An archive that was read to its end is not read again while each of its clips exists or failed.
    `log` has what earlier runs found; a failure in it counts while its clip does not exist.
    """

    def __init__(self, archives: list[str], log_path: Path, videos: Path):
        self.archives = archives
        self.log_path = log_path
        self.log = read_log(log_path) if archives else ArchiveLog({}, {})
        self.videos = videos
        self.errors: list[str] = []

    def find_failed(self) -> dict[str, Outcome]:
        """Return the clips that failed in earlier runs and still do not exist."""
        return {
            clip: Outcome('failed', reason)
            for clip, reason in self.log.failed.items()
            if not self.clip_exists(clip)
        }

    def clip_exists(self, clip: str) -> bool:
        return (self.videos / f'{clip}.mp4').exists()

    def is_done(self, key: str) -> bool:
        """Return whether an archive was read to its end, and its clips exist or failed."""
        return key in self.log.clips and all(
            clip in self.log.failed or self.clip_exists(clip) for clip in self.log.clips[key]
        )

    def read(self, plan: Plan, keyframes: Keyframes, bar: tqdm) -> Iterator[Job]:
        """Yield the clips that do not exist yet."""
        digest = hashlib.sha256(json.dumps(keyframes).encode()).hexdigest()
        for number, archive in enumerate(self.archives, 1):
            bar.set_postfix_str(f'archive {number} of {len(self.archives)}')
            clips = set()
            try:
                file, version = open_archive(archive)
                key = f'{Path(archive).name} {version} {digest}'  # no folder: it may be moved
                if self.is_done(key):
                    continue
                for job in read_members(file, plan):
                    clips.add(job.clip.name)
                    if not self.clip_exists(job.clip.name):
                        yield job
            except Exception as error:  # remote file systems raise what their libraries do
                self.errors.append(f'{archive}: {explain_error(error)}')
            else:
                if version:
                    self.append_to_log(archive=key, clips=sorted(clips))

    def record(self, job: Job, outcome: Outcome) -> None:
        """Log that a clip of an archive failed, or no longer does; one given up is tried again."""
        clip = job.clip.name
        is_news = outcome.reason or clip in self.log.failed
        if job.content is not None and is_news and outcome.reason != GIVEN_UP:
            self.append_to_log(clip=clip, reason=outcome.reason)

    def append_to_log(self, **record) -> None:
        with open(self.log_path, 'a') as file:
            file.write(f'\n{json.dumps(record)}\n')  # on a new line, after one that was cut off


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


def check_options(args: argparse.Namespace, videos: Path) -> None:
    """Record what shapes the clips; exit if the existing clips were made with other options.

    A key that an older record lacks counts as unchanged.
    """
    options = {
        'short_side': args.short_side,
        'av': av.__version__,
        'fps': FPS,
        'context_s': CONTEXT_S,
        'encoder': [ENCODER, SMALL, LARGE, LARGE_SIDE],
    }
    path = args.avakinetics_root / 'reports/cut_kinetics_options.json'
    recorded = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        recorded = json.loads(path.read_text())
    if any(videos.glob('*.mp4')):
        if not recorded:
            reason = f'were not made by this script (there is no {path}); move them away'
            sys.exit(f'error: the clips in {videos} {reason}')
        changed = [key for key in options if recorded.get(key, options[key]) != options[key]]
        if changed:
            described = ', '.join(f'{key} {recorded[key] or "of the source"}' for key in changed)
            sys.exit(
                f'error: the clips in {videos} were made with {described}; give the same options '
                'and install the same av, or move these clips away'
            )
    write_if_changed(path, json.dumps(options).encode())


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


def find_covering_clips(names: Iterable[str], keyframes: Keyframes) -> dict[Clip, list[int]]:
    """Return the clips among these names that cover keyframes, with the timestamps."""
    return {
        clip: timestamps
        for clip in map(parse_clip, names)
        if clip and (timestamps := keyframes_in(clip, keyframes))
    }


def index_by_keyframe(clips: dict[Clip, list[int]]) -> dict[tuple[str, int], str]:
    """Return the name of a clip for each keyframe (video id, timestamp) that clips cover."""
    return {(clip.video_id, found): clip.name for clip in clips for found in clips[clip]}


def list_failures(
    keyframes: Keyframes, clips: dict[Clip, list[int]], outcomes: dict[str, Outcome]
) -> list[tuple]:
    """Return a report row for each keyframe without a clip, or whose clip could not be replaced.

    `clips` has all clips with their keyframes, `outcomes` what became of new and failed ones.
    """
    covered = index_by_keyframe(clips)
    attempted = index_by_keyframe(find_covering_clips(outcomes, keyframes))
    rows = []
    for keyframe in ((video_id, found) for video_id in keyframes for found in keyframes[video_id]):
        clip = covered.get(keyframe) or attempted.get(keyframe)
        reason = outcomes[clip].reason if clip in outcomes else ''
        if keyframe not in covered:
            rows.append((*keyframe, reason or 'no video that could be read holds this second'))
        elif reason:  # its source is newer, and broken
            rows.append((*keyframe, f'older clip kept: {reason}'))
    return rows


def cut_jobs(
    jobs: Iterable[Job], options: Options, args: argparse.Namespace, bar: tqdm
) -> Iterator[tuple[Job, Outcome]]:
    """Yield jobs with their outcomes, as they are done."""
    results = run_all(cut_clip, jobs, options, args.num_workers, args.dask_scheduler)
    with contextlib.closing(results):
        for job, outcome in results:
            bar.update()
            if not outcome:  # its workers were killed, perhaps after one had cut it
                is_lost = not is_cut(job, options)
                outcome = Outcome('failed', GIVEN_UP) if is_lost else Outcome('new')
            yield job, outcome


def print_summary(
    clips: dict[Clip, list[int]],
    outcomes: dict[str, Outcome],
    rows: list[tuple],
    keyframes: Keyframes,
    videos: Path,
) -> None:
    """Print how many clips are new, how many keyframes they cover, and why others are missing."""
    new = sum(outcomes.get(clip.name) == Outcome('new') for clip in clips)
    covered = len(index_by_keyframe(clips))
    print(
        f'clips in {videos}: {new:,} new, {len(clips) - new:,} existing; they cover '
        f'{covered:,} of {sum(map(len, keyframes.values())):,} annotated keyframes'
    )
    for reason, number in Counter(row[2].split(':')[0] for row in rows).items():
        print(f'  {reason}: {number:,}')


def cut_all(args: argparse.Namespace) -> None:
    """Cut all clips, write the report and print the summary."""
    # read the annotations and the list
    gc.disable()  # it would search millions of tuples again and again, a third of the time
    reports = args.avakinetics_root / 'reports'
    annotations = args.avakinetics_anotation / f'kinetics_{args.split}_v1.0.csv'
    keyframes, problems = read_keyframes(annotations)
    plan = functools.partial(plan_clips, keyframes=keyframes)
    jobs: list[Job] = []
    if not args.kinetics_archives:
        jobs, malformed = read_list(args.kinetics_list, plan)
        problems += malformed
    gc.enable()

    # cut the clips
    options = build_options(args)
    log_path = reports / f'cut_kinetics_{args.split}_archives.jsonl'
    reader = ArchiveReader(args.kinetics_archives, log_path, options.videos)
    outcomes = reader.find_failed()
    with workspace(options.scratch):
        check_options(args, options.videos)
        with tqdm(desc='cut', total=len(jobs) or None, unit='clip', leave=False) as bar:
            planned = jobs or reader.read(plan, keyframes, bar)
            for job, outcome in cut_jobs(planned, options, args, bar):
                # several sources may have the same clip: once one gave it, others may fail
                if outcome.status != 'existing' and outcomes.get(job.clip.name) != Outcome('new'):
                    outcomes[job.clip.name] = outcome
                reader.record(job, outcome)

    # report the keyframes without a clip
    names = (name[:-4] for name in os.listdir(options.videos) if name.endswith('.mp4'))
    clips = find_covering_clips(names, keyframes)
    rows = list_failures(keyframes, clips, outcomes) + problems
    rows += [('', '', f'unreadable archive: {error}') for error in reader.errors]
    report = reports / f'cut_kinetics_{args.split}.csv'
    write_csv(report, [('video_id', 'timestamp', 'reason'), *rows])
    print_summary(clips, outcomes, rows, keyframes, options.videos)
    if rows:
        print(f'  report: {report}')
    if reader.errors:
        count = f'{len(reader.errors)} of {len(args.kinetics_archives)}, first {reader.errors[0]}'
        sys.exit(f'error: archives that cannot be read to the end: {count}')
    if not clips:
        sys.exit('error: no clip could be cut; the report says why')


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    sys.stderr = sys.stderr or open(os.devnull, 'w')  # None if it is closed
    try:
        cut_all(parse_args(argv))
        print(end='', flush=True)  # so that a closed pipe is noticed here
    except BrokenPipeError:  # `| head` has read enough
        os._exit(141)
    except (OSError, UnicodeDecodeError) as error:  # a full disk, permissions; an @FILE of bytes
        sys.exit(f'error: {error}; fix it, then run the same command again')
    except KeyboardInterrupt:
        print('interrupted; run the same command again', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':  # run as a module: workers of a cluster cannot import __main__
    sys.path.insert(0, os.path.dirname(__file__))  # python -P leaves it out
    importlib.import_module(Path(__file__).stem).main()
