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
import os
import pickle
import re
import shlex
import signal
import string
import sys
from collections import Counter, defaultdict
from datetime import datetime
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
WINDOWS, BEFORE, BEHIND = '4x16, 8x8, 16x4, 32x2', 40, 30
CLIP_NAME = re.compile(r'([A-Za-z0-9_-]{11})_([0-9]{6})_([0-9]{6})')
BOX = ['x1', 'y1', 'x2', 'y2']
COLUMNS = dict(clip=str, second=int, **dict.fromkeys(BOX, float), action=int, entity=int)
RECALL = ['clip', 'second', 'boxes', 'met']  # columns of Step 6's report that are shown
LABELS = 'ava_action_list_v2.2_for_activitynet_2019.pbtxt'
NEEDED = [LABELS, 'ava_train_excluded_timestamps_v2.2.csv', 'ava_val_excluded_timestamps_v2.2.csv']
COPY = "copy it from AVA's annotation folder"
SHOWN = 12  # keyframes of each kind on the page
WIDTH = 480  # pixels of a keyframe on the page
GREEN, ORANGE = (60, 220, 60), (0, 140, 255)  # BGR
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
body { overflow-wrap: anywhere }
h1, h2, h3 { line-height: 1.2 } figure { margin: 0 } figcaption { font-size: .85rem }
img { width: 100%; height: auto; display: block; background: white }
.grid { display: grid; gap: 1rem }
.grid { grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)) }
table { border-collapse: collapse } td, th { padding: .2rem .6rem .2rem 0; text-align: left }
tr { border-bottom: 1px solid #8886 }
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
    there = len(movies) - made
    print(f'{len(movies)} AVA movies in {frames}: {made} linked now, {there} there already')


def command(script: str, root: Path) -> str:
    """A command that can be pasted."""
    path = Path(__file__).resolve().with_name(script)
    return f'python3 {shlex.quote(str(path))} --avakinetics_root={shlex.quote(str(root))}'


def window(second: int) -> range:
    """The frames of an AVA movie that training can ask for around a keyframe."""
    keyframe, last = (second - AVA_START_S) * FPS, (AVA_END_S - AVA_START_S) * FPS
    return range(max(1, keyframe - BEFORE), min(last, keyframe + BEHIND) + 1)


def lacking_frames(folder: Path, wanted: Iterable[int], since: float) -> str | None:
    """Which of the wanted frames are missing, empty or older than a time (s)."""
    try:
        entries = list(os.scandir(folder))
        made = {entry.name: entry.stat().st_mtime for entry in entries if entry.stat().st_size}
    except OSError:
        made = {}
    names = [f'img_{index:05d}.jpg' for index in sorted(wanted)]
    missing = [name for name in names if name not in made]
    if missing:
        return f'frames missing or empty: {len(missing):,} of {len(names):,}, first {missing[0]}'
    return 'frames older than their clip' if any(made[name] < since for name in names) else None


def check_clip(name: str, raw: bool, root: Path) -> Problem | None:
    """What a clip lacks: as frames, or as a video as decord counts its frames."""
    video, total = root / f'videos/{name}.mp4', (int(name[-6:]) - int(name[-13:-7])) * FPS
    if raw:
        since = video.stat().st_mtime if video.exists() else 0
        reason = lacking_frames(root / 'rawframes' / name, range(1, total + 1), since)
        remedy = f'repeat Step 4: {command("extract_rgb_frames.py", root)}'
        return reason and Problem(name, reason, remedy)
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        count = len(decord.VideoReader(str(video), num_threads=1)) if video.is_file() else 0
    except (decord.DECORDError, RuntimeError):
        count = 0
    reason = f'clip missing or broken: {count} of {total} frames'
    remedy = 'remove it if it is there, then repeat Step 3 (cut_kinetics.py)'
    return Problem(name, reason, remedy) if count != total else None


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

    remedy = f'do Step 7a: {command("merge_annotations.py", root)} --split={part.split}'
    remedy = remedy if part.split else COPY
    content = part.proposals.read_bytes() if part.proposals.is_file() else b''
    proposals, own = read_proposals(content), root / f'kinetics_{part.split}.csv'
    pickled = own.with_name(f'kinetics{"_val" if part.split == "val" else ""}_proposal.pkl')
    if proposals is None:
        problems.append(Problem(part.proposals.name, 'unreadable proposals', remedy))
    elif part.split and pickled.exists():
        digest = hashlib.sha256(pickled.read_bytes()).hexdigest()
        if not content.endswith(f'\nmerged with {digest}\n'.encode()):
            reason = f'other proposals than {pickled.name}'
            problems.append(Problem(part.proposals.name, reason, remedy))
    try:
        table = pd.read_csv(part.rows, names=list(COLUMNS), dtype=COLUMNS)
    except (OSError, ValueError) as error:
        reason = f'unreadable annotations: {error}'.splitlines()[0]
        problems.append(Problem(part.rows.name, reason, remedy))
        return pd.DataFrame(columns=list(COLUMNS)), {}
    rows, merged = own.read_bytes() if own.exists() else b'', part.rows.read_bytes()
    if part.split and not rows:
        problems.append(Problem(own.name, 'no annotations', 'do Step 5 (prepare_annotation.py)'))
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

    def check_one(name: str) -> Problem | None:
        if CLIP_NAME.fullmatch(name):
            return check_clip(name, name in raw, root)
        wanted = {index for second in seconds[name] for index in window(second)}
        reason = lacking_frames(root / 'rawframes' / name, wanted, 0)
        return reason and Problem(f'AVA {name}', reason, "extract AVA's frames again")

    with ThreadPool(16) as threads:  # a slow file server answers them together
        answers = threads.imap(check_one, seconds, 16)
        answers = tqdm(answers, 'check', len(seconds), unit='clip', delay=1)
        return {name: problem for name, problem in zip(seconds, answers) if problem}


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
    """A keyframe as the address of a JPEG: numbered boxes in green, proposals in orange."""
    import cv2

    size = WIDTH, round(image.shape[0] * WIDTH / image.shape[1])
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    for colour, thickness, found in (ORANGE, 5, people), (GREEN, 2, boxes):
        for number, box in enumerate(found, 1):
            x1, y1, x2, y2 = (np.clip(box[:4], 0, 1) * [*size, *size]).astype(int).tolist()
            cv2.rectangle(image, (x1, y1), (x2, y2), colour, thickness)
            if colour == GREEN:  # at the feet, inside the picture
                place = min(x1 + 4, WIDTH - 24), max(y2 - 6, 16)
                cv2.putText(image, str(number), place, cv2.FONT_HERSHEY_SIMPLEX, 0.6, colour, 2)
    return data_url(cv2.imencode('.jpg', image)[1].tobytes(), 'jpeg')


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
    """Bars of boxes, people and actions, one series for each source, as HTML."""
    import matplotlib
    from matplotlib.figure import Figure
    from pandas import crosstab

    heights = ((boxes.y2 - boxes.y1) * 5).astype(int).clip(0, 4) / 5
    people = keyframes.boxes.clip(upper=6)
    actions, figures = crosstab(table.action_name, table.source), ''
    actions = actions.loc[actions.sum(axis=1).sort_values().index]
    for counts, kind, title, *labels in (
        (crosstab(heights, boxes.source), 'bar', 'Height', 'of the frame, rounded down', 'boxes'),
        (crosstab(people, keyframes.source), 'bar', 'People', '6: or more', 'keyframes'),
        (actions, 'barh', 'Actions', 'annotations', ''),
    ):
        figure, content = Figure((5, 3 + 0.16 * len(counts)), layout='constrained'), io.BytesIO()
        axes, log = figure.add_subplot(), 'sym' if kind == 'barh' else False
        counts.plot(ax=axes, kind=kind, logx=log, width=0.8, rot=0, fontsize=8)
        axes.set(title=title, xlabel=labels[0], ylabel=labels[1])
        with matplotlib.rc_context({'svg.hashsalt': 'page'}):  # the same for the same counts
            figure.savefig(content, format='svg', metadata={'Date': None})
        address = data_url(content.getvalue(), 'svg+xml')
        figures += f'<figure><img alt="" src="{address}"></figure>'
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
    """A part as HTML: numbers, what was left out, plots, and keyframes, the worst first."""
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
    keyframes = keyframes.assign(proposals=found, bare=np.array(found) == 0)
    groups = keyframes.groupby('source')
    numbers = pd.DataFrame(
        dict(
            clips=groups['clip'].nunique(),
            keyframes=groups.size(),
            boxes=groups.boxes.sum(),
            annotations=table.groupby('source').size(),
            proposals=groups.proposals.sum(),
            without_a_proposal=groups.bare.sum(),
        )
    ).T
    numbers = numbers.assign(both=numbers.sum(axis=1)).to_html(border=0)
    content = f'<h2>{part.title}</h2>{numbers}'
    recall = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=RECALL)
    if len(recall):
        share = recall.met.sum() / recall.boxes.sum()
        content += f'<p>Proposals match {share:.1%} of the boxes of Kinetics at IoU 0.5.</p>'
    if reasons := count_reasons(root / 'reports', part.split):
        reasons = pd.DataFrame(reasons, columns=['step', 'reported', 'rows'])
        content += reasons.to_html(border=0, index=False)
    content += draw_plots(boxes, keyframes, table)
    places = np.unique(np.linspace(0, len(keyframes) - 1, SHOWN).astype(int))
    for title, chosen in (
        ('Boxes that proposals miss, the worst first', recall[recall.met < recall.boxes][:SHOWN]),
        ('Keyframes: annotated boxes in green, proposals in orange', keyframes.iloc[places]),
    ):
        if len(chosen):
            sheet = draw_sheet(chosen, table, proposals, root, actions)
            content += f'<h3>{title}</h3>{sheet}'
    return content


def show_making(reports: Path) -> str:
    """How the data set was made, as HTML."""
    content = ''
    for name in 'cut_kinetics_options', 'fetch_proposal_train', 'fetch_proposal_val':
        path = reports / f'{name}.json'
        if path.exists():
            noted = re.sub(r'[{}"]', '', path.read_text())
            content += f'<li>{html.escape(f"{name}: {noted}")}</li>'
    return f'<h2>How it was made</h2><ul>{content}</ul>'


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
    lacking = check_all([table for table, _ in read], root)
    lines = tell([*problems, *lacking.values()])
    for part, (table, _) in zip(parts, read):
        names = table['clip'].unique()
        clips, count = sum(len(name) > 11 for name in names), sum(name in lacking for name in names)
        print(
            f'{part.title}: {clips:,} Kinetics clips and {len(names) - clips:,} AVA movies, '
            f'{count:,} of them not complete'
        )
    report, page = root / 'reports/softlink_ava.csv', root / 'report.html'
    write_csv(report, [Problem._fields, *sorted([*problems, *lacking.values()])])
    for line in lines:
        print(f'  {line}')
    verdict = 'NOT ready for training' if lines else 'ready for training'
    if not lines and not read_as_frames(read[0][0]['clip'], root):
        verdict += ' from the videos of Kinetics, see docs/small-disk.md'
    merged = datetime.fromtimestamp(parts[0].rows.stat().st_mtime)
    try:
        content = PAGE.substitute(
            verdict=verdict,
            checked=html.escape(
                f'{root}, merged {merged:%Y-%m-%d %H:%M}; windows of MMAction2: {WINDOWS}'
            ),
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
    if lines:
        sys.exit(f'error: {verdict}: {lines[0]}; all reasons: {report}')
    print(verdict)


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    os.environ['MPLBACKEND'] = 'agg'  # a notebook's may not be in this environment
    args = parse_args(argv)
    root, ava = args.avakinetics_root, args.ava_root / 'rawframes'
    try:
        if ava.resolve() == (root / 'rawframes').resolve():
            sys.exit(f"error: {ava} is the data set's own folder; set --ava_root to AVA's")
        if not ava.is_dir():
            sys.exit(f'error: {ava} not found; extract the frames of AVA or set --ava_root')
        if not find_parts(root)[0].rows.exists():
            merge = command('merge_annotations.py', root)
            sys.exit(f'error: {root} holds no merged annotations; do Step 7a: {merge}')
        link_all(ava, root / 'rawframes')
        check(root)
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; fix it, then run the same command again')
    except KeyboardInterrupt:
        print('interrupted; run the same command again', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
