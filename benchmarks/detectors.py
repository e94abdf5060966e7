"""What detectors cost: frames a second of Step 6 on the CPU, each with its own config.

    python benchmarks/detectors.py [FRAMES]

FRAMES (default: 4) drawn frames of 340x256 go through the detector one by one, with random
weights, which need the same arithmetic as trained ones; the first frame warms up.
"""

import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

REPO = Path(__file__).parent.parent
sys.path[:0] = [str(REPO / folder) for folder in ('', 'tests', 'tests/tools')]
warnings.filterwarnings('ignore')
import fetch_proposal  # noqa: E402
from proposals import write_frames  # noqa: E402

DETECTORS = {
    'Cascade R-CNN X-101-64x4d': f"_base_ = '{REPO}/X-101-64x4d-FPN.py'\n",
    'RTMDet-m': "_base_ = 'mmdet::rtmdet/rtmdet_m_8xb32-300e_coco.py'\n",
    'YOLOX-nano': "_base_ = 'mmdet::yolox/yolox_nano_8xb8-300e_coco.py'\n",
}


def main() -> None:
    count, first = int(sys.argv[1]) if len(sys.argv) > 1 else 4, None
    fetch_proposal.use_torchvision_operators()
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()
    print(f'{"":28}{"frames/s":>10}{"ratio":>8}   {torch.get_num_threads()} threads')
    for name, text in DETECTORS.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            (root / 'config.py').write_text(text + 'model = dict(backbone=dict(init_cfg=None))\n')
            model = MODELS.build(fetch_proposal.load_config(root / 'config.py', True).model)
            torch.save(dict(state_dict=model.state_dict()), root / 'weights.pth')
            frames = write_frames(root, count + 1)
            options = fetch_proposal.Options(
                root, root / 'config.py', root / 'weights.pth', 0, 0.7, False, 1, ()
            )
            fetch_proposal.detect(frames[:1], options)
            start = time.perf_counter()
            fetch_proposal.detect(frames[1 : count + 1], options)
            rate = count / (time.perf_counter() - start)
            first = first or rate
            print(f'{name:28}{rate:>10.3f}{rate / first:>8.1f}', flush=True)


if __name__ == '__main__':
    main()
