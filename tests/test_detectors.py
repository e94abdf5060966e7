"""Step 6 with detectors of every family, by torchvision's operators: the boxes of mmdet's
`inference_detector`.
"""

import sys
import types
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch

import draw
import fetch_proposal
from helpers import (
    FRAME_SIZES,
    REPO,
    TINY,
    load,
    overlap,
    refused,
    write_detector_class,
    write_root,
)

RESNET = """backbone=dict(_delete_=True, type='ResNet', depth=18, base_channels=16, num_stages=4,
                  out_indices=OUT, style='pytorch', norm_cfg=dict(type='BN'))"""
PIPELINE = """
test_pipeline = [
    dict(type='LoadImageFromFile'), RESIZE
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
"""
KEEP_RATIO = "dict(type='Resize', scale=(320, 192), keep_ratio=True),"
SQUEEZED = "dict(type='Resize', scale=(256, 224), keep_ratio=False),"
LETTERBOX = (
    KEEP_RATIO.replace('192', '320')
    + "dict(type='Pad', size=(320, 320), pad_val=dict(img=(114, 114, 114))),"
)
ALL = '(0, 1, 2, 3)'
ONE_LAYER = 'encoder=dict(num_layers=1), decoder=dict(num_layers=1)'
TWO_STAGES = """neck=dict(in_channels=[16, 32, 64, 128], out_channels=32),
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(bbox_roi_extractor=dict(out_channels=32),
                  bbox_head=dict(in_channels=32, fc_out_channels=64)MASK)"""
MASK = """, mask_roi_extractor=dict(out_channels=32),
        mask_head=dict(in_channels=32, conv_out_channels=32, num_convs=1)"""
ONE_STAGE = (
    'neck=dict(in_channels=[16, 32, 64, 128], out_channels=32), '
    'bbox_head=dict(in_channels=32, feat_channels=32)'
)
THIN = (
    'backbone=dict(deepen_factor=0.33, widen_factor=0.125, init_cfg=None), '
    'neck=dict(in_channels=[32, 64, 128], out_channels=32, num_csp_blocks=1), '
    'bbox_head=dict(in_channels=32, feat_channels=32)'
)
# family -> mmdetection's config, what is made smaller, how frames are resized, the class layer
FAMILIES = {
    'Faster R-CNN': (
        'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        f'{RESNET}, {TWO_STAGES}'.replace('OUT', ALL).replace('MASK', ''),
        KEEP_RATIO,
        'fc_cls',
    ),
    'Mask R-CNN': (
        'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
        f'{RESNET}, {TWO_STAGES}'.replace('OUT', ALL).replace('MASK', MASK),
        KEEP_RATIO,
        'fc_cls',
    ),
    'RetinaNet': (
        'retinanet/retinanet_r50_fpn_1x_coco.py',
        f'{RESNET}, {ONE_STAGE}'.replace('OUT', ALL),
        SQUEEZED,
        'retina_cls',
    ),
    'FCOS': (
        'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
        f'{RESNET}, {ONE_STAGE}'.replace('OUT', ALL),
        KEEP_RATIO,
        'conv_cls',
    ),
    'YOLOX': ('yolox/yolox_s_8xb8-300e_coco.py', THIN, LETTERBOX, 'multi_level_conv_cls'),
    'RTMDet': ('rtmdet/rtmdet_s_8xb32-300e_coco.py', THIN, LETTERBOX, 'rtm_cls'),
    'DETR': (
        'detr/detr_r50_8xb2-150e_coco.py',
        f'{RESNET}, neck=dict(in_channels=[128]), {ONE_LAYER}'.replace('OUT', '(3, )'),
        KEEP_RATIO,
        'fc_cls',
    ),
    'DINO': (
        'dino/dino-4scale_r50_8xb2-12e_coco.py',
        f'{RESNET}, {ONE_LAYER}, neck=dict(in_channels=[32, 64, 128]), num_queries=60'.replace(
            'OUT', '(1, 2, 3)'
        ),
        KEEP_RATIO,
        'cls_branches',
    ),
}
CLASSES = 80
CANDIDATES = 40  # of a picture that score more than 0.05 before suppression


def write_detector(folder, family: str) -> list[str]:
    """A small detector with random weights: its options. Neither its boxes nor its scores tie."""
    base, smaller, resize, classes = FAMILIES[family]
    (folder / 'config.py').write_text(
        f"_base_ = 'mmdet::{base}'\nmodel = dict({smaller})\n" + PIPELINE.replace('RESIZE', resize)
    )
    fetch_proposal.use_torchvision_operators()
    from mmdet.apis import inference_detector, init_detector

    torch.manual_seed(0)
    model = init_detector(f'{folder}/config.py', device='cpu')
    for name, value in model.state_dict().items():
        if family == 'YOLOX' and 'stem' in name and name.endswith('conv.weight'):
            value /= 300  # it takes pictures of 0 to 255, which untrained layers make ever larger
        if name == 'level_embed':  # of DINO, which is not initialised
            value.normal_()
    picture = draw.draw_frame(0, 1, FRAME_SIZES[0])[0]
    layers = [
        module
        for name, module in model.named_modules()
        if classes in name and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    ]
    spread_scores(layers, lambda: inference_detector(model, picture))
    assert_nothing_ties(inference_detector(model, picture).pred_instances)
    torch.save(dict(state_dict=model.state_dict()), folder / 'weights.pth')
    return [f'--config={folder}/config.py', f'--checkpoint={folder}/weights.pth']


@torch.no_grad()
def spread_scores(layers: list, detect) -> None:
    """Scale the layers that tell classes, so that people score 0.05 to 0.9 and others less.

    Else random weights make scores that lie all at 0.5, or all at 1.
    """
    seen = []

    def note(layer, _, answer):
        channels = answer.movedim(1, -1) if isinstance(layer, torch.nn.Conv2d) else answer
        seen.append(channels.reshape(-1, CLASSES + layer_has_background(layer))[:, 0])

    hooks = [layer.register_forward_hook(note) for layer in layers]
    detect()
    for hook in hooks:
        hook.remove()
    logits = torch.cat(seen).sort(descending=True).values
    low, high = torch.logit(torch.tensor([0.05, 0.9]))
    factor = (high - low) / (logits[0] - logits[CANDIDATES])
    for layer in layers:
        count = CLASSES + layer_has_background(layer)
        weight, bias = (
            layer.weight.view(-1, count, *layer.weight.shape[1:]),
            layer.bias.view(-1, count),
        )
        weight[:, 0] *= factor
        bias[:, 0] = bias[:, 0] * factor + high - factor * logits[0]
        weight[:, 1], bias[:, 1] = weight[:, 0], bias[:, 0] - 1  # a class that Step 6 passes over
        weight[:, 2:], bias[:, 2:] = 0, -20
        if layer_has_background(layer):
            bias[:, -1] = 0


def layer_has_background(layer) -> bool:
    """Whether the last of its classes is the background, as where scores are a softmax."""
    return layer.weight.shape[0] == CLASSES + 1


def assert_nothing_ties(found) -> None:
    """Rounding that differs from CPU to CPU, some 1e-6, must not decide on what is found."""
    people = found[(found.labels == 0) & (found.scores > 0.15)]  # the tests ask for 0.2
    scores, boxes = people.scores.double().sort().values, people.bboxes.double()
    assert len(people) >= 4 and scores.diff().min() > 1e-4
    between = (boxes[:, None] - boxes[None]).abs().amax(-1) + torch.eye(len(boxes)) * 1e6
    assert between.min() > 1e-2


def detected_by_mmdet(folder, root, score_thr: float) -> dict[str, np.ndarray]:
    """Boxes of a plain loop over `inference_detector`, as Step 6 writes them."""
    from mmdet.apis import inference_detector, init_detector

    model, found = init_detector(f'{folder}/config.py', f'{folder}/weights.pth', device='cpu'), {}
    for path in sorted(root.glob('rawframes/*/*.jpg')):
        result = inference_detector(model, str(path))
        people, (height, width) = result.pred_instances.cpu().numpy(), result.ori_shape
        people = people[(people.labels == 0) & (people.scores > score_thr)]
        second = 10 + int(path.stem[4:]) // draw.FPS
        if len(people) and second != 10:
            boxes = np.clip(people.bboxes / [width, height, width, height], 0, 1)
            inside = (boxes[:, :2] < boxes[:, 2:]).all(axis=1)  # not in the padding
            found[f'{path.parent.name[:11]},{second:04d}'] = np.column_stack(
                [boxes, people.scores]
            )[inside]
    return found


def assert_same_boxes(ours: dict, theirs: dict, score_thr: float) -> int:
    """Every box has a counterpart within 1e-3, but those whose score is at the threshold; says how
    many there are.
    """
    count = 0
    for key in ours.keys() | theirs.keys():
        a, b = (found.get(key, np.empty((0, 5))) for found in (ours, theirs))
        for first, second in (a, b), (b, a):
            for box in first[first[:, 4] > score_thr + 1e-3]:
                assert len(second) and abs(second - box).max(1).min() < 1e-3, (key, box)
                count += 1
    return count // 2


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_root(tmp_path_factory.mktemp('frames'), range(4))


@pytest.mark.parametrize('family', FAMILIES)
def test_every_family_gives_the_boxes_of_inference_detector(root, tmp_path, family):
    """In batches, without any operator compiled by mmcv."""
    options = write_detector(tmp_path, family)
    fetch_proposal.main(
        [
            f'--avakinetics_root={root}',
            f'--picklepath={tmp_path}/found.pkl',
            '--score_thr=0.2',
            *options,
        ]
    )
    found = load(tmp_path / 'found.pkl')
    assert assert_same_boxes(found, detected_by_mmdet(tmp_path, root, 0.2), 0.2) >= 10
    assert len({round(box[4], 3) for boxes in found.values() for box in boxes}) >= 5


def fetch_refused(root, tmp_path, *options) -> str:
    fetch_proposal.start_detector.cache_clear()
    place = f'--avakinetics_root={root}', f'--picklepath={tmp_path}/none.pkl'
    return refused('fetch_proposal.py', *place, *options)


def operators():
    """The module that stands in the place of mmcv's compiled one."""
    fetch_proposal.use_torchvision_operators()
    return sys.modules['mmcv._ext']


def test_an_operator_that_the_device_lacks(root, tmp_path, monkeypatch, device):
    """The run ends before it starts."""

    def missing(*args, **options):
        raise RuntimeError('nms_impl: implementation for device cuda:0 not found.\n')

    monkeypatch.setattr(operators(), 'nms', missing)
    message = fetch_refused(root, tmp_path, *TINY)
    assert (
        'cannot run: RuntimeError: nms_impl: implementation for device cuda:0 not found' in message
    )


def test_a_device_that_finds_other_people(root, tmp_path, monkeypatch, device):
    """The run ends before it starts."""
    predict = fetch_proposal.predict
    calls = []

    def shifted(model, batch, device, amp):
        answers = predict(model, batch, device, amp)
        calls.append(device)
        if device == 'cpu:0':
            answers[0].pred_instances.bboxes += 30
        return answers

    monkeypatch.setattr(fetch_proposal, 'predict', shifted)
    assert 'cpu:0 and the CPU disagree on the first frames' in fetch_refused(root, tmp_path, *TINY)
    assert calls == ['cpu'] * 3 + ['cpu:0'] * 3 and not (tmp_path / 'none.pkl').exists()
    fetch_proposal.start_detector.cache_clear()
    monkeypatch.setattr(fetch_proposal, 'MAX_BOX_SHIFT', 0.2)  # the check is what refused it
    fetch_proposal.main([f'--avakinetics_root={root}', f'--picklepath={tmp_path}/found.pkl', *TINY])


@pytest.mark.parametrize(
    'extra,operator',
    [
        (
            "backbone=dict(depth=50, dcn=dict(type='DCNv2', deform_groups=1), "
            'stage_with_dcn=(False, True, True, True)), '
            'neck=dict(in_channels=[64, 128, 256, 512])',
            'modulated_deform_conv_forward',
        ),
        ("test_cfg=dict(rcnn=dict(nms=dict(type='soft_nms')))", 'softnms'),
    ],
)
def test_a_detector_that_needs_a_built_mmcv_says_so(root, tmp_path, extra, operator):
    (tmp_path / 'config.py').write_text(
        f"_base_ = '{REPO}/tests/tiny_detector.py'\nmodel = dict({extra})\n"
    )
    fetch_proposal.use_torchvision_operators()
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()
    model = MODELS.build(fetch_proposal.load_config(tmp_path / 'config.py', True).model)
    known = (
        {}
        if 'dcn' in extra
        else torch.load(f'{REPO}/tests/tiny_detector.pth', weights_only=True)['state_dict']
    )
    torch.save({**model.state_dict(), **known}, tmp_path / 'weights.pth')
    message = fetch_refused(
        root, tmp_path, f'--config={tmp_path}/config.py', f'--checkpoint={tmp_path}/weights.pth'
    )
    assert f"mmcv's compiled operator {operator}; install" in message


def test_a_built_mmcv_keeps_its_own_operators(monkeypatch):
    operators()
    import mmcv
    import mmcv.ops  # noqa: F401, which would bind the stand-in below for ever

    built = types.ModuleType('mmcv._ext')
    built.__spec__ = ModuleSpec('mmcv._ext', None)
    monkeypatch.setitem(sys.modules, 'mmcv._ext', built)
    monkeypatch.setattr(mmcv, '_ext', built, raising=False)
    fetch_proposal.use_torchvision_operators()
    assert sys.modules['mmcv._ext'] is built and not hasattr(built, 'nms')


def test_operators_that_there_are_not_say_so():
    with pytest.raises(NotImplementedError, match='operator softnms; install'):
        operators().softnms()


def test_deformable_attention_on_a_gpu_is_pytorchs(root):
    operators()
    from mmcv.ops.multi_scale_deform_attn import (
        MultiScaleDeformableAttnFunction,
        multi_scale_deformable_attn_pytorch,
    )

    random = torch.Generator().manual_seed(0)
    shapes = torch.tensor([[6, 8], [3, 4]])
    value, points = (
        torch.rand(2, 60, 4, 8, generator=random),
        torch.rand(2, 5, 4, 2, 3, 2, generator=random),
    )
    weights = torch.rand(2, 5, 4, 2, 3, generator=random)
    found = MultiScaleDeformableAttnFunction.apply(
        value, shapes, torch.tensor([0, 48]), points, weights, 64
    )
    assert torch.equal(found, multi_scale_deformable_attn_pytorch(value, shapes, points, weights))


def bilinear(picture: np.ndarray, y: float, x: float) -> np.ndarray:
    """The value of a picture (C, H, W) at a point; outside by more than one pixel it is 0."""
    height, width = picture.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return np.zeros(len(picture))
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    down, right = min(top + 1, height - 1), min(left + 1, width - 1)
    return (1 - y + top) * (
        (1 - x + left) * picture[:, top, left] + (x - left) * picture[:, top, right]
    ) + (y - top) * ((1 - x + left) * picture[:, down, left] + (x - left) * picture[:, down, right])


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_mmcvs_operators_are_what_they_are_defined_to_be(layout):
    """RoIAlign and NMS as mmcv calls them, against plain loops."""
    operators()
    from mmcv.ops import nms, roi_align

    random = np.random.default_rng(0)
    features = random.random((2, 3, 12, 16)).astype(np.float32)
    rois = np.array(
        [
            [index % 2, *(corner := random.random(2) * 20), *(corner + 4 + random.random(2) * 30)]
            for index in range(6)
        ],
        np.float32,
    )
    found = roi_align(
        torch.from_numpy(features).to(memory_format=layout), torch.from_numpy(rois), (3, 2), 0.5, 2
    ).numpy()
    for (index, x1, y1, x2, y2), pooled in zip(rois, found):
        left, top, cell_w, cell_h = x1 / 2 - 0.5, y1 / 2 - 0.5, (x2 - x1) / 2 / 2, (y2 - y1) / 2 / 3
        for row in range(3):
            for column in range(2):
                samples = [
                    bilinear(
                        features[int(index)],
                        top + (row + dy) * cell_h,
                        left + (column + dx) * cell_w,
                    )
                    for dy in (0.25, 0.75)
                    for dx in (0.25, 0.75)
                ]
                np.testing.assert_allclose(
                    pooled[:, row, column], np.mean(samples, axis=0), atol=1e-5
                )
    corners = random.random((80, 2)) * 50
    boxes, scores = (
        np.hstack([corners, corners + 5 + random.random((80, 2)) * 40]).astype(np.float32),
        random.random(80),
    )
    for offset in 0, 1:
        reach = boxes + np.array([0, 0, offset, offset])
        kept = []
        for candidate in scores.argsort()[::-1]:
            if not kept or overlap(reach[[candidate]], reach[kept]).max() <= 0.4:
                kept.append(candidate)
        assert (
            nms(torch.from_numpy(boxes), torch.from_numpy(scores).float(), 0.4, offset)[1].tolist()
            == kept
        )


def test_checkpoints_that_mmdet_loads(root, tmp_path):
    """Mean and std of the pictures, averaged weights beside the used ones, names of FCOS's first
    version.
    """
    options = write_detector(tmp_path, 'FCOS')
    fetch_proposal.main(
        [
            f'--avakinetics_root={root}',
            f'--picklepath={tmp_path}/plain.pkl',
            '--score_thr=0.2',
            *options,
        ]
    )
    weights = torch.load(tmp_path / 'weights.pth', weights_only=True)['state_dict']
    old = {name.replace('head.conv_', 'head.fcos_'): value for name, value in weights.items()}
    old |= {
        'data_preprocessor.mean': torch.zeros(3, 1, 1),
        'data_preprocessor.std': torch.ones(3, 1, 1),
        'ema_backbone_conv1_weight': torch.zeros(1),
    }
    assert {
        'bbox_head.fcos_cls.weight',
        'bbox_head.fcos_reg.bias',
        'bbox_head.fcos_centerness.weight',
    } <= old.keys()
    torch.save(
        dict(state_dict={'module.' + name: value for name, value in old.items()}),
        tmp_path / 'old.pth',
    )
    fetch_proposal.main(
        [
            f'--avakinetics_root={root}',
            f'--picklepath={tmp_path}/old.pkl',
            '--score_thr=0.2',
            options[0],
            f'--checkpoint={tmp_path}/old.pth',
        ]
    )
    assert (tmp_path / 'old.pkl').read_bytes() == (tmp_path / 'plain.pkl').read_bytes()
    for change, first in (
        ({'bbox_head.conv_cls.weight': None}, 'bbox_head.conv_cls.weight'),
        ({'backbone.layer9.conv.weight': torch.zeros(1)}, 'backbone.layer9.conv.weight'),
        ({'backbone.conv1.weight': torch.zeros(7, 3, 7, 7)}, 'backbone.conv1.weight'),
    ):
        other = {name: value for name, value in {**weights, **change}.items() if value is not None}
        torch.save(other, tmp_path / 'other.pth')
        message = fetch_refused(root, tmp_path, options[0], f'--checkpoint={tmp_path}/other.pth')
        assert f'does not fit the config: 1 tensors differ, first {first};' in message


def test_training_checkpoints(root, tmp_path):
    """They are refused; their weights alone are read.

    What mmengine's Runner writes while it trains holds objects beside the weights.
    """
    from mmengine.logging import MessageHub

    hub = MessageHub('training')
    hub.update_scalar('train/loss', 0.5)
    weights = torch.load(f'{REPO}/tests/tiny_detector.pth', weights_only=True)
    everything = {**weights, 'message_hub': hub.state_dict()}
    torch.save(everything, tmp_path / 'epoch_1.pth')
    message = fetch_refused(root, tmp_path, TINY[0], f'--checkpoint={tmp_path}/epoch_1.pth')
    assert 'epoch_1.pth is damaged, not a checkpoint, or holds more than weights' in message
    assert message.endswith('if it is your own, save its state_dict alone')
    fetch_proposal.main([f'--avakinetics_root={root}', f'--picklepath={tmp_path}/b.pkl', *TINY])
    # mmdet's publish_model.py writes PyTorch's old format
    torch.save(weights['state_dict'], tmp_path / 'w.pth', _use_new_zipfile_serialization=False)
    options = TINY[0], f'--checkpoint={tmp_path}/w.pth'
    fetch_proposal.main([f'--avakinetics_root={root}', f'--picklepath={tmp_path}/w.pkl', *options])
    assert (tmp_path / 'w.pkl').read_bytes() == (tmp_path / 'b.pkl').read_bytes()


def test_a_config_without_test_cfg(root, tmp_path, monkeypatch):
    """DETR's has none; for others it may be given to the heads."""
    config = write_detector_class(
        tmp_path,
        'DetectorWithoutTestCfg',
        """
    def __init__(self, test_cfg=None, **options):
        from mmengine.config import ConfigDict
        rpn = dict(nms_pre=300, max_per_img=100, min_bbox_size=0,
                   nms=dict(type='nms', iou_threshold=0.7))
        rcnn = dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
        super().__init__(test_cfg=ConfigDict(rpn=rpn, rcnn=rcnn), **options)
""",
        ', test_cfg=None',
    )
    monkeypatch.syspath_prepend(tmp_path)
    fetch_proposal.main(
        [
            f'--avakinetics_root={root}',
            f'--picklepath={tmp_path}/a.pkl',
            TINY[1],
            f'--config={config}',
        ]
    )
    fetch_proposal.main([f'--avakinetics_root={root}', f'--picklepath={tmp_path}/b.pkl', *TINY])
    assert (tmp_path / 'a.pkl').read_bytes() == (tmp_path / 'b.pkl').read_bytes()


def test_mixed_precision_moves_boxes_a_little(root, tmp_path):
    for name, options in ('full', ()), ('half', ('--amp',)):
        fetch_proposal.main(
            [f'--avakinetics_root={root}', f'--picklepath={tmp_path}/{name}.pkl', *TINY, *options]
        )
    full, half = load(tmp_path / 'full.pkl'), load(tmp_path / 'half.pkl')
    shifts = [
        abs(half[key] - person).max(axis=1).min()
        for key, people in full.items()
        for person in people[people[:, 4] > 0.8]
    ]
    assert 1e-5 < max(shifts) < 0.02
