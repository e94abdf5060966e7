#!/usr/bin/env python3
"""Step 3: cut the annotated clips out of the Kinetics-700 videos.

Reads the AVA-Kinetics annotations (kinetics_train_v1.0.csv) and the list of Kinetics-700 videos, or their archives, and
writes ROOT/videos/<video_id>_<start:06d>_<end:06d>.mp4: two seconds around the annotated keyframes, constant 30 fps,
exactly (end - start) * 30 frames, frame k being the source frame nearest to source time start - source_start + k / 30.
What could not be cut is in ROOT/reports/cut_kinetics_train.csv with its reason. Run it again to continue after an
interruption. With `--split val`, all names have val in place of train.

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
import glob
import hashlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import imageio_ffmpeg
from tqdm import tqdm

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30
CONTEXT_S = 2  # seconds kept before and after the keyframes; MMAction2's windows reach 32 frames, about one second
MAX_REPEAT = 22  # frames: a source that ends up to 0.75 s early has its last frame repeated
MAX_LEAD_S = 0.2  # codec delays put the first picture up to 0.1 s behind the sound; beyond, pictures are missing
# More SSIM than x264's defaults (medium, crf 23) at a third of the time and below 1.8 times the size. One B-frame and no
# look-ahead are faster than superfast itself; without CABAC (9 % of size), Step 4 and training decode a quarter faster
ENCODER = ['-c:v', 'libx264', '-preset', 'superfast', '-crf', '21.4', '-bf', '1', '-b_strategy', '0', '-weightp', '0',
           '-coder', 'vlc', '-threads', '1', '-pix_fmt', 'yuv420p']
COLOURS = 'scale=out_range=limited:out_color_matrix=bt601'  # as decoders and JPEG take them; most sources have them
# Only real containers: ffmpeg would also read a playlist under a video's name, and with it any other file
FORMATS = 'mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,asf,mpegts,mpeg,ogg'
MAX_PIXELS = 7680 * 4320  # a header that claims larger pictures would cost gigabytes of memory
MAX_BYTES = 2 ** 30  # of a video in an archive; ten seconds have a few MB
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
AHEAD = 2000  # items that a cluster is given at once
TIME_LIMIT = 12  # s that ffmpeg may take for each second of video, some 100 times the usual, and 30 s more
KILLED = 'unreadable video: ffmpeg was killed, as it happens when memory runs out'
DISK_FULL = {b'No space left on device': errno.ENOSPC, b'Disk quota exceeded': errno.EDQUOT}
ARCHIVE_ERRORS = OSError, EOFError, zlib.error, tarfile.TarError
VIDEO_ID = r'[A-Za-z0-9_-]{11}'
NUMBERS = ['timestamp', 'x1', 'y1', 'x2', 'y2', 'action']
BLOCK = 2 ** 22  # bytes of annotations that are read together
SOURCE_NAME = re.compile(r'(?P<id>[A-Za-z0-9_-]{11})_(?P<start>[0-9]{6})_(?P<end>[0-9]{6})\.[A-Za-z0-9]+')


class Source(NamedTuple):
    """A Kinetics-700 video: seconds [start, end) of the original, and its path as the list gives it."""
    start: int
    end: int
    path: str


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Step 3: cut the annotated clips out of the Kinetics-700 videos.')
    parser.add_argument('--avakinetics_anotation', '--avakinetics_annotation', type=Path, default=Path('ava_kinetics_v1_0'),
                        metavar='DIR', help='folder of the AVA-Kinetics annotations (default: %(default)s)')
    parser.add_argument('--split', choices=['train', 'val'], default='train', help='part of AVA-Kinetics (default: train)')
    parser.add_argument('--kinetics_list', type=Path, metavar='FILE',
                        help='list of the Kinetics-700 videos, a line each: PATH [LABEL] (default: '
                        f'{MMACTION2}/data/kinetics700/kinetics700_train_list_videos.txt, or ..._val_...)')
    parser.add_argument('--kinetics_archives', nargs='+', metavar='ARCHIVE',
                        help='in place of --kinetics_list: tar or tar.gz files, patterns, URLs, or @FILE with one of '
                        'these a line; read in one pass, never unpacked')
    parser.add_argument('--short_side', type=int, metavar='N',
                        help='scale clips down to N pixels on their short side (default: size of the source)')
    parser.add_argument('--avakinetics_root', type=Path, default=MMACTION2 / 'data/ava_kinetics', metavar='DIR',
                        help='folder of the data set that is made (default: %(default)s)')
    parser.add_argument('--num_workers', type=int, default=-1, metavar='N', help='parallel processes (default: all CPUs)')
    parser.add_argument('--dask_scheduler', metavar='ADDRESS',
                        help='work on the Dask cluster of this scheduler, such as tcp://host:8786, not on this machine')
    parser.add_argument('--ffmpeg', default=imageio_ffmpeg.get_ffmpeg_exe(), metavar='PATH',
                        help="ffmpeg program; other versions may choose other frames (default: imageio-ffmpeg's)")
    parser.add_argument('--overwrite', action='store_true', help='cut clips again that are there already')
    args = parser.parse_args(argv)
    args.kinetics_list = args.kinetics_list or MMACTION2 / f'data/kinetics700/kinetics700_{args.split}_list_videos.txt'
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
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        while lines := file.readlines(BLOCK):
            try:
                table = pd.read_csv(io.StringIO(''.join(lines)), header=None, names=['video', *NUMBERS], quoting=csv.QUOTE_NONE,
                                    dtype={'video': str, **dict.fromkeys(NUMBERS, float)}, skip_blank_lines=False)
            except ValueError:  # a line that is not of this form: each is taken apart
                rows = [[field.strip().strip('"') for field in line.split(',')] for line in lines]
                table = pd.DataFrame([row + [None] * (7 - len(row)) if len(row) in (2, 7) else [''] * 7 for row in rows],
                                     columns=['video', *NUMBERS])
                numbers = table[NUMBERS].apply(pd.to_numeric, errors='coerce').astype(float)
                table[NUMBERS] = numbers.mask(numbers.isna() & table[NUMBERS].notna(), -1)  # not a number
            box, nobody = table[NUMBERS[1:5]], table[NUMBERS[1:]].isna().all(axis=1)
            inside = ((box >= 0) & (box <= 1)).all(axis=1) & (table.x1 < table.x2) & (table.y1 < table.y2)
            faults = [('not 7 or 2 columns that begin with a video id', ~table.video.fillna('').str.fullmatch(VIDEO_ID)),
                      ('not a time in seconds', ~table.timestamp.between(0, 1e6, 'left')),
                      ('not a box within 0 and 1', ~(inside | nobody)),
                      ('not an action of 1 to 80', ~(table.action.between(1, 80) & (table.action % 1 == 0) | nobody))]
            reasons = np.select([wrong for _, wrong in faults], [reason for reason, _ in faults], '')
            problems += [('', '', f'malformed annotation: line {count + index + 1}: {reasons[index]}')
                         for index in np.flatnonzero(reasons) if lines[index].strip()]
            tables.append(table[reasons == ''])
            count += len(lines)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=['video', *NUMBERS]), problems


def read_keyframes(path: Path) -> tuple[dict[str, set[int]], int, list[tuple]]:
    """The annotated seconds of every video, the number of seconds without people, and report rows on malformed lines."""
    table, problems = read_annotations(path)
    pairs = {peopled: set(zip(part.video, part.timestamp.astype(int))) for peopled, part in table.groupby(table.x1.notna())}
    keyframes = {}
    for video, second in pairs.get(True, ()):
        keyframes.setdefault(video, set()).add(second)
    return keyframes, len(pairs.get(False, set()) - pairs.get(True, set())), problems


def read_sources(path: Path, keyframes: dict[str, set[int]]) -> tuple[dict[str, list[Source]], list[tuple]]:
    """By annotated video the listed sources that hold an annotated second, and report rows on malformed lines."""
    sources, problems = {}, []
    with open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
        for number, line in enumerate(file, 1):
            words = line.strip().rsplit(None, 1)
            if not words:
                continue
            video = words[0] if words[-1].lstrip('+-').isdigit() else line.strip()
            name = SOURCE_NAME.fullmatch(video.rsplit('/', 1)[-1])
            if not name or int(name['end']) <= int(name['start']):
                problems.append(('', '', f'malformed list line: line {number}: no name like ID_000001_000011.mp4'))
                continue
            if name['id'] in keyframes:
                source, copies = Source(int(name['start']), int(name['end']), video), sources.setdefault(name['id'], [])
                if any(source.start <= second < source.end for second in keyframes[name['id']]) and source not in copies:
                    copies.append(source)
    return sources, problems


def plan_clips(sources: list[Source], seconds: set[int]) -> dict[Source, list[int]]:
    """Give every annotated second to the source in which it is most centred; seconds in no source are left out."""
    plan = {}
    for second in sorted(seconds):
        holding = [source for source in sources if source.start <= second < source.end]
        if holding:
            best = min(holding, key=lambda source: abs(source.start + source.end - 2 * second))
            plan.setdefault(best, []).append(second)
    return plan


def clip_name(video_id: str, start: int, end: int) -> str:
    return f'{video_id}_{start:06d}_{end:06d}.mp4'


def clip_range(source: Source, seconds: list[int]) -> tuple[int, int]:
    """Seconds [start, end) of the original video to keep: two around the keyframes, within the source."""
    return max(source.start, min(seconds) - CONTEXT_S), min(source.end, max(seconds) + CONTEXT_S)


def cut_command(ffmpeg: str, video: Path, offset: int, seconds: int, short_side: int | None, target: Path) -> list[str]:
    """ffmpeg's arguments to cut `seconds` from source time `offset` (both in s), each frame the nearest of the source.

    `setpts` moves every frame to the middle between its predecessor and itself, so that `fps`, which holds a frame
    until the next one is due, takes the nearest frame on either side, at any frame rate. Source time 0 is the
    container's start, or the first picture where that follows within MAX_LEAD_S.
    """
    filters = (
        f"settb=AVTB,setpts='(PTS+if(isnan(PREV_INPTS),PTS,PREV_INPTS))/2-if(lt(STARTT,{MAX_LEAD_S}),STARTPTS,0)',"
        f'fps={FPS}:start_time={offset}:round=up,tpad=stop={MAX_REPEAT}:stop_mode=clone,'
        'crop=trunc(iw/2)*2:trunc(ih/2)*2:0:0,')  # yuv420p needs even sides; boxes are relative
    if short_side:
        factor = f'min(1,{short_side}/min(iw,ih))'
        filters += f"scale='2*round(iw/2*{factor})':'2*round(ih/2*{factor})',"
    return [ffmpeg, '-nostdin', '-v', 'error', '-protocol_whitelist', 'file', '-format_whitelist', FORMATS,
            '-max_pixels', str(MAX_PIXELS), '-threads', '1', '-i', f'file:{video}', '-map', '0:V:0',
            '-vf', filters + COLOURS, '-frames:v', str(seconds * FPS), *ENCODER,
            '-map_metadata', '-1', '-map_chapters', '-1', '-f', 'mp4', '-y', str(target)]


def cut_clip(video: Path, offset: int, seconds: int, target: Path, options: argparse.Namespace) -> str | None:
    """Cut one clip into `target`; return None, or the reason why it cannot be had from this video."""
    try:
        done = subprocess.run(cut_command(options.ffmpeg, video, offset, seconds, options.short_side, target),
                              capture_output=True, timeout=30 + TIME_LIMIT * (offset + seconds))
    except subprocess.TimeoutExpired:
        return f'unreadable video: ffmpeg took more than {30 + TIME_LIMIT * (offset + seconds)} s'
    for message, number in DISK_FULL.items():
        if message in done.stderr:
            raise OSError(number, os.strerror(number), str(target.parent))
    if done.returncode < 0:
        return KILLED
    if done.returncode:
        lines = done.stderr.decode(errors='replace').splitlines() or ['ffmpeg gives no reason']
        reason = re.sub(r'^\[.*? @ 0x\w+\] ', '', lines[0]).replace(f'file:{video}', '').strip(': ')
        return f'unreadable video: {reason}'
    import av
    try:
        with av.open(str(target), format='mov') as clip:
            frames = sum(packet.size > 0 for packet in clip.demux(video=0))
    except (av.FFmpegError, IndexError):  # nothing was decoded
        frames = 0
    if frames < seconds * FPS:
        return 'source too short: it ends {:.1f} s before the clip does'.format(
            seconds - max(0, frames - MAX_REPEAT) / FPS)
    return None


@contextlib.contextmanager
def unfinished(root: Path, split: str):
    """A folder of its own for one item's unfinished files; on a cluster, two workers may happen to do the same item."""
    with tempfile.TemporaryDirectory(dir=root / f'videos/.cut_kinetics_{split}', ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def settle_video(video_id: str, sources: list[Source], seconds: set[int],
                 attempt: Callable[[Source, int, int], str | None]) -> tuple[set[str], list[tuple]]:
    """Get all clips of one video; where a source fails, its seconds go to the next best one.

    `attempt(source, start, end)` gets one clip, or returns why it cannot be had. Returns the names of the clips, and
    report rows for the seconds that have none.
    """
    sources, reasons, settled = list(sources), {}, False
    while not settled:
        plan, settled = plan_clips(sources, seconds), True
        for source, covered in plan.items():
            problem = attempt(source, *clip_range(source, covered))
            if problem:
                reasons.update({second: reasons.get(second, []) + [problem] for second in covered})
                sources.remove(source)
                settled = False
                break
    names = {clip_name(video_id, *clip_range(source, covered)) for source, covered in plan.items()}
    return names, [(video_id, second, '; '.join(reasons.get(second, ['no listed video holds this second'])))
                   for second in seconds.difference(*plan.values())]


def cut_video(video_id: str, sources: list[Source], seconds: set[int], folders: list[Path], root: Path,
              options: argparse.Namespace) -> tuple[int, int, list[tuple]]:
    """Cut all clips of one video out of files: the number cut now, the number there before, and report rows."""
    fresh = set()

    def attempt(source: Source, start: int, end: int) -> str | None:
        name = clip_name(video_id, start, end)
        if name in fresh or (root / 'videos' / name).exists() and not options.overwrite:
            return None
        try:
            video = next((path for path in (folder / source.path for folder in folders) if path.is_file()), None)
        except (OSError, ValueError) as error:  # no permission, a name that no file can have
            return f'unreadable video: {error}'
        if video is None:
            return f'file missing: {source.path}'
        problem = cut_clip(video.absolute(), start - source.start, end - start, work / name, options)
        if not problem:
            fresh.add(name)
        return problem

    with unfinished(root, options.split) as work:
        names, lost = settle_video(video_id, sources, seconds, attempt)
        for name in names & fresh:
            os.replace(work / name, root / 'videos' / name)
    return len(names & fresh), len(names - fresh), lost


def may_pass(error: BaseException) -> bool:
    """Whether reading an archive again may help: after a dropped connection, not on a full disk or a missing file."""
    import aiohttp
    return (isinstance(error, (*ARCHIVE_ERRORS, aiohttp.ClientError))
            and not isinstance(error, (FileNotFoundError, PermissionError))
            and getattr(error, 'errno', None) not in DISK_FULL.values())


def patiently(function: Callable) -> Callable:
    import tenacity
    return tenacity.retry(stop=tenacity.stop_after_attempt(5), wait=tenacity.wait_random_exponential(max=20),
                          retry=tenacity.retry_if_exception(may_pass), reraise=True)(function)


def staged_folder(root: Path, split: str) -> Path:
    """Where clips out of archives wait for the final plan: on the disk of ROOT/videos, which may be a link to another."""
    return (root / 'videos' if (root / 'videos').is_symlink() else root) / f'.cut_kinetics_{split}_staged'


def staged_clip(root: Path, split: str, key: tuple) -> Path:
    """The place of a clip that waits; key: video, source start and end, clip start and end."""
    return staged_folder(root, split) / '{}_{:06d}_{:06d}_{:06d}_{:06d}.mp4'.format(*key)


def cut_archive(archive: str, annotations: Path, root: Path, options: argparse.Namespace
                ) -> tuple[str, list[tuple], str | None]:
    """Cut the clips of every wanted video in a tar archive, a file or URL, read once from front to back.

    The sources in other archives are unknown here, so that every range is cut that the final plan may ask of a source,
    one but for the videos with several annotated seconds (0.14 %), and staged under the source's name and its own.
    Returns the archive, for every range (video, source start, source end, start, end, None or the reason of a failure),
    and None or what stopped it.
    """
    import aiohttp
    import fsspec
    results, keyframes = {}, read_keyframes(annotations)[0]  # 2 s for all of them, and less than sending them

    def cut_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        name = SOURCE_NAME.fullmatch(member.name.rsplit('/', 1)[-1])
        if (not name or not member.isfile() or member.issparse() or member.name.startswith('/')
                or '..' in member.name.split('/')):
            return
        source = Source(int(name['start']), int(name['end']), name[0])
        held = [second for second in keyframes.get(name['id'], ()) if source.start <= second < source.end]
        ranges = {clip_range(source, [first, last]) for first in held for last in held if first <= last}
        keys = {(name['id'], source.start, source.end, *span) for span in ranges}
        there = {key for key in keys if staged_clip(root, options.split, key).exists() or not options.overwrite
                 and (root / 'videos' / clip_name(key[0], *key[3:])).exists()}
        results.update({key: None for key in there})
        wanted = sorted(keys - results.keys())
        if member.size > MAX_BYTES:
            results.update({key: f'unreadable video: larger than {MAX_BYTES:,} bytes' for key in wanted})
            return
        if wanted:
            with open(work / name[0], 'wb') as file:
                shutil.copyfileobj(tar.extractfile(member), file, 1 << 20)
        for key in wanted:
            offset, seconds, clip = key[3] - source.start, key[4] - key[3], work / clip_name(key[0], *key[3:])
            results[key] = cut_clip(work / name[0], offset, seconds, clip, options)
            if not results[key]:
                os.replace(clip, staged_clip(root, options.split, key))
        (work / name[0]).unlink(missing_ok=True)

    def read() -> None:
        with fsspec.open(archive, 'rb').open() as file:
            read_some, empty = patiently(file.read), 0

            def read_on(size: int) -> bytes:  # takes a dropped connection up where it broke, if the server can
                nonlocal empty
                data = read_some(size)
                empty = 0 if data else empty + 1
                if empty > 9:  # a header claims terabytes: tarfile would go through all of them
                    raise EOFError('it ends before the size that a header claims')
                return data

            file.read = read_on
            with tarfile.open(fileobj=file, mode='r|*', bufsize=1 << 20) as tar:
                for member in tar:
                    cut_member(tar, member)
                    tar.members.clear()  # else memory grows with the archive

    error = None
    with unfinished(root, options.split) as work:
        try:
            patiently(read)() if '://' in archive else read()
        except (*ARCHIVE_ERRORS, aiohttp.ClientError, ImportError, ValueError) as stop:  # protocols that fsspec lacks
            if getattr(stop, 'errno', None) in DISK_FULL.values():
                raise
            error = f'{type(stop).__name__}: {stop}'.split('\n')[0]
    if KILLED in results.values():
        error = KILLED
    return archive, sorted((*key, result) for key, result in results.items()), error


def find_archives(names: list[str]) -> list[str]:
    """The archives that --kinetics_archives names: files, URLs, glob patterns, and @FILE with one of these a line."""
    archives = []
    for name in names:
        if name.startswith('@'):
            archives += find_archives([line.lstrip('@') for line in Path(name[1:]).read_text(errors='replace').split('\n')])
        elif '://' in name:
            archives.append(name)
        elif name:
            archives += [os.path.abspath(path) for path in sorted(glob.glob(name)) or [name]]
    return list(dict.fromkeys(archives))


@contextlib.contextmanager
def workspace(path: Path):
    """A hidden folder for unfinished files, of one run at a time; what a killed run left there is removed."""
    path.mkdir(parents=True, exist_ok=True)
    try:
        lock = open(path / 'lock', 'w')
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go when this process ends, however it ends
    except (BlockingIOError, FileNotFoundError):  # the latter where the other run has just ended
        sys.exit(f'error: another run of this step is at work in {path.parent}; wait for it to end')
    for leftover in path.glob('*/'):
        shutil.rmtree(leftover)
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)
        lock.close()


def shielded(function: Callable, item: tuple) -> tuple:
    """An item and its answer, in a process that leaves Ctrl-C to its parent and ends with it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return item, function(*item)


def run_all(function: Callable, items: list[tuple], args: argparse.Namespace) -> Iterator[tuple]:
    """Yield (item, answer, None) in any order, or (item, None, reason) for an item that cost its workers their lives."""
    if not args.dask_scheduler:
        from joblib import Parallel, cpu_count, delayed
        workers = min(args.num_workers if args.num_workers > 0 else cpu_count(), len(items)) or 1
        try:
            for item, answer in Parallel(workers, return_as='generator_unordered')(
                    delayed(shielded)(function, item) for item in items):
                yield item, answer, None
        except BrokenProcessPool:
            sys.exit('error: a worker process was killed, as it happens when memory runs out; use fewer with --num_workers, '
                     'then the same command continues')
        return
    try:
        from distributed import CancelledError, Client, KilledWorker, as_completed
    except ImportError:
        sys.exit('error: --dask_scheduler needs Dask; pip install distributed')
    logging.disable()  # Dask logs tracebacks of what is told below
    try:
        client = Client(args.dask_scheduler, timeout=10)
        client.wait_for_workers(1, timeout=30)
    except (OSError, ValueError) as error:
        reason = str(error).split('\n')[0]
        sys.exit(f'error: no Dask scheduler with workers at {args.dask_scheduler} ({reason}); start them first')
    with client:
        waiting = iter(items)
        todo = {client.submit(function, *item, pure=False): item for item in islice(waiting, AHEAD)}
        futures = as_completed(list(todo))
        for future in futures:
            item = todo.pop(future)
            try:
                yield item, future.result(), None
            except KilledWorker:
                yield item, None, 'given up: the workers of the cluster that had it were killed'
            except CancelledError:
                sys.exit(f'error: the Dask scheduler at {args.dask_scheduler} went away; the same command continues')
            for item in islice(waiting, 1):
                future = client.submit(function, *item, pure=False)
                todo[future] = item
                futures.add(future)


def write_lines(path: Path, lines: list[str]) -> None:
    """Write a text file beside its final name, then rename it."""
    part = path.with_suffix('.part')
    part.write_text(''.join(line + '\n' for line in lines))
    os.replace(part, path)


def write_report(path: Path, header: list[str], rows: list[tuple]) -> None:
    """Write a csv beside its final name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix('.part'), 'w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        csv.writer(file, lineterminator='\n').writerows([header, *rows])
    os.replace(path.with_suffix('.part'), path)


def cut_files(args: argparse.Namespace, keyframes: dict[str, set[int]]) -> tuple[int, int, list[tuple], list[tuple]]:
    """Cut all clips out of the listed files: clips cut now, clips there before, rows on keyframes, rows on lines."""
    if not args.kinetics_list.is_file():
        sys.exit(f'error: {args.kinetics_list} not found; do Step 1 or set --kinetics_list')
    sources, problems = read_sources(args.kinetics_list, keyframes)
    if not any(sources.values()):
        sys.exit(f'error: {args.kinetics_list} holds none of the {len(keyframes)} annotated videos; is it the list of '
                 f'the Kinetics-700 {args.split} videos?')
    rows = [(video, second, 'video not in the list') for video in keyframes.keys() - sources.keys()
            for second in keyframes[video]]
    folder = args.kinetics_list.absolute().parent
    folders = [Path.cwd(), folder, folder / f'videos_{args.split}']
    finished = set() if args.overwrite else set(os.listdir(args.avakinetics_root / 'videos'))
    cut, kept, left = 0, 0, []
    for video, found in sources.items():
        names, lost = settle_video(video, found, keyframes[video], lambda source, start, end: None)
        if names <= finished:  # a second run is done with it here, in a third of the time
            kept, rows = kept + len(names), rows + lost
        else:
            left.append(video)
    items = [(video, sources[video], keyframes[video], folders, args.avakinetics_root, args) for video in left]
    with contextlib.closing(run_all(cut_video, items, args)) as answers:
        for item, answer, failure in tqdm(answers, total=len(left), desc='cut', unit='video', delay=1):
            fresh, there, lost = answer or (0, 0, [(item[0], second, failure) for second in sorted(item[2])])
            cut, kept, rows = cut + fresh, kept + there, rows + lost
    return cut, kept, rows, problems


def cut_archives(args: argparse.Namespace, keyframes: dict[str, set[int]]) -> tuple[int, int, list[tuple], list[tuple]]:
    """Cut all clips out of archives. A ledger says which ones were read to their end: these are not read again."""
    root, results, finished, problems = args.avakinetics_root, {}, set(), []
    identity = hashlib.sha256(repr(sorted((video, sorted(keyframes[video])) for video in keyframes)).encode()).hexdigest()
    ledger = root / f'reports/cut_kinetics_{args.split}_archives.jsonl'
    staged = staged_folder(root, args.split)

    def note(cuts: list[tuple]) -> None:
        for *key, problem in cuts:  # of two copies one has to succeed
            results[tuple(key)] = problem if results.get(tuple(key), problem) else None

    if args.overwrite:
        shutil.rmtree(staged, ignore_errors=True)
        ledger.unlink(missing_ok=True)
    staged.mkdir(exist_ok=True)
    ledger.parent.mkdir(exist_ok=True)
    entries = []
    for line in ledger.read_text(errors='replace').splitlines() if ledger.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line of a killed run may be torn
            entry = json.loads(line)
            if entry['annotations'] == identity:
                note(entry['cuts'])
                finished.add(entry['archive'])
                entries.append(entry)
    archives = [archive for archive in find_archives(args.kinetics_archives) if archive not in finished]
    write_lines(ledger, [json.dumps(entry) for entry in entries])
    annotations = (args.avakinetics_anotation / f'kinetics_{args.split}_v1.0.csv').absolute()
    items = [(archive, annotations, root, args) for archive in archives]
    with open(ledger, 'a') as file, contextlib.closing(run_all(cut_archive, items, args)) as answers:
        for item, answer, failure in tqdm(answers, total=len(archives), desc='read', unit='archive', delay=1):
            archive, cuts, error = answer or (item[0], [], failure)
            note(cuts)
            if error:
                problems.append(('', '', f'unreadable archive: {archive}: {error}'))
            else:
                entries.append(dict(annotations=identity, archive=archive, cuts=cuts))
                file.write(json.dumps(entries[-1]) + '\n')
                file.flush()
    write_lines(ledger, sorted(json.dumps(entry) for entry in entries))

    sources, ranges, cut, kept = {}, {}, 0, 0
    for video, first, last, start, end in sorted(results):
        sources.setdefault(video, {})[Source(first, last, '')] = None
        ranges.setdefault(video, set()).add(clip_name(video, start, end))
    rows = [(video, second, 'video in no archive that was read') for video in keyframes.keys() - sources.keys()
            for second in keyframes[video]]
    for video, found in sources.items():
        chosen = {}

        def attempt(source: Source, start: int, end: int) -> str | None:
            key = video, source.start, source.end, start, end
            clip = chosen[clip_name(video, start, end)] = staged_clip(root, args.split, key)
            if results.get(key) or clip.exists() or (root / 'videos' / clip_name(video, start, end)).exists():
                return results.get(key)
            return 'clip gone: it was cut and deleted; run again with --overwrite'

        names, lost = settle_video(video, list(found), keyframes[video], attempt)
        rows += lost
        for name in names:
            fresh = chosen[name].exists() and (args.overwrite or not (root / 'videos' / name).exists())
            if fresh:
                os.replace(chosen[name], root / 'videos' / name)
            cut, kept = cut + fresh, kept + (not fresh)
        for name in ranges[video] - names if not lost else ():  # chosen before a better source was known
            (root / 'videos' / name).unlink(missing_ok=True)
    if not any(staged.iterdir()):  # else ranges that an archive read later may ask for
        staged.rmdir()
    return cut, kept, rows, problems


def cut(args: argparse.Namespace, annotations: Path) -> None:
    """Cut the clips, write the report, say what came of it."""
    keyframes, unpeopled, problems = read_keyframes(annotations)
    root = args.avakinetics_root = args.avakinetics_root.absolute()
    with workspace(root / f'videos/.cut_kinetics_{args.split}'):
        fresh, kept, rows, others = (cut_archives if args.kinetics_archives else cut_files)(args, keyframes)
        report = root / f'reports/cut_kinetics_{args.split}.csv'
        write_report(report, ['video_id', 'timestamp', 'reason'], sorted(rows) + problems + others)

    total = sum(map(len, keyframes.values()))
    print(f'{fresh + kept} clips in {root / "videos"} ({fresh} cut now, {kept} there already) '
          f'for {total - len(rows)} of {total} annotated keyframes')
    for reason, count in Counter(row[2].split(':')[0] for row in rows).most_common():
        print(f'  {count} keyframes left out: {reason}')
    if unpeopled:
        print(f'  {unpeopled} keyframes without people: nothing to cut')
    for reason, count in Counter(row[2].split(':')[0] for row in problems + others).items():
        print(f'  {count} lines or archives skipped: {reason}')
    print(f'  report: {report}')
    if not fresh + kept:
        sys.exit('error: not one clip could be cut; the report says why')


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    args = parse_args(argv)
    annotations = args.avakinetics_anotation / f'kinetics_{args.split}_v1.0.csv'
    if not annotations.is_file():
        sys.exit(f'error: {annotations} not found; do Step 2 or set --avakinetics_anotation')
    if not shutil.which(args.ffmpeg):
        sys.exit(f'error: {args.ffmpeg} is not a program; omit --ffmpeg to use the one of imageio-ffmpeg')
    try:
        cut(args, annotations)
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; fix it, then the same command continues')
    except KeyboardInterrupt:
        print('interrupted; the same command continues', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
    for number in signal.SIGINT, signal.SIGTERM:  # while the workers end, nothing is left to interrupt
        signal.signal(number, signal.SIG_IGN)
