"""What this software promises: rows that tests name by ``@pytest.mark.promise(row="...")``, and how they last ended.

``pytest -m "promise(row='atomic')"`` runs the tests of one row; ``--promises FILE`` keeps how the chosen tests ended.
``python tests/promises.py FILE`` writes the table of docs/promises.md from such a file.
"""

KERNELS = {
    "registered right": "every public op passes torch.library.opcheck, torch.compile(fullgraph=True) and torch.export",
    "accurate": "error against float64 at most twice that of the same precision in plain torch, plus 4 ulp",
    "odd inputs": "any size, any strides, misaligned; NaN and Inf stay where float64 has them; no input is modified",
    "in bounds": "no access outside the tensors",
    "large": "right beyond 2^31 elements, or refused in one line before the launch",
    "repeatable": "repeats are equal bit for bit, forward and backward",
    "well behaved": "the caller's stream and device, CUDA graphs, threads, no waiting for the device in a step",
    "equal in training": "reference and fast take the same steps of training within rounding",
    "absent parts": "without GPU, Triton, DALI, CuPy or the built module: same calls, same numbers, one line of log",
}
FILES = {
    "hostile files": "every file ends as a score or one line that names it; nothing but the given file is opened",
    "fuzz": "mutated files of every kind: no crash, no hang, no exception but ours",
    "true frames": "every frame once and in order; what is damaged or missing is reported",
    "isolation": "decoding runs in a process with limits, which may reach nothing; a killed one is one failed file",
    "no substitution": "a bad sample is an error or a listed skip, and never replaced by another",
    "limits": "size, pixels, frames and seconds of a video are checked before anything is allocated",
}
RUNS = {
    "no code from files": "no file of a user can run code, and what a file may take is bounded",
    "atomic": "a file is written whole or not at all; the newest whole checkpoint counts",
    "kill -9": "a run killed at any moment ends, once resumed, as one that was not",
    "pre-emption": "SIGTERM or SIGUSR1: a checkpoint, exit code 143, within 30 s",
    "disk full, read-only": "one line, and what was there before stays whole",
    "odd surroundings": "vanished input, wrong clock, damaged or shared cache, no home, any path, any locale",
    "state": "a run goes on with all of its state, and a mismatch names the field",
    "augmentation": "a pure function of seed, epoch, sample and view",
    "numbers": "non-finite steps are skipped and named; edge cases give finite losses and gradients",
    "memory": "scoring halves its batch when memory runs out; training says which setting to change",
    "soak": "many clips leave memory, descriptors, threads and shared memory as they were",
    "supply": "versions without known holes, no network but asked-for downloads, no shell, eval or unsafe loader",
    "metrics": "AUC, accuracy and EER equal exact values, ties included; clips and videos are told apart",
}
ROWS = KERNELS | FILES | RUNS
