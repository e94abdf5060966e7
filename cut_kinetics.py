#!/usr/bin/env python3
"""Step 3: cut the annotated clips out of the Kinetics-700 videos.

Reads the AVA-Kinetics annotations (kinetics_train_v1.0.csv) and the list of Kinetics-700 videos, and writes
ROOT/videos/<video_id>_<start:06d>_<end:06d>.mp4: two seconds around the annotated keyframes, constant 30 fps, exactly
(end - start) * 30 frames, frame k being the source frame nearest to source time start - source_start + k / 30. What
could not be cut is in ROOT/reports/cut_kinetics_train.csv with its reason. Run it again to continue after an
interruption.

    python3 cut_kinetics.py --avakinetics_anotation=./ava_kinetics_v1_0 \\
        --kinetics_list=$MMACTION2/data/kinetics700/kinetics700_train_list_videos.txt \\
        --avakinetics_root=$MMACTION2/data/ava_kinetics
"""
import argparse
import contextlib
import csv
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import decord
import imageio_ffmpeg
from joblib import Parallel, delayed
from tqdm import tqdm

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30
CONTEXT_S = 2  # seconds kept before and after the keyframes; MMAction2's windows reach 32 frames, about one second
MAX_REPEAT = 22  # frames: a source that ends up to 0.75 s early has its last frame repeated
MAX_LEAD_S = 0.2  # codec delays put the first picture up to 0.1 s behind the sound; more means that pictures are missing
# x264 superfast at crf 21 has a higher SSIM than its defaults (medium, crf 23) at a third of the time: benchmarks/
ENCODER = ['-c:v', 'libx264', '-preset', 'superfast', '-crf', '21', '-threads', '1', '-pix_fmt', 'yuv420p']
SOURCE_NAME = re.compile(r'(?P<id>[A-Za-z0-9_-]{11})_(?P<start>\d{6})_(?P<end>\d{6})\.[A-Za-z0-9]+')


class Source(NamedTuple):
    """A Kinetics-700 video: seconds [start, end) of the original, and its path as the list gives it."""
    start: int
    end: int
    path: str


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Step 3: cut the annotated clips out of the Kinetics-700 videos.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--avakinetics_anotation', '--avakinetics_annotation', type=Path,
                        default=Path('ava_kinetics_v1_0'), metavar='DIR',
                        help='folder of the AVA-Kinetics annotations')
    parser.add_argument('--kinetics_list', type=Path, metavar='FILE',
                        default=MMACTION2 / 'data/kinetics700/kinetics700_train_list_videos.txt',
                        help='list of the Kinetics-700 videos, a line each: PATH [LABEL]')
    parser.add_argument('--avakinetics_root', type=Path, default=MMACTION2 / 'data/ava_kinetics', metavar='DIR',
                        help='folder of the data set that is made')
    parser.add_argument('--num_workers', type=int, default=-1, metavar='N', help='parallel processes; -1: all CPUs')
    parser.add_argument('--ffmpeg', default=imageio_ffmpeg.get_ffmpeg_exe(), metavar='PATH',
                        help='ffmpeg program; other versions may choose other frames')
    parser.add_argument('--overwrite', action='store_true', help='cut clips again that are there already')
    return parser.parse_args(argv)


def parse_annotation(line: str) -> tuple[str, float, list[float] | None, int | None]:
    """A row of the annotations as (video id, timestamp in s, relative box x1 y1 x2 y2, action id).

    A row of two columns names a keyframe without people: its box is None. Raises ValueError for any other row.
    """
    row = [field.strip().strip('"') for field in line.split(',')]
    if len(row) not in (2, 7):
        raise ValueError(f'{len(row)} columns instead of 7 or 2')
    if not re.fullmatch(r'[A-Za-z0-9_-]{11}', row[0]):
        raise ValueError(f'not a video id, {row[0][:20]!r}')
    numbers = [float(field) for field in row[1:]]
    if not 0 <= numbers[0] < 1e6:  # also false for NaN
        raise ValueError(f'not a time in seconds, {row[1][:20]}')
    if len(row) == 2:
        return row[0], numbers[0], None, None
    box, action = numbers[1:5], numbers[5]
    if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError('not a box, ' + ' '.join(field[:12] for field in row[2:6]))
    if not (action.is_integer() and 1 <= action <= 80):
        raise ValueError(f'not an action of 1 to 80, {row[6][:20]}')
    return row[0], numbers[0], box, int(action)


def read_keyframes(path: Path) -> tuple[dict[str, set[int]], list[tuple]]:
    """The annotated seconds of every video, and report rows for the lines that cannot be read."""
    keyframes, problems = {}, []
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                video, timestamp, box, _ = parse_annotation(line)
            except ValueError as error:
                problems.append(('', '', f'malformed annotation: line {number}: {error}'))
                continue
            if box:
                keyframes.setdefault(video, set()).add(int(timestamp))
    return keyframes, problems


def read_sources(path: Path, keyframes: dict[str, set[int]]) -> tuple[dict[str, list[Source]], list[tuple]]:
    """The listed sources that hold an annotated second, by video, and report rows for lines that name no source."""
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
            source = Source(int(name['start']), int(name['end']), video)
            if any(source.start <= second < source.end for second in keyframes.get(name['id'], ())):
                copies = sources.setdefault(name['id'], [])
                if source not in copies:
                    copies.append(source)
    return sources, problems


def plan_clips(sources: list[Source], seconds: list[int]) -> dict[Source, list[int]]:
    """Give every annotated second to the source in which it is most centred; seconds in no source are left out."""
    plan = {}
    for second in sorted(seconds):
        holding = [source for source in sources if source.start <= second < source.end]
        if holding:
            best = min(holding, key=lambda source: abs(source.start + source.end - 2 * second))
            plan.setdefault(best, []).append(second)
    return plan


def clip_range(source: Source, seconds: list[int]) -> tuple[int, int]:
    """Seconds [start, end) of the original video to keep: two around the keyframes, within the source."""
    return max(source.start, min(seconds) - CONTEXT_S), min(source.end, max(seconds) + CONTEXT_S)


def cut_command(ffmpeg: str, video: Path, offset: int, seconds: int, target: Path) -> list[str]:
    """ffmpeg's arguments to cut `seconds` from source time `offset` (both in s), each frame the nearest of the source.

    `setpts` moves every frame to the middle between its predecessor and itself, so that `fps`, which holds a frame
    until the next one is due, takes the nearest frame on either side, at any frame rate. Source time 0 is the
    container's start, or the first picture where that follows within MAX_LEAD_S.
    """
    filters = (
        f"settb=AVTB,setpts='(PTS+if(isnan(PREV_INPTS),PTS,PREV_INPTS))/2-if(lt(STARTT,{MAX_LEAD_S}),STARTPTS,0)',"
        f'fps={FPS}:start_time={offset}:round=up,tpad=stop={MAX_REPEAT}:stop_mode=clone,'
        'crop=trunc(iw/2)*2:trunc(ih/2)*2:0:0,scale=out_range=limited')  # yuv420p needs even sides; boxes are relative
    return [ffmpeg, '-nostdin', '-v', 'error', '-protocol_whitelist', 'file', '-threads', '1', '-i', f'file:{video}',
            '-map', '0:V:0', '-vf', filters, '-frames:v', str(seconds * FPS), *ENCODER,
            '-map_metadata', '-1', '-map_chapters', '-1', '-f', 'mp4', '-y', str(target)]


def cut_clip(ffmpeg: str, video: Path, offset: int, seconds: int, target: Path) -> str | None:
    """Cut one clip into `target`; return None, or the reason why it cannot be had from this video."""
    try:
        done = subprocess.run(cut_command(ffmpeg, video, offset, seconds, target), capture_output=True,
                              timeout=60 + 60 * (offset + seconds))  # 100 times what a slow machine needs
    except subprocess.TimeoutExpired:
        return 'unreadable video: ffmpeg hangs on it'
    if done.returncode:
        lines = done.stderr.decode(errors='replace').splitlines() or ['ffmpeg gives no reason']
        return 'unreadable video: ' + re.sub(r'^\[.*? @ 0x\w+\] ', '', lines[0]).replace(f'file:{video}', '').strip(': ')
    decord.logging.set_level(decord.logging.QUIET)
    try:
        frames = len(decord.VideoReader(str(target), num_threads=1))
    except (decord.DECORDError, RuntimeError):  # nothing was decoded
        frames = 0
    if frames < seconds * FPS:
        return 'source too short: it ends {:.1f} s before the clip does'.format(
            seconds - max(0, frames - MAX_REPEAT) / FPS)
    return None


def cut_video(video_id: str, sources: list[Source], seconds: list[int], folders: list[Path], root: Path,
              ffmpeg: str, overwrite: bool) -> tuple[int, int, list[tuple]]:
    """Cut all clips of one video; where a source fails, its seconds go to the next best one.

    Returns the number of clips cut now, the number that were there, and report rows for the seconds that have none.
    """
    work, sources, reasons, fresh, kept = root / '.cut_kinetics', list(sources), {}, set(), set()
    plan = plan_clips(sources, seconds)
    while True:
        for source, covered in plan.items():
            start, end = clip_range(source, covered)
            name = f'{video_id}_{start:06d}_{end:06d}.mp4'
            if name in fresh:
                continue
            if (root / 'videos' / name).exists() and not overwrite:
                kept.add(name)
                continue
            video = next((path for path in (folder / source.path for folder in folders) if path.is_file()), None)
            problem = 'file missing: ' + source.path if video is None else cut_clip(
                ffmpeg, video.absolute(), start - source.start, end - start, work / name)
            if problem:
                reasons.update({second: reasons.get(second, []) + [problem] for second in covered})
                sources.remove(source)
                break
            fresh.add(name)
        else:
            break
        plan = plan_clips(sources, seconds)
    wanted = {'{}_{:06d}_{:06d}.mp4'.format(video_id, *clip_range(*item)) for item in plan.items()}
    for name in wanted & fresh:
        os.replace(work / name, root / 'videos' / name)
    lost = set(seconds).difference(*plan.values())
    return len(wanted & fresh), len(wanted & kept), [
        (video_id, second, '; '.join(reasons.get(second, ['no listed video holds this second']))) for second in lost]


@contextlib.contextmanager
def workspace(path: Path):
    """A folder for unfinished files that belongs to this run alone, emptied before and removed after."""
    path.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go when this process ends, however
        for leftover in path.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield path
        shutil.rmtree(path)
    except BlockingIOError:
        sys.exit(f'error: another run of this step is at work in {path.parent}; wait for it to end')
    finally:
        os.close(handle)


def write_report(path: Path, header: list[str], rows: list[tuple]) -> None:
    """Write a csv beside its final name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix('.part'), 'w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        csv.writer(file, lineterminator='\n').writerows([header, *rows])
    os.replace(path.with_suffix('.part'), path)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    annotations = args.avakinetics_anotation / 'kinetics_train_v1.0.csv'
    for path, hint in (annotations, 'do Step 2 or set --avakinetics_anotation'), (args.kinetics_list,
                                                                                 'do Step 1 or set --kinetics_list'):
        if not path.is_file():
            sys.exit(f'error: {path} not found; {hint}')
    if not shutil.which(args.ffmpeg):
        sys.exit(f'error: {args.ffmpeg} is not a program; leave --ffmpeg away to use the one of imageio-ffmpeg')

    keyframes, problems = read_keyframes(annotations)
    sources, list_problems = read_sources(args.kinetics_list, keyframes)
    if not sources:
        sys.exit(f'error: {args.kinetics_list} holds none of the {len(keyframes)} videos annotated in {annotations}; '
                 'is it the list of the Kinetics-700 training videos?')
    rows = [(video, second, 'video not in the list') for video in keyframes.keys() - sources.keys()
            for second in keyframes[video]]

    root = args.avakinetics_root
    (root / 'videos').mkdir(parents=True, exist_ok=True)
    list_folder = args.kinetics_list.absolute().parent
    folders = [Path.cwd(), list_folder, list_folder / 'videos_train']
    cut = kept = 0
    with workspace(root / '.cut_kinetics'):
        tasks = (delayed(cut_video)(video, sources[video], sorted(keyframes[video]), folders, root.absolute(),
                                    args.ffmpeg, args.overwrite) for video in sources)
        results = Parallel(n_jobs=args.num_workers if args.num_workers > 0 else -1,
                           return_as='generator_unordered')(tasks)
        for fresh, there, lost in tqdm(results, total=len(sources), desc='cut', unit='video', delay=1):
            cut, kept, rows = cut + fresh, kept + there, rows + lost
    report = root / 'reports/cut_kinetics_train.csv'
    write_report(report, ['video_id', 'timestamp', 'reason'], sorted(rows) + problems + list_problems)

    total = sum(map(len, keyframes.values()))
    print(f'{cut + kept} clips in {root / "videos"} ({cut} cut now, {kept} there already) '
          f'for {total - len(rows)} of {total} annotated keyframes')
    for reason, count in Counter(row[2].split(':')[0] for row in rows).most_common():
        print(f'  {count} keyframes left out: {reason}')
    for reason, count in Counter(row[2].split(':')[0] for row in problems + list_problems).items():
        print(f'  {count} lines skipped: {reason}')
    print(f'  report: {report}')
    if not cut + kept:
        sys.exit('error: not one clip could be cut; the report says why')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        print('interrupted; the same command continues', file=sys.stderr)
        sys.exit(130)
