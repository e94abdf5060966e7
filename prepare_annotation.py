#!/usr/bin/env python3
"""Step 5: write the annotations of the clips that are there, as MMAction2 reads them.

Reads the AVA-Kinetics annotations (kinetics_train_v1.0.csv) and the clip folders in ROOT/rawframes, whatever made
them, or the clips in ROOT/videos where no raw frames were made, and writes ROOT/kinetics_train.csv: a row
`<clip>,<second>,x1,y1,x2,y2,action_id,-1` for each annotation, in the order of the annotation file, on the clip in
which its keyframe is most centred. A clip that lacks frames is not used. What could not be used is in
ROOT/reports/prepare_annotation_train.csv with its reason. With `--split val`, all names have val in place of train.

    python3 prepare_annotation.py --avakinetics_anotation=./ava_kinetics_v1_0 \\
        --avakinetics_root=$MMACTION2/data/ava_kinetics
"""
import argparse
import csv
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Iterator

import decord
from joblib import Parallel, delayed
from tqdm import tqdm

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30
CLIP_NAME = re.compile(r'(?P<id>[A-Za-z0-9_-]{11})_(?P<start>\d{6})_(?P<end>\d{6})')
BATCH = 64  # clip folders looked through by one task


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Step 5: write the annotations of the clips that are there, as MMAction2 reads them.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--avakinetics_anotation', '--avakinetics_annotation', type=Path,
                        default=Path('ava_kinetics_v1_0'), metavar='DIR',
                        help='folder of the AVA-Kinetics annotations')
    parser.add_argument('--avakinetics_root', type=Path, default=MMACTION2 / 'data/ava_kinetics', metavar='DIR',
                        help='folder of the data set that is made')
    parser.add_argument('--split', choices=['train', 'val'], default='train', help='part of AVA-Kinetics')
    parser.add_argument('--num_workers', type=int, default=-1, metavar='N', help='parallel processes; -1: all CPUs')
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


def read_annotations(path: Path) -> Iterator[tuple | str]:
    """What `parse_annotation` makes of each line, or what is wrong with it."""
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield parse_annotation(line)
                except ValueError as error:
                    yield f'malformed annotation: line {number}: {error}'


def missing_frames(clips: list[Path]) -> list[str | None]:
    """For each clip, a folder or a video, what it lacks, or None where all frames that its name promises are there."""
    decord.logging.set_level(decord.logging.QUIET)
    answers = []
    for clip in clips:
        name = CLIP_NAME.fullmatch(clip.stem)
        total = (int(name['end']) - int(name['start'])) * FPS
        try:
            if clip.suffix:
                count = len(decord.VideoReader(str(clip), num_threads=1))
                answers.append(f'frames missing: {total - count} of {total}' if count < total else None)
                continue
            present = set(os.listdir(clip))
        except OSError as error:
            answers.append(f'unreadable clip: {error.strerror}')
            continue
        except (decord.DECORDError, RuntimeError):
            answers.append('unreadable clip: no video')
            continue
        missing = [index for index in range(1, total + 1) if f'img_{index:05d}.jpg' not in present]
        answers.append(f'frames missing: {len(missing)} of {total}, first img_{missing[0]:05d}.jpg' if missing else None)
    return answers


def find_clips(root: Path, videos: set[str]) -> list[Path]:
    """The clips of the videos in ROOT/rawframes or, where none has raw frames, in ROOT/videos. AVA's have other names."""
    for folder, suffix in (root / 'rawframes', ''), (root / 'videos', '.mp4'):
        names = (os.path.splitext(entry.name) for entry in os.scandir(folder)) if folder.is_dir() else ()
        names = [(CLIP_NAME.fullmatch(name), extension) for name, extension in names]
        clips = sorted(name[0] for name, extension in names if name and extension == suffix
                       and name['id'] in videos and name['start'] < name['end'])
        if clips:
            return [folder / (clip + suffix) for clip in clips]
    return []


def choose_clip(clips: list[tuple[int, int, str]], second: int) -> str | None:
    """The clip (start, end, name) in which the second is most centred, if any holds it."""
    holding = [clip for clip in clips if clip[0] <= second < clip[1]]
    return min(holding, key=lambda clip: abs(clip[0] + clip[1] - 2 * second))[2] if holding else None


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    root, annotations = args.avakinetics_root, args.avakinetics_anotation / f'kinetics_{args.split}_v1.0.csv'
    if not annotations.is_file():
        sys.exit(f'error: {annotations} not found; do Step 2 or set --avakinetics_anotation')
    if not (root / 'rawframes').is_dir() and not (root / 'videos').is_dir():
        sys.exit(f'error: {root} has neither rawframes nor videos; do Step 3 (cut_kinetics.py) or set --avakinetics_root')

    videos = {row[0] for row in read_annotations(annotations) if isinstance(row, tuple) and row[2]}
    clips = find_clips(root, videos)
    if not clips:
        sys.exit(f'error: {root} holds no clip of the {len(videos)} videos annotated in {annotations}; '
                 'do Step 3 (cut_kinetics.py) first')
    batches = [clips[index:index + BATCH] for index in range(0, len(clips), BATCH)]
    results = Parallel(n_jobs=args.num_workers if args.num_workers > 0 else -1, return_as='generator')(
        delayed(missing_frames)(batch) for batch in batches)
    problems = []
    with tqdm(total=len(clips), desc='look through', unit='clip', delay=1) as bar:
        for answers in results:
            problems += answers
            bar.update(len(answers))

    usable, unusable = {}, {}
    problems = dict(zip((clip.stem for clip in clips), problems))
    for name, problem in problems.items():
        clip = (int(name[-13:-7]), int(name[-6:]), name)
        (unusable if problem else usable).setdefault(name[:-14], []).append(clip)
    target, rows, lost, malformed = root / f'kinetics_{args.split}.csv', 0, {}, []
    keyframes, unpeopled, used = set(), set(), set()
    with open(target.with_suffix('.part'), 'w') as file:
        for row in read_annotations(annotations):
            if isinstance(row, str):
                malformed.append(('', '', row))
                continue
            video, timestamp, box, action = row
            second = int(timestamp)  # MMAction2 names a keyframe by the integer part; real ones are 0 to 0.17 s later
            if not box:
                unpeopled.add((video, second))
                continue
            clip = choose_clip(usable.get(video, ()), second)
            if clip:
                file.write('{},{},{:.3f},{:.3f},{:.3f},{:.3f},{},-1\n'.format(clip, second, *box, action))
                keyframes.add((video, second))
                used.add(clip)
                rows += 1
            else:
                broken = choose_clip(unusable.get(video, ()), second)
                lost[video, second] = f'{problems[broken]} in {broken}' if broken else 'no clip holds this keyframe'
    if not rows:
        target.with_suffix('.part').unlink()
    else:
        os.replace(target.with_suffix('.part'), target)

    report = root / f'reports/prepare_annotation_{args.split}.csv'
    report.parent.mkdir(exist_ok=True)
    with open(report.with_suffix('.part'), 'w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        csv.writer(file, lineterminator='\n').writerows(
            [('video_id', 'timestamp', 'reason'), *sorted((*key, reason) for key, reason in lost.items()), *malformed])
    os.replace(report.with_suffix('.part'), report)
    if not rows:
        sys.exit(f'error: not one annotation has its frames; {report} says why')
    print(f'{rows} rows in {target}: {len(keyframes)} of {len(keyframes) + len(lost)} annotated keyframes, '
          f'on {len(used)} clips, by their {"raw frames" if clips[0].suffix == "" else "videos"}')
    for reason, count in Counter(reason.split(':')[0] for reason in lost.values()).most_common():
        print(f'  {count} keyframes left out: {reason}')
    if unpeopled:
        print(f'  {len(unpeopled - keyframes - lost.keys())} keyframes without people: nothing to prepare')
    if malformed:
        print(f'  {len(malformed)} lines skipped: malformed annotation')
    print(f'  report: {report}')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        print('interrupted; the same command continues', file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; mend it, then the same command continues')
