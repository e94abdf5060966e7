#!/usr/bin/env python3
"""Step 7b: link AVA's frames into the data set, and say whether the whole is ready for training.

Makes ROOT/rawframes/<ava video id> an absolute symbolic link to AVA_ROOT/rawframes/<ava video id>.
Correct links are kept, broken and wrong ones are repaired, a real folder of that name is left
alone. Then all that training reads is looked up: the files in ROOT/annotations, and every frame of
each annotated clip, or its video where there are no raw frames of Kinetics. What is missing is in
ROOT/reports/softlink_ava.csv. ROOT/report.html shows the whole: numbers, plots, keyframes.

    python3 softlink_ava.py --avakinetics_root=$MMACTION2/data/ava_kinetics \\
        --ava_root=$MMACTION2/data/ava
"""

import argparse
import base64
import html
import io
import os
import pickle
import re
import signal
import sys
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30
NUMBER = r'[-+]?(\d+\.?\d*|\.\d+)(e-\d+)?'
ROW = re.compile(
    r'[A-Za-z0-9_-]{11}(_\d{6}_\d{6})?,\d{1,9}' + f',{NUMBER}' * 4 + r',\d{1,9},-?\d{1,9}', re.ASCII
)
# What MMAction2's configs of AVA-Kinetics name in ROOT/annotations, beside the merged rows
NEEDED = [
    'ava_action_list_v2.2_for_activitynet_2019.pbtxt',
    'ava_train_excluded_timestamps_v2.2.csv',
    'ava_dense_proposals_train.FAIR.recall_93.9.pkl',
    'ava_val_v2.2.csv',
    'ava_val_excluded_timestamps_v2.2.csv',
    'ava_dense_proposals_val.FAIR.recall_93.9.pkl',
]
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
BOX = ['x1', 'y1', 'x2', 'y2']
COLUMNS = ['clip', 'second', *BOX, 'action', 'entity']
SHOWN = 30  # keyframes on the page, a third of them those that the proposals miss most
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>AVA-Kinetics</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 75rem; margin: 0 auto; padding: 1rem }}
h1, h2 {{ line-height: 1.2 }} img {{ width: 100%; height: auto; display: block }} figure {{ margin: 0 }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem }}
.wide {{ overflow-x: auto }} table {{ border-collapse: collapse }} td, th {{ padding: .2rem .8rem .2rem 0; text-align: left }}
tbody th {{ font-weight: normal }} tr {{ border-bottom: 1px solid #ddd }}
figcaption {{ font-size: .85rem; overflow-wrap: anywhere }}
</style></head><body>
<h1>AVA-Kinetics, training part</h1>{numbers}
<h2>What came in</h2>{came}<h2>What was left out</h2>{reasons}
<h2>What it is like</h2><div class="grid">{plots}</div>
<p>Below: annotated boxes with their actions in green, proposals with their scores in orange.</p>{sheet}
</body></html>
"""  # noqa: E501
AVA_START_S = 900  # AVA's frames begin at minute 15 of the movie
CLIP_NAME = re.compile(r'[A-Za-z0-9_-]{11}_(?P<start>[0-9]{6})_(?P<end>[0-9]{6})')


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Step 7b: link AVA's frames into the data set, and check the whole."
    )
    parser.add_argument(
        '--avakinetics_root',
        type=Path,
        default=MMACTION2 / 'data/ava_kinetics',
        metavar='DIR',
        help='folder of the data set that is made (default: %(default)s)',
    )
    parser.add_argument(
        '--ava_root',
        type=Path,
        default=MMACTION2 / 'data/ava',
        metavar='DIR',
        help='folder of the AVA data set; its frames are in rawframes/ (default: %(default)s)',
    )
    return parser.parse_args(argv)


def link_folder(source: Path, link: Path) -> str:
    """Make `link` point to the folder `source`; return 'linked', 'kept', 'mended' or 'folder', a
    real one left alone.
    """
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


def read_annotations(path: Path):
    """The rows that MMAction2 can read as a DataFrame of COLUMNS, and report rows on the other
    lines.
    """
    import pandas as pd

    rows, problems = [','.join(COLUMNS)], []
    with open(path, errors='replace') as file:
        for number, line in enumerate(file, 1):
            if ROW.fullmatch(line.strip()):
                rows.append(line.strip())
            else:
                problems.append(
                    (f'line {number} of {path.name}', 'malformed row: training stops at it')
                )
    return pd.read_csv(io.StringIO('\n'.join(rows)), dtype={'clip': str}), problems


def is_there(file: str) -> bool:
    try:
        return os.stat(file).st_size > 0
    except OSError:
        return False


def missing_frames(folder: Path, seconds: set[int]) -> str | None:
    """What a folder lacks: of a clip any frame that its name promises, of an AVA video any
    annotated keyframe.
    """
    if not folder.is_dir():
        return 'folder missing: no frames'
    name = CLIP_NAME.fullmatch(folder.name)
    wanted = (
        range(1, (int(name['end']) - int(name['start'])) * FPS + 1)
        if name
        else [(second - AVA_START_S) * FPS + 1 for second in sorted(seconds)]
    )
    missing = [index for index in wanted if not is_there(f'{folder}/img_{index:05d}.jpg')]
    return (
        f'frames missing or empty: {len(missing)} of {len(wanted)}, first img_{missing[0]:05d}.jpg'
        if missing
        else None
    )


def missing_in_video(video: Path) -> str | None:
    """What a clip lacks of the frames that its name promises, as decord counts them."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    if not video.is_file():
        return 'clip missing: no video'
    total = (int(video.stem[-6:]) - int(video.stem[-13:-7])) * FPS
    try:
        count = len(decord.VideoReader(str(video), num_threads=1))
    except (decord.DECORDError, RuntimeError):
        return 'unreadable clip: decord cannot open it'
    return None if count == total else f'wrong number of frames: {count} instead of {total}'


def missing_files(root: Path, kinetics: bool) -> list[tuple]:
    """Report rows on what training reads beside frames and videos."""
    merged, rows = root / 'annotations/ava_train_v2.2.csv', []
    own = root / 'kinetics_train.csv'
    if not kinetics:
        rows.append((merged.name, 'no Kinetics row: do Step 7 (merge_annotations.py)'))
    if not own.is_file():
        rows.append((own.name, 'file missing: do Step 5 (prepare_annotation.py)'))
    elif own.stat().st_mtime > merged.stat().st_mtime:
        rows.append(
            (
                merged.name,
                'older than kinetics_train.csv: merge again, Step 7 (merge_annotations.py)',
            )
        )
    return rows + [
        (name, "file missing: copy it from AVA's annotation folder")
        for name in NEEDED
        if not (root / 'annotations' / name).is_file()
    ]


class Unpickler(pickle.Unpickler):
    """Reads arrays alone: a pickle could run code."""

    def find_class(self, module, name):
        if (module, name) not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f'it names {module}.{name}')
        return super().find_class(module, name)


def read_proposals(path: Path) -> dict | None:
    """The merged proposals, key '<video_id>,<second:04d>' -> (n, 5), if they can be read."""
    try:
        with open(path, 'rb') as file:
            return dict(Unpickler(file).load())
    except Exception:  # damaged bytes may make pickle and NumPy raise anything
        return None


def link_all(videos: list[str], ava: Path, root: Path) -> None:
    """Link the folders of all AVA videos, say what was done."""
    outcomes = {}
    try:
        for video in videos:
            outcomes.setdefault(link_folder(ava / video, root / 'rawframes' / video), []).append(
                video
            )
    except OSError as error:
        sys.exit(
            f'error: no link can be made in {root / "rawframes"} ({error.strerror}); copy '
            f'{ava} there instead'
        )
    words = dict(
        linked='linked now',
        kept='linked already',
        mended='broken or wrong links mended',
        folder='real folders left alone',
    )
    print(
        f'{len(videos)} AVA videos in {root / "rawframes"}: '
        + ', '.join(f'{len(names)} {words[outcome]}' for outcome, names in sorted(outcomes.items()))
    )


def key_of(clip: str, second: int) -> str:
    """What a keyframe is called in the pickle."""
    return f'{clip[:11]},{second:04d}'


def best_overlaps(boxes, proposals: dict[str, np.ndarray]) -> np.ndarray:
    """The IoU of every annotated box (columns clip, second, x1, y1, x2, y2) with the best proposal
    of its keyframe, or 0.
    """
    best, corners = np.zeros(len(boxes)), boxes[['x1', 'y1', 'x2', 'y2']].to_numpy()
    for (clip, second), rows in boxes.groupby(['clip', 'second']).indices.items():
        found = proposals.get(key_of(clip, second))
        if found is not None and len(found):
            ours, theirs = corners[rows, None], found[None, :, :4]
            sides = np.minimum(ours[..., 2:], theirs[..., 2:]) - np.maximum(
                ours[..., :2], theirs[..., :2]
            )
            both = sides.clip(0).prod(-1)
            areas = (ours[..., 2:] - ours[..., :2]).prod(-1) + (
                theirs[..., 2:] - theirs[..., :2]
            ).prod(-1)
            best[rows] = (both / (areas - both)).max(axis=1)
    return best


def read_keyframe(root: Path, name: str, second: int):
    """The picture of a keyframe as RGB uint8 (H, W, 3), from the raw frames or the video; None
    where it cannot be read.
    """
    import cv2

    index = (second - (int(name[12:18]) if CLIP_NAME.fullmatch(name) else AVA_START_S)) * FPS
    frame, image = root / f'rawframes/{name}/img_{index + 1:05d}.jpg', None
    if os.path.isfile(frame):  # and its folder may be entered
        image = cv2.imread(str(frame))
    if image is None and (root / f'videos/{name}.mp4').is_file():
        video = cv2.VideoCapture(str(root / f'videos/{name}.mp4'))
        video.set(cv2.CAP_PROP_POS_FRAMES, index)
        image = video.read()[1]
    return None if image is None else image[..., ::-1]


def data_url(figure, kind: str) -> str:
    """A matplotlib figure as a data URL, the same for the same figure."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({'svg.hashsalt': 'page', 'savefig.dpi': 100}):
        figure.savefig(
            buffer, format=kind, **(dict(metadata={'Date': None}) if kind == 'svg' else {})
        )
    media = dict(svg='svg+xml', jpg='jpeg')[kind]
    return f'data:image/{media};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def draw_keyframe(image, rows, found, actions: dict[int, str]) -> str:
    """A keyframe with the annotated boxes and their actions in green and the proposals in orange,
    as a picture's address.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    height, width = image.shape[:2]
    figure = Figure(figsize=(4.8, 4.8 * height / width))
    axes = figure.add_axes((0, 0, 1, 1), frame_on=False, xticks=[], yticks=[])
    axes.imshow(image, aspect='auto')

    def draw(box, label, colour, line_width, below):
        x1, y1, x2, y2 = np.clip(box, 0, 1) * [width, height, width, height]
        axes.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=line_width)
        )
        axes.text(
            x1,
            y2 if below else y1,
            label,
            fontsize=7,
            color=colour,
            va='bottom' if below else 'top',
            clip_on=True,
            bbox=dict(facecolor='black', alpha=0.6, linewidth=0, pad=0.5),
        )

    for box in found:
        draw(box[:4], f'{box[4]:.2f}' if len(box) > 4 else '', 'orange', 2.5, True)
    for box, people in rows.groupby(BOX):
        draw(
            box,
            '\n'.join(actions.get(action, str(action)) for action in people.action),
            'lime',
            1,
            False,
        )
    return data_url(figure, 'jpg')


def draw_bars(title: str, table, **options) -> str:
    """A DataFrame as bars, one series for each column, as a picture's address."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(5, 0.6 + 0.19 * len(table)) if options.get('kind') == 'barh' else (5, 2.8),
        layout='constrained',
    )
    axes = table.plot(
        ax=figure.add_subplot(),
        **dict(kind='bar', width=0.8, rot=30, fontsize=8, legend=False) | options,
    )
    axes.set(xlabel='', ylabel='')
    axes.set_title(title, fontsize=10)
    if table.shape[1] > 1:
        figure.legend(loc='outside lower center', ncols=table.shape[1], fontsize=8)
    return data_url(figure, 'svg')


def draw_plots(root: Path, table, boxes, keyframes, actions: dict[int, str]) -> list[str]:
    """Plots of boxes, people, clips and actions, as pictures' addresses."""
    import pandas as pd

    def count(values, rows, **options):  # a column each for AVA, Kinetics and both
        return pd.crosstab(
            values, rows.part, margins=True, margins_name='both', dropna=False, **options
        )

    heights = pd.cut(
        boxes.y2 - boxes.y1,
        [0, 0.2, 0.4, 0.6, 0.8, np.inf],
        right=False,
        labels=['below 0.2', '0.2 to 0.4', '0.4 to 0.6', '0.6 to 0.8', '0.8 or more'],
    )
    people = keyframes.boxes.astype(str).where(keyframes.boxes < 5, '5 or more')
    names = table.action.map(lambda number: f'{actions.get(number, "")} {number}'.strip())
    clips = keyframes.loc[keyframes.part == 'Kinetics', 'clip'].drop_duplicates()
    lengths = (
        (clips.str[-6:].astype(int) - clips.str[-13:-7].astype(int)).value_counts().sort_index()
    )
    images = [
        read_keyframe(root, clip, int(clip[12:18])) for clip in clips[:: max(1, len(clips) // 200)]
    ]
    sizes = pd.Series(
        [f'{image.shape[1]}x{image.shape[0]}' for image in images if image is not None], dtype=str
    ).value_counts()
    frequencies = count(names, table).drop('both').sort_values('both')
    plots = [
        (
            'Height of the boxes, of the frame: share of the boxes',
            count(heights, boxes, normalize='columns'),
            {},
        ),
        (
            'People on a keyframe: share of the keyframes',
            count(people, keyframes, normalize='columns'),
            {},
        ),
        ('Length of the Kinetics clips, s', lengths.to_frame(), {}),
        (f'Size of the Kinetics clips, of {sizes.sum()} of them', sizes[:8].to_frame(), {}),
        ('Annotations by action', frequencies, dict(kind='barh', logx='sym', rot=0)),
    ]
    return [draw_bars(title, rows, **options) for title, rows, options in plots if len(rows)]


def draw_sheet(root: Path, table, keyframes, proposals: dict, actions: dict[int, str]) -> str:
    """Keyframes as HTML: those that the proposals miss most, and others evenly chosen."""
    worst = keyframes[keyframes.worst < 0.5].nsmallest(SHOWN // 3, 'worst')
    places = np.unique(np.linspace(0, len(keyframes) - 1, SHOWN - len(worst)).astype(int))
    sheet = ''
    for title, chosen in (
        ('Boxes that no proposal meets', worst),
        ('Keyframes, evenly chosen', keyframes.iloc[places]),
    ):
        sheet += f'<h2>{title}</h2><div class="grid">' + ('' if len(chosen) else '<p>None.</p>')
        for clip, second in zip(chosen['clip'], chosen.second):
            image = read_keyframe(root, clip, second)
            rows = table[(table['clip'] == clip) & (table.second == second)]
            found = proposals.get(key_of(clip, second), ())
            picture = (
                '<p>This keyframe cannot be read.</p>'
                if image is None
                else f'<img alt="" src="{draw_keyframe(image, rows, found, actions)}">'
            )
            sheet += (
                f'<figure>{picture}<figcaption>{html.escape(clip)}, second '
                f'{second}</figcaption></figure>'
            )
        sheet += '</div>'
    return sheet


def count_reasons(reports: Path):
    """What the reports of the training part say, as a DataFrame: step, reason and how often."""
    import pandas as pd

    counts = [pd.DataFrame([], columns=['step', 'left out because', 'count'])]
    for report in sorted(path for path in reports.glob('*.csv') if not path.stem.endswith('_val')):
        rows = pd.read_csv(report, dtype=str, encoding_errors='replace')
        if 'reason' in rows:
            reasons = rows.reason.str.split(':').str[0].value_counts()
            counts.append(
                pd.DataFrame(
                    {
                        'step': report.stem,
                        'left out because': reasons.index,
                        'count': reasons.to_numpy(),
                    }
                )
            )
    return pd.concat(counts)


def describe(table, boxes, keyframes):
    """The numbers of AVA, of Kinetics and of both, as a DataFrame of text."""
    import pandas as pd

    rows, each, frames = (
        pd.concat([part, part.assign(part='both')]).groupby('part')
        for part in (table, boxes, keyframes)
    )
    return pd.DataFrame(
        {
            'clips or movies': frames['clip'].nunique().map('{:,}'.format),
            'keyframes': frames.size().map('{:,}'.format),
            'boxes': each.size().map('{:,}'.format),
            'annotations': rows.size().map('{:,}'.format),
            'boxes a keyframe': (each.size() / frames.size()).map('{:.2f}'.format),
            'proposals a keyframe': frames.proposals.mean().map('{:.2f}'.format),
            'keyframes without a proposal': frames.bare.sum().map('{:,}'.format),
            'recall at IoU 0.5': each.met.mean().map('{:.1%}'.format),
            'recall at IoU 0.75': each.met_well.mean().map('{:.1%}'.format),
        }
    ).T


def list_names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def write_page(root: Path, table, proposals: dict) -> None:
    """Write ROOT/report.html: what came in, what was left out, what the data set is like, and
    keyframes to look at.
    """
    import pandas as pd

    labels = root / 'annotations' / NEEDED[0]
    text = labels.read_text(errors='replace') if labels.is_file() else ''
    actions = {
        int(number): name
        for name, number in re.findall(r'name: "(.*)"\s+(?:label_)?id: (\d+)', text)
    }
    table = table.assign(part=np.where(table['clip'].str.len() > 11, 'Kinetics', 'AVA'))
    boxes = table.drop_duplicates(['clip', 'second', *BOX], ignore_index=True)
    boxes['best'] = best_overlaps(boxes, proposals)
    boxes = boxes.assign(met=boxes.best >= 0.5, met_well=boxes.best >= 0.75)
    keyframes = (
        boxes.groupby(['clip', 'second', 'part']).best.agg(boxes='size', worst='min').reset_index()
    )
    keyframes['proposals'] = [
        len(proposals.get(key_of(clip, second), ()))
        for clip, second in zip(keyframes['clip'], keyframes.second)
    ]
    keyframes['bare'] = keyframes.proposals == 0
    came = {
        'clips in videos/': sum(name.endswith('.mp4') for name in list_names(root / 'videos')),
        'clips with raw frames': sum(
            bool(CLIP_NAME.fullmatch(name)) for name in list_names(root / 'rawframes')
        ),
        'frames with proposals': len(proposals),
    }
    numbers = describe(table, boxes, keyframes)
    tables = dict(
        numbers=numbers,
        came=pd.DataFrame({'count': came}),
        reasons=count_reasons(root / 'reports').set_index('step'),
    )
    page = root / 'report.html'
    unfinished = page.with_name(f'.{page.name}.part')
    unfinished.write_text(
        PAGE.format(
            **{
                name: f'<div class="wide">{rows.to_html(border=0, index_names=False)}</div>'
                for name, rows in tables.items()
            },
            plots=''.join(
                f'<figure><img alt="" src="{plot}"></figure>'
                for plot in draw_plots(root, table, boxes, keyframes, actions)
            ),
            sheet=draw_sheet(root, table, keyframes, proposals, actions),
        ),
        errors='replace',
    )
    os.replace(unfinished, page)
    for part, said in numbers.items():
        print(
            f'  recall of {part}: proposals meet {said["recall at IoU 0.5"]} of '
            f'{said["boxes"]} annotated boxes at IoU 0.5, '
            f'{said["recall at IoU 0.75"]} at 0.75'
        )
    print(f'  a page to look at: {page}')


def check(root: Path) -> None:
    """Look up every annotated clip and AVA video, write the report, say whether the data set is
    complete.
    """
    import pandas as pd

    annotations = root / 'annotations/ava_train_v2.2.csv'
    if not annotations.is_file():
        sys.exit(
            f'error: {annotations} not found, so the data set cannot be checked; do Step 7 '
            '(merge_annotations.py)'
        )
    table, rows = read_annotations(annotations)
    total, read = len(table) + len(rows), [table]
    validated = root / 'annotations/ava_val_v2.2.csv'  # which training reads after the first epoch
    if validated.is_file():
        others, problems = read_annotations(validated)
        rows += problems
        read.append(others)
    annotated = {name: set(seconds) for name, seconds in pd.concat(read).groupby('clip').second}
    clips = {name for name in annotated if CLIP_NAME.fullmatch(name)}
    raw = any(
        (root / 'rawframes' / clip).is_dir() for clip in clips
    )  # else training reads the clips themselves
    rows += missing_files(root, bool(clips))
    proposals = read_proposals(root / 'annotations/ava_dense_proposals_train.FAIR.recall_93.9.pkl')
    if proposals is None:
        rows.append(
            (
                'ava_dense_proposals_train.FAIR.recall_93.9.pkl',
                'unreadable: do Step 7 (merge_annotations.py)',
            )
        )

    def look(name: str) -> str | None:
        if name in clips and not raw:
            return missing_in_video(root / f'videos/{name}.mp4')
        return missing_frames(root / 'rawframes' / name, annotated[name])

    with ThreadPool(16) as threads:  # which a slow file server answers together
        answers = tqdm(
            threads.imap(look, annotated, 16),
            total=len(annotated),
            desc='check',
            unit='clip',
            delay=1,
        )
        rows += [(name, problem) for name, problem in zip(annotated, answers) if problem]
    report = root / 'reports/softlink_ava.csv'
    report.parent.mkdir(exist_ok=True)
    part = report.with_name(f'.{report.name}.part')
    pd.DataFrame(sorted(rows), columns=['clip', 'reason']).to_csv(
        part, index=False, errors='backslashreplace'
    )
    os.replace(part, report)
    print(
        f'AVA-Kinetics in {root}: {len(clips)} Kinetics clips and '
        f'{len(annotated) - len(clips)} AVA videos annotated, '
        f'{total} rows, {"no readable" if proposals is None else len(proposals)} frames with '
        'proposals'
    )
    for reason, count in Counter(row[1].split(':')[0] for row in rows).most_common():
        example = next(name for name, why in rows if why.split(':')[0] == reason)
        print(f'  {count} not complete: {reason}, such as {example}')
    try:
        if len(table):
            write_page(root, table, proposals or {})
    except (
        ImportError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:  # odd files in reports/, no matplotlib
        print(f'  no report.html: {type(error).__name__}: {error}'.split('\n')[0])
    if rows:
        print(f'  report: {report}')
        sys.exit(f'error: the data set is not complete; {rows[0][0]}: {rows[0][1]}')
    print(
        f'  all {len(annotated)} have their frames: ready for training'
        + ('' if raw else ', the Kinetics part from its videos (README: Without raw frames)')
    )


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    sys.stdout.reconfigure(errors='backslashreplace')  # names of files may be no UTF-8
    os.environ['MPLBACKEND'] = 'agg'  # a notebook's may not be in this environment
    args = parse_args(argv)
    try:
        root, ava = args.avakinetics_root, args.ava_root.absolute() / 'rawframes'
        if args.ava_root.resolve() == root.resolve():
            sys.exit(
                'error: --ava_root and --avakinetics_root are the same folder; AVA has one '
                'of its own'
            )
        if ava.resolve() == (root / 'rawframes').resolve():
            sys.exit(
                f"error: {root / 'rawframes'} is AVA's own folder; the data set has one of "
                'its own: remove the link'
            )
        if not ava.is_dir():
            sys.exit(f'error: {ava} not found; extract the frames of AVA or set --ava_root')
        if not (root / 'rawframes').is_dir() and not (root / 'videos').is_dir():
            sys.exit(
                f'error: {root} has neither rawframes nor videos; do Step 3 '
                '(cut_kinetics.py) or set --avakinetics_root'
            )
        videos = sorted(
            name
            for name in os.listdir(ava)
            if os.path.isdir(ava / name) and not name.startswith('.')
        )
        if not videos:
            sys.exit(
                f'error: {ava} holds no folder of frames; extract the frames of AVA or set '
                '--ava_root'
            )
        (root / 'rawframes').mkdir(
            exist_ok=True
        )  # without raw frames of Kinetics, AVA's are the first
        link_all(videos, ava, root)
        check(root)
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; fix it, then run the same command again')
    except KeyboardInterrupt:
        print('interrupted; run the same command again', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
