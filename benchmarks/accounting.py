"""Where every annotated keyframe ends up: Steps 3 and 5 on real annotations and empty clips.

    python benchmarks/accounting.py kinetics_val_v1.0.csv kinetics-700_val.csv FOLDER

FOLDER is emptied. The first is an AVA-Kinetics csv, the second Kinetics-700's
(label,youtube_id,time_start,time_end,split). Every clip that Step 3 plans is an empty file with
frames of one byte, as if all videos existed, so that what is skipped is skipped by the planning.
"""

import csv
import functools
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO))
import cut_kinetics  # noqa: E402


def write_list(kinetics: Path, path: Path) -> None:
    """Write Kinetics-700's csv as the list of videos that Step 1 makes."""
    with open(kinetics) as file:
        path.write_text(
            ''.join(
                '{}/{}_{:06d}_{:06d}.mp4\n'.format(
                    row['label'], row['youtube_id'], int(row['time_start']), int(row['time_end'])
                )
                for row in csv.DictReader(file)
            )
        )


def make_clips(annotations: Path, listing: Path, root: Path) -> None:
    """Make an empty file for every clip that Step 3 plans, and its frames of one byte."""
    keyframes, _ = cut_kinetics.read_keyframes(annotations)
    plan = functools.partial(cut_kinetics.plan_clips, keyframes=keyframes)
    jobs, _ = cut_kinetics.read_list(listing, plan)
    videos = root / 'videos'
    videos.mkdir(parents=True)
    # as if Step 3 had made them
    cut_kinetics.check_options(cut_kinetics.parse_args([f'--avakinetics_root={root}']), videos)
    made = 0
    for clip in {job.clip for job in jobs}:  # some videos are listed twice, under two labels
        (videos / f'{clip.name}.mp4').touch()
        os.utime(videos / f'{clip.name}.mp4', (0, 0))  # older than the frames, which are links
        folder = root / 'rawframes' / clip.name
        folder.mkdir(parents=True)
        for frame in range(1, clip.num_frames + 1):
            if made % 60_000 == 0:  # ext4 allows a file 65,000 names
                source = root / f'frame_{made}'
                source.write_text('x')
            os.link(source, folder / f'img_{frame:05d}.jpg')
            made += 1


def report_keys(path: Path) -> set[tuple[str, str]]:
    with open(path, newline='') as file:
        return {(row['video_id'], row['timestamp']) for row in csv.DictReader(file)}


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    folder = Path(sys.argv[3])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    annotations, listing, root = (
        folder / 'kinetics_val_v1.0.csv',
        folder / 'list.txt',
        folder / 'root',
    )
    shutil.copy(sys.argv[1], annotations)
    write_list(Path(sys.argv[2]), listing)
    make_clips(annotations, listing, root)
    for script, *options in (
        ('cut_kinetics.py', f'--kinetics_list={listing}'),
        ('prepare_annotation.py',),
    ):
        print(f'\n$ {script}', flush=True)
        subprocess.run(
            [
                sys.executable,
                REPO / script,
                f'--avakinetics_anotation={folder}',
                f'--avakinetics_root={root}',
                '--split=val',
                *options,
            ],
            check=True,
        )
    seconds, unpeopled = {}, set()
    for line in open(annotations):
        video, timestamp, *rest = line.strip().split(',')
        if rest:
            seconds[video, timestamp] = video, str(int(float(timestamp)))
        else:
            unpeopled.add((video, timestamp))
    with open(root / 'kinetics_val.csv', newline='') as file:
        used = {(row[0][:11], row[1]) for row in csv.reader(file)}
    cut, prepared = (
        report_keys(root / f'reports/{step}_val.csv')
        for step in ('cut_kinetics', 'prepare_annotation')
    )
    states = Counter(
        'in the csv' * (second in used)
        + 'in the report of Step 3' * (second in cut)
        + ' and of Step 5' * (second in prepared)
        for second in seconds.values()
    )
    keyframes, alone = len(seconds.keys() | unpeopled), len(unpeopled - seconds.keys())
    print(
        f'\n{keyframes} keyframes: {alone} without people, {len(seconds)} with people (in '
        f'{len(set(seconds.values()))} '
        f'different seconds): {dict(states)}'
    )
    shutil.rmtree(folder)


if __name__ == '__main__':
    main()
