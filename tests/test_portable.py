"""What runs on one system only is not used, and files are opened and replaced as every system allows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lit_unlearn"

FILE_OPERATIONS = "system/files.py"
"""The one module that replaces, renames and removes files."""
POSIX_ONLY = {
    *("crypt", "fcntl", "grp", "nis", "posix", "pty", "pwd", "resource", "spwd", "syslog", "termios", "tty"),
}
"""Modules that Windows does not have."""
ALLOWED = {("system/memory.py", "resource")}
"""Where one of them is imported, behind a question for the system."""
POSIX_ATTRIBUTES = {
    "os": {
        *("chown", "chroot", "fchmod", "fchown", "fork", "forkpty", "getegid", "geteuid", "getgid", "getgroups"),
        *("getloadavg", "getpgid", "getpgrp", "getpriority", "getsid", "getuid", "kill", "killpg", "lchown", "mkfifo"),
        *("mknod", "nice", "pathconf", "posix_spawn", "register_at_fork", "sched_getaffinity", "setpgid", "setsid"),
        *("setuid", "statvfs", "sync", "sysconf", "uname", "wait", "WEXITSTATUS", "O_NOFOLLOW", "O_DIRECTORY"),
    },
    "signal": {
        *("SIGALRM", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGTSTP", "SIGUSR1"),
        *("SIGUSR2", "SIGWINCH", "alarm", "pause", "pthread_kill", "setitimer", "sigwait"),
    },
    "time": {"tzset", "clock_settime"},
}
"""Attributes of modules that Windows does not have, or that do something else there."""
KNOWN_NUMBERS = {
    *("EACCES", "EBADF", "EDQUOT", "EEXIST", "EFBIG", "EINTR", "EINVAL", "EIO", "EISDIR", "EMFILE", "ENOENT", "ENOMEM"),
    *("ENOSPC", "ENOTDIR", "ENOTEMPTY", "EPERM", "EPIPE", "EROFS", "EXDEV"),
}
"""Names in ``errno`` that all systems have; a missing one ends the import."""
REPLACING = {
    "os": {"link", "remove", "removedirs", "rename", "renames", "replace", "rmdir", "symlink", "truncate", "unlink"},
    "shutil": {"copy", "copy2", "copytree", "move", "rmtree"},  # copies with the mode, which may forbid to replace
    "tempfile": {"mkdtemp", "mkstemp", "NamedTemporaryFile", "TemporaryDirectory", "TemporaryFile"},
}
"""Functions for that one module."""
PATH_METHODS = {"hardlink_to", "rename", "rmdir", "symlink_to", "unlink"}
"""Methods of ``Path`` for that one module; ``replace`` is known by its one argument."""


def dotted(node: ast.AST) -> str:
    """``a.b`` for the attribute ``b`` of the name ``a``, else nothing."""
    return (
        f"{node.value.id}.{node.attr}" if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ""
    )


def faults(source: str, name: str) -> Iterator[str]:
    """What in the module ``name`` of the package does not run on every system."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (
                f"{node.lineno}: {module} is not on Windows"
                for module in modules
                if module.split(".")[0] in POSIX_ONLY and (name, module) not in ALLOWED
            )
            if isinstance(node, ast.ImportFrom) and node.module in {*POSIX_ATTRIBUTES, *REPLACING, "errno"}:
                yield f"{node.lineno}: import {node.module} itself, so that its functions are seen"
        library, _, attribute = dotted(node).partition(".")
        if attribute in POSIX_ATTRIBUTES.get(library, ()):
            yield f"{node.lineno}: {library}.{attribute} is not on Windows"
        if library == "errno" and attribute not in KNOWN_NUMBERS:
            yield f"{node.lineno}: errno.{attribute} is not on every system"
        if name == FILE_OPERATIONS:
            if (library, attribute) == ("os", "rename"):
                yield f"{node.lineno}: os.rename does not replace a file on Windows"
        elif attribute in REPLACING.get(library, ()):
            yield f"{node.lineno}: {library}.{attribute} belongs to {FILE_OPERATIONS}"
        options = {keyword.arg for keyword in node.keywords} if isinstance(node, ast.Call) else set()
        if {"num_workers", "multiprocessing_context"} & options:
            yield f"{node.lineno}: Windows spawns processes: test first that what they are given can be pickled"
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and not dotted(node.func).startswith("re.")
        ):
            method, count = node.func.attr, len(node.args) + len(node.keywords)
            if name != FILE_OPERATIONS and (method in PATH_METHODS or (method == "replace" and count == 1)):
                yield f"{node.lineno}: .{method}() belongs to {FILE_OPERATIONS}"


def in_the_systems_encoding(source: str) -> Iterator[str]:
    """Where text is opened without an encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        library = dotted(node.func).partition(".")[0]
        if "encoding" in options or None in options:
            continue
        if function in ("read_text", "write_text"):
            yield f"{node.lineno}: {function}"
        elif function == "open" and library not in ("Image", "os"):
            first = 1 if isinstance(node.func, ast.Name) or library == "io" else 0
            modes = [options["mode"]] if "mode" in options else node.args[first : first + 1]
            if not any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes):
                yield f"{node.lineno}: open"
        elif library == "subprocess" and {"text", "universal_newlines"} & set(options):
            yield f"{node.lineno}: {function}"


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_is_of_one_system_only(path: Path) -> None:
    assert list(faults(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix())) == []


@pytest.mark.parametrize("folder", ["lit_unlearn", "tests", "benchmarks"])
def test_text_is_opened_with_an_encoding(folder: str) -> None:
    found = {
        path.relative_to(ROOT).as_posix(): list(in_the_systems_encoding(path.read_text(encoding="utf-8")))
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {path: places for path, places in found.items() if places} == {}


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("import resource", False),
        ("def later():\n    from fcntl import flock", False),
        ("import signal\nsignal.signal(signal.SIGINT, f)", True),
        ("import signal\nsignal.signal(signal.SIGUSR1, f)", False),
        ("from signal import SIGUSR1", False),
        ("import os\nos.getpid()", True),
        ("import os\nos.kill(1, 9)", False),
        ("import errno\nerrno.ENOSPC", True),
        ("import errno\nerrno.EKEYREJECTED", False),
        ("import os\nos.replace(a, b)", False),
        ("import shutil\nshutil.copyfile(a, b)", True),
        ("import shutil\nshutil.rmtree(a)", False),
        ("path.unlink()", False),
        ("path.replace(other)", False),
        ("text.replace(a, b)", True),
        ("DataLoader(data, batch_size=2)", True),
        ("DataLoader(data, num_workers=2)", False),
    ],
)
def test_a_fault_is_seen(source: str, allowed: bool) -> None:
    assert (list(faults(source, "export.py")) == []) is allowed


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("path.read_text()", False),
        ("path.read_text(encoding='utf-8')", True),
        ("path.open()", False),
        ("path.open('rb')", True),
        ("open(path, 'w')", False),
        ("open(path, mode='wb')", True),
        ("Image.open(path)", True),
        ("subprocess.run(command, text=True)", False),
        ("subprocess.run(command, capture_output=True)", True),
    ],
)
def test_text_without_an_encoding_is_seen(source: str, allowed: bool) -> None:
    assert (list(in_the_systems_encoding(source)) == []) is allowed
