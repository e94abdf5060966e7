"""What Step 3 does with damaged videos: which clips show wrong or spoilt pictures, and whether the
report names them.

    python benchmarks/damage.py [DAMAGES]

Draws ten-second videos with a number in every frame, damages copies of them at random (zeros,
noise, single bytes, a cut-off end, lost packets of a transport stream), DAMAGES (default: 40) for
each codec and container, and runs cut_kinetics.py on all of them, from a list and from an archive.
A clip is wrong where a frame shows a number that is more than 0.75 s off, and spoilt where a frame
is below 25 dB of the picture of its number, or shows none.
"""

import csv
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import av
import numpy as np

REPO = Path(__file__).parent.parent
sys.path[:0] = [str(REPO / folder) for folder in ('', 'tests', 'tests/tools')]
import draw  # noqa: E402
from helpers import numbered_source  # noqa: E402

X264 = ('-preset', 'medium', '-g', '250')
X265 = ('-c:v', 'libx265', '-preset', 'fast', '-x265-params', 'log-level=none')
PAIRS = {
    'H.264 mp4': dict(options=X264),
    'H.264 mkv': dict(options=X264, suffix='mkv'),
    'H.264 ts': dict(options=X264, suffix='ts'),
    'HEVC mp4': dict(options=X265),
    'HEVC mkv': dict(options=X265, suffix='mkv'),
    'HEVC ts': dict(options=X265, suffix='ts'),
    'VP8 webm': dict(
        options=('-c:v', 'libvpx', '-deadline', 'realtime', '-cpu-used', '8', '-b:v', '1M'),
        suffix='webm',
    ),
    'VP9 webm': dict(
        options=('-c:v', 'libvpx-vp9', '-deadline', 'realtime', '-cpu-used', '8', '-b:v', '1M'),
        suffix='webm',
    ),
    'AV1 mp4': dict(options=('-c:v', 'libsvtav1', '-preset', '10', '-svtav1-params', 'keyint=5s')),
}
PACKET = 188  # bytes of a transport stream's


def damage(data: bytes, kind: str, chance: random.Random) -> bytes:
    """Return the same file with one damage at a random place behind its header."""
    spoilt, length = bytearray(data), int(2 ** chance.uniform(3, 12))
    start = chance.randrange(2000, len(data) * 9 // 10)
    if kind == 'zeros':
        spoilt[start : start + length] = bytes(min(length, len(data) - start))
    elif kind == 'noise':
        spoilt[start : start + length] = chance.randbytes(min(length, len(data) - start))
    elif kind == 'bytes':
        for _ in range(chance.randrange(1, 60)):
            spoilt[min(start + chance.randrange(len(data) // 4), len(data) - 1)] = chance.randrange(
                256
            )
    elif kind == 'cut off':
        del spoilt[start:]
    else:  # lost packets
        first = start // PACKET * PACKET
        del spoilt[first : first + PACKET * chance.randrange(1, 20)]
    return bytes(spoilt)


def read_frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format='bgr24') for frame in video.decode(video=0)]


def noise(frame: np.ndarray, other: np.ndarray) -> float:
    """Return the mean square difference of two images."""
    return ((frame.astype(int) - other) ** 2).mean()


def video_id(index: int) -> str:
    return f'damage{index:05d}'


def run_step_3(folder: Path, *source) -> tuple[Path, dict[str, str]]:
    """Run Step 3; return the folder of clips and the reasons of the report by video."""
    root = folder / source[0].split('=')[0].strip('-')
    done = subprocess.run(
        [
            sys.executable,
            REPO / 'cut_kinetics.py',
            f'--avakinetics_anotation={folder}',
            f'--avakinetics_root={root}',
            *source,
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    with open(root / 'reports/cut_kinetics_train.csv', newline='') as file:
        return root / 'videos', {row['video_id']: row['reason'] for row in csv.DictReader(file)}


def main() -> None:
    damages, chance = int(sys.argv[1]) if len(sys.argv) > 1 else 40, random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder, made, whole = Path(name), {}, {}
        for pair, variant in PAIRS.items():
            suffix = variant.get('suffix', 'mp4')
            source = folder / f'source.{suffix}'
            numbered_source(source, dict(variant, size=(320, 240)))
            data = source.read_bytes()
            for number in range(damages + 1):  # the first is not damaged
                kinds = ['zeros', 'noise', 'bytes', 'cut off'] + ['lost packets'] * (suffix == 'ts')
                kind = kinds[number % len(kinds)] if number else 'none'
                video = video_id(len(made))
                (folder / f'{video}_000000_000010.{suffix}').write_bytes(
                    damage(data, kind, chance) if number else data
                )
                made[video] = (
                    pair,
                    kind,
                    f'{video}_000000_000010.{suffix}',
                    chance.randrange(1, 9) if number else 5,
                )
            whole[pair] = read_frames(source)
        (folder / 'kinetics_train_v1.0.csv').write_text(
            ''.join(
                f'{video},{second},0.1,0.1,0.9,0.9,12\n'
                for video, (_, _, _, second) in made.items()
            )
        )
        (folder / 'list.txt').write_text(
            ''.join(f'{folder}/{file}\n' for _, _, file, _ in made.values())
        )
        with tarfile.open(folder / 'all.tar', 'w') as tar:
            for _, _, file, _ in made.values():
                tar.add(folder / file, file)
        routes = dict(
            list=f'--kinetics_list={folder}/list.txt',
            archive=f'--kinetics_archives={folder}/all.tar',
        )
        for route, source in routes.items():
            clips, reasons = run_step_3(folder, source)
            print(
                f'\n{route:11}{"damaged":>9}{"reported":>10}{"right":>7}'
                f'{"wrong, unreported":>19}{"spoilt, unreported":>20}{"undamaged lost":>16}'
            )
            for pair in PAIRS:
                counts = dict.fromkeys(
                    ['damaged', 'reported', 'right', 'wrong', 'spoilt', 'lost'], 0
                )
                for video, (its_pair, kind, _, second) in made.items():
                    if its_pair != pair:
                        continue
                    if kind == 'none':
                        counts['lost'] += video in reasons
                        continue
                    counts['damaged'] += 1
                    if video in reasons:
                        counts['reported'] += 1
                        continue
                    first = max(0, second - 2) * draw.FPS
                    shown = read_frames(next(clips.glob(f'{video}_*.mp4')))
                    numbers = [draw.read_stamp(frame) for frame in shown]
                    wrong = any(
                        number >= 0 and abs(number - due) > 22
                        for due, number in enumerate(numbers, first)
                    )
                    spoilt = any(
                        not 0 <= number < 300
                        or noise(frame, whole[pair][number]) > 255**2 / 10**2.5
                        for number, frame in zip(numbers, shown)
                    )
                    counts['wrong'] += wrong
                    counts['spoilt'] += spoilt
                    counts['right'] += not wrong and not spoilt
                print(
                    f'{pair:11}{counts["damaged"]:>9}{counts["reported"]:>10}{counts["right"]:>7}{counts["wrong"]:>19}'
                    f'{counts["spoilt"]:>20}{counts["lost"]:>16}',
                    flush=True,
                )


if __name__ == '__main__':
    main()
