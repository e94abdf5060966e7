#!/usr/bin/env python3
r"""Step 5: write the annotations of the usable clips in MMAction2's format.

Reads the annotations of AVA-Kinetics (kinetics_train_v1.0.csv) and checks each clip: its frames in
ROOT/rawframes, whichever program extracted them, or its video in ROOT/videos if these are unusable.
Writes ROOT/kinetics_train.csv, a row `<clip>,<timestamp>,x1,y1,x2,y2,action_id,-1` for each
annotation. If several usable clips cover a keyframe, the one with the keyframe closest to its
middle is taken. Keyframes without a usable clip are listed in
ROOT/reports/prepare_annotation_train.csv, each with the reason. With --split val, all names have
val in place of train.

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
from collections import Counter, defaultdict
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Iterable, NamedTuple

import av
from tqdm import tqdm

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30  # frames per second of the clips
MAX_ACTION = 80  # the highest action of AVA
VIDEO_ID = re.compile(r'[A-Za-z0-9_-]{1,64}')
CLIP_NAME = re.compile(r'([A-Za-z0-9_-]{1,64})_([0-9]{6})_([0-9]{6})')
OLD_FRAMES = 'frames older than their clip'
NO_THREADS = 'no more threads can be started here; raise the limit on processes (ulimit -u)'

KeyframeId = tuple[str, int]  # video id, timestamp


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


class State(NamedTuple):
    """How a clip can be used: as frames, or else as a video, unless `error` says why not."""

    clip: Clip
    has_frames: bool
    has_old_frames: bool = False  # they are complete, but older than the clip
    error: str = ''


def to_path(text: str) -> Path:
    """Return the path that an argument names."""
    if not text:
        raise argparse.ArgumentTypeError('it is empty; set its variable as README says')
    return Path(text).expanduser()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Step 5: write the annotations of the usable clips in MMAction2's format."
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
        help='threads that check clips: many for a slow file server, 2 for a local disk; -1: all '
        'CPUs (default: %(default)s)',
    )
    args = parser.parse_args(argv)
    if args.num_workers < 1 and args.num_workers != -1:
        sys.exit('error: --num_workers must be 1 or more, or -1 for all CPUs')
    return args


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


def read_annotations(path: Path) -> tuple[list[Annotation], list[tuple]]:
    """Read an annotation file; return its annotations, and report rows for malformed lines."""
    if not path.exists():
        sys.exit(f'error: {path} not found; run Step 2 or set --avakinetics_anotation')
    annotations = []
    malformed = []
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        for number, line in enumerate(map(str.strip, file), 1):
            if annotation := parse_annotation(line):
                annotations.append(annotation)
            elif line:
                malformed.append(('', '', f'malformed annotation: line {number}: {line[:80]!r}'))
    if not any(annotation.box for annotation in annotations):
        reason = malformed[0][2] if malformed else 'nobody is annotated'
        sys.exit(f'error: {path} holds no annotated keyframe: {reason}; run Step 2 again')
    return annotations, malformed


def find_clips(root: Path, video_ids: set[str]) -> list[Clip]:
    """Return the clips of these videos in ROOT/rawframes or ROOT/videos."""
    names = set()
    for folder, suffix in ('rawframes', ''), ('videos', '.mp4'):
        if (root / folder).is_dir():
            found = os.listdir(root / folder)
            names |= {name.removesuffix(suffix) for name in found if name.endswith(suffix)}
    return [clip for clip in map(parse_clip, sorted(names)) if clip and clip.video_id in video_ids]


def check_frames(folder: Path, numbers: Iterable[int], since: float | None) -> str:
    """Return why these raw frames of a folder cannot be used, or an empty string.

    Missing and empty frames are errors. So are frames with other numbers and frames older than
    `since`, a time in seconds, unless that is None, as it is for AVA's movies.
    """
    entries = os.scandir(folder)
    files = {entry.name: entry.stat() for entry in entries if entry.name.startswith('img_')}
    names = [f'img_{number:05d}.jpg' for number in numbers]
    missing = [name for name in names if name not in files or not files[name].st_size]
    if missing:
        return f'frames missing or empty: {len(missing):,} of {len(names):,}, first {missing[0]}'
    if since is None:
        return ''
    if len(files) > len(names):
        return f'too many frames: {len(files):,}, not {len(names):,}'
    return OLD_FRAMES if any(file.st_mtime < since for file in files.values()) else ''


def check_video(video: Path, num_frames: int) -> str:
    """Return why a clip's video cannot be used, or an empty string.

    Counts packets, which is much faster than decoding frames.
    """
    try:
        with av.open(str(video), format='mov') as container:
            found = sum(packet.size > 0 for packet in container.demux(video=0))
    except (av.FFmpegError, IndexError, ValueError) as error:  # ValueError: an undecodable name
        return f'unreadable clip: {getattr(error, "strerror", None) or "it holds no frames"}'
    return '' if found == num_frames else f'wrong number of frames: {found:,}, not {num_frames:,}'


def check_clip(clip: Clip, root: Path) -> State:
    """Check a clip's raw frames or, if they cannot be used, its video."""
    video = root / f'videos/{clip.name}.mp4'
    exists = video.exists()
    numbers = range(1, clip.num_frames + 1)
    try:
        since = video.stat().st_mtime if exists else 0  # without a video, any age will do
        error = check_frames(root / 'rawframes' / clip.name, numbers, since)
    except OSError as failure:
        error = f'unreadable frames: {failure.strerror}'
    if not error:
        return State(clip, has_frames=True)
    has_old_frames = error == OLD_FRAMES
    if exists:
        error = check_video(video, clip.num_frames)
    return State(clip, False, has_old_frames, error)


def check_clips(clips: list[Clip], root: Path, num_threads: int) -> dict[str, list[State]]:
    """Check clips in threads, since a slow file server answers many at the same time.

    Returns the clips' states by video id.
    """
    try:
        threads = ThreadPool(num_threads if num_threads > 0 else None)
    except (RuntimeError, AttributeError):  # AttributeError: the half-made pool's clean-up fails
        sys.exit(f'error: {NO_THREADS}')
    checked = threads.imap(functools.partial(check_clip, root=root), clips, 64)
    states = defaultdict(list)
    with threads, tqdm(checked, 'check', len(clips), unit='clip', leave=False) as bar:
        for state in bar:
            states[state.clip.video_id].append(state)
    return states


def choose_clip(timestamp: int, states: list[State]) -> State | None:
    """Choose the clip for a keyframe: usable if possible, then with its middle closest to it."""
    covering = [state for state in states if state.clip.start <= timestamp < state.clip.end]

    def rank(state: State) -> tuple[bool, int]:
        return bool(state.error), abs(state.clip.start + state.clip.end - 2 * timestamp)

    return min(covering, key=rank, default=None)


def choose_clips(
    keyframes: set[KeyframeId], states: dict[str, list[State]]
) -> tuple[dict[KeyframeId, State], list[tuple]]:
    """Choose a usable clip for each keyframe; return them, and report rows for the others."""
    chosen = {}
    skipped = []
    for video_id, timestamp in sorted(keyframes):
        state = choose_clip(timestamp, states.get(video_id, []))
        if not state:
            skipped.append((video_id, timestamp, 'no clip holds this keyframe'))
        elif state.error:
            skipped.append((video_id, timestamp, f'{state.error} in {state.clip.name}'))
        else:
            chosen[video_id, timestamp] = state
    return chosen, skipped


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


def format_rows(annotations: list[Annotation], chosen: dict[KeyframeId, State]) -> list[str]:
    """Format the annotations of the chosen clips as MMAction2 reads them, a row each."""
    return [
        '{},{},{:.3f},{:.3f},{:.3f},{:.3f},{},-1\n'.format(
            chosen[row.keyframe].clip.name, row.timestamp, *row.box, row.action
        )
        for row in annotations
        if row.box and row.keyframe in chosen
    ]


def print_clips(chosen: set[State], skipped: list[tuple], root: Path) -> None:
    """Print how training can read the chosen clips, and why keyframes and lines were skipped."""
    with_frames = sum(state.has_frames for state in chosen)
    old = sum(state.has_old_frames for state in chosen)
    as_videos = len(chosen) - with_frames
    print(f'  clips: {with_frames:,} with raw frames, {as_videos:,} as videos')
    if old:
        print(f'  clips whose raw frames are older than the clip, as after cp -r: {old:,}')
    if old or (with_frames and as_videos):
        print(
            '  training reads either all clips as frames or all as videos: run Step 4, then this '
            f'step again: python3 extract_rgb_frames.py --avakinetics_root={root}'
        )
    for reason, number in Counter(row[2].split(':')[0] for row in skipped).items():
        print(f'  {number:,} skipped: {reason}')


def prepare(args: argparse.Namespace) -> None:
    """Check the clips, write the annotations and the report, print the summary."""
    # read the annotations
    root = args.avakinetics_root
    path = args.avakinetics_anotation / f'kinetics_{args.split}_v1.0.csv'
    annotations, malformed = read_annotations(path)
    keyframes = {annotation.keyframe for annotation in annotations if annotation.box}
    empty = {annotation.keyframe for annotation in annotations} - keyframes

    # check the clips of the annotated videos
    video_ids = {video_id for video_id, _ in keyframes}
    clips = find_clips(root, video_ids)
    if not clips:
        sys.exit(
            f'error: {root} holds no clip of the {len(video_ids):,} annotated videos; run Step 3 '
            '(cut_kinetics.py) or set --avakinetics_root'
        )
    states = check_clips(clips, root, args.num_workers)

    # choose a clip for each keyframe, report the keyframes without one
    chosen, skipped = choose_clips(keyframes, states)
    skipped += malformed
    report = root / f'reports/prepare_annotation_{args.split}.csv'
    write_csv(report, [('video_id', 'timestamp', 'reason'), *skipped])
    if not chosen:
        sys.exit(f'error: no annotated keyframe has a usable clip; {report} says why')

    # write the annotations
    rows = format_rows(annotations, chosen)
    target = root / f'kinetics_{args.split}.csv'
    write_if_changed(target, ''.join(rows).encode())
    count = f'{len(rows):,}, for {len(chosen):,} of {len(keyframes):,} annotated keyframes'
    print(f'rows in {target}: {count}')
    print_clips(set(chosen.values()), skipped, root)
    if empty:
        print(f'  keyframes without people, nothing to prepare: {len(empty):,}')
    if max(annotation.action for annotation in annotations) > MAX_ACTION:
        print(
            f'  actions above {MAX_ACTION}: MMAction2 needs num_classes and a label file for them'
        )
    if skipped:
        print(f'  report: {report}')


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    sys.stderr = sys.stderr or open(os.devnull, 'w')  # None if it is closed
    try:
        prepare(parse_args(argv))
        print(end='', flush=True)  # so that a closed pipe is noticed here
    except BrokenPipeError:  # `| head` has read enough
        os._exit(141)
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; fix it, then run the same command again')
    except KeyboardInterrupt:
        print('interrupted; run the same command again', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
