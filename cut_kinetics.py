#!/usr/bin/env python3
"""Step 3: cut the annotated clips out of the Kinetics-700 videos.

Reads the AVA-Kinetics annotations (kinetics_train_v1.0.csv) and the list of Kinetics-700 videos, or
their archives, and writes ROOT/videos/<video_id>_<start:06d>_<end:06d>.mp4: two seconds around the
annotated keyframes, constant 30 fps, exactly (end - start) * 30 frames, frame k being the source
frame nearest to source time start - source_start + k / 30. What could not be cut is in
ROOT/reports/cut_kinetics_train.csv with its reason. Run it again to continue after an interruption:
clips that are there are kept, unless their source is newer. With `--split val`, all names have val
in place of train.

    python3 cut_kinetics.py --avakinetics_anotation=./ava_kinetics_v1_0 \\
        --kinetics_list=$MMACTION2/data/kinetics700/kinetics700_train_list_videos.txt \\
        --avakinetics_root=$MMACTION2/data/ava_kinetics
"""

import argparse
import contextlib
import csv
import ctypes
import errno
import fcntl
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import types
import uuid
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Callable, Iterator

import imageio_ffmpeg
from tqdm import tqdm

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30
# seconds kept before and after the keyframes; MMAction2's windows reach 32 frames, about one second
CONTEXT_S = 2
MAX_REPEAT = 22  # frames: a source that ends up to 0.75 s early has its last frame repeated
# how far a frame's source time may be from its due time where pictures are missing
MAX_OFF_S = 0.75
# codec delays put the first picture up to 0.1 s behind the sound; beyond, pictures are missing
MAX_LEAD_S = 0.2
# More SSIM than x264's defaults (medium, crf 23) at a third of the time and below 1.8 times the
# size. One B-frame and no look-ahead are faster than superfast itself; without CABAC (9 % of size),
# Step 4 and training decode a quarter faster. Large pictures need CABAC to stay below 1.8 times the
# size
ENCODER = [
    '-c:v',
    'libx264',
    '-preset',
    'superfast',
    '-bf',
    '1',
    '-b_strategy',
    '0',
    '-weightp',
    '0',
    '-threads',
    '1',
    '-pix_fmt',
    'yuv420p',
]
QUALITY, LARGE_QUALITY, LARGE = (
    ['-crf', '21.4', '-coder', 'vlc'],
    ['-crf', '21.6'],
    480,
)  # pixels of the short side
# what decoders and JPEG assume, and most sources use
COLOURS = 'scale=out_range=limited:out_color_matrix=bt601'
CLIP_FORMAT = 2  # higher for each change of this script that makes other clips
# Only real containers: ffmpeg would also read a playlist under a video's name, and with it any
# other file
FORMATS = 'mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,asf,mpegts,mpeg,ogg'
MAX_PIXELS = 7680 * 4320  # a header that claims larger pictures would cost gigabytes of memory
READING = dict(format_whitelist=FORMATS, protocol_whitelist='file', max_pixels=str(MAX_PIXELS))
MAX_BYTES = 2**30  # of a video in an archive; ten seconds have a few MB
# s that ffmpeg may take for each second of video, some 100 times the usual, and 30 s more
TIME_LIMIT = 12
MISSING, OF_FFMPEG = (
    'file missing: ',
    'unreadable video: ffmpeg ',
)  # how reasons begin that are not the video's fault
KILLED = f'{OF_FFMPEG}was killed, as it happens when memory runs out'
# What ffmpeg says where threads, memory or permissions are short
REFUSAL = (
    'Resource temporarily unavailable|Cannot allocate memory|malloc of size|Permission '
    'denied|Too many open files'
)
DISK_FULL = {b'No space left on device': errno.ENOSPC, b'Disk quota exceeded': errno.EDQUOT}
# Messages that damaged files cause, and none of the intact files that were tried. A stream without
# an index may lose packets, which ffmpeg tells at level debug alone
FAULT = (
    r'\[(error|fatal)\]|corrupt|undecodable|Invalid timestamps|Continuity check '
    r'failed|Frame num gap'
)
OTHER_SIZE = r'context - (w: \d+ h: \d+ fmt: \d+) .*incoming frame - (?!\1)'
# at the start of a video that a tool cut out of open groups of pictures
HARMLESS = 'mmco: unref short failure'
STREAMS = '.ts', '.mts', '.m2ts', '.mpg', '.mpeg', '.vob'
READ_AGAIN = 'archive to read again'
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
AHEAD = 2000  # items that a cluster is given at once
VIDEO_ID = re.compile(r'[A-Za-z0-9_-]{11}')
NUMBERS = ['timestamp', 'x1', 'y1', 'x2', 'y2', 'action']
BLOCK = 2**22  # bytes of annotations that are read together
SOURCE_NAME = r'([A-Za-z0-9_-]{11})_([0-9]{6})_([0-9]{6})\.[A-Za-z0-9]+'


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Step 3: cut the annotated clips out of the Kinetics-700 videos.',
        fromfile_prefix_chars='@',
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
        f'{MMACTION2}/data/kinetics700/kinetics700_train_list_videos.txt, or ..._val_...)',
    )
    parser.add_argument(
        '--kinetics_archives',
        nargs='+',
        metavar='ARCHIVE',
        help='in place of --kinetics_list: tar or tar.gz files or URLs, or @FILE with one of '
        'these a line; '
        'read in one pass, never unpacked',
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
        '--ffmpeg',
        metavar='PATH',
        help="ffmpeg program; other versions may choose other frames (default: imageio-ffmpeg's)",
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='cut clips again that are there already'
    )
    args = parser.parse_args(argv)
    args.kinetics_list = (
        args.kinetics_list
        or MMACTION2 / f'data/kinetics700/kinetics700_{args.split}_list_videos.txt'
    )
    args.avakinetics_root = args.avakinetics_root.absolute()
    try:
        args.ffmpeg = args.ffmpeg or imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:  # its wheel for this machine brings none
        sys.exit('error: imageio-ffmpeg has no ffmpeg for this machine; set --ffmpeg')
    if args.num_workers < 1 and args.num_workers != -1:
        sys.exit('error: --num_workers must be 1 or more, or -1 for all CPUs')
    if args.short_side is not None and (args.short_side < 2 or args.short_side % 2):
        sys.exit('error: --short_side must be an even number of pixels, such as 256')
    return args


def read_annotations(path: Path):
    """The rows as a DataFrame of video and NUMBERS, and report rows on malformed lines.

    Rows of two columns name keyframes without people: their box and action are NaN.
    """
    import numpy as np
    import pandas as pd

    tables, problems, count = [], [], 0
    with open(path, 'rb') as file:
        while block := file.read(BLOCK) + file.readline():
            try:
                if block.split(b'\n', 1)[0].count(b',') > 6:
                    raise ValueError(
                        'pandas would make an index of these columns, or fail on others'
                    )
                table = pd.read_csv(
                    io.BytesIO(block),
                    header=None,
                    names=['video', *NUMBERS],
                    quoting=csv.QUOTE_NONE,
                    dtype={'video': str, **dict.fromkeys(NUMBERS, float)},
                    skip_blank_lines=False,
                    keep_default_na=False,
                    na_values=[''],
                )
                if not all(map(VIDEO_ID.fullmatch, table.video.unique().tolist())):
                    raise ValueError('quotes, spaces')
                named, blank = table.video.notna(), table.video.isna()
            except (ValueError, TypeError):  # a line that is not of this form: each is taken apart
                lines = io.TextIOWrapper(io.BytesIO(block), 'utf-8-sig', 'replace').readlines()
                rows = [
                    [field.strip().strip('"') or None for field in line.split(',')]
                    for line in lines
                ]
                table = pd.DataFrame(
                    [row + [None] * (7 - len(row)) if len(row) <= 7 else [''] * 7 for row in rows],
                    columns=['video', *NUMBERS],
                )
                numbers = table[NUMBERS].apply(pd.to_numeric, errors='coerce').astype(float)
                table[NUMBERS] = numbers.mask(
                    numbers.isna() & table[NUMBERS].notna(), -1
                )  # not a number
                named = table.video.fillna('').str.fullmatch(VIDEO_ID)
                blank = np.array([not line.strip() for line in lines])
            box, nobody = table[NUMBERS[1:5]], table[NUMBERS[1:]].isna().all(axis=1)
            inside = (
                ((box >= 0) & (box <= 1)).all(axis=1)
                & (table.x1 < table.x2)
                & (table.y1 < table.y2)
            )
            faults = [
                ('no video id, or more than 7 columns', ~named),
                ('not a time in seconds', ~table.timestamp.between(0, 1e6, 'left')),
                ('not a box within 0 and 1', ~(inside | nobody)),
                (
                    'not an action of 1 to 80',
                    ~(table.action.between(1, 80) & (table.action % 1 == 0) | nobody),
                ),
            ]
            reasons = np.select(
                [wrong for _, wrong in faults], [reason for reason, _ in faults], ''
            )
            problems += [
                ('', '', f'malformed annotation: line {count + index + 1}: {reasons[index]}')
                for index in np.flatnonzero((reasons != '') & ~blank)
            ]
            tables.append(table[reasons == ''])
            count += len(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(
        columns=['video', *NUMBERS]
    ), problems


def read_keyframes(path: Path):
    """The annotated seconds as a DataFrame of video and second, the number of those without people,
    and report rows.
    """
    import pandas as pd

    table, problems = read_annotations(path)
    table['second'] = table.timestamp.astype(
        int
    )  # MMAction2 names a keyframe so; real ones are 0 to 0.17 s later
    people, names = table.x1.notna(), ['video', 'second']
    keyframes = table.loc[people, names].drop_duplicates(ignore_index=True)
    seconds = pd.concat([keyframes, table.loc[~people, names]]).drop_duplicates()
    return keyframes, len(seconds) - len(keyframes), problems


def read_sources(path: Path, videos: set[str]):
    """The listed sources of these videos as a DataFrame of video, start, end (s), path, and report
    rows on malformed lines.
    """
    import pandas as pd

    line = rf'^[ \t]*((?:.*/)?{SOURCE_NAME})(?:[ \t]+[+-]?[0-9]+)?[ \t]*$'
    text, problems = path.read_text(encoding='utf-8-sig', errors='surrogateescape'), []
    found = re.findall(line, text, re.M)
    if len(found) < len(text.rstrip('\n').split('\n')) or any(
        start >= end for _, _, start, end in found
    ):
        for number, words in enumerate(text.split('\n'), 1):
            name = re.match(line, words)
            if words.strip() and not (name and name[3] < name[4]):
                problems.append(
                    (
                        '',
                        '',
                        f'malformed list line: line {number}: no name like ID_000001_000011.mp4',
                    )
                )
    sources = dict.fromkeys(
        (video, int(start), int(end), path)
        for path, video, start, end in found
        if video in videos and start < end
    )
    return pd.DataFrame(list(sources), columns=['video', 'start', 'end', 'path']), problems


def find_holders(keyframes, sources):
    """Every keyframe with every source that holds it: columns video, second, source (its index),
    start, end, rank.
    """
    holders = keyframes.merge(sources.rename_axis('source').reset_index(), on='video')
    holders = holders[(holders.start <= holders.second) & (holders.second < holders.end)]
    if 'rank' not in holders:  # most centred first
        holders['rank'] = (holders.start + holders.end - 2 * holders.second).abs()
    return holders.sort_values('rank', kind='stable')


def clip_range(start, end, first, last):
    """Seconds [start, end) of the original to keep for keyframes first to last: two around them,
    within the source's.
    """
    import numpy as np

    return np.maximum(start, first - CONTEXT_S), np.minimum(end, last + CONTEXT_S)


def clip_name(video: str, start: int, end: int) -> str:
    return f'{video}_{start:06d}_{end:06d}.mp4'


def name_clips(held, sources):
    """The sources of these keyframes, with the clip that covers them: its start and length (s) and
    its name.
    """
    spans = sources.join(held.groupby('source').second.agg(['min', 'max']), how='inner')
    first, last = clip_range(spans.start, spans.end, spans['min'], spans['max'])
    return spans.assign(
        offset=first - spans.start,
        seconds=last - first,
        name=[
            clip_name(*clip) for clip in zip(spans.video.tolist(), first.tolist(), last.tolist())
        ],
    )


def plan_clips(keyframes, sources):
    """The keyframes with the source in which each is most centred, and these sources with their
    clips.
    """
    covered = find_holders(keyframes, sources).drop_duplicates(['video', 'second'])
    return covered, name_clips(covered, sources)


def is_large(video: Path) -> bool:
    """Whether the short side of its pictures is above LARGE."""
    import av

    try:
        with open(video, 'rb') as file, av.open(file, options=READING) as source:
            return min(source.streams.video[0].width, source.streams.video[0].height) > LARGE
    except (av.FFmpegError, OSError, IndexError, ValueError):  # ffmpeg says what is wrong with it
        return False


def cut_command(
    ffmpeg: str,
    video: Path,
    offset: int,
    seconds: int,
    short_side: int | None,
    large: bool,
    target: Path,
) -> list[str]:
    """ffmpeg's arguments to cut `seconds` from source time `offset` (both in s), each frame the
    nearest of the source.

    `setpts` moves every frame to the middle between its predecessor and itself, so that `fps`,
    which holds a frame until the next one is due, takes the nearest frame on either side, at any
    frame rate. Source time 0 is the container's start, or the first picture where that follows
    within MAX_LEAD_S. A gap between pictures that leaves frames of the clip without one within
    MAX_OFF_S is printed, as two times, among the errors (level 16).
    """
    before, far = 'if(isnan(PREV_INT),0,PREV_INT)', MAX_OFF_S
    gap = (
        f'gt(T-{before},if(isnan(PREV_INT),{far},{2 * far}))*gt(T-{far},{offset})'
        f'*lt({before}+{far},{offset + seconds})'
    )
    filters = (
        f"settb=AVTB,setpts='(PTS+if(isnan(PREV_INPTS),PTS,PREV_INPTS))/2-if(lt(STARTT,{MAX_LEAD_S}),STARTPTS,0)"
        f"+if({gap},0*(print({before},16)+print(T,16)),0)',"
        f'fps={FPS}:start_time={offset}:round=up,tpad=stop={MAX_REPEAT}:stop_mode=clone,'
        'crop=trunc(iw/2)*2:trunc(ih/2)*2:0:0,'
    )  # yuv420p needs even sides; boxes are relative
    if short_side:
        factor = f'min(1,{short_side}/min(iw,ih))'
        filters += f"scale='2*round(iw/2*{factor})':'2*round(ih/2*{factor})',"
    level = 'level+debug' if video.suffix.lower() in STREAMS else 'level+warning'
    quality = LARGE_QUALITY if large else QUALITY
    return [
        ffmpeg,
        '-nostdin',
        '-v',
        level,
        '-protocol_whitelist',
        'file',
        '-format_whitelist',
        FORMATS,
        '-max_pixels',
        str(MAX_PIXELS),
        '-threads',
        '1',
        '-reinit_filter',
        '0',
        '-i',
        f'file:{video}',
        '-map',
        '0:V:0',
        '-vf',
        filters + COLOURS,
        '-frames:v',
        str(seconds * FPS),
        *ENCODER,
        *quality,
        '-map_metadata',
        '-1',
        '-map_chapters',
        '-1',
        '-f',
        'mp4',
        '-y',
        str(target),
    ]


def find_damage(video: Path, start: int, end: int, words: str) -> str | None:
    """Why source times start to end (s) may show what was decoded with errors, of which ffmpeg's
    are `words`; else None.

    An error shows in no picture before its packet's decoding time, and in none after the next key
    frame.
    """
    import av

    fault, seen = None, False
    av.logging.set_level(av.logging.ERROR)
    try:
        with (
            open(video, 'rb') as file,
            av.open(file, options=READING) as source,
            av.logging.Capture() as log,
        ):
            stream = source.streams.video[0]
            stream.thread_type = 'NONE'
            for packet in source.demux(stream):
                pts, dts = (
                    math.nan
                    if ticks is None
                    else float(ticks * packet.time_base) - (source.start_time or 0) / 1e6
                    for ticks in (packet.pts, packet.dts)
                )
                if packet.is_keyframe and pts <= start:
                    fault = None
                log.clear()
                try:
                    packet.decode()
                    wrong = packet.is_corrupt or any(
                        HARMLESS not in message for _, _, message in log
                    )
                except av.FFmpegError:
                    wrong = True
                if wrong and fault is None:
                    fault, seen = dts, True
    except (
        av.FFmpegError,
        IndexError,
        ValueError,
    ):  # not even headers make sense: streams that come and go, names in no code
        return f'damaged video: {words}'
    finally:
        av.logging.set_level(None)
    if seen and (fault is None or fault >= end + MAX_LEAD_S):
        return None
    return f'damaged video: {words}' + (
        f', at {max(fault, 0):.1f} s' if seen and not math.isnan(fault) else ''
    )


def cut_clip(
    video: Path, offset: int, seconds: int, name: str, options: argparse.Namespace
) -> str | None:
    """Cut ROOT/videos/<name> out of a video; return None, or the reason why it cannot be had."""
    videos = options.avakinetics_root / 'videos'
    part = videos / f'.cut_kinetics_{options.split}/{uuid.uuid4().hex}.mp4'
    try:
        problem = cut_part(video, offset, seconds, part, options)
        if not problem:
            os.replace(part, videos / name)
    finally:
        part.unlink(missing_ok=True)
    return problem


def cut_part(
    video: Path, offset: int, seconds: int, part: Path, options: argparse.Namespace
) -> str | None:
    """Cut one clip into `part`; return None, or the reason why it cannot be had from this video."""
    large = (options.short_side is None or options.short_side > LARGE) and is_large(video)
    try:
        done = subprocess.run(
            cut_command(options.ffmpeg, video, offset, seconds, options.short_side, large, part),
            capture_output=True,
            timeout=30 + TIME_LIMIT * (offset + seconds),
            process_group=0,
        )  # which Ctrl-C does not reach
    except subprocess.TimeoutExpired:
        return f'{OF_FFMPEG}took more than {30 + TIME_LIMIT * (offset + seconds)} s'
    for message, number in DISK_FULL.items():
        if message in done.stderr:
            raise OSError(number, os.strerror(number), str(part.parent))
    if done.returncode < 0 or done.returncode == 255:  # by a signal
        return KILLED
    told = done.stderr.decode(errors='replace').splitlines()
    gap = [float(line.split()[-1]) for line in told if line.startswith('[Eval')]
    faults = [
        line
        for line in told
        if re.search(FAULT, line) and HARMLESS not in line and not line.startswith('[Eval')
    ]
    words = (
        re.sub(r'^(\[.*?\] )+', '', (faults or ['no reason given'])[0])
        .replace(f'file:{video}', '')
        .strip(': ')
    )
    if refusal := re.search(REFUSAL, '\n'.join(faults)):
        return f'{OF_FFMPEG}was refused by this machine: {refusal[0]}'
    if done.returncode:
        return f'unreadable video: {words}'
    if any(re.search(OTHER_SIZE, line) for line in told):
        return 'damaged video: the size of its pictures changes'
    import av

    try:
        with open(part, 'rb') as file, av.open(file, format='mov') as clip:
            frames = sum(packet.size > 0 for packet in clip.demux(video=0))
    except (av.FFmpegError, IndexError):  # nothing was decoded
        frames = 0
    if frames < seconds * FPS:
        return (
            f'source too short: it ends {seconds - max(0, frames - MAX_REPEAT) / FPS:.1f} '
            's before the clip does'
        )
    if faults and video.suffix.lower() in STREAMS:  # whose time stamps may be damaged too
        return f'damaged video: {words}'
    problem = find_damage(video, offset, offset + seconds, words) if faults else None
    if gap and not problem:
        return f'damaged video: no picture between {gap[0]:.1f} and {gap[1]:.1f} s'
    return problem


def find_video(path: str, folders: list[str]) -> str | None:
    """Where a listed video lies: an absolute path, or below one of the folders."""
    return next(
        (
            found
            for found in (os.path.join(folder, path) for folder in folders)
            if os.path.isfile(found)
        ),
        None,
    )


def cut_listed(
    path: str, folders: list[str], offset: int, seconds: int, name: str, options: argparse.Namespace
) -> str | None:
    """Cut one clip out of a listed video; return None, or the reason why it cannot be had."""
    video = find_video(path, folders)
    return cut_clip(Path(video), offset, seconds, name, options) if video else f'{MISSING}{path}'


class StrictTarInfo(tarfile.TarInfo):
    """Makes a damaged or missing header an error, where tarfile would take it for the archive's
    end.
    """

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f'damaged archive: {error}') from None


def cut_archive(
    archive: str, known: list, annotations: Path, options: argparse.Namespace, only: list[str]
) -> dict:
    """Cut the annotated seconds of every video in a tar archive, a file or URL, which is read once
    from front to back.

    Returns what the ledger notes: what tells the archive from others (name, size, modification time
    or ETag), the videos in it, those that cannot be used with their reasons, the clips made and
    spoilt now, and what stopped it. A `known` archive is not read; `only` these clips are made, if
    any are given, although they are there.
    """
    import aiohttp
    import fsspec
    import tenacity

    entry = dict(
        archive=[archive.rsplit('/', 1)[-1]], videos=[], failed={}, made=[], spoilt=[], error=None
    )
    copy = options.avakinetics_root / f'videos/.cut_kinetics_{options.split}/{uuid.uuid4().hex}'
    patiently = tenacity.retry(
        stop=tenacity.stop_after_attempt(5),
        wait=tenacity.wait_random_exponential(max=20),
        retry=tenacity.retry_if_exception_type((OSError, aiohttp.ClientError)),
        reraise=True,
    )
    try:
        system, path = fsspec.url_to_fs(archive)
        info = system.info(path)
        entry['archive'] += [
            info['size'],
            str(info.get('ETag') or info.get('mtime') or info.get('LastModified')),
        ]
        changed = (
            info['mtime'] if isinstance(info.get('mtime'), float) else 0
        )  # of a file on this machine
        if entry['archive'] in known:
            return entry
        keyframes = {}
        for video, second in read_keyframes(annotations)[0].itertuples(
            index=False
        ):  # 1 s for all, less than sending them
            keyframes.setdefault(video, []).append(second)
        with system.open(path) as file:
            reader = types.SimpleNamespace(
                read=patiently(file.read)
            )  # which resumes after a dropped connection
            with tarfile.open(
                fileobj=reader, mode='r|*', bufsize=1 << 20, tarinfo=StrictTarInfo
            ) as tar:
                for member in tar:
                    tar.members.clear()  # else memory grows with the archive
                    name = re.fullmatch(SOURCE_NAME, member.name.rsplit('/', 1)[-1])
                    if not name or not member.isfile() or name[2] >= name[3]:
                        continue
                    video, start, end = name[1], int(name[2]), int(name[3])
                    entry['videos'].append([video, start, end])
                    held = [second for second in keyframes.get(video, ()) if start <= second < end]
                    if not held:
                        continue
                    first, last = clip_range(start, end, min(held), max(held))
                    clip = clip_name(video, first, last)
                    if (
                        clip in entry['made']
                        or only
                        and clip not in only
                        or not (only or options.overwrite or is_stale(clip, options, changed))
                    ):
                        continue
                    problem = f'unreadable video: larger than {MAX_BYTES:,} bytes'
                    if member.size <= MAX_BYTES:
                        copy = copy.with_suffix(Path(name[0]).suffix)
                        with open(copy, 'wb') as target:
                            shutil.copyfileobj(tar.extractfile(member), target, 1 << 20)
                        problem = cut_clip(copy, first - start, last - first, clip, options)
                        copy.unlink()
                    if problem:
                        entry['failed'][clip_name(video, start, end)] = problem
                        if not problem.startswith(OF_FFMPEG):
                            entry['spoilt'].append(clip)
                    else:
                        entry['failed'].pop(clip_name(video, start, end), None)  # of another copy
                        entry['made'].append(clip)
    except Exception as error:  # remote file systems raise what their libraries do
        if getattr(error, 'errno', None) in DISK_FULL.values():
            raise
        entry['error'] = f'{type(error).__name__}: {error}'.split('\n')[0]
    finally:
        copy.unlink(missing_ok=True)
    entry['error'] = next(
        (reason for reason in entry['failed'].values() if reason.startswith(OF_FFMPEG)),
        entry['error'],
    )
    return entry


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
    for leftover in path.glob('*.*'):
        leftover.unlink()
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


def is_stale(clip: str, options: argparse.Namespace, source_time: float) -> bool:
    """Whether a clip is missing, or older than its source or than the options that shape clips."""
    try:
        return os.stat(options.avakinetics_root / 'videos' / clip).st_mtime < max(
            options.since, source_time
        )
    except OSError:
        return True


def note_options(args: argparse.Namespace) -> float:
    """Note once for all clips what shapes them; other options end the run, or with --overwrite make
    older clips stale.

    Returns the modification time (s) before which clips are stale, as the clock of their file
    system has it.
    """
    videos, note = (
        args.avakinetics_root / 'videos',
        args.avakinetics_root / 'reports/cut_kinetics_options.json',
    )
    note.parent.mkdir(exist_ok=True)
    version = subprocess.run(
        [args.ffmpeg, '-version'], capture_output=True, text=True, errors='replace'
    ).stdout.split(' ', 3)
    options = dict(
        short_side=args.short_side or 'none',
        ffmpeg=version[2] if len(version) > 3 else 'unknown',
        encoder=' '.join([*ENCODER, *QUALITY, *LARGE_QUALITY, str(LARGE), COLOURS]),
        format=CLIP_FORMAT,
    )
    try:
        noted = json.loads(note.read_text())
    except (FileNotFoundError, ValueError):
        noted = {}
    clips = sum(name.endswith('.mp4') for name in os.listdir(videos))
    others = [
        f'{name}={noted[name]}'
        for name in options
        if name in noted and noted[name] != options[name]
    ]
    if clips and (others or not noted) and not args.overwrite:
        made = 'with ' + ', '.join(others) if noted else 'by another program or an older version'
        sys.exit(
            f'error: {clips:,} clips in {videos} were made {made}; --overwrite makes all of '
            'them anew'
        )
    if others or not noted:
        part = note.with_suffix('.part')
        part.touch()
        noted = dict(options, since=part.stat().st_mtime if clips else 0)
        part.write_text(json.dumps(noted))
        os.replace(part, note)
    return noted['since']


def find_lost(keyframes, sources, covered, absent: str) -> list[tuple]:
    """Report rows for the keyframes that no clip covers, with what is wrong with the sources that
    hold them.
    """
    lost = keyframes.merge(covered[['video', 'second']], how='left', indicator='where')
    lost = lost.loc[lost['where'] == 'left_only', ['video', 'second']]
    reasons = (
        find_holders(lost, sources).groupby(['video', 'second']).reason.agg('; '.join).to_dict()
    )
    listed = set(sources.video)
    return [
        (
            *keyframe,
            reasons.get(keyframe)
            or ('no listed video holds this second' if keyframe[0] in listed else absent),
        )
        for keyframe in lost.itertuples(index=False, name=None)
    ]


def cut_list(
    args: argparse.Namespace, keyframes, sources
) -> tuple[set[str], int, list[tuple], list[tuple]]:
    """Cut all clips out of the listed files: their names, how many were cut now, report rows on
    keyframes, and no more.
    """
    folder = args.kinetics_list.absolute().parent
    folders = [str(place) for place in (Path.cwd(), folder, folder / f'videos_{args.split}')]
    sources['reason'], tried, made = '', {}, set()

    def is_done(path: str, name: str) -> bool:
        video = find_video(path, folders)
        return not is_stale(name, args, os.path.getmtime(video) if video else 0)

    while True:  # until no source fails: the keyframes of one that does go to the next best
        working = sources[sources.reason == '']
        covered, clips = plan_clips(keyframes, working)
        left = clips[[tried.get(name) != path for name, path in zip(clips.name, clips.path)]]
        if left.empty:
            break
        tried.update(zip(left.name, left.path))
        if not args.overwrite:
            with ThreadPool(16) as threads:  # which a slow file server answers together
                left = left[
                    [not done for done in threads.starmap(is_done, zip(left.path, left.name), 64)]
                ]
        items = [
            (path, folders, offset, seconds, name, args)
            for path, offset, seconds, name in left[
                ['path', 'offset', 'seconds', 'name']
            ].itertuples(index=False)
        ]
        with contextlib.closing(run_all(cut_listed, items, args)) as answers:
            for item, problem, failure in tqdm(
                answers, total=len(items), desc='cut', unit='clip', delay=1
            ):
                made.add(item[4])
                if problem or failure:
                    sources.loc[sources.path == item[0], 'reason'] = problem or failure
    names, kept = (
        set(clips.name),
        set(sources.path[sources.reason.str.startswith((MISSING, OF_FFMPEG))]),
    )
    for name in [name for name, path in tried.items() if name not in names and path not in kept]:
        (args.avakinetics_root / 'videos' / name).unlink(
            missing_ok=True
        )  # its source is broken, or has a longer one now
    return (
        names,
        len(names & made),
        find_lost(keyframes, sources, covered, 'video not in the list'),
        [],
    )


def survey_archives(args: argparse.Namespace, keyframes, entries: list[dict]):
    """What the ledger's archives give: their sources with what is wrong, the keyframes that clips
    cover, and these clips.

    Of two archives that hold a second, the earlier one gives it.
    """
    import pandas as pd

    videos = set(keyframes.video.tolist())
    sources = pd.DataFrame(
        [
            (*video, rank, entry['failed'].get(clip_name(*video), ''))
            for rank, entry in enumerate(entries)
            for video in entry['videos']
            if video[0] in videos
        ],
        columns=['video', 'start', 'end', 'rank', 'reason'],
    )
    working = sources[sources.reason == '']
    held = find_holders(keyframes, working)
    covered, clips = held.drop_duplicates(['video', 'second']), name_clips(held, working)
    there = {
        name for name in os.listdir(args.avakinetics_root / 'videos') if not is_stale(name, args, 0)
    }
    for source in clips.index[clips.index.isin(covered.source) & ~clips.name.isin(there)]:
        sources.loc[source, 'reason'] = (
            f'{READ_AGAIN}: {entries[sources["rank"][source]]["archive"][0]}'
        )
    return sources, covered[(sources.reason[covered.source] == '').to_numpy()], clips


def note_archive(entries: list[dict], entry: dict) -> None:
    """Add what is in an archive, in the place of what was noted of the same one before: when it was
    read to another point, touched or downloaded again.

    Others of its name hold other videos.
    """
    videos = set(map(tuple, entry['videos']))
    for place, old in enumerate(entries):
        if old['archive'][0] == entry['archive'][0] and videos.issuperset(
            map(tuple, old['videos'])
        ):
            entries[place] = entry
            return
    entries.append(entry)


def cut_archives(
    args: argparse.Namespace, keyframes
) -> tuple[set[str], int, list[tuple], list[tuple]]:
    """Cut all clips out of archives: their names, how many were cut now, report rows on keyframes
    and on archives.

    A ledger says what is in the archives that were read; those whose clips are all there are not
    read again.
    """
    entries, order, made, spoilt, problems = [], {}, {}, set(), []
    ledger = args.avakinetics_root / f'reports/cut_kinetics_{args.split}_archives.jsonl'
    for line in ledger.read_text(errors='replace').splitlines() if ledger.is_file() else ():
        with contextlib.suppress(ValueError):  # the last line of a killed run may be torn
            note_archive(entries, json.loads(line))
    sources, _, _ = survey_archives(args, keyframes, entries)
    unfinished = set(sources['rank'][sources.reason.str.startswith(READ_AGAIN)])
    known = (
        []
        if args.overwrite
        else [
            entry['archive']
            for rank, entry in enumerate(entries)
            if not entry['error'] and rank not in unfinished
        ]
    )
    annotations = (args.avakinetics_anotation / f'kinetics_{args.split}_v1.0.csv').absolute()
    archives = [
        name if '://' in name else os.path.abspath(name)
        for name in dict.fromkeys(args.kinetics_archives)
        if name
    ]
    items = [(archive, known, annotations, args, []) for archive in archives]
    with (
        open(ledger, 'a') as file,
        contextlib.closing(run_all(cut_archive, items, args)) as answers,
    ):
        for item, entry, failure in tqdm(
            answers, total=len(items), desc='read', unit='archive', delay=1
        ):
            name, *version = entry['archive'] if entry else [item[0]]
            if version:
                order[tuple(entry['archive'])] = archives.index(item[0])
            if name in [other[0] for other in known] and (not version or entry['archive'] in known):
                continue  # it was read before, and may be gone now
            if failure or entry['error']:
                problems.append(
                    ('', '', f'unreadable archive: {item[0]}: {failure or entry["error"]}')
                )
            if version:
                made[tuple(entry['archive'])] = entry.pop('made')
                spoilt.update(entry.pop('spoilt'))
                note_archive(entries, entry)
                file.write(f'\n{json.dumps(entry)}\n')
                file.flush()
    # those that were given and are there in the order given; the others where they are
    places = [place for place, entry in enumerate(entries) if tuple(entry['archive']) in order]
    given = sorted(
        (entries[place] for place in places), key=lambda entry: order[tuple(entry['archive'])]
    )
    for place, entry in zip(places, given):
        entries[place] = entry
    keys = [tuple(entry['archive']) for entry in entries]
    part = ledger.with_suffix('.part')
    part.write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    os.replace(part, ledger)

    sources, covered, clips = survey_archives(args, keyframes, entries)
    used, again = clips.loc[covered.source.unique()], {}
    names = set(used.name)
    for rank, name in zip(
        used['rank'], used.name
    ):  # where another archive has the same clip, its own may be in place
        if keys[rank] in made and any(
            name in others for key, others in made.items() if key != keys[rank]
        ):
            again.setdefault(keys[rank], []).append(name)
    for key, only in again.items():
        cut_archive(archives[order[key]], [], annotations, args, only)
    unused = clips.loc[clips.index[sources.reason[clips.index] == ''].difference(used.index)]
    problems += [
        (
            '',
            '',
            f'not used, since an earlier archive has it too: {name} of '
            f'{entries[rank]["archive"][0]}',
        )
        for rank, name in zip(unused['rank'], unused.name)
    ]
    for name in (
        spoilt | set(unused.name)
    ) - names:  # spoilt: of an earlier run, and its source is broken now
        (args.avakinetics_root / 'videos' / name).unlink(missing_ok=True)
    fresh = len(names.intersection(set().union(*made.values())))
    return (
        names,
        fresh,
        find_lost(keyframes, sources, covered, 'video in no archive that was read'),
        problems,
    )


def write_report(path: Path, rows: list[tuple]) -> None:
    import pandas as pd

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.part')
    pd.DataFrame(rows, columns=['video_id', 'timestamp', 'reason']).to_csv(
        part, index=False, errors='backslashreplace'
    )
    os.replace(part, path)


def cut(args: argparse.Namespace, annotations: Path) -> None:
    """Cut the clips, write the report, say what came of it."""
    keyframes, without_people, problems = read_keyframes(annotations)
    if keyframes.empty:
        first = f'; its first fault: {problems[0][2]}' if problems else ''
        sys.exit(
            f'error: {annotations} holds no annotated keyframe{first}; do Step 2 again or '
            'set --avakinetics_anotation'
        )
    videos, named = args.avakinetics_root / 'videos', set(keyframes.video.tolist())
    if not args.kinetics_archives:
        sources, malformed = read_sources(args.kinetics_list, named)
        problems += malformed
        if sources.empty:
            sys.exit(
                f'error: {args.kinetics_list} holds none of the {len(named)} annotated '
                'videos; is it the list of the '
                f'Kinetics-700 {args.split} videos?'
            )
    with workspace(videos / f'.cut_kinetics_{args.split}'):
        args.since = note_options(args)
        clips, fresh, rows, others = (
            cut_archives(args, keyframes)
            if args.kinetics_archives
            else cut_list(args, keyframes, sources)
        )
    problems += others
    report = args.avakinetics_root / f'reports/cut_kinetics_{args.split}.csv'
    write_report(report, sorted(rows) + problems)

    print(
        f'{len(clips)} clips in {videos} ({fresh} cut now, {len(clips) - fresh} there already) '
        f'for {len(keyframes) - len(rows)} of {len(keyframes)} annotated keyframes'
    )
    for reason, count in Counter(row[2].split(':')[0] for row in rows).most_common():
        print(f'  {count} keyframes left out: {reason}')
    if without_people:
        print(f'  {without_people} keyframes without people: nothing to cut')
    for reason, count in Counter(row[2].split(':')[0] for row in problems).items():
        print(f'  {count} more in the report: {reason}')
    if unasked := sorted(
        name for name in os.listdir(videos) if name[:11] in named and name not in clips
    ):
        print(
            f'  {len(unasked)} other clips of these videos are left, which no annotation '
            f'asks for, such as {unasked[0]}'
        )
    print(f'  report: {report}')
    if not clips:
        sys.exit('error: not one clip could be cut; the report says why')


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    sys.stdout.reconfigure(errors='backslashreplace')  # names of files may be no UTF-8
    args = parse_args(argv)
    try:
        annotations = args.avakinetics_anotation / f'kinetics_{args.split}_v1.0.csv'
        if not annotations.is_file():
            sys.exit(f'error: {annotations} not found; do Step 2 or set --avakinetics_anotation')
        if not args.kinetics_archives and not args.kinetics_list.is_file():
            sys.exit(f'error: {args.kinetics_list} not found; do Step 1 or set --kinetics_list')
        if not shutil.which(args.ffmpeg):
            sys.exit(
                f'error: {args.ffmpeg} is not a program; omit --ffmpeg to use the one of '
                'imageio-ffmpeg'
            )
        cut(args, annotations)
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
