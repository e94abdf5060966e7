#!/usr/bin/env python3
"""Step 5: write the annotations of the clips that are there, as MMAction2 reads them.

Reads the AVA-Kinetics annotations (kinetics_train_v1.0.csv) and, clip by clip, the folder in
ROOT/rawframes, whatever made it, or the video in ROOT/videos where that is missing or lacks frames,
and writes ROOT/kinetics_train.csv: a row `<clip>,<second>,x1,y1,x2,y2,action_id,-1` for each
annotation, in the order of the annotation file, on the clip in which its keyframe is most centred.
A clip that lacks frames is not used. What could not be used is in
ROOT/reports/prepare_annotation_train.csv with its reason. With `--split val`, all names have val in
place of train.

    python3 prepare_annotation.py --avakinetics_anotation=./ava_kinetics_v1_0 \\
        --avakinetics_root=$MMACTION2/data/ava_kinetics
"""

import argparse
import csv
import functools
import io
import os
import re
import signal
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30
CLIP_NAME = re.compile(r'(?P<id>[A-Za-z0-9_-]{11})_(?P<start>[0-9]{6})_(?P<end>[0-9]{6})')
VIDEO_ID = re.compile(r'[A-Za-z0-9_-]{11}')
NUMBERS = ['timestamp', 'x1', 'y1', 'x2', 'y2', 'action']
BLOCK = 2**22  # bytes of annotations that are read together


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Step 5: write the annotations of the clips that are there, as MMAction2 '
        'reads them.'
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
        '--avakinetics_root',
        type=Path,
        default=MMACTION2 / 'data/ava_kinetics',
        metavar='DIR',
        help='folder of the data set that is made (default: %(default)s)',
    )
    parser.add_argument(
        '--split',
        choices=['train', 'val'],
        default='train',
        help='part of AVA-Kinetics (default: train)',
    )
    parser.add_argument(
        '--num_workers',
        type=int,
        default=16,
        metavar='N',
        help='threads that look at clips, many for a slow file server (default: %(default)s)',
    )
    args = parser.parse_args(argv)
    if args.num_workers < 1:
        sys.exit('error: --num_workers must be 1 or more')
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


@functools.cache
def frame_names(count: int) -> frozenset[str]:
    return frozenset(f'img_{index:05d}.jpg' for index in range(1, count + 1))


def missing_frames(root: Path, clip: str) -> tuple[bool, str]:
    """Whether a clip has all its raw frames and, where neither these nor its video are whole, what
    is missing.
    """
    total, problem = (int(clip[-6:]) - int(clip[-13:-7])) * FPS, ''
    try:
        missing = sorted(frame_names(total).difference(os.listdir(root / 'rawframes' / clip)))
        if not missing:
            return True, ''
        problem = f'frames missing: {len(missing)} of {total}, first {missing[0]}'
    except FileNotFoundError:  # no raw frames
        pass
    except OSError as error:
        problem = f'unreadable clip: {error.strerror}'
    import av

    try:
        with av.open(str(root / f'videos/{clip}.mp4'), format='mov') as video:
            count = sum(packet.size > 0 for packet in video.demux(video=0))
        return (
            False,
            ''
            if count == total
            else problem or f'wrong number of frames: {count} instead of {total}',
        )
    except (av.FFmpegError, IndexError) as error:
        return (
            False,
            problem or f'unreadable clip: {getattr(error, "strerror", None) or "no video"}',
        )


def find_clips(root: Path, videos: set[str]) -> list[str]:
    """The clips of these videos in ROOT/rawframes or ROOT/videos, without AVA's folders."""
    names = set(os.listdir(root / 'rawframes')) if (root / 'rawframes').is_dir() else set()
    if (root / 'videos').is_dir():
        names |= {name[:-4] for name in os.listdir(root / 'videos') if name.endswith('.mp4')}
    matches = (CLIP_NAME.fullmatch(name) for name in names)
    return sorted(
        name[0] for name in matches if name and name['id'] in videos and name['start'] < name['end']
    )


def choose_clips(clips, keyframes):
    """For each keyframe (video, second) the clip that holds it, a whole one if there is one, then
    the most centred.

    `clips` has the columns clip, video, start, end and problem; keyframes in no clip are left out.
    """
    held = keyframes.merge(clips, on='video')
    held = held[(held.start <= held.second) & (held.second < held.end)]
    held = held.assign(
        broken=held.problem != '', distance=(held.start + held.end - 2 * held.second).abs()
    )
    return held.sort_values(['broken', 'distance', 'clip']).drop_duplicates(['video', 'second'])


def prepare(args: argparse.Namespace, annotations: Path) -> None:
    """Look at the clips, write the csv and the report, say what came of it."""
    import pandas as pd

    root, target = args.avakinetics_root, args.avakinetics_root / f'kinetics_{args.split}.csv'
    table, malformed = read_annotations(annotations)
    table['second'] = table.timestamp.astype(
        int
    )  # MMAction2 names a keyframe so; real ones are 0 to 0.17 s later
    keyframes = table.loc[table.x1.notna(), ['video', 'second']].drop_duplicates()
    nobody = table.loc[table.x1.isna(), ['video', 'second']].drop_duplicates()
    if keyframes.empty:
        first = f'; its first fault: {malformed[0][2]}' if malformed else ''
        sys.exit(
            f'error: {annotations} holds no annotated keyframe{first}; do Step 2 again or '
            'set --avakinetics_anotation'
        )
    names = find_clips(root, set(keyframes.video))
    if not names:
        sys.exit(
            f'error: {root} holds no clip of the {keyframes.video.nunique()} videos '
            f'annotated in {annotations}; '
            'do Step 3 (cut_kinetics.py) first'
        )
    with ThreadPool(args.num_workers) as threads:
        look = threads.imap(functools.partial(missing_frames, root), names, 64)
        raw, problems = zip(*tqdm(look, total=len(names), desc='check', unit='clip', delay=1))
    clips = pd.DataFrame(
        dict(
            clip=names,
            video=[name[:-14] for name in names],
            start=[int(name[-13:-7]) for name in names],
            end=[int(name[-6:]) for name in names],
            raw=raw,
            problem=problems,
        )
    )
    chosen = keyframes.merge(choose_clips(clips, keyframes), on=['video', 'second'], how='left')
    lost = chosen[chosen.problem != ''].fillna(
        {'problem': 'no clip holds this keyframe', 'clip': ''}
    )
    used = chosen[chosen.problem == ''].astype({'raw': bool})
    report = root / f'reports/prepare_annotation_{args.split}.csv'
    report.parent.mkdir(exist_ok=True)
    part = report.with_name(f'.{report.name}.part')
    left_out = sorted(
        (row.video, row.second, f'{row.problem} in {row.clip}' if row.clip else row.problem)
        for row in lost.itertuples()
    )
    pd.DataFrame(left_out + malformed, columns=['video_id', 'timestamp', 'reason']).to_csv(
        part, index=False
    )
    os.replace(part, report)
    if used.empty:
        sys.exit(f'error: not one annotation has its frames; {report} says why')
    rows = table[table.x1.notna()].merge(used[['video', 'second', 'clip']], on=['video', 'second'])
    part = target.with_name(f'.{target.name}.part')
    with open(part, 'w') as file:
        columns = rows[['clip', 'second', 'x1', 'y1', 'x2', 'y2', 'action']].itertuples(
            index=False, name=None
        )
        file.writelines('%s,%d,%.3f,%.3f,%.3f,%.3f,%d,-1\n' % row for row in columns)
    os.replace(part, target)

    used_clips = used.drop_duplicates('clip')
    print(
        f'{len(rows)} rows in {target}: {len(used)} of {len(keyframes)} annotated keyframes, '
        f'on {len(used_clips)} clips, '
        f'{used_clips.raw.sum()} by their raw frames, {(~used_clips.raw).sum()} by their videos'
    )
    if used_clips.raw.nunique() > 1:
        print(
            '  training reads either frames or videos of Kinetics: extract the missing '
            'frames (Step 4) and repeat this step, '
            'or train from videos only'
        )
    for reason, count in lost.problem.str.split(':').str[0].value_counts().items():
        print(f'  {count} keyframes left out: {reason}')
    if len(nobody):
        alone = nobody.merge(keyframes, how='left', indicator='where')['where'] == 'left_only'
        print(f'  {alone.sum()} keyframes without people: nothing to prepare')
    if malformed:
        print(f'  {len(malformed)} lines skipped: malformed annotation')
    print(f'  report: {report}')


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    sys.stdout.reconfigure(errors='backslashreplace')  # names of files may be no UTF-8
    args = parse_args(argv)
    try:
        root, annotations = (
            args.avakinetics_root,
            args.avakinetics_anotation / f'kinetics_{args.split}_v1.0.csv',
        )
        if not annotations.is_file():
            sys.exit(f'error: {annotations} not found; do Step 2 or set --avakinetics_anotation')
        if not (root / 'rawframes').is_dir() and not (root / 'videos').is_dir():
            sys.exit(
                f'error: {root} has neither rawframes nor videos; do Step 3 '
                '(cut_kinetics.py) or set --avakinetics_root'
            )
        prepare(args, annotations)
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; fix it, then run the same command again')
    except KeyboardInterrupt:
        print('interrupted; run the same command again', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
