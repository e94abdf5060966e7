"""A small world to prepare: Kinetics-700, the AVA-Kinetics annotations and AVA, laid out as
MMAction2 documents it.

    python tests/tools/sample_world.py FOLDER     # FOLDER stands for $MMACTION2

The people are drawn figures whose boxes are known; the annotations are these boxes.
"""

import pickle
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

import draw

# Kinetics-700 class -> (video id, first second, frames a second, size, annotated seconds)
SCENES = {
    "massaging person's head": [('Ab3_d-fGhI1', 12, 30, (340, 256), [17])],
    'curling (sport)': [
        ('-Kq_7RtYuIo', 100, 25, (426, 240), [103]),
        ('zXcVb_nM-12', 3, '30000/1001', (426, 240), [3]),
    ],
    'passing American football (not in game)': [('_0-PaSsInG_', 55, 24, (320, 240), [64])],
    'throwing ball (not baseball or American football)': [
        ('tHrOw_-BaLl', 201, 30, (456, 256), [203, 208])
    ],
    'zumba': [('ZuMbA-00001', 0, 30, (340, 256), [5]), ('ZuMbA-00002', 10, 15, (340, 256), [14])],
    'abseiling': [('AbSeIl_0001', 40, '24000/1001', (426, 240), [46])],
    'wrapping present': [('WrApPiNg_01', 77, 50, (320, 240), [79])],
    'cooking sausages (not on barbeque)': [('sAuSaGeS__1', 31, 30, (340, 256), [36])],
}
AVA_VIDEOS = {'AVA_mov-1_x': 700, '-5KQ66BBWC4': 701}  # id -> scene
OTHER_IDS = str.maketrans('A-', 'B_')  # of the videos of the validation split
AVA_SIZE, AVA_SECONDS = (340, 256), range(902, 905)
ACTIONS = {12: 'stand', 79: 'talk to (e.g., self, a person, a group)', 80: 'watch (a person)'}


def annotate(name: str, second: str, boxes: np.ndarray, tail: str = '') -> str:
    """Return AVA rows: every person stands and does one of two more things."""
    rows = ''
    for index, box in enumerate(boxes):
        for action in (12, 79 + index % 2):
            rows += (
                f'{name},{second},'
                + ','.join(f'{value:.6f}' for value in box)
                + f',{action}{tail}\n'
            )
    return rows


def draw_kinetics(mmaction2: Path) -> None:
    """Draw data/kinetics700 with its list, and the annotations beside the scripts."""
    kinetics, rows, lines, scene = mmaction2 / 'data/kinetics700', '', [], 0
    for label, (class_name, videos) in enumerate(SCENES.items()):
        for video, start, fps, size, seconds in videos:
            scene += 1
            rate = float(Fraction(fps))
            path = f'{class_name}/{video}_{start:06d}_{start + 10:06d}.mp4'
            (kinetics / 'videos_train' / class_name).mkdir(parents=True, exist_ok=True)
            frames = (draw.draw_frame(scene, n / rate, size, n)[0] for n in range(round(10 * rate)))
            draw.encode_plain(kinetics / 'videos_train' / path, frames, fps, size)
            lines.append(f'{path} {label}')
            for second in seconds:
                rows += annotate(
                    video, f'{second + 0.011:.6f}', draw.figure_boxes(scene, second - start, size)
                )
    # what real downloads hold too: a file that broke off, one that is gone, a video that nobody was
    # annotated in
    whole = (kinetics / 'videos_train' / lines[0].rsplit(' ', 1)[0]).read_bytes()
    (kinetics / 'videos_train/zumba/bRoKeN-off__000020_000030.mp4').write_bytes(whole[:2000])
    lines += ['zumba/bRoKeN-off__000020_000030.mp4 4', 'zumba/gOnE-gOnE-1_000020_000030.mp4 4']
    rows += annotate('bRoKeN-off_', '25.000000', np.array([[0.1, 0.2, 0.5, 0.9]]))
    rows += annotate('gOnE-gOnE-1', '25.000000', np.array([[0.1, 0.2, 0.5, 0.9]]))
    rows += 'nObOdY-1234,31.000000\n'
    (kinetics / 'kinetics700_train_list_videos.txt').write_text('\n'.join(lines) + '\n')
    annotations = mmaction2 / 'tools/data/ava_kinetics/ava_kinetics_v1_0'
    annotations.mkdir(parents=True, exist_ok=True)
    (annotations / 'kinetics_train_v1.0.csv').write_text(rows)


def draw_ava(mmaction2: Path) -> None:
    """Draw data/ava: six seconds of two movies, annotations and proposals in FAIR's format."""
    ava, rows, proposals = mmaction2 / 'data/ava', '', {}
    (ava / 'annotations').mkdir(parents=True, exist_ok=True)
    for video, scene in AVA_VIDEOS.items():
        (ava / 'rawframes' / video).mkdir(parents=True, exist_ok=True)
        for n in range(6 * draw.FPS):
            image = draw.draw_frame(scene, n / draw.FPS, AVA_SIZE, n)[0]
            cv2.imwrite(str(ava / f'rawframes/{video}/img_{n + 1:05d}.jpg'), image)
        for second in AVA_SECONDS:
            boxes = draw.figure_boxes(scene, second - 900, AVA_SIZE)
            rows += annotate(video, f'{second:04d}', boxes.round(3), ',0')
            proposals[f'{video},{second:04d}'] = np.hstack(
                [boxes.round(3), np.full((len(boxes), 1), 0.95)]
            )
    names = ava / 'annotations'
    (names / 'ava_train_v2.2.csv').write_text(rows)
    draw_other_annotations(names, '')
    (names / 'ava_train_excluded_timestamps_v2.2.csv').write_text(
        f'{next(iter(AVA_VIDEOS))},0904\n'
    )
    (names / 'ava_val_v2.2.csv').write_text(rows)
    for split in 'train', 'val':
        (names / f'ava_dense_proposals_{split}.FAIR.recall_93.9.pkl').write_bytes(
            fair_pickle(proposals)
        )


def draw_other_annotations(folder: Path, validated: str) -> None:
    """Write AVA's other annotation files, with one validated keyframe `movie,second`."""
    (folder / 'ava_train_excluded_timestamps_v2.2.csv').write_text('')
    (folder / 'ava_val_v2.2.csv').write_text(f'{validated},0.1,0.2,0.3,0.4,12,0\n')
    (folder / 'ava_val_excluded_timestamps_v2.2.csv').write_text('')
    (folder / 'ava_dense_proposals_val.FAIR.recall_93.9.pkl').write_bytes(fair_pickle({}))
    (folder / 'ava_action_list_v2.2_for_activitynet_2019.pbtxt').write_text(
        ''.join(
            f'item {{\n  name: "{name}"\n  id: {number}\n}}\n' for number, name in ACTIONS.items()
        )
    )


def fair_pickle(proposals: dict[str, np.ndarray]) -> bytes:
    """Pickle proposals as the published file is: by NumPy 1, so that it names numpy.core."""
    return pickle.dumps(proposals, protocol=2).replace(
        b'numpy._core.multiarray', b'numpy.core.multiarray'
    )


def copy_as_validation_split(mmaction2: Path) -> None:
    """Copy the Kinetics part as the validation split, under other video ids."""
    kinetics = mmaction2 / 'data/kinetics700'

    def renamed(name: str) -> str:
        return name[:11].translate(OTHER_IDS) + name[11:]

    for path in (kinetics / 'videos_train').rglob('*.mp4'):
        folder = kinetics / 'videos_val' / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / renamed(path.name))
    lines = (kinetics / 'kinetics700_train_list_videos.txt').read_text().splitlines()
    (kinetics / 'kinetics700_val_list_videos.txt').write_text(
        ''.join(f'{Path(line).parent}/{renamed(Path(line).name)}\n' for line in lines)
    )
    notes = mmaction2 / 'tools/data/ava_kinetics/ava_kinetics_v1_0'
    rows = (notes / 'kinetics_train_v1.0.csv').read_text().splitlines()
    (notes / 'kinetics_val_v1.0.csv').write_text(''.join(renamed(row) + '\n' for row in rows))


def draw_world(mmaction2: Path) -> None:
    draw_kinetics(mmaction2)
    draw_ava(mmaction2)


if __name__ == '__main__':
    draw_world(Path(sys.argv[1]))
