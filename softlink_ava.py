#!/usr/bin/env python3
r"""Step 7b: link AVA's frames into the data set, and check that training can run.

Links each folder of AVA's frames into ROOT/rawframes. Then looks up every frame that MMAction2's
loaders can ask for, of the training and the validation lists. What is missing is in
ROOT/reports/softlink_ava.csv, with the step that mends it. ROOT/report.html shows the verdict, how
the data set was made, numbers, plots and keyframes.

    python3 softlink_ava.py --avakinetics_root=$MMACTION2/data/ava_kinetics \
        --ava_root=$MMACTION2/data/ava
"""

from __future__ import annotations

import argparse
import base64
import codecs
import csv
import hashlib
import html
import io
import json
import os
import pickle
import re
import shlex
import signal
import string
import sys
from collections import Counter, defaultdict
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, NamedTuple

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    import pandas as pd

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30
AVA_START_S, AVA_END_S = 900, 1800  # of the movies, whose frames are numbered from there on
# Frames around a keyframe's, at 30 fps, that the configs of AVA-Kinetics sample: 4x16, 8x8, 16x4
# and 32x2 with their random offsets. MMAction2 limits them to the range that the name implies
BEFORE, BEHIND = 40, 30
OLD_FRAMES = 'frames older than their clip'
NO_THREADS = 'no more threads can be started here; raise the limit on processes (ulimit -u)'
CLIP_NAME = re.compile(r'([A-Za-z0-9_-]{11})_([0-9]{6})_([0-9]{6})')
BOX = ['x1', 'y1', 'x2', 'y2']
COLUMNS = dict(clip=str, second=int, **dict.fromkeys(BOX, float), action=int, entity=int)
# columns of the report on recall: matched boxes by all proposals, then by those kept
RECALL = ['clip', 'second', 'boxes', 'proposals']
RECALL += ['matched_0.5', 'matched_0.75', 'kept_0.5', 'kept_0.75', 'worst_iou']
LABELS = 'ava_action_list_v2.2_for_activitynet_2019.pbtxt'
NEEDED = [LABELS, 'ava_train_excluded_timestamps_v2.2.csv', 'ava_val_excluded_timestamps_v2.2.csv']
COPY = "copy it from AVA's annotation folder"
SHOWN = dict(Kinetics=9, AVA=3)  # keyframes on the page, evenly chosen
MISSED = 12  # keyframes whose boxes proposals miss
WIDTH, JPEG_QUALITY = 480, 80  # of a keyframe on the page; the width in pixels
# BGR; they differ for colour-blind people, too
BLACK, BLUE, ORANGE = (0, 0, 0), (233, 180, 86), (0, 159, 230)
COLOURS = dict(AVA='#999999', Kinetics='#0072B2')  # of the plots
INSET = 6  # pixels by which proposals are drawn inside their box
# What Steps 3 and 6 record, as the page names it
RECORDED = dict(
    short_side='pixels of the short side',
    fps='frames a second',
    context_s='seconds kept around keyframes',
    av='version of av',
    config='detector',
    checkpoint='checkpoint',
    score_thr='score threshold',
    neighbors='seconds around keyframes',
    amp='mixed precision',
    torch='version of torch',
    mmdet='version of mmdet',
)
WORDS = {'None': 'as the source', 'True': 'yes', 'False': 'no'}
STEPS = dict(cut_kinetics='Step 3', prepare_annotation='Step 5', fetch_proposal='Step 6')
# What a pickle of arrays names: ndarray, dtype, and what NumPy calls since protocols 2 and 5
ARRAY_PARTS = {
    part.__name__: part
    for part in (
        np.ndarray,
        np.dtype,
        codecs.encode,
        np.empty(0).__reduce__()[0],
        np.empty(0).__reduce_ex__(5)[0],
    )
}
PAGE = string.Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>AVA-Kinetics</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 0 auto; padding: 1rem }
h1, p, li, figcaption, td { overflow-wrap: anywhere }
h1, h2, h3 { line-height: 1.2 } figure { margin: 0 } figcaption { font-size: .85rem }
img { width: 100%; height: auto; display: block; background: white }
.grid { display: grid; gap: 1rem; margin: 1rem 0 }
.grid { grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)) }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0 }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
td { font-variant-numeric: tabular-nums; min-width: 3.5rem } tr { border-bottom: 1px solid #8886 }
</style></head><body>
<h1>AVA-Kinetics: $verdict</h1><p>$checked</p><ul>$problems</ul>$made$parts</body></html>
""")


class Problem(NamedTuple):
    """What training would stop at: where, what, and what mends it."""

    name: str
    reason: str
    remedy: str


class Part(NamedTuple):
    """A list of annotations with its proposals; split says which part of Kinetics is in it."""

    title: str
    split: str
    rows: Path
    proposals: Path


def to_path(text: str) -> Path:
    """The path that an argument names."""
    if not text:
        raise argparse.ArgumentTypeError('it is empty; set its variable as README says')
    return Path(text).expanduser()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Step 7b: link AVA's frames into the data set, and check that training can run."
    )
    parser.add_argument(
        '--avakinetics_root',
        type=to_path,
        default=MMACTION2 / 'data/ava_kinetics',
        metavar='DIR',
        help='folder of the data set (default: %(default)s)',
    )
    parser.add_argument(
        '--ava_root',
        type=to_path,
        default=MMACTION2 / 'data/ava',
        metavar='DIR',
        help='folder of the AVA data set; its frames are in rawframes/ (default: %(default)s)',
    )
    args = parser.parse_args(argv)
    args.avakinetics_root, args.ava_root = (
        path.absolute() for path in (args.avakinetics_root, args.ava_root)
    )
    return args


def link_all(ava: Path, frames: Path) -> None:
    """Link the folders of all AVA movies, unless real folders are there; say what was done."""
    names = [name for name in sorted(os.listdir(ava)) if not name.startswith('.')]
    movies, made = [name for name in names if os.path.isdir(ava / name)], 0
    if not movies:
        sys.exit(f'error: {ava} holds no folder of frames; extract the frames of AVA')
    try:
        frames.mkdir(exist_ok=True)  # without raw frames of Kinetics, AVA's are the first
        for movie in movies:
            link, part = frames / movie, frames / f'.{movie}.part'
            right = os.readlink(link) == str(ava / movie) if link.is_symlink() else link.exists()
            if not right:
                part.unlink(missing_ok=True)  # of a killed run
                part.symlink_to(ava / movie)
                os.replace(part, link)
                made += 1
    except OSError as error:
        reason = f'({error.strerror}); copy {ava} there instead'
        sys.exit(f'error: no link can be made in {frames} {reason}')
    existing = len(movies) - made
    print(f'links to AVA movies in {frames}: {made:,} new, {existing:,} existing')


def command(script: str, root: Path) -> str:
    """Return a command that can be pasted."""
    path = Path(__file__).resolve().with_name(script)
    return f'python3 {shlex.quote(str(path))} --avakinetics_root={shlex.quote(str(root))}'


def window(second: int) -> range:
    """The frames of an AVA movie that training can ask for around a keyframe."""
    keyframe, last = (second - AVA_START_S) * FPS, (AVA_END_S - AVA_START_S) * FPS
    return range(max(1, keyframe - BEFORE), min(last, keyframe + BEHIND) + 1)


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


def check_folder(folder: Path, numbers: Iterable[int], since: float | None) -> str | None:
    try:
        return check_frames(folder, numbers, since)
    except OSError as error:
        return f'frames missing or empty: all, {error.strerror}'


def check_clip(name: str, raw: bool, root: Path) -> Problem | None:
    """What a clip lacks: as frames, or as a video as decord counts its frames."""
    video, total = root / f'videos/{name}.mp4', (int(name[-6:]) - int(name[-13:-7])) * FPS
    if raw:
        since = video.stat().st_mtime if video.exists() else 0
        reason = check_folder(root / 'rawframes' / name, range(1, total + 1), since)
        remedy = f'run Step 4 again: {command("extract_rgb_frames.py", root)}'
        return reason and Problem(name, reason, remedy)
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        count = len(decord.VideoReader(str(video), num_threads=1)) if video.is_file() else 0
    except (decord.DECORDError, RuntimeError):
        count = 0
    reason = f'clip missing or broken: {count} of {total} frames'
    remedy = 'remove it if it exists, then run Step 3 again (cut_kinetics.py)'
    return Problem(name, reason, remedy) if count != total else None


def read_record(split: str, root: Path) -> tuple[list[Problem], list[str]]:
    """Return what Step 6 recorded: files that it could not read, if they are still as they were
    then, and its warning.
    """
    path = root / f'reports/fetch_proposal_{split}.json'
    recorded = json.loads(path.read_text()) if path.exists() else {}
    remedy = f'remove it, then run Steps 3 and 4 again: {command("extract_rgb_frames.py", root)}'
    unreadable = [
        Problem(file, 'unreadable frame', remedy)
        for file, size in recorded.get('unreadable', {}).items()
        if os.path.isfile(root / file) and os.path.getsize(root / file) == size
    ]
    return unreadable, [recorded['warning']] if recorded.get('warning') else []


class Unpickler(pickle.Unpickler):
    """Reads arrays and plain Python values only: a pickle that names more could run code.

    NumPy 1 and 2 keep the same functions in modules of different names.
    """

    def find_class(self, module, name):
        if module.split('.')[0] not in ('numpy', '_codecs') or name not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f'it names {module}.{name}')
        return ARRAY_PARTS[name]


def read_proposals(content: bytes) -> dict[str, np.ndarray] | None:
    """The proposals of a pickle, key '<video id>,<second:04d>' -> (n, 5), if they can be read."""
    try:
        return dict(Unpickler(io.BytesIO(content)).load())
    except Exception:  # damaged bytes may make pickle and NumPy raise anything
        return None


def find_parts(root: Path) -> list[Part]:
    """Training, AVA's validation and, if it was merged, validation on Kinetics too."""
    notes, name = root / 'annotations', 'ava_dense_proposals_{}.FAIR.recall_93.9.pkl'
    parts = [
        Part('Training', 'train', notes / 'ava_train_v2.2.csv', notes / name.format('train')),
        Part('AVA validation', '', notes / 'ava_val_v2.2.csv', notes / name.format('val')),
    ]
    rows = notes / 'ava_kinetics_val_v2.2.csv'
    if rows.exists():
        proposals = notes / 'ava_kinetics_dense_proposals_val.pkl'
        parts.append(Part('Validation on AVA and Kinetics', 'val', rows, proposals))
    return parts


def check_files(part: Part, root: Path, problems: list[Problem]) -> tuple[pd.DataFrame, dict]:
    """The rows and the proposals of a part, after a look at its files."""
    import pandas as pd

    remedy = f'run Step 7a: {command("merge_annotations.py", root)} --split={part.split}'
    remedy = remedy if part.split else COPY
    content = part.proposals.read_bytes() if part.proposals.is_file() else b''
    proposals, own = read_proposals(content), root / f'kinetics_{part.split}.csv'
    pickled = own.with_name(f'kinetics{"_val" if part.split == "val" else ""}_proposal.pkl')
    rows = own.read_bytes() if own.exists() else b''
    if proposals is None:
        problems.append(Problem(part.proposals.name, 'unreadable proposals', remedy))
    elif part.split and pickled.exists():
        data, listed = pickled.read_bytes(), hashlib.sha256(rows).hexdigest()
        if b'\nmade of ' in data[-100:] and listed.encode() not in data[-100:]:
            fetch = f'{command("fetch_proposal.py", root)} --datalist={shlex.quote(str(own))}'
            reason = f'made from another list than {own.name}'
            problems.append(Problem(pickled.name, reason, f'run Step 6: {fetch}; then Step 7a'))
        elif not content.endswith(f'\nmerged with {hashlib.sha256(data).hexdigest()}\n'.encode()):
            reason = f'other proposals than {pickled.name}'
            problems.append(Problem(part.proposals.name, reason, remedy))
    try:
        table = pd.read_csv(part.rows, names=list(COLUMNS), dtype=COLUMNS)
    except (OSError, ValueError) as error:
        reason = f'unreadable annotations: {error}'.splitlines()[0]
        problems.append(Problem(part.rows.name, reason, remedy))
        return pd.DataFrame(columns=list(COLUMNS)), {}
    merged = part.rows.read_bytes()
    if part.split and not rows:
        problems.append(Problem(own.name, 'no annotations', 'run Step 5 (prepare_annotation.py)'))
    elif not merged.startswith(rows) or rows.count(b'\n') != sum(table['clip'].str.len() > 11):
        problems.append(Problem(part.rows.name, f'other Kinetics rows than {own.name}', remedy))
    return table, proposals or {}


def read_as_frames(clips: Iterable[str], root: Path) -> set[str]:
    """The clips of a list that training reads as frames, not as videos: all if one has some."""
    clips = {clip for clip in clips if len(clip) > 11}
    return clips if clips.intersection(os.listdir(root / 'rawframes')) else set()


def check_all(tables: list[pd.DataFrame], root: Path) -> dict[str, Problem]:
    """What clips and movies lack, by name."""
    seconds, raw = defaultdict(set), set()
    for table in tables:
        names = table.groupby('clip').second.agg(set).to_dict()
        raw |= read_as_frames(names, root)
        for name, found in names.items():
            seconds[name] |= found

    def check_one(name: str) -> tuple[str, Problem | None]:
        if CLIP_NAME.fullmatch(name):
            return name, check_clip(name, name in raw, root)
        wanted = {index for second in seconds[name] for index in window(second)}
        reason = check_folder(root / 'rawframes' / name, sorted(wanted), None)
        return name, reason and Problem(f'AVA {name}', reason, "extract AVA's frames again")

    try:
        threads = ThreadPool(16)  # a slow file server answers them together
    except (RuntimeError, AttributeError):  # AttributeError: Python fails to clean up after itself
        sys.exit(f'error: {NO_THREADS}')
    with threads, tqdm(desc='check', total=len(seconds), unit='clip', leave=False) as bar:
        problems = {}
        for name, problem in threads.imap(check_one, seconds, 16):
            bar.update()
            if problem:
                problems[name] = problem
    return problems


def tell(problems: Iterable[Problem]) -> list[str]:
    """A line for each kind of problem: how much it concerns, an example, what mends it."""
    kinds = defaultdict(list)
    for problem in problems:
        kinds[problem.reason.split(':')[0], problem.remedy].append(problem)
    return [
        (f'{len(found):,} items, such as ' if len(found) > 1 else '')
        + f'{found[0].name}: {found[0].reason}; {remedy}'
        for (_, remedy), found in kinds.items()
    ]


def data_url(content: bytes, media: str) -> str:
    return f'data:image/{media};base64,{base64.b64encode(content).decode()}'


def read_keyframe(root: Path, name: str, second: int) -> np.ndarray | None:
    """The picture of a keyframe as BGR uint8 (H, W, 3), from the raw frames or the video."""
    import cv2

    clip = CLIP_NAME.fullmatch(name)
    index = (second - (int(clip[2]) if clip else AVA_START_S)) * FPS
    frame = root / f'rawframes/{name}/img_{index + 1:05d}.jpg'
    if os.path.isfile(frame):  # False, not an error, where its folder may not be entered
        return cv2.imread(str(frame))
    video = cv2.VideoCapture(str(root / f'videos/{name}.mp4'))
    video.set(cv2.CAP_PROP_POS_FRAMES, index)
    return video.read()[1]


def draw_keyframe(image: np.ndarray, boxes: list, people: np.ndarray) -> str:
    """A keyframe as the address of a JPEG: annotated boxes in blue, numbered, proposals in orange,
    thinner and a little inside, so that both are seen where they coincide.
    """
    import cv2

    size = WIDTH, round(image.shape[0] * WIDTH / image.shape[1])
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    for number, box in enumerate([*boxes, *people], 1):
        x1, y1, x2, y2 = (np.clip(box[:4], 0, 1) * [*size, *size]).astype(int).tolist()
        if number > len(boxes):
            inner = (x1 + INSET, y1 + INSET), (x2 - INSET, y2 - INSET)
            cv2.rectangle(image, *inner, ORANGE, 2)
            continue
        place = min(x1 + 8, WIDTH - 24), max(y2 - 10, 16)  # at the feet
        for colour, thickness in (BLACK, 5), (BLUE, 3):  # outlined, for any background
            cv2.rectangle(image, (x1, y1), (x2, y2), colour, thickness)
            cv2.putText(image, str(number), place, cv2.FONT_HERSHEY_SIMPLEX, 0.6, colour, thickness)
    content = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return data_url(content.tobytes(), 'jpeg')


def draw_sheet(
    chosen: pd.DataFrame, table: pd.DataFrame, proposals: dict, root: Path, actions: dict[int, str]
) -> str:
    """Keyframes (clip, second) as HTML, each with its actions below."""
    figures = ''
    for clip, second in zip(chosen['clip'], chosen.second):
        people = table[(table['clip'] == clip) & (table.second == second)].groupby(BOX).action
        caption = f'{clip}, second {second}'
        for number, (_, done) in enumerate(people, 1):
            caption += f'; {number}: {", ".join(actions.get(action, "?") for action in done)}'
        picture, image = '<p>cannot be read</p>', read_keyframe(root, clip, second)
        if image is not None:
            found = proposals.get(f'{clip[:11]},{second:04d}', ())
            picture = f'<img alt="" src="{draw_keyframe(image, list(people.groups), found)}">'
        figures += f'<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>'
    return f'<div class="grid">{figures}</div>'


def draw_plots(boxes: pd.DataFrame, keyframes: pd.DataFrame, table: pd.DataFrame) -> str:
    """Bars of heights, people and actions, by source, as HTML."""
    import matplotlib
    from matplotlib.figure import Figure
    from pandas import crosstab

    fifths = ((boxes.y2 - boxes.y1) * 5).astype(int).clip(0, 4)
    heights = crosstab(fifths, boxes.source).reindex(range(5), fill_value=0)
    heights.index = [f'{20 * fifth} to {20 * fifth + 20} %' for fifth in range(5)]
    people = crosstab(keyframes.boxes.clip(upper=6), keyframes.source)
    people = people.reindex(range(1, people.index.max() + 1), fill_value=0)
    people = people.rename(index={6: '6 or more'})
    actions, figures = crosstab(table.action_name, table.source), ''
    actions = actions.loc[actions.sum(axis=1).sort_values().index]
    for counts, kind, title in (
        (heights, 'bar', "Height of the annotated boxes, as a share of the frame's"),
        (people, 'bar', 'Annotated people on a keyframe'),
        (actions, 'barh', 'Annotations of each action, on a logarithmic scale'),
    ):
        figure, content = Figure((5, 3 + 0.16 * len(counts)), layout='constrained'), io.BytesIO()
        axes, log = figure.add_subplot(), 'sym' if kind == 'barh' else False
        bars = dict(ax=axes, kind=kind, logx=log, stacked=not log, width=0.8, rot=0, fontsize=8)
        counts.plot(color=COLOURS, xlabel='', ylabel='', **bars)
        axes.legend(loc='lower right' if log else 'best')
        figure.suptitle(title, fontsize=10)
        with matplotlib.rc_context({'svg.hashsalt': 'page'}):  # the same for the same counts
            figure.savefig(content, format='svg', metadata={'Date': None})
        address = data_url(content.getvalue(), 'svg+xml')
        figures += f'<figure><img alt="{html.escape(title)}" src="{address}"></figure>'
    return f'<div class="grid">{figures}</div>'


def count_reasons(reports: Path, split: str) -> list[tuple]:
    """What the reports say: step, reason and how often. A keyframe counts at its first step."""
    counts, seen = Counter(), set()
    for script, step in STEPS.items():
        path = reports / f'{script}_{split}.csv'
        rows = csv.reader(path.read_text(errors='replace').splitlines()) if path.exists() else ()
        for video, second, reason in islice(rows, 1, None):
            if (video, second) not in seen:
                counts[step, reason.split(':')[0]] += 1
            if video:
                seen.add((video, second))
    return [(*reason, count) for reason, count in counts.items()]


def show_part(part: Part, table: pd.DataFrame, proposals: dict, root: Path) -> str:
    """A part as HTML: numbers, recall, what was left out, plots and keyframes."""
    import pandas as pd

    labels, path = root / 'annotations' / LABELS, root / f'reports/recall_{part.split}.csv'
    text = labels.read_text(errors='replace') if labels.exists() else ''
    actions = re.findall(r'name: "(.*)"\s+(?:label_)?id: (\d+)', text)
    actions = {int(number): name for name, number in actions}
    table = table.assign(
        source=np.where(table['clip'].str.len() > 11, 'Kinetics', 'AVA'),
        action_name=[f'{actions.get(number, "")} {number}' for number in table.action],
    )
    boxes = table.drop_duplicates(['clip', 'second', *BOX])
    keyframes = boxes.groupby(['clip', 'second', 'source']).size().reset_index(name='boxes')
    names = zip(keyframes['clip'], keyframes.second)
    found = [len(proposals.get(f'{clip[:11]},{second:04d}', ())) for clip, second in names]
    keyframes = keyframes.assign(proposals=found, empty=np.array(found) == 0)
    groups = keyframes.groupby('source')
    numbers = {
        'clips or movies': groups['clip'].nunique(),
        'keyframes': groups.size(),
        'annotated boxes': groups.boxes.sum(),
        'annotations': table.groupby('source').size(),
        'proposals': groups.proposals.sum(),
        'keyframes without a proposal': groups['empty'].sum(),
    }
    numbers = pd.DataFrame(numbers).T.rename_axis(columns=None)
    content = f'<h2>{part.title}</h2>'
    content += numbers.assign(both=numbers.sum(axis=1)).map('{:,}'.format).to_html(border=0)
    recall = pd.read_csv(path) if path.exists() else pd.DataFrame()
    recall = recall.reindex(columns=RECALL).dropna()  # an older one has other columns
    if len(recall):
        shares = recall[RECALL[4:8]].sum().to_numpy().reshape(2, 2) / recall.boxes.sum()
        shares = pd.DataFrame(shares, ['all proposals', 'those that MMAction2 keeps'])
        shares.columns = ['boxes matched at IoU 0.5', 'at IoU 0.75']
        content += shares.map('{:.1%}'.format).to_html(border=0)
    if reasons := count_reasons(root / 'reports', part.split):
        reasons = pd.DataFrame(reasons, columns=['step', 'left out', 'rows'])
        content += reasons.to_html(border=0, index=False)
    content += draw_plots(boxes, keyframes, table)
    missed = recall[recall['matched_0.5'] < recall.boxes][:MISSED].astype({'second': int})
    chosen = [
        group.iloc[np.unique(np.linspace(0, len(group) - 1, SHOWN[source]).astype(int))]
        for source, group in reversed(list(groups))  # Kinetics first
    ]
    content += '<p>Blue and numbered: annotated boxes. Orange and thin: proposals.</p>'
    for title, some in (
        ('Boxes that proposals miss, the worst first', missed),
        ('Keyframes', pd.concat(chosen)),
    ):
        if len(some):
            sheet = draw_sheet(some, table, proposals, root, actions)
            content += f'<h3>{title}</h3>{sheet}'
    return content


def show_making(reports: Path) -> str:
    """How the data set was made, as HTML."""
    import pandas as pd

    rows = []
    for step, name in (
        ('Step 3', 'cut_kinetics_options'),
        ('Step 6, training', 'fetch_proposal_train'),
        ('Step 6, validation', 'fetch_proposal_val'),
    ):
        path = reports / f'{name}.json'
        recorded = json.loads(path.read_text()) if path.exists() else {}
        for option in filter(recorded.__contains__, RECORDED):
            value = str(recorded[option])
            rows.append((step, RECORDED[option], WORDS.get(value, value)))
    table = pd.DataFrame(rows, columns=['step', 'what', 'value'])
    return f'<h2>How it was made</h2>{table.to_html(border=0, index=False)}'


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


def check(root: Path) -> None:
    """Look up all that training reads, write the report and the page, say whether it is ready."""
    parts, problems = find_parts(root), []
    for name in NEEDED:
        if not (root / 'annotations' / name).exists():
            problems.append(Problem(name, 'file missing', COPY))
    read = [check_files(part, root, problems) for part in parts]
    incomplete = check_all([table for table, _ in read], root)
    for part, (table, _) in zip(parts, read):
        names = table['clip'].unique()
        clips = sum(len(name) > 11 for name in names)
        count = sum(name in incomplete for name in names)
        print(
            f'{part.title}: Kinetics clips: {clips:,}, AVA movies: {len(names) - clips:,}; '
            + (f'{count:,} incomplete' if count else 'all complete')
        )
    warnings = []
    for unreadable, warning in (read_record(part.split, root) for part in parts):
        problems += unreadable
        warnings += warning
    problems = sorted([*problems, *incomplete.values()])
    report = root / 'reports/softlink_ava.csv'
    write_csv(report, [Problem._fields, *problems])
    lines = tell(problems)
    verdict = 'NOT ready for training' if lines else 'ready for training'
    if not lines and not read_as_frames(read[0][0]['clip'], root):
        verdict += ' from the videos of Kinetics, see docs/small-disk.md'
        warnings.append(
            "MMAction2's own configs read raw frames: for them, run Step 4, then Steps 5 to 7 "
            f'again: {command("extract_rgb_frames.py", root)}'
        )
    for line in lines + warnings:
        print(f'  {line}')
    write_page(parts, read, verdict, lines + warnings, root)
    if lines:
        sys.exit(f'error: {verdict}: {lines[0]}; all reasons: {report}')
    print(verdict)


def write_page(
    parts: list[Part], read: list[tuple], verdict: str, lines: list[str], root: Path
) -> None:
    """Write ROOT/report.html, of equal data an equal page; say why where it cannot be written."""
    page = root / 'report.html'
    try:
        content = PAGE.substitute(
            verdict=verdict,
            checked=html.escape(str(root)),
            problems=''.join(f'<li>{html.escape(line)}</li>' for line in lines),
            made=show_making(root / 'reports'),
            parts=''.join(
                show_part(part, *found, root)
                for part, found in zip(parts, read)
                if part.split and len(found[0])
            ),
        )
        write(page, content.encode('utf-8', 'backslashreplace'))
        print(f'  page: {page}')
    except (ImportError, ValueError, KeyError, TypeError) as error:  # odd files, no matplotlib
        page.unlink(missing_ok=True)
        print(f'  no report.html: {type(error).__name__}: {error}'.split('\n')[0])


def link_and_check(args: argparse.Namespace) -> None:
    root, ava = args.avakinetics_root, args.ava_root / 'rawframes'
    if ava.resolve() == (root / 'rawframes').resolve():
        sys.exit(f"error: {ava} is the data set's own folder; set --ava_root to AVA's")
    if not ava.is_dir():
        sys.exit(f'error: {ava} not found; extract the frames of AVA or set --ava_root')
    if not find_parts(root)[0].rows.exists():
        merge = command('merge_annotations.py', root)
        sys.exit(f'error: {root} holds no merged annotations; run Step 7a: {merge}')
    link_all(ava, root / 'rawframes')
    check(root)


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    sys.stderr = sys.stderr or open(os.devnull, 'w')  # None where it is closed
    os.environ['MPLBACKEND'] = 'agg'  # a notebook's may not be in this environment
    try:
        link_and_check(parse_args(argv))
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
