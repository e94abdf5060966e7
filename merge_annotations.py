#!/usr/bin/env python3
"""Step 7a: merge the Kinetics part into AVA's annotations.

Reads ROOT/kinetics_train.csv, ROOT/kinetics_proposal.pkl and ROOT/annotations, a copy of AVA's annotation folder, and
puts the Kinetics rows before AVA's in annotations/ava_train_v2.2.csv and the proposals of both into
annotations/ava_dense_proposals_train.FAIR.recall_93.9.pkl; where keys collide, AVA's stay. AVA's own two files are kept
beside them as *.ava_only.csv and *.ava_only.pkl, and every merge starts from these: merging twice is merging once.

With --split val, AVA's files stay as they are, so that published AVA figures can still be reproduced: both parts go into
new files, annotations/ava_kinetics_val_v2.2.csv and annotations/ava_kinetics_dense_proposals_val.pkl.

    cp -r $MMACTION2/data/ava/annotations/ $MMACTION2/data/ava_kinetics/
    python3 merge_annotations.py --avakinetics_root=$MMACTION2/data/ava_kinetics
"""
import argparse
import csv
import io
import os
import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
# split -> Kinetics' rows and proposals in ROOT, AVA's in ROOT/annotations, the merged ones in ROOT/annotations
FILES = {'train': (('kinetics_train.csv', 'kinetics_proposal.pkl'),
                   ('ava_train_v2.2.csv', 'ava_dense_proposals_train.FAIR.recall_93.9.pkl'),
                   ('ava_train_v2.2.csv', 'ava_dense_proposals_train.FAIR.recall_93.9.pkl')),
         'val': (('kinetics_val.csv', 'kinetics_val_proposal.pkl'),
                 ('ava_val_v2.2.csv', 'ava_dense_proposals_val.FAIR.recall_93.9.pkl'),
                 ('ava_kinetics_val_v2.2.csv', 'ava_kinetics_dense_proposals_val.pkl'))}
VIDEO = re.compile(r'[A-Za-z0-9_-]{11}')
CLIP = re.compile(r'[A-Za-z0-9_-]{11}_\d{6}_\d{6}')


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Step 7a: merge the Kinetics part into AVA's annotations.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--avakinetics_root', type=Path, default=MMACTION2 / 'data/ava_kinetics', metavar='DIR',
                        help='folder of the data set that is made')
    parser.add_argument('--split', choices=['train', 'val'], default='train', help='part of AVA-Kinetics')
    return parser.parse_args(argv)


def read_rows(path: Path, name: re.Pattern, problems: list[tuple]) -> Iterator[tuple[str, str]]:
    """(video or clip, line) for every row that MMAction2 can read and whose first column is such a name.

    Rows are `name,second,x1,y1,x2,y2,action_id,entity_id`; what is wrong with the others is added to `problems`.
    """
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        for number, line in enumerate(file, 1):
            row = line.strip().split(',')
            if row == ['']:
                continue
            try:
                int(row[1]), int(row[6]), int(row[7])
                readable = name.fullmatch(row[0]) and np.isfinite([float(value) for value in row[2:6]]).all()
            except (ValueError, IndexError):
                readable = False
            if readable:
                yield row[0], line.strip()
            else:
                problems.append(('', '', f'malformed row: line {number} of {path.name}'))


class Unpickler(pickle.Unpickler):
    """Reads arrays and plain Python values only: a pickle that names anything else could run code."""

    def find_class(self, module, name):
        if (module, name) in (('numpy', 'ndarray'), ('numpy', 'dtype')):
            return getattr(np, name)
        if module in ('numpy.core.multiarray', 'numpy._core.multiarray') and name == '_reconstruct':
            return lambda kind, shape, code: np.ndarray((0,), 'b')  # the state that follows fills it
        if module in ('numpy.core.numeric', 'numpy._core.numeric') and name == '_frombuffer':  # protocol 5
            return lambda data, dtype, shape, order: np.frombuffer(data, dtype).reshape(shape, order=order)
        if (module, name) == ('_codecs', 'encode'):  # how protocol 2 writes bytes
            return lambda text, encoding: text.encode('latin1')
        raise pickle.UnpicklingError(f'it names {module}.{name}')


class Pickler(pickle.Pickler):
    """Writes arrays so that NumPy 1.21 to 2.x can read them: by public names, `numpy._core` is unknown to NumPy 1."""

    def reducer_override(self, value):
        if type(value) is np.ndarray:
            return np.ndarray, (value.shape, value.dtype.str), value.__reduce__()[2]
        return NotImplemented


def read_proposals(path: Path, problems: list[tuple]) -> dict[str, np.ndarray]:
    """The proposals of a pickle, key '<video_id>,<second:04d>' -> (n, 5); malformed ones are added to `problems`."""
    try:
        with open(path, 'rb') as file:
            loaded = Unpickler(file).load()
    except (pickle.UnpicklingError, ValueError, TypeError, EOFError, IndexError, KeyError, AttributeError, MemoryError,
            ImportError, OverflowError, RecursionError, UnicodeError) as error:
        sys.exit(f'error: {path} is no pickle of proposals: {type(error).__name__}: {error}'.replace('\n', ' '))
    if not isinstance(loaded, dict):
        sys.exit(f'error: {path} is no pickle of proposals: it holds a {type(loaded).__name__}, not a dict')
    proposals = {}
    for key, boxes in loaded.items():
        if (isinstance(key, str) and re.fullmatch(r'[A-Za-z0-9_-]{11},\d{4,}', key) and isinstance(boxes, np.ndarray)
                and boxes.ndim == 2 and boxes.shape[1] in (4, 5) and boxes.dtype.kind == 'f' and len(boxes)
                and np.isfinite(boxes).all()):
            proposals[key] = boxes
        else:
            problems.append(('', '', f'malformed proposal: {str(key)[:40]!r} in {path.name}'))
    return proposals


def original_of(path: Path) -> Path:
    """Where the first merge keeps AVA's own file."""
    return path.with_suffix('.ava_only' + path.suffix)


def own_file(path: Path, copy_ava: str, problems: list[tuple], read: Callable, of_kinetics: Callable) -> tuple[Path, Any]:
    """AVA's own file and what it holds: `path` where nothing of Kinetics is in it, else the one kept beside it."""
    for candidate in path, original_of(path):
        if candidate.is_file():
            found = []
            content = read(candidate, found)
            if not any(map(of_kinetics, content)):
                problems += found
                return candidate, content
    sys.exit(f'error: {path} holds Kinetics already, merged by another program; {copy_ava}')


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    root, notes = args.avakinetics_root, args.avakinetics_root / 'annotations'
    (rows_name, proposals_name), own_names, merged_names = FILES[args.split]
    copy_ava = f"copy AVA's annotation folder: cp -r {MMACTION2}/data/ava/annotations/ {root}/"
    for path, hint in ((root / rows_name, 'do Step 5 (prepare_annotation.py) or set --avakinetics_root'),
                       (root / proposals_name, 'do Step 6 (fetch_proposal.py) first'),
                       *((notes / name, copy_ava) for name in own_names)):
        if not path.is_file():
            sys.exit(f'error: {path} not found; {hint}')
    merged_csv, merged_pickle = (notes / name for name in merged_names)

    problems = []
    kinetics = list(read_rows(root / rows_name, CLIP, problems))
    videos = {name[:11] for name, _ in kinetics}
    own_csv, ava = own_file(notes / own_names[0], copy_ava, problems, lambda path, problems: list(read_rows(
        path, re.compile(f'{VIDEO.pattern}|{CLIP.pattern}'), problems)), lambda row: CLIP.fullmatch(row[0]))
    own_pickle, ava_proposals = own_file(notes / own_names[1], copy_ava, problems, read_proposals,
                                         lambda key: key[:11] in videos)
    proposals = read_proposals(root / proposals_name, problems)
    for path, rows in (root / rows_name, kinetics), (own_csv, ava):
        if not rows:
            sys.exit(f'error: {path} holds no row of annotations; make it anew')
    collisions = len(proposals.keys() & ava_proposals.keys())
    proposals.update(ava_proposals)

    # both are whole on the disk before either gets its name, and a run that ends in between is mended by the next
    parts = [path.with_name(path.name + '.part') for path in (merged_csv, merged_pickle)]
    parts[0].write_text(''.join(line + '\n' for _, line in kinetics + ava))
    buffer = io.BytesIO()
    Pickler(buffer, protocol=4).dump(proposals)
    parts[1].write_bytes(buffer.getvalue())
    for path in own_csv, own_pickle:
        if path in (merged_csv, merged_pickle):  # about to be replaced
            copy = path.with_name(path.name + '.copy')
            shutil.copyfile(path, copy)
            os.replace(copy, original_of(path))
    for part, path in zip(parts, (merged_csv, merged_pickle)):
        os.replace(part, path)

    report = root / f'reports/merge_annotations_{args.split}.csv'
    report.parent.mkdir(exist_ok=True)
    with open(report.with_suffix('.part'), 'w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        csv.writer(file, lineterminator='\n').writerows([('video_id', 'timestamp', 'reason'), *problems])
    os.replace(report.with_suffix('.part'), report)

    keyframes = {(name[:11], int(line.split(',', 2)[1])) for name, line in kinetics + ava}
    bare = sum(f'{video},{second:04d}' not in proposals for video, second in keyframes)
    print(f'{len(kinetics) + len(ava)} rows in {merged_csv}: {len(kinetics)} of Kinetics, {len(ava)} of AVA')
    print(f'{len(proposals)} frames with proposals in {merged_pickle}: {len(proposals) - len(ava_proposals)} of '
          f"Kinetics, {len(ava_proposals)} of AVA{f' ({collisions} keys in both)' if collisions else ''}")
    print(f'  {bare} of {len(keyframes)} annotated keyframes have no proposal: training takes the whole frame there')
    if problems:
        print(f'  {len(problems)} rows or proposals left out: malformed')
    print(f'  report: {report}')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        print('interrupted; the same command continues', file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; mend it, then the same command continues')
