#!/usr/bin/env python3
r"""Step 6: detect the people on the annotated keyframes.

Reads ROOT/kinetics_train.csv and the frames in ROOT/rawframes, or in ROOT/videos where raw frames
are missing or older. Runs a person detector of mmdetection on each annotated keyframe and on the
seconds before and after it. Writes ROOT/kinetics_proposal.pkl: a dict with keys
'<video id>,<second:04d>' and values float64 (n, 5) of x1, y1, x2, y2, score, relative to the frame,
score > --score_thr. A frame without people has no key. Frames that could not be read are in
ROOT/reports/fetch_proposal_train.csv; how well the proposals match the annotated boxes is in
ROOT/reports/recall_train.csv.

Detections are kept in kinetics_proposal.pkl.frames.jsonl: the same command continues after an
interruption, and one with a longer list detects only what is new.

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
from typing import TYPE_CHECKING, Callable, Iterable, Iterator, NamedTuple

import numpy as np
from joblib import cpu_count
from tqdm import tqdm

if TYPE_CHECKING:
    from distributed import Client
    from torch.nn import Module

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
CHECKPOINT = (
    'https://download.openmmlab.com/mmdetection/v2.0/cascade_rcnn/cascade_rcnn_x101_64x4d_fpn_1x_coco/'
    'cascade_rcnn_x101_64x4d_fpn_1x_coco_20200515_075702-43ce6a30.pth'
)
FPS = 30
PERSON = 0  # COCO's class
CHUNK, CPU_CHUNK = 1024, 64  # frames that a process gets at once, and what a kill loses
LOADERS = 4  # threads that load frames, in each process
# Before it starts, a GPU is compared with the CPU on the first frames: the people who score more
# than CLEAR_SCORE. Accepted shifts of boxes, as a fraction of the frame, and of scores are ten
# times those of TF32, float16 and bfloat16
FIRST_FRAMES = 3
CLEAR_SCORE, MAX_BOX_SHIFT, MAX_SCORE_SHIFT = 0.6, 0.05, 0.1
# What MMAction2 keeps of a keyframe's proposals, its person_det_score_thr, and the best one if none
# scores as much
KEPT_SCORE = 0.9
LOOSE, STRICT = 0.5, 0.75  # IoU above which a proposal matches an annotated box
# columns of the report on recall: matched boxes by all proposals, then by those kept
RECALL = ['clip', 'second', 'boxes', 'proposals']
RECALL += ['matched_0.5', 'matched_0.75', 'kept_0.5', 'kept_0.75', 'worst_iou']
LOW_RECALL, MANY_EMPTY = 0.8, 0.2  # where Step 6 warns; AVA's own recall is 93.9 %
NOTED = 'key', 'file', 'size', 'people'  # in a frame's line of the file of detections
FRACTION = r'(-?\d*\.?\d+)'
# clip, second, box, action, entity
ROW = re.compile(
    rf'([A-Za-z0-9_-]{{11}}_\d{{6}}_\d{{6}}),(\d+){f",{FRACTION}" * 4},\d+,-?\d+', re.ASCII
)
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
AHEAD = 500  # items that a cluster is given at once
GIVEN_UP = 'given up: the workers of the cluster that had it were killed'


class DetectorError(Exception):
    """What keeps the detector from running, as one line for the user."""


class Frame(NamedTuple):
    """A frame to detect people on: its key in the pickle, its clip, its second of the YouTube
    video, and the file below ROOT that it is read from, with its size in bytes.
    """

    key: str
    clip: str
    second: int
    file: str
    size: int

    @property
    def index(self) -> int:
        """Its number in the clip, from 0."""
        return (self.second - int(self.clip[-13:-7])) * FPS

    @property
    def state(self) -> tuple[str, str, int]:
        """What tells a frame that changed; a time would tell each frame that was copied."""
        return self.key, self.file, self.size


class Options(NamedTuple):
    """The data set, the detector and how it runs; gpus is None if a worker uses what it has."""

    root: Path
    config: Path
    checkpoint: Path
    gpus: int | None
    score_thr: float
    amp: bool
    batch_size: int | None
    first_frames: tuple[Frame, ...]


def first_line(error: Exception) -> str:
    return f'{type(error).__name__}: {error}'.splitlines()[0]


def to_path(text: str) -> Path:
    """The path that an argument names."""
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
    add_running(parser)
    return parser


def add_running(parser: argparse.ArgumentParser) -> None:
    """The arguments that say with which detector and where the step runs."""
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
        help='frames of equal size that the detector takes at once (default: 8 on a GPU, 4 on the '
        'CPU)',
    )
    running.add_argument(
        '--dask_scheduler',
        metavar='ADDRESS',
        help='work on the Dask cluster of this scheduler, such as tcp://host:8786',
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    os.getcwd()  # raises OSError where it was deleted, where torch would crash
    args = build_parser().parse_args(argv)
    if args.neighbors < 0 or (args.num_gpus or 0) < 0:
        sys.exit('error: --neighbors and --num_gpus must be 0 or more')
    if args.batch_size is not None and args.batch_size < 1:
        sys.exit('error: --batch_size must be 1 or more')
    if not 0 <= args.score_thr < 1:
        sys.exit('error: --score_thr must be at least 0 and below 1')
    # absolute, since a cluster's workers are in other folders
    root = args.avakinetics_root = args.avakinetics_root.absolute()
    args.reports = root / 'reports'
    args.datalist = (args.datalist or root / 'kinetics_train.csv').absolute()
    args.name = args.datalist.stem.removeprefix('kinetics_')
    part = '' if args.name == 'train' else f'_{args.name}'
    args.picklepath = (args.picklepath or root / f'kinetics{part}_proposal.pkl').absolute()
    args.config = args.config.absolute()
    for path, wanted in (
        (args.datalist, 'run Step 5 (prepare_annotation.py) or set --datalist to its csv'),
        (args.config, 'set --config to an mmdetection config'),
    ):
        if not path.is_file():
            sys.exit(f'error: {path} is not a file; {wanted}')
    other = dict(train='kinetics_val_proposal.pkl', val='kinetics_proposal.pkl').get(args.name)
    if other and args.picklepath == root / other:
        sys.exit(
            f'error: {args.picklepath} is of the other split; set --picklepath to another file'
        )
    if args.picklepath.is_dir() or args.picklepath == args.datalist:
        sys.exit(f'error: {args.picklepath} is a folder or the list; set --picklepath to a pickle')
    return args


def read_datalist(path: Path) -> dict[tuple[str, int], set]:
    """The annotated boxes of each keyframe (clip, second).

    A box is x1, y1, x2, y2, relative to the frame.
    """
    keyframes = defaultdict(set)
    for number, line in enumerate(path.read_text(errors='replace').splitlines(), 1):
        row = ROW.fullmatch(line)
        if not row:
            sys.exit(f'error: line {number} of {path} was not written by Step 5; run Step 5 again')
        clip, second, *box = row.groups()
        keyframes[clip, int(second)].add(tuple(map(float, box)))
    if not keyframes:
        sys.exit(f'error: {path} is empty; run Step 5 again')
    return keyframes


def key_of(clip: str, second: int) -> str:
    """What a keyframe is called in the pickle."""
    return f'{clip[:11]},{second:04d}'


def find_file(root: Path, clip: str, second: int) -> tuple[str, int]:
    """The file below ROOT that a frame is read from, and its size in bytes.

    A raw frame or, if that is missing or older, the clip; the clip, too, where its folder has more
    frames than its name says. By whole seconds, as tar keeps times.
    """
    image, extra = (
        f'rawframes/{clip}/img_{(moment - int(clip[-13:-7])) * FPS + 1:05d}.jpg'
        for moment in (second, int(clip[-6:]))
    )
    found, files = [(0, image, 0)], [f'videos/{clip}.mp4']
    for file in files if os.path.exists(root / extra) else [image, *files]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            state = os.stat(root / file)
            found.append((int(state.st_mtime), file, state.st_size))
    return max(found, key=lambda file: file[0])[1:]


def plan_frames(keyframes: Iterable[tuple[str, int]], neighbors: int, root: Path) -> list[Frame]:
    """Each keyframe (clip, second) and its neighbours within the clip, each second once.

    A keyframe is read from its own clip, where two clips hold it.
    """
    planned = {}
    for distance in sorted(range(-neighbors, neighbors + 1), key=abs):
        for clip, second in keyframes:
            if int(clip[-13:-7]) <= second + distance < int(clip[-6:]):
                planned.setdefault(key_of(clip, second + distance), (clip, second + distance))
    ordered = sorted(planned.items(), key=lambda item: item[1])
    return [Frame(key, *where, *find_file(root, *where)) for key, where in ordered]


def read_frame(root: Path, frame: Frame) -> np.ndarray:
    """A frame as BGR uint8 (H, W, 3); ValueError says why it cannot be read."""
    import cv2

    if frame.file.endswith('.mp4'):
        import decord  # after torch, whose convolutions crash otherwise (decord2 3.4, torch 2.14)

        decord.logging.set_level(decord.logging.QUIET)
        try:
            video = decord.VideoReader(str(root / frame.file), num_threads=1)
            return np.ascontiguousarray(video[frame.index].asnumpy()[..., ::-1])
        except (decord.DECORDError, RuntimeError, IndexError):
            raise ValueError(f'frame {frame.index + 1} of {frame.file} cannot be decoded') from None
    try:
        data = (root / frame.file).read_bytes()
    except OSError as error:
        raise ValueError(f'{error.strerror} {frame.file}') from None
    # OpenCV fills the rest of a truncated JPEG with grey
    if not data.rstrip(b'\0').endswith(b'\xff\xd9'):
        raise ValueError(f'not a complete JPEG {frame.file}')
    with contextlib.suppress(cv2.error):  # a header that claims billions of pixels
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if image is not None:
            return image
    raise ValueError(f'broken JPEG {frame.file}')


def local_checkpoint(source: str) -> Path:
    """The file of a checkpoint; a URL is downloaded once, to where PyTorch keeps such files."""
    path = Path(source).expanduser().absolute()
    if re.match(r'https?://', source):
        import torch

        path = Path(torch.hub.get_dir()) / 'checkpoints' / source.rsplit('/', 1)[-1]
        digest = re.search(r'-([0-9a-f]{8,})\.', path.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                torch.hub.download_url_to_file(source, str(path), digest and digest[1])
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
    module = types.ModuleType('mmcv._ext')
    module.__spec__ = ModuleSpec('mmcv._ext', BuiltinImporter)  # mmengine asks whether there is one
    module.nms, module.roi_align_forward = torchvision_nms, torchvision_roi_align
    module.ms_deform_attn_forward, module.__getattr__ = deformable_attention, unavailable
    sys.modules['mmcv._ext'] = module  # where mmcv.ops looks for them when it is imported


def load_config(path: Path, custom_imports: bool):
    """The detector's config; its own imports, which take seconds, may be left out."""
    from mmengine.config import Config

    try:
        return Config.fromfile(path, import_custom_modules=custom_imports)
    except Exception as error:  # a config is a program: it may raise anything
        reason = f'is not a valid mmdetection config: {first_line(error)}'
        raise DetectorError(f'{path} {reason}') from None


def build_detector(config_path: Path, checkpoint: Path) -> tuple[Module, Callable]:
    """The config's model with the checkpoint's weights, on the CPU, and its test pipeline."""
    use_torchvision_operators()
    config = load_config(config_path, True)
    import torch
    from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

    try:
        from mmcv.transforms import Compose
        from mmdet.registry import MODELS
        from mmdet.utils import get_test_pipeline_cfg, register_all_modules
        from mmengine.model import revert_sync_batchnorm

        register_all_modules()
        model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
        pipeline = get_test_pipeline_cfg(config)
        pipeline[0].type = 'mmdet.LoadImageFromNDArray'
        pipeline = Compose(pipeline)
    except Exception as error:  # a config may name any class; mmdet refuses other mmcvs
        reason = f'does not build a detector: {first_line(error)}'
        raise DetectorError(f'{config_path} {reason}') from None
    try:
        loaded = torch.load(checkpoint, map_location='cpu', weights_only=True)
        weights = loaded.get('state_dict', loaded)
        consume_prefix_in_state_dict_if_present(weights, 'module.')  # of data parallel training
    except Exception as error:  # a damaged pickle may make torch raise anything
        raise DetectorError(
            f'{checkpoint} is damaged, no checkpoint, or holds more than weights '
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
    return model, pipeline


def own_device(gpus: int | None) -> str:
    """The device of this process: process number k has GPU k modulo the number of GPUs."""
    import torch

    if gpus is None:
        gpus = min(1, torch.cuda.device_count())
    number = re.search(r'SpawnProcess-(\d+)', current_process().name)
    return f'cuda:{int(number[1]) % gpus if number else 0}' if gpus else 'cpu'


def predict(model: Module, batch: list[dict], device: str, amp: bool) -> list:
    """The detector's answers to frames that are padded to the same size."""
    import torch

    # float16 is more exact than bfloat16, but slow on CPUs
    kind = device.split(':')[0]
    half = torch.bfloat16 if kind == 'cpu' else torch.float16
    names = 'inputs', 'data_samples'
    with torch.no_grad(), torch.autocast(kind, half, enabled=amp):
        return model.test_step({name: [data[name] for data in batch] for name in names})


def people_of(answer, score_thr: float) -> np.ndarray:
    """The people in a detector's answer: float64 (n, 5) of x1, y1, x2, y2, relative, clipped to
    [0, 1], and score.
    """
    found, (height, width) = answer.pred_instances, answer.ori_shape
    found = found[(found.labels == PERSON) & (found.scores > score_thr)]
    boxes = np.clip(found.bboxes.double().cpu().numpy() / [width, height, width, height], 0, 1)
    people = np.column_stack([boxes, found.scores.double().cpu().numpy()])
    # without boxes of NaN and boxes in the padding
    return people[(boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])]


def same_people(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether at least half of the clear detections of both (n, 5) have a match in the other: a
    broken device finds nearly none.
    """
    near = [MAX_BOX_SHIFT] * 4 + [MAX_SCORE_SHIFT]
    matched = [
        (abs(others - person) < near).all(axis=1).any()
        for people, others in ((ours, theirs), (theirs, ours))
        for person in people[people[:, 4] > CLEAR_SCORE]
    ]
    return sum(matched) >= len(matched) / 2


@functools.lru_cache(maxsize=1)
def start_detector(options: Options) -> tuple[Module, Callable, str]:
    """The detector on the device of this process, and its pipeline.

    Raises DetectorError if a GPU does not find whom the CPU finds in float32.
    """
    model, pipeline = build_detector(options.config, options.checkpoint)
    device = own_device(options.gpus)
    if device == 'cpu':
        return model, pipeline, device
    loaded = load_frames(options.first_frames, options.root, pipeline)
    first = [data for _, data in loaded if isinstance(data, dict)]
    people = []
    try:
        for where, amp in ('cpu', False), (device, options.amp):
            model.to(where)
            people.append([people_of(predict(model, [data], where, amp)[0], 0) for data in first])
    except Exception as error:  # whatever an arbitrary model, or a broken device, raises
        raise DetectorError(f'the detector cannot run: {first_line(error)}') from None
    if not all(map(same_people, *people)):
        raise DetectorError(f'the detector is wrong on {device}: the CPU finds other people')
    return model, pipeline, device


def load_frames(
    frames: Iterable[Frame], root: Path, pipeline: Callable
) -> Iterator[tuple[Frame, dict | str]]:
    """Frames in their order, each with what the test pipeline makes of it, or why it cannot."""

    def load(frame: Frame) -> tuple[Frame, dict | str]:
        try:
            image = read_frame(root, frame)
        except ValueError as error:
            return frame, f'unreadable frame: {error}'
        try:
            return frame, pipeline(dict(img=image, img_id=0))
        except Exception as error:  # of an arbitrary pipeline; OpenCV has limits, too
            return frame, f'frame that the test pipeline cannot take: {first_line(error)}'

    ahead = deque()
    with ThreadPoolExecutor(LOADERS) as threads:  # decoding and resizing let other threads run
        for frame in frames:
            ahead.append(threads.submit(load, frame))
            if len(ahead) > 2 * LOADERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def detect(frames: list[Frame], options: Options) -> list[tuple[str, np.ndarray | str]]:
    """The key of each frame with its people, or with the reason why it cannot be read.

    Frames go through the detector with others that are padded to the same size, so that none gets
    more padding than it would alone.
    """
    model, pipeline, device = start_detector(options)
    size = options.batch_size or (4 if device == 'cpu' else 8)
    multiple = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    found, batches = [], defaultdict(list)

    def flush(batch: list[tuple[Frame, dict]]) -> None:
        try:
            answers = predict(model, [data for _, data in batch], device, options.amp)
        except Exception as error:  # whatever an arbitrary model raises: CUDA errors, wrong shapes
            raise DetectorError(
                f'the detector failed on {batch[0][0].key}: {first_line(error)}; run the same '
                'command again, with a smaller --batch_size if memory is short'
            ) from None
        for (frame, _), answer in zip(batch, answers):
            found.append((frame.key, people_of(answer, options.score_thr)))
        batch.clear()

    for frame, data in load_frames(frames, options.root, pipeline):
        if isinstance(data, str):
            found.append((frame.key, data))
            continue
        batch = batches[tuple(-(-side // multiple) for side in data['inputs'].shape[1:])]
        batch.append((frame, data))
        if len(batch) == size:
            flush(batch)
    for batch in filter(None, batches.values()):
        flush(batch)
    return found


def shield() -> None:
    """Make a worker ignore Ctrl-C, which is for its parent, and die with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def connect(address: str) -> tuple[Client, type]:
    """A client of a Dask scheduler, and the error of items whose workers died."""
    try:
        import dask
        from distributed import Client, KilledWorker
    except ImportError:
        sys.exit('error: --dask_scheduler needs Dask; pip install distributed')
    dask.config.set({'distributed.admin.large-graph-warning-threshold': '1 GB'})  # not at a video
    logging.disable()  # Dask would log tracebacks of errors that are reported in one line
    try:
        client = Client(address, timeout=10)
        tqdm.write(f'waiting for the workers of {address}', sys.stderr)
        client.wait_for_workers(1, timeout=30)
        client.upload_file(__file__)
    except (OSError, ValueError) as error:
        sys.exit(f'error: no Dask scheduler with workers at {address}: {error}'.split('\n')[0])
    return client, KilledWorker


def run_all(
    function: Callable, items: Iterable[tuple], args: argparse.Namespace
) -> Iterator[tuple]:
    """Yield (item, answer) in any order; the answer is GIVEN_UP where an item's workers died.

    Items are taken as workers get free.
    """
    workers = args.num_workers if args.num_workers > 0 else cpu_count()
    if workers == 1 and not args.dask_scheduler:  # in this process, where a debugger reaches it
        yield from ((item, function(*item)) for item in items)
        return
    if args.dask_scheduler:
        client, killed = connect(args.dask_scheduler)
        executor, ahead = client.get_executor(pure=False), AHEAD
    else:
        executor, ahead = ProcessPoolExecutor(workers, get_context('spawn'), shield), 2 * workers
        killed = ()  # catches nothing
    waiting, todo = iter(items), {}
    try:
        while True:
            for item in islice(waiting, ahead - len(todo)):
                todo[executor.submit(function, *item)] = item
            if not todo:
                break
            for future in wait(todo, return_when=FIRST_COMPLETED).done:
                item = todo.pop(future)
                try:
                    yield item, future.result()
                except killed:
                    yield item, GIVEN_UP
    except BrokenProcessPool:
        sys.exit(
            'error: a worker process was killed, as it happens when memory runs out; run the same '
            'command again, with fewer processes'
        )
    except CancelledError:
        sys.exit('error: the Dask scheduler went away; run the same command again')
    finally:
        for child in active_children() if todo else ():  # interrupted
            child.kill()
        executor.shutdown(wait=not (killed and todo))  # a cluster's items are cancelled


def read_detections(path: Path, identity: str, score_thr: float) -> dict[tuple, np.ndarray]:
    """(key, file, size) of each frame that this detector was run on -> its people (n, 5).

    The file holds JSON lines: each run appends one for its detector and --score_thr, then one for
    each frame. After a damaged line all is ignored up to the next detector's.
    """
    known, ours = {}, False
    with open(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            try:
                noted = json.loads(line)
                if 'detector' in noted:
                    ours = noted['detector'] == identity and noted['score_thr'] <= score_thr
                elif ours:
                    *state, people = (noted[name] for name in NOTED)
                    known[tuple(state)] = np.array(people, float).reshape(-1, 5)
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


def write(path: Path, content: bytes) -> None:
    """Write a file, which appears when it is complete; nothing changes if the content is equal."""
    part = path.with_suffix('.part')
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        part.write_bytes(content)
        os.replace(part, path)


def write_csv(path: Path, rows: list[tuple]) -> None:
    table = io.StringIO()
    csv.writer(table, lineterminator='\n').writerows(rows)
    write(path, table.getvalue().encode('utf-8', 'backslashreplace'))


def overlaps_of(boxes: set, people: np.ndarray) -> np.ndarray:
    """Return the IoU (n, m) of each annotated box with each proposal of its keyframe."""
    import torch
    from torchvision.ops import box_iou

    annotated = torch.tensor(sorted(boxes), dtype=torch.float64)
    return box_iou(annotated, torch.from_numpy(people[:, :4])).numpy()


def report_recall(path: Path, keyframes: dict[tuple, set], proposals: dict) -> str | None:
    """List how well the proposals match the annotated boxes of each keyframe, the worst first.

    Returns the warning that is printed where they hardly match.
    """
    rows = []
    for (clip, second), boxes in keyframes.items():
        people = proposals.get(key_of(clip, second), np.empty((0, 5)))
        overlaps = overlaps_of(boxes, people)
        kept = overlaps[:, people[:, 4] >= min(KEPT_SCORE, people[:, 4].max(initial=0))]
        best = [some.max(axis=1, initial=0) for some in (overlaps, kept)]
        matched = [(some >= least).sum() for some in best for least in (LOOSE, STRICT)]
        worst = f'{best[0].min():.3f}'
        rows.append((clip, second, len(boxes), len(people), *matched, worst))
    rows.sort(key=lambda row: (row[-1], row))
    write_csv(path, [RECALL, *rows])
    if not rows:
        return None
    boxes, _, *matched = np.sum([row[2:-1] for row in rows], axis=0)
    recall, strict, kept, kept_strict = (count / boxes for count in matched)
    print(
        f'  recall of {boxes:,} annotated boxes:{"IoU 0.5":>12}{"0.75":>9}\n'
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


def detect_all(
    frames: list[Frame], args: argparse.Namespace, checkpoint: Path
) -> Iterator[list[tuple[str, np.ndarray | str]]]:
    """Yield what `detect` returns for each chunk: from the cluster, the GPUs or the CPU."""
    gpus = None
    if not args.dask_scheduler:
        import torch

        visible = torch.cuda.device_count()
        gpus = visible if args.num_gpus is None else args.num_gpus
        if gpus > visible:
            sys.exit(f'error: GPUs visible to PyTorch: {visible}, not {gpus}; check its build')
        if args.num_gpus is None and not gpus:
            tqdm.write('no GPU is visible to PyTorch: the CPU is used')
    args.num_workers = gpus or 1
    options = Options(
        args.avakinetics_root,
        args.config,
        checkpoint,
        gpus,
        args.score_thr,
        args.amp,
        args.batch_size,
        tuple(frames[:FIRST_FRAMES]),
    )
    size = CPU_CHUNK if gpus == 0 else CHUNK
    chunks = [(frames[first : first + size], options) for first in range(0, len(frames), size)]
    with contextlib.closing(run_all(detect, chunks, args)) as answers:
        for (chunk, _), found in answers:
            yield [(frame.key, found) for frame in chunk] if found == GIVEN_UP else found


def detect_missing(
    frames: dict[str, Frame], checkpoint: Path, args: argparse.Namespace
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The people on each frame, and why others cannot be read; keeps what is detected now."""
    config = load_config(args.config, False)
    settings = [config.get(name) for name in ('model', 'test_dataloader', 'custom_imports')]
    settings = json.dumps(settings, sort_keys=True, default=str)
    identity = f'{digest_of(settings.encode())} {digest_of(checkpoint.read_bytes())} {args.amp}'
    notes = args.picklepath.with_name(f'{args.picklepath.name}.frames.jsonl')
    known = read_detections(notes, identity, args.score_thr) if notes.exists() else {}
    people = {key: known[frame.state] for key, frame in frames.items() if frame.state in known}
    left, unreadable = [frame for key, frame in frames.items() if key not in people], {}
    print(f'frames to detect: {len(left):,}, detected before: {len(people):,}', flush=True)
    if not left:
        return people, unreadable
    notes.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(notes, 'a', encoding='utf-8', buffering=1) as file,  # a line at once
        tqdm(desc='detect', total=len(left), unit='frame', smoothing=0, leave=False) as bar,
    ):
        start = json.dumps(dict(detector=identity, score_thr=args.score_thr))
        file.write(f'\n{start}\n')  # on a line of its own after a torn one
        for chunk in detect_all(left, args, checkpoint):
            if not bar.n:  # the clock starts once the detector runs
                bar.reset()
                bar.initial = len(chunk)
            bar.update(len(chunk))
            for key, found in chunk:
                if isinstance(found, str):
                    unreadable[key] = found
                else:
                    people[key], noted = found, (*frames[key].state, found.tolist())
                    file.write(json.dumps(dict(zip(NOTED, noted))) + '\n')
    return people, unreadable


def write_proposals(people: dict[str, np.ndarray], listed: str, args: argparse.Namespace) -> dict:
    """Write the pickle, with the digest of the list; returns the proposals."""
    proposals = {
        key: kept
        for key, found in sorted(people.items())
        if len(kept := found[found[:, 4] > args.score_thr])
    }
    content = io.BytesIO()
    Pickler(content, protocol=4).dump(proposals)
    # a trailer, which unpicklers ignore: Step 7 refuses a pickle of another list
    content.write(f'\nmade of {listed}\n'.encode())
    write(args.picklepath, content.getvalue())
    return proposals


def record(warning: str | None, unreadable: list[Frame], args: argparse.Namespace) -> None:
    """Write how the proposals were made and, for Step 7b, the files that cannot be read."""
    used = {name: getattr(args, name) for name in ('checkpoint', 'score_thr', 'neighbors', 'amp')}
    used |= {name: version(name) for name in ('torch', 'mmdet')} | dict(config=args.config.name)
    used |= dict(warning=warning, unreadable={frame.file: frame.size for frame in unreadable})
    write(args.reports / f'fetch_proposal_{args.name}.json', json.dumps(used).encode())


def fetch(args: argparse.Namespace) -> None:
    """Detect what is not there yet, write the pickle and the reports, say what came of it."""
    keyframes, listed = read_datalist(args.datalist), digest_of(args.datalist.read_bytes())
    checkpoint = local_checkpoint(args.checkpoint)
    planned = plan_frames(keyframes, args.neighbors, args.avakinetics_root)
    frames = {frame.key: frame for frame in planned}
    people, unreadable = detect_missing(frames, checkpoint, args)
    rows = sorted((key[:11], frames[key].second, reason) for key, reason in unreadable.items())
    report = args.reports / f'fetch_proposal_{args.name}.csv'
    write_csv(report, [('video_id', 'timestamp', 'reason'), *rows])
    if not people:
        sys.exit(f'error: not one frame could be read; {report} says why')
    proposals = write_proposals(people, listed, args)

    count = sum(map(len, proposals.values()))
    print(
        f'people in {args.picklepath}: {count:,}, on {len(proposals):,} of {len(frames):,} frames'
    )
    seen = {name: boxes for name, boxes in keyframes.items() if key_of(*name) in people}
    warning = report_recall(args.reports / f'recall_{args.name}.csv', seen, proposals)
    record(warning, [frames[key] for key in unreadable if 'unreadable' in unreadable[key]], args)
    bare = sum(key_of(*keyframe) not in proposals for keyframe in keyframes)
    print(
        f'  annotated keyframes without a proposal: {bare:,} of {len(keyframes):,}; MMAction2 '
        'takes the whole frame there'
    )
    for reason, count in Counter(row[2].split(':')[0] for row in rows).items():
        print(f'  {count:,} left out: {reason}')
    if rows:
        print(f'  report: {report}')


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    sys.stderr = sys.stderr or open(os.devnull, 'w')  # None where it is closed
    os.environ['MPLBACKEND'] = 'agg'  # a notebook's may not be in this environment
    os.environ['PYTHONWARNINGS'] = 'ignore'  # of libraries to their callers, here and in workers
    warnings.simplefilter('ignore')
    try:
        fetch(parse_args(argv))
        print(end='', flush=True)
    except BrokenPipeError:  # `| head` has read enough
        os._exit(141)
    except DetectorError as error:
        sys.exit(f'error: {error}')
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; fix it, then run the same command again')
    except KeyboardInterrupt:
        print('interrupted; run the same command again', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':  # under the name by which workers import it
    sys.path.insert(0, os.path.dirname(__file__))  # python -P leaves it out
    importlib.import_module(Path(__file__).stem).main()
