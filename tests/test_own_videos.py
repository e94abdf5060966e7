"""docs/own-videos.md, as it stands: from three videos and a csv to a training run, without AVA."""

import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from mmengine.registry import init_default_scope

import draw
import sample_world
from helpers import (
    REPO,
    TINY,
    annotation_rows,
    clip_frames,
    cut,
    documented_config,
    here,
    load,
    numbered_source,
    prepare,
    read_csv,
    run,
)
from test_training import build, importable_models, shrink  # noqa: F401, a fixture

PAGE = 'docs/own-videos.md'
IDS = ['a', '-kitchen_1', 'x_y-z_0-9A_', '__front-door', '_' * 64]
SIZE = (160, 120)


def commands(heading: str) -> list[str]:
    section = (REPO / PAGE).read_text().split(heading)[1]
    return re.search(r'^```shell\n(.*?)^```', section, re.M | re.S)[1].splitlines()


@pytest.fixture(scope='module')
def own(common):
    """A working directory with videos, annotations and data/own, made by the page's commands."""

    def make(folder):
        (folder / 'videos').mkdir()
        (folder / 'annotations').mkdir()
        rows = ''
        for scene, video_id in enumerate(IDS):
            frames = (
                draw.draw_frame(scene, n / draw.FPS, SIZE, n)[0] for n in range(10 * draw.FPS)
            )
            path = folder / f'videos/{video_id}_000000_000010.mp4'
            draw.encode_plain(path, frames, draw.FPS, SIZE)
            for box in draw.figure_boxes(scene, 5, SIZE):
                corners = ','.join(f'{value:.3f}' for value in box)
                rows += f'{video_id},5,{corners},1\n{video_id},5,{corners},{2 + scene % 2}\n'
        for split in 'train', 'val':
            (folder / f'annotations/kinetics_{split}_v1.0.csv').write_text(rows)
        labels = ''.join(f'item {{\n  name: "{n}"\n  id: {n}\n}}\n' for n in (1, 2, 3))
        (folder / 'annotations/labels.pbtxt').write_text(labels)
        environment = os.environ | {'VIDEOS': str(folder / 'videos')}
        for command in commands('## 1. Name'):
            subprocess.run(command, shell=True, check=True, cwd=folder, env=environment)
        for command in commands('## 3. Run'):
            command = command.replace('$VIDEOS', 'videos').replace('$ROOT', 'data/own')
            script, *options = command.split()[1:]
            here(script, *options, *(TINY if 'fetch' in script else []), cwd=folder)

    return common('own', make)


def test_videos_of_any_name_are_prepared(own):
    assert [len(video_id) for video_id in IDS] == [1, 10, 11, 12, 64]
    root = own / 'data/own'
    names = {f'{video_id}_000003_000007' for video_id in IDS}
    assert {path.stem for path in (root / 'videos').glob('*.mp4')} == names
    for split, infix in ('train', ''), ('val', '_val'):
        assert {row[0] for row in read_csv(root / f'kinetics_{split}.csv')} == names
        keys = {f'{video_id},{second:04d}' for video_id in IDS for second in (4, 5, 6)}
        assert load(root / f'kinetics{infix}_proposal.pkl').keys() == keys


@pytest.fixture
def config(own, monkeypatch, tmp_path):
    monkeypatch.chdir(own)
    config = documented_config(PAGE, 0, tmp_path)
    config.merge_from_dict(
        {
            f'{name}.label_file': 'annotations/labels.pbtxt'
            for name in ('train_dataloader.dataset', 'val_dataloader.dataset', 'val_evaluator')
        }
    )
    config.test_dataloader = config.val_dataloader
    config.test_evaluator = config.val_evaluator
    return config


def test_mmaction2_reads_them(own, config):
    """By the page's own loop over its loader; each record has its video's boxes and proposals."""
    init_default_scope('mmaction')
    block = re.findall(r'^```python\n(.*?)^```', (REPO / PAGE).read_text(), re.M | re.S)[1]
    config.dump(own / 'own.py')
    found = {}
    exec(block, found)
    dataset = found['dataset']
    assert len(dataset) == len(IDS)
    for index in range(len(IDS)):
        data = dataset.get_data_info(index)
        scene = [f'{video_id}_000003_000007' for video_id in IDS].index(data['video_id'])
        right = draw.figure_boxes(scene, 5, SIZE)
        np.testing.assert_allclose(data['gt_bboxes'], right, atol=0.001)
        assert len(data['proposals']) == len(right)
        assert data['gt_labels'].sum(0).astype(bool).tolist() == [
            False,
            True,
            scene % 2 == 0,
            scene % 2 == 1,
        ]


def test_mmaction2_trains_on_them(own, config, monkeypatch, tmp_path):
    monkeypatch.setattr(type(config), 'pretty_text', '')
    runner = build(shrink(config, tmp_path / 'work'))
    runner.train()
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(losses) == 3 * 2 and all(0 < loss < 100 for loss in losses)
    if hasattr(np, 'NAN'):  # which AVAMetric needs
        assert 0 <= runner.test()['mAP/overall'] <= 1


def test_step_7_joins_them_with_ava(own, tmp_path):
    root = shutil.copytree(own / 'data/own', tmp_path / 'root')
    sample_world.draw_ava(tmp_path)
    shutil.copytree(tmp_path / 'data/ava/annotations', root / 'annotations')
    run('merge_annotations.py', f'--avakinetics_root={root}')
    place = f'--avakinetics_root={root}', f'--ava_root={tmp_path}/data/ava'
    said = run('softlink_ava.py', *place).stdout
    assert f'Training: Kinetics clips: {len(IDS)}, AVA movies: 2; all complete' in said
    assert said.endswith('\nready for training\n')
    page = (root / 'report.html').read_text()
    assert all(f'<figcaption>{video_id}_000003_000007, second 5' in page for video_id in IDS)


def test_keyframes_far_apart_go_into_separate_clips(world):
    """Of a video of 75 seconds, with keyframes at 3, 4 and 70."""
    variant = dict(seconds=75, fps=10)
    numbered_source(world / 'kinetics700/long_000100_000175.mp4', variant)
    (world / 'kinetics700/list.txt').write_text('long_000100_000175.mp4\n')
    rows = ''.join(annotation_rows('long', second) for second in (103, 104, 170))
    (world / 'ava_kinetics_v1_0/kinetics_train_v1.0.csv').write_text(rows)
    assert '2 new, 0 existing; they cover 3 of 3' in cut(world).stdout
    clips = sorted((world / 'root/videos').glob('*.mp4'))
    assert [clip.stem for clip in clips] == ['long_000101_000106', 'long_000168_000172']
    for clip, start in zip(clips, (1, 68)):
        numbers = clip_frames(clip)
        assert numbers[0] == start * 10 and numbers[2 * draw.FPS] == (start + 2) * 10
    assert 'for 3 of 3 annotated keyframes' in prepare(world).stdout


def test_actions_of_your_own_are_told(world):
    numbered_source(world / 'kinetics700/x_000000_000010.mp4', {})
    (world / 'kinetics700/list.txt').write_text('x_000000_000010.mp4\n')
    annotations = world / 'ava_kinetics_v1_0/kinetics_train_v1.0.csv'
    annotations.write_text('x,5,0.1,0.2,0.5,0.9,81\n')
    cut(world)
    assert 'actions above 80: MMAction2 needs num_classes and a label file' in prepare(world).stdout
    assert read_csv(world / 'root/kinetics_train.csv')[0][6] == '81'
