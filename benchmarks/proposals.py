"""Frames a second of a plain loop over mmdet's inference_detector and of fetch_proposal.py, in one run.

    python benchmarks/proposals.py                                        # the documented detector, random weights
    python benchmarks/proposals.py --config tests/tiny_detector.py --checkpoint tests/tiny_detector.pth

Same frames, same weights, same device; every figure is the median of several rounds. On a GPU it also gives how busy
the GPU was and which share of the arithmetic limit (the rate of a large matrix product) was reached. Then the boxes are
compared. Without --frames, frames are drawn; with random weights the classifier is biased so that there are boxes.
"""
import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import torch

REPO = Path(__file__).parent.parent
sys.path[:0] = [str(REPO), str(REPO / 'tests')]
warnings.filterwarnings('ignore')
import draw  # noqa: E402
import fetch_proposal  # noqa: E402
from mmdet.apis import inference_detector  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--config', type=Path, default=REPO / 'X-101-64x4d-FPN.py', help='mmdetection config')
    parser.add_argument('--checkpoint', type=Path, help='its weights (default: random ones)')
    parser.add_argument('--frames', type=int, default=64, help='frames to detect on, of two sizes')
    parser.add_argument('--rounds', type=int, default=3, help='rounds of each measurement')
    parser.add_argument('--batch_sizes', type=int, nargs='+', default=[1, 2, 4, 8, 16, 32], help='batch sizes to try')
    parser.add_argument('--device', default='cuda:0' if torch.cuda.is_available() else 'cpu', help='torch device')
    return parser.parse_args()


def random_checkpoint(config: Path, folder: Path) -> Path:
    """Random weights for a Cascade R-CNN whose last layers are biased towards the person, so that there are boxes."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    register_all_modules()
    torch.manual_seed(0)
    model = MODELS.build(fetch_proposal.load_config(config).model)
    for name, value in model.state_dict().items():
        if name.endswith('fc_cls.bias'):
            value[0] += 5
    torch.save(dict(state_dict=model.state_dict()), folder / 'random.pth')
    return folder / 'random.pth'


def write_frames(root: Path, count: int) -> list[tuple[str, str, int]]:
    """Drawn frames of two sizes in clips of four seconds, as (key, clip, second)."""
    frames = []
    for scene in range((count + 3) // 4):
        clip = f'scene-{scene:05d}_000000_000004'
        (root / 'rawframes' / clip).mkdir(parents=True)
        for second in range(4):
            image = draw.draw_frame(scene, second, [(340, 256), (426, 240)][scene % 2])[0]
            cv2.imwrite(str(root / f'rawframes/{clip}/img_{second * 30 + 1:05d}.jpg'), image)
            frames.append((f'{clip[:11]},{second:04d}', clip, second))
    return frames[:count]


def timed(work, device: str) -> tuple[float, float]:
    """Seconds that `work` takes, and the mean utilisation of the GPU in per cent meanwhile (NaN on the CPU)."""
    busy, done = [], threading.Event()

    def watch():
        while not done.wait(0.1):
            busy.append(float(subprocess.run(['nvidia-smi', '--query-gpu=utilization.gpu', '--format=csv,noheader,nounits'],
                                             capture_output=True, text=True).stdout.split()[0]))
    if device != 'cpu':
        torch.cuda.synchronize()
        threading.Thread(target=watch).start()
    start = time.perf_counter()
    work()
    if device != 'cpu':
        torch.cuda.synchronize()
    done.set()
    return time.perf_counter() - start, statistics.mean(busy) if busy else float('nan')


def arithmetic_limit(device: str, half: bool) -> float:
    """Floating point operations a second of a large matrix product."""
    torch.backends.cuda.matmul.allow_tf32 = True  # as cuDNN's convolutions do
    size = 8192 if device != 'cpu' else 2048
    a = torch.randn(size, size, device=device, dtype=torch.float16 if half else torch.float32)
    a @ a
    return 10 * 2 * size ** 3 / timed(lambda: [a @ a for _ in range(10)], device)[0]


def count_operations(options: fetch_proposal.Options, root: Path, frame: tuple) -> float:
    """Floating point operations of one frame, multiplications and additions counted apart."""
    from torch.utils.flop_counter import FlopCounterMode
    model, pipeline = fetch_proposal.load_detector(options)
    _, data = fetch_proposal.load_frame(root, pipeline, frame)
    with FlopCounterMode(display=False) as counter:
        fetch_proposal.predict(model, [data], options)
    return counter.get_total_flops()


def largest_difference(a: dict, b: dict, score_thr: float) -> tuple[float, float, int]:
    """Largest difference of boxes and of scores, and boxes on one side only whose score is not near the threshold."""
    boxes = scores = 0.0
    alone = 0
    for key in a.keys() | b.keys():
        ours, theirs = a.get(key, np.empty((0, 5))), b.get(key, np.empty((0, 5)))
        for first, second in (ours, theirs), (theirs, ours):
            for box in first:
                distance = abs(second[:, :4] - box[:4]).max(1) if len(second) else np.array([9.0])
                if distance.min() > 0.02:
                    alone += box[4] > score_thr + 2e-3
                    continue
                boxes = max(boxes, distance.min())
                scores = max(scores, abs(second[distance.argmin(), 4] - box[4]))
    return boxes, scores, alone


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        frames = write_frames(root, args.frames)
        checkpoint = args.checkpoint or random_checkpoint(args.config, root)
        gpu = args.device != 'cpu'
        name = torch.cuda.get_device_name(args.device) if gpu else f'{platform.processor() or platform.machine()} CPU'
        print(f'{name}, torch {torch.__version__}, {torch.get_num_threads()} threads; {args.config.name}, '
              f'{len(frames)} frames of 340x256 and 426x240, median of {args.rounds} rounds')
        base = fetch_proposal.Options(args.config, checkpoint, args.device, 0.7 if args.checkpoint else 0.05, False, 1, 0)

        def loop() -> dict:
            model, _ = fetch_proposal.load_detector(base)
            found = {}
            for key, clip, second in frames:
                path = root / f'rawframes/{clip}/img_{second * 30 + 1:05d}.jpg'
                people = fetch_proposal.people_of(inference_detector(model, str(path)), base.score_thr)
                if len(people):
                    found[key] = people
            return found

        expected = loop()  # also warms up
        print(f'{sum(map(len, expected.values()))} boxes above {base.score_thr}\n')
        plain = [timed(loop, args.device)[0] for _ in range(args.rounds)]
        operations = count_operations(base, root, frames[0])
        limit = {half: arithmetic_limit(args.device, half) for half in ((False, True) if gpu else (False,))}
        print(f'{"":<28}{"frames/s":>10}{"ratio":>8}{"GPU busy":>10}{"of limit":>10}   boxes, scores, alone')
        print(f'{"inference_detector loop":<28}{len(frames) / statistics.median(plain):>10.2f}{1:>8.2f}'
              f'{"":>10}{operations * len(frames) / statistics.median(plain) / limit[False]:>10.1%}')
        for amp in (False, True) if gpu else (False,):
            for batch_size in args.batch_sizes:
                options = base._replace(batch_size=batch_size, amp=amp, num_workers=4 if gpu else 1)
                shard = root / 'shard.pkl'
                fetch_proposal.detect_shard(shard, root, frames, options)  # warms up: cuDNN tries each size
                runs = [timed(lambda: fetch_proposal.detect_shard(shard, root, frames, options), args.device)
                        for _ in range(args.rounds)]
                seconds, busy = (statistics.median(run[i] for run in runs) for i in (0, 1))
                found = largest_difference(fetch_proposal.read_shard(shard)[0], expected, base.score_thr)
                print(f'{f"batch size {batch_size}" + (", --amp" if amp else ""):<28}{len(frames) / seconds:>10.2f}'
                      f'{statistics.median(plain) / seconds:>8.2f}{"" if not gpu else f"{busy:.0f} %":>10}'
                      f'{operations * len(frames) / seconds / limit[amp]:>10.1%}   '
                      f'{found[0]:.1e}, {found[1]:.1e}, {found[2]}', flush=True)


if __name__ == '__main__':
    main()
