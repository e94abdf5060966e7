"""docs/slowfast.md, as it stands: SlowFast's own loader reads what its program writes."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import yaml

import draw
import sample_world
from helpers import REPO, load, read_csv

PAGE = (REPO / 'docs/slowfast.md').read_text()
PARTS = {
    'val': (
        'annotations/ava_kinetics_val_v2.2.csv',
        'annotations/ava_kinetics_dense_proposals_val.pkl',
    ),
    'kinetics': ('kinetics_train.csv', 'kinetics_proposal.pkl'),
    'both': (
        'annotations/ava_train_v2.2.csv',
        'annotations/ava_dense_proposals_train.FAIR.recall_93.9.pkl',
    ),
}


@pytest.fixture(scope='module')
def written(mmaction2, tmp_path_factory):
    """The folder that the page's two commands fill."""
    folder = tmp_path_factory.mktemp('slowfast')
    program = re.search(r'^```python\n(.*?)^```', PAGE, re.M | re.S)[1]
    (folder / 'to_slowfast.py').write_text(program)
    command = re.search(r'^```shell\n(.*?)^```', PAGE, re.M | re.S)[1]
    command = command.replace('$AVAKINETICS_ROOT/slowfast', str(folder))
    command = command.replace('python3', sys.executable)
    environment = os.environ | {'AVAKINETICS_ROOT': str(mmaction2.root)}
    subprocess.run(command, shell=True, check=True, cwd=folder, env=environment)
    return folder


def config_of(folder, root, part: str) -> SimpleNamespace:
    """The page's settings, for this data set, with a part to train or to validate on."""
    block = re.search(r'^```yaml\nAVA:\n(.*?)^```', PAGE, re.M | re.S)[1]
    settings = yaml.safe_load(block)
    settings |= {'FRAME_DIR': str(root / Path(settings['FRAME_DIR']).name)}
    settings |= {name: str(folder) for name in ('FRAME_LIST_DIR', 'ANNOTATION_DIR')}
    for name in 'TRAIN_LISTS', 'TRAIN_GT_BOX_LISTS', 'TEST_LISTS', 'TEST_PREDICT_BOX_LISTS':
        settings[name] = [f'{part}/{Path(path).name}' for path in settings[name]]
    return SimpleNamespace(AVA=SimpleNamespace(**settings))


def slowfast(module: str):
    """A module of SlowFast's loader, without the package's other modules and their dependencies."""
    folder = Path(importlib.util.find_spec('slowfast').origin).parent / 'datasets'
    spec = importlib.util.spec_from_file_location(module, folder / f'{module}.py')
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def keyframes(folder, root, part: str, mode: str):
    """Yield (name, second, paths of the window 8x8, boxes with labels), as SlowFast does."""
    ava_helper, utils = slowfast('ava_helper'), slowfast('utils')
    config = config_of(folder, root, part)
    paths, names = ava_helper.load_image_lists(config, mode == 'train')
    loaded = ava_helper.load_boxes_and_labels(config, mode)
    assert len(loaded) == len(paths)
    indices, boxes = ava_helper.get_keyframe_data([loaded[name] for name in names])
    for video, number, second, center in indices:
        window = utils.get_sequence(center, 32, 8, num_frames=len(paths[video]))
        yield names[video], second, [paths[video][frame] for frame in window], boxes[video][number]


def original(name: str, second: int) -> int:
    """The timestamp that a second of SlowFast's stands for."""
    return second + (int(name[-13:-7]) - 902 if len(name) > 11 else 0)


@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize('mode', ['train', 'val'])
def test_windows_show_the_right_frames(mmaction2, written, part, mode):
    """By name, and the middle one by the number that is drawn in it."""
    sources = {
        name: (start, float(sample_world.Fraction(rate)))
        for videos in sample_world.SCENES.values()
        for video, start, rate, *_ in videos
        for name in (video, video.translate(sample_world.OTHER_IDS))
    }
    found = list(keyframes(written, mmaction2.root, part, mode))
    rows = read_csv(mmaction2.root / PARTS[part][0])
    assert {(name, original(name, second)) for name, second, *_ in found} == {
        (row[0], int(row[1])) for row in rows
    }
    for name, second, window, _ in found:
        timestamp = original(name, second)
        start = int(name[-13:-7]) if len(name) > 11 else 900
        keyframe = (timestamp - start) * draw.FPS + 1
        last = len(os.listdir(mmaction2.root / 'rawframes' / name))
        expected = [min(max(1, keyframe + offset), last) for offset in range(-32, 32, 8)]
        folder = mmaction2.root / 'rawframes' / name
        assert window == [str(folder / f'img_{number:05d}.jpg') for number in expected]
        source_start, rate = sources.get(name[:11], (900, draw.FPS))
        shown = draw.read_stamp(cv2.imread(window[4]))
        assert abs(shown - (timestamp - source_start) * rate) <= 1


@pytest.mark.parametrize('part', PARTS)
def test_boxes_and_labels_are_those_of_the_csv(mmaction2, written, part):
    rows = read_csv(mmaction2.root / PARTS[part][0])
    for name, second, _, boxes in keyframes(written, mmaction2.root, part, 'train'):
        timestamp = original(name, second)
        found = {(*box, label) for box, labels in boxes for label in labels}
        assert found == {
            (*map(float, row[2:6]), int(row[6]))
            for row in rows
            if (row[0], int(row[1])) == (name, timestamp)
        }


@pytest.mark.parametrize('part', PARTS)
def test_predicted_boxes(mmaction2, written, part):
    """They are the proposals that MMAction2 keeps."""
    proposals = load(mmaction2.root / PARTS[part][1])
    for name, second, _, boxes in keyframes(written, mmaction2.root, part, 'val'):
        key = f'{name[:11]},{original(name, second):04d}'
        found = proposals.get(key, [[0, 0, 1, 1, 1]])
        kept = [list(box[:4]) for box in found if box[4] >= min(0.9, max(box[4] for box in found))]
        assert sorted(box for box, _ in boxes) == sorted(kept)


def test_the_files_that_slowfasts_meter_opens_are_there(mmaction2, written):
    settings = vars(config_of(written, mmaction2.root, 'val').AVA)
    for name in 'LABEL_MAP_FILE', 'EXCLUSION_FILE', 'GROUNDTRUTH_FILE':
        assert (written / settings[name]).exists()
