"""Without raw frames, and the validation split: up to MMAction2's own data set and metric."""

import numpy as np
import pytest
from mmengine.registry import init_default_scope

import draw
import sample_world
from helpers import load, overlap, read_csv, documented_config

SCENES = {
    video: (number, start, size, fps)
    for number, (video, start, fps, size, _) in enumerate(
        (video for videos in sample_world.SCENES.values() for video in videos), 1
    )
}


def test_same_rows_and_same_proposals_as_from_frames(mmaction2):
    with_frames, without, said = mmaction2.root, mmaction2.without, mmaction2.notes['without']
    assert 'Kinetics clips: 10, AVA movies: 2; all complete' in said
    assert said.endswith('ready for training from the videos of Kinetics, see docs/small-disk.md\n')
    assert sorted(path.name for path in (without / 'rawframes').iterdir()) == sorted(
        sample_world.AVA_VIDEOS
    )
    for name in 'kinetics_train.csv', 'annotations/ava_train_v2.2.csv':
        assert (with_frames / name).read_bytes() == (without / name).read_bytes()
    ours, theirs = (load(root / 'kinetics_proposal.pkl') for root in (without, with_frames))
    assert ours.keys() == theirs.keys()
    for key, boxes in ours.items():
        assert (
            len(boxes) == len(theirs[key])
            and (overlap(boxes[:, :4], theirs[key][:, :4]).max(1) > 0.95).all()
        )


def records(config, monkeypatch, mmaction2):
    from mmaction.registry import DATASETS

    init_default_scope('mmaction')
    monkeypatch.chdir(mmaction2)
    return DATASETS.build(config)


def test_documented_config_trains_from_clips(mmaction2, monkeypatch, tmp_path):
    config = documented_config('docs/small-disk.md', 0, tmp_path)
    data = records(config.train_dataloader.dataset, monkeypatch, mmaction2.path)
    assert len(data) == 11 + 5
    for record in data:
        assert record['inputs'].shape[1] == 8 and len(record['data_samples'].gt_instances)


def test_windows_out_of_clips_show_the_right_moment(mmaction2, monkeypatch, tmp_path):
    config = documented_config('docs/small-disk.md', 0, tmp_path).train_dataloader.dataset.datasets[
        1
    ]
    config.pipeline = config.pipeline[:3]
    config.pipeline[1].test_mode = True
    for record in records(config, monkeypatch, mmaction2.path):
        scene, start, size, fps = SCENES[record['video_id'][:11]]
        rate = float(sample_world.Fraction(fps))
        number = draw.read_stamp(record['imgs'][4][..., ::-1])
        assert (
            abs(number / rate - (record['timestamp'] - start)) <= 0.5 / min(rate, draw.FPS) + 1e-6
        )
        people = draw.figure_boxes(scene, record['timestamp'] - start, size)
        height, width = record['imgs'][0].shape[:2]
        np.testing.assert_allclose(
            record['gt_bboxes'] / [width, height, width, height], people, atol=0.001
        )


def test_both_splits_live_side_by_side_and_avas_files_stay(mmaction2):
    root, notes = mmaction2.root, mmaction2.notes
    before, after = notes['after again'], notes['after validation']
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed <= {'reports/extract_rgb_frames.csv', 'report.html'}
    assert len(list((root / 'videos').iterdir())) == 20
    assert {
        'kinetics_val.csv',
        'kinetics_val_proposal.pkl',
        'annotations/ava_kinetics_val_v2.2.csv',
        'annotations/ava_kinetics_dense_proposals_val.pkl',
        'reports/cut_kinetics_val.csv',
        'reports/prepare_annotation_val.csv',
        'reports/fetch_proposal_val.csv',
    } <= after.keys() - before.keys()
    assert len(read_csv(root / 'annotations/ava_kinetics_val_v2.2.csv')) == 60 + len(
        read_csv(root / 'annotations/ava_val_v2.2.csv')
    )
    assert len(load(root / 'annotations/ava_kinetics_dense_proposals_val.pkl')) == 31 + 6


@pytest.mark.parametrize('number,count', [(0, 11 + 6), (1, 11)], ids=['both', 'kinetics'])
def test_mmaction2_scores_perfect_predictions_at_one(
    mmaction2, monkeypatch, tmp_path, number, count
):
    import torch
    from mmaction.evaluation import AVAMetric

    config = documented_config('docs/validation.md', number, tmp_path)
    data = records(config.val_dataloader.dataset, monkeypatch, mmaction2.path)
    assert len(data) == count
    evaluator = {key: value for key, value in config.val_evaluator.items() if key != 'type'}
    metric = AVAMetric(**evaluator)
    for record in data:
        sample = record['data_samples']
        assert record['inputs'].shape[1] == 8
        boxes = torch.as_tensor(sample.gt_instances.bboxes).float()
        height, width = sample.img_shape
        metric.process(
            None,
            [
                dict(
                    video_id=sample.video_id,
                    timestamp=sample.timestamp,
                    pred_instances=dict(
                        bboxes=boxes / torch.tensor([width, height, width, height]),
                        scores=torch.as_tensor(sample.gt_instances.labels).float(),
                    ),
                )
            ],
        )
    monkeypatch.chdir(tmp_path)
    metric.ann_file, metric.label_file = (
        str(mmaction2.path / path) for path in (metric.ann_file, metric.label_file)
    )
    metric.exclude_file = metric.exclude_file and str(mmaction2.path / metric.exclude_file)
    assert metric.compute_metrics(metric.results)['overall'] == pytest.approx(1)
