#!/usr/bin/env python3
"""Step 7b: link AVA's frames into the data set, and say whether the whole is ready for training.

Makes ROOT/rawframes/<ava video id> an absolute symbolic link to AVA_ROOT/rawframes/<ava video id>. Right links are
kept, broken and wrong ones are mended, a real folder of that name is left alone. Then all that training reads is looked up:
the files in ROOT/annotations, and every frame of each annotated clip, or its video where there are no raw frames of Kinetics.
What is missing is in ROOT/reports/softlink_ava.csv.

    python3 softlink_ava.py --avakinetics_root=$MMACTION2/data/ava_kinetics --ava_root=$MMACTION2/data/ava
"""
import argparse
import os
import pickle
import re
import signal
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30
NAME = re.compile(r'[A-Za-z0-9_-]{11}(_[0-9]{6}_[0-9]{6})?')
# What MMAction2's configs of AVA-Kinetics name in ROOT/annotations, beside the merged rows
NEEDED = ['ava_action_list_v2.2_for_activitynet_2019.pbtxt', 'ava_train_excluded_timestamps_v2.2.csv',
          'ava_dense_proposals_train.FAIR.recall_93.9.pkl', 'ava_val_v2.2.csv', 'ava_val_excluded_timestamps_v2.2.csv',
          'ava_dense_proposals_val.FAIR.recall_93.9.pkl']
AVA_START_S = 900  # AVA's frames begin at minute 15 of the movie
CLIP_NAME = re.compile(r'[A-Za-z0-9_-]{11}_(?P<start>[0-9]{6})_(?P<end>[0-9]{6})')


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Step 7b: link AVA's frames into the data set, and check the whole.")
    parser.add_argument('--avakinetics_root', type=Path, default=MMACTION2 / 'data/ava_kinetics', metavar='DIR',
                        help='folder of the data set that is made (default: %(default)s)')
    parser.add_argument('--ava_root', type=Path, default=MMACTION2 / 'data/ava', metavar='DIR',
                        help='folder of the AVA data set; its frames are in rawframes/ (default: %(default)s)')
    return parser.parse_args(argv)


def link_folder(source: Path, link: Path) -> str:
    """Make `link` point to the folder `source`; return 'linked', 'kept', 'mended' or 'folder', a real one left alone."""
    if link.is_symlink():
        if os.readlink(link) == str(source):
            return 'kept'
        outcome = 'mended'
    elif link.exists():
        return 'folder'
    else:
        outcome = 'linked'
    part = link.with_name(f'.{link.name}.part')
    part.unlink(missing_ok=True)  # of a killed run
    part.symlink_to(source)
    os.replace(part, link)
    return outcome


def read_annotated(path: Path) -> tuple[dict[str, set[int]], int, list[tuple]]:
    """The annotated seconds of every clip and AVA video in the merged annotations, how many lines these have, and report
    rows on malformed ones."""
    seconds, number, problems = {}, 0, []
    with open(path, errors='replace') as file:
        for number, line in enumerate(file, 1):
            row = line.split(',')
            if len(row) == 8 and NAME.fullmatch(row[0]) and row[1].isdecimal():
                seconds.setdefault(row[0], set()).add(int(row[1]))
            else:
                problems.append((f'line {number} of {path.name}', 'malformed row: training stops at it'))
    return seconds, number, problems


def missing_frames(folder: Path, seconds: set[int]) -> str | None:
    """What a folder lacks: of a clip any frame that its name promises, of an AVA video any annotated keyframe."""
    if not folder.is_dir():
        return 'folder missing: no frames'
    name = CLIP_NAME.fullmatch(folder.name)
    wanted = (range(1, (int(name['end']) - int(name['start'])) * FPS + 1) if name
              else [(second - AVA_START_S) * FPS + 1 for second in sorted(seconds)])

    def is_there(index: int) -> bool:
        try:
            return os.stat(f'{folder}/img_{index:05d}.jpg').st_size > 0
        except OSError:
            return False

    missing = [index for index in wanted if not is_there(index)]
    return f'frames missing or empty: {len(missing)} of {len(wanted)}, first img_{missing[0]:05d}.jpg' if missing else None


def missing_in_video(video: Path) -> str | None:
    """What a clip lacks of the frames that its name promises, as decord counts them for training."""
    import decord
    decord.logging.set_level(decord.logging.QUIET)
    if not video.is_file():
        return 'clip missing: no video'
    total = (int(video.stem[-6:]) - int(video.stem[-13:-7])) * FPS
    try:
        count = len(decord.VideoReader(str(video), num_threads=1))
    except (decord.DECORDError, RuntimeError):
        return 'unreadable clip: decord cannot open it'
    return None if count == total else f'frames missing: {total - count} of {total}'


def missing_files(root: Path, kinetics: bool) -> list[tuple]:
    """Report rows on what training reads beside frames and videos."""
    merged, rows = root / 'annotations/ava_train_v2.2.csv', []
    own = root / 'kinetics_train.csv'
    if not kinetics:
        rows.append((merged.name, 'no Kinetics row: do Step 7 (merge_annotations.py)'))
    if not own.is_file():
        rows.append((own.name, 'file missing: do Step 5 (prepare_annotation.py)'))
    elif own.stat().st_mtime > merged.stat().st_mtime:
        rows.append((merged.name, 'older than kinetics_train.csv: merge again, Step 7 (merge_annotations.py)'))
    return rows + [(name, "file missing: copy it from AVA's annotation folder") for name in NEEDED
                   if not (root / 'annotations' / name).is_file()]


class Ignored:
    """Stands in for whatever a pickle names."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


class KeyReader(pickle.Unpickler):
    """Reads the keys of a pickle without making objects of what it names: a pickle could run code."""

    def find_class(self, module, name):
        return Ignored


def count_proposals(path: Path) -> int | None:
    """How many frames a merged pickle has proposals for, if it can be read."""
    try:
        with open(path, 'rb') as file:
            return len(KeyReader(file).load())
    except Exception:  # damaged bytes may make pickle raise anything
        return None


def link_all(videos: list[str], ava: Path, root: Path) -> None:
    """Link the folders of all AVA videos, say what was done."""
    outcomes = {}
    try:
        for video in videos:
            outcomes.setdefault(link_folder(ava / video, root / 'rawframes' / video), []).append(video)
    except OSError as error:
        sys.exit(f'error: no link can be made in {root / "rawframes"} ({error.strerror}); copy {ava} there instead')
    words = dict(linked='linked now', kept='linked already', mended='broken or wrong links mended',
                 folder='real folders left alone')
    print(f'{len(videos)} AVA videos in {root / "rawframes"}: '
          + ', '.join(f'{len(names)} {words[outcome]}' for outcome, names in sorted(outcomes.items())))


def check(root: Path) -> None:
    """Look up every annotated clip and AVA video, write the report, say whether the data set is complete."""
    import pandas as pd
    annotations = root / 'annotations/ava_train_v2.2.csv'
    if not annotations.is_file():
        sys.exit(f'error: {annotations} not found, so the data set cannot be checked; do Step 7 (merge_annotations.py)')
    annotated, total, rows = read_annotated(annotations)
    clips = {name for name in annotated if CLIP_NAME.fullmatch(name)}
    raw = any((root / 'rawframes' / clip).is_dir() for clip in clips)  # else training reads the clips themselves
    rows += missing_files(root, bool(clips))
    proposals = count_proposals(root / 'annotations/ava_dense_proposals_train.FAIR.recall_93.9.pkl')
    if proposals is None:
        rows.append(('ava_dense_proposals_train.FAIR.recall_93.9.pkl', 'unreadable: do Step 7 (merge_annotations.py)'))

    def look(name: str) -> str | None:
        if name in clips and not raw:
            return missing_in_video(root / f'videos/{name}.mp4')
        return missing_frames(root / 'rawframes' / name, annotated[name])

    with ThreadPoolExecutor(16) as threads:  # which a slow file server answers together
        for name, problem in zip(annotated, tqdm(threads.map(look, annotated), total=len(annotated), desc='check', unit='clip',
                                                 delay=1)):
            if problem:
                rows.append((name, problem))
    report = root / 'reports/softlink_ava.csv'
    report.parent.mkdir(exist_ok=True)
    part = report.with_name(f'.{report.name}.part')
    pd.DataFrame(sorted(rows), columns=['clip', 'reason']).to_csv(part, index=False, errors='backslashreplace')
    os.replace(part, report)
    print(f'AVA-Kinetics in {root}: {len(clips)} Kinetics clips and {len(annotated) - len(clips)} AVA videos annotated, '
          f'{total} rows, {proposals or "no readable"} frames with proposals')
    for reason, count in Counter(row[1].split(':')[0] for row in rows).most_common():
        print(f'  {count} not complete: {reason}, such as {next(row[0] for row in rows if row[1].startswith(reason))}')
    if rows:
        print(f'  report: {report}')
        sys.exit(f'error: the data set is not complete, training would stop; {rows[0][0]}: {rows[0][1]}')
    print(f'  all {len(annotated)} have their frames: ready for training'
          + ('' if raw else ', the Kinetics part from its videos (README: Without raw frames)'))


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    sys.stdout.reconfigure(errors='backslashreplace')  # names of files may be no UTF-8
    args = parse_args(argv)
    root, ava = args.avakinetics_root, args.ava_root.absolute() / 'rawframes'
    if args.ava_root.resolve() == root.resolve():
        sys.exit('error: --ava_root and --avakinetics_root are the same folder; AVA has one of its own')
    if not ava.is_dir():
        sys.exit(f'error: {ava} not found; extract the frames of AVA or set --ava_root')
    if not (root / 'rawframes').is_dir() and not (root / 'videos').is_dir():
        sys.exit(f'error: {root} has neither rawframes nor videos; do Step 3 (cut_kinetics.py) or set --avakinetics_root')
    videos = sorted(name for name in os.listdir(ava) if os.path.isdir(ava / name) and not name.startswith('.'))
    if not videos:
        sys.exit(f'error: {ava} holds no folder of frames; extract the frames of AVA or set --ava_root')
    try:
        (root / 'rawframes').mkdir(exist_ok=True)  # without raw frames of Kinetics, AVA's are the first
        link_all(videos, ava, root)
        check(root)
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; fix it, then the same command continues')
    except KeyboardInterrupt:
        print('interrupted; the same command continues', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
