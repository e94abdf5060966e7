"""These scripts and MMAction2's own, side by side: Steps 3 to 5 on real videos, in turn.

    python benchmarks/compare.py --videos FOLDER --annotations kinetics_val_v1.0.csv \\
        --kinetics kinetics-700_val.csv

The videos get real names and annotations: each line of Kinetics-700's csv
(label,youtube_id,time_start,time_end,split) whose video is annotated takes one of them. MMAction2's
scripts run as they come in its wheel, with the ffmpeg on PATH, and spaces in class names replaced
by underscores as its documentation asks. Times are per clip that came out. Needs what the tests
need, and an idle machine: CPU time is that of the whole machine.
"""

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import cv2
import decord
import imageio_ffmpeg
import mmaction
import numpy as np

REPO = Path(__file__).parent.parent
THEIRS = Path(mmaction.__path__[0]) / '.mim/tools/data/ava_kinetics'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        '--videos', type=Path, required=True, help='folder of real videos of ten seconds'
    )
    parser.add_argument('--annotations', type=Path, required=True, help='real AVA-Kinetics csv')
    parser.add_argument(
        '--kinetics', type=Path, required=True, help="Kinetics-700's csv of the same videos"
    )
    parser.add_argument('--clips', type=int, default=60, help='videos in the job')
    parser.add_argument('--rounds', type=int, default=5, help='runs of each side')
    parser.add_argument(
        '--workers', type=int, default=os.cpu_count(), help='--num_workers of both sides'
    )
    parser.add_argument('--chart', type=Path, help='also draw the ratios into this PNG')
    return parser.parse_args()


def write_job(args: argparse.Namespace, folder: Path) -> int:
    """Copy videos under real names, write list and annotations; return the number of keyframes."""
    with open(args.kinetics) as file:
        names = {row['youtube_id']: row for row in csv.DictReader(file)}
    rows = {}
    for line in open(args.annotations):
        video, second, *rest = line.split(',')
        if rest and video in names and 0 <= float(second) - int(names[video]['time_start']) < 10:
            rows.setdefault(video, []).append(line)
    step = len(rows) // args.clips
    videos, lines = sorted(args.videos.glob('*.mp4')), []
    for index, video in enumerate(list(rows)[::step][: args.clips]):
        row = names[video]
        path = 'videos_train/{}/{}_{:06d}_{:06d}.mp4'.format(
            row['label'].replace(' ', '_'), video, int(row['time_start']), int(row['time_end'])
        )
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(videos[index % len(videos)], folder / path)
        lines.append((f'{folder}/{path} {index}\n', rows[video]))
    (folder / 'list.txt').write_text(''.join(line for line, _ in lines))
    (folder / 'kinetics_train_v1.0.csv').write_text(
        ''.join(row for _, found in lines for row in found)
    )
    return len({tuple(row.split(',')[:2]) for _, found in lines for row in found})


def cpu_seconds() -> float:
    user, nice, system, *_ = map(int, open('/proc/stat').readline().split()[1:])
    return (user + nice + system) / os.sysconf('SC_CLK_TCK')


def session_memory(session: int) -> int:
    """Return the resident memory in bytes of all processes of a session."""
    total = 0
    for path in Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = path.read_text().rsplit(')', 1)[1].split()
        except OSError:  # ended since it was listed
            continue
        if int(fields[3]) == session:
            total += int(fields[21]) * os.sysconf('SC_PAGE_SIZE')
    return total


def run(command: list) -> tuple[float, float, int]:
    """Run a command; return wall time and CPU time in s and peak memory in bytes."""
    before, start, peak = cpu_seconds(), time.perf_counter(), 0
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    done = threading.Event()
    threading.Thread(target=lambda: (process.wait(), done.set())).start()
    while not done.wait(0.1):
        peak = max(peak, session_memory(process.pid))
    return time.perf_counter() - start, cpu_seconds() - before, peak


def steps(
    scripts: Path, job: Path, root: Path, workers: list[str], frames: bool = True
) -> dict[str, tuple]:
    """Run Steps 3 to 5 of one side into an empty root."""
    notes, place = f'--avakinetics_anotation={job}', f'--avakinetics_root={root}'
    results = {
        'cut': run(
            [
                sys.executable,
                scripts / 'cut_kinetics.py',
                notes,
                f'--kinetics_list={job}/list.txt',
                place,
                *workers,
            ]
        )
    }
    if frames:
        results['extract'] = run(
            [sys.executable, scripts / 'extract_rgb_frames.py', place, *workers]
        )
    results['annotate'] = run(
        [sys.executable, scripts / 'prepare_annotation.py', notes, place, *workers]
    )
    return results


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Return the structural similarity of two grey images, 11x11 windows, sigma 1.5 (Wang et al.,
    2004).
    """
    a, b = a.astype(np.float32), b.astype(np.float32)

    def blur(image):
        return cv2.GaussianBlur(image, (11, 11), 1.5)

    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    return float(
        (
            ((2 * ma * mb + 6.5025) * (2 * cov + 58.5225))
            / ((ma * ma + mb * mb + 6.5025) * (va + vb + 58.5225))
        ).mean()
    )


def quality(job: Path, root: Path) -> dict[str, float]:
    """Return SSIM of clips against sources, PSNR of frames against clips, sizes, missing clips.

    Each tenth frame is compared with the best of the source's five frames around its time, so that
    a shift in time does not count as a loss of quality.
    """
    similar, psnr, complete = [], [], 0
    sources = {path.name[:11]: path for path in (job / 'videos_train').rglob('*.mp4')}
    clips = sorted((root / 'videos').glob('*.mp4'))
    for clip in clips:
        source = decord.VideoReader(str(sources[clip.name[:11]]))
        video, rate = decord.VideoReader(str(clip)), source.get_avg_fps()
        offset = int(clip.stem[-13:-7]) - int(sources[clip.name[:11]].stem[-13:-7])
        folder = root / 'rawframes' / clip.stem
        length = (int(clip.stem[-6:]) - int(clip.stem[-13:-7])) * 30
        complete += len(video) == length and (
            not folder.is_dir() or len(list(folder.iterdir())) == length
        )
        for k in range(5, len(video), 10):
            picture = cv2.cvtColor(video[k].asnumpy(), cv2.COLOR_RGB2BGR)
            grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
            middle = round((offset + k / 30) * rate)
            similar.append(
                max(
                    ssim(
                        grey,
                        cv2.cvtColor(source[i].asnumpy(), cv2.COLOR_RGB2GRAY)[
                            : grey.shape[0], : grey.shape[1]
                        ],
                    )
                    for i in range(max(0, middle - 2), min(len(source), middle + 3))
                )
            )
            frame = folder / f'img_{k + 1:05d}.jpg'
            if frame.is_file():
                psnr.append(cv2.PSNR(picture, cv2.imread(str(frame))))
    size = {
        name: sum(path.stat().st_size for path in (root / name).rglob('*') if path.is_file())
        for name in ('videos', 'rawframes')
    }
    keyframes = {tuple(line.split(',')[:2]) for line in open(root / 'kinetics_train.csv')}
    return dict(
        clips=len(clips),
        complete=complete,
        keyframes=len(keyframes),
        ssim=statistics.mean(similar),
        psnr=statistics.mean(psnr) if psnr else float('nan'),
        videos=size['videos'] / len(clips) / 1e3,
        frames=size['rawframes'] / len(clips) / 1e6,
    )


def floor(job: Path, root: Path) -> dict[str, float]:
    """Return CPU seconds per clip of decoding, and of decoding and encoding, in one process."""
    sources = {path.name[:11]: path for path in (job / 'videos_train').rglob('*.mp4')}
    clips, costs = sorted((root / 'videos').glob('*.mp4')), {}
    inputs, cut, encode = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for index, clip in enumerate(clips):
            source = sources[clip.name[:11]]
            offset = int(clip.stem[-13:-7]) - int(source.stem[-13:-7])
            span = ['-t', str(int(clip.stem[-6:]) - int(clip.stem[-13:-7]))]
            inputs += ['-threads', '1', '-ss', str(offset), *span, '-i', str(source)]
            cut += ['-map', f'{index}:V', '-f', 'null', '-']
            encode += [
                '-map',
                f'{index}:V',
                '-c:v',
                'libx264',
                '-preset',
                'superfast',
                '-crf',
                '21',
                '-threads',
                '1',
                f'{folder}/{index}.mp4',
            ]
        for name, outputs in ('decode the span', cut), ('decode and encode the span', encode):
            costs[name] = run([imageio_ffmpeg.get_ffmpeg_exe(), '-v', 'error', *inputs, *outputs])[
                1
            ] / len(clips)
        inputs = [item for clip in clips for item in ('-threads', '1', '-i', str(clip))]
        outputs = [
            item
            for index in range(len(clips))
            for item in ('-map', f'{index}:V', '-f', 'null', '-')
        ]
        costs['decode the clip'] = run(
            [imageio_ffmpeg.get_ffmpeg_exe(), '-v', 'error', *inputs, *outputs]
        )[1] / len(clips)
    return costs


def spread(values: list[float], digits: int = 2) -> str:
    return (
        f'{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to '
        f'{max(values):.{digits}f})'
    )


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job, roots = (
            Path(folder) / 'job',
            {side: Path(folder) / side for side in ('theirs', 'ours', 'small')},
        )
        job.mkdir()
        keyframes = write_job(args, job)
        times = {}
        for number in range(args.rounds):
            for workers, flags in ('same', [f'--num_workers={args.workers}']), ('default', []):
                for side, scripts in ('theirs', THEIRS), ('ours', REPO), ('small', REPO):
                    shutil.rmtree(roots[side], ignore_errors=True)
                    for step, result in steps(
                        scripts, job, roots[side], flags, side != 'small'
                    ).items():
                        times.setdefault((workers, side, step), []).append(result)
            print(f'round {number + 1} of {args.rounds}', file=sys.stderr)
        found = {side: quality(job, root) for side, root in roots.items()}
        costs = floor(job, roots['ours'])

    version = subprocess.run(['ffmpeg', '-version'], capture_output=True, text=True).stdout
    print(
        f'{args.clips} videos, {keyframes} annotated keyframes, {args.workers} workers, '
        f'{args.rounds} rounds; '
        f'{version.splitlines()[0]} for MMAction2'
    )
    print('median (smallest to largest); s are per clip that came out\n')
    print(
        f'{"step":<10}{"MMAction2 s":>24}{"ours s":>24}{"ratio":>22}{"CPU s":>16}{"memory MB":>16}'
    )
    ratios = {}
    for step in 'cut', 'extract', 'annotate':
        walls = {
            side: [t[0] / found[side]['clips'] for t in times['same', side, step]]
            for side in ('theirs', 'ours')
        }
        ratios[step] = [a / b for a, b in zip(walls['theirs'], walls['ours'])]
        cpu, memory = (
            [
                statistics.median(t[i] for t in times['same', side, step])
                for side in ('theirs', 'ours')
            ]
            for i in (1, 2)
        )
        cpu = [value / found[side]['clips'] for value, side in zip(cpu, ('theirs', 'ours'))]
        print(
            f'{step:<10}{spread(walls["theirs"], 3):>24}{spread(walls["ours"], 3):>24}'
            f'{spread(ratios[step]):>22}'
            f'{f"{cpu[0]:.3f} {cpu[1]:.3f}":>16}'
            f'{f"{memory[0] / 1e6:.0f} {memory[1] / 1e6:.0f}":>16}'
        )
    for side, name in ('ours', 'all, default workers'), ('small', 'without raw frames'):
        totals = [
            [
                sum(
                    times['default', which, step][n][0]
                    for step in ('cut', 'extract', 'annotate')
                    if (which, step) != ('small', 'extract')
                )
                / found[which]['clips']
                for n in range(args.rounds)
            ]
            for which in ('theirs', side)
        ]
        ratios[name] = [a / b for a, b in zip(*totals)]
        print(
            f'{name:<22}{spread(totals[0], 3)}  {spread(totals[1], 3)}  ratio '
            f'{spread(ratios[name])}'
        )
    print(
        f'\n{"":<10}{"clips":>7}{"complete":>10}{"keyframes":>11}'
        f'{"SSIM":>8}{"PSNR dB":>9}{"clip kB":>9}{"frames MB":>11}'
    )
    for side, q in found.items():
        print(
            f'{side:<10}{q["clips"]:>7}{q["complete"]:>10}{q["keyframes"]:>11}'
            f'{q["ssim"]:>8.4f}{q["psnr"]:>9.2f}{q["videos"]:>9.0f}{q["frames"]:>11.2f}'
        )
    print(
        '\nCPU s per clip in one process without process starts: '
        + ', '.join(f'{name} {value:.3f}' for name, value in costs.items())
    )
    if args.chart:
        draw_chart(args.chart, ratios)


def draw_chart(path: Path, ratios: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    names = {
        'cut': 'Step 3: cut',
        'extract': 'Step 4: extract',
        'annotate': 'Step 5: annotate',
        'all, default workers': 'Steps 3 to 5',
        'without raw frames': 'Steps 3 and 5,\nwithout raw frames',
    }
    figure, axes = pyplot.subplots(figsize=(8, 3.2))
    medians = [statistics.median(ratios[name]) for name in names]
    axes.barh(list(names.values()), medians, color='#3a7ca5')
    for index, name in enumerate(names):
        axes.plot([min(ratios[name]), max(ratios[name])], [index, index], color='black')
        axes.text(max(ratios[name]) + 0.1, index, f'{medians[index]:.1f} x', va='center')
    axes.axvline(1, color='grey', linestyle=':')
    axes.set_xlabel("times the speed of MMAction2's scripts (median, smallest to largest)")
    axes.invert_yaxis()
    axes.spines[['top', 'right']].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == '__main__':
    main()
