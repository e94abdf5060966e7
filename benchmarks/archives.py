"""What cutting straight out of an archive needs beyond the clips: disk and memory, for archives of
growing size.

    python benchmarks/archives.py VIDEO...

All members are wanted. With one worker and with two, since one archive keeps all of them busy.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

REPO = Path(__file__).parent.parent


def folder_size(folder: Path) -> int:
    total = 0
    for path in folder.rglob('*') if folder.is_dir() else ():
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # gone since it was listed
            pass
    return total


def measure(
    videos: list[Path], members: int, workers: int, folder: Path
) -> tuple[int, int, float, float]:
    """Return archive size and peak of unfinished files in bytes, peak memory in MB, seconds."""
    names = [f'{index:011d}_000000_000010.mp4' for index in range(members)]
    with tarfile.open(folder / 'kinetics.tar', 'w') as tar:
        for index, name in enumerate(names):
            tar.add(videos[index % len(videos)], f'some class/{name}')
    (folder / 'kinetics_train_v1.0.csv').write_text(
        ''.join(f'{name[:11]},5.0,0.1,0.1,0.5,0.9,12\n' for name in names)
    )
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        [
            sys.executable,
            REPO / 'cut_kinetics.py',
            f'--avakinetics_anotation={folder}',
            f'--avakinetics_root={folder}/root',
            '--kinetics_archives',
            folder / 'kinetics.tar',
            f'--num_workers={workers}',
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    answer = []
    waiter = threading.Thread(target=lambda: answer.append(os.wait4(process.pid, 0)))
    waiter.start()
    while waiter.is_alive():
        peak = max(peak, folder_size(folder / 'root/videos/.cut_kinetics_train'))
        time.sleep(0.005)
    assert len(list((folder / 'root/videos').iterdir())) == len(names)
    return (
        (folder / 'kinetics.tar').stat().st_size,
        peak,
        answer[0][2].ru_maxrss / 1024,
        time.perf_counter() - start,
    )


def main() -> None:
    videos = [Path(name) for name in sys.argv[1:]]
    if not videos:
        sys.exit(__doc__)
    print(f'largest video {max(path.stat().st_size for path in videos) / 1e6:.2f} MB')
    print(
        f'{"members":>8}{"workers":>9}{"archive MB":>12}{"peak disk MB":>14}{"peak memory MB":>16}'
        f'{"seconds":>9}'
    )
    for members, workers in (200, 1), (200, 2), (800, 2):
        with tempfile.TemporaryDirectory() as folder:
            size, peak, memory, seconds = measure(videos, members, workers, Path(folder))
        print(
            f'{members:>8}{workers:>9}{size / 1e6:>12.0f}{peak / 1e6:>14.2f}{memory:>16.0f}'
            f'{seconds:>9.1f}'
        )


if __name__ == '__main__':
    main()
