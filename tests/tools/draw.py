"""Drawn videos for the tests and the demo: people whose boxes are known, and a number in every
frame.

Every picture is a pure function of (scene, time), so whoever holds a frame can tell which one it
should be: `stamp` writes the frame's number as a bar of black and white cells that survives
compression, `read_stamp` reads it back, and `figure_boxes` says where the drawn people stand.
"""

import functools
import subprocess
from fractions import Fraction

import av
import cv2
import numpy as np

try:
    import imageio_ffmpeg

    FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
except ImportError:  # in `make demo`, which does without
    FFMPEG = None
FPS = 30  # frames per second of the clips, as in the six scripts
STAMP_BITS = 12  # frame numbers up to 4095, most significant bit first, then one cell of parity


def stamp(image: np.ndarray, number: int) -> None:
    """Write `number` into the top tenth of a BGR image (H, W, 3), in place."""
    bits = [number >> i & 1 for i in reversed(range(STAMP_BITS))]
    bits.append(sum(bits) % 2)
    edges = np.linspace(0, image.shape[1], len(bits) + 1).astype(int)
    for bit, left, right in zip(bits, edges, edges[1:]):
        image[: stamp_height(image), left:right] = 235 if bit else 20


def stamp_height(image: np.ndarray) -> int:
    return max(6, image.shape[0] // 10)


def read_stamp(image: np.ndarray) -> int:
    """Read the number that `stamp` wrote; -1 if its parity is wrong, as in a blend of frames."""
    bar = image[1 : stamp_height(image) - 2].mean(axis=(0, 2))
    edges = np.linspace(0, image.shape[1], STAMP_BITS + 2)
    cells = [
        bar[int(a + (b - a) / 4) : max(int(b - (b - a) / 4), int(a + (b - a) / 4) + 1)].mean()
        for a, b in zip(edges, edges[1:])
    ]
    bits = [int(cell > 128) for cell in cells]
    if sum(bits[:-1]) % 2 != bits[-1]:
        return -1
    return int(''.join(map(str, bits[:-1])), 2)


def figures_at(scene: int, time: float) -> list[dict]:
    """Return the people of a scene at a time: center x, feet y, height (all relative), looks."""
    rng = np.random.default_rng(scene)
    count = int(rng.integers(1, 4))
    people = []
    for index in range(count):
        height = rng.uniform(0.42, 0.62)
        centre = (index + 0.5) / count + rng.uniform(-0.04, 0.04)
        sway = rng.uniform(0.01, 0.05) * np.sin(time * rng.uniform(0.5, 2) + rng.uniform(0, 6))
        people.append(
            dict(
                x=float(centre + sway),
                feet=float(rng.uniform(0.86, 0.95)),
                height=float(height),
                arms=float(rng.uniform(-0.6, 0.9) + 0.3 * np.sin(2 * time + index)),
                stride=float(rng.uniform(0.1, 0.5)),
                skin=tuple(int(v) for v in rng.integers((70, 100, 140), (140, 180, 235))),
                shirt=tuple(int(v) for v in rng.integers(20, 235, 3)),
                trousers=tuple(int(v) for v in rng.integers(10, 150, 3)),
            )
        )
    return people


def draw_figure(image: np.ndarray, person: dict) -> tuple[int, int, int, int]:
    """Draw one person into a BGR image; return the enclosing box x1, y1, x2, y2 in pixels."""
    rows, columns = image.shape[:2]
    mask = np.zeros((rows, columns), np.uint8)
    tall = person['height'] * rows
    x, feet = person['x'] * columns, person['feet'] * rows
    top, head = feet - tall, tall * 0.085
    neck, hip = top + 2.1 * head, feet - tall * 0.47
    limb = max(2, round(tall * 0.07))

    def paint(draw, colour, *args):
        for canvas, value in ((image, colour), (mask, 255)):
            draw(canvas, *args[:-1], value, args[-1], cv2.LINE_8)

    def point(px, py):
        return round(px), round(py)

    for side in (-1, 1):
        paint(
            cv2.line,
            person['trousers'],
            point(x + side * tall * 0.04, hip),
            point(x + side * tall * (0.05 + 0.12 * person['stride']), feet - limb / 2),
            limb,
        )
    paint(cv2.line, person['shirt'], point(x, neck + limb), point(x, hip), round(tall * 0.17))
    for side in (-1, 1):
        elbow = x + side * tall * 0.16
        paint(
            cv2.line,
            person['skin'],
            point(x + side * tall * 0.08, neck + limb),
            point(elbow, neck + limb + tall * (0.22 - 0.25 * person['arms'])),
            max(2, limb * 2 // 3),
        )
    paint(cv2.circle, person['skin'], point(x, top + head), round(head), -1)
    left, top, width, height = cv2.boundingRect(mask)
    return left, top, left + width, top + height


@functools.lru_cache(maxsize=4)
def draw_background(scene: int, width: int, height: int) -> np.ndarray:
    """Draw a still room with furniture that is not a person.

    BGR, uint8.
    """
    rng = np.random.default_rng(scene + 7919)
    image = cv2.resize(
        rng.integers(60, 200, (4, 5, 3), dtype=np.uint8),
        (width, height),
        interpolation=cv2.INTER_CUBIC,
    )
    for _ in range(int(rng.integers(4, 9))):
        colour = tuple(int(v) for v in rng.integers(0, 255, 3))
        x, y = int(rng.integers(0, width)), int(rng.integers(height // 4, height))
        size = int(rng.integers(height // 16, height // 4))
        kind = rng.integers(4)
        if kind == 0:
            cv2.rectangle(image, (x, y), (x + size, y + size // 2), colour, -1)
        elif kind == 1:
            cv2.circle(image, (x, y), size // 3, colour, -1)
        elif kind == 2:
            cv2.line(image, (x, y), (x, y - 2 * size), colour, max(2, size // 6))
        else:
            cv2.fillPoly(
                image, [np.array([(x, y), (x + size, y), (x + size // 2, y - size)])], colour
            )
    return image


def draw_frame(
    scene: int, time: float, size: tuple[int, int], number: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a frame of a scene: BGR (H, W, 3) and the relative boxes (n, 4) of its people."""
    width, height = size
    image = draw_background(scene, width, height).copy()
    boxes = [draw_figure(image, person) for person in figures_at(scene, time)]
    if number is not None:
        stamp(image, number)
    return image, np.array(boxes, float).reshape(-1, 4) / [width, height, width, height]


def figure_boxes(scene: int, time: float, size: tuple[int, int]) -> np.ndarray:
    """Return the relative boxes (n, 4) of the people of a scene, as `draw_frame` draws them."""
    return draw_frame(scene, time, size)[1]


def encode(path, frames, fps, size: tuple[int, int], before=(), inputs=(), options=()) -> None:
    """Encode BGR frames at `fps` (a number or 'n/d') as H.264 into `path`.

    `before` goes before the pictures' input, `inputs` are further inputs, `options` come last and
    win.
    """
    command = [
        FFMPEG,
        '-v',
        'error',
        '-y',
        '-f',
        'rawvideo',
        '-pix_fmt',
        'bgr24',
        '-s',
        f'{size[0]}x{size[1]}',
        '-framerate',
        str(fps),
        *before,
        '-i',
        '-',
        *inputs,
        '-c:v',
        'libx264',
        '-preset',
        'ultrafast',
        '-threads',
        '2',
        '-pix_fmt',
        'yuv420p',
        *options,
        str(path),
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    for frame in frames:
        process.stdin.write(np.ascontiguousarray(frame).tobytes())
    process.stdin.close()
    if process.wait():
        raise RuntimeError(f'ffmpeg failed on {path}: {command}')


def encode_plain(path, frames, fps, size: tuple[int, int]) -> None:
    """Do what `encode` does without options, by PyAV."""
    with av.open(str(path), 'w') as video:
        stream = video.add_stream('libx264', Fraction(fps), options=dict(preset='ultrafast'))
        stream.width, stream.height = size
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), 'bgr24')
            video.mux(stream.encode(picture))
        video.mux(stream.encode())
