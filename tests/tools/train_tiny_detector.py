"""Train tests/tiny_detector.pth: `python tests/tools/train_tiny_detector.py` (about 8 minutes on 2
cores).

800 steps of 8 freshly drawn pictures, AdamW, one cycle up to 2e-3; then the weights are kept in
half precision (2.2 MB). Ends with the share of people found at IoU > 0.7 with score > 0.7 on
pictures that it never saw.
"""

import argparse
import pathlib
import time

import cv2
import numpy as np
import torch
from mmdet.apis import init_detector
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmengine.structures import InstanceData

from draw import draw_frame

HERE = pathlib.Path(__file__).parents[1]
SIZE = (432, 256)  # what the config's pipeline resizes wide frames to
BATCH, STEPS = 8, 800
TRAIN_SCENES = 1_000_000  # scenes from here on are trained on; tests and demo draw scenes below


def draw_sample(scene: int) -> tuple[torch.Tensor, DetDataSample]:
    """Draw an image (3, 256, 432) uint8 BGR with its people as ground truth, through JPEG."""
    rng = np.random.default_rng(scene)
    width = int(rng.choice([320, 340, 426, 432, 456]))
    image, boxes = draw_frame(scene, rng.uniform(0, 10), (width, 256), int(rng.integers(300)))
    image = cv2.imdecode(
        cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(60, 96))])[1], 1
    )
    padded = np.zeros((SIZE[1], 480, 3), np.uint8)
    padded[:, :width] = image
    shape = image.shape[:2]
    sample = DetDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0)))
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor(boxes * [width, 256, width, 256], dtype=torch.float32),
        labels=torch.zeros(len(boxes), dtype=torch.long),
    )
    return torch.from_numpy(padded).permute(2, 0, 1), sample


def train(steps: int) -> torch.nn.Module:
    torch.manual_seed(0)
    model = init_detector(str(HERE / 'tiny_detector.py'), None, device='cpu')
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 2e-3, total_steps=steps, pct_start=0.15
    )
    start = time.time()
    for step in range(steps):
        images, samples = zip(*(draw_sample(TRAIN_SCENES + step * BATCH + i) for i in range(BATCH)))
        data = model.data_preprocessor(
            dict(inputs=list(images), data_samples=list(samples)), training=True
        )
        loss, logs = model.parse_losses(model(**data, mode='loss'))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimiser.step()
        schedule.step()
        if step % 50 == 49:
            print(
                f'step {step + 1}/{steps}  loss {loss.item():.3f}  {time.time() - start:.0f} s',
                flush=True,
            )
    return model.eval()


def recall(model: torch.nn.Module, scenes: range) -> tuple[int, int]:
    """Return how many of the drawn people are found (IoU > 0.7, score > 0.7), of how many."""
    found = total = 0
    for scene in scenes:
        image, sample = draw_sample(scene)
        sample.set_metainfo(dict(batch_input_shape=tuple(image.shape[1:])))
        with torch.no_grad():
            result = model.test_step(dict(inputs=[image], data_samples=[sample]))[0].pred_instances
        people = result[(result.labels == 0) & (result.scores > 0.7)].bboxes
        overlaps = bbox_overlaps(sample.gt_instances.bboxes, people)
        found += int((overlaps.max(1).values > 0.7).sum()) if len(people) else 0
        total += len(overlaps)
    return found, total


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, default=STEPS, help='training steps')
    arguments = parser.parse_args()
    detector = train(arguments.steps)
    weights = {
        name: value.half() if value.is_floating_point() else value
        for name, value in detector.state_dict().items()
    }
    torch.save(
        dict(
            meta=dict(dataset_meta=dict(classes=detector.dataset_meta['classes'])),
            state_dict=weights,
        ),
        HERE / 'tiny_detector.pth',
    )
    print('found {} of {} people'.format(*recall(detector, range(500_000, 500_100))))
