#!/usr/bin/env python3
"""Step 6: detect the people on the annotated keyframes.

Reads ROOT/kinetics_train.csv and ROOT/rawframes, or ROOT/videos where a clip has no raw frames, runs a person detector
of mmdetection on every annotated keyframe and on the seconds before and after it, and writes
ROOT/kinetics_proposal.pkl: a dict with keys '<video_id>,<second:04d>' and values float64 (n, 5) of x1, y1, x2, y2,
score, relative to the frame, score > 0.7. A frame without people has no key. Frames that could not be read are in
ROOT/reports/fetch_proposal_train.csv. Run it again to continue after an interruption.

    python3 fetch_proposal.py --avakinetics_root=$MMACTION2/data/ava_kinetics \\
        --datalist=$MMACTION2/data/ava_kinetics/kinetics_train.csv \\
        --picklepath=$MMACTION2/data/ava_kinetics/kinetics_proposal.pkl
"""
import signal

if __name__ == '__main__':  # a Ctrl-C during the imports waits for their end: a line in place of a traceback
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})

import argparse
import contextlib
import copy
import csv
import functools
import hashlib
import importlib
import json
import logging
import os
import pickle
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, CancelledError, ProcessPoolExecutor, wait
from multiprocessing import active_children, current_process, get_context
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import cv2
import decord
import filelock
import numpy as np
from joblib import Parallel, delayed, parallel_config
from joblib.parallel import get_active_backend
from tqdm import tqdm

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
CHECKPOINT = ('https://download.openmmlab.com/mmdetection/v2.0/cascade_rcnn/cascade_rcnn_x101_64x4d_fpn_1x_coco/'
              'cascade_rcnn_x101_64x4d_fpn_1x_coco_20200515_075702-43ce6a30.pth')
FPS = 30
PERSON = 0  # COCO's class
MAX_DASK_WORKERS = 1000  # twice as many tasks wait in the cluster
SHARD = 512  # frames between two saves
CLIP_NAME = re.compile(r'(?P<id>[A-Za-z0-9_-]{11})_(?P<start>[0-9]{6})_(?P<end>[0-9]{6})')


class Options(NamedTuple):
    """A detector and how it is run; the device as torch names it, '' for what a cluster's worker has; frames a batch and
    loading processes, None for what fits the device."""
    config: Path
    checkpoint: Path
    device: str
    score_thr: float
    amp: bool
    batch_size: int | None
    num_workers: int | None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Step 6: detect the people on the annotated keyframes.',
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--avakinetics_root', type=Path, default=MMACTION2 / 'data/ava_kinetics', metavar='DIR',
                        help='folder of the data set that is made')
    parser.add_argument('--split', choices=['train', 'val'], default='train', help='part of AVA-Kinetics')
    parser.add_argument('--datalist', type=Path, metavar='CSV', default=argparse.SUPPRESS,
                        help='annotations written by Step 5 (default: ROOT/kinetics_train.csv, or ..._val.csv)')
    parser.add_argument('--picklepath', type=Path, metavar='PKL', default=argparse.SUPPRESS,
                        help='where the proposals go (default: ROOT/kinetics_proposal.pkl, or ..._val_proposal.pkl)')
    parser.add_argument('--config', type=Path, metavar='PY', default=Path(__file__).with_name('X-101-64x4d-FPN.py'),
                        help='mmdetection config of the detector')
    parser.add_argument('--checkpoint', metavar='PTH', default=CHECKPOINT, help="file or URL of the detector's weights")
    parser.add_argument('--num_gpus', type=int, metavar='N', default=argparse.SUPPRESS,
                        help='GPUs to use, 0 for the CPU (default: all that are visible)')
    parser.add_argument('--dask_scheduler', metavar='ADDRESS', default=argparse.SUPPRESS,
                        help="work on the Dask cluster of this scheduler, such as tcp://host:8786, on each worker's own "
                        'GPU')
    parser.add_argument('--batch_size', type=int, metavar='N', default=argparse.SUPPRESS,
                        help='frames of equal size that the detector takes at once (default: 8 on a GPU, 4 on the CPU)')
    parser.add_argument('--num_workers', type=int, metavar='N', default=argparse.SUPPRESS,
                        help='processes that load frames, for each GPU (default: 4 on a GPU, 1 on the CPU)')
    parser.add_argument('--amp', action='store_true', help='mixed precision: faster, and moves boxes a little')
    parser.add_argument('--neighbors', type=int, metavar='N', default=1,
                        help='seconds before and after each keyframe that get proposals too: 1 as in MMAction2, 0 for '
                        'all that its training reads, a third of the work')
    parser.add_argument('--score_thr', type=float, metavar='S', default=0.7, help='least score of a proposal')
    parser.add_argument('--preview', type=Path, metavar='FILE', default=argparse.SUPPRESS,
                        help='also draw keyframes with annotated boxes and proposals into this picture')
    parser.add_argument('--overwrite', action='store_true', help='detect again although the proposals are there')
    args = parser.parse_args(argv)
    root, part = args.avakinetics_root, '' if args.split == 'train' else '_val'
    defaults = dict(datalist=root / f'kinetics_{args.split}.csv', picklepath=root / f'kinetics{part}_proposal.pkl',
                    num_gpus=-1, batch_size=None, num_workers=None, preview=None, dask_scheduler=None)
    args = argparse.Namespace(**{**defaults, **vars(args)})
    if args.neighbors < 0 or args.batch_size is not None and args.batch_size < 1 or (args.num_workers or 0) < 0:
        sys.exit('error: --neighbors and --num_workers must be 0 or more, --batch_size 1 or more')
    if not 0 <= args.score_thr < 1:
        sys.exit('error: --score_thr must be at least 0 and below 1')
    return args


def read_datalist(path: Path) -> tuple[dict[tuple[str, int], list], list[tuple]]:
    """(clip, second) -> its rows as (relative box x1 y1 x2 y2, action id), and report rows for unreadable lines."""
    keyframes, problems = {}, []
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        for number, line in enumerate(file, 1):
            row = line.strip().split(',')
            name = CLIP_NAME.fullmatch(row[0])
            try:
                second, box, action = int(row[1]), [float(value) for value in row[2:6]], int(row[6])
                if not name or not int(name['start']) <= second < int(name['end']) or not np.isfinite(box).all():
                    raise ValueError
            except (ValueError, IndexError):
                problems.append(('', '', f'malformed row: line {number} of {path.name}'))
                continue
            keyframes.setdefault((row[0], second), []).append((box, action))
    return keyframes, problems


def plan_frames(keyframes: list[tuple[str, int]], neighbors: int) -> dict[str, tuple[str, int]]:
    """Proposal key -> clip and second, for every keyframe and its neighbours within the clip; keyframes come first."""
    frames = {}
    for distance in sorted(range(-neighbors, neighbors + 1), key=abs):
        for clip, second in keyframes:
            if int(clip[-13:-7]) <= second + distance < int(clip[-6:]):
                frames.setdefault(f'{clip[:-14]},{second + distance:04d}', (clip, second + distance))
    return dict(sorted(frames.items(), key=lambda item: item[1]))


def local_checkpoint(source: str) -> Path:
    """The file of a checkpoint; a URL is downloaded once into torch's cache, where mmengine keeps them too."""
    if not re.match(r'https?://', source):
        return Path(source)
    import torch
    path = Path(torch.hub.get_dir()) / 'checkpoints' / source.rsplit('/', 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = re.search(r'-([0-9a-f]{8,})\.', path.name)
        try:
            torch.hub.download_url_to_file(source, str(path), digest and digest[1])
        except (OSError, RuntimeError) as error:
            sys.exit(f'error: {source} cannot be downloaded ({error}); give a file with --checkpoint')
    return path


def load_config(path: Path):
    """The detector's config; whatever is wrong with it ends the run with one line."""
    warnings.filterwarnings('ignore', message='pkg_resources')  # mmengine 0.10.7 and mmdet 3.3.0 still import it
    from mmengine.config import Config
    try:
        return Config.fromfile(path)
    except Exception as error:  # a config is a program: it may raise anything
        sys.exit(f'error: {path} is no mmdetection config: {type(error).__name__}: {error}'.replace('\n', ' '))


def read_weights(checkpoint: Path) -> dict:
    """The tensors of a checkpoint by name, read without running any code that it holds."""
    import torch
    try:
        loaded = torch.load(checkpoint, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        sys.exit(f'error: {checkpoint} cannot be read as weights: {(str(error) or "it is empty").splitlines()[0]}; a '
                 "training checkpoint is reduced to weights by mmdetection's tools/model_converters/publish_model.py")
    weights = loaded.get('state_dict', loaded) if isinstance(loaded, dict) else {}
    return {re.sub(r'^module\.', '', name): value for name, value in weights.items() if torch.is_tensor(value)}


@functools.lru_cache(maxsize=1)
def load_detector(options: Options):
    """Build the config's model with the checkpoint's weights, ready to detect, and its test pipeline for arrays."""
    import torch
    from mmcv.transforms import Compose
    from mmdet.registry import MODELS
    from mmdet.utils import get_test_pipeline_cfg, register_all_modules
    from mmengine.model import revert_sync_batchnorm
    register_all_modules()
    config, weights = load_config(options.config), read_weights(options.checkpoint)
    try:
        # Boxes of a two-stage detector below the threshold would be thrown away in the end, and in its suppression a
        # box never yields to one of lower score; a margin is kept for what rounding may do
        final = config.model.test_cfg.get('rcnn') or {}
        if 'score_thr' in final:
            final['score_thr'] = max(final['score_thr'], options.score_thr - 0.01)
        model = revert_sync_batchnorm(MODELS.build(config.model))
        pipeline = copy.deepcopy(get_test_pipeline_cfg(config))
        pipeline[0].type = 'mmdet.LoadImageFromNDArray'
        pipeline = Compose(pipeline)
    except Exception as error:  # a config may name any class with any arguments
        sys.exit(f'error: {options.config} builds no detector: {type(error).__name__}: {error}'.split('\n')[0])
    own = model.state_dict()
    differing = [name for name in {**own, **weights} if not name.endswith('num_batches_tracked')
                 and (name not in own or name not in weights or own[name].shape != weights[name].shape)]
    if differing:
        sys.exit(f'error: {options.checkpoint} does not fit the config: {len(differing)} of {len(own)} tensors differ, '
                 f'first {", ".join(differing[:3])}; give the --config that it was trained with')
    model.load_state_dict(weights, strict=False)  # strict but for num_batches_tracked, as just checked
    if options.device != 'cpu':
        torch.backends.cudnn.benchmark = True  # frames come in a few sizes only
        model = model.to(memory_format=torch.channels_last)
    model.cfg = config  # where mmdet's own functions look for it
    model.batch_size = options.batch_size  # less once memory ran out
    return model.to(options.device).eval(), pipeline


def own_device(options: Options) -> Options:
    """The options with all that was left to the device: on a cluster, that of the worker that this runs in."""
    import torch
    device = options.device or ('cuda:0' if torch.cuda.is_available() else 'cpu')
    batch_size, num_workers = (4, 1) if device == 'cpu' else (8, 4)
    if current_process().daemon:  # such a process, as a Dask worker is by default, may have no others
        num_workers = 0
    elif options.num_workers is not None:
        num_workers = options.num_workers
    return options._replace(device=device, batch_size=options.batch_size or batch_size, num_workers=num_workers)


def read_frame(root: Path, clip: str, second: int) -> np.ndarray | str:
    """The keyframe of a second as BGR uint8 (H, W, 3), or the reason why it cannot be read.

    It comes from the clip's raw frames or, where the clip has none, out of its video.
    """
    index = (second - int(clip[-13:-7])) * FPS
    name, video = f'{clip}/img_{index + 1:05d}.jpg', root / f'videos/{clip}.mp4'
    if video.is_file() and not (root / 'rawframes' / clip).is_dir():
        decord.logging.set_level(decord.logging.QUIET)
        try:
            return np.ascontiguousarray(decord.VideoReader(str(video), num_threads=1)[index].asnumpy()[..., ::-1])
        except (decord.DECORDError, RuntimeError, IndexError):
            return f'unreadable frame: number {index + 1} of {video.name}'
    try:
        data = (root / 'rawframes' / name).read_bytes()
    except OSError as error:
        return f'unreadable frame: {error.strerror} {name}'
    if not data.rstrip(b'\0').endswith(b'\xff\xd9'):  # OpenCV fills the rest of a truncated JPEG with grey
        return f'unreadable frame: truncated or no JPEG {name}'
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # a header that claims billions of pixels
        image = None
    return f'unreadable frame: broken JPEG {name}' if image is None else image


def load_frame(root: Path, pipeline: Callable, frame: tuple[str, str, int]) -> tuple[str, dict | str]:
    """A frame's key, and what the test pipeline makes of its picture, or the reason why it cannot be read."""
    key, clip, second = frame
    image = read_frame(root, clip, second)
    return key, image if isinstance(image, str) else pipeline(dict(img=image, img_id=0))


def predict(model, batch: list[dict], options: Options) -> list:
    """The detector's answers for frames of equal size; a batch that does not fit into memory is halved, for good."""
    import torch
    answers = []
    while len(answers) < len(batch):
        part = batch[len(answers):len(answers) + model.batch_size]
        try:
            with torch.no_grad(), torch.autocast(options.device.split(':')[0], enabled=options.amp):
                answers += model.test_step(dict(inputs=[data['inputs'] for data in part],
                                                data_samples=[data['data_samples'] for data in part]))
        except torch.cuda.OutOfMemoryError:
            if model.batch_size == 1:
                raise
            model.batch_size //= 2
            torch.cuda.empty_cache()
    return answers


def people_of(answer, score_thr: float) -> np.ndarray:
    """The people in a detector's answer: float64 (n, 5) of x1, y1, x2, y2 relative, clipped to [0, 1], and score."""
    found, (height, width) = answer.pred_instances.cpu().numpy(), answer.ori_shape
    chosen = (found.labels == PERSON) & (found.scores > score_thr)
    boxes = np.clip(found.bboxes[chosen].astype(np.float64) / [width, height, width, height], 0, 1)
    return np.hstack([boxes, found.scores[chosen, None].astype(np.float64)])


def ignore_interrupt(_) -> None:
    """Leave Ctrl-C to the process that this one loads frames for, which ends it by SIGTERM where need be."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    sys.excepthook = lambda *_: None  # a thread of multiprocessing tells that the other end has gone; errors go through torch


def detect_shard(path: Path, root: Path, frames: list[tuple[str, str, int]], options: Options,
                 progress: Callable = lambda count: None) -> int:
    """Detect the people on frames (key, clip, second), write the shard: proposals, and reasons for unreadable frames.

    Frames are loaded by other processes, and go through the detector with others of their size, so that none is padded
    more than it would be alone.
    """
    import torch
    options = own_device(options)
    model, pipeline = load_detector(options)
    cv2.setNumThreads(1)  # the loading processes are the parallelism
    loader = torch.utils.data.DataLoader(frames, batch_size=None, num_workers=options.num_workers,
                                         worker_init_fn=ignore_interrupt,
                                         collate_fn=functools.partial(load_frame, root, pipeline))
    proposals, problems, waiting = {}, {}, {}

    def detect(batch: list[tuple[str, dict]]) -> None:
        try:
            answers = predict(model, [data for _, data in batch], options)
        except Exception as error:  # whatever an arbitrary model raises: out of memory, CUDA errors, wrong shapes
            raise RuntimeError(f'on {batch[0][0]} ({type(error).__name__}: {error})'.replace('\n', ' ')) from error
        for (key, _), answer in zip(batch, answers):
            people = people_of(answer, options.score_thr)
            if len(people):
                proposals[key] = people.tolist()
        progress(len(batch))

    def load() -> Iterator[tuple[str, dict | str]]:
        try:
            try:  # Python drops a Ctrl-C that comes within a fork
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
                loaded = iter(loader)
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
            yield from loaded
        except Exception as error:  # whatever an arbitrary pipeline raises; a loading process that was killed
            raise RuntimeError(f'in loading frames ({type(error).__name__}: {error})'.replace('\n', ' ')) from error

    for key, data in load():
        if isinstance(data, str):
            problems[key] = data
            progress(1)
            continue
        batch = waiting.setdefault(tuple(data['inputs'].shape), [])
        batch.append((key, data))
        if len(batch) == options.batch_size:
            detect(waiting.pop(tuple(data['inputs'].shape)))
    for batch in waiting.values():
        detect(batch)
    write_shard(path, proposals, problems)
    return len(frames)


def detect_on_all(shards: dict[Path, list[tuple]], root: Path, options: list[Options], bar: tqdm) -> None:
    """Detect shards on several GPUs, a process each, that take them from one list; a GPU that fails gives its back."""
    todo, running = list(shards), {}
    pools = {option: ProcessPoolExecutor(1, get_context('spawn')) for option in options}
    try:
        while todo or running:
            # the processes inherit that these are ignored: interruptions are for this one alone
            handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
            for option in [option for option in pools if option not in running.values()]:
                if todo:
                    path = todo.pop(0)
                    future = pools[option].submit(detect_shard, path, root, shards[path], option)
                    future.path, running[future] = path, option
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                option = running.pop(future)
                try:
                    bar.update(future.result())
                except (Exception, SystemExit) as error:  # whatever a GPU that is lost, full or not there makes torch raise
                    tqdm.write(f'{option.device} is given up, the others go on: {error}', file=sys.stderr)
                    pools.pop(option).shutdown(wait=False)
                    todo.insert(0, future.path)
    finally:
        for process in active_children():
            process.kill()
    if todo:
        raise RuntimeError('on every GPU')


def detect_on_cluster(shards: dict[Path, list[tuple]], root: Path, options: Options, address: str, bar: tqdm) -> None:
    """Detect shards on the workers of a Dask cluster, which keep the model from one shard to the next."""
    with dask_cluster(address) as client:
        client.upload_file(__file__)  # as a module: what lies in __main__ would be sent, and the model loaded, every time
        module = importlib.import_module(Path(__file__).stem)
        answers = Parallel(return_as='generator_unordered', batch_size=1)(
            delayed(module.detect_shard)(path, root, shard, module.Options(*options)) for path, shard in shards.items())
        with contextlib.closing(answers):
            for count in answers:
                bar.update(count)


class Pickler(pickle.Pickler):
    """Writes arrays so that NumPy 1.21 to 2.x can read them: by public names, `numpy._core` is unknown to NumPy 1."""

    def reducer_override(self, value):
        if type(value) is np.ndarray:
            return np.ndarray, (value.shape, value.dtype.str), value.__reduce__()[2]
        return NotImplemented


class Unpickler(pickle.Unpickler):
    """Reads arrays and plain Python values only: a pickle that names anything else could run code."""

    def find_class(self, module, name):
        if (module, name) in (('numpy', 'ndarray'), ('numpy', 'dtype')):
            return getattr(np, name)
        raise pickle.UnpicklingError(f'{module}.{name} is not allowed')


def write_pickle(path: Path, value: object) -> None:
    with open(path, 'wb') as file:
        Pickler(file, protocol=4).dump(value)


def write_shard(path: Path, proposals: dict[str, list], problems: dict[str, str]) -> None:
    """Write a shard beside its final name, in a folder of its own since another process may do the same, then rename it."""
    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder:
        part = Path(folder) / path.name
        part.write_text(json.dumps([proposals, problems], sort_keys=True))
        os.replace(part, path)


def read_shard(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]] | None:
    """A shard's proposals and its unreadable frames, or None where it is not there, or spoilt."""
    try:
        proposals, problems = json.loads(path.read_bytes())
        return {key: np.array(people, float).reshape(-1, 5) for key, people in proposals.items()}, dict(problems)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def digest(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def read_stamp(stamp: Path, target: Path, inputs: dict) -> list[str] | None:
    """The keys that could not be read when `target` was made of these inputs, or None if it was not, or was changed."""
    try:
        noted = json.loads(stamp.read_text())
        return noted['unreadable'] if noted == {**noted, **inputs, 'pickle': digest(target)} else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def draw_box(tile: np.ndarray, box: list[float], text: str, colour: tuple, thickness: int, below: bool) -> None:
    """Draw a relative box and its label on a dark ground, above or below it, into a BGR picture."""
    height, width = tile.shape[:2]
    x1, y1, x2, y2 = (np.clip(box, 0, 1) * [width, height, width, height]).round().astype(int).tolist()
    cv2.rectangle(tile, (x1, y1), (x2, y2), colour, thickness)
    y = min(y2 + 14, height) if below else max(y1, 14)
    cv2.rectangle(tile, (x1, y - 14), (x1 + 8 * len(text) + 2, y), (30, 30, 30), -1)
    cv2.putText(tile, text, (x1 + 2, y - 3), cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, 1, cv2.LINE_AA)


def draw_preview(path: Path, root: Path, keyframes: dict[tuple[str, int], list], proposals: dict) -> None:
    """Draw up to 12 keyframes, evenly chosen: annotated boxes in green with their actions, proposals in orange."""
    green, orange, white, dark = (80, 220, 80), (0, 140, 255), (255, 255, 255), 30
    tile_width, tile_height, margin = 400, 300, 26
    names, tiles = list(keyframes), []
    for index in np.unique(np.linspace(0, len(names) - 1, 12).astype(int)):
        clip, second = names[index]
        tile = np.full((tile_height, tile_width, 3), dark, np.uint8)
        cv2.putText(tile, f'{clip} at {second} s', (5, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.45, white, 1, cv2.LINE_AA)
        image = read_frame(root, clip, second)
        if not isinstance(image, str):
            scale = min((tile_width - 6) / image.shape[1], (tile_height - margin) / image.shape[0])
            image = cv2.resize(image, [max(1, int(side * scale)) for side in image.shape[1::-1]],
                               interpolation=cv2.INTER_AREA)
            for *box, score in proposals.get(f'{clip[:-14]},{second:04d}', ()):
                draw_box(image, box, f'{score:.2f}', orange, 3, True)
            actions = {}
            for box, action in keyframes[clip, second]:
                actions.setdefault(tuple(box), []).append(str(action))
            for box, numbers in actions.items():
                draw_box(image, box, ' '.join(numbers), green, 1, False)
            tile[margin:margin + image.shape[0], :image.shape[1]] = image
        tiles.append(tile)
    columns = min(4, len(tiles))
    tiles += [np.full_like(tiles[0], dark)] * (-len(tiles) % columns)
    legend = np.full((30, columns * tile_width, 3), dark, np.uint8)
    cv2.putText(legend, 'annotation: action ids', (5, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, green, 1, cv2.LINE_AA)
    cv2.putText(legend, 'proposal: score', (220, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, orange, 1, cv2.LINE_AA)
    sheet = [legend, *(np.hstack(tiles[index:index + columns]) for index in range(0, len(tiles), columns))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, np.vstack(sheet))[1].tobytes())


@contextlib.contextmanager
def workspace(path: Path):
    """A folder for unfinished files that belongs to this run alone, emptied before and removed after."""
    path.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path / 'lock')  # the kernel lets go when this process ends, however it ends
    try:
        lock.acquire(blocking=False)
    except (filelock.Timeout, FileNotFoundError):  # the latter where the other run has just ended
        sys.exit(f'error: another run of this step is at work in {path.parent}; wait for it to end')
    try:
        for leftover in set(path.iterdir()) - {path / 'lock'}:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        lock.release()


@contextlib.contextmanager
def dask_cluster(address: str):
    """Send joblib's work to the Dask cluster of the scheduler at this address."""
    try:
        import distributed
    except ImportError:
        sys.exit('error: --dask_scheduler needs Dask; pip install distributed')
    logging.disable()  # Dask logs what is told below, with tracebacks
    try:
        client = distributed.Client(address, timeout=10)
        client.wait_for_workers(1, timeout=30)
    except Exception as error:  # whatever answers at such an address
        reason = (str(error) or type(error).__name__).splitlines()[0]
        sys.exit(f'error: no Dask scheduler with workers at {address} ({reason}); start them first')

    def submit(task, callback=None):
        job = submit_quietly(task, callback)
        job.add_done_callback(lambda job: job.exception() and callback(job.exception()))
        return job

    with client, parallel_config('dask', client=client):
        # joblib 1.6 tells nobody of a task whose workers died time and again, and waits for it for ever; it would work
        # here where one worker has joined so far, and send no more than that many need where others join later
        backend = get_active_backend()[0]
        submit_quietly, backend.submit, backend.effective_n_jobs = backend.submit, submit, lambda n_jobs: MAX_DASK_WORKERS
        try:
            yield client
        except (CancelledError, distributed.KilledWorker) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            sys.exit(f'error: the Dask cluster at {address} failed ({reason}); mend it, then the same command continues')


def write_report(path: Path, header: list[str], rows: list[tuple]) -> None:
    """Write a csv beside its final name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix('.part'), 'w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        csv.writer(file, lineterminator='\n').writerows([header, *rows])
    os.replace(path.with_suffix('.part'), path)


def detect_frames(frames: dict[str, tuple[str, int]], folder: Path, options: Options, args: argparse.Namespace
                  ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Proposals and reasons for unreadable frames, shard by shard; shards that `folder` holds are taken as they are."""
    import torch
    visible = torch.cuda.device_count()
    if args.num_gpus > visible > 0:
        print(f'only {visible} of {args.num_gpus} GPUs are visible', file=sys.stderr)
    gpus = min(args.num_gpus, visible) if args.num_gpus >= 0 else visible
    devices = [f'cuda:{number}' for number in range(gpus)] if not args.dask_scheduler else []
    local = [own_device(options._replace(device=device)) for device in devices or ['cpu']]
    load_detector(local[0])  # a checkpoint that does not fit ends the run here
    folder.mkdir(parents=True, exist_ok=True)
    items = [(key, *frame) for key, frame in frames.items()]
    shards = {folder / f'{index:08d}.json': items[index:index + SHARD] for index in range(0, len(items), SHARD)}
    todo = {path: shard for path, shard in shards.items() if read_shard(path) is None}
    with tqdm(total=len(items), initial=len(items) - sum(map(len, todo.values())), desc='detect', unit='frame',
              delay=1) as bar:
        try:
            if args.dask_scheduler:
                detect_on_cluster(todo, args.avakinetics_root, options, args.dask_scheduler, bar)
            elif len(local) > 1:
                detect_on_all(todo, args.avakinetics_root, local, bar)
            else:
                for path, shard in todo.items():
                    detect_shard(path, args.avakinetics_root, shard, local[0], bar.update)
        except RuntimeError as error:
            sys.exit(f'error: the detector failed {error}; what is done is saved, the same command continues')
    proposals, unreadable = {}, {}
    for path in shards:
        for whole, part in zip((proposals, unreadable), read_shard(path)):
            whole.update(part)
    return proposals, unreadable


def fetch(args: argparse.Namespace, keyframes: dict, problems: list[tuple], checkpoint: Path, work: Path) -> None:
    """Detect what is not there yet, write the pickle and the report, say what came of it."""
    root, target, frames = args.avakinetics_root, args.picklepath, plan_frames(list(keyframes), args.neighbors)
    config = json.dumps(load_config(args.config).to_dict(), sort_keys=True, default=str)
    inputs = dict(frames=hashlib.sha256(json.dumps(frames).encode()).hexdigest(),
                  config=hashlib.sha256(config.encode()).hexdigest(),
                  checkpoint=digest(checkpoint), score_thr=args.score_thr, amp=args.amp)
    stamp = target.with_name(f'{target.name}.inputs.json')
    proposals, left, known = {}, frames, None if args.overwrite else read_stamp(stamp, target, inputs)
    if known is not None:  # the pickle is there: only frames that could not be read are tried again
        with open(target, 'rb') as file:
            proposals, left = Unpickler(file).load(), {key: frames[key] for key in known}
        print(f'{target} is there already, of the same list and detector; '
              + (f'{len(left)} unreadable frames are tried again' if left else 'nothing to do'))
    if left:
        # bound to all inputs: another detector has another folder
        identity = hashlib.sha256(json.dumps([inputs, sorted(left)]).encode()).hexdigest()[:12]
        folder = target.with_name(f'{target.name}.{identity}.shards')
        if args.overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        options = Options(args.config, checkpoint, '', args.score_thr, args.amp, args.batch_size, args.num_workers)
        found, unreadable = detect_frames(left, folder, options, args)
        proposals.update(found)
        report = root / f'reports/fetch_proposal_{args.split}.csv'
        rows = sorted((*key.rsplit(',', 1), reason) for key, reason in unreadable.items()) + problems
        write_report(report, ['video_id', 'timestamp', 'reason'], rows)
        if len(unreadable) == len(frames):
            shutil.rmtree(folder)
            sys.exit(f'error: not one frame could be read; {report} says why')
        write_pickle(work / target.name, dict(sorted(proposals.items())))
        (work / stamp.name).write_text(json.dumps({**inputs, 'unreadable': sorted(unreadable),
                                                   'pickle': digest(work / target.name)}, indent=1) + '\n')
        for path in target, stamp:
            os.replace(work / path.name, path)
        shutil.rmtree(folder)

        print(f'{sum(map(len, proposals.values()))} people on {len(proposals)} of {len(frames)} frames in {target}')
        bare = sum(f'{clip[:-14]},{second:04d}' not in proposals for clip, second in keyframes)
        print(f'  {bare} of {len(keyframes)} annotated keyframes have no proposal: training takes the whole frame there')
        for reason, count in Counter(row[2].split(':')[0] for row in rows).most_common():
            print(f'  {count} left out: {reason}')
        print(f'  report: {report}')
    if args.preview:
        draw_preview(args.preview, root, keyframes, proposals)
        print(f'  preview: {args.preview}')


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for name in 'avakinetics_root', 'datalist', 'picklepath', 'config':  # a cluster's workers are in other folders
        setattr(args, name, getattr(args, name).absolute())
    root = args.avakinetics_root
    if not args.datalist.is_file():
        sys.exit(f'error: {args.datalist} not found; do Step 5 (prepare_annotation.py) or set --datalist')
    if not (root / 'rawframes').is_dir() and not (root / 'videos').is_dir():
        sys.exit(f'error: {root} has neither rawframes nor videos; do Step 3 or set --avakinetics_root')
    if not args.config.is_file():
        sys.exit(f'error: {args.config} not found; set --config to an mmdetection config')
    if args.preview and not cv2.haveImageWriter(args.preview.name):
        sys.exit(f'error: {args.preview} is no picture name; let --preview end in .jpg or .png')
    keyframes, problems = read_datalist(args.datalist)
    if not keyframes:
        sys.exit(f'error: {args.datalist} holds no annotated keyframe; is it what Step 5 (prepare_annotation.py) wrote?')
    checkpoint = local_checkpoint(args.checkpoint).absolute()
    if not checkpoint.is_file():
        sys.exit(f'error: {checkpoint} not found; set --checkpoint to a file or URL')
    with workspace(args.picklepath.with_name(f'.{args.picklepath.name}.work')) as work:
        fetch(args, keyframes, problems, checkpoint, work)


if __name__ == '__main__':
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        main()
    except KeyboardInterrupt:
        print('interrupted; the same command continues', file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; mend it, then the same command continues')
    finally:  # nothing is left to interrupt
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
