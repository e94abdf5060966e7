"""How long Step 3 plans, and how much memory that takes, at full size.

    python benchmarks/planning.py ANNOTATIONS.csv KINETICS.csv

Takes a real AVA-Kinetics csv and Kinetics-700's own csv
(label,youtube_id,time_start,time_end,split), makes the list of videos of it, and repeats both under
other ids up to 540,000 list lines, the size of the training set.
"""

import csv
import functools
import gc
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import cut_kinetics  # noqa: E402


def other_id(video: str, copy: int) -> str:
    """Return the same id for copy 0, for the others a valid id that no other video has."""
    return video if not copy else f'{chr(64 + copy)}{video[1:]}'


def write_job(annotations: Path, kinetics: Path, copies: int, folder: Path) -> tuple[Path, Path]:
    """Write an annotation csv and a list of videos, each `copies` times the real ones."""
    with open(kinetics) as file:
        videos = list(csv.DictReader(file))
    lines = open(annotations).read().splitlines()
    with open(folder / 'list.txt', 'w') as listing, open(folder / 'annotations.csv', 'w') as rows:
        for copy in range(copies):
            listing.writelines(
                '{}/{}_{:06d}_{:06d}.mp4 1\n'.format(
                    row['label'],
                    other_id(row['youtube_id'], copy),
                    int(row['time_start']),
                    int(row['time_end']),
                )
                for row in videos
            )
            rows.writelines(other_id(line, copy) + '\n' for line in lines)
    return folder / 'annotations.csv', folder / 'list.txt'


def plan_all(annotations: Path, listing: Path, queue) -> None:
    gc.disable()  # as cut_all does
    start = time.perf_counter()
    keyframes, _ = cut_kinetics.read_keyframes(annotations)
    plan = functools.partial(cut_kinetics.plan_clips, keyframes=keyframes)
    jobs, _ = cut_kinetics.read_list(listing, plan)
    clips = cut_kinetics.find_covering_clips({job.clip.name for job in jobs}, keyframes)
    covered = {(clip.video_id, found) for clip in clips for found in clips[clip]}
    queue.put(
        (
            sum(map(len, keyframes.values())),
            len(covered),
            time.perf_counter() - start,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )
    )


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(f'{"list lines":>12}{"rows":>10}{"keyframes":>11}{"planned":>10}{"seconds":>9}{"MB":>6}')
    for copies in 1, 4, 8, 16:
        with tempfile.TemporaryDirectory() as folder:
            job = write_job(Path(sys.argv[1]), Path(sys.argv[2]), copies, Path(folder))
            lines = [sum(1 for _ in open(path)) for path in job]
            queue = multiprocessing.get_context('spawn').Queue()
            process = multiprocessing.get_context('spawn').Process(
                target=plan_all, args=(*job, queue)
            )
            process.start()
            keyframes, planned, seconds, memory = queue.get()
            process.join()
        print(
            f'{lines[1]:>12,}{lines[0]:>10,}{keyframes:>11,}{planned:>10,}{seconds:>9.1f}{memory:>6.0f}'
        )


if __name__ == '__main__':
    main()
