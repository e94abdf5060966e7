#!/usr/bin/env python3
r"""Step 6: detect the people on the annotated keyframes.

Reads ROOT/kinetics_train.csv and the frames in ROOT/rawframes, or in ROOT/videos where raw frames
are missing or older. Runs a person detector of mmdetection on each annotated keyframe and on the
seconds before and after it. Writes ROOT/kinetics_proposal.pkl: a dict with keys
'<video id>,<timestamp:04d>' and values float64 (n, 5) of x1, y1, x2, y2, score, relative to the
frame, score > --score_thr. A frame without people has no key. Frames that could not be read are
listed in ROOT/reports/fetch_proposal_train.csv; how well the proposals match the annotated boxes is
in ROOT/reports/recall_train.csv.

All detections are cached in kinetics_proposal.pkl.frames.jsonl: the same command continues after an
interruption, and with a longer list it detects only what is new.

    python3 fetch_proposal.py --avakinetics_root=$MMACTION2/data/ava_kinetics \
        --datalist=$MMACTION2/data/ava_kinetics/kinetics_train.csv \
        --picklepath=$MMACTION2/data/ava_kinetics/kinetics_proposal.pkl
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import functools
import hashlib
import importlib.util
import io
import json
import logging
import os
import pickle
import re
import signal
import sys
import types
import warnings
from collections import Counter, defaultdict, deque
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from http.client import HTTPException
from importlib.machinery import BuiltinImporter, ModuleSpec
from importlib.metadata import version
from itertools import islice
from multiprocessing import active_children, current_process, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Generator, Iterable, Iterator, NamedTuple

import numpy as np
from joblib import cpu_count
from tqdm import tqdm

if TYPE_CHECKING:
    from torch.nn import Module

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
CHECKPOINT = (
    'https://download.openmmlab.com/mmdetection/v2.0/cascade_rcnn/cascade_rcnn_x101_64x4d_fpn_1x_coco/'
    'cascade_rcnn_x101_64x4d_fpn_1x_coco_20200515_075702-43ce6a30.pth'
)
FPS = 30  # frames per second of the clips
PERSON = 0  # COCO's class
CHUNK, CPU_CHUNK = 1024, 64  # frames that a process gets at a time, lost if it is killed
NUM_LOADERS = 4  # threads that load frames, in each process
# Before a GPU is used, it is compared with the CPU on the first frames, by the proposals scoring
# above CLEAR_SCORE. The tolerated shifts of boxes (as a fraction of the frame) and of scores are
# ten times those that TF32, float16 and bfloat16 cause
FIRST_FRAMES = 3
CLEAR_SCORE, MAX_BOX_SHIFT, MAX_SCORE_SHIFT = 0.6, 0.05, 0.1
# MMAction2's person_det_score_thr: it keeps proposals that score at least this, or else the best
KEPT_SCORE = 0.9
LOOSE_IOU, STRICT_IOU = 0.5, 0.75  # above which a proposal matches an annotated box
# Columns of the report on recall; those of MATCHED count boxes matched by all proposals, then by
# those that are kept
MATCHED = ['matched_0.5', 'matched_0.75', 'kept_0.5', 'kept_0.75']
RECALL = ['clip', 'second', 'boxes', 'proposals', *MATCHED, 'worst_iou']
LOW_RECALL, MANY_EMPTY = 0.8, 0.2  # where Step 6 warns; AVA's own recall is 93.9 %
CLIP_NAME = re.compile(r'([A-Za-z0-9_-]{1,64})_([0-9]{6})_([0-9]{6})')
NUMBER = r'(-?\d*\.?\d+)'
# clip, timestamp, box, action, entity
ROW = re.compile(rf'([A-Za-z0-9_-]+),(\d+){f",{NUMBER}" * 4},\d+,-?\d+', re.ASCII)
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
MAX_QUEUED = 500  # items that a cluster is given at once
GIVEN_UP = 'given up: the workers of the cluster that had it were killed'

Boxes = set[tuple[float, ...]]  # of x1, y1, x2, y2, relative to the frame
NOTHING = np.empty((0, 5))  # what is found on a frame without people


class DetectorError(Exception):
    """Why the detector cannot run, as one line for the user."""


class Clip(NamedTuple):
    """Seconds `start` to `end` of a video, as Step 3 cuts them."""

    name: str
    video_id: str
    start: int
    end: int

    @property
    def num_frames(self) -> int:
        return (self.end - self.start) * FPS


def parse_clip(name: str) -> Clip | None:
    """Parse `<video id>_<start>_<end>`; return None for any other name."""
    match = CLIP_NAME.fullmatch(name)
    return Clip(name, match[1], int(match[2]), int(match[3])) if match else None


class Keyframe(NamedTuple):
    """A second of a clip: an annotated one, or a neighbor of one."""

    clip: Clip
    timestamp: int

    @property
    def key(self) -> str:
        """Its key in the pickle."""
        return f'{self.clip.video_id},{self.timestamp:04d}'

    @property
    def frame_index(self) -> int:
        """The number of its frame in the clip, from 0."""
        return (self.timestamp - self.clip.start) * FPS


class Frame(NamedTuple):
    """A frame to detect people on, in a file below ROOT."""

    keyframe: Keyframe
    file: str
    size: int  # bytes

    @property
    def identity(self) -> tuple[str, str, int]:
        """Its key in the cache: the size, not the time, which copying changes."""
        return self.keyframe.key, self.file, self.size


class Detections(NamedTuple):
    """The people on a frame; `error`, `<kind>: <detail>`, says why they could not be detected."""

    key: str
    boxes: np.ndarray  # float64 (n, 5) of x1, y1, x2, y2, relative to the frame, and score
    error: str = ''


class Options(NamedTuple):
    """What a worker needs to know about the data set, the detector and how it runs."""

    root: Path
    config: Path
    checkpoint: Path
    num_gpus: int | None  # None: a worker of a cluster uses its first GPU, if it has one
    score_thr: float
    amp: bool
    batch_size: int | None
    first_frames: tuple[Frame, ...]


class Detector(NamedTuple):
    """A model and its test pipeline on a device."""

    model: Module
    pipeline: Callable
    device: str


def first_line(error: Exception) -> str:
    return f'{type(error).__name__}: {error}'.splitlines()[0]


def to_path(text: str) -> Path:
    """Return the path that an argument names."""
    if not text:
        raise argparse.ArgumentTypeError('it is empty; set its variable as README says')
    return Path(text).expanduser()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Step 6: detect the people on the annotated keyframes.'
    )
    data = parser.add_argument_group('data')
    data.add_argument(
        '--avakinetics_root',
        type=to_path,
        default=MMACTION2 / 'data/ava_kinetics',
        metavar='DIR',
        help='folder of the data set (default: %(default)s)',
    )
    data.add_argument(
        '--datalist',
        type=to_path,
        metavar='CSV',
        help='annotations written by Step 5 (default: ROOT/kinetics_train.csv)',
    )
    data.add_argument(
        '--picklepath',
        type=to_path,
        metavar='PKL',
        help='where the proposals go (default: ROOT/kinetics_proposal.pkl, or '
        'ROOT/kinetics_val_proposal.pkl for ROOT/kinetics_val.csv)',
    )
    data.add_argument(
        '--neighbors',
        type=int,
        metavar='N',
        default=1,
        help='also detect on N seconds before and after each keyframe: 1 as in MMAction2; '
        '0 is enough for training, a third of the work (default: %(default)s)',
    )
    add_detector(parser)
    return parser


def add_detector(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which detector runs, and where."""
    detector = parser.add_argument_group('detector')
    detector.add_argument(
        '--config',
        type=to_path,
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
        '--amp', action='store_true', help='mixed precision: faster, moves boxes a little'
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
        help='frames that the detector takes at once (default: 8 on a GPU, 4 on the CPU)',
    )
    running.add_argument(
        '--dask_scheduler',
        metavar='ADDRESS',
        help='work on the Dask cluster of this scheduler, such as tcp://host:8786',
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    os.getcwd()  # raises OSError if the working directory was deleted; torch would crash
    args = build_parser().parse_args(argv)
    if args.neighbors < 0 or (args.num_gpus or 0) < 0:
        sys.exit('error: --neighbors and --num_gpus must be 0 or more')
    if args.batch_size is not None and args.batch_size < 1:
        sys.exit('error: --batch_size must be 1 or more')
    if not 0 <= args.score_thr < 1:
        sys.exit('error: --score_thr must be at least 0 and below 1')
    # absolute, since a cluster's workers run in other folders
    root = args.avakinetics_root = args.avakinetics_root.absolute()
    args.datalist = (args.datalist or root / 'kinetics_train.csv').absolute()
    args.split = args.datalist.stem.removeprefix('kinetics_')
    part = '' if args.split == 'train' else f'_{args.split}'
    args.picklepath = (args.picklepath or root / f'kinetics{part}_proposal.pkl').absolute()
    args.config = args.config.absolute()
    return args


def check_args(args: argparse.Namespace) -> None:
    """Exit if a file does not exist, or if the pickle would overwrite something else."""
    if not args.datalist.is_file():
        hint = 'run Step 5 (prepare_annotation.py) or set --datalist to its csv'
        sys.exit(f'error: {args.datalist} is not a file; {hint}')
    if not args.config.is_file():
        sys.exit(f'error: {args.config} is not a file; set --config to an mmdetection config')
    other = {'train': 'kinetics_val_proposal.pkl', 'val': 'kinetics_proposal.pkl'}.get(args.split)
    if other and args.picklepath == args.avakinetics_root / other:
        hint = 'set --picklepath to another file'
        sys.exit(f'error: {args.picklepath} belongs to the other split; {hint}')
    if args.picklepath.is_dir() or args.picklepath == args.datalist:
        sys.exit(f'error: {args.picklepath} is a folder or the list; set --picklepath to a pickle')


def read_datalist(path: Path) -> dict[Keyframe, Boxes]:
    """Return the annotated boxes of each keyframe."""
    keyframes = defaultdict(set)
    for number, line in enumerate(path.read_text(errors='replace').splitlines(), 1):
        row = ROW.fullmatch(line)
        clip = parse_clip(row[1]) if row else None
        if not row or not clip:
            sys.exit(f'error: line {number} of {path} was not written by Step 5; run Step 5 again')
        keyframes[Keyframe(clip, int(row[2]))].add(tuple(map(float, row.groups()[2:])))
    if not keyframes:
        sys.exit(f'error: {path} is empty; run Step 5 again')
    return keyframes


def find_frame(root: Path, keyframe: Keyframe) -> Frame:
    """Find the file with a keyframe: its raw frame or the clip, whichever is newer.

    A folder with more frames than the clip's name says does not count: it may have another frame
    rate. Times are compared by whole seconds, as tar keeps them; a raw frame wins a tie.
    """
    clip = keyframe.clip
    image = f'rawframes/{clip.name}/img_{keyframe.frame_index + 1:05d}.jpg'
    extra = f'rawframes/{clip.name}/img_{clip.num_frames + 1:05d}.jpg'
    files = [f'videos/{clip.name}.mp4']
    if not os.path.exists(root / extra):
        files.insert(0, image)
    frame = Frame(keyframe, image, 0)  # if neither exists
    newest = -1
    for file in files:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = os.stat(root / file)
            if int(status.st_mtime) > newest:
                newest = int(status.st_mtime)
                frame = Frame(keyframe, file, status.st_size)
    return frame


def plan_frames(keyframes: Iterable[Keyframe], neighbors: int, root: Path) -> list[Frame]:
    """Return the frames of keyframes and of their neighbors within the clip, each second once.

    If two clips cover a keyframe, it is read from the one that it is annotated in.
    """
    planned: dict[str, Keyframe] = {}
    for distance in sorted(
        range(-neighbors, neighbors + 1), key=abs
    ):  # 0, the annotated ones, first
        for clip, timestamp in keyframes:
            neighbor = Keyframe(clip, timestamp + distance)
            if clip.start <= neighbor.timestamp < clip.end:
                planned.setdefault(neighbor.key, neighbor)
    return [find_frame(root, keyframe) for keyframe in sorted(planned.values())]


def read_raw_frame(path: Path) -> np.ndarray:
    """Read a JPEG as BGR uint8 (H, W, 3); a ValueError says why that fails."""
    import cv2

    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(error.strerror) from None
    # OpenCV fills the rest of a truncated JPEG with grey
    if not data.rstrip(b'\0').endswith(b'\xff\xd9'):
        raise ValueError('not a complete JPEG')
    image = None
    with contextlib.suppress(cv2.error):  # a header that claims billions of pixels
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError('broken JPEG')
    return image


def read_frame(root: Path, frame: Frame) -> np.ndarray:
    """Read a frame from its file as BGR uint8 (H, W, 3); a ValueError says why that fails."""
    if not frame.file.endswith('.mp4'):
        try:
            return read_raw_frame(root / frame.file)
        except ValueError as error:
            raise ValueError(f'{error} {frame.file}') from None
    import decord  # after torch, whose convolutions crash otherwise (decord2 3.4, torch 2.14)

    decord.logging.set_level(decord.logging.QUIET)
    index = frame.keyframe.frame_index
    try:
        video = decord.VideoReader(str(root / frame.file), num_threads=1)
        return np.ascontiguousarray(video[index].asnumpy()[..., ::-1])
    except (decord.DECORDError, RuntimeError, IndexError):
        raise ValueError(f'frame {index + 1} of {frame.file} cannot be decoded') from None


def find_checkpoint(source: str) -> Path:
    """Return the file of a checkpoint; download a URL once, to where PyTorch keeps such files."""
    path = Path(source).expanduser().absolute()
    if re.match(r'https?://', source):
        import torch

        path = Path(torch.hub.get_dir()) / 'checkpoints' / source.rsplit('/', 1)[-1]
        digest = re.search(r'-([0-9a-f]{8,})\.', path.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                torch.hub.download_url_to_file(source, str(path), digest[1] if digest else None)
        except (OSError, RuntimeError, HTTPException) as error:
            reason = f'cannot be downloaded ({error}); give a file with --checkpoint'
            sys.exit(f'error: {source} {reason}')
    if not path.is_file():
        sys.exit(f'error: checkpoint {source!r} not found; set --checkpoint to a file or URL')
    return path


def use_torchvision_operators() -> None:
    """Give mmcv-lite, which has no compiled operators, those of torchvision and PyTorch.

    Each wheel of torchvision has NMS and RoIAlign for the CPU and for CUDA. All other operators
    raise NotImplementedError.
    """
    from torchvision.ops import nms, roi_align

    def torchvision_nms(boxes, scores, iou_threshold, offset):
        return nms(boxes + boxes.new_tensor([0, 0, offset, offset]), scores, iou_threshold)

    def torchvision_roi_align(features, rois, output, *unused, **options):
        size = options['aligned_height'], options['aligned_width']
        rest = (options[name] for name in ('spatial_scale', 'sampling_ratio', 'aligned'))
        output.copy_(roi_align(features, rois, size, *rest))

    def deformable_attention(value, shapes, level_starts, locations, weights, im2col_step):
        from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

        return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)

    def unavailable(name):
        if name.startswith('__'):
            raise AttributeError(name)

        def operator(*args, **options):
            raise NotImplementedError(
                f"it needs mmcv's compiled operator {name}; install mmcv==2.1.0 built from source "
                'in place of mmcv-lite (see README), or take another detector'
            )

        return operator

    if importlib.util.find_spec('mmcv._ext'):  # a built mmcv has all of them
        return
    module: Any = types.ModuleType('mmcv._ext')
    # mmengine asks whether it has a loader, of any kind
    module.__spec__ = ModuleSpec('mmcv._ext', BuiltinImporter)  # type: ignore[arg-type]
    module.nms = torchvision_nms
    module.roi_align_forward = torchvision_roi_align
    module.ms_deform_attn_forward = deformable_attention
    module.__getattr__ = unavailable
    sys.modules['mmcv._ext'] = module  # where mmcv.ops looks for them when it is imported


def load_config(path: Path, custom_imports: bool):
    """Load the detector's config; its own imports, which take seconds, may be left out."""
    from mmengine.config import Config

    try:
        return Config.fromfile(path, import_custom_modules=custom_imports)
    except Exception as error:  # a config is a program: it may raise anything
        reason = f'is not a valid mmdetection config: {first_line(error)}'
        raise DetectorError(f'{path} {reason}') from None


def build_model(config_path: Path) -> tuple[Module, Callable]:
    """Build a config's model, on the CPU, and its test pipeline."""
    use_torchvision_operators()
    config = load_config(config_path, custom_imports=True)
    try:
        from mmcv.transforms import Compose
        from mmdet.registry import MODELS
        from mmdet.utils import get_test_pipeline_cfg, register_all_modules
        from mmengine.model import revert_sync_batchnorm

        register_all_modules()
        model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
        pipeline = get_test_pipeline_cfg(config)
        pipeline[0].type = 'mmdet.LoadImageFromNDArray'
        return model, Compose(pipeline)
    except Exception as error:  # a config may name any class; mmdet refuses other mmcvs
        reason = f'does not build a detector: {first_line(error)}'
        raise DetectorError(f'{config_path} {reason}') from None


def load_weights(model: Module, checkpoint: Path) -> None:
    """Load a weights-only checkpoint into the model that it was made for."""
    import torch
    from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

    try:
        loaded = torch.load(checkpoint, map_location='cpu', weights_only=True)
        weights = loaded.get('state_dict', loaded)
        consume_prefix_in_state_dict_if_present(weights, 'module.')  # of data parallel training
    except Exception as error:  # a damaged pickle may make torch raise anything
        raise DetectorError(
            f'{checkpoint} is damaged, not a checkpoint, or holds more than weights '
            f'({type(error).__name__}); if it was downloaded, delete it and run again; if it is '
            'your own, save its state_dict alone'
        ) from None
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        differing = missing + unexpected
    except RuntimeError as error:  # tensors of another shape
        differing = re.findall(r'size mismatch for (\S+):', str(error)) or [first_line(error)]
    # mean and std come from the config; ema_* are averaged copies of the weights
    harmless = re.compile(r'data_preprocessor\.|ema_|.*num_batches_tracked$')
    differing = [name for name in differing if not harmless.match(name)]
    if differing:
        raise DetectorError(
            f'{checkpoint} does not fit the config: {len(differing)} tensors differ, first '
            f'{", ".join(differing[:3])}; give the --config that it was trained with'
        )


def choose_device(num_gpus: int | None) -> str:
    """Return the device of this process: local worker k takes GPU k modulo the number of GPUs."""
    import torch

    if num_gpus is None:
        num_gpus = min(1, torch.cuda.device_count())
    if not num_gpus:
        return 'cpu'
    worker = re.search(r'SpawnProcess-(\d+)', current_process().name)
    return f'cuda:{int(worker[1]) % num_gpus}' if worker else 'cuda:0'


def predict(model: Module, batch: list[dict], device: str, amp: bool) -> list:
    """Run the model on frames that are padded to the same size; return a result for each."""
    import torch

    # float16 is more exact than bfloat16, but slow on CPUs
    kind = device.split(':')[0]
    half = torch.bfloat16 if kind == 'cpu' else torch.float16
    data = {name: [frame[name] for frame in batch] for name in ('inputs', 'data_samples')}
    with torch.no_grad(), torch.autocast(kind, half, enabled=amp):
        return model.test_step(data)  # type: ignore[operator]  # a method of mmdet's models


def extract_people(result, score_thr: float) -> np.ndarray:
    """Return the people in a model's result, as Detections.boxes has them, clipped to the frame."""
    height, width = result.ori_shape
    found = result.pred_instances
    found = found[(found.labels == PERSON) & (found.scores > score_thr)]
    boxes = np.clip(found.bboxes.double().cpu().numpy() / [width, height, width, height], 0, 1)
    people = np.column_stack([boxes, found.scores.double().cpu().numpy()])
    # without boxes of NaN and boxes in the padding
    return people[(boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])]


def boxes_agree(first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether at least half of the clear boxes of both (n, 5) match one in the other.

    That is loose, since a broken device matches almost none.
    """
    tolerance = [MAX_BOX_SHIFT] * 4 + [MAX_SCORE_SHIFT]
    matched = [
        (abs(others - box) < tolerance).all(axis=1).any()
        for boxes, others in ((first, second), (second, first))
        for box in boxes[boxes[:, 4] > CLEAR_SCORE]
    ]
    return sum(matched) >= len(matched) / 2


@functools.lru_cache(maxsize=1)
def start_detector(options: Options) -> Detector:
    """Start the detector on the device of this process.

    Raises DetectorError if the GPU finds other people on the first frames than the CPU does. The
    GPU runs as it will later, with --amp or without; the CPU computes in float32. Frames that
    cannot be read are left out.
    """
    model, pipeline = build_model(options.config)
    load_weights(model, options.checkpoint)
    device = choose_device(options.num_gpus)
    if device == 'cpu':
        return Detector(model, pipeline, device)
    loaded = load_frames(options.first_frames, options.root, pipeline)
    first = [data for _, data, error in loaded if not error]
    found = []  # on the CPU, then on the GPU: the people on each frame
    try:
        for where, amp in ('cpu', False), (device, options.amp):
            model.to(where)
            results = [predict(model, [data], where, amp)[0] for data in first]
            found.append([extract_people(result, 0) for result in results])
    except Exception as error:  # whatever an arbitrary model, or a broken device, raises
        raise DetectorError(f'the detector cannot run: {first_line(error)}') from None
    if not all(map(boxes_agree, *found)):
        raise DetectorError(f'{device} and the CPU disagree on the first frames')
    return Detector(model, pipeline, device)


def load_frames(
    frames: Iterable[Frame], root: Path, pipeline: Callable
) -> Iterator[tuple[Frame, dict, str]]:
    """Yield (frame, what the test pipeline makes of it, why that failed) in the frames' order.

    Frames are loaded ahead in threads, since decoding and resizing let other threads run.
    """

    def load(frame: Frame) -> tuple[Frame, dict, str]:
        try:
            image = read_frame(root, frame)
        except ValueError as error:
            return frame, {}, f'unreadable frame: {error}'
        try:
            return frame, pipeline({'img': image, 'img_id': 0}), ''
        except Exception as error:  # of an arbitrary pipeline; OpenCV has limits, too
            return frame, {}, f'frame that the test pipeline cannot take: {first_line(error)}'

    loading: deque[Future] = deque()
    with ThreadPoolExecutor(NUM_LOADERS) as threads:
        for frame in frames:
            loading.append(threads.submit(load, frame))
            if len(loading) > 2 * NUM_LOADERS:
                yield loading.popleft().result()
        while loading:
            yield loading.popleft().result()


def detect_batch(
    batch: list[tuple[Frame, dict]], detector: Detector, options: Options
) -> list[Detections]:
    """Detect people on loaded frames that are padded to the same size."""
    try:
        results = predict(detector.model, [data for _, data in batch], detector.device, options.amp)
    except Exception as error:  # whatever an arbitrary model raises: CUDA errors, wrong shapes
        raise DetectorError(
            f'the detector failed on {batch[0][0].keyframe.key}: {first_line(error)}; run the same '
            'command again, with a smaller --batch_size if memory is short'
        ) from None
    return [
        Detections(frame.keyframe.key, extract_people(result, options.score_thr))
        for (frame, _), result in zip(batch, results)
    ]


def detect(frames: list[Frame], options: Options) -> list[Detections]:
    """Detect people on frames.

    A batch has frames that are padded to the same size, so that none gets more padding than alone.
    """
    detector = start_detector(options)
    batch_size = options.batch_size or (4 if detector.device == 'cpu' else 8)
    divisor = getattr(detector.model.data_preprocessor, 'pad_size_divisor', 1)
    detections = []
    batches = defaultdict(list)
    for frame, data, error in load_frames(frames, options.root, detector.pipeline):
        if error:
            detections.append(Detections(frame.keyframe.key, NOTHING, error))
            continue
        padded = tuple(-(-side // divisor) for side in data['inputs'].shape[1:])
        batches[padded].append((frame, data))
        if len(batches[padded]) == batch_size:
            detections += detect_batch(batches.pop(padded), detector, options)
    for batch in batches.values():
        detections += detect_batch(batch, detector, options)
    return detections


def init_worker() -> None:
    """Make a worker ignore Ctrl-C, which is for its parent, and die with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def connect(address: str) -> tuple[Executor, tuple[type[Exception], ...]]:
    """Connect to a Dask cluster; return its executor and its errors for killed workers.

    Uploads this script, so that workers can import it.
    """
    try:
        import dask
        from distributed import Client, KilledWorker
    except ImportError:
        sys.exit('error: --dask_scheduler needs Dask; pip install distributed')
    # an item of Step 3 may hold a video, which exceeds the default
    dask.config.set({'distributed.admin.large-graph-warning-threshold': '1 GB'})
    logging.disable()  # Dask would log tracebacks of errors that are reported in one line
    try:
        client = Client(address, timeout=10)
        tqdm.write(f'waiting for the workers of {address}', sys.stderr)
        client.wait_for_workers(1, timeout=30)
        client.upload_file(__file__)
    except (OSError, ValueError) as error:
        sys.exit(f'error: no Dask scheduler with workers at {address}: {error}'.split('\n')[0])
    # ValueError: distributed's own, if a worker is killed while its result is on the way
    return client.get_executor(pure=False), (KilledWorker, ValueError)


def run_all(
    function: Callable, items: Iterable, options: tuple, num_workers: int, scheduler: str | None
) -> Generator[tuple[Any, Any], None, None]:
    """Yield (item, function(item, options)) as items are done; take them as workers become free.

    Runs in this process, in local processes or on a Dask cluster. There, the result is None if an
    item's workers were killed.
    """
    if num_workers == 1 and not scheduler:  # in this process, where a debugger can stop it
        yield from ((item, function(item, options)) for item in items)
        return
    worker_died: tuple[type[Exception], ...] = ()  # catches nothing
    limit = MAX_QUEUED
    if scheduler:
        executor, worker_died = connect(scheduler)
    else:
        num_workers = cpu_count() if num_workers == -1 else num_workers
        executor = ProcessPoolExecutor(num_workers, get_context('spawn'), init_worker)
        limit = 2 * num_workers
    waiting = iter(items)
    running: dict[Future, Any] = {}
    try:
        while True:
            for item in islice(waiting, limit - len(running)):
                running[executor.submit(function, item, options)] = item
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                item = running.pop(future)
                try:
                    yield item, future.result()
                except worker_died:
                    yield item, None
    except BrokenProcessPool:
        sys.exit('error: a worker process was killed: out of memory? run again with fewer of them')
    except CancelledError:
        sys.exit('error: the Dask scheduler went away; run the same command again')
    finally:
        if running:  # left early: kill local workers, or shutdown would wait for them
            for child in active_children():
                child.kill()
        executor.shutdown(wait=not (scheduler and running))  # Dask cancels what is running


def read_cache(path: Path, detector_id: str, score_thr: float) -> dict[tuple, np.ndarray]:
    """Return the cached boxes (n, 5) of each frame, by Frame.identity, that this detector found.

    The file has JSON lines: each run appends one for its detector and --score_thr, then one for
    each frame. A malformed line, and all after it up to the next detector's, is ignored.
    """
    cached = {}
    is_usable = False  # whether the lines to come are of this detector, with a score_thr as low
    with open(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            try:
                record = json.loads(line)
                if 'detector' in record:
                    is_same = record['detector'] == detector_id
                    is_usable = is_same and record['score_thr'] <= score_thr
                elif is_usable:
                    identity = record['key'], record['file'], record['size']
                    cached[identity] = np.array(record['people'], float).reshape(-1, 5)
            except (ValueError, TypeError, KeyError):
                is_usable = False
    return cached


class Pickler(pickle.Pickler):
    """Writes arrays so that NumPy 1.21 to 2.x can read them.

    Names numpy.ndarray, not a function of numpy._core, which NumPy 1 does not have.
    """

    def reducer_override(self, value):
        if type(value) is np.ndarray:  # an empty array of this shape and type, then what fills it
            return np.ndarray, (value.shape, value.dtype.str), value.__reduce__()[2]
        return NotImplemented


def write_if_changed(path: Path, content: bytes) -> None:
    """Write a file atomically; leave an equal one as it is."""
    part = path.with_suffix('.part')
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        part.write_bytes(content)
        os.replace(part, path)


def write_csv(path: Path, rows: list[tuple]) -> None:
    table = io.StringIO()
    csv.writer(table, lineterminator='\n').writerows(rows)
    write_if_changed(path, table.getvalue().encode('utf-8', 'backslashreplace'))


def compute_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the intersection over union (n, m) of boxes (n, 4) with others (m, 4).

    torchvision has it, too, but takes four seconds to import.
    """
    top_left = np.maximum(boxes[:, None, :2], others[:, :2])
    bottom_right = np.minimum(boxes[:, None, 2:], others[:, 2:])
    intersection = np.clip(bottom_right - top_left, 0, None).prod(axis=2)
    areas, other_areas = ((some[:, 2:] - some[:, :2]).prod(axis=1) for some in (boxes, others))
    return intersection / (areas[:, None] + other_areas - intersection)


def count_matched(annotated: Boxes, proposals: np.ndarray) -> list:
    """Count the annotated boxes that proposals (m, 5) match: by all and by those kept, at each IoU.

    The last item is the IoU of the box that is matched worst.
    """
    ious = compute_iou(np.array(sorted(annotated)), proposals[:, :4])
    kept = proposals[:, 4] >= min(KEPT_SCORE, proposals[:, 4].max(initial=0))  # or the best one
    best = ious.max(axis=1, initial=0)
    best_kept = ious[:, kept].max(axis=1, initial=0)
    counts = [(some >= iou).sum() for some in (best, best_kept) for iou in (LOOSE_IOU, STRICT_IOU)]
    return [*counts, f'{best.min():.3f}']


def report_recall(path: Path, keyframes: dict[Keyframe, Boxes], proposals: dict) -> str | None:
    """Report how well the proposals match the annotated boxes of each keyframe, the worst first.

    Prints a summary. If they hardly match, prints and returns a warning.
    """
    rows = []
    for keyframe, boxes in keyframes.items():
        found = proposals.get(keyframe.key, NOTHING)
        counts = (len(boxes), len(found), *count_matched(boxes, found))
        rows.append((keyframe.clip.name, keyframe.timestamp, *counts))
    rows.sort(key=lambda row: (float(row[-1]), row))  # by worst_iou
    write_csv(path, [tuple(RECALL), *rows])
    if not rows:
        return None
    num_boxes, _, *matched = np.sum([row[2:-1] for row in rows], axis=0)
    recall, strict, kept, kept_strict = (count / num_boxes for count in matched)
    print(
        f'  recall of {num_boxes:,} annotated boxes:{"IoU 0.5":>12}{"0.75":>9}\n'
        f'    all proposals{recall:26.1%}{strict:9.1%}\n'
        f'    those that MMAction2 keeps{kept:13.1%}{kept_strict:9.1%}\n'
        f'    worst keyframes first: {path}'
    )
    empty = np.mean([row[3] == 0 for row in rows])
    if recall >= LOW_RECALL and empty <= MANY_EMPTY:
        return None
    warning = (
        f'warning: proposals match {recall:.1%} of the annotated boxes, and {empty:.1%} of the '
        'keyframes have none; usual causes: --score_thr is too high, the checkpoint is the wrong '
        'one, or the frames are those of other videos'
    )
    print(f'  {warning}')
    return warning


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def count_gpus(wanted: int | None) -> int:
    """Return how many GPUs to use: as many as wanted, or all; say so if there is none."""
    import torch

    visible = torch.cuda.device_count()
    if wanted is None and not visible:
        tqdm.write('no GPU is visible to PyTorch: the CPU is used')
    if wanted is not None and wanted > visible:
        sys.exit(f'error: GPUs visible to PyTorch: {visible}, not {wanted}; check its build')
    return visible if wanted is None else wanted


def detect_all(
    frames: list[Frame], args: argparse.Namespace, checkpoint: Path
) -> Iterator[list[Detections]]:
    """Yield the detections of chunks of frames, on the cluster, the GPUs or the CPU."""
    num_gpus = None if args.dask_scheduler else count_gpus(args.num_gpus)
    options = Options(
        args.avakinetics_root,
        args.config,
        checkpoint,
        num_gpus,
        args.score_thr,
        args.amp,
        args.batch_size,
        tuple(frames[:FIRST_FRAMES]),
    )
    size = CPU_CHUNK if num_gpus == 0 else CHUNK
    chunks = [frames[first : first + size] for first in range(0, len(frames), size)]
    results = run_all(detect, chunks, options, num_gpus or 1, args.dask_scheduler)
    with contextlib.closing(results):
        for chunk, detections in results:
            yield detections or [
                Detections(frame.keyframe.key, NOTHING, GIVEN_UP) for frame in chunk
            ]


def identify_detector(args: argparse.Namespace, checkpoint: Path) -> str:
    """Return what tells detectors apart: digests of the config and the weights, the precision."""
    config = load_config(args.config, custom_imports=False)
    settings = [config.get(name) for name in ('model', 'test_dataloader', 'custom_imports')]
    text = json.dumps(settings, sort_keys=True, default=str)
    return f'{digest_of(text.encode())} {digest_of(checkpoint.read_bytes())} {args.amp}'


def detect_missing(
    frames: dict[str, Frame], checkpoint: Path, args: argparse.Namespace
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the boxes on each frame, and why other frames failed; detect what is not cached."""
    # look up what earlier runs detected
    detector_id = identify_detector(args, checkpoint)
    cache = args.picklepath.with_name(f'{args.picklepath.name}.frames.jsonl')
    cached = read_cache(cache, detector_id, args.score_thr) if cache.exists() else {}
    found = {
        key: cached[frame.identity] for key, frame in frames.items() if frame.identity in cached
    }
    missing = [frame for key, frame in frames.items() if key not in found]
    failed: dict[str, str] = {}
    print(f'frames to detect: {len(missing):,}, detected before: {len(found):,}', flush=True)
    if not missing:
        return found, failed

    # detect the others
    cache.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(cache, 'a', encoding='utf-8', buffering=1) as file,  # a line at once
        tqdm(desc='detect', total=len(missing), unit='frame', smoothing=0, leave=False) as bar,
    ):
        start = json.dumps({'detector': detector_id, 'score_thr': args.score_thr})
        file.write(f'\n{start}\n')  # on a new line, after one that a kill cut off
        for chunk in detect_all(missing, args, checkpoint):
            if not bar.n:  # start the clock again, since the detector's start is in the first chunk
                bar.reset()
                bar.initial = len(chunk)  # which tqdm then leaves out of its rate
            bar.update(len(chunk))
            for key, boxes, error in chunk:
                if error:
                    failed[key] = error
                    continue
                found[key] = boxes
                record = dict(zip(('key', 'file', 'size'), frames[key].identity))
                file.write(json.dumps(record | {'people': boxes.tolist()}) + '\n')
    return found, failed


def write_proposals(path: Path, found: dict[str, np.ndarray], score_thr: float) -> dict:
    """Write the pickle of the boxes that score enough; return what it holds."""
    proposals = {
        key: kept
        for key, boxes in sorted(found.items())
        if len(kept := boxes[boxes[:, 4] > score_thr])
    }
    content = io.BytesIO()
    Pickler(content, protocol=4).dump(proposals)
    write_if_changed(path, content.getvalue())
    return proposals


def write_record(
    warning: str | None, unreadable: list[Frame], datalist_digest: str, args: argparse.Namespace
) -> None:
    """Record how the proposals were made, and which files cannot be read, for Steps 7a and 7b."""
    names = ('checkpoint', 'score_thr', 'neighbors', 'amp')
    record = {name: getattr(args, name) for name in names}
    record |= {name: version(name) for name in ('torch', 'mmdet')}
    record |= {
        'config': args.config.name,
        'warning': warning,
        'unreadable': {frame.file: frame.size for frame in unreadable},
        'datalist_sha256': datalist_digest,
        'proposals_sha256': digest_of(args.picklepath.read_bytes()),
    }
    path = args.avakinetics_root / f'reports/fetch_proposal_{args.split}.json'
    write_if_changed(path, json.dumps(record).encode())


def fetch(args: argparse.Namespace) -> None:
    """Detect what is missing, write the pickle and the reports, print the summary."""
    # plan the frames
    check_args(args)
    reports = args.avakinetics_root / 'reports'
    keyframes = read_datalist(args.datalist)
    datalist_digest = digest_of(args.datalist.read_bytes())
    checkpoint = find_checkpoint(args.checkpoint)
    planned = plan_frames(keyframes, args.neighbors, args.avakinetics_root)
    frames = {frame.keyframe.key: frame for frame in planned}

    # detect the people on them
    found, failed = detect_missing(frames, checkpoint, args)
    rows = sorted(
        (frames[key].keyframe.clip.video_id, frames[key].keyframe.timestamp, reason)
        for key, reason in failed.items()
    )
    report = reports / f'fetch_proposal_{args.split}.csv'
    write_csv(report, [('video_id', 'timestamp', 'reason'), *rows])
    if not found:
        sys.exit(f'error: no frame could be read; {report} says why')

    # write the proposals, compare them with the annotated boxes
    proposals = write_proposals(args.picklepath, found, args.score_thr)
    count = (
        f'{sum(map(len, proposals.values())):,}, on {len(proposals):,} of {len(frames):,} frames'
    )
    print(f'proposals in {args.picklepath}: {count}')
    seen = {keyframe: boxes for keyframe, boxes in keyframes.items() if keyframe.key in found}
    warning = report_recall(reports / f'recall_{args.split}.csv', seen, proposals)
    unreadable = [frames[key] for key in failed if failed[key].startswith('unreadable frame:')]
    write_record(warning, unreadable, datalist_digest, args)

    # print the summary
    empty = sum(keyframe.key not in proposals for keyframe in keyframes)
    print(
        f'  annotated keyframes without a proposal: {empty:,} of {len(keyframes):,}; MMAction2 '
        'takes the whole frame there'
    )
    for reason, number in Counter(row[2].split(':')[0] for row in rows).items():
        print(f'  {number:,} skipped: {reason}')
    if rows:
        print(f'  report: {report}')


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    sys.stderr = sys.stderr or open(os.devnull, 'w')  # None if it is closed
    os.environ['MPLBACKEND'] = 'agg'  # a notebook's may not be in this environment
    os.environ['PYTHONWARNINGS'] = 'ignore'  # those of libraries, in workers and here
    warnings.simplefilter('ignore')
    try:
        fetch(parse_args(argv))
        print(end='', flush=True)  # so that a closed pipe is noticed here
    except BrokenPipeError:  # `| head` has read enough
        os._exit(141)
    except DetectorError as error:
        sys.exit(f'error: {error}')
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; fix it, then run the same command again')
    except KeyboardInterrupt:
        print('interrupted; run the same command again', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':  # run as a module: workers of a cluster cannot import __main__
    sys.path.insert(0, os.path.dirname(__file__))  # python -P leaves it out
    importlib.import_module(Path(__file__).stem).main()
