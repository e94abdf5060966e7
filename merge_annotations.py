#!/usr/bin/env python3
"""Step 7a: merge the Kinetics part into AVA's annotations.

Reads ROOT/kinetics_train.csv, ROOT/kinetics_proposal.pkl and ROOT/annotations, a copy of AVA's
annotation folder, and puts the Kinetics rows before AVA's in annotations/ava_train_v2.2.csv and the
proposals of both into annotations/ava_dense_proposals_train.FAIR.recall_93.9.pkl; where keys
collide, AVA's stay. AVA's own two files are kept beside them as *.ava_only.csv and *.ava_only.pkl,
and every merge starts from these: merging twice is merging once.

With --split val, AVA's files stay as they are, so that published AVA figures can still be
reproduced: both parts go into new files, annotations/ava_kinetics_val_v2.2.csv and
annotations/ava_kinetics_dense_proposals_val.pkl.

    cp -r $MMACTION2/data/ava/annotations/ $MMACTION2/data/ava_kinetics/
    python3 merge_annotations.py --avakinetics_root=$MMACTION2/data/ava_kinetics
"""

import argparse
import contextlib
import csv
import fcntl
import hashlib
import os
import pickle
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
# a trailer of merged pickles, which unpicklers ignore
MERGED = b'\nmerged by merge_annotations.py\n'
VIDEO = r'[A-Za-z0-9_-]{11}'
CLIP = r'[A-Za-z0-9_-]{11}_[0-9]{6}_[0-9]{6}'
NUMBER = r'[-+]?(\d+\.?\d*|\.\d+)(e-\d+)?'
ROW = (
    r',\d{1,9}' + f',{NUMBER}' * 4 + r',\d{1,9},-?\d{1,9}'
)  # second, box, action, entity: what follows the name
# What a pickle of arrays names, in NumPy 1 and 2 and in protocols 2 to 5
ARRAY_PARTS = {
    ('numpy', 'ndarray'),
    ('numpy', 'dtype'),
    ('_codecs', 'encode'),
    *(
        (f'numpy.{core}.{module}', name)
        for core in ('core', '_core')
        for module, name in (('multiarray', '_reconstruct'), ('numeric', '_frombuffer'))
    ),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Step 7a: merge the Kinetics part into AVA's annotations."
    )
    parser.add_argument(
        '--avakinetics_root',
        type=Path,
        default=MMACTION2 / 'data/ava_kinetics',
        metavar='DIR',
        help='folder of the data set that is made (default: %(default)s)',
    )
    parser.add_argument(
        '--datalist',
        type=Path,
        metavar='CSV',
        help='annotations written by Step 5 (default: ROOT/kinetics_train.csv, or ..._val.csv)',
    )
    parser.add_argument(
        '--picklepath',
        type=Path,
        metavar='PKL',
        help='proposals written by Step 6 (default: ROOT/kinetics_proposal.pkl, or '
        '..._val_proposal.pkl)',
    )
    parser.add_argument(
        '--split',
        choices=['train', 'val'],
        default='train',
        help='part of AVA-Kinetics (default: train)',
    )
    return parser.parse_args(argv)


def read_rows(path: Path, name: str, problems: list[tuple]) -> list[str]:
    """The rows `name,second,x1,y1,x2,y2,action_id,entity_id` of such names; the other lines are
    added to `problems`.
    """
    readable, rows = re.compile(name + ROW, re.ASCII), []
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        for number, line in enumerate(map(str.strip, file), 1):
            if readable.fullmatch(line):
                rows.append(line)
            elif line:
                problems.append(('', '', f'malformed row: line {number} of {path.name}'))
    return rows


class Unpickler(pickle.Unpickler):
    """Reads arrays and plain Python values only: a pickle that names more could run code."""

    def find_class(self, module, name):
        if (module, name) not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f'it names {module}.{name}')
        return super().find_class(module, name)


class Pickler(pickle.Pickler):
    """Writes arrays so that NumPy 1.21 to 2.x can read them: by public names, `numpy._core` is
    unknown to NumPy 1.
    """

    def reducer_override(self, value):
        if type(value) is np.ndarray:
            return np.ndarray, (value.shape, value.dtype.str), value.__reduce__()[2]
        return NotImplemented


def read_proposals(path: Path, problems: list[tuple]) -> dict[str, np.ndarray]:
    """The proposals of a pickle, key '<video_id>,<second:04d>' -> (n, 5); malformed ones are added
    to `problems`.
    """
    try:
        with open(path, 'rb') as file:
            loaded = Unpickler(file).load()
        if not isinstance(loaded, dict):
            raise pickle.UnpicklingError(f'it holds a {type(loaded).__name__}, not a dict')
    except Exception as error:  # damaged bytes may make pickle and NumPy raise anything
        sys.exit(
            f'error: {path} is no pickle of proposals: {type(error).__name__} {error}'.replace(
                '\n', ' '
            ).rstrip()
        )
    proposals = {}
    for key, boxes in loaded.items():
        if (
            isinstance(key, str)
            and re.fullmatch(VIDEO + r',\d{4,}', key)
            and isinstance(boxes, np.ndarray)
            and boxes.ndim == 2
            and boxes.shape[1] in (4, 5)
            and boxes.dtype.kind == 'f'
            and len(boxes)
            and np.isfinite(boxes).all()
        ):
            proposals[key] = boxes
        else:
            problems.append(('', '', f'malformed proposal: {str(key)[:40]!r} in {path.name}'))
    return proposals


def trailer_of(path: Path) -> bytes:
    """The last bytes of a pickle, where a trailer stands."""
    with open(path, 'rb') as file:
        file.seek(max(0, path.stat().st_size - 100))
        return file.read()


def check_list(rows: Path, proposals: Path) -> None:
    """Exit if the pickle's trailer says that Step 6 made it for another list."""
    made_for = re.search(rb'\nmade of ([0-9a-f]{64})\n\Z', trailer_of(proposals))
    if made_for and made_for[1].decode() != hashlib.sha256(rows.read_bytes()).hexdigest():
        sys.exit(
            f'error: {proposals} was made for another list than {rows}; repeat Step 6: '
            'fetch_proposal.py '
            f'--datalist={rows} --picklepath={proposals}'
        )


def original_of(path: Path) -> Path:
    """Where the first merge keeps AVA's own file."""
    return path.with_suffix('.ava_only' + path.suffix)


def own_file(path: Path, merged: bool, copy_ava: str) -> Path:
    """AVA's own file: `path` or, where that is merged already, the one that the first merge kept
    beside it.
    """
    if merged and not original_of(path).is_file():
        sys.exit(
            f"error: {path} holds Kinetics already, and AVA's own is not kept beside it; {copy_ava}"
        )
    return original_of(path) if merged else path


def part_of(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f'.{path.name}.part')


def merge(
    kinetics: list[Path], own: list[Path], merged: list[Path], report: Path, copy_ava: str
) -> None:
    """Join the rows and the proposals of both parts, write the two files and the report, say what
    came of it.

    Each argument is a csv of annotations and a pickle of proposals: of Kinetics, AVA's own, and
    where the merged ones go.
    """
    with contextlib.suppress(OSError):  # some file servers have no locks
        fcntl.flock(
            os.open(merged[0].parent, os.O_RDONLY), fcntl.LOCK_EX
        )  # a second merge waits until this process ends
    check_list(*kinetics)
    problems = []
    rows = read_rows(kinetics[0], CLIP, problems)
    own_csv = own_file(
        own[0], bool(re.search(f'^{CLIP},'.encode(), own[0].read_bytes(), re.M)), copy_ava
    )
    ava_rows = read_rows(own_csv, VIDEO, problems)
    for path, found in (kinetics[0], rows), (own_csv, ava_rows):
        if not found:
            sys.exit(f'error: {path} holds no row of annotations; make it again')
    own_pickle = own_file(own[1], trailer_of(own[1]).endswith(MERGED), copy_ava)
    malformed = []
    ava_proposals = read_proposals(own_pickle, malformed)
    of_kinetics = {row[:11] for row in rows} - {row[:11] for row in ava_rows}
    if any(key[:11] in of_kinetics for key in ava_proposals):  # merged by another program
        own_pickle, malformed = own_file(own[1], True, copy_ava), []
        ava_proposals = read_proposals(own_pickle, malformed)
    problems += malformed
    proposals = read_proposals(kinetics[1], problems)
    collisions = len(proposals.keys() & ava_proposals.keys())
    proposals.update(ava_proposals)

    # both are whole on the disk before either gets its name, and a run that ends in between is
    # mended by the next
    part_of(merged[0]).write_text(''.join(row + '\n' for row in rows + ava_rows))
    with open(part_of(merged[1]), 'wb') as file:
        Pickler(file, protocol=4).dump(proposals)
        file.write(MERGED)
    for path in own_csv, own_pickle:
        if path in merged:  # about to be replaced
            shutil.copyfile(path, part_of(original_of(path)))
            os.replace(part_of(original_of(path)), original_of(path))
    report.parent.mkdir(exist_ok=True)
    with open(
        part_of(report), 'w', newline='', encoding='utf-8', errors='backslashreplace'
    ) as file:
        csv.writer(file, lineterminator='\n').writerows(
            [('video_id', 'timestamp', 'reason'), *problems]
        )
    for path in *merged, report:
        os.replace(part_of(path), path)

    keyframes = {(row[:11], int(row.split(',', 2)[1])) for row in rows + ava_rows}
    bare = sum(f'{video},{second:04d}' not in proposals for video, second in keyframes)
    print(
        f'{len(rows) + len(ava_rows)} rows in {merged[0]}: {len(rows)} of Kinetics, '
        f'{len(ava_rows)} of AVA'
    )
    print(
        f'{len(proposals)} frames with proposals in {merged[1]}: '
        f'{len(proposals) - len(ava_proposals)} of '
        f'Kinetics, {len(ava_proposals)} of '
        f'AVA{f" ({collisions} keys in both)" if collisions else ""}'
    )
    print(
        f'  {bare} of {len(keyframes)} annotated keyframes have no proposal: training takes '
        'the whole frame there'
    )
    if problems:
        print(f'  {len(problems)} rows or proposals left out: malformed; report: {report}')


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    sys.stdout.reconfigure(errors='backslashreplace')  # names of files may be no UTF-8
    args = parse_args(argv)
    root, notes, split = args.avakinetics_root, args.avakinetics_root / 'annotations', args.split
    kinetics = [
        args.datalist or root / f'kinetics_{split}.csv',
        args.picklepath or root / f'kinetics{"" if split == "train" else "_val"}_proposal.pkl',
    ]
    own = [
        notes / f'ava_{split}_v2.2.csv',
        notes / f'ava_dense_proposals_{split}.FAIR.recall_93.9.pkl',
    ]
    merged = (
        own
        if split == 'train'
        else [notes / 'ava_kinetics_val_v2.2.csv', notes / 'ava_kinetics_dense_proposals_val.pkl']
    )
    copy_ava = f"copy AVA's annotation folder: cp -r {MMACTION2}/data/ava/annotations/ {root}/"
    hints = [
        'do Step 5 (prepare_annotation.py) or set --avakinetics_root',
        'do Step 6 (fetch_proposal.py) first',
    ]
    try:
        for path, hint in zip(kinetics + own, hints + [copy_ava] * 2):
            if not path.is_file():
                sys.exit(f'error: {path} not found; {hint}')
        if notes.is_symlink():
            sys.exit(
                f"error: {notes} is a link to {notes.resolve()}: merging would change AVA's "
                'own files; remove the link, '
                f'then {copy_ava}'
            )
        merge(kinetics, own, merged, root / f'reports/merge_annotations_{split}.csv', copy_ava)
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; fix it, then run the same command again')
    except KeyboardInterrupt:
        print('interrupted; run the same command again', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
