"""The kernel's filter on a decoding process (seccomp): what it may still ask for once its libraries are loaded.

A decoder that a hostile video has taken over can then compute, start threads, read that video and write to its pipe and
its log. It cannot open, create, rename or look up files, make sockets, start programs or processes, trace or signal
others, or make memory executable. What it asks for beyond that answers "not permitted" and it goes on, because
libraries try odd things (FFmpeg looks for a table of characters, dav1d names its threads); a call by another kind of
machine's numbers ends the process. With a GPU's decoder the filter is weak: see NEVER_ON_A_GPU.

Linux on x86_64 and aarch64. A network namespace would add nothing, as there is no way to a socket, and many machines
let no user make one. RLIMIT_NPROC cannot stand for the filter: it counts the threads of all processes of the user, the
decoder's own too, and does not bind root. This file imports the standard library alone.
"""

import ctypes
import errno
import os
import struct

STEP = struct.Struct("=HBBI")  # of a filter: code, steps to skip where it holds, where it does not, value
LOAD, RETURN = 0x20, 0x06  # BPF_LD | BPF_W | BPF_ABS, BPF_RET | BPF_K
EQUAL, AT_LEAST, ANY_BIT = 0x15, 0x35, 0x45  # BPF_JMP | BPF_K and BPF_JEQ, BPF_JGE, BPF_JSET
NUMBER_AT, MACHINE_AT, ARGUMENTS_AT = 0, 4, 16  # in struct seccomp_data; the low half of a 64-bit argument comes first
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000  # SECCOMP_RET_ALLOW, _KILL_PROCESS, _ERRNO
REFUSE, MISSING = FAIL | errno.EPERM, FAIL | errno.ENOSYS

SET_MODE_FILTER, ALL_THREADS = 1, 1  # SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38
X32 = 0x40000000  # added to the number of a call that takes 32-bit pointers
CLONE_THREAD, PROT_EXEC, AF_UNIX = 0x10000, 0x4, 1
SET_OWNER = (8, 10, 15)  # of fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX; the kernel then sends signals to the owner
TO_OTHERS = (0x8901, 0x8902, 0x5410, 0x5412, 0x541C)  # of ioctl: FIOSETOWN, SIOCSPGRP, TIOCSPGRP, TIOCSTI, TIOCLINUX

MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_*, column of NUMBERS
NUMBERS = {  # of the calls; -1: there is none
    "write": (1, 64),
    "close": (3, 57),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "ioctl": (16, 29),
    "pread64": (17, 67),
    "writev": (20, 66),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "socket": (41, 198),
    "clone": (56, 220),
    "fork": (57, -1),
    "vfork": (58, -1),
    "execve": (59, 221),
    "exit": (60, 93),
    "kill": (62, 129),
    "fcntl": (72, 25),
    "gettimeofday": (96, 169),
    "ptrace": (101, 117),
    "rt_sigqueueinfo": (129, 138),
    "sigaltstack": (131, 132),
    "setpriority": (141, 140),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "mount": (165, 40),
    "umount2": (166, 39),
    "init_module": (175, 105),
    "delete_module": (176, 106),
    "gettid": (186, 178),
    "tkill": (200, 130),
    "time": (201, -1),
    "futex": (202, 98),
    "sched_setaffinity": (203, 122),
    "sched_getaffinity": (204, 123),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "tgkill": (234, 131),
    "kexec_load": (246, 104),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "unshare": (272, 97),
    "set_robust_list": (273, 99),
    "move_pages": (279, 239),
    "rt_tgsigqueueinfo": (297, 240),
    "perf_event_open": (298, 241),
    "prlimit64": (302, 261),
    "open_by_handle_at": (304, 265),
    "setns": (308, 268),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "finit_module": (313, 273),
    "sched_setattr": (314, 274),
    "seccomp": (317, 277),
    "getrandom": (318, 278),
    "kexec_file_load": (320, 294),
    "bpf": (321, 280),
    "execveat": (322, 281),
    "userfaultfd": (323, 282),
    "rseq": (334, 293),
    "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "pidfd_open": (434, 434),
    "clone3": (435, 435),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "mount_setattr": (442, 442),
}

# what Python, FFmpeg and DALI without a GPU ask for while they decode, and what a C library may ask for them
NEEDED = """
    futex write pread64 brk mmap munmap mremap mprotect madvise rt_sigprocmask rt_sigaction rt_sigreturn sigaltstack
    clone clone3 set_robust_list rseq gettid getpid tgkill exit exit_group sched_yield sched_getaffinity restart_syscall
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time getrandom lseek writev close
"""
# CUDA opens devices, maps code, may keep files of its own and may ask its daemons through AF_UNIX. With a GPU only what
# no decoder has a use for is refused: a stricter list cannot be vouched for without trying every driver. A filter sees
# no path, so every file that the user can open stays open, /proc/PID/mem of the parent among them where the system lets
# a process read its parent's memory, and so does every local service.
NEVER_ON_A_GPU = """
    execve execveat fork vfork clone clone3 socket ptrace process_vm_readv process_vm_writev pidfd_open pidfd_getfd
    pidfd_send_signal kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo io_uring_setup io_uring_enter
    io_uring_register bpf perf_event_open userfaultfd add_key request_key keyctl unshare setns mount umount2 pivot_root
    chroot open_tree move_mount fsopen fsmount fspick mount_setattr init_module finit_module delete_module kexec_load
    kexec_file_load open_by_handle_at process_madvise setpriority ioprio_set fcntl ioctl prlimit64 sched_setaffinity
    sched_setparam sched_setscheduler sched_setattr migrate_pages move_pages
"""
# their first argument is a process, 0 the caller: with a GPU a decoder may name itself alone
OF_ITSELF = "prlimit64 sched_setaffinity sched_setparam sched_setscheduler sched_setattr migrate_pages move_pages"


def restrict(*, gpu: bool = False) -> str:
    """Sets the filter for every thread of this process, for good. ``gpu``: the filter that CUDA can work under.

    Returns:
        Why this process has no filter; "" where it has one.
    """
    machine = os.uname().machine
    if os.uname().sysname != "Linux" or machine not in MACHINES or struct.calcsize("P") != 8:
        return f"no filter is known for {os.uname().sysname} on {machine}"
    libc = ctypes.CDLL(None, use_errno=True)
    if not gpu:  # CUDA may read of itself what only a dumpable process can
        libc.prctl(PR_SET_DUMPABLE, *[ctypes.c_ulong(0)] * 4)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))):
        return f"the kernel refuses: {os.strerror(ctypes.get_errno())}"
    steps = program(machine, os.getpid(), gpu=gpu)
    buffer = ctypes.create_string_buffer(steps, len(steps))
    head = struct.pack("@HP", len(steps) // STEP.size, ctypes.addressof(buffer))
    number = NUMBERS["seccomp"][MACHINES[machine][1]]
    arguments = map(ctypes.c_long, (number, SET_MODE_FILTER, ALL_THREADS))
    failed = libc.syscall(*arguments, head)
    if failed > 0:
        return f"the kernel refuses: thread {failed} has another filter"
    return f"the kernel refuses: {os.strerror(ctypes.get_errno())}" if failed else ""


def program(machine: str, pid: int, *, gpu: bool) -> bytes:
    """The filter's steps for process ``pid`` on a machine of MACHINES."""
    architecture, column = MACHINES[machine]
    checked = {  # argument, test, value or values, answer where it holds for one of them, where it does not
        "clone": (0, ANY_BIT, CLONE_THREAD, ALLOW, REFUSE),
        "mmap": (2, ANY_BIT, PROT_EXEC, REFUSE, ALLOW),
        "mprotect": (2, ANY_BIT, PROT_EXEC, REFUSE, ALLOW),
        "tgkill": (0, EQUAL, pid, ALLOW, REFUSE),
        "socket": (0, EQUAL, AF_UNIX, ALLOW, REFUSE),
        "fcntl": (1, EQUAL, SET_OWNER, REFUSE, ALLOW),
        "ioctl": (1, EQUAL, TO_OTHERS, REFUSE, ALLOW),
        **dict.fromkeys(OF_ITSELF.split(), (0, EQUAL, (0, pid), ALLOW, REFUSE)),
    }
    steps = [(LOAD, 0, 0, MACHINE_AT), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER_AT)]
    if machine == "x86_64":
        steps += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)]
    for name in (NEVER_ON_A_GPU if gpu else NEEDED).split():
        number = NUMBERS[name][column]
        if number < 0:
            continue
        if name in checked:
            argument, test, value, yes, no = checked[name]
            values = value if isinstance(value, tuple) else (value,)
            steps += [(EQUAL, 0, 3 + len(values), number), (LOAD, 0, 0, ARGUMENTS_AT + 8 * argument)]
            steps += [(test, len(values) - place, 0, value) for place, value in enumerate(values)]
            steps += [(RETURN, 0, 0, no), (RETURN, 0, 0, yes)]
        else:  # its flags lie in memory, where no filter looks; without it C libraries take clone
            answer = MISSING if name == "clone3" else REFUSE if gpu else ALLOW
            steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, answer)]
    steps.append((RETURN, 0, 0, ALLOW if gpu else REFUSE))
    return b"".join(STEP.pack(*step) for step in steps)
