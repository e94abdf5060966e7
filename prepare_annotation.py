#!/usr/bin/env python3
r"""Step 5: write the annotations of the clips that are there, as MMAction2 reads them.

Reads the annotations of AVA-Kinetics (kinetics_train_v1.0.csv) and looks at each clip: at its
frames in ROOT/rawframes, whoever made them, or at its video in ROOT/videos if frames are missing.
Writes ROOT/kinetics_train.csv, a row `<clip>,<second>,x1,y1,x2,y2,action_id,-1` for each
annotation, on the complete clip in which the keyframe is most centred. Keyframes without one are
listed in ROOT/reports/prepare_annotation_train.csv, with the reason. With --split val, all names
have val in place of train.

    python3 prepare_annotation.py --avakinetics_anotation=./ava_kinetics_v1_0 \
        --avakinetics_root=$MMACTION2/data/ava_kinetics
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import os
import re
import signal
import sys
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Iterable, NamedTuple

import av
from tqdm import tqdm

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30
OLD_FRAMES = 'frames older than their clip'
NO_THREADS = 'no more threads can be started here; raise the limit on processes (ulimit -u)'
CLIP_NAME = re.compile(r'([A-Za-z0-9_-]{11})_([0-9]{6})_([0-9]{6})')
FRACTION = r'(0?\.\d+|[01](?:\.0*)?|\d(?:\.\d+)?e-\d+)'  # 0 to 1
# video, timestamp and, if somebody is annotated there, box and action
ROW = re.compile(
    r'([A-Za-z0-9_-]{11}),(\d{1,6})(?:\.\d*)?'
    rf'(?:,,,,,|{f",{FRACTION}" * 4},([1-9]|[1-7]\d|80))?',
    re.ASCII,
)


class Clip(NamedTuple):
    """Seconds start to end of a YouTube video."""

    name: str
    video: str
    start: int
    end: int


class State(NamedTuple):
    """How usable a clip is: by its raw frames, else by its video, or what is wrong with both.

    Its frames are `old` where only their times keep them from being used.
    """

    clip: Clip
    frames: bool = False
    problem: str | None = None
    old: bool = False


def to_path(text: str) -> Path:
    """The path that an argument names."""
    if not text:
        raise argparse.ArgumentTypeError('it is empty; set its variable as README says')
    return Path(text).expanduser()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Step 5: write the annotations of the clips that are there.'
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
        '--avakinetics_root',
        type=to_path,
        default=MMACTION2 / 'data/ava_kinetics',
        metavar='DIR',
        help='folder of the data set (default: %(default)s)',
    )
    parser.add_argument(
        '--num_workers',
        type=int,
        default=16,
        metavar='N',
        help='threads that look at clips: many for a slow file server, 2 for a local disk; -1: all '
        'CPUs (default: %(default)s)',
    )
    args = parser.parse_args(argv)
    if args.num_workers < 1 and args.num_workers != -1:
        sys.exit('error: --num_workers must be 1 or more, or -1 for all CPUs')
    return args


def read_annotations(path: Path) -> tuple[list[tuple], list[tuple]]:
    """The rows (video, second, numbers) of an annotation file, and report rows on malformed lines.

    The numbers are x1, y1, x2, y2, relative to the frame, and the action; none where the row has
    two columns, which name a keyframe on which nobody was annotated.
    """
    if not path.exists():
        sys.exit(f'error: {path} not found; run Step 2 or set --avakinetics_anotation')
    rows, problems = [], []
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        for number, line in enumerate(map(str.strip, file), 1):
            row = ROW.fullmatch(line)
            video, second, *numbers = row.groups() if row else ('', '')
            numbers = [float(text) for text in numbers if text]
            if row and (not numbers or numbers[0] < numbers[2] and numbers[1] < numbers[3]):
                rows.append((video, int(second), numbers))  # as MMAction2 names keyframes
            elif line:
                problems.append(('', '', f'malformed annotation: line {number}: {line[:80]!r}'))
    return rows, problems


def check_frames(folder: Path, numbers: Iterable[int], since: float | None) -> str | None:
    """Return what is wrong with these raw frames of a folder: missing, empty, older than `since`.

    Where `since` is given, the folder may hold no others.
    """
    entries = os.scandir(folder)
    files = {entry.name: entry.stat() for entry in entries if entry.name.startswith('img_')}
    names = [f'img_{number:05d}.jpg' for number in numbers]
    missing = [name for name in names if name not in files or not files[name].st_size]
    if missing:
        return f'frames missing or empty: {len(missing):,} of {len(names):,}, first {missing[0]}'
    if since is None:
        return None
    if len(files) > len(names):
        return f'too many frames: {len(files):,}, not {len(names):,}'
    return OLD_FRAMES if any(file.st_mtime < since for file in files.values()) else None


def check_clip(clip: Clip, root: Path) -> State:
    """Look at a clip's raw frames or, where they are not complete, at its video."""
    total, problem = (clip.end - clip.start) * FPS, None
    video = root / f'videos/{clip.name}.mp4'
    exists = video.exists()
    try:
        since = video.stat().st_mtime if exists else 0
        problem = check_frames(root / 'rawframes' / clip.name, range(1, total + 1), since)
        if not problem:
            return State(clip, frames=True)
    except FileNotFoundError:  # no raw frames
        pass
    except OSError as error:
        problem = f'unreadable frames: {error.strerror}'
    old = problem == OLD_FRAMES
    if exists or not problem:
        problem = check_video(video, total)
    return State(clip, problem=problem, old=old)


def check_video(video: Path, total: int) -> str | None:
    """Return what is wrong with a clip's video, by its packets, which are not decoded."""
    try:
        with av.open(str(video), format='mov') as packets:
            count = sum(packet.size > 0 for packet in packets.demux(video=0))
    except (av.FFmpegError, IndexError, ValueError) as error:  # ValueError: undecodable names
        return f'unreadable clip: {getattr(error, "strerror", None) or "it holds no frames"}'
    return f'wrong number of frames: {count:,}, not {total:,}' if count != total else None


def check_clips(clips: list[Clip], root: Path, workers: int) -> dict[Clip, State]:
    """Look at clips in threads, many of which wait for a slow file server together."""
    try:
        threads = ThreadPool(workers if workers > 0 else None)
    except (RuntimeError, AttributeError):  # AttributeError: Python fails to clean up after itself
        sys.exit(f'error: {NO_THREADS}')
    states = {}
    with threads, tqdm(desc='check', total=len(clips), unit='clip', leave=False) as bar:
        for state in threads.imap(functools.partial(check_clip, root=root), clips, 64):
            states[state.clip] = state
            bar.update()
    return states


def find_clips(root: Path, keyframes: set[tuple]) -> dict[str, list[Clip]]:
    """The clips of annotated videos in ROOT/rawframes or ROOT/videos, by video."""
    names, clips = set(), {video: [] for video, _ in keyframes}
    for folder, suffix in ('rawframes', ''), ('videos', '.mp4'):
        if (root / folder).is_dir():
            found = os.listdir(root / folder)
            names |= {name.removesuffix(suffix) for name in found if name.endswith(suffix)}
    for match in filter(None, map(CLIP_NAME.fullmatch, sorted(names))):
        clip = Clip(match[0], match[1], int(match[2]), int(match[3]))
        if clip.video in clips:
            clips[clip.video].append(clip)
    return clips


def choose_clip(second: int, clips: list[Clip], states: dict[Clip, State]) -> Clip | None:
    """The best clip that holds a keyframe: complete if there is such, then the most centred one."""
    held = [clip for clip in clips if clip.start <= second < clip.end]
    return min(
        held,
        key=lambda clip: (bool(states[clip].problem), abs(clip.start + clip.end - 2 * second)),
        default=None,
    )


def prepare(args: argparse.Namespace) -> None:
    """Look at the clips, write the csv and the report, say what came of it."""
    root = args.avakinetics_root
    annotations = args.avakinetics_anotation / f'kinetics_{args.split}_v1.0.csv'
    rows, malformed = read_annotations(annotations)
    keyframes = {row[:2] for row in rows if row[2]}
    if not keyframes:
        first = malformed[0][2] if malformed else 'nobody is annotated'
        sys.exit(f'error: {annotations} holds no annotated keyframe: {first}; run Step 2 again')
    clips = find_clips(root, keyframes)
    found = [clip for of_video in clips.values() for clip in of_video]
    if not found:
        sys.exit(
            f'error: {root} holds no clip of the {len(clips)} annotated videos; run Step 3 '
            '(cut_kinetics.py) or set --avakinetics_root'
        )
    states = check_clips(found, root, args.num_workers)
    chosen, lost = {}, []
    for video, second in sorted(keyframes):
        if not (clip := choose_clip(second, clips[video], states)):
            lost.append((video, second, 'no clip holds this keyframe'))
        elif problem := states[clip].problem:
            lost.append((video, second, f'{problem} in {clip.name}'))
        else:
            chosen[video, second] = clip
    report = root / f'reports/prepare_annotation_{args.split}.csv'
    write_csv(report, [('video_id', 'timestamp', 'reason'), *lost, *malformed])
    if not chosen:
        sys.exit(f'error: not one annotation has its frames; {report} says why')
    lines = [
        '%s,%d,%.3f,%.3f,%.3f,%.3f,%d,-1\n' % (chosen[row[:2]].name, row[1], *row[2])
        for row in rows
        if row[2] and row[:2] in chosen
    ]
    target = root / f'kinetics_{args.split}.csv'
    write(target, ''.join(lines).encode())

    used = [states[clip] for clip in set(chosen.values())]
    by_frames = sum(state.frames for state in used)
    print(
        f'rows in {target}: {len(lines):,}, for {len(chosen):,} of {len(keyframes):,} annotated '
        f'keyframes; clips: {by_frames:,} with raw frames, {len(used) - by_frames:,} as videos'
    )
    old = sum(state.old for state in used)
    if old or 0 < by_frames < len(used):
        print(
            f'  clips whose raw frames are older than the clip, as after cp -r: {old:,}; training '
            'reads either all clips as frames or all as videos: run Step 4, then this step again: '
            f'python3 extract_rgb_frames.py --avakinetics_root={root}'
        )
    for reason, count in Counter(row[2].split(':')[0] for row in lost + malformed).items():
        print(f'  {count:,} left out: {reason}')
    if nobody := len({row[:2] for row in rows} - keyframes):
        print(f'  keyframes without people, nothing to prepare: {nobody:,}')
    if lost or malformed:
        print(f'  report: {report}')


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
        prepare(parse_args(argv))
        print(end='', flush=True)
    except BrokenPipeError:  # `| head` has read enough
        os._exit(141)
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; fix it, then run the same command again')
    except KeyboardInterrupt:
        print('interrupted; run the same command again', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
