"""The launcher of `sandbox`: enters the namespaces, then forks a restricted process for each run. A script.

Arguments: descriptors of the job (lines of JSON: first what all runs share, then the runs) and of the report's pipe,
where it writes "ready" and for each run an `Outcome` as JSON. It runs with ``-I -S``, so it uses the standard library
alone. A failure before a run's own "ready" is the sandbox's.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
PR_SET_NO_NEW_PRIVS, CAPABILITY_VERSION_3 = 38, 0x20080522
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
MAX_REPORT = 1 << 16
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin")


def system(call, *arguments):
    """Call a function of the C library; raise OSError if it fails."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, call)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), call + ": " + os.strerror(ctypes.get_errno()))


def enter_namespaces(mounts):
    """Unshare network, IPC and PID namespaces, and with ``mounts`` the mount namespace."""
    import ctypes

    flags = CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWPID | (CLONE_NEWNS if mounts else 0)
    user, group = os.geteuid(), os.getegid()
    system("unshare", ctypes.c_int(flags if user == 0 else flags | CLONE_NEWUSER))
    if user != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def become_child(keep):
    """Fork: the child is the first process of its PID namespace, and all others in it die with it."""
    child = os.fork()
    if child == 0:
        return
    for end in keep:
        os.close(end)

    def stop(*_):
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGTERM, stop)
    while True:
        try:
            status = os.waitpid(child, 0)[1]
            break
        except InterruptedError:
            continue
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def build_root(root):
    """Change the root to a folder with only the system's libraries and the interpreter, read-only."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=32m,mode=755")
    for path in dict.fromkeys((*SYSTEM, sys.base_prefix, sys.base_exec_prefix, *DEVICES)):  # a prefix may be /usr
        if not os.path.exists(path) or any(path.startswith(done + "/") for done in SYSTEM):
            continue
        inside = root + path
        os.makedirs(os.path.dirname(inside), mode=0o755, exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
        elif path in DEVICES:
            open(inside, "w").close()
            mount(path, inside, None, MS_BIND)
        else:
            os.mkdir(inside, 0o755)
            mount(path, inside, None, MS_BIND)
            mount("none", inside, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    for name in ("/run", "/tmp"):
        os.mkdir(root + name)
        os.chmod(root + name, 0o777)
    os.chroot(root)
    os.chdir("/")


def mount(source, target, kind, flags, options=None):
    import ctypes

    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    system("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])


def enter_folder(job):
    """Change to an empty folder; in the jail no run sees what another wrote."""
    if job["level"] == "jail":
        import ctypes

        system("unshare", ctypes.c_int(CLONE_NEWNS))
        for path in ("/run", "/tmp"):
            mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, "size=32m,mode=777")
        os.chdir("/run")
        return
    path = os.path.join(job["folder"], os.urandom(8).hex())
    os.mkdir(path)
    os.chmod(path, 0o777 if job["user"] is not None else 0o700)
    os.chdir(path)


def block_sockets():
    """Disable Python's sockets, where there is no namespace. A program can bypass it."""
    import _socket

    def refuse(*args, **kwargs):
        raise PermissionError("no network in the sandbox")

    class NoSocket(_socket.socket):  # a class, because the socket module derives its own from it
        __slots__ = ()
        __init__ = refuse

    _socket.socket = _socket.SocketType = NoSocket
    for name in ("socketpair", "getaddrinfo", "gethostbyname", "gethostbyname_ex"):
        setattr(_socket, name, refuse)


def limit(job):
    import resource

    def at_most(kind, value):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))

    at_most(resource.RLIMIT_CORE, 0)
    at_most(resource.RLIMIT_FSIZE, job["file_size"])
    at_most(resource.RLIMIT_NOFILE, job["open_files"])
    at_most(resource.RLIMIT_CPU, job["cpu"])
    if sys.platform == "linux":  # macOS refuses address-space limits
        at_most(resource.RLIMIT_AS, job["memory"])
    if hasattr(resource, "RLIMIT_NPROC"):
        at_most(resource.RLIMIT_NPROC, 0)


def give_up_rights(user):
    import ctypes  # before the user changes: nobody may be unable to read it

    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    if sys.platform == "linux":
        system("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
        system("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def run_in_child(job, run, token_end, report_end):
    """Restrict this process, run the program, and report; never returns."""
    write, read, leave = os.write, os.read, os._exit  # the program may replace these names, in `os` and in builtins
    execute, translate, failure, kind, show = exec, compile, BaseException, type, float.__repr__
    number, integer, truth = float, int, bool
    try:
        enter_folder(job)
        limit(job)
        give_up_rights(job["user"])
        arguments = json.loads(run.get("arguments", "[]"))
        sys.argv[:] = ["program.py"]
        os.environ.clear()  # Python itself puts LC_CTYPE there
        space = {"__name__": "__main__", "__builtins__": __builtins__}
    except BaseException as error:
        write(report_end, f"set-up failed: {type(error).__name__}: {error}\n".encode())
        leave(1)
    write(report_end, b"ready\n")
    value = 1.0
    try:
        tests = translate(run["tests"], "tests.py", "exec") if "tests" in run else None
        execute(translate(job["program"], "program.py", "exec"), space)
        if tests is not None:
            execute(tests, space)
        else:
            value = space[run["function"]](*arguments)
            if kind(value) not in (number, integer, truth):
                raise TypeError(f"{run['function']} returned a {kind(value).__name__}, not a number")
            value = number(value)
    except failure as error:  # SystemExit too: a program that leaves before its tests has not passed them
        try:
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
        except BaseException:
            reason = "an error that cannot be printed"
        write(report_end, f"{reason}\n".encode("utf-8", "replace"))
        leave(1)
    write(report_end, b"passed " + read(token_end, 64) + b" " + show(value).encode() + b"\n")
    leave(0)


def run_once(job, run, keep):
    """Run in a child process and return its `Outcome` as a dictionary."""
    token_out, token_in = os.pipe()
    report_out, report_in = os.pipe()
    child = os.fork()
    if child == 0:
        for end in (*keep, token_in, report_out):
            os.close(end)
        run_in_child(job, run, token_out, report_in)
    token = os.urandom(16).hex()  # after the fork: no run has it in memory
    os.write(token_in, token.encode())  # waits in the pipe's buffer
    for end in (token_out, token_in, report_in):
        os.close(end)
    report, late = read_report(report_out, time.monotonic() + job["wall"])
    os.close(report_out)
    ended, status = os.waitpid(child, os.WNOHANG)
    patience = time.monotonic() + 1
    while not ended and not late and time.monotonic() < patience:
        time.sleep(0.001)
        ended, status = os.waitpid(child, os.WNOHANG)
    if os.getpid() == 1:  # all others of the PID namespace
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return outcome(report.decode("utf-8", "replace").splitlines(), token, late, bool(ended), status)


def read_report(end, deadline):
    """Read until the other side closes; also return True if the deadline came first."""
    report = b""
    while len(report) < MAX_REPORT:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([end], [], [], left)[0]:
            return report, True
        part = os.read(end, 4096)
        if not part:
            break
        report += part
    return report, False


def outcome(lines, token, late, ended, status):
    # "ready" is sent just before the program starts: an earlier failure is the sandbox's, a later one the program's
    if "ready" not in lines[:1]:
        return {"kind": "sandbox", "detail": (lines or ["no start in time" if late else "the run died"])[0]}
    for line in lines[1:]:
        words = line.split(" ")
        if words[:2] == ["passed", token] and len(words) == 3:
            return {"kind": "passed", "value": float(words[2])}
    if late:
        return {"kind": "timeout", "detail": "still running at the wall-clock limit"}
    if not ended:
        return {"kind": "failed", "detail": "closed its pipes and went on"}
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return {"kind": "timeout", "detail": "out of CPU time"}
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return {"kind": "failed", "detail": lines[1][:300] if len(lines) > 1 else f"ended early with status {code}"}


def main():
    source, report_end = map(int, sys.argv[1:3])
    with open(source, "rb") as lines:
        try:
            job = json.loads(lines.readline())
            if job["level"] == "plain":
                block_sockets()
            else:
                enter_namespaces(mounts=job["level"] == "jail")
                become_child((source, report_end))
                if job["level"] == "jail":
                    build_root(job["folder"])
            os.write(report_end, b"ready\n")
            for line in lines:
                result = run_once(job, json.loads(line), (source, report_end))
                os.write(report_end, json.dumps(result).encode() + b"\n")
        except BaseException as error:
            os.write(report_end, f"set-up failed: {type(error).__name__}: {error}\n".encode())
            os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
