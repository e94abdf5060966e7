#!/usr/bin/env python3
r"""Step 7b: link AVA's frames into the data set, and check that training can run.

Links each folder of AVA's frames into ROOT/rawframes. Then checks every frame that MMAction2's
loaders can ask for, of the training and the validation lists. What is missing is listed in
ROOT/reports/softlink_ava.csv, with the step that fixes it. ROOT/report.html shows the verdict, how
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
FPS = 30  # frames per second of the clips
AVA_START_S, AVA_END_S = 900, 1800  # of the movies, whose frames are numbered from there on
# Frames before and after a keyframe that any config of AVA-Kinetics can sample: 4x16, 8x8, 16x4
# and 32x2, with their random offsets. MMAction2 clamps them to the clip, or to AVA's 15 minutes
FRAMES_BEFORE, FRAMES_AFTER = 40, 30
CLIP_NAME = re.compile(r'([A-Za-z0-9_-]{1,64})_([0-9]{6})_([0-9]{6})')
OLD_FRAMES = 'frames older than their clip'
NO_THREADS = 'no more threads can be started here; raise the limit on processes (ulimit -u)'
NUM_THREADS = 16  # they mostly wait: a slow file server answers many at the same time
BOX = ['x1', 'y1', 'x2', 'y2']
COLUMNS = {'clip': str, 'second': int, **dict.fromkeys(BOX, float), 'action': int, 'entity': int}
# Columns of the report on recall; those of MATCHED count boxes matched by all proposals, then by
# those that are kept
MATCHED = ['matched_0.5', 'matched_0.75', 'kept_0.5', 'kept_0.75']
RECALL = ['clip', 'second', 'boxes', 'proposals', *MATCHED, 'worst_iou']
LABELS = 'ava_action_list_v2.2_for_activitynet_2019.pbtxt'
NEEDED = [LABELS, 'ava_train_excluded_timestamps_v2.2.csv', 'ava_val_excluded_timestamps_v2.2.csv']
COPY_AGAIN = "copy it from AVA's annotation folder"
EXTRACT_AGAIN = (
    "extract AVA's frames again, with -r 30: many movies are not 30 fps, and give some 21,600 "
    'frames without it, where 27,000 are needed'
)
NUM_SHOWN = {'Kinetics': 9, 'AVA': 3}  # keyframes on the page, evenly chosen
NUM_MISSED = 12  # keyframes on the page whose boxes proposals miss
WIDTH = 480  # pixels of a keyframe on the page
JPEG_QUALITY = 80  # of a keyframe on the page
# BGR; color-blind people can tell them apart, too
BLACK, BLUE, ORANGE = (0, 0, 0), (233, 180, 86), (0, 159, 230)
PLOT_COLORS = {'AVA': '#999999', 'Kinetics': '#0072B2'}
INSET = 6  # pixels by which proposals are drawn inside their box
# What Steps 3 and 6 record, as the page names it
SETTINGS = {
    'short_side': 'pixels of the short side',
    'fps': 'frames per second',
    'context_s': 'seconds kept around keyframes',
    'av': 'version of av',
    'config': 'detector',
    'checkpoint': 'checkpoint',
    'score_thr': 'score threshold',
    'neighbors': 'seconds around keyframes',
    'amp': 'mixed precision',
    'torch': 'version of torch',
    'mmdet': 'version of mmdet',
}
VALUES = {'None': 'as the source', 'True': 'yes', 'False': 'no'}
STEPS = {'cut_kinetics': 'Step 3', 'prepare_annotation': 'Step 5', 'fetch_proposal': 'Step 6'}
# What a pickle of arrays names: types, and the functions that rebuild an array
ARRAY_PARTS = {
    'ndarray': np.ndarray,
    'dtype': np.dtype,
    'encode': codecs.encode,  # makes bytes, in pickles of protocol 2
    '_reconstruct': np.empty(0).__reduce__()[0],
    '_frombuffer': np.empty(0).__reduce_ex__(5)[0],
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
<h1>AVA-Kinetics: $verdict</h1><p>$checked</p><ul>$problems</ul>$settings$parts</body></html>
""")


class Problem(NamedTuple):
    """What would stop training: where, what, and how to fix it."""

    name: str
    reason: str
    remedy: str


class Part(NamedTuple):
    """A list of annotations with its proposals; `split` is Kinetics' split, '' for AVA alone."""

    title: str
    split: str
    rows: Path
    proposals: Path


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


class Loaded(NamedTuple):
    """A part with what its files hold."""

    part: Part
    table: pd.DataFrame
    proposals: dict[str, np.ndarray]


def to_path(text: str) -> Path:
    """Return the path that an argument names."""
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
    args.avakinetics_root = args.avakinetics_root.absolute()
    args.ava_root = args.ava_root.absolute()
    return args


def link_movie(source: Path, link: Path) -> bool:
    """Link a movie's folder; return False if the link, or a real folder, exists."""
    if link.is_symlink():
        if os.readlink(link) == str(source):
            return False
    elif link.exists():
        return False
    part = link.with_name(f'.{link.name}.part')
    part.unlink(missing_ok=True)  # from a killed run
    part.symlink_to(source)
    os.replace(part, link)
    return True


def link_movies(ava: Path, rawframes: Path) -> None:
    """Link the folders of all AVA movies and print how many are new."""
    names = [name for name in sorted(os.listdir(ava)) if not name.startswith('.')]
    movies = [name for name in names if os.path.isdir(ava / name)]
    if not movies:
        sys.exit(f'error: {ava} holds no folder of frames; extract the frames of AVA')
    try:
        rawframes.mkdir(exist_ok=True)  # without raw frames of Kinetics, AVA's are the first
        new = sum(link_movie(ava / movie, rawframes / movie) for movie in movies)
    except OSError as error:
        reason = f'({error.strerror}); copy {ava} there instead'
        sys.exit(f'error: no link can be made in {rawframes} {reason}')
    print(f'links to AVA movies in {rawframes}: {new:,} new, {len(movies) - new:,} existing')


def command(script: str, root: Path) -> str:
    """Return a command that can be pasted."""
    path = Path(__file__).resolve().with_name(script)
    return f'python3 {shlex.quote(str(path))} --avakinetics_root={shlex.quote(str(root))}'


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


def check_folder(folder: Path, numbers: Iterable[int], since: float | None) -> str:
    """Do the same as check_frames; an unreadable folder is a reason, too, not an OSError."""
    try:
        return check_frames(folder, numbers, since)
    except OSError as error:
        return f'frames missing or empty: all, {error.strerror}'


def window(timestamp: int) -> range:
    """Return the frames of an AVA movie that training can ask for around a keyframe."""
    keyframe = (
        timestamp - AVA_START_S
    ) * FPS  # MMAction2's center; the keyframe's image is the next
    last = (AVA_END_S - AVA_START_S) * FPS
    return range(max(1, keyframe - FRAMES_BEFORE), min(last, keyframe + FRAMES_AFTER) + 1)


def check_movie(name: str, timestamps: set[int], root: Path) -> Problem | None:
    """Check the frames of an AVA movie around its keyframes."""
    numbers = sorted({number for timestamp in timestamps for number in window(timestamp)})
    reason = check_folder(root / 'rawframes' / name, numbers, None)
    return Problem(f'AVA {name}', reason, EXTRACT_AGAIN) if reason else None


def check_clip(clip: Clip, as_frames: bool, root: Path) -> Problem | None:
    """Check a clip's raw frames, or its video as decord counts its frames."""
    video = root / f'videos/{clip.name}.mp4'
    if as_frames:
        since = video.stat().st_mtime if video.exists() else 0
        folder = root / 'rawframes' / clip.name
        reason = check_folder(folder, range(1, clip.num_frames + 1), since)
        remedy = f'run Step 4 again: {command("extract_rgb_frames.py", root)}'
        return Problem(clip.name, reason, remedy) if reason else None
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    found = 0
    if video.is_file():
        try:
            found = len(decord.VideoReader(str(video), num_threads=1))
        except (decord.DECORDError, RuntimeError):
            pass
    if found == clip.num_frames:
        return None
    reason = f'clip missing or broken: {found} of {clip.num_frames} frames'
    remedy = 'remove it if it exists, then run Step 3 again (cut_kinetics.py)'
    return Problem(clip.name, reason, remedy)


def clips_of(table: pd.DataFrame) -> list[Clip]:
    """Return the clips in a list of annotations; its other names are those of AVA movies."""
    return [clip for clip in map(parse_clip, table['clip'].unique()) if clip]


def reads_frames(clips: list[Clip], folders: set[str]) -> bool:
    """Return whether to read the clips of a list as frames: all of them, if any has a folder.

    MMAction2 reads a list either as frames or as videos; a folder shows that Step 4 was run.
    """
    return any(clip.name in folders for clip in clips)


def check_all_frames(tables: list[pd.DataFrame], root: Path) -> dict[str, Problem]:
    """Check the frames of all clips and movies in lists; return problems by clip or movie."""
    timestamps: dict[str, set[int]] = defaultdict(set)
    as_frames: set[str] = set()
    folders = set(os.listdir(root / 'rawframes'))
    for table in tables:
        for name, found in table.groupby('clip').second.agg(set).items():
            timestamps[name] |= found
        clips = clips_of(table)
        if reads_frames(clips, folders):
            as_frames |= {clip.name for clip in clips}

    def check(name: str) -> tuple[str, Problem | None]:
        clip = parse_clip(name)
        if clip:
            return name, check_clip(clip, name in as_frames, root)
        return name, check_movie(name, timestamps[name], root)

    try:
        threads = ThreadPool(NUM_THREADS)
    except (RuntimeError, AttributeError):  # AttributeError: the half-made pool's clean-up fails
        sys.exit(f'error: {NO_THREADS}')
    checked = threads.imap(check, timestamps, 16)
    with threads, tqdm(checked, 'check', len(timestamps), unit='clip', leave=False) as bar:
        return {name: problem for name, problem in bar if problem}


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_record(path: Path) -> dict:
    """Read what a step recorded in reports/; return an empty dict if there is none."""
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # none, or edited by hand
        return {}


def check_record(split: str, root: Path) -> tuple[list[Problem], list[str]]:
    """Return what Step 6 recorded: files that it could not read, and a list of warnings.

    Files that changed since then do not count.
    """
    record = read_record(root / f'reports/fetch_proposal_{split}.json')
    remedy = f'remove it, run Step 3 again, then Step 4: {command("extract_rgb_frames.py", root)}'
    unreadable = [
        Problem(file, 'unreadable frame', remedy)
        for file, size in record.get('unreadable', {}).items()
        if os.path.isfile(root / file) and os.path.getsize(root / file) == size
    ]
    return unreadable, list(filter(None, [record.get('warning')]))


class Unpickler(pickle.Unpickler):
    """Reads arrays and plain Python values only: a pickle that names more could run code.

    NumPy 1 and 2 keep the same functions in modules of different names.
    """

    def find_class(self, module, name):
        if module.split('.')[0] not in ('numpy', '_codecs') or name not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f'it names {module}.{name}')
        return ARRAY_PARTS[name]


def read_proposals(content: bytes) -> dict[str, np.ndarray] | None:
    """Read the proposals '<video id>,<timestamp:04d>' -> (n, 5) of a pickle, if possible."""
    try:
        return dict(Unpickler(io.BytesIO(content)).load())
    except Exception:  # damaged bytes may make pickle and NumPy raise anything
        return None


def find_parts(root: Path) -> list[Part]:
    """Return training, AVA's validation and, if it was merged, validation on Kinetics, too."""
    folder = root / 'annotations'
    name = 'ava_dense_proposals_{}.FAIR.recall_93.9.pkl'
    parts = [
        Part('Training', 'train', folder / 'ava_train_v2.2.csv', folder / name.format('train')),
        Part('AVA validation', '', folder / 'ava_val_v2.2.csv', folder / name.format('val')),
    ]
    rows = folder / 'ava_kinetics_val_v2.2.csv'
    if rows.exists():
        proposals = folder / 'ava_kinetics_dense_proposals_val.pkl'
        parts.append(Part('Validation on AVA and Kinetics', 'val', rows, proposals))
    return parts


def merge_remedy(part: Part, root: Path) -> str:
    """Say how to get the files of a part again."""
    merge = f'run Step 7a: {command("merge_annotations.py", root)} --split={part.split}'
    return merge if part.split else COPY_AGAIN


def check_merged(part: Part, content: bytes, root: Path) -> list[Problem]:
    """Check that Step 6 used the current list of Step 5, and that its proposals were merged."""
    datalist = root / f'kinetics_{part.split}.csv'
    infix = '' if part.split == 'train' else f'_{part.split}'
    pickle_path = root / f'kinetics{infix}_proposal.pkl'
    if not pickle_path.exists():  # it is needed for merging only
        return []
    fetched = read_record(root / f'reports/fetch_proposal_{part.split}.json')
    merged = read_record(root / f'reports/merge_annotations_{part.split}.json')
    digest = digest_of(pickle_path.read_bytes())
    list_digest = digest_of(datalist.read_bytes()) if datalist.exists() else ''
    is_recorded = fetched.get('proposals_sha256') == digest  # else the record is of another pickle
    if is_recorded and fetched.get('datalist_sha256') != list_digest:
        fetch = f'{command("fetch_proposal.py", root)} --datalist={shlex.quote(str(datalist))}'
        reason = f'made from another list than {datalist.name}'
        return [Problem(pickle_path.name, reason, f'run Step 6: {fetch}; then Step 7a')]
    is_merged = merged.get('kinetics_proposals_sha256') == digest
    if is_merged and merged.get('proposals_sha256') == digest_of(content):
        return []
    if content.endswith(f'\nmerged with {digest}\n'.encode()):  # version 1.0 wrote no record
        return []
    reason = f'other proposals than {pickle_path.name}'
    return [Problem(part.proposals.name, reason, merge_remedy(part, root))]


def check_proposals(part: Part, root: Path) -> tuple[dict[str, np.ndarray], list[Problem]]:
    """Read and check the proposals of a part."""
    content = part.proposals.read_bytes() if part.proposals.is_file() else b''
    proposals = read_proposals(content)
    if proposals is None:
        reason = 'unreadable proposals'
        return {}, [Problem(part.proposals.name, reason, merge_remedy(part, root))]
    return proposals, check_merged(part, content, root) if part.split else []


def check_rows(part: Part, root: Path) -> tuple[pd.DataFrame, list[Problem]]:
    """Read the annotations of a part; check that they start with those of Step 5."""
    import pandas as pd

    remedy = merge_remedy(part, root)
    try:
        table = pd.read_csv(part.rows, names=list(COLUMNS), dtype=COLUMNS)
        if table.isna().any(axis=None):
            raise ValueError('a column is empty')
    except (OSError, ValueError) as error:
        reason = f'unreadable annotations: {error}'.splitlines()[0]
        return pd.DataFrame(columns=list(COLUMNS)), [Problem(part.rows.name, reason, remedy)]
    datalist = root / f'kinetics_{part.split}.csv'
    rows = datalist.read_bytes() if datalist.exists() else b''  # none where AVA is alone
    if part.split and not rows:
        remedy = 'run Step 5 (prepare_annotation.py)'
        return table, [Problem(datalist.name, 'no annotations', remedy)]
    num_kinetics = table['clip'].str.fullmatch(CLIP_NAME).sum()
    if not part.rows.read_bytes().startswith(rows) or rows.count(b'\n') != num_kinetics:
        reason = f'other Kinetics rows than {datalist.name}'
        return table, [Problem(part.rows.name, reason, remedy)]
    return table, []


def summarize(problems: Iterable[Problem]) -> list[str]:
    """Return a line for each kind of problem: how many, an example, how to fix it."""
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


def read_keyframe(root: Path, name: str, timestamp: int) -> np.ndarray | None:
    """Read a keyframe as BGR uint8 (H, W, 3), from the raw frames or the video."""
    import cv2

    clip = parse_clip(name)
    index = (timestamp - (clip.start if clip else AVA_START_S)) * FPS
    frame = root / f'rawframes/{name}/img_{index + 1:05d}.jpg'
    if os.path.isfile(frame):  # False, not an error, if its folder may not be entered
        return cv2.imread(str(frame))
    video = cv2.VideoCapture(str(root / f'videos/{name}.mp4'))
    video.set(cv2.CAP_PROP_POS_FRAMES, index)
    return video.read()[1]


def draw_keyframe(image: np.ndarray, boxes: list, proposals: np.ndarray) -> str:
    """Draw boxes on a keyframe; return it as the data URL of a JPEG.

    Annotated boxes are blue and numbered. Proposals are orange, thinner and a little inside, so
    that both can be seen where they coincide.
    """
    import cv2

    height = round(image.shape[0] * WIDTH / image.shape[1])
    image = cv2.resize(image, (WIDTH, height), interpolation=cv2.INTER_AREA)

    def to_pixels(box) -> list[int]:
        return (np.clip(box[:4], 0, 1) * [WIDTH, height, WIDTH, height]).astype(int).tolist()

    for number, box in enumerate(boxes, 1):
        x1, y1, x2, y2 = to_pixels(box)
        place = min(x1 + 8, WIDTH - 24), max(y2 - 10, 16)  # at the feet
        for color, thickness in (BLACK, 5), (BLUE, 3):  # outlined, for any background
            cv2.rectangle(image, (x1, y1), (x2, y2), color, thickness)
            cv2.putText(image, str(number), place, cv2.FONT_HERSHEY_SIMPLEX, 0.6, color, thickness)
    for box in proposals:
        x1, y1, x2, y2 = to_pixels(box)
        cv2.rectangle(image, (x1 + INSET, y1 + INSET), (x2 - INSET, y2 - INSET), ORANGE, 2)
    content = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return data_url(content.tobytes(), 'jpeg')


def keyframes_html(
    chosen: pd.DataFrame, table: pd.DataFrame, proposals: dict, root: Path, actions: dict[int, str]
) -> str:
    """Return keyframes (clip, second) as HTML, each with its actions below."""
    figures = ''
    for name, timestamp in zip(chosen['clip'], chosen.second):
        by_box = table[(table['clip'] == name) & (table.second == timestamp)].groupby(BOX).action
        caption = f'{name}, second {timestamp}'
        for number, (_, box_actions) in enumerate(by_box, 1):  # in the order of by_box.groups
            caption += (
                f'; {number}: {", ".join(actions.get(action, "?") for action in box_actions)}'
            )
        image = read_keyframe(root, name, timestamp)
        shown = '<p>cannot be read</p>'
        if image is not None:
            found = proposals.get(proposal_key(name, timestamp), ())
            shown = f'<img alt="" src="{draw_keyframe(image, list(by_box.groups), found)}">'
        figures += f'<figure>{shown}<figcaption>{html.escape(caption)}</figcaption></figure>'
    return f'<div class="grid">{figures}</div>'


def plot_html(counts: pd.DataFrame, kind: str, title: str) -> str:
    """Return a plot of counts by source as HTML: stacked bars, or `barh` on a logarithmic scale."""
    import matplotlib
    from matplotlib.figure import Figure

    log = 'sym' if kind == 'barh' else False
    figure = Figure((5, 3 + 0.16 * len(counts)), layout='constrained')
    axes = figure.add_subplot()
    options = {'kind': kind, 'logx': log, 'stacked': not log, 'width': 0.8, 'rot': 0, 'fontsize': 8}
    counts.plot(ax=axes, color=PLOT_COLORS, xlabel='', ylabel='', **options)
    axes.legend(loc='lower right' if log else 'best')
    figure.suptitle(title, fontsize=10)
    content = io.BytesIO()
    with matplotlib.rc_context({'svg.hashsalt': 'page'}):  # the same for the same counts
        figure.savefig(content, format='svg', metadata={'Date': None})
    address = data_url(content.getvalue(), 'svg+xml')
    return f'<figure><img alt="{html.escape(title)}" src="{address}"></figure>'


def plots_html(boxes: pd.DataFrame, keyframes: pd.DataFrame, table: pd.DataFrame) -> str:
    """Return plots of heights, people and actions, by source, as HTML."""
    from pandas import crosstab

    fifths = ((boxes.y2 - boxes.y1) * 5).astype(int).clip(0, 4)
    heights = crosstab(fifths, boxes.source).reindex(range(5), fill_value=0)
    heights.index = [f'{20 * fifth} to {20 * fifth + 20} %' for fifth in range(5)]
    people = crosstab(keyframes.boxes.clip(upper=6), keyframes.source)
    people = people.reindex(range(1, people.index.max() + 1), fill_value=0)
    people = people.rename(index={6: '6 or more'})
    actions = crosstab(table.action_name, table.source)
    actions = actions.loc[actions.sum(axis=1).sort_values().index]
    figures = [
        plot_html(heights, 'bar', "Height of the annotated boxes, as a share of the frame's"),
        plot_html(people, 'bar', 'Annotated people on a keyframe'),
        plot_html(actions, 'barh', 'Annotations of each action, on a logarithmic scale'),
    ]
    return f'<div class="grid">{"".join(figures)}</div>'


def count_reasons(reports: Path, split: str) -> list[tuple[str, str, int]]:
    """Return (step, reason, count) of the reports; a keyframe counts at its first step."""
    counts: Counter = Counter()
    seen = set()
    for script, step in STEPS.items():
        path = reports / f'{script}_{split}.csv'
        rows = csv.reader(path.read_text(errors='replace').splitlines()) if path.exists() else ()
        for video_id, timestamp, reason in islice(rows, 1, None):
            if (video_id, timestamp) not in seen:
                counts[step, reason.split(':')[0]] += 1
            if video_id:  # else it is a malformed line, not a keyframe
                seen.add((video_id, timestamp))
    return [(*reason, count) for reason, count in counts.items()]


def proposal_key(name: str, timestamp: int) -> str:
    """Return the key of a clip's or movie's keyframe in a pickle of proposals."""
    clip = parse_clip(name)
    return f'{clip.video_id if clip else name},{timestamp:04d}'


def numbers_html(table: pd.DataFrame, boxes: pd.DataFrame, keyframes: pd.DataFrame) -> str:
    """Return a table of counts by source as HTML."""
    import pandas as pd

    groups = keyframes.groupby('source')
    numbers = {
        'clips or movies': groups['clip'].nunique(),
        'keyframes': groups.size(),
        'annotated boxes': groups.boxes.sum(),
        'annotations': table.groupby('source').size(),
        'proposals': groups.proposals.sum(),
        'keyframes without a proposal': (keyframes.proposals == 0).groupby(keyframes.source).sum(),
    }
    counts = pd.DataFrame(numbers).T.rename_axis(columns=None)
    return counts.assign(both=counts.sum(axis=1)).map('{:,}'.format).to_html(border=0)


def recall_html(recall: pd.DataFrame) -> str:
    """Return a table of the recall of all proposals, and of those that MMAction2 keeps, as HTML."""
    import pandas as pd

    shares = recall[MATCHED].sum().to_numpy().reshape(2, 2) / recall.boxes.sum()
    rows = ['all proposals', 'those that MMAction2 keeps']
    columns = ['boxes matched at IoU 0.5', 'at IoU 0.75']
    return pd.DataFrame(shares, rows, columns).map('{:.1%}'.format).to_html(border=0)


def read_actions(path: Path) -> dict[int, str]:
    """Read the names of AVA's actions, by number."""
    text = path.read_text(errors='replace') if path.exists() else ''
    found = re.findall(r'name: "(.*)"\s+(?:label_)?id: (\d+)', text)
    return {int(number): name for name, number in found}


def part_html(loaded: Loaded, root: Path) -> str:
    """Return a part as HTML: numbers, recall, what was skipped, plots and keyframes."""
    import pandas as pd

    part, table, proposals = loaded
    # count boxes and proposals by keyframe
    actions = read_actions(root / 'annotations' / LABELS)
    table = table.assign(
        source=np.where(table['clip'].str.fullmatch(CLIP_NAME), 'Kinetics', 'AVA'),
        action_name=[f'{actions.get(number, "")} {number}' for number in table.action],
    )
    boxes = table.drop_duplicates(['clip', 'second', *BOX])
    keyframes = boxes.groupby(['clip', 'second', 'source']).size().reset_index(name='boxes')
    keys = map(proposal_key, keyframes['clip'], keyframes.second)
    keyframes['proposals'] = [len(proposals.get(key, ())) for key in keys]

    # numbers and plots
    content = f'<h2>{part.title}</h2>' + numbers_html(table, boxes, keyframes)
    path = root / f'reports/recall_{part.split}.csv'  # of Step 6, the worst keyframes first
    recall = pd.read_csv(path) if path.exists() else pd.DataFrame()
    recall = recall.reindex(columns=RECALL).dropna()  # an older report has other columns
    if len(recall):
        content += recall_html(recall)
    if reasons := count_reasons(root / 'reports', part.split):
        skipped = pd.DataFrame(reasons, columns=['step', 'skipped', 'rows'])
        content += skipped.to_html(border=0, index=False)
    content += plots_html(boxes, keyframes, table)

    # keyframes
    missed = recall[recall['matched_0.5'] < recall.boxes][:NUM_MISSED].astype({'second': int})
    chosen = [
        group.iloc[np.unique(np.linspace(0, len(group) - 1, NUM_SHOWN[source]).astype(int))]
        for source, group in reversed(list(keyframes.groupby('source')))  # Kinetics first
    ]
    content += '<p>Blue and numbered: annotated boxes. Orange and thin: proposals.</p>'
    if len(missed):
        content += '<h3>Boxes that proposals miss, the worst first</h3>'
        content += keyframes_html(missed, table, proposals, root, actions)
    content += '<h3>Keyframes</h3>'
    return content + keyframes_html(pd.concat(chosen), table, proposals, root, actions)


def settings_html(reports: Path) -> str:
    """Return how the data set was made, as HTML."""
    import pandas as pd

    rows = []
    for step, name in (
        ('Step 3', 'cut_kinetics_options'),
        ('Step 6, training', 'fetch_proposal_train'),
        ('Step 6, validation', 'fetch_proposal_val'),
    ):
        record = read_record(reports / f'{name}.json')
        for key in filter(record.__contains__, SETTINGS):
            value = str(record[key])
            rows.append((step, SETTINGS[key], VALUES.get(value, value)))
    table = pd.DataFrame(rows, columns=['step', 'what', 'value'])
    return f'<h2>How it was made</h2>{table.to_html(border=0, index=False)}'


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


def check_lists(parts: list[Part], root: Path) -> tuple[list[Loaded], list[Problem], list[str]]:
    """Check the files in annotations/; return what they hold, problems and warnings."""
    problems = [
        Problem(name, 'file missing', COPY_AGAIN)
        for name in NEEDED
        if not (root / 'annotations' / name).exists()
    ]
    loaded = []
    warnings = []
    for part in parts:
        table, wrong_rows = check_rows(part, root)
        proposals, wrong_proposals = check_proposals(part, root)
        unreadable, warning = check_record(part.split, root)
        loaded.append(Loaded(part, table, proposals))
        problems += wrong_rows + wrong_proposals + unreadable
        warnings += warning
    return loaded, problems, warnings


def check(root: Path) -> None:
    """Check all that training reads, write the report and the page, print the verdict."""
    # check the lists, then the frames of their clips and movies
    lists, problems, warnings = check_lists(find_parts(root), root)
    incomplete = check_all_frames([loaded.table for loaded in lists], root)
    for part, table, _ in lists:
        names = set(table['clip'])
        num_clips = len(clips_of(table))
        count = len(names & incomplete.keys())
        print(
            f'{part.title}: Kinetics clips: {num_clips:,}, AVA movies: {len(names) - num_clips:,}; '
            + (f'{count:,} incomplete' if count else 'all complete')
        )

    # report the problems
    problems = sorted([*problems, *incomplete.values()])
    report = root / 'reports/softlink_ava.csv'
    write_csv(report, [Problem._fields, *problems])
    lines = summarize(problems)
    verdict = 'NOT ready for training' if lines else 'ready for training'
    folders = set(os.listdir(root / 'rawframes'))
    if not lines and not reads_frames(clips_of(lists[0].table), folders):
        verdict += ' from the videos of Kinetics, see docs/small-disk.md'
        warnings.append(
            "MMAction2's own configs read raw frames: for them, run Step 4, then Steps 5 to 7 "
            f'again: {command("extract_rgb_frames.py", root)}'
        )
    for line in lines + warnings:
        print(f'  {line}')
    write_page(lists, verdict, lines + warnings, root)
    if lines:
        sys.exit(f'error: {verdict}: {lines[0]}; all reasons: {report}')
    print(verdict)


def write_page(lists: list[Loaded], verdict: str, lines: list[str], root: Path) -> None:
    """Write ROOT/report.html, the same for the same data; print why if no page can be made."""
    page = root / 'report.html'
    try:
        content = PAGE.substitute(
            verdict=verdict,
            checked=html.escape(str(root)),
            problems=''.join(f'<li>{html.escape(line)}</li>' for line in lines),
            settings=settings_html(root / 'reports'),
            parts=''.join(
                part_html(loaded, root)
                for loaded in lists
                if loaded.part.split and len(loaded.table)
            ),
        )
        write_if_changed(page, content.encode('utf-8', 'backslashreplace'))
        print(f'  page: {page}')
    except (ImportError, ValueError, KeyError, TypeError) as error:  # odd files, no matplotlib
        page.unlink(missing_ok=True)
        print(f'  no report.html: {type(error).__name__}: {error}'.split('\n')[0])


def link_and_check(args: argparse.Namespace) -> None:
    """Link AVA's frames, then check the data set."""
    root = args.avakinetics_root
    ava = args.ava_root / 'rawframes'
    if ava.resolve() == (root / 'rawframes').resolve():
        sys.exit(f"error: {ava} is the data set's own folder; set --ava_root to AVA's")
    if not ava.is_dir():
        sys.exit(f'error: {ava} not found; extract the frames of AVA or set --ava_root')
    if not find_parts(root)[0].rows.exists():
        merge = command('merge_annotations.py', root)
        sys.exit(f'error: {root} holds no merged annotations; run Step 7a: {merge}')
    link_movies(ava, root / 'rawframes')
    check(root)


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    sys.stderr = sys.stderr or open(os.devnull, 'w')  # None if it is closed
    os.environ['MPLBACKEND'] = 'agg'  # a notebook's may not be in this environment
    try:
        link_and_check(parse_args(argv))
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
