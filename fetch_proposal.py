#!/usr/bin/env python3
"""Step 6: detect the people on the annotated keyframes.

Reads ROOT/kinetics_train.csv and ROOT/rawframes, or ROOT/videos where a clip has no raw frames,
runs a person detector of mmdetection on every annotated keyframe and on the seconds before and
after it, and writes ROOT/kinetics_proposal.pkl: a dict with keys '<video_id>,<second:04d>' and
values float64 (n, 5) of x1, y1, x2, y2, score, relative to the frame, score > 0.7. A frame without
people has no key. Frames that could not be read are listed in
ROOT/reports/fetch_proposal_train.csv.

Detections are kept frame by frame in kinetics_proposal.pkl.frames.jsonl: run the same command again
to continue after an interruption, or one with a longer list to detect only what is new.

    python3 fetch_proposal.py --avakinetics_root=$MMACTION2/data/ava_kinetics \\
        --datalist=$MMACTION2/data/ava_kinetics/kinetics_train.csv \\
        --picklepath=$MMACTION2/data/ava_kinetics/kinetics_proposal.pkl
"""

import argparse
import csv
import fcntl
import functools
import hashlib
import importlib
import io
import json
import logging
import multiprocessing.connection
import os
import pickle
import re
import signal
import sys
import types
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from importlib.machinery import BuiltinImporter, ModuleSpec
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np
from tqdm import tqdm

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
CHECKPOINT = (
    'https://download.openmmlab.com/mmdetection/v2.0/cascade_rcnn/cascade_rcnn_x101_64x4d_fpn_1x_coco/'
    'cascade_rcnn_x101_64x4d_fpn_1x_coco_20200515_075702-43ce6a30.pth'
)
FPS = 30
PERSON = 0  # COCO's class
# share of annotated boxes below which the summary warns; AVA's own proposals reach 0.939
LOW_RECALL = 0.6
CHUNK = 512  # frames that a cluster's worker gets at once
# in which the check at the start looks for people, who score more than CLEAR_SCORE or --score_thr
FIRST_FRAMES = 8
CLEAR_SCORE = 0.5
# loaded frames that wait for others of their size: at most 0.8 GB, 3.2 MB each at 1333x800
MAX_WAITING = 256
CLIP_NAME = re.compile(r'(?P<id>[A-Za-z0-9_-]{11})_(?P<start>[0-9]{6})_(?P<end>[0-9]{6})')
# The largest differences from what the CPU finds in float32 that this check accepts: of boxes, as a
# fraction of the frame, and of scores. On 100 frames, the tests' detector with TF32 moves boxes by
# up to 0.004, float16 too, bfloat16 by up to 0.007, and scores by up to 0.002
MAX_BOX_SHIFT, MAX_SCORE_SHIFT = 0.05, 0.1


class DetectorError(Exception):
    """What keeps the detector from starting, as one line for the user."""


class UnreadableFrame(Exception):
    """Why a frame cannot be read, as the report has it."""


class Frame(NamedTuple):
    """A frame to detect people on: its key in the pickle, its clip, its second of the original
    video.
    """

    key: str
    clip: str
    second: int

    @property
    def index(self) -> int:
        """Its number in the clip, from 0."""
        return (self.second - int(self.clip[-13:-7])) * FPS


class Options(NamedTuple):
    """The data set, the detector and how it runs; `device` is '' where a cluster's worker chooses
    its own.
    """

    root: Path
    config: Path
    checkpoint: Path
    device: str
    score_thr: float
    amp: bool
    batch_size: int | None
    num_workers: int
    first_frames: tuple[Frame, ...]
    identity: str = (
        ''  # what `identify` says of config and checkpoint; '' where they need not stay the same
    )


def first_line(error: Exception) -> str:
    return f'{type(error).__name__}: {error}'.splitlines()[0]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Step 6: detect the people on the annotated keyframes.'
    )
    data = parser.add_argument_group('data')
    data.add_argument(
        '--avakinetics_root',
        type=Path,
        default=MMACTION2 / 'data/ava_kinetics',
        metavar='DIR',
        help='folder of the data set that is made (default: %(default)s)',
    )
    data.add_argument(
        '--split',
        choices=['train', 'val'],
        default='train',
        help='part of AVA-Kinetics (default: train)',
    )
    data.add_argument(
        '--datalist',
        type=Path,
        metavar='CSV',
        help='annotations written by Step 5 (default: ROOT/kinetics_train.csv, or ..._val.csv)',
    )
    data.add_argument(
        '--picklepath',
        type=Path,
        metavar='PKL',
        help='where the proposals go (default: ROOT/kinetics_proposal.pkl, or '
        '..._val_proposal.pkl)',
    )
    data.add_argument(
        '--neighbors',
        type=int,
        metavar='N',
        default=1,
        help='seconds before and after each keyframe that get proposals too: 1 as in '
        'MMAction2, 0 for '
        'all that its training reads, a third of the work (default: 1)',
    )
    data.add_argument('--overwrite', action='store_true', help='detect all frames again')
    detector = parser.add_argument_group('detector')
    detector.add_argument(
        '--config',
        type=Path,
        metavar='PY',
        default=Path(__file__).with_name('X-101-64x4d-FPN.py'),
        help='mmdetection config of the detector (default: X-101-64x4d-FPN.py beside this script)',
    )
    detector.add_argument(
        '--checkpoint',
        metavar='PTH',
        default=CHECKPOINT,
        help="file or URL of the detector's weights (default: %(default)s)",
    )
    detector.add_argument(
        '--score_thr',
        type=float,
        metavar='S',
        default=0.7,
        help='keep people who score more than S (default: %(default)s)',
    )
    detector.add_argument(
        '--amp', action='store_true', help='mixed precision: faster, and moves boxes a little'
    )
    running = parser.add_argument_group('running')
    running.add_argument(
        '--num_gpus',
        type=int,
        metavar='N',
        help='GPUs to use, 0 for the CPU (default: all visible ones)',
    )
    running.add_argument(
        '--batch_size',
        type=int,
        metavar='N',
        help='frames of equal size that the detector takes at once (default: 8 on a GPU, 4 '
        'on the CPU)',
    )
    running.add_argument(
        '--num_workers',
        type=int,
        metavar='N',
        default=4,
        help='threads that load frames, for each GPU (default: %(default)s)',
    )
    running.add_argument(
        '--dask_scheduler',
        metavar='ADDRESS',
        help='work on the Dask cluster of this scheduler, such as tcp://host:8786',
    )
    args = parser.parse_args(argv)
    if args.neighbors < 0 or (args.num_gpus or 0) < 0:
        sys.exit('error: --neighbors and --num_gpus must be 0 or more')
    if args.num_workers < 1 or args.batch_size is not None and args.batch_size < 1:
        sys.exit('error: --num_workers and --batch_size must be 1 or more')
    if not 0 <= args.score_thr < 1:
        sys.exit('error: --score_thr must be at least 0 and below 1')
    root, part = args.avakinetics_root, '' if args.split == 'train' else '_val'
    args.datalist = args.datalist or root / f'kinetics_{args.split}.csv'
    args.picklepath = args.picklepath or root / f'kinetics{part}_proposal.pkl'
    for name in (
        'avakinetics_root',
        'datalist',
        'picklepath',
        'config',
    ):  # a cluster's workers are in other folders
        setattr(args, name, getattr(args, name).absolute())
    return args


def read_datalist(path: Path):
    """The annotations as a DataFrame of clip, second, x1, y1, x2, y2, action, and report rows for
    unusable lines.
    """
    import pandas as pd

    names = ['clip', 'second', 'x1', 'y1', 'x2', 'y2', 'action']
    # without types, since one odd line must cost itself only; more columns than seven are not read
    try:
        table = pd.read_csv(
            path,
            header=None,
            names=names,
            usecols=range(7),
            dtype={'clip': str},
            na_filter=False,
            skip_blank_lines=False,
            quoting=csv.QUOTE_NONE,
            encoding='utf-8-sig',
            encoding_errors='replace',
            low_memory=False,
        )
    except ValueError:  # an empty file, or one with fewer columns
        table = pd.DataFrame(columns=names, dtype=str)
    table[names[1:]] = table[names[1:]].apply(pd.to_numeric, errors='coerce').astype(float)
    bounds = table['clip'].str.extract(f'^{CLIP_NAME.pattern}$')[['start', 'end']].astype(float)
    good = (
        np.isfinite(table[names[1:]]).all(axis=1)
        & (table[['second', 'action']] % 1 == 0).all(axis=1)
        & (bounds.start <= table.second)
        & (table.second < bounds.end)
    )
    problems = [
        ('', '', f'malformed row: line {index + 1} of {path.name}') for index in table.index[~good]
    ]
    return table[good].astype(dict(second=int, action=int)), problems


def key_of(clip: str, second: int) -> str:
    """What a keyframe is called in the pickle."""
    return f'{clip[:11]},{second:04d}'


def plan_frames(keyframes: list[tuple[str, int]], neighbors: int) -> list[Frame]:
    """Every keyframe (clip, second) and its neighbours within the clip, each once; a keyframe's own
    clip has precedence.
    """
    frames = {}
    for distance in sorted(range(-neighbors, neighbors + 1), key=abs):
        for clip, second in keyframes:
            if int(clip[-13:-7]) <= second + distance < int(clip[-6:]):
                key = key_of(clip, second + distance)
                frames.setdefault(key, Frame(key, clip, second + distance))
    return sorted(frames.values(), key=lambda frame: (frame.clip, frame.second))


def frame_file(root: Path, frame: Frame) -> Path:
    """The file that a frame is read from: a raw frame or, where that is missing, the clip."""
    image = root / f'rawframes/{frame.clip}/img_{frame.index + 1:05d}.jpg'
    video = root / f'videos/{frame.clip}.mp4'
    return video if not image.is_file() and video.is_file() else image


def frame_version(root: Path, frame: Frame) -> tuple[str, int, int] | None:
    """What tells a changed frame: path below ROOT, size and modification time of its file, in whole
    seconds as tar keeps it; None without a file.
    """
    file = frame_file(root, frame)
    try:
        stat = file.stat()
    except OSError:
        return None
    return str(file.relative_to(root)), stat.st_size, int(stat.st_mtime)


def read_frame(root: Path, frame: Frame) -> np.ndarray:
    """A frame as BGR uint8 (H, W, 3); UnreadableFrame says why it cannot be read."""
    import cv2

    file = frame_file(root, frame)
    name = file.relative_to(file.parents[1])
    if file.suffix == '.mp4':
        import decord  # after torch, whose convolutions crash otherwise (decord2 3.4, torch 2.14)

        decord.logging.set_level(decord.logging.QUIET)
        try:
            return np.ascontiguousarray(
                decord.VideoReader(str(file), num_threads=1)[frame.index].asnumpy()[..., ::-1]
            )
        except (decord.DECORDError, RuntimeError, IndexError):
            raise UnreadableFrame(
                f'unreadable frame: number {frame.index + 1} of {file.name}'
            ) from None
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UnreadableFrame(f'unreadable frame: {error.strerror} {name}') from None
    if not data.rstrip(b'\0').endswith(
        b'\xff\xd9'
    ):  # OpenCV fills the rest of a truncated JPEG with grey
        raise UnreadableFrame(f'unreadable frame: truncated or no JPEG {name}')
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # a header that claims billions of pixels
        image = None
    if image is None:
        raise UnreadableFrame(f'unreadable frame: broken JPEG {name}')
    return image


def local_checkpoint(source: str) -> Path:
    """The file of a checkpoint; a URL is downloaded once into torch's cache, where mmengine keeps
    them too.
    """
    if re.match(r'https?://', source):
        import torch

        name = source.rsplit('/', 1)[-1]
        digest = re.search(r'-([0-9a-f]{8,})\.', name)
        if not digest:  # many a URL ends in model.pth
            name = f'{hashlib.sha256(source.encode()).hexdigest()[:8]}-{name}'
        path = Path(torch.hub.get_dir()) / 'checkpoints' / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                torch.hub.download_url_to_file(source, str(path), digest and digest[1])
        except (OSError, RuntimeError, HTTPException) as error:
            sys.exit(
                f'error: {source} cannot be downloaded ({error}); give a file with --checkpoint'
            )
    else:
        path = Path(source).absolute()
    if not path.is_file():
        sys.exit(f'error: {path} not found; set --checkpoint to a file or URL')
    return path


@functools.cache
def use_torchvision_operators() -> bool:
    """Give mmcv the operators NMS and RoIAlign of torchvision instead of compiled ones of its own.

    Every wheel of torchvision has them for the CPU and for CUDA, and they read any memory layout
    right, whereas mmcv's assume NCHW. Deformable attention is PyTorch's. All others are those of a
    built mmcv or, where there is none, raise NotImplementedError. Returns whether there is a built
    mmcv.
    """
    from torchvision.ops import nms, roi_align

    try:
        built = importlib.import_module('mmcv._ext')
        built = getattr(
            built, 'built', built
        )  # that of an earlier run, where a cluster's worker had this script before
    except ImportError:
        built = None

    def torchvision_nms(boxes, scores, iou_threshold, offset):
        return nms(boxes + boxes.new_tensor([0, 0, offset, offset]), scores, iou_threshold)

    def torchvision_roi_align(
        features,
        rois,
        output,
        argmax_y,
        argmax_x,
        aligned_height,
        aligned_width,
        spatial_scale,
        sampling_ratio,
        pool_mode,
        aligned,
    ):
        if pool_mode == 0:
            return unavailable('roi_align with max pooling')()
        output.copy_(
            roi_align(
                features,
                rois,
                (aligned_height, aligned_width),
                spatial_scale,
                sampling_ratio,
                aligned,
            )
        )

    def deformable_attention(value, shapes, level_starts, locations, weights, im2col_step):
        from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

        return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)

    def unavailable(name):
        def operator(*args, **options):
            raise NotImplementedError(
                f"it needs mmcv's compiled operator {name}; install mmcv==2.1.0 built from "
                'source in '
                'place of mmcv-lite (see README), or take another detector'
            )

        return operator

    def other(name):
        if name.startswith('__'):
            raise AttributeError(name)
        return getattr(built, name) if hasattr(built, name) else unavailable(name)

    module = types.ModuleType('mmcv._ext')
    module.__spec__ = ModuleSpec('mmcv._ext', BuiltinImporter)  # mmengine asks whether there is one
    module.nms, module.roi_align_forward = torchvision_nms, torchvision_roi_align
    module.ms_deform_attn_forward, module.built = deformable_attention, built
    module.__getattr__ = other
    sys.modules['mmcv._ext'] = module  # where mmcv.ops looks for them when it is imported
    return built is not None


def load_config(path: Path, custom_imports: bool):
    """The detector's config, after the imports that it asks for, which may take seconds, or without
    these.
    """
    warnings.filterwarnings(
        'ignore', message='pkg_resources'
    )  # mmengine 0.10.7 and mmdet 3.3.0 still import it
    from mmengine.config import Config

    try:
        return Config.fromfile(path, import_custom_modules=custom_imports)
    except Exception as error:  # a config is a program: it may raise anything
        raise DetectorError(
            f'{path} is not a valid mmdetection config: {first_line(error)}'
        ) from None


class Ignored:
    """Stands in for all that a checkpoint holds beside tensors and plain values: histories,
    optimisers, code.
    """

    def __new__(cls, *args, **options):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def read_weights(checkpoint: Path) -> dict:
    """The tensors of a checkpoint by name, read without running any code that it holds."""
    import torch
    from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

    loaded, ignored = None, []
    try:
        while loaded is None:
            try:
                with torch.serialization.safe_globals([(Ignored, name) for name in ignored]):
                    loaded = torch.load(checkpoint, map_location='cpu', weights_only=True)
            except pickle.UnpicklingError as error:  # it names one class or function at a time
                found = re.search(r'Unsupported global: GLOBAL (\S+)', str(error))
                name = found and (found[1] if '.' in found[1] else f'builtins.{found[1]}')
                if not name or name in ignored:
                    raise
                ignored.append(name)
        weights = loaded.get('state_dict', loaded)
        consume_prefix_in_state_dict_if_present(weights, 'module.')  # of data parallel training
    except Exception as error:  # a damaged pickle may make torch raise anything
        words = re.search(r'(?:WeightsUnpickler error:|PytorchStreamReader)\s*(.*)', str(error))
        raise DetectorError(
            f'{checkpoint} is damaged, no checkpoint, or one that would run code '
            f'({words[1] if words else type(error).__name__}); if it was downloaded, delete it and '
            'run again; if it is your own, save its state_dict alone'
        ) from None
    return weights


def build_detector(options: Options):
    """The config's model with the checkpoint's weights, on the CPU, and its test pipeline for
    arrays.
    """
    use_torchvision_operators()
    config = load_config(options.config, True)
    from mmcv.transforms import Compose
    from mmdet.registry import MODELS
    from mmdet.utils import get_test_pipeline_cfg, register_all_modules
    from mmengine.model import revert_sync_batchnorm
    import torch

    register_all_modules()
    try:
        model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
        pipeline = get_test_pipeline_cfg(config)
        pipeline[0].type = 'mmdet.LoadImageFromNDArray'
        pipeline = Compose(pipeline)
        sample = pipeline(dict(img=np.zeros((120, 160, 3), np.uint8), img_id=0))
        if not torch.is_tensor(sample['inputs']):
            raise ValueError(
                'its test pipeline makes several pictures of a frame (test-time '
                'augmentation); give one that '
                'makes one'
            )
    except Exception as error:  # a config may name any class with any arguments
        raise DetectorError(
            f'{options.config} does not build a detector: {first_line(error)}'
        ) from None
    weights = read_weights(options.checkpoint)
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        differing = missing + unexpected
    except RuntimeError as error:  # tensors of another shape
        differing = re.findall(r'size mismatch for (\S+):', str(error)) or [
            str(error).splitlines()[0]
        ]
    # mean and std come from the config; averaged weights (ema_) stand beside the ones that are used
    differing = [
        name
        for name in differing
        if not name.endswith('num_batches_tracked')
        and not name.startswith(('data_preprocessor.', 'ema_'))
    ]
    if differing:
        raise DetectorError(
            f'{options.checkpoint} does not fit the config: {len(differing)} tensors differ, first '
            f'{", ".join(differing[:3])}; give the --config that it was trained with'
        )
    if (
        options.identity
        and identify(options.config, options.checkpoint, options.amp) != options.identity
    ):
        raise DetectorError(
            f'{options.checkpoint} or the config has changed since this run began; run the '
            'same command again'
        )
    return model, pipeline


def check_operators(device: str) -> None:
    """Compare mmcv's NMS and RoIAlign on this device, in both memory layouts, with the CPU's
    answers on random input.
    """
    import torch
    from mmcv.ops import nms, roi_align

    random = torch.Generator().manual_seed(0)
    features = torch.rand(2, 16, 20, 30, generator=random)
    corners, sides = (
        torch.rand(300, 2, generator=random) * 100,
        torch.rand(300, 2, generator=random) * 60,
    )
    boxes, scores = torch.cat([corners, corners + sides], 1), torch.rand(300, generator=random)
    rois = torch.cat([torch.arange(300)[:, None] % 2, boxes], 1)
    kept, aligned = nms(boxes, scores, 0.5)[1], roi_align(features, rois, 7, 0.25)
    for layout in torch.contiguous_format, torch.channels_last:
        pooled = roi_align(features.to(device, memory_format=layout), rois.to(device), 7, 0.25)
        if not torch.allclose(pooled.cpu(), aligned, atol=1e-3):
            raise RuntimeError(f'RoIAlign of {layout} input is wrong')
    if not torch.equal(nms(boxes.to(device), scores.to(device), 0.5)[1].cpu(), kept):
        raise RuntimeError('NMS is wrong')


def clear_ones(people: np.ndarray, least: float) -> np.ndarray:
    """Those of the people (n, 5) who score clearly more than `least`, so that another device finds
    them, too.
    """
    return people[people[:, 4] > least + MAX_SCORE_SHIFT]


def same_people(ours: np.ndarray, theirs: np.ndarray, least: float) -> bool:
    """Whether at least half of the people (n, 5) on either side who score clearly more than `least`
    are on the other, too.
    """
    matched = [
        len(others) > 0
        and (abs(others - person) < [MAX_BOX_SHIFT] * 4 + [MAX_SCORE_SHIFT]).all(axis=1).any()
        for people, others in ((ours, theirs), (theirs, ours))
        for person in clear_ones(people, least)
    ]
    return sum(matched) >= len(matched) / 2


def find_first_people(
    model, pipeline: Callable, options: Options, least: float
) -> tuple[str, dict, np.ndarray]:
    """A first frame, its data and its people on the CPU, of whom one scores clearly more than
    `least` if that can be had.

    A black frame if no first frame can be read.
    """

    def look_at(key: str, data: dict) -> tuple[str, dict, np.ndarray]:
        return key, data, people_of(predict(model, [data], 'cpu', False)[0], least)

    first = None
    for frame, data in load_frames(options.first_frames, options, pipeline):
        if isinstance(data, dict):
            first = look_at(frame.key, data)
            if len(clear_ones(first[2], least)):
                break
    return first or look_at(
        'a black frame', pipeline(dict(img=np.zeros((256, 340, 3), np.uint8), img_id=0))
    )


def move_to_device(model, data: dict, options: Options):
    """The detector's answer to a frame on the device, where the model then stays, in the memory
    layout that suits it.
    """
    import torch

    built = use_torchvision_operators()  # a built mmcv assumes NCHW
    for layout in (
        [torch.contiguous_format] if built else [torch.channels_last, torch.contiguous_format]
    ):
        try:  # with two frames, since the layout of one alone may be both
            model.to(options.device, memory_format=layout)
            return predict(model, [data] * min(2, options.batch_size), options.device, options.amp)[
                0
            ]
        except RuntimeError:  # CornerNet, for one, takes views that NCHW alone allows
            if layout == torch.contiguous_format:
                raise


@functools.lru_cache(maxsize=1)
def start_detector(options: Options):
    """The detector on its device and its pipeline, after a check that it finds there whom it finds
    on the CPU in float32.

    A DetectorError says what is wrong.
    """
    import torch

    model, pipeline = build_detector(options)
    least = min(options.score_thr, CLEAR_SCORE)
    try:
        key, data, people = find_first_people(model, pipeline, options, least)
        check_operators(options.device)
        # batches are always full, so cuDNN tries its algorithms once for each size
        torch.backends.cudnn.benchmark = True
        found = people_of(move_to_device(model, data, options), least)
    except Exception as error:  # whatever an arbitrary model, or a broken device, raises
        raise DetectorError(f'the detector cannot run: {first_line(error)}') from error
    if not len(clear_ones(people, least)) and options.device != 'cpu':
        print(
            f'nobody on the first {len(options.first_frames)} frames: {options.device} is '
            'not compared with the CPU'
        )
    if not same_people(found, people, least):
        raise DetectorError(
            f'the detector is wrong on {options.device}: it finds {len(found)} people on '
            f'{key} where '
            f'the CPU finds {len(people)}, or finds them elsewhere'
        )
    return model, pipeline


def predict(model, batch: list[dict], device: str, amp: bool) -> list:
    """The detector's answers to frames of equal size."""
    import torch

    kind = device.split(':')[0]
    half = (
        torch.bfloat16 if kind == 'cpu' else torch.float16
    )  # the more exact one, but slow on CPUs
    with torch.no_grad(), torch.autocast(kind, half, enabled=amp):
        return model.test_step(
            dict(
                inputs=[data['inputs'] for data in batch],
                data_samples=[data['data_samples'] for data in batch],
            )
        )


def people_of(answer, score_thr: float) -> np.ndarray:
    """The people in a detector's answer: float64 (n, 5) of x1, y1, x2, y2 relative, clipped to [0,
    1], and score.
    """
    found, (height, width) = answer.pred_instances, answer.ori_shape
    found = found[(found.labels == PERSON) & (found.scores > score_thr)]
    boxes = np.clip(found.bboxes.double().cpu().numpy() / [width, height, width, height], 0, 1)
    people = np.column_stack([boxes, found.scores.double().cpu().numpy()])
    return people[
        (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    ]  # NaN is not less, nor is a box in the padding


def load_frames(
    frames: Iterable[Frame], options: Options, pipeline: Callable
) -> Iterator[tuple[Frame, dict | str]]:
    """Frames in their order, with what the test pipeline makes of them, or why that is not
    possible.
    """

    def load(frame: Frame) -> dict | str:
        try:
            return pipeline(dict(img=read_frame(options.root, frame), img_id=0))
        except UnreadableFrame as error:
            return str(error)
        except Exception as error:  # of an arbitrary pipeline; OpenCV has limits, too
            return f'frame that the test pipeline cannot take: {first_line(error)}'

    with ThreadPoolExecutor(
        options.num_workers
    ) as threads:  # decoding and resizing let other threads run
        ahead = deque()
        for frame in frames:
            ahead.append((frame, threads.submit(load, frame)))
            if len(ahead) > 2 * options.num_workers:
                frame, loaded = ahead.popleft()
                yield frame, loaded.result()
        for frame, loaded in ahead:
            yield frame, loaded.result()


def detect(frames: list[Frame], options: Options) -> Iterator[tuple[str, np.ndarray | str]]:
    """The key of every frame with its people, or with the reason why it cannot be read, in any
    order.

    Frames go through the detector with others that are padded to the same size, so that none gets
    more padding than it would alone. A RuntimeError says on which frame the detector failed.
    """
    import torch

    device = options.device or ('cuda:0' if torch.cuda.is_available() else 'cpu')
    options = options._replace(
        device=device, batch_size=options.batch_size or (4 if device == 'cpu' else 8)
    )
    model, pipeline = start_detector(options)
    multiple = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    size, waiting, at = options.batch_size, {}, frames[0]

    def flush(batch: list[tuple[Frame, dict]]) -> Iterator[tuple[str, np.ndarray]]:
        nonlocal at, size
        while batch:
            at = batch[0][0]
            part = [data for _, data in batch[:size]]
            if (
                device != 'cpu'
            ):  # an incomplete batch is a new size, for which cuDNN would try all its algorithms
                part += part[-1:] * (size - len(part))
            try:
                answers = predict(model, part, device, options.amp)
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
                continue
            for (frame, _), answer in zip(
                batch[:size], answers
            ):  # answers to what fills a batch up are dropped
                yield frame.key, people_of(answer, options.score_thr)
            del batch[:size]

    try:
        for frame, data in load_frames(frames, options, pipeline):
            if isinstance(data, str):
                yield frame.key, data
                continue
            padded = tuple(-(-side // multiple) for side in data['inputs'].shape[1:])
            batch = waiting.setdefault(padded, [])
            batch.append((frame, data))
            if sum(map(len, waiting.values())) > MAX_WAITING:
                batch = max(waiting.values(), key=len)
            elif len(batch) < size:
                continue
            yield from flush(batch)
        for batch in waiting.values():
            yield from flush(batch)
    # whatever an arbitrary model or pipeline raises: out of memory, CUDA errors, wrong shapes
    except Exception as error:
        raise RuntimeError(f'on {at.key}: {first_line(error)}') from error


def serve(
    sender: multiprocessing.connection.Connection, frames: list[Frame], options: Options
) -> None:
    """Send what `detect` yields, then None, or the error that ended it: the work of a process that
    has a GPU of its own.
    """
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the parent, which ends this process
    try:
        for answer in detect(frames, options):
            sender.send(answer)
        sender.send(None)
    except BrokenPipeError:  # the parent is gone
        pass
    except (DetectorError, RuntimeError) as error:
        sender.send(error)


def detect_on_gpus(
    frames: list[Frame], options: Options, devices: list[str]
) -> Iterator[tuple[str, np.ndarray | str]]:
    """Yield what `detect` does, from a process for each device; the frames of a device that is lost
    go to the others.
    """
    context, left = multiprocessing.get_context('spawn'), {frame.key: frame for frame in frames}
    while left:
        running = {}
        for index, device in enumerate(devices[: len(left)]):
            receiver, sender = context.Pipe(duplex=False)
            share = list(left.values())[index :: len(devices)]
            context.Process(
                target=serve, args=(sender, share, options._replace(device=device)), daemon=True
            ).start()
            sender.close()  # so that the receiver sees the end when the process dies
            running[receiver] = device
        while running:
            for receiver in multiprocessing.connection.wait(list(running)):
                try:
                    answer = receiver.recv()
                except (EOFError, OSError):  # the latter in the middle of a message
                    answer = RuntimeError('its process was killed')
                if isinstance(answer, DetectorError):
                    raise answer
                if isinstance(answer, tuple):
                    del left[answer[0]]
                    yield answer
                    continue
                device = running.pop(receiver)
                if answer is not None:
                    devices = [other for other in devices if other != device]
                    if not devices:
                        raise answer
                    tqdm.write(
                        f'{device} failed: {answer}; continuing on the others', file=sys.stderr
                    )


def detect_chunk(frames: list[Frame], options: Options) -> list[tuple[str, np.ndarray | str]]:
    """What `detect` yields, as a list: a task of a cluster, whose workers keep the detector from
    one to the next.
    """
    return list(detect(frames, options))


def detect_on_cluster(
    frames: list[Frame], options: Options, address: str
) -> Iterator[tuple[str, np.ndarray | str]]:
    """Yield what `detect` does, from the workers of a Dask cluster; frames whose workers die again
    and again are reported.
    """
    try:
        from distributed import CancelledError, Client, KilledWorker, as_completed
        from distributed.comm import CommClosedError
    except ImportError:
        sys.exit('error: --dask_scheduler needs Dask; pip install distributed')
    logging.disable()  # Dask logs tracebacks of what is told below
    try:
        client = Client(address, timeout=10)
        client.wait_for_workers(1, timeout=30)
    except (OSError, ValueError) as error:
        reason = str(error).split('\n')[0]
        sys.exit(f'error: no Dask scheduler with workers at {address} ({reason}); start them first')
    with client:
        client.upload_file(
            __file__
        )  # as a module: what is sent from __main__ would load the detector for every task
        module = importlib.import_module(Path(__file__).stem)
        chunks = [frames[index : index + CHUNK] for index in range(0, len(frames), CHUNK)]
        tasks = client.map(
            module.detect_chunk, chunks, options=module.Options(*options), pure=False
        )
        todo = dict(zip(tasks, chunks))
        del tasks
        for future in as_completed(list(todo)):
            chunk = todo.pop(future)
            try:
                yield from future.result()
            except KilledWorker:
                yield from (
                    (frame.key, 'not detected: the workers of the cluster that had it were killed')
                    for frame in chunk
                )
            except (
                module.DetectorError
            ) as error:  # which is not this module's class where this one is __main__
                raise DetectorError(str(error)) from None
            except (CancelledError, CommClosedError):
                sys.exit(
                    f'error: the Dask scheduler at {address} went away; what is done is '
                    'saved; run the same command again'
                )


def read_detections(path: Path, identity: str, score_thr: float) -> dict[tuple, np.ndarray]:
    """(key, path, size, modification time) of every frame that this detector was run on -> its
    people (n, 5).

    The file holds JSON lines: one for a detector and its least score, then one for each frame that
    it was run on, again and again. A line that a kill or a full disk has cut counts for nothing,
    nor do those up to the next detector's.
    """
    known, ours = {}, False
    if path.exists():
        with open(path, encoding='utf-8', errors='replace') as file:
            for line in file:
                try:
                    noted = json.loads(line)
                    if 'detector' in noted:
                        ours = noted['detector'] == identity and noted['score_thr'] <= score_thr
                    elif ours:
                        version = noted['key'], noted['file'], noted['size'], noted['mtime']
                        known[version] = np.array(noted['people'], float).reshape(-1, 5)
                except (ValueError, TypeError, KeyError):
                    ours = False
    return known


class Pickler(pickle.Pickler):
    """Writes arrays so that NumPy 1.21 to 2.x can read them: by public names, `numpy._core` is
    unknown to NumPy 1.
    """

    def reducer_override(self, value):
        if type(value) is np.ndarray:
            return np.ndarray, (value.shape, value.dtype.str), value.__reduce__()[2]
        return NotImplemented


def write_proposals(path: Path, proposals: dict[str, np.ndarray], made_of: str) -> None:
    """Pickle the proposals beside their final name, then rename; a file that holds just these is
    left as it is.

    A trailer, which unpicklers ignore, says of which list they were made: Step 7 merges them with
    no other.
    """
    buffer = io.BytesIO()
    Pickler(buffer, protocol=4).dump(dict(sorted(proposals.items())))
    buffer.write(f'\nmade of {made_of}\n'.encode())
    if not path.is_file() or path.read_bytes() != buffer.getbuffer():
        part = path.with_name(f'.{path.name}.part')
        part.write_bytes(buffer.getbuffer())
        os.replace(part, path)


def write_csv(path: Path, table) -> None:
    """Write a DataFrame beside its final name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.part')
    table.to_csv(part, index=False, float_format='%.3f', errors='backslashreplace')
    os.replace(part, path)


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


def report_recall(path: Path, table, proposals: dict[str, np.ndarray]) -> None:
    """Say which share of the annotated boxes the proposals meet, and list the keyframes where they
    miss some, worst first.
    """
    boxes = table[['clip', 'second', 'x1', 'y1', 'x2', 'y2']].drop_duplicates(ignore_index=True)
    best = best_overlaps(boxes, proposals)
    keyframes = boxes.assign(met=best >= 0.5, iou=best).groupby(['clip', 'second'])
    found = keyframes.agg(
        boxes=('met', 'size'), met=('met', 'sum'), worst_iou=('iou', 'min')
    ).reset_index()
    missed = found[found.met < found.boxes].sort_values(['worst_iou', 'clip', 'second'])
    write_csv(path, missed)
    count = sum(
        len(proposals.get(key_of(clip, second), ()))
        for clip, second in zip(found['clip'], found.second)
    )
    print(
        f'  recall: proposals meet {(best >= 0.5).mean():.1%} of {len(boxes)} annotated '
        'boxes at IoU 0.5, '
        f'{(best >= 0.75).mean():.1%} at 0.75; {len(boxes) / len(found):.2f} boxes and '
        f'{count / len(found):.2f} proposals '
        'a keyframe'
    )
    if (best >= 0.5).mean() < LOW_RECALL:
        print(
            '  that is far below the 90 % that a person detector reaches: is --score_thr too '
            'high for it, is it the wrong '
            'checkpoint, is its class 0 not the person, or are these frames of other videos?'
        )
    if len(missed):
        print(f'  {len(missed)} keyframes with boxes that are missed, the worst first: {path}')


def digest_of(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def identify(config: Path, checkpoint: Path, amp: bool) -> str:
    """What makes a detector: digests of its weights and of what its config says of the model and
    its input, its precision.
    """

    def text(value) -> str | list[str]:  # in every process the same
        return (
            sorted(map(str, value))
            if isinstance(value, (set, frozenset))
            else re.sub(' at 0x[0-9a-f]+', '', str(value))
        )

    settings = load_config(config, False).to_dict()
    used = [settings.get(key) for key in ('model', 'test_dataloader', 'custom_imports')]
    digest = hashlib.sha256(json.dumps(used, sort_keys=True, default=text).encode()).hexdigest()
    return f'config {digest} checkpoint {digest_of(checkpoint)} amp {amp}'


def start_detection(
    frames: list[Frame], args: argparse.Namespace, checkpoint: Path, identity: str
) -> Iterator[tuple[str, np.ndarray | str]]:
    """Detect on the cluster, on several GPUs, on one or on the CPU, as the arguments say."""
    import torch

    options = Options(
        args.avakinetics_root,
        args.config,
        checkpoint,
        '',
        args.score_thr,
        args.amp,
        args.batch_size,
        args.num_workers,
        tuple(frames[:FIRST_FRAMES]),
        identity,
    )
    if args.dask_scheduler:
        build_detector(
            options
        )  # a checkpoint that does not fit is told before the cluster is asked
        return detect_on_cluster(frames, options, args.dask_scheduler)
    visible = torch.cuda.device_count()
    gpus = visible if args.num_gpus is None else min(args.num_gpus, visible)
    if not visible and args.num_gpus != 0:
        print('no GPU is visible to PyTorch: the CPU is used')
    elif (args.num_gpus or 0) > visible:
        print(f'only {visible} of {args.num_gpus} GPUs are visible to PyTorch')
    if gpus > 1:
        return detect_on_gpus(frames, options, [f'cuda:{number}' for number in range(gpus)])
    return detect(frames, options._replace(device='cuda:0' if gpus else 'cpu'))


def fetch(args: argparse.Namespace) -> None:
    """Detect what is not there yet, write the pickle and the report, say what came of it."""
    import pandas as pd

    root, target, made_of = args.avakinetics_root, args.picklepath, digest_of(args.datalist)
    table, problems = read_datalist(args.datalist)
    keyframes = list(table[['clip', 'second']].drop_duplicates().itertuples(index=False, name=None))
    if not keyframes:
        sys.exit(
            f'error: {args.datalist} holds no annotated keyframe; is it what Step 5 '
            '(prepare_annotation.py) wrote?'
        )
    checkpoint = local_checkpoint(args.checkpoint)
    identity = identify(args.config, checkpoint, args.amp)
    frames = plan_frames(keyframes, args.neighbors)
    versions = {frame.key: frame_version(root, frame) for frame in frames}
    target.parent.mkdir(parents=True, exist_ok=True)
    notes = target.with_name(f'{target.name}.frames.jsonl')
    known = {} if args.overwrite else read_detections(notes, identity, args.score_thr)
    people = {
        key: known[key, *version]
        for key, version in versions.items()
        if version and (key, *version) in known
    }
    left, unreadable = [frame for frame in frames if frame.key not in people], {}
    if not people and notes.exists() and not args.overwrite:
        print(
            f'nothing in {notes} is of this detector, these frames and a --score_thr as low: '
            'all are detected anew'
        )
    if left:
        with open(notes, 'a', encoding='utf-8', buffering=1) as file:
            try:
                fcntl.flock(
                    file, fcntl.LOCK_EX | fcntl.LOCK_NB
                )  # the kernel lets go when this process ends
            except BlockingIOError:
                sys.exit(
                    f'error: another run is at work on {target}; wait for it to end, or set '
                    '--picklepath'
                )
            except OSError:  # of some file servers, such as Lustre mounted without flock
                print(
                    f'{target.parent} has no file locks: let no other run work on {target.name}',
                    file=sys.stderr,
                )
            file.write(
                '\n' * (file.tell() > 0)
                + json.dumps(dict(detector=identity, score_thr=args.score_thr))
                + '\n'
            )
            with tqdm(
                total=len(frames), initial=len(people), desc='detect', unit='frame', delay=1
            ) as bar:
                for key, found in start_detection(left, args, checkpoint, identity):
                    bar.update()
                    if isinstance(found, str):
                        unreadable[key] = found
                        continue
                    people[key] = found
                    if versions[key]:
                        name, size, mtime = versions[key]
                        line = dict(
                            key=key, file=name, size=size, mtime=mtime, people=found.tolist()
                        )
                        file.write(json.dumps(line) + '\n')
    proposals = {key: found[found[:, 4] > args.score_thr] for key, found in people.items()}
    proposals = {key: found for key, found in proposals.items() if len(found)}
    report = root / f'reports/fetch_proposal_{args.split}.csv'
    rows = sorted((*key.rsplit(',', 1), reason) for key, reason in unreadable.items()) + problems
    write_csv(report, pd.DataFrame(rows, columns=['video_id', 'timestamp', 'reason']))
    if not people:
        sys.exit(f'error: not one frame could be read; {report} says why')
    write_proposals(target, proposals, made_of)

    print(
        f'{sum(map(len, proposals.values()))} people on {len(proposals)} of {len(frames)} '
        f'frames in {target}'
    )
    done = len(left) - len(unreadable)
    print(
        f'  {done} frames detected now, {len(people) - done} before'
        if left
        else '  all were detected before; nothing to do'
    )
    report_recall(root / f'reports/recall_{args.split}.csv', table, proposals)
    bare = sum(key_of(clip, second) not in proposals for clip, second in keyframes)
    print(
        f'  {bare} of {len(keyframes)} annotated keyframes have no proposal: training takes '
        'the whole frame there'
    )
    for reason, count in Counter(row[2].split(':')[0] for row in rows).most_common():
        print(f'  {count} left out: {reason}')
    if rows:
        print(f'  report: {report}')


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    sys.stdout.reconfigure(errors='backslashreplace')  # names of files may be no UTF-8
    os.environ['MPLBACKEND'] = 'agg'  # a notebook's may not be in this environment
    args = parse_args(argv)
    try:
        root = args.avakinetics_root
        if not args.datalist.is_file():
            sys.exit(
                f'error: {args.datalist} not found; do Step 5 (prepare_annotation.py) or set '
                '--datalist'
            )
        if not (root / 'rawframes').is_dir() and not (root / 'videos').is_dir():
            sys.exit(
                f'error: {root} has neither rawframes nor videos; do Step 3 or set '
                '--avakinetics_root'
            )
        if not args.config.is_file():
            sys.exit(f'error: {args.config} not found; set --config to an mmdetection config')
        if args.picklepath.is_dir():
            sys.exit(f'error: {args.picklepath} is a folder; set --picklepath to a file')
        fetch(args)
    except DetectorError as error:
        sys.exit(f'error: {error}')
    except RuntimeError as error:
        sys.exit(
            f'error: the detector failed: {error}; what is done is saved; run the same '
            'command again'
        )
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; fix it, then run the same command again')
    except KeyboardInterrupt:
        print('interrupted; run the same command again', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
