"""Frames a second of a plain loop over mmdet's inference_detector and of fetch_proposal.py.

    python benchmarks/proposals.py    # the documented detector, random weights
    python benchmarks/proposals.py --published    # a small one, published weights
    python benchmarks/proposals.py --config tests/tiny_detector.py \\
        --checkpoint tests/tiny_detector.pth

Same frames, same weights, same device; every figure is the median of several rounds. On a GPU it
also gives how busy the GPU was and which share of the arithmetic limit (the rate of a large matrix
product) was reached. The boxes of every setting are compared with the loop's. Frames are drawn;
random weights are biased so that there are boxes. Needs what requirements.txt installs, no
compiler.
"""

import argparse
import contextlib
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
sys.path[:0] = [str(REPO / folder) for folder in ('', 'tests', 'tests/tools')]
warnings.filterwarnings('ignore')
import draw  # noqa: E402
import fetch_proposal  # noqa: E402
import published_detector  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        '--config', type=Path, default=REPO / 'X-101-64x4d-FPN.py', help='mmdetection config'
    )
    parser.add_argument('--checkpoint', type=Path, help='its weights (default: random ones)')
    parser.add_argument(
        '--published',
        action='store_true',
        help='YOLOX-nano with its published weights, in place of --config and --checkpoint',
    )
    parser.add_argument('--frames', type=int, default=64, help='frames to detect on, of two sizes')
    parser.add_argument('--rounds', type=int, default=3, help='rounds of each measurement')
    parser.add_argument(
        '--batch_sizes',
        type=int,
        nargs='+',
        default=[1, 2, 4, 8, 16, 32],
        help='batch sizes to try',
    )
    parser.add_argument(
        '--device', default='cuda:0' if torch.cuda.is_available() else 'cpu', help='torch device'
    )
    return parser.parse_args()


def random_checkpoint(config: Path, folder: Path) -> Path:
    """Write random weights, biased towards the person so that there are boxes; return the file."""
    fetch_proposal.use_torchvision_operators()
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()
    torch.manual_seed(0)
    model = MODELS.build(fetch_proposal.load_config(config, True).model)
    for name, value in model.state_dict().items():
        if name.endswith('fc_cls.bias'):
            value[0] += 5
    torch.save(dict(state_dict=model.state_dict()), folder / 'random.pth')
    return folder / 'random.pth'


def write_frames(root: Path, count: int) -> list[fetch_proposal.Frame]:
    """Draw frames of two sizes in clips of four seconds."""
    frames = []
    for scene in range((count + 3) // 4):
        clip = f'scene-{scene:05d}_000000_000004'
        (root / 'rawframes' / clip).mkdir(parents=True)
        for second in range(4):
            image = draw.draw_frame(scene, second, [(340, 256), (426, 240)][scene % 2])[0]
            cv2.imwrite(str(root / f'rawframes/{clip}/img_{second * draw.FPS + 1:05d}.jpg'), image)
            keyframe = fetch_proposal.Keyframe(fetch_proposal.parse_clip(clip), second)
            frames += fetch_proposal.plan_frames([keyframe], 0, root)
    return frames[:count]


def timed(work, device: str) -> tuple[float, float]:
    """Return the seconds that `work` takes, and the utilization of the GPU in per cent (NaN on the
    CPU).
    """
    busy, done = [], threading.Event()

    def watch():
        while not done.wait(0.1):
            busy.append(
                float(
                    subprocess.run(
                        [
                            'nvidia-smi',
                            '--query-gpu=utilization.gpu',
                            '--format=csv,noheader,nounits',
                        ],
                        capture_output=True,
                        text=True,
                    ).stdout.split()[0]
                )
            )

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
    """Measure the floating point operations per second of a large matrix product."""
    torch.backends.cuda.matmul.allow_tf32 = True  # as cuDNN's convolutions do
    size = 8192 if device != 'cpu' else 2048
    a = torch.randn(size, size, device=device, dtype=torch.float16 if half else torch.float32)
    a @ a
    return 10 * 2 * size**3 / timed(lambda: [a @ a for _ in range(10)], device)[0]


def count_operations(options: fetch_proposal.Options, frame: fetch_proposal.Frame) -> float:
    """Count the floating point operations of one frame, multiplications and additions apart."""
    from torch.utils.flop_counter import FlopCounterMode

    model, pipeline, device = fetch_proposal.start_detector(options)
    _, data, _ = next(fetch_proposal.load_frames([frame], options.root, pipeline))
    with FlopCounterMode(display=False) as counter:
        fetch_proposal.predict(model, [data], device, False)
    return counter.get_total_flops()


def largest_difference(a: dict, b: dict, score_thr: float) -> tuple[float, float, int]:
    """Return the largest differences of boxes and scores, and clear boxes on one side only."""
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


def settings(gpu: bool, batch_sizes: list[int]) -> list[dict]:
    """Return the script's own settings at every batch size, then with one change at a time."""
    own = dict(
        batch_size=8 if gpu else 4,
        amp=False,
        layout=torch.contiguous_format,
        autotuning=False,
        tf32=False,
    )
    changes = [dict(batch_size=size) for size in batch_sizes] + [dict(layout=torch.channels_last)]
    if gpu:
        changes += [dict(autotuning=True), dict(tf32=True)]
    changes += [dict(amp=True), dict(amp=True, layout=torch.channels_last)]
    if gpu:
        changes += [dict(amp=True, batch_size=size) for size in batch_sizes if size > 8]
    return [{**own, **change} for change in changes]


def describe(setting: dict) -> str:
    words = [f'batch size {setting["batch_size"]}']
    words += ['--amp'] * setting['amp'] + ['TF32 products'] * setting['tf32']
    words += ['channels-last'] * (setting['layout'] == torch.channels_last)
    words += ['autotuning'] * setting['autotuning']
    return ', '.join(words)


def main() -> None:
    args = parse_args()
    fetch_proposal.use_torchvision_operators()
    fetch_proposal.boxes_agree = lambda *_: (
        True
    )  # random weights may go too far in half precision; the table says how far
    from mmdet.apis import inference_detector

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        frames = write_frames(root, args.frames)
        if args.published:
            args.config, args.checkpoint = published_detector.convert(root / 'published')
        checkpoint = args.checkpoint or random_checkpoint(args.config, root)
        gpu = args.device != 'cpu'
        name = (
            torch.cuda.get_device_name(args.device)
            if gpu
            else f'{platform.processor() or platform.machine()} CPU'
        )
        print(
            f'{name}, torch {torch.__version__}, {torch.get_num_threads()} threads; '
            f'{args.config.name}, '
            f'{len(frames)} frames of 340x256 and 426x240, median of {args.rounds} rounds'
        )
        base = fetch_proposal.Options(
            root,
            args.config.absolute(),
            checkpoint.absolute(),
            None,
            0.7 if args.checkpoint else 0.05,
            False,
            1,
            (),
        )
        fetch_proposal.choose_device = lambda num_gpus: args.device
        model, _ = fetch_proposal.build_model(base.config)
        fetch_proposal.load_weights(model, base.checkpoint)
        model.cfg = fetch_proposal.load_config(base.config, True)
        model.to(args.device)

        def loop() -> dict:
            found = {}
            for frame in frames:
                answer = inference_detector(model, str(root / frame.file))
                found[frame.keyframe.key] = fetch_proposal.extract_people(answer, base.score_thr)
            return found

        expected = loop()  # also warms up
        print(f'{sum(map(len, expected.values()))} boxes above {base.score_thr}\n')
        plain = [timed(loop, args.device)[0] for _ in range(args.rounds)]
        model = None  # frees the device's memory
        operations = count_operations(base, frames[0])
        limit = {
            half: arithmetic_limit(args.device, half)
            for half in ((False, True) if gpu else (False,))
        }
        median = statistics.median(plain)
        print(
            f'{"":<36}{"frames/s":>10}{"ratio":>8}{"GPU busy":>10}{"of limit":>10}   boxes, '
            'scores, alone'
        )
        print(
            f'{"inference_detector loop":<36}{len(frames) / median:>10.2f}{1:>8.2f}'
            f'{"":>10}{operations * len(frames) / median / limit[False]:>10.1%}'
        )
        for setting in settings(gpu, args.batch_sizes):
            options = base._replace(batch_size=setting['batch_size'], amp=setting['amp'])
            with contextlib.redirect_stdout(sys.stderr):
                fetch_proposal.start_detector(options)[0].to(memory_format=setting['layout'])
            torch.backends.cudnn.benchmark = setting['autotuning']
            torch.backends.cuda.matmul.allow_tf32 = setting['tf32']
            detections = fetch_proposal.detect(frames, options)  # warms up
            found = {detection.key: detection.boxes for detection in detections}
            runs = [
                timed(lambda: fetch_proposal.detect(frames, options), args.device)
                for _ in range(args.rounds)
            ]
            seconds, busy = (statistics.median(run[i] for run in runs) for i in (0, 1))
            shifts = largest_difference(found, expected, base.score_thr)
            rate = operations * len(frames) / seconds
            print(
                f'{describe(setting):<36}{len(frames) / seconds:>10.2f}{median / seconds:>8.2f}'
                f'{"" if not gpu else f"{busy:.0f} %":>10}'
                f'{rate / limit[gpu and setting["amp"]]:>10.1%}   '
                f'{shifts[0]:.1e}, {shifts[1]:.1e}, {shifts[2]}',
                flush=True,
            )


if __name__ == '__main__':
    main()
