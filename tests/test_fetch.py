"""Step 6: real detections of a real detector, equal to what mmdet gives frame by frame."""

import functools
import http.server
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import sys
import threading
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import cv2
import draw
import numpy as np
import pytest
import torch
from helpers import (
    FRAME_SIZES,
    KEYFRAME,
    REPO,
    TINY,
    Evil,
    assert_same_people,
    errors,
    here,
    kill_tree,
    load,
    overlap,
    read_csv,
    read_report,
    refused,
    snapshot,
    stopped_at,
    wait_until,
    write_detector_class,
    write_root,
)
from mmengine import Config
from mmengine.structures import InstanceData

import fetch_proposal

FRAMES = 'kinetics_proposal.pkl.frames.jsonl'
NOTHING = 'frames to detect: 0, '


def fetch(root, *options, **kwargs):
    return here('fetch_proposal.py', f'--avakinetics_root={root}', *TINY, *options, **kwargs)


SCENES = 40


def keyframe_of(clip: str, timestamp: int = 12) -> fetch_proposal.Keyframe:
    return fetch_proposal.Keyframe(fetch_proposal.parse_clip(clip), timestamp)


def digest_of(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope='module')
def fetched(common):
    """Forty clips of one annotated keyframe each, detected, and what the run said."""

    def make(folder):
        root = write_root(folder / 'root', range(SCENES))
        (folder / 'said.txt').write_text(fetch(root).stdout)

    folder = common('fetched', make)
    return folder / 'root', (folder / 'said.txt').read_text()


@pytest.fixture(scope='module')
def small(common):
    """Eight clips, 24 frames, for what needs several runs."""
    return (
        common('fetched small', lambda folder: fetch(write_root(folder / 'root', range(8))))
        / 'root'
    )


def test_keys_are_the_keyframes_and_their_neighbours(fetched):
    root, said = fetched
    proposals = load(root / 'kinetics_proposal.pkl')
    assert proposals.keys() == {
        f'scene-{scene:05d},{second:04d}' for scene in range(SCENES) for second in (11, 12, 13)
    }
    assert '120 of 120 frames' in said and 'keyframes without a proposal: 0 of 40' in said
    for boxes in proposals.values():
        assert boxes.dtype == np.float64 and boxes.shape[1] == 5
        assert boxes.min() >= 0 and boxes.max() <= 1 and (boxes[:, 4] > 0.7).all()
    assert b'numpy._core' not in (root / 'kinetics_proposal.pkl').read_bytes()


def test_neighbours_outside_the_clip_are_left_out(tmp_path):
    root = write_root(tmp_path, [0])
    text = (root / 'kinetics_train.csv').read_text()
    (root / 'kinetics_train.csv').write_text(text.replace(',12,0', ',10,0'))
    fetch(root)
    assert load(root / 'kinetics_proposal.pkl').keys() == {'scene-00000,0010', 'scene-00000,0011'}


def test_the_drawn_people_are_found(fetched):
    proposals, good = load(fetched[0] / 'kinetics_proposal.pkl'), 0
    for scene in range(SCENES):
        people = draw.figure_boxes(scene, 2, FRAME_SIZES[scene % 4])
        found = proposals[f'scene-{scene:05d},0012'][:, :4]
        good += len(found) == len(people) and (overlap(people, found).max(1) > 0.7).all()
    assert good >= 0.95 * SCENES


def brute_force_recall(rows: list[str], proposals: dict, least: float) -> tuple[int, int]:
    """How many annotated boxes some proposal of their keyframe meets, and how many there are, pair
    by pair.
    """
    boxes, met = {tuple(row.split(',')[:6]) for row in rows}, 0
    for clip, second, *corners in boxes:
        x1, y1, x2, y2 = map(float, corners)
        for a1, b1, a2, b2, _ in proposals.get(f'{clip[:11]},{int(second):04d}', ()):
            both = max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1))
            if both / ((x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - both) >= least:
                met += 1
                break
    return met, len(boxes)


def test_recall_is_that_of_a_loop_over_pairs(fetched, tmp_path, capsys):
    """On detections of the tiny detector, a third of which are moved until they match their people
    no more, or less well; of all, and of those that MMAction2 keeps.
    """
    root, _ = fetched
    rows = (root / 'kinetics_train.csv').read_text().splitlines()
    whole = load(root / 'kinetics_proposal.pkl')
    moved = {
        key: boxes + [(0, 0.03, 0.5)[index // 3 % 3], 0, (0, 0.03, 0.5)[index // 3 % 3], 0, 0]
        for index, (key, boxes) in enumerate(sorted(whole.items()))
    }
    unsure = {key: boxes - [0, 0, 0, 0, 0.2] for key, boxes in whole.items()}  # some below 0.9
    keyframes = fetch_proposal.read_datalist(root / 'kinetics_train.csv')
    for proposals in whole, moved, unsure, {}:
        fetch_proposal.report_recall(tmp_path / 'recall.csv', keyframes, proposals)
        kept = {
            key: boxes[boxes[:, 4] >= min(0.9, boxes[:, 4].max())]
            for key, boxes in proposals.items()
        }
        right = [
            brute_force_recall(rows, some, least)[0]
            for some in (proposals, kept)
            for least in (0.5, 0.75)
        ]
        count = len({tuple(row.split(',')[:6]) for row in rows})
        said = re.sub(' +', ' ', capsys.readouterr().out)
        shares = [f'{matched / count:.1%}' for matched in right]
        assert f' recall of {count} annotated boxes: IoU 0.5 0.75\n all proposals ' in said
        assert f' all proposals {shares[0]} {shares[1]}\n' in said
        assert f' those that MMAction2 keeps {shares[2]} {shares[3]}\n' in said
        header, *listed = read_csv(tmp_path / 'recall.csv')
        assert header == fetch_proposal.RECALL and len(listed) == SCENES
        assert [float(row[-1]) for row in listed] == sorted(float(row[-1]) for row in listed)
        assert [sum(int(row[index]) for row in listed) for index in (2, 4, 5, 6, 7)] == [
            count,
            *right,
        ]
    assert read_csv(root / 'reports/recall_train.csv')[0] == header


@pytest.mark.parametrize(
    'scores,kept', [([0.89, 0.91], 1), ([0.9, 0.9], 2), ([0.8, 0.89], 1), ([0.95, 0.99], 2)]
)
def test_mmaction2_keeps_what_scores_at_least_0_9_or_the_best(tmp_path, scores, kept):
    """Of two boxes with a proposal each."""
    boxes = [(0.1, 0.1, 0.4, 0.9), (0.6, 0.1, 0.9, 0.9)]
    people = np.array([[*box, score] for box, score in zip(boxes, scores)])
    keyframe = keyframe_of('aaaaaaaaaaa_000010_000014')
    proposals = {keyframe.key: people}
    fetch_proposal.report_recall(tmp_path / 'recall.csv', {keyframe: set(boxes)}, proposals)
    ((*_, matched, _, matched_kept, _, _),) = read_csv(tmp_path / 'recall.csv')[1:]
    assert (matched, matched_kept) == ('2', str(kept))
    assert keeps(people) == kept


def keeps(people: np.ndarray) -> int:
    """How many proposals MMAction2's data set keeps."""
    from mmaction.datasets import AVAKineticsDataset

    data = object.__new__(AVAKineticsDataset)
    data.proposals, data.person_det_score_thr = {'aaaaaaaaaaa,0012': people}, 0.9
    data.num_max_proposals, data.filename_tmpl = 1000, ''
    ann = dict(gt_bboxes=0, gt_labels=0, entity_ids=0)
    record = dict(img_key='aaaaaaaaaaa,0012', timestamp_start=0, ann=ann)
    data.serialize_data, data.data_list = False, [record]
    data.start_index = data.modality = data.num_classes = data.multi_class = 0
    data._fully_initialized = True
    return len(data.get_data_info(0)['proposals'])


@pytest.mark.parametrize(
    'matched,missed,empty,crowd,warned',
    [(80, 0, 20, 0, False), (79, 1, 20, 0, True), (79, 0, 21, 9, True), (80, 0, 20, 9, False)],
)
def test_proposals_that_hardly_match_are_warned_of(
    tmp_path, capsys, matched, missed, empty, crowd, warned
):
    """Fewer than 80 % of the boxes matched, or more than a fifth of the keyframes empty; the first
    keyframe may have a crowd of boxes more, all matched.
    """
    boxes, proposals = {}, {}
    for index in range(matched + missed + empty):
        boxes[keyframe_of(f'{index:011d}_000010_000014')] = {(0.1, 0.1, 0.5, 0.9)}
        left = 0.1 if index < matched else 0.6
        if index < matched + missed:
            proposals[f'{index:011d},0012'] = np.array([[left, 0.1, left + 0.4, 0.9, 0.95]])
    boxes[keyframe_of('00000000000_000010_000014')] |= {
        (0.1, 0.1, 0.5, 0.89 - i / 1000) for i in range(crowd)
    }
    warning = fetch_proposal.report_recall(tmp_path / 'recall.csv', boxes, proposals)
    said = capsys.readouterr().out
    assert bool(warning) == warned == ('  warning: proposals match' in said)
    if warned:
        assert warning in said
        assert all(cause in warning for cause in ('--score_thr', 'checkpoint', 'other videos'))


def test_frames_of_other_videos_are_warned_of(small, tmp_path):
    root = shutil.copytree(small, tmp_path / 'root')
    rows = (root / 'kinetics_train.csv').read_text().splitlines()
    moved = [row.split(',')[:2] + ['0.000', '0.000', '0.050', '0.050', '12', '-1'] for row in rows]
    (root / 'kinetics_train.csv').write_text(''.join(','.join(row) + '\n' for row in moved))
    assert '  warning: proposals match 0.0% of the annotated boxes' in fetch(root).stdout
    record = json.loads((root / 'reports/fetch_proposal_train.json').read_text())
    assert record['warning'].startswith('warning: proposals match 0.0%')
    shutil.copy(small / 'kinetics_train.csv', root / 'kinetics_train.csv')
    assert 'warning' not in fetch(root).stdout
    record = json.loads((root / 'reports/fetch_proposal_train.json').read_text())
    assert record['warning'] is None and record['unreadable'] == {}


def test_the_other_splits_pickle_is_not_overwritten(small, tmp_path):
    root = shutil.copytree(small, tmp_path / 'root')
    shutil.copy(root / 'kinetics_train.csv', root / 'kinetics_val.csv')
    before = snapshot(root)
    for name, other in ('val', 'kinetics_proposal'), ('train', 'kinetics_val_proposal'):
        options = f'--datalist={root}/kinetics_{name}.csv', f'--picklepath={root}/{other}.pkl'
        message = errors(fetch(root, *options, code=1))
        assert f'{other}.pkl belongs to the other split; set --picklepath to another' in message
    assert snapshot(root) == before


@pytest.fixture(scope='module')
def tiny():
    fetch_proposal.use_torchvision_operators()
    from mmdet.apis import init_detector

    return init_detector(
        f'{REPO}/tests/tiny_detector.py', f'{REPO}/tests/tiny_detector.pth', device='cpu'
    )


def test_boxes_are_those_of_inference_detector(fetched, tiny):
    from mmdet.apis import inference_detector

    root, proposals = fetched[0], load(fetched[0] / 'kinetics_proposal.pkl')
    for scene, second in itertools.product(range(SCENES), (1, 2, 3)):
        path = (
            root / f'rawframes/scene-{scene:05d}_000010_000014/img_{second * draw.FPS + 1:05d}.jpg'
        )
        result = inference_detector(tiny, str(path)).pred_instances.numpy()
        chosen = (result.labels == 0) & (result.scores > 0.7)
        width, height = FRAME_SIZES[scene % 4]
        expected = np.hstack(
            [
                np.clip(result.bboxes[chosen] / [width, height, width, height], 0, 1),
                result.scores[chosen, None],
            ]
        )
        found = proposals[f'scene-{scene:05d},00{10 + second}']
        assert_same_people(found, expected)


def test_second_run_changes_nothing(small, tmp_path):
    root = shutil.copytree(small, tmp_path / 'root')
    before = snapshot(root)
    assert NOTHING in fetch(root).stdout
    assert snapshot(root) == before
    record = json.loads((root / 'reports/fetch_proposal_train.json').read_text())
    assert record['proposals_sha256'] == digest_of(root / 'kinetics_proposal.pkl')
    assert record['datalist_sha256'] == digest_of(root / 'kinetics_train.csv')
    (root / 'kinetics_proposal.pkl').write_bytes(b'of another program')
    assert NOTHING in fetch(root).stdout and snapshot(root) == before


def test_what_a_kill_or_a_disk_has_spoilt_is_detected_again(small, tmp_path):
    """Of the file of detections the first half is whole: its frames are kept, and nothing else is
    believed.
    """
    root = shutil.copytree(small, tmp_path / 'root')
    lines = (root / FRAMES).read_text().splitlines(keepends=True)
    assert len(lines) == 26  # an empty one, the detector and 24 frames
    expected = load(root / 'kinetics_proposal.pkl')
    for spoilt in (
        lines[14][:40],
        '\0' * 100 + '\n' + lines[15],
        '[1, 2]\n' + lines[15],
        '{"key": 3}\n' + lines[15],
    ):
        (root / FRAMES).write_text(''.join(lines[:14]) + spoilt)
        assert 'frames to detect: 12, detected before: 12' in fetch(root).stdout
        for key, boxes in load(root / 'kinetics_proposal.pkl').items():
            assert_same_people(boxes, expected[key])
        assert NOTHING in fetch(root).stdout


def test_detectors_do_not_mix(tmp_path):
    """Another detector in between, and the first one's detections are still known."""
    root = write_root(tmp_path / 'root', range(2))
    fetch(root)
    before = (root / 'kinetics_proposal.pkl').read_bytes()
    other = torch.load(f'{REPO}/tests/tiny_detector.pth', weights_only=True)
    other['state_dict'] = {
        'module.' + name: value * (0 if 'fc_cls' in name else 1)  # saved by data parallel training
        for name, value in other['state_dict'].items()
    }
    torch.save(other, tmp_path / 'blind.pth')
    blind = TINY[0], f'--checkpoint={tmp_path}/blind.pth'
    done = here('fetch_proposal.py', f'--avakinetics_root={root}', *blind)
    assert ': 0, on 0 of 6 frames' in done.stdout and 'without a proposal: 2 of 2' in done.stdout
    assert load(root / 'kinetics_proposal.pkl') == {}
    assert NOTHING in fetch(root).stdout
    assert (root / 'kinetics_proposal.pkl').read_bytes() == before
    assert 'frames to detect: 6, detected before: 0' in fetch(root, '--amp').stdout
    assert 'frames to detect: 6, detected before: 0' in fetch(root, '--score_thr=0.3').stdout
    assert NOTHING in fetch(root, '--score_thr=0.5').stdout


def test_only_what_is_new_is_detected(tmp_path):
    """Neighbours, a longer list, a shorter one, changed frames."""
    root = write_root(tmp_path, range(3))
    table = (root / 'kinetics_train.csv').read_text()
    (root / 'kinetics_train.csv').write_text(
        ''.join(line for line in table.splitlines(True) if 'scene-00002' not in line)
    )
    assert 'frames to detect: 2, detected before: 0' in fetch(root, '--neighbors=0').stdout
    assert 'frames to detect: 4, detected before: 2' in fetch(root).stdout
    (root / 'kinetics_train.csv').write_text(table)
    assert 'frames to detect: 3, detected before: 6' in fetch(root).stdout
    whole = load(root / 'kinetics_proposal.pkl')
    (root / 'kinetics_train.csv').write_text(table.splitlines(True)[0])
    assert NOTHING in fetch(root).stdout
    assert load(root / 'kinetics_proposal.pkl').keys() == {
        f'scene-00000,00{second}' for second in (11, 12, 13)
    }
    (root / 'kinetics_train.csv').write_text(table)
    assert NOTHING in fetch(root).stdout
    assert load(root / 'kinetics_proposal.pkl').keys() == whole.keys()
    frame = root / f'rawframes/scene-00001_000010_000014/{KEYFRAME}'
    shutil.copy(root / f'rawframes/scene-00002_000010_000014/{KEYFRAME}', frame)
    assert 'frames to detect: 1, detected before: 8' in fetch(root).stdout
    changed = load(root / 'kinetics_proposal.pkl')
    assert {key for key in whole if not np.array_equal(whole[key], changed[key])} == {
        'scene-00001,0012'
    }
    found = overlap(changed['scene-00001,0012'][:, :4], whole['scene-00002,0012'][:, :4])
    assert found.shape[0] == found.shape[1] and (found.max(1) > 0.8).all()


def test_unreadable_frames_cost_themselves_only(small, tmp_path):
    root = shutil.copytree(small, tmp_path / 'root')
    frames = root / 'rawframes'
    (frames / f'scene-00000_000010_000014/{KEYFRAME}').unlink()
    whole = (frames / f'scene-00001_000010_000014/{KEYFRAME}').read_bytes()
    (frames / f'scene-00001_000010_000014/{KEYFRAME}').write_bytes(whole[: len(whole) // 2])
    (frames / f'scene-00002_000010_000014/{KEYFRAME}').write_bytes(b'no picture\xff\xd9')
    (root / FRAMES).unlink()
    done = fetch(root)
    assert read_report(root, 'fetch_proposal_train') == [
        [
            'scene-00000',
            '12',
            'unreadable frame: No such file or directory '
            f'rawframes/scene-00000_000010_000014/{KEYFRAME}',
        ],
        [
            'scene-00001',
            '12',
            f'unreadable frame: not a complete JPEG rawframes/scene-00001_000010_000014/{KEYFRAME}',
        ],
        [
            'scene-00002',
            '12',
            f'unreadable frame: broken JPEG rawframes/scene-00002_000010_000014/{KEYFRAME}',
        ],
    ]
    assert '21 of 24 frames' in done.stdout
    expected = load(small / 'kinetics_proposal.pkl')
    for key, boxes in load(root / 'kinetics_proposal.pkl').items():
        assert_same_people(boxes, expected[key])
    record = json.loads((root / 'reports/fetch_proposal_train.json').read_text())
    sizes = [
        os.path.getsize(frames / f'scene-0000{index}_000010_000014/{KEYFRAME}') for index in (1, 2)
    ]
    assert list(record['unreadable'].values()) == [0, *sizes]
    before = snapshot(root)
    again = fetch(root).stdout
    assert (
        'frames to detect: 3, detected before: 21' in again
        and '3 skipped: unreadable frame' in again
    )
    (root / FRAMES).unlink()  # the detector's name stands there once more
    before.pop(FRAMES)
    assert snapshot(root) == before
    shutil.copy(small / FRAMES, root / FRAMES)
    for scene in range(3):
        name = f'rawframes/scene-{scene:05d}_000010_000014/{KEYFRAME}'
        shutil.copy(small / name, root / name)
    fetch(root)
    mended = load(root / 'kinetics_proposal.pkl')
    assert mended.keys() == expected.keys()
    for key, boxes in mended.items():
        assert_same_people(boxes, expected[key])


def test_a_failing_model_ends_the_run_and_what_was_found_stays(tmp_path, monkeypatch):
    """A head that breaks on tall pictures only; the same command continues."""
    root = write_root(tmp_path / 'root', range(3))
    config = write_detector_class(
        tmp_path,
        'FailingDetector',
        """
    def predict(self, inputs, samples, **kwargs):
        import os
        if samples[0].ori_shape == (240, 320) and not os.path.exists('mended'):
            raise RuntimeError('CUDA error: an illegal memory access')
        return super().predict(inputs, samples, **kwargs)
""",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = ['fetch_proposal.py', f'--avakinetics_root={root}', f'--config={config}', TINY[1]]
    assert 'the detector failed on scene-00002' in refused(*command)
    assert not (root / 'kinetics_proposal.pkl').exists()
    (tmp_path / 'mended').touch()
    assert '9 of 9 frames' in here(*command).stdout


def test_the_documented_config_is_mmdetections_model():
    fetch_proposal.use_torchvision_operators()
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()
    ours = Config.fromfile(f'{REPO}/X-101-64x4d-FPN.py')
    theirs = Config.fromfile(
        f'{mmdet.__path__[0]}/.mim/configs/cascade_rcnn/cascade-rcnn_x101-64x4d_fpn_1x_coco.py'
    )
    tensors = [
        {
            name: tuple(value.shape)
            for name, value in MODELS.build(config.model).state_dict().items()
        }
        for config in (ours, theirs)
    ]
    assert tensors[0] == tensors[1] and len(tensors[0]) == 670
    assert ours.test_dataloader.dataset.pipeline == theirs.test_dataloader.dataset.pipeline


def test_the_tiny_detector_is_of_the_documented_kind():
    tiny, documented = (
        Config.fromfile(REPO / name).model
        for name in ('tests/tiny_detector.py', 'X-101-64x4d-FPN.py')
    )
    assert (
        tiny.type == documented.type
        and len(tiny.roi_head.bbox_head) == len(documented.roi_head.bbox_head) == 3
    )
    assert {head.num_classes for head in tiny.roi_head.bbox_head} == {80}
    assert (REPO / 'tests/tiny_detector.pth').stat().st_size < 4 * 2**20


def test_errors_say_what_to_do_before_any_frame_is_read(fetched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    assert 'run Step 5' in errors(fetch(fetched[0], f'--datalist={tmp_path}/none.csv', code=1))

    def refusal(*options, root=fetched[0], config=TINY[0]):
        place = f'--avakinetics_root={root}', f'--picklepath={tmp_path}/none.pkl'
        return refused('fetch_proposal.py', *place, config, TINY[1], *options)

    datalist = f'--datalist={fetched[0]}/kinetics_train.csv'
    assert 'no frame could be read' in refusal(datalist, root=tmp_path)
    (tmp_path / 'empty.csv').touch()
    assert 'is empty' in refusal(f'--datalist={tmp_path}/empty.csv')
    (tmp_path / 'kinetics-700.csv').write_text(
        'label,youtube_id,time_start,time_end,split\nwaving,aaaaaaaaaaa,0,10,val\n'
    )
    assert 'was not written by Step 5' in refusal(f'--datalist={tmp_path}/kinetics-700.csv')
    assert 'set --config' in refusal('--config=none.py')
    (tmp_path / 'broken.py').write_text('model = dict(')
    assert 'is not a valid mmdetection config' in refusal(f'--config={tmp_path}/broken.py')
    assert 'set --checkpoint' in refusal('--checkpoint=none.pth')
    for wrong in tmp_path, fetched[0] / 'kinetics_train.csv':
        assert 'is a folder or the list; set --picklepath' in refusal(f'--picklepath={wrong}')
    for url in 'http://127.0.0.1:9/x.pth', 'http://127.0.0.1:9/a name.pth':
        assert 'cannot be downloaded' in refusal(f'--checkpoint={url}')
    whole, random = TINY[1].split('=')[1], np.random.default_rng(0)
    damaged = bytearray(Path(whole).read_bytes())
    for place in random.integers(0, len(damaged), 20_000):
        damaged[place] = 0
    for content in (
        b'',
        b'<title>404</title>',
        pickle.dumps(Evil()),
        bytes(damaged),
        Path(whole).read_bytes()[:-500],
    ):
        (tmp_path / 'bad.pth').write_bytes(content)
        assert 'damaged, not a checkpoint, or' in refusal(f'--checkpoint={tmp_path}/bad.pth')
    torch.save(Evil(), tmp_path / 'evil.pth')
    assert 'damaged, not a checkpoint, or' in refusal(f'--checkpoint={tmp_path}/evil.pth')
    assert not (tmp_path / 'pwned').exists()
    message = refusal(config=f'--config={REPO}/X-101-64x4d-FPN.py')
    assert 'does not fit the config' in message and 'backbone.' in message
    for option in ('--neighbors=-1', '--batch_size=0', '--score_thr=1', '--num_gpus=-1'):
        assert 'must be' in refusal(option)


def test_a_checkpoint_is_downloaded_once(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    data = Path(TINY[1].split('=')[1]).read_bytes()
    names = ['x.pth', f'x-{sha256(data).hexdigest()[:8]}.pth', 'x-00000000.pth']
    for name in names:
        (tmp_path / name).write_bytes(data)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f'http://127.0.0.1:{server.server_port}/'
        paths = [fetch_proposal.find_checkpoint(url + name) for name in names[:2]]
        with pytest.raises(
            SystemExit, match='cannot be downloaded'
        ):  # another file than its name says
            fetch_proposal.find_checkpoint(url + names[2])
    finally:
        server.shutdown()
    assert [path.read_bytes() for path in paths] == [data, data]
    assert [fetch_proposal.find_checkpoint(url + name) for name in names[:2]] == paths


def test_frames_detected_before_a_kill(tmp_path):
    """They are not detected again."""
    root, notes = write_root(tmp_path, range(12)), tmp_path / 'notes'
    program = (
        f'import sys; sys.path.insert(0, {str(REPO)!r}); import fetch_proposal; '
        'fetch_proposal.CPU_CHUNK = 4; fetch_proposal.main()'
    )
    command = [sys.executable, '-c', program, f'--avakinetics_root={root}', *TINY]
    with stopped_at(command, notes, r'open .*/scene-00009_.*\.jpg$') as process:
        wait_until(lambda: (root / FRAMES).read_text().count('people') >= 4, process)
        kill_tree(process)
    assert not (root / 'kinetics_proposal.pkl').exists()
    lines = (root / FRAMES).read_text().splitlines()
    kept = [json.loads(line) for line in lines[2:] if line.endswith('}')]
    assert 4 <= len(kept) < 30
    for person in kept[0]['people']:
        person[4] = 0.875  # a mark that only a detection which was kept can leave
    (root / FRAMES).write_text('\n'.join([*lines[:2], *map(json.dumps, kept), '{"torn']))
    assert f'frames to detect: {36 - len(kept)}, detected before: {len(kept)}' in fetch(root).stdout
    proposals = load(root / 'kinetics_proposal.pkl')
    assert len(proposals) == 36 and (proposals[kept[0]['key']][:, 4] == 0.875).all()


@pytest.mark.parametrize('size', [1, 32])
def test_batches_give_the_same_boxes(fetched, tmp_path, size):
    """Frames of four sizes: boxes and scores within 2e-3 of those frame by frame, the same set."""
    fetch(fetched[0], f'--picklepath={tmp_path}/batched.pkl', f'--batch_size={size}')
    batched, single = load(tmp_path / 'batched.pkl'), load(fetched[0] / 'kinetics_proposal.pkl')
    assert batched.keys() == single.keys()
    for key, boxes in batched.items():
        assert_same_people(boxes, single[key])


def test_a_list_that_changes_meanwhile(small, tmp_path, monkeypatch):
    """The record has the digest of the list that was read."""
    root, rows = shutil.copytree(small, tmp_path / 'root'), small / 'kinetics_train.csv'
    detect_missing = fetch_proposal.detect_missing

    def change(*arguments):
        (root / rows.name).write_bytes(rows.read_bytes() * 2)
        return detect_missing(*arguments)

    monkeypatch.setattr(fetch_proposal, 'detect_missing', change)
    fetch(root)
    record = json.loads((root / 'reports/fetch_proposal_train.json').read_text())
    assert record['datalist_sha256'] == digest_of(rows)


def test_neighbors_and_score_thr(fetched, tmp_path):
    root = shutil.copytree(fetched[0], tmp_path / 'root')
    fetch(root, f'--picklepath={tmp_path}/few.pkl', '--neighbors=0', '--score_thr=0.99')
    few, all_of_them = load(tmp_path / 'few.pkl'), load(fetched[0] / 'kinetics_proposal.pkl')
    assert few and few.keys() <= {f'scene-{scene:05d},0012' for scene in range(SCENES)}
    for key, boxes in few.items():
        assert_same_people(boxes, all_of_them[key][all_of_them[key][:, 4] > 0.99])


@pytest.fixture
def few(fetched):
    """Eight frames and how a detector runs on them."""
    keyframes = [keyframe_of(f'scene-{scene:05d}_000010_000014') for scene in range(0, 32, 4)]
    frames = fetch_proposal.plan_frames(keyframes, 0, fetched[0])
    return frames, options_of(fetched[0], frames)


def options_of(root, frames, **others) -> fetch_proposal.Options:
    config, checkpoint = (REPO / f'tests/tiny_detector.{suffix}' for suffix in ('py', 'pth'))
    options = fetch_proposal.Options(root, config, checkpoint, 0, 0.7, False, 8, tuple(frames))
    return options._replace(**others)


def assert_found(detections: list, fetched, frames) -> None:
    expected = load(fetched[0] / 'kinetics_proposal.pkl')
    assert {found.key for found in detections} == {frame.keyframe.key for frame in frames}
    for key, boxes, _ in detections:
        assert_same_people(boxes, expected[key])


def test_a_batch_that_does_not_fit_is_told(few, monkeypatch):
    def test_step(data):
        raise torch.cuda.OutOfMemoryError('out of memory')

    monkeypatch.setattr(fetch_proposal.start_detector(few[1])[0], 'test_step', test_step)
    with pytest.raises(fetch_proposal.DetectorError, match='OutOfMem.* a smaller --batch_size'):
        fetch_proposal.detect(*few)


def test_a_process_for_each_gpu_has_its_own(fetched, few, monkeypatch):
    """By the numbers in their names, which count on from pool to pool."""
    devices = []
    for name in 'SpawnProcess-4', 'SpawnProcess-5', 'SpawnProcess-6', 'MainProcess':
        monkeypatch.setattr(multiprocessing.current_process(), 'name', name)
        devices.append(fetch_proposal.choose_device(3))
    assert devices == ['cuda:1', 'cuda:2', 'cuda:0', 'cuda:0']
    assert fetch_proposal.choose_device(0) == 'cpu'


def test_several_processes_find_what_one_does(fetched, few):
    chunks = [few[0][first : first + 2] for first in range(0, 8, 2)]
    results = fetch_proposal.run_all(fetch_proposal.detect, chunks, few[1], 2, None)
    assert_found([found for _, result in results for found in result], fetched, few[0])


def test_a_frame_that_the_pipeline_refuses(tmp_path):
    """It costs itself only: OpenCV cannot resize an image of 3000x1."""
    root = write_root(tmp_path, range(2))
    cv2.imwrite(
        str(root / f'rawframes/scene-00001_000010_000014/{KEYFRAME}'),
        np.zeros((1, 3000, 3), np.uint8),
    )
    fetch(root)
    assert {'scene-00000,0012', 'scene-00001,0011'} <= load(root / 'kinetics_proposal.pkl').keys()
    (row,) = read_report(root, 'fetch_proposal_train')
    assert row[:2] == ['scene-00001', '12'] and row[2].startswith(
        'frame that the test pipeline cannot take: error: OpenCV'
    )


def test_what_the_cache_depends_on(tmp_path):
    """On the config and on the size of frames, not on their times: a plain copy has other times."""
    root, config = write_root(tmp_path / 'root', range(1)), tmp_path / 'config.py'
    options = [f'--avakinetics_root={root}', f'--config={config}', TINY[1]]
    for text, said in (
        ('', 'frames to detect: 3, detected before: 0'),
        ('', 'frames to detect: 0, detected before: 3'),
        ('model = dict(test_cfg=dict(rcnn=dict(max_per_img=50)))', 'frames to detect: 3'),
    ):
        config.write_text(f"_base_ = '{TINY[0].split('=')[1]}'\n{text}\n")
        assert said in here('fetch_proposal.py', *options).stdout
        for frame in root.glob('rawframes/*/*.jpg'):
            os.utime(frame)


def test_boxes_without_area_are_no_people():
    """Of NaN, as float16 may give, or in the padding beside the frame."""
    boxes = torch.tensor(
        [[10.0, 10, 50, 90], [float('nan'), 10, 50, 90], [210, 10, 250, 90], [10, -30, 50, -5]]
    )
    found = InstanceData(
        bboxes=boxes, scores=torch.full((4,), 0.9), labels=torch.zeros(4, dtype=int)
    )
    answer = SimpleNamespace(pred_instances=found, ori_shape=(100, 200))
    np.testing.assert_allclose(
        fetch_proposal.extract_people(answer, 0.7), [[0.05, 0.1, 0.25, 0.9, 0.9]], atol=1e-7
    )


def test_a_run_says_where_it_runs(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    for number, options in enumerate(([], ['--num_gpus=0'])):
        said = fetch(small, f'--picklepath={tmp_path}/{number}.pkl', *options).stdout
        assert ('no GPU is visible to PyTorch: the CPU is used' in said) == (not options)
    done = fetch(small, f'--picklepath={tmp_path}/2.pkl', '--num_gpus=2', code=1)
    assert 'GPUs visible to PyTorch: 0, not 2' in errors(done)


def test_a_device_that_finds_the_same_people_is_used(fetched, few, device):
    assert_found(fetch_proposal.detect(*few), fetched, few[0])


def test_first_frames_that_cannot_be_read_are_not_compared(fetched, few, device):
    gone = few[0][0]._replace(file='no-such-one')
    options = few[1]._replace(first_frames=(gone, gone))
    assert_found(fetch_proposal.detect(few[0], options), fetched, few[0])


def test_a_gpu_that_cannot_start_ends_the_run(few, device, monkeypatch):
    monkeypatch.setattr(fetch_proposal, 'choose_device', lambda num_gpus: 'cuda:7')
    with pytest.raises(fetch_proposal.DetectorError, match='cannot run'):
        fetch_proposal.detect(*few)


def test_the_validation_part_has_names_of_its_own(small, tmp_path):
    root = shutil.copytree(small, tmp_path / 'root')
    (root / 'kinetics_train.csv').rename(root / 'kinetics_val.csv')
    fetch(root, f'--datalist={root}/kinetics_val.csv')
    assert (
        load(root / 'kinetics_val_proposal.pkl').keys()
        == load(small / 'kinetics_proposal.pkl').keys()
    )
    for name in 'fetch_proposal_val', 'recall_val':
        assert (root / f'reports/{name}.csv').exists()
