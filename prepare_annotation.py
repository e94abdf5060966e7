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
from typing import NamedTuple

import av
from tqdm import tqdm

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30
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
        help='threads that look at clips, many for a slow file server; -1: all CPUs (default: '
        '%(default)s)',
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
        sys.exit(f'error: {path} not found; do Step 2 or set --avakinetics_anotation')
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


@functools.cache
def frame_names(count: int) -> frozenset[str]:
    return frozenset(f'img_{index:05d}.jpg' for index in range(1, count + 1))


def check_clip(clip: Clip, root: Path) -> tuple[bool, str]:
    """(True, '') if a clip has all its raw frames, (False, '') if its video is intact, else (False,
    what is wrong).
    """
    total, problem = (clip.end - clip.start) * FPS, ''
    video, frames = root / f'videos/{clip.name}.mp4', root / 'rawframes' / clip.name
    try:
        missing = frame_names(total).difference(os.listdir(frames))
        since = video.stat().st_mtime if video.exists() else 0
        if missing:
            problem = f'frames missing: {len(missing)} of {total}, first {min(missing)}'
        elif (frames / 'img_00001.jpg').stat().st_mtime >= since:
            return True, ''
    except FileNotFoundError:  # no raw frames
        pass
    except OSError as error:
        problem = f'unreadable frames: {error.strerror}'
    if video.exists():  # then it is what counts
        problem = ''
    try:
        with av.open(str(video), format='mov') as packets:
            count = sum(packet.size > 0 for packet in packets.demux(video=0))
    except (av.FFmpegError, IndexError, ValueError) as error:  # ValueError: undecodable names
        reason = getattr(error, 'strerror', None) or 'it holds no pictures'
        return False, problem or f'unreadable clip: {reason}'
    return False, '' if count == total else f'wrong number of frames: {count}, not {total}'


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


def choose_clip(second: int, clips: list[Clip], states: dict[Clip, tuple]) -> Clip | None:
    """The best clip that holds a keyframe: complete if there is such, then the most centred one."""
    held = [clip for clip in clips if clip.start <= second < clip.end]
    return min(
        held,
        key=lambda clip: (bool(states[clip][1]), abs(clip.start + clip.end - 2 * second)),
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
        sys.exit(f'error: {annotations} holds no annotated keyframe: {first}; do Step 2 again')
    clips = find_clips(root, keyframes)
    found = [clip for of_video in clips.values() for clip in of_video]
    if not found:
        sys.exit(
            f'error: {root} holds no clip of the {len(clips)} annotated videos; do Step 3 '
            '(cut_kinetics.py) or set --avakinetics_root'
        )
    with ThreadPool(args.num_workers if args.num_workers > 0 else None) as threads:
        looked = threads.imap(functools.partial(check_clip, root=root), found, 64)
        states = dict(zip(found, tqdm(looked, 'check', len(found), unit='clip', delay=1)))
    chosen, lost = {}, []
    for video, second in sorted(keyframes):
        if not (clip := choose_clip(second, clips[video], states)):
            lost.append((video, second, 'no clip holds this keyframe'))
        elif problem := states[clip][1]:
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

    used = set(chosen.values())
    by_frames = sum(states[clip][0] for clip in used)
    print(
        f'{len(lines)} rows in {target}: {len(chosen)} of {len(keyframes)} annotated keyframes, '
        f'on {len(used)} clips, {by_frames} by their raw frames, {len(used) - by_frames} by their '
        'videos'
    )
    if 0 < by_frames < len(used):
        print(
            '  training reads either frames or videos of Kinetics: extract frames that are missing '
            'or older than their clip (Step 4) and repeat this step, or train from videos only'
        )
    for reason, count in Counter(row[2].split(':')[0] for row in lost + malformed).items():
        print(f'  {count} left out: {reason}')
    if nobody := len({row[:2] for row in rows} - keyframes):
        print(f'  {nobody} keyframes without people: nothing to prepare')
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
    try:
        prepare(parse_args(argv))
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; fix it, then run the same command again')
    except KeyboardInterrupt:
        print('interrupted; run the same command again', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
