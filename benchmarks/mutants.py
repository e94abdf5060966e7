"""Whether the tests notice what changes: draw mutants of a script, run the tests that concern it.

    python benchmarks/mutants.py SCRIPT COUNT [SEED]

A mutant is the script with one change, drawn at random: a comparison turned, an `and` swapped for
an `or`, a condition negated, a number plus one, a call removed. Each runs in a copy of this
repository, up to the first test that fails. Prints a line for each: killed, with the test that
noticed it, or SURVIVED; then how many survived.
"""

import ast
import copy
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).parent.parent
# the tests of each script, the quick ones first, and the word in the names of those of the tests of
# all steps that concern it
TESTS = {
    'cut_kinetics': ('planning cut changes archives damage hostile messages faults', 'cut'),
    'extract_rgb_frames': ('planning extract changes hostile messages faults', 'extract'),
    'prepare_annotation': ('planning prepare changes hostile messages faults', 'prepare'),
    'fetch_proposal': ('planning fetch changes hostile messages faults', 'fetch'),
    'merge_annotations': ('planning merge hostile messages faults', 'merge'),
    'softlink_ava': ('planning link changes hostile messages faults page', 'link'),
}
OF_ALL_STEPS = 'test_messages or test_faults'
LIMIT_S = 1800  # a mutant that hangs counts as killed
TURNED = {
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}


def changes(node: ast.AST) -> list:
    """Return functions that change a node in place, one for each kind of mutant."""
    found = []
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        found.append(lambda node: node.ops.__setitem__(0, TURNED[type(node.ops[0])]()))
    if isinstance(node, ast.BoolOp):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        found.append(lambda node: setattr(node, 'op', other()))
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        found.append(lambda node: setattr(node, 'test', ast.UnaryOp(ast.Not(), node.test)))
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        found.append(lambda node: setattr(node, 'value', node.value + 1))
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        found.append(lambda node: setattr(node, 'value', ast.Constant(None)))
    return found


def draw_mutants(text: str, count: int, seed: int) -> list[tuple[int, str, str]]:
    """Return (line, change, text of the mutant) of so many mutants, no two on one line."""
    tree, drawn, lines = ast.parse(text), [], set()
    places = [
        (index, kind)
        for index, node in enumerate(ast.walk(tree))
        for kind in range(len(changes(node)))
    ]
    random.Random(seed).shuffle(places)
    for index, kind in places:
        mutant = copy.deepcopy(tree)
        node = next(node for number, node in enumerate(ast.walk(mutant)) if number == index)
        line, before = node.lineno, ast.unparse(node)
        changes(node)[kind](node)
        change = f'{before} -> {ast.unparse(node)}'.replace('\n', ' ')
        if line not in lines and len(drawn) < count:
            lines.add(line)
            drawn.append((line, change, ast.unparse(ast.fix_missing_locations(mutant))))
    return drawn


def run_tests(folder: Path, script: str) -> str:
    """Run the tests of a script up to the first that fails; return that, or '' if none does."""
    files, word = TESTS[script]
    tests = [f'tests/test_{name}.py' for name in files.split()]
    tests += ['-k', f'not ({OF_ALL_STEPS}) or {word}']
    # this test compares the texts of the scripts, which a mutant has lost its comments from
    tests += ['--deselect', 'tests/test_planning.py::test_what_stands_in_two_scripts_is_the_same']
    command = [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', *tests]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return 'it hangs'
    if not done.returncode:
        return ''
    failed = re.search(r'^(?:FAILED|ERROR) (\S+)', done.stdout, re.M)
    return failed[1] if failed else 'no test can be collected'


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    script, count = sys.argv[1].removesuffix('.py'), int(sys.argv[2])
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    mutants = draw_mutants((REPO / f'{script}.py').read_text(), count, seed)
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        ignored = shutil.ignore_patterns('.git', '.venv', 'demo', '__pycache__')
        shutil.copytree(REPO, folder, ignore=ignored, dirs_exist_ok=True)
        for line, change, text in mutants:
            (Path(folder) / f'{script}.py').write_text(text)
            noticed = run_tests(Path(folder), script)
            survived += not noticed
            outcome = f'killed by {noticed}' if noticed else 'SURVIVED'
            print(f'{script}.py:{line}: {change[:150]}: {outcome}', flush=True)
    print(f'{survived} of {len(mutants)} survived')


if __name__ == '__main__':
    main()
