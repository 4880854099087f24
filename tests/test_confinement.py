"""A decoding process under the kernel's filter: what is refused, what still works, what is said without a filter."""

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from video_files import barcode_video, read_barcode

from sdr import confinement, decode_worker, decoding
from sdr.video import open_video

pytestmark = pytest.mark.promise(row="isolation")

machine = os.uname().machine
filtered = pytest.mark.skipif(machine not in confinement.MACHINES, reason="no filter is known for this machine")

numbers = {name: row[confinement.MACHINES.get(machine, (0, 0))[1]] for name, row in confinement.NUMBERS.items()}

# becomes what the worker is before it reads a byte, by the worker's own functions, then runs the test's lines
CONFINED = f"""
import ctypes, fcntl, json, mmap, os, resource, signal, socket, struct, sys, threading, time, types
package = types.ModuleType("sdr")
package.__path__ = [{str(Path(decode_worker.__file__).parent)!r}]
sys.modules["sdr"] = package
from sdr.decode_worker import confine, open_nothing_more, send
libc = ctypes.CDLL(None, use_errno=True)
parent = os.getppid()
numbers = {numbers}

def refusal(call):
    "The number of the error that a call ends with, 0 without one."
    try:
        result = call()
    except OSError as error:
        return error.errno
    return ctypes.get_errno() if type(result) is int and result == -1 else 0

def tell(**calls):
    os.write(1, json.dumps({{name: refusal(call) for name, call in calls.items()}}).encode())
    os._exit(0)

def thread():
    started = threading.Thread(target=time.sleep, args=(0.01,))
    started.start()
    started.join()
"""
WORKER = """
confine({"decoder": "pyav", "seconds": 60, "memory": 2**30})
before = mmap.mmap(-1, 4096)
assert open_nothing_more() == ""
"""
ON_A_GPU = WORKER.replace("open_nothing_more()", "open_nothing_more(later=256, gpu=True)") + (
    "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
)


def confined(script: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-P", "-c", CONFINED + script], capture_output=True, timeout=60)


def refusals(script: str) -> dict[str, int]:
    done = confined(script)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


COMMON = """
    execve=lambda: os.execv("/bin/true", ["true"]),
    fork=os.fork,
    fork_of_c=libc.fork,
    vfork=lambda: libc.syscall(numbers["vfork"]) if numbers["vfork"] >= 0 else libc.fork(),
    spawn=lambda: os.posix_spawn("/bin/true", ["true"], {}),
    ptrace=lambda: libc.ptrace(16, parent, 0, 0),
    kill_parent=lambda: os.kill(parent, signal.SIGTERM),
    thread_of_parent=lambda: libc.tgkill(parent, parent, signal.SIGTERM),
    any_thread=lambda: libc.syscall(numbers["tkill"], parent, signal.SIGTERM),
    internet=socket.socket,
    packets=lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    parents_memory=lambda: libc.syscall(numbers["process_vm_readv"], parent, None, 0, None, 0, 0),
    io_uring=lambda: libc.syscall(numbers["io_uring_setup"], 1, None),
    namespace=lambda: libc.unshare(0x10000000),
    mount=lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
    new_mount=lambda: libc.syscall(numbers["fsopen"], b"tmpfs", 0),
    limits_of_parent=lambda: libc.prlimit(parent, resource.RLIMIT_CORE, None, None),
    priority_of_parent=lambda: libc.setpriority(0, parent, 0),
    processors_of_parent=lambda: os.sched_setaffinity(parent, range(256)),
    signals_to_parent=lambda: fcntl.fcntl(1, fcntl.F_SETOWN, parent),
    signals_to_its_thread=lambda: fcntl.fcntl(1, 15, struct.pack("ii", 0, parent)),
    which_signal=lambda: fcntl.fcntl(1, fcntl.F_SETSIG, signal.SIGKILL),
    signals_by_ioctl=lambda: fcntl.ioctl(1, 0x8901, struct.pack("i", parent)),
    typing=lambda: fcntl.ioctl(1, 0x5412, b"x"),
    by_handle=lambda: libc.syscall(numbers["open_by_handle_at"], -1, None, 0),
"""


@filtered
def test_a_decoder_may_not_reach_out():
    """Every call is refused and the process goes on."""
    answers = refusals(
        WORKER
        + f"""
tell({COMMON}
    open=lambda: os.open("/dev/null", os.O_RDONLY),
    create=lambda: os.open("/tmp/x", os.O_CREAT | os.O_WRONLY),
    unlink=lambda: os.unlink("/nowhere"),
    rename=lambda: os.rename("/nowhere", "/nobody"),
    folder=lambda: os.mkdir("/tmp/x"),
    look=lambda: os.stat("/"),
    list=lambda: os.listdir("/"),
    change=lambda: os.chmod("/nowhere", 0o777),
    local=lambda: socket.socket(socket.AF_UNIX),
    pair=socket.socketpair,
    limits=lambda: libc.prlimit(0, resource.RLIMIT_NOFILE, None, None),
    memory_file=lambda: os.memfd_create("x"),
    pipe=os.pipe,
    copy=lambda: os.dup(1),
    user=lambda: os.setuid(0),
    priority=lambda: os.nice(-5),
    code=lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    turned_to_code=lambda: libc.mprotect(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(before))), 4096, 5),
)"""
    )
    assert len(answers) > 30
    assert {
        name: errno.errorcode.get(number, number) for name, number in answers.items() if number != errno.EPERM
    } == {}


@filtered
def test_what_decoding_needs_still_works():
    answers = refusals(
        WORKER
        + """
tell(thread=thread, threads=lambda: [thread() for _ in range(8)] and 0, sleep=lambda: time.sleep(0.001),
    memory=lambda: len(bytearray(2**26)), random=lambda: len(os.urandom(8)), processors=lambda: os.sched_getaffinity(0),
    own_signal=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN) and signal.raise_signal(signal.SIGTERM))"""
    )
    assert set(answers.values()) == {0}


@filtered
def test_what_a_decoder_on_a_gpu_may_ask_for():
    """All files that the user can open are among it: a filter sees no path."""
    answers = refusals(
        ON_A_GPU
        + f"""
tell({COMMON}
    open=lambda: os.close(os.open("/dev/null", os.O_RDONLY)),
    local=lambda: socket.socket(socket.AF_UNIX).close(),
    code=lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC).close(),
    thread=thread,
    write=lambda: os.close(os.open("/dev/null", os.O_WRONLY)),
    own_limits=lambda: libc.prlimit(0, resource.RLIMIT_NOFILE, None, None),
    limits_by_its_number=lambda: libc.prlimit(os.getpid(), resource.RLIMIT_NOFILE, None, None),
    own_processors=lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)),
    flags=lambda: fcntl.fcntl(1, fcntl.F_GETFL),
    terminal=lambda: fcntl.ioctl(1, 0x541B, bytes(4)),
    file_of_parents_memory=lambda: os.close(os.open(f"/proc/{{parent}}/mem", os.O_RDWR)),
)"""
    )
    assert answers.pop("file_of_parents_memory") in (0, errno.EACCES)  # the system's answer, not the filter's
    works = {"open", "local", "code", "thread", "write", "own_limits", "limits_by_its_number", "own_processors"}
    works |= {"flags", "terminal"}
    assert answers == {name: 0 if name in works else errno.EPERM for name in answers}


@filtered
def test_threads_that_already_run_are_filtered_too():
    """DALI's threads are older than the filter."""
    script = f"""
go, told = threading.Event(), []
late = threading.Thread(target=lambda: go.wait() and told.append(refusal(lambda: os.kill(parent, 0))))
late.start()
{WORKER}
go.set()
late.join()
tell(late=lambda: (_ for _ in ()).throw(OSError(told[0], "")))"""
    assert refusals(script) == {"late": errno.EPERM}


@filtered
@pytest.mark.skipif(machine != "x86_64", reason="only x86_64 has other ways to call the kernel")
@pytest.mark.parametrize("call", ["x32", "i386"])
def test_calls_by_another_machines_numbers_end_the_process(call):
    """Each is getpid; b8 14 00 00 00 cd 80 c3: mov eax, 20; int 0x80; ret."""
    script = f"""
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex("b814000000cd80c3"))
i386 = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
x32 = lambda: libc.syscall(0x40000000 | 39)
{WORKER}
tell(call={call})"""
    assert confined(script).returncode == -signal.SIGSYS


@pytest.mark.parametrize(("name", "column"), [("x86_64-linux-gnu/asm/unistd_64.h", 0), ("asm-generic/unistd.h", 1)])
def test_numbers_are_the_kernels(name, column):
    header = Path("/usr/include") / name
    if not header.exists():
        pytest.skip("the kernel's headers are not installed")
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+) +(\d+)", header.read_text()))
    found |= {"mmap": found.get("mmap", found.get("mmap2"))}
    expected = {call: str(numbers[column]) for call, numbers in confinement.NUMBERS.items() if numbers[column] >= 0}
    assert {call: found.get(call) for call in expected} == expected


@pytest.mark.parametrize("machine", confinement.MACHINES)
@pytest.mark.parametrize("gpu", [False, True])
def test_the_filter_is_whole_on_every_machine(machine, gpu):
    """Each call of the list is asked for, no step skips past the end, and the last step decides."""
    steps = list(confinement.STEP.iter_unpack(confinement.program(machine, 1, gpu=gpu)))
    column = confinement.MACHINES[machine][1]
    names = (confinement.NEVER_ON_A_GPU if gpu else confinement.NEEDED).split()
    numbers = {confinement.NUMBERS[name][column] for name in names} - {-1}
    assert numbers <= {value for code, _, _, value in steps if code == confinement.EQUAL}
    assert all(at + 1 + max(yes, no) < len(steps) for at, (_, yes, no, _) in enumerate(steps[:-1]))
    assert steps[-1] == (confinement.RETURN, 0, 0, confinement.ALLOW if gpu else confinement.REFUSE)


def status_of(opened) -> dict[str, str]:
    text = Path(f"/proc/{opened._workers[0]._process.pid}/status").read_text()
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


@filtered
def test_the_worker_of_a_video_is_filtered(tmp_path, caplog):
    with open_video(barcode_video(tmp_path / "a.mp4", 40, (640, 480))) as opened:
        status = status_of(opened)
    assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
    assert caplog.records == []


WITHOUT = {
    "unknown machine": (
        "import types; os.uname = lambda: types.SimpleNamespace(sysname='Linux', machine='riscv64')",
        "no filter is known for Linux on riscv64",
    ),
    "kernel without": (
        "import ctypes; load = ctypes.CDLL\n"
        "class Without:\n"
        "    def __init__(self, *args, **kwargs): self.prctl = load(None).prctl\n"
        "    def syscall(self, *args): ctypes.set_errno(38); return -1\n"
        "ctypes.CDLL = Without",
        "the kernel refuses: Function not implemented",
    ),
    "thread with another filter": (
        "import ctypes; load = ctypes.CDLL\n"
        "class Without:\n"
        "    def __init__(self, *args, **kwargs): self.prctl = load(None).prctl\n"
        "    def syscall(self, *args): return 7\n"
        "ctypes.CDLL = Without",
        "the kernel refuses: thread 7 has another filter",
    ),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_without_a_filter_videos_are_decoded_and_the_log_says_so_once(tmp_path, monkeypatch, caplog, name):
    lines, reason = WITHOUT[name]
    script = tmp_path / "decode_worker.py"
    script.write_text(
        f"import os, runpy\n{lines}\nrunpy.run_path({decode_worker.__file__!r}, run_name='__main__')\n", "utf-8"
    )
    monkeypatch.setattr(decode_worker, "__file__", str(script))
    decoding._say_once.cache_clear()
    path = barcode_video(tmp_path / "a.mp4", 3)
    for _ in range(2):
        with open_video(path) as opened:
            assert [read_barcode(picture) for _, picture in opened.frames()] == [0, 1, 2]
            assert opened.damage == ""
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.records[0].getMessage().endswith(f"without a filter on system calls: {reason}")
    decoding._say_once.cache_clear()
