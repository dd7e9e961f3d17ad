"""Runs code that nobody has read: a script of the standard library alone, started by sandbox.py, which confines itself.

Two processes make a verdict. One has the model's code, the other the tests; the tests call the code through a pipe on
which plain values go, as JSON. So the code cannot reach the tests, their verdict, or the way it is reported.

Each process, before it runs what it was given:
  limits itself (processor time, memory, size and number of files, no core dump, no further process);
  in mode "namespaces", gets user, mount, process, network and IPC namespaces of its own, with a small tmpfs;
  in modes "namespaces" and "landlock", drops all capabilities; can read libraries alone, and write in that tmpfs alone,
    by Landlock; can make no system call but those of SYSCALLS, by seccomp: no socket, process, thread, signal, program.
"""

import builtins
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import types
from typing import Any

MODES = ("namespaces", "landlock", "none")
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# name, number on x86_64, number on aarch64 (asm/unistd.h); "-" where the machine has no such call.
SYSCALLS = """
read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, mmap 9 222,
mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, pipe 22 -, select 23 -, sched_yield 24 124,
mremap 25 216, madvise 28 233, dup 32 23, dup2 33 -, pause 34 -, nanosleep 35 101, getitimer 36 102, alarm 37 -,
setitimer 38 103, getpid 39 172, exit 60 93, uname 63 160, fsync 74 82, ftruncate 77 46, getdents 78 -, getcwd 79 17,
chdir 80 49, rename 82 -, mkdir 83 -, rmdir 84 -, unlink 87 -, readlink 89 -, umask 95 166, gettimeofday 96 169,
getrlimit 97 163, getrusage 98 165, sysinfo 99 179, times 100 153, getuid 102 174, getgid 104 176, geteuid 107 175,
getegid 108 177, getppid 110 173, getpgrp 111 -, sigaltstack 131 132, arch_prctl 158 -, gettid 186 178, time 201 -,
futex 202 98, sched_getaffinity 204 123, getdents64 217 61, restart_syscall 219 128, clock_gettime 228 113,
clock_getres 229 114, clock_nanosleep 230 115, exit_group 231 94, openat 257 56, mkdirat 258 34, newfstatat 262 79,
unlinkat 263 35, renameat 264 38, readlinkat 267 78, faccessat 269 48, pselect6 270 72, ppoll 271 73,
set_robust_list 273 99, dup3 292 24, pipe2 293 59, renameat2 316 276, getrandom 318 278, membarrier 324 283,
statx 332 291, rseq 334 293, faccessat2 439 439
"""
# The same, for calls that are allowed with these second arguments alone; others of fcntl and ioctl can send signals.
COMMANDS = {
    "fcntl 72 25": (0, 1, 2, 3, 4, 1030),  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
    "ioctl 16 29": (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),  # TCGETS, TIOCGWINSZ, FIO{NREAD,NBIO,NCLEX,CLEX}
}
CLONE = {"NEWNS": 0x20000, "NEWUTS": 0x4000000, "NEWIPC": 0x8000000, "NEWUSER": 0x10000000, "NEWPID": 0x20000000}
CLONE |= {"NEWNET": 0x40000000}
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 444, 445, 446
READ, READ_DIR, WRITE, TRUNCATE = 4, 8, 2, 1 << 14
CHANGE = WRITE | TRUNCATE | 16 | 32 | 128 | 256 | 1 << 13  # also remove, make and rename directories and files
LONGEST = 1 << 22  # bytes of a message between the two processes

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args) -> int:
    """Calls a function of the C library; raises OSError where it returns -1. Integers are passed as longs."""
    result = getattr(_libc, name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


# ------------------------------------------------------------------------------------------------------- confinement


def limit(request: dict) -> None:
    """Sets the limits of this process, which it cannot raise again."""
    ceilings = {
        "AS": request["memory"], "CPU": request["cpu"], "FSIZE": request["file_size"], "NOFILE": 64,
        "CORE": 0, "NPROC": 0, "MEMLOCK": 0, "MSGQUEUE": 0,
    }  # fmt: skip
    for name, most in ceilings.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def enter_namespaces(directory: str, size: int) -> None:
    """Goes on in a new process, the first of namespaces of its own; the old one waits and ends as the new one does."""
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", sum(CLONE.values()))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    options = f"size={size},nr_inodes=256,mode=700".encode()
    _call("mount", b"tmpfs", directory.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    child = os.fork()
    if child:
        os.closerange(0, 256)  # who waits for the end of a pipe is not to wait for this process
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else 128 - status)
    _call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def drop_capabilities() -> None:
    """Gives up all capabilities, which root and the first process of a user namespace have."""
    _call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))


def restrict_files(directory: str, *, writable: bool) -> None:
    """Forbids all access to files but reading libraries, /dev/null, and, where writable, all of `directory`."""
    version = _call("syscall", SYS_LANDLOCK_CREATE, None, 0, 1)
    handled = 0x1FFF | sum(1 << bit for since, bit in ((2, 13), (3, 14), (5, 15)) if version >= since)
    ruleset = _call("syscall", SYS_LANDLOCK_CREATE, struct.pack("Q", handled), 8, 0)
    stdlib, prefix = os.path.dirname(os.__file__), os.path.join(sys.base_prefix, "lib")
    libraries = (stdlib, prefix, "/lib", "/lib64", "/usr/lib", "/usr/lib64")
    rules = dict.fromkeys(libraries, READ | READ_DIR)
    rules |= {"/etc/ld.so.cache": READ, "/dev/null": READ | WRITE, "/dev/urandom": READ}
    rules[directory] = READ | READ_DIR | (CHANGE & handled if writable else 0)
    for path, access in rules.items():
        if os.path.exists(path):
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            _call("syscall", SYS_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", access, handle), 0)
            os.close(handle)
    _call("syscall", SYS_LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def restrict_calls() -> None:
    """Forbids all system calls but those of SYSCALLS and COMMANDS: EPERM. Those of another machine type kill."""
    machine = platform.machine()
    if machine not in AUDIT_ARCH:
        raise OSError(f"system calls of {machine} are not known here")

    def number(line: str) -> str:
        return line.split()[1 + list(AUDIT_ARCH).index(machine)]

    load, equal, back = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    kill, refuse, allow = 0x80000000, 0x00050000 | 1, 0x7FFF0000  # KILL_PROCESS, ERRNO of EPERM, ALLOW
    code = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[machine]), (back, 0, 0, kill), (load, 0, 0, 0)]
    for line in SYSCALLS.split(","):
        if number(line) != "-":
            code += [(equal, 0, 1, int(number(line))), (back, 0, 0, allow)]
    for line, commands in COMMANDS.items():
        code += [(equal, 0, 2 * len(commands) + 2, int(number(line))), (load, 0, 0, 24)]  # 24: second argument
        for command in commands:
            code += [(equal, 0, 1, command), (back, 0, 0, allow)]
        code.append((back, 0, 0, refuse))
    code.append((back, 0, 0, refuse))
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in code))
    header = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(program))
    _call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)


def confine(request: dict) -> None:
    """Does all of it, in the mode of the request; raises OSError where this system does not allow it."""
    _call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    directory, mode = request["directory"], request["mode"]
    if mode == "namespaces":
        enter_namespaces(directory, request["file_size"])
    os.chdir(directory)
    limit(request)
    if mode != "none":
        _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        drop_capabilities()
        restrict_files(directory, writable=mode == "namespaces")
        restrict_calls()


# ---------------------------------------------------------------------------------------- values between the processes


def to_json(value: Any) -> Any:
    """A plain value as JSON has it; raises TypeError for what is none."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return float(value) if isinstance(value, float) else int(value)
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[to_json(key), to_json(item)] for key, item in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [to_json(item) for item in value]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {type(value).__name__: list(value)}
    raise TypeError(f"a value of type {type(value).__name__} is not a plain one")


def from_json(value: Any) -> Any:
    """The value that to_json was given."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind, items = next(iter(value.items()))
    if kind == "complex":
        return complex(*items)
    if kind == "dict":
        return {from_json(key): from_json(item) for key, item in items}
    kinds = {"tuple": tuple, "set": set, "frozenset": frozenset, "bytes": bytes, "bytearray": bytearray}
    return kinds[kind](from_json(item) for item in items)


class Ended(Exception):
    """The program has ended, or answers what is no answer."""


def describe(error: BaseException) -> str:
    """The kind of an error and the beginning of its message."""
    try:
        return f"{type(error).__name__}: {error}"[:300].rstrip(": ")
    except BaseException:
        return type(error).__name__


# ---------------------------------------------------------------------------------------------- the two processes


def _module(name: str, *sources: str) -> dict:
    """Runs sources one after the other in a new module, and returns its names."""
    module = sys.modules[name] = types.ModuleType(name)
    for source in sources:
        exec(compile(source, f"<{name}>", "exec"), module.__dict__)
    return module.__dict__


def serve_answer(request: dict) -> None:
    """Runs the model's code, and answers the calls of the tests."""
    calls, results = os.fdopen(request["read"], "rb"), os.fdopen(request["write"], "wb")

    def send(message) -> None:
        results.write(json.dumps(message).encode() + b"\n")
        results.flush()

    send({"value": None})  # confined
    try:
        names, name = _module("answer", request["source"]), request["entry_point"]
        if name not in names:
            raise NameError(f"the program defines no {name}")
        send({"value": None})  # and loaded
        for line in calls:
            try:
                positional, named = from_json(json.loads(line))
                send({"value": to_json(names[name](*positional, **named))})
            except BaseException as error:  # SystemExit too
                send({"error": type(error).__name__, "text": describe(error)})
    except BaseException as error:
        send({"error": type(error).__name__, "text": describe(error)})


def run_tests(request: dict) -> None:
    """Runs the tests, and writes the verdict: {"reason": "" where they pass} or {"broken": why they do not run}."""
    calls, results = os.fdopen(request["write"], "wb"), os.fdopen(request["read"], "rb")

    def receive():
        line = results.readline(LONGEST)
        if not line.endswith(b"\n"):
            raise Ended("the program ended before its tests did" if len(line) < LONGEST else "the answer is too long")
        message = json.loads(line)
        if "error" not in message:
            return from_json(message["value"])
        kind = getattr(builtins, str(message["error"]), None)
        text = str(message["text"])
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise kind(text.removeprefix(f"{message['error']}: "))
        raise RuntimeError(text)

    def candidate(*positional, **named):
        call = json.dumps(to_json((positional, named)))
        try:
            calls.write(call.encode() + b"\n")
            calls.flush()
        except BrokenPipeError:
            raise Ended("the program ended before its tests did") from None
        return receive()

    def verdict() -> dict:
        try:
            receive()
        except BaseException:
            return {"unconfined": "the process of the program did not begin"}
        try:
            names = _module("tests", request["source"], request["tests"])
            check, names[request["entry_point"]] = names["check"], candidate
        except BaseException as error:
            return {"broken": describe(error)}
        try:
            receive()  # the program is loaded
            check(candidate)
        except Ended as error:
            return {"reason": str(error), "ended": True}
        except BaseException as error:
            return {"reason": describe(error)}
        return {"reason": ""}

    report(request, verdict())


def report(request: dict, verdict: dict) -> None:
    """Writes the verdict for the process that started this one; a program has no way to."""
    os.write(request["verdict"], json.dumps(verdict).encode())


ROLES = {"answer": serve_answer, "tests": run_tests, "probe": lambda request: report(request, {})}

if __name__ == "__main__":
    os.environ.clear()
    asked = json.load(sys.stdin)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    sys.set_int_max_str_digits(0)
    try:
        confine(asked)
    except OSError as problem:
        if "verdict" in asked:
            report(asked, {"unconfined": str(problem)})
        os._exit(1)
    ROLES[asked["role"]](asked)
    os._exit(0)
